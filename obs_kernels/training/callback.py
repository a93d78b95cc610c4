# SPDX-License-Identifier: Apache-2.0
"""``OBSPruningCallback``: gradual pruning in transformers' Trainer, a thin wrapper of ``GradualPruning``.

This module needs transformers; ``obs_kernels.training.OBSPruningCallback`` imports it when it is asked for.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from obs_kernels.errors import ConfigError, ResumeMismatchError
from obs_kernels.pruning import OBSConfig, OBSPruner
from obs_kernels.pruning.calibration import LossFn
from obs_kernels.pruning.schedule import PruningSchedule
from obs_kernels.pruning.state_files import STATE_JSON, read_state, write_state
from obs_kernels.training.gradual import GradualPruning

log = logging.getLogger("obs_kernels")


class OBSPruningCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Prunes at the scheduled optimizer steps of a Trainer and holds the masks after every one.

    ``callback = OBSPruningCallback(config, schedule, loader, loss_fn)``, then ``Trainer(..., callbacks=[callback])``
    and ``callback.attach(trainer)``, so that its numbers go through ``trainer.log`` to every tracker. Each checkpoint
    of the Trainer gets the masks and the position as safetensors and JSON beside ``trainer_state.json``, and a resumed
    run goes on from them.

    Args:
        pruner: of the Trainer's model, or a config, of which one is built when the training begins.
        schedule: when to prune, and to what.
        loader: batches for the curvature, re-iterable, not the Trainer's; None where the config needs none.
        loss_fn: ``loss_fn(model, batch)`` for the curvature; the Trainer's loss, its clipping and accumulation are
            not used.
        steps_per_epoch: optimizer steps an epoch; None takes them from the Trainer's loader.
        resume_from: folder of the checkpoint that is resumed, where it is not ``<output_dir>/checkpoint-<step>``.
        restored: filled by the Trainer (``restore_callback_states_from_checkpoint``), never by hand.

    Raises:
        ConfigError: while training begins: what ``OBSPruner`` and ``GradualPruning`` raise; FSDP or DeepSpeed, whose
            sharded weights cannot be pruned here; ``load_best_model_at_end``, which would bring back weights of an
            earlier stage. ResumeMismatchError: the checkpoint is of another recipe, with the keys that differ, or its
            masks are not those of the weights that were loaded, with the layer.
    """

    _of_run: ClassVar[weakref.WeakValueDictionary[str, OBSPruningCallback]] = weakref.WeakValueDictionary()
    """The callbacks of this process by what they were made of: the Trainer rebuilds a callback from plain values."""

    def __init__(
        self,
        pruner: OBSPruner | OBSConfig | None = None,
        schedule: PruningSchedule | None = None,
        loader: Iterable[Any] | None = None,
        loss_fn: LossFn | None = None,
        *,
        steps_per_epoch: int | None = None,
        resume_from: str | Path | None = None,
        restored: str | None = None,
    ) -> None:
        if restored is not None:
            self._take_parts_of(restored)
            return
        if pruner is None or schedule is None:
            raise ConfigError("pruner and schedule must be given, got None; pass an OBSConfig and a PruningSchedule")
        self.pruner = None if isinstance(pruner, OBSConfig) else pruner
        self.config = pruner if isinstance(pruner, OBSConfig) else pruner.config
        self.schedule, self.loader, self.loss_fn = schedule, loader, loss_fn
        self.steps_per_epoch = steps_per_epoch
        self.resume_from = None if resume_from is None else Path(resume_from)
        self.gradual: GradualPruning | None = None
        """What the Trainer's steps drive; None before the training begins."""
        self.position = 0
        self._trainer: weakref.ref[Trainer] | None = None
        self._of_run[self._key] = self

    def attach(self, trainer: Trainer) -> None:
        """Send the numbers through ``trainer.log``, and put the callback among its callbacks if it is not there."""
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        self._trainer = weakref.ref(trainer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Build what is not there yet; on a resumed run read its state."""
        _refuse(args)
        if self.pruner is None or self.gradual is not None:  # a second training starts anew, from the zeros it finds
            self.pruner = OBSPruner(kwargs["model"], self.config)
        steps = self.steps_per_epoch or _steps_per_epoch(kwargs.get("train_dataloader"), args)
        self.gradual = GradualPruning(self.pruner, self.schedule, self.loader, self.loss_fn, steps_per_epoch=steps)
        if state.global_step > 0:
            self.gradual.load_state_dict(read_state(self._checkpoint(args, state)))
        self.position = self.gradual.position

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prune if a pruning is due."""
        gradual = self._running()
        if gradual.before_step(state.global_step, kwargs.get("optimizer")) is None:
            return
        self.position = gradual.position
        trainer = None if self._trainer is None else self._trainer()
        if trainer is not None:
            trainer.log(gradual.logs())

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Zeros at pruned places again, before anything else sees the weights."""
        self._running().after_step(kwargs.get("optimizer"))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the state of the masks to what the Trainer logs; trackers that came before it get it by ``attach``."""
        if self.gradual is None or logs is None or "loss" not in logs:
            return
        for values in (logs, *state.log_history[-1:]):
            values["sparsity/global"] = self.gradual.sparsity
            values["obs/mask_violations"] = float(self.gradual.pruner.verify())

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Masks and position into the checkpoint that the Trainer has just written."""
        if state.is_world_process_zero:
            write_state(_folder(args, state), self._running().state_dict())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Finish, or warn that training ended before the last pruning, where ``callback.gradual.finish()`` raises."""
        gradual = self._running()
        if gradual.is_due is None:
            gradual.finish()
        else:
            log.warning("training ended before the pruning that is due at optimizer step %d", gradual.is_due)

    def state(self) -> dict[str, Any]:
        """For ``trainer_state.json``: what the callback is of, and its position; tensors are in files of their own."""
        return {"args": {"restored": self._key}, "attributes": {"position": self.position}}

    @property
    def _key(self) -> str:
        return f"{self.config.fingerprint()} {self.schedule!r}"

    def _take_parts_of(self, key: str) -> None:
        found = self._of_run.get(key)
        if found is None:
            raise ResumeMismatchError(
                "the checkpoint is of a callback with another recipe; resume with the config and the schedule that it "
                "was made with, or without restore_callback_states_from_checkpoint to see the keys that differ"
            )
        self.__dict__.update(found.__dict__)
        self._of_run[key] = self

    def _running(self) -> GradualPruning:
        if self.gradual is None:
            raise ConfigError("the callback was added after the training began; pass it to Trainer(callbacks=[...])")
        return self.gradual

    def _checkpoint(self, args: TrainingArguments, state: TrainerState) -> Path:
        named = [self.resume_from, args.resume_from_checkpoint, _folder(args, state)]
        folders = [Path(folder) for folder in named if isinstance(folder, (str, Path))]
        for folder in folders:
            if (folder / STATE_JSON).is_file():
                return folder
        raise ResumeMismatchError(
            f"no {STATE_JSON} in {', '.join(map(str, folders))}: the run that is resumed was not pruned by this "
            f"callback, or died while it saved; resume from another checkpoint, or name its folder with resume_from="
        )


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _steps_per_epoch(loader: Any, args: TrainingArguments) -> int:
    try:
        batches = len(loader)
    except TypeError:
        raise ConfigError(
            "steps_per_epoch must be given for a training set without length, got None; give the optimizer steps that "
            "count as an epoch of the schedule"
        ) from None
    return max(1, -(-batches // args.gradient_accumulation_steps))


def _refuse(args: TrainingArguments) -> None:
    if getattr(args, "fsdp", None) or getattr(args, "deepspeed", None):
        raise ConfigError("FSDP and DeepSpeed shard the weights that pruning needs whole; use DDP (torchrun) instead")
    if args.load_best_model_at_end:
        raise ConfigError(
            "load_best_model_at_end must be False: it would bring back weights of an earlier stage of the pruning"
        )
