# SPDX-License-Identifier: Apache-2.0
"""``accumulate_fisher_``: S gradients into the block Fisher of a model.

The floor is the gradients read once and F read and written once; a kernel that reads one triangle of F can beat it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from bench import peers
from bench.harness.backends import called, runnable, some_blocks
from bench.harness.case import WEIGHTS, Case, Check, Inputs, Problem, Selection, Variant
from obs_kernels import ops
from obs_kernels.dtype_names import DTYPES
from obs_kernels.ops.dispatch import kernel

OP = "accumulate_fisher_"
BLOCK_SIZES = (4, 8, 16, 32, 50, 64, 128)
SAMPLES = (32, 64)
SCALE = 1 / 1024
"""A power of two; F grows by about S / 1024 a call, so thousands of calls on one buffer stay far from overflow."""
RMS_PER_SQRT_SAMPLE = 1e-6
"""RMS error / RMS increment, times sqrt(S): S rounded products are summed in f32. Plain tf32 fails it by far."""

Accumulate = Callable[[Tensor, Tensor], object]


def problems(selection: Selection) -> Iterator[Problem]:
    """Every size that was asked for."""
    for name in selection.pick(WEIGHTS, selection.shapes):
        for size in selection.pick(BLOCK_SIZES, None) if selection.block_sizes is None else selection.block_sizes:
            for samples in SAMPLES if selection.samples is None else selection.samples:
                for dtype in selection.pick(CASE.dtypes, selection.dtypes):
                    yield problem(selection, name, size, samples, dtype)


def problem(selection: Selection, name: str, size: int, samples: int, dtype: str) -> Problem:
    """One size, with our backends and the peers."""
    real = WEIGHTS[name] // size
    blocks = selection.cut(real)
    width = torch.finfo(DTYPES[dtype]).bits // 8
    fisher_bytes, grad_bytes = 4 * blocks * size * size, width * samples * blocks * size
    shape = {"B": blocks, "D": size, "S": samples}

    def make(number: int) -> Inputs:
        generator = torch.Generator(selection.device).manual_seed(number)
        grads = torch.empty(samples, blocks * size, dtype=DTYPES[dtype], device=selection.device)
        return {
            "fisher": torch.zeros(blocks, size, size, device=selection.device),
            "grads": grads.normal_(generator=generator),
        }

    one_gradient = {
        "share": 1 / samples,
        "shape": shape | {"S": 1},
        "num_bytes": 2 * fisher_bytes + grad_bytes // samples,
        "num_flops": 4 * blocks * size * size,
    }
    return Problem(
        op=OP,
        name=name,
        shape=shape,
        dtype=dtype,
        num_bytes=2 * fisher_bytes + grad_bytes,
        num_flops=2 * samples * blocks * size * size,
        set_bytes=fisher_bytes + grad_bytes,
        make=make,
        variants=(*ours(selection, size, samples, dtype), *(_peers(one_gradient) if selection.peers else ())),
        real_shape=shape | {"B": real} if blocks != real else None,
    )


def ours(selection: Selection, size: int, samples: int, dtype: str) -> Iterator[Variant]:
    """Each backend on ready tensors, the public op on the default one, and forced tuning records in a sweep."""

    def variant(name: str, run: Accumulate, config: dict[str, Any], path: str = "kernel") -> Variant:
        return Variant(name, lambda i: run(i["fisher"], i["grads"]), partial(check_accumulate, run), config, path)

    like = (
        torch.empty(0, size, size, device=selection.device),
        torch.empty(samples, 0, dtype=DTYPES[dtype], device=selection.device),
    )
    for backend in runnable(OP, selection, *like):
        yield variant(backend, partial(kernel(OP, backend), scale=SCALE), {"backend": backend})
        for record, run in _forced(backend, size, samples) if selection.sweep else ():
            yield variant(f"{backend} {record}", run, {"backend": backend, "forced": True})
    chosen = called(OP, selection, *like)
    if chosen is not None:
        public = partial(ops.accumulate_fisher_, scale=SCALE, backend=chosen)
        yield variant(f"call {chosen}", public, {"backend": chosen}, "call")


def _forced(backend: str, size: int, samples: int) -> Iterator[tuple[str, Accumulate]]:
    """Tuning records near the chosen one, each with a call that forces it."""
    if backend != "triton" or find_spec("triton") is None:
        return
    from obs_kernels.triton_kernels.fisher import launch_accumulate_fisher
    from obs_kernels.triton_kernels.tuning import fisher_config

    chosen = fisher_config(size, samples)
    for tiles in sorted({max(1, chosen.tiles // 2), chosen.tiles, 2 * chosen.tiles}):
        for warps in (2, 4, 8):
            for stages in (1, 2, 3):
                record = dataclasses.replace(chosen, tiles=tiles, warps=warps, stages=stages)
                if record != chosen:
                    yield str(record), partial(launch_accumulate_fisher, scale=SCALE, config=record)


def _peers(one_gradient: dict[str, Any]) -> Iterator[Variant]:
    baddbmm = partial(peers.baddbmm_fisher_, scale=SCALE)
    name = "torch baddbmm"
    yield Variant(
        name,
        lambda i: baddbmm(i["fisher"], i["grads"]),
        partial(check_accumulate, baddbmm),
        {"peer": name},
        peer=True,
    )
    # It has F^-1 at the end, which we get by one invert_spd for all gradients together: see bench/cases/inverse.py.
    name = "sparseml, per gradient"
    yield Variant(
        name,
        lambda i: peers.sherman_morrison_(i["fisher"], i["grads"][0], samples=1024),
        check_recursion,
        {"peer": name},
        peer=True,
        **one_gradient,
    )


def check_accumulate(run: Accumulate, inputs: Inputs) -> Check:
    """The increment of some blocks, far apart, of a call at full size: RMS error against float64."""
    fisher, grads = inputs["fisher"], inputs["grads"]
    chosen = some_blocks(fisher.shape[0]).to(fisher.device)
    fisher.zero_()
    run(fisher, grads)
    g = grads.unflatten(1, fisher.shape[:2])[:, chosen].double()
    wanted = SCALE * torch.einsum("sbi,sbj->bij", g, g)
    error = (fisher[chosen].double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
    return Check(float(error), RMS_PER_SQRT_SAMPLE * grads.shape[0] ** 0.5)


def check_recursion(inputs: Inputs) -> Check:
    """One step from finv = I against the inverse of I + g g^T / 1024 in float64."""
    finv, grad = inputs["fisher"], inputs["grads"][0]
    chosen = some_blocks(finv.shape[0]).to(finv.device)
    finv.zero_().diagonal(dim1=1, dim2=2).fill_(1.0)
    peers.sherman_morrison_(finv, grad, samples=1024)
    g = grad.view(finv.shape[:2])[chosen].double()
    eye = torch.eye(finv.shape[1], dtype=torch.float64, device=finv.device)
    wanted = torch.linalg.inv(eye + g[:, :, None] * g[:, None, :] / 1024)
    return Check(float((finv[chosen].double() - wanted).abs().max()), 1e-5)  # entries up to 1, D terms in f32


CASE = Case(
    topic="fisher",
    op=OP,
    summary="S gradients into the block Fisher",
    shapes=tuple(WEIGHTS),
    dtypes=("f32", "bf16"),
    problems=problems,
)
