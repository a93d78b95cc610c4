# SPDX-License-Identifier: Apache-2.0
"""Products come to the GPU before the kernel in front of them is done (programmatic dependent launch): nothing may be
read that is not written yet, nor written that is still to be read, eagerly, on other streams and in graphs.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from product_checks import DEVICE, hopper, normal
from torch import Tensor

from obs_kernels import ops, parse_pattern
from obs_kernels.inference.encoders import impose_

pytestmark = pytest.mark.gpu
__all__ = ["hopper"]  # fixture

SIZE, TOKENS, ROUNDS = 1024, 1536, 40
WAYS = (("2:4", "token"), ("2:4", "feature"), ("128:2:8", "feature"), ("128:2:16", "token"))
"""Patterns and layouts: both kernels, and the one that gathers behind a transposition."""


def weight_of(pattern: str, seed: int) -> ops.SparseWeight:
    weight = normal(torch.Generator(DEVICE).manual_seed(seed), (SIZE, SIZE), torch.bfloat16) * SIZE**-0.5
    impose_(weight, parse_pattern(pattern))
    return ops.pack(weight, weight != 0, pattern)


def product(x: Tensor, sparse: ops.SparseWeight, layout: str) -> Tensor:
    """On x [T, C] or, feature-major, [C, T]; y lies as x does."""
    return ops.sparse_linear(x, sparse, x_layout=layout, y_layout=layout, backend="cuda")


def given(layout: str, seed: int) -> Tensor:
    shape = (TOKENS, SIZE) if layout == "token" else (SIZE, TOKENS)
    return normal(torch.Generator(DEVICE).manual_seed(seed), shape, torch.bfloat16)


def with_waits(steps: list[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
    """What ``steps`` make of x if each waits for the one before to end."""
    for step in steps:
        x = step(x)
        torch.cuda.synchronize()
    return x


@torch.no_grad()
@pytest.mark.parametrize(("pattern", "layout"), WAYS)
def test_chains_read_what_is_written_and_write_where_nothing_reads_any_more(pattern, layout):
    weights = [weight_of(pattern, seed) for seed in range(3)]
    steps: list[Callable[[Tensor], Tensor]] = []
    for sparse in weights * 2:
        steps.append(lambda x, sparse=sparse: product(x, sparse, layout))
        steps.append(lambda x: x.mul_(1.5))  # in place: a kernel that is launched behind the end of the one before
    x = given(layout, 0)
    wanted = with_waits(steps, x.clone())
    for _ in range(ROUNDS):
        y = x.clone()
        for step in steps:
            y = step(y)  # what y was before goes back to the allocator, and is the y of the product after next
        assert torch.equal(y, wanted)


@torch.no_grad()
@pytest.mark.parametrize(("pattern", "layout"), WAYS)
def test_what_lies_around_a_product_is_in_order(pattern, layout):
    """x is written right before and right after it, y is read right after it, products follow each other directly."""
    sparse, other = weight_of(pattern, 1), weight_of(pattern, 2)
    first, second = given(layout, 1), given(layout, 2)
    wanted = [product(x, w, layout) for x in (first, second) for w in (sparse, other)]
    torch.cuda.synchronize()
    x = torch.empty_like(first)
    large = torch.empty(64 << 20, device=DEVICE, dtype=torch.uint8)
    for _ in range(ROUNDS):
        large.zero_()  # the writes of x end long after its launch
        x.copy_(first)
        a, b = product(x, sparse, layout), product(x, other, layout)
        x.copy_(second)
        c, d = product(x, sparse, layout), product(x, other, layout)
        x.fill_(torch.nan)
        copies = [y.clone() for y in (a, b, c, d)]
        for y in (a, b, c, d):
            y.fill_(torch.nan)
        assert all(torch.equal(y, want) for y, want in zip(copies, wanted, strict=True))


@torch.no_grad()
@pytest.mark.parametrize(("pattern", "layout"), WAYS)
def test_a_weight_that_changed_is_packed_before_it_is_read(pattern, layout):
    sparse, other = weight_of(pattern, 1), weight_of(pattern, 2)
    x = given(layout, 1)
    wanted = product(x, sparse, layout), product(x, other, layout)
    torch.cuda.synchronize()
    parts = [(mine, theirs, mine.clone()) for mine, theirs in _parts(sparse, other)]
    for _ in range(ROUNDS):
        for mine, theirs, _ in parts:
            mine.copy_(theirs)
        changed = product(x, sparse, layout)
        for mine, _, before in parts:
            mine.copy_(before)
        back = product(x, sparse, layout)
        assert torch.equal(changed, wanted[1]) and torch.equal(back, wanted[0])


def _parts(a: ops.SparseWeight, b: ops.SparseWeight) -> list[tuple[Tensor, Tensor]]:
    pairs = [(a.values, b.values), (a.codes, b.codes), (a.columns, b.columns)]
    return [(mine, theirs) for mine, theirs in pairs if mine is not None and theirs is not None]


@torch.no_grad()
@pytest.mark.parametrize(("pattern", "layout"), WAYS)
def test_graphs_and_streams_keep_the_order(pattern, layout):
    weights = [weight_of(pattern, seed) for seed in range(2)]
    x, side = given(layout, 3), torch.cuda.Stream()

    def work(x: Tensor) -> Tensor:
        y = product(product(x, weights[0], layout), weights[1], layout)
        side.wait_stream(torch.cuda.current_stream())  # what comes first on a stream follows no kernel, but an event
        with torch.cuda.stream(side):
            left = product(y, weights[0], layout)
        right = product(y, weights[1], layout)
        torch.cuda.current_stream().wait_stream(side)
        z = product(left, weights[0], layout)  # behind two streams
        return z + product(right, weights[1], layout)

    for _ in range(2):
        wanted = work(x)
    torch.cuda.synchronize()
    graph, static = torch.cuda.CUDAGraph(), torch.zeros_like(x)
    with torch.cuda.graph(graph):
        found = work(static)
    for _ in range(ROUNDS):
        static.copy_(x)
        graph.replay()
        static.zero_()
        assert torch.equal(found, wanted)
        assert torch.equal(work(x), wanted)
