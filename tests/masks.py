# SPDX-License-Identifier: Apache-2.0
"""Random masks that obey a pattern, for the tests of packing and of what reads packed weights."""

from __future__ import annotations

import torch
from torch import Tensor

from obs_kernels.patterns import NMPattern, VNMPattern


def random_mask(gen: torch.Generator, rows: int, cols: int, pattern: NMPattern, *, drop: float = 0.0) -> Tensor:
    """A mask that obeys ``pattern`` and leaves a share ``drop`` of its slots free."""
    groups = cols // pattern.m
    score = torch.rand(rows, groups, pattern.m, generator=gen)
    if isinstance(pattern, VNMPattern):
        open_columns = torch.rand(rows // pattern.v, groups, pattern.m, generator=gen).argsort(-1).argsort(-1) < 4
        score = score - (~open_columns).float().repeat_interleave(pattern.v, 0)
    kept = score.argsort(-1, descending=True).argsort(-1) < pattern.n
    return (kept & (torch.rand(kept.shape, generator=gen) >= drop)).reshape(rows, cols)
