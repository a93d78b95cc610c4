# SPDX-License-Identifier: Apache-2.0
"""Exact counts for thresholded patterns: prune just k units, ties included."""

from __future__ import annotations

import torch
from torch import Tensor


def prune_count(sparsity: float, total: int) -> int:
    """k = floor(s * N + 1/2)."""
    return int(sparsity * total + 0.5)


def select_lowest(scores: Tensor, count: int) -> Tensor:
    """[N] bool, True at the ``count`` units with the least (score, index descending).

    Among equal scores the higher index is pruned first. One selection pass and an exact count of ties, no sort.
    """
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if count >= scores.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count).values
    pruned = scores < threshold
    ties = (scores == threshold).nonzero().flatten()
    pruned[ties[ties.numel() - (count - int(pruned.sum())) :]] = True
    return pruned
