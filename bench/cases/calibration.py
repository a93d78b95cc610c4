# SPDX-License-Identifier: Apache-2.0
"""The whole Fisher of a model: forward, backward, per-sample gradients and accumulation, and where the time goes.

    python -m bench.run --op calibration --shape bert-base

BERT-base with random weights, questions of 384 tokens without padding, a loss a sample, 1,024 per-sample gradients. A
row is one ``OBSPruner.collect``, from batches on the host to the finished Fisher; what the phases took is measured in a
run of its own, by CUDA events. On a CPU the model is a small one, and the row says so.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness.backends import called, runnable
from bench.harness.case import Case
from bench.harness.encoder import CPU_ENCODER, SHAPES, Encoder, build, make_batches, seconds, squad_loss
from bench.harness.rows import Row, make_row
from bench.harness.session import Context
from obs_kernels.dtype_names import DTYPES
from obs_kernels.errors import MemoryBudgetError
from obs_kernels.pruning import OBSConfig, OBSPruner, gradient_buffer
from obs_kernels.pruning.phase_times import PHASES, PhaseTimes
from obs_kernels.timing import Ceilings, spread

OP = "accumulate_fisher_"
"""The op whose backend counts."""
ROW_OP = "collect"
BLOCK_SIZES = (16,)
NUM_GRADS = 1024
CPU_GRADS = 64
BATCH_SIZES = (32, 16, 64)
CHECKED_SAMPLES = 2
CHECK_LIMIT = {"bf16": 0.1, "f16": 0.1, "f32": 1e-3}
"""RMS error / RMS of the Fisher of two samples against one backward pass each: the passes differ in batch size and so
in kernels, and bf16 rounds every activation to 8 bits (0.023 for BERT-base, emulated on a CPU)."""


def run(context: Context) -> list[Row]:
    """A row for every shape, dtype, D, backend and batch size."""
    selection, rows = context.selection, []
    for name in selection.pick(SHAPES, selection.shapes):
        for dtype in selection.dtypes or (("bf16",) if selection.device.type == "cuda" else ("f32",)):
            rows += _rows_of_model(context, name, dtype)
    return rows


def _rows_of_model(context: Context, name: str, dtype: str) -> list[Row]:
    selection, rows = context.selection, []
    gpu = selection.device.type == "cuda"
    encoder, num_grads = (SHAPES[name], NUM_GRADS) if gpu else (CPU_ENCODER, CPU_GRADS)
    try:
        model = build(encoder, DTYPES[dtype], selection.device)
    except ImportError as error:
        context.skip(ROW_OP, {"S": num_grads}, name, f"transformers is missing ({error})")
        return []
    for count in selection.samples or (num_grads,):
        for size in selection.block_sizes or BLOCK_SIZES:
            rows_dtype = gradient_buffer.row_dtype(DTYPES[dtype], selection.device)
            like = [
                torch.empty(1, size, size, device=selection.device),
                torch.empty(2, size, dtype=rows_dtype, device=selection.device),
            ]
            chosen = called(OP, selection, *like)
            asked = [chosen] if selection.backends is None else runnable(OP, selection, *like)
            for backend in filter(None, asked):
                for batch in dict.fromkeys(min(batch, count) for batch in BATCH_SIZES):
                    shape = {"S": count, "batch": batch, "T": encoder.tokens, "W": encoder.weights, "D": size}
                    context.say(f"{ROW_OP} {name} {shape} {dtype} {backend}{'' if gpu else ' (CPU: a small model)'}")
                    try:
                        row = _row(context, model, encoder, name, dtype, backend, shape)
                    except (torch.OutOfMemoryError, MemoryBudgetError) as error:
                        context.skip(ROW_OP, shape, f"{backend} batch {batch}", str(error).splitlines()[0])
                        continue
                    rows += [row] if row is not None else []
    return rows


def _row(
    context: Context, model: nn.Module, encoder: Encoder, name: str, dtype: str, backend: str, shape: dict[str, int]
) -> Row | None:
    device = context.selection.device
    gpu = device.type == "cuda"
    loader = make_batches(encoder, shape["S"], shape["batch"])
    cfg = OBSConfig(pattern="2:4", fisher_block_size=shape["D"], num_grads=shape["S"], curvature="block")

    def collect(timings: PhaseTimes | None = None) -> OBSPruner:
        pruner = OBSPruner(model, cfg)
        pruner.collect(loader, squad_loss, timings=timings)
        return pruner

    with _backend(backend):
        error = _check(model, cfg, encoder, device)
        if not error <= CHECK_LIMIT[dtype]:
            why = f"error {error:.3g} against single backward passes is above {CHECK_LIMIT[dtype]:.3g}"
            context.refuse(ROW_OP, shape, backend, why)
            return None
        collect()  # libraries load, the allocator takes its memory
        if gpu:
            torch.cuda.reset_peak_memory_stats(device)
        samples = [seconds(collect, device) * 1e6 for _ in range(5 if gpu else 3)]
        peak = torch.cuda.max_memory_allocated(device) if gpu else None
        alone = statistics.median(seconds(lambda: _model_alone(model, loader, device), device) for _ in range(3))
        timings = PhaseTimes(device)
        timed = seconds(lambda: collect(timings), device) * 1e6
        plan = OBSPruner(model, cfg).plan()
    parts = {phase: value * 1e6 for phase, value in timings.device_seconds().items()}
    floors = _floors(encoder, shape, plan.buffer_rows[0], DTYPES[dtype], device, context.ceilings)
    host = {phase: seconds * 1e6 for phase, seconds in timings.host_seconds.items()}
    _explain(context, statistics.median(samples), timed, parts, host, floors, alone * 1e6)
    flops, num_bytes = _work(encoder, shape, plan.buffer_rows[0], DTYPES[dtype], device)
    found = spread(samples)
    return make_row(
        ROW_OP,
        shape,
        us=found.us,
        p20=found.p20,
        p80=found.p80,
        path="model",
        config={"backend": backend, "rows": plan.buffer_rows[0]},
        dtype=dtype,
        name=name if gpu else f"{name} (small, CPU)",
        num_bytes=round(sum(num_bytes.values())),
        num_flops=round(sum(flops.values())),
        parts=parts,
        detail={
            "repeats": found.repeats,
            "error": error,
            "error_limit": CHECK_LIMIT[dtype],
            "phases_run_us": timed,
            "host_us": host,
            "floor_us": floors,
            "forward_backward_alone_us": alone * 1e6,
            "peak_bytes": peak,
            "planned_bytes": plan.peak_bytes,
        }
        | ({} if gpu else {"real_shape": shape | {"S": NUM_GRADS, "T": 384, "W": SHAPES[name].weights}}),
    )


def _explain(
    context: Context,
    whole: float,
    timed: float,
    parts: dict[str, float],
    host: dict[str, float],
    floors: dict[str, float],
    alone: float,
) -> None:
    """The breakdown as text: each phase beside the least that it can take."""
    context.say(f"    {'phase':12s} {'ms':>10s} {'share':>7s} {'host ms':>10s} {'floor ms':>10s}")
    for phase in PHASES:
        context.say(
            f"    {phase:12s} {parts[phase] / 1e3:10,.1f} {parts[phase] / timed:7.1%} {host[phase] / 1e3:10,.1f} "
            f"{floors.get(phase, 0.0) / 1e3:10,.1f}"
        )
    rest = timed - sum(parts.values())
    context.say(f"    {'rest':12s} {rest / 1e3:10,.1f} {rest / timed:7.1%}")
    context.say(
        f"    whole {whole / 1e6:.3f} s (with events {timed / 1e6:.3f} s), floor {sum(floors.values()) / 1e6:.3f} s; "
        f"forward and backward of the model alone, all weight gradients of the batch: {alone / 1e6:.3f} s"
    )


def _work(
    encoder: Encoder, shape: dict[str, int], rows: int, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, float], dict[str, float]]:
    """Least operations and bytes of each phase.

    Products of weights: 2 W flops a token in the forward pass, again for the gradients of activations, again for those
    of weights. Attention: 4 T H flops a token and layer forward, twice that backward. Bytes of products are left to the
    matrix units' ceiling; a per-sample gradient is written once and read once, F is read and written for each S.
    """
    tokens, width = shape["S"] * shape["T"], dtype.itemsize
    row_width = gradient_buffer.row_dtype(dtype, device).itemsize
    linear = 2.0 * encoder.weights * tokens
    attention = 4.0 * encoder.tokens * encoder.hidden * encoder.layers * tokens
    gradients = float(row_width * encoder.weights * shape["S"])
    fisher = 2.0 * 4 * encoder.weights * shape["D"]
    # each input once (query, key and value share one) and each output gradient
    seen = encoder.layers * tokens * width * ((3 * encoder.hidden + encoder.ffn) + (5 * encoder.hidden + encoder.ffn))
    flops = {"forward": linear + attention, "backward": linear + 2 * attention, "product": linear}
    num_bytes = {
        "check": float(seen),
        "product": gradients,
        "accumulate": gradients + fisher * -(-shape["S"] // rows),
    }
    return flops, num_bytes


def _floors(
    encoder: Encoder,
    shape: dict[str, int],
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    ceilings: Ceilings,
) -> dict[str, float]:
    """Microseconds of each phase at the measured ceilings of the machine."""
    flops, num_bytes = _work(encoder, shape, rows, dtype, device)
    names = [phase for phase in PHASES if phase in flops or phase in num_bytes]
    return {name: ceilings.floor_us(num_bytes.get(name, 0.0), flops.get(name, 0.0)) for name in names}


def _model_alone(model: nn.Module, loader: list[dict[str, Tensor]], device: torch.device) -> None:
    """What any method has to do at least: forward and backward of every batch, gradients of the weights of linears."""
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    for batch in loader:
        moved = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
        torch.autograd.grad(squad_loss(model, moved).sum(), weights)


def _check(model: nn.Module, cfg: OBSConfig, encoder: Encoder, device: torch.device) -> float:
    """RMS error / RMS of the Fishers of the first and the last layer, of two samples, against one pass a sample."""
    loader = make_batches(encoder, CHECKED_SAMPLES, CHECKED_SAMPLES)
    pruner = OBSPruner(model, cfg)
    pruner.collect(loader, squad_loss)
    worst = 0.0
    for layer in (pruner.layers[0], pruner.layers[-1]):
        wanted: Any = 0.0
        for i in range(CHECKED_SAMPLES):
            sample = {key: value[i : i + 1].to(device) for key, value in loader[0].items()}
            (grad,) = torch.autograd.grad(squad_loss(model, sample).sum(), [layer.weight])
            g = grad.float().reshape(layer.num_blocks, layer.block_size)
            wanted = wanted + g[:, :, None] * g[:, None, :]
        found = layer.fisher_sum
        assert found is not None
        worst = max(worst, float((found - wanted).norm() / wanted.norm()))
    return worst


@contextmanager
def _backend(name: str) -> Iterator[None]:
    """``OBS_KERNELS_BACKEND`` for the block."""
    before = os.environ.get("OBS_KERNELS_BACKEND")
    os.environ["OBS_KERNELS_BACKEND"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["OBS_KERNELS_BACKEND"]
        else:
            os.environ["OBS_KERNELS_BACKEND"] = before


CASE = Case(
    topic="calibration",
    op=OP,
    summary="a whole Fisher: forward, backward, per-sample gradients, accumulation",
    shapes=tuple(SHAPES),
    dtypes=("bf16", "f32"),
    run=run,
)
