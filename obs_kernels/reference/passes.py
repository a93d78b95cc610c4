# SPDX-License-Identifier: Apache-2.0
"""Coordinate passes over the groups of a Fisher block, for D > m: each group chooses anew while the others stay.

The first choice prices a group as if every other weight of its block stayed and could make up for it. Most of them go.
With the kept sets O of the other groups fixed, keeping K in group G gains ``r_K^T (S_KK)^-1 r_K`` on top of what O
gains, with ``S = F_GG - F_GO (F_OO)^-1 F_OG`` and ``r = u_G - F_GO (F_OO)^-1 u_O``: the gain of the first choice, with
another curvature. So each step is exact, and the loss of the block never rises.

Curvature and linear part are kept swept by the kept set (see ``greedy``): a group is swept out, chosen, and swept in
again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from obs_kernels.patterns import NMPattern, VNMPattern, parse_pattern
from obs_kernels.reference.blocks import Groups, compute_dtype, damp_blocks, factor_or_raise, rescale
from obs_kernels.reference.candidates import dead_in_sets, gain_table, kept_sets, sets_inside_columns
from obs_kernels.reference.fisher import chunks
from obs_kernels.reference.search import as_mask, choose_panels, fewest_dead

CHUNK_BYTES = 256 * 1024 * 1024
"""Working memory of the blocks in hand: a pass is some hundred small launches for every chunk, so few large ones."""
GAIN_TOLERANCE = 1e-5
"""Share of its gain by which a new choice must win: the swept curvature carries rounding of some hundred sweeps."""


def improve_choice(
    weight: Tensor,
    fisher: Tensor,
    mask: Tensor,
    pattern: str,
    *,
    damp: Tensor,
    alive: Tensor,
    passes: int,
    num_columns: int = 4,
) -> tuple[Tensor, int]:
    """Mask [R, C] after at most ``passes`` passes from ``mask``, and the number of groups (panels) that changed.

    Arguments as in ``ops.search_nm`` and ``search_vnm``; ``mask`` is their choice, ``alive`` the entries still alive.
    """
    parsed: NMPattern = parse_pattern(pattern)
    v = parsed.v if isinstance(parsed, VNMPattern) else 0
    size = fisher.shape[1]
    rows, cols = weight.shape
    run = max(v, 1) * cols // size  # Fisher blocks of a panel's rows
    out = mask.reshape(-1, size).clone()
    dtype = compute_dtype(weight, fisher)
    table = kept_sets(parsed.n, parsed.m).shape[0]
    changed = 0
    each = run * (4 * size * size + 3 * table) * dtype.itemsize
    for part in chunks(out.shape[0] // run if run else 0, each, weight.device, limit=CHUNK_BYTES):
        blocks = slice(part.start * run, part.stop * run)
        live = alive.reshape(-1, size)[blocks]
        state = _start(
            weight.reshape(-1, size)[blocks].to(dtype), fisher[blocks], live, _part(damp, blocks), blocks.start
        )
        keep = out[blocks]
        _sweep_in(state, keep)
        for _ in range(passes):
            moved = sum(
                _choose_again(state, keep, live, group, parsed, v, cols // size, num_columns)
                for group in range(size // parsed.m)
            )
            changed += moved
            if not moved:
                break
    return out.view(rows, cols), changed


@dataclass
class _State:
    """Curvature [N, D, D] and linear part [N, D], swept by the kept sets; ``unit`` [N] is the scale of both."""

    curvature: Tensor
    linear: Tensor
    unit: Tensor

    def sweep(self, index: Tensor, active: Tensor, sign: float) -> None:
        """Take entry ``index`` [N] of each ``active`` block into the kept set (``sign`` 1) or out of it (-1)."""
        a, b = self.curvature, self.linear
        every = torch.arange(a.shape[0], device=a.device)
        row, own = a[every, index], b[every, index]
        pivot = row[every, index]
        scaled = (row / pivot[:, None]).masked_fill_(~active[:, None], 0.0)
        a.addcmul_(row[:, :, None], scaled[:, None], value=-1.0)  # bound by memory; a product of width 1 is slower
        b.addcmul_(scaled, own[:, None], value=-1.0)
        swept = torch.where(active[:, None], sign * scaled, row)
        swept[every, index] = torch.where(active, -1.0 / pivot, pivot)
        a[every, index] = swept
        a[every, :, index] = swept
        b[every, index] = torch.where(active, sign * (own / pivot), own)


def _start(weight: Tensor, fisher: Tensor, alive: Tensor, damp: Tensor, offset: int) -> _State:
    f = damp_blocks(fisher, alive, damp, weight.dtype)
    factor_or_raise(f, "fisher", offset)
    f, unit = rescale(f, alive)
    u = (f @ weight.masked_fill(~alive, 0.0)[:, :, None])[:, :, 0]
    return _State(f, u, unit)


def _sweep_in(state: _State, keep: Tensor) -> None:
    for column in range(keep.shape[1]):
        index = torch.full((keep.shape[0],), column, device=keep.device)
        state.sweep(index, keep[:, column], 1.0)


def _choose_again(
    state: _State, keep: Tensor, alive: Tensor, group: int, pattern: NMPattern, v: int, wide: int, num_columns: int
) -> int:
    """Choose group ``group`` of every block anew, in place; how many groups (panels) changed."""
    n, m = pattern.n, pattern.m
    span = slice(group * m, (group + 1) * m)
    old, live = keep[:, span].clone(), alive[:, span]
    _sweep_group(state, old, span.start, n, -1.0)
    curvature, linear = state.curvature[:, span, span], state.linear[:, span]
    gains = gain_table(Groups(curvature, linear, linear, live, state.unit), n)
    allowed = fewest_dead(gains, dead_in_sets(live, n))
    member = as_mask(kept_sets(n, m, keep.device), m).to(gains.dtype)
    holds = old.to(gains.dtype) @ member.T >= old.sum(1, keepdim=True)
    own = allowed.masked_fill(~holds, -torch.inf).amax(1)  # of the sets that hold the old one: it, and dead fillers
    if v:
        inside = sets_inside_columns(n, m, num_columns, keep.device)
        sets, _ = choose_panels(gains, live, v, wide, n, inside, masked=not bool(live.all()))
        sets = sets.reshape(-1)
        found, before = (x.view(-1, v, wide).sum(1) for x in (gains.gather(1, sets[:, None])[:, 0], own))
        better = found > before + GAIN_TOLERANCE * before.abs()
        moved = int(better.sum())
        better = better[:, None].expand(-1, v, -1).reshape(-1)
    else:
        found, sets = allowed.max(1)
        better = found > own + GAIN_TOLERANCE * own.abs()
        moved = int(better.sum())
    chosen = as_mask(kept_sets(n, m, keep.device)[sets], m) & live
    new = torch.where(better[:, None], chosen, old)
    keep[:, span] = new
    _sweep_group(state, new, span.start, n, 1.0)
    return moved


def _sweep_group(state: _State, kept: Tensor, start: int, n: int, sign: float) -> None:
    places = kept.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :n]
    for at in range(n):
        index = places[:, at]
        state.sweep(start + index, kept.gather(1, index[:, None])[:, 0], sign)


def _part(damp: Tensor, blocks: slice) -> Tensor:
    return damp if damp.numel() == 1 else damp[blocks]
