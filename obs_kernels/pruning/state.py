# SPDX-License-Identifier: Apache-2.0
"""A pruner's state: what it holds of each layer, and, before anything is changed, whether it is whole and its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from obs_kernels.errors import ConfigError, ResumeMismatchError
from obs_kernels.patterns import Pattern, parse_pattern
from obs_kernels.pruning.config import OBSConfig
from obs_kernels.pruning.layer import PrunedLayer
from obs_kernels.pruning.report import LayerReport
from obs_kernels.pruning.row_layer import RowLayer
from obs_kernels.pruning.schedule import check_reachable

NUMBERS = ("stage", "saliency", "seconds", "received")
TABLES = ("config", "masks", "first_masks", "fisher_sums", "row_sums", "origins", "input_sums", "num_grads", "reports")


def tables_of(layers: Sequence[PrunedLayer]) -> dict[str, dict[str, Any]]:
    """Masks, Fisher sums and counts, each by the name of the layer; copies."""
    rows = [layer for layer in layers if isinstance(layer, RowLayer)]
    return {
        "masks": {layer.name: layer.mask.clone() for layer in layers},
        "first_masks": {layer.name: layer.first_mask.clone() for layer in layers},
        "fisher_sums": {layer.name: fisher.clone() for layer in layers if (fisher := layer.fisher_sum) is not None},
        "row_sums": {layer.name: layer.row_sum.clone() for layer in rows if layer.row_sum is not None},
        "origins": {layer.name: layer.origin.clone() for layer in rows if layer.origin is not None},
        "input_sums": {layer.name: layer.input_sum.clone() for layer in rows if layer.input_sum is not None},
        "clusters": {layer.name: layer.clusters.clone() for layer in rows if layer.clusters is not None},
        "num_grads": {layer.name: layer.num_grads for layer in layers},
    }


def take_tables(state: Mapping[str, Any], layers: Sequence[PrunedLayer]) -> None:
    """Set ``layers`` to what ``tables_of`` found, in a state that ``check_state`` has passed; copies."""
    for layer in layers:
        device = layer.weight.device
        layer.mask = state["masks"][layer.name].to(device, copy=True)
        layer.first_mask = state["first_masks"][layer.name].to(device, copy=True)
        fisher = state["fisher_sums"].get(layer.name)
        fisher = None if fisher is None else fisher.to(device, copy=True)
        layer.set_fisher(fisher, state["num_grads"][layer.name])
        if isinstance(layer, RowLayer) and fisher is not None:
            layer.row_sum = state["row_sums"][layer.name].to(device, copy=True)
            origin = state["origins"].get(layer.name)
            layer.origin = None if origin is None else origin.to(device, copy=True)
            layer.input_sum = state["input_sums"][layer.name].to(device, copy=True)
            if layer.num_clusters > 1:
                layer.clusters = state["clusters"][layer.name].to(device, copy=True)


def check_state(state: Mapping[str, Any], config: OBSConfig, layers: Sequence[PrunedLayer]) -> tuple[Pattern, ...]:
    """The stages of ``state``; ``ResumeMismatchError`` unless it is whole, and of a pruner of ``config`` over
    ``layers``.
    """
    for key in (*NUMBERS, *TABLES):
        kind = (int, float) if key in NUMBERS else Mapping
        if not isinstance(state.get(key), kind):
            raise ResumeMismatchError(
                f"state[{key!r}] is missing or damaged, got {type(state.get(key)).__name__}; save it again"
            )
    _check_config(state["config"], config)
    stages = _stages_of(state.get("stages"), config)
    if not isinstance(state["stage"], int) or not 0 <= state["stage"] <= len(stages):
        raise ResumeMismatchError(f"state['stage'] must be 0 to {len(stages)}, got {state['stage']!r}; save it again")
    names = {layer.name for layer in layers}
    for key in ("masks", "first_masks", "num_grads"):
        if set(state[key]) != names:
            raise ResumeMismatchError(
                f"state[{key!r}] is of other layers or shapes; build the pruner on the same model"
            )
    for layer in layers:
        for key in ("masks", "first_masks"):
            _check_tensor(
                f"state[{key!r}][{layer.name!r}]", state[key][layer.name], tuple(layer.mask.shape), torch.bool
            )
        count = state["num_grads"][layer.name]
        if not isinstance(count, int) or count < 0:
            raise ResumeMismatchError(f"state['num_grads'][{layer.name!r}] must be a count, got {count!r}")
        fisher = state["fisher_sums"].get(layer.name)
        if fisher is not None:
            shape = (layer.num_blocks, layer.block_size, layer.block_size)
            _check_tensor(f"state['fisher_sums'][{layer.name!r}]", fisher, shape, torch.float32)
            if isinstance(layer, RowLayer):
                rows = state["row_sums"].get(layer.name)
                _check_tensor(f"state['row_sums'][{layer.name!r}]", rows, (layer.padded[0],), torch.float64)
                origin = state["origins"].get(layer.name)
                if origin is not None:  # None where no token came
                    width = (layer.mask.shape[1],)
                    _check_tensor(f"state['origins'][{layer.name!r}]", origin, width, torch.float32)
                inputs = state["input_sums"].get(layer.name)
                wanted = (layer.num_clusters, layer.padded[1] + 1)
                _check_tensor(f"state['input_sums'][{layer.name!r}]", inputs, wanted, torch.float64)
                if layer.num_clusters > 1:
                    _check_clusters(layer, state.get("clusters", {}).get(layer.name))
    keys = {field.name for field in fields(LayerReport)}
    for name, report in state["reports"].items():
        if name not in names or not isinstance(report, Mapping) or set(report) != keys:
            raise ResumeMismatchError(f"state['reports'][{name!r}] is damaged; save the state again")
    return stages


def check_weights(masks: Mapping[str, Tensor], layers: Sequence[PrunedLayer]) -> None:
    """``ResumeMismatchError`` with the first layer whose weights live where its mask [R, C] in ``masks`` prunes.

    Masks of another checkpoint than the weights would otherwise prune these without a choice or an update.
    """
    live = [int((layer.matrix.masked_fill(masks[layer.name].to(layer.mask.device), 0) != 0).sum()) for layer in layers]
    wrong = [(layer, count) for layer, count in zip(layers, live, strict=True) if count]
    if wrong:
        layer, count = wrong[0]
        raise ResumeMismatchError(
            f"{layer.name}: weights must be zero where the mask of the state prunes, got {count} that are not (in "
            f"{len(wrong)} of {len(layers)} layers); load the model's weights of the same checkpoint first"
        )


def _stages_of(texts: Any, config: OBSConfig) -> tuple[Pattern, ...]:
    """Patterns that lead to that of ``config``, each from the one before."""
    if not isinstance(texts, (list, tuple)) or not texts:
        raise ResumeMismatchError(f"state['stages'] is missing or damaged, got {texts!r}; save it again")
    final, found = config.parsed_pattern, list[Pattern]()
    try:
        for text in texts:
            found.append(parse_pattern(text))
            check_reachable(found[-1], reached=None, final=final)
    except ConfigError as error:
        raise ResumeMismatchError(f"state['stages'] is damaged: {error}") from None
    falls = all(one.sparsity <= two.sparsity for one, two in pairwise(found))
    if not falls or found[-1] != final:
        raise ResumeMismatchError(f"state['stages'] must lead to {final}, got {list(texts)}; save it again")
    return tuple(found)


def _check_config(theirs: Mapping[str, Any], mine: OBSConfig) -> None:
    try:
        other = OBSConfig.from_dict(dict(theirs))
    except ConfigError as error:
        raise ResumeMismatchError(f"state['config'] is damaged: {error}") from None
    if other != mine:
        ours, others = mine.to_dict(), other.to_dict()
        differing = [key for key in ours | others if ours.get(key) != others.get(key)]
        raise ResumeMismatchError(
            f"the state was made with another config (differs in {', '.join(differing)}); use the same"
        )


def _check_clusters(layer: RowLayer, clusters: Any) -> None:
    name = f"state['clusters'][{layer.name!r}]"
    _check_tensor(name, clusters, (layer.padded[0],), torch.int64)
    if not bool(((clusters >= 0) & (clusters < layer.num_clusters)).all()):
        raise ResumeMismatchError(
            f"{name} must hold 0 to {layer.num_clusters - 1}, got {int(clusters.min())} to {int(clusters.max())}; save "
            f"the state again"
        )


def _check_tensor(name: str, value: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if not isinstance(value, Tensor) or tuple(value.shape) != shape or value.dtype != dtype:
        came = f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise ResumeMismatchError(
            f"{name} must be {list(shape)} {dtype}, got {came}; build the pruner on the same model"
        )
