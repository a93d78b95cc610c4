# SPDX-License-Identifier: Apache-2.0
"""Markdown of the gradual pruning table, from its JSON alone."""

from __future__ import annotations

from typing import Any

MUST = {"2:4": 98.0, "2:8": 96.0, "64:2:8": 93.0, "128:2:8": 92.0, "2:16": 89.0}
"""Share of the dense F1 that the better curvature of a gradual row has to reach, in percent."""


def to_markdown(stored: dict[str, Any]) -> str:
    """Settings, the share that each pattern reaches, spread over seeds, and every row, also those not run."""
    header, rows, dense = stored["header"], stored["rows"], stored["dense"] or {}
    devices = ", ".join(sorted({row["device"] for row in rows.values()})) or "no device yet"
    commits = ", ".join(sorted({row["commit"][:7] for row in rows.values()})) or "none"
    hidden = f", hidden states {header['hidden']:g}" if header.get("hidden") else ""
    share = "all questions" if header["every"] == 1 else f"every {header['every']}th question"
    lines = [
        "# Pruning in training on SQuAD",
        "",
        f"Every row: {header['epochs']:g} epochs, batch {header['batch_size']}, AdamW {header['learning_rate']:g} "
        f"falling linearly to {header['final_factor']:g} of it, teacher the dense model "
        f"(hardness {header['hardness']:g}, T = {header['temperature']:g}{hidden}), {header['precision']}. "
        f"Gradual rows prune every {header['prune_every']:g} epochs from the first step on, one-shot rows before it; "
        f"{header['num_grads']} gradients, damping {header['dampening_frac']:g} of the mean diagonal, "
        f"D = {header['fisher_block_size']} for block curvature. F1 on {share} of the dev set; the dense "
        f"model as it came has {dense.get('f1', float('nan')):.2f}, which shares refer to. "
        f"{devices}; commits {commits}.",
        "",
        "## Gradual, by pattern",
        "",
        *_summary(rows),
        "",
        "## Spread over seeds",
        "",
        *_spread(rows),
        "",
        "## Every row",
        "",
        "| way | pattern | curvature | method | seed | EM | F1 | % of dense F1 | sparsity | violations | epochs | "
        "train s | prune s | commit |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for wanted in stored["wanted"]:
        name = [wanted[key] or "-" for key in ("way", "pattern", "curvature", "method")]
        name[0] += " (must)" if wanted["must"] else ""
        row = rows.get(wanted["key"])
        if row is None:
            running = stored["running"].get(wanted["key"])
            state = "not run" if running is None else f"in work, epoch {running['epoch']:.2f}"
            lines.append(f"| {' | '.join(name)} | {wanted['seed']} | {state} |" + " - |" * 8)
            continue
        lines.append(
            f"| {' | '.join(name)} | {row['seed']} | {row['exact_match']:.2f} | {row['f1']:.2f} | "
            f"{row['f1_share']:.1f} | {row['sparsity']:.4f} | {row['violations']} | {row['epochs']:g} | "
            f"{row['seconds_train']:.0f} | {row['seconds_prune']:.0f} | {row['commit'][:7]} |"
        )
    return "\n".join(lines) + "\n"


def _summary(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Share of dense F1 by pattern and method, seed 0; what must be reached, and whether it is."""
    columns = (("row", "combinatorial"), ("block", "combinatorial"), ("block", "pairwise"), ("block", "magnitude"))
    head = [f"{curvature}, {method}" for curvature, method in columns]
    lines = ["| pattern | one-shot, row | " + " | ".join(head) + " | must | reached |", "|---|" + "---:|" * 6 + "---|"]
    found = {
        (r["way"], r["pattern"], r["curvature"], r["method"]): r["f1_share"] for r in rows.values() if r["seed"] == 0
    }
    patterns = list(dict.fromkeys([*MUST, *(row["pattern"] for row in rows.values() if row["pattern"])]))
    for pattern in patterns:
        values = [found.get(("gradual", pattern, *column)) for column in columns]
        best = max((value for value in values[:2] if value is not None), default=None)
        must = MUST.get(pattern)
        reached = "-" if must is None else "not run" if best is None else "yes" if best >= must else "no"
        shown = [found.get(("one-shot", pattern, "row", "combinatorial")), *values]
        texts = ["not run" if value is None else f"{value:.1f}" for value in shown]
        lines.append(f"| {pattern} | {' | '.join(texts)} | {'-' if must is None else f'{must:g}'} | {reached} |")
    return lines


def _spread(rows: dict[str, dict[str, Any]]) -> list[str]:
    several = over_seeds(rows)
    if not several:
        return ["Not run."]
    lines = [
        "| way | pattern | curvature | method | seeds | mean F1 | least | largest |",
        "|---|---|---|---|" + "---:|" * 4,
    ]
    for key, values in several:
        mean = sum(values) / len(values)
        lines.append(f"| {' | '.join(key)} | {len(values)} | {mean:.2f} | {min(values):.2f} | {max(values):.2f} |")
    return lines


def over_seeds(rows: dict[str, dict[str, Any]]) -> list[tuple[tuple[str, ...], list[float]]]:
    """((way, pattern, curvature, method), F1 of each seed) of what was run with several, the best mean first."""
    groups: dict[tuple[str, ...], list[float]] = {}
    for row in rows.values():
        groups.setdefault((row["way"], row["pattern"], row["curvature"], row["method"]), []).append(row["f1"])
    several = [(key, values) for key, values in groups.items() if len(values) > 1]
    return sorted(several, key=lambda item: -sum(item[1]) / len(item[1]))
