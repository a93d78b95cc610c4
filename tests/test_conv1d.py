# SPDX-License-Identifier: Apache-2.0
"""GPT-2's Conv1D stores its weight inputs first; it is pruned as the Linear that computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import obs_kernels as obs

transformers = pytest.importorskip("transformers")
from transformers.pytorch_utils import Conv1D  # noqa: E402


class Linears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(x).tanh())
        return y


class Convs(Linears):
    """The same function, weights transposed, called by name."""

    def __init__(self, other: Linears) -> None:
        super().__init__()
        self.up, self.down = Conv1D(16, 8), Conv1D(8, 16)  # type: ignore[assignment]
        with torch.no_grad():
            for name in ("up", "down"):
                mine, theirs = getattr(self, name), getattr(other, name)
                mine.weight.copy_(theirs.weight.T)
                mine.bias.copy_(theirs.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(x=self.up(x=x).tanh())
        return y


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().sum((1, 2))


@pytest.fixture
def pair() -> tuple[Linears, Convs]:
    torch.manual_seed(3)
    linears = Linears()
    return linears, Convs(linears)


@pytest.fixture
def batches(gen: torch.Generator) -> list[Tensor]:
    return [torch.randn(4, 3, 8, generator=gen) for _ in range(3)]


def config(target: str, pattern: str, **changes: Any) -> obs.OBSConfig:
    return obs.OBSConfig(pattern=pattern, num_grads=12, targets=(target,), **{"curvature": "block"} | changes)


@pytest.mark.parametrize(
    ("pattern", "changes"),
    [
        ("2:4", {}),
        ("2:4", {"gradients": "batch"}),
        ("4:2:8", {"fisher_block_size": 8}),
        ("2:4", {"curvature": "row"}),
        ("4:2:8", {"curvature": "row", "sequential": True}),
        ("2:4", {"curvature": "layer"}),
        ("unstructured:0.5", {"global_sparsity": True, "fisher_block_size": 8}),
        ("2:8", {"recomputations": 2}),
        ("2:4", {"method": "magnitude", "update": "none"}),
    ],
)
def test_as_the_linear_that_computes_the_same(
    pair: tuple[Linears, Convs], batches: list[Tensor], pattern: str, changes: dict[str, Any]
) -> None:
    linears, convs = pair
    torch.testing.assert_close(convs(batches[0]), linears(batches[0]))
    wanted = obs.sparsify_(linears, config("Linear", pattern, **changes), batches, loss_fn)
    found = obs.sparsify_(convs, config("Conv1D", pattern, **changes), batches, loss_fn)
    for name in ("up", "down"):
        ours = getattr(convs, name).weight
        assert ours.shape == getattr(linears, name).weight.T.shape
        assert torch.equal(ours != 0, getattr(linears, name).weight.T != 0)
        torch.testing.assert_close(ours, getattr(linears, name).weight.T, rtol=1e-4, atol=1e-6)
    assert [layer.shape for layer in found.layers] == [layer.shape for layer in wanted.layers] == [(16, 8), (8, 16)]
    assert found.saliency == pytest.approx(wanted.saliency, rel=1e-4, nan_ok=True)


def test_own_loop_and_masks(pair: tuple[Linears, Convs], batches: list[Tensor]) -> None:
    """``accumulate`` reads the gradient as it is stored; masks hold after a step; the state goes round."""
    _, convs = pair
    pruner = obs.OBSPruner(convs, config("Conv1D", "2:4"))
    assert [row.shape for row in pruner.plan().layers] == [(16, 8), (8, 16)]
    loss_fn(convs, batches[0]).mean().backward()
    pruner.accumulate()
    grad = convs.up.weight.grad
    assert grad is not None
    block = grad.T.reshape(-1, 4)[0]
    torch.testing.assert_close(pruner.fishers()["up.weight"][0], torch.outer(block, block))
    other = obs.OBSPruner(convs, config("Conv1D", "2:4"))
    other.load_state_dict(pruner.state_dict())
    pruner.prune()
    with torch.no_grad():
        convs.up.weight.add_(0.1)
    assert pruner.verify() > 0
    pruner.apply_masks()
    assert pruner.verify() == 0 and int((convs.up.weight == 0).sum()) == 64
    pruner.finalize()


def test_packing_and_back(pair: tuple[Linears, Convs], batches: list[Tensor]) -> None:
    class Both(nn.Module):
        def __init__(self, linears: Linears, convs: Convs) -> None:
            super().__init__()
            self.linears, self.convs = linears, convs

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.convs(self.linears(x))
            return y

    model = Both(*pair)
    cfg = obs.OBSConfig(pattern="2:4", num_grads=12, targets=("Linear", "Conv1D"), curvature="block")
    obs.sparsify_(model, cfg, batches, loss_fn)
    before, state = model(batches[0]), {k: v.clone() for k, v in model.state_dict().items()}
    names = ["linears.up", "linears.down", "convs.up", "convs.down"]
    assert obs.compress_(model) == dict.fromkeys(names, "2:4")
    assert isinstance(model.convs.up, obs.SparseLinear)
    torch.testing.assert_close(model(batches[0]), before)
    assert obs.decompress_(model) == names
    assert type(model.convs.up) is Conv1D and model.convs.up.nf == 16
    after = model.state_dict()
    assert set(after) == set(state) and all(torch.equal(after[k], state[k]) for k in state)
    torch.testing.assert_close(model(batches[0]), before)


def test_a_packed_gpt2_goes_to_disk_and_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    cfg = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(cfg).eval()
    settings = obs.OBSConfig(pattern="2:8", targets=("Conv1D",), method="magnitude", update="none", curvature="block")
    obs.sparsify_(model, settings, None, None)
    ids = torch.randint(0, 40, (2, 6))
    with torch.no_grad():
        dense = model(ids).logits
        assert len(obs.compress_(model, fuse_ffn="token").fused) == 2
        wanted = model(ids).logits
        torch.testing.assert_close(wanted, dense, rtol=1e-4, atol=1e-5)
        path = obs.save_pretrained(model, tmp_path / "out")
        for found in (obs.load(path), transformers.AutoModelForCausalLM.from_pretrained(path)):
            torch.testing.assert_close(found(ids).logits, dense, rtol=1e-4, atol=1e-5)
            assert found.lm_head.weight is found.transformer.wte.weight
        plain = obs.save_pretrained(model, tmp_path / "dense", save_dense=True)
        found = transformers.AutoModelForCausalLM.from_pretrained(plain)
        torch.testing.assert_close(found(ids).logits, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("curvature", ["block", "row"])
def test_a_language_model(curvature: str) -> None:
    """A GPT-2 of two layers by its own loss: no labels from outside, and the tied head stays as it is."""
    torch.manual_seed(0)
    cfg = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(cfg).eval()
    ids = torch.randint(0, 40, (8, 12))

    def lm_loss(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = net(**batch).logits[:, :-1].float()
        return nn.functional.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none").mean(1)

    head = model.lm_head.weight.detach().clone()
    settings = obs.OBSConfig(pattern="2:4", num_grads=8, targets=("Conv1D",), curvature=curvature)
    report = obs.sparsify_(model, settings, [{"input_ids": part} for part in ids.split(4)], lm_loss)
    assert len(report.layers) == 8 and report.sparsity == pytest.approx(0.5)
    assert torch.equal(model.lm_head.weight, head)
    weight = model.transformer.h[0].mlp.c_fc.weight  # [in, out]
    assert ((weight.T.reshape(-1, 4) != 0).sum(1) == 2).all()
