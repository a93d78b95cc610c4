# SPDX-License-Identifier: Apache-2.0
"""``obs_update``: the joint update of the kept weights of a tensor of 14M.

The floor is F read once, the mask read once, and the weight read and written once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from bench import peers
from bench.cases.inverse import random_spd
from bench.harness.backends import called, runnable, some_blocks
from bench.harness.case import WEIGHTS, Case, Check, Inputs, Problem, Selection, Variant
from obs_kernels import ops
from obs_kernels.dtype_names import DTYPES
from obs_kernels.ops.dispatch import kernel

OP = "obs_update"
SIZES = (8, 16, 32, 64, 128)
SHARES = {"kept 1/4": 4, "kept 1/2": 2}
"""Kept entries of a block are D over this: 2:8 and 2:4 keep as many."""
CPU_ENTRIES = 2**21
"""Entries of F on a CPU."""
DAMP = 0.01
ERROR = 2e-5
"""RMS error over RMS weight, as in the tests, at a condition of about 20."""

Update = Callable[[Inputs], Tensor]


def problems(selection: Selection) -> Iterator[Problem]:
    """Every size and kept share that was asked for."""
    for name in selection.pick(CASE.shapes, selection.shapes):
        for size in SIZES if selection.block_sizes is None else selection.block_sizes:
            for dtype in selection.pick(CASE.dtypes, selection.dtypes):
                for share in SHARES:
                    if size // SHARES[share]:
                        yield problem(selection, name, size, dtype, share)


def problem(selection: Selection, name: str, size: int, dtype: str, share: str) -> Problem:
    """One size: k^3 / 3 operations a block for the factor, 2 k^2 for its solves, 2 D^2 for the right side."""
    real = WEIGHTS[name] // size
    count = real if selection.device.type == "cuda" else max(1, min(real, CPU_ENTRIES // size**2))
    kept = size // SHARES[share]
    shape = {"B": count, "D": size, "K": kept}
    width = torch.finfo(DTYPES[dtype]).bits // 8
    outputs = width * count * size
    given = 4 * count * size**2 + (width + 1) * count * size
    return Problem(
        op=OP,
        name=name,
        shape=shape,
        dtype=dtype,
        num_bytes=given + outputs,
        num_flops=count * (kept**3 // 3 + 2 * kept**2 + 2 * size**2),
        set_bytes=given + outputs,
        make=lambda number: make_inputs(count, size, kept, DTYPES[dtype], selection.device, seed=number),
        variants=(*ours(selection, size, DTYPES[dtype]), *(_peers() if selection.peers else ())),
        real_shape=shape | {"B": real} if count != real else None,
        pattern=share,
    )


def make_inputs(
    count: int, size: int, kept: int, dtype: torch.dtype, device: torch.device, *, seed: int
) -> dict[str, Tensor]:
    """F of condition about 20, a normal weight, and ``kept`` places of each block drawn at random."""
    generator = torch.Generator(device).manual_seed(seed)
    fisher = random_spd(count, size, torch.float32, device, seed=seed)
    order = torch.rand(count, size, generator=generator, device=device)
    mask = torch.zeros(count, size, dtype=torch.bool, device=device)
    mask.scatter_(1, order.topk(kept, dim=1).indices, True)
    weight = torch.randn(count, size, generator=generator, device=device).to(dtype)
    return {"fisher": fisher, "mask": mask, "weight": weight}


def ours(selection: Selection, size: int, dtype: torch.dtype) -> Iterator[Variant]:
    """Each backend on ready tensors, and the public op on the default one."""
    damp = torch.full((1,), DAMP, device=selection.device)

    def variant(name: str, run: Update, backend: str, path: str = "kernel") -> Variant:
        return Variant(name, run, partial(check_update, run), {"backend": backend}, path)

    def ready(inputs: Inputs, backend: str) -> Tensor:
        updated = kernel(OP, backend)(inputs["weight"], inputs["fisher"], inputs["mask"], damp=damp, update="joint")
        assert isinstance(updated, Tensor)
        return updated

    def public(inputs: Inputs, backend: str) -> Tensor:
        return ops.obs_update(inputs["weight"], inputs["fisher"], inputs["mask"], damp=DAMP, backend=backend)

    like = (
        torch.empty(0, size, dtype=dtype, device=selection.device),
        torch.empty(0, size, size, device=selection.device),
    )
    for backend in runnable(OP, selection, *like):
        yield variant(backend, partial(ready, backend=backend), backend)
    chosen = called(OP, selection, *like)
    if chosen is not None:
        yield variant(f"call {chosen}", partial(public, backend=chosen), chosen, "call")


def _peers() -> Iterator[Variant]:
    known = {
        "torch linalg.solve of the kept part": partial(peers.kept_solve, solve=peers.lu_solve, damp=DAMP),
        "torch cholesky_solve of the kept part": partial(peers.kept_solve, solve=peers.cholesky_solve, damp=DAMP),
    }
    for name, function in known.items():

        def run(inputs: Inputs, function: Callable[..., Tensor] = function) -> Tensor:
            return function(inputs["weight"], inputs["fisher"], inputs["mask"])

        yield Variant(name, run, partial(check_update, run), {"peer": name}, peer=True)


def check_update(run: Update, inputs: Inputs) -> Check:
    """RMS error of some blocks, far apart, of a call at full size, in float64; and true zeros at pruned places."""
    weight, fisher, mask = inputs["weight"], inputs["fisher"], inputs["mask"]
    updated = run(inputs)
    if bool(updated[~mask].any()):
        return Check(float("nan"), 0.0)
    chosen = some_blocks(fisher.shape[0]).to(fisher.device)
    keep = mask[chosen].cpu()
    w = weight[chosen].double().cpu()
    exact = fisher[chosen].double().cpu() + DAMP * torch.eye(fisher.shape[1], dtype=torch.float64)
    wanted = peers.kept_solve(w, exact, keep, solve=peers.lu_solve, damp=0.0)
    error = (updated[chosen].double().cpu() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
    rounding = torch.finfo(weight.dtype).eps if weight.dtype != torch.float32 else 0.0
    return Check(float(error), ERROR + rounding)


CASE = Case(
    topic="update",
    op=OP,
    summary="joint OBS update of the kept weights",
    shapes=("14M",),
    dtypes=("f32", "bf16"),
    problems=problems,
)
