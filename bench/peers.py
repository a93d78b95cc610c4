# SPDX-License-Identifier: Apache-2.0
"""What our kernels are measured against: torch's own calls; sparseml's recursion, VENOM's search by definition."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

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


def search_by_pruned_sets(weight: Tensor, fisher: Tensor, *, n: int, damp: float) -> tuple[Tensor, Tensor]:
    """Kept set [N, n] and loss [N] of groups (``weight`` [N, m], ``fisher`` [N, m, m]), one pruned set after another.

    VENOM's search from its definition: F^-1, and for every set Q of m - n an (m - n) x (m - n) system a group,
    ``rho(Q) = 1/2 w_Q^T [(F^-1)_QQ]^-1 w_Q``.
    """
    m = weight.shape[1]
    finv = torch.linalg.inv(fisher + damp * torch.eye(m, dtype=fisher.dtype, device=fisher.device))
    best = torch.full_like(weight[:, 0], torch.inf)
    chosen = torch.zeros(weight.shape[0], n, dtype=torch.int64, device=weight.device)
    for kept in combinations(range(m), n):
        pruned = [i for i in range(m) if i not in kept]
        w = weight[:, pruned]
        loss = 0.5 * (w * torch.linalg.solve(finv[:, pruned][:, :, pruned], w)).sum(1)
        better = loss < best
        best = torch.where(better, loss, best)
        chosen[better] = torch.tensor(kept, device=weight.device)
    return chosen, best
