# SPDX-License-Identifier: Apache-2.0
"""Conjugate gradients of Triton without a GPU: interpreted, where torch makes the products, and compiled."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from cubins import assert_no_spills
from interpreted import Case, interpret
from oracle import numpy
from torch import Tensor

from obs_kernels import reference
from obs_kernels.ops import dispatch
from obs_kernels.reference.hessian import row_loss
from obs_kernels.reference.resolve import RESIDUAL

triton = pytest.importorskip("triton")

from obs_kernels.triton_kernels import resolve as kernels  # noqa: E402  needs triton
from obs_kernels.triton_kernels.resolve import GradientRows  # noqa: E402
from obs_kernels.triton_kernels.tuning import gradients_config  # noqa: E402

F64 = torch.float64
HALVES = 2.0**-14
"""Relative; two bf16 halves hold 2^-16 of a number where they are cut off, as by the interpreter; sums lose some."""


def halves(values: Tensor) -> Tensor:
    """[r, 3 C] bf16: low, high and high halves of ``values`` [r, C]."""
    high = values.bfloat16()
    return torch.cat([(values - high.float()).bfloat16(), high, high], dim=1)


def direction_of(directions: Tensor) -> Tensor:
    """[r, C] f64, and that both copies of the high half are one."""
    low, high, again = directions.chunk(3, dim=1)
    assert torch.equal(high.view(torch.int16), again.view(torch.int16))
    return low.double() + high.double()


# One iteration, interpreted


def rows_under_way(gen: torch.Generator, rows: int, cols: int) -> tuple[Tensor, Tensor, GradientRows]:
    """Weights, a product and rows in the middle of a recursion, whose slope is that of their residual."""
    mask = torch.rand(rows, cols, generator=gen) < 0.6
    weights = torch.rand(cols, generator=gen) + 0.5
    x, left, direction, product = (torch.randn(rows, cols, generator=gen) for _ in range(4))
    left, direction = left.masked_fill(~mask, 0.0), direction.masked_fill(~mask, 0.0)
    product = product + 2 * direction  # positive curvature
    slope = (left * left * weights).sum(1)
    state = GradientRows(mask, x, left, halves(direction), slope, left.norm(dim=1), torch.full((rows,), 1e-3))
    return weights, product, state


def launch(cases: list[tuple[Tensor, Tensor, GradientRows, dict[str, Any]]], folder: Path) -> list[GradientRows]:
    given: list[Case] = [
        ("launch_gradients", (weights, product, *(getattr(state, f.name).clone() for f in fields(state))), options)
        for weights, product, state, options in cases
    ]
    return [GradientRows(*result) for result in interpret(given, folder)]


def assert_is_next(found: GradientRows, weights: Tensor, product: Tensor, state: GradientRows) -> None:
    """The formulas of the recursion in f64."""
    old, image = direction_of(state.directions), product.double().masked_fill(~state.mask, 0.0)
    curvature = (old * image).sum(1)
    length = torch.where(curvature > 0, state.slope.double() / curvature, 0.0)[:, None]
    left = state.left.double() - length * image
    slope = (left * left * weights.double()).sum(1)
    torch.testing.assert_close(found.x.double(), state.x.double() + length * old, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.left.double(), left, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.slope.double(), slope, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(found.norm.double(), left.norm(dim=1), rtol=1e-5, atol=0.0)
    wanted = left * weights + torch.where(state.slope > 0, slope / state.slope, 0.0)[:, None] * old
    torch.testing.assert_close(direction_of(found.directions), wanted, rtol=HALVES, atol=1e-5)
    assert not found.left[~state.mask].any() and not direction_of(found.directions)[~state.mask].any()


@pytest.mark.parametrize("block", [None, 128])
@pytest.mark.parametrize("cols", [1, 128, 300])
def test_one_iteration(gen: torch.Generator, tmp_path: Path, cols: int, block: int | None) -> None:
    """A row in one block and in three, blocks that the columns do not fill."""
    weights, product, state = rows_under_way(gen, 5, cols)
    first, following = ({"block": block, "first": first} for first in (True, False))
    begun, found = launch([(weights, product, state, first), (weights, product, state, following)], tmp_path)
    assert_is_next(found, weights, product, state)
    for same in ("mask", "x", "left", "stop"):
        assert torch.equal(getattr(begun, same), getattr(state, same))
    scaled = state.left.double() * weights
    torch.testing.assert_close(direction_of(begun.directions), scaled, rtol=HALVES, atol=0.0)
    torch.testing.assert_close(begun.slope.double(), (scaled * state.left).sum(1), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(begun.norm.double(), state.left.double().norm(dim=1), rtol=1e-5, atol=0.0)


def test_rows_at_rest_keep_every_bit(gen: torch.Generator, tmp_path: Path) -> None:
    """At their target, past it, zero, NaN: untouched, and the rows between them go on."""
    weights, product, state = rows_under_way(gen, 7, 40)
    state.stop[0] = state.norm[0]
    state.norm[2] = 1e-9
    state.left[4], state.directions[4], state.slope[4], state.norm[4], state.stop[4] = 0.0, 0.0, 0.0, 0.0, 0.0
    state.norm[6] = torch.nan
    (found,) = launch([(weights, product, state, {"block": None, "first": False})], tmp_path)
    resting, going = torch.tensor([0, 2, 4, 6]), torch.tensor([1, 3, 5])
    for field in fields(state):
        before, after = getattr(state, field.name)[resting], getattr(found, field.name)[resting]
        assert torch.equal(before.view(torch.uint8), after.view(torch.uint8)), field.name
    assert_is_next(found.those(going), weights, product[going], state.those(going))


def test_no_curvature_and_nan_stay_in_their_rows(gen: torch.Generator, tmp_path: Path) -> None:
    weights, product, state = rows_under_way(gen, 4, 40)
    product[1] *= -1.0
    product[2] = torch.nan
    (found,) = launch([(weights, product, state, {"block": None, "first": False})], tmp_path)
    assert torch.equal(found.x[1], state.x[1]) and torch.equal(found.left[1], state.left[1])
    assert not found.norm[2] > 0  # so it rests from now on
    others = torch.tensor([0, 1, 3])
    assert_is_next(found.those(others), weights, product[others], state.those(others))


# Whole solutions, interpreted


def problem(rows: int, cols: int, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(5)
    weight = torch.randn(rows, cols, generator=gen)
    hessian = oracle.random_spd(gen, 1, cols, floor=floor)[0].float()
    return weight, hessian, torch.rand(rows, cols, generator=gen) < torch.linspace(0, 1, rows)[:, None]


@pytest.mark.parametrize(("floor", "excess"), [(1e-1, 1e-9), (1e-3, 1e-6)])
def test_the_minimum_of_every_row(tmp_path: Path, floor: float, excess: float) -> None:
    """Rows that keep nothing, all, and what is between; and a row that is at its minimum from the start."""
    weight, hessian, mask = problem(6, 40, floor)
    best = torch.from_numpy(
        np.stack(
            [
                oracle.constrained_minimiser(numpy(hessian), *row)
                for row in zip(numpy(weight), mask.numpy(), strict=True)
            ]
        )
    )
    start = weight * mask
    start[2] = best[2]
    (new,) = interpret([("resolve_rows", (weight, start, hessian, mask), {})], tmp_path)
    exact, dense = hessian.double(), weight.double()
    assert new.dtype == torch.float32 and not new[~mask].any()
    # condition 40 / floor: of the weights digits are open that the loss does not see
    found, least = row_loss(new - dense, exact), row_loss(best - dense, exact)
    scale = row_loss(dense, exact)
    assert (found <= least + excess * scale).all()
    residual = ((new - dense) @ exact).masked_fill(~mask, 0.0).norm(dim=1)
    wanted = (dense @ exact).masked_fill(~mask, 0.0).norm(dim=1)
    assert (residual <= 2 * RESIDUAL[torch.float32] * wanted).all()  # twice, as in test_resolve


def test_steps_against_the_reference_and_rows_that_leave(gen: torch.Generator, tmp_path: Path) -> None:
    """Some rows are done long before others, so that the others go on without them; NaN harms its own row only."""
    _, hessian, _ = problem(1, 40, 1e-1)
    mask = torch.rand(7, 40, generator=gen) < 0.5
    residual = torch.randn(7, 40, generator=gen).masked_fill(~mask, 0.0)
    residual[5] = 0.0
    target = residual.norm(dim=1) * torch.tensor([0.9, 1e-4, 0.9, 0.9, 0.9, 0.0, 1e-4])
    spoiled = residual.clone()
    spoiled[3] = torch.nan
    cases: list[Case] = [
        ("conjugate_gradients", (given, hessian, mask, target), {"most": most})
        for given, most in ((residual, 300), (residual, 3), (spoiled, 300))
    ]
    (step, used), (short, few), (other, _) = interpret(cases, tmp_path)
    wanted, products = reference.conjugate_gradients(residual, hessian, mask, target, 300)
    # in 20 dimensions it is rounding that makes the number of products: 24 would do in f64
    assert used % kernels.CHECK_EVERY == 0 and kernels.CHECK_EVERY < used <= 2 * products
    for part in (step, wanted):
        left = (residual - part.double() @ hessian.double()).masked_fill(~mask, 0.0)
        assert (left.norm(dim=1) <= 2 * target).all()  # half of it by the recursion
    assert few == 3 and not step[~mask].any() and not step[5].any() and not short[5].any()
    early = reference.conjugate_gradients(residual.double(), hessian.double(), mask, target.double(), 3)[0][[1, 6]]
    torch.testing.assert_close(short[[1, 6]].double(), early, rtol=1e-3, atol=1e-3)
    good = torch.arange(7) != 3
    assert torch.equal(other[good], step[good])


def test_nothing_to_do() -> None:
    empty = torch.zeros(0, 8)
    step, used = kernels.conjugate_gradients(empty, torch.eye(8), empty.bool(), empty[:, 0], 300)
    assert step.shape == (0, 8) and used == 0


# The product


@pytest.mark.parametrize("longest", [8192, 16])
def test_product_of_halves(gen: torch.Generator, monkeypatch: pytest.MonkeyPatch, longest: int) -> None:
    """To 2^-16 of the sum of the products' sizes, in one part and in several; zeros stay zeros."""
    monkeypatch.setattr(kernels, "LONGEST_SUM", longest)
    _, hessian, _ = problem(1, 40, 1e-2)
    directions = torch.randn(5, 40, generator=gen) * 10.0 ** torch.arange(-12, 13, 6)[:, None]
    directions[3] = 0.0
    product = kernels.product_of_halves(halves(directions), kernels.stacked_halves(hessian))
    wanted, sizes = directions.double() @ hessian.double(), directions.abs().double() @ hessian.abs().double()
    assert ((product - wanted).abs() <= 2.0**-16 * sizes).all() and not product[3].any()


# Compiled


@pytest.mark.parametrize("target", [80, 90, 100])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("cols", [100, 768, 3072, 14336])
def test_compiles_without_spills(cols: int, first: bool, target: int, tmp_path: Path) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    record = gradients_config(cols)
    constants = {"C": cols, "BLOCK": record.block, "FIRST": first}
    names = ("product", "mask", "weights", "x", "left", "directions", "slope", "norm", "stop")
    signature = {**dict.fromkeys(names, "*fp32"), "mask": "*u8", "directions": "*bf16"}
    source = ASTSource(
        kernels._gradients_kernel,
        {**signature, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={(index,): [["tt.divisibility", 16]] for index in range(len(names))},
    )
    options = {"num_warps": record.warps, "enable_fp_fusion": True}
    kernel = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    if cols % 4 == 0:
        assert "ld.global.v4.b32" in kernel.asm["ptx"], "no wide loads"
    assert_no_spills(kernel, tmp_path)


# Dispatch


def test_dispatch_of_the_step(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("OBS_KERNELS_BACKEND", raising=False)
    dispatch._log_step_once.cache_clear()

    def chosen(device_type: str, dtype: torch.dtype = torch.float32) -> str:
        return dispatch.inner_step("conjugate_gradients", device_type, dtype).__module__.split(".")[1]

    with caplog.at_level("INFO", logger="obs_kernels"):
        assert chosen("cuda") == chosen("cuda") == "triton_kernels"
        assert chosen("cuda", torch.float64) == chosen("cpu") == "reference"
        monkeypatch.setattr(dispatch, "_has_c_compiler", lambda: False)
        assert chosen("cuda") == "reference"
        monkeypatch.setenv("OBS_KERNELS_BACKEND", "reference")
        assert chosen("cuda") == "reference"
    assert len(caplog.messages) == 5 and "conjugate_gradients on cuda runs on the triton backend" in caplog.messages
    assert any("C compiler" in text for text in caplog.messages)


def test_the_swept_rows_of_a_kernel_get_the_step() -> None:
    around = dispatch.kernel("sweep_rows", "cuda").__closure__[0].cell_contents
    assert around.func is reference.sweep_rows_by
    assert around.keywords["gradients"] is kernels.conjugate_gradients
