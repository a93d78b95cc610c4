# SPDX-License-Identifier: Apache-2.0
"""The step of a layer under row or layer curvature: one sweep over its columns, then the kept weights of each row.

A group that is settled late has fewer columns after it to make up for what it loses. Under ``sweep_order="diagonal"``
the groups with the largest curvature (sum of H_jj) go first; groups stay whole, so masks and panels are the pattern's.

Where errors of the outputs are known (the layers before are pruned already), the sweep starts from the weights that
undo them best, ``goal = w + D (H + damp I)^-1`` with ``D = mean of |dy|^2 e x^T``. About the goal the loss is the same
quadratic as without a target about the dense weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from obs_kernels import ops
from obs_kernels.errors import SingularBlockError
from obs_kernels.patterns import NMPattern, Pattern, VNMPattern
from obs_kernels.pruning.config import OBSConfig
from obs_kernels.pruning.fused_step import DAMP_GROWTH, MAX_RAISES, LayerStep
from obs_kernels.pruning.row_layer import RowLayer
from obs_kernels.reference.hessian import damp_hessian, row_loss
from obs_kernels.reference.resolve import best_rows, resolve_rows


def prune_rows(layer: RowLayer, pattern: Pattern, cfg: OBSConfig) -> LayerStep:
    """Choice, new weights and bias of ``layer``, which stays as it is.

    Raises:
        SingularBlockError: H is not positive definite, also after raised damping if ``cfg`` asks for it.
    """
    weight = layer.pad(layer.matrix.masked_fill(~layer.mask, 0.0))
    alive = layer.pad(layer.mask)
    exact = cfg.curvature == "row"
    moments = layer.moments(free_bias=exact and cfg.refit_bias and layer.bias is not None)
    scale = layer.row_scale()
    damp = layer.damp_of(moments, cfg)
    raises = MAX_RAISES if cfg.on_singular == "increase_damp" else 0
    for raised in range(raises + 1):
        try:
            goal = weight if moments.pull is None else _goal(weight, moments.hessian, moments.pull, damp, alive)
            mask, new = _sweep(goal, moments.hessian, scale if exact else None, pattern, damp, alive, cfg)
            break
        except SingularBlockError:
            if raised == raises:
                raise
            damp *= DAMP_GROWTH
    new = new.to(weight.dtype)
    change = new.float() - weight.float()
    lost = new.float() - goal.float()
    loss = float(row_loss(lost, moments.hessian, row_scale=scale, damp=damp).double().sum())
    moved = moments.bias_change(change)
    bias = None if moved is None else _moved_bias(layer, moved)
    finite = torch.isfinite(new).all() & (torch.isfinite(bias).all() if bias is not None else True)
    return LayerStep(mask, new, loss, damp, int(raised > 0), bool(finite), bias)


def _goal(weight: Tensor, hessian: Tensor, pull: Tensor, damp: float, alive: Tensor) -> Tensor:
    """[R, C], f32 for half precision: the best weights at the entries that are alive, without a pattern."""
    dense = weight.to(torch.promote_types(weight.dtype, torch.float32))
    damped = damp_hessian(hessian, torch.full((1,), damp, device=hessian.device), dense.dtype)
    goal = dense + best_rows(pull, damped)
    return goal if bool(alive.all()) else resolve_rows(goal, dense, damped, alive)


def _sweep(
    weight: Tensor,
    hessian: Tensor,
    scale: Tensor | None,
    pattern: Pattern,
    damp: float,
    alive: Tensor,
    cfg: OBSConfig,
) -> tuple[Tensor, Tensor]:
    """Mask and weights, the columns swept in the order of ``cfg`` and put back."""
    exact = cfg.curvature == "row"
    order = _sweep_order(hessian, pattern) if cfg.sweep_order == "diagonal" else None
    found = ops.sweep_rows(
        weight if order is None else weight[:, order],
        hessian if order is None else hessian[order][:, order],
        pattern,
        row_scale=scale,
        damp=damp,
        method="combinatorial" if exact else "sparsegpt",
        mask=alive if order is None else alive[:, order],
        num_columns=pattern.num_columns if isinstance(pattern, VNMPattern) else 4,
        resolve=exact,
    )
    assert found.weight is not None
    if order is None:
        return found.mask, found.weight
    back = order.argsort()
    return found.mask[:, back], found.weight[:, back]


def _moved_bias(layer: RowLayer, moved: Tensor) -> Tensor:
    """[R] of the bias's dtype, of the layer's own height."""
    assert layer.bias is not None
    bias = layer.bias.detach()
    return (bias.double() + moved[: bias.shape[0]]).to(bias.dtype)


def _sweep_order(hessian: Tensor, pattern: Pattern) -> Tensor:
    """[C]: columns, whole groups with the largest curvature first; ties to the lower index."""
    m = pattern.m if isinstance(pattern, NMPattern) else 1
    groups = hessian.diagonal().view(-1, m).sum(1).sort(descending=True, stable=True).indices
    return (groups[:, None] * m + torch.arange(m, device=groups.device)).flatten()
