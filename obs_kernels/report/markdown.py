# SPDX-License-Identifier: Apache-2.0
"""``report.md``: the report of a job for reading in a terminal or beside the code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from obs_kernels.report.bench import TEXT_COLUMNS, bench_facts, bench_table, bench_title, ratio_text
from obs_kernels.report.speed import speed_facts, speed_table
from obs_kernels.report.values import MISSING, cell_name, megabytes, number, score_columns, setting, shape_text


def render_markdown(report: dict[str, Any]) -> str:
    """The sections that ``report`` has: bench, accuracy, comparison, sizes, layers, notes, settings, environment."""
    pruning = report.get("pruning") or {}
    parts = [f"# {report_title(report)}", ""]
    for key in ("model", "data", "train"):
        if report.get(key):
            parts.append(f"- {key}: `{report[key]}`")
    for doc in report.get("bench") or ():
        parts += ["", f"## {bench_title(doc)}", "", *bench_lines(doc)]
    parts += _runs(report)
    for doc in report.get("speed") or ():
        parts += ["", f"## Speed of {doc.get('model')}", "", *speed_lines(doc)]
    parts += _accuracy(report.get("accuracy") or {})
    parts += _comparison(report.get("comparison") or [], report.get("accuracy") or {})
    parts += _sizes(report)
    if pruning.get("layers"):
        parts += _layers(pruning)
    if report.get("notes"):
        parts += ["", "## Notes", "", *(f"- {note}" for note in report["notes"])]
    for title, values in (
        ("Settings", report.get("config") or pruning.get("config")),
        ("Environment", report.get("environment") or pruning.get("environment")),
    ):
        if values:
            rows = [(key, setting(value)) for key, value in values.items()]
            parts += ["", f"## {title}", "", *_table(("name", "value"), rows)]
    return "\n".join(parts) + "\n"


def report_title(report: dict[str, Any]) -> str:
    """What the report is of."""
    if report.get("job") == "report":
        models = {doc.get("model") for key in ("runs", "speed") for doc in report.get(key) or ()} - {None}
        return f"Report: {', '.join(sorted(map(str, models)))}" if models else "Report"
    pattern = (report.get("pruning") or {}).get("pattern")
    return f"Pruning report: {pattern}" if pattern else "Kernel bench" if report.get("bench") else "Report"


def speed_lines(doc: dict[str, Any]) -> list[str]:
    """Facts and rows of one result of ``obs-kernels speed``."""
    head, rows = speed_table(doc)
    facts = [f"- {line}" for line in speed_facts(doc)]
    return [*facts, "", *_table(head, rows, text_columns=head.index("way") + 1)] if rows else [*facts, "", "No cells."]


def runs_table(runs: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(head, rows) of the runs of a report."""
    head = ["run", "pattern", "curvature", "dense F1", "F1", "% of dense F1", "sparsity", "packed / dense size", "s"]
    formats = (("dense_f1", ".2f"), ("f1", ".2f"), ("f1_share", ".1f"), ("sparsity", ".4f"), ("size", ".3f"))
    rows = [
        [
            str(run["name"]),
            run["pattern"] or MISSING,
            run["curvature"] or MISSING,
            *(number(run[key], spec) for key, spec in formats),
            number(run["seconds"], ".1f"),
        ]
        for run in runs
    ]
    return head, rows


def _runs(report: dict[str, Any]) -> list[str]:
    """Accuracy and speed-up side by side, then the runs."""
    lines: list[str] = []
    if report.get("points"):
        head = ("pattern", "label", "on the front", "F1", "% of dense F1", "speed-up")
        rows = [
            (
                point["pattern"],
                point["label"],
                "yes" if point["front"] else "",
                number(point["f1"], ".2f"),
                number(point["share"], ".1f"),
                ratio_text(point["speedup"]),
            )
            for point in report["points"]
        ]
        lines += ["", "## Accuracy against speed-up", "", *_table(head, rows, text_columns=3)]
    if report.get("runs"):
        names, cells = runs_table(report["runs"])
        lines += ["", "## Runs", "", *_table(names, cells, text_columns=3)]
    return lines


def bench_lines(doc: dict[str, Any]) -> list[str]:
    """Header and rows of one result of ``bench.run``."""
    head, rows = bench_table(doc)
    text_columns = sum(name in TEXT_COLUMNS for name in head) - ("parts" in head)
    facts = [f"- {line}" for line in bench_facts(doc)]
    return [*facts, "", *_table(head, rows, text_columns=text_columns)] if rows else [*facts, "", "No rows."]


def _accuracy(accuracy: dict[str, Any]) -> list[str]:
    if not accuracy:
        return []
    columns = score_columns(accuracy)
    rows = [(name, *(number(scores.get(key), spec) for _, key, spec in columns)) for name, scores in accuracy.items()]
    return ["", "## Accuracy", "", *_table(("", *(title for title, _, _ in columns)), rows)]


def _comparison(cells: Sequence[dict[str, Any]], accuracy: dict[str, Any]) -> list[str]:
    if not cells:
        return []
    rows = [
        (
            cell.get("pattern"),
            cell_name(cell),
            number(cell.get("exact_match"), ".2f"),
            number(cell.get("f1"), ".2f"),
            number(cell.get("f1_share"), ".1f"),
            number(cell.get("predicted_loss"), ".4g"),
            number(cell.get("seconds_prune"), ".1f"),
        )
        for cell in cells
    ]
    dense = number((accuracy.get("dense") or {}).get("f1"), ".2f")
    head = ("pattern", "method, update", "EM", "F1", "% of dense F1", "predicted loss increase", "s")
    intro = [] if dense == MISSING else [f"Dense F1: {dense}", ""]
    return ["", "## Comparison", "", *intro, *_table(head, rows, text_columns=2)]


def _sizes(report: dict[str, Any]) -> list[str]:
    sizes = report.get("sizes") or {}
    if not sizes:
        return []
    dense = sizes.get("dense")
    rows = [
        (name, megabytes(size), number(size / dense if dense else None, ".3f"), number(size, ",d"))
        for name, size in sizes.items()
    ]
    lines = ["", "## Sizes", "", *_table(("weights", "size", "of dense", "bytes"), rows)]
    packed = report.get("packed")
    if packed and packed.get("max_difference") is not None:
        lines += ["", f"Packed against dense, read back: largest difference of logits {packed['max_difference']:.3g}."]
    return lines


def _layers(pruning: dict[str, Any]) -> list[str]:
    rows = [
        (
            layer["name"],
            shape_text(layer["shape"]),
            layer["pattern"],
            number(layer["sparsity"], ".4f"),
            number(layer["saliency"], ".4g"),
            number(layer["damp"], ".3g"),
            layer["outcome"],
            number(layer["seconds"], ".2f"),
        )
        for layer in pruning["layers"]
    ]
    head = ("layer", "shape", "pattern", "sparsity", "predicted loss increase", "damp", "outcome", "s")
    skipped = [f"- left out: {name}: {reason}" for name, reason in pruning.get("skipped") or ()]
    sums = (
        f"Sparsity {number(pruning.get('sparsity'), '.4f')}, predicted loss increase "
        f"{number(pruning.get('saliency'), '.6g')}, {pruning.get('num_grads', 0)} gradients, "
        f"stages {', '.join(pruning.get('stages') or ())}, {number(pruning.get('seconds'), '.1f')} s."
    )
    return ["", "## Layers", "", sums, "", *_table(head, rows), *([""] if skipped else []), *skipped]


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], *, text_columns: int = 1) -> list[str]:
    """Columns whose cells are numbers are right-aligned; ``text_columns`` at the left never are."""
    numeric = [
        column >= text_columns and all(str(row[column])[:1] in f"-0123456789.{MISSING}" for row in rows)
        for column in range(len(head))
    ]
    rule = ("---:" if right else "---" for right in numeric)
    return [_line(head), _line(list(rule)), *map(_line, rows)]


def _line(cells: Sequence[Any]) -> str:
    texts = (str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells)
    return f"| {' | '.join(texts)} |"
