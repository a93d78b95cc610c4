# SPDX-License-Identifier: Apache-2.0
"""Layer by layer on kept activations of one block gives what running the whole model gives, or gives way to it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import obs_kernels as obs
from obs_kernels.pruning import block_chain, layerwise
from obs_kernels.pruning.block_chain import find_chains

Batch = dict[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]


class Block(nn.Module):
    """A residual block that counts its runs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.runs = nn.Linear(8, 16), nn.Linear(16, 8), 0

    def forward(self, hidden_states: Tensor, extra: Tensor | None = None) -> tuple[Tensor]:
        self.runs += 1
        change = self.down(self.up(hidden_states).relu())
        if extra is not None:
            change = change + extra
        return (hidden_states + change,)


class Stack(nn.Module):
    """Blocks in a row. ``skip``: the last one is also given what the first one gave."""

    def __init__(self, *, skip: bool = False, by_name: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.skip, self.by_name = skip, by_name

    @property
    def runs(self) -> list[int]:
        return [block.runs for block in self.blocks]  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        given: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            extra = given[0] if self.skip and i == 2 else None
            (x,) = block(hidden_states=x, extra=extra) if self.by_name else block(x, extra)
            given.append(x)
        return x


def stack_loss(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch["x"]) - batch["y"]).square().sum((1, 2))


@pytest.fixture
def batches(gen: torch.Generator) -> list[Batch]:
    return [{k: torch.randn(4, 5, 8, generator=gen) for k in ("x", "y")} for _ in range(3)]


def prune_both(
    model: nn.Module, cfg: obs.OBSConfig, batches: list[Batch], loss: Loss, monkeypatch: pytest.MonkeyPatch
) -> tuple[nn.Module, nn.Module]:
    """The model pruned with chains, and without any."""
    with_chains, without = copy.deepcopy(model), copy.deepcopy(model)
    obs.sparsify_(with_chains, cfg, batches, loss)
    monkeypatch.setattr(layerwise, "find_chains", lambda *_: [])
    obs.sparsify_(without, cfg, batches, loss)
    monkeypatch.undo()
    return with_chains, without


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    for (name, one), other in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(one, other), name


def config(**changes: Any) -> obs.OBSConfig:
    return obs.OBSConfig(pattern="2:4", curvature="row", sequential=True, num_grads=12, **changes)


@pytest.mark.parametrize("options", [{}, {"by_name": True}])
def test_the_same_as_the_whole_model(
    options: dict[str, bool], batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Stack(**options)
    assert_equal(*prune_both(model, config(), batches, stack_loss, monkeypatch))


def test_only_the_block_in_hand_runs(batches: list[Batch], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    kept, whole = prune_both(Stack(), config(), batches, stack_loss, monkeypatch)
    assert isinstance(kept, Stack) and isinstance(whole, Stack)
    assert kept.runs[0] < whole.runs[0] - 6


def test_a_block_that_needs_more_than_the_last_hidden_state(
    batches: list[Batch], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What the last block is given of the first was kept before the first was pruned: the whole model must run."""
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING, logger="obs_kernels"):
        pair = prune_both(Stack(skip=True), config(), batches, stack_loss, monkeypatch)
    assert_equal(*pair)
    assert "whole model runs" in caplog.text


def test_activations_that_do_not_fit(
    batches: list[Batch], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = Stack()
    one, other = copy.deepcopy(model), copy.deepcopy(model)
    obs.sparsify_(one, config(), batches, stack_loss)
    monkeypatch.setattr(block_chain, "free_bytes", lambda _: 100)
    with caplog.at_level(logging.INFO, logger="obs_kernels"):
        obs.sparsify_(other, config(), batches, stack_loss)
    assert_equal(one, other)
    assert "computed anew" in caplog.text and one.runs[0] < other.runs[0]


def test_what_is_a_chain(batches: list[Batch]) -> None:
    """Blocks in a list, each called once, on what the one before gave; the outermost list where lists nest."""

    class Twice(Stack):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(x))

    class Apart(Stack):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = sum(block(x)[0] for block in self.blocks)  # type: ignore[assignment]
            return y

    x = batches[0]["x"]
    for model, count in ((Stack(), 1), (Twice(), 0), (Apart(), 0)):
        layers = obs.OBSPruner(model, config()).layers
        chains = find_chains(model, layers, lambda model=model: model(x))
        assert len(chains) == count
        if chains:
            assert chains[0].blocks == list(model.blocks) and chains[0].bytes_per_batch == x.nbytes
            assert [chains[0].place_of([layer]) for layer in layers] == [0, 0, 1, 1, 2, 2]
            assert chains[0].place_of([layers[0], layers[2]]) is None


class Ends(nn.Module):
    """A layer before the blocks and one after; ``outside``: the sum with the stream is made around the block."""

    def __init__(self, blocks: list[nn.Module], *, outside: bool = False) -> None:
        super().__init__()
        self.first, self.blocks, self.last = nn.Linear(8, 8), nn.ModuleList(blocks), nn.Linear(8, 8)
        self.outside = outside

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        for block in self.blocks:
            given = block(x)
            x = x + given if self.outside else given[0]
        y: Tensor = self.last(x)
        return y


def _plain() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("ignore", [(), ("re:blocks.1.*",)])
def test_a_stage_starts_anew(
    count: int, ignore: tuple[str, ...], batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept of one stage is not of the next, also where only one block is pruned."""
    torch.manual_seed(0)
    model = Ends([Block() for _ in range(count)])
    cfg = config(recomputations=2, ignore=ignore)
    assert_equal(*prune_both(model, cfg, batches, stack_loss, monkeypatch))


@pytest.mark.parametrize("count", [1, 3])
def test_a_sum_outside_of_the_blocks(count: int, batches: list[Batch], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Ends([_plain() for _ in range(count)], outside=True)
    assert_equal(*prune_both(model, config(), batches, stack_loss, monkeypatch))


def test_a_sum_of_what_a_chain_gives(batches: list[Batch], monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks follow each other, and the last one's output goes into a sum that no block shows."""

    class Around(Ends):
        def forward(self, x: Tensor) -> Tensor:
            y = x = self.first(x).tanh()
            for block in self.blocks:
                y = block(y)
            z: Tensor = self.last(x + y)
            return z

    torch.manual_seed(0)
    model = Around([_plain() for _ in range(2)])
    assert_equal(*prune_both(model, config(), batches, stack_loss, monkeypatch))


def test_a_part_that_blocks_share(batches: list[Batch], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    blocks = [Block() for _ in range(3)]
    blocks[2].up, blocks[2].down = blocks[0].up, blocks[0].down
    kept, whole = prune_both(Ends(list(blocks)), config(), batches, stack_loss, monkeypatch)
    assert_equal(kept, whole)


def test_masks_of_minus_infinity_are_compared() -> None:
    inf = -torch.inf
    assert not block_chain._is_near(torch.tensor([0.0, inf]), torch.tensor([5.0, 5.0]))
    assert not block_chain._is_near(torch.tensor([1.0, inf]), torch.tensor([5.0, inf]))
    assert block_chain._is_near(torch.tensor([1.0, inf]), torch.tensor([1.0001, inf]))


def _bert() -> tuple[nn.Module, dict[str, Any], Loss]:
    from transformers import BertConfig, BertForQuestionAnswering

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForQuestionAnswering(BertConfig(vocab_size=50, max_position_embeddings=16, **sizes))

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        out, padding = model(**batch), batch["attention_mask"] == 0
        start = obs.output_probe(out.start_logits, padding=padding)
        return start + obs.output_probe(out.end_logits, padding=padding)

    return model, {}, loss


def _gpt2() -> tuple[nn.Module, dict[str, Any], Loss]:
    from transformers import GPT2Config, GPT2LMHeadModel

    ids = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, **ids))
    assert model.config.use_cache  # each call of a block would add to its keys and values
    return model, {"targets": ("Conv1D",)}, lambda m, b: obs.output_probe(m(input_ids=b["input_ids"]).logits)


def _t5() -> tuple[nn.Module, dict[str, Any], Loss]:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=50, decoder_start_token_id=0, **sizes))
    return (
        model,
        {"ignore": ("lm_head",)},
        lambda m, b: obs.output_probe(m(**b, decoder_input_ids=b["input_ids"]).logits),
    )


@pytest.mark.parametrize(("make", "chains"), [(_bert, 1), (_gpt2, 1), (_t5, 2)])
def test_models_of_transformers(
    make: Callable[[], tuple[nn.Module, dict[str, Any], Loss]],
    chains: int,
    gen: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Encoder, decoder with a cache of keys and values, encoder and decoder; padded; found as chains, and equal."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, options, loss = make()
    model.eval()
    mask = torch.ones(4, 12, dtype=torch.int64)
    mask[1, 8:] = 0
    batches = [{"input_ids": torch.randint(50, (4, 12), generator=gen), "attention_mask": mask} for _ in range(3)]
    layers = obs.OBSPruner(model, config(**options)).layers
    assert len(find_chains(model, layers, lambda: loss(model, batches[0]))) == chains
    assert_equal(*prune_both(model, config(**options), batches, loss, monkeypatch))
