# SPDX-License-Identifier: Apache-2.0
"""Samples of like length batched together, in an order that is a function of seed and epoch; and padded batches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from obs_kernels.errors import ConfigError

_BATCHES_PER_BUCKET = 50


def longest_first(lengths: Tensor, rows: Tensor) -> Tensor:
    """``rows`` by their length in ``lengths`` [N], the longest first; equal ones keep their order."""
    return rows[lengths[rows].argsort(descending=True, stable=True)]


def shuffled_batches(lengths: Tensor, rows: Tensor, batch_size: int, *, seed: int, epoch: int) -> list[Tensor]:
    """``rows`` in batches of like length, in a random order that ``seed`` and ``epoch`` decide alone.

    A batch that is not full comes last: where processes share batches, Accelerate drops a round with one inside.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    rows = rows[torch.randperm(len(rows), generator=generator)]
    buckets = rows.split(batch_size * _BATCHES_PER_BUCKET)
    batches = [batch for bucket in buckets for batch in longest_first(lengths, bucket).split(batch_size)]
    order = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
    return sorted(order, key=lambda batch: len(batch) < batch_size)


class EpochRows:
    """Batch sampler for a ``DataLoader`` over ``RowNumbers``: numbers ``epoch * N + row``, batched by like length.

    The number carries its epoch, so that what is drawn for a sample (masked tokens) can depend on it alone, and a
    resumed run draws the same.
    """

    def __init__(self, lengths: Tensor, batch_size: int, *, seed: int) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}; try 16")
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.drop_last = False
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of batches; the last may be smaller."""
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        """Numbers of each batch of the epoch."""
        count = len(self.lengths)
        rows = torch.arange(count)
        for batch in shuffled_batches(self.lengths, rows, self.batch_size, seed=self.seed, epoch=self.epoch):
            yield (batch + self.epoch * count).tolist()


class RowNumbers:
    """A data set whose samples are their numbers; the collation makes the batch of them."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        """Return the number of samples of an epoch."""
        return self.count

    def __getitem__(self, number: int) -> int:
        """The number, which ``EpochRows`` made."""
        return number


def padded_inputs(
    input_ids: Tensor, token_type_ids: Tensor | None, lengths: Tensor, rows: Tensor, *, pad_to_multiple_of: int = 8
) -> dict[str, Tensor]:
    """``rows`` [B] of padded token tables [N, L] as int64 inputs [B, T] of a model, T that of the longest of them."""
    taken = lengths[rows]
    width = min(-(-int(taken.max()) // pad_to_multiple_of) * pad_to_multiple_of, input_ids.shape[1])
    batch = {
        "input_ids": input_ids[rows, :width].long(),
        "attention_mask": (torch.arange(width) < taken[:, None]).long(),
    }
    if token_type_ids is not None:
        batch["token_type_ids"] = token_type_ids[rows, :width].long()
    return batch
