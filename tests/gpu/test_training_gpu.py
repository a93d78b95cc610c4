# SPDX-License-Identifier: Apache-2.0
"""Training with pruning on a GPU: captured steps against eager ones, skipped steps in half precision, NCCL."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from bench.gradual_run import Trainee, TrainSettings
from obs_kernels.pruning.schedule import PruningSchedule
from obs_kernels.training import GradualPruning
from tests import gloo_workers
from tests.tiny_training import SCHEDULE, config, pruner_of, samples, span_loss, stacked, tiny_model, tiny_windows

pytest.importorskip("transformers")
pytestmark = pytest.mark.gpu

STEPS = PruningSchedule(start_epoch=0.5, end_epoch=2.0, update_frequency=0.5, shape="structure_decay")


def trainee(device: str = "cuda", *, graphs: bool, **changes: Any) -> Trainee:
    model = tiny_model(dropout=changes.pop("model_dropout", 0.0), positions=128).to(device)
    settings = {"epochs": 3.0, "batch_size": 8, "learning_rate": 1e-3, "hardness": 0.5}
    autocast = changes.pop("autocast", None)
    return Trainee(
        model,
        copy.deepcopy(model),
        tiny_windows(160, longest=96),
        TrainSettings(**settings | changes),
        config=config(),
        schedule=STEPS,
        seed=3,
        graphs=graphs,
        autocast=autocast,
    )


def test_captured_steps_are_the_eager_ones() -> None:
    found = []
    for graphs in (False, True):
        run = trainee(graphs=graphs)
        run.train(float("inf"), lambda: None)
        assert run.gradual is not None and run.gradual.position == 4 and run.gradual.pruner.verify() == 0
        assert str(run.gradual.finish().pattern) == "2:8"
        assert len(run._graphs) == (3 if graphs else 0)  # widths 32 to 96
        found.append(run.losses)
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(found[0]), rtol=5e-3, atol=0.0)


def test_captured_steps_in_bf16_with_dropout_follow_masks_and_rates() -> None:
    run = trainee(graphs=True, autocast=torch.bfloat16, model_dropout=0.3)
    run.train(float("inf"), lambda: None)
    assert run.gradual is not None and run.gradual.pruner.verify() == 0 and run.gradual.sparsity == pytest.approx(0.75)
    assert all(torch.isfinite(torch.tensor(run.losses))) and run.losses[-1] < run.losses[0] * 1.5
    graph, _ = next(iter(run._graphs.values()))
    for group in run.optimizer.param_groups:
        group["lr"].fill_(0.0)
    losses, before = [], run.model.qa_outputs.weight.detach().clone()  # type: ignore[union-attr, operator]
    for _ in range(2):
        run.loss_sum.zero_()
        graph.replay()
        losses.append(float(run.loss_sum))
    assert losses[0] != losses[1]  # the same windows and weights, another dropout
    assert torch.equal(before, run.model.qa_outputs.weight)  # type: ignore[union-attr, arg-type]


def test_a_run_with_graphs_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    first = trainee(graphs=True)
    first.train(float("inf"), lambda: first.save(tmp_path) if first.epoch == 1.0 else None)
    second = trainee(graphs=True)
    assert second.load(tmp_path) and second.epoch == 1.0
    second.train(float("inf"), lambda: None)
    torch.testing.assert_close(torch.tensor(second.losses), torch.tensor(first.losses), rtol=5e-3, atol=0.0)
    assert second.gradual is not None and second.gradual.position == 4 and second.gradual.pruner.verify() == 0


def test_masks_hold_where_a_scaler_skips_in_half_precision() -> None:
    model = tiny_model(layers=1).cuda().train()
    gradual = GradualPruning(pruner_of(model), SCHEDULE, stacked(samples(5)), span_loss, steps_per_epoch=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**24)  # overflows at first
    skipped = 0
    for step in range(12):
        gradual.before_step(step, optimizer)
        batch = {key: value.cuda() for key, value in stacked(samples(), 4)[step % 6].items()}
        with torch.autocast("cuda", dtype=torch.float16):
            loss = span_loss(model, batch).mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        before = scaler.get_scale()
        scaler.update()
        skipped += scaler.get_scale() < before
        gradual.after_step(optimizer)
        optimizer.zero_grad()
        assert gradual.pruner.verify() == 0
    assert skipped > 0 and gradual.position == 3


@pytest.mark.multigpu
def test_two_gpus_equal_one(tmp_path: Path) -> None:
    mp.spawn(gloo_workers.equality, args=(str(tmp_path), "nccl"), nprocs=2)
    for case in gloo_workers.CASES:
        _, pruner = gloo_workers.pruned(case, shared=False, device="cuda:0")
        both = [torch.load(tmp_path / f"{case}.{rank}.pt") for rank in (0, 1)]
        for layer in pruner.layers:
            assert torch.equal(both[0]["weights"][layer.name], both[1]["weights"][layer.name])
            same = (both[0]["masks"][layer.name] == layer.mask.cpu()).double().mean()
            assert float(same) > 0.99, (case, layer.name)  # near-ties may fall either way
        assert both[0]["violations"] == both[1]["violations"] == 0
        if case != "magnitude":
            assert both[0]["saliency"] == pytest.approx(pruner.report().saliency, rel=1e-2), case
