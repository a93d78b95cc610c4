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
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from obs_kernels.checks import check_damp_values, check_finite, check_info
from obs_kernels.patterns import NMPattern, VNMPattern, parse_pattern
from obs_kernels.reference.blocks import Groups, compute_dtype, decouple_, rescale
from obs_kernels.reference.candidates import dead_in_sets, gain_table, kept_sets, sets_inside_columns
from obs_kernels.reference.fisher import chunks, invert_spd
from obs_kernels.reference.hessian import damp_hessian, upper_factor
from obs_kernels.reference.precision import exact_products
from obs_kernels.reference.resolve import resolve_rows
from obs_kernels.reference.search import as_mask, choose_panels, fewest_dead, live_first
from obs_kernels.reference.sparsegpt import sweep_columns, without_dead_inputs
from obs_kernels.row_checks import check_scale_values

BLOCK = 128
"""Columns whose changes reach the later columns in one matrix product."""

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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``sweep_rows`` around the ``sweep_groups`` of any backend: what comes before and after is the same for all."""
    check_finite("weight", weight)
    check_finite("hessian", hessian)
    check_damp_values(damp)
    if row_scale is not None:
        check_scale_values(row_scale)
    dtype = compute_dtype(weight, hessian, row_scale)
    alive = None if mask is None or bool(mask.all()) else mask
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
        new = resolve_rows(live, new, shared, kept)
    return kept, new.to(weight.dtype), saliency, columns


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
        inverses = None if alive is not None else _kept_inverses(curvature[block], n, start)
        for group in range(block.start, block.stop):
            span = slice(group * m, (group + 1) * m)
            now = live[:, span] @ own[group] - pushed[:, span] / units[group] ** 0.5
            groups = _groups(curvature[group], now @ own[group].mT, None if alive is None else alive[:, span])
            table = None if inverses is None else inverses[group - block.start]
            kept[:, span], new[:, span], chosen = _settle(groups, pattern, row_scale, table, num_columns, span.start)
            if chosen is not None:
                columns[:, group] = chosen
            loss[:, group] = (0.5 * units[group]) * (now - new[:, span] @ own[group]).square().sum(1)
            change[:, span] = new[:, span] - live[:, span]
            pushed[:, span.stop : stop].addmm_(change[:, span], factor[span, span.stop : stop])
        pushed[:, stop:].addmm_(change[:, start:stop], factor[start:stop, stop:])
    if row_scale is not None:
        loss = loss * row_scale[:, None]
    return kept, new, loss.view(panels, v, wide).sum(1), columns


def _groups(curvature: Tensor, linear: Tensor, alive: Tensor | None) -> Groups:
    """One group of every row: S [1, m, m] for all, or [R, m, m] with the dead entries of each row decoupled."""
    one = linear.new_ones(1)
    if alive is None:
        return Groups(curvature[None], linear, linear, torch.ones_like(linear, dtype=torch.bool), one)
    own = decouple_(curvature.expand(linear.shape[0], -1, -1).clone(), ~alive)
    linear = linear.masked_fill(~alive, 0.0)
    return Groups(own, linear, linear, alive, one)


def _kept_inverses(curvature: Tensor, n: int, start: int) -> Tensor:
    """[g, sets, n, n]: S_KK^-1 of every kept set of the groups ``curvature`` [g, m, m], which begin at column
    ``start``.
    """
    groups, m = curvature.shape[:2]
    sets = kept_sets(n, m, curvature.device)
    kept = curvature[:, sets[:, :, None], sets[:, None, :]]
    return _inverses(kept.view(-1, n, n), start, start + groups * m).view(kept.shape)


def _inverses(matrices: Tensor, start: int, stop: int) -> Tensor:
    inverse, info = invert_spd(matrices, damp=matrices.new_zeros(1))
    check_info(f"kept sets of hessian in columns {start} to {stop - 1}", info)
    return inverse


def _settle(
    groups: Groups, pattern: NMPattern, row_scale: Tensor | None, inverses: Tensor | None, num_columns: int, first: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Kept [R, m], weights [R, m] and panel columns of the group from column ``first`` on.

    ``inverses`` [sets, n, n], None if entries are dead.
    """
    rows, m = groups.linear.shape
    n, v = pattern.n, pattern.v if isinstance(pattern, VNMPattern) else 1
    kept = torch.empty_like(groups.alive)
    weights = torch.zeros_like(groups.linear)
    columns = []
    per_row = 4 * kept_sets(n, m).shape[0] + (m * m + n * n)
    for part in chunks(rows // v, v * per_row * weights.element_size(), weights.device):
        span = slice(part.start * v, part.stop * v)
        mine = Groups(
            groups.curvature if inverses is not None else groups.curvature[span],
            groups.linear[span],
            groups.weight[span],
            groups.alive[span],
            groups.scale,
        )
        scale = None if row_scale is None else row_scale[span]
        sets, places, chosen = _choose(mine, pattern, scale, inverses is None, num_columns)
        if inverses is None:
            inside = mine.curvature.gather(1, places[:, :, None].expand(-1, -1, m))
            inverse = _inverses(inside.gather(2, places[:, None].expand(-1, n, -1)), first, first + m)
        else:
            inverse = inverses[sets]
        solved = (inverse @ mine.linear.gather(1, places)[:, :, None])[:, :, 0]
        kept[span] = as_mask(places, m) & mine.alive
        weights[span] = weights[span].scatter(1, places, solved).masked_fill(~mine.alive, 0.0)
        if chosen is not None:
            columns.append(chosen)
    return kept, weights, torch.cat(columns) if columns else None


def _choose(
    groups: Groups, pattern: NMPattern, row_scale: Tensor | None, masked: bool, num_columns: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Number of the kept set [R] among those looked at, its places [R, n], and the columns of each panel [P, c]."""
    n, m = pattern.n, pattern.m
    rows = groups.linear.shape[0]
    panels = isinstance(pattern, VNMPattern)
    v = pattern.v if isinstance(pattern, VNMPattern) else 1
    length, index, panel_index = m, None, None
    if masked:  # only what is alive in some row of a panel, in some group of the rows
        used = groups.alive.view(-1, v, m).any(1)
        panel_index = live_first(used, num_columns if panels else n)
        length = panel_index.shape[1]
        index = panel_index[:, None].expand(-1, v, -1).reshape(rows, length)
        groups = groups.take(index)
    gains = gain_table(groups, n)
    columns = None
    if panels:
        inside = sets_inside_columns(n, length, num_columns, gains.device)
        sets, chosen = choose_panels(gains, groups.alive, v, 1, n, inside, masked=masked, row_scale=row_scale)
        sets = sets.flatten()
        columns = kept_sets(num_columns, length, gains.device)[chosen[:, 0]]
        if panel_index is not None:
            columns = panel_index.gather(1, columns).sort(1).values
    else:
        if masked:
            gains = fewest_dead(gains, dead_in_sets(groups.alive, n))
        sets = gains.argmax(1)
    places = kept_sets(n, length, gains.device)[sets]
    return sets, places if index is None else index.gather(1, places), columns
