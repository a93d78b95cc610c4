# SPDX-License-Identifier: Apache-2.0
"""The step of a layer under row or layer curvature: one sweep over its columns, then the kept weights of each row.

A group that is settled late has fewer columns after it to make up for what it loses. Under ``sweep_order="diagonal"``
the groups with the largest curvature (sum of H_jj) go first; groups stay whole, so masks and panels are the pattern's.
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
from obs_kernels.reference.hessian import row_loss


def prune_rows(layer: RowLayer, pattern: Pattern, cfg: OBSConfig) -> LayerStep:
    """Choice and new weights of ``layer``, which stays as it is.

    Raises:
        SingularBlockError: H is not positive definite, also after raised damping if ``cfg`` asks for it.
    """
    weight = layer.pad(layer.matrix.masked_fill(~layer.mask, 0.0))
    alive = layer.pad(layer.mask)
    hessian = layer.mean_fisher()[0]
    scale = layer.row_scale()
    damp = float(layer.live_damp(cfg))
    exact = cfg.curvature == "row"
    order = _sweep_order(hessian, pattern) if cfg.sweep_order == "diagonal" else None
    raises = MAX_RAISES if cfg.on_singular == "increase_damp" else 0
    for raised in range(raises + 1):
        try:
            found = ops.sweep_rows(
                weight if order is None else weight[:, order],
                hessian if order is None else hessian[order][:, order],
                pattern,
                row_scale=scale if exact else None,
                damp=damp,
                method="combinatorial" if exact else "sparsegpt",
                mask=alive if order is None else alive[:, order],
                num_columns=pattern.num_columns if isinstance(pattern, VNMPattern) else 4,
                resolve=exact,
            )
            break
        except SingularBlockError:
            if raised == raises:
                raise
            damp *= DAMP_GROWTH
    assert found.weight is not None
    mask, new = found.mask, found.weight
    if order is not None:
        back = order.argsort()
        mask, new = mask[:, back], new[:, back]
    change = new.float() - weight.float()
    loss = float(row_loss(change, hessian, row_scale=scale, damp=damp).double().sum())
    return LayerStep(mask, new, loss, damp, int(raised > 0), bool(torch.isfinite(new).all()))


def _sweep_order(hessian: Tensor, pattern: Pattern) -> Tensor:
    """[C]: columns, whole groups with the largest curvature first; ties to the lower index."""
    m = pattern.m if isinstance(pattern, NMPattern) else 1
    groups = hessian.diagonal().view(-1, m).sum(1).sort(descending=True, stable=True).indices
    return (groups[:, None] * m + torch.arange(m, device=groups.device)).flatten()
