# SPDX-License-Identifier: Apache-2.0
"""What our kernels are measured against: torch's own calls, and sparseml's recursion written from its definition."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Solve = Callable[[Tensor, Tensor], Tensor]
"""(matrices [B, k, k], right sides [B, k]) to solutions [B, k]."""


def baddbmm_fisher_(fisher: Tensor, grads: Tensor, *, scale: float) -> Tensor:
    """``fisher`` [B, D, D] += scale * sum_s g_s g_s^T by one ``baddbmm_``; ``grads`` is [S, B * D]."""
    g = grads.unflatten(1, fisher.shape[:2]).to(fisher.dtype).transpose(0, 1)  # [B, S, D]
    return fisher.baddbmm_(g.mT, g, alpha=scale)


def sherman_morrison_(finv: Tensor, grad: Tensor, *, samples: int) -> Tensor:
    """One gradient ``grad`` [B * D] into ``finv`` [B, D, D], which becomes the inverse of F + g g^T / samples.

    The recursion of sparseml and of oBERT's block Fisher, for every block::

        v = finv g;  finv -= v v^T / (samples + g^T v)

    It reads ``finv`` twice and writes it once for every gradient; what it needs no more at the end is an inverse.
    """
    g = grad.to(finv.dtype).view(finv.shape[:2])  # [B, D]
    v = torch.einsum("bij,bj->bi", finv, g)
    weight = samples + torch.einsum("bi,bi->b", g, v)
    return finv.baddbmm_((v / weight[:, None])[:, :, None], v[:, None, :], alpha=-1)


def cholesky_inverse(matrices: Tensor) -> Tensor:
    """``torch.linalg.cholesky`` and ``torch.cholesky_inverse``."""
    return torch.cholesky_inverse(torch.linalg.cholesky(matrices))


def linalg_inverse(matrices: Tensor) -> Tensor:
    """``torch.linalg.inv``: LU, which needs no symmetry."""
    return torch.linalg.inv(matrices)


def kept_solve(weight: Tensor, fisher: Tensor, mask: Tensor, *, solve: Solve, damp: float) -> Tensor:
    """``w_K + F_KK^-1 F_KP w_P`` of blocks [B, D] that all keep the same number: gather, one batched solve, scatter."""
    count, size = mask.shape
    places = mask.nonzero()[:, 1].view(count, -1)  # [B, k]
    w = weight.to(fisher.dtype)
    right = torch.bmm(fisher, w.masked_fill(mask, 0.0)[:, :, None])[:, :, 0].gather(1, places)
    rows = fisher.gather(1, places[:, :, None].expand(-1, -1, size))
    kept = rows.gather(2, places[:, None].expand(-1, places.shape[1], -1))
    kept.diagonal(dim1=1, dim2=2).add_(damp)
    return w.masked_fill(~mask, 0.0).scatter_add_(1, places, solve(kept, right)).to(weight.dtype)


def lu_solve(matrices: Tensor, right: Tensor) -> Tensor:
    """``torch.linalg.solve``."""
    return torch.linalg.solve(matrices, right)


def cholesky_solve(matrices: Tensor, right: Tensor) -> Tensor:
    """``torch.linalg.cholesky`` and ``torch.cholesky_solve``."""
    return torch.cholesky_solve(right[:, :, None], torch.linalg.cholesky(matrices))[:, :, 0]
