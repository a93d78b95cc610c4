# SPDX-License-Identifier: Apache-2.0
"""In which order the layers of a model run, and which of them read the same input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from obs_kernels.errors import ConfigError
from obs_kernels.pruning.calibration import LossFn, move
from obs_kernels.pruning.capture import input_of
from obs_kernels.pruning.layer import PrunedLayer
from obs_kernels.pruning.modes import eval_mode


def execution_groups(
    model: nn.Module, layers: Sequence[PrunedLayer], loader: Iterable[Any], loss_fn: LossFn
) -> list[list[str]]:
    """Names of ``layers`` in the order of their first use in the first batch, those that share an input together.

    Layers that the batch does not use make the last group.
    """
    batch = next(iter(loader), None)
    if batch is None:
        raise ConfigError("loader gave no batch; it must yield at least one")
    groups: list[list[str]] = []
    inputs: list[tuple[Tensor, int]] = []  # of the groups; held, so that no other tensor takes their place
    seen: set[str] = set()

    def hook_of(layer: PrunedLayer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if layer.name in seen:
                return
            seen.add(layer.name)
            x = input_of(args, kwargs)
            if inputs and inputs[-1][0] is x and inputs[-1][1] == x._version:
                groups[-1].append(layer.name)
            else:
                groups.append([layer.name])
                inputs.append((x, x._version))

        return hook

    handles = [layer.module.register_forward_pre_hook(hook_of(layer), with_kwargs=True) for layer in layers]
    try:
        with eval_mode(model), torch.no_grad():
            loss_fn(model, move(batch, layers[0].weight.device))
    finally:
        for handle in handles:
            handle.remove()
    rest = [layer.name for layer in layers if layer.name not in seen]
    return groups + ([rest] if rest else [])
