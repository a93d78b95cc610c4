# SPDX-License-Identifier: Apache-2.0
"""Whole encoders, sparse beside the best dense: BERT-base, BERT-large and MiniLM shapes with random weights.

    python -m bench.run --op inference --shape bert-large --samples 32 --lengths 512 --json inference.json

One row for each model and cell, of its fastest way: eager, as a CUDA graph, compiled, compiled as a CUDA graph. Dense
is the same model with torch's SDPA, measured in turn with the sparse ones; ``x_dense`` is its best time over ours, and
losing cells stay. ``--samples`` picks batches, ``--lengths`` lengths, ``--block-size`` m of the patterns, ``--seconds``
the budget of one way of one model in a cell. ``predicted_x`` is what the kernel rows of ``bench/results/matmul*.json``
let expect, where they are of this device; ``products_x`` the same by its products timed in this run. On a CPU the
model is a small one, eager alone, and the row says so.
"""

from __future__ import annotations

from typing import Any

import torch

from bench.harness.case import Case
from bench.harness.rows import Row, make_row
from bench.harness.session import Context
from bench.kernel_rows import stored_table
from bench.stored import results_of
from obs_kernels.dtype_names import DTYPES
from obs_kernels.errors import MissingDependencyError
from obs_kernels.inference.encoders import SHAPES, build
from obs_kernels.inference.measure import Plan, Twin, measure_cell
from obs_kernels.inference.ways import check_ways
from obs_kernels.patterns import parse_pattern
from obs_kernels.sparse.crossover import KernelTable

OP = "sparse_linear"
ROW_OP = "encoder"
PATTERNS = ("64:2:8", "128:2:8", "128:2:16")
HALF = "2:4"
"""Only where ``--block-size`` asks for it."""
BATCHES = (1, 8, 32, 64)
LENGTHS = (128, 256, 512)
CPU_MODEL, CPU_PATTERNS, CPU_CELL = "tiny", ("64:2:8",), (2, 16)


def run(context: Context) -> list[Row]:
    """Rows of every shape, batch, length and pattern; kept after each cell."""
    selection = context.selection
    device = selection.device
    gpu = device.type == "cuda"
    shapes = selection.pick([name for name in SHAPES if name != CPU_MODEL], selection.shapes)
    for name in shapes if gpu else shapes[:1]:
        for dtype in selection.pick(CASE.dtypes, selection.dtypes or ("bf16" if gpu else "f32",)):
            try:
                dense, _ = build(name if gpu else CPU_MODEL, DTYPES[dtype], device)
            except MissingDependencyError as error:
                context.skip(ROW_OP, {"B": 1}, name, str(error))
                return []
            known, wanted = PATTERNS if gpu else CPU_PATTERNS, selection.block_sizes
            named = [text for text in (HALF, *known) if wanted is not None and parse_pattern(text).m in wanted]
            patterns = known if wanted is None else tuple(named)
            if not patterns:
                continue
            plan = Plan(patterns, check_ways(None, device), seconds=context.seconds, table=_table(device))
            twins: dict[str, Twin] = {}
            lengths, batches = selection.lengths or LENGTHS, selection.samples or BATCHES
            cells = [(b, n) for n in lengths for b in batches] if gpu else [CPU_CELL]
            for batch, length in cells:
                if context.is_over(ROW_OP, {"B": batch, "L": length}, name):
                    continue
                context.say(f"{name}, batch {batch}, length {length}, {dtype}")
                try:
                    cell = measure_cell(dense, batch, length, plan, context.clock, say=context.say, twins=twins)
                except torch.OutOfMemoryError:
                    context.skip(ROW_OP, {"B": batch, "L": length}, name, "out of memory")
                    continue
                context.add(cell_rows(cell, name if gpu else f"{name} (small, CPU)", dtype, gpu=gpu))
    return []


def cell_rows(cell: dict[str, Any], name: str, dtype: str, *, gpu: bool) -> list[Row]:
    """The dense row and the sparse rows of one cell of ``measure_cell``."""
    dense, rows = cell["dense"], list[Row]()
    shape = {"B": cell["batch"], "L": cell["length"], "T": cell["tokens"]}
    for pattern, found in ((None, dense), *cell["sparse"].items()):
        if found["us"] is None:
            continue
        config: dict[str, Any] = (
            {"peer": "dense, SDPA"} if pattern is None else {"backend": "cuda" if gpu else "reference"}
        )
        keys = ("samples_per_s", "peak_bytes", "joules", "linear_share", "ways", "failed", "max_difference")
        detail = {key: found[key] for key in keys if found.get(key)}
        for key, source in (("predicted_x", "predicted"), ("products_x", "predicted_here")):
            guess = found.get(source)
            detail |= {key: guess["speedup"]} if guess and guess["speedup"] else {}
        rows.append(
            make_row(
                ROW_OP,
                shape,
                us=found["us"],
                p20=found["p20"],
                p80=found["p80"],
                path="model",
                config=config | {"config": found["way"]},
                dtype=dtype,
                pattern=pattern,
                name=name,
                x_dense=found.get("speedup"),
                detail=detail | ({} if gpu else {"real_shape": {"B": BATCHES[2], "L": LENGTHS[-1], "T": 16384}}),
            )
        )
    return rows


def _table(device: torch.device) -> KernelTable | None:
    """The stored rows of the kernels, if they are of this device."""
    if device.type != "cuda" or not results_of("matmul"):
        return None
    table = stored_table()
    return table if table.device == torch.cuda.get_device_name(device) else None


CASE = Case(
    topic="inference",
    op=OP,
    summary="whole encoders, sparse beside the best dense",
    shapes=tuple(name for name in SHAPES if name != CPU_MODEL),
    dtypes=("bf16", "f16", "f32"),
    run=run,
)
