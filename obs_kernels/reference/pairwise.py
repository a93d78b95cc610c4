# SPDX-License-Identifier: Apache-2.0
"""Exact minimum of the pairwise model by dynamic programming over adjacent pairs.

VENOM's pairwise search sorts pair costs greedily; on (m = 4, n = 1) it already misses its own model's minimum. Here
``T_j[q] = min(T_{j+1}[q], S_j + T_{j+1}[q - 1], P_j + T_{j+1}[q - 2])``, with P_j the cost to prune pair j and S_j the
cost to prune the cheaper of the two. Ties: walk j upward, prefer fewer pruned; of two equal singles the higher index is
pruned.
"""

from __future__ import annotations

import torch
from torch import Tensor

from obs_kernels.reference.blocks import Groups


def keep_by_pairs(pairs: Groups, n: int) -> Tensor:
    """[N, m] bool: the kept entries that minimise the pair model of ``pairs`` (curvature block-diagonal in 2 x 2)."""
    count, m = pairs.linear.shape
    half = m // 2
    costs, prune_first = _pair_costs(pairs)
    to_prune = m - torch.clamp(pairs.alive.sum(1), max=n)  # [N]
    infinity = torch.full((), torch.inf, dtype=costs.dtype, device=costs.device)
    table = [torch.cat([costs.new_zeros(count, 1), infinity.expand(count, m)], 1)]
    for j in reversed(range(half)):
        after = table[-1]
        table.append(
            torch.minimum(
                torch.minimum(costs[:, j, :1] + after, costs[:, j, 1:2] + _shift(after, 1)),
                costs[:, j, 2:] + _shift(after, 2),
            )
        )
    table.reverse()  # table[j][:, q]: least cost of pruning q entries in pairs j ..

    keep = torch.ones(count, half, 2, dtype=torch.bool, device=costs.device)
    left = to_prune
    for j in range(half):
        options = torch.stack(
            [costs[:, j, k] + _shift(table[j + 1], k).gather(1, left[:, None])[:, 0] for k in range(3)], 1
        )
        pruned = options.argmin(1)
        keep[:, j, 0] = ~((pruned == 2) | ((pruned == 1) & prune_first[:, j]))
        keep[:, j, 1] = ~((pruned == 2) | ((pruned == 1) & ~prune_first[:, j]))
        left = left - pruned
    return keep.view(count, m)


def _pair_costs(pairs: Groups) -> tuple[Tensor, Tensor]:
    """Costs [N, m/2, 3] of pruning 0, 1 or 2 of each pair, and [N, m/2] whether the single is its first entry."""
    count, m = pairs.linear.shape
    f = pairs.curvature.view(count, m // 2, 2, m // 2, 2).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    w = pairs.weight.view(count, -1, 2)
    dead = ~pairs.alive.view(count, -1, 2)
    both = 0.5 * torch.einsum("gji,gjik,gjk->gj", w, f, w)
    det = f[..., 0, 0] * f[..., 1, 1] - f[..., 0, 1] * f[..., 1, 0]
    # w_i^2 / (2 (A_j)_ii) with A_j = F_j^-1, whose diagonal is that of F_j swapped over the determinant
    single = torch.stack([w[..., i] ** 2 * det / (2.0 * f[..., 1 - i, 1 - i]) for i in range(2)], -1)
    single = single.masked_fill(dead, 0.0)
    # a live entry must not be pruned in place of its dead neighbour
    single = single.masked_fill(dead.flip(-1) & ~dead, torch.inf)
    costs = torch.stack([torch.zeros_like(both), single.amin(-1), both], -1)
    costs[..., 0].masked_fill_(dead.any(-1), torch.inf)
    costs[..., 1].masked_fill_(dead.all(-1), torch.inf)
    return costs, single[..., 0] < single[..., 1]


def _shift(values: Tensor, by: int) -> Tensor:
    """``values[:, q - by]``, infinity for q < by."""
    if by == 0:
        return values
    return torch.cat([torch.full_like(values[:, :by], torch.inf), values[:, :-by]], 1)
