# SPDX-License-Identifier: Apache-2.0
"""Tables of the column sets of a panel, for the kernel that compares them (``obs_kernels/search.h``)."""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor


class ColumnTables(NamedTuple):
    """Which entries of a row's table hold its best gain inside a column set.

    The table has the gains of the kept sets of n, then ``derived`` ones: the largest gain inside three columns (n = 2).
    """

    derived: Tensor
    """[3, derived] int16: numbers of kept sets."""
    lists: Tensor
    """[length, column sets] int16: entries of the table."""
    columns: Tensor
    """[column sets, num_columns] uint8, lexicographic."""


def listed_sets(n: int, m: int) -> Tensor:
    """[comb(m, n), n] kept sets in the order in which ``lists`` number them."""
    return _combinations(m, n) if n <= 2 else _kept_sets(n, m)


@lru_cache(maxsize=16)
def column_tables(n: int, m: int, num_columns: int, device: torch.device) -> ColumnTables:
    """Tables for a panel of n of m with ``num_columns`` columns; up to 500,000 entries, which 1 MB holds."""
    sets = _combinations(m, num_columns)
    derived, lists = _lists_of_few(n, m, num_columns) if n <= 2 else (_combinations(0, 3), _lists(n, m, sets))
    return ColumnTables(
        derived.to(torch.int16).t().contiguous().to(device),
        lists.to(torch.int16).to(device),
        sets.to(torch.uint8).to(device),
    )


def _combinations(count: int, size: int) -> Tensor:
    """[comb(count, size), size] subsets of range(count), lexicographic."""
    return torch.tensor(list(combinations(range(count), size)), dtype=torch.int64).view(-1, size)


def _lists(n: int, m: int, sets: Tensor) -> Tensor:
    """[comb(c, n), column sets] numbers of the kept sets inside each of ``sets`` [column sets, c]."""
    bits, order = (1 << _kept_sets(n, m)).sum(1).sort()
    inside = (1 << sets)[:, _combinations(sets.shape[1], n).t()].sum(1)  # [column sets, comb(c, n)]
    return order[torch.searchsorted(bits, inside)].t().contiguous()


def _kept_sets(n: int, m: int) -> Tensor:
    """[comb(m, n), n] kept sets of n > 2 in the order of the kernel (``obs_kernels/search.h``)."""
    sets = _combinations(m, n)
    first = sets < (4 if m <= 8 else 8)
    beyond = torch.where(first, 0, 1 << (m - sets)).sum(1)  # larger = lexicographically first
    key = (first.sum(1) << 32) - (beyond << 8) + torch.where(first, 1 << sets, 0).sum(1)
    return sets[key.argsort()]


def _lists_of_few(n: int, m: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """Derived entries [derived, 3] and lists for n = 1 or 2.

    The pairs of three columns or more are covered by triples: three entries instead of six for four columns.
    """
    entry = {kept: i for i, kept in enumerate(combinations(range(m), n))}
    triples: list[tuple[int, int, int]] = []
    if n == 2 and num_columns > 2:
        triples = list(combinations(range(m), 3))
        entry |= {triple: len(entry) + i for i, triple in enumerate(triples)}
    derived = [[entry[pair] for pair in combinations(triple, 2)] for triple in triples]
    cover = _cover(num_columns) if n == 2 else [(i,) for i in range(num_columns)]
    sets = combinations(range(m), num_columns)
    lists = [[entry[tuple(columns[i] for i in part)] for part in cover] for columns in sets]
    return torch.tensor(derived, dtype=torch.int64).view(-1, 3), torch.tensor(lists).t().contiguous()


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
