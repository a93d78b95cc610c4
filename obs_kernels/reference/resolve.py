# SPDX-License-Identifier: Apache-2.0
"""The best weights of whole rows for a given mask: ``w_K = H_KK^-1 (H w0)_K``, H shared by all rows.

A sweep settles columns from left to right, so the weights that it leaves are not the joint optimum of their row. Solved
for the step from the swept weights, ``H_KK step = -(H dw)_K`` with dw their change so far: the step is small where the
sweep was good, and rounding is relative to it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from obs_kernels.reference.blocks import solve_kept
from obs_kernels.reference.fisher import chunks, factor_spd
from obs_kernels.reference.precision import exact_products
from obs_kernels.row_checks import check_column_pivot

MAX_CHOLESKY_WIDTH = 128
"""Kept entries of a row up to which each row is factorised. Some 25 products by H, shared by all rows, do for wider
ones: of 4096 x 4096 weights at 64:2:8 (1,024 kept) the factors alone took 0.4 s on an H100, of 1,024 rows at 2:4 on a
CPU 3 s instead of 0.4 s."""
RESIDUAL = {torch.float32: 1e-6, torch.float64: 1e-12}
"""Norm of the true residual ``(H dw)_K`` over that of ``(H w0)_K`` at which conjugate gradients stop."""
MOST_PRODUCTS = 300
"""Products by H after which conjugate gradients stop anyway."""
CHECK_EVERY = 8
"""Iterations between two looks at the residuals, each of which waits for a GPU."""

Gradients = Callable[[Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, int]]
"""``conjugate_gradients``, of this or of another backend."""


def conjugate_gradients(
    residual: Tensor, hessian: Tensor, mask: Tensor, target: Tensor, most: int
) -> tuple[Tensor, int]:
    """Step [r, C] with ``H_KK step_K = residual`` and products by H used, at most ``most``.

    ``residual`` [r, C] is 0 where ``mask`` [r, C] is False, and so is the step. Preconditioned by the diagonal; rows
    leave as their residual, by the recursion, reaches half of ``target`` [r].
    """
    step = torch.zeros_like(residual)
    rows = torch.arange(residual.shape[0], device=residual.device)
    weights = hessian.diagonal().reciprocal()
    x, left = torch.zeros_like(residual), residual.clone()
    direction = left * weights
    slope = (left * direction).sum(1)
    for iteration in range(most):
        if iteration % CHECK_EVERY == 0:
            going = norm_of_rows(left) > 0.5 * target
            if not bool(going.all()):
                step[rows] = x
                rows, x, left, direction, slope = (t[going] for t in (rows, x, left, direction, slope))
                mask, target = mask[going], target[going]
                if not rows.numel():
                    return step, iteration
        image = (direction @ hessian).masked_fill_(~mask, 0.0)
        curvature = (direction * image).sum(1)
        length = torch.where(curvature > 0, slope / curvature, 0.0)[:, None]
        x += length * direction
        left -= length * image
        scaled = left * weights
        before, slope = slope, (left * scaled).sum(1)
        direction = scaled + torch.where(before > 0, slope / before, 0.0)[:, None] * direction
    step[rows] = x
    return step, most


@exact_products()
def resolve_rows(
    weight: Tensor, swept: Tensor, hessian: Tensor, mask: Tensor, gradients: Gradients = conjugate_gradients
) -> Tensor:
    """[R, C]: the weights at the entries of ``mask`` that minimise ``1/2 dw^T H dw`` against ``weight``, 0 elsewhere.

    All of one dtype; ``hessian`` is damped, ``swept`` [R, C] is the start and 0 where ``mask`` is False. By Cholesky
    where no row keeps more than ``MAX_CHOLESKY_WIDTH`` entries, else by conjugate ``gradients``, whose residual is
    ``RESIDUAL`` unless ``MOST_PRODUCTS`` or rounding end them before. Either way the loss of a row, as computed, is
    never above that of ``swept``: a row that does not gain keeps its swept weights.
    """
    if weight.numel() == 0:
        return swept
    change = swept - weight
    gradient = change @ hessian
    if int(mask.sum(1).max()) <= MAX_CHOLESKY_WIDTH:
        step = _step_by_cholesky(gradient, hessian, mask)
    else:
        target = RESIDUAL[weight.dtype] * norm_of_rows((weight @ hessian).masked_fill(~mask, 0.0))
        step = _step_by_gradients(gradient, hessian, mask, target, gradients)
    moved = change + step
    better = ((moved @ hessian) * moved).sum(1) <= (gradient * change).sum(1)  # False for NaN
    return torch.where(better[:, None], swept + step, swept)


def best_rows(pull: Tensor, hessian: Tensor) -> Tensor:
    """[R, C]: ``pull H^-1``, the change of whole rows that minimises ``1/2 dw^T H dw - pull^T dw``; ``hessian`` damped.

    Solved in f64: the change is the small difference that a layer makes up for, and H may be near singular.

    Raises:
        SingularBlockError: H is not positive definite; names the column of the failing pivot.
    """
    factor, info = factor_spd(hessian.double().flip(0, 1)[None])  # from the last column, as the sweep's own
    check_column_pivot(info, hessian.shape[0])
    return torch.cholesky_solve(pull.double().flip(1).mT, factor[0]).mT.flip(1).to(hessian.dtype)


def _step_by_cholesky(gradient: Tensor, hessian: Tensor, mask: Tensor) -> Tensor:
    """``-H_KK^-1 gradient_K`` of each row; 0 for a row whose H_KK is not positive definite to this precision."""
    step = torch.zeros_like(gradient)
    counts = mask.sum(1)
    width = max(1, int(counts.max()))
    for part in chunks(mask.shape[0], 3 * width * width * step.element_size(), step.device):
        most = max(1, int(counts[part].max()))
        index = mask[part].sort(dim=1, descending=True, stable=True).indices[:, :most]
        valid = mask[part].gather(1, index)
        solved, info = solve_kept(hessian[index[:, :, None], index[:, None, :]], gradient[part].gather(1, index), valid)
        step[part] = torch.zeros_like(step[part]).scatter(1, index, -solved.masked_fill((info != 0)[:, None], 0.0))
    return step


def _step_by_gradients(gradient: Tensor, hessian: Tensor, mask: Tensor, target: Tensor, gradients: Gradients) -> Tensor:
    """The same by conjugate gradients over all rows at once, down to a residual of ``target`` [R].

    The residual that the recursion carries drifts from the true one in f32, and by what the products of a backend lack
    to f32. So it is computed anew when the recursion is done, and rows that are not there yet start again from where
    they are, while that halves their residual.
    """
    step = torch.zeros_like(gradient)
    residual = gradient.neg().masked_fill_(~mask, 0.0)
    norm = norm_of_rows(residual)
    rows = (norm > target).nonzero().flatten()
    residual = residual[rows]
    products = 0
    while rows.numel() and products < MOST_PRODUCTS:
        found, used = gradients(residual, hessian, mask[rows], target[rows], MOST_PRODUCTS - products)
        step[rows] += found
        products += used + 1
        residual = (gradient[rows] + step[rows] @ hessian).neg_().masked_fill_(~mask[rows], 0.0)
        before, now = norm[rows], norm_of_rows(residual)
        norm[rows] = now
        going = (now > target[rows]) & (now <= 0.5 * before)
        rows, residual = rows[going], residual[going]
    return step


def norm_of_rows(rows: Tensor) -> Tensor:
    """[r]: the length of each of ``rows`` [r, C]."""
    return torch.linalg.vector_norm(rows, dim=1)
