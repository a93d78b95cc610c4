# SPDX-License-Identifier: Apache-2.0
"""A BERT encoder with random weights, its batches and its loss: what whole runs are timed on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import cast

import torch
from torch import Tensor, nn

from obs_kernels.inference import encoders


@dataclass(frozen=True)
class Encoder(encoders.Encoder):
    """Sizes of a BERT encoder, and tokens of a sample."""

    tokens: int = 384

    @property
    def weights(self) -> int:
        """Pruned weights: query, key, value, output, and the two of the feed-forward part."""
        return self.layers * (4 * self.hidden**2 + 2 * self.hidden * self.ffn)


SHAPES = {"bert-base": Encoder(**asdict(encoders.SHAPES["bert-base"]))}
CPU_ENCODER = Encoder(layers=2, hidden=64, ffn=256, heads=4, tokens=32, vocab=100)


def build(encoder: Encoder, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The model in eval mode."""
    from transformers import BertConfig, BertForQuestionAnswering

    config = BertConfig(
        vocab_size=encoder.vocab,
        hidden_size=encoder.hidden,
        num_hidden_layers=encoder.layers,
        num_attention_heads=encoder.heads,
        intermediate_size=encoder.ffn,
        max_position_embeddings=max(encoder.positions, encoder.tokens),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForQuestionAnswering(config)
    model.set_attn_implementation("sdpa")
    return cast(nn.Module, model).to(device, dtype).eval()


def make_batches(encoder: Encoder, count: int, batch: int) -> list[dict[str, Tensor]]:
    """Batches on the host; no attention mask: with one, transformers asks the device whether anything is masked."""
    gen = torch.Generator().manual_seed(1)
    tokens, vocab = encoder.tokens, encoder.vocab
    batches = []
    for start in range(0, count, batch):
        size = min(batch, count - start)
        batches.append(
            {
                "input_ids": torch.randint(vocab, (size, tokens), generator=gen),
                "start_positions": torch.randint(tokens, (size,), generator=gen),
                "end_positions": torch.randint(tokens, (size,), generator=gen),
            }
        )
    return batches


def squad_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """[B]: mean of the cross-entropies of first and last answer token."""
    out = model(input_ids=batch["input_ids"])
    start, end = (
        nn.functional.cross_entropy(logits.float(), batch[key], reduction="none")
        for logits, key in ((out.start_logits, "start_positions"), (out.end_logits, "end_positions"))
    )
    return (start + end) / 2


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, until the device is done."""
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if gpu:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
