# SPDX-License-Identifier: Apache-2.0
"""The job of ``obs-kernels train``: fine-tune a model by a recipe, prune it meanwhile, and write its folder.

What is written appears whole or not at all; checkpoints are kept in ``<out>.work`` until then, and a run that was cut
off goes on from the last whole one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from obs_kernels.errors import ConfigError, MissingDependencyError, ResumeMismatchError
from obs_kernels.files import hold_folder, whole_folder, write_text
from obs_kernels.pruning import OBSConfig, OBSPruner
from obs_kernels.pruning.schedule import PruningSchedule
from obs_kernels.recipes import Recipe
from obs_kernels.sparse.linear import PRUNED_ATTRIBUTE
from obs_kernels.training.distillation import Distiller
from obs_kernels.training.environment import environment
from obs_kernels.training.gradual import GradualPruning, check_identity
from obs_kernels.training.layer_drop import drop_layers_
from obs_kernels.training.model_folder import (
    ModelFiles,
    check_out,
    make_trainable,
    violations_in_file,
    why_not_packed,
    write_models,
    write_reports,
)
from obs_kernels.training.models import load_model, pick_device
from obs_kernels.training.squad_batches import model_inputs
from obs_kernels.training.tasks import HEADS, LABEL_COUNTS, Source, TaskData, curvature_loss, load_task

JOB = "job.json"
SELF, DISABLE = "self", "disable"
"""In place of a teacher's name: the model as it comes, and none."""


@dataclass
class _Run:
    """What the parts of a job share."""

    recipe: Recipe
    net: nn.Module
    tokenizer: Any
    task: TaskData
    device: torch.device
    distiller: Distiller | None
    pruner: OBSPruner | None
    work: Path
    say: Callable[[str], None]
    notes: list[str] = field(default_factory=list)
    accuracy: dict[str, dict[str, Any]] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return int(os.environ.get("RANK", "0")) == 0

    def score(self, name: str, model: nn.Module) -> None:
        """Evaluate a model under a name, in the first process."""
        if self.is_first:
            scores = self.accuracy[name] = self.task.evaluate(model)
            self.say(f"{name}: {', '.join(f'{k} {v:.4g}' for k, v in scores.items())}")


def run_train_job(
    *,
    model: Source,
    data: Source,
    recipe: Recipe,
    out: str | os.PathLike[str],
    train: Source | None = None,
    teacher: Source | None = None,
    device: str = "auto",
    max_train: int | None = None,
    max_eval: int | None = None,
    save_steps: int | None = None,
    logging_steps: int = 50,
    report_to: str = "none",
    overwrite: bool = False,
    resume: bool = False,
    callbacks: Sequence[Any] = (),
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train ``model`` by ``recipe`` and write ``out``: dense/, packed/ where there is such a format, and reports.

    Under torchrun every process calls it; the first one writes.

    Args:
        model: folder or hub name; a packed folder is trained on as dense with zeros.
        data: samples to evaluate on: a file of the task, or a hub name.
        recipe: see ``obs_kernels.recipes.load_recipe``.
        out: folder to write; it appears whole, at the end.
        train: samples to train on; None takes the train split of a hub name ``data``.
        teacher: folder or hub name in place of the recipe's; "self" is the model as it comes, "disable" is none.
        device: "auto", "cpu" or "cuda" (choose one of several by CUDA_VISIBLE_DEVICES).
        max_train, max_eval: samples at most, drawn by the recipe's seed.
        save_steps: optimizer steps between checkpoints; None keeps one an epoch.
        logging_steps: optimizer steps between two lines of numbers.
        report_to: trackers of the Trainer, such as "tensorboard".
        overwrite: replace ``out`` if an earlier run wrote it, and what a cut-off run left.
        resume: go on from the last whole checkpoint of a run that was cut off; from the start where there is none.
        callbacks: more of transformers' callbacks.
        say: called with a line for each finished step.

    Returns:
        The content of report.json.

    Raises:
        ConfigError: a bad value, a recipe whose targets match nothing, a pattern that does not divide a layer, a
            teacher with another head, ``out`` that cannot be written. DataFormatError: a bad data file, samples without
            answers. ResumeMismatchError: the run to resume was made with something else; names what.
    """
    start, say = time.perf_counter(), say or (lambda text: None)
    target = check_out(out, overwrite=overwrite)
    teacher = teacher or (recipe.distillation.teacher if recipe.distillation is not None else None)
    run = _prepare(model, data, train, recipe, teacher, device, (max_train, max_eval), target, say)
    identity = {
        "recipe": recipe.to_dict(),
        "model": _digest(model),
        "teacher": str(teacher) if teacher in (None, SELF, DISABLE) else _digest(teacher or ""),
        "data": _digest(data),
        "train": None if train is None else _digest(train),
        "max_train": max_train,
    }
    with hold_folder(run.work) if run.is_first else nullcontext():
        if run.is_first:
            _open_work(run.work, identity, resume=resume, overwrite=overwrite)
        run.score("before", run.net)
        if run.distiller is not None and teacher != SELF:
            run.score("teacher", run.distiller.teacher)
        settings = {"logging_steps": logging_steps, "report_to": report_to}
        if save_steps is not None:
            settings |= {"save_strategy": "steps", "save_steps": save_steps}
        gradual = _train(run, settings, callbacks, resume=resume)
        report: dict[str, Any] = {"job": "train", "model": os.fspath(model), "data": os.fspath(data)}
        report |= {"train": None if train is None else os.fspath(train), "recipe": recipe.to_dict()}
        if run.is_first:
            _write(run, target, gradual, report, start)
    if run.is_first:
        shutil.rmtree(run.work, ignore_errors=True)
        say(f"wrote {target}")
    return report


def _prepare(
    model: Source,
    data: Source,
    train: Source | None,
    recipe: Recipe,
    teacher: Source | None,
    device: str,
    limits: tuple[int | None, int | None],
    target: Path,
    say: Callable[[str], None],
) -> _Run:
    """Model, data, teacher and pruner, or the error that says why not; nothing is written or computed yet."""
    try:
        from transformers import set_seed
    except ImportError:
        raise MissingDependencyError("training needs transformers; pip install 'obs_kernels[train]'") from None
    training, picked = recipe.training, _pick(device, recipe)
    set_seed(training.seed)  # of a head that is new
    labels = LABEL_COUNTS.get(training.task)
    net, tokenizer = load_model(model, HEADS[training.task], device=picked, num_labels=labels)
    make_trainable(net)
    task = load_task(training, net, tokenizer, data=data, train=train, max_train=limits[0], max_eval=limits[1])
    distiller = _distiller(recipe, teacher, net, picked)
    notes = []
    if recipe.layer_drop is not None:
        removed = drop_layers_(net, recipe.layer_drop.keep)
        notes.append(f"{len(removed)} layers were removed: {', '.join(removed)}")
    if distiller is not None:  # of the layers that are left
        distiller.check(net, model_inputs(net, task.batch(torch.arange(1))))
    pruner = None if recipe.pruning is None else OBSPruner(net, recipe.pruning)
    work = target.with_name(f"{target.name}.work")
    return _Run(recipe, net, tokenizer, task, picked, distiller, pruner, work, say, notes)


def _pick(device: str, recipe: Recipe) -> torch.device:
    picked = pick_device(device)
    if picked.type == "cuda":
        if picked.index:
            raise ConfigError(f"device must be auto, cpu or cuda, got {device!r}; choose a GPU by CUDA_VISIBLE_DEVICES")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    elif recipe.training.precision == "fp16":
        raise ConfigError(
            "training.precision must be fp32 or bf16 on a CPU, got 'fp16'; pass --recipe-args precision=fp32"
        )
    return picked


def _distiller(recipe: Recipe, name: Source | None, net: nn.Module, device: torch.device) -> Distiller | None:
    """The teacher; one that reads other tokens is refused here."""
    settings = recipe.distillation
    if settings is None:
        if name not in (None, DISABLE):
            raise ConfigError(f"teacher {os.fspath(name or '')!r} is given, but the recipe has no distillation section")
        return None
    if name == DISABLE:
        return None
    if name is None:
        raise ConfigError(
            "the recipe learns from a teacher, got none; pass --teacher FOLDER, --teacher self for the model as it "
            "comes, or --teacher disable"
        )
    values: dict[str, Any] = {
        "hardness": settings.hardness,
        "temperature": settings.temperature,
        "outputs": settings.outputs,
        "hidden": settings.hidden,
    }
    if name == SELF:
        return Distiller.of_copy(net, **values)
    teacher, _ = load_model(name, HEADS[recipe.training.task], device=device, trained_head=True)
    _check_sizes(net, teacher)
    return Distiller(teacher, **values)


def _check_sizes(net: nn.Module, teacher: nn.Module) -> None:
    """Refuse a teacher that reads other tokens: an id out of its table ends a GPU's process."""
    for key in ("vocab_size", "max_position_embeddings"):
        mine, theirs = (getattr(getattr(found, "config", None), key, None) for found in (net, teacher))
        if mine is not None and theirs is not None and (theirs < mine if key != "vocab_size" else theirs != mine):
            raise ConfigError(f"teacher must have the model's {key} = {mine}, got {theirs}; give one of its family")


def _train(run: _Run, settings: dict[str, Any], callbacks: Sequence[Any], *, resume: bool) -> GradualPruning | None:
    """The training; what pruned meanwhile, finished."""
    from transformers import PrinterCallback

    from obs_kernels.training.callback import OBSPruningCallback
    from obs_kernels.training.trainer import (
        SayLogs,
        TaskTrainer,
        WholeCheckpoints,
        last_whole_checkpoint,
        training_arguments,
    )

    recipe = run.recipe
    args = training_arguments(recipe, run.work, on_cpu=run.device.type == "cpu", **settings)
    if args.n_gpu > 1:
        args._n_gpu = 1  # several GPUs go by torchrun: nn.DataParallel would copy the model at every step
    trainer = TaskTrainer(data=run.task, recipe=recipe, distiller=run.distiller, model=run.net, args=args)
    trainer.remove_callback(PrinterCallback)
    parts: tuple[Any, ...] = ()
    if run.pruner is not None:
        config, training = run.pruner.config, recipe.training
        schedule = recipe.schedule or PruningSchedule(start_epoch=0.0, end_epoch=0.0)
        calibration = run.task.calibration(config, training.gradient_batch_size or training.batch_size)
        parts = (run.pruner, schedule, calibration, run.task.loss_fn(curvature_loss(config)))
        _require_time(schedule, config, recipe.training.epochs, trainer.steps_per_epoch)
    if recipe.training.epochs == 0:
        gradual = GradualPruning(*parts, steps_per_epoch=trainer.steps_per_epoch) if parts else None
        if gradual is not None:
            gradual.before_step(0)
            gradual.finish()
        return gradual
    pruning = OBSPruningCallback(*parts, steps_per_epoch=trainer.steps_per_epoch) if parts else None
    if pruning is not None:
        pruning.attach(trainer)
        trainer.pruning = pruning
    for extra in (*callbacks, SayLogs(run.say), WholeCheckpoints()):
        trainer.add_callback(extra)
    checkpoint = last_whole_checkpoint(run.work) if resume else None
    if checkpoint is not None:
        run.say(f"resuming from {checkpoint.name}")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.accelerator.unwrap_model(run.net, keep_fp32_wrapper=False)  # scored as it is written, without autocast
    run.history = list(trainer.state.log_history)
    if pruning is None or pruning.gradual is None:
        return None
    pruning.gradual.finish()
    return pruning.gradual


def _require_time(schedule: PruningSchedule, config: OBSConfig, epochs: float, steps_per_epoch: int) -> None:
    """Refuse a last pruning that rounds to the end of a short training, before the training rather than after it."""
    prunings = schedule.prunings(config.parsed_pattern, steps_per_epoch)
    total = math.ceil(epochs * steps_per_epoch)
    if epochs > 0 and prunings and prunings[-1].step >= total:
        raise ConfigError(
            f"end_epoch must leave a step of training after the last pruning, got it at step {prunings[-1].step} of "
            f"{total}; lower end_epoch, or train longer"
        )


def _write(run: _Run, target: Path, gradual: GradualPruning | None, report: dict[str, Any], start: float) -> None:
    """Score the model and write its folder; ``report`` is filled."""
    run.net.eval()
    run.score("trained" if gradual is None else "pruned", run.net)
    _add_shares(run)
    report |= {"accuracy": run.accuracy, "history": run.history}
    masks: dict[str, Any] = {}
    why_not: str | None = "nothing was pruned"
    if gradual is not None:
        pruner = gradual.pruner
        masks = {name: mask.cpu() for name, mask in getattr(run.net, PRUNED_ATTRIBUTE)["masks"].items()}
        why_not = why_not_packed(pruner.config.parsed_pattern, pruner.plan())
        report |= {"config": pruner.config.to_dict(), "pruning": pruner.report().to_dict()}
        report["checks"] = {"violations": pruner.verify()}
    probe = run.task.probe_batch()
    files = ModelFiles(
        run.tokenizer,
        lambda path: load_model(path, HEADS[run.recipe.training.task])[0],
        lambda net: run.task.logits(net(**model_inputs(net, probe))),
    )
    with whole_folder(target) as folder:
        write_models(folder, run.net, files, report, run.notes, why_not=why_not)
        if gradual is not None:
            pattern = gradual.pruner.config.parsed_pattern
            report["checks"]["violations_in_file"] = violations_in_file(folder / "dense", pattern, masks)
        report |= {"environment": environment(run.device), "notes": run.notes}
        report["seconds"] = time.perf_counter() - start
        write_reports(folder, report)


def _add_shares(run: _Run) -> None:
    """The score of the result as a share of the teacher's, or of the model as it came."""
    score, better = run.task.score, run.task.smaller_is_better
    base = run.accuracy.get("teacher", run.accuracy["before"])[score]
    *_, result = run.accuracy.values()
    over, under = (base, result[score]) if better else (result[score], base)
    result["f1_share" if score == "f1" else "share"] = 100.0 * over / under if under else 0.0


def _open_work(work: Path, identity: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
    """``<out>.work``, bound to what decides the run."""
    path = work / JOB
    if path.exists() and not resume:
        if not overwrite:
            raise ConfigError(
                f"{work} holds a run that was cut off; pass --resume to go on, or --overwrite to start anew"
            )
        for old in work.iterdir():
            if not old.name.startswith(".lock"):  # of this process, which holds the folder
                shutil.rmtree(old) if old.is_dir() else old.unlink()
    if not path.exists():
        write_text(path, json.dumps(identity, indent=1))
        return
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ResumeMismatchError(f"{path} is not readable ({error}); pass --overwrite to start anew") from None
    check_identity(found, identity)


def _digest(source: Source) -> str:
    """Hash of a file, or of a folder's config and weights; the name itself where there is neither."""
    path, found = Path(source).expanduser(), hashlib.sha256()
    files = sorted([*path.glob("*.safetensors"), *path.glob("config.json")]) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        return os.fspath(source)
    for file in files:
        with file.open("rb") as stream:
            while part := stream.read(1 << 24):
                found.update(part)
    return found.hexdigest()[:16]
