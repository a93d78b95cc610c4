# SPDX-License-Identifier: Apache-2.0
"""The fit of norms: what it restores, what it fits to by brute force in f64, and what stays as it was."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from test_layerwise import Problem
from torch import Tensor, nn

import obs_kernels as obs
from obs_kernels.errors import ConfigError, NonFiniteError, ResumeMismatchError
from obs_kernels.pruning.find_layers import find_layers, find_norms
from obs_kernels.pruning.gradual import gradual_step
from obs_kernels.pruning.layer import Norm
from obs_kernels.pruning.layerwise import Snapshot
from obs_kernels.pruning.norm_refit import NormRefit
from obs_kernels.pruning.report import NormReport

Batch = dict[str, Tensor]
SAMPLES = 38
"""Fewer than the loader gives: the last batch is cut."""
WIDTH = 8


class OnePlusRMSNorm(nn.Module):
    """Takes its weight as ``1 + w``, as Gemma's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6).to(x.dtype) * (1.0 + self.weight)


KINDS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "one plus": OnePlusRMSNorm}


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.norm = KINDS[kind](WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x + self.down(self.up(x).tanh()))
        return y


class Net(nn.Module):
    """Two blocks after a norm of their own; ``listed``, they run block by block."""

    def __init__(self, kind: str, *, listed: bool) -> None:
        super().__init__()
        self.first = nn.LayerNorm(WIDTH)
        self.blocks = nn.ModuleList(Block(kind) for _ in range(2)) if listed else nn.Module()
        if not listed:
            for i in range(2):
                self.blocks.add_module(str(i), Block(kind))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks.children():
            x = block(x)
        return x


def make(kind: str = "layer", *, listed: bool = True) -> Net:
    torch.manual_seed(3)
    net = Net(kind, listed=listed)
    for name, value in net.named_parameters():
        if "norm" in name or "first" in name:
            value.data += 0.3 * torch.randn(value.shape)
    return net


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return squares_of(model(batch["x"]).float(), batch)


def squares_of(output: Tensor, batch: Batch) -> Tensor:
    return ((output - batch["y"]).square() * batch["attention_mask"][..., None]).sum((1, 2))


@pytest.fixture
def batches(gen: torch.Generator) -> list[Batch]:
    found = []
    for _ in range(5):
        mask = torch.ones(8, 5, dtype=torch.int64)
        mask[1, 3:] = 0
        mask[4, :2] = 0
        x = torch.randn(8, 5, WIDTH, generator=gen) + torch.linspace(-1, 1, WIDTH)
        found.append({"x": x, "y": torch.randn(8, 5, WIDTH, generator=gen), "attention_mask": mask})
    return found


def config(pattern: str = "2:4", **changes: Any) -> obs.OBSConfig:
    changes = {"num_grads": SAMPLES, "sequential": True, "refit_norms": True, "curvature": "row"} | changes
    return obs.OBSConfig(pattern=pattern, **changes)


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def refit(net: nn.Module, dense: nn.Module, batches: list[Batch], **changes: Any) -> list[NormReport]:
    """Norms of ``net`` fitted to ``dense``; what the pruner does at the end without ``sequential``."""
    cfg = config(**changes)
    layers, norms = find_layers(net, cfg)[0], find_norms(net, cfg)
    now = state(net)
    net.load_state_dict(dense.state_dict())
    snapshot = Snapshot([*layers, *norms])
    net.load_state_dict(now)
    work = NormRefit(net, layers, norms, batches, loss_fn, cfg, snapshot)
    work.refit_before()
    return work.reports


def live(values: Tensor, batch: Batch, count: int) -> Tensor:
    return values[:count][batch["attention_mask"][:count].bool()]


def normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """[..., C] by the definition of each kind."""
    if isinstance(norm, nn.LayerNorm):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    eps = torch.finfo(torch.float32).eps if isinstance(norm, nn.RMSNorm) else 1e-6
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def fitted(dense: Net, net: Net, place: int, batches: list[Batch]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the norm of block ``place`` by least squares in f64; what is before it as in ``net``."""
    dense, net = copy.deepcopy(dense).double(), copy.deepcopy(net).double()
    norm = list(net.blocks.children())[place].norm
    inputs, aims, left = [], [], SAMPLES
    for batch in batches:
        count = min(left, 8)
        left -= count
        streams = []
        for model in (dense, net):
            x = model.first(batch["x"].double())
            for block in list(model.blocks.children())[:place]:
                x = block(x)
            block = list(model.blocks.children())[place]
            streams.append(x + block.down(block.up(x).tanh()))
        aims.append(live(list(dense.blocks.children())[place].norm(streams[0]), batch, count))
        inputs.append(live(normalised(norm, streams[1]), batch, count))
    n, y = torch.cat(inputs).detach(), torch.cat(aims).detach()
    free = getattr(norm, "bias", None) is not None
    weights, biases = [], []
    for c in range(WIDTH):
        columns = [n[:, c : c + 1], torch.ones(len(n), 1, dtype=torch.float64)][: 1 + free]
        found = torch.linalg.lstsq(torch.cat(columns, 1), y[:, c : c + 1]).solution[:, 0]
        weights.append(found[0] - (1.0 if isinstance(norm, OnePlusRMSNorm) else 0.0))
        biases.append(found[-1])
    return torch.stack(weights), torch.stack(biases) if free else None


@pytest.mark.parametrize("listed", [True, False], ids=["blocks", "whole"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_wrong_scales_are_restored(kind: str, listed: bool, batches: list[Batch]) -> None:
    dense = make(kind, listed=listed)
    net = copy.deepcopy(dense)
    blocks = list(net.blocks.children())
    with torch.no_grad():
        for block, factor in zip(blocks, (0.25, 3.0), strict=True):
            block.norm.weight.mul_(factor).add_(0.5)
            if kind == "layer":
                block.norm.bias.add_(torch.linspace(-2, 2, WIDTH))
    reports = refit(net, dense, batches)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, dense.state_dict()[name], rtol=2e-4, atol=2e-5)
    assert [(r.name, r.refit) for r in reports] == [
        ("first", False),
        ("blocks.0.norm", True),
        ("blocks.1.norm", True),
    ]
    for report in reports[1:]:
        assert report.error_before > 0.1 and report.error_after < 1e-8


@pytest.mark.parametrize("listed", [True, False], ids=["blocks", "whole"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_fit_is_that_of_least_squares(kind: str, listed: bool, batches: list[Batch]) -> None:
    dense = make(kind, listed=listed)
    net = copy.deepcopy(dense)
    report = obs.sparsify_(net, config(), batches, loss_fn)
    for place, block in enumerate(net.blocks.children()):
        weight, bias = fitted(dense, net, place, batches)
        torch.testing.assert_close(block.norm.weight.double(), weight, rtol=1e-4, atol=1e-4)
        if bias is not None:
            torch.testing.assert_close(block.norm.bias.double(), bias, rtol=1e-4, atol=1e-4)
    assert [n.name for n in report.norms] == ["first", "blocks.0.norm", "blocks.1.norm"]
    assert all(n.error_after < n.error_before for n in report.norms[1:])
    assert torch.equal(net.first.weight, dense.first.weight) and not report.norms[0].refit


@pytest.mark.parametrize("curvature", ["row", "block"])
def test_outputs_come_nearer(curvature: str, batches: list[Batch]) -> None:
    """Of the same pruned model; the mean square of the last norm's error is what falls."""
    dense = make()
    found = {}
    for refit_norms in (False, True):
        net = copy.deepcopy(dense)
        cfg = config("2:8", curvature=curvature, sequential=curvature == "row", refit_norms=refit_norms)
        report = obs.sparsify_(net, cfg, batches, loss_fn)
        assert bool(report.norms) == refit_norms
        left, found[refit_norms] = SAMPLES, 0.0
        for batch in batches:
            count = min(left, 8)
            left -= count
            error = (net(batch["x"]) - dense(batch["x"])).square()
            found[refit_norms] += float(live(error, batch, count).sum().detach())
    assert found[True] < found[False]
    assert report.norms[-1].error_after < report.norms[-1].error_before


def test_reported_errors_are_those_of_the_outputs(batches: list[Batch]) -> None:
    dense = make()
    net = copy.deepcopy(dense)
    report = obs.sparsify_(net, config("2:8"), batches, loss_fn)
    left, outputs = SAMPLES, []
    for batch in batches:
        count = min(left, 8)
        left -= count
        outputs.append([live(model(batch["x"]).double(), batch, count).detach() for model in (dense, net)])
    aim, got = (torch.cat(part) for part in zip(*outputs, strict=True))
    share = (got - aim).square().sum() / (aim - aim.mean(0)).square().sum()
    assert report.norms[-1].error_after == pytest.approx(float(share), rel=1e-4)


def test_a_dead_channel_stays(batches: list[Batch]) -> None:
    """A channel that is 0 in every token says nothing of its weight."""
    dense = make("rms")
    with torch.no_grad():
        for block in dense.blocks:
            block.down.weight[2], block.down.bias[2], block.norm.weight[2] = 0.0, 0.0, 0.7
        dense.first.weight[2] = dense.first.bias[2] = 0.0
    net = copy.deepcopy(dense)
    obs.sparsify_(net, config("2:8"), batches, loss_fn)
    for block in net.blocks:
        assert float(block.norm.weight.detach()[2]) == pytest.approx(0.7, abs=1e-7)
        assert float((block.norm.weight - dense.blocks[0].norm.weight).detach().abs().max()) > 1e-3


def test_ignored_and_shared_norms_stay(batches: list[Batch]) -> None:
    dense = make()
    dense.blocks[1].norm.weight = dense.first.weight
    net = copy.deepcopy(dense)
    before = state(net)
    with pytest.raises(ConfigError, match=r"refit_norms needs normalisation layers.*got none in Net"):
        obs.OBSPruner(net, config(ignore=("blocks.0.norm",)))
    report = obs.sparsify_(net, config("2:8"), batches, loss_fn)
    assert [n.name for n in report.norms] == ["blocks.0.norm"]
    assert torch.equal(net.blocks[1].norm.weight, before["first.weight"])
    assert torch.equal(net.blocks[1].norm.bias, before["blocks.1.norm.bias"])


def test_half_precision(batches: list[Batch]) -> None:
    dense = make().bfloat16()
    net = copy.deepcopy(dense)
    low = [batch | {"x": batch["x"].bfloat16()} for batch in batches]
    report = obs.sparsify_(net, config("2:8"), low, loss_fn)
    assert all(value.dtype == torch.bfloat16 for value in net.parameters())
    assert all(n.error_after < n.error_before for n in report.norms[1:])


class WrongRMSNorm(nn.Module):
    """Called a norm, but its weight is no factor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((WIDTH,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.exp()


def test_another_function_is_refused(batches: list[Batch]) -> None:
    net = make()
    net.blocks[1].norm = WrongRMSNorm()
    with pytest.raises(ConfigError, match=r"blocks\.1\.norm: refit_norms takes norms.*got another function in Wrong"):
        obs.sparsify_(net, config(), batches, loss_fn)


class NormedProblem(Problem):
    """What ``blocks.1.up`` is fitted to: on the outputs of the norm before it, as it is in the end."""

    def __init__(self, dense: Net, pruned: Net, batches: list[Batch]) -> None:
        dense, pruned = copy.deepcopy(dense).double(), copy.deepcopy(pruned).double()
        (first, second), (start, _) = dense.blocks.children(), pruned.blocks.children()
        self.dense = second.up
        inputs, wanted, squares, left = [], [], [], SAMPLES
        for batch in batches:
            count = min(left, 8)
            left -= count
            x = batch["x"].double()
            y = self.dense(first(dense.first(x)))
            stream = first(dense.first(x)) + second.down(y.tanh())
            (dy,) = torch.autograd.grad(squares_of(second.norm(stream), batch).sum(), y)
            inputs.append(live(start(pruned.first(x)), batch, count).detach())
            wanted.append(live(y, batch, count).detach())
            squares.append(live(dy, batch, count).square())
        self.x, self.target, self.weight = torch.cat(inputs), torch.cat(wanted), torch.cat(squares).sum(1)


@pytest.mark.parametrize("listed", [True, False], ids=["blocks", "whole"])
def test_layers_after_a_norm_are_fitted_to_what_it_gives(listed: bool, batches: list[Batch]) -> None:
    dense = make(listed=listed)
    net = copy.deepcopy(dense)
    obs.sparsify_(net, config("2:8"), batches, loss_fn)
    problem, layer = NormedProblem(dense, net, batches), list(net.blocks.children())[1].up
    weight, bias = problem.solve(layer.weight != 0, problem.damp(0.01), free_bias=True)
    assert bias is not None
    torch.testing.assert_close(layer.weight.detach().double(), weight, rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(layer.bias.detach().double(), bias, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("sequential", [True, False])
def test_an_error_leaves_the_norms(sequential: bool, batches: list[Batch], monkeypatch: pytest.MonkeyPatch) -> None:
    """One in the pass of the last norm alone; the step in a training leaves all as it was."""
    net = make(listed=False)
    before = state(net)
    calls: list[str] = []
    added = NormRefit._add

    def fails(self: NormRefit, sums: Any, norm: Norm, *rest: Any) -> None:
        calls.append(norm.name)
        if norm.name == "blocks.1.norm":
            raise NonFiniteError("blocks.1.norm: came NaN")
        added(self, sums, norm, *rest)

    monkeypatch.setattr(NormRefit, "_add", fails)
    pruner = obs.OBSPruner(net, config(sequential=sequential))
    with pytest.raises(NonFiniteError, match="came NaN"):
        gradual_step(pruner, "2:4", batches, loss_fn)
    assert calls.count("blocks.0.norm") == len(batches)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert pruner.stage == 0 and not pruner.report().norms


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip_batch"])
def test_nan_of_one_batch(on_nonfinite: str, batches: list[Batch]) -> None:
    dense = make()
    net = copy.deepcopy(dense)
    net.blocks[0].norm.weight.data.mul_(2.0)
    bad = [*batches[:2], batches[2] | {"x": batches[2]["x"] * float("nan")}, *batches[3:]]
    if on_nonfinite == "raise":
        before = state(net)
        with pytest.raises(NonFiniteError, match=r"first: .*batch 2"):
            refit(net, dense, bad)
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        return
    refit(net, dense, bad, on_nonfinite="skip_batch")
    torch.testing.assert_close(net.blocks[0].norm.weight, dense.blocks[0].norm.weight, rtol=2e-4, atol=2e-5)


def test_plan_report_and_state_say_it(batches: list[Batch]) -> None:
    net = make()
    pruner = obs.OBSPruner(net, config())
    plan = pruner.plan()
    assert plan.norms == ("first", "blocks.0.norm", "blocks.1.norm")
    held = sum(p.nbytes for p in net.parameters())  # all of this net is pruned or refit
    assert plan.held_bytes == held == plan.to_dict()["held_bytes"]
    assert plan.layer_by_layer and "layer by layer" in plan.to_markdown()
    assert "3 norms refit, with" in plan.to_markdown()
    assert "refit" not in obs.OBSPruner(net, config(refit_norms=False)).plan().to_markdown()

    report = gradual_step(pruner, "2:4", batches, loss_fn)
    text, values = report.to_markdown(), json.loads(json.dumps(report.to_dict()))
    assert "| blocks.1.norm |" in text and "| refit |" in text and "| as it was |" in text
    assert [n["name"] for n in values["norms"]] == ["first", "blocks.0.norm", "blocks.1.norm"]

    saved = pruner.state_dict()
    other = obs.OBSPruner(copy.deepcopy(net), config())
    other.load_state_dict(saved)
    assert other.report().norms == report.norms
    with pytest.raises(ResumeMismatchError, match=r"state\['norms'\] is damaged"):
        other.load_state_dict(saved | {"norms": [{"name": "first"}]})
    older = {key: value for key, value in saved.items() if key != "norms"}
    other.load_state_dict(older)
    assert other.report().norms == ()


def test_what_does_not_go(batches: list[Batch]) -> None:
    cfg = config(sequential=False)
    pruner = obs.OBSPruner(make(), cfg)
    pruner.collect(batches, loss_fn)
    with pytest.raises(ConfigError, match=r"refit_norms needs the data again.*sparsify_"):
        pruner.prune()
    with pytest.raises(ConfigError, match="loader is an iterator"):
        obs.sparsify_(make(), cfg, iter(batches), loss_fn)
    none = config(sequential=False, curvature="block", method="magnitude", update="none")
    with pytest.raises(ConfigError, match=r"loader and loss_fn are needed.*refit_norms=True"):
        obs.sparsify_(make(), none, None, None)
