# SPDX-License-Identifier: Apache-2.0
"""Which weights to keep: n:m and v:n:m search against brute force over all sets, from the definition with F^-1."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Group, Kept, best_by_score, best_panel, groups_of, kept_of, numpy, runner_up_gap
from tolerances import (
    EXAMPLE_F32,
    EXAMPLE_F64,
    SALIENCY_CONDITIONAL,
    SALIENCY_EQUAL_BLOCK,
    SALIENCY_F64,
    SEARCH_GAP_F64,
    SEARCH_LOSS_CONDITIONAL,
    SEARCH_LOSS_EQUAL_BLOCK,
)
from torch import Tensor

import obs_kernels as obs
from obs_kernels.errors import ConfigError
from obs_kernels.ops import Selection, block_saliency, loss_increase, obs_update, search_nm, search_vnm
from obs_kernels.reference import pairwise
from obs_kernels.reference.blocks import condition_groups, pair_model
from obs_kernels.reference.candidates import gain_table, kept_sets

F32, F64 = torch.float32, torch.float64
METHODS = ["combinatorial", "pairwise", "greedy", "diagonal", "magnitude"]


def close(actual: Tensor | float, expected: float | list[float], dtype: torch.dtype) -> None:
    """A worked number of math.md: 1e-5 relative in f32, 1e-6 absolute in f64 (printed with six decimals)."""
    tolerance = {"rtol": EXAMPLE_F32, "atol": 0.0} if dtype == F32 else {"rtol": 0.0, "atol": EXAMPLE_F64}
    actual = torch.as_tensor(actual, dtype=dtype).reshape(-1)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=dtype).reshape(-1), **tolerance)


def kept_by_row(mask: Tensor, m: int, group: int = 0) -> list[Kept]:
    return [kept_of(mask, row, group, m) for row in range(mask.shape[0])]


def problem(gen: torch.Generator, rows: int, cols: int, size: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    """Random weight [rows, cols] and its correlated Fisher blocks, both exactly representable in ``dtype``."""
    weight = torch.randn(rows, cols, generator=gen, dtype=F64).to(dtype)
    return weight, oracle.random_spd(gen, rows * cols // size, size).to(dtype)


def live_mask(gen: torch.Generator, rows: int, cols: int, m: int) -> Tensor:
    """A mask of live entries with full, thin, single and fully dead groups."""
    share = torch.tensor([1.0, 0.7, 0.4, 0.15, 0.0])[torch.randint(0, 5, (rows, cols // m), generator=gen)]
    return torch.rand(rows, cols // m, m, generator=gen).lt(share[:, :, None]).view(rows, cols)


def excess(dtype: torch.dtype, conditional: bool) -> float:
    if dtype == F64:
        return SEARCH_GAP_F64
    return SEARCH_LOSS_CONDITIONAL if conditional else SEARCH_LOSS_EQUAL_BLOCK


def saliency_tolerance(dtype: torch.dtype, conditional: bool) -> float:
    if dtype == F64:
        return SALIENCY_F64
    return SALIENCY_CONDITIONAL if conditional else SALIENCY_EQUAL_BLOCK


def check_nm(
    sel: Selection, groups: dict[tuple[int, int], Group], n: int, m: int, dtype: torch.dtype, size: int
) -> None:
    """Counts, the optimum over all kept sets, and the reported saliency of every group."""
    rows, cols = sel.mask.shape
    assert sel.mask.dtype == torch.bool and sel.columns is None
    assert sel.saliency.shape == (rows, cols // m) and sel.saliency.dtype == dtype
    for (row, group), problem_ in groups.items():
        kept = kept_of(sel.mask, row, group, m)
        losses = problem_.losses(n)
        assert kept in losses, f"row {row}, group {group}: kept {kept} of live {problem_.live}"
        best, least = problem_.best(n)
        floor = 1e-12 if dtype == F64 else 1e-6
        assert losses[kept] <= least * (1 + excess(dtype, size > m)) + floor, (row, group, kept, best)
        if dtype == F64 and runner_up_gap(losses) > SEARCH_GAP_F64:
            assert kept == best, f"row {row}, group {group}: kept {kept}, optimum {best}"
        assert float(sel.saliency[row, group]) == pytest.approx(
            losses[kept], rel=saliency_tolerance(dtype, size > m), abs=floor
        )


def check_vnm(
    sel: Selection,
    groups: dict[tuple[int, int], Group],
    v: int,
    n: int,
    m: int,
    num_columns: int,
    dtype: torch.dtype,
    size: int,
) -> None:
    """Columns, counts, the joint optimum over all column sets and kept sets inside, and the summed saliency."""
    rows, cols = sel.mask.shape
    assert sel.columns is not None and sel.columns.dtype == torch.uint8
    assert sel.columns.shape == (rows // v, cols // m, num_columns)
    assert sel.saliency.shape == (rows // v, cols // m) and sel.saliency.dtype == dtype
    floor = 1e-12 if dtype == F64 else 1e-6
    for panel, group in itertools.product(range(rows // v), range(cols // m)):
        members = [groups[panel * v + i, group] for i in range(v)]
        columns = tuple(sel.columns[panel, group].tolist())
        best_columns, best_rows, totals = best_panel(members, n, num_columns)
        assert columns in totals, columns  # ascending, distinct, below m
        loss = 0.0
        for i, member in enumerate(members):
            kept = kept_of(sel.mask, panel * v + i, group, m)
            inside = [c for c in member.live if c in columns]
            assert set(kept) <= set(inside) and len(kept) == min(n, len(inside)), (kept, inside)
            loss += member.losses(len(kept))[kept]
            if dtype == F64 and runner_up_gap(totals) > SEARCH_GAP_F64:
                assert kept == best_rows[i]
        assert loss <= totals[best_columns] * (1 + excess(dtype, size > m)) + floor
        if dtype == F64 and runner_up_gap(totals) > SEARCH_GAP_F64:
            assert columns == best_columns
        assert float(sel.saliency[panel, group]) == pytest.approx(
            loss, rel=saliency_tolerance(dtype, size > m), abs=floor
        )


# worked examples


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(
    ("n", "kept", "loss"),
    [(2, (3, 6), 187.4), (3, (2, 3, 5), 89.836346), (4, (2, 3, 5, 6), 41.903370), (5, (1, 2, 3, 5, 6), 5.719273)],
)
def test_example_c(n, kept, loss, dtype):
    weight, fisher = oracle.example_c(dtype)
    sel = search_nm(weight, fisher, f"{n}:8")
    assert kept_of(sel.mask, 0, 0, 8) == kept
    close(sel.saliency, loss, dtype)


def test_example_c_in_the_oracle():
    """The oracle itself against the printed losses, so that both sides of the comparison are anchored."""
    weight, fisher = oracle.example_c()
    group = groups_of(weight, fisher, 8)[0, 0]
    losses = group.losses(2)
    printed = {
        (3, 6): 187.4,
        (1, 7): 197.102217,
        (2, 7): 208.388252,
        (0, 1): 447.328622,
        (2, 3): 222.086397,
        (0, 6): 299.879902,
        (2, 5): 221.867596,
        (3, 7): 219.461806,
        (5, 6): 256.967391,
        (6, 7): 228.588745,
    }
    for kept, loss in printed.items():
        assert losses[kept] == pytest.approx(loss, abs=1e-6)
    assert sorted(losses, key=losses.__getitem__)[:3] == [(3, 6), (1, 7), (2, 7)] and max(
        losses, key=losses.__getitem__
    ) == (0, 1)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(
    ("n", "kept", "model", "true_loss"),
    [
        (5, (1, 2, 3, 5, 6), 8.306304, 5.719273),
        (4, (2, 3, 5, 6), 45.568794, 41.903370),
        (3, (1, 5, 6), 85.761391, 213.247253),
        (2, (5, 6), 123.023880, 256.967391),
    ],
)
def test_example_d(n, kept, model, true_loss, dtype):
    """pairwise: the exact minimum of its model; the saliency it reports is the true joint loss of the set."""
    weight, fisher = oracle.example_c(dtype)
    sel = search_nm(weight, fisher, f"{n}:8", method="pairwise")
    assert kept_of(sel.mask, 0, 0, 8) == kept
    close(sel.saliency, true_loss, dtype)
    pairs = groups_of(weight, fisher, 8)[0, 0].pair_model()
    assert pairs.best(n)[0] == kept and pairs.best(n)[1] == pytest.approx(model, abs=1e-6)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_example_e(dtype):
    weight, fisher = oracle.example_e(dtype)
    assert [f.trace().item() + 8 for f in fisher] == [91.75, 94.1875, 85.375, 99.6875]
    assert weight[0].tolist() == [-6, -3, 0, 3, 6, -4, -1, 2]
    sel = search_vnm(weight, fisher, "4:2:8", damp=1.0)
    assert sel.columns.tolist() == [[[0, 4, 5, 6]]]
    assert kept_by_row(sel.mask, 8) == [(0, 4), (5, 6), (5, 6), (4, 6)]
    close(sel.saliency, 839.487105, dtype)
    free = search_nm(weight, fisher, "2:8", damp=1.0)
    assert kept_by_row(free.mask, 8) == [(0, 4), (5, 6), (3, 6), (2, 3)]
    close(free.saliency.sum(), 770.915439, dtype)
    by_row = search_vnm(weight, fisher, "4:2:8", damp=1.0)
    new = obs_update(weight, fisher, by_row.mask, damp=1.0)
    losses = loss_increase(new - weight, fisher, damp=1.0)
    close(losses, [214.145866, 184.03125, 155.072113, 286.237876], dtype)
    kept = [-6.392318, 5.665809, 7.5, -6.5, 2.409392, -7.039838, -8.429397, 8.047019]
    close(new[by_row.mask], kept, dtype)
    pairs = search_vnm(weight, fisher, "4:2:8", damp=1.0, method="pairwise")
    assert pairs.columns.tolist() == [[[0, 4, 5, 6]]]
    assert kept_by_row(pairs.mask, 8) == [(0, 4), (5, 6), (0, 6), (4, 6)]
    close(pairs.saliency, 851.310754, dtype)
    model = [group.pair_model() for group in groups_of(weight, fisher, 8, damp=1.0).values()]
    columns, _, totals = best_panel(model, 2, 4)
    assert columns == (0, 4, 5, 6) and totals[columns] == pytest.approx(646.648099, abs=1e-6)
    magnitude = search_vnm(weight, None, "4:2:8", method="magnitude")
    assert magnitude.columns.tolist() == [[[0, 2, 4, 5]]]
    assert weight.abs()[magnitude.mask].sum() == 42 and weight.abs().sum() == 99


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(
    ("stages", "columns", "losses", "total"),
    [
        (
            [(5, 7), (4, 6), (3, 4), (2, 4)],
            [(0, 1, 2, 3, 4, 5, 6), (0, 2, 3, 4, 5, 6), (0, 2, 5, 6), (0, 2, 5, 6)],
            [70.303813, 145.164885, 429.637826, 238.823287],
            883.929812,
        ),
        (
            [(5, 7), (4, 6), (3, 5), (2, 4)],
            [(0, 1, 2, 3, 4, 5, 6), (0, 2, 3, 4, 5, 6), None, None],
            [70.303813, 145.164885, 242.666139, 381.352268],
            839.487105,
        ),
    ],
)
def test_example_e_ladders(stages, columns, losses, total, dtype):
    """Structure decay with an update after each stage; the 7,6,4,4 ladder leaves row 0 with 2 live weights at n = 3."""
    weight, fisher = oracle.example_e(dtype)
    now, mask = weight, None
    for (n, num_columns), expected, loss in zip(stages, columns, losses, strict=True):
        sel = search_vnm(now, fisher, f"4:{n}:8", damp=1.0, mask=mask, num_columns=num_columns)
        if expected is not None:  # math.md prints the sets of the first ladder only
            assert tuple(sel.columns.flatten().tolist()) == expected
        close(sel.saliency, loss, dtype)
        assert mask is None or not (sel.mask & ~mask).any()
        if (n, num_columns) == (3, 4):
            assert len(kept_of(sel.mask, 0, 0, 8)) == 2
        now, mask = obs_update(now, fisher, sel.mask, damp=1.0), sel.mask
    assert mask.sum(1).tolist() == [2, 2, 2, 2]
    close(loss_increase(now - weight, fisher, damp=1.0).sum(), total, dtype)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_example_f(dtype):
    """n:m ladder under a fixed F: nested sets, and stage losses that add up to the loss against the original."""
    weight, fisher = oracle.example_c(dtype)
    now, mask = weight, None
    stages = [
        (5, (1, 2, 3, 5, 6), 5.719273),
        (4, (2, 3, 5, 6), 36.184097),
        (3, (2, 3, 5), 47.932976),
        (2, (2, 5), 132.03125),
    ]
    for n, kept, loss in stages:
        sel = search_nm(now, fisher, f"{n}:8", mask=mask)
        assert kept_of(sel.mask, 0, 0, 8) == kept
        close(sel.saliency, loss, dtype)
        now, mask = obs_update(now, fisher, sel.mask), sel.mask
    close(loss_increase(now - weight, fisher), 221.867596, dtype)
    close(now[mask], [6.090592, -3.958188], dtype)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_example_g(dtype):
    """D = 16 > m = 8: the curvature of a group is that with the rest of the block re-optimised, not F_GG."""
    weight, fisher = oracle.example_g(dtype)
    sel = search_nm(weight, fisher, "2:8", damp=0.5)
    assert [kept_of(sel.mask, 0, g, 8) for g in range(2)] == [(0, 7), (3, 4)]
    close(sel.saliency, [60.850642, 177.304694], dtype)
    second = groups_of(*oracle.example_g(), 8, damp=0.5)[0, 0].losses(2)
    assert sorted(second.values())[1] == second[0, 2] == pytest.approx(79.283133, abs=1e-6)


def test_counterexample_to_the_greedy():
    """math.md 6: greedy keeps index 2 or 3 at model cost 1.9; the minimum 1.2 keeps index 1."""
    finv = torch.eye(4, dtype=F64)
    finv[2, 3] = finv[3, 2] = 7 / 11
    weight = torch.tensor([[0.2, 1.8, 1.8, 1.8]], dtype=F64).sqrt()
    fisher = torch.linalg.inv(finv)[None]
    assert kept_of(search_nm(weight, fisher, "1:4", method="pairwise").mask, 0, 0, 4) == (1,)
    group = groups_of(weight, fisher, 4)[0, 0].pair_model()
    assert group.best(1) == ((1,), pytest.approx(1.2)) and group.losses(1)[(2,)] == pytest.approx(1.9)


# brute force, n:m


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize(("n", "m"), [(n, m) for m in (4, 6, 8) for n in range(1, m)])
def test_nm_is_the_optimum(gen, n, m, blocks, dtype):
    """Every n of m = 4, 6, 8 with D = m (no inverse) and D = 2m, 4m (conditional curvature)."""
    weight, fisher = problem(gen, 2, max(blocks, 2) * m, blocks * m, dtype)
    before = weight.clone(), fisher.clone()
    sel = search_nm(weight, fisher, f"{n}:{m}", damp=0.01)
    check_nm(sel, groups_of(weight, fisher, m, damp=0.01), n, m, dtype, blocks * m)
    assert torch.equal(weight, before[0]) and torch.equal(fisher, before[1])
    assert not (sel.mask.view(2, -1, m).sum(2) != n).any()


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("n", [2, 3, 14])
def test_sixteen_columns(gen, n, size):
    weight, fisher = problem(gen, 2, 32, size)
    check_nm(search_nm(weight, fisher, f"{n}:16"), groups_of(weight, fisher, 16), n, 16, F64, size)
    check_nm(
        search_nm(weight.float(), fisher.float(), f"{n}:16"),
        groups_of(weight.float(), fisher.float(), 16),
        n,
        16,
        F32,
        size,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights(gen, dtype):
    """Half weights are exact after the cast to f32, so the optimum is that of the rounded weight."""
    weight, fisher = problem(gen, 3, 16, 8, F32)
    weight = weight.to(dtype)
    check_nm(search_nm(weight, fisher, "2:8"), groups_of(weight, fisher, 8), 2, 8, F32, 8)
    sel = search_vnm(weight, fisher, "3:2:8")
    check_vnm(sel, groups_of(weight, fisher, 8), 3, 2, 8, 4, F32, 8)


def test_mixed_precision_computes_in_f64(gen):
    weight, fisher = problem(gen, 2, 16, 8)
    for w, f in [(weight.float(), fisher), (weight, fisher.float())]:
        sel = search_nm(w, f, "2:8")
        check_nm(sel, groups_of(w, f, 8), 2, 8, F64, 8)


def test_damp_keeps_its_digits_in_mixed_precision(gen):
    weight, fisher = problem(gen, 2, 16, 8, F32)
    sel, same = (search_nm(w, fisher.double(), "2:8", damp=0.1) for w in (weight, weight.double()))
    torch.testing.assert_close(sel.saliency, same.saliency, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("size", [8, 16])
def test_damp_of_each_block(gen, size):
    """One damping a block equals adding it by hand, and it changes the choice."""
    weight, fisher = problem(gen, 4, 16, size)
    damp = torch.tensor([0.0, 0.3, 5.0, 40.0, 0.1, 1.0, 0.0, 2.0], dtype=F64)[: fisher.shape[0]]
    by_hand = fisher + damp[:, None, None] * torch.eye(size, dtype=F64)
    for op, pattern in [(search_nm, "2:8"), (search_vnm, "2:2:8")]:
        for method in ("combinatorial", "pairwise", "diagonal"):
            sel, expected = (
                op(weight, fisher, pattern, damp=damp, method=method),
                op(weight, by_hand, pattern, method=method),
            )
            assert torch.equal(sel.mask, expected.mask)
            torch.testing.assert_close(sel.saliency, expected.saliency)
    check_nm(search_nm(weight, fisher, "2:8", damp=damp), groups_of(weight, fisher, 8, damp=damp), 2, 8, F64, size)
    assert not torch.equal(search_nm(weight, fisher, "2:8").mask, search_nm(weight, fisher, "2:8", damp=100.0).mask)


def test_large_damp_is_magnitude(gen):
    """math.md 3: F ~ lambda I makes OBS magnitude pruning."""
    weight, fisher = problem(gen, 4, 32, 8)
    magnitude = search_nm(weight, None, "2:8", method="magnitude")
    for method in ("combinatorial", "pairwise"):
        assert torch.equal(search_nm(weight, fisher, "2:8", damp=1e9, method=method).mask, magnitude.mask)


# brute force, v:n:m


@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize(
    ("v", "n", "m", "num_columns"),
    [(2, n, 4, c) for n in (1, 2, 3) for c in range(n, 5)]
    + [(3, n, 6, c) for n in (1, 2, 3, 4) for c in range(n, 7)]
    + [(2, n, 8, c) for n, c in [(1, 4), (2, 2), (2, 4), (2, 8), (3, 4), (4, 6), (5, 7), (6, 8)]],
)
def test_vnm_is_the_joint_optimum(gen, v, n, m, num_columns, blocks):
    weight, fisher = problem(gen, 2 * v, max(blocks, 2) * m, blocks * m)
    sel = search_vnm(weight, fisher, f"{v}:{n}:{m}", damp=0.01, num_columns=num_columns)
    check_vnm(sel, groups_of(weight, fisher, m, damp=0.01), v, n, m, num_columns, F64, blocks * m)


@pytest.mark.parametrize(("v", "size"), [(1, 8), (5, 8), (3, 32)])
def test_vnm_in_f32(gen, v, size):
    weight, fisher = problem(gen, 2 * v, 32, size, F32)
    check_vnm(search_vnm(weight, fisher, f"{v}:2:8"), groups_of(weight, fisher, 8), v, 2, 8, 4, F32, size)


@pytest.mark.parametrize("size", [16, 32])
def test_vnm_of_sixteen_columns(gen, size):
    weight, fisher = problem(gen, 3, 32, size)
    sel = search_vnm(weight, fisher, "3:2:16")
    check_vnm(sel, groups_of(weight, fisher, 16), 3, 2, 16, 4, F64, size)


@pytest.mark.parametrize("method", METHODS)
def test_one_row_with_all_columns_is_plain_nm(gen, method):
    weight, fisher = problem(gen, 3, 32, 16)
    for n in (1, 2, 5):
        panel = search_vnm(weight, fisher, f"1:{n}:8", method=method, num_columns=8)
        plain = search_nm(weight, fisher, f"{n}:8", method=method)
        assert torch.equal(panel.mask, plain.mask)
        torch.testing.assert_close(panel.saliency, plain.saliency)
        assert torch.equal(panel.columns, torch.arange(8, dtype=torch.uint8).expand(3, 4, 8))


def test_sharing_columns_costs(gen):
    """A panel's optimum is never below the sum of its rows' free optima, and equals it when all rows agree."""
    weight, fisher = problem(gen, 8, 16, 8)
    free = search_nm(weight, fisher, "2:8").saliency.view(2, 4, 2).sum(1)
    shared = search_vnm(weight, fisher, "4:2:8").saliency
    assert (shared >= free * (1 - 1e-12)).all() and (shared > free * (1 + 1e-6)).any()
    same = search_vnm(weight[:1].expand(4, 16), fisher[:2].repeat(4, 1, 1), "4:2:8")
    torch.testing.assert_close(same.saliency, 4 * search_nm(weight[:1], fisher[:2], "2:8").saliency)


# live and dead entries


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("size", [8, 16, 32])
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_nm_with_dead_entries(gen, n, size, dtype):
    """Dead rows and columns leave F before damping; fewer than n live keeps all; dead is never kept."""
    weight, fisher = problem(gen, 6, 32, size, dtype)
    mask = live_mask(gen, 6, 32, 8)
    sel = search_nm(weight, fisher, f"{n}:8", damp=0.02, mask=mask)
    assert not (sel.mask & ~mask).any()
    assert torch.equal(sel.mask.view(6, 4, 8).sum(2), mask.view(6, 4, 8).sum(2).clamp(max=n))
    check_nm(sel, groups_of(weight, fisher, 8, damp=0.02, mask=mask), n, 8, dtype, size)


@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize(("n", "num_columns"), [(2, 4), (1, 3), (3, 4), (4, 6), (5, 7), (2, 8)])
def test_vnm_with_dead_entries(gen, n, num_columns, size):
    weight, fisher = problem(gen, 6, 32, size)
    mask = live_mask(gen, 6, 32, 8)
    sel = search_vnm(weight, fisher, f"3:{n}:8", damp=0.02, mask=mask, num_columns=num_columns)
    assert not (sel.mask & ~mask).any()
    check_vnm(sel, groups_of(weight, fisher, 8, damp=0.02, mask=mask), 3, n, 8, num_columns, F64, size)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("op", "pattern"), [(search_nm, "2:8"), (search_vnm, "3:2:8")])
@pytest.mark.parametrize("size", [8, 16])
def test_dead_entries_do_not_matter(gen, op, pattern, method, size):
    """The same answer whether gradients were masked or not, and whatever value a dead weight holds."""
    weight, fisher = problem(gen, 6, 16, size)
    mask = live_mask(gen, 6, 16, 8)
    live = mask.reshape(-1, size).to(F64)
    masked_fisher = fisher * live[:, :, None] * live[:, None, :]
    expected = op(weight * mask, masked_fisher, pattern, damp=0.05, method=method, mask=mask)
    for w, f in [(weight, fisher), (weight, masked_fisher), (weight.masked_fill(~mask, 1e4), fisher)]:
        sel = op(w, f, pattern, damp=0.05, method=method, mask=mask)
        assert torch.equal(sel.mask, expected.mask) and torch.equal(sel.saliency, expected.saliency)
        assert sel.columns is None or torch.equal(sel.columns, expected.columns)
    full = torch.ones_like(mask)
    assert torch.equal(
        op(weight, fisher, pattern, method=method, mask=full).mask, op(weight, fisher, pattern, method=method).mask
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [1, 2, 4])
def test_live_zeros_stay_live(gen, n, method):
    """A live weight of exactly 0 is kept before any dead one, and counts."""
    _, fisher = problem(gen, 5, 8, 8)
    weight = torch.zeros(5, 8, dtype=F64)
    mask = torch.tensor(
        [[c == "1" for c in row] for row in ("00000000", "00000001", "00110000", "01010101", "11111111")]
    )
    weight = weight.masked_fill(~mask, 7.0)
    expected = [(), (7,), (2, 3)[:n], (1, 3, 5, 7)[:n], (0, 1, 2, 3)[:n]]
    assert kept_by_row(search_nm(weight, fisher, f"{n}:8", mask=mask, method=method).mask, 8) == expected
    sel = search_vnm(weight, fisher, f"5:{n}:8", mask=mask, method=method, num_columns=8)
    assert kept_by_row(sel.mask, 8) == expected
    assert not sel.saliency.any()


def test_all_dead_panel(gen):
    weight, fisher = problem(gen, 4, 16, 8)
    mask = torch.zeros(4, 16, dtype=torch.bool)
    sel = search_vnm(weight, fisher, "2:2:8", mask=mask)
    assert not sel.mask.any() and not sel.saliency.any()
    assert torch.equal(sel.columns, torch.arange(4, dtype=torch.uint8).expand(2, 2, 4))


@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("ladder", [[(6, 8), (5, 7), (4, 6), (3, 4), (2, 4)], [(5, 7), (4, 6), (3, 5), (2, 4)]])
def test_ladders_are_nested_and_each_stage_is_optimal(gen, ladder, size):
    weight, fisher = problem(gen, 6, 16, size)
    now, mask = weight, torch.ones(6, 16, dtype=torch.bool)
    for n, num_columns in ladder:
        sel = search_vnm(now, fisher, f"3:{n}:8", damp=0.01, mask=mask, num_columns=num_columns)
        check_vnm(sel, groups_of(now, fisher, 8, damp=0.01, mask=mask), 3, n, 8, num_columns, F64, size)
        assert not (sel.mask & ~mask).any()
        now, mask = obs_update(now, fisher, sel.mask, damp=0.01), sel.mask
    obs.parse_pattern("3:2:8").validate_mask(mask)


def test_search_again_inside_its_own_choice_changes_nothing(gen):
    weight, fisher = problem(gen, 4, 32, 8)
    first = search_nm(weight, fisher, "2:8")
    again = search_nm(weight * first.mask, fisher, "2:8", mask=first.mask)
    assert torch.equal(again.mask, first.mask) and (again.saliency < 1e-25).all()


# ties and integers


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
def test_equal_weights_keep_the_lowest(n, size, method):
    weight = torch.tensor([[1.0, -1.0] * 8, [-2.0] * 16])
    fisher = 4.0 * torch.eye(size).expand(32 // size, size, size)
    sel = search_nm(weight, fisher, f"{n}:8", method=method)
    assert sel.mask.view(4, 8).int().tolist() == [[1] * n + [0] * (8 - n)] * 4
    panel = search_vnm(weight, fisher, f"2:{n}:8", method=method, num_columns=max(4, n))
    assert torch.equal(panel.mask, sel.mask)
    assert panel.columns.tolist() == [[list(range(max(4, n)))] * 2]


def pair_gain_exact(f: np.ndarray, w: np.ndarray, kept: Kept) -> np.float32:
    """The n = 2 gain of math.md 4 in exact integers, then ONE IEEE division in f32: the contract of every backend."""
    a, b = kept
    u = f @ w
    numerator = f[b, b] * u[a] ** 2 - 2 * f[a, b] * u[a] * u[b] + f[a, a] * u[b] ** 2
    return np.float32(numerator) / np.float32(f[a, a] * f[b, b] - f[a, b] ** 2)


def tied_integers(gen: torch.Generator, count: int, m: int) -> tuple[Tensor, Tensor]:
    """Small integers with many exact ties: diagonally dominant F and w in -1, 0, 1."""
    off = torch.randint(-1, 2, (count, m, m), generator=gen)
    fisher = off.triu(1) + off.triu(1).mT + (m + 1) * torch.eye(m, dtype=torch.int64)
    return torch.randint(-1, 2, (count, m), generator=gen), fisher


@pytest.mark.parametrize("m", [4, 8])
def test_integers_give_the_exact_choice(gen, m):
    """Every product is below 2^24, so f32 and f64 are exact up to one division; exact ties go to the lower index."""
    weight, fisher = tied_integers(gen, 60, m)
    sel = search_nm(weight.float(), fisher.float(), f"2:{m}")
    ties = 0
    for row in range(60):
        gains = {
            k: pair_gain_exact(fisher[row].numpy(), weight[row].numpy(), k) for k in itertools.combinations(range(m), 2)
        }
        best = max(gains.values())
        ties += sum(g == best for g in gains.values()) > 1
        assert kept_of(sel.mask, row, 0, m) == next(k for k, g in gains.items() if g == best)
    assert ties >= 10, "the inputs must hold ties"


@pytest.mark.parametrize("divisor", [41, 47, 55, 61, 83])
def test_gains_use_one_ieee_division(divisor):
    """In f32 k * (1 / k) < 1 for these k: a reciprocal instead of k / k would break the tie of (0, 1) and (0, 2)."""
    assert np.float32(divisor) * (np.float32(1) / np.float32(divisor)) < 1
    weight, fisher = torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.diag(torch.tensor([1.0, divisor, 1.0, 1.0]))[None]
    assert kept_of(search_nm(weight, fisher, "2:4").mask, 0, 0, 4) == (0, 1)
    sel = search_vnm(weight, fisher, "1:2:4", num_columns=2)
    assert kept_of(sel.mask, 0, 0, 4) == (0, 1) and sel.columns.tolist() == [[[0, 1]]]


def test_panel_rows_are_summed_in_ascending_order():
    """(2^24 + 1) + 1 is 2^24 in f32, so columns (0, 1) and (0, 2) tie; summed from the last row they would not."""
    weight = torch.tensor([[4096.0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]])
    sel = search_vnm(weight, torch.eye(4).expand(3, 4, 4), "3:2:4", num_columns=2)
    assert sel.columns.tolist() == [[[0, 1]]]


def test_integer_panels_give_the_exact_choice(gen):
    weight, fisher = tied_integers(gen, 60, 8)
    sel = search_vnm(weight.float(), fisher.float(), "3:2:8")
    ties = 0
    for panel in range(20):
        rows = range(3 * panel, 3 * panel + 3)
        gains = [
            {k: pair_gain_exact(fisher[r].numpy(), weight[r].numpy(), k) for k in itertools.combinations(range(8), 2)}
            for r in rows
        ]
        totals = {}
        for columns in itertools.combinations(range(8), 4):
            total = np.float32(0)
            for row in gains:  # in ascending order, in f32
                total = total + max(row[k] for k in itertools.combinations(columns, 2))
            totals[columns] = total
        best = max(totals.values())
        ties += sum(t == best for t in totals.values()) > 1
        columns = next(c for c, t in totals.items() if t == best)
        assert tuple(sel.columns[panel, 0].tolist()) == columns
        for r, row in zip(rows, gains, strict=True):
            inside = {k: row[k] for k in itertools.combinations(columns, 2)}
            assert kept_of(sel.mask, r, 0, 8) == next(k for k, g in inside.items() if g == max(inside.values()))
    assert ties >= 5


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_pairwise_ties_on_integers(gen, n):
    """Diagonal integer F, exact costs: fewer are pruned of the earlier pairs, and the higher index of two equals."""
    scale = 4.0 ** torch.randint(0, 2, (50, 8), generator=gen)  # squares, so that the Cholesky factor is exact
    weight = torch.randint(-2, 3, (50, 8), generator=gen).float()
    sel = search_nm(weight, torch.diag_embed(scale), f"{n}:8", method="pairwise")
    for row in range(50):
        score = [Fraction(float(f)) * Fraction(float(w)) ** 2 for f, w in zip(scale[row], weight[row], strict=True)]
        cost = {k: sum(s for i, s in enumerate(score) if i not in k) for k in itertools.combinations(range(8), n)}
        assert kept_of(sel.mask, row, 0, 8) == next(k for k, c in cost.items() if c == min(cost.values()))


@pytest.mark.parametrize("method", ["magnitude", "diagonal"])
def test_scores_and_their_ties(gen, method):
    """diagonal: 1/2 (F_ii + damp) w_i^2; magnitude: |w|; no compensation, so the loss is the sum over the pruned."""
    weight = torch.randint(-3, 4, (40, 16), generator=gen).float()
    fisher = torch.diag_embed(torch.randint(1, 4, (40, 16), generator=gen).float()) + 0.25
    mask = live_mask(gen, 40, 16, 8)
    for live in (None, mask):
        alive = torch.ones_like(mask) if live is None else live
        w = numpy(weight) * alive.numpy()
        loss = 0.5 * w**2 * (1.0 if method == "magnitude" else numpy(fisher.diagonal(dim1=1, dim2=2)) + 0.5)
        score = np.abs(w) if method == "magnitude" else loss
        for fisher_given in (fisher, None) if method == "magnitude" else (fisher,):
            sel = search_nm(weight, fisher_given, "3:8", damp=0.5, method=method, mask=live)
            for row, g in itertools.product(range(40), range(2)):
                span = slice(8 * g, 8 * g + 8)
                inside = tuple(alive[row, span].nonzero().flatten().tolist())
                kept = kept_of(sel.mask, row, g, 8)
                assert kept == best_by_score(score[row, span], inside, 3)
                pruned = [i for i in inside if i not in kept]
                assert float(sel.saliency[row, g]) == pytest.approx(loss[row, span][pruned].sum())


@pytest.mark.parametrize("method", ["magnitude", "diagonal"])
def test_panels_by_score(gen, method):
    """The columns of largest sum over the rows of the n largest scores inside, first of equals."""
    weight = torch.randint(-3, 4, (24, 8), generator=gen).float()
    fisher = torch.diag_embed(torch.randint(1, 4, (24, 8), generator=gen).float())
    sel = search_vnm(weight, fisher, "4:2:8", damp=1.0, method=method)
    w = numpy(weight)
    loss = 0.5 * w**2 * (1.0 if method == "magnitude" else numpy(fisher.diagonal(dim1=1, dim2=2)) + 1.0)
    score = np.abs(w) if method == "magnitude" else loss
    for panel in range(6):
        rows = range(4 * panel, 4 * panel + 4)
        totals = {
            c: sum(np.sort(score[r, list(c)])[-2:].sum() for r in rows) for c in itertools.combinations(range(8), 4)
        }
        columns = next(c for c, total in totals.items() if total == max(totals.values()))
        assert tuple(sel.columns[panel, 0].tolist()) == columns
        pruned_loss = 0.0
        for r in rows:
            kept = best_by_score(score[r], columns, 2)
            assert kept_of(sel.mask, r, 0, 8) == kept
            pruned_loss += loss[r].sum() - loss[r][list(kept)].sum()
        assert float(sel.saliency[panel, 0]) == pytest.approx(pruned_loss)


# pairwise


@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7])
def test_pairwise_is_the_optimum_of_its_model(gen, n, size):
    """The dynamic program against all sets under the block-diagonal F^-1, with and without dead entries."""
    weight, fisher = problem(gen, 8, 16, size)
    for mask in (None, live_mask(gen, 8, 16, 8)):
        sel = search_nm(weight, fisher, f"{n}:8", damp=0.01, method="pairwise", mask=mask)
        for (row, g), group in groups_of(weight, fisher, 8, damp=0.01, mask=mask).items():
            losses = group.pair_model().losses(n)
            kept = kept_of(sel.mask, row, g, 8)
            assert runner_up_gap(losses) > SEARCH_GAP_F64 or len(group.live) <= n
            assert kept == oracle.least(losses)[0]
            assert float(sel.saliency[row, g]) == pytest.approx(group.losses(n)[kept], rel=SALIENCY_F64, abs=1e-12)


def test_dynamic_program_equals_enumeration(gen):
    """math.md 6: the program and the search with F' replaced by the pair blocks agree exactly."""
    weight, fisher = problem(gen, 200, 8, 8)
    alive = torch.ones(200, 8, dtype=torch.bool)
    groups, finv = condition_groups(weight, fisher, alive, torch.zeros(1, dtype=F64), 8)
    pairs = pair_model(groups, finv)
    for n in range(1, 8):
        best = kept_sets(n, 8)[gain_table(pairs, n).argmax(1)]
        expected = torch.zeros(200, 8, dtype=torch.bool).scatter_(1, best, True)
        assert torch.equal(pairwise.keep_by_pairs(pairs, n), expected)


@pytest.mark.parametrize(("v", "n", "num_columns", "size"), [(2, 2, 4, 8), (3, 2, 4, 16), (2, 4, 6, 8), (2, 1, 3, 8)])
def test_pairwise_panels(gen, v, n, num_columns, size):
    weight, fisher = problem(gen, 2 * v, 16, size)
    for mask in (None, live_mask(gen, 2 * v, 16, 8)):
        sel = search_vnm(weight, fisher, f"{v}:{n}:8", method="pairwise", mask=mask, num_columns=num_columns)
        groups = groups_of(weight, fisher, 8, mask=mask)
        for panel, g in itertools.product(range(2), range(2)):
            members = [groups[panel * v + i, g] for i in range(v)]
            columns, rows, totals = best_panel([member.pair_model() for member in members], n, num_columns)
            if runner_up_gap(totals) > SEARCH_GAP_F64:
                assert tuple(sel.columns[panel, g].tolist()) == columns
                kept = [kept_of(sel.mask, panel * v + i, g, 8) for i in range(v)]
                assert kept == rows
                true_loss = sum(member.losses(len(k))[k] for member, k in zip(members, kept, strict=True))
                assert float(sel.saliency[panel, g]) == pytest.approx(true_loss, rel=SALIENCY_F64, abs=1e-12)


def test_pairwise_needs_an_even_m(gen):
    weight, fisher = problem(gen, 2, 6, 3)
    with pytest.raises(ConfigError, match=r"pairwise.*even m.*2:3"):
        search_nm(weight, fisher, "2:3", method="pairwise")
    search_nm(weight, fisher, "2:3")


# saliency against the update


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("method", ["combinatorial", "pairwise"])
def test_saliency_is_the_loss_of_the_update(gen, method, dtype):
    """D = m: what the search predicts is what the quadratic model pays after the joint update."""
    weight, fisher = problem(gen, 6, 16, 8, dtype)
    tolerance = {"rtol": saliency_tolerance(dtype, False), "atol": 1e-6}
    for n in (1, 2, 5):
        sel = search_nm(weight, fisher, f"{n}:8", damp=0.1, method=method)
        new = obs_update(weight, fisher, sel.mask, damp=0.1)
        torch.testing.assert_close(loss_increase(new - weight, fisher, damp=0.1).view(6, 2), sel.saliency, **tolerance)
    sel = search_vnm(weight, fisher, "3:2:8", damp=0.1, method=method)
    new = obs_update(weight, fisher, sel.mask, damp=0.1)
    losses = loss_increase(new - weight, fisher, damp=0.1).view(2, 3, 2).sum(1)
    torch.testing.assert_close(losses, sel.saliency, **tolerance)


def test_no_other_mask_with_the_same_update_is_better(gen):
    """D = m, combinatorial: the real loss after the update is least over all 28 masks, measured through the ops."""
    weight, fisher = problem(gen, 1, 8, 8)
    best = search_nm(weight, fisher, "2:8")
    for kept in itertools.combinations(range(8), 2):
        mask = torch.zeros(1, 8, dtype=torch.bool)
        mask[0, list(kept)] = True
        loss = loss_increase(obs_update(weight, fisher, mask) - weight, fisher)
        assert loss.item() >= best.saliency.item() * (1 - 1e-12)


def test_single_weight_saliency_matches_block_saliency(gen):
    """n = m - 1 prunes the weight of least w_i^2 / (2 F^-1_ii)."""
    weight, fisher = problem(gen, 4, 16, 8)
    singles = block_saliency(weight, fisher, 1).view(4, 2, 8)
    sel = search_nm(weight, fisher, "7:8")
    assert torch.equal((~sel.mask).view(4, 2, 8).int().argmax(2), singles.argmin(2))
    torch.testing.assert_close(sel.saliency, singles.amin(2))


# shapes, strides, chunks


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(0, 8), (0, 16), (4, 0), (0, 0)])
def test_empty_nm(shape, method):
    rows, cols = shape
    for fisher in (torch.zeros(0, 8, 8), None) if method == "magnitude" else (torch.zeros(0, 8, 8),):
        for n in (1, 2, 3):
            sel = search_nm(torch.zeros(shape), fisher, f"{n}:8", method=method)
            assert sel.mask.shape == shape and sel.mask.dtype == torch.bool
            assert sel.saliency.shape == (rows, cols // 8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "shape",
    [
        (0, 8),
        (0, 16),
        (4, 0),
        (0, 0),
    ],
)
def test_empty_vnm(shape, method):
    rows, cols = shape
    for fisher in (torch.zeros(0, 8, 8), None) if method == "magnitude" else (torch.zeros(0, 8, 8),):
        sel = search_vnm(torch.zeros(shape), fisher, "2:2:8", method=method)
        assert sel.mask.shape == shape and sel.saliency.shape == (rows // 2, cols // 8)
        assert sel.columns.shape == (rows // 2, cols // 8, 4) and sel.columns.dtype == torch.uint8


@pytest.mark.parametrize("method", METHODS)
def test_strided_arguments(gen, method):
    """Transposed weight, sliced Fisher, expanded mask: the same as their copies."""
    weight = torch.randn(32, 6, generator=gen).T
    wide = oracle.random_spd(gen, 48, 8).float()
    fisher = wide[::2]
    row = live_mask(gen, 1, 32, 8)
    mask = row.expand(6, 32)
    damp = torch.rand(48, generator=gen)[::2]
    for op, pattern in [(search_nm, "2:8"), (search_vnm, "3:2:8")]:
        sel = op(weight, fisher, pattern, damp=damp, method=method, mask=mask)
        same = op(
            weight.contiguous(),
            fisher.contiguous(),
            pattern,
            damp=damp.contiguous(),
            method=method,
            mask=mask.contiguous(),
        )
        assert torch.equal(sel.mask, same.mask) and torch.equal(sel.saliency, same.saliency)
        assert sel.mask.is_contiguous() and sel.saliency.is_contiguous()
    halves = torch.randn(12, 64, generator=gen)[::2, ::2]
    assert torch.equal(
        search_nm(halves, fisher, "2:8", method=method).mask,
        search_nm(halves.contiguous(), fisher, "2:8", method=method).mask,
    )
    one = torch.randn(1, 32, generator=gen).expand(6, 32)
    assert torch.equal(
        search_nm(one, fisher, "2:8", method=method).mask,
        search_nm(one.contiguous(), fisher, "2:8", method=method).mask,
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("chunk", [1, 20_000])
def test_chunks_give_the_same(gen, monkeypatch, method, chunk):
    """1 byte: one block, or one panel, at a time; 20 kB: a few."""
    weight, fisher = problem(gen, 6, 16, 16)
    mask = live_mask(gen, 6, 16, 8)
    damp = torch.rand(6, generator=gen, dtype=F64)
    calls = [(search_nm, "3:8"), (search_nm, "2:8"), (search_vnm, "3:2:8")]
    whole = [op(weight, fisher, pattern, damp=damp, method=method, mask=mask) for op, pattern in calls]
    monkeypatch.setattr("obs_kernels.reference.fisher.CHUNK_BYTES", chunk)
    for (op, pattern), expected in zip(calls, whole, strict=True):
        sel = op(weight, fisher, pattern, damp=damp, method=method, mask=mask)
        assert torch.equal(sel.mask, expected.mask)
        torch.testing.assert_close(sel.saliency, expected.saliency)
        assert sel.columns is None or torch.equal(sel.columns, expected.columns)


@pytest.mark.parametrize("method", METHODS)
def test_same_bits_each_run(gen, method):
    weight, fisher = problem(gen, 6, 32, 16, F32)
    for op, pattern in [(search_nm, "2:8"), (search_vnm, "3:2:8")]:
        runs = [op(weight, fisher, pattern, method=method) for _ in range(2)]
        assert torch.equal(runs[0].mask, runs[1].mask) and torch.equal(runs[0].saliency, runs[1].saliency)


@pytest.mark.parametrize("exponent", [-100, -60, -48, -30, 30, 48, 100])
@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("method", METHODS)
def test_scale_of_the_fisher_does_not_matter(gen, method, size, exponent):
    """Hazard 2 of promises.md names scale 1e+-30. A power of two only moves exponents; squared gradients are small."""
    weight, fisher = problem(gen, 6, 32, size, F32)
    weight, scaled = 0.05 * weight, fisher * 2.0**exponent
    for op, pattern in [(search_nm, "1:8"), (search_nm, "2:8"), (search_nm, "4:8"), (search_vnm, "3:2:8")]:
        for mask in (None, live_mask(gen, 6, 32, 8)):  # a dead entry's diagonal of 1 must not set the scale
            expected, sel = (op(weight, f, pattern, method=method, mask=mask) for f in (fisher, scaled))
            assert torch.equal(sel.mask, expected.mask)
            scale = 1.0 if method == "magnitude" else 2.0**exponent
            torch.testing.assert_close(sel.saliency, expected.saliency * scale, rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("exponent", [-100, -60, -48])
def test_scales_that_differ_inside_a_block(gen, exponent):
    """D = 2m without coupling between its groups: each must choose as if it were alone."""
    first, second = (oracle.random_spd(gen, 8, 8).float() for _ in range(2))
    fisher = torch.zeros(8, 16, 16)
    fisher[:, :8, :8], fisher[:, 8:, 8:] = first, second * 2.0**exponent
    weight = 0.05 * torch.randn(8, 16, generator=gen)
    for op, pattern in [(search_nm, "2:8"), (search_nm, "4:8"), (search_vnm, "4:2:8")]:
        sel = op(weight, fisher, pattern)
        assert torch.equal(sel.mask[:, :8], op(weight[:, :8], first, pattern).mask)
        assert torch.equal(sel.mask[:, 8:], op(weight[:, 8:], second, pattern).mask)


@settings(max_examples=60)
@given(
    st.integers(0, 3),
    st.integers(0, 3),
    st.sampled_from([(1, 2), (1, 3), (2, 4), (1, 4), (3, 5), (2, 8), (5, 8)]),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_nm_of_any_shape(rows, blocks, nm, groups_per_block, masked, seed):
    (n, m), gen = nm, torch.Generator().manual_seed(seed)
    size = groups_per_block * m
    weight, fisher = problem(gen, rows, blocks * size, size)
    mask = live_mask(gen, rows, blocks * size, m) if masked else None
    sel = search_nm(weight, fisher, f"{n}:{m}", damp=0.01, mask=mask)
    check_nm(sel, groups_of(weight, fisher, m, damp=0.01, mask=mask), n, m, F64, size)
    obs.parse_pattern(f"{n}:{m}").validate_mask(sel.mask)


@settings(max_examples=40)
@given(
    st.integers(0, 2),
    st.integers(1, 2),
    st.sampled_from([(1, 1, 2), (2, 1, 4), (1, 2, 4), (3, 2, 5), (2, 2, 8), (2, 5, 8)]),
    st.integers(1, 2),
    st.integers(0, 3),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_vnm_of_any_shape(panels, blocks, vnm, groups_per_block, more_columns, masked, seed):
    (v, n, m), gen = vnm, torch.Generator().manual_seed(seed)
    size, num_columns = groups_per_block * m, min(m, n + more_columns)
    weight, fisher = problem(gen, panels * v, blocks * size, size)
    mask = live_mask(gen, panels * v, blocks * size, m) if masked else None
    sel = search_vnm(weight, fisher, f"{v}:{n}:{m}", damp=0.01, mask=mask, num_columns=num_columns)
    check_vnm(sel, groups_of(weight, fisher, m, damp=0.01, mask=mask), v, n, m, num_columns, F64, size)


@pytest.mark.parametrize("method", ["magnitude", "diagonal"])
def test_scores_accept_a_singular_fisher(method):
    weight = torch.tensor([[1.0, 3.0, 2.0, -4.0]])
    fisher = torch.ones(1, 4, 4)  # one gradient of ones: rank one
    assert kept_of(search_nm(weight, fisher, "2:4", method=method).mask, 0, 0, 4) == (1, 3)
