# SPDX-License-Identifier: Apache-2.0
"""The pruner under row and layer curvature: what it collects, what it prunes, in which order, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import obs_kernels as obs
from obs_kernels.errors import ConfigError, SingularBlockError
from obs_kernels.pruning.execution import execution_groups
from obs_kernels.pruning.row_layer import RowLayer
from obs_kernels.reference.hessian import row_loss

Batch = dict[str, Tensor]


class Net(nn.Module):
    """Two branches on one input, then a layer on both; and a layer that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(16, 8)
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)
        self.idle = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.cat([self.left(x).tanh(), self.right(x).relu()], -1))
        return y


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return ((model(batch["x"]) - batch["y"]).square() * batch["attention_mask"][..., None]).sum((1, 2))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(1)
    return Net()


@pytest.fixture
def batches(gen: torch.Generator) -> list[Batch]:
    found = []
    for _ in range(3):
        mask = torch.ones(4, 5)
        mask[1, 3:] = 0
        found.append(
            {
                "x": torch.randn(4, 5, 8, generator=gen),
                "y": torch.randn(4, 5, 8, generator=gen),
                "attention_mask": mask,
            }
        )
    return found


def config(pattern: str = "2:4", **changes: Any) -> obs.OBSConfig:
    return obs.OBSConfig(pattern=pattern, curvature="row", num_grads=12, ignore=("idle",), **changes)


def expected(net: Net, batches: list[Batch], name: str, samples: int) -> tuple[Tensor, Tensor]:
    """H and h of the definition, one token at a time, in f64."""
    module = getattr(net, name)
    hessian = torch.zeros(module.in_features, module.in_features, dtype=torch.float64)
    rows = torch.zeros(module.out_features, dtype=torch.float64)
    seen: dict[str, Tensor] = {}

    def hook(_: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        seen["x"], seen["y"] = args[0].detach(), output
        return output

    handle = module.register_forward_hook(hook)
    left = samples
    for batch in batches:
        loss = loss_fn(net, batch)
        (dy,) = torch.autograd.grad(loss.sum(), seen["y"])
        for sample in range(min(left, dy.shape[0])):
            for token in range(dy.shape[1]):
                if batch["attention_mask"][sample, token] == 0:
                    continue
                x, g = seen["x"][sample, token].double(), dy[sample, token].double()
                hessian += g.square().sum() * torch.outer(x, x)
                rows += g.square()
        left -= min(left, dy.shape[0])
    handle.remove()
    return hessian / samples, rows / samples


@pytest.mark.parametrize("name", ["left", "last"])
@pytest.mark.parametrize("samples", [12, 6])
def test_sums_are_those_of_the_definition(net: Net, batches: list[Batch], name: str, samples: int) -> None:
    """Padded tokens count nowhere, and a batch is cut where enough samples came."""
    pruner = obs.OBSPruner(net, obs.OBSConfig(pattern="2:4", curvature="row", num_grads=samples, ignore=("idle",)))
    assert pruner.collect(batches, loss_fn) == samples
    layer = next(x for x in pruner.layers if x.name == name)
    assert isinstance(layer, RowLayer)
    hessian, rows = expected(net, batches, name, samples)
    torch.testing.assert_close(pruner.fishers()[f"{name}.weight"][0].double(), hessian, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.row_scale().double(), rows / rows.sum(), rtol=1e-5, atol=1e-8)


def test_layers_that_share_an_output_gradient(batches: list[Batch]) -> None:
    """Outputs that are added have one gradient tensor between them: no layer may change it for the next."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.left(x) + self.right(x)
            return y

    batches = [batch | {"attention_mask": torch.ones(4, 5)} for batch in batches]  # padding would be cut from a copy
    torch.manual_seed(2)
    net = Sum()
    pruner = obs.OBSPruner(net, obs.OBSConfig(pattern="2:4", curvature="row", num_grads=12))
    pruner.collect(batches, loss_fn)
    for name in ("left", "right"):
        hessian, _ = expected(net, batches, name, 12)  # type: ignore[arg-type]
        torch.testing.assert_close(pruner.fishers()[f"{name}.weight"][0].double(), hessian, rtol=1e-5, atol=1e-6)


def test_a_mean_loss_gives_the_same_sums(net: Net, batches: list[Batch]) -> None:
    each, mean = (obs.OBSPruner(net, config()) for _ in range(2))
    each.collect(batches, loss_fn)
    mean.collect(batches, lambda model, batch: loss_fn(model, batch).mean())
    for name, found in each.fishers().items():
        torch.testing.assert_close(mean.fishers()[name], found, rtol=1e-4, atol=1e-6)


def test_layer_curvature_weighs_every_token_alike(net: Net, batches: list[Batch]) -> None:
    pruner = obs.OBSPruner(net, obs.OBSConfig(pattern="2:4", curvature="layer", num_grads=12, ignore=("idle",)))
    pruner.collect(batches, loss_fn)
    x = torch.cat([b["x"][b["attention_mask"] > 0] for b in batches]).double()
    torch.testing.assert_close(pruner.fishers()["left.weight"][0].double(), x.mT @ x / 12, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pattern", ["2:4", "4:2:8"])
def test_prune_is_the_sweep(net: Net, batches: list[Batch], pattern: str) -> None:
    """Mask, weights and predicted loss of every layer; violations none; the report has the damping used."""
    pruner = obs.OBSPruner(net, config(pattern, refit_bias=False))
    pruner.collect(batches, loss_fn)
    before = {layer.name: layer.weight.detach().clone() for layer in pruner.layers}
    hessians = {layer.name: layer.mean_fisher()[0] for layer in pruner.layers}
    scales = {layer.name: layer.row_scale() for layer in pruner.layers if isinstance(layer, RowLayer)}
    report = pruner.prune()
    for item in report.layers:
        damp = 0.01 * float(hessians[item.name].diagonal().mean())
        assert item.damp == pytest.approx(damp, rel=1e-5)
        found = obs.ops.sweep_rows(
            before[item.name], hessians[item.name], pattern, row_scale=scales[item.name], damp=damp
        )
        weight = getattr(net, item.name).weight
        torch.testing.assert_close(weight, found.weight, rtol=1e-4, atol=1e-6)
        change = weight.detach() - before[item.name]
        loss = row_loss(change, hessians[item.name], row_scale=scales[item.name], damp=damp)
        assert item.saliency == pytest.approx(float(loss.sum()), rel=1e-4)
    assert pruner.verify() == 0 and report.sparsity == pytest.approx(obs.parse_pattern(pattern).sparsity)


@pytest.mark.parametrize(("curvature", "pattern"), [("row", "2:4"), ("row", "4:2:8"), ("layer", "2:4")])
def test_groups_with_the_largest_curvature_first(net: Net, batches: list[Batch], curvature: str, pattern: str) -> None:
    """The sweep of the columns in that order, put back; groups and panels stay those of the pattern."""
    cfg = obs.OBSConfig(
        pattern=pattern,
        curvature=curvature,
        num_grads=12,
        ignore=("idle",),
        sweep_order="diagonal",
        refit_bias=False,
    )
    with torch.no_grad():
        net.right.weight.mul_(4.0)  # the later inputs of ``last`` are the larger ones
    pruner = obs.OBSPruner(net, cfg)
    pruner.collect(batches, loss_fn)
    layer = next(x for x in pruner.layers if x.name == "last")
    assert isinstance(layer, RowLayer)
    before, hessian, scale = layer.matrix.clone(), layer.mean_fisher()[0], layer.row_scale()
    m = obs.parse_pattern(pattern).m
    sums = hessian.diagonal().view(-1, m).sum(1).tolist()
    groups = sorted(range(len(sums)), key=lambda g: -sums[g])
    assert groups != sorted(groups), "this Hessian has another order"
    order = [g * m + i for g in groups for i in range(m)]
    exact = curvature == "row"
    wanted = obs.ops.sweep_rows(
        before[:, order],
        hessian[order][:, order],
        pattern,
        row_scale=scale if exact else None,
        damp=0.01 * float(hessian.diagonal().mean()),
        method="combinatorial" if exact else "sparsegpt",
        resolve=exact,
    )
    assert wanted.weight is not None
    pruner.prune()
    assert torch.equal(net.last.weight[:, order] != 0, wanted.mask)
    torch.testing.assert_close(net.last.weight[:, order].detach(), wanted.weight, rtol=1e-4, atol=1e-6)
    assert pruner.verify() == 0


def test_order_of_execution(net: Net, batches: list[Batch]) -> None:
    """As they run, not as they are defined; what shares an input together; what never runs last."""
    pruner = obs.OBSPruner(net, obs.OBSConfig(pattern="2:4", curvature="row"))
    assert execution_groups(net, pruner.layers, batches, loss_fn) == [["left", "right"], ["last"], ["idle"]]


def test_an_error_on_the_way_leaves_the_model(net: Net, batches: list[Batch]) -> None:
    """Sequential writes weights as it goes; all come back."""
    before = [p.detach().clone() for p in net.parameters()]
    calls = 0

    def failing(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 5:  # the first batch for the order, three for the first group
            raise RuntimeError("power cut")
        return loss_fn(model, batch)

    with pytest.raises(RuntimeError, match="power cut"):
        obs.sparsify_(net, config(sequential=True), batches, failing)
    for old, now in zip(before, net.parameters(), strict=True):
        assert torch.equal(old, now)


def test_resumed_run_is_the_same(net: Net, batches: list[Batch], tmp_path: Path) -> None:
    import copy

    whole, cut = copy.deepcopy(net), copy.deepcopy(net)
    obs.sparsify_(whole, config(sequential=True), batches, loss_fn)
    calls = 0

    def failing(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 5:
            raise RuntimeError("power cut")
        return loss_fn(model, batch)

    with pytest.raises(RuntimeError, match="power cut"):
        obs.sparsify_(cut, config(sequential=True), batches, failing, work_dir=tmp_path)
    obs.sparsify_(cut, config(sequential=True), batches, loss_fn, work_dir=tmp_path, resume=True)
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_layer_that_never_runs_stays_dense(net: Net, batches: list[Batch]) -> None:
    cfg = obs.OBSConfig(pattern="2:4", curvature="row", num_grads=12)
    before = net.idle.weight.detach().clone()
    report = obs.sparsify_(net, cfg, batches, loss_fn)
    outcome = {layer.name: layer.outcome for layer in report.layers}
    assert outcome["idle"].startswith("skipped: no loss gradient") and outcome["left"] == "pruned"
    assert torch.equal(net.idle.weight, before)


def test_state_goes_round(net: Net, batches: list[Batch]) -> None:
    first, second = obs.OBSPruner(net, config()), obs.OBSPruner(net, config())
    first.collect(batches, loss_fn)
    second.load_state_dict(first.state_dict())
    staged, again = first.stage_layers(), second.stage_layers()
    for a, b in zip(staged, again, strict=True):
        assert torch.equal(a.mask, b.mask) and torch.equal(a.weight, b.weight)


def test_a_layer_that_nothing_reaches_has_a_state(net: Net, batches: list[Batch]) -> None:
    cfg = obs.OBSConfig(pattern="2:4", curvature="row", num_grads=12)
    first, second = obs.OBSPruner(net, cfg), obs.OBSPruner(net, cfg)
    first.collect(batches, loss_fn)
    assert not bool(first.fishers()["idle.weight"].any())
    second.load_state_dict(first.state_dict())
    assert second.stage_layers(["idle"])[0].outcome.startswith("skipped")


def test_a_batch_that_breaks_off_leaves_no_part(
    net: Net, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums and counts go together: a layer has a batch whole or has nothing."""
    pruner = obs.OBSPruner(net, config())
    pruner.collect(batches[:1], loss_fn)
    add, calls = RowLayer.add_tokens, iter(range(9))

    def failing(self: RowLayer, *args: Any) -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt
        add(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(RowLayer, "add_tokens", failing)
        with pytest.raises(KeyboardInterrupt):
            pruner.collect(batches[1:], loss_fn)
    assert all(layer.num_grads == 0 and not layer.has_fisher for layer in pruner.layers)


def test_recomputations_nest(net: Net, batches: list[Batch]) -> None:
    report = obs.sparsify_(net, config("2:8", recomputations=3), batches, loss_fn)
    assert report.stages == ("6:8", "4:8", "2:8")
    assert ((net.left.weight != 0).sum(1) == 2).all()


def test_padding_columns_and_rows(batches: list[Batch]) -> None:
    """8 columns as 12 for a pattern of 6, 8 rows as 12 for panels of 12: what is cut away is never written."""
    torch.manual_seed(0)
    net = Net()
    cfg = config("12:2:6", on_unsupported="pad")
    report = obs.sparsify_(net, cfg, batches, loss_fn)
    assert ((net.left.weight != 0).sum(1) <= 4).all() and report.layers[0].outcome == "pruned"


def test_dead_inputs_need_damping_only(net: Net, batches: list[Batch]) -> None:
    """An input that is always 0 has no curvature; without samples enough H is singular, and damping mends it."""
    for batch in batches:
        batch["x"][..., 2] = 0.0
    obs.sparsify_(net, config(), batches, loss_fn)
    assert torch.isfinite(net.left.weight).all()


def test_singular_hessian(net: Net, batches: list[Batch]) -> None:
    """Too little damping for what f32 can factorise: an error that names the layer, or more damping, reported."""
    for batch in batches:
        batch["x"] = batch["x"][..., :1].expand(-1, -1, 8) * 1e3
    with pytest.raises(SingularBlockError, match=r"(left|right|last)"):
        obs.sparsify_(net, config(damp=1e-12), batches, loss_fn)
    report = obs.sparsify_(net, config(damp=1e-6, on_singular="increase_damp"), batches, loss_fn)
    assert any(layer.damp > 1e-6 and "damping raised" in layer.outcome for layer in report.layers)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p, b: p.accumulate(), "accumulate is for curvature='block'"),
        (lambda p, b: p.set_fishers({}, 1), "set_fishers is for curvature='block'"),
        (lambda p, b: p.prune(), "no gradients"),
    ],
)
def test_what_does_not_go(net: Net, batches: list[Batch], call: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        call(obs.OBSPruner(net, config()), batches)


def test_sequential_is_not_for_one_collection(net: Net, batches: list[Batch]) -> None:
    with pytest.raises(ConfigError, match=r"sequential .* sparsify_"):
        obs.OBSPruner(net, config(sequential=True)).collect(batches, loss_fn)
    with pytest.raises(ConfigError, match="re-iterable"):
        obs.sparsify_(net, config(sequential=True), iter(batches), loss_fn)


def test_plan_counts_hessians(net: Net) -> None:
    plan = obs.OBSPruner(net, config()).plan()
    assert {row.name: row.fisher_bytes for row in plan.layers if row.group >= 0} == {
        "last": 4 * 16 * 16,
        "left": 4 * 8 * 8,
        "right": 4 * 8 * 8,
    }
    assert "gradients buffered" not in str(plan)
