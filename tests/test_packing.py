# SPDX-License-Identifier: Apache-2.0
"""Stored format version 1: an independent scalar packer, bits kept, and damage refused."""

from __future__ import annotations

import itertools
from dataclasses import replace

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import obs_kernels as obs
from obs_kernels.errors import (
    CheckpointFormatError,
    ConfigError,
    NonFiniteError,
    ShapeNotSupportedError,
    SparsityPatternError,
)
from obs_kernels.ops import SparseWeight, pack, unpack
from obs_kernels.patterns import VNMPattern

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INT_OF = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
PATTERNS = ["2:4", "2:8", "1:4", "4:8", "2:16", "3:5", "1:2", "1:2:4", "2:2:4", "3:2:8", "4:2:16", "1:2:8", "2:2:6"]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(INT_OF[tensor.dtype])


def numbers(text: str) -> tuple[int, int, int]:
    """(v, n, m); v = 0 without panels."""
    parts = [int(x) for x in text.split(":")]
    return (parts[0], parts[1], parts[2]) if len(parts) == 3 else (0, parts[0], parts[1])


def random_mask(gen: torch.Generator, rows: int, cols: int, text: str, *, full: bool = False) -> Tensor:
    """A valid mask; groups keep n entries, or 0 to n of them."""
    v, n, m = numbers(text)
    mask = torch.zeros(rows, cols, dtype=torch.bool)
    for r0, g in itertools.product(range(0, rows, v or 1), range(cols // m)):
        columns = torch.randperm(m, generator=gen)[: 4 if v else m]
        for r in range(r0, r0 + (v or 1)):
            count = n if full else int(torch.randint(0, n + 1, (), generator=gen))
            mask[r, g * m + columns[torch.randperm(len(columns), generator=gen)[:count]]] = True
    return mask


def special_values(gen: torch.Generator, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Random finite bit patterns: subnormals, both zeros, the largest values among them."""
    limits = torch.iinfo(INT_OF[dtype])
    raw = torch.randint(limits.min, limits.max, shape, generator=gen, dtype=INT_OF[dtype]).view(dtype).clone()
    pick = torch.randint(0, 8, shape, generator=gen)
    info = torch.finfo(dtype)
    for case, value in enumerate((-0.0, info.smallest_normal / 4, -info.smallest_normal / 2, info.max, info.min)):
        raw[pick == case] = value
    return torch.where(torch.isfinite(raw), raw, torch.ones_like(raw))


def check_round_trip(weight: Tensor, mask: Tensor, text: str) -> SparseWeight:
    sparse = pack(weight, mask, text)
    sparse.validate()
    dense = unpack(sparse)
    assert dense.shape == weight.shape and dense.dtype == weight.dtype
    assert torch.equal(bits(dense), bits(weight.masked_fill(~mask, 0.0))), "bits must be kept, pruned entries be +0.0"
    assert torch.equal(bits(sparse.to_dense()), bits(dense))
    return sparse


# round trip and layout


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", PATTERNS)
def test_round_trip_and_layout(gen, text, dtype):
    """Bitwise, and byte for byte what the scalar packer of the design page writes; full and thin groups."""
    v, n, m = numbers(text)
    rows, cols = 3 * max(v, 1), 3 * m
    for full in (True, False):
        weight, mask = special_values(gen, (rows, cols), dtype), random_mask(gen, rows, cols, text, full=full)
        before = bits(weight).clone(), mask.clone()
        sparse = check_round_trip(weight, mask, text)
        values, codes, columns = oracle.pack(weight.double().tolist(), mask.tolist(), v, n, m)
        assert sparse.values.dtype == dtype and sparse.codes.dtype == torch.uint8
        assert bits(sparse.values).tolist() == [[_signed(oracle.bits(x, dtype), dtype) for x in row] for row in values]
        assert sparse.codes.tolist() == codes
        assert (None if sparse.columns is None else sparse.columns.tolist()) == columns
        assert sparse.pattern == obs.parse_pattern(text) and sparse.shape == (rows, cols)
        assert torch.equal(bits(weight), before[0]) and torch.equal(mask, before[1])


def _signed(pattern: int, dtype: torch.dtype) -> int:
    width = torch.iinfo(INT_OF[dtype]).bits
    return pattern - (1 << width) if pattern >> (width - 1) else pattern


def test_all_six_patterns_of_2_4():
    """In one byte: two groups of four, lowest bits first; codes for (0,1) (0,2) (0,3) (1,2) (1,3) (2,3)."""
    weight = torch.arange(1.0, 9.0)[None]
    expected = {(0, 1): 0x4, (0, 2): 0x8, (0, 3): 0xC, (1, 2): 0x9, (1, 3): 0xD, (2, 3): 0xE}
    for low, high in itertools.product(expected, repeat=2):
        mask = torch.zeros(1, 8, dtype=torch.bool)
        mask[0, [*low, *(4 + i for i in high)]] = True
        sparse = check_round_trip(weight, mask, "2:4")
        assert sparse.codes.tolist() == [[expected[low] | expected[high] << 4]]
        assert sparse.values.tolist() == [[1.0 + i for i in (*low, *(4 + i for i in high))]]


def test_all_sets_of_2_8():
    weight = torch.arange(1.0, 9.0).expand(28, 8)
    sets = list(itertools.combinations(range(8), 2))
    mask = torch.zeros(28, 8, dtype=torch.bool).scatter_(1, torch.tensor(sets), True)
    sparse = check_round_trip(weight, mask, "2:8")
    assert [tuple(row) for row in sparse.codes.tolist()] == sets and sparse.columns is None
    panels = check_round_trip(weight, mask, "1:2:8")
    for row, kept in enumerate(sets):
        columns = oracle.fill_up(list(kept), 4, 8)
        assert panels.columns[row, 0].tolist() == columns
        assert panels.codes[row].tolist() == [columns.index(kept[0]) | columns.index(kept[1]) << 2]


def test_every_byte_of_codes():
    """All 36 valid bytes of two groups, unpacked from codes made by hand."""
    pairs = list(itertools.combinations(range(4), 2))
    for low, high in itertools.product(pairs, repeat=2):
        byte = low[0] | low[1] << 2 | high[0] << 4 | high[1] << 6
        sparse = SparseWeight(
            torch.tensor([[1.0, 2.0, 3.0, 4.0]]),
            torch.tensor([[byte]], dtype=torch.uint8),
            None,
            obs.parse_pattern("2:4"),
            (1, 8),
        )
        sparse.validate()
        expected = torch.zeros(1, 8)
        expected[0, [low[0], low[1], 4 + high[0], 4 + high[1]]] = torch.tensor([1.0, 2.0, 3.0, 4.0])
        assert torch.equal(unpack(sparse), expected)


def test_empty_slots_hold_plus_zero_at_the_lowest_unused_positions():
    weight = -torch.arange(1.0, 17.0).reshape(1, 16)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 5] = True
    sparse = check_round_trip(weight, mask, "2:8")
    assert sparse.codes.tolist() == [[0, 5, 0, 1]]
    assert sparse.values.tolist() == [[0.0, -6.0, 0.0, 0.0]] and torch.signbit(sparse.values).tolist() == [
        [False, True, False, False]
    ]
    panels = check_round_trip(weight, mask, "1:2:8")
    assert panels.columns.tolist() == [[[0, 1, 2, 5], [0, 1, 2, 3]]]
    assert panels.codes.tolist() == [[0 | 3 << 2 | 0 << 4 | 1 << 6]]


@pytest.mark.parametrize(("groups", "size"), [(1, 1), (2, 1), (3, 2), (5, 3)])
def test_tail_of_codes(gen, groups, size):
    """K = 2 groups; K % 4 == 2 leaves the four high bits of the last byte at 0."""
    mask = random_mask(gen, 3, 4 * groups, "2:4", full=True)
    sparse = check_round_trip(torch.randn(3, 4 * groups, generator=gen), mask, "2:4")
    assert sparse.codes.shape == (3, size) and sparse.values.shape == (3, 2 * groups)
    if groups % 2:
        assert (sparse.codes[:, -1] < 16).all()


@pytest.mark.parametrize(
    ("text", "shape", "bound"),
    [
        ("64:2:8", (128, 256), 0.30),
        ("64:2:16", (128, 256), 0.16),
        ("2:4", (64, 256), 0.57),
        ("128:2:8", (128, 512), 0.29),
    ],
)
def test_bytes_against_dense(gen, text, shape, bound):
    weight = torch.randn(shape, generator=gen).to(torch.bfloat16)
    sparse = check_round_trip(weight, random_mask(gen, *shape, text, full=True), text)
    assert sparse.nbytes <= bound * weight.nbytes
    columns = 0 if sparse.columns is None else sparse.columns.numel()
    assert sparse.nbytes == 2 * sparse.values.numel() + sparse.codes.numel() + columns


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0)])
@pytest.mark.parametrize("text", ["2:4", "2:8", "2:2:8"])
def test_empty(text, shape):
    sparse = check_round_trip(torch.zeros(shape), torch.zeros(shape, dtype=torch.bool), text)
    assert sparse.values.numel() == 0 and (sparse.columns is None) == (text != "2:2:8")


@pytest.mark.parametrize("text", ["2:4", "2:8", "2:2:8"])
def test_strided_arguments(gen, text):
    weight = torch.randn(16, 4, generator=gen).T
    mask = random_mask(gen, 4, 16, text)
    wide = torch.zeros(8, 32, dtype=torch.bool)
    wide[::2, ::2] = mask
    sparse, same = pack(weight, wide[::2, ::2], text), pack(weight.contiguous(), mask, text)
    assert torch.equal(sparse.values, same.values) and torch.equal(sparse.codes, same.codes)
    assert all(t is None or t.is_contiguous() for t in (sparse.values, sparse.codes, sparse.columns))
    assert sparse.columns is None or torch.equal(sparse.columns, same.columns)
    turned = replace(sparse, values=sparse.values.T.contiguous().T, codes=sparse.codes.T.contiguous().T)
    assert torch.equal(unpack(turned), unpack(sparse))


@settings(max_examples=60)
@given(
    st.sampled_from(PATTERNS),
    st.integers(1, 3),
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
)
def test_any_shape(text, high, wide, full, dtype, seed):
    gen = torch.Generator().manual_seed(seed)
    v, _, m = numbers(text)
    rows, cols = high * max(v, 1), wide * m
    check_round_trip(special_values(gen, (rows, cols), dtype), random_mask(gen, rows, cols, text, full=full), text)


def test_searched_panels_pack(gen):
    """From the search to the format: the columns of the choice hold those that are packed."""
    weight = torch.randn(8, 32, generator=gen)
    sel = obs.ops.search_vnm(weight, oracle.random_spd(gen, 32, 8).float(), "4:2:8")
    sparse = check_round_trip(weight, sel.mask, "4:2:8")
    used = sel.mask.view(2, 4, 4, 8).any(1)
    inside = torch.zeros(2, 4, 8, dtype=torch.bool).scatter_(2, sparse.columns.long(), True)
    assert not (used & ~inside).any()


def test_to_moves_and_casts(gen):
    sparse = pack(torch.randn(4, 16, generator=gen), random_mask(gen, 4, 16, "2:2:8"), "2:2:8")
    half = sparse.to(torch.bfloat16)
    assert half.values.dtype == torch.bfloat16 and half.codes.dtype == torch.uint8 and half.columns.dtype == torch.uint8
    assert torch.equal(half.to_dense(), sparse.to_dense().bfloat16())
    meta = sparse.to("meta")
    assert {meta.values.device.type, meta.codes.device.type, meta.columns.device.type} == {"meta"}


# refused input


def test_masks_that_break_the_pattern(gen):
    weight = torch.ones(4, 16)
    mask = torch.zeros(4, 16, dtype=torch.bool)
    mask[2, 8:11] = True
    for text in ("2:4", "2:8", "2:2:8"):
        with pytest.raises(
            SparsityPatternError, match=rf"keeps 3 of {numbers(text)[2]} in row 2, group {8 // numbers(text)[2]}"
        ):
            pack(weight, mask, text)
    wide = torch.zeros(4, 16, dtype=torch.bool)
    wide[2, [8, 9]] = wide[3, [10, 12]] = True
    pack(weight, wide, "2:2:8")
    wide[3, 12], wide[3, 13] = False, True
    pack(weight, wide, "2:2:8")
    five = torch.zeros(3, 8, dtype=torch.bool)
    five[0, :2] = five[1, 2:4] = True
    five[2, 6] = True
    with pytest.raises(SparsityPatternError, match=r"columns \[0, 1, 2, 3, 6\] in panel 0"):
        pack(torch.ones(3, 8), five, "3:2:8")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_only_kept_entries_must_be_finite(dtype, bad):
    weight = torch.ones(2, 8, dtype=dtype)
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[:, :2] = True
    weight[1, 5] = bad
    for text in ("2:4", "2:8", "2:2:8"):
        sparse = pack(weight, mask, text)
        assert torch.equal(unpack(sparse), mask.to(dtype))
    weight[1, 1] = bad
    for text in ("2:4", "2:8", "2:2:8"):
        with pytest.raises(NonFiniteError, match=r"weight must be finite.*\[1, 1\]"):
            pack(weight, mask, text)


def test_pruned_nan_beside_an_empty_slot():
    """A free slot sits on a NaN that was pruned: it must hold +0.0 all the same."""
    weight = torch.full((1, 8), float("nan"))
    sparse = pack(weight, torch.zeros(1, 8, dtype=torch.bool), "2:8")
    assert sparse.values.tolist() == [[0.0, 0.0]] and not torch.signbit(sparse.values).any()


@pytest.mark.parametrize("text", ["unstructured:0.5", "block4:0.5", "2:1:4", "2:3:8", "2:2:3"])
def test_patterns_without_a_packed_form(text):
    with pytest.raises(ConfigError, match=r"no packed format"):
        pack(torch.ones(2, 24), torch.zeros(2, 24, dtype=torch.bool), text)


def test_shapes_that_do_not_fit():
    with pytest.raises(ShapeNotSupportedError, match="cols % 8"):
        pack(torch.ones(2, 12), torch.zeros(2, 12, dtype=torch.bool), "2:8")
    with pytest.raises(ShapeNotSupportedError, match="rows % 4"):
        pack(torch.ones(6, 8), torch.zeros(6, 8, dtype=torch.bool), "4:2:8")


# validate


def good(text: str, rows: int = 4, wide: int = 3) -> SparseWeight:
    gen = torch.Generator().manual_seed(5)
    m = numbers(text)[2]
    return pack(torch.randn(rows, wide * m, generator=gen), random_mask(gen, rows, wide * m, text, full=True), text)


def with_code(sparse: SparseWeight, row: int, at: int, value: int) -> SparseWeight:
    codes = sparse.codes.clone()
    codes[row, at] = value
    return replace(sparse, codes=codes)


def with_columns(sparse: SparseWeight, columns: list[int]) -> SparseWeight:
    changed = sparse.columns.clone()
    changed[-1, -1] = torch.tensor(columns, dtype=torch.uint8)
    return replace(sparse, columns=changed)


DAMAGE = {
    "values too narrow": ("2:4", lambda s: replace(s, values=s.values[:, :-1]), r"fc\.values must be \[4, 6\]"),
    "values with a row less": (
        "2:4",
        lambda s: replace(s, values=s.values[:-1]),
        r"fc\.values must be \[4, 6\].*got \[3, 6\]",
    ),
    "values flat": ("2:8", lambda s: replace(s, values=s.values.flatten()), r"fc\.values"),
    "values of integers": ("2:4", lambda s: replace(s, values=s.values.int()), r"fc\.values must be float16.*int32"),
    "codes too narrow": ("2:4", lambda s: replace(s, codes=s.codes[:, :-1]), r"fc\.codes must be \[4, 2\]"),
    "codes a byte too many": ("2:4", lambda s: replace(s, codes=torch.cat([s.codes, s.codes[:, :1]], 1)), r"fc\.codes"),
    "codes a byte a position for 2:4": (
        "2:4",
        lambda s: replace(s, codes=torch.zeros(4, 6, dtype=torch.uint8)),
        r"fc\.codes",
    ),
    "codes of another dtype": (
        "2:4",
        lambda s: replace(s, codes=s.codes.to(torch.int32)),
        r"fc\.codes must be uint8.*int32",
    ),
    "unused high bits": (
        "2:4",
        lambda s: with_code(s, 1, 1, int(s.codes[1, 1]) | 0x40),
        r"fc\.codes.*unused high bits",
    ),
    "codes equal in a pair": ("2:4", lambda s: with_code(s, 0, 0, 0x05 | 0x40), r"fc\.codes.*ascending"),
    "codes falling in a pair": ("2:4", lambda s: with_code(s, 0, 0, 0x4 | 0x1 << 4), r"fc\.codes.*ascending"),
    "codes falling in the last pair": ("2:4", lambda s: with_code(s, 3, 1, 0x1), r"fc\.codes.*ascending"),
    "codes falling in a panel": ("2:2:8", lambda s: with_code(s, 3, 0, 0x4 | 0x1 << 4), r"fc\.codes.*ascending"),
    "code of m": ("2:8", lambda s: with_code(s, 2, 1, 8), r"fc\.codes.*below 8.*got 8"),
    "code of 255": ("2:8", lambda s: with_code(s, 3, 5, 255), r"fc\.codes.*below 8.*got 255"),
    "codes equal": ("2:8", lambda s: with_code(s, 1, 3, int(s.codes[1, 2])), r"fc\.codes.*ascending"),
    "codes falling": ("4:8", lambda s: with_code(s, 1, 2, 0), r"fc\.codes.*ascending"),
    "columns lost": ("2:2:8", lambda s: replace(s, columns=None), r"fc\.columns must be \[2, 3, 4\].*got nothing"),
    "columns where none belong": (
        "2:4",
        lambda s: replace(s, columns=torch.zeros(4, 3, 4, dtype=torch.uint8)),
        r"fc\.columns",
    ),
    "columns a panel less": ("2:2:8", lambda s: replace(s, columns=s.columns[:1]), r"fc\.columns must be \[2, 3, 4\]"),
    "columns three": ("2:2:8", lambda s: replace(s, columns=s.columns[:, :, :3]), r"fc\.columns"),
    "columns of another dtype": ("2:2:8", lambda s: replace(s, columns=s.columns.long()), r"fc\.columns must be uint8"),
    "columns falling": ("2:2:8", lambda s: with_columns(s, [0, 2, 1, 3]), r"fc\.columns.*ascending"),
    "columns equal": ("2:2:8", lambda s: with_columns(s, [0, 2, 2, 3]), r"fc\.columns.*ascending"),
    "columns of m": ("2:2:8", lambda s: with_columns(s, [0, 1, 2, 8]), r"fc\.columns.*below 8.*got 8"),
    "columns of 255": ("2:2:8", lambda s: with_columns(s, [0, 1, 2, 255]), r"fc\.columns.*below 8"),
    "shape with more rows": ("2:4", lambda s: replace(s, shape=(5, 12)), r"fc\.values"),
    "shape with more columns": ("2:4", lambda s: replace(s, shape=(4, 16)), r"fc\.values"),
    "another pattern": ("2:4", lambda s: replace(s, pattern=obs.parse_pattern("1:4")), r"fc\.values"),
    "a pattern that does not divide": ("2:4", lambda s: replace(s, pattern=obs.parse_pattern("2:8")), r"fc.*cols % 8"),
    "another v": ("2:2:8", lambda s: replace(s, pattern=VNMPattern(n=2, m=8, v=4)), r"fc\.columns must be \[1, 3, 4\]"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_validate_refuses_damage(name):
    text, damage, words = DAMAGE[name]
    sparse = good(text)
    sparse.validate("fc")
    with pytest.raises(CheckpointFormatError, match=words):
        damage(sparse).validate("fc")


@pytest.mark.parametrize(("text", "shape"), [("2:8", (4, 25)), ("2:2:8", (5, 24)), ("2:4", (4, 13))])
def test_validate_refuses_a_shape_that_does_not_fit_the_pattern(text, shape):
    sparse = good(text)
    _, n, m = numbers(text)
    rows, kept = shape[0], shape[1] // m * n
    codes = sparse.codes[:1].expand(rows, -1)
    sparse = replace(sparse, values=torch.ones(rows, kept), codes=codes, shape=shape)
    with pytest.raises((CheckpointFormatError, ShapeNotSupportedError)):
        sparse.validate("fc")


def test_validate_refuses_a_dtype_outside_the_format():
    sparse = good("2:4")
    with pytest.raises(CheckpointFormatError):
        replace(sparse, values=sparse.values.to(torch.float8_e4m3fn)).validate("fc")


@settings(max_examples=100)
@given(st.sampled_from(["2:4", "2:8", "3:5", "2:2:8"]), st.data())
def test_validate_accepts_exactly_what_round_trips(text, data):
    """Any one byte of codes or columns changed: refused, or unpacked inside the pattern and packed back the same."""
    sparse = good(text)
    part = data.draw(st.sampled_from(["codes", "columns"] if sparse.columns is not None else ["codes"]))
    tensor = getattr(sparse, part).clone()
    tensor.view(-1)[data.draw(st.integers(0, tensor.numel() - 1))] = data.draw(st.integers(0, 255))
    changed = replace(sparse, **{part: tensor})
    try:
        changed.validate()
    except CheckpointFormatError:
        return
    dense = unpack(changed)
    again = pack(dense, dense != 0, text)
    assert torch.equal(unpack(again), dense)
    if text in ("2:4", "2:8", "3:5"):
        assert torch.equal(again.codes, changed.codes)
