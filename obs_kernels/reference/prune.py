# SPDX-License-Identifier: Apache-2.0
"""The pruning step of groups that are their own Fisher block (D = m): exact choice and joint update, in plain torch.

The complement identity (see ``candidates``) gives both from one matrix: the best kept set maximises
``u_K^T (F_KK)^-1 u_K``, and ``(F_KK)^-1 u_K`` are its new weights. Nothing is raised for a bad block: one of many
should not cost the others their result, and whoever waits for a device can ask once, at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from obs_kernels.reference.search import choose_nm, choose_vnm
from obs_kernels.reference.update import update_kept


def prune_nm(
    weight: Tensor, fisher: Tensor, pattern: str, *, damp: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mask, new weight, saliency [R, C/m] and ``info`` [B] of the n:m choice; arguments as in ``ops.prune_nm``."""
    info = torch.zeros(fisher.shape[0], dtype=torch.int32, device=fisher.device)
    kept, saliency = choose_nm(weight, fisher, pattern, damp=damp, method="combinatorial", mask=mask, info=info)
    kept, new = _updated(weight, fisher, kept, damp, mask, info)
    return kept, new, saliency.masked_fill((info != 0).view(saliency.shape), torch.nan), info


def prune_vnm(
    weight: Tensor, fisher: Tensor, pattern: str, *, damp: Tensor, mask: Tensor | None, num_columns: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Mask, new weight, saliency [R/v, C/m], columns and ``info`` [B] of the joint v:n:m choice."""
    info = torch.zeros(fisher.shape[0], dtype=torch.int32, device=fisher.device)
    kept, saliency, columns = choose_vnm(
        weight, fisher, pattern, damp=damp, method="combinatorial", mask=mask, num_columns=num_columns, info=info
    )
    kept, new = _updated(weight, fisher, kept, damp, mask, info)
    panels, wide = saliency.shape
    bad = (info != 0).view(panels, -1, wide).any(1) if info.numel() else torch.zeros_like(saliency, dtype=torch.bool)
    return kept, new, saliency.masked_fill(bad, torch.nan), columns, info


def _updated(
    weight: Tensor, fisher: Tensor, kept: Tensor, damp: Tensor, mask: Tensor | None, info: Tensor
) -> tuple[Tensor, Tensor]:
    """Mask and new weight [R, C]; a block with ``info`` keeps nothing and its weight stays."""
    live = weight if mask is None else weight.masked_fill(~mask, 0.0)
    new = update_kept(live, fisher, kept, damp=damp, update="joint", info=info)
    bad = (info != 0)[:, None]
    m = fisher.shape[1]
    kept = kept.reshape(-1, m).masked_fill(bad, False).view(weight.shape)
    return kept, torch.where(bad, weight.reshape(-1, m), new.view(-1, m)).view(weight.shape)
