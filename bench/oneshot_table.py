# SPDX-License-Identifier: Apache-2.0
"""Markdown of the one-shot table, from its JSON alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.stored import table_row

METHOD_ORDER = ("magnitude", "diagonal", "pairwise", "combinatorial")
UPDATE_ORDER = ("none", "single", "joint")
CURVATURE_ORDER = (
    "block",
    "block, outputs",
    "layer",
    "layer, sequential",
    "row",
    "row, sequential",
    "row, outputs",
    "row, sequential, outputs",
)


def to_markdown(stored: dict[str, Any]) -> str:
    """The whole result file: settings, F1 by pattern and method, recomputations, and every cell."""
    header, dense, cells = stored["header"], stored["dense"], list(stored["cells"].values())
    lines = ["# One-shot pruning of a SQuAD model", ""]
    if dense:
        lines += [f"Dense: EM {dense['exact_match']:.2f}, F1 {dense['f1']:.2f} on {dense['total']:,} questions.", ""]
    block_size = header["fisher_block_size"] or "by pattern"
    commits = dict.fromkeys(c.get("commit", header["commit"]) for c in cells)
    lines += [
        f"Nothing is trained. {header['num_grads']} per-sample gradients, Fisher block D = {block_size}, damping "
        f"{header['dampening_frac']} of the mean diagonal, seed {header['seed']}; {devices_of(header, cells)}, torch "
        f"{header['torch']}, commits {', '.join(commits)}. Gradients for one block size: "
        f"{stored['seconds_gradients']:.1f} s.",
        "",
        f"Made by `{header['command']}`.",
        "",
        "## F1 by pattern, method and update",
        "",
        *f1_table(cells),
        "",
        "## Recomputations (combinatorial, joint): F1",
        "",
        *recomputation_table(cells),
        "",
        "## Curvature: F1",
        "",
        *curvature_table(cells),
        "",
        "## Every cell",
        "",
        "| pattern | method | update | parts | curvature | EM | F1 | % of dense F1 | predicted loss increase | "
        "sparsity | violations | prune s | eval s | commit |",
        "|---|---|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for c in cells:
        lines.append(
            f"| {c['pattern']} | {c['method']} | {c['update']} | {c['recomputations']} | "
            f"{_curvature(c)} | {c['exact_match']:.2f} "
            f"| {c['f1']:.2f} | "
            f"{c['f1_share']:.1f} | {c['predicted_loss']:.4g} | {c['sparsity']:.4f} | {c['violations']} | "
            f"{c['seconds_prune']:.1f} | "
            f"{c['seconds_eval']:.1f} | {c.get('commit', header['commit'])} |"
        )
    return "\n".join(lines) + "\n"


def devices_of(header: dict[str, Any], cells: list[dict[str, Any]]) -> str:
    """Where the cells were measured; older ones name no device, theirs is that of the header."""
    return " and ".join(dict.fromkeys(c.get("device", header["device"]) for c in cells) or [header["device"]])


def f1_table(cells: list[dict[str, Any]]) -> list[str]:
    """Rows: patterns. Columns: method and update. The best of a row is bold; a dash where a method does not apply."""
    block = [c for c in cells if _curvature(c) == "block"]
    single = {(c["pattern"], c["method"], c["update"]): c["f1"] for c in block if c["recomputations"] == 1}
    columns = [(m, u) for m in METHOD_ORDER for u in UPDATE_ORDER if any(k[1:] == (m, u) for k in single)]
    patterns = list(dict.fromkeys(c["pattern"] for c in block))
    lines = ["| pattern | " + " | ".join(f"{m}, {u}" for m, u in columns) + " |", "|---|" + "---:|" * len(columns)]
    for pattern in patterns:
        values = [single.get((pattern, m, u)) for m, u in columns]
        lines.append(table_row(pattern, values, max((v for v in values if v is not None), default=None)))
    return lines


def recomputation_table(cells: list[dict[str, Any]]) -> list[str]:
    """F1 by pattern and number of parts; for n:m the parts are capped at m - n."""
    found = {
        (c["pattern"], c["recomputations"]): c["f1"]
        for c in cells
        if (c["method"], c["update"], _curvature(c)) == ("combinatorial", "joint", "block")
    }
    parts = sorted({r for _, r in found})
    lines = [
        "| pattern | " + " | ".join(f"{r} part{'s' if r > 1 else ''}" for r in parts) + " |",
        "|---|" + "---:|" * len(parts),
    ]
    for pattern in dict.fromkeys(p for p, r in found if r > 1):
        values = [found.get((pattern, r)) for r in parts]
        lines.append(table_row(pattern, values, None))
    return lines


def curvature_table(cells: list[dict[str, Any]]) -> list[str]:
    """F1 by pattern and curvature, one part, exact choice and joint update; the best of a row is bold."""
    found = {
        (c["pattern"], _curvature(c)): c["f1"]
        for c in cells
        if (c["method"], c["update"], c["recomputations"]) == ("combinatorial", "joint", 1)
    }
    columns = [c for c in CURVATURE_ORDER if any(kind == c for _, kind in found)]
    if len(columns) < 2:
        return ["Not run."]
    lines = ["| pattern | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for pattern in dict.fromkeys(p for p, kind in found if kind != "block"):
        values = [found.get((pattern, kind)) for kind in columns]
        lines.append(table_row(pattern, values, max(v for v in values if v is not None)))
    return lines


def summary_table(cells: list[dict[str, Any]], core: Sequence[tuple[str, str]]) -> list[str]:
    """F1 of one part: the method and update pairs of ``core`` under the block Fisher, then the other curvatures."""
    found = {
        (c["pattern"], _curvature(c), c["method"], c["update"]): c["f1"] for c in cells if c["recomputations"] == 1
    }
    columns = [("block", method, update) for method, update in core]
    columns += [(kind, "combinatorial", "joint") for kind in CURVATURE_ORDER[1:]]
    columns = [column for column in columns if any(key[1:] == column for key in found)]
    names = [f"{method}, {update}" if kind == "block" else kind for kind, method, update in columns]
    lines = ["| pattern | " + " | ".join(names) + " |", "|---|" + "---:|" * len(columns)]
    for pattern in dict.fromkeys(key[0] for key in found):
        values = [found.get((pattern, *column)) for column in columns]
        lines.append(table_row(pattern, values, max(v for v in values if v is not None)))
    return lines


def _curvature(cell: dict[str, Any]) -> str:
    """Its name in the tables; "outputs": of the model's own distribution instead of the labels'."""
    loss = cell.get("loss", "labels")
    parts = [cell.get("curvature", "block"), "sequential" if cell.get("sequential") else "", loss]
    return ", ".join(part for part in parts if part not in ("", "labels"))
