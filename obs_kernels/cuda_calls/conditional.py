# SPDX-License-Identifier: Apache-2.0
"""Curvature of the groups of a wider Fisher block, with the rest of the block re-optimised, by the batched inverse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from obs_kernels.cuda_calls.inverse import invert_spd

BYTES_AT_ONCE = 256 << 20
"""Of Fisher blocks: the conditioned copy, its inverse and the groups make about three times as much."""
FISHER_NOT_FINITE, DAMP_NOT_VALID = -2, -3
"""What ``info`` tells, as in ``obs_kernels/search.h``."""


class InvertedBlocks(NamedTuple):
    """Some Fisher blocks, damped and without dead entries (diagonal 1), inverted."""

    blocks: slice
    groups: slice
    inverse: Tensor
    """[groups, m, m]: ``(F^-1)_GG`` times ``unit``; zeros of a bad block."""
    unit: Tensor
    """[groups]: a power of four near the largest diagonal of F."""
    info: Tensor
    """[blocks] int32: 0, the failing pivot, or what is not finite."""


def inverted_blocks(
    fisher: Tensor, damp: Tensor, alive: Tensor | None, m: int, multiple: int = 1
) -> Iterator[InvertedBlocks]:
    """The blocks of ``fisher`` [B, D, D], ``BYTES_AT_ONCE`` at a time but a multiple of ``multiple``."""
    count, size, _ = fisher.shape
    per_block = size // m
    zero = torch.zeros(1, dtype=torch.float32, device=fisher.device)
    step = max(multiple, BYTES_AT_ONCE // (4 * size * size) // multiple * multiple)
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        own_damp = damp if damp.numel() == 1 else damp[part]
        given = fisher[part]
        finite = torch.isfinite(given.amax((1, 2))) & torch.isfinite(given.amin((1, 2)))
        live = None if alive is None else alive.reshape(-1, size)[part]
        f, unit = _conditioned(given, own_damp, live)
        inverse, info = invert_spd(f, damp=zero)
        inner = inverse.view(-1, per_block, m, per_block, m).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        valid = ((own_damp >= 0) & torch.isfinite(own_damp)).expand(finite.shape)
        info = info.masked_fill(~valid, DAMP_NOT_VALID).masked_fill(~finite, FISHER_NOT_FINITE)
        groups = slice(part.start * per_block, part.stop * per_block)
        yield InvertedBlocks(
            part, groups, inner.reshape(-1, m, m).contiguous(), unit.repeat_interleave(per_block), info
        )


def conditional_curvature(fisher: Tensor, damp: Tensor, alive: Tensor | None, m: int) -> tuple[Tensor, Tensor]:
    """``[(F^-1)_GG]^-1`` of every group, [B * D / m, m, m] f32, and ``info`` [B].

    F is damped, and dead entries (``alive`` False, D a block) leave it: diagonal 1. Groups of a bad block are zeros.
    """
    count, size, _ = fisher.shape
    curvature = torch.empty(count * size // m, m, m, dtype=torch.float32, device=fisher.device)
    info = torch.empty(count, dtype=torch.int32, device=fisher.device)
    for part in inverted_blocks(fisher, damp, alive, m):
        curvature[part.groups], info[part.blocks] = curvature_of(part)
    return curvature, info


def curvature_of(part: InvertedBlocks) -> tuple[Tensor, Tensor]:
    """``[(F^-1)_GG]^-1`` of the groups of ``part``, and ``info`` of its blocks."""
    zero = torch.zeros(1, dtype=torch.float32, device=part.inverse.device)
    own, failed = invert_spd(part.inverse, damp=zero)
    own.mul_(part.unit[:, None, None])
    return own, worst_info(part.info, failed)


def worst_info(block_info: Tensor, group_info: Tensor) -> Tensor:
    """``info`` [B] of blocks, and where that is 0 the worst of their groups' [groups]."""
    if not block_info.numel():
        return block_info
    groups = group_info.view(block_info.shape[0], -1)
    worst = torch.where(groups.amin(1) < 0, groups.amin(1), groups.amax(1))
    return torch.where(block_info != 0, block_info, worst)


def _conditioned(fisher: Tensor, damp: Tensor, alive: Tensor | None) -> tuple[Tensor, Tensor]:
    """A damped copy without dead entries, over a power of four near its largest live diagonal; and those powers."""
    f = fisher.clone(memory_format=torch.contiguous_format)
    diagonal = f.diagonal(dim1=1, dim2=2)
    diagonal.add_(damp.reshape(-1, 1))
    if alive is not None:
        f.masked_fill_(~(alive[:, :, None] & alive[:, None, :]), 0.0)
    top = diagonal.amax(1)
    exponent = torch.where((top > 0) & torch.isfinite(top), torch.frexp(top).exponent, 0)
    unit = torch.ldexp(torch.ones_like(top), exponent - exponent % 2)
    f.div_(unit[:, None, None])
    if alive is not None:
        diagonal.masked_fill_(~alive, 1.0)
    return f, unit
