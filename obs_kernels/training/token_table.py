# SPDX-License-Identifier: Apache-2.0
"""Tokenised samples of any task but SQuAD, as padded tables, and the walk over them in eval mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from obs_kernels.errors import ConfigError
from obs_kernels.pruning.modes import eval_mode
from obs_kernels.training.length_batches import longest_first, padded_inputs
from obs_kernels.training.squad_batches import model_inputs


@dataclass(frozen=True, eq=False)
class TokenTable:
    """N samples of at most L tokens; every tensor is on the CPU."""

    input_ids: Tensor
    """[N, L] int32, padded."""
    token_type_ids: Tensor | None
    """[N, L] uint8; None where all are 0."""
    lengths: Tensor
    """[N] int64."""

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.lengths)

    def inputs(self, rows: Tensor) -> dict[str, Tensor]:
        """Samples ``rows`` [B] as inputs of a model, int64, padded to the longest of them."""
        return padded_inputs(self.input_ids, self.token_type_ids, self.lengths, rows)


def make_table(ids: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None, pad_id: int) -> TokenTable:
    """A table of token lists."""
    lengths = torch.tensor([len(row) for row in ids])
    width = int(lengths.max())
    table = torch.full((len(ids), width), pad_id, dtype=torch.int32)
    kinds = None if types is None or not any(map(any, types)) else torch.zeros(len(ids), width, dtype=torch.uint8)
    for i, row in enumerate(ids):
        table[i, : len(row)] = torch.tensor(row, dtype=torch.int32)
        if kinds is not None and types is not None:
            kinds[i, : len(row)] = torch.tensor(types[i], dtype=torch.uint8)
    return TokenTable(table, kinds, lengths)


def require_fast(tokenizer: Any) -> None:
    """Refuse a slow tokenizer, as SQuAD's windows do."""
    if not getattr(tokenizer, "is_fast", False):
        kind = type(tokenizer).__name__
        raise ConfigError(f"tokenizer must be a fast one, got {kind}; use AutoTokenizer")


def eval_outputs(
    model: nn.Module, lengths: Tensor, batch_of: Callable[[Tensor], dict[str, Tensor]], batch_size: int
) -> Iterator[tuple[Tensor, dict[str, Tensor], Any]]:
    """(rows, batch, outputs) of each batch of samples of ``lengths`` [N], longest first; eval mode, no gradients."""
    rows = longest_first(lengths, torch.arange(len(lengths)))
    with eval_mode(model), torch.inference_mode():
        for part in rows.split(batch_size):
            batch = batch_of(part)
            yield part, batch, model(**model_inputs(model, batch))
