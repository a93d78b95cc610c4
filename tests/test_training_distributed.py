# SPDX-License-Identifier: Apache-2.0
"""Several processes: equal to one process on the same samples, balanced owners, and errors that end all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from obs_kernels.pruning.distributed import is_distributed, owners_by_bytes
from tests import gloo_workers

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")


@dataclass(eq=False)
class Layer:
    name: str
    fisher_bytes: int
    mask: torch.Tensor = field(default_factory=lambda: torch.ones(1))


def test_owners_are_balanced_by_bytes() -> None:
    sizes = {"a": 10, "b": 9, "c": 3, "d": 3, "e": 3, "f": 1}
    layers = [Layer(name, size - 1) for name, size in sizes.items()]
    owners = owners_by_bytes(layers, 2)  # type: ignore[arg-type]
    loads = [sum(sizes[layer.name] for layer, rank in owners.items() if rank == r) for r in (0, 1)]
    assert sorted(loads) == [14, 15]
    assert set(owners_by_bytes(layers[:1], 4).values()) == {0} and not is_distributed()  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gloo")
    mp.spawn(gloo_workers.equality, args=(str(folder),), nprocs=2)
    return folder


def test_two_processes_equal_one(done: Path) -> None:
    for case in gloo_workers.CASES:
        _, pruner = gloo_workers.pruned(case, shared=False)
        both = [torch.load(done / f"{case}.{rank}.pt") for rank in (0, 1)]
        for found in both:
            assert found["violations"] == 0 and found["config"] == pruner.config.to_dict(), case
            assert found["num_grads"] == pruner.report().num_grads and not found["owned"], case
            for layer in pruner.layers:
                assert torch.equal(found["masks"][layer.name], layer.mask), (case, layer.name)
                torch.testing.assert_close(found["weights"][layer.name], layer.matrix, rtol=2e-3, atol=2e-5)
                if layer.bias is not None:
                    torch.testing.assert_close(found["biases"][layer.name], layer.bias.detach(), rtol=2e-3, atol=2e-5)
            if case != "magnitude":
                assert found["saliency"] == pytest.approx(pruner.report().saliency, rel=1e-3), case
        for layer in pruner.layers:
            assert torch.equal(both[0]["weights"][layer.name], both[1]["weights"][layer.name])


def test_an_error_of_one_process_ends_all(done: Path) -> None:
    for rank in (0, 1):
        disagree, few, one, after, none, each, *damaged = (done / f"lines.{rank}").read_text().splitlines()
        assert disagree.startswith("disagree: DeviceMismatchError: weights and masks must be the same in all processes")
        assert "got 2 different ones (processes [0], [1])" in disagree and disagree.endswith("unchanged True")
        assert few.startswith("too few: ConfigError: loader must give a batch to each of 2 processes, got 1")
        assert few.endswith("unchanged True")
        assert one.startswith("one fails: NonFiniteGradientError: " + ("process 1: " if rank == 0 else ""))
        assert after == "after that: fine"
        assert none.startswith("no tensor: ConfigError: batch 0 of loader must hold a tensor whose first dimension")
        assert "got dict without one" in none and none.endswith("unchanged True")
        assert each == "no tensor, batch gradients: fine"
        for line in damaged:
            assert line.startswith("damaged on the way: DeviceMismatchError: weights and masks must be the same in all")
            assert "after the step" in line and line.endswith("unchanged True")
        assert len(damaged) == 2


def test_a_checkpoint_is_whole_when_all_processes_have_written(done: Path) -> None:
    assert (done / "whole with").read_text() == "rng_state_1.pth whole.json"


def test_a_trainer_of_two_processes(done: Path) -> None:
    first, second = (torch.load(done / f"trained.{rank}.pt") for rank in (0, 1))
    for found in (first, second):
        assert found["violations"] == 0 and found["position"] == 3 and found["sparsity"] == pytest.approx(0.75)
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
