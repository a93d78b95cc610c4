# SPDX-License-Identifier: Apache-2.0
"""Conjugate gradients on tensor cores, against f64: the loss, the residual that is promised, and how many steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from obs_kernels import ops, reference
from obs_kernels.ops import dispatch
from obs_kernels.ops.sweep import resolve_rows
from obs_kernels.reference.hessian import row_loss
from obs_kernels.reference.resolve import RESIDUAL
from obs_kernels.reference.resolve import resolve_rows as resolve_rows_by

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
EXCESS = 1e-6
"""Relative; loss above the optimum in f64. In f32 on a CPU 1e-8 at condition 1e5, 1e-11 below 1e4."""


@pytest.fixture
def gen() -> torch.Generator:
    return torch.Generator(device=DEVICE).manual_seed(20240)


def problem(gen: torch.Generator, rows: int, cols: int, damp: float = 0.01) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, damped Hessian of correlated inputs with some large columns, and a mask that keeps a quarter."""
    x = torch.randn(cols // 2 + 1, cols, generator=gen, device=DEVICE)
    x = x + 0.7 * torch.randn(cols // 2 + 1, 1, generator=gen, device=DEVICE)
    x[:, ::97] *= 30.0
    hessian = torch.zeros(cols, cols, device=DEVICE)
    ops.accumulate_hessian_(hessian, x, scale=1e-6 / cols)
    hessian.diagonal().add_(damp * float(hessian.diagonal().median()))
    weight = 0.05 * torch.randn(rows, cols, generator=gen, device=DEVICE)
    return weight, hessian, torch.rand(rows, cols, generator=gen, device=DEVICE) < 0.25


def counted(gradients: Callable[..., tuple[Tensor, int]], used: list[int]) -> Callable[..., tuple[Tensor, int]]:
    def call(*arguments: object) -> tuple[Tensor, int]:
        step, products = gradients(*arguments)
        used.append(products)
        return step, products

    return call


@pytest.mark.parametrize("damp", [1e-2, 1e-4])
@pytest.mark.parametrize(
    ("rows", "cols"), [(768, 768), (3072, 768), (768, 3072), (101, 1003), (64, 4104), (48, 8200), (1, 640)]
)
def test_the_loss_of_every_row(gen: torch.Generator, rows: int, cols: int, damp: float) -> None:
    """One block a row and several, sizes that fill none, sums in one part and in three."""
    weight, hessian, mask = problem(gen, rows, cols, damp)
    fast, plain = list[int](), list[int]()
    chosen = dispatch.inner_step("conjugate_gradients", DEVICE, torch.float32)
    assert chosen.__module__ == "obs_kernels.triton_kernels.resolve"
    new = resolve_rows_by(weight, weight * mask, hessian, mask, counted(chosen, fast))
    by_torch = resolve_rows_by(weight, weight * mask, hessian, mask, counted(reference.conjugate_gradients, plain))
    dense, exact = weight.double(), hessian.double()
    best = resolve_rows(dense, dense * mask, exact, mask)
    least = row_loss(best - dense, exact)
    found, other = (row_loss(x.double() - dense, exact) for x in (new, by_torch))
    assert (found <= least * (1 + EXCESS) + 1e-12 * row_loss(dense, exact)).all(), (found / least - 1).max()
    assert found.sum() <= other.sum() * (1 + EXCESS)
    assert not new[~mask].any()
    assert sum(fast) <= 2 * sum(plain) + 16, (fast, plain)
    residual = ((new.double() - dense) @ exact).masked_fill(~mask, 0.0).norm(dim=1)
    wanted = (dense @ exact).masked_fill(~mask, 0.0).norm(dim=1)
    if damp == 1e-2:  # else rounding of the weights alone moves it
        assert (residual <= 4 * RESIDUAL[torch.float32] * wanted).float().mean() > 0.99, (residual / wanted).max()


def test_rows_do_not_spread(gen: torch.Generator) -> None:
    """NaN, zeros and a row at its minimum among others: the bits of these are those without."""
    weight, hessian, mask = problem(gen, 256, 768)
    mask[7], weight[9] = False, 0.0
    start = weight * mask
    good = resolve_rows(weight, start, hessian, mask)
    start[5] = torch.nan
    new = resolve_rows(weight, start, hessian, mask)
    others = torch.arange(256, device=DEVICE) != 5
    loss, wanted = (row_loss(x[others] - weight[others], hessian) for x in (new, good))
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0.0)
    assert torch.isfinite(new[others]).all() and not new[7].any() and not new[9].any()


def test_the_sweep_takes_the_step(gen: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    from obs_kernels import triton_kernels

    used = list[int]()
    monkeypatch.setattr(triton_kernels, "conjugate_gradients", counted(triton_kernels.conjugate_gradients, used))
    weight, hessian, _ = problem(gen, 256, 768)
    first, second = (ops.sweep_rows(weight, hessian, "64:2:8", backend="cuda") for _ in range(2))
    assert len(used) >= 2 and torch.equal(first.weight, second.weight)  # type: ignore[arg-type]
    used.clear()
    ops.sweep_rows(weight, hessian, "64:2:8", backend="reference")
    assert not used
