# SPDX-License-Identifier: Apache-2.0
"""What a forward pass leaves for per-sample gradients: inputs of layers, and where their output gradients arrive."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from obs_kernels.pruning.layer import PrunedLayer


@dataclass(frozen=True)
class Use:
    """One call of a layer's module."""

    layer: PrunedLayer
    input: int
    """Place of the input in ``Captured.inputs``; the same for layers that share it, as query, key and value do."""
    edge: GradientEdge
    """Where the gradient of the output arrives."""


@dataclass
class Captured:
    """The uses of one forward pass, in the order of the calls."""

    uses: list[Use] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    """Detached inputs, each once."""


@contextmanager
def capture(layers: Sequence[PrunedLayer]) -> Iterator[Captured]:
    """Every use of ``layers`` in a forward pass; hooks go also after exceptions."""
    captured = Captured()
    places: dict[tuple[int, int], tuple[Tensor, int]] = {}  # holds the inputs, so that ids stay theirs
    handles = []

    def hook_of(layer: PrunedLayer) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            if not output.requires_grad:
                return None
            x = input_of(args, kwargs)
            output = _own_edge(module, output)
            _, place = places.setdefault((id(x), x._version), (x, len(captured.inputs)))
            if place == len(captured.inputs):
                captured.inputs.append(x.detach())
            captured.uses.append(Use(layer, place, get_gradient_edge(output)))
            return output

        return hook

    try:
        for layer in layers:
            handles.append(layer.module.register_forward_hook(hook_of(layer), with_kwargs=True))
        yield captured
    finally:
        for handle in handles:
            handle.remove()
        places.clear()


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a layer was called with, by place or by whatever name its module gives it."""
    x: Tensor = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
    return x


def _own_edge(module: nn.Module, output: Tensor) -> Tensor:
    """``output`` as a tensor whose gradient edge no later in-place activation can bypass.

    A linear of a 3-D input returns a view, and in-place changes of a view bypass its edge. A copy would do, at two
    passes over all outputs. What ``nn.Linear`` returns nobody else holds (its backward needs input and weight only), so
    the same memory under a new tensor does too; of other modules and of outputs that hooks have seen nobody knows.
    """
    plain = type(module).forward is nn.Linear.forward and "forward" not in vars(module)
    if plain and len(module._forward_hooks) == 1 and output.is_contiguous():
        return torch.ops.aten._unsafe_view(output, output.shape)
    return output.clone()
