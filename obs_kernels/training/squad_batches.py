# SPDX-License-Identifier: Apache-2.0
"""Batches of SQuAD windows, the choice of windows for calibration, and the loss of a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from obs_kernels.errors import ConfigError
from obs_kernels.pruning.output_probe import TEMPERATURE, output_probe
from obs_kernels.training.length_batches import longest_first, shuffled_batches
from obs_kernels.training.squad import Batch, SquadWindows


class SquadLoader:
    """Batches of windows, as often as wanted; the order is a function of the arguments and of nothing else.

    ``order="length"`` sorts by length, longest first, so that little is padded and memory peaks at once.
    ``order="given"`` keeps ``rows``. ``order="shuffle"`` draws a new order from ``seed`` and the epoch (``set_epoch``),
    with windows of like length batched together.
    """

    def __init__(
        self,
        windows: SquadWindows,
        rows: Tensor | None = None,
        *,
        batch_size: int,
        order: Literal["length", "given", "shuffle"] = "length",
        seed: int = 0,
        pad_to_multiple_of: int = 8,
    ) -> None:
        """Take the windows ``rows`` [S] int64 (None: all of them) in batches of ``batch_size``."""
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}; try 16")
        if order not in ("length", "given", "shuffle"):
            raise ConfigError(f"order must be 'length', 'given' or 'shuffle', got {order!r}")
        self.windows, self.batch_size, self.order, self.seed = windows, batch_size, order, seed
        self.rows = torch.arange(len(windows)) if rows is None else rows
        self.pad_to_multiple_of = pad_to_multiple_of
        self.epoch = 0
        if len(self.rows) == 0:
            raise ConfigError("rows must name at least one window, got none; None takes all of them")

    def __len__(self) -> int:
        """Return the number of batches; the last may be smaller."""
        return -(-len(self.rows) // self.batch_size)

    @property
    def num_samples(self) -> int:
        """Number of windows of one pass."""
        return len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass; only ``order="shuffle"`` depends on it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of one pass, as ``SquadWindows.batch`` makes them."""
        for rows in self._batches():
            yield self.windows.batch(rows, pad_to_multiple_of=self.pad_to_multiple_of)

    def _batches(self) -> list[Tensor]:
        if self.order == "given":
            return list(self.rows.split(self.batch_size))
        if self.order == "length":
            return list(longest_first(self.windows.lengths, self.rows).split(self.batch_size))
        return shuffled_batches(self.windows.lengths, self.rows, self.batch_size, seed=self.seed, epoch=self.epoch)


def calibration_loader(
    windows: SquadWindows, *, num_samples: int, batch_size: int, seed: int, sort_by_length: bool = True
) -> SquadLoader:
    """Return a loader over ``num_samples`` windows that ``seed`` chooses uniformly, each at most once.

    All windows are candidates, also the few without the answer, which are labelled [CLS] as in training. With one seed
    a smaller choice is part of a larger one. Batches are sorted by length, which changes nothing for gradients of
    single samples; ``sort_by_length=False`` leaves the windows in random order, for gradients of whole batches.

    Raises:
        ConfigError: the windows carry no labels, or there are fewer than ``num_samples``.
    """
    if windows.start_positions is None:
        raise ConfigError("windows must carry labels for calibration, got none; call prepare_windows(with_labels=True)")
    if not 1 <= num_samples <= len(windows):
        raise ConfigError(
            f"num_samples must be 1 to {len(windows)}, the number of windows, got {num_samples}; load more questions"
        )
    rows = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:num_samples]
    return SquadLoader(windows, rows, batch_size=batch_size, order="length" if sort_by_length else "given")


def model_inputs(model: nn.Module, batch: Batch) -> Batch:
    """Return what ``model.forward`` takes of ``batch``, on the model's device, without labels."""
    inner = model
    while isinstance(wrapped := getattr(inner, "module", getattr(inner, "_orig_mod", None)), nn.Module):
        inner = wrapped
    keys = ["input_ids", "attention_mask"]
    takes_types = "token_type_ids" in inspect.signature(inner.forward).parameters
    if "token_type_ids" in batch and takes_types and getattr(getattr(inner, "config", None), "type_vocab_size", 2) > 1:
        keys.append("token_type_ids")
    device = next((p.device for p in model.parameters()), batch["input_ids"].device)
    return {key: batch[key].to(device, non_blocking=True) for key in keys}


def squad_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of each window, [B] float32: mean of the cross-entropies of first and last answer token.

    The softmax runs over the tokens of the window only: logits where ``attention_mask`` is 0 are left out, so the loss
    of a window does not depend on the length that its batch is padded to.

    Raises:
        ConfigError: the batch carries no labels.
    """
    _require_labels(batch)
    inputs = model_inputs(model, batch)
    return span_losses(model(**inputs), inputs["attention_mask"], batch)


def span_losses(outputs: Any, attention_mask: Tensor, batch: Batch) -> Tensor:
    """Return [B] float32 losses of the outputs of a question answering model, see ``squad_loss``."""
    _require_labels(batch)
    padding = attention_mask == 0
    losses = [
        nn.functional.cross_entropy(x.masked_fill(padding, -torch.inf), batch[key].to(x.device), reduction="none")
        for x, key in zip(span_logits(outputs), ("start_positions", "end_positions"), strict=True)
    ]
    return (losses[0] + losses[1]) / 2


def _require_labels(batch: Batch) -> None:
    if "start_positions" not in batch:
        raise ConfigError("batch must carry start_positions, got none; call prepare_windows(with_labels=True)")


def squad_output_loss(model: nn.Module, batch: Batch, *, temperature: float = TEMPERATURE) -> Tensor:
    """Return stand-in losses [B] that carry the curvature of the model's own answers, first and last token.

    Labels are not read; tokens where ``attention_mask`` is 0 are left out. See ``obs_kernels.output_probe``.
    """
    inputs = model_inputs(model, batch)
    start, end = span_logits(model(**inputs))
    padding = inputs["attention_mask"] == 0
    first, last = (output_probe(x, temperature=temperature, padding=padding) for x in (start, end))
    return (first + last) / 2


LOSSES: dict[str, Callable[[nn.Module, Batch], Tensor]] = {"labels": squad_loss, "outputs": squad_output_loss}
"""What curvature may be taken of: the loss on the answers, or the model's own distribution."""


def span_logits(outputs: Any) -> tuple[Tensor, Tensor]:
    """Return start and end logits [B, T] of a question answering model's output, half precision raised to float32."""
    start, end = (outputs["start_logits"], outputs["end_logits"]) if hasattr(outputs, "keys") else outputs[:2]
    dtype = torch.promote_types(start.dtype, torch.float32)
    return start.to(dtype), end.to(dtype)
