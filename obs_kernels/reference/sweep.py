# SPDX-License-Identifier: Apache-2.0
"""Row curvature: choice and compensation of whole rows in one sweep over the columns, one Hessian for all rows.

Columns are settled from left to right. With ``H = R R^T``, R upper triangular, a change dw of a row costs
``1/2 |dw R|^2``, and entry j of ``dw R`` depends on the columns up to j alone. So the columns still to come make up for
the settled ones as well as they can exactly when their part of ``dw R`` is 0, and settling a group g at w adds
``1/2 |a_g - w R_gg|^2`` to the loss, with

    a_g = w0_g R_gg - (dw of the settled columns) R[settled, g]        (compensated weights of the group, times R_gg)

For a kept set K that is the problem of the block search, with ``S = R_gg R_gg^T`` for F' and ``u = a_g R_gg^T``: the
gain is ``u_K^T S_KK^-1 u_K`` and the weights are ``S_KK^-1 u_K``, with one S for all rows. In terms of the upper factor
``U = R^-1`` of H^-1 it is the sweep of SparseGPT (Frantar and Alistarh 2023) with an exact joint choice a group; U is
not formed.

A dead entry of a row (``mask`` False) counts as weight 0 and is never kept. H is shared, so its row and column cannot
leave the matrix of that row alone: like any entry that will be pruned it counts as free to adapt until its group is
settled, and the loss of the compensation it then gives up is in the saliency.

Groups follow each other, so on a GPU it is the host that takes the time: what does not depend on the groups before is
found for a block of columns at once, and values are read only there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
from math import isfinite

import torch
from torch import Tensor

from obs_kernels.checks import check_damp_values, check_finite, check_info
from obs_kernels.patterns import NMPattern, VNMPattern, parse_pattern
from obs_kernels.reference.blocks import Groups, compute_dtype, decouple_, rescale
from obs_kernels.reference.candidates import dead_in_sets, gain_table, kept_sets, sets_inside_columns
from obs_kernels.reference.fisher import chunks, invert_spd
from obs_kernels.reference.hessian import damp_hessian, upper_factor
from obs_kernels.reference.precision import exact_products
from obs_kernels.reference.resolve import Gradients, conjugate_gradients, resolve_rows
from obs_kernels.reference.search import as_mask, choose_panels, fewest_dead
from obs_kernels.reference.sparsegpt import sweep_columns, without_dead_inputs
from obs_kernels.row_checks import check_scale_values

BLOCK = 128
"""Columns whose changes reach the later columns in one matrix product."""
TABLE_SIZE = 8
"""Largest m for which inverses are made for every set that some row may keep, where entries are dead."""

Sweep = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
"""``sweep_groups``, of this or of another backend."""


def sweep_rows(
    weight: Tensor,
    hessian: Tensor,
    pattern: str,
    *,
    row_scale: Tensor | None,
    damp: Tensor,
    method: str,
    mask: Tensor | None,
    num_columns: int,
    resolve: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mask [R, C], new weight [R, C], saliency and columns ([0] without panels); arguments as in ``ops.sweep_rows``."""
    return sweep_rows_by(
        sweep_groups,
        weight,
        hessian,
        pattern,
        row_scale=row_scale,
        damp=damp,
        method=method,
        mask=mask,
        num_columns=num_columns,
        resolve=resolve,
    )


@exact_products()
def sweep_rows_by(
    sweep: Sweep,
    weight: Tensor,
    hessian: Tensor,
    pattern: str,
    *,
    row_scale: Tensor | None,
    damp: Tensor,
    method: str,
    mask: Tensor | None,
    num_columns: int,
    resolve: bool,
    gradients: Gradients = conjugate_gradients,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``sweep_rows`` around the ``sweep_groups`` and ``conjugate_gradients`` of any backend: the rest is the same."""
    all_alive = _check_values(weight, hessian, damp, row_scale, mask)
    dtype = compute_dtype(weight, hessian, row_scale)
    alive = None if all_alive else mask
    live = weight.to(dtype) if alive is None else weight.to(dtype).masked_fill(~alive, 0.0)
    shared = hessian.to(dtype)
    if method == "sparsegpt":
        live, shared = without_dead_inputs(live, shared)
    shared = damp_hessian(shared, damp, dtype)
    factor = upper_factor(shared)
    parsed = parse_pattern(pattern)
    columns = torch.empty(0, dtype=torch.uint8, device=weight.device)
    if method == "sparsegpt":
        kept, new, saliency = sweep_columns(live, factor, parsed, alive, BLOCK)
    else:
        scale = None if row_scale is None else row_scale.to(dtype)
        own, curvature, unit = diagonal_groups(factor, parsed.m)
        kept, new, saliency, columns = sweep(live, factor, own, curvature, unit, parsed, scale, alive, num_columns)
    if resolve:
        new = resolve_rows(live, new, shared, kept, gradients)
    return kept, new.to(weight.dtype), saliency, columns


def _check_values(weight: Tensor, hessian: Tensor, damp: Tensor, row_scale: Tensor | None, mask: Tensor | None) -> bool:
    """Whether ``mask`` has no dead entry; raises for what is wrong with the values of the others.

    Where nothing is, a GPU is waited for once: the largest of all sizes is finite, and nothing is negative.
    """
    valued = [t for t in (weight, hessian, damp, row_scale) if t is not None and t.numel()]
    largest = [torch.linalg.vector_norm(t, torch.inf).to(torch.float64) for t in valued]
    least = [t.amin().to(torch.float64) for t in (damp, row_scale) if t is not None and t.numel()]
    dead = [] if mask is None else [mask.logical_not().any().to(torch.float64)]
    read = [*largest, *least, *dead]
    found = torch.stack(read).tolist() if read else []
    sizes, lowest = found[: len(largest)], found[len(largest) : len(largest) + len(least)]
    if not (all(map(isfinite, sizes)) and all(value >= 0 for value in lowest)):
        check_finite("weight", weight)
        check_finite("hessian", hessian)
        check_damp_values(damp)
        if row_scale is not None:
            check_scale_values(row_scale)
    return not (dead and found[-1])


def diagonal_groups(factor: Tensor, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """``R_gg / sqrt(unit)`` and ``S = R_gg R_gg^T / unit`` of each group [C/m, m, m], and unit [C/m], powers of 4."""
    wide = factor.shape[0] // m
    own = factor.unflatten(0, (wide, m)).unflatten(2, (wide, m)).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
    curvature, unit = rescale(own @ own.mT, torch.ones_like(own[:, 0], dtype=torch.bool))
    return own / unit.sqrt()[:, None, None], curvature, unit


def sweep_groups(
    live: Tensor,
    factor: Tensor,
    own: Tensor,
    curvature: Tensor,
    unit: Tensor,
    pattern: NMPattern,
    row_scale: Tensor | None,
    alive: Tensor | None,
    num_columns: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Kept [R, C], weights [R, C], saliency and columns of the sweep of ``live`` [R, C] with ``factor`` R [C, C].

    All in one dtype; ``own``, ``curvature`` and ``unit`` as ``diagonal_groups`` gives them; ``row_scale`` [R] or None,
    ``alive`` [R, C] or None, where ``live`` must be 0 if False.
    """
    rows, cols = live.shape
    n, m = pattern.n, pattern.m
    v = pattern.v if isinstance(pattern, VNMPattern) else 1
    panels, wide = rows // v, cols // m
    kept = torch.zeros(rows, cols, dtype=torch.bool, device=live.device)
    new = torch.zeros(rows, cols, dtype=live.dtype, device=live.device)
    loss = torch.zeros(rows, wide, dtype=live.dtype, device=live.device)
    columns = torch.empty(
        (panels, wide, num_columns) if isinstance(pattern, VNMPattern) else 0, dtype=torch.uint8, device=live.device
    )
    if live.numel() == 0:
        return kept, new, loss.view(panels, v, wide).sum(1), columns

    units = unit.tolist()
    pushed = torch.zeros_like(live)  # (dw of the settled columns) R
    change = torch.zeros_like(live)
    width = max(1, BLOCK // m) * m
    for start in range(0, cols, width):
        stop = min(start + width, cols)
        block = slice(start // m, stop // m)
        inverses = _kept_inverses(curvature[block], n, start) if alive is None else None
        tables = None if alive is None else _live_inverses(curvature[block], n, rows)
        orders = None if alive is None else _live_orders(alive[:, start:stop], pattern, num_columns)
        infos = list[tuple[int, Tensor]]()
        for group in range(block.start, block.stop):
            span, place = slice(group * m, (group + 1) * m), group - block.start
            now = live[:, span] @ own[group] - pushed[:, span] / units[group] ** 0.5
            here = _Group(
                curvature[group],
                now @ own[group].mT,
                inverses=None if inverses is None else inverses[place],
                alive=None if alive is None else alive[:, span],
                order=None if orders is None else orders[place],
                table=None if tables is None else tables[place],
            )
            kept[:, span], new[:, span], chosen, info = _settle(here, pattern, row_scale, num_columns)
            infos += [(span.start, part) for part in info]
            if chosen is not None:
                columns[:, group] = chosen
            loss[:, group] = (0.5 * units[group]) * (now - new[:, span] @ own[group]).square().sum(1)
            change[:, span] = new[:, span] - live[:, span]
            pushed[:, span.stop : stop].addmm_(change[:, span], factor[span, span.stop : stop])
        _check_infos(infos, m)
        pushed[:, stop:].addmm_(change[:, start:stop], factor[start:stop, stop:])
    if row_scale is not None:
        loss = loss * row_scale[:, None]
    return kept, new, loss.view(panels, v, wide).sum(1), columns


@dataclass(frozen=True)
class _Group:
    """One group of every row."""

    curvature: Tensor
    """[m, m]: S, for all rows."""
    linear: Tensor
    """[R, m]: u, whatever is dead."""
    inverses: Tensor | None
    """[sets, n, n]: S_KK^-1 of every kept set; None if entries are dead."""
    alive: Tensor | None
    """[R, m]; None if nothing is dead."""
    order: Tensor | None
    """[P, L]: what is looked at in each panel, or row, where entries are dead: the live positions come first."""
    table: tuple[Tensor, Tensor] | None
    """Of ``_live_inverses``, where there is one."""

    def part(self, units: slice, v: int) -> _Group:
        """Some of the panels of v rows, or rows."""
        rows = slice(units.start * v, units.stop * v)
        return replace(
            self,
            linear=self.linear[rows],
            alive=None if self.alive is None else self.alive[rows],
            order=None if self.order is None else self.order[units],
        )


def _kept_inverses(curvature: Tensor, n: int, start: int) -> Tensor:
    """[g, sets, n, n]: S_KK^-1 of every kept set of the groups ``curvature`` [g, m, m], which begin at column
    ``start``.
    """
    groups, m = curvature.shape[:2]
    sets = kept_sets(n, m, curvature.device)
    kept = curvature[:, sets[:, :, None], sets[:, None, :]]
    inverse, info = invert_spd(kept.view(-1, n, n), damp=kept.new_zeros(1))
    check_info(f"kept sets of hessian in columns {start} to {start + groups * m - 1}", info)
    return inverse.view(kept.shape)


def _live_inverses(curvature: Tensor, n: int, rows: int) -> list[tuple[Tensor, Tensor]] | None:
    """For each group ``curvature`` [g, m, m]: the inverse [sets, m, m] and ``info`` [sets] of S_KK for every set of at
    most n, 0 outside of it; None where these are more than there are rows to look them up.
    """
    groups, m = curvature.shape[:2]
    if m > TABLE_SIZE or 2**m > rows:
        return None
    member, _ = _small_sets(n, m, curvature.device)
    every = curvature.repeat_interleave(member.shape[0], 0)
    outside = ~member.repeat(groups, 1)
    inverse, info = invert_spd(decouple_(every, outside), damp=every.new_zeros(1))
    inverse.masked_fill_(outside[:, :, None] | outside[:, None, :], 0.0)
    return list(zip(inverse.view(groups, -1, m, m), info.view(groups, -1), strict=True))


@lru_cache(maxsize=16)
def _small_sets(n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """[sets, m] bool of every set of at most n of m, and [2^m] which of them has the members whose bits are set."""
    sets = [chosen for size in range(n + 1) for chosen in combinations(range(m), size)]
    member = torch.tensor([[i in chosen for i in range(m)] for chosen in sets])
    number = torch.zeros(2**m, dtype=torch.int64)
    number[(member * 2 ** torch.arange(m)).sum(1)] = torch.arange(len(sets))
    return member.to(device), number.to(device)


def _live_orders(alive: Tensor, pattern: NMPattern, num_columns: int) -> list[Tensor]:
    """For each group of ``alive`` [R, c] the positions [P, L] to look at: live ones ascending, then the lowest dead.

    A panel looks at what is alive in some row of it. L is the largest number of live positions, and at least what is
    kept: in later stages of a schedule the search runs over what the stages before left.
    """
    v, least = (pattern.v, num_columns) if isinstance(pattern, VNMPattern) else (1, pattern.n)
    used = alive.unflatten(0, (-1, v)).unflatten(2, (-1, pattern.m)).any(1)  # [P, g, m]
    lengths = used.sum(2).amax(0).clamp_min(least).tolist()
    order = used.to(torch.uint8).sort(dim=2, descending=True, stable=True).indices
    return [order[:, group, :length] for group, length in enumerate(lengths)]


def _check_infos(infos: list[tuple[int, Tensor]], m: int) -> None:
    """Raise for the first of the groups, each with its first column and ``info``, that has a singular kept set."""
    if not infos or not bool(torch.cat([info for _, info in infos]).any()):
        return
    for first, info in infos:
        check_info(f"kept sets of hessian in columns {first} to {first + m - 1}", info)


def _settle(
    group: _Group, pattern: NMPattern, row_scale: Tensor | None, num_columns: int
) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
    """Kept [R, m], weights [R, m] and panel columns of a group, and what ``info`` there is to look at."""
    rows, m = group.linear.shape
    n, v = pattern.n, pattern.v if isinstance(pattern, VNMPattern) else 1
    kept = torch.empty(rows, m, dtype=torch.bool, device=group.linear.device)
    weights = torch.empty_like(group.linear)
    columns, infos = [], []
    per_row = 4 * kept_sets(n, m).shape[0] + (m * m + n * n)
    for part in chunks(rows // v, v * per_row * weights.element_size(), weights.device):
        span = slice(part.start * v, part.stop * v)
        mine = group.part(part, v)
        scale = None if row_scale is None else row_scale[span]
        sets, places, chosen = _choose(mine, pattern, scale, num_columns)
        mask = as_mask(places, m)
        kept[span] = mask if mine.alive is None else mask & mine.alive
        weights[span], info = _kept_weights(mine, sets, places, kept[span])
        if info is not None:
            infos.append(info)
        if chosen is not None:
            columns.append(chosen)
    return kept, weights, torch.cat(columns) if columns else None, infos


def _kept_weights(group: _Group, sets: Tensor, places: Tensor, kept: Tensor) -> tuple[Tensor, Tensor | None]:
    """[R, m]: S_KK^-1 u_K at what is ``kept`` [R, m], else 0; and ``info`` [R] if it was not looked at."""
    info = None
    if group.table is not None:
        inverses, infos = group.table
        m = kept.shape[1]
        number = _small_sets(places.shape[1], m, kept.device)[1]
        bits = number[(kept * _bits(m, kept.device)).sum(1)]
        weights, info = (inverses[bits] @ group.linear[:, :, None])[:, :, 0], infos[bits]
        return weights.masked_fill(~kept, 0.0), info
    linear = group.linear.gather(1, places)
    if group.inverses is not None:
        inverse = group.inverses[sets]
    else:
        assert group.alive is not None
        near = group.alive.gather(1, places)
        inside = decouple_(group.curvature[places[:, :, None], places[:, None, :]], ~near)
        inverse, info = invert_spd(inside, damp=inside.new_zeros(1))
        linear = linear.masked_fill(~near, 0.0)
    solved = (inverse @ linear[:, :, None])[:, :, 0]
    return torch.zeros_like(group.linear).scatter_(1, places, solved).masked_fill_(~kept, 0.0), info


@lru_cache(maxsize=16)
def _bits(m: int, device: torch.device) -> Tensor:
    return (2 ** torch.arange(m)).to(device)


def _choose(
    group: _Group, pattern: NMPattern, row_scale: Tensor | None, num_columns: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Number of the kept set [R] among those looked at, its places [R, n], and the columns of each panel [P, c]."""
    n = pattern.n
    v = pattern.v if isinstance(pattern, VNMPattern) else 1
    index = None if group.order is None else group.order[:, None].expand(-1, v, -1).flatten(0, 1)
    groups = _looked_at(group, index)
    length, masked = groups.linear.shape[1], index is not None
    gains = gain_table(groups, n)
    columns = None
    if isinstance(pattern, VNMPattern):
        inside = sets_inside_columns(n, length, num_columns, gains.device)
        sets, chosen = choose_panels(gains, groups.alive, v, 1, n, inside, masked=masked, row_scale=row_scale)
        sets = sets.flatten()
        columns = kept_sets(num_columns, length, gains.device)[chosen[:, 0]]
        if group.order is not None:
            columns = group.order.gather(1, columns).sort(1).values
    else:
        if masked:
            gains = fewest_dead(gains, dead_in_sets(groups.alive, n))
        sets = gains.argmax(1)
    places = kept_sets(n, length, gains.device)[sets]
    return sets, places if index is None else index.gather(1, places), columns


def _looked_at(group: _Group, index: Tensor | None) -> Groups:
    """The positions ``index`` [R, L] of a group as the search takes them, dead entries decoupled; all if it is None."""
    linear = group.linear
    one = linear.new_ones(1)
    if index is None or group.alive is None:
        return Groups(group.curvature[None], linear, linear, torch.ones_like(linear, dtype=torch.bool), one)
    alive = group.alive.gather(1, index)
    curvature = decouple_(group.curvature[index[:, :, None], index[:, None, :]], ~alive)
    linear = linear.gather(1, index).masked_fill_(~alive, 0.0)
    return Groups(curvature, linear, linear, alive, one)
