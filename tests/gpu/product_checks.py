# SPDX-License-Identifier: Apache-2.0
"""Weights, inputs and comparisons that the GPU tests of the sparse product share."""

from __future__ import annotations

import importlib
import itertools
from dataclasses import replace
from functools import cache
from types import ModuleType

import pytest
import torch
from masks import random_mask
from test_matmul import expected
from torch import Tensor

from obs_kernels import _ext, parse_pattern
from obs_kernels.ops import SparseWeight, pack
from obs_kernels.patterns import NMPattern, VNMPattern

DEVICE = "cuda"
NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float16, torch.bfloat16]
GRADIENT = 2.0
"""Times eps of the dtype, relative to the largest: the gradient behind the activation is rounded once more."""


@pytest.fixture
def hopper() -> None:
    """Skips where the tensor cores lack the product."""
    found = torch.cuda.get_device_capability()
    if found != (9, 0):
        pytest.skip(f"wgmma.sp needs sm_90, found sm_{found[0]}{found[1]}")


@pytest.fixture
def matmul() -> ModuleType:
    return importlib.import_module("obs_kernels.cuda_calls.matmul")


@pytest.fixture
def gen() -> torch.Generator:
    return torch.Generator(device=DEVICE).manual_seed(77)


def integers(gen: torch.Generator, limit: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randint(-limit, limit + 1, shape, generator=gen, device=DEVICE).to(dtype)


def normal(gen: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=gen, device=DEVICE).to(dtype)


def random_places(gen: torch.Generator, rows: int, cols: int, text: str) -> Tensor:
    """A mask with some groups that keep fewer than n."""
    with torch.device(DEVICE):
        return random_mask(gen, rows, cols, parse_pattern(text), drop=0.1)


def normal_weight(
    gen: torch.Generator, rows: int, cols: int, text: str, dtype: torch.dtype
) -> tuple[SparseWeight, Tensor]:
    """(packed, dense)."""
    mask = random_places(gen, rows, cols, text)
    dense = (normal(gen, (rows, cols), torch.float32) / cols**0.5).to(dtype).masked_fill(~mask, 0.0)
    return pack(dense, mask, text), dense


@cache
def integer_weight(rows: int, cols: int, text: str, dtype: torch.dtype) -> tuple[SparseWeight, Tensor]:
    """(packed, dense) with entries of -3 to 3: with x of -7 to 7 all sums are exact in f32, in any order."""
    gen = torch.Generator(device=DEVICE).manual_seed(1000 * rows + cols)
    mask = random_places(gen, rows, cols, text)
    dense = integers(gen, 3, (rows, cols), dtype).masked_fill(~mask, 0.0)
    return pack(dense, mask, text), dense


def assert_exact(y: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None = None, case: object = "") -> None:
    """``y`` is the float64 product, rounded once; NaN is wrong."""
    wanted = expected(x, dense, bias, None).to(x.dtype)
    assert y.shape == wanted.shape and y.dtype == wanted.dtype, case
    bad = (y != wanted).nonzero()
    assert not len(bad), f"{case}: {len(bad)} of {y.numel()} are wrong, the first at {bad[0].tolist()}"


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.int16), other.contiguous().view(torch.int16))


def every_place(rows: int, cols: int, pattern: NMPattern) -> Tensor:
    """A mask whose panels have their four columns at the extremes of the group.

    Each of the 128 rows of a tile keeps each of the six pairs of the four in every group, over six tiles.
    """
    m, v = pattern.m, pattern.v if isinstance(pattern, VNMPattern) else 1
    half = m // 2
    fours = [(0, 1, 2, 3), (m - 4, m - 3, m - 2, m - 1), (0, 1, m - 2, m - 1), (0, half - 1, half, m - 1)]
    pairs = torch.tensor(list(itertools.combinations(range(4), 2)))
    row, group = torch.arange(rows)[:, None], torch.arange(cols // m)
    four, pair = torch.tensor(fours)[(row // v + group) % 4], pairs[(row // 128 + row % 128 + group) % 6]
    kept = torch.zeros(rows, cols // m, m, dtype=torch.bool).scatter_(2, four.gather(2, pair), True)
    return kept.flatten(1).to(DEVICE)


def rows_between_nans(x: Tensor) -> Tensor:
    """A copy of rows that lie apart, at multiples of 16 bytes, in a buffer of NaN on all sides."""
    rows, width = x.shape
    buffer = torch.full((rows + 16, -(-width // 8) * 8 + 64), NAN, dtype=x.dtype, device=x.device)
    return buffer[8 : 8 + rows, 32 : 32 + width].copy_(x)


def prepacked_kept(matmul: ModuleType, sparse: SparseWeight) -> Tensor:
    return matmul.prepack(*matmul.kept_columns(sparse.values, sparse.codes, sparse.columns), "2:4")


def fresh(sparse: SparseWeight) -> SparseWeight:
    """The same weight in memory that no call has packed yet."""
    columns = None if sparse.columns is None else sparse.columns.clone()
    return replace(sparse, values=sparse.values.clone(), codes=sparse.codes.clone(), columns=columns)


def taken() -> tuple[int, int]:
    """(launches of the compiled module, allocations) so far."""
    return _ext.load().launch_count(), torch.cuda.memory_stats()["allocation.all.allocated"]


def takes_gather(matmul: ModuleType, case: tuple[int, int, int, str], x_layout: str) -> bool:
    """Whether a call of (tokens, rows, cols, pattern) runs on the kept columns alone."""
    tokens, rows, cols, text = case
    found: bool = matmul.gathers(parse_pattern(text), rows, cols, tokens, x_layout, torch.device(DEVICE, 0))
    return found
