# SPDX-License-Identifier: Apache-2.0
"""Packed form of a pruned weight, stored format version 1, in plain torch.

``values`` [R, K]: kept weights of a row in column order, K = C/m * n. ``codes``: 2-bit positions, four a byte, lowest
bits first ([R, ceil(K/4)]) for 2:4 and v:2:m; the column inside the group ([R, K]) for other n:m. ``columns`` [R/v,
C/m, 4]: the panel's columns, ascending (empty without panels). Exactly n slots a group: free ones hold +0.0 at the
lowest unused positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from obs_kernels.packed_format import PANEL_COLUMNS, has_two_bit_codes
from obs_kernels.patterns import NMPattern, VNMPattern, parse_pattern


def pack(weight: Tensor, mask: Tensor, pattern: str) -> tuple[Tensor, Tensor, Tensor]:
    """(values, codes, columns) of ``weight`` [R, C] at the kept entries of ``mask``, which must satisfy ``pattern``."""
    parsed: NMPattern = parse_pattern(pattern)
    rows, cols = weight.shape
    n, m = parsed.n, parsed.m
    columns = torch.empty(0, dtype=torch.uint8, device=weight.device)
    groups, kept = weight.reshape(rows, cols // m, m), mask.reshape(rows, cols // m, m)
    if isinstance(parsed, VNMPattern):
        columns = _lowest(parsed.panel_columns(mask), PANEL_COLUMNS)  # [R/v, C/m, 4]
        index = columns.repeat_interleave(parsed.v, dim=0)
        groups, kept = groups.gather(2, index), kept.gather(2, index)
        columns = columns.to(torch.uint8)
    place = _lowest(kept, n)  # [R, C/m, n]
    values = groups.gather(2, place).masked_fill(~kept.gather(2, place), 0.0).flatten(1)
    codes = place.flatten(1).to(torch.uint8)
    return values.contiguous(), _to_bytes(codes) if has_two_bit_codes(parsed) else codes.contiguous(), columns


def unpack(values: Tensor, codes: Tensor, columns: Tensor, pattern: str) -> Tensor:
    """The dense weight [R, C]; pruned entries are +0.0, kept ones come back bit for bit."""
    parsed: NMPattern = parse_pattern(pattern)
    rows, kept = values.shape
    n, m = parsed.n, parsed.m
    place = _from_bytes(codes, kept) if has_two_bit_codes(parsed) else codes
    place = place.long().view(rows, kept // n, n)
    if isinstance(parsed, VNMPattern):
        place = columns.long().repeat_interleave(parsed.v, dim=0).gather(2, place)
    dense = torch.zeros(rows, kept // n, m, dtype=values.dtype, device=values.device)
    return dense.scatter_(2, place, values.reshape(rows, kept // n, n)).flatten(1)


def _lowest(used: Tensor, count: int) -> Tensor:
    """Positions of the True entries of the last dimension, filled with the lowest False ones, ascending."""
    return used.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :count].sort(dim=-1).values


def _to_bytes(codes: Tensor) -> Tensor:
    """[R, K] 2-bit codes -> [R, ceil(K/4)] bytes, lowest bits first, unused bits 0."""
    rows, kept = codes.shape
    quads = F.pad(codes, (0, -kept % 4)).view(rows, -(-kept // 4), 4)
    return quads[..., 0] | quads[..., 1] << 2 | quads[..., 2] << 4 | quads[..., 3] << 6


def _from_bytes(codes: Tensor, kept: int) -> Tensor:
    """The inverse of ``_to_bytes``: [R, K]."""
    return torch.stack([codes >> shift & 3 for shift in (0, 2, 4, 6)], -1).flatten(1)[:, :kept]
