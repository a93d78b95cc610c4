# SPDX-License-Identifier: Apache-2.0
"""Sweep over rows with one shared Hessian: against all sets of each group by the inverse, and by what must add up."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import kept_of, numpy
from tolerances import SALIENCY_F64, SWEEP_IDENTITY, UPDATE_F64
from torch import Tensor

from obs_kernels.errors import SingularBlockError
from obs_kernels.ops import Selection, obs_update, search_nm, search_vnm, sweep_rows
from obs_kernels.patterns import VNMPattern, parse_pattern
from obs_kernels.reference import fisher as reference_fisher
from obs_kernels.reference.hessian import row_loss

F32, F64 = torch.float32, torch.float64


def live_mask(rows: int, cols: int, m: int, seed: int = 0) -> Tensor:
    """Full, thin, single and fully dead groups."""
    gen = torch.Generator().manual_seed(seed + 100)
    share = torch.tensor([1.0, 0.7, 0.4, 0.15, 0.0])[torch.randint(0, 5, (rows, cols // m), generator=gen)]
    return torch.rand(rows, cols // m, m, generator=gen).lt(share[:, :, None]).view(rows, cols)


def scales(rows: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.arange(1, rows + 1, dtype=dtype) / rows


def check_against_sets(
    sel: Selection, weight: Tensor, hessian: Tensor, pattern: str, num_columns: int = 4, **given_: object
) -> None:
    """The sweep of ``sel`` (not resolved) equals that of the oracle, in f64."""
    parsed = parse_pattern(pattern)
    panels = isinstance(parsed, VNMPattern)
    more = {"v": parsed.v, "num_columns": num_columns} if panels else {}
    wanted = oracle.sweep_groups(weight, hessian, parsed.n, parsed.m, **more, **given_)
    assert np.array_equal(sel.mask.numpy(), wanted.kept)
    np.testing.assert_allclose(numpy(sel.weight), wanted.weight, rtol=UPDATE_F64, atol=UPDATE_F64)
    np.testing.assert_allclose(numpy(sel.saliency), wanted.loss, rtol=SALIENCY_F64, atol=1e-12)
    assert (sel.columns is not None) == panels
    for (panel, group), columns in wanted.columns.items():
        assert tuple(sel.columns[panel, group].tolist()) == columns


# worked examples


@pytest.mark.parametrize("dtype", [F32, F64])
def test_example_i(dtype):
    weight, hessian, row_scale = oracle.example_i(dtype)
    sel = sweep_rows(weight, hessian, "2:4", row_scale=row_scale, resolve=False)
    assert [kept_of(sel.mask, row, 0, 8) for row in (0, 1)] == [(2, 3, 5, 6), (2, 3, 4, 6)]
    oracle.assert_worked_numbers(sel.weight[0][sel.mask[0]], [4.851879, 4.302454, -3.840926, -2.702889], dtype)
    oracle.assert_worked_numbers(sel.weight[1][sel.mask[1]], [1.396398, -2.738714, 1.784549, -7.785471], dtype)
    oracle.assert_worked_numbers(sel.saliency, [39.407071, 4.054745, 34.042077, 69.486418], dtype)
    oracle.assert_worked_numbers(sel.saliency.sum(1), [43.461816, 103.528495], dtype)

    solved = sweep_rows(weight, hessian, "2:4", row_scale=row_scale)
    assert torch.equal(solved.mask, sel.mask) and torch.equal(solved.saliency, sel.saliency)
    oracle.assert_worked_numbers(solved.weight[0][sel.mask[0]], [4.638533, 3.886511, -3.761964, -2.815817], dtype)
    oracle.assert_worked_numbers(solved.weight[1][sel.mask[1]], [1.865345, -1.907404, 2.425796, -7.499040], dtype)
    loss = row_loss(solved.weight - weight, hessian, row_scale=row_scale)
    oracle.assert_worked_numbers(loss, [41.903370, 90.705501], dtype)
    finv = np.linalg.inv(numpy(hessian))
    for row in (0, 1):  # these are the optimum of all 36 sets
        least = min(
            oracle.set_saliency(finv, numpy(weight[row]), (*a, *(4 + i for i in b)))
            for a, b in itertools.product(itertools.combinations(range(4), 2), repeat=2)
        )
        assert float(loss[row]) == pytest.approx(float(row_scale[row]) * least, rel=1e-5)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_example_i_wide_groups_and_panel(dtype):
    weight, hessian, row_scale = oracle.example_i(dtype)
    for resolve in (True, False):
        sel = sweep_rows(weight, hessian, "2:8", row_scale=row_scale, resolve=resolve)
        assert [kept_of(sel.mask, row, 0, 8) for row in (0, 1)] == [(3, 6), (3, 6)]
        oracle.assert_worked_numbers(sel.weight[sel.mask], [3.8, -4.2, -3.031373, -8.501961], dtype)
        oracle.assert_worked_numbers(sel.saliency, [187.4, 179.976471], dtype)
        panel = sweep_rows(weight, hessian, "2:2:8", row_scale=row_scale, resolve=resolve)
        assert panel.columns.tolist() == [[[0, 1, 3, 6]]]
        assert torch.equal(panel.mask, sel.mask)
        oracle.assert_worked_numbers(panel.saliency, [187.4 + 179.976471], dtype)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_example_h_exact(dtype):
    weight, hessian = (torch.tensor(x, dtype=dtype) for x in ([oracle.EXAMPLE_H_WEIGHT], oracle.EXAMPLE_H_HESSIAN))
    sel = sweep_rows(weight, hessian, "2:4", damp=oracle.EXAMPLE_H_DAMP)
    assert kept_of(sel.mask, 0, 0, 4) == (0, 3)
    oracle.assert_worked_numbers(sel.weight[sel.mask], [1.593302, 2.186549], dtype)
    oracle.assert_worked_numbers(sel.saliency, [16.264168], dtype)
    oracle.assert_worked_numbers(row_loss(sel.weight - weight, hessian, damp=oracle.EXAMPLE_H_DAMP), [16.264168], dtype)


# all sets of every group


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pattern", ["1:4", "2:4", "3:4", "2:8", "4:8", "7:8", "3:6", "1:2"])
def test_every_group_takes_its_best_set(pattern, masked, seed):
    m = parse_pattern(pattern).m
    weight, hessian = oracle.row_problem(4, 2 * m if m > 4 else 16, seed=seed)
    mask = live_mask(*weight.shape, m, seed) if masked else None
    row_scale = scales(4) if seed % 2 else None
    sel = sweep_rows(weight, hessian, pattern, damp=0.1, mask=mask, row_scale=row_scale, resolve=False)
    check_against_sets(sel, weight, hessian, pattern, damp=0.1, mask=mask, row_scale=row_scale)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("pattern", "num_columns"), [("2:2:8", 4), ("4:2:8", 5), ("2:3:6", 4), ("3:1:4", 2), ("1:2:4", 4)]
)
def test_every_panel_takes_its_best_columns(pattern, num_columns, masked, seed):
    parsed = parse_pattern(pattern)
    weight, hessian = oracle.row_problem(2 * parsed.v, 2 * parsed.m, seed=seed)
    mask = live_mask(*weight.shape, parsed.m, seed) if masked else None
    row_scale = None if seed == 0 else scales(weight.shape[0])
    given_ = {"damp": 0.1, "mask": mask, "row_scale": row_scale}
    sel = sweep_rows(weight, hessian, pattern, num_columns=num_columns, resolve=False, **given_)
    if masked:  # a column that is dead in the whole panel may be any
        wanted = oracle.sweep_groups(weight, hessian, parsed.n, parsed.m, v=parsed.v, num_columns=num_columns, **given_)
        assert np.array_equal(sel.mask.numpy(), wanted.kept)
        np.testing.assert_allclose(numpy(sel.saliency), wanted.loss, rtol=SALIENCY_F64, atol=1e-12)
        inside = torch.zeros(weight.shape[0] // parsed.v, 2, parsed.m, dtype=torch.bool)
        inside.scatter_(2, sel.columns.long(), True)
        assert inside.sum(2).eq(num_columns).all()
        assert not (sel.mask.view(-1, parsed.v, 2, parsed.m) & ~inside[:, None]).any()
    else:
        check_against_sets(sel, weight, hessian, pattern, num_columns, **given_)


def test_many_kept_sets():
    """11,440 sets a group: the tree of sets, shared by all rows."""
    weight, hessian = oracle.row_problem(3, 16)
    sel = sweep_rows(weight, hessian, "9:16", resolve=False)
    check_against_sets(sel, weight, hessian, "9:16")


# what must add up


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("pattern", "cols"), [("2:4", 384), ("2:8", 264), ("5:12", 252), ("4:2:8", 272), ("2:2:16", 160), ("1:64", 192)]
)
def test_group_losses_add_up_to_the_loss_of_the_rows(pattern, cols, masked, dtype):
    """Over several blocks of columns, so that errors pass inside a block, between blocks, and to a short last one."""
    weight, hessian = oracle.row_problem(8, cols, dtype)
    parsed = parse_pattern(pattern)
    mask = live_mask(8, cols, parsed.m) if masked else None
    row_scale = scales(8, dtype)
    sel = sweep_rows(weight, hessian, pattern, damp=0.05, mask=mask, row_scale=row_scale, resolve=False)
    live = weight if mask is None else weight.masked_fill(~mask, 0.0)
    loss = row_loss(sel.weight.double() - live.double(), hessian.double(), row_scale=row_scale.double(), damp=0.05)
    rows = loss.view(-1, parsed.v).sum(1) if isinstance(parsed, VNMPattern) else loss
    assert sel.saliency.dtype == dtype
    torch.testing.assert_close(sel.saliency.sum(1).double(), rows, rtol=SWEEP_IDENTITY[dtype], atol=0.0)
    assert (sel.weight[~sel.mask] == 0).all() and not torch.signbit(sel.weight[~sel.mask]).any()
    if mask is None:
        assert (sel.mask.unflatten(1, (-1, parsed.m)).sum(2) == parsed.n).all()
    else:
        assert not (sel.mask & ~mask).any()
    if not isinstance(parsed, VNMPattern) and mask is not None:
        live_counts = mask.unflatten(1, (-1, parsed.m)).sum(2).clamp_max(parsed.n)
        assert torch.equal(sel.mask.unflatten(1, (-1, parsed.m)).sum(2), live_counts)

    solved = sweep_rows(weight, hessian, pattern, damp=0.05, mask=mask, row_scale=row_scale)
    after = row_loss(solved.weight.double() - live.double(), hessian.double(), row_scale=row_scale.double(), damp=0.05)
    assert torch.equal(solved.mask, sel.mask) and torch.equal(solved.saliency, sel.saliency)
    assert (after <= loss * (1 + SWEEP_IDENTITY[dtype])).all() and after.sum() < loss.sum()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pattern", ["2:4", "2:8", "3:8", "2:2:8"])
def test_groups_that_do_not_touch_are_the_block_search(pattern, masked):
    """H block-diagonal in groups: choice, saliency and weights of search and update with F = row_scale * blocks."""
    m, rows, wide = parse_pattern(pattern).m, 4, 3
    weight, _ = oracle.row_problem(rows, wide * m)
    blocks = oracle.random_spd(torch.Generator().manual_seed(3), wide, m)
    mask = live_mask(rows, wide * m, m) if masked else None
    row_scale = scales(rows)
    sel = sweep_rows(
        weight, torch.block_diag(*blocks), pattern, row_scale=row_scale, damp=0.1, mask=mask, resolve=False
    )
    damped = blocks + 0.1 * torch.eye(m, dtype=F64)
    fisher = (row_scale[:, None, None, None] * damped).reshape(-1, m, m)
    search = search_vnm if pattern == "2:2:8" else search_nm
    wanted = search(weight, fisher, pattern, mask=mask)
    assert torch.equal(sel.mask, wanted.mask)
    torch.testing.assert_close(sel.saliency, wanted.saliency, rtol=SALIENCY_F64, atol=1e-12)
    if wanted.columns is not None:
        assert torch.equal(sel.columns, wanted.columns)
    live = weight if mask is None else weight.masked_fill(~mask, 0.0)
    torch.testing.assert_close(sel.weight, obs_update(live, fisher, wanted.mask), rtol=UPDATE_F64, atol=UPDATE_F64)


def test_rows_do_not_depend_on_each_other_without_panels():
    weight, hessian = oracle.row_problem(16, 64, F32)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    mask = live_mask(16, 64, 8)
    for given_ in ({}, {"mask": mask}):
        sel = sweep_rows(weight, hessian, "2:8", damp=0.1, row_scale=scales(16, F32), **given_)
        moved = {"mask": mask[order]} if given_ else {}
        other = sweep_rows(weight[order], hessian, "2:8", damp=0.1, row_scale=scales(16, F32)[order], **moved)
        assert torch.equal(other.mask, sel.mask[order])
        torch.testing.assert_close(other.weight, sel.weight[order], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(other.saliency, sel.saliency[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "2:2:8"])
@pytest.mark.parametrize("masked", [False, True])
def test_chunks_of_rows_change_nothing(pattern, masked, monkeypatch):
    weight, hessian = oracle.row_problem(8, 32)
    mask = live_mask(8, 32, 8) if masked else None
    whole = sweep_rows(weight, hessian, pattern, mask=mask, row_scale=scales(8))
    monkeypatch.setattr(reference_fisher, "CHUNK_BYTES", 1)
    monkeypatch.setattr(reference_fisher, "CACHE_BYTES", 1)
    parts = sweep_rows(weight, hessian, pattern, mask=mask, row_scale=scales(8))
    assert torch.equal(parts.mask, whole.mask)
    torch.testing.assert_close(parts.weight, whole.weight, rtol=UPDATE_F64, atol=UPDATE_F64)
    if whole.columns is not None:
        assert torch.equal(parts.columns, whole.columns)


# scales and ties


def test_row_scale_decides_between_the_rows_of_a_panel():
    """Two rows that want other columns; the one that counts more gets them, the other its best of those."""
    weight = torch.tensor([[3.0, 2.0, 0.5, 0.25], [0.25, 0.5, 2.0, 3.0]])
    chosen = {
        ratio: sweep_rows(
            weight, torch.eye(4), "2:1:4", num_columns=1, row_scale=torch.tensor([1.0, ratio])
        ).columns.tolist()
        for ratio in (0.25, 4.0)
    }
    assert chosen == {0.25: [[[0]]], 4.0: [[[3]]]}


def test_a_row_of_scale_zero_still_keeps_its_best():
    weight = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    sel = sweep_rows(weight, torch.eye(4), "2:1:4", num_columns=2, row_scale=torch.tensor([1.0, 0.0]))
    assert sel.columns.tolist() == [[[0, 1]]] and sel.mask.nonzero().tolist() == [[0, 0], [1, 1]]
    assert float(sel.saliency) == 0.5 * (9 + 4 + 1)
    nothing = sweep_rows(weight, torch.eye(4), "1:4", row_scale=torch.zeros(2))
    assert nothing.mask.nonzero().tolist() == [[0, 0], [1, 3]] and (nothing.saliency == 0).all()


@pytest.mark.parametrize("power", [-80, -40, 40, 80])
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "2:2:8"])
def test_the_scale_of_the_hessian_changes_no_choice(pattern, power):
    """A power of four, in f32: choices, weights and the digits of the saliency are those of scale 1."""
    weight, hessian = oracle.row_problem(4, 32, F32)
    one = sweep_rows(weight, hessian, pattern, resolve=False)
    sel = sweep_rows(weight, hessian * 2.0**power, pattern, resolve=False)
    assert torch.equal(sel.mask, one.mask) and torch.equal(sel.weight, one.weight)
    assert torch.equal(sel.saliency, one.saliency * 2.0**power)


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "3:4", "2:2:4", "3:8"])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_equal_weights_keep_the_lower_index(pattern, dtype):
    parsed = parse_pattern(pattern)
    sel = sweep_rows(torch.ones(2, 16, dtype=dtype), torch.eye(16, dtype=dtype), pattern, num_columns=2)
    assert torch.equal(sel.mask, (torch.arange(16) % parsed.m < parsed.n).expand(2, 16))
    if sel.columns is not None:
        assert (sel.columns == torch.tensor([0, 1])).all()


@given(st.data())
def test_integer_ties_go_to_the_lower_index(data):
    """One group with an integer factor: f32 and f64 take the first best pair in exact arithmetic."""
    entry = st.integers(-2, 2)
    upper = torch.tensor(data.draw(st.lists(entry, min_size=16, max_size=16)), dtype=F64).view(4, 4).triu(1)
    upper += torch.eye(4, dtype=F64)
    weight = torch.tensor([data.draw(st.lists(entry, min_size=4, max_size=4))], dtype=F64)
    hessian = upper @ upper.T
    s = [[Fraction(int(x)) for x in row] for row in hessian.tolist()]
    u = [sum(s[i][j] * int(weight[0, j]) for j in range(4)) for i in range(4)]
    gains = {
        (a, b): (s[b][b] * u[a] ** 2 - 2 * s[a][b] * u[a] * u[b] + s[a][a] * u[b] ** 2)
        / (s[a][a] * s[b][b] - s[a][b] ** 2)
        for a, b in itertools.combinations(range(4), 2)
    }
    first = max(gains, key=gains.__getitem__)
    for dtype in (F32, F64):
        sel = sweep_rows(weight.to(dtype), hessian.to(dtype), "2:4")
        assert kept_of(sel.mask, 0, 0, 4) == first, gains


# inputs of all kinds


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_are_computed_in_f32_and_rounded_once(dtype):
    weight, hessian = oracle.row_problem(4, 32, F32)
    sel = sweep_rows(weight.to(dtype), hessian, "2:8")
    full = sweep_rows(weight.to(dtype).float(), hessian, "2:8")
    assert sel.weight.dtype == dtype and sel.saliency.dtype == F32
    assert torch.equal(sel.weight, full.weight.to(dtype)) and torch.equal(sel.mask, full.mask)
    assert torch.equal(sel.saliency, full.saliency)


@pytest.mark.parametrize("which", ["weight", "hessian", "row_scale"])
def test_one_f64_argument_makes_the_arithmetic_f64(which):
    weight, hessian = oracle.row_problem(2, 16, F32)
    given_ = {"weight": weight, "hessian": hessian, "row_scale": scales(2, F32)}
    given_[which] = given_[which].double()
    sel = sweep_rows(**given_, pattern="2:4")
    full = sweep_rows(weight.double(), hessian.double(), "2:4", row_scale=scales(2, F32).double())
    assert sel.saliency.dtype == F64 and torch.equal(sel.saliency, full.saliency)
    assert sel.weight.dtype == given_["weight"].dtype and torch.equal(sel.weight, full.weight.to(sel.weight.dtype))


@pytest.mark.parametrize(
    ("pattern", "method"), [("2:8", "combinatorial"), ("2:2:8", "combinatorial"), ("2:4", "sparsegpt")]
)
def test_any_strides_and_inputs_left_alone(pattern, method):
    weight, hessian = oracle.row_problem(8, 32, F32)
    mask = live_mask(8, 32, 8)
    row_scale = scales(16, F32)[::2] if method == "combinatorial" else None
    wanted = sweep_rows(weight, hessian, pattern, mask=mask, method=method, row_scale=row_scale)
    wide = torch.zeros(32, 16)
    wide[:, ::2] = weight.T
    strided = [wide[:, ::2].T, hessian.T.contiguous().T, mask.T.contiguous().T]
    before = [t.clone() for t in strided]
    sel = sweep_rows(strided[0], strided[1], pattern, mask=strided[2], method=method, row_scale=row_scale)
    assert torch.equal(sel.mask, wanted.mask) and torch.equal(sel.weight, wanted.weight)
    assert all(torch.equal(a, b) for a, b in zip(strided, before, strict=True))


@pytest.mark.parametrize(("pattern", "units"), [("2:4", 0), ("2:2:4", 0), ("unstructured:0.5", 0)])
def test_empty(pattern, units):
    method = "sparsegpt" if pattern.startswith("un") else "combinatorial"
    wide = -(-8 // (128 if method == "sparsegpt" else 4))
    sel = sweep_rows(torch.zeros(0, 8), torch.eye(8), pattern, method=method)
    assert sel.mask.shape == (0, 8) and sel.weight.shape == (0, 8) and sel.saliency.shape == (0, wide)
    none = sweep_rows(torch.zeros(4, 0), torch.zeros(0, 0), pattern, method=method)
    assert none.weight.shape == (4, 0) and none.saliency.shape == (2 if pattern == "2:2:4" else 4, 0)
    if pattern == "2:2:4":
        assert sel.columns.shape == (0, 2, 4) and none.columns.shape == (2, 0, 4)


@pytest.mark.parametrize("pattern", ["2:4", "3:8", "2:2:8"])
def test_a_weight_of_zeros(pattern):
    parsed = parse_pattern(pattern)
    _, hessian = oracle.row_problem(4, 16)
    sel = sweep_rows(torch.zeros(4, 16), hessian.float(), pattern)
    assert torch.equal(sel.mask, (torch.arange(16) % parsed.m < parsed.n).expand(4, 16))
    assert (sel.saliency == 0).all() and (sel.weight == 0).all()


def test_a_mask_of_all_alive_is_no_mask_and_dead_rows_stay_dead():
    weight, hessian = oracle.row_problem(4, 32)
    alive = torch.ones(4, 32, dtype=torch.bool)
    for pattern in ("2:4", "2:2:8"):
        without, with_mask = (sweep_rows(weight, hessian, pattern, mask=mask) for mask in (None, alive))
        assert torch.equal(without.mask, with_mask.mask) and torch.equal(without.weight, with_mask.weight)
        alive[1] = False
        sel = sweep_rows(weight, hessian, pattern, mask=alive)
        assert not sel.mask[1].any() and (sel.weight[1] == 0).all()
        if sel.columns is None:
            assert torch.equal(sel.weight[0], without.weight[0]) and (sel.saliency[1] == 0).all()
        alive[1] = True


def test_a_column_dead_in_all_rows_carries_no_weight():
    """Its weights count as 0: garbage there changes nothing."""
    weight, hessian = oracle.row_problem(4, 16)
    mask = torch.arange(16).ne(5).expand(4, 16)
    sel = sweep_rows(weight, hessian, "2:4", mask=mask)
    other = sweep_rows(weight.masked_fill(~mask, 1e6), hessian, "2:4", mask=mask)
    assert torch.equal(sel.mask, other.mask) and torch.equal(sel.weight, other.weight)


# what the Hessian may be


def test_inputs_that_were_always_zero_need_damping():
    weight, hessian = oracle.row_problem(4, 16, F32)
    hessian[6] = hessian[:, 6] = 0.0
    with pytest.raises(SingularBlockError, match=r"pivot 10 of 16 not above 0, at column 6 .*raise damp"):
        sweep_rows(weight, hessian, "2:4")
    sel = sweep_rows(weight, hessian, "2:4", damp=1e-3)
    assert torch.isfinite(sel.weight).all() and torch.isfinite(sel.saliency).all()


@pytest.mark.parametrize("column", [0, 3, 15])
def test_a_hessian_that_is_not_positive_definite_names_the_column(column):
    hessian = torch.eye(16)
    hessian[column, column] = -1.0
    with pytest.raises(SingularBlockError, match=rf"hessian must be .*pivot {16 - column} of 16.* column {column} "):
        sweep_rows(torch.ones(4, 16), hessian, "2:4")


def test_autotuned_products_do_not_reach_the_sweep():
    """A process that lets its model multiply f32 in bf16 or TF32 gets the same result and keeps its setting."""
    weight, hessian = oracle.row_problem(8, 256, F32)
    wanted = sweep_rows(weight, hessian, "2:4")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        sel = sweep_rows(weight, hessian, "2:4")
        assert torch.get_float32_matmul_precision() == "medium" and torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(sel.mask, wanted.mask) and torch.equal(sel.weight, wanted.weight)
