# SPDX-License-Identifier: Apache-2.0
"""``sweep_rows``: choice and compensation of whole rows with one Hessian, its factorisation included.

The floor is the weight read and written, the mask written and H read once. Without the re-solve at the end, unless a
variant says so: that is the same for every backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness.backends import called, runnable
from bench.harness.case import Case, Check, Inputs, Problem, Selection, Variant
from obs_kernels import ops, reference
from obs_kernels.ops.dispatch import kernel
from obs_kernels.patterns import NMPattern, VNMPattern, parse_pattern
from obs_kernels.reference.hessian import row_loss
from obs_kernels.reference.sparsegpt import sparsegpt

OP = "sweep_rows"
SHAPES = {
    "4096x4096": (4096, 4096),
    "14336x4096": (14336, 4096),
    "4096x14336": (4096, 14336),
    "ffn-up": (3072, 768),
    "ffn-down": (768, 3072),
}
"""Rows and columns; ffn-up and ffn-down are those of BERT-base."""
PATTERNS = ("2:4", "2:8", "64:2:8", "64:4:8")
CPU_SHARE = 16
"""A CPU takes one of so many rows and columns."""
DAMP = 0.01
SLOW_WEIGHTS = 20_000_000
"""Beyond so many weights the reference is measured on a GPU only on request."""
CHECKED_ROWS = 64
"""Rows (or panels of them) that are swept in f64 too: rows do not know of each other."""
LOSS = 5e-3
"""Relative; loss of those rows against f64: near ties fall either way, and later groups go on from there."""

Sweep = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def problems(selection: Selection) -> Iterator[Problem]:
    """Every size and pattern that was asked for; ``--block-size`` picks m."""
    for name in selection.pick(SHAPES, selection.shapes):
        for text in PATTERNS:
            pattern: NMPattern = parse_pattern(text)
            if selection.block_sizes is None or pattern.m in selection.block_sizes:
                yield problem(selection, name, pattern)


def problem(selection: Selection, name: str, pattern: NMPattern) -> Problem:
    """One weight and its Hessian."""
    real = SHAPES[name]
    whole = selection.device.type == "cuda"
    rows, cols = real if whole else (max(CHECKED_ROWS, real[0] // CPU_SHARE), real[1] // CPU_SHARE)
    num_bytes = 9 * rows * cols + 4 * cols * cols
    return Problem(
        op=OP,
        name=name,
        shape={"R": rows, "C": cols},
        dtype="f32",
        num_bytes=num_bytes,
        num_flops=rows * cols * cols + cols**3 // 3,
        set_bytes=num_bytes,
        make=lambda number: make(rows, cols, selection.device, seed=number),
        variants=(*ours(selection, pattern, rows * cols), *(_peers(selection, pattern) if selection.peers else ())),
        real_shape=None if whole else {"R": real[0], "C": real[1]},
        pattern=str(pattern),
    )


def ours(selection: Selection, pattern: NMPattern, weights: int) -> Iterator[Variant]:
    """Each backend, the best one with the re-solve, and the public op."""
    like = (torch.empty(0, 0, device=selection.device),) * 2 + (None, pattern, "combinatorial")
    backends = runnable(OP, selection, *like)
    for backend in backends:
        on_gpu = backend == "reference" and selection.device.type == "cuda"
        if on_gpu and weights > SLOW_WEIGHTS and selection.backends is None:
            continue
        run = _by(selection, backend, pattern, resolve=False)
        yield _variant(backend, run, pattern, {"backend": backend})
        if backend == backends[0]:
            run = _by(selection, backend, pattern, resolve=True)
            config = {"backend": backend, "config": "with re-solve"}
            yield _variant(f"{backend}, with re-solve", run, pattern, config)
    chosen = called(OP, selection, *like)
    if chosen is not None:
        run = partial(_public, str(pattern), chosen)
        yield _variant(f"call {chosen}", run, pattern, {"backend": chosen}, "call")


def _variant(name: str, run: Sweep, pattern: NMPattern, config: dict[str, str], path: str = "kernel") -> Variant:
    check = partial(check_sweep, run, pattern=pattern)
    return Variant(name, lambda i: run(i["weight"], i["hessian"]), check, config, path)


def _by(selection: Selection, backend: str, pattern: NMPattern, *, resolve: bool) -> Sweep:
    run, damp = kernel(OP, backend), torch.full((1,), DAMP, device=selection.device)
    options = sweep_options(pattern, resolve=resolve)
    return lambda weight, hessian: run(weight, hessian, str(pattern), damp=damp, **options)


def sweep_options(pattern: NMPattern, *, resolve: bool) -> dict[str, Any]:
    """What a backend's ``sweep_rows`` takes beside weight, Hessian, pattern and damping."""
    fixed = {"row_scale": None, "method": "combinatorial", "mask": None}
    return {**fixed, "num_columns": num_columns(pattern), "resolve": resolve}


def num_columns(pattern: NMPattern) -> int:
    """What the op takes for it; of no account without panels."""
    return pattern.num_columns if isinstance(pattern, VNMPattern) else 4


def _public(pattern: str, backend: str, weight: Tensor, hessian: Tensor) -> tuple[Tensor, ...]:
    count = num_columns(parse_pattern(pattern))
    found = ops.sweep_rows(weight, hessian, pattern, damp=DAMP, num_columns=count, resolve=False, backend=backend)
    assert found.weight is not None
    return found.mask, found.weight, found.saliency


def _peers(selection: Selection, pattern: NMPattern) -> Iterator[Variant]:
    """SparseGPT's loop over columns, which knows no panels."""
    if isinstance(pattern, VNMPattern):
        return
    damp = torch.full((1,), DAMP, device=selection.device)
    name = "SparseGPT, per column"
    run = partial(sparsegpt, pattern=str(pattern), damp=damp, mask=None)
    yield Variant(
        name,
        lambda i: run(i["weight"], i["hessian"]),
        lambda i: _bookkeeping(run(i["weight"], i["hessian"]), i),
        {"peer": name},
        peer=True,
    )


def make(rows: int, cols: int, device: torch.device, *, seed: int) -> Inputs:
    """Weight, and H = X^T X / T of T = 2 C inputs with a common part."""
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.empty(rows, cols, device=device).normal_(generator=generator)
    hessian = torch.zeros(cols, cols, device=device)
    for _ in range(2):
        x = torch.empty(cols, cols, device=device).normal_(generator=generator)
        x += 0.5 * torch.empty(cols, 1, device=device).normal_(generator=generator)
        reference.accumulate_hessian_(hessian, x, token_weight=None, scale=1 / (2 * cols))
    return {"weight": weight, "hessian": hessian}


def check_sweep(run: Sweep, inputs: Inputs, *, pattern: NMPattern) -> Check:
    """Loss of the first rows against the sweep in f64, and of all of them against that of the weights."""
    found = run(inputs["weight"], inputs["hessian"])
    weight, hessian = inputs["weight"][:CHECKED_ROWS].double(), inputs["hessian"].double()
    damp = torch.full((1,), DAMP, dtype=torch.float64, device=weight.device)
    options = sweep_options(pattern, resolve=False)
    best = reference.sweep_rows(weight, hessian, str(pattern), damp=damp, **options)[2].sum()
    mine = found[2][: CHECKED_ROWS // (pattern.v if isinstance(pattern, VNMPattern) else 1)].double().sum()
    return Check(float((mine / best - 1).abs()), LOSS)


def _bookkeeping(found: tuple[Tensor, ...], inputs: Inputs) -> Check:
    """Reported loss of the first rows against that of their weights."""
    _, new, loss = (t[:CHECKED_ROWS].double() for t in found)
    true = row_loss(new - inputs["weight"][:CHECKED_ROWS].double(), inputs["hessian"].double(), damp=DAMP)
    return Check(float((loss.sum() / true.sum() - 1).abs()), LOSS)


CASE = Case(
    topic="sweep",
    op=OP,
    summary="choice and compensation of rows with one Hessian",
    shapes=tuple(SHAPES),
    dtypes=("f32",),
    problems=problems,
)
