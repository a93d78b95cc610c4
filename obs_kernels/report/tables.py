# SPDX-License-Identifier: Apache-2.0
"""Reports on a terminal: rich tables of plain dicts. rich is imported inside the functions."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import IO, Any

from obs_kernels.errors import MissingDependencyError
from obs_kernels.report.bench import TEXT_COLUMNS, bench_facts, bench_table, bench_title
from obs_kernels.report.markdown import runs_table
from obs_kernels.report.speed import SPEED_TEXT, speed_facts, speed_table
from obs_kernels.report.values import megabytes, number, score_columns, shape_text

_WIDE = 160
"""Columns off a terminal, where nothing may be cut."""
BENCH_WIDTH = 220
"""The same for the rows of a bench."""
_CELL_COLUMNS = (("pattern", 17), ("method", 13), ("update", 6), ("parts", 5))
_CELL_NUMBERS = (
    ("EM", "exact_match", ".2f", 6),
    ("F1", "f1", ".2f", 6),
    ("% of dense", "f1_share", ".1f", 10),
    ("predicted loss", "predicted_loss", ".4g", 14),
    ("sparsity", "sparsity", ".4f", 8),
    ("violations", "violations", ",d", 10),
    ("s", "seconds_prune", ".1f", 6),
)


def console(file: IO[str] | None = None, *, width: int = _WIDE) -> Any:
    """A rich console on ``file`` (None: stdout); plain and ``width`` columns wide where that is no terminal."""
    try:
        from rich.console import Console
    except ImportError:
        raise MissingDependencyError("tables need rich; pip install 'obs_kernels[cli]'") from None
    stream = sys.stdout if file is None else file
    terminal = stream.isatty()
    plain: dict[str, Any] = {} if terminal else {"width": width, "force_terminal": False, "color_system": None}
    return Console(file=stream, highlight=False, markup=False, emoji=False, soft_wrap=not terminal, **plain)


def plan_table(plan: dict[str, Any]) -> Any:
    """The layers of ``PruningPlan.to_dict()``."""
    table = _table(("layer", False), ("shape", True), ("pattern", False), ("D", True), ("Fisher", True), ("pass", True))
    table.add_column("note")
    for row in plan["layers"]:
        done = row["group"] >= 0
        table.add_row(
            row["name"],
            shape_text(row["shape"]),
            row["pattern"],
            str(row["block_size"]) if done else "-",
            megabytes(row["fisher_bytes"]) if done else "-",
            str(row["group"] + 1) if done else "-",
            row["reason"] if done else f"left out: {row['reason']}",
        )
    return table


def memory_lines(plan: dict[str, Any]) -> list[str]:
    """Fisher memory of each pass, the peak, and the budget, of ``PruningPlan.to_dict()``.

    In words, where a pass is not a group of layers: layer by layer, or without gradients.
    """
    passes: dict[int, tuple[int, int]] = {}
    for row in plan["layers"]:
        if row["group"] >= 0:
            count, size = passes.get(row["group"], (0, 0))
            passes[row["group"]] = (count + 1, size + row["fisher_bytes"])
    lines = [
        f"pass {group + 1} of {len(passes)}: {count} layers, Fisher {megabytes(size)}"
        for group, (count, size) in sorted(passes.items())
    ]
    peak = max((size for _, size in passes.values()), default=0)
    if plan["layer_by_layer"] or not peak:
        lines = [plan["way"]]
    sums = f"peak of the Fisher {megabytes(peak)}, budget {megabytes(plan['budget'])}"
    return [*lines, f"{plan['num_weights']:,} weights; {sums}"]


def accuracy_table(accuracy: dict[str, dict[str, Any]]) -> Any:
    """The scores of each model of a report's "accuracy"."""
    columns = score_columns(accuracy)
    table = _table(("", False), *((title, True) for title, _, _ in columns))
    for name, scores in accuracy.items():
        table.add_row(name, *(number(scores.get(key), spec) for _, key, spec in columns))
    return table


def backend_table(backends: dict[str, dict[str, str | None]], chosen: dict[str, str]) -> Any:
    """Op by backend: "default", "yes", or why not."""
    names = list(next(iter(backends.values()), {}))
    table = _table(("op", False))
    for name in names:
        table.add_column(name, overflow="fold")
    for op, row in backends.items():
        texts = (
            "default" if chosen.get(op) == name else "yes" if row[name] is None else str(row[name]) for name in row
        )
        table.add_row(op, *texts)
    return table


def checks_table(checks: Sequence[dict[str, Any]]) -> Any:
    """Results of ``ops.self_check``."""
    table = _table(
        ("op", False), ("backend", False), ("device", False), ("against brute force", False), ("detail", False)
    )
    for check in checks:
        table.add_row(
            check["op"], check["backend"], check["device"], "ok" if check["ok"] else "FAILED", check["detail"]
        )
    return table


class CellRows:
    """Prints cells of a comparison one by one, aligned under one head."""

    def __init__(self, target: Any) -> None:
        """Print to ``target``, a console of ``console``."""
        self.target = target
        self.started = False

    def add(self, cell: dict[str, Any]) -> None:
        """Print the row of ``CellResult.to_dict()``, and before the first one the head."""
        if not self.started:
            head = [*(name for name, _ in _CELL_COLUMNS), *(column[0] for column in _CELL_NUMBERS)]
            self._print(head)
            self._print(["─" * width for width in self._widths()])
            self.started = True
        texts = [str(cell[key]) for key in ("pattern", "method", "update")]
        values = [number(cell.get(key), spec) for _, key, spec, _ in _CELL_NUMBERS]
        self._print([*texts, str(cell.get("recomputations", 1)), *values])

    def _widths(self) -> list[int]:
        return [*(width for _, width in _CELL_COLUMNS), *(column[3] for column in _CELL_NUMBERS)]

    def _print(self, texts: Sequence[str]) -> None:
        from rich.table import Table

        row = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for index, width in enumerate(self._widths()):
            row.add_column(min_width=width, no_wrap=True, justify="left" if index < 3 else "right")
        row.add_row(*texts)
        self.target.print(row)


def print_report(report: dict[str, Any]) -> None:
    """The report of any job ("prune", "train", "eval", "demo", "plan", "doctor", "bench", "damping", ...) on stdout."""
    target = console(width=BENCH_WIDTH if report.get("job") in ("bench", "speed", "report") else _WIDE)
    match report.get("job"):
        case "plan":
            _print_plan(target, report)
        case "doctor":
            _print_doctor(target, report)
        case "bench":
            _print_bench_report(target, report)
        case "speed":
            print_speed(target, report)
        case "report":
            _print_merged(target, report)
        case "damping":
            _print_damping(target, report)
        case "compress" | "convert":
            _print_conversion(target, report)
        case _:
            _print_result(target, report)


def print_bench(target: Any, doc: dict[str, Any]) -> None:
    """Header and rows of one result of ``bench.run``; sizes apart by a line."""
    target.print(bench_title(doc))
    for line in bench_facts(doc):
        target.print(line)
    head, cells = bench_table(doc)
    table = _table(*((name, name not in TEXT_COLUMNS) for name in head))
    if "shape" in head:
        table.columns[head.index("shape")].no_wrap = True
    rows = doc["rows"]
    for index, row in enumerate(rows):
        # the rows of one problem end with its peers
        ends = "peer" in row["config"] and index + 1 < len(rows) and "peer" not in rows[index + 1]["config"]
        table.add_row(*cells[index], end_section=ends)
    target.print(table)


def print_speed(target: Any, doc: dict[str, Any]) -> None:
    """Facts and rows of one result of ``obs-kernels speed``; cells apart by a line."""
    target.print(f"speed of {doc.get('model')}")
    for line in speed_facts(doc):
        target.print(line)
    head, cells = speed_table(doc)
    if cells:
        table = _table(*((name, name not in SPEED_TEXT) for name in head))
        for index, row in enumerate(cells):
            table.add_row(*row, end_section=index + 1 < len(cells) and cells[index + 1][:2] != row[:2])
        target.print(table)
    for note in doc.get("notes") or ():
        target.print(f"note: {note}")


def _print_merged(target: Any, report: dict[str, Any]) -> None:
    if report["runs"]:
        head, rows = runs_table(report["runs"])
        table = _table(*((name, index > 2) for index, name in enumerate(head)))
        for row in rows:
            table.add_row(*row)
        target.print(table)
    for doc in report["speed"]:
        print_speed(target, doc | {"notes": []})
    _print_bench_report(target, report)


def _print_bench_report(target: Any, report: dict[str, Any]) -> None:
    for doc in report["bench"]:
        print_bench(target, doc)
    for note in report.get("notes") or ():
        target.print(f"note: {note}")
    for path in report.get("written") or ():
        target.print(f"written: {path}")


def _print_plan(target: Any, report: dict[str, Any]) -> None:
    """Layers, then how they would be pruned, by which gradients, and in what memory."""
    config, loss = report["config"], report["loss"]
    target.print(plan_table(report["plan"]))
    damp = number(config["damp"], "g") if config["damp"] is not None else f"{config['dampening_frac']:g} of the mean"
    what = f"{config['num_grads']} gradients ({config['gradients']}) of the {loss}" if loss else "no gradients"
    target.print(
        f"{config['curvature']} curvature, {config['method']} choice, {config['update']} update, damping {damp}; {what}"
    )
    target.print(f"stages: {', '.join(report['stages'])}")
    for line in (*memory_lines(report["plan"]), *(f"note: {note}" for note in report["notes"])):
        target.print(line)


def _print_result(target: Any, report: dict[str, Any]) -> None:
    """Accuracy, sizes and notes; layers and comparison are in the report's files."""
    target.print(accuracy_table(report["accuracy"]))
    sizes = report.get("sizes") or {}
    for name, size in sizes.items():
        target.print(f"{name}: {megabytes(size)}, {number(size / sizes['dense'], '.3f')} of dense")
    packed = report.get("packed")
    if packed and packed.get("max_difference") is not None:
        target.print(f"packed against dense, read back: largest difference {number(packed['max_difference'], '.3g')}")
    for note in report.get("notes") or ():
        target.print(f"note: {note}")
    target.print(f"{number(report.get('seconds'), '.1f')} s")


def _print_damping(target: Any, report: dict[str, Any]) -> None:
    """F1 by damping and number of gradients, for each pattern; and the best of each."""
    rows = report["rows"]
    damps, counts = (sorted({row[key] for row in rows}) for key in ("damp", "num_grads"))
    target.print(f"dense: F1 {number(report['accuracy']['dense']['f1'], '.2f')}")
    for pattern in dict.fromkeys(row["pattern"] for row in rows):
        found = {(row["num_grads"], row["damp"]): row for row in rows if row["pattern"] == pattern}
        table = _table((f"{pattern}: F1", False), *((f"damp {damp:g}", True) for damp in reversed(damps)))
        for count in counts:
            cells = (found.get((count, damp), {}) for damp in reversed(damps))
            texts = ("failed" if "failed" in cell else number(cell.get("f1"), ".2f") for cell in cells)
            table.add_row(f"{count} gradients", *texts)
        target.print(table)
    for pattern, row in report["best"].items():
        target.print(
            f"best at {pattern}: damp {row['damp']:g} with {row['num_grads']} gradients, F1 {number(row['f1'], '.2f')}"
        )
    for note in report.get("notes") or ():
        target.print(f"note: {note}")


def _print_conversion(target: Any, report: dict[str, Any]) -> None:
    """Layers by pattern, those that stayed dense with the reason, and sizes."""
    kinds = Counter(report["layers"].values())
    target.print(f"{report['from']} to {report['to']}: {report['out']}")
    for pattern, count in sorted(kinds.items()):
        target.print(f"  {count} layers of {pattern}")
    for name, reason in report["dense_layers"].items():
        target.print(f"  dense: {name}: {reason}")
    first, second = report["sizes"].values()
    target.print(f"weights: {megabytes(first)} before, {megabytes(second)} now, {number(second / first, '.3f')} of it")
    if report.get("verified"):
        target.print(f"read back: all {report['verified']} tensors are as in the source, bit for bit")
    for note in report.get("notes") or ():
        target.print(f"note: {note}")


def _print_doctor(target: Any, found: dict[str, Any]) -> None:
    target.print("obs-kernels doctor (paste this into an issue)\n")
    for name, value in found["environment"].items():
        target.print(f"  {name}: {value}")
    for index, gpu in enumerate(found["gpus"]):
        target.print(f"  GPU {index}: {gpu['name']}, sm {gpu['sm']}, {megabytes(gpu['bytes'])}")
    if not found["gpus"]:
        cuda = found["cuda_of_torch"]
        target.print(f"  GPUs: none that torch sees (it was built {f'for CUDA {cuda}' if cuda else 'without CUDA'})")
    built = found["compiled"]
    names = ", ".join(map(str, built.get("architectures") or ()))
    target.print(f"  compiled module _C: {f'built, {names}' if built['built'] else built['reason']}\n")
    target.print(f"Backends for {found['device_type']} tensors:")
    target.print(backend_table(found["backends"], found["default_backends"]))
    target.print("Each op on tiny tensors:")
    target.print(checks_table(found["checks"]))
    failed = sum(not check["ok"] for check in found["checks"])
    target.print(f"{failed} of {len(found['checks'])} checks FAILED" if failed else "All is well.")


def _table(*columns: tuple[str, bool]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, right in columns:
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    return table
