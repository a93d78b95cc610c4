# SPDX-License-Identifier: Apache-2.0
"""Which weights to keep: exact n:m and v:n:m choice in plain torch.

Loss of keeping K in a group: ``1/2 (w^T F' w - u_K^T (F'_KK)^-1 u_K)`` (see ``candidates``). The least loss is the
largest gain. A panel takes the columns with the largest sum, over its rows, of the best gain inside them; then each row
its best set. Ties go to the lower index everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from obs_kernels.checks import check_damp_values, check_finite
from obs_kernels.patterns import NMPattern, VNMPattern, parse_pattern
from obs_kernels.reference.blocks import Groups, compute_dtype, condition_groups, pair_model, plain_groups
from obs_kernels.reference.candidates import dead_in_sets, gain_table, kept_sets, sets_inside_columns
from obs_kernels.reference.fisher import CACHE_BYTES, chunks
from obs_kernels.reference.greedy import choose_columns, keep_by_greedy
from obs_kernels.reference.pairwise import keep_by_pairs

SINGLE_WEIGHT_METHODS = ("diagonal", "magnitude")


def search_nm(
    weight: Tensor, fisher: Tensor | None, pattern: str, *, damp: Tensor, method: str, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Mask [R, C] bool (True = kept) and saliency [R, C/m] of the n:m choice; arguments as in ``ops.search_nm``."""
    _check_values(weight, fisher, damp)
    return choose_nm(weight, fisher, pattern, damp=damp, method=method, mask=mask, info=None)


def choose_nm(
    weight: Tensor,
    fisher: Tensor | None,
    pattern: str,
    *,
    damp: Tensor,
    method: str,
    mask: Tensor | None,
    info: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``search_nm`` of values that are not looked at; with ``info`` [B] as in ``condition_groups``."""
    parsed: NMPattern = parse_pattern(pattern)
    n, m = parsed.n, parsed.m
    rows, cols = weight.shape
    keep = torch.empty(rows * cols // m, m, dtype=torch.bool, device=weight.device)
    saliency = torch.empty(rows * cols // m, dtype=compute_dtype(weight, fisher), device=weight.device)
    size = m if fisher is None else fisher.shape[1]
    table = kept_sets(n, m).shape[0] if method == "combinatorial" else 4 * m * m if method == "greedy" else m
    for part in chunks(rows * cols // size, (4 * size * size + size // m * table * 3) * saliency.element_size()):
        groups, finv = _groups(weight, fisher, mask, damp, m, size, part, method, info)
        span = slice(part.start * size // m, part.stop * size // m)
        if method == "combinatorial":
            index = live_first(groups.alive, n)
            live = groups.take(index)
            gains = _forbid_dead(gain_table(live, n), live.alive, n)
            places = kept_sets(n, index.shape[1], weight.device)[gains.argmax(1)]
            keep[span] = as_mask(index.gather(1, places), m)
        elif method == "greedy":
            keep[span] = keep_by_greedy(groups, n)
        elif method == "pairwise":
            keep[span] = keep_by_pairs(pair_model(groups, finv), n)
        else:
            scores = _scores(groups, fisher, damp, method, part).masked_fill(~groups.alive, -1.0)
            keep[span] = as_mask(scores.sort(dim=1, descending=True, stable=True).indices[:, :n], m)
        keep[span] &= groups.alive
        saliency[span] = _choice_loss(groups, fisher, damp, keep[span], n, method, part)
    return keep.view(rows, cols), saliency.view(rows, cols // m)


def search_vnm(
    weight: Tensor,
    fisher: Tensor | None,
    pattern: str,
    *,
    damp: Tensor,
    method: str,
    mask: Tensor | None,
    num_columns: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mask [R, C], saliency [R/v, C/m] and columns [R/v, C/m, num_columns] uint8 of the joint v:n:m choice."""
    _check_values(weight, fisher, damp)
    return choose_vnm(weight, fisher, pattern, damp=damp, method=method, mask=mask, num_columns=num_columns, info=None)


def choose_vnm(
    weight: Tensor,
    fisher: Tensor | None,
    pattern: str,
    *,
    damp: Tensor,
    method: str,
    mask: Tensor | None,
    num_columns: int,
    info: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``search_vnm`` of values that are not looked at; with ``info`` [B] as in ``condition_groups``."""
    parsed: VNMPattern = parse_pattern(pattern)
    v, n, m = parsed.v, parsed.n, parsed.m
    rows, cols = weight.shape
    panels, wide = rows // v, cols // m
    keep = torch.empty(panels, v, wide, m, dtype=torch.bool, device=weight.device)
    dtype = compute_dtype(weight, fisher)
    saliency = torch.empty(panels, wide, dtype=dtype, device=weight.device)
    columns = torch.empty(panels, wide, num_columns, dtype=torch.uint8, device=weight.device)
    if weight.numel() == 0:
        return keep.view(rows, cols), saliency, columns
    size = m if fisher is None else fisher.shape[1]
    exact = method != "greedy"
    sets_per_panel = sets_inside_columns(n, m, num_columns).numel() if exact and mask is None else 0
    bytes_each = (
        v * cols * (4 * size + 2 * kept_sets(n, m).shape[0] / m) + wide * sets_per_panel
    ) * saliency.element_size()
    for part in chunks(panels, int(bytes_each)):
        blocks = slice(part.start * v * cols // size, part.stop * v * cols // size)
        groups, finv = _groups(weight, fisher, mask, damp, m, size, blocks, method, info)
        used = groups.alive.view(-1, v, wide, m).any(1)
        panel_index = live_first(used.view(-1, m), num_columns).view(*used.shape[:2], -1)  # [P, C/m, L]
        index = panel_index[:, None].expand(-1, v, -1, -1).reshape(groups.alive.shape[0], -1)
        gains = _gains_by_method(groups, finv, fisher, damp, n, method, blocks, index)
        length = index.shape[1]
        alive = groups.alive.gather(1, index)
        if exact:
            inside = sets_inside_columns(n, length, num_columns, weight.device)
            sets, chosen = choose_panels(gains, alive, v, wide, n, inside, masked=mask is not None)
            picked = kept_sets(num_columns, length, weight.device)[chosen]
        else:
            sets, picked = _choose_panels_greedily(gains, alive, v, wide, n, num_columns)
        places = index.gather(1, kept_sets(n, length, weight.device)[sets.flatten()])
        keep[part] = (as_mask(places, m) & groups.alive).view(-1, v, wide, m)
        kept_columns = panel_index.gather(2, picked)
        columns[part] = kept_columns.sort(-1).values.to(torch.uint8)
        loss = _choice_loss(groups, fisher, damp, keep[part].view(-1, m), n, method, blocks)
        saliency[part] = loss.view(-1, v, wide).sum(1)
    return keep.view(rows, cols), saliency, columns


def _groups(
    weight: Tensor,
    fisher: Tensor | None,
    mask: Tensor | None,
    damp: Tensor,
    m: int,
    size: int,
    part: slice,
    method: str,
    info: Tensor | None,
) -> tuple[Groups, Tensor | None]:
    """Groups of the Fisher blocks ``part``; methods that look at single weights get no curvature."""
    w = weight.reshape(-1, size)[part]
    alive = torch.ones_like(w, dtype=torch.bool) if mask is None else mask.reshape(-1, size)[part]
    if fisher is None or method in SINGLE_WEIGHT_METHODS:
        return plain_groups(w, alive, m, compute_dtype(weight, fisher)), None
    own = None if info is None else info[part]
    return condition_groups(w, fisher[part], alive, damp if damp.numel() == 1 else damp[part], m, part.start, own)


def choose_panels(
    gains: Tensor,
    alive: Tensor,
    v: int,
    wide: int,
    n: int,
    inside: Tensor,
    *,
    masked: bool,
    row_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Kept set of each row [P, v, C/m] and column set of each panel [P, C/m], from ``gains`` [P * v * C/m, sets].

    ``row_scale`` [P * v] multiplies the gains of a row inside the sum over the panel.
    """
    gains = gains.view(-1, v, wide, gains.shape[-1])
    dead = dead_in_sets(alive, n).view(gains.shape) if masked else None

    total = gains.new_zeros(gains.shape[0], wide, inside.shape[0])
    row_bytes = 2 * gains.shape[0] * wide * inside.numel() * gains.element_size()
    for part in chunks(v, row_bytes, gains.device, limit=CACHE_BYTES):
        best = gains[:, part][..., inside]  # [P, rows, C/m, column sets, kept sets inside]
        best = fewest_dead(best, None if dead is None else dead[:, part][..., inside]).amax(-1)
        if row_scale is not None:
            best = best * row_scale.view(-1, v)[:, part, None, None]
        for row in best.unbind(1):  # in ascending order: the sum must not depend on the backend
            total += row
    chosen = total.argmax(-1)  # [P, C/m]

    sets = inside[chosen][:, None].expand(-1, v, -1, -1)  # [P, v, C/m, kept sets inside]
    best = fewest_dead(gains.gather(3, sets), None if dead is None else dead.gather(3, sets))
    return sets.gather(3, best.argmax(-1, keepdim=True))[..., 0], chosen


def _choose_panels_greedily(
    gains: Tensor, alive: Tensor, v: int, wide: int, n: int, num_columns: int
) -> tuple[Tensor, Tensor]:
    """As ``choose_panels``, with the columns [P, C/m, num_columns] grown and exchanged one by one."""
    length = alive.shape[1]
    gains = gains.view(-1, v, wide, gains.shape[-1])
    dead = dead_in_sets(alive, n).view(gains.shape)
    sets = kept_sets(n, length, gains.device)
    member = torch.zeros(sets.shape[0], length, dtype=gains.dtype, device=gains.device).scatter_(1, sets, 1.0)

    def inside(columns: Tensor, row: int) -> Tensor:
        """[P, C/m, sets]: gains of a row, -inf for sets that leave the columns or hold more dead than they must."""
        leaves = columns.to(member.dtype) @ member.T < n
        return fewest_dead(gains[:, row], dead[:, row].masked_fill(leaves, n + 1.0)).masked_fill(leaves, -torch.inf)

    def total(columns: Tensor) -> Tensor:
        value = gains.new_zeros(columns.shape[:-1])
        for row in range(v):
            value = value + inside(columns, row).amax(-1)
        return value

    everywhere = torch.ones(gains.shape[0], wide, length, dtype=torch.bool, device=gains.device)
    whole = gains.new_zeros(gains.shape[0], wide, gains.shape[-1])
    for row in range(v):
        whole = whole + inside(everywhere, row).clamp_min(torch.finfo(gains.dtype).min / (4 * v))
    first = torch.zeros_like(everywhere).scatter_(2, sets[whole.argmax(-1)], True)
    columns = choose_columns(total, first, num_columns)
    best = torch.stack([inside(columns, row).argmax(-1) for row in range(v)], 1)
    order = columns.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices
    return best, order[..., :num_columns]


def fewest_dead(gains: Tensor, dead: Tensor | None) -> Tensor:
    """Gains with -inf where a set holds more dead entries than the best set of the last dimension must."""
    return gains if dead is None else gains.masked_fill(dead > dead.amin(-1, keepdim=True), -torch.inf)


def _gains_by_method(
    groups: Groups,
    finv: Tensor | None,
    fisher: Tensor | None,
    damp: Tensor,
    n: int,
    method: str,
    part: slice,
    index: Tensor,
) -> Tensor:
    """[N, comb(L, n)] gains of the kept sets among the columns ``index`` [N, L]."""
    if method in ("combinatorial", "greedy"):
        return gain_table(groups.take(index), n)
    if method == "pairwise":
        return gain_table(pair_model(groups, finv).take(index), n)
    scores = _scores(groups, fisher, damp, method, part).gather(1, index)
    return scores[:, kept_sets(n, scores.shape[1], scores.device)].sum(-1)


def _scores(groups: Groups, fisher: Tensor | None, damp: Tensor, method: str, part: slice) -> Tensor:
    """[N, m] score of single weights: |w|, or 1/2 (F_ii + damp) w_i^2."""
    if method == "magnitude" or fisher is None:
        return groups.weight.abs()
    diagonal = fisher[part].diagonal(dim1=1, dim2=2).to(groups.weight.dtype)
    diagonal = diagonal + (damp if damp.numel() == 1 else damp[part]).to(diagonal.dtype).reshape(-1, 1)
    return 0.5 * diagonal.reshape(groups.weight.shape) * groups.weight**2


def _choice_loss(
    groups: Groups, fisher: Tensor | None, damp: Tensor, keep: Tensor, n: int, method: str, part: slice
) -> Tensor:
    """[N] loss increase of keeping ``keep`` [N, m]: 1/2 dw^T F' dw with the kept weights re-solved in their group.

    The diagonal and magnitude methods know no compensation: the sum of 1/2 (F_ii + damp) w_i^2, or of 1/2 w_i^2, over
    the pruned.
    """
    if method in SINGLE_WEIGHT_METHODS:
        cost = 0.5 * groups.weight**2 if method == "magnitude" else _scores(groups, fisher, damp, method, part)
        return cost.masked_fill(keep, 0.0).sum(1)
    index = keep.sort(dim=1, descending=True, stable=True).indices[:, :n]  # kept first, then fillers
    valid = keep.gather(1, index)
    f = groups.curvature.gather(1, index[:, :, None].expand(-1, -1, keep.shape[1])).gather(
        2, index[:, None].expand(-1, n, -1)
    )
    f = f.masked_fill(~(valid[:, :, None] & valid[:, None, :]), 0.0)
    f.diagonal(dim1=1, dim2=2).masked_fill_(~valid, 1.0)
    u = groups.linear.gather(1, index).masked_fill(~valid, 0.0)
    solved = torch.cholesky_solve(u[:, :, None], torch.linalg.cholesky_ex(f)[0])[:, :, 0]
    change = torch.zeros_like(groups.weight).scatter_(1, index, solved).masked_fill(~keep, 0.0) - groups.weight
    # from the change itself, not from E - gain, which cancels
    return 0.5 * torch.einsum("gi,gij,gj->g", change, groups.curvature, change) * groups.scale


def live_first(alive: Tensor, least: int) -> Tensor:
    """[N, L] positions: the live ones of ``alive`` [N, m], ascending, then the lowest dead ones.

    L is the largest number of live positions, at least ``least``: in later stages of a schedule the search runs over
    what the stages before left, 10 kept sets instead of 11,440 from 10 to 9 of 16.
    """
    length = max(least, int(alive.sum(1).max()) if alive.numel() else 0)
    return alive.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :length]


def _forbid_dead(gains: Tensor, alive: Tensor, n: int) -> Tensor:
    """Gains with -inf where a set holds more dead entries than a short group forces it to."""
    if bool(alive.all()):
        return gains
    return fewest_dead(gains, dead_in_sets(alive, n))


def as_mask(index: Tensor, m: int) -> Tensor:
    """[N, m] bool with True at ``index`` [N, k]."""
    return torch.zeros(index.shape[0], m, dtype=torch.bool, device=index.device).scatter_(1, index, True)


def _check_values(weight: Tensor, fisher: Tensor | None, damp: Tensor) -> None:
    check_finite("weight", weight)
    if fisher is not None:
        check_finite("fisher", fisher)
        check_damp_values(damp)
