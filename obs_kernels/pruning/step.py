# SPDX-License-Identifier: Apache-2.0
"""One pruning step: choose what to keep, update the rest, and only then write anything into the model."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from obs_kernels import ops
from obs_kernels.errors import NonFiniteError, SingularBlockError
from obs_kernels.ops.dispatch import no_autocast
from obs_kernels.ops.fisher import damp_tensor
from obs_kernels.patterns import BlockPattern, NMPattern, Pattern, VNMPattern
from obs_kernels.pruning.config import OBSConfig
from obs_kernels.pruning.fused_step import DAMP_GROWTH, MAX_RAISES, LayerStep, is_fused, prune_fused
from obs_kernels.pruning.layer import PrunedLayer
from obs_kernels.pruning.row_layer import RowLayer
from obs_kernels.pruning.row_step import prune_rows
from obs_kernels.reference.blocks import damp_blocks, weight_blocks
from obs_kernels.reference.fisher import factor_spd
from obs_kernels.reference.passes import improve_choice
from obs_kernels.reference.threshold import prune_count, select_lowest

log = logging.getLogger("obs_kernels")


@dataclass
class StagedLayer:
    """What a step will write into one layer."""

    layer: PrunedLayer
    mask: Tensor
    weight: Tensor
    saliency: float
    damp: float
    blocks_raised: int
    outcome: str
    num_grads: int
    seconds: float
    bias: Tensor | None = None
    """[R], where the step moves it."""

    @torch.no_grad()
    def write(self) -> None:
        """Put weight and bias into the model; the mask of the layer is the caller's."""
        torch.clear_autocast_cache()  # of the weights that go, rounded
        self.layer.matrix.copy_(self.weight)
        if self.bias is not None and self.layer.bias is not None:
            self.layer.bias.copy_(self.bias)


@dataclass(frozen=True)
class _Damping:
    value: float | Tensor
    base: float
    blocks_raised: int


def stage_step(
    layers: Sequence[PrunedLayer],
    pattern: Pattern,
    cfg: OBSConfig,
    *,
    only: Collection[PrunedLayer] | None = None,
    scores_of: Callable[[PrunedLayer, int, OBSConfig], Tensor] | None = None,
) -> list[StagedLayer]:
    """Masks and new weights of every layer for ``pattern``; the model is not touched.

    Args:
        layers: all that a global threshold runs over.
        only: those of them that are wanted; None takes all.
        scores_of: what gives the saliency of a layer's units where it does not lie here; see ``unit_saliency``.

    Raises:
        SingularBlockError: names the layer; under ``on_singular="raise"``, or if raising the damping did not help.
    """
    wanted = layers if only is None else [layer for layer in layers if layer in only]
    if pattern.fixed_count or cfg.curvature != "block":
        return [_staged(layer, pattern, cfg, None) for layer in wanted]
    choices = _threshold_masks(layers, pattern, cfg, scores_of or unit_saliency)
    return [
        _skipped(layer, choice) if isinstance(choice, str) else _staged(layer, pattern, cfg, choice)
        for layer, choice in zip(layers, choices, strict=True)
        if layer in wanted
    ]


def _staged(layer: PrunedLayer, pattern: Pattern, cfg: OBSConfig, keep: Tensor | None) -> StagedLayer:
    start = time.perf_counter()
    try:
        if isinstance(layer, RowLayer):
            layer.require_sum()
            if not layer.is_reached:
                return _skipped(layer, "no loss gradient of any sample reaches it")
            with no_autocast():
                done = prune_rows(layer, pattern, cfg)
        elif is_fused(layer, pattern, cfg):
            done = prune_fused(layer, pattern, cfg)
        else:
            done = _step(layer, pattern, cfg, keep)
    except SingularBlockError as error:
        if cfg.on_singular != "skip":
            raise SingularBlockError(f"{layer.name}: {error}") from None
        return _skipped(layer, str(error))
    if not done.finite:
        raise NonFiniteError(
            f"{layer.name}: the updated weight does not fit {done.weight.dtype}, its largest value would overflow; "
            f"prune in float32, or raise damp"
        )
    outcome = "pruned" if done.blocks_raised == 0 else f"damping raised in {done.blocks_raised} blocks"
    return StagedLayer(
        layer,
        layer.crop(done.mask).clone(),
        layer.crop(done.weight).clone(),
        saliency=done.saliency,
        damp=done.damp,
        blocks_raised=done.blocks_raised,
        outcome=outcome,
        num_grads=layer.num_grads,
        seconds=time.perf_counter() - start,
        bias=done.bias,
    )


def _step(layer: PrunedLayer, pattern: Pattern, cfg: OBSConfig, keep: Tensor | None) -> LayerStep:
    """Choice (none if a threshold made ``keep`` [R, C]), then update, on a copy of the mean Fisher."""
    fisher, damping = _fisher_of(layer, cfg)
    weight = layer.pad(layer.matrix.masked_fill(~layer.mask, 0.0))
    mask = _choose(layer, weight, fisher, damping, pattern, cfg) if keep is None else layer.pad(keep)
    new = ops.obs_update(weight, fisher, mask, damp=damping.value, update=cfg.update)
    loss = float("nan")
    if fisher is not None:
        loss = float(ops.loss_increase(new.float() - weight.float(), fisher, damp=damping.value).double().sum())
    finite = bool(torch.isfinite(new).all())
    return LayerStep(mask, new, loss, damping.base, damping.blocks_raised, finite)


def _skipped(layer: PrunedLayer, reason: str) -> StagedLayer:
    """A layer that stays as it is."""
    weight = layer.matrix
    return StagedLayer(layer, layer.mask, weight, 0.0, 0.0, 0, f"skipped: {reason}", layer.num_grads, 0.0)


def _choose(
    layer: PrunedLayer, weight: Tensor, fisher: Tensor | None, damping: _Damping, pattern: Pattern, cfg: OBSConfig
) -> Tensor:
    """Mask of the padded weight for n:m and v:n:m."""
    assert isinstance(pattern, NMPattern)
    alive = layer.pad(layer.mask)
    columns = pattern.num_columns if isinstance(pattern, VNMPattern) else 0
    if isinstance(pattern, VNMPattern):
        mask = ops.search_vnm(
            weight, fisher, pattern, damp=damping.value, method=cfg.method, mask=alive, num_columns=columns
        ).mask
    else:
        mask = ops.search_nm(weight, fisher, pattern, damp=damping.value, method=cfg.method, mask=alive).mask
    if not cfg.passes or fisher is None or fisher.shape[1] == pattern.m:
        return mask
    damp = damp_tensor(damping.value, weight, fisher)
    with no_autocast():
        return improve_choice(
            weight, fisher, mask, str(pattern), damp=damp, alive=alive, passes=cfg.passes, num_columns=columns
        )[0]


def _threshold_masks(
    layers: Sequence[PrunedLayer],
    pattern: Pattern,
    cfg: OBSConfig,
    scores_of: Callable[[PrunedLayer, int, OBSConfig], Tensor],
) -> list[Tensor | str]:
    """Masks [R, C] by one threshold over all layers (global) or one a layer, counts exact.

    Or why a layer is skipped.
    """
    block = pattern.size if isinstance(pattern, BlockPattern) else 1
    groups = [list(range(len(layers)))] if cfg.global_sparsity else [[i] for i in range(len(layers))]
    masks: dict[int, Tensor | str] = {}
    for group in groups:
        scores: dict[int, Tensor] = {}
        for i in sorted(group, key=lambda i: layers[i].parameter_name):  # the tie rule runs over tensors by name
            try:
                scores[i] = scores_of(layers[i], block, cfg)
            except SingularBlockError as error:
                if cfg.on_singular != "skip":
                    raise SingularBlockError(f"{layers[i].name}: {error}") from None
                masks[i] = str(error)
        if not scores:
            continue
        joined = torch.cat([s.to(layers[group[0]].mask.device) for s in scores.values()])
        share = pattern.sparsity if cfg.global_sparsity else layers[group[0]].pattern_at(pattern).sparsity
        count, dead = prune_count(share, joined.numel()), int((joined == -torch.inf).sum())
        if dead > count:
            log.warning("pattern %s prunes %d units, %d are zero already and stay so", pattern, count, dead)
        pruned = select_lowest(joined, max(count, dead))
        for i, part in zip(scores, pruned.split([s.numel() for s in scores.values()]), strict=True):
            units = (~part.to(layers[i].mask.device)).repeat_interleave(block).view(layers[i].padded)
            masks[i] = layers[i].crop(units) & layers[i].mask
    return [masks[i] for i in range(len(layers))]


def unit_saliency(layer: PrunedLayer, block: int, cfg: OBSConfig) -> Tensor:
    """Saliency of the layer's units; -inf where all of a unit is pruned already, so that masks nest."""
    alive = layer.pad(layer.mask)
    weight = layer.pad(layer.matrix.masked_fill(~layer.mask, 0.0))
    fisher, damping = _fisher_of(layer, cfg)
    scores = ops.block_saliency(weight, fisher, block, damp=damping.value, method=cfg.method, mask=alive)
    return scores.masked_fill(~alive.reshape(-1, block).any(1), -torch.inf)


def _fisher_of(layer: PrunedLayer, cfg: OBSConfig) -> tuple[Tensor | None, _Damping]:
    """Mean Fisher with dead entries out, and its damping (None without gradients where none are needed)."""
    if layer.fisher_sum is None and not cfg.needs_fisher:
        return None, _Damping(0.0, 0.0, 0)
    fisher = layer.mean_fisher()
    base = float(layer.live_damp(cfg))
    if not bool(layer.mask.all()):
        alive = weight_blocks(layer.pad(layer.mask), layer.num_blocks, layer.block_size)
        fisher.masked_fill_(~(alive[:, :, None] & alive[:, None, :]), 0.0)
    if cfg.on_singular != "increase_damp":
        return fisher, _Damping(base, base, 0)
    return fisher, _raise_damping(fisher, base)


def _raise_damping(fisher: Tensor, base: float) -> _Damping:
    """Multiply the damping of blocks that do not factorise, only of those, until they do."""
    damp = torch.full((fisher.shape[0],), base, dtype=fisher.dtype, device=fisher.device)
    failed = _singular_blocks(fisher, damp)
    raised = failed.numel()
    for _ in range(MAX_RAISES):
        if not failed.numel():
            break
        damp[failed] *= DAMP_GROWTH
        failed = failed[_singular_blocks(fisher[failed], damp[failed])]
    return _Damping(damp if raised else base, base, raised)


def _singular_blocks(fisher: Tensor, damp: Tensor) -> Tensor:
    alive = torch.ones(fisher.shape[:2], dtype=torch.bool, device=fisher.device)
    return (factor_spd(damp_blocks(fisher, alive, damp, fisher.dtype))[1] != 0).nonzero().flatten()
