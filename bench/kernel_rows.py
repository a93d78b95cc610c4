# SPDX-License-Identifier: Apache-2.0
"""The rows of the sparse product that ship with the package, taken from results of the bench.

    python -m bench.kernel_rows [bench/results/matmul.json ...]

They are those of the launch that a call on token-major x comes to, whichever kernel that is for a pattern.
``compress_(tokens=)`` and ``obs-kernels speed`` read them; run it again whenever a result changes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.stored import merged, results_of, run_command
from obs_kernels.files import write_text
from obs_kernels.sparse.crossover import ROWS_FILE, KernelTable

TARGET = Path(__file__).parent.parent / "obs_kernels" / "sparse" / ROWS_FILE


def stored_table() -> KernelTable:
    """Rows of the committed results."""
    return KernelTable.from_bench(merged(results_of("matmul")))


def rows_text(found: KernelTable) -> str:
    """The text of the package's file."""
    table = found.to_dict()
    rows = ",\n".join(f"    {json.dumps(row)}" for row in table.pop("rows"))
    head = "".join(f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in table.items())
    columns = json.dumps(["rows", "cols", "tokens", "pattern", "sparse_us", "dense_us", "feature_us"])
    return f'{{\n{head}  "columns": {columns},\n  "rows": [\n{rows}\n  ]\n}}\n'


def main(argv: Sequence[str] | None = None) -> int:
    """Write the package's file."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    paths = [Path(argument) for argument in arguments]
    write_text(TARGET, rows_text(KernelTable.from_bench(merged(paths)) if paths else stored_table()))
    return 0


if __name__ == "__main__":
    run_command(main)
