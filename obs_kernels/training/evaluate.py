# SPDX-License-Identifier: Apache-2.0
"""Answer SQuAD questions with a model and score the answers by the official metric.

The best span is found on the device: for each start the best of the next ends, as a running maximum over a view, so
only three numbers a window leave it, once at the end. Nothing else makes the host wait for the device.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from obs_kernels.errors import ConfigError, NonFiniteError
from obs_kernels.pruning.modes import eval_mode
from obs_kernels.training.metric import squad_metrics
from obs_kernels.training.squad import SquadExample, SquadWindows, prepare_windows
from obs_kernels.training.squad_batches import model_inputs, span_logits

_PAD_TO = 8


@dataclass(frozen=True)
class SquadResult:
    """Scores of one evaluation."""

    exact_match: float
    """Percent of the questions."""
    f1: float
    """Percent, averaged over the questions."""
    total: int
    """Number of questions."""
    predictions: dict[str, str]
    """Answer text by question id; empty where no span was found."""
    seconds: float
    """Wall time of model, span search and metric; without tokenising."""


def evaluate_squad(
    model: nn.Module,
    tokenizer: Any,
    data: SquadWindows | Sequence[SquadExample],
    *,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    max_answer_length: int = 30,
    progress: bool = True,
) -> SquadResult:
    """Answer every question of ``data`` and score the answers.

    The answer of a window is the span with the highest start logit + end logit inside the context, at most
    ``max_answer_length`` tokens long. Of several windows of a question the one with the highest log odds of its span
    against "no answer here" counts (the logits of [CLS] taken off, which windows without the answer are trained to
    point at). Ties go to the earlier window, start and end.

    Args:
        model: a Hugging Face question answering model, or any module with the same inputs and outputs. It runs in eval
            mode without gradients; the mode of each module is restored.
        tokenizer: the model's fast tokenizer; may be None where ``data`` is tokenised already.
        data: questions, or better, for more than one evaluation, their windows from ``prepare_windows``.
        batch_size: windows a batch, sorted by length.
        device: where to run; the model is moved there and stays. None: where the model is.
        autocast: dtype for ``torch.autocast``, such as ``torch.bfloat16``. None: the model's own dtypes.
        max_answer_length: longest answer, in tokens.
        progress: show a bar once the call has taken two seconds, if stderr is a terminal.

    Raises:
        ConfigError: ``batch_size`` or ``max_answer_length`` below 1, or windows that do not fit the model.
        DataFormatError: no question, or one without an answer.
        NonFiniteError: the model gives NaN or Inf.
    """
    for name, value in (("batch_size", batch_size), ("max_answer_length", max_answer_length)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    windows = data if isinstance(data, SquadWindows) else prepare_windows(data, tokenizer, with_labels=False)
    _check_fits(model, windows)
    if device is not None:
        model.to(device)
    began = time.perf_counter()
    with eval_mode(model), torch.inference_mode():
        spans = _find_spans(model, windows, batch_size, autocast, max_answer_length, progress)
    predictions = _best_texts(windows, *spans)
    scores = squad_metrics(predictions, windows.examples)
    return SquadResult(**scores, predictions=predictions, seconds=time.perf_counter() - began)


def best_spans(
    start_logits: Tensor, end_logits: Tensor, context_mask: Tensor, *, max_answer_length: int = 30
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the score, start and end (both included) of the best span of each window.

    Args:
        start_logits: [B, T] floating point.
        end_logits: [B, T], same dtype.
        context_mask: [B, T] bool, True where a span may stand; its True columns are adjacent.
        max_answer_length: longest span, in tokens.

    Returns:
        ``start + end`` logit [B], first and last column [B] int64 with
        ``start <= end < start + max_answer_length``. The score is -inf where no column is allowed.
    """
    starts = start_logits.masked_fill(~context_mask, -torch.inf)
    ends = end_logits.masked_fill(~context_mask, -torch.inf)
    # The end that is best for a start does not depend on the start's logit: no [B, T, max_answer_length] sum is needed.
    ends = nn.functional.pad(ends, (0, max_answer_length - 1), value=-torch.inf)
    best_end, length = ends.unfold(1, max_answer_length, 1).max(dim=2)
    score, start = (starts + best_end).max(dim=1)
    return score, start, start + length.gather(1, start[:, None]).squeeze(1)


def _find_spans(
    model: nn.Module,
    windows: SquadWindows,
    batch_size: int,
    autocast: torch.dtype | None,
    max_answer_length: int,
    progress: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return score, start and end of each window [W], on the CPU."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    order = windows.lengths.argsort(descending=True, stable=True)  # longest first: memory peaks in the first batch
    widths = windows.lengths[order].tolist()
    ids = windows.input_ids[order].to(device)
    types = None if windows.token_type_ids is None else windows.token_type_ids[order].to(device)
    lengths, first, count = (
        t[order].to(device)[:, None] for t in (windows.lengths, windows.context_start, windows.context_length)
    )
    columns = torch.arange(ids.shape[1], device=device)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    context = nullcontext() if autocast is None else torch.autocast(device.type, dtype=autocast)
    bar = tqdm(total=len(windows), desc="evaluate", unit="window", delay=2.0, disable=None if progress else True)
    with bar, context:
        for begin in range(0, len(windows), batch_size):
            width = min(-(-widths[begin] // _PAD_TO) * _PAD_TO, ids.shape[1])
            part, column = slice(begin, begin + batch_size), columns[:width]
            batch = {"input_ids": ids[part, :width].long(), "attention_mask": (column < lengths[part]).long()}
            if types is not None:
                batch["token_type_ids"] = types[part, :width].long()
            start_logits, end_logits = span_logits(model(**model_inputs(model, batch)))
            allowed = (column >= first[part]) & (column < first[part] + count[part])
            score, start, end = best_spans(start_logits, end_logits, allowed, max_answer_length=max_answer_length)
            # Logits of two windows have no common zero. Their no-answer logits, [CLS] twice, give them one.
            found.append((score - start_logits[:, 0] - end_logits[:, 0], start, end))
            bar.update(len(batch["input_ids"]))
        back = order.argsort()
        score, start, end = (torch.cat(parts).cpu()[back] for parts in zip(*found, strict=True))
    return score, start, end


def _best_texts(windows: SquadWindows, score: Tensor, start: Tensor, end: Tensor) -> dict[str, str]:
    wrong = ~score.isfinite() & (windows.context_length > 0)
    if bool(wrong.any()):
        name = windows.examples[int(windows.example_index[wrong][0])].id
        raise NonFiniteError(
            f"logits must be finite, got NaN or Inf in {int(wrong.sum())} of {len(wrong)} windows, first at question "
            f"{name!r}; look for NaN in the weights, or try autocast=None"
        )
    best: dict[int, int] = {}
    scores = score.tolist()
    for window, example in enumerate(windows.example_index.tolist()):
        if example not in best or scores[window] > scores[best[example]]:
            best[example] = window
    offsets, starts, ends = windows.token_offsets.tolist(), start.tolist(), end.tolist()
    shifts, counts = (windows.offset_row - windows.context_start).tolist(), windows.context_length.tolist()
    predictions = {}
    for i, example in enumerate(windows.examples):
        w = best[i]
        first, last = starts[w] + shifts[w], ends[w] + shifts[w]
        predictions[example.id] = example.context[offsets[first][0] : offsets[last][1]] if counts[w] else ""
    return predictions


def _check_fits(model: nn.Module, windows: SquadWindows) -> None:
    """Refuse windows that would read out of an embedding; on a GPU that ends the whole process."""
    config = getattr(model, "config", None)
    positions, vocabulary = getattr(config, "max_position_embeddings", None), getattr(config, "vocab_size", None)
    longest, largest = int(windows.lengths.max()), int(windows.input_ids.max())
    if positions and longest > positions:
        raise ConfigError(f"max_length must be at most the model's {positions} positions, got windows of {longest}")
    if vocabulary and largest >= vocabulary:
        raise ConfigError(f"tokenizer must have ids below the model's {vocabulary}, got {largest}; use the model's own")
