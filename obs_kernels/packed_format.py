# SPDX-License-Identifier: Apache-2.0
"""Shapes of the packed form of a weight: the one place that knows them, for every backend and for the loader."""

from __future__ import annotations

from obs_kernels.patterns import NMPattern, VNMPattern

PANEL_COLUMNS = 4
"""Columns that a panel stores."""
CODES_PER_BYTE = 4
"""2-bit positions in a byte, lowest bits first."""


def has_two_bit_codes(pattern: NMPattern) -> bool:
    """True for 2:4 and v:2:m, whose codes are sparse tensor-core metadata; False for other n:m (a byte a position)."""
    return isinstance(pattern, VNMPattern) or (pattern.n, pattern.m) == (2, 4)


def runs_as_two_of_four(pattern: NMPattern) -> bool:
    """Whether a weight of ``pattern`` has at most two nonzeros in each aligned four columns: 2:4 to tensor cores."""
    return pattern.n <= 2 and pattern.m % 4 == 0


def packed_shapes(
    pattern: NMPattern, rows: int, cols: int
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int, int] | None]:
    """Shapes of (values, codes, columns) of a weight [rows, cols]; columns is None without panels."""
    kept = cols // pattern.m * pattern.n
    codes = -(-kept // CODES_PER_BYTE) if has_two_bit_codes(pattern) else kept
    panels = (rows // pattern.v, cols // pattern.m, PANEL_COLUMNS) if isinstance(pattern, VNMPattern) else None
    return (rows, kept), (rows, codes), panels
