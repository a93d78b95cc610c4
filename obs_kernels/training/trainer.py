# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer on a task of ``tasks``: dynamic padding, a teacher, learning rates tied to the prunings.

This module needs transformers; it is imported inside functions only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from obs_kernels.files import write_text
from obs_kernels.pruning.distributed import is_distributed
from obs_kernels.recipes import Recipe
from obs_kernels.training.callback import OBSPruningCallback
from obs_kernels.training.distillation import Distiller
from obs_kernels.training.learning_rates import keep_up, learning_rate_schedule
from obs_kernels.training.length_batches import EpochRows, RowNumbers
from obs_kernels.training.squad_batches import model_inputs
from obs_kernels.training.tasks import Batch, TaskData

WHOLE = "whole.json"
"""In a checkpoint: all of it was written."""
CHECKPOINTS = "checkpoint-"


class TaskTrainer(Trainer):  # type: ignore[misc]
    """A Trainer of ``recipe`` on ``data``; a loss is the mean over samples of what ``data`` gives for each."""

    def __init__(self, *, data: TaskData, recipe: Recipe, distiller: Distiller | None, **settings: Any) -> None:
        self.data, self.recipe, self.distiller = data, recipe, distiller
        self.pruning: OBSPruningCallback | None = None
        """Whose masks gradients get before they are clipped."""
        super().__init__(train_dataset=RowNumbers(len(data.lengths)), **settings)
        self._rows = EpochRows(data.lengths, self.args.train_batch_size, seed=recipe.training.seed)
        self.add_callback(_OrderOfEpoch(self._rows))
        self.add_callback(_RateOfStep())
        self.loss_is_scaled_for_ga = False  # means of batches: the Trainer divides by the batches of a step
        self.model_accepts_loss_kwargs = False

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return max(1, -(-len(self.get_train_dataloader()) // self.args.gradient_accumulation_steps))

    def get_train_dataloader(self) -> Any:
        """Batches of like length, in an order that seed and epoch decide."""
        loader = torch.utils.data.DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=self._rows,  # type: ignore[arg-type]
            collate_fn=self._collate,
            pin_memory=self.args.device.type == "cuda",
        )
        return self.accelerator.prepare(loader)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The learning rate of the recipe."""
        if self.lr_scheduler is None:
            training, steps = self.recipe.training, self.steps_per_epoch
            starts = self.recipe.cycle_starts(steps)
            chosen = self.optimizer if optimizer is None else optimizer
            assert chosen is not None
            self.lr_scheduler = learning_rate_schedule(
                chosen,
                training.lr_schedule,
                total_steps=num_training_steps,
                final_factor=training.final_learning_rate / training.learning_rate,
                starts=tuple(step for step in starts if step < num_training_steps),
                warmup_steps=math.ceil(training.warmup_ratio * num_training_steps),
                first_step=round((training.lr_start_epoch or 0.0) * steps),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss on the labels, the teacher's term, or both, as the recipe says."""
        options = {} if self.distiller is None else self.distiller.options
        outputs = model(**model_inputs(model, inputs), **options)
        loss = None
        if self.distiller is None or self.distiller.hardness < 1:
            loss = self.data.losses(outputs, inputs).mean()
        if self.distiller is not None:
            with self.accelerator.autocast():
                loss = self.distiller.loss(loss, outputs, model_inputs(self.distiller.teacher, inputs))
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Also keeps gradients of pruned weights out of the norm that is clipped."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.pruning is not None and self.pruning.gradual is not None:
            self.pruning.gradual.masks.mask_gradients()
        return loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """No batches where all steps are done: the loop of a Trainer that is resumed at the end of a part of an epoch
        would take one more step before it looks.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        found: tuple[list[Any], Any] = super().get_batch_samples(*args, **kwargs)
        return found

    def _collate(self, numbers: list[int]) -> Batch:
        count = len(self.data.lengths)
        return self.data.batch(torch.tensor([number % count for number in numbers]), numbers[0] // count)


class _OrderOfEpoch(TrainerCallback):  # type: ignore[misc]
    """Tells the batch sampler its epoch: resumed in the middle of one with several processes, it is wrapped more often
    than the Trainer looks.
    """

    def __init__(self, rows: EpochRows) -> None:
        self.rows = rows

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Whole epochs that are behind; the fraction is of the one that is resumed."""
        self.rows.set_epoch(math.floor((state.epoch or 0.0) + 1e-6))


class _RateOfStep(TrainerCallback):  # type: ignore[misc]
    """Ties the learning rate to the number of the step: the Trainer leaves it behind at steps that overflow in fp16."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count a step that was skipped, too."""
        keep_up(kwargs["lr_scheduler"], state.global_step)


class WholeCheckpoints(TrainerCallback):  # type: ignore[misc]
    """Marks a checkpoint when everything of it is written; to be the last of the callbacks."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the mark, when every process has written its part: each has random generators of its own."""
        if is_distributed():
            dist.barrier()
        if state.is_world_process_zero:
            write_text(Path(str(args.output_dir)) / f"{CHECKPOINTS}{state.global_step}" / WHOLE, "{}\n")


class SayLogs(TrainerCallback):  # type: ignore[misc]
    """What the Trainer logs, as lines; without the sparsity of each layer."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """One line."""
        if state.is_world_process_zero and logs:
            shown = {k: v for k, v in logs.items() if not k.startswith("sparsity/") or k == "sparsity/global"}
            texts = [f"{key} {value:.6g}" for key, value in shown.items() if isinstance(value, (int, float))]
            self.say(f"step {state.global_step} of {state.max_steps}: {', '.join(texts)}")


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the latest step in ``folder`` that was written to its end; None where there is none."""
    found = {}
    for path in folder.glob(f"{CHECKPOINTS}*/{WHOLE}"):
        number = path.parent.name.removeprefix(CHECKPOINTS)
        if number.isdigit():
            found[int(number)] = path.parent
    return found[max(found)] if found else None


def training_arguments(recipe: Recipe, folder: Path, *, on_cpu: bool, **changes: Any) -> TrainingArguments:
    """Arguments of the Trainer for ``recipe``; it works in ``folder`` and evaluates nothing itself."""
    training = recipe.training
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": training.epochs,
        "per_device_train_batch_size": training.batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation,
        "learning_rate": training.learning_rate,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "optim": "adamw_torch",
        "bf16": training.precision == "bf16",
        "fp16": training.precision == "fp16",
        "seed": training.seed,
        "save_strategy": "epoch",
        "save_total_limit": 2,  # the older one stays until the newer one is whole
        "eval_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "use_cpu": on_cpu,
    }
    return TrainingArguments(**settings | changes)
