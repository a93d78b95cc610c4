# SPDX-License-Identifier: Apache-2.0
"""The Trainer's callback and the parts for own loops: when they prune, that masks hold, and resuming bit for bit."""

from __future__ import annotations

import copy
import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from obs_kernels.errors import CheckpointFormatError, ConfigError, ResumeMismatchError
from obs_kernels.pruning.held_masks import HeldMasks
from obs_kernels.pruning.schedule import PruningSchedule
from obs_kernels.pruning.state_files import STATE_JSON, STATE_TENSORS, read_state, write_state
from obs_kernels.training.gradual import GradualPruning
from tests.tiny_training import SCHEDULE, config, pruner_of, samples, span_loss, stacked, tiny_model, trainer_of

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import TrainerCallback

from obs_kernels.training import OBSPruningCallback

PRUNED_BEFORE = (3, 6, 9)


def callback(curvature: str = "block", **changes: Any) -> OBSPruningCallback:
    schedule, source = changes.pop("schedule", SCHEDULE), changes.pop("resume_from", None)
    found = config(curvature, **changes)
    return OBSPruningCallback(found, schedule, stacked(samples(5)), span_loss, resume_from=source)


class Watch(TrainerCallback):
    """Violations after every optimizer step, and the sparsity before each."""

    def __init__(self, watched: OBSPruningCallback) -> None:
        self.watched, self.violations, self.position = watched, list[int](), list[int]()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.watched.gradual is not None
        self.violations.append(self.watched.gradual.pruner.verify())
        self.position.append(self.watched.gradual.position)


class Kill(TrainerCallback):
    """Ends the process's training by an exception at one moment."""

    def __init__(self, event: str, step: int) -> None:
        self.event, self.step = event, step

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_") and name == object.__getattribute__(self, "event"):
            return self._kill
        return object.__getattribute__(self, name)

    def _kill(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


def run(folder: Path, curvature: str = "block", **changes: Any) -> tuple[nn.Module, OBSPruningCallback, Any]:
    model, found = tiny_model(), callback(curvature)
    trainer = trainer_of(model, folder, [found], **changes)
    found.attach(trainer)
    trainer.train()
    return model, found, trainer


@pytest.fixture(scope="module")
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp(f"whole-{request.param}")
    model, found, trainer = run(folder, request.param)
    return {"curvature": request.param, "model": model, "callback": found, "trainer": trainer, "folder": folder}


@pytest.mark.parametrize("whole", ["block", "row"], indirect=True)
def test_prunes_on_schedule_and_logs(whole: dict[str, Any]) -> None:
    pruner = whole["callback"].gradual.pruner
    assert str(pruner.reached) == "2:8" and pruner.verify() == 0
    assert whole["model"].obs_kernels_pruned["pattern"] == "2:8"
    history = whole["trainer"].state.log_history
    pruned = [row for row in history if "obs/prunings_done" in row]
    assert [row["step"] for row in pruned] == list(PRUNED_BEFORE)
    assert [row["sparsity/global"] for row in pruned] == pytest.approx([0.25, 0.5, 0.75])
    for row in pruned:
        assert row["obs/mask_violations"] == 0 and row["obs/damp_used"] > 0
        assert row["sparsity/bert.encoder.layer.0.output.dense"] > 0
    saliency = [row["obs/saliency_removed"] for row in pruned]
    assert saliency == sorted(saliency) and saliency[0] > 0
    trained = [row for row in history if "loss" in row]
    assert len(trained) == 12 and trained[-1]["sparsity/global"] == pytest.approx(0.75)
    assert all(row["obs/mask_violations"] == 0 for row in trained)


@pytest.mark.parametrize(
    ("whole", "event", "step", "last"),
    [
        ("block", "on_step_begin", 2, 2),
        (
            "block",
            "on_pre_optimizer_step",
            3,
            3,
        ),  # pruned, and nothing saved since: pruned again, from the same weights
        ("block", "on_save", 7, 6),  # the checkpoint of step 7 is there, its masks are not
        ("block", "on_step_end", 10, 9),
        ("row", "on_step_end", 10, 9),
    ],
    indirect=["whole"],
)
def test_a_killed_run_resumes_bit_for_bit(
    whole: dict[str, Any], tmp_path: Path, event: str, step: int, last: int
) -> None:
    found = callback(whole["curvature"])
    kill = Kill(event, step)
    callbacks = [kill, found] if event == "on_save" else [found, kill]
    trainer = trainer_of(tiny_model(), tmp_path, callbacks)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    model, again = tiny_model(seed=99), callback(whole["curvature"])  # its weights come from the checkpoint
    torch.rand(5)
    trainer = trainer_of(model, tmp_path, [again])
    again.attach(trainer)
    assert (tmp_path / f"checkpoint-{last}" / STATE_JSON).is_file()
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{last}"))
    assert_same(weights(model), weights(whole["model"]))
    mine, theirs = again.gradual.pruner, whole["callback"].gradual.pruner
    assert_same(mine.masks(), theirs.masks())
    assert again.gradual.position == 3 and mine.stages == theirs.stages
    before = [row["step"] for row in trainer.state.log_history if "obs/prunings_done" in row and row["step"] > last]
    assert [s for s in PRUNED_BEFORE if s > last] == before  # no extra pruning


@pytest.mark.parametrize("whole", ["block"], indirect=True)
def test_resuming_with_another_recipe_names_the_keys(whole: dict[str, Any], tmp_path: Path) -> None:
    other = PruningSchedule(start_epoch=0.5, end_epoch=1.5, update_frequency=0.5, shape="linear", initial_sparsity=0.25)
    checkpoint = str(whole["folder"] / "checkpoint-4")
    for changed, keys in (
        (callback(damp=0.5, resume_from=checkpoint), r"config\.damp"),
        (
            callback(schedule=other, resume_from=checkpoint),
            r"schedule\.initial_sparsity, schedule\.ladder, schedule\.shape",
        ),
        (callback(num_grads=8, method="pairwise", resume_from=checkpoint), r"config\.method, config\.num_grads"),
    ):
        model = tiny_model()
        with pytest.raises(ResumeMismatchError, match=rf"another recipe \(differs in .*{keys}"):
            trainer_of(model, tmp_path, [changed]).train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("whole", ["block", "row"], indirect=True)
def test_the_trainer_may_rebuild_the_callback(whole: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = str(whole["folder"] / "checkpoint-7")
    stored = json.loads((whole["folder"] / "checkpoint-7" / "trainer_state.json").read_text())
    assert stored["stateful_callbacks"]["OBSPruningCallback"]["attributes"] == {"position": 2}
    model, again = tiny_model(seed=99), callback(whole["curvature"], resume_from=checkpoint)
    trainer = trainer_of(model, tmp_path, [again], restore_callback_states_from_checkpoint=True)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert_same(weights(model), weights(whole["model"]))
    with pytest.raises(ResumeMismatchError, match="another recipe"):
        OBSPruningCallback(restored="of nobody")


@pytest.mark.parametrize("whole", ["block"], indirect=True)
def test_a_checkpoint_without_state_or_a_damaged_one_is_refused(whole: dict[str, Any], tmp_path: Path) -> None:
    import shutil

    source, copied = whole["folder"] / "checkpoint-5", tmp_path / "moved"
    shutil.copytree(source, copied)
    content = (copied / STATE_TENSORS).read_bytes()
    (copied / STATE_TENSORS).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    found = callback(whole["curvature"], resume_from=copied)
    with pytest.raises(CheckpointFormatError, match="is not the file that"):
        trainer_of(tiny_model(), tmp_path / "a", [found]).train(resume_from_checkpoint=str(copied))
    (copied / STATE_JSON).unlink()
    with pytest.raises(ResumeMismatchError, match=r"no obs_pruning.json in .*moved"):
        trainer_of(tiny_model(), tmp_path / "b", [found]).train(resume_from_checkpoint=str(copied))


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    args = trainer_of(tiny_model(), tmp_path, []).args
    for name, value, text in (
        ("load_best_model_at_end", True, "load_best_model_at_end must be False"),
        ("deepspeed", "zero3.json", "FSDP and DeepSpeed shard the weights"),
    ):
        changed = copy.copy(args)
        object.__setattr__(changed, name, value)
        with pytest.raises(ConfigError, match=text):
            callback().on_train_begin(changed, SimpleNamespace(global_step=0), None, model=tiny_model())  # type: ignore
    with pytest.raises(ConfigError, match="pruner and schedule must be given"):
        OBSPruningCallback()


@pytest.mark.parametrize("whole", ["block"], indirect=True)
def test_masks_of_another_checkpoint_than_the_weights_are_refused(whole: dict[str, Any], tmp_path: Path) -> None:
    folders = [tmp_path / f"checkpoint-{step}" for step in (5, 11)]
    for folder in folders:
        shutil.copytree(whole["folder"] / folder.name, folder)
    early, late = folders
    for name in (STATE_JSON, STATE_TENSORS):
        shutil.copy(late / name, early / name)
    with pytest.raises(
        ResumeMismatchError, match=r"bert\.encoder\.layer\.0\.[\w.]+: weights must be zero where the mask"
    ):
        trainer_of(tiny_model(), tmp_path, [callback()]).train(resume_from_checkpoint=str(early))


def test_a_state_is_refused_without_the_weights_it_is_of() -> None:
    source = GradualPruning(
        pruner_of(tiny_model(layers=1)), SCHEDULE, stacked(samples(5)), span_loss, steps_per_epoch=6
    )
    source.before_step(9)
    model = tiny_model(layers=1)
    gradual = GradualPruning(pruner_of(model), SCHEDULE, stacked(samples(5)), span_loss, steps_per_epoch=6)
    before = weights(model)
    with pytest.raises(ResumeMismatchError, match=r"in 6 of 6 layers.*load the model's weights of the same checkpoint"):
        gradual.load_state_dict(source.state_dict())
    assert gradual.position == 0 and all(layer.mask.all() for layer in gradual.pruner.layers)
    gradual.after_step()
    assert_same(weights(model), before)
    model.load_state_dict(source.pruner.model.state_dict())
    gradual.load_state_dict(source.state_dict())
    assert gradual.position == 3 and gradual.pruner.verify() == 0


def test_state_files_round_trip(tmp_path: Path, gen: torch.Generator) -> None:
    state = {
        "a": {"x.weight": torch.randn(3, 4, generator=gen), "mask": torch.rand(5, generator=gen) > 0.5},
        "list": [1, 2.5, None, "text", torch.arange(4)],
        "empty": {},
        "view": torch.arange(12).view(3, 4).mT,
    }
    write_state(tmp_path, state)
    again = read_state(tmp_path)
    assert torch.equal(again["a"]["x.weight"], state["a"]["x.weight"]) and again["a"]["mask"].dtype == torch.bool
    assert torch.equal(again["view"], state["view"]) and torch.equal(again["list"].pop(), torch.arange(4))
    assert again["list"] == [1, 2.5, None, "text"] and again["empty"] == {}


# own loops


def loop(
    model: nn.Module, gradual: GradualPruning, optimizer: torch.optim.Optimizer, steps: range, *, accumulate: int = 1
) -> list[int]:
    """Violations after each optimizer step."""
    found, batches = [], stacked(samples(), 4)
    model.train()
    for step in steps:
        gradual.before_step(step, optimizer)
        for part in range(accumulate):
            loss = span_loss(model, batches[(step * accumulate + part) % len(batches)]).mean()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        gradual.after_step(optimizer)
        optimizer.zero_grad()
        found.append(gradual.pruner.verify() + gradual.masks.violations())
    return found


OPTIMIZERS = {
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
}


@pytest.mark.parametrize(("name", "accumulate"), [*((name, 1) for name in OPTIMIZERS), ("adamw", 3)])
def test_masks_hold_under_every_optimizer(name: str, accumulate: int) -> None:
    model = tiny_model(layers=1)
    gradual = GradualPruning(pruner_of(model), SCHEDULE, stacked(samples(5)), span_loss, steps_per_epoch=6)
    optimizer = OPTIMIZERS[name](model.parameters())
    assert loop(model, gradual, optimizer, range(12), accumulate=accumulate) == [0] * 12
    for layer in gradual.pruner.layers:  # what the optimizer keeps of pruned weights is zero too
        for value in optimizer.state[layer.weight].values():
            if isinstance(value, Tensor) and value.shape == layer.weight.shape:
                assert not value[~layer.mask].any()
                assert value[layer.mask].any()
    assert gradual.finish().sparsity == pytest.approx(0.75)


def test_without_masks_they_would_grow_back() -> None:
    """What the masks are for: the same loop, the masks left out once."""
    model = tiny_model(layers=1)
    gradual = GradualPruning(pruner_of(model), SCHEDULE, stacked(samples(5)), span_loss, steps_per_epoch=6)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    loop(model, gradual, optimizer, range(10))
    span_loss(model, stacked(samples())[0]).mean().backward()
    optimizer.step()
    assert gradual.masks.violations() > 1000
    gradual.after_step(optimizer)
    assert gradual.masks.violations() == 0
    assert not any(torch.signbit(layer.matrix[~layer.mask]).any() for layer in gradual.pruner.layers)  # +0


def test_averages_and_skipped_steps() -> None:
    """An average of the weights follows the masks, and so does a step that a GradScaler skips."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = tiny_model(layers=1)
    gradual = GradualPruning(pruner_of(model), SCHEDULE, stacked(samples(5)), span_loss, steps_per_epoch=2)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer, scaler = OPTIMIZERS["adamw"](model.parameters()), torch.amp.GradScaler("cpu", init_scale=4.0)
    skipped = 0
    for step in range(6):
        gradual.before_step(step, optimizer)
        scaler.scale(span_loss(model, stacked(samples(), 4)[step]).mean()).backward()
        if step in (1, 4):
            model.qa_outputs.weight.grad.fill_(torch.inf)  # type: ignore[union-attr]
        scaler.step(optimizer)
        before = scaler.get_scale()
        scaler.update()
        skipped += scaler.get_scale() < before
        averaged.update_parameters(model)
        gradual.after_step(optimizer, averaged)
        optimizer.zero_grad()
        assert gradual.pruner.verify() == 0
        for name, mask in gradual.pruner.masks().items():
            assert not averaged.module.get_parameter(name)[~mask].any()
    assert skipped == 2 and gradual.position == 3
    with pytest.raises(ConfigError, match="averaged must be a copy of the pruned model, got Linear"):
        gradual.after_step(optimizer, nn.Linear(2, 2))


def test_the_training_does_not_feel_the_collection_and_the_fisher_does_not_feel_the_training() -> None:
    """Clipping, accumulation and gradients at hand change no Fisher; a collection changes no mode, gradient or seed."""
    found = []
    for disturbed in (False, True):
        model = tiny_model()
        gradual = GradualPruning(pruner_of(model), SCHEDULE, stacked(samples(5)), span_loss, steps_per_epoch=6)
        model.train()
        if disturbed:
            span_loss(model, stacked(samples())[0]).mean().mul(1e6).backward()
        grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
        torch.manual_seed(3)
        gradual.before_step(3)
        after = torch.rand(3)
        torch.manual_seed(3)
        assert torch.equal(after, torch.rand(3)) and all(module.training for module in model.modules())
        for name, p in model.named_parameters():
            assert (p.grad is None) == (grads[name] is None)
            assert p.grad is None or torch.equal(p.grad, grads[name])
        found.append(weights(model))
    assert_same(*found)


def test_an_own_loop_resumes_bit_for_bit(tmp_path: Path) -> None:
    def build() -> tuple[nn.Module, GradualPruning, torch.optim.Optimizer]:
        model = tiny_model(dropout=0.0)
        gradual = GradualPruning(pruner_of(model), SCHEDULE, stacked(samples(5)), span_loss, steps_per_epoch=6)
        return model, gradual, torch.optim.AdamW(model.parameters(), lr=1e-2)

    model, gradual, optimizer = build()
    loop(model, gradual, optimizer, range(12))
    for cut in (3, 6, 8):
        first, begun, adam = build()
        loop(first, begun, adam, range(cut))
        write_state(tmp_path / str(cut), begun.state_dict())
        saved = copy.deepcopy((first.state_dict(), adam.state_dict()))
        second, again, adam = build()
        second.load_state_dict(saved[0])
        adam.load_state_dict(saved[1])
        again.load_state_dict(read_state(tmp_path / str(cut)))
        assert loop(second, again, adam, range(cut, 12)) == [0] * (12 - cut)
        assert_same(weights(second), weights(model))
        assert_same(again.pruner.masks(), gradual.pruner.masks())


def test_held_zeros_of_a_sparse_model() -> None:
    """Sparse transfer: the mask is what the model came with, also where training makes a live weight zero."""
    model = tiny_model(layers=1)
    source = pruner_of(model, method="magnitude", update="none")
    source.prune()
    constant = PruningSchedule(start_epoch=0.0, end_epoch=2.0, shape="constant")
    gradual = GradualPruning(pruner_of(model), constant, steps_per_epoch=6)
    assert gradual.prunings == () and gradual.is_due is None
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    assert loop(model, gradual, optimizer, range(4)) == [0] * 4
    assert_same(gradual.pruner.masks(), source.masks())
    gradual.finish()
    with pytest.raises(ConfigError, match="must come at pattern 2:8"):
        GradualPruning(pruner_of(tiny_model(layers=1)), constant, steps_per_epoch=6)


def test_bad_input_of_the_loop() -> None:
    model = tiny_model(layers=1)
    with pytest.raises(ConfigError, match="loader and loss_fn are needed"):
        GradualPruning(pruner_of(model), SCHEDULE, steps_per_epoch=6)
    with pytest.raises(ConfigError, match="steps_per_epoch must be at least 1"):
        GradualPruning(pruner_of(model), SCHEDULE, stacked(samples()), span_loss, steps_per_epoch=0)
    gradual = GradualPruning(pruner_of(model), SCHEDULE, stacked(samples()), span_loss, steps_per_epoch=6)
    gradual.before_step(3)
    with pytest.raises(
        ConfigError, match=r"after 1 of 3 prunings; the next is due at step 6, the last \(2:8\) at step 9"
    ):
        gradual.finish()
    for state in ({}, gradual.state_dict() | {"position": 4}, {"position": 1, "identity": gradual.identity()}):
        with pytest.raises(ResumeMismatchError):
            gradual.load_state_dict(state)
    assert gradual.position == 1
    state = gradual.state_dict()
    for fitted in (True, False):  # of before refit_norms went: only without it
        for settings in (state["identity"]["config"], state["pruner"]["config"]):
            settings["refit_norms"] = fitted
        with pytest.raises(ResumeMismatchError, match=r"config\.refit_norms\)") if fitted else nullcontext():
            gradual.load_state_dict(state)


def test_gradients_at_pruned_places_leave_the_norm() -> None:
    model = tiny_model(layers=1)
    pruner = pruner_of(model, method="magnitude", update="none")
    pruner.prune()
    held = HeldMasks(pruner.layers)
    span_loss(model, stacked(samples())[0]).mean().backward()
    held.mask_gradients()
    for layer in pruner.layers:
        grad = layer.weight.grad
        assert grad is not None and not grad[~layer.mask].any() and grad[layer.mask].any()
