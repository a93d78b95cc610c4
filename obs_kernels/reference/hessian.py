# SPDX-License-Identifier: Apache-2.0
"""The Hessian that all rows of a layer share: accumulation, damping, factor, and the loss of a change.

For ``y = x W^T`` the curvature of a row over its C weights is ``E_t[dy_tr^2 x_t x_t^T]``. Row curvature replaces the R
matrices by one, ``H = 1/S sum_t |dy_t|^2 x_t x_t^T``, and keeps a number a row; with unit weights H is the layer
Hessian of SparseGPT (Frantar and Alistarh 2023), up to a factor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from obs_kernels.reference.fisher import add_damp, chunks, factor_spd
from obs_kernels.reference.precision import exact_products
from obs_kernels.row_checks import check_column_pivot

STRIP = 1024
"""Rows of H that one product computes, from the diagonal on: the part left of it is mirrored, not computed."""


def accumulate_hessian_(
    hessian: Tensor, x: Tensor, *, token_weight: Tensor | None, origin: Tensor | None = None, scale: float
) -> Tensor:
    """Add ``scale * sum_t q_t (x_t - c) (x_t - c)^T`` to ``hessian`` [C, C], in place.

    ``x`` [T, C], ``token_weight`` q [T] or None, ``origin`` c [C] or None. The upper triangle is read and computed, the
    lower one written from it: the result is exactly symmetric.
    """
    return _accumulate(hessian, None, x, token_weight, origin, scale)


def accumulate_inputs_(
    hessian: Tensor, input_sum: Tensor, x: Tensor, *, token_weight: Tensor | None, origin: Tensor | None
) -> Tensor:
    """``accumulate_hessian_`` by scale 1, and ``sum_t q_t (x_t - c, 1)`` into ``input_sum`` f64 from the same pass.

    ``input_sum`` is [C + 1], or longer: the last value is the sum of q, what is between is left as it is.
    """
    return _accumulate(hessian, input_sum, x, token_weight, origin, 1.0)


def weigh_tokens_(row_sum: Tensor, dy: Tensor, *, scale: float) -> Tensor:
    """[T] f32, ``sum_r (scale dy_tr)^2`` of ``dy`` [T, R]; the same summed over t is added to ``row_sum`` [R] f64."""
    squares = squared(dy, scale)
    row_sum += squares.sum(0, dtype=torch.float64)
    return squares.sum(1)


def squared(dy: Tensor, scale: float) -> Tensor:
    """f32 squares of ``scale * dy``; a new tensor, as layers whose outputs are added get one and the same dy."""
    return dy.float().square().mul_(scale * scale)


@exact_products()
def _accumulate(
    hessian: Tensor,
    input_sum: Tensor | None,
    x: Tensor,
    token_weight: Tensor | None,
    origin: Tensor | None,
    scale: float,
) -> Tensor:
    cols, dtype = hessian.shape[0], hessian.dtype
    if x.numel() == 0:
        return hessian
    strips = [slice(start, min(start + STRIP, cols)) for start in range(0, cols, STRIP)]
    for part in chunks(x.shape[0], 2 * cols * hessian.element_size(), x.device):
        tokens = from_origin(x[part], origin, dtype)
        weight = None if token_weight is None else token_weight[part].to(dtype)
        weighted = tokens if weight is None else tokens * weight[:, None]
        right = halves_of(tokens, x)
        left = right if weighted is tokens else halves_of(weighted, x)
        for strip in strips:
            part_of_row = hessian[strip, strip.start :]
            add_product_(part_of_row, [h[:, strip] for h in left], [h[:, strip.start :] for h in right], scale)
        if input_sum is not None:
            input_sum[:cols] += tokens.sum(0, dtype=torch.float64) if weight is None else weight @ tokens
            input_sum[-1] += tokens.shape[0] if weight is None else weight.sum(dtype=torch.float64)
    for strip in strips:
        square = hessian[strip, strip]
        square.copy_(square.triu() + square.triu(1).mT)
        hessian[strip.stop :, strip] = hessian[strip, strip.stop :].mT
    return hessian


def from_origin(x: Tensor, origin: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``x - origin`` in ``dtype``."""
    return x.to(dtype) if origin is None else x.to(dtype) - origin.to(dtype)


def halves_of(factor: Tensor, x: Tensor) -> list[Tensor]:
    """``factor`` [T, C] as what ``add_product_`` multiplies: itself, or two bf16 tensors that add up to 16 bits of it.

    In two where ``x``, which it was made of, is bf16 on a GPU: on its tensor cores three products of halves take a
    fraction of the time of one in f32.
    """
    if not (x.is_cuda and x.dtype == torch.bfloat16 and factor.dtype == torch.float32):
        return [factor]
    high = factor.to(x.dtype)
    return [high, (factor - high.to(factor.dtype)).to(x.dtype)]


TOKENS_AT_ONCE = 8192
"""Of a bf16 product: tensor cores cut off what a sum cannot hold, a bias that grows with the length of the sum."""


def add_product_(total: Tensor, left: list[Tensor], right: list[Tensor], scale: float = 1.0) -> None:
    """Add ``scale * left^T right`` to ``total`` [A, B]; [T, A] and [T, B] as ``halves_of`` gives them."""
    if len(left) == len(right) == 1:
        total.addmm_(left[0].mT, right[0], alpha=scale)
        return
    for i, a in enumerate(left):
        for b in right[: len(right) - i]:  # the product of both low halves is below what they hold
            for rows, others in zip(a.split(TOKENS_AT_ONCE), b.split(TOKENS_AT_ONCE), strict=True):
                total.add_(torch.mm(rows.mT, others, out_dtype=total.dtype), alpha=scale)


def damp_hessian(hessian: Tensor, damp: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of ``hessian`` [C, C] in ``dtype`` with ``damp`` [1] added to the diagonal."""
    return add_damp(hessian.to(dtype)[None], damp)[0]


def upper_factor(hessian: Tensor) -> Tensor:
    """R [C, C] upper triangular with ``H = R R^T``; ``SingularBlockError`` naming the column of the failing pivot.

    By the Cholesky factor of H with rows and columns in reverse. R^-1 is the upper factor U of H^-1 = U^T U that
    SparseGPT sweeps with; a sweep by R needs neither inverse.
    """
    factor, info = factor_spd(hessian.flip(0, 1)[None])
    check_column_pivot(info, hessian.shape[0])
    return factor[0].flip(0, 1)


@exact_products()
def row_loss(change: Tensor, hessian: Tensor, *, row_scale: Tensor | None = None, damp: float = 0.0) -> Tensor:
    """[R]: ``row_scale_r * 1/2 dw_r^T (H + damp I) dw_r`` of the rows of ``change`` [R, C], in the dtype of H."""
    dw = change.to(hessian.dtype)
    loss = 0.5 * ((dw @ hessian) * dw).sum(1) + 0.5 * damp * (dw * dw).sum(1)
    return loss if row_scale is None else loss * row_scale.to(loss.dtype)
