# SPDX-License-Identifier: Apache-2.0
"""The step of a layer under row or layer curvature: one sweep over its columns, then the kept weights of each row.

Clusters of rows with a Hessian each are swept one after the other; nothing of one depends on another.

A group that is settled late has fewer columns after it to make up for what it loses. Under ``sweep_order="diagonal"``
the groups with the largest curvature (sum of H_jj) go first; groups stay whole, so masks and panels are the pattern's.

Where errors of the outputs are known (the layers before are pruned already), the sweep starts from the weights that
undo them best, ``goal = w + D (H + damp I)^-1`` with ``D = mean of |dy|^2 e x^T``. About the goal the loss is the same
quadratic as without a target about the dense weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from obs_kernels import ops
from obs_kernels.errors import SingularBlockError
from obs_kernels.ops.sweep import resolve_rows
from obs_kernels.patterns import NMPattern, Pattern, VNMPattern
from obs_kernels.pruning.config import OBSConfig
from obs_kernels.pruning.fused_step import DAMP_GROWTH, MAX_RAISES, LayerStep
from obs_kernels.pruning.row_layer import RowLayer
from obs_kernels.reference.hessian import damp_hessian, row_loss
from obs_kernels.reference.resolve import best_rows


@dataclass(frozen=True)
class _Part:
    """What was found for the rows of a cluster, R of them."""

    mask: Tensor
    weight: Tensor
    loss: float
    damp: float
    raised: bool
    bias_change: Tensor | None
    """[R], where the bias moves."""


def prune_rows(layer: RowLayer, pattern: Pattern, cfg: OBSConfig) -> LayerStep:
    """Choice, new weights and bias of ``layer``, which stays as it is; of several clusters the largest damping is told.

    Raises:
        SingularBlockError: H is not positive definite, also after raised damping if ``cfg`` asks for it.
    """
    weight = layer.pad(layer.matrix.masked_fill(~layer.mask, 0.0))
    alive = layer.pad(layer.mask)
    scale = layer.row_scale()
    mask, new = torch.empty_like(alive), torch.empty_like(weight)
    moved = torch.zeros(weight.shape[0], dtype=torch.float64, device=weight.device)
    parts = []
    for cluster in range(layer.num_clusters):
        rows = layer.rows_of(cluster)
        part = _prune_cluster(layer, cluster, weight[rows], alive[rows], scale[rows], pattern, cfg)
        mask[rows], new[rows] = part.mask, part.weight
        if part.bias_change is not None:
            moved[rows] = part.bias_change.double()
        parts.append(part)
    moves = any(part.bias_change is not None for part in parts)
    bias = _moved_bias(layer, moved) if moves else None
    finite = torch.isfinite(new).all() & (torch.isfinite(bias).all() if bias is not None else True)
    loss, damp = sum(part.loss for part in parts), max(part.damp for part in parts)
    return LayerStep(mask, new, loss, damp, sum(part.raised for part in parts), bool(finite), bias)


def _prune_cluster(
    layer: RowLayer, cluster: int, weight: Tensor, alive: Tensor, scale: Tensor, pattern: Pattern, cfg: OBSConfig
) -> _Part:
    """``prune_rows`` of the rows of one cluster."""
    exact = cfg.curvature == "row"
    moments = layer.moments(cluster, free_bias=exact and cfg.refit_bias and layer.bias is not None)
    damp = layer.damp_of(moments, cfg, cluster)
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
    return _Part(mask, new, loss, damp, raised > 0, moments.bias_change(change))


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
