# SPDX-License-Identifier: Apache-2.0
"""The step of a layer under row or layer curvature: one sweep over its columns, then the kept weights of each row."""

from __future__ import annotations

import torch

from obs_kernels import ops
from obs_kernels.errors import SingularBlockError
from obs_kernels.patterns import Pattern, VNMPattern
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
    raises = MAX_RAISES if cfg.on_singular == "increase_damp" else 0
    for raised in range(raises + 1):
        try:
            found = ops.sweep_rows(
                weight,
                hessian,
                pattern,
                row_scale=scale if exact else None,
                damp=damp,
                method="combinatorial" if exact else "sparsegpt",
                mask=alive,
                num_columns=pattern.num_columns if isinstance(pattern, VNMPattern) else 4,
                resolve=exact,
            )
            break
        except SingularBlockError:
            if raised == raises:
                raise
            damp *= DAMP_GROWTH
    assert found.weight is not None
    change = found.weight.float() - weight.float()
    loss = float(row_loss(change, hessian, row_scale=scale, damp=damp).double().sum())
    finite = bool(torch.isfinite(found.weight).all())
    return LayerStep(found.mask, found.weight, loss, damp, int(raised > 0), finite)
