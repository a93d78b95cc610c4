# SPDX-License-Identifier: Apache-2.0
"""``accumulate_hessian_``: the activations of 512 sequences of 384 tokens into the Hessian of a layer.

Bound by arithmetic: half the products of x^T x would do, since H is symmetric. Shapes with a ``q`` are calls as row
curvature makes them, one batch of 32 sequences with weights of tokens and an origin; there bytes count too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from bench.harness.backends import called, runnable
from bench.harness.case import Case, Check, Inputs, Problem, Selection, Variant
from obs_kernels import ops
from obs_kernels.dtype_names import DTYPES
from obs_kernels.ops.dispatch import kernel
from obs_kernels.reference.precision import exact_products

OP = "accumulate_hessian_"
TOKENS = 196_608
BATCH_TOKENS = 12_288
SHAPES = {"C768": 768, "C3072": 3072, "C4096": 4096, "C768q": 768, "C3072q": 3072}
SCALE = 1 / TOKENS
CHECKED = 32
"""Rows of H that are compared with f64."""
RMS = 1e-4
"""RMS error / RMS of those rows: some 2^17 products are summed in f32."""

Accumulate = Callable[..., object]
"""Of H and x, with ``token_weight`` and ``origin``."""


def problems(selection: Selection) -> Iterator[Problem]:
    """Every size and dtype that was asked for."""
    for name in selection.pick(SHAPES, selection.shapes):
        for dtype in selection.pick(CASE.dtypes, selection.dtypes):
            yield problem(selection, name, dtype)


def problem(selection: Selection, name: str, dtype: str) -> Problem:
    """One size, with our backends and cuBLAS."""
    weighted = name.endswith("q")
    real, cols = BATCH_TOKENS if weighted else TOKENS, SHAPES[name]
    tokens = selection.cut(real)
    num_bytes = tokens * cols * (torch.finfo(DTYPES[dtype]).bits // 8) + 8 * cols * cols
    num_bytes += 4 * (tokens + cols) if weighted else 0

    def make(number: int) -> Inputs:
        generator = torch.Generator(selection.device).manual_seed(number)
        x = torch.empty(tokens, cols, dtype=DTYPES[dtype], device=selection.device).normal_(generator=generator)
        q = torch.rand(tokens, generator=generator, device=selection.device) if weighted else None
        c = 0.1 * torch.randn(cols, generator=generator, device=selection.device) if weighted else None
        return {
            "hessian": torch.zeros(cols, cols, device=selection.device),
            "x": x,
            "options": {"token_weight": q, "origin": c},
        }

    return Problem(
        op=OP,
        name=name,
        shape={"C": cols, "T": tokens},
        dtype=dtype,
        num_bytes=num_bytes,
        num_flops=tokens * cols * (cols + 1),
        set_bytes=num_bytes,
        make=make,
        variants=(*ours(selection, DTYPES[dtype]), *(_peers() if selection.peers else ())),
        real_shape=None if tokens == real else {"C": cols, "T": real},
    )


def ours(selection: Selection, dtype: torch.dtype) -> Iterator[Variant]:
    """Each backend on ready tensors, and the public op."""
    like = (torch.empty(0, 0, dtype=dtype, device=selection.device), torch.empty(0, 0, device=selection.device))
    for backend in runnable(OP, selection, *like):
        run = partial(kernel(OP, backend), scale=SCALE)
        yield _variant(backend, run, {"backend": backend})
    chosen = called(OP, selection, *like)
    if chosen is not None:
        run = partial(ops.accumulate_hessian_, scale=SCALE, backend=chosen)
        yield _variant(f"call {chosen}", run, {"backend": chosen}, "call")


def _variant(name: str, run: Accumulate, config: dict[str, str], path: str = "kernel", peer: bool = False) -> Variant:
    call = partial(check_sum, run)
    return Variant(name, lambda i: run(i["hessian"], i["x"], **i["options"]), call, config, path, peer)


def _peers() -> Iterator[Variant]:
    name = "torch x^T x"
    yield _variant(name, exact_products()(_product), {"peer": name}, peer=True)


def _product(hessian: Tensor, x: Tensor, *, token_weight: Tensor | None, origin: Tensor | None) -> Tensor:
    x = x.to(hessian.dtype) if origin is None else x.to(hessian.dtype) - origin
    return hessian.addmm_(x.mT, x if token_weight is None else x * token_weight[:, None], alpha=SCALE)


def check_sum(run: Accumulate, inputs: Inputs) -> Check:
    """Some rows of H, of a call at full size, against float64."""
    hessian, x, options = inputs["hessian"].zero_(), inputs["x"], inputs["options"]
    run(hessian, x, **options)
    some = torch.linspace(0, hessian.shape[0] - 1, CHECKED, device=x.device).long()
    wanted = torch.zeros(CHECKED, hessian.shape[0], dtype=torch.float64, device=x.device)
    for tokens in torch.arange(x.shape[0], device=x.device).split(1 << 14):
        u = x[tokens].double() if options["origin"] is None else x[tokens].double() - options["origin"].double()
        q = 1.0 if options["token_weight"] is None else options["token_weight"][tokens].double()[:, None]
        wanted += SCALE * (u[:, some].mT @ (q * u))
    error = (hessian[some].double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
    return Check(float(error), RMS)


CASE = Case(
    topic="hessian",
    op=OP,
    summary="activations into the Hessian of a layer",
    shapes=tuple(SHAPES),
    dtypes=("f32", "bf16"),
    problems=problems,
)
