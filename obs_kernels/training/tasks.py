# SPDX-License-Identifier: Apache-2.0
"""What a training needs to know of a task: its model's head, batches, loss, curvature and scores."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from obs_kernels.errors import ConfigError
from obs_kernels.pruning import OBSConfig
from obs_kernels.pruning.calibration import LossFn
from obs_kernels.training.squad_batches import model_inputs

if TYPE_CHECKING:
    from obs_kernels.recipes import TrainingSettings

Batch = dict[str, Tensor]
Source = str | os.PathLike[str]
HEADS = {
    "squad": "question-answering",
    "mnli": "sequence-classification",
    "qqp": "sequence-classification",
    "mlm": "masked-lm",
}
"""Kind of head by task; see ``models.load_model``."""
LABEL_COUNTS = {"mnli": 3, "qqp": 2}


@dataclass(frozen=True)
class TaskSources:
    """Samples to evaluate and to train on, files or hub names, and how much of them is taken."""

    data: Source
    train: Source
    max_length: int
    """Tokens of a sample."""
    max_train: int | None = None
    max_eval: int | None = None


class TaskData(ABC):
    """Tokenised data of one task, with its loss and its scores.

    Attributes:
        lengths: [N] tokens of each training sample.
        score: name of the score that stands for the task, the larger the better unless ``smaller_is_better``.
    """

    lengths: Tensor
    score: str
    smaller_is_better = False

    @abstractmethod
    def batch(self, rows: Tensor, epoch: int = 0) -> Batch:
        """Training samples ``rows`` [B] with labels, padded to the longest; what is drawn depends on ``epoch``."""

    @abstractmethod
    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        """[B] f32: loss of each sample, of the model's outputs on ``batch``; padding has no share."""

    @abstractmethod
    def output_losses(self, outputs: Any, batch: Batch) -> Tensor:
        """[B]: stand-in losses with the curvature of the model's own answers, see ``output_probe``."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, Any]:
        """Scores on the evaluation part, in eval mode, by name; with "samples" and "seconds"."""

    @abstractmethod
    def probe_batch(self) -> Batch:
        """A few evaluation samples, on which two models are compared."""

    @abstractmethod
    def logits(self, outputs: Any) -> tuple[Tensor, ...]:
        """The distributions of a model's outputs."""

    def loss_fn(self, kind: str) -> LossFn:
        """Per-sample losses [B] as ``OBSPruner.collect`` takes them; ``kind`` is "labels" or "outputs"."""
        of: Callable[[Any, Batch], Tensor] = self.output_losses if kind == "outputs" else self.losses

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            return of(model(**model_inputs(model, batch)), batch)

        return loss

    def calibration(self, config: OBSConfig, batch_size: int) -> Calibration:
        """Batches for the gradients of ``config``, drawn from the training samples by its seed."""
        by_sample = config.gradients == "sample"
        wanted = config.num_grads if by_sample else config.num_grads * batch_size
        order = torch.randperm(len(self.lengths), generator=torch.Generator().manual_seed(config.seed))
        rows = order[:wanted]
        if by_sample:  # the order changes nothing for gradients of single samples
            rows = rows[self.lengths[rows].argsort(descending=True, stable=True)]
        return Calibration(self, rows, batch_size)


@dataclass(frozen=True, eq=False)
class Calibration:
    """Batches of training samples ``rows`` in their order, as often as wanted."""

    data: TaskData
    rows: Tensor
    batch_size: int

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """One pass."""
        for part in self.rows.split(self.batch_size):
            yield self.data.batch(part)


def curvature_loss(config: OBSConfig) -> str:
    """Whose curvature is taken: the model's own answers for row curvature, else the loss on the labels."""
    return "outputs" if config.curvature == "row" else "labels"


def load_task(
    settings: TrainingSettings, model: nn.Module, tokenizer: Any, *, data: Source, train: Source | None, **limits: Any
) -> TaskData:
    """Data of ``settings.task``, tokenised for ``model``.

    Args:
        settings: task, lengths, batch size of the evaluation, seed.
        model: for the most tokens it takes.
        tokenizer: its fast tokenizer.
        data: samples to evaluate on: a file, or a hub name.
        train: samples to train on; None takes the train split of a hub name ``data``.
        limits: ``max_train`` and ``max_eval``, samples at most (None: all).

    Raises:
        ConfigError: ``train`` is missing. DataFormatError: a bad file, or samples without answers.
    """
    if train is None and os.path.isfile(os.fspath(data)):
        raise ConfigError(
            f"train must name the samples to train on where data is a file ({os.fspath(data)!r}); give --train"
        )
    train = data if train is None else train
    positions = int(getattr(getattr(model, "config", None), "max_position_embeddings", None) or settings.max_length)
    sources = TaskSources(data, train, min(settings.max_length, positions), **limits)
    if settings.task == "squad":
        from obs_kernels.training.squad_task import SquadData

        return SquadData(settings, tokenizer, sources)
    if settings.task == "mlm":
        from obs_kernels.training.masked_text import MaskedTextData

        return MaskedTextData(settings, tokenizer, sources)
    from obs_kernels.training.text_pairs import TextPairData

    return TextPairData(settings, tokenizer, sources)


def limited(count: int, most: int | None, seed: int) -> Tensor:
    """Rows of ``count``, at most ``most``, drawn by ``seed`` and in order."""
    if most is not None and most < 1:
        raise ConfigError(f"max_train and max_eval must be at least 1, got {most}; leave them out for all samples")
    if most is None or most >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:most].sort().values
