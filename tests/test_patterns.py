# SPDX-License-Identifier: Apache-2.0
"""Patterns: texts, shapes, masks."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import obs_kernels as obs
from obs_kernels.errors import ConfigError, ShapeNotSupportedError, SparsityPatternError
from obs_kernels.patterns import BlockPattern, NMPattern, UnstructuredPattern, VNMPattern


@pytest.mark.parametrize(
    ("text", "pattern", "sparsity", "fixed", "multiples"),
    [
        ("2:4", NMPattern(2, 4), 0.5, True, (1, 4)),
        ("2:8", NMPattern(2, 8), 0.75, True, (1, 8)),
        ("4:8", NMPattern(4, 8), 0.5, True, (1, 8)),
        ("2:16", NMPattern(2, 16), 0.875, True, (1, 16)),
        ("1:4", NMPattern(1, 4), 0.75, True, (1, 4)),
        ("64:2:8", VNMPattern(n=2, m=8, v=64), 0.75, True, (64, 8)),
        ("128:2:16", VNMPattern(n=2, m=16, v=128), 0.875, True, (128, 16)),
        ("unstructured:0.9", UnstructuredPattern(0.9), 0.9, False, (1, 1)),
        ("unstructured:0", UnstructuredPattern(0.0), 0.0, False, (1, 1)),
        ("block4:0.8", BlockPattern(0.8, size=4), 0.8, False, (1, 4)),
        ("block8:0.75", BlockPattern(0.75, size=8), 0.75, False, (1, 8)),
    ],
)
def test_parse(text, pattern, sparsity, fixed, multiples):
    parsed = obs.parse_pattern(text)
    assert parsed == pattern and type(parsed) is type(pattern)
    assert parsed.sparsity == pytest.approx(sparsity, abs=1e-15)
    assert parsed.fixed_count is fixed
    assert parsed.multiples() == multiples
    assert obs.parse_pattern(parsed) is parsed
    assert obs.parse_pattern(f" {text.upper()} ") == pattern


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["pattern", "2:4", "keep n of m"]),
        ("2", ["'2'", "keep n of m"]),
        ("2:", ["'2:'"]),
        ("2:4:8:16", ["'2:4:8:16'"]),
        ("a:b", ["'a:b'"]),
        ("2.0:4", ["'2.0:4'"]),
        ("-2:4", ["'-2:4'"]),
        ("0:4", ["0 < n < m", "n = 0, m = 4"]),
        ("4:4", ["0 < n < m", "n = 4, m = 4"]),
        ("8:2", ["0 < n < m", "n = 8, m = 2"]),
        ("2:128", ["at most 64", "got 128"]),
        ("0:2:8", ["v", "positive", "got 0"]),
        ("64:8:8", ["0 < n < m"]),
        ("unstructured", ["sparsity", "unstructured:0.75"]),
        ("unstructured:1.0", ["below 1", "got 1.0"]),
        ("unstructured:-0.1", ["at least 0", "got -0.1"]),
        ("unstructured:nan", ["sparsity", "got nan"]),
        ("unstructured:many", ["'many'", "no number"]),
        ("block4", ["sparsity", "block4:0.75"]),
        ("block0:0.5", ["block0", "at least 2"]),
        ("block1:0.5", ["block1", "at least 2"]),
        ("block4:1.5", ["block4", "got 1.5"]),
        ("blocks:0.5", ["'blocks:0.5'"]),
    ],
)
def test_parse_refuses(text, words):
    with pytest.raises(ConfigError) as caught:
        obs.parse_pattern(text)
    for word in words:
        assert word in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("value", [None, 4, 0.5, ("2", "4"), b"2:4"])
def test_parse_refuses_other_types(value):
    with pytest.raises(ConfigError, match=f"text.*got {type(value).__name__}"):
        obs.parse_pattern(value)


@pytest.mark.parametrize(
    "make", [lambda: NMPattern(2.0, 4), lambda: VNMPattern(n=2, m=8, v=2.0), lambda: BlockPattern(0.5, size=4.0)]
)
def test_constructors_refuse_floats(make):
    with pytest.raises(ConfigError):
        make()


def test_patterns_are_frozen_hashable_and_distinct():
    texts = ["2:4", "2:8", "2:16", "4:8", "1:2:4", "64:2:8", "128:2:8", "unstructured:0.8", "block4:0.8", "block8:0.8"]
    patterns = [obs.parse_pattern(text) for text in texts]
    assert len({*patterns, *(obs.parse_pattern(text) for text in texts)}) == len(texts)
    with pytest.raises(dataclasses.FrozenInstanceError):
        patterns[0].n = 3
    stage = dataclasses.replace(obs.parse_pattern("64:2:8"), n=5)
    assert str(stage) == "64:5:8" and stage.num_columns == 7


@given(st.integers(1, 63), st.integers(1, 63), st.integers(0, 4096))
def test_text_round_trip_of_nm(a, b, v):
    n, m = sorted((a, b + 1)) if a != b + 1 else (a, a + 1)
    text = f"{v}:{n}:{m}" if v else f"{n}:{m}"
    parsed = obs.parse_pattern(text)
    assert (parsed.n, parsed.m, getattr(parsed, "v", 0)) == (n, m, v)
    assert str(parsed) == text and obs.parse_pattern(str(parsed)) == parsed
    assert parsed.sparsity == pytest.approx(1 - n / m)


@pytest.mark.parametrize("target", [0.9, 0.75, 0.8125, 0.123456])
@pytest.mark.parametrize("kind", ["unstructured", "block4"])
def test_text_round_trip_of_thresholds(kind, target):
    parsed = obs.parse_pattern(f"{kind}:{target}")
    assert obs.parse_pattern(str(parsed)) == parsed


@pytest.mark.parametrize("target", [0.74213046, 0.9999999])
def test_text_round_trip_keeps_every_digit(target):
    parsed = obs.parse_pattern(f"unstructured:{target}")
    assert obs.parse_pattern(str(parsed)) == parsed


@pytest.mark.parametrize(
    ("n", "m", "columns"),
    [(1, 8, 4), (2, 8, 4), (3, 8, 4), (4, 8, 6), (5, 8, 7), (6, 8, 8), (7, 8, 8), (9, 16, 11), (2, 3, 3)],
)
def test_columns_of_a_panel(n, m, columns):
    """math.md 7: c = n + 2 if n > 3 else 4, at most m."""
    assert VNMPattern(n=n, m=m, v=2).num_columns == columns


# shapes


@pytest.mark.parametrize(("text", "columns"), [("64:3:8/5", 5), ("64:2:8/8", 8), ("32:4:16/4", 4)])
def test_columns_that_are_not_the_usual(text, columns):
    found = obs.parse_pattern(text)
    assert str(found) == text and found.num_columns == columns and obs.parse_pattern(str(found)) == found
    assert found != obs.parse_pattern(text.split("/")[0])
    with pytest.raises(ConfigError, match="no packed format"):
        obs.ops.pack(torch.zeros(64, 16), torch.zeros(64, 16, dtype=torch.bool), text)


def test_the_usual_columns_go_without_saying():
    assert (
        obs.parse_pattern("64:3:8/4") == obs.parse_pattern("64:3:8") and str(obs.parse_pattern("64:5:8/7")) == "64:5:8"
    )
    for text in ("64:3:8/2", "64:3:8/9", "64:2:8/0"):
        with pytest.raises(ConfigError, match="columns must be n to m"):
            obs.parse_pattern(text)
    for text in ("3:8/5", "64:3:8/", "64:3:8/5/5", "64:3:8:5"):
        with pytest.raises(ConfigError, match="pattern must be one of"):
            obs.parse_pattern(text)


@pytest.mark.parametrize(
    ("text", "shape", "words"),
    [
        ("2:8", (3, 12), ["weight", "[3, 12]", "2:8", "cols % 8 == 0", "pad to 16"]),
        ("64:2:8", (96, 16), ["[96, 16]", "64:2:8", "rows % 64 == 0", "pad to 128", "v = 32 fits"]),
        ("64:2:8", (7, 16), ["rows % 64 == 0", "pad to 64", "v = 1 fits"]),
        ("64:2:8", (64, 12), ["cols % 8 == 0"]),
        ("block4:0.5", (2, 6), ["block4:0.5", "cols % 4 == 0", "pad to 8"]),
        ("2:4", (4,), ["matrix [R, C]", "[4]"]),
        ("2:4", (2, 4, 4), ["matrix [R, C]", "[2, 4, 4]"]),
        ("unstructured:0.5", (2, 2, 2), ["matrix [R, C]"]),
    ],
)
def test_check_shape_refuses(text, shape, words):
    with pytest.raises(ShapeNotSupportedError) as caught:
        obs.parse_pattern(text).check_shape(shape)
    for word in words:
        assert word in str(caught.value)


def test_check_shape_names_the_tensor():
    with pytest.raises(ShapeNotSupportedError, match=r"encoder\.fc"):
        obs.parse_pattern("2:4").check_shape((1, 3), name="encoder.fc")


@given(
    st.sampled_from(["2:4", "1:3", "5:7", "2:16", "2:2:4", "3:2:8", "64:2:8", "block4:0.5", "unstructured:0.5"]),
    st.integers(0, 257),
    st.integers(0, 257),
)
def test_check_shape_is_divisibility(text, rows, cols):
    pattern = obs.parse_pattern(text)
    *_, size = [int(x) for x in re.findall(r"\d+", text.split(":0")[0])] or [1]
    v = int(text.split(":")[0]) if text.count(":") == 2 else 1
    fits = rows % v == 0 and cols % size == 0
    padded = pattern.padded_shape((rows, cols))
    assert padded[0] >= rows and padded[1] >= cols and padded[0] - rows < v and padded[1] - cols < size
    pattern.check_shape(padded)
    if fits:
        pattern.check_shape((rows, cols))
        assert padded == (rows, cols)
        return
    with pytest.raises(ShapeNotSupportedError) as caught:
        pattern.check_shape((rows, cols))
    suggested = re.search(r"v = (\d+) fits", str(caught.value))
    if suggested:  # the v that the message names must fit
        assert rows % int(suggested[1]) == 0 and int(suggested[1]) < v


# masks


def mask_of(*rows: str) -> torch.Tensor:
    return torch.tensor([[c == "1" for c in row.replace(" ", "")] for row in rows])


def test_validate_mask_accepts_at_most_n():
    pattern = obs.parse_pattern("2:4")
    pattern.validate_mask(mask_of("1100 0011", "0000 1000"))
    assert pattern.count_violations(mask_of("1100 0011", "0000 1000")) == 0


def test_validate_mask_names_the_first_group():
    mask = mask_of("1100 0011 0000", "0110 1101 1111")
    pattern = obs.parse_pattern("2:4")
    assert pattern.count_violations(mask) == 2
    with pytest.raises(
        SparsityPatternError, match=r"keeps 3 of 4 in row 1, group 1 \(columns 4 to 7\).*2:4.*at most 2"
    ):
        pattern.validate_mask(mask)


def test_validate_mask_names_the_first_panel():
    pattern = obs.parse_pattern("3:2:8")
    four = mask_of("11000000", "00110000", "10010000")
    five = mask_of("11000000", "00110000", "00001000")
    pattern.validate_mask(torch.cat([four, four.flip(1)]))
    assert pattern.count_violations(torch.cat([five, five])) == 2
    with pytest.raises(
        SparsityPatternError, match=r"columns \[0, 1, 2, 3, 4\] in panel 0 \(rows 0 to 2\), group 0.*allows 4 columns"
    ):
        pattern.validate_mask(five)
    with pytest.raises(SparsityPatternError, match=r"panel 1 \(rows 3 to 5\), group 2"):
        pattern.validate_mask(torch.cat([torch.cat([four, four, four], 1), torch.cat([four, four, five], 1)]))
    with pytest.raises(
        SparsityPatternError, match="keeps 3 of 8 in row 1, group 0"
    ):  # rows are looked at before panels
        pattern.validate_mask(mask_of("11000000", "11100000", "00000000"))


def test_middle_stages_allow_more_columns():
    five = mask_of("11111000", "00111110")
    obs.parse_pattern("2:5:8").validate_mask(five)
    with pytest.raises(SparsityPatternError, match="allows 6 columns"):
        obs.parse_pattern("3:4:8").validate_mask(mask_of("11110000", "00001110", "00000000"))


def test_validate_mask_of_blocks():
    pattern = obs.parse_pattern("block4:0.5")
    pattern.validate_mask(mask_of("1111 0000", "0000 0000"))
    assert pattern.count_violations(mask_of("1111 0001", "0000 0111")) == 2
    with pytest.raises(SparsityPatternError, match=r"part of row 0, block 1 \(columns 4 to 7\)"):
        pattern.validate_mask(mask_of("1111 0001", "0000 0111"))
    obs.parse_pattern("unstructured:0.5").validate_mask(mask_of("1111 0001"))


def test_validate_mask_refuses_dtype_and_shape():
    with pytest.raises(SparsityPatternError, match=r"torch\.bool.*got torch\.uint8"):
        obs.parse_pattern("2:4").validate_mask(torch.ones(2, 4, dtype=torch.uint8))
    with pytest.raises(ShapeNotSupportedError, match=r"mask.*cols % 4"):
        obs.parse_pattern("2:4").validate_mask(torch.ones(2, 6, dtype=torch.bool))


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([(1, 2, 4), (2, 2, 8), (3, 4, 8), (1, 3, 5)]),
    st.integers(0, 2**31),
)
def test_validate_mask_agrees_with_counting(panels, wide, vnm, seed):
    v, n, m = vnm
    mask = torch.rand(panels * v, wide * m, generator=torch.Generator().manual_seed(seed)) < 0.4
    pattern = VNMPattern(n=n, m=m, v=v)
    rows = [[mask[r, g * m : g * m + m].sum() > n for g in range(wide)] for r in range(panels * v)]
    panel = [
        [mask[p * v : p * v + v, g * m : g * m + m].any(0).sum() > pattern.num_columns for g in range(wide)]
        for p in range(panels)
    ]
    broken = int(sum(map(sum, rows)) + sum(map(sum, panel)))
    assert pattern.count_violations(mask) == broken
    if broken:
        with pytest.raises(SparsityPatternError):
            pattern.validate_mask(mask)
    else:
        pattern.validate_mask(mask)


@pytest.mark.parametrize("text", ["2:4", "2:2:4", "block4:0.5", "unstructured:0.5"])
@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0)])
def test_empty_masks_are_valid(text, shape):
    pattern = obs.parse_pattern(text)
    pattern.validate_mask(torch.ones(shape, dtype=torch.bool))
    assert pattern.count_violations(torch.ones(shape, dtype=torch.bool)) == 0
