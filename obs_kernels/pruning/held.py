# SPDX-License-Identifier: Apache-2.0
"""A model that comes pruned: whether its zeros are at a pattern, so that they can be held while it is trained."""

from __future__ import annotations

from collections.abc import Sequence

from obs_kernels.errors import ConfigError
from obs_kernels.patterns import NMPattern, Pattern, UnstructuredPattern
from obs_kernels.pruning.layer import PrunedLayer
from obs_kernels.pruning.step import StagedLayer

SHORT = 1e-3
"""Share of weights that such a model may lack, beside one weight or block a layer: counts were rounded."""


def require_at(pattern: Pattern, layers: Sequence[PrunedLayer]) -> None:
    """Raise ``ConfigError`` unless the masks of ``layers`` are at ``pattern``.

    n:m and v:n:m: no group or panel keeps too many. Thresholds: the share of pruned weights, or whole blocks, over all
    layers together; a block counts as pruned only if all of it is.
    """
    masks = [layer.pad(layer.mask) for layer in layers]
    if isinstance(pattern, NMPattern):
        bad = [
            f"{layer.name} ({count})"
            for layer, mask in zip(layers, masks, strict=True)
            if (count := pattern.count_violations(mask))
        ]
        if bad:
            raise ConfigError(
                f"the model must come at pattern {pattern} to be held, got groups or panels that keep too many in "
                f"{len(bad)} layers: {', '.join(bad[:3])}; load the pruned model, or prune it"
            )
        return
    block = pattern.block if isinstance(pattern, UnstructuredPattern) else 1
    pruned = sum(int((~mask.reshape(-1, block).any(1)).sum()) for mask in masks)
    units = sum(mask.numel() for mask in masks) // block
    shares = zip(layers, masks, strict=True)
    wanted = sum(layer.pattern_at(pattern).sparsity * mask.numel() for layer, mask in shares) / (units * block)
    if pruned + len(layers) < (wanted - SHORT) * units:
        raise ConfigError(
            f"the model must come with {wanted:.4g} of its weights pruned to be held at pattern {pattern}, "
            f"got {pruned / units:.4f} over {len(layers)} layers; load the pruned model, or lower the sparsity"
        )


def held_layer(layer: PrunedLayer) -> StagedLayer:
    """``layer`` as it is, for ``OBSPruner.commit``."""
    return StagedLayer(layer, layer.mask, layer.matrix, 0.0, 0.0, 0, "held", 0, 0.0)
