# SPDX-License-Identifier: Apache-2.0
"""``invert_spd``: the inverse of many small symmetric positive definite matrices.

The floor is the matrices read and written once; a kernel that reads one triangle can beat it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from bench import peers
from bench.harness.backends import called, runnable, some_blocks
from bench.harness.case import WEIGHTS, Case, Check, Inputs, Problem, Selection, Variant
from obs_kernels import ops
from obs_kernels.dtype_names import DTYPES
from obs_kernels.ops.dispatch import kernel
from obs_kernels.timing import free_bytes

OP = "invert_spd"
BLOCK_SIZES = (4, 8, 16, 32, 50, 64, 128)
CPU_ENTRIES = 2**21
"""Entries of all matrices on a CPU: fewer large ones, and so many small ones that a call costs less than they do."""
DAMP = 0.01
RESIDUAL = 2.0
"""max |A X - I| <= this * sqrt(D) * eps * cond(A), as in the tests: measured 0.3 to 1.4 without sqrt(D)."""

Invert = Callable[[Tensor], object]


def problems(selection: Selection) -> Iterator[Problem]:
    """Every size that was asked for."""
    for name in selection.pick(WEIGHTS, selection.shapes):
        for size in BLOCK_SIZES if selection.block_sizes is None else selection.block_sizes:
            for dtype in selection.pick(CASE.dtypes, selection.dtypes):
                yield problem(selection, name, size, dtype)


def problem(selection: Selection, name: str, size: int, dtype: str) -> Problem:
    """One size, with our backends and the peers. D^3 operations a matrix: factor a third, inverse two."""
    real = WEIGHTS[name] // size
    count = real if selection.device.type == "cuda" else max(1, min(real, CPU_ENTRIES // size**2))
    shape = {"B": count, "D": size}
    num_bytes = 2 * torch.finfo(DTYPES[dtype]).bits // 8 * count * size * size
    return Problem(
        op=OP,
        name=name,
        shape=shape,
        dtype=dtype,
        num_bytes=num_bytes,
        num_flops=count * size**3,
        set_bytes=num_bytes,  # matrices and inverses
        make=lambda number: {"matrices": random_spd(count, size, DTYPES[dtype], selection.device, seed=number)},
        variants=(*ours(selection, size, DTYPES[dtype]), *(_peers() if selection.peers else ())),
        real_shape=shape | {"B": real} if count != real else None,
    )


def ours(selection: Selection, size: int, dtype: torch.dtype) -> Iterator[Variant]:
    """Each backend on ready tensors, and the public op on the default one."""
    damp = torch.full((1,), DAMP, dtype=dtype, device=selection.device)

    def variant(name: str, run: Invert, backend: str, path: str = "kernel") -> Variant:
        check = partial(check_inverse, run, damp=DAMP)
        return Variant(name, lambda i: run(i["matrices"]), check, {"backend": backend}, path)

    like = torch.empty(0, size, size, dtype=dtype, device=selection.device)
    for backend in runnable(OP, selection, like):
        yield variant(backend, partial(kernel(OP, backend), damp=damp), backend)
    chosen = called(OP, selection, like)
    if chosen is not None:
        yield variant(f"call {chosen}", partial(ops.invert_spd, damp=DAMP, backend=chosen), chosen, "call")


def _peers() -> Iterator[Variant]:
    # Without damping: adding it would cost them a pass of its own.
    known: dict[str, Invert] = {
        "torch cholesky + cholesky_inverse": peers.cholesky_inverse,
        "torch linalg.inv": peers.linalg_inverse,
    }
    for name, run in known.items():

        def call(inputs: Inputs, run: Invert = run) -> object:
            return run(inputs["matrices"])

        yield Variant(name, call, partial(check_inverse, run, damp=0.0), {"peer": name}, peer=True)


def random_spd(count: int, size: int, dtype: torch.dtype, device: torch.device, *, seed: int) -> Tensor:
    """Full matrices [count, size, size] of condition about 20: G G^T / 2D + I / 20 with G [D, 2D] normal."""
    generator = torch.Generator(device).manual_seed(seed)
    out = torch.empty(count, size, size, dtype=dtype, device=device)
    step = max(1, min(1 << 28, free_bytes(device) // 16) // (2 * size * size))
    for part in out.split(step):
        g = torch.empty(len(part), size, 2 * size, dtype=dtype, device=device).normal_(generator=generator)
        torch.bmm(g, g.mT, out=part)
        part.mul_(1 / (2 * size)).diagonal(dim1=1, dim2=2).add_(0.05)
    return out


def check_inverse(run: Invert, inputs: Inputs, *, damp: float) -> Check:
    """Residual of some matrices, far apart, of a call at full size, in float64; and no failed pivot."""
    matrices = inputs["matrices"]
    result = run(matrices)
    inverse, info = result if isinstance(result, tuple) else (result, None)
    if info is not None and bool(info.any()):
        return Check(float("nan"), 0.0)
    assert isinstance(inverse, Tensor)
    chosen = some_blocks(matrices.shape[0]).to(matrices.device)
    eye = torch.eye(matrices.shape[1], dtype=torch.float64)
    exact = matrices[chosen].double().cpu() + damp * eye
    values = torch.linalg.eigvalsh(exact)
    condition = values[:, -1] / values[:, 0]
    error = (exact @ inverse[chosen].double().cpu() - eye).abs().amax((1, 2)) / condition
    limit = RESIDUAL * matrices.shape[1] ** 0.5 * torch.finfo(matrices.dtype).eps
    return Check(float(error.max()), limit)


CASE = Case(
    topic="inverse",
    op=OP,
    summary="batched inverse of symmetric positive definite blocks",
    shapes=tuple(WEIGHTS),
    dtypes=("f32",),
    problems=problems,
)
