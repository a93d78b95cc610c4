# SPDX-License-Identifier: Apache-2.0
"""Batches of like length: every row once, the one that is not full last, also where processes share them."""

from __future__ import annotations

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard

from obs_kernels.training.length_batches import EpochRows, shuffled_batches


@pytest.mark.parametrize("count", [1, 15, 16, 1005, 1021])
def test_every_row_once_and_the_rest_last(count: int) -> None:
    lengths = torch.randint(1, 100, (count,), generator=torch.Generator().manual_seed(count))
    for epoch in range(5):
        batches = shuffled_batches(lengths, torch.arange(count), 16, seed=3, epoch=epoch)
        assert sorted(torch.cat(batches).tolist()) == list(range(count))
        assert [len(batch) == 16 for batch in batches[:-1]] == [True] * (len(batches) - 1)


def test_orders_differ_by_epoch_and_seed_and_come_again() -> None:
    lengths = torch.randint(1, 100, (64,), generator=torch.Generator().manual_seed(0))
    orders = {
        (seed, epoch): [
            batch.tolist() for batch in shuffled_batches(lengths, torch.arange(64), 8, seed=seed, epoch=epoch)
        ]
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len({str(order) for order in orders.values()}) == 4
    assert orders[0, 1] == [b.tolist() for b in shuffled_batches(lengths, torch.arange(64), 8, seed=0, epoch=1)]


@pytest.mark.parametrize("count", [1005, 1021])
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_lose_no_batch(count: int, processes: int) -> None:
    """A shard drops the round of a batch that is not full, unless it is the last."""
    rows = EpochRows(torch.randint(1, 100, (count,), generator=torch.Generator().manual_seed(1)), 16, seed=0)
    for epoch in range(5):
        rows.set_epoch(epoch)
        shards = [list(BatchSamplerShard(rows, processes, rank)) for rank in range(processes)]
        assert {len(shard) for shard in shards} == {-(-len(rows) // processes)}
        seen = {number - epoch * count for shard in shards for batch in shard for number in batch}
        assert seen == set(range(count))
