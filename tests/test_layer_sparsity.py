# SPDX-License-Identifier: Apache-2.0
"""Layers with a sparsity of their own: exact counts, on the way too, and what does not go together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from obs_kernels import OBSConfig, OBSPruner, sparsify_
from obs_kernels.errors import ConfigError, ResumeMismatchError
from obs_kernels.pruning import gradual_step
from obs_kernels.pruning.schedule import PruningSchedule

OWN = {"first": 0.75, "re:.*third": 0.25}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second, self.third = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def loss_fn(net: nn.Module, batch: Tensor) -> Tensor:
    return net(batch).square().sum(1)


def batches() -> list[Tensor]:
    return list(torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(1)))


def config(pattern: str, **changes: Any) -> OBSConfig:
    return OBSConfig(**{"pattern": pattern, "num_grads": 32, "fisher_block_size": 16, "layer_sparsity": OWN} | changes)


def pruned(pruner: OBSPruner) -> dict[str, int]:
    return {layer.name: int((~layer.mask).sum()) for layer in pruner.layers}


@pytest.mark.parametrize("pattern", ["unstructured:0.5", "block4:0.5"])
@pytest.mark.parametrize("method", ["combinatorial", "magnitude"])
def test_each_layer_has_its_own_count(pattern: str, method: str) -> None:
    net = Net()
    pruner = OBSPruner(net, config(pattern, method=method))
    assert [row.pattern.split(":")[1] for row in pruner.plan().layers] == ["0.75", "0.5", "0.25"]
    pruner.collect(batches(), loss_fn)
    report = pruner.prune()
    assert pruned(pruner) == {"first": 192, "second": 128, "third": 64}
    assert [layer.pattern.split(":")[1] for layer in report.layers] == ["0.75", "0.5", "0.25"]
    assert report.sparsity == 0.5 and pruner.verify() == 0
    assert int((net.first.weight == 0).sum()) == 192


def test_on_the_way_it_is_the_same_share_of_its_own() -> None:
    pruner = OBSPruner(Net(), config("unstructured:0.5"))
    gradual_step(pruner, "unstructured:0.25", batches(), loss_fn)
    assert pruned(pruner) == {"first": 96, "second": 64, "third": 32}
    before = {layer.name: layer.mask.clone() for layer in pruner.layers}
    gradual_step(pruner, "unstructured:0.5", batches(), loss_fn)
    assert pruned(pruner) == {"first": 192, "second": 128, "third": 64}
    assert all(bool((before[layer.name] | ~layer.mask).all()) for layer in pruner.layers)  # nothing opens again
    parts = Net()
    assert sparsify_(parts, config("unstructured:0.5", recomputations=2), batches(), loss_fn).stages[0].endswith("0.25")
    assert int((parts.first.weight == 0).sum()) == 192


def test_a_model_that_comes_so_can_be_held() -> None:
    from obs_kernels.training import GradualPruning

    net, own = Net(), {"second": 0.9}
    sparsify_(net, config("unstructured:0.5", layer_sparsity=own), batches(), loss_fn)
    constant = PruningSchedule(start_epoch=0.0, end_epoch=1.0, shape="constant")
    held = GradualPruning(OBSPruner(net, config("unstructured:0.5", layer_sparsity=own)), constant, steps_per_epoch=4)
    assert pruned(held.pruner) == {"first": 128, "second": 230, "third": 128}
    with pytest.raises(ConfigError, match=r"must come with 0\.7667 of its weights pruned"):
        GradualPruning(
            OBSPruner(net, config("unstructured:0.5", layer_sparsity={"re:first|second": 0.9})),
            constant,
            steps_per_epoch=4,
        )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"pattern": "2:8"}, "layer_sparsity needs an unstructured or block pattern"),
        ({"global_sparsity": True}, "layer_sparsity needs an unstructured or block pattern"),
        ({"curvature": "layer", "fisher_block_size": None}, "layer_sparsity needs an unstructured or block pattern"),
        ({"pattern": "unstructured:0.0"}, "needs a pattern of more than 0"),
        ({"layer_sparsity": {"first": 1.0}}, "above 0 and below 1, got 'first': 1.0"),
        ({"layer_sparsity": {"first": "much"}}, r"layer_sparsity\['first'\] must be a number, got 'much'"),
        ({"layer_sparsity": 0.5}, "must map names"),
        ({"layer_sparsity": {"fourth": 0.5}}, r"layer_sparsity\['fourth'\] matches no layer that is pruned"),
        ({"layer_sparsity": {"first": 0.5, "re:f.*": 0.6}}, "one sparsity for 'first', got 'first' and 're:f"),
    ],
)
def test_what_does_not_go_together(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        OBSPruner(Net(), config(**{"pattern": "unstructured:0.5"} | changes))


def test_round_trips() -> None:
    found = config("unstructured:0.5")
    assert OBSConfig.from_dict(found.to_dict()) == found and found.to_dict()["layer_sparsity"] == OWN
    assert hash(found) == hash(config("unstructured:0.5", layer_sparsity=tuple(OWN.items())))
    plain = config("unstructured:0.5", layer_sparsity={})
    assert "layer_sparsity" not in plain.to_dict()
    for one, other in ((found, plain), (plain, found)):
        with pytest.raises(ResumeMismatchError, match=r"differs in layer_sparsity\)"):
            OBSPruner(Net(), one).load_state_dict(OBSPruner(Net(), other).state_dict())
    recipes = pytest.importorskip("obs_kernels.recipes")
    pytest.importorskip("pydantic")
    yaml = pytest.importorskip("yaml")
    recipe = recipes.load_recipe(
        "30epochs_unstructured90_squad", {"layer_sparsity": "{'re:.*query': 0.8}", "global_sparsity": "false"}
    )
    assert recipe.pruning.layer_sparsity == (("re:.*query", 0.8),)
    assert yaml.safe_load(recipe.to_yaml())["pruning"]["layer_sparsity"] == {"re:.*query": 0.8}


def test_on_the_command_line() -> None:
    pytest.importorskip("typer")
    from obs_kernels.cli_prune import _config

    options = {"pattern": "unstructured:0.5", "layer_sparsity": ["first=0.75", "re:.*=x=0.25"]}
    assert _config(None, options).layer_sparsity == (("first", 0.75), ("re:.*=x", 0.25))
    with pytest.raises(ConfigError, match=r"--layer-sparsity must be NAME=SHARE, got '0\.5'"):
        _config(None, options | {"layer_sparsity": ["0.5"]})
