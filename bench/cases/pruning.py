# SPDX-License-Identifier: Apache-2.0
"""A whole one-shot pruning of a model under row curvature, from batches on the host to pruned weights.

    python -m bench.run --op pruning --shape bert-base

BERT-base with random weights, 512 questions of 384 tokens without padding, 64:2:8; once with all curvature from the
dense model, once layer by layer. Parts are those of the collection by CUDA events, ``step`` is the rest: factors,
sweeps, solves. On a CPU the model is a small one, and the row says so.
"""

from __future__ import annotations

from torch import Tensor, nn

import obs_kernels as obs
from bench.harness.case import Case
from bench.harness.encoder import CPU_ENCODER, SHAPES, Encoder, build, make_batches, seconds
from bench.harness.rows import Row, make_row
from bench.harness.session import Context
from obs_kernels.dtype_names import DTYPES
from obs_kernels.pruning.phase_times import PhaseTimes
from obs_kernels.pruning.sparsify import run_stages
from obs_kernels.timing import spread

OP = "sweep_rows"
ROW_OP = "sparsify_"
PATTERN = "64:2:8"
NUM_GRADS = 512
CPU_GRADS = 16
BATCH_SIZE = 32
REPEATS = 3


def run(context: Context) -> list[Row]:
    """A row for every shape and dtype, all from the dense model and sequential."""
    selection, rows = context.selection, list[Row]()
    gpu = selection.device.type == "cuda"
    for name in selection.pick(SHAPES, selection.shapes):
        for dtype in selection.dtypes or (("bf16", "f32") if gpu else ("f32",)):
            encoder = SHAPES[name] if gpu else CPU_ENCODER
            try:
                model = build(encoder, DTYPES[dtype], selection.device)
            except ImportError as error:
                context.skip(ROW_OP, {"S": NUM_GRADS}, name, f"transformers is missing ({error})")
                return rows
            for sequential in (False, True):
                rows.append(_row(context, model, encoder, name, dtype, sequential))
    return rows


def output_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """[B]: curvature of the model's own first and last answer tokens."""
    out = model(input_ids=batch["input_ids"])
    return obs.output_probe(out.start_logits) + obs.output_probe(out.end_logits)


def _row(context: Context, model: nn.Module, encoder: Encoder, name: str, dtype: str, sequential: bool) -> Row:
    device = context.selection.device
    gpu = device.type == "cuda"
    count = NUM_GRADS if gpu else CPU_GRADS
    loader = make_batches(encoder, count, BATCH_SIZE)
    cfg = obs.OBSConfig(pattern=PATTERN, curvature="row", sequential=sequential, num_grads=count)
    dense = {key: value.clone() for key, value in model.state_dict().items()}

    def prune(timings: PhaseTimes | None = None) -> None:
        run_stages(obs.OBSPruner(model, cfg), loader, output_loss, timings=timings)

    samples = []
    for _ in range(1 + REPEATS if gpu else 1):  # the first one loads libraries
        samples.append(seconds(prune, device) * 1e6)
        model.load_state_dict(dense)
    timings = PhaseTimes(device)
    whole = seconds(lambda: prune(timings), device) * 1e6
    model.load_state_dict(dense)
    parts = {phase: value * 1e6 for phase, value in timings.device_seconds().items() if value}
    found = spread(samples[1:] or samples)
    shape = {"S": count, "batch": BATCH_SIZE, "T": encoder.tokens, "W": encoder.weights}
    return make_row(
        ROW_OP,
        shape,
        us=found.us,
        p20=found.p20,
        p80=found.p80,
        path="model",
        config={"backend": "cuda" if gpu else "reference", "config": "sequential" if sequential else "all at once"},
        dtype=dtype,
        pattern=PATTERN,
        name=name if gpu else f"{name} (small, CPU)",
        parts=parts | {"step": whole - sum(parts.values())},
        detail={"repeats": found.repeats}
        | ({} if gpu else {"real_shape": shape | {"S": NUM_GRADS, "T": 384, "W": SHAPES[name].weights}}),
    )


CASE = Case(
    topic="pruning",
    op=OP,
    summary="a whole one-shot pruning under row curvature",
    shapes=tuple(SHAPES),
    dtypes=("bf16", "f32"),
    run=run,
)
