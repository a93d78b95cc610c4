# SPDX-License-Identifier: Apache-2.0
"""The step of a layer whose groups are their own Fisher blocks (D = m): one op on the Fisher sum itself, no copy of it.

Choice and new weights stay the same if F and the damping are scaled alike, so the sum over S gradients takes S times
the damping, and its saliency over S is that of the mean. The host waits once a layer, for a handful of numbers; only a
layer with bad blocks costs more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from obs_kernels import ops
from obs_kernels.checks import check_step_info
from obs_kernels.patterns import NMPattern, Pattern, VNMPattern
from obs_kernels.pruning.config import OBSConfig
from obs_kernels.pruning.layer import PrunedLayer
from obs_kernels.reference.blocks import compute_dtype
from obs_kernels.reference.fisher import chunks

DAMP_GROWTH = 10.0
MAX_RAISES = 12
"""Times that the damping of a block is multiplied by ``DAMP_GROWTH`` before the layer is given up."""


@dataclass(frozen=True)
class LayerStep:
    """Mask and new weight of a layer, padded, and what the report says of them."""

    mask: Tensor
    weight: Tensor
    saliency: float
    damp: float
    blocks_raised: int
    finite: bool
    """Whether all of ``weight`` is."""
    bias: Tensor | None = None
    """[R] of the layer, where the step moves it."""


def is_fused(layer: PrunedLayer, pattern: Pattern, cfg: OBSConfig) -> bool:
    """Whether ``prune_fused`` does the step of that configuration."""
    exact = cfg.method == "combinatorial" and cfg.update == "joint"
    return exact and isinstance(pattern, NMPattern) and layer.block_size == pattern.m


def prune_fused(layer: PrunedLayer, pattern: Pattern, cfg: OBSConfig) -> LayerStep:
    """Choice and joint update of ``layer``, which stays as it is.

    Raises:
        SingularBlockError: blocks that are not positive definite, also after raised damping if ``cfg`` asks for it.
        NonFiniteError: NaN or Inf in weight or Fisher. ConfigError: no gradients.
    """
    assert isinstance(pattern, NMPattern)
    weight = layer.pad(layer.matrix.masked_fill(~layer.mask, 0.0)).contiguous()
    fisher, alive = layer.require_sum(), layer.pad(layer.mask)
    base = layer.live_damp(cfg)
    damp = (base * layer.num_grads).to(compute_dtype(weight, fisher))
    done = _prune(weight, fisher, pattern, damp, alive)
    numbers = _read(done, weight, fisher, damp, base)
    blocks_raised = 0
    if numbers.bad and cfg.on_singular == "increase_damp":
        damp, blocks_raised = _raise_damping(done, weight, fisher, pattern, damp, alive)
        numbers = _read(done, weight, fisher, damp, base)
    if numbers.bad:
        check_step_info(done.info, weight, fisher, damp)
    loss = numbers.loss / layer.num_grads
    return LayerStep(done.mask, done.weight, loss, numbers.damp, blocks_raised, numbers.finite)


def _prune(weight: Tensor, fisher: Tensor, pattern: NMPattern, damp: Tensor, alive: Tensor) -> ops.Pruned:
    if isinstance(pattern, VNMPattern):
        return ops.prune_vnm(weight, fisher, pattern, damp=damp, mask=alive, num_columns=pattern.num_columns)
    return ops.prune_nm(weight, fisher, pattern, damp=damp, mask=alive)


@dataclass(frozen=True)
class _Numbers:
    bad: bool
    loss: float
    """Of the Fisher sum."""
    damp: float
    finite: bool


def _read(done: ops.Pruned, weight: Tensor, fisher: Tensor, damp: Tensor, base: Tensor) -> _Numbers:
    """What the host needs to know of a step, in one wait."""
    loss = done.saliency
    if weight.element_size() < fisher.element_size():  # of the weights as they are stored, rounded
        change = done.weight.float() - weight.float()
        squares = change.view(fisher.shape[0], -1).square().sum(1)
        loss = ops.loss_increase(change, fisher) + 0.5 * damp * squares  # as an argument its values would be read
    values = (done.info.count_nonzero(), loss.sum(dtype=torch.float64), base, torch.isfinite(done.weight).all())
    bad, total, used, finite = torch.stack([value.double() for value in values]).tolist()
    return _Numbers(bad > 0, total, used, finite > 0)


def _raise_damping(
    done: ops.Pruned, weight: Tensor, fisher: Tensor, pattern: NMPattern, damp: Tensor, alive: Tensor
) -> tuple[Tensor, int]:
    """Prune groups that are not positive definite again, with more damping for them alone, until they are.

    The new results go into ``done``. Returns the damping of each block and how many were raised.
    """
    v, m = pattern.v if isinstance(pattern, VNMPattern) else 1, pattern.m
    wide = weight.shape[1] // m
    panel_of = torch.arange(done.info.numel(), device=weight.device).view(-1, v, wide).transpose(1, 2).reshape(-1, v)
    damps = damp.repeat(done.info.numel())
    raised = done.info > 0
    failed = raised
    for _ in range(MAX_RAISES):
        damps[failed] *= DAMP_GROWTH
        panels = failed[panel_of].any(1).nonzero().flatten()
        for part in chunks(panels.numel(), v * m * m * fisher.element_size(), fisher.device):
            at = panel_of[panels[part]].flatten()  # the blocks of whole panels, row by row
            again = _prune(weight.view(-1, m)[at], fisher[at], pattern, damps[at], alive.reshape(-1, m)[at])
            done.mask.view(-1, m)[at], done.weight.view(-1, m)[at] = again.mask, again.weight
            done.saliency.view(-1)[panels[part]], done.info[at] = again.saliency.flatten(), again.info
        failed = done.info > 0
        raised = raised | failed
        if not bool(failed.any()):
            break
    return damps, int(raised.sum())
