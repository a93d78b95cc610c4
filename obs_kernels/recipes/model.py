# SPDX-License-Identifier: Apache-2.0
"""A recipe: what to prune, when, and how to train meanwhile. Frozen records that check themselves.

``read`` makes them from YAML by pydantic; they can be built directly too, without pydantic or YAML.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from obs_kernels import checks
from obs_kernels.dtype_names import dtype_name
from obs_kernels.errors import ConfigError
from obs_kernels.pruning.config import OBSConfig
from obs_kernels.pruning.schedule import PruningSchedule, step_of

FORMAT_VERSION = 1
LR_SCHEDULES = ("linear", "cyclic_linear", "constant")
PRECISIONS = {"f32": "fp32", "bf16": "bf16", "f16": "fp16"}
"""Written as transformers' flags are named; by ``dtype_names``, whose spellings are read."""
TASK_OUTPUTS = {
    "squad": ("start_logits", "end_logits"),
    "mnli": ("logits",),
    "qqp": ("logits",),
    "mlm": ("logits",),
}
"""Tasks, and the outputs of their models that are distributions."""
FORBID: dict[str, Any] = {"extra": "forbid"}


@dataclass(frozen=True)
class TrainingSettings:
    """How to train. Epochs may be fractions; batch sizes are of one process.

    Attributes:
        task: "squad", "mnli", "qqp" or "mlm".
        epochs: length of the training; 0 trains nothing.
        learning_rate: of AdamW, at the start of each fall.
        final_learning_rate: at the end of each fall.
        lr_schedule: "linear", one fall; "cyclic_linear", a fall after each pruning, see ``Recipe.cycle_starts``;
            "constant".
        lr_start_epoch: where a linear fall begins (constant before it), or the first cycle after the one from 0 on.
            None takes 0, or the schedule's first pruning.
        lr_cycle_epochs: length of the cycles; None takes the schedule's ``update_frequency``.
        batch_size: samples a batch.
        eval_batch_size: the same, in evaluation.
        gradient_batch_size: samples a batch of the gradients for the Fisher, with ``gradients="batch"`` a part of its
            definition; None takes ``batch_size``.
        gradient_accumulation: batches an optimizer step.
        max_length: tokens a window or text.
        doc_stride: tokens that two windows of a passage share; for "squad".
        weight_decay: of AdamW.
        warmup_ratio: share of the optimizer steps in which the rate rises.
        max_grad_norm: gradients are clipped to it; 0 does not clip. The Fisher's never are.
        precision: "fp32", "bf16" or "fp16", or another spelling of these.
        seed: of everything random in the training.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID

    task: str = "squad"
    epochs: float = 3.0
    learning_rate: float = 8e-5
    final_learning_rate: float = 0.0
    lr_schedule: str = "linear"
    lr_start_epoch: float | None = None
    lr_cycle_epochs: float | None = None
    batch_size: int = 16
    eval_batch_size: int = 16
    gradient_batch_size: int | None = None
    gradient_accumulation: int = 1
    max_length: int = 384
    doc_stride: int = 128
    weight_decay: float = 0.0
    warmup_ratio: float = 0.0
    max_grad_norm: float = 1.0
    precision: str = "fp32"
    seed: int = 42

    def __post_init__(self) -> None:
        """Validate."""
        checks.check_choice("task", self.task, tuple(TASK_OUTPUTS))
        checks.check_choice("lr_schedule", self.lr_schedule, LR_SCHEDULES)
        precision = PRECISIONS[dtype_name("precision", self.precision, tuple(PRECISIONS))]
        object.__setattr__(self, "precision", precision)
        for name in ("epochs", "final_learning_rate", "weight_decay", "max_grad_norm"):
            _check_number(name, getattr(self, name))
        _check_number("learning_rate", self.learning_rate, above=True)
        _check_number("warmup_ratio", self.warmup_ratio, most=1.0)
        for name in ("batch_size", "eval_batch_size", "gradient_accumulation", "max_length"):
            _check_count(name, getattr(self, name))
        _check_count("doc_stride", self.doc_stride, least=0)
        _check_count("seed", self.seed, least=0)
        if self.gradient_batch_size is not None:
            _check_count("gradient_batch_size", self.gradient_batch_size)
        if self.lr_start_epoch is not None:
            _check_number("lr_start_epoch", self.lr_start_epoch)
        if self.lr_cycle_epochs is not None:
            _check_number("lr_cycle_epochs", self.lr_cycle_epochs, above=True)
            if self.lr_schedule != "cyclic_linear":
                raise ConfigError(
                    f"lr_cycle_epochs needs lr_schedule='cyclic_linear', got {self.lr_schedule!r}; leave it out"
                )
        if self.final_learning_rate > self.learning_rate:
            raise ConfigError(
                f"final_learning_rate must be at most learning_rate = {self.learning_rate:g}, got "
                f"{self.final_learning_rate:g}; exchange the two"
            )
        if self.task == "squad" and self.doc_stride >= self.max_length:
            raise ConfigError(
                f"doc_stride must be below max_length = {self.max_length}, got {self.doc_stride}; windows would not "
                f"move on"
            )


@dataclass(frozen=True)
class DistillationSettings:
    """Learning from a teacher beside the labels: ``(1 - hardness) * task + hardness * T^2 KL(teacher || student)``.

    Attributes:
        hardness: share of the teacher's term, 0 to 1; 1 leaves the labels out.
        temperature: T, by which the logits of both are divided.
        teacher: folder or hub name; "self" takes the model as it comes, before a layer is dropped or a weight pruned;
            None has to be given when the training starts.
        outputs: the outputs that are compared, their terms averaged; None takes those of the task.
        hidden: factor of the error of what the layers give, relative to the teacher's, added to the loss; 0 without.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID

    hardness: float = 1.0
    temperature: float = 2.0
    teacher: str | None = None
    outputs: tuple[str, ...] | None = None
    hidden: float = 0.0

    def __post_init__(self) -> None:
        """Validate and normalise."""
        _check_number("hardness", self.hardness, most=1.0)
        _check_number("temperature", self.temperature, above=True)
        _check_number("hidden", self.hidden)
        if self.outputs is not None:
            object.__setattr__(self, "outputs", tuple(self.outputs))
            if not self.outputs or not all(isinstance(name, str) for name in self.outputs):
                raise ConfigError(f"outputs must name at least one output, got {list(self.outputs)}; leave it out")


@dataclass(frozen=True)
class LayerDropSettings:
    """Which encoder layers stay, before anything else; the others are removed from the model.

    Attributes:
        keep: indices of the layers that stay, ascending.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID

    keep: tuple[int, ...]

    def __post_init__(self) -> None:
        """Validate and normalise."""
        object.__setattr__(self, "keep", tuple(self.keep))
        for index in self.keep:
            _check_count("keep", index, least=0)
        if not self.keep or list(self.keep) != sorted(set(self.keep)):
            raise ConfigError(f"keep must list different layers in ascending order, got {list(self.keep)}")


@dataclass(frozen=True)
class Recipe:
    """Everything that a run needs beside a model and data.

    Attributes:
        name: what it is listed under.
        description: one line.
        training: how to train.
        pruning: what to prune and how; None prunes nothing.
        schedule: when to prune; None with ``pruning`` is one pruning before the first step.
        distillation: the teacher; None learns from the labels.
        layer_drop: layers that stay; None keeps all.

    Raises:
        ConfigError: parts that do not go together, a schedule that does not lead to the pattern.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID

    name: str
    training: TrainingSettings
    description: str = ""
    pruning: OBSConfig | None = None
    schedule: PruningSchedule | None = None
    distillation: DistillationSettings | None = None
    layer_drop: LayerDropSettings | None = None

    def __post_init__(self) -> None:
        """Check what concerns more than one part; fill in the outputs of the task."""
        training, schedule = self.training, self.schedule
        if schedule is not None:
            if self.pruning is None:
                raise ConfigError("schedule needs a pruning section that says what to prune; add one or leave it out")
            schedule.patterns(self.pruning.parsed_pattern)
            last = max(schedule.epochs(), default=0.0)
            if last >= training.epochs > 0 or last > training.epochs:
                raise ConfigError(
                    f"schedule.end_epoch must be below training.epochs = {training.epochs:g}, got {last:g}: no step is "
                    f"left after the last pruning; train longer, or prune earlier"
                )
        if training.lr_schedule == "cyclic_linear" and self.cycle_epochs is None:
            raise ConfigError(
                "lr_schedule='cyclic_linear' takes its cycles from a schedule that prunes more than once, got none; "
                "set training.lr_cycle_epochs"
            )
        known = TASK_OUTPUTS[training.task]
        if self.distillation is not None:
            outputs = known if self.distillation.outputs is None else self.distillation.outputs
            if not set(outputs) <= set(known):
                raise ConfigError(
                    f"distillation.outputs of task {training.task!r} must be among {list(known)}, got {list(outputs)}"
                )
            values = asdict(self.distillation) | {"outputs": outputs}
            object.__setattr__(self, "distillation", DistillationSettings(**values))

    @property
    def cycle_epochs(self) -> float | None:
        """Epochs of a learning rate cycle; None where nothing says it."""
        if self.training.lr_cycle_epochs is not None or self.schedule is None:
            return self.training.lr_cycle_epochs
        return self.schedule.update_frequency if len(self.schedule.epochs()) > 1 else None

    def cycle_starts(self, steps_per_epoch: int) -> tuple[int, ...]:
        """Optimizer steps at which the rate starts again from the top: 0, the first pruning, and every cycle from there
        to the end; only (0,) for other shapes than "cyclic_linear". Prunings fall on starts of cycles.
        """
        training, cycle = self.training, self.cycle_epochs
        if training.lr_schedule != "cyclic_linear" or cycle is None:
            return (0,)
        first = training.lr_start_epoch
        if first is None:
            first = 0.0 if self.schedule is None else self.schedule.start_epoch
        end, starts, k = step_of(training.epochs, steps_per_epoch), {0}, 0
        while (step := step_of(first + k * cycle, steps_per_epoch)) < end:
            starts.add(step)
            k += 1
        return tuple(sorted(starts))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the inverse of ``recipe_from_dict``; parts that are None are left out."""
        values: dict[str, Any] = {"obs_kernels": FORMAT_VERSION}
        for name in ("name", "description", "layer_drop", "pruning", "schedule", "training", "distillation"):
            value = getattr(self, name)
            if isinstance(value, (OBSConfig, PruningSchedule)):
                values[name] = value.to_dict()
            elif value is not None:
                values[name] = value if isinstance(value, str) else _plain(asdict(value))
        return values

    def to_yaml(self) -> str:
        """The recipe as a file that ``load_recipe`` reads."""
        from obs_kernels.recipes.yaml_text import dump_yaml

        return dump_yaml(self.to_dict())


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _check_number(name: str, value: Any, *, above: bool = False, most: float = math.inf) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0 or value > most or (above and value == 0):
        wanted = "greater than 0" if above else "at least 0" if math.isinf(most) else f"0 to {most:g}"
        raise ConfigError(f"{name} must be a number {wanted}, got {value!r}")


def _check_count(name: str, value: Any, *, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")
