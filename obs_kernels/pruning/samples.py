# SPDX-License-Identifier: Apache-2.0
"""Gradients of every sample's own loss from one backward pass.

y = x W^T gives G_i = sum_t dy_it x_it^T: one batched product of output gradients and inputs a layer, written straight
into the rows of the gradient buffer. The factor between a sample's share of a mean loss and its own loss is a factor of
that product too, so no tensor of activations is ever scaled, raised to f32 or copied, unless it has padding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from obs_kernels.errors import ConfigError, ShapeNotSupportedError
from obs_kernels.pruning.capture import Captured
from obs_kernels.pruning.finite import Readings, is_safe, require_finite, require_finite_loss
from obs_kernels.pruning.gradient_buffer import row_dtype
from obs_kernels.pruning.layer import PrunedLayer

SELF_CHECK_TOLERANCE = 0.05
"""Share by which the summed per-sample gradients may miss autograd's own; half precision needs most of it."""


@dataclass(frozen=True)
class Piece:
    """One use of a layer by a batch of N samples with T tokens."""

    input: int
    """Place of x [N, T, C] in ``Samples.inputs``."""
    dy: Tensor
    """[N, T, R], of the loss as it was differentiated."""


class Samples:
    """Inputs and output gradients of a batch that was found finite.

    Args:
        inputs: x [N, ..., C] of the uses, as they were captured; replaced here by [N, T, C] without padding.
        pieces: the uses of each layer that the loss reaches; of the others nothing.
        scale: from the gradient of the differentiated loss to that of a sample's own.
    """

    def __init__(self, inputs: list[Tensor], pieces: dict[PrunedLayer, list[Piece]], scale: float) -> None:
        self.inputs, self.pieces, self.scale = inputs, pieces, scale
        self._cast: tuple[tuple[int, slice, torch.dtype], Tensor] | None = None

    @property
    def dtypes(self) -> dict[PrunedLayer, torch.dtype]:
        """Dtype of the buffer's rows of each layer that the loss reaches."""
        found = {}
        for layer, pieces in self.pieces.items():
            dtypes = {row_dtype(piece.dy.dtype, piece.dy.device) for piece in pieces}
            if dtypes:
                found[layer] = dtypes.pop() if len(dtypes) == 1 else torch.float32
        return found

    def write(self, layer: PrunedLayer, out: Tensor, part: slice) -> None:
        """Gradients of the samples ``part`` into ``out`` [n, R, C], whatever it holds; summed over uses and tokens."""
        pieces = self.pieces[layer]
        exact = any(piece.dy.dtype == torch.float64 for piece in pieces)  # rounded once, as the last step
        dtype = torch.float64 if exact else out.dtype
        xs = [self._x(piece.input, part, dtype) for piece in pieces]
        dys = [piece.dy[part].to(dtype) for piece in pieces]
        # several uses as more tokens of one: their sum is then rounded once, too
        x, dy = (xs[0], dys[0]) if len(pieces) == 1 else (torch.cat(xs, 1), torch.cat(dys, 1))
        if exact:
            out.copy_(torch.bmm(dy.mT, x).mul_(self.scale))
        else:
            out.baddbmm_(dy.mT, x, beta=0, alpha=self.scale)  # in place: autocast leaves it alone

    def _x(self, place: int, part: slice, dtype: torch.dtype) -> Tensor:
        """Samples ``part`` of an input in ``dtype``; layers that share an input follow each other and convert once.

        Under autocast x may be f32 where dy is bf16: the linear has rounded it too.
        """
        x = self.inputs[place][part]
        if x.dtype == dtype:
            return x
        key = (place, part, dtype)
        if self._cast is None or self._cast[0] != key:
            self._cast = None  # the old one goes before the new one comes
            self._cast = (key, x.to(dtype))
        return self._cast[1]

    def require_finite(self, layer: PrunedLayer, batch: int) -> None:
        """Look at the gradients themselves, one by one: what the bounds could not settle."""
        dtype = self.dtypes[layer]
        for i in range(self.pieces[layer][0].dy.shape[0]):
            out = torch.empty((1, *layer.mask.shape), dtype=dtype, device=layer.weight.device)
            self.write(layer, out, slice(i, i + 1))
            require_finite(layer, out.float().square(), batch)


def check_samples(
    layers: Sequence[PrunedLayer],
    captured: Captured,
    dys: list[Tensor | None],
    weight_grads: Sequence[Tensor | None],
    loss: Tensor,
    *,
    samples: int,
    scale: float,
    padding: Tensor | None,
    batch: int,
) -> Samples:
    """What a batch holds, fit for the Fisher; the host waits for the device once.

    Args:
        captured: its inputs are used up.
        dys: output gradients of ``captured.uses``; None where the loss does not reach. Used up.
        weight_grads: autograd's own gradients of the layers to compare with, or nothing.
        loss: as ``loss_fn`` gave it.
        samples: N. scale: see ``Samples``.
        padding: [N, T] bool, True at tokens that count nowhere, or None.
        batch: number of the batch, for messages.

    Raises:
        ShapeNotSupportedError: a layer whose input does not have the batch first. ConfigError: a layer whose gradient
            is not the sum of its samples'. NonFiniteGradientError: names layer and batch.
    """
    if all(dy is None for dy in dys):
        raise ConfigError("the loss reaches no selected layer; check targets, ignore and loss_fn")
    inputs, reached = captured.inputs, [i for i, dy in enumerate(dys) if dy is not None]
    for i in reached:
        _require_batch_first(captured.uses[i].layer, inputs[captured.uses[i].input], samples)
    readings = Readings()
    gaps = _gaps_to_autograd(layers, captured, dys, weight_grads, readings)
    for place in {captured.uses[i].input for i in reached}:
        inputs[place] = as_tokens(inputs[place], samples, padding)
    pieces: dict[PrunedLayer, list[Piece]] = {layer: [] for layer in layers}
    for i in reached:
        dy, dys[i] = dys[i], None  # of a padded batch only the copy lives on
        assert dy is not None
        pieces[captured.uses[i].layer].append(Piece(captured.uses[i].input, as_tokens(dy, samples, padding)))
    found = Samples(inputs, pieces, scale)
    bounds = {
        layer: [
            (readings.add_largest(inputs[p.input]), readings.add_largest(p.dy), p.dy.shape[1]) for p in pieces[layer]
        ]
        for layer in layers
    }
    loss_place = readings.add_largest(loss.detach())
    values = readings.read()  # the one wait

    for layer, miss, size in gaps:
        _require_sum(layer, values[miss], values[size])
    for layer in layers:
        if not is_safe(sum(values[x] * values[dy] * tokens * scale for x, dy, tokens in bounds[layer])):
            found.require_finite(layer, batch)
    require_finite_loss(values[loss_place], batch)
    return found


def host_padding(batch: Any) -> bool | None:
    """Whether a batch has tokens that count nowhere; None if only the device knows, which is not asked."""
    mask = _attention_mask(batch)
    if mask is None:
        return False
    return bool((mask == 0).any()) if mask.device.type == "cpu" else None


def padding_of(batch: Any) -> Tensor | None:
    """[N, T] bool on the batch's device, True at tokens outside of ``attention_mask``."""
    mask = _attention_mask(batch)
    return None if mask is None else mask == 0


def batch_size(batch: Any) -> int | None:
    """Samples of a batch: the first dimension of its first tensor; None where it has no such tensor."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else None
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    for value in values:
        if isinstance(value, Tensor) and value.dim():
            return value.shape[0]
    return None


def _attention_mask(batch: Any) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _require_batch_first(layer: PrunedLayer, x: Tensor, samples: int) -> None:
    if x.shape[0] != samples:
        raise ShapeNotSupportedError(
            f"{layer.name}: input has {x.shape[0]} rows for {samples} samples; per-sample gradients need the batch in "
            f"the first dimension. Fix: gradients='batch', or ignore this layer"
        )


def as_tokens(values: Tensor, samples: int, padding: Tensor | None) -> Tensor:
    """[N, T, :] of an input or output gradient, zero at padded tokens whatever they hold."""
    if padding is not None and values.dim() == 3 and padding.shape == values.shape[:2]:
        values = values.masked_fill(padding[..., None], 0.0)
    return values.reshape(samples, -1, values.shape[-1])


def _gaps_to_autograd(
    layers: Sequence[PrunedLayer],
    captured: Captured,
    dys: Sequence[Tensor | None],
    weight_grads: Sequence[Tensor | None],
    readings: Readings,
) -> list[tuple[PrunedLayer, int, int]]:
    """Ask for |sum of samples - autograd's gradient| and |autograd's gradient| of each layer, to be compared later."""
    gaps = []
    for layer, grad in zip(layers, weight_grads, strict=bool(weight_grads)):
        wanted = torch.zeros_like(layer.matrix, dtype=torch.float32) if grad is None else layer.as_matrix(grad).float()
        total = torch.zeros_like(wanted)
        for use, dy in zip(captured.uses, dys, strict=True):
            if use.layer is not layer or dy is None:
                continue
            x = captured.inputs[use.input]
            if x.shape[-1] == wanted.shape[1] and dy.shape[-1] == wanted.shape[0]:
                dtype = row_dtype(dy.dtype, dy.device)
                total += dy.reshape(-1, dy.shape[-1]).to(dtype).mT @ x.reshape(-1, x.shape[-1]).to(dtype)
        gaps.append((layer, readings.add((total - wanted).norm()), readings.add(wanted.norm())))
    return gaps


def _require_sum(layer: PrunedLayer, miss: float, size: float) -> None:
    """Refuse a layer whose activations and output gradients do not make up its weight gradient."""
    if miss > SELF_CHECK_TOLERANCE * size and math.isfinite(miss) and math.isfinite(size):
        raise ConfigError(
            f"{layer.name}: per-sample gradients do not add up to its gradient (relative difference "
            f"{miss / max(size, 1e-30):.2g}); the weight is used outside of its module, or the module is no linear "
            f"map. Fix: gradients='batch', or ignore it"
        )
