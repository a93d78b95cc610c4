# SPDX-License-Identifier: Apache-2.0
"""``obs-kernels speed`` without a terminal: names and settings in, one plain dict out."""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from obs_kernels import checks
from obs_kernels.dtype_names import DTYPES, dtype_name
from obs_kernels.errors import ConfigError, DataFormatError
from obs_kernels.inference.encoders import build, check_pattern, found_pattern
from obs_kernels.inference.measure import LAYERS, Plan, Twin, measure_cell
from obs_kernels.inference.power import EnergyMeter
from obs_kernels.inference.ways import check_ways
from obs_kernels.sparse.compress import reference_note
from obs_kernels.sparse.crossover import KernelTable, packaged_table
from obs_kernels.timing import make_clock
from obs_kernels.training.environment import environment
from obs_kernels.training.models import pick_device

MODEL_DTYPES = ("bf16", "f16", "f32")


def run_speed_job(
    *,
    model: str,
    patterns: Sequence[str] = (),
    batches: Sequence[int] = (1,),
    lengths: Sequence[int] = (128,),
    dtype: str = "bf16",
    device: str = "auto",
    ways: Sequence[str] | None = None,
    layers: str = "all",
    fuse_ffn: str | None = "feature",
    kernel_rows: str | os.PathLike[str] | None = None,
    seconds: float = 0.5,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Latency of a whole model, sparse against the best dense, for every batch and length.

    Args:
        model: a name of ``encoders.SHAPES`` (random weights), or a folder: packed, or dense with or without zeros.
        patterns: sparse models to time; none takes what the folder's zeros say.
        batches, lengths: every pair is a cell.
        dtype: "bf16", "f16" or "f32", or another spelling of these.
        device: "auto", "cpu" or "cuda[:n]".
        ways: of ``ways.WAYS``; None takes all that the device has.
        layers: "all" packs every layer that fits, "rows" and "measure" leave those dense that lose (``compress_``).
        fuse_ffn: as in ``compress_``.
        kernel_rows: a result of ``bench.run --op matmul`` to predict from; None takes the rows of the package, if
            they are of this GPU.
        seconds: budget of one way of one model in one cell.
        say: called with a line of progress.

    Returns:
        {"job": "speed", "model", "cells": [...], "skipped", "environment", "notes", ...}.

    Raises:
        ConfigError: a bad argument. CheckpointFormatError: a damaged folder. DataFormatError: bad kernel rows.
    """
    start, say = time.perf_counter(), say or (lambda line: None)
    dtype = dtype_name("dtype", dtype, MODEL_DTYPES)
    checks.check_choice("layers", layers, LAYERS)
    if fuse_ffn is not None:
        checks.check_choice("fuse_ffn", fuse_ffn, checks.LAYOUTS)
    for name, values in (("batch", batches), ("length", lengths)):
        if not values or any(value < 1 for value in values):
            raise ConfigError(f"{name} must be positive whole numbers, got {list(values)}")
    if seconds < 0:
        raise ConfigError(f"seconds must not be negative, got {seconds}")
    picked = pick_device(device)
    if picked.type == "cuda" and picked.index is None:
        picked = torch.device("cuda", torch.cuda.current_device())
    chosen_ways = check_ways(ways, picked)
    table, notes = _table(kernel_rows, picked), list[str]()
    dense, source = build(model, DTYPES[dtype], picked)
    patterns = tuple(dict.fromkeys(patterns)) or (found_pattern(dense),)
    plan = Plan(patterns, chosen_ways, layers, fuse_ffn, seconds, max(seconds, 1.0) if seconds else 0.0, table)
    for pattern in patterns:
        check_pattern(dense, pattern)
    clock, cells, skipped = make_clock(picked), list[dict[str, Any]](), list[dict[str, Any]]()
    twins: dict[str, Twin] = {}
    for length in lengths:
        for batch in batches:
            say(f"batch {batch}, length {length}")
            try:
                cells.append(measure_cell(dense, batch, length, plan, clock, say=say, twins=twins))
            except (torch.OutOfMemoryError, ConfigError) as error:
                why = "out of memory" if isinstance(error, torch.OutOfMemoryError) else str(error)
                skipped.append({"batch": batch, "length": length, "why": why})
                say(f"  skipped: {why}")
                _free(picked)
    imposed = {p: cell["imposed_by_magnitude"] for found in cells for p, cell in found["sparse"].items()}
    notes += _notes(picked, plan, imposed, source)
    return {
        "job": "speed",
        "model": os.fspath(model),
        "weights": source,
        "dtype": dtype,
        "config": {"ways": list(chosen_ways), "layers": layers, "fuse_ffn": fuse_ffn, "seconds": seconds},
        "patterns": list(patterns),
        "cells": cells,
        "skipped": skipped,
        "environment": environment(picked),
        "notes": notes,
        "seconds": time.perf_counter() - start,
    }


def _table(path: str | os.PathLike[str] | None, device: torch.device) -> KernelTable | None:
    if path is None:
        table = packaged_table()
        same = device.type == "cuda" and torch.cuda.get_device_name(device) == table.device
        return table if same else None
    try:
        doc = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataFormatError(f"kernel rows must be a JSON file, got {os.fspath(path)!r} ({error})") from None
    return KernelTable.from_bench(doc)


def _free(device: torch.device) -> None:
    """What a cell that failed has left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _notes(device: torch.device, plan: Plan, imposed: dict[str, int], source: str) -> list[str]:
    notes = [
        "dense: the best of all ways measured here, SDPA attention, in the same run and in turn with the sparse model; "
        "it keeps the weights it came with",
        "share of the linear layers: by subtraction of the same model without them, eager or as a graph: a compiler "
        "would drop what only they use",
    ]
    cut = [f"{pattern} ({count} layers)" for pattern, count in imposed.items() if count]
    if cut:
        notes.append(f"masks imposed by magnitude on {source}: {', '.join(cut)}; times hold, answers do not")
    notes += reference_note(device.type)
    if plan.fuse_ffn is not None:
        notes.append(
            "predictions by kernel rows count bare products: that the activation runs inside one, and what a shared "
            "input takes to be made, is not in them"
        )
    if plan.table is None:
        notes.append("no prediction: the package has no kernel rows of this device; give --kernel-rows FILE")
    missing = EnergyMeter(device).reason
    if missing is not None:
        notes.append(f"energy was not measured: {missing}")
    return notes
