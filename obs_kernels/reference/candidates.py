# SPDX-License-Identifier: Apache-2.0
"""Tables of kept sets, and the gain of every kept set of a group.

``gain(K) = u_K^T (F'_KK)^-1 u_K`` (complement identity): an n x n problem for each kept set instead of an (m - n) x (m
- n) one for each pruned set. Sets are in lexicographic order, so that the first maximum is the lower index.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations
from math import comb

import torch
from torch import Tensor

from obs_kernels.reference.blocks import Groups
from obs_kernels.reference.fisher import chunks


@lru_cache(maxsize=64)
def kept_sets(n: int, m: int, device: torch.device | None = None) -> Tensor:
    """All n-subsets of range(m), [comb(m, n), n] int64, lexicographic; one copy a device, as copies wait for a GPU."""
    return torch.tensor(list(combinations(range(m), n)), dtype=torch.int64, device=device)


@lru_cache(maxsize=16)
def sets_inside_columns(n: int, m: int, num_columns: int, device: torch.device | None = None) -> Tensor:
    """For each column set of ``kept_sets(num_columns, m)``, the numbers of the kept sets inside it, [comb(m, c),
    comb(c, n)].
    """
    number = {kept: i for i, kept in enumerate(combinations(range(m), n))}
    return torch.tensor(
        [[number[kept] for kept in combinations(columns, n)] for columns in combinations(range(m), num_columns)],
        dtype=torch.int64,
        device=device,
    )


def gain_table(groups: Groups, n: int) -> Tensor:
    """[N, comb(m, n)]: gain of every kept set of every group; a set's dead entries add nothing.

    One curvature [1, m, m] for all N groups will do, if no entry is dead.
    """
    return _scaled_gains(groups.curvature, groups.linear, n) * groups.scale[:, None]


def _scaled_gains(f: Tensor, u: Tensor, n: int) -> Tensor:
    count, m = u.shape
    if n == 1:
        return u * u / f.diagonal(dim1=1, dim2=2)
    if n == 2:
        return _pair_gains(f, u)
    widest = comb(m - 2, n - 2)  # sets of the last level that carries matrices
    shared = f.shape[0] == 1
    per_group = 3 * widest * m * (1 if shared else m) * f.element_size()
    parts = [_tree_gains(f if shared else f[part], u[part], n) for part in chunks(count, per_group, f.device)]
    return torch.cat(parts) if parts else u.new_zeros(0, kept_sets(n, m).shape[0])


def dead_in_sets(alive: Tensor, n: int) -> Tensor:
    """[N, comb(m, n)]: how many dead entries each kept set has; ``alive`` [N, m]."""
    return (~alive).float() @ _members(n, alive.shape[1], alive.device)


@lru_cache(maxsize=64)
def _members(n: int, m: int, device: torch.device) -> Tensor:
    """[m, comb(m, n)] f32: 1 where a place is in a kept set."""
    sets = kept_sets(n, m, device)
    return torch.zeros(sets.shape[0], m, device=device).scatter_(1, sets, 1.0).T


def _pair_gains(f: Tensor, u: Tensor) -> Tensor:
    """Closed form for n = 2; the formula and its IEEE division are the contract for equal masks on every backend."""
    a, b = kept_sets(2, u.shape[1], u.device).unbind(1)
    diagonal = f.diagonal(dim1=1, dim2=2)
    fa, fb, fab, ua, ub = diagonal[:, a], diagonal[:, b], f[:, a, b], u[:, a], u[:, b]
    return (fb * ua * ua - 2.0 * fab * ua * ub + fa * ub * ub) / (fa * fb - fab * fab)


def _tree_gains(f: Tensor, u: Tensor, n: int) -> Tensor:
    """Grow kept sets by one larger index at a time, eliminating it from the curvature of the rest."""
    count, m = u.shape
    gain, linear, curvature = u.new_zeros(count, 1), u[:, None], f[:, None]  # [N, sets, ...]
    for level, (parent, place) in enumerate(_tree_levels(n, m, u.device)):
        value = linear.flatten(1).index_select(1, place)  # [N, sets]
        scale = curvature.diagonal(dim1=2, dim2=3).flatten(1).index_select(1, place)
        gain = gain.index_select(1, parent) + value * value / scale
        if level == n - 1:
            break
        column = curvature.flatten(1, 2).index_select(1, place)  # [N, sets, m]
        linear = linear.index_select(1, parent).sub_(column * (value / scale)[..., None])
        pushed = column[..., :, None] * (column / scale[..., None])[..., None, :]
        curvature = curvature.index_select(1, parent).sub_(pushed)
    return gain


@lru_cache(maxsize=64)
def _tree_levels(n: int, m: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """For each size of sets up to n: the number p of the set without its largest index i, and ``p m + i``."""
    levels, last = [], [-1]
    for level in range(n):
        pairs = [(p, i) for p, end in enumerate(last) for i in range(end + 1, m - n + level + 1)]
        last = [i for _, i in pairs]
        parent = torch.tensor([p for p, _ in pairs])
        levels.append((parent.to(device), (parent * m + torch.tensor(last)).to(device)))
    return levels
