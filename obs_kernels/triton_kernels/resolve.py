# SPDX-License-Identifier: Apache-2.0
"""Conjugate gradients over all rows at once: two launches an iteration, the product by H on tensor cores.

Everything but the product of the directions by H is local to a row, so one program does all of it for a row and leaves
the next direction in the form that the next product takes. The product is in bf16: a factor is the sum of a high and a
low half, which hold 16 bits of it, and three of the four products of halves count,

    d H = d_lo H_hi + d_hi H_lo + d_hi H_hi        one product of [lo | hi | hi] and [H_hi; H_lo; H_hi]

with the small ones first: what tensor cores cut off a sum is relative to the sum so far. A direction is by definition
what its halves add up to, so nothing of it is lost; H is, at 2^-17, and the product of the low halves. So the recursion
solves with a slightly different H, and its caller starts it anew from the true residual.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl
from torch import Tensor

from obs_kernels.launch_plan import LaunchPlan
from obs_kernels.triton_kernels.tuning import GradientsConfig, gradients_config

__all__ = ["GradientRows", "conjugate_gradients", "launch_gradients"]

CHECK_EVERY = 8
"""Iterations between two looks at the residuals, each of which waits for the GPU."""
REACH = 1e-6
"""Share of its first residual below which a row is not followed: what H lacks is more. Stopping earlier, at 1e-5 or
1e-4, took more products in all on Hessians of condition 1e4 to 1e8: the start after it has lost the directions."""
LEFT_TO_LEAVE = 0.5
"""Share of the rows still going at which the others leave: above it, the products that a row at rest has a part in cost
less than moving the rest."""
LONGEST_SUM = 8192
"""Columns up to which the sum of one product is not too long, as ``TOKENS_AT_ONCE`` of ``reference.hessian``."""


@triton.jit
def _image(product, mask, at, live):
    # [BLOCK]: entries of (d H)_K
    kept = tl.load(mask + at, mask=live, other=0) != 0
    return tl.where(kept, tl.load(product + at, mask=live, other=0.0), 0.0)


@triton.jit
def _direction(directions, at, C: tl.constexpr, live):
    # [BLOCK]: the sum of the halves, exact in f32
    low = tl.load(directions + at, mask=live, other=0.0).to(tl.float32)
    return low + tl.load(directions + C + at, mask=live, other=0.0).to(tl.float32)


@triton.jit
def _gradients_kernel(
    product,  # [r, C] f32: directions H, not read if FIRST
    mask,  # [r, C] uint8
    weights,  # [C] f32: 1 / H_jj
    x,  # [r, C] f32, updated; not touched if FIRST
    left,  # [r, C] f32: the residual, 0 outside of mask, updated
    directions,  # [r, 3 C] bf16: low, high, high, updated
    slope,  # [r] f32: left . (left weights), updated
    norm,  # [r] f32: |left|, updated
    stop,  # [r] f32: a row whose norm is not above it stays as it is; not read if FIRST
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    FIRST: tl.constexpr,  # finds direction, slope and norm of left
):
    # One iteration of one row after its product.
    row = tl.program_id(0).to(tl.int64)
    product += row * C
    mask += row * C
    x += row * C
    left += row * C
    directions += row * (3 * C)
    column = tl.arange(0, BLOCK)

    length = 0.0
    if not FIRST:
        if not (tl.load(norm + row) > tl.load(stop + row)):  # false for NaN too
            return
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, C, BLOCK):
            at = start + column
            total += _direction(directions, at, C, at < C) * _image(product, mask, at, at < C)
        curvature = tl.sum(total)
        before = tl.load(slope + row)
        length = tl.where(curvature > 0, before / curvature, 0.0)

    # Nothing is written before both sums are there, and an entry is written after its last reading, by one thread: a
    # barrier is not needed. The compiler sees that a row of one block is loaded once for all three passes.
    scaled_sum = tl.zeros([BLOCK], dtype=tl.float32)
    square_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, C, BLOCK):
        at = start + column
        residual = tl.load(left + at, mask=at < C, other=0.0)
        if not FIRST:
            residual -= length * _image(product, mask, at, at < C)
        scaled_sum += residual * (residual * tl.load(weights + at, mask=at < C, other=0.0))
        square_sum += residual * residual
    new_slope = tl.sum(scaled_sum)
    new_norm = tl.sqrt(tl.sum(square_sum))

    for start in range(0, C, BLOCK):
        at = start + column
        live = at < C
        residual = tl.load(left + at, mask=live, other=0.0)
        if not FIRST:
            residual -= length * _image(product, mask, at, live)
        direction = residual * tl.load(weights + at, mask=live, other=0.0)
        if not FIRST:
            old = _direction(directions, at, C, live)
            tl.store(x + at, tl.load(x + at, mask=live, other=0.0) + length * old, mask=live)
            tl.store(left + at, residual, mask=live)
            direction += tl.where(before > 0, new_slope / before, 0.0) * old
        high = direction.to(tl.bfloat16)
        tl.store(directions + at, (direction - high.to(tl.float32)).to(tl.bfloat16), mask=live)
        tl.store(directions + C + at, high, mask=live)
        tl.store(directions + 2 * C + at, high, mask=live)
    tl.store(slope + row, new_slope)
    tl.store(norm + row, new_norm)


@dataclass
class GradientRows:
    """The rows that an iteration works on, r of them."""

    mask: Tensor
    """[r, C] bool."""
    x: Tensor
    """[r, C] f32: the step so far."""
    left: Tensor
    """[r, C] f32: the residual that the recursion carries."""
    directions: Tensor
    """[r, 3 C] bf16."""
    slope: Tensor
    """[r] f32."""
    norm: Tensor
    """[r] f32: of ``left``."""
    stop: Tensor
    """[r] f32: the norm at which a row stands."""

    def those(self, index: Tensor) -> GradientRows:
        """The rows ``index`` of these."""
        return GradientRows(*(getattr(self, field.name)[index] for field in fields(self)))


def launch_gradients(
    rows: GradientRows, weights: Tensor, product: Tensor | None, config: GradientsConfig | None = None
) -> LaunchPlan:
    """One iteration of ``rows`` with ``product`` [r, C] f32 of their directions and H; None finds the first directions.

    Everything contiguous; ``weights`` [C] f32 is the preconditioner, ``config`` forces a record.
    """
    count, cols = rows.x.shape
    config = gradients_config(cols) if config is None else config
    with torch.cuda.device_of(rows.x):
        _gradients_kernel[(count,)](
            rows.x if product is None else product,
            rows.mask.view(torch.uint8),
            weights,
            rows.x,
            rows.left,
            rows.directions,
            rows.slope,
            rows.norm,
            rows.norm if product is None else rows.stop,
            C=cols,
            BLOCK=config.block,
            FIRST=product is None,
            num_warps=config.warps,
            enable_fp_fusion=True,  # a fused multiply-add rounds once less, and a default may change
        )
    path = "first" if product is None else "next"
    return LaunchPlan("conjugate_gradients", path, count, 32 * config.warps, str(config))


def conjugate_gradients(
    residual: Tensor, hessian: Tensor, mask: Tensor, target: Tensor, most: int
) -> tuple[Tensor, int]:
    """Step [r, C] with ``H_KK step_K = residual`` and products by H used, at most ``most``; all f32.

    ``residual`` [r, C] is 0 where ``mask`` [r, C] is False, and so is the step. Preconditioned by the diagonal; a row
    stands as its residual, by the recursion, reaches half of ``target`` [r], or ``REACH`` of the one it came with. The
    halves of H take ``6 C^2`` bytes.
    """
    step = x = torch.zeros_like(residual, memory_format=torch.contiguous_format)
    if not residual.numel():
        return step, 0
    count, cols = residual.shape
    halves = stacked_halves(hessian)
    weights = hessian.diagonal().reciprocal()
    left = residual.clone(memory_format=torch.contiguous_format)
    directions = torch.empty(count, 3 * cols, dtype=torch.bfloat16, device=x.device)
    slope, norm = torch.empty_like(target), torch.empty_like(target)
    rows = GradientRows(mask.contiguous(), x, left, directions, slope, norm, norm)
    launch_gradients(rows, weights, None)
    rows.stop = torch.maximum(0.5 * target, REACH * norm)
    places: Tensor | None = None  # of the rows in ``step``; None: all, and x is step itself
    used = 0
    while used < most:
        launch_gradients(rows, weights, product_of_halves(rows.directions, halves))
        used += 1
        if used % CHECK_EVERY == 0 and used < most:
            going = rows.norm > rows.stop
            left_over = int(going.sum())
            if not left_over:
                break
            if left_over <= LEFT_TO_LEAVE * going.numel():
                if places is not None:
                    step[places] = rows.x
                index = going.nonzero().flatten()
                places = index if places is None else places[index]
                rows = rows.those(index)
    if places is not None:
        step[places] = rows.x
    return step, used


def stacked_halves(hessian: Tensor) -> Tensor:
    """[3 C, C] bf16: high, low and high halves of ``hessian`` [C, C] f32."""
    cols = hessian.shape[0]
    halves = torch.empty(3 * cols, cols, dtype=torch.bfloat16, device=hessian.device)
    high, low, again = halves.split(cols)
    high.copy_(hessian)
    low.copy_(hessian - high)
    again.copy_(high)
    return halves


def product_of_halves(directions: Tensor, halves: Tensor) -> Tensor:
    """[r, C] f32: ``directions`` [r, 3 C] times ``halves`` [3 C, C]."""
    if halves.shape[1] <= LONGEST_SUM:
        return _product_in_f32(directions, halves)
    first, *more = zip(directions.split(LONGEST_SUM, 1), halves.split(LONGEST_SUM), strict=True)
    product = _product_in_f32(*first)
    for part, of_hessian in more:
        product.add_(_product_in_f32(part, of_hessian))
    return product


def _product_in_f32(left: Tensor, right: Tensor) -> Tensor:
    if not left.is_cuda:  # interpreted: only a GPU has bf16 products with a result in f32
        return left.float() @ right.float()
    return torch.mm(left, right, out_dtype=torch.float32)
