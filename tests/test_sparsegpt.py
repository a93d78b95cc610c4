# SPDX-License-Identifier: Apache-2.0
"""The published sweep, as the peer of the exact one: worked example, and column by column with explicit inverses."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch
from oracle import kept_of, numpy
from tolerances import SWEEP_IDENTITY, UPDATE_F64
from torch import Tensor

from obs_kernels.ops import sweep_rows
from obs_kernels.reference.hessian import row_loss, upper_factor
from obs_kernels.reference.sparsegpt import sparsegpt

F32, F64 = torch.float32, torch.float64
NONE = torch.zeros(1, dtype=F64)


def example_h(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.tensor([oracle.EXAMPLE_H_WEIGHT], dtype=dtype), torch.tensor(oracle.EXAMPLE_H_HESSIAN, dtype=dtype)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_example_h(dtype):
    weight, hessian = example_h(dtype)
    damp = 0.01 * float(hessian.diagonal().mean())
    assert damp == pytest.approx(oracle.EXAMPLE_H_DAMP)
    pivots = 1 / upper_factor(hessian + damp * torch.eye(4, dtype=dtype)).diagonal()
    oracle.assert_worked_numbers(pivots, [0.424126, 0.386928, 0.342586, 0.375690], dtype)
    oracle.assert_worked_numbers((weight / pivots) ** 2, [50.032619, 26.717744, 53.252668, 7.085], dtype)
    sel = sweep_rows(weight, hessian, "2:4", damp=damp, method="sparsegpt", resolve=False)
    assert kept_of(sel.mask, 0, 0, 4) == (0, 2)
    assert sel.weight[0, 0] == 3 and (sel.weight[0, [1, 3]] == 0).all()
    oracle.assert_worked_numbers(sel.weight[0, 2], [1.729549], dtype)
    oracle.assert_worked_numbers(sel.saliency, [21.327101], dtype)
    oracle.assert_worked_numbers(row_loss(sel.weight - weight, hessian, damp=damp), [21.327101], dtype)
    solved = sweep_rows(weight, hessian, "2:4", damp=damp, method="sparsegpt")
    assert torch.equal(solved.mask, sel.mask)
    oracle.assert_worked_numbers(row_loss(solved.weight - weight, hessian, damp=damp), [17.612370], dtype)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_groups_column_by_column(pattern, masked, seed):
    n, m = map(int, pattern.split(":"))
    weight, hessian = oracle.row_problem(5, 24, seed=seed)
    mask = torch.rand(5, 24, generator=torch.Generator().manual_seed(seed)).lt(0.6) if masked else None

    def choose(column: int, score: np.ndarray) -> np.ndarray | None:
        if column % m:
            return None
        order = np.argsort(-score[:, :m], axis=1, kind="stable")[:, :n]
        kept = np.zeros((5, m), bool)
        np.put_along_axis(kept, order, True, axis=1)
        return kept

    wanted, kept = oracle.sweep_columns(weight, hessian, choose, damp=0.1, mask=mask)
    for block in (8, 16, 128):
        found, new, loss = sparsegpt(weight, hessian, pattern, damp=NONE + 0.1, mask=mask, block=block)
        assert np.array_equal(found.numpy(), kept)
        np.testing.assert_allclose(numpy(new), wanted, rtol=UPDATE_F64, atol=UPDATE_F64)
        assert loss.shape == (5, 24 // m)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("masked", [False, True])
def test_a_threshold_a_block_over_all_rows(sparsity, masked):
    weight, hessian = oracle.row_problem(5, 20)
    mask = torch.rand(5, 20, generator=torch.Generator().manual_seed(2)).lt(0.6) if masked else None
    block = 8

    def choose(column: int, score: np.ndarray) -> np.ndarray | None:
        if column % block:
            return None
        score = score[:, :block].reshape(-1)
        order = sorted(range(score.size), key=lambda i: (score[i], -i))
        kept = np.ones(score.size, bool)
        kept[order[: math.floor(sparsity * score.size + 0.5)]] = False
        return kept.reshape(5, -1)

    wanted, kept = oracle.sweep_columns(weight, hessian, choose, damp=0.1, mask=mask)
    found, new, loss = sparsegpt(weight, hessian, f"unstructured:{sparsity}", damp=NONE + 0.1, mask=mask, block=block)
    assert np.array_equal(found.numpy(), kept)
    np.testing.assert_allclose(numpy(new), wanted, rtol=UPDATE_F64, atol=UPDATE_F64)
    assert loss.shape == (5, 3)
    if not masked:
        assert [int((~found[:, i : i + 8]).sum()) for i in (0, 8, 16)] == [
            math.floor(sparsity * size + 0.5) for size in (40, 40, 20)
        ]


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(("pattern", "groups"), [("2:4", 75), ("unstructured:0.5", 3), ("5:12", 25)])
def test_losses_add_up(pattern, groups, dtype):
    weight, hessian = oracle.row_problem(6, 300, dtype)
    sel = sweep_rows(weight, hessian, pattern, damp=0.1, method="sparsegpt", resolve=False)
    assert sel.saliency.shape == (6, groups) and sel.saliency.dtype == dtype and sel.columns is None
    loss = row_loss(sel.weight.double() - weight.double(), hessian.double(), damp=0.1)
    torch.testing.assert_close(sel.saliency.sum(1).double(), loss, rtol=SWEEP_IDENTITY[dtype], atol=0.0)
    solved = sweep_rows(weight, hessian, pattern, damp=0.1, method="sparsegpt")
    assert row_loss(solved.weight.double() - weight.double(), hessian.double(), damp=0.1).sum() < loss.sum()


def test_inputs_that_were_always_zero_get_weight_zero():
    weight, hessian = oracle.row_problem(4, 16)
    hessian[6] = hessian[:, 6] = 0.0
    for resolve in (False, True):
        sel = sweep_rows(weight, hessian, "2:4", method="sparsegpt", resolve=resolve)
        assert (sel.weight[:, 6] == 0).all() and (sel.weight[sel.mask] != 0).sum() >= 4 * 8 - 4
        change = (sel.weight - weight).index_fill(1, torch.tensor([6]), 0.0)
        if not resolve:  # the loss of an input that is always zero is zero
            torch.testing.assert_close(sel.saliency.sum(1), row_loss(change, hessian))


def test_equal_scores_keep_the_lower_index():
    sel = sweep_rows(torch.ones(2, 8), torch.eye(8), "2:4", method="sparsegpt")
    assert torch.equal(sel.mask, (torch.arange(8) % 4 < 2).expand(2, 8))
    flat = sweep_rows(torch.ones(2, 4), torch.eye(4), "unstructured:0.625", method="sparsegpt")
    assert flat.mask.tolist() == [[True, True, True, False], [False] * 4]


def test_the_exact_sweep_is_better_on_average():
    """What the peer is there to show: less loss at the same pattern, over many rows."""
    weight, hessian = oracle.row_problem(64, 128)
    losses = {
        method: float(sweep_rows(weight, hessian, "2:4", damp=0.1, method=method, resolve=False).saliency.sum())
        for method in ("combinatorial", "sparsegpt")
    }
    assert losses["combinatorial"] < losses["sparsegpt"]
