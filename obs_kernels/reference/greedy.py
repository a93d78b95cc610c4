# SPDX-License-Identifier: Apache-2.0
"""Greedy choice with swaps, for counts beyond the exact search: one entry at a time, then the best exchange of a kept
entry for a pruned one as long as one helps.

The state of a group is its curvature swept by the kept set K (Goodnight 1979): ``a_KK = -(F_KK)^-1``, ``a_KJ =
(F_KK)^-1 F_KJ``, ``a_JJ`` the Schur complement, ``b_K = (F_KK)^-1 u_K`` the kept weights and ``b_J = u_J - F_JK b_K``.
From it the gain of adding j is ``b_j^2 / a_jj``, the cost of dropping i ``b_i^2 / -a_ii``, and the exchange of both is
known without trying it: m^2 candidates at a time instead of comb(m, n) sets.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from obs_kernels.reference.blocks import Groups

GAIN_TOLERANCE = 1e-6
"""Share of the gain by which an exchange must win: rounding alone must not keep groups changing."""
MAX_EXCHANGES = 4
"""Exchanges of a group, times m; each one wins, so there is an end in any case, and it comes within a few."""


def keep_by_greedy(groups: Groups, n: int) -> Tensor:
    """[N, m] bool: n live entries of each group (all if there are fewer); ties go to the lower index.

    Two starts, kept entries added from none and dropped from all, are improved by exchanges; the better one counts.
    """
    grown, grown_gain = _improve(groups, *_grow(groups, n))
    shrunk, shrunk_gain = _improve(groups, *_shrink(groups, n))
    better = shrunk_gain > grown_gain * (1.0 + GAIN_TOLERANCE)
    return torch.where(better[:, None], shrunk, grown)


State = tuple[Tensor, Tensor, Tensor]
"""Swept curvature [N, m, m], its linear part [N, m] and the kept set [N, m] bool."""


def _start(groups: Groups) -> State:
    curvature = groups.curvature.clone(memory_format=torch.contiguous_format)
    linear = groups.linear.clone(memory_format=torch.contiguous_format)
    return curvature, linear, torch.zeros_like(groups.alive)


def _grow(groups: Groups, n: int) -> State:
    curvature, linear, keep = _start(groups)
    every = torch.arange(keep.shape[0], device=keep.device)
    for _ in range(n):
        gain = (linear**2 / curvature.diagonal(dim1=1, dim2=2)).masked_fill(keep | ~groups.alive, -1.0)
        best, index = gain.max(1)  # the first maximum: the lower index
        chosen = every[best >= 0]
        _sweep(curvature, linear, chosen, index[chosen], 1.0)
        keep[chosen, index[chosen]] = True
    return curvature, linear, keep


def _shrink(groups: Groups, n: int) -> State:
    curvature, linear, keep = _start(groups)
    every = torch.arange(keep.shape[0], device=keep.device)
    m = keep.shape[1]
    for j in range(m):
        chosen = every[groups.alive[:, j]]
        _sweep(curvature, linear, chosen, torch.full_like(chosen, j), 1.0)
        keep[chosen, j] = True
    for _ in range(m - n):
        cost = (linear**2 / -curvature.diagonal(dim1=1, dim2=2)).masked_fill(~keep, torch.inf)
        index = m - 1 - cost.flip(1).argmin(1)  # the last minimum: the lower index stays
        chosen = every[keep.sum(1) > n]
        _sweep(curvature, linear, chosen, index[chosen], -1.0)
        keep[chosen, index[chosen]] = False
    return curvature, linear, keep


def _improve(groups: Groups, curvature: Tensor, linear: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Kept set after the exchanges, and its gain [N]."""
    m = keep.shape[1]
    active = torch.arange(keep.shape[0], device=keep.device)
    for _ in range(MAX_EXCHANGES * m):
        if not active.numel():
            break
        a, b, kept = curvature[active], linear[active], keep[active]
        net = _exchanges(a, b, kept, groups.alive[active])  # [N', m (out), m (in)]
        best, place = net.flatten(1).max(1)
        better = best > GAIN_TOLERANCE * _gain(groups.linear[active], b, kept)
        active, place = active[better], place[better]
        out, into = place // m, place % m
        _sweep(curvature, linear, active, out, -1.0)
        _sweep(curvature, linear, active, into, 1.0)
        keep[active, out] = False
        keep[active, into] = True
    return keep, _gain(groups.linear, linear, keep)


def _gain(u: Tensor, swept: Tensor, keep: Tensor) -> Tensor:
    """[N] u_K^T (F_KK)^-1 u_K."""
    return (u * swept).masked_fill(~keep, 0.0).sum(1)


def choose_columns(total: Callable[[Tensor], Tensor], first: Tensor, num_columns: int) -> Tensor:
    """Column sets of panels [..., L] bool, grown from ``first`` [..., L] one by one, then improved by exchanges.

    ``total`` gives the value [...] of column sets [..., L]; ties go to the lower index.
    """
    columns = first.clone()
    length = columns.shape[-1]
    eye = torch.eye(length, dtype=torch.bool, device=columns.device)
    for _ in range(num_columns - int(first.sum(-1).reshape(-1)[0]) if columns.numel() else 0):
        grown = [total(columns | eye[j]).masked_fill(columns[..., j], -torch.inf) for j in range(length)]
        columns = columns | eye[torch.stack(grown, -1).argmax(-1)]
    value = total(columns)
    for _ in range(MAX_EXCHANGES * length):
        best, best_columns = value, columns
        for out in range(length):
            for into in range(length):
                if out == into:
                    continue
                tried = (columns & ~eye[out]) | eye[into]
                allowed = columns[..., out] & ~columns[..., into]
                if not bool(allowed.any()):
                    continue
                found = total(tried).masked_fill(~allowed, -torch.inf)
                better = found > best + GAIN_TOLERANCE * best.abs()
                best = torch.where(better, found, best)
                best_columns = torch.where(better[..., None], tried, best_columns)
        if torch.equal(best_columns, columns):
            break
        value, columns = best, best_columns
    return columns


def _exchanges(a: Tensor, b: Tensor, kept: Tensor, alive: Tensor) -> Tensor:
    """[N, m, m]: what dropping i and then adding j wins; -inf where i is not kept, or j is kept or dead."""
    own = a.diagonal(dim1=1, dim2=2)  # -(F_KK)^-1 of the kept, the Schur complement of the others
    cost = b**2 / -own
    step = a / own[:, :, None]
    freed = own[:, None, :] - a * step
    residual = b[:, None, :] - step * b[:, :, None]
    net = residual**2 / freed - cost[:, :, None]
    return net.masked_fill(~(kept[:, :, None] & (alive & ~kept)[:, None, :]), -torch.inf)


def _sweep(a: Tensor, b: Tensor, group: Tensor, index: Tensor, sign: float) -> None:
    """Take ``index`` [k] of the groups ``group`` [k] into the kept set (``sign`` 1) or out of it (-1), in place."""
    part, linear = a[group], b[group]
    place = torch.arange(group.numel(), device=group.device)
    row = part[place, index]  # [k, m]
    pivot, own = row[place, index], linear[place, index]
    scaled = row / pivot[:, None]
    part -= row[:, :, None] * scaled[:, None]
    linear -= scaled * own[:, None]
    part[place, index] = sign * scaled
    part[place, :, index] = sign * scaled
    part[place, index, index] = -1.0 / pivot
    linear[place, index] = sign * own / pivot
    a[group], b[group] = part, linear
