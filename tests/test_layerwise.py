# SPDX-License-Identifier: Apache-2.0
"""Row curvature layer by layer: what each layer is fitted to, by brute force in f64, and what stays as it was."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import obs_kernels as obs
from obs_kernels.errors import ConfigError, NonFiniteError
from obs_kernels.pruning import layerwise
from obs_kernels.pruning.layerwise import Snapshot
from obs_kernels.pruning.report import PruningReport

Batch = dict[str, Tensor]
SAMPLES = 38
"""Fewer than the loader gives: the last batch is cut."""
LAYERS = ("blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down")


class Block(nn.Module):
    """A feed-forward part of a residual stream."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16, bias=bias), nn.Linear(16, 8, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(self.up(x).tanh())
        return y


class Net(nn.Module):
    """Two blocks; ``listed`` in a ModuleList, which is run block by block, or not, when the whole model runs."""

    def __init__(self, *, listed: bool, bias: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(bias) for _ in range(2)) if listed else nn.Module()
        if not listed:
            for i in range(2):
                self.blocks.add_module(str(i), Block(bias))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks.children():
            x = block(x)
        return x


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    """Padded tokens have a part in it: that they count nowhere is for the pruner to see to."""
    return (model(batch["x"]).float() - batch["y"]).square().sum((1, 2))


def make(*, listed: bool = False, bias: bool = True) -> Net:
    torch.manual_seed(1)
    return Net(listed=listed, bias=bias)


@pytest.fixture
def batches(gen: torch.Generator) -> list[Batch]:
    found = []
    for _ in range(5):
        mask = torch.ones(8, 5, dtype=torch.int64)
        mask[1, 3:] = 0
        mask[4, :2] = 0
        x = torch.randn(8, 5, 8, generator=gen) + torch.linspace(-1, 1, 8)
        x[..., 1] = 0.9 * x[..., 0] + 0.1 * x[..., 1]
        found.append({"x": x, "y": torch.randn(8, 5, 8, generator=gen), "attention_mask": mask})
    return found


def config(pattern: str = "2:4", **changes: Any) -> obs.OBSConfig:
    changes = {"num_grads": SAMPLES, "sequential": True} | changes
    return obs.OBSConfig(pattern=pattern, curvature="row", **changes)


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def assert_same(net: nn.Module, before: dict[str, Tensor]) -> None:
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


class Problem:
    """What the layer ``name`` is fitted to, in f64: tokens that count, their weights, and the outputs to be had.

    Args:
        dense: before any pruning.
        pruned: of which the layers before ``name`` are used, and the others are dense.
        own: aim at the layer's own dense outputs, on dense inputs (``sequential=False``).
    """

    def __init__(self, dense: Net, pruned: Net, batches: list[Batch], name: str, *, own: bool = False) -> None:
        dense, pruned = copy.deepcopy(dense).double(), copy.deepcopy(pruned).double()
        block, self.kind = int(name.split(".")[1]), name.split(".")[2]
        self.dense = dense.get_submodule(name)
        inputs, wanted, squares = [], [], []
        left = SAMPLES
        for batch in batches:
            count = min(left, batch["x"].shape[0])
            left -= count
            x, y = batch["x"].double(), batch["y"].double()
            live = batch["attention_mask"][:count].bool()
            streams, outputs = [x], {}
            for i, part in enumerate(dense.blocks.children()):
                outputs[f"blocks.{i}.up"] = part.up(streams[-1])
                outputs[f"blocks.{i}.down"] = part.down(outputs[f"blocks.{i}.up"].tanh())
                streams.append(streams[-1] + outputs[f"blocks.{i}.down"])
            (dy,) = torch.autograd.grad((streams[-1] - y).square().sum(), outputs[name])
            used = dense if own else pruned
            stream = x
            for part in list(used.blocks.children())[:block]:
                stream = part(stream)
            given = stream if self.kind == "up" else list(used.blocks.children())[block].up(stream).tanh()
            aim = outputs[name] if self.kind == "up" or own else streams[block + 1] - stream
            inputs.append(given[:count][live].detach())
            wanted.append(aim[:count][live].detach())
            squares.append(dy[:count][live].square())
        self.x, self.target, self.squares = torch.cat(inputs), torch.cat(wanted), torch.cat(squares)
        self.weight = self.squares.sum(1)
        self.row_scale = self.squares.sum(0) / self.squares.sum()

    def damp(self, share: float) -> float:
        """A share of the mean diagonal of H."""
        return share * float((self.weight @ self.x.square()).mean()) / SAMPLES

    def value(self, weight: Tensor, bias: Tensor | None, damp: float) -> Tensor:
        """[R]: the weighted squares over the samples, and the damping about the dense weights."""
        y = self.x @ weight.double().mT + (0.0 if bias is None else bias.double())
        misses = (self.weight[:, None] * (y - self.target).square()).sum(0) / SAMPLES
        return (0.5 * misses + 0.5 * damp * (weight.double() - self.dense.weight).square().sum(1)).detach()

    def solve(self, mask: Tensor, damp: float, *, free_bias: bool) -> tuple[Tensor, Tensor | None]:
        """The best weights at the entries of ``mask`` and the best bias, a row at a time by least squares."""
        scale = (self.weight / SAMPLES).sqrt()[:, None]
        weight, bias = torch.zeros_like(self.dense.weight), None
        if self.dense.bias is not None:
            bias = self.dense.bias.detach().clone()
        for row in range(mask.shape[0]):
            kept = mask[row].nonzero().flatten()
            tokens = scale * torch.cat([self.x[:, kept], torch.ones(len(self.x), 1)], 1)
            goal = scale[:, 0] * self.target[:, row]
            if not free_bias:
                goal = goal - (0.0 if bias is None else tokens[:, -1] * bias[row])
                tokens = tokens[:, :-1]
            held = torch.zeros(len(kept), tokens.shape[1], dtype=torch.float64)
            held[:, : len(kept)] = damp**0.5 * torch.eye(len(kept))
            w0 = damp**0.5 * self.dense.weight.detach()[row, kept]
            found = torch.linalg.lstsq(torch.cat([tokens, held]), torch.cat([goal, w0])[:, None]).solution[:, 0]
            weight[row, kept] = found[: len(kept)]
            if free_bias and bias is not None:
                bias[row] = found[-1]
        return weight.detach(), bias


def pruned(dense: Net, batches: list[Batch], **changes: Any) -> tuple[Net, PruningReport]:
    net = copy.deepcopy(dense)
    return net, obs.sparsify_(net, config(**changes), batches, loss_fn)


@pytest.mark.parametrize("listed", [True, False], ids=["blocks", "whole"])
@pytest.mark.parametrize("damp", [None, 0.5])
@pytest.mark.parametrize(("bias", "refit"), [(True, True), (True, False), (False, True)])
def test_every_layer_is_the_best_for_its_mask(
    listed: bool, damp: float | None, bias: bool, refit: bool, batches: list[Batch]
) -> None:
    """On the inputs of the model pruned so far, for the outputs of the dense one: of the stream, where there is one."""
    dense = make(listed=listed, bias=bias)
    net, report = pruned(dense, batches, damp=damp, refit_bias=refit)
    reports = {item.name: item for item in report.layers}
    assert reports.keys() == set(LAYERS)
    for name in LAYERS:
        problem, module = Problem(dense, net, batches, name), net.get_submodule(name)
        free = bias and refit
        used = reports[name].damp
        assert used == pytest.approx(damp or problem.damp(0.01), rel=1e-4)
        mask = module.weight.detach() != 0
        assert (mask.reshape(-1, 4).sum(1) == 2).all()
        weight, shift = problem.solve(mask, used, free_bias=free)
        torch.testing.assert_close(
            module.weight.detach().double(), weight, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )
        if bias:
            torch.testing.assert_close(module.bias.detach().double(), shift, rtol=1e-3, atol=1e-4)
        far = problem.value(weight, shift, used) - problem.value(dense.get_submodule(name).weight * mask, shift, used)
        assert (far < -1e-3).any(), "this problem moves the kept weights"


@pytest.mark.parametrize("listed", [True, False], ids=["blocks", "whole"])
def test_the_predicted_loss_is_that_about_the_goal(listed: bool, batches: list[Batch]) -> None:
    """What the pattern costs beside the best dense weights, rows weighed by their share of the gradients."""
    dense = make(listed=listed)
    net, report = pruned(dense, batches)
    for item in report.layers:
        problem, module = Problem(dense, net, batches, item.name), net.get_submodule(item.name)
        best, shift = problem.solve(torch.ones_like(module.weight, dtype=torch.bool), item.damp, free_bias=True)
        lost = problem.value(module.weight, module.bias, item.damp) - problem.value(best, shift, item.damp)
        assert (lost > 0).all()
        assert item.saliency == pytest.approx(float(lost @ problem.row_scale), rel=2e-3)


def test_the_choice_is_better_than_any_single_swap(batches: list[Batch]) -> None:
    """Of the last group of columns, which has nothing after it: each row's two are the best two of the four, jointly
    with the kept weights before it."""
    dense = make()
    net, report = pruned(dense, batches)
    name = LAYERS[-1]
    problem, module = Problem(dense, net, batches, name), net.get_submodule(name)
    damp = next(item.damp for item in report.layers if item.name == name)
    mask = module.weight.detach() != 0
    swept = Sweep(problem, damp)
    for row in range(8):
        assert swept.last_group(row, mask[row]) == mask[row, -4:].nonzero().flatten().tolist()


class Sweep:
    """What a sweep has settled before the last group of four columns."""

    def __init__(self, problem: Problem, damp: float) -> None:
        x = problem.x - (problem.weight @ problem.x) / problem.weight.sum()
        e = problem.target - (problem.weight @ problem.target) / problem.weight.sum()
        self.h = (x * problem.weight[:, None]).mT @ x / SAMPLES + damp * torch.eye(x.shape[1], dtype=torch.float64)
        pull = (e * problem.weight[:, None]).mT @ x / SAMPLES + damp * problem.dense.weight.detach()
        self.goal = torch.linalg.solve(self.h, pull.mT).mT

    def last_group(self, row: int, mask: Tensor) -> list[int]:
        """The pair with the least joint loss when the columns before are as their mask says, settled in order."""
        w, width = self.goal[row].clone(), self.goal.shape[1]
        for first in range(0, width - 4, 4):
            later = list(range(first, width))
            inverse = torch.linalg.inv(self.h[first:, first:])
            gone = [j for j in range(4) if not mask[first + j]]
            part = torch.linalg.solve(inverse[gone][:, gone], w[first:][gone])
            w[later] = w[later] - inverse[:, gone] @ part
        tail = self.h[-4:, -4:]
        losses = {}
        for i in range(4):
            for j in range(i + 1, 4):
                gone = [k for k in range(4) if k not in (i, j)]
                part = w[-4:][gone]
                losses[i, j] = float(part @ torch.linalg.solve(torch.linalg.inv(tail)[gone][:, gone], part))
        return list(min(losses, key=lambda pair: losses[pair]))


@pytest.mark.parametrize("listed", [True, False], ids=["blocks", "whole"])
def test_better_than_without_the_order(listed: bool, batches: list[Batch]) -> None:
    """The stream that the net gives is nearer to the dense one's where later layers make up for earlier ones."""
    dense = make(listed=listed)
    found = {}
    for sequential in (True, False):
        net, _ = pruned(dense, batches, sequential=sequential)
        problem = Problem(dense, net, batches, LAYERS[-1])
        module = net.get_submodule(LAYERS[-1])
        found[sequential] = float(problem.value(module.weight, module.bias, 0.0).sum())
    assert found[True] < 0.9 * found[False]


def test_nothing_before_and_nothing_to_make_up_for(batches: list[Batch]) -> None:
    """Of the one layer that is pruned, the last, inputs and stream are the dense ones: no order is the same."""
    ignore = LAYERS[:-1]
    nets = [pruned(make(), batches, sequential=sequential, ignore=ignore)[0] for sequential in (True, False)]
    first, second = (net.get_submodule(LAYERS[-1]) for net in nets)
    assert torch.equal(first.weight != 0, second.weight != 0)
    torch.testing.assert_close(first.weight, second.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first.bias, second.bias, rtol=1e-4, atol=1e-5)
    assert not torch.equal(first.bias, make().get_submodule(LAYERS[-1]).bias)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_makes_up_for_what_others_broke(name: str, batches: list[Batch]) -> None:
    """What a layer became is nearer to the dense stream, given what comes in, than its best for its own dense job."""
    dense = make()
    net, _ = pruned(dense, batches)
    problem = Problem(dense, net, batches, name)
    module = net.get_submodule(name)
    kept = module.weight.detach() != 0
    own = Problem(dense, net, batches, name, own=True)
    own_weight, own_bias = own.solve(kept, 1e-3, free_bias=True)
    ours = problem.value(module.weight, module.bias, 0.0).sum()
    others = problem.value(own_weight, own_bias, 0.0).sum()
    assert ours < others if name != LAYERS[0] else ours <= 1.01 * others


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("pattern", ["2:4", "4:2:8"])
def test_biases_stay_where_they_are_not_refitted(sequential: bool, pattern: str, batches: list[Batch]) -> None:
    dense = make()
    net, _ = pruned(dense, batches, pattern=pattern, sequential=sequential, refit_bias=False)
    for name in LAYERS:
        assert torch.equal(net.get_submodule(name).bias, dense.get_submodule(name).bias)
        assert not torch.equal(net.get_submodule(name).weight, dense.get_submodule(name).weight)


def test_layer_curvature_leaves_biases_alone(batches: list[Batch]) -> None:
    net, dense = make(), make()
    cfg = obs.OBSConfig(pattern="2:4", curvature="layer", num_grads=SAMPLES, sequential=True)
    obs.sparsify_(net, cfg, batches, loss_fn)
    for name in LAYERS:
        assert torch.equal(net.get_submodule(name).bias, dense.get_submodule(name).bias)


@pytest.mark.parametrize("pattern", ["2:4", "4:2:8"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_mean_error_of_outputs_is_zero(name: str, pattern: str, batches: list[Batch]) -> None:
    """Of each layer by itself, tokens weighed as the loss says, where its bias is free."""
    dense = make()
    net, _ = pruned(dense, batches, pattern=pattern, sequential=False)
    problem, module = Problem(dense, net, batches, name, own=True), net.get_submodule(name)
    error = problem.x @ module.weight.double().mT + module.bias.double() - problem.target
    spread = (problem.weight @ error.square() / problem.weight.sum()).sqrt()
    mean = (problem.weight @ error) / problem.weight.sum()
    assert (mean.abs() < 1e-5 * spread).all() and (spread > 1e-3).all()
    kept = module.weight.detach() != 0
    without = problem.x @ module.weight.double().mT + dense.get_submodule(name).bias.double() - problem.target
    assert ((problem.weight @ without / problem.weight.sum()).abs() > 1e-3).any() and not kept.all()


@pytest.mark.parametrize("name", LAYERS)
def test_one_collection_is_the_best_for_its_mask(name: str, batches: list[Batch]) -> None:
    """Without an order: own outputs, own inputs."""
    dense = make()
    net, report = pruned(dense, batches, sequential=False)
    problem, module = Problem(dense, net, batches, name, own=True), net.get_submodule(name)
    damp = next(item.damp for item in report.layers if item.name == name)
    assert damp == pytest.approx(problem.damp(0.01), rel=1e-4)
    weight, bias = problem.solve(module.weight.detach() != 0, damp, free_bias=True)
    torch.testing.assert_close(module.weight.detach().double(), weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(module.bias.detach().double(), bias, rtol=1e-3, atol=1e-4)


def test_a_mean_loss_is_the_same(batches: list[Batch]) -> None:
    nets = [make(), make()]
    obs.sparsify_(nets[0], config(), batches, loss_fn)
    obs.sparsify_(nets[1], config(), batches, lambda model, batch: loss_fn(model, batch).mean())
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(one != 0, other != 0)
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


class Shuffled:
    """Batches in another order from pass number ``after`` on."""

    def __init__(self, batches: list[Batch], swap: tuple[int, int], after: int) -> None:
        self.batches, self.swap, self.after, self.passes = batches, swap, after, 0

    def __iter__(self) -> Iterator[Batch]:
        self.passes += 1
        order = list(range(len(self.batches)))
        if self.passes >= self.after:
            i, j = self.swap
            order[i], order[j] = order[j], order[i]
        yield from (self.batches[i] for i in order)


@pytest.mark.parametrize("listed", [True, False], ids=["blocks", "whole"])
@pytest.mark.parametrize(("swap", "first"), [((0, 1), 0), ((1, 3), 1), ((2, 4), 2)])
def test_another_order_is_an_error(listed: bool, swap: tuple[int, int], first: int, batches: list[Batch]) -> None:
    """From the first pass without gradients on; the batch is named, and nothing is changed."""
    net = make(listed=listed)
    before = state(net)
    with pytest.raises(ConfigError, match=rf"same batches .* batch {first}\b"):
        obs.sparsify_(net, config(), Shuffled(batches, swap, after=3), loss_fn)
    assert_same(net, before)


def test_another_order_in_the_middle_is_an_error(batches: list[Batch]) -> None:
    """With a part of the net pruned already."""
    net = make()
    before = state(net)
    wrote: list[bool] = []
    loader = Shuffled(batches, (1, 2), after=6)

    def watched(model: nn.Module, batch: Batch) -> Tensor:
        wrote.append(bool((net.get_submodule(LAYERS[0]).weight == 0).any()))
        return loss_fn(model, batch)

    with pytest.raises(ConfigError, match=r"same batches .* batch 1\b"):
        obs.sparsify_(net, config(), loader, watched)
    assert any(wrote)
    assert_same(net, before)


@pytest.mark.parametrize("part", ["samples", "tokens", "values", "short"])
def test_other_batches_are_an_error(part: str, batches: list[Batch]) -> None:
    """Other samples of the same set, as a shuffling loader gives: the sums of the values may be the same."""

    class Other:
        passes = 0

        def __iter__(self) -> Iterator[Batch]:
            self.passes += 1
            found = [dict(batch) for batch in batches]
            if self.passes >= 3:
                if part == "samples":
                    found[2]["x"] = found[2]["x"].flip(0)
                elif part == "tokens":
                    found[2]["x"] = found[2]["x"].flip(1)
                elif part == "values":
                    found[2]["x"] = found[2]["x"] + 1e-3
                else:
                    del found[2:]
            yield from found

    net = make()
    before = state(net)
    with pytest.raises(ConfigError, match=r"same batches .* batch 2\b"):
        obs.sparsify_(net, config(), Other(), loss_fn)
    assert_same(net, before)


def test_loader_of_new_tensors(batches: list[Batch]) -> None:
    """Equal batches are the same ones, wherever their memory is."""

    class Copies:
        def __iter__(self) -> Iterator[Batch]:
            for batch in batches:
                yield {
                    name: torch.cat([value.new_zeros(1), value.flatten()])[1:].view(value.shape)
                    for name, value in batch.items()
                }

    one, other = make(), make()
    obs.sparsify_(one, config(), batches, loss_fn)
    obs.sparsify_(other, config(), Copies(), loss_fn)
    assert_same(one, state(other))


@pytest.mark.parametrize("listed", [True, False], ids=["blocks", "whole"])
def test_loader_of_one_buffer(listed: bool, batches: list[Batch]) -> None:
    """A loader may fill the same memory for each batch, which is over when the next one is asked for."""
    given = [{name: batch[name] for name in ("x", "y")} for batch in batches]

    class Reused:
        def __iter__(self) -> Iterator[Batch]:
            buffer = {name: torch.empty_like(value) for name, value in given[0].items()}
            for batch in given:
                for name, value in batch.items():
                    buffer[name].copy_(value)
                yield buffer

    one, other = make(listed=listed), make(listed=listed)
    obs.sparsify_(one, config(), given, loss_fn)
    obs.sparsify_(other, config(), Reused(), loss_fn)
    assert_same(other, state(one))


def test_an_iterator_is_refused(batches: list[Batch]) -> None:
    net = make()
    before = state(net)
    with pytest.raises(ConfigError, match="re-iterable"):
        obs.sparsify_(net, config(), iter(batches), loss_fn)
    assert_same(net, before)


def cut_after(calls: int) -> Callable[[nn.Module, Batch], Tensor]:
    left = [calls]

    def failing(model: nn.Module, batch: Batch) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("power cut")
        return loss_fn(model, batch)

    return failing


def pruned_when_cut(net: Net, calls: int, batches: list[Batch], **options: Any) -> int:
    """Layers that were pruned in the model when ``calls`` runs were over."""
    found = [0]
    inner = cut_after(calls)

    def failing(model: nn.Module, batch: Batch) -> Tensor:
        found[0] = max(found[0], sum(bool((net.get_submodule(name).weight == 0).any()) for name in LAYERS))
        return inner(model, batch)

    with pytest.raises(RuntimeError, match="power cut"):
        obs.sparsify_(net, config(), batches, failing, **options)
    return found[0]


@pytest.mark.parametrize("calls", [0, 1, 3, 6, 8, 12, 20, 30, 40])
def test_an_error_on_the_way_restores_weights_and_biases(calls: int, batches: list[Batch]) -> None:
    net = make()
    before = state(net)
    found = pruned_when_cut(net, calls, batches)
    assert_same(net, before)
    assert (found > 0) == (calls >= 20)


@pytest.mark.parametrize("listed", [True, False], ids=["blocks", "whole"])
def test_an_error_in_the_step_restores_weights_and_biases(
    listed: bool, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    from obs_kernels.pruning.pruner import OBSPruner

    original = OBSPruner.stage_layers

    def failing(self: OBSPruner, names: Any = None) -> Any:
        if names == [LAYERS[3]]:
            assert not torch.equal(net.get_submodule(LAYERS[2]).bias, before[f"{LAYERS[2]}.bias"])
            raise KeyboardInterrupt
        return original(self, names)

    net = make(listed=listed)
    before = state(net)
    monkeypatch.setattr(OBSPruner, "stage_layers", failing)
    with pytest.raises(KeyboardInterrupt):
        obs.sparsify_(net, config(), batches, loss_fn)
    assert_same(net, before)


@pytest.mark.parametrize("calls", [20, 30, 40])
def test_a_resumed_run_is_the_same(calls: int, batches: list[Batch], tmp_path: Path) -> None:
    whole, cut = make(), make()
    obs.sparsify_(whole, config(), batches, loss_fn)
    assert pruned_when_cut(cut, calls, batches, work_dir=tmp_path) > 0
    obs.sparsify_(cut, config(), batches, loss_fn, work_dir=tmp_path, resume=True)
    assert_same(cut, state(whole))


@pytest.mark.parametrize("recomputations", [1, 2])
@pytest.mark.parametrize("at", range(1, 4))
def test_a_resumed_run_of_blocks_is_the_same(
    at: int, recomputations: int, batches: list[Batch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut before the step of each layer, in the first stage and in the second."""
    from obs_kernels.pruning.pruner import OBSPruner

    cfg = config(recomputations=recomputations)
    whole, cut = make(listed=True), make(listed=True)
    obs.sparsify_(whole, cfg, batches, loss_fn)
    original = OBSPruner.stage_layers

    def failing(self: OBSPruner, names: Any = None) -> Any:
        if names == [LAYERS[at]] and self.stage == recomputations - 1:
            raise RuntimeError("power cut")
        return original(self, names)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(OBSPruner, "stage_layers", failing)
        obs.sparsify_(cut, cfg, batches, loss_fn, work_dir=tmp_path)
    fresh = make(listed=True)
    obs.sparsify_(fresh, cfg, batches, loss_fn, work_dir=tmp_path, resume=True)
    assert_same(fresh, state(whole))


class Fragile(nn.Module):
    """NaN where the weights before it have zeros."""

    def __init__(self, before: nn.Linear) -> None:
        super().__init__()
        self.watched = [before]

    def forward(self, x: Tensor) -> Tensor:
        broken = bool((self.watched[0].weight == 0).any()) and bool((x[0, 0, 0] == x[0, 0, 0].round()).all())
        return x * torch.nan if broken else x


class FragileNet(nn.Module):
    """Only a batch that starts with a whole number breaks it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.fragile = Fragile(self.first)

    def forward(self, x: Tensor) -> Tensor:
        broken = self.fragile(x)
        y: Tensor = self.second(self.first(x) + (broken - x))
        return y


def test_nan_of_the_pruned_model_alone(batches: list[Batch]) -> None:
    """Names the layer whose input it is, and the batch; weights and biases come back."""
    torch.manual_seed(1)
    net = FragileNet()
    batches[3]["x"][0, 0, 0] = 2.0
    before = state(net)
    with pytest.raises(NonFiniteError, match=r"^second: .* batch 3 "):
        obs.sparsify_(net, config(), batches, loss_fn)
    assert_same(net, before)
    batches[3]["x"][0, 0, 0] = 2.5
    obs.sparsify_(net, config(), batches, loss_fn)
    assert (net.second.weight == 0).any()


def test_nan_of_padding_alone_is_none(batches: list[Batch]) -> None:
    """What padded tokens hold in the pruned model counts nowhere."""

    class Padded(FragileNet):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            if bool((self.first.weight == 0).any()):
                h = torch.cat([h[:, :3], h[:, 3:].masked_fill((torch.arange(8) == 1)[:, None, None], torch.nan)], 1)
            y: Tensor = self.second(h)
            return y

    torch.manual_seed(1)
    net = Padded()
    obs.sparsify_(net, config(), batches, loss_fn)
    assert torch.isfinite(net.second.weight).all() and (net.second.weight == 0).any()


@pytest.mark.parametrize("listed", [True, False], ids=["blocks", "whole"])
@pytest.mark.parametrize("where", ["x", "y", "loss"])
@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_skipped_batch_is_left_out_of_all_passes(at: int, where: str, listed: bool, batches: list[Batch]) -> None:
    """Inputs or labels of NaN, or a loss that overflows: the same as a loader without that batch."""
    broken = {name: value.clone() for name, value in batches[0].items()}
    broken["y" if where == "loss" else where][2, 1] = 1e30 if where == "loss" else torch.nan
    given = [*batches[:at], broken, *batches[at:]]
    one, other = make(listed=listed), make(listed=listed)
    obs.sparsify_(one, config(), batches, loss_fn)
    obs.sparsify_(other, config(on_nonfinite="skip_batch"), given, loss_fn)
    assert_same(one, state(other))


def test_a_batch_of_nan_is_an_error_otherwise(batches: list[Batch]) -> None:
    net = make()
    before = state(net)
    batches[1]["y"][0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"batch 1\b"):
        obs.sparsify_(net, config(), batches, loss_fn)
    assert_same(net, before)


@pytest.mark.parametrize("listed", [True, False], ids=["blocks", "whole"])
def test_zeros_stay_and_the_rest_is_the_best(listed: bool, batches: list[Batch]) -> None:
    """Weights that are zero already are no part of the fit, neither of the goal nor of the result."""
    dense = make(listed=listed)
    with torch.no_grad():
        for name in LAYERS:
            dense.get_submodule(name).weight[:, 1] = 0.0
            dense.get_submodule(name).weight[0, :3] = 0.0
    net, report = pruned(dense, batches)
    for item in report.layers:
        problem, module = Problem(dense, net, batches, item.name), net.get_submodule(item.name)
        alive = dense.get_submodule(item.name).weight != 0
        assert not module.weight[~alive].any()
        mask = module.weight.detach() != 0
        weight, bias = problem.solve(mask, item.damp, free_bias=True)
        torch.testing.assert_close(module.weight.detach().double(), weight, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(module.bias.detach().double(), bias, rtol=1e-3, atol=1e-4)
        best, shift = problem.solve(alive, item.damp, free_bias=True)
        lost = problem.value(module.weight, module.bias, item.damp) - problem.value(best, shift, item.damp)
        assert item.saliency == pytest.approx(float(lost @ problem.row_scale), rel=2e-3)


@pytest.mark.parametrize("listed", [True, False], ids=["blocks", "whole"])
def test_recomputations_nest(listed: bool, batches: list[Batch], tmp_path: Path) -> None:
    """The masks of the second stage are within those of the first, and the last layer fits the dense stream still."""
    from safetensors.torch import load_file

    dense, net = make(listed=listed), make(listed=listed)
    report = obs.sparsify_(net, config("2:8", recomputations=2), batches, loss_fn, work_dir=tmp_path)
    assert len(report.stages) == 2 and report.stages[-1] == "2:8"
    for name in LAYERS:
        first, second = (load_file(tmp_path / "layers" / f"stage{i}.{name}.safetensors") for i in (1, 2))
        masks = [stage["mask"].bool() for stage in (first, second)]
        assert not (masks[1] & ~masks[0]).any() and masks[1].sum() < masks[0].sum() < masks[0].numel()
        assert torch.equal(net.get_submodule(name).weight != 0, masks[1])
        assert torch.equal(net.get_submodule(name).weight, second["weight"])
        assert torch.equal(net.get_submodule(name).bias, second["bias"])
    problem, module = Problem(dense, net, batches, LAYERS[-1]), net.get_submodule(LAYERS[-1])
    error = problem.x @ module.weight.double().mT + module.bias.double() - problem.target
    mean = (problem.weight @ error) / problem.weight.sum()
    assert (mean.abs() < 1e-5).all(), "the bias makes up for the mean error against the dense stream, not a later one"


class Router(nn.Module):
    """Gives ``chosen`` the tokens that ``gate`` likes, of each sample as many."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.chosen = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        dropped = int((self.gate.weight == 0).any())
        y: Tensor = self.chosen(self.gate(x).tanh()[:, dropped:])
        return y.sum(1, keepdim=True) + x


def test_other_tokens_are_an_error(batches: list[Batch]) -> None:
    torch.manual_seed(1)
    net = Router()
    before = state(net)
    with pytest.raises(ConfigError, match=r"^chosen: the same tokens .* batch 0"):
        obs.sparsify_(net, config(), batches, loss_fn)
    assert_same(net, before)


def test_a_layer_that_is_called_less_often_is_an_error(batches: list[Batch]) -> None:
    class Twice(Router):
        def forward(self, x: Tensor) -> Tensor:
            h = self.gate(x).tanh()
            y: Tensor = self.chosen(h)
            return y if bool((self.gate.weight == 0).any()) else self.chosen(y.tanh())

    torch.manual_seed(1)
    net = Twice()
    before = state(net)
    with pytest.raises(ConfigError, match=r"^chosen: the same tokens"):
        obs.sparsify_(net, config(), batches, loss_fn)
    assert_same(net, before)


class Repeated(nn.Module):
    """One layer for two steps of a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + self.step(x.tanh())
        return x


def test_a_layer_called_twice(batches: list[Batch]) -> None:
    """Tokens of both calls, each with the weight and the error of its own call, at the dense weights."""
    torch.manual_seed(1)
    net = Repeated()
    dense = copy.deepcopy(net).double()
    report = obs.sparsify_(net, config(num_grads=40), batches, loss_fn)
    xs, ys, ws = [], [], []
    for batch in batches:
        live = batch["attention_mask"].bool()
        stream, calls = batch["x"].double(), []
        for _ in range(2):
            x = stream.tanh()
            y = dense.step(x)
            stream = stream + y
            calls.append((x, y))
        grads = torch.autograd.grad((stream - batch["y"].double()).square().sum(), [y for _, y in calls])
        for (x, y), dy in zip(calls, grads, strict=True):
            xs.append(x[live].detach())
            ys.append(y[live].detach())
            ws.append(dy[live].square().sum(1))
    problem = Problem.__new__(Problem)
    problem.x, problem.target, problem.weight, problem.dense = torch.cat(xs), torch.cat(ys), torch.cat(ws), dense.step
    damp = report.layers[0].damp
    assert damp == pytest.approx(problem.damp(0.01) * SAMPLES / 40, rel=1e-4)
    weight, bias = problem.solve(net.step.weight.detach() != 0, damp * 40 / SAMPLES, free_bias=True)
    torch.testing.assert_close(net.step.weight.detach().double(), weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(net.step.bias.detach().double(), bias, rtol=1e-3, atol=1e-4)


def without_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise, "find_chains", lambda *_: [])


def test_blocks_and_whole_are_the_same(batches: list[Batch], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a block leaves is kept; nothing else is different. Far fewer runs of the model."""
    calls = []

    def counted(model: nn.Module, batch: Batch) -> Tensor:
        calls[-1] += 1
        return loss_fn(model, batch)

    nets = [make(listed=True) for _ in range(2)]
    for net in nets:
        calls.append(0)
        obs.sparsify_(net, config(), batches, counted)
        without_chains(monkeypatch)
    assert_same(nets[0], state(nets[1]))
    assert calls[0] < 0.6 * calls[1]


class Carried(nn.Module):
    """Blocks that hand on more than the stream: the second also reads what the first made beside it."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.side, self.main = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
            mine = self.side(x).tanh() if values is None else values
            return x + self.main((x * mine).tanh()), mine

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Part() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        values = None
        for block in self.blocks:
            x, values = block(x, values)
        return x


def test_blocks_that_hand_on_more_than_the_stream(batches: list[Batch], monkeypatch: pytest.MonkeyPatch) -> None:
    """As the values of the first layer are in some language models: they are those of the model pruned so far."""
    torch.manual_seed(1)
    nets = [Carried()]
    nets.append(copy.deepcopy(nets[0]))
    cfg = config(ignore=("blocks.1.side", "blocks.2.side"))
    for net in nets:
        obs.sparsify_(net, cfg, batches, loss_fn)
        without_chains(monkeypatch)
    for name, value in nets[1].state_dict().items():
        torch.testing.assert_close(
            nets[0].state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


class Between(nn.Module):
    """Something happens to the stream between two blocks, in the memory that the first gave."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            x = x.mul_(0.5)
        return x


def test_a_stream_changed_between_blocks(batches: list[Batch], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    nets = [Between()]
    nets.append(copy.deepcopy(nets[0]))
    for net in nets:
        obs.sparsify_(net, config(), batches, loss_fn)
        without_chains(monkeypatch)
    assert_same(nets[0], state(nets[1]))


class InPlace(nn.Module):
    """Blocks that add to the stream in its own memory, twice each."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
            self.wide, self.narrow = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            x += self.down(self.up(x.tanh()).tanh())
            x += self.narrow(self.wide(x.tanh()).tanh())
            return x

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Part() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        for block in self.blocks:
            x = block(x)
        return x


def test_blocks_that_work_in_place(batches: list[Batch], monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that runs once more starts from the stream as it was."""
    torch.manual_seed(1)
    nets = [InPlace()]
    nets.append(copy.deepcopy(nets[0]))
    for net in nets:
        obs.sparsify_(net, config(), batches, loss_fn)
        without_chains(monkeypatch)
    assert_same(nets[0], state(nets[1]))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sequential": False},
        {"recomputations": 2},
        {"recomputations": 2, "sequential": False},
        {"curvature": "layer"},
    ],
    ids=str,
)
def test_under_autocast_from_outside(changes: dict[str, Any], batches: list[Batch]) -> None:
    """Autocast keeps the weights it has rounded until its end: those of before must not serve a later pass.

    Sums and means are not rounded either way.
    """
    inside, outside = make(), make()
    cfg = dataclasses.replace(config(), **changes)

    def rounded(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_fn(model, batch)

    obs.sparsify_(inside, cfg, batches, rounded)
    with torch.autocast("cpu", torch.bfloat16):
        obs.sparsify_(outside, cfg, batches, loss_fn)
    for name, value in inside.state_dict().items():
        torch.testing.assert_close(
            outside.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_a_bias_of_two_layers_comes_back() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    net[1].bias = net[0].bias
    layers = obs.OBSPruner(net, obs.OBSConfig(pattern="2:4", curvature="row")).layers
    snapshot = Snapshot(layers)
    with torch.no_grad():
        net[0].bias.fill_(7.0)
    with snapshot.in_place(net):
        assert not bool((net[0].bias == 7.0).any())
    assert bool((net[0].bias == 7.0).all())


def test_a_compiled_model_is_pruned_as_it_is(batches: list[Batch]) -> None:
    """Hooks that come after a graph was made are not in it: the model runs uncompiled."""
    plain, inner = make(), make()
    compiled = torch.compile(inner, backend="eager")
    with torch.no_grad():
        loss_fn(compiled, batches[0])
    obs.sparsify_(plain, config(), batches, loss_fn)
    obs.sparsify_(compiled, config(), batches, loss_fn)
    assert_same(inner, state(plain))


def test_generators_come_back_whatever_draws(batches: list[Batch]) -> None:
    net = make()
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, shuffle=True)
    obs.sparsify_(net, config(), loader, lambda m, b: loss_fn(m, b) * torch.rand(()))
    assert torch.equal(torch.rand(3), wanted)


def test_modes_and_generators_come_back(batches: list[Batch]) -> None:
    net = make().train()
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    obs.sparsify_(net, config(), batches, loss_fn)
    assert torch.equal(torch.rand(3), wanted)
    assert all(module.training for module in net.modules())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


transformers = pytest.importorskip("transformers")


def language_model(kind: str) -> tuple[nn.Module, str]:
    if kind == "gpt2":
        cfg = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=3, n_head=2)
        return transformers.GPT2LMHeadModel(cfg), "Conv1D"
    if kind == "llama":
        cfg = transformers.LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
        return transformers.LlamaForCausalLM(cfg), "Linear"
    cfg = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
    )
    return transformers.BertForQuestionAnswering(cfg), "Linear"


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_transformers_by_blocks_and_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same net either way, with padding, by the curvature of the model's own outputs."""
    torch.manual_seed(0)
    model, target = language_model(kind)
    ids = torch.randint(0, 40, (12, 10))
    mask = torch.ones(12, 10, dtype=torch.int64)
    mask[1::3, 7:] = 0
    given = [{"input_ids": a, "attention_mask": b} for a, b in zip(ids.split(4), mask.split(4), strict=True)]
    calls = [0]

    def probe(net: nn.Module, batch: Batch) -> Tensor:
        calls[-1] += 1
        found = net(**batch)
        if kind != "bert":
            return obs.output_probe(found.logits, padding=(batch["attention_mask"] == 0)[..., None])
        padding = batch["attention_mask"] == 0
        return obs.output_probe(found.start_logits, padding=padding) + obs.output_probe(
            found.end_logits, padding=padding
        )

    cfg = config(num_grads=12, targets=(target,), ignore=("re:.*(qa_outputs|lm_head)",))
    nets = [copy.deepcopy(model) for _ in range(2)]
    for net in nets:
        report = obs.sparsify_(net, cfg, given, probe)
        assert report.sparsity == pytest.approx(0.5)
        calls.append(0)
        without_chains(monkeypatch)
    assert calls[0] < 0.7 * calls[1]
    for (name, one), other in zip(nets[0].state_dict().items(), nets[1].state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
