# SPDX-License-Identifier: Apache-2.0
"""Is a batch fit for the Fisher? One number a tensor on the device, all of them read by one wait of the host.

The largest magnitude of a tensor is non-finite exactly if the tensor holds a NaN or Inf (a maximum that keeps NaN), and
it bounds products without forming them. Only where the bounds do not settle it are values looked at, layer by layer, to
name the first bad one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from obs_kernels.errors import NonFiniteGradientError
from obs_kernels.pruning.layer import PrunedLayer

SAFE = 1e16
"""Gradients below it need no look: their squares, summed over a million samples, stay below the f32 maximum."""


class Readings:
    """Numbers of a batch that are on the device; ``read`` fetches all that were added since, in one wait."""

    def __init__(self) -> None:
        self._pending: list[Tensor] = []
        self._places: dict[int, tuple[Tensor, int]] = {}  # holds the tensors, so that ids stay theirs
        self._values: list[float] = []

    def add(self, value: Tensor) -> int:
        """Ask for a 0-dim tensor; returns its place in what ``read`` gives."""
        self._pending.append(value)
        return len(self._values) + len(self._pending) - 1

    def add_largest(self, values: Tensor) -> int:
        """Ask for the largest magnitude in ``values``: NaN or Inf if one is there, 0 if it is empty; once a tensor."""
        if id(values) not in self._places:
            # one pass without temporaries, and NaN wins; vector_norm(ord=inf) is the same on a GPU, but takes seven
            # times as long on a CPU
            low, high = torch.aminmax(values) if values.numel() else (values.new_zeros(()),) * 2
            self._places[id(values)] = (values, self.add(low))
            self.add(high)
        return self._places[id(values)][1]

    def read(self) -> list[float]:
        """All numbers asked for so far."""
        pending, self._pending = self._pending, []
        if not pending:
            return self._values
        # stacked in each dtype first: a conversion of every number would be a launch of its own
        dtypes = dict.fromkeys(value.dtype for value in pending)
        groups = [[i for i, value in enumerate(pending) if value.dtype == dtype] for dtype in dtypes]
        stacked = torch.cat([torch.stack([pending[i] for i in group]).double() for group in groups])
        first = len(self._values)
        self._values += [0.0] * len(pending)
        for i, value in zip([i for group in groups for i in group], stacked.tolist(), strict=True):
            self._values[first + i] = value
        for _, place in self._places.values():
            if place >= first:
                low, high = self._values[place : place + 2]
                self._values[place] = math.nan if math.isnan(low) or math.isnan(high) else max(-low, high)
        return self._values


def is_safe(bound: float) -> bool:
    """Whether gradients of at most that magnitude fit the Fisher; False for NaN."""
    return bound < SAFE


def require_finite(layer: PrunedLayer, values: Tensor, batch: int) -> None:
    """Raise ``NonFiniteGradientError`` with layer, batch and count if ``values`` hold NaN or Inf."""
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        raise NonFiniteGradientError(
            f"{layer.name}: {int((~finite).sum())} NaN or Inf in the gradients of batch {batch}; the Fisher is as it "
            f"was before this batch. Fix: clean the data, lower the loss scale, or on_nonfinite='skip_batch'"
        )


def require_finite_loss(largest: float, batch: int) -> None:
    """After the layers, so that the first of them that is not finite gets named."""
    if not largest < math.inf:
        raise NonFiniteGradientError(
            f"loss_fn gave NaN or Inf for batch {batch} while all gradients are finite; the Fisher is as it was before "
            f"this batch. Fix: clean the data, or on_nonfinite='skip_batch'"
        )


def require_finite_gradients(
    layers: Sequence[PrunedLayer], grads: Sequence[Tensor], batch: int, loss: Tensor | None = None
) -> None:
    """Refuse gradients [R, C] of the layers, one each, and ``loss``, unless their squares are finite too."""
    readings = Readings()
    places = [readings.add_largest(grad) for grad in grads]
    place = None if loss is None else readings.add_largest(loss)
    values = readings.read()
    for layer, grad, at in zip(layers, grads, places, strict=True):
        if not is_safe(values[at]):
            require_finite(layer, grad.float().square(), batch)  # squared: what the Fisher will hold
    if place is not None:
        require_finite_loss(values[place], batch)
