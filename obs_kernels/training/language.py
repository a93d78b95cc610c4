# SPDX-License-Identifier: Apache-2.0
"""Plain text for a causal language model: blocks of tokens, the model's own loss, perplexity. No labels are needed."""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from obs_kernels.errors import ConfigError
from obs_kernels.pruning.output_probe import output_probe

Batch = dict[str, Tensor]


class TextBlocks:
    """Batches {"input_ids": [B, length]} of consecutive tokens, as often as wanted.

    What does not fill a block at the end is left out. With ``seed`` and ``count`` some blocks are drawn without
    replacement, the same ones every time.
    """

    def __init__(self, ids: Tensor, length: int, batch_size: int, *, count: int | None = None, seed: int = 0) -> None:
        """Take the tokens ``ids`` [N] int64."""
        blocks = ids[: ids.numel() // length * length].view(-1, length)
        if len(blocks) == 0:
            raise ConfigError(f"ids must hold at least {length} tokens, one block, got {ids.numel()}; lower length")
        if count is not None:
            order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
            blocks = blocks[order[:count]]
        self.blocks, self.batch_size = blocks, batch_size

    def __len__(self) -> int:
        """Return the number of batches; the last may be smaller."""
        return -(-len(self.blocks) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Batches in the order of the text, or as drawn."""
        for part in self.blocks.split(self.batch_size):
            yield {"input_ids": part}


def read_text(path: str | Path) -> str:
    """A text file, gzipped if it is called so."""
    path = Path(path)
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")


def train_tokenizer(text: str, vocab_size: int) -> Any:
    """A byte-level BPE tokenizer (``tokenizers``) made from ``text``; every text has tokens under it."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(text.splitlines(keepends=True), vocab_size=vocab_size, show_progress=False)
    return tokenizer


def causal_lm_loss(model: nn.Module, batch: Batch) -> Tensor:
    """[B]: mean loss of each block's next tokens, f32; what ``OBSPruner.collect`` takes as ``loss_fn``."""
    return token_losses(model, batch).mean(1)


def causal_lm_output_loss(model: nn.Module, batch: Batch) -> Tensor:
    """[B]: stand-in losses that carry the curvature of the model's own next tokens (``obs_kernels.output_probe``)."""
    return output_probe(model(input_ids=batch["input_ids"]).logits[:, :-1])


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """[B, T - 1]: loss of every next token in nats, f32."""
    ids = batch["input_ids"]
    logits: Tensor = model(input_ids=ids).logits[:, :-1].float()
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


@torch.no_grad()
def perplexity(model: nn.Module, blocks: TextBlocks) -> float:
    """exp of the mean loss a token over all blocks, each read on its own; the model in eval mode, and back after."""
    was_training = model.training
    device = next(model.parameters()).device
    total, count = 0.0, 0
    model.eval()
    try:
        for batch in blocks:
            losses = token_losses(model, {"input_ids": batch["input_ids"].to(device)})
            total += float(losses.sum(dtype=torch.float64))
            count += losses.numel()
    finally:
        model.train(was_training)
    return math.exp(total / count)
