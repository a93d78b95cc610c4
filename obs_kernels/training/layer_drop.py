# SPDX-License-Identifier: Apache-2.0
"""Encoder layers taken out of a model for good: from its modules and its config, so that none of them is saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from obs_kernels.errors import ConfigError


def drop_layers_(model: nn.Module, keep: Sequence[int]) -> list[str]:
    """Keep the layers ``keep`` of the model's stack, in their order, and remove the others, in place.

    Args:
        model: a transformers model with ``config.num_hidden_layers`` and one list of as many layers.
        keep: indices, ascending; [0, 11] keeps the first and the last of 12.

    Returns:
        Names of the removed modules.

    Raises:
        ConfigError: indices out of range, twice or not ascending; no stack, or more than one, in the model.
    """
    config = getattr(model, "config", None)
    count = getattr(config, "num_hidden_layers", None)
    stacks = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and _is_uniform(module)
    }
    if len(stacks) != 1 or config is None:
        found = ", ".join(stacks) or "none"
        raise ConfigError(
            f"layer_drop needs a model with one list of config.num_hidden_layers = {count} layers, got {found} in "
            f"{type(model).__name__}; leave layer_drop out"
        )
    name, stack = next(iter(stacks.items()))
    chosen = list(keep)
    if not chosen or chosen != sorted(set(chosen)) or chosen[0] < 0 or chosen[-1] >= len(stack):
        raise ConfigError(f"layer_drop.keep must ascend within 0 to {len(stack) - 1}, got {chosen}; e.g. [0, 2, 4]")
    kept = nn.ModuleList(stack[i] for i in chosen)
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, kept)
    for place, layer in enumerate(kept):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):  # where a layer finds its part of a cache
                module.layer_idx = place  # type: ignore[assignment]
    _shrink(config, chosen)
    return [f"{name}.{i}" for i in range(len(stack)) if i not in chosen]


def _is_uniform(stack: nn.ModuleList) -> bool:
    return len({type(layer) for layer in stack}) == 1 and next(iter(stack.parameters()), None) is not None


def _shrink(config: Any, chosen: Sequence[int]) -> None:
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, (list, tuple)):
        config.layer_types = [kinds[i] for i in chosen]
    config.num_hidden_layers = len(chosen)
