# SPDX-License-Identifier: Apache-2.0
"""Whole encoders in one Markdown table, from results of ``bench.run --op inference``.

python -m bench.inference_table [bench/results/inference.json ...]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.stored import results_of
from obs_kernels.errors import ConfigError
from obs_kernels.report.values import MISSING, number


def inference_table(docs: Sequence[Mapping[str, Any]]) -> str:
    """Speed-up of each pattern over the best dense model, and in brackets what the kernel rows let expect.

    Args:
        docs: the JSON of each result. Losing cells stay, as ratios below 1; a run that was cut off says so.
    """
    rows = [row for doc in docs for row in doc["rows"] if row["op"] == "encoder"]
    patterns = list(dict.fromkeys(row["pattern"] for row in rows if row["pattern"]))
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    cells: dict[tuple[str, int, int], dict[str, Any]] = {}
    for row in rows:
        name = row["name"] if len(dtypes) == 1 else f"{row['name']}, {row['dtype']}"
        cell = cells.setdefault((name, row["shape"]["B"], row["shape"]["L"]), {})
        if (row["pattern"] or "dense") in cell:
            raise ConfigError(f"results must hold a cell once, got {name}, {row['shape']} twice; leave one file out")
        cell[row["pattern"] or "dense"] = row
    device, commit = (", ".join(dict.fromkeys(doc["env"][key] for doc in docs)) for key in ("device", "commit"))
    whole = all(doc["env"]["complete"] and not doc.get("skipped") for doc in docs)
    cut = "" if whole else "; other cells were not reached"
    lines = [
        f"{device}, commit {commit}, {', '.join(dtypes)}: x the best dense time "
        "(predicted from the kernel rows of that commit); "
        f"dense is the fastest of eager, CUDA graph, compiled, and both{cut}:",
        "",
        f"| model | batch x length | dense, ms | {' | '.join(patterns)} |",
        f"|---|---:|---:{'|---:' * len(patterns)}|",
    ]
    for (name, batch, length), found in cells.items():
        dense = found.get("dense")
        shown = [_ratio(found.get(pattern)) for pattern in patterns]
        best = MISSING if dense is None else f"{number(dense['us'] / 1e3, ',.2f')} ({dense['config']['config']})"
        lines.append(f"| {name} | {batch} x {length} | {best} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _ratio(row: Mapping[str, Any] | None) -> str:
    if row is None or row["x_dense"] is None:
        return MISSING
    return f"{row['x_dense']:.2f} ({number(row['detail'].get('predicted_x'), '.2f')})"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    paths = [Path(argument) for argument in arguments] or results_of("inference")
    print(inference_table([json.loads(path.read_text(encoding="utf-8")) for path in paths]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
