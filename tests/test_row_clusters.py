# SPDX-License-Identifier: Apache-2.0
"""Clusters of rows: which rows go together, and that each cluster is pruned by its own Hessian; brute force in f64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_layerwise import LAYERS, SAMPLES, Problem, make
from test_layerwise import batches as batches  # the fixture
from test_layerwise import loss_fn as sequential_loss
from torch import Tensor, nn

import obs_kernels as obs
from obs_kernels.errors import ConfigError, ResumeMismatchError
from obs_kernels.pruning.distributed import distributed_step
from obs_kernels.pruning.row_clusters import like_units
from obs_kernels.pruning.row_layer import RowLayer
from obs_kernels.pruning.row_step import prune_rows
from obs_kernels.pruning.sparsify import run_stages

Batch = dict[str, Tensor]
ROWS, COLS, TOKENS = 16, 8, 240


class TwoKinds(nn.Module):
    """One layer, whose first inputs say of what kind a token is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(COLS, ROWS)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


KIND = torch.tensor([0, 1, 1, 0, 0, 0, 1, 0, 1, 1, 0, 1, 0, 1, 1, 0])
"""Of each row: which kind of tokens it matters for."""


def kinds_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Rows of a kind are asked for much at tokens of that kind, and little elsewhere."""
    share = torch.where(batch["kind"][..., None] == KIND, 3.0, 0.05)
    return (share * (model(batch["x"]) - batch["y"]).square()).sum((1, 2))


@pytest.fixture
def kinds(gen: torch.Generator) -> list[Batch]:
    """Inputs of one kind are correlated in another way than those of the other."""
    mixes = torch.randn(2, COLS, COLS, generator=gen)
    found = []
    for _ in range(3):
        kind = torch.randint(0, 2, (8, 10), generator=gen)
        x = torch.einsum("ntc,ntcd->ntd", torch.randn(8, 10, COLS, generator=gen), mixes[kind])
        found.append({"x": x, "y": torch.randn(8, 10, ROWS, generator=gen), "kind": kind})
    return found


def config(clusters: int, pattern: str = "2:4", **changes: Any) -> obs.OBSConfig:
    changes = {"num_grads": 24} | changes
    return obs.OBSConfig(pattern=pattern, curvature="row", row_clusters=clusters, **changes)


def collected(clusters: int, kinds: list[Batch], **changes: Any) -> tuple[obs.OBSPruner, RowLayer]:
    torch.manual_seed(0)
    pruner = obs.OBSPruner(TwoKinds(), config(clusters, **changes))
    pruner.collect(kinds, kinds_loss)
    (layer,) = pruner.layers
    assert isinstance(layer, RowLayer)
    return pruner, layer


def own_hessians(net: TwoKinds, kinds: list[Batch]) -> tuple[Tensor, Tensor]:
    """[R, C, C] and [R] f64: ``1/S sum_t dy_tr^2 x_t x_t^T`` and ``1/S sum_t dy_tr^2``, by the definition."""
    hessians, rows = torch.zeros(ROWS, COLS, COLS, dtype=torch.float64), torch.zeros(ROWS, dtype=torch.float64)
    for batch in kinds:
        y = net(batch["x"])
        (dy,) = torch.autograd.grad((kinds_loss(lambda _, y=y: y, batch)).sum(), y)
        squares, x = dy.double().square().reshape(-1, ROWS), batch["x"].double().reshape(-1, COLS)
        hessians += torch.einsum("tr,tc,td->rcd", squares, x, x) / 24
        rows += squares.sum(0) / 24
    return hessians, rows


def test_rows_that_weigh_tokens_alike_go_together(kinds: list[Batch]) -> None:
    """The two kinds of rows, which the weights of tokens alone tell apart."""
    _, layer = collected(2, kinds)
    assert layer.clusters is not None
    assert torch.equal(layer.clusters == layer.clusters[0], KIND[0] == KIND)


@pytest.mark.parametrize("clusters", [2, 3, ROWS])
def test_hessians_are_sums_over_the_rows_of_a_cluster(clusters: int, kinds: list[Batch]) -> None:
    pruner, layer = collected(clusters, kinds)
    assert isinstance(pruner.model, TwoKinds) and layer.clusters is not None
    hessians, rows = own_hessians(pruner.model, kinds)
    found, scale = layer.mean_fisher(), layer.row_scale().double()
    assert found.shape == (clusters, COLS, COLS)
    for cluster in range(clusters):
        own = layer.clusters == cluster
        wanted = hessians[own].sum(0)
        torch.testing.assert_close(found[cluster].double(), wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))
        torch.testing.assert_close(scale[own], rows[own] / rows[own].sum(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("pattern", ["2:4", "2:8"])
def test_as_many_clusters_as_rows_is_each_rows_own_hessian(pattern: str, kinds: list[Batch]) -> None:
    """Every row as if it were a layer of its own, to the choice."""
    pruner, layer = collected(ROWS, kinds, pattern=pattern, refit_bias=False)
    assert isinstance(pruner.model, TwoKinds)
    hessians, _ = own_hessians(pruner.model, kinds)
    step = prune_rows(layer, pruner.stages[0], pruner.config)
    for row in range(ROWS):
        damp = 0.01 * float(hessians[row].diagonal().mean())
        weight = layer.matrix[row : row + 1]
        sel = obs.ops.sweep_rows(weight, hessians[row].float(), obs.parse_pattern(pattern), damp=damp)
        assert torch.equal(step.mask[row : row + 1], sel.mask)
        torch.testing.assert_close(step.weight[row : row + 1], sel.weight, rtol=1e-3, atol=1e-4)


def test_more_clusters_lose_less(kinds: list[Batch]) -> None:
    """By every row's own Hessian, in f64; the two kinds of rows have little in common."""
    losses = {}
    for clusters in (1, 2, ROWS):
        pruner, layer = collected(clusters, kinds, refit_bias=False)
        assert isinstance(pruner.model, TwoKinds)
        hessians, _ = own_hessians(pruner.model, kinds)
        change = prune_rows(layer, pruner.stages[0], pruner.config).weight.double() - layer.matrix.double()
        losses[clusters] = 0.5 * float(torch.einsum("rc,rcd,rd->", change, hessians, change))
    assert losses[ROWS] < losses[2] < 0.9 * losses[1]


def test_by_its_own_hessian_a_cluster_is_the_best_for_its_mask(kinds: list[Batch]) -> None:
    """Against the solution of one Hessian for all rows at the same mask, the damping included."""
    pruner, layer = collected(3, kinds, refit_bias=False)
    _, shared = collected(1, kinds, refit_bias=False)
    step = prune_rows(layer, pruner.stages[0], pruner.config)
    total, hessians = shared.mean_fisher()[0].double(), layer.mean_fisher().double()
    dense, predicted = layer.matrix.double(), 0.0
    assert layer.clusters is not None
    scale = layer.row_scale().double()
    for row in range(ROWS):
        kept = step.mask[row].nonzero().flatten()
        hessian = hessians[layer.clusters[row]]
        hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(COLS)
        other = torch.zeros(COLS, dtype=torch.float64)
        other[kept] = torch.linalg.solve(total[kept][:, kept], (total @ dense[row])[kept])
        lost = [w - dense[row] for w in (step.weight[row].double(), other)]
        mine, theirs = (0.5 * float(d @ hessian @ d) for d in lost)
        assert mine <= theirs * (1 + 1e-5)
        predicted += float(scale[row]) * mine
    assert step.saliency == pytest.approx(predicted, rel=1e-3)


def test_an_absolute_damping_is_shared_out(kinds: list[Batch]) -> None:
    """A row has ``h_r / sum(h) damp`` on its diagonal whatever the clusters are."""
    _, one = collected(1, kinds, damp=0.5)
    pruner, layer = collected(4, kinds, damp=0.5)
    on_rows = torch.zeros(ROWS)
    for cluster in range(4):
        rows = layer.rows_of(cluster)
        damp = layer.damp_of(layer.moments(cluster, free_bias=True), pruner.config, cluster)
        on_rows[rows] = layer.row_scale()[rows] * damp
    torch.testing.assert_close(on_rows, one.row_scale() * 0.5, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("pattern", ["4:2:4", "4:2:8"])
def test_panels_stay_whole(pattern: str, kinds: list[Batch]) -> None:
    """Rows of both kinds in a panel: it goes where most of its loss is, and the pattern holds."""
    pruner, layer = collected(2, kinds, pattern=pattern)
    assert layer.clusters is not None
    panels = layer.clusters.view(-1, 4)
    assert bool((panels == panels[:, :1]).all()) and len(panels.unique()) == 2
    pruner.prune()
    assert pruner.verify() == 0
    _, more = collected(99, kinds, pattern=pattern)
    assert more.num_clusters == 4 and more.clusters is not None
    assert more.clusters.tolist() == [panel for panel in range(4) for _ in range(4)]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("clusters", [2, 99])
def test_layer_by_layer_every_row_is_the_best_for_its_mask(clusters: int, name: str, batches: list[Batch]) -> None:
    """What a row is fitted to are the tokens by the weights of its cluster, what the layers before left included."""
    dense = make(listed=True)
    net = copy.deepcopy(dense)
    pruner = obs.OBSPruner(net, config(clusters, sequential=True, num_grads=SAMPLES))
    run_stages(pruner, batches, sequential_loss)
    layer = next(layer for layer in pruner.layers if layer.name == name)
    assert isinstance(layer, RowLayer) and layer.clusters is not None
    problem = Problem(dense, net, batches, name)
    squares = problem.squares
    for cluster in range(layer.num_clusters):
        rows = (layer.clusters == cluster).nonzero().flatten()
        problem.weight = squares[:, rows].sum(1)
        weight, bias = problem.solve(layer.mask, problem.damp(0.01), free_bias=True)
        assert bias is not None and layer.bias is not None
        torch.testing.assert_close(layer.matrix[rows].double(), weight[rows], rtol=2e-3, atol=2e-4)
        torch.testing.assert_close(layer.bias.detach()[rows].double(), bias[rows], rtol=2e-3, atol=2e-4)


def test_k_means() -> None:
    """Planted groups of unlike size are found, the same ones for one seed, and none is empty."""
    generator = torch.Generator().manual_seed(5)
    own = torch.tensor([0] * 30 + [1] * 5 + [2] * 10)
    points = 10.0 * torch.eye(3, dtype=torch.float64)[own] + torch.rand(45, 3, generator=generator, dtype=torch.float64)
    weight = torch.rand(45, generator=generator, dtype=torch.float64) + 0.1
    found = like_units(points, weight, 3, seed=0)
    assert all(len(found[own == group].unique()) == 1 for group in range(3)) and len(found.unique()) == 3
    assert torch.equal(found, like_units(points, weight, 3, seed=0))
    alike = like_units(torch.ones(7, 3, dtype=torch.float64), torch.zeros(7, dtype=torch.float64), 4, seed=0)
    assert alike.unique().tolist() == [0, 1, 2, 3]
    # of two ways to cut a line in two, the heavy end decides
    line = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    for heavy, alone in ((0, 0), (2, 2)):
        share = torch.ones(3, dtype=torch.float64)
        share[heavy] = 50.0
        cut = like_units(line, share, 2, seed=0)
        assert int((cut == cut[alone]).sum()) == 1


def test_state_goes_round(kinds: list[Batch]) -> None:
    pruner, layer = collected(3, kinds)
    state = pruner.state_dict()
    other, same = collected(3, kinds[:1])
    other.load_state_dict(state)
    assert layer.clusters is not None and same.clusters is not None and torch.equal(same.clusters, layer.clusters)
    assert other.prune().saliency == pruner.prune().saliency
    assert torch.equal(same.matrix, layer.matrix)
    bad = {"layer": torch.full((ROWS,), 3)}
    with pytest.raises(ResumeMismatchError, match=r"state\['clusters'\]\['layer'\] must hold 0 to 2, got 3 to 3"):
        other.load_state_dict(state | {"clusters": bad})
    with pytest.raises(ResumeMismatchError, match=r"state\['clusters'\]\['layer'\] must be \[16\] torch.int64"):
        other.load_state_dict({key: value for key, value in state.items() if key != "clusters"})


def test_collected_again_the_clusters_stay(kinds: list[Batch]) -> None:
    """More tokens go to the same clusters; sums of two would not add up otherwise."""
    pruner, layer = collected(3, kinds)
    assert layer.clusters is not None
    before = layer.clusters.clone()
    assert pruner.collect(kinds[:1], kinds_loss) == 8
    assert torch.equal(layer.clusters, before) and layer.num_grads == 32
    _, fresh = collected(3, kinds[:1])
    assert fresh.clusters is not None and not torch.equal(fresh.clusters, before)  # it would have been another choice


def test_what_does_not_go(kinds: list[Batch]) -> None:
    with pytest.raises(
        ConfigError, match=r"row_clusters needs curvature='row', got 2 with 'block'; use row_clusters=1"
    ):
        obs.OBSConfig(pattern="2:4", curvature="block", row_clusters=2)
    with pytest.raises(ConfigError, match=r"row_clusters must be an integer of at least 1, got 0"):
        config(0)
    pruner = obs.OBSPruner(TwoKinds(), config(2))
    with pytest.raises(ConfigError, match=r"loader is an iterator.*row_clusters takes one more pass"):
        pruner.collect(iter(kinds), kinds_loss)
    with pytest.raises(ConfigError, match=r"row_clusters is for one process, got 2 with several; use row_clusters=1"):
        distributed_step(pruner, "2:4", kinds, kinds_loss)


def test_plan_counts_a_hessian_a_cluster() -> None:
    sizes = [obs.OBSPruner(TwoKinds(), config(clusters)).plan().fisher_bytes for clusters in (1, 4)]
    assert sizes == [4 * COLS**2, 16 * COLS**2]
