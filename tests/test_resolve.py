# SPDX-License-Identifier: Apache-2.0
"""Joint weights of whole rows for a given mask: against the constrained minimum, by both ways, and never worse."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from oracle import numpy
from tolerances import UPDATE_F64, UPDATE_RMS_F32
from torch import Tensor

from obs_kernels.reference import fisher as reference_fisher
from obs_kernels.reference import resolve
from obs_kernels.reference.hessian import row_loss
from obs_kernels.reference.resolve import resolve_rows

F32, F64 = torch.float32, torch.float64


@pytest.fixture(params=["cholesky", "gradients"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(resolve, "MAX_CHOLESKY_WIDTH", 1024 if request.param == "cholesky" else -1)
    return request.param


def problem(rows: int, cols: int, dtype: torch.dtype = F64, floor: float = 0.1) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, Hessian and a mask whose rows keep from nothing to everything."""
    gen = torch.Generator().manual_seed(5)
    weight = torch.randn(rows, cols, generator=gen, dtype=F64).to(dtype)
    hessian = oracle.random_spd(gen, 1, cols, floor=floor)[0]
    share = torch.linspace(0, 1, rows)[:, None]
    return weight, hessian.to(dtype), torch.rand(rows, cols, generator=gen) < share


def wanted_rows(weight: Tensor, hessian: Tensor, mask: Tensor) -> np.ndarray:
    return np.stack(
        [oracle.constrained_minimiser(numpy(hessian), w, k) for w, k in zip(numpy(weight), mask.numpy(), strict=True)]
    )


def test_the_minimum_of_every_row(way):
    weight, hessian, mask = problem(9, 40)
    for start in (weight * mask, torch.zeros_like(weight)):
        new = resolve_rows(weight, start, hessian, mask)
        np.testing.assert_allclose(numpy(new), wanted_rows(weight, hessian, mask), rtol=UPDATE_F64, atol=UPDATE_F64)
        assert (new[~mask] == 0).all()


def test_f32_against_f64(way):
    weight, hessian, mask = problem(16, 200, F32)
    new = resolve_rows(weight, weight * mask, hessian, mask)
    wanted = wanted_rows(weight, hessian, mask)
    assert new.dtype == F32
    assert np.sqrt(np.mean((numpy(new) - wanted) ** 2) / np.mean(wanted**2)) < UPDATE_RMS_F32


@pytest.mark.parametrize("dtype", [F32, F64])
def test_the_residual_that_is_promised(dtype, monkeypatch):
    monkeypatch.setattr(resolve, "MAX_CHOLESKY_WIDTH", -1)
    weight, hessian, mask = problem(16, 200, dtype)
    new = resolve_rows(weight, weight * mask, hessian, mask)
    product = ((new.double() - weight.double()) @ hessian.double()).masked_fill(~mask, 0.0)
    start = (weight.double() @ hessian.double()).masked_fill(~mask, 0.0)
    # twice: the residual is computed in f32, and rounded weights move the true one
    assert (product.norm(dim=1) <= 2 * resolve.RESIDUAL[dtype] * start.norm(dim=1)).all()


@pytest.mark.parametrize("products", [1, 2, 5, 300])
@pytest.mark.parametrize("floor", [1e-1, 1e-6])
def test_the_loss_of_no_row_rises(products, floor, monkeypatch):
    """Also when iterations end early, and where f32 cannot solve: condition 1e8."""
    monkeypatch.setattr(resolve, "MOST_PRODUCTS", products)
    weight, hessian, mask = problem(16, 120, F32, floor=floor)
    for width in (-1, 1024):
        monkeypatch.setattr(resolve, "MAX_CHOLESKY_WIDTH", width)
        best = torch.from_numpy(wanted_rows(weight, hessian, mask)).float()
        for start in (weight * mask, best):
            new = resolve_rows(weight, start, hessian, mask)
            before, after = (row_loss(x - weight, hessian) for x in (start, new))
            assert (after <= before * (1 + 1e-5) + 1e-7).all()
            assert torch.isfinite(new).all() and (new[~mask] == 0).all()


@pytest.mark.parametrize("wrong", [float("nan"), 1e3])
def test_a_row_that_does_not_gain_keeps_its_weights(way, wrong, monkeypatch):
    name = "_step_by_cholesky" if way == "cholesky" else "_step_by_gradients"
    right = getattr(resolve, name)

    def spoiled(*arguments: Tensor) -> Tensor:
        step = right(*arguments)
        step[3] = wrong
        return step

    weight, hessian, mask = problem(9, 40)
    good = resolve_rows(weight, weight * mask, hessian, mask)
    monkeypatch.setattr(resolve, name, spoiled)
    new = resolve_rows(weight, weight * mask, hessian, mask)
    others = torch.arange(9) != 3
    assert torch.equal(new[3], (weight * mask)[3]) and torch.equal(new[others], good[others])


def test_rows_that_are_done_leave_the_iteration(monkeypatch):
    """One row at its minimum, one that needs work: the products shrink to what is left."""
    monkeypatch.setattr(resolve, "MAX_CHOLESKY_WIDTH", -1)
    weight, hessian, _ = problem(2, 100, floor=1e-3)
    mask = torch.rand(2, 100, generator=torch.Generator().manual_seed(1)) < 0.5
    start = weight * mask
    start[0] = torch.from_numpy(wanted_rows(weight, hessian, mask)[0])
    seen = []

    def spy(residual: Tensor, *rest: object) -> tuple[Tensor, int]:
        seen.append(residual.shape[0])
        return resolve.conjugate_gradients(residual, *rest)

    new = resolve_rows(weight, start, hessian, mask, spy)
    assert seen and seen[-1] == 1
    # in terms of the loss: condition 1e5 leaves digits of the weights open
    best = row_loss(torch.from_numpy(wanted_rows(weight, hessian, mask)) - weight, hessian)
    torch.testing.assert_close(row_loss(new - weight, hessian), best, rtol=1e-9, atol=0.0)


def test_chunks_of_rows_change_nothing(monkeypatch):
    weight, hessian, mask = problem(9, 40)
    whole = resolve_rows(weight, weight * mask, hessian, mask)
    monkeypatch.setattr(reference_fisher, "CHUNK_BYTES", 1)
    torch.testing.assert_close(
        resolve_rows(weight, weight * mask, hessian, mask), whole, rtol=UPDATE_F64, atol=UPDATE_F64
    )


def test_nothing_to_do(way):
    weight, hessian, _ = problem(3, 8)
    everything = torch.ones(3, 8, dtype=torch.bool)
    assert torch.equal(resolve_rows(weight, weight, hessian, everything), weight)
    zero = torch.zeros_like(weight)
    assert torch.equal(resolve_rows(weight, zero, hessian, ~everything), zero)
    assert torch.equal(resolve_rows(zero, zero, hessian, everything), zero)
    assert resolve_rows(weight[:0], weight[:0], hessian, everything[:0]).shape == (0, 8)
