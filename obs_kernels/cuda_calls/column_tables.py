# SPDX-License-Identifier: Apache-2.0
"""Tables of the column sets of a panel, for the kernel that compares them (``obs_kernels/search.h``)."""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

LARGEST_TABLE = 5632
"""Entries of a row's table that fit the shared memory of a block: pairs and triples of 32 columns."""


class ColumnTables(NamedTuple):
    """Which entries of a row's table hold its best gain inside a column set.

    The table has the gains of the kept sets of n, then ``derived`` ones: the largest gain inside three columns.
    """

    derived: Tensor
    """[3, derived] int16: numbers of kept sets."""
    lists: Tensor
    """[length, column sets] int16: entries of the table."""
    columns: Tensor
    """[column sets, num_columns] uint8, lexicographic."""


@lru_cache(maxsize=16)
def column_tables(n: int, m: int, num_columns: int, device: torch.device) -> ColumnTables:
    """Tables for n = 1 or 2.

    The pairs of three columns or more are covered by triples: three entries instead of six for four columns.
    """
    entry = {kept: i for i, kept in enumerate(combinations(range(m), n))}
    triples: list[tuple[int, int, int]] = []
    if n == 2 and num_columns > 2:
        triples = list(combinations(range(m), 3))
        entry |= {triple: len(entry) + i for i, triple in enumerate(triples)}
    derived = [[entry[pair] for pair in combinations(triple, 2)] for triple in triples]
    cover = _cover(num_columns) if n == 2 else [(i,) for i in range(num_columns)]
    sets = list(combinations(range(m), num_columns))
    lists = [[entry[tuple(columns[i] for i in part)] for columns in sets] for part in cover]
    return ColumnTables(
        torch.tensor(derived, dtype=torch.int16).reshape(-1, 3).t().contiguous().to(device),
        torch.tensor(lists, dtype=torch.int16).to(device),
        torch.tensor(sets, dtype=torch.uint8).to(device),
    )


def _cover(count: int) -> list[tuple[int, ...]]:
    """Triples and pairs of range(count) that hold every pair; a triple only where it saves an entry."""
    left = set(combinations(range(count), 2))
    parts: list[tuple[int, ...]] = []
    while left:
        triples = combinations(range(count), 3)
        best = max(triples, key=lambda t: len(left & set(combinations(t, 2))), default=())
        found = left & set(combinations(best, 2))
        parts.append(best if len(found) > 1 else min(left))
        left -= set(combinations(parts[-1], 2))
    return parts
