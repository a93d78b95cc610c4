# SPDX-License-Identifier: Apache-2.0
"""Pruned weights that stay zero while an optimizer works on the model: weights, its state, averaged copies.

Momentum, decay and averages let pruned weights grow back. What is zeroed here is filled, not multiplied: a product
leaves -0.0, and NaN where there was NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from obs_kernels.errors import ConfigError
from obs_kernels.pruning.layer import PrunedLayer


class HeldMasks:
    """Masks of ``layers`` as buffers that keep their memory, so that a captured graph follows later masks too.

    The masks are those of the layers; call ``refresh`` when they changed.
    """

    def __init__(self, layers: Sequence[PrunedLayer]) -> None:
        self.layers = tuple(layers)
        self._seen: list[Tensor | None] = [None] * len(self.layers)
        self._dead = [torch.zeros_like(layer.weight, dtype=torch.bool) for layer in self.layers]
        self.refresh()

    def refresh(self) -> None:
        """Take the present masks; only those that are new are copied."""
        for i, layer in enumerate(self.layers):
            if self._seen[i] is layer.mask:
                continue
            dead = ~layer.mask
            self._dead[i].copy_(dead.mT if layer.transposed else dead)
            self._seen[i] = layer.mask

    @torch.no_grad()
    def apply(self, optimizer: Any = None, averaged: nn.Module | None = None) -> None:
        """Zeros at pruned places of the weights, of what ``optimizer`` keeps of them, and of an averaged model.

        Args:
            optimizer: any with ``state``; its tensors of a weight's shape are masked (momenta, squares), others (step
                counts, factored rows and columns) are left.
            averaged: a copy of the model that follows it, such as ``torch.optim.swa_utils.AveragedModel``.
        """
        state = None if optimizer is None else optimizer.state
        for layer, dead in self._pairs():
            weight = layer.weight
            weight.masked_fill_(dead, 0.0)
            if state is None:
                continue
            for value in state.get(weight, {}).values():
                if isinstance(value, Tensor) and value.shape == weight.shape and value.is_floating_point():
                    value.masked_fill_(dead, 0.0)
        if averaged is not None:
            for copied, dead in zip(self._weights_of(averaged), self._dead, strict=True):
                copied.masked_fill_(dead, 0.0)

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Zeros at pruned places of ``.grad``; before a clipping by norm, which then looks at what can move."""
        for layer, dead in self._pairs():
            if layer.weight.grad is not None:
                layer.weight.grad.masked_fill_(dead, 0.0)

    def violations(self) -> int:
        """Nonzero weights at pruned places; waits for the device once."""
        counts = [(layer.weight.detach().masked_fill(~dead, 0.0) != 0).sum() for layer, dead in self._pairs()]
        return int(torch.stack([count.cpu() for count in counts]).sum()) if counts else 0

    def _pairs(self) -> Iterable[tuple[PrunedLayer, Tensor]]:
        return zip(self.layers, self._dead, strict=True)

    def _weights_of(self, model: nn.Module) -> list[Tensor]:
        inner = model
        while isinstance(wrapped := getattr(inner, "module", None), nn.Module):
            inner = wrapped
        parameters = dict(inner.named_parameters())
        missing = [layer.parameter_name for layer in self.layers if layer.parameter_name not in parameters]
        if missing:
            raise ConfigError(
                f"averaged must be a copy of the pruned model, got {type(inner).__name__} without {missing[0]}; pass "
                f"torch.optim.swa_utils.AveragedModel(model)"
            )
        return [parameters[layer.parameter_name].detach() for layer in self.layers]
