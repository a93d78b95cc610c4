# SPDX-License-Identifier: Apache-2.0
"""The generated parts of the README: no figure there is typed by hand.

``python -m bench.readme`` rewrites them, ``--check`` exits 1 if they are not what the result files and the dispatch
table say. A part stands between ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import choices_squad, squad_gradual
from bench.gradual_rows import DENSE, GRADUAL
from bench.gradual_table import over_seeds
from bench.inference_table import inference_table
from bench.oneshot_squad import CORE, RESULTS
from bench.oneshot_table import devices_of, summary_table
from bench.stored import merged, results_of
from obs_kernels.files import write_text
from obs_kernels.ops.dispatch import TABLE
from obs_kernels.timing import is_steady

README = Path(__file__).parents[1] / "README.md"

# What each op takes, beside its backends; the dtypes are those of the checks.
PATTERNS_AND_DTYPES = {
    "accumulate_fisher_": ("any block size D", "gradients f16 bf16 f32 f64, Fisher f32 f64"),
    "invert_spd": ("any D", "f32 f64"),
    "search_nm": ("n:m up to 20,000 kept sets", "weight f16 bf16 f32 f64, Fisher f32 f64"),
    "search_vnm": ("v:n:m, n to m columns", "as search_nm"),
    "prune_nm": ("as search_nm, D = m", "as search_nm"),
    "prune_vnm": ("as search_vnm, D = m", "as search_nm"),
    "obs_update": ("any mask", "as search_nm"),
    "block_saliency": ("unstructured, blockN", "as search_nm"),
    "loss_increase": ("any", "as search_nm"),
    "accumulate_hessian_": ("any C", "activations f16 bf16 f32 f64, Hessian f32 f64"),
    "sweep_rows": ("n:m and v:n:m up to 20,000 kept sets; sparsegpt: n:m, unstructured", "as search_nm"),
    "pack": ("n:m, v:2:m", "f16 bf16 f32 f64"),
    "unpack": ("n:m, v:2:m", "f16 bf16 f32 f64"),
    "sparse_linear": ("n:m, v:2:m", "f16 bf16 f32 f64"),
    "feature_major": ("any [..., C]", "f16 bf16 f32 f64"),
}
# What a kernel takes where that is less than the op takes.
LESS = {
    ("accumulate_fisher_", "cuda"): "D up to 128, not f64",
    ("accumulate_fisher_", "triton"): "not f64",
    ("accumulate_hessian_", "triton"): "bf16, Hessian f32",
    ("invert_spd", "cuda"): "D up to 128, f32",
    ("search_nm", "cuda"): "D up to 128, m up to 32; not diagonal, magnitude, f64",
    ("search_vnm", "cuda"): "D up to 128; m up to 32 for n up to 2, else 16; combinatorial or pairwise, not f64",
    ("prune_nm", "cuda"): "as search_nm",
    ("prune_vnm", "cuda"): "as search_vnm",
    ("obs_update", "cuda"): "D up to 128, not f64",
    ("block_saliency", "cuda"): "D up to 128; combinatorial, not f64",
    ("loss_increase", "cuda"): "D up to 128, not f64",
    ("sparse_linear", "cuda"): "sm_90a; f16 bf16; n up to 2, m a multiple of 4",
    ("feature_major", "cuda"): "all of it; the kernel: f16 bf16, multiples of 8",
    ("sweep_rows", "cuda"): "m up to 16 for n up to 2, else 8; panels up to 256 rows; combinatorial, not f64",
}


def support_table() -> str:
    """Op x pattern x dtype x backend, from the dispatch table; "-" where a backend has no kernel."""
    lines = ["| op | takes | dtypes | triton takes | cuda takes |", "|---|---|---|---|---|"]
    for op, backends in TABLE.items():
        kernels = [LESS.get((op, k), "all of it") if k in backends else "-" for k in ("triton", "cuda")]
        lines.append(f"| `{op}` | {' | '.join([*PATTERNS_AND_DTYPES[op], *kernels])} |")
    return "\n".join(lines)


def kernel_tables() -> str:
    """Share of the byte floor and ratio to the fastest peer, from the stored results of the kernel bench."""
    fisher, inverse, search = (_rows(topic) for topic in ("fisher", "inverse", "search"))
    columns = {
        "accumulate bf16, S = 32": (fisher, {"S": 32}, "bf16"),
        "bf16, S = 64": (fisher, {"S": 64}, "bf16"),
        "f32, S = 32": (fisher, {"S": 32}, "f32"),
        "f32, S = 64": (fisher, {"S": 64}, "f32"),
        "inverse": (inverse, {}, "f32"),
    }
    lines = [f"| D | {' | '.join(columns)} |", f"|---{'|---:' * len(columns)}|"]
    for size in sorted({row["shape"]["D"] for row in inverse}):
        cells = [_share(rows, {"D": size, **sizes}, dtype) for rows, sizes, dtype in columns.values()]
        lines.append(f"| {size} | {' | '.join(cells)} |")
    rows = [row for row in search if row["config"].get("config") == "with update" and row["name"] == "bert-base"]
    pairwise = {
        row["pattern"]: f"{row['us'] / 1000:.1f}"
        for row in search
        if row["config"].get("config") == "pairwise" and row["name"] == "bert-base"
    }
    step = {
        "BERT-base": [row["pattern"] for row in rows],
        "exact, with update, ms": [f"{row['us'] / 1000:.1f}" for row in rows],
        "share of the floor": [f"{row['limit_share']:.0%}" for row in rows],
    }
    if pairwise:
        step["pairwise, no update, ms"] = [pairwise.get(row["pattern"], "-") for row in rows]
    first, *others = (f"| {name} | {' | '.join(cells)} |" for name, cells in step.items())
    lines += ["", first, f"|---{'|---:' * len(rows)}|", *others]
    collected = json.loads((RESULTS.parent / "calibration.json").read_text())["rows"]
    times = {row["shape"]["batch"]: row["us"] / 1e6 for row in collected}
    by_batch = ", ".join(f"{times[batch]:.2f} s at batch {batch}" for batch in sorted(times, reverse=True))
    what = "Block Fisher of BERT-base (D = 16, 1,024 per-sample gradients, 384 tokens), forward and backward included"
    lines += ["", f"{what}: {by_batch}."]
    return "\n".join(lines)


def _rows(topic: str) -> list[dict[str, Any]]:
    """Kernel rows of the backend that ``backend=None`` takes on a GPU."""
    stored = json.loads((RESULTS.parent / f"{topic}.json").read_text())
    rows: list[dict[str, Any]] = stored["rows"]
    return [row for row in rows if row["path"] == "kernel" and row["config"].get("backend") == "cuda"]


PANELS = ("128:2:8", "128:2:16", "128:2:32")
"""Patterns of the product's table beside 2:4, once there are rows of them on feature-major x."""
LARGE_LAYER, MANY_TOKENS = 4096, 2048
"""Rows, columns and tokens from which on a product is a large one, whose ratios stand above the table."""


def matmul_table(paths: Sequence[Path] = ()) -> str:
    """The sparse product against dense and against cuSPARSELt, from the stored results; layers in columns.

    Panels have a line of their own in every cell: token-major, and feature-major after a slash.
    """
    stored = merged(paths or results_of("matmul"))
    found: dict[tuple[str, str], dict[tuple[str, int], dict[str, Any]]] = {}
    for row in stored["rows"]:
        config = row["config"]
        if row["path"] == "kernel" and config.get("backend") == "cuda" and not (config.get("forced") or "y" in config):
            of_layout = found.setdefault((row["pattern"], config.get("x", "token-major")), {})
            of_layout[row["name"], row["shape"]["T"]] = row
    rows = found[("2:4", "token-major")]
    panels = [p for p in PANELS if {(p, "token-major"), (p, "feature-major")} <= found.keys()]
    layers = {row["name"]: f"{row['shape']['R']} x {row['shape']['C']}" for row in rows.values()}

    peers = {
        (r["config"]["peer"], r["pattern"], r["name"], r["shape"]["T"]): r
        for r in stored["rows"]
        if r["config"].get("peer") in ("F.linear", "cuSPARSELt")
    }

    def says_something(row: dict[str, Any], peer: str) -> bool:
        beside = peers.get((peer, row["pattern"], row["name"], row["shape"]["T"]))
        return all(is_steady(r["p20"], r["p80"]) for r in (row, beside) if r is not None)

    def to_dense(row: dict[str, Any]) -> str:
        return f"{row['x_dense']:.2f}" if says_something(row, "F.linear") else "unsteady"

    def to_peer(row: dict[str, Any]) -> str:
        to_it = f"{row['x_peer'].get('cuSPARSELt', float('nan')):.2f}"
        return to_it if says_something(row, "cuSPARSELt") else "unsteady"

    def ratio(pattern: str, layout: str, at: tuple[str, int]) -> str:
        row = found[pattern, layout].get(at)
        return to_dense(row) if row else "-"

    def range_of(pattern: str, layout: str) -> str:
        large = [
            row["x_dense"]
            for (_, tokens), row in found[pattern, layout].items()
            if min(row["shape"]["R"], row["shape"]["C"]) >= LARGE_LAYER and tokens >= MANY_TOKENS
            if says_something(row, "F.linear")
        ]
        return f"{min(large):.2f} to {max(large):.2f}" if large else "-"

    more = f"; {', '.join(panels)}: x token-major / feature-major" if panels else ""
    ranges = [f"2:4 {range_of('2:4', 'token-major')}"]
    ranges += [f"{p} {range_of(p, 'token-major')} / {range_of(p, 'feature-major')}" for p in panels]
    lines = [
        f"{stored['env']['device']}, commit {_commits(rows.values())}, 2:4, bf16, kernel time of calls back to "
        f"back, whose starts overlap: x dense cuBLAS of the same run (x cuSPARSELt, best algorithm){more}. "
        f"From {LARGE_LAYER:,} x {LARGE_LAYER:,} and {MANY_TOKENS:,} tokens on: {', '.join(ranges)}.",
        "",
        f"| tokens, pattern | {' | '.join(layers.values())} |",
        f"|---:{'|---:' * len(layers)}|",
    ]
    for tokens in sorted({tokens for _, tokens in rows}):
        cells = [rows.get((name, tokens)) for name in layers]
        shown = [f"{to_dense(c)} ({to_peer(c)})" if c else "-" for c in cells]
        for pattern in panels:
            for index, name in enumerate(layers):
                if cells[index] is None:
                    continue
                both = (ratio(pattern, layout, (name, tokens)) for layout in ("token-major", "feature-major"))
                shown[index] += f"<br>{' / '.join(both)}"
        lines.append(f"| {'<br>'.join([f'{tokens:,} tokens, 2:4', *panels])} | {' | '.join(shown)} |")
    if any("unsteady" in line for line in lines):
        lines[0] += ' "unsteady": samples that spread by more than a quarter, of which no ratio is given.'
    return "\n".join(lines)


def _commits(rows: Iterable[dict[str, Any]]) -> str:
    """The commit of ``rows``, or each with the layers that it measured."""
    layers: dict[str, list[str]] = {}
    for row in rows:
        layers.setdefault(row["commit"], []).append(f"{row['shape']['R']} x {row['shape']['C']}")
    if len(layers) == 1:
        return next(iter(layers))
    return ", ".join(
        f"{commit} ({' to '.join(dict.fromkeys((names[0], names[-1])))})" for commit, names in layers.items()
    )


def _share(rows: list[dict[str, Any]], sizes: dict[str, int], dtype: str) -> str:
    (row,) = (r for r in rows if r["dtype"] == dtype and r["name"] == "14M" and sizes.items() <= r["shape"].items())
    ratio = min(ratio for name, ratio in row["x_peer"].items() if name.startswith("torch"))
    return f"{row['limit_share']:.0%}, {ratio:.1f} x"


def oneshot_table() -> str:
    """F1 by pattern, method and curvature, from the stored results."""
    stored = json.loads(RESULTS.read_text())
    header, dense, cells = stored["header"], stored["dense"], list(stored["cells"].values())
    lines = [
        f"Dense EM {dense['exact_match']:.2f}, F1 {dense['f1']:.2f} ({dense['total']:,} questions). F1 in one "
        f"shot, nothing trained; {header['num_grads']} questions for the curvature, block Fisher D = "
        f"{header['fisher_block_size']}, {devices_of(header, cells)}, seed {header['seed']}:",
        "",
        *summary_table(cells, CORE),
    ]
    return "\n".join(lines)


def seeds_line() -> str:
    """F1 of row curvature over the seeds that were run, as it is."""
    cells = [c for c in json.loads(choices_squad.RESULTS.read_text())["cells"].values() if c["study"] == "row"]
    found = [c for c in cells if c["value"] == choices_squad.AS_IT_IS]
    seeds = len({c["seed"] for c in found})
    parts = []
    for pattern in choices_squad.ROW_PATTERNS:
        own = [c["f1"] for c in found if c["pattern"] == pattern]
        parts.append(f"{pattern} {sum(own) / len(own):.2f} ({max(own) - min(own):.2f})")
    return f"Last column over {seeds} seeds, mean (largest less least): {', '.join(parts)}."


def choices_lines() -> str:
    """Row curvature over the seeds and by the number of questions, then the passes."""
    return f"{seeds_line()} {questions_line()}\n{passes_line()}"


def questions_line(pattern: str = "2:8") -> str:
    """F1 of row curvature by the number of questions, of the seed that all numbers were run with."""
    stored = json.loads(choices_squad.RESULTS.read_text())
    usual, found = stored["header"]["num_grads"], dict[int, float]()
    for cell in stored["cells"].values():
        if cell["study"] == "row" and cell["pattern"] == pattern and cell["seed"] == 0:
            change = choices_squad.ROW_CHANGES.get(cell["value"], {})
            if cell["value"] == choices_squad.AS_IT_IS or set(change) == {"num_grads"}:
                found[change.get("num_grads", usual)] = cell["f1"]
    parts = [f"{count:,} {f1:.2f}" for count, f1 in sorted(found.items())]
    return f"{pattern} by questions, seed 0: {', '.join(parts)}."


def gradual_line() -> str:
    """F1 of gradual rows from the stored results: those that must be there, row curvature, and means over seeds."""
    stored = json.loads(squad_gradual.RESULTS.read_text())
    epochs, dense = stored["header"]["epochs"], stored["dense"]["f1"]
    alike = next((row["f1"] for row in stored["rows"].values() if row["way"] == DENSE), None)
    several = dict(over_seeds(stored["rows"]))
    parts = list[str]()
    for row in (stored["rows"][wanted["key"]] for wanted in stored["wanted"] if wanted["key"] in stored["rows"]):
        if row["way"] != GRADUAL or row["seed"] != 0:
            continue
        found = several.get((GRADUAL, row["pattern"], row["curvature"], row["method"]), [row["f1"]])
        if not (row["must"] or row["curvature"] == "row" or len(found) > 1):
            continue
        kind = "row" if row["curvature"] == "row" else f"block, {row['method']}"
        mean = sum(found) / len(found)
        spread = f", {len(found)} seeds {min(found):.2f} to {max(found):.2f}" if len(found) > 1 else ""
        parts.append(f"{row['pattern']} {kind} {mean:.2f} ({100 * mean / dense:.1f} %{spread})")
    return (
        f"Pruned in steps and trained for {epochs:g} epochs, F1 (share of the dense {dense:.2f}"
        f"{f', which gets to {alike:.2f} by as much training' if alike else ''}; one seed where no number is given): "
        f"{'; '.join(parts)}. Every row: [squad_gradual.md](bench/results/squad_gradual.md)."
    )


def passes_line() -> str:
    """F1 without and with passes, from the stored results: the largest block for which all of them were run."""
    cells = [c for c in json.loads(choices_squad.RESULTS.read_text())["cells"].values() if c["study"] == "passes"]
    found: dict[tuple[int, str, int], list[float]] = {}
    for c in cells:
        found.setdefault((c["D"], c["pattern"], c["value"]), []).append(c["f1"])

    def whole(size: int) -> bool:
        wanted = ((size, p, n) for p in choices_squad.PASSES_PATTERNS for n in choices_squad.PASSES)
        return all(key in found for key in wanted)

    size = max(filter(whole, {c["D"] for c in cells}))
    mean = {key: f"{sum(values) / len(values):.2f}" for key, values in found.items()}
    parts = [
        f"{pattern} {', '.join(mean[size, pattern, passes] for passes in choices_squad.PASSES)}"
        for pattern in choices_squad.PASSES_PATTERNS
    ]
    return f"F1 at D = {size} with {', '.join(map(str, choices_squad.PASSES))} passes: {'; '.join(parts)}."


def encoder_table() -> str:
    """Whole encoders, sparse beside the best dense."""
    return inference_table([json.loads(path.read_text()) for path in results_of("inference")])


PARTS = {
    "choices": choices_lines,
    "support": support_table,
    "kernels": kernel_tables,
    "matmul": matmul_table,
    "inference": encoder_table,
    "oneshot": oneshot_table,
    "gradual": gradual_line,
}


def render(text: str) -> str:
    """``text`` with every generated part made anew."""
    for name, make in PARTS.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise SystemExit(f"README.md must have one part {name!r}")
        head, rest = text.split(begin)
        text = head + begin + make() + "\n" + end + rest.split(end)[1]
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    check = "--check" in (sys.argv[1:] if argv is None else argv)
    text = README.read_text()
    fresh = render(text)
    if check:
        if fresh != text:
            print("README.md: generated parts are stale; run python -m bench.readme", file=sys.stderr)
            return 1
        return 0
    write_text(README, fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
