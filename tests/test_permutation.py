# SPDX-License-Identifier: Apache-2.0
"""The study of the order of columns: the same function, a better score, columns that stay where they may."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench.permutation import best_order, reorder_channels_
from obs_kernels import OBSConfig
from obs_kernels.patterns import VNMPattern, parse_pattern


def test_order_finds_what_was_shuffled(gen: torch.Generator) -> None:
    """Two good columns a group, shuffled so that some groups hold four: exchanges spread them again."""
    pattern = parse_pattern("4:2:8")
    assert isinstance(pattern, VNMPattern)
    scores = torch.full((8, 32), 0.01)
    scores[:, :8] = 1.0  # all good ones in the first group: 2 of 8 are kept there
    order = best_order(scores, pattern, 32, rounds=60)
    assert sorted(order.tolist()) == list(range(32))
    good = (order < 8).view(4, 8).sum(1)
    assert good.tolist() == [2, 2, 2, 2]


def test_columns_stay_in_their_span(gen: torch.Generator) -> None:
    """Heads do not mix."""
    pattern = parse_pattern("4:2:8")
    assert isinstance(pattern, VNMPattern)
    order = best_order(torch.rand(8, 64, generator=gen), pattern, 16, rounds=20)
    assert torch.equal(order.view(4, 16).sort(1).values, torch.arange(64).view(4, 16))


def test_model_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reordered BERT gives the logits of the one it was made of, and its weights are others."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    model = transformers.BertForQuestionAnswering(config).eval()
    ids = torch.randint(0, 50, (4, 12))

    def loss(found: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return found(**batch).start_logits.float().square().mean()

    monkeypatch.setattr("bench.permutation.squad_loss", loss)
    before, weight = model(input_ids=ids).start_logits, model.bert.encoder.layer[0].output.dense.weight.clone()
    base = OBSConfig(pattern="4:2:8", num_grads=4, fisher_block_size=8, curvature="block")
    gained = reorder_channels_(model, "4:2:8", [{"input_ids": ids}], base, rounds=10)
    assert gained["kept score"] > 1
    assert not torch.equal(model.bert.encoder.layer[0].output.dense.weight, weight)
    torch.testing.assert_close(model(input_ids=ids).start_logits, before, rtol=1e-4, atol=1e-5)
