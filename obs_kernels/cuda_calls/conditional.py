# SPDX-License-Identifier: Apache-2.0
"""Curvature of the groups of a wider Fisher block, with the rest of the block re-optimised, by the batched inverse."""

from __future__ import annotations

import torch
from torch import Tensor

from obs_kernels.cuda_calls.inverse import invert_spd

BYTES_AT_ONCE = 256 << 20
"""Of Fisher blocks: the conditioned copy, its inverse and the groups make about three times as much."""
FISHER_NOT_FINITE, DAMP_NOT_VALID = -2, -3
"""What ``info`` tells, as in ``obs_kernels/search.h``."""


def conditional_curvature(fisher: Tensor, damp: Tensor, alive: Tensor | None, m: int) -> tuple[Tensor, Tensor]:
    """``[(F^-1)_GG]^-1`` of every group, [B * D / m, m, m] f32, and ``info`` [B].

    F is damped, and dead entries (``alive`` False, D a block) leave it: diagonal 1. Groups of a bad block are zeros.
    """
    count, size, _ = fisher.shape
    curvature = torch.empty(count * size // m, m, m, dtype=torch.float32, device=fisher.device)
    info = torch.empty(count, dtype=torch.int32, device=fisher.device)
    zero = torch.zeros(1, dtype=torch.float32, device=fisher.device)
    step = max(1, BYTES_AT_ONCE // (4 * size * size))
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        own_damp = damp if damp.numel() == 1 else damp[part]
        given = fisher[part]
        finite = torch.isfinite(given.amax((1, 2))) & torch.isfinite(given.amin((1, 2)))
        live = None if alive is None else alive.reshape(-1, size)[part]
        f, unit = _conditioned(given, own_damp, live)
        inverse, info[part] = invert_spd(f, damp=zero)
        inner = inverse.view(-1, size // m, m, size // m, m).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        own, failed = invert_spd(inner.reshape(-1, m, m).contiguous(), damp=zero)
        groups = slice(part.start * (size // m), part.stop * (size // m))
        torch.mul(own, unit.repeat_interleave(size // m)[:, None, None], out=curvature[groups])
        worst = failed.view(-1, size // m).amax(1)
        info[part] = torch.where(info[part] != 0, info[part], worst)
        valid = ((own_damp >= 0) & torch.isfinite(own_damp)).expand(finite.shape)
        info[part] = info[part].masked_fill(~valid, DAMP_NOT_VALID).masked_fill(~finite, FISHER_NOT_FINITE)
    return curvature, info


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
