# SPDX-License-Identifier: Apache-2.0
"""SQuAD as a task to train on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from obs_kernels.pruning.output_probe import output_probe
from obs_kernels.training.evaluate import evaluate_squad
from obs_kernels.training.squad import SquadExample, load_squad, prepare_windows
from obs_kernels.training.squad_batches import span_logits, span_losses
from obs_kernels.training.tasks import Batch, Source, TaskData, TaskSources, limited

if TYPE_CHECKING:
    from obs_kernels.recipes import TrainingSettings

_PROBED = 16


class SquadData(TaskData):
    """Windows of SQuAD questions; a sample is a window."""

    score = "f1"

    def __init__(self, settings: TrainingSettings, tokenizer: Any, sources: TaskSources) -> None:
        self.tokenizer, self.eval_batch_size = tokenizer, settings.eval_batch_size
        stride = min(settings.doc_stride, sources.max_length // 3)

        def part(source: Source, split: str, most: int | None) -> list[SquadExample]:
            found = load_squad(source, split=split)
            return [found[i] for i in limited(len(found), most, settings.seed).tolist()]

        sizes = {"max_length": sources.max_length, "doc_stride": stride}
        self.dev = prepare_windows(
            part(sources.data, "validation", sources.max_eval), tokenizer, with_labels=False, **sizes
        )
        self.windows = prepare_windows(
            part(sources.train, "train", sources.max_train), tokenizer, with_labels=True, **sizes
        )
        self.lengths = self.windows.lengths

    def batch(self, rows: Tensor, epoch: int = 0) -> Batch:
        """Windows with their labels."""
        return self.windows.batch(rows)

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        """Mean of the cross-entropies of first and last answer token."""
        return span_losses(outputs, batch["attention_mask"].to(self.logits(outputs)[0].device), batch)

    def output_losses(self, outputs: Any, batch: Batch) -> Tensor:
        """Of the distributions of first and last answer token."""
        start, end = self.logits(outputs)
        padding = batch["attention_mask"].to(start.device) == 0
        return (output_probe(start, padding=padding) + output_probe(end, padding=padding)) / 2

    def evaluate(self, model: nn.Module) -> dict[str, Any]:
        """Exact match and F1 by the official metric."""
        found = evaluate_squad(model, self.tokenizer, self.dev, batch_size=self.eval_batch_size)
        scores = {"exact_match": found.exact_match, "f1": found.f1}
        return scores | {"questions": found.total, "seconds": found.seconds}

    def probe_batch(self) -> Batch:
        """Some windows of the evaluation."""
        step = max(1, len(self.dev) // _PROBED)
        return self.dev.batch(torch.arange(len(self.dev))[::step][:_PROBED])

    def logits(self, outputs: Any) -> tuple[Tensor, ...]:
        """Start and end."""
        return span_logits(outputs)
