# SPDX-License-Identifier: Apache-2.0
"""Stages of a pruning step: which intermediate patterns lead to the final one."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from obs_kernels.patterns import NMPattern, Pattern, UnstructuredPattern


def recomputation_stages(pattern: Pattern, recomputations: int) -> tuple[Pattern, ...]:
    """The step to ``pattern`` in ``recomputations`` parts, new gradients and a new Fisher for each.

    Thresholded patterns: sparsity i/R of the target. n:m: ``n_i = m - floor(i (m - n) / R + 1/2)``, R capped at m - n;
    the columns of v:n:m follow n (see ``VNMPattern.num_columns``). Unlike a float, n never misses a stage.
    """
    if isinstance(pattern, NMPattern):
        parts = min(recomputations, pattern.m - pattern.n)
        counts = [pattern.m - int(i * (pattern.m - pattern.n) / parts + 0.5) for i in range(1, parts + 1)]
        return tuple(replace(pattern, n=n) for n in counts)
    thresholded = cast(UnstructuredPattern, pattern)
    return tuple(
        replace(thresholded, target=round(thresholded.target * i / recomputations, 12))
        for i in range(1, recomputations + 1)
    )
