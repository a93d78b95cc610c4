# SPDX-License-Identifier: Apache-2.0
"""Text for language models: blocks, losses, perplexity; and the bench that prunes one."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench import wikitext
from obs_kernels.errors import ConfigError
from obs_kernels.training.language import TextBlocks, causal_lm_loss, perplexity, read_text, train_tokenizer


class Fixed(nn.Module):
    """Gives every next token the same logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids: Tensor) -> object:
        class Output:
            logits = self.logits.expand(*input_ids.shape, -1)

        return Output()


def test_blocks_leave_the_rest_out() -> None:
    blocks = TextBlocks(torch.arange(23), 5, 3)
    found = [batch["input_ids"] for batch in blocks]
    assert len(blocks) == 2 and [len(part) for part in found] == [3, 1]
    assert torch.equal(torch.cat(found).flatten(), torch.arange(20))
    assert torch.equal(next(iter(blocks))["input_ids"], found[0]), "as often as wanted"


def test_drawn_blocks_are_the_same_every_time() -> None:
    one, two, other = (
        torch.cat([b["input_ids"] for b in TextBlocks(torch.arange(100), 5, 4, count=7, seed=seed)])
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert one.shape == (7, 5) and len(set(one[:, 0].tolist())) == 7


def test_too_little_text() -> None:
    with pytest.raises(ConfigError, match="at least 8 tokens, one block, got 3; lower length"):
        TextBlocks(torch.arange(3), 8, 1)


def test_losses_are_those_of_the_next_token() -> None:
    model = Fixed(torch.tensor([0.0, math.log(3.0)]))  # probabilities 1/4 and 3/4
    loss = causal_lm_loss(model, {"input_ids": torch.tensor([[0, 1, 1], [1, 0, 1]])})
    quarter, most = -math.log(0.25), -math.log(0.75)
    assert loss.tolist() == pytest.approx([most, (quarter + most) / 2])


def test_perplexity_is_over_tokens_and_leaves_the_mode() -> None:
    model = Fixed(torch.zeros(4)).train()
    blocks = TextBlocks(torch.randint(0, 4, (64,)), 8, 3)
    assert perplexity(model, blocks) == pytest.approx(4.0)
    assert model.training


def test_texts_and_tokens(tmp_path: Path) -> None:
    text = "the cat sat on the mat\nthe cat sat\n" * 20
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    assert read_text(tmp_path / "a.txt") == read_text(tmp_path / "a.txt.gz") == text
    tokenizer = train_tokenizer(text, 300)
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text and max(ids) < 300 and len(ids) < len(text)


def test_bench_of_a_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole run on made text: every cell, and a second call measures nothing again."""
    pytest.importorskip("transformers")
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    gen = torch.Generator().manual_seed(0)
    picks = torch.randint(0, 8, (3000,), generator=gen).tolist()
    (tmp_path / "text.txt").write_text(" ".join(words[i] for i in picks))
    options = ["--train", str(tmp_path / "text.txt"), "--test", str(tmp_path / "text.txt"), "--work", str(tmp_path)]
    options += ["--layers", "1", "--width", "64", "--vocab", "300", "--length", "16", "--steps", "3", "--device", "cpu"]
    options += ["--num-grads", "8", "--batch-size", "4", "--patterns", "2:4,64:2:8"]
    options += ["--json", str(tmp_path / "wikitext.json"), "--commit", "abc"]
    assert wikitext.main(options) == 0
    table = capsys.readouterr().out
    stored = json.loads((tmp_path / "wikitext.json").read_text())
    assert set(stored["cells"]) == {
        f"{pattern}/{name}"
        for pattern in ("2:4", "64:2:8")
        for name in wikitext.METHODS
        if (pattern, name) != ("64:2:8", "SparseGPT")
    }
    assert (
        stored["cells"]["2:4/row"]["sparsity"] == pytest.approx(0.5) and stored["cells"]["2:4/row"]["commit"] == "abc"
    )
    assert all(math.isfinite(cell["perplexity"]) for cell in stored["cells"].values())
    assert "| 64:2:8 |" in table and " - |" in table and (tmp_path / "wikitext.md").read_text() in table + "\n"
    stored["cells"]["2:4/row"]["perplexity"] = 1.0
    (tmp_path / "wikitext.json").write_text(json.dumps(stored))
    assert wikitext.main(options) == 0
    assert "**1.00**" in capsys.readouterr().out
