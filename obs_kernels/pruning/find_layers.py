# SPDX-License-Identifier: Apache-2.0
"""Which weights of a model a configuration selects, and which it leaves out and why."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from obs_kernels.errors import ConfigError, DTypeNotSupportedError, NonFiniteError, ShapeNotSupportedError
from obs_kernels.patterns import Pattern
from obs_kernels.pruning.config import OBSConfig
from obs_kernels.pruning.layer import PrunedLayer, SkippedLayer
from obs_kernels.pruning.row_layer import RowLayer
from obs_kernels.sparse.linear import is_conv1d


def find_layers(model: nn.Module, cfg: OBSConfig) -> tuple[list[PrunedLayer], list[SkippedLayer]]:
    """Layers of ``model`` that ``cfg`` selects, in the order of their names in the model, and those left out with the
    reason.

    A shared module is counted once. A weight that an embedding or another module also holds is left out.

    Raises:
        ConfigError: a target matches nothing, or all is ignored. ShapeNotSupportedError, NonFiniteError: as named.
    """
    pattern: Pattern = cfg.parsed_pattern
    modules = dict(model.named_modules())
    owners = _weight_owners(modules)
    layers: list[PrunedLayer] = []
    skipped: list[SkippedLayer] = []
    matched: set[str] = set()
    for name, module in modules.items():
        hits = {t for t in cfg.targets if _matches(t, name, module)}
        matched |= hits
        weight = getattr(module, "weight", None)
        if not hits or not isinstance(weight, nn.Parameter) or weight.dim() != 2:
            continue
        shape = tuple(weight.shape[::-1] if is_conv1d(module) else weight.shape)
        shared = [other for other in owners[_place_of(weight)] if other != name] if weight.numel() else []
        if any(_matches(t, name, module) for t in cfg.ignore):
            skipped.append(SkippedLayer(name, shape, "ignored"))
        elif isinstance(module, nn.Embedding) or shared:
            skipped.append(SkippedLayer(name, shape, f"tied with {shared[0]}" if shared else "embedding"))
        elif not weight.numel():
            skipped.append(SkippedLayer(name, shape, "empty"))
        else:
            layer = _make_layer(name, module, weight, pattern, cfg)
            layers.append(layer) if isinstance(layer, PrunedLayer) else skipped.append(layer)
    missing = [t for t in cfg.targets if t not in matched]
    if missing:
        kinds = sorted(
            {type(m).__name__ for m in modules.values() if isinstance(getattr(m, "weight", None), nn.Parameter)}
        )
        raise ConfigError(
            f"targets {missing} match nothing in {type(model).__name__}; modules with weights: {', '.join(kinds)}"
        )
    if not layers:
        reasons = "; ".join(f"{s.name}: {s.reason}" for s in skipped[:3])
        raise ConfigError(f"no layer is left to prune in {type(model).__name__} ({reasons}); change targets or ignore")
    _set_shares(layers, cfg)
    return layers, skipped


def _set_shares(layers: list[PrunedLayer], cfg: OBSConfig) -> None:
    """Give the layers of ``cfg.layer_sparsity`` their own; each entry must match, and no layer two of them."""
    shares, taken = dict(cfg.layer_sparsity), dict[str, str]()
    for rule, sparsity in shares.items():
        hits = [layer for layer in layers if _matches(rule, layer.name, layer.module)]
        if not hits:
            raise ConfigError(
                f"layer_sparsity[{rule!r}] matches no layer that is pruned; names are such as {layers[0].name!r}"
            )
        for layer in hits:
            if layer.name in taken:
                raise ConfigError(
                    f"layer_sparsity must say one sparsity for {layer.name!r}, got {taken[layer.name]!r} and {rule!r}; "
                    f"make one of them narrower"
                )
            taken[layer.name] = rule
            layer.share = sparsity / cfg.parsed_pattern.sparsity


def _make_layer(
    name: str, module: nn.Module, weight: nn.Parameter, pattern: Pattern, cfg: OBSConfig
) -> PrunedLayer | SkippedLayer:
    transposed = is_conv1d(module)
    values = weight.detach().mT if transposed else weight.detach()
    shape = (int(values.shape[0]), int(values.shape[1]))
    if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise DTypeNotSupportedError(f"{name}.weight must be a float tensor, got {weight.dtype}; ignore this layer")
    padded = shape
    whole_rows = cfg.curvature != "block"
    try:
        pattern.check_shape(shape, name=f"{name}.weight")
        size = shape[1] if whole_rows else _block_size(shape, pattern, cfg, name)
    except ShapeNotSupportedError as error:
        if cfg.on_unsupported == "raise":
            raise
        if cfg.on_unsupported == "skip":
            return SkippedLayer(name, shape, str(error))
        size = cfg.block_size
        rows, cols = pattern.padded_shape(shape)
        padded = (rows, -(-cols // size) * size if pattern.fixed_count and not whole_rows else cols)
    if not weight.is_meta and not bool(torch.isfinite(values).all()):
        raise NonFiniteError(
            f"{name}.weight must be finite, got {int((~torch.isfinite(values)).sum())} NaN or Inf; repair the model"
        )
    alive = (values != 0).contiguous()
    if whole_rows:
        row = cfg.curvature == "row"
        return RowLayer(
            name,
            module,
            padded,
            padded[1],
            alive,
            alive.clone(),
            transposed,
            weighted=row,
            has_target=row and cfg.sequential,
            num_clusters=min(cfg.row_clusters, padded[0] // pattern.multiples()[0]),
        )
    return PrunedLayer(name, module, padded, size, alive, alive.clone(), transposed)


def _block_size(shape: tuple[int, int], pattern: Pattern, cfg: OBSConfig, name: str) -> int:
    size = cfg.block_size
    if pattern.fixed_count and shape[1] % size:
        raise ShapeNotSupportedError(
            f"{name}.weight is [{shape[0]}, {shape[1]}]; fisher_block_size = {size} must divide cols for "
            f"pattern {pattern}. "
            f"Fix: fisher_block_size = {cfg.parsed_pattern.multiples()[1]}, or on_unsupported='pad' or 'skip'"
        )
    return size


def _place_of(weight: Tensor) -> tuple[int, int]:
    """Where the values of a weight are; of one without values, on the meta device, which tensor it is."""
    return id(weight) if weight.is_meta else weight.data_ptr(), weight.numel()


def _weight_owners(modules: dict[str, nn.Module]) -> dict[tuple[int, int], list[str]]:
    owners: dict[tuple[int, int], list[str]] = {}
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(_place_of(parameter), []).append(name)
    return owners


def _matches(rule: str, name: str, module: nn.Module) -> bool:
    """A rule is a class name, a module name (also below a data-parallel ``module.``), or ``re:`` and a regular
    expression.
    """
    bare = name.removeprefix("module.")
    if rule.startswith("re:"):
        try:
            return re.fullmatch(rule[3:], name) is not None or re.fullmatch(rule[3:], bare) is not None
        except re.error as error:
            raise ConfigError(f"{rule!r} is no regular expression: {error}") from None
    return rule in (type(module).__name__, name, bare, f"{bare}.weight")
