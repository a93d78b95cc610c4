# SPDX-License-Identifier: Apache-2.0
"""Products come to the GPU before the kernel in front of them is done (programmatic dependent launch): nothing may be
read that is not written yet, nor written that is still to be read, eagerly, on other streams and in graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from product_checks import DEVICE, hopper, matmul, normal, normal_weight, prepacked_kept, takes_gather
from torch import Tensor

from obs_kernels import ops

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]
__all__ = ["hopper", "matmul"]  # fixtures

SIZE, TOKENS, ROUNDS = 2048, 1536, 40
WAYS = (("2:4", "token"), ("2:4", "feature"), ("128:2:8", "feature"), ("128:2:16", "token"))
"""Patterns and layouts: both kernels, and the one that gathers behind a transposition."""
Step = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def nan_filled_empty() -> None:
    """Left out here: it fills new memory by a kernel in front of each product, which then follows no other product."""


def weight_of(pattern: str, seed: int) -> ops.SparseWeight:
    return normal_weight(torch.Generator(DEVICE).manual_seed(seed), SIZE, SIZE, pattern, torch.bfloat16)[0]


def product(x: Tensor, sparse: ops.SparseWeight, layout: str) -> Tensor:
    """On x [T, C] or, feature-major, [C, T]; y lies as x does."""
    return ops.sparse_linear(x, sparse, x_layout=layout, y_layout=layout, backend="cuda")


def given(layout: str, seed: int) -> Tensor:
    shape = (TOKENS, SIZE) if layout == "token" else (SIZE, TOKENS)
    return normal(torch.Generator(DEVICE).manual_seed(seed), shape, torch.bfloat16)


def hold() -> None:
    """Keeps the device busy for about a millisecond, so that launches behind it lie ready: a host may be the slower."""
    torch.cuda._sleep(2_000_000)


def with_waits(steps: list[Step], x: Tensor) -> Tensor:
    """What ``steps`` make of x if each waits for the one before to end."""
    for step in steps:
        torch.cuda.synchronize()
        x = step(x)
    torch.cuda.synchronize()
    return x


def test_the_ways_are_what_they_say(matmul: ModuleType) -> None:
    for pattern, layout in WAYS:
        gathers = pattern.count(":") == 2 and takes_gather(matmul, (TOKENS, SIZE, SIZE, pattern), layout)
        assert gathers == (pattern != "2:4"), (pattern, layout)


@torch.no_grad()
@pytest.mark.parametrize("between", [False, True], ids=["products", "and others"])
@pytest.mark.parametrize(("pattern", "layout"), WAYS)
def test_chains_read_what_is_written_and_write_where_nothing_reads_any_more(pattern, layout, between):
    weights = [weight_of(pattern, seed) for seed in range(3)]
    steps: list[Step] = []
    for sparse in weights * 3:
        steps.append(lambda x, sparse=sparse: product(x, sparse, layout))
        if between:
            steps.append(lambda x: x.mul_(1.5))  # in place: a kernel that is launched behind the end of the one before
    x = given(layout, 0)
    wanted = with_waits(steps, x.clone())
    for _ in range(ROUNDS):
        hold()
        y = x.clone()
        for step in steps:
            y = step(y)  # what y was before goes back to the allocator, and is the y of the product after next
        assert torch.equal(y, wanted)


@torch.no_grad()
@pytest.mark.parametrize(("pattern", "layout"), [("2:4", "token"), ("256:2:8", "feature")])
def test_every_tile_waits_for_the_product_before(matmul, pattern, layout):
    """Bare launches between two buffers by turns: each reads what the one before writes, and writes what that reads."""
    sparse = weight_of(pattern, 4)
    options = {"rows": SIZE, "cols": SIZE, "activation": "", "y_layout": layout}
    if layout == "token":
        packed = matmul.prepack(sparse.values, sparse.codes, sparse.columns_or_empty(), pattern)
        tiles = matmul.CONFIGS
    else:
        packed = prepacked_kept(matmul, sparse)
        tiles = matmul.GATHER_CONFIGS
    ours, x = [torch.empty_like(given(layout, 5)) for _ in range(2)], given(layout, 5)

    def launch(source: Tensor, target: Tensor, tile: str) -> Tensor:
        if layout == "token":
            matmul.launch_sparse_linear(source, packed, None, target, config=tile, **options)
        else:
            v = sparse.pattern.v
            matmul.launch_gather_linear(source, sparse.columns, packed, None, target, v=v, config=tile, **options)
        return target

    for tile in tiles:
        steps = [lambda y, tile=tile, turn=turn: launch(y, ours[turn % 2], tile) for turn in range(8)]
        wanted = with_waits(steps, x).clone()
        for _ in range(ROUNDS):
            hold()
            y = x
            for step in steps:
                y = step(y)
            assert torch.equal(y, wanted), tile


@torch.no_grad()
@pytest.mark.parametrize(("pattern", "layout"), WAYS)
def test_what_lies_around_a_product_is_in_order(pattern, layout):
    """x is written right before and right after it, y is read right after it."""
    sparse, other = weight_of(pattern, 1), weight_of(pattern, 2)
    first, second = given(layout, 1), given(layout, 2)
    wanted = [with_waits([lambda x, w=w: product(x, w, layout)], x) for x in (first, second) for w in (sparse, other)]
    x = torch.empty_like(first)
    large = torch.empty(64 << 20, device=DEVICE, dtype=torch.uint8)
    for _ in range(ROUNDS):
        hold()
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
    wanted = [with_waits([lambda x, w=w: product(x, w, layout)], x) for w in (sparse, other)]
    parts = [(mine, theirs, mine.clone()) for mine, theirs in _parts(sparse, other)]
    for _ in range(ROUNDS):
        hold()
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

    def step(number: int) -> Step:
        return lambda x: product(x, weights[number], layout)

    def work(x: Tensor) -> Tensor:
        y = step(1)(step(0)(x))
        side.wait_stream(torch.cuda.current_stream())  # what comes first on a stream follows no kernel, but an event
        with torch.cuda.stream(side):
            left = step(0)(y)
        right = step(1)(y)
        torch.cuda.current_stream().wait_stream(side)
        z = step(0)(left)  # behind two streams
        return z + step(1)(right)

    begin = [step(0), step(1)]
    wanted = with_waits([*begin, step(0), step(0)], x) + with_waits([*begin, step(1), step(1)], x)
    graph, static = torch.cuda.CUDAGraph(), torch.zeros_like(x)
    work(static)
    with torch.cuda.graph(graph):
        found = work(static)
    for _ in range(ROUNDS):
        static.copy_(x)
        graph.replay()
        static.zero_()
        assert torch.equal(found, wanted)
        hold()
        assert torch.equal(work(x), wanted)
