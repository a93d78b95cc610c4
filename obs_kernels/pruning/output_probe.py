# SPDX-License-Identifier: Apache-2.0
"""Curvature of what a model puts out, instead of that of its loss on labels.

The gradient of a loss on labels is large where the model is wrong and vanishes where it is sure, so a few samples
decide what an empirical Fisher sees. What pruning must keep is the model's own distribution: its curvature is the
Gauss-Newton matrix ``J^T (diag(p) - p p^T) J``, J the Jacobian of the logits. A random vector with the covariance in
the middle, sent back through the model, gives gradients with that second moment: no labels, and one backward pass as
with a loss. A temperature above 1 flattens p: pruning moves outputs farther than the curvature at 1 describes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from obs_kernels.errors import ConfigError

TEMPERATURE = 4.0
"""F1 of a SQuAD model at 2:8 and 64:2:8 rises up to here, and stays as it is up to 16."""


def output_probe(logits: Tensor, *, temperature: float = TEMPERATURE, padding: Tensor | None = None) -> Tensor:
    """Stand-in losses, one a sample, whose gradients have the Gauss-Newton matrix of the outputs as second moment.

    To be returned by a ``loss_fn`` for ``curvature="row"`` (or added up over several outputs, as start and end are):
    ``lambda model, batch: output_probe(model(**batch).logits, padding=...)``. The value of these losses means nothing.

    Args:
        logits: [N, ..., K] float with a gradient; a distribution over the last dimension, N samples.
        temperature: T of ``p = softmax(logits / T)``; greater than 0.
        padding: [N, ..., K] bool, or what expands to it: True where a class or a position counts nowhere.

    Returns:
        [N] of the logits' dtype, f32 for half precision. The random vector comes from torch's global generator, which
        ``OBSPruner`` seeds with ``OBSConfig.seed`` during a collection.

    Raises:
        ConfigError: no sample or no class, a temperature that is not a positive number.

    Source: the Gauss-Newton (Fisher) matrix of a softmax, Martens 2020 (arXiv:1412.1193), section 8, with a Gaussian
    instead of a sampled label: the same matrix, and no label decides alone.
    """
    if logits.dim() < 2 or not logits.numel() or not logits.is_floating_point():
        raise ConfigError(
            f"logits must be [N, ..., K] of floats with at least one sample and class, got {list(logits.shape)} "
            f"{logits.dtype}; pass model(...).logits"
        )
    if not math.isfinite(temperature) or temperature <= 0:
        raise ConfigError(f"temperature must be greater than 0, got {temperature}; 4 is usual")
    if padding is not None and (padding.dtype != torch.bool or not _expands(padding.shape, logits.shape)):
        raise ConfigError(
            f"padding must be bool and expand to the logits {list(logits.shape)}, got {list(padding.shape)} "
            f"{padding.dtype}; for positions [N, T] of [N, T, K] pass padding[..., None]"
        )
    values = logits.to(torch.promote_types(logits.dtype, torch.float32))
    with torch.no_grad():
        scaled = values / temperature
        if padding is None:
            p = scaled.softmax(-1)
        else:
            empty = padding.expand_as(scaled).all(-1, keepdim=True)  # nothing but padding: no distribution
            p = scaled.masked_fill(padding, -torch.inf).softmax(-1).masked_fill(empty, 0.0)
        drawn = p.sqrt() * torch.randn_like(p)
        direction = drawn - p * drawn.sum(-1, keepdim=True)
    return (direction * values.masked_fill(p == 0, 0.0)).flatten(1).sum(1)


def _expands(shape: torch.Size, to: torch.Size) -> bool:
    try:
        return torch.broadcast_shapes(shape, to) == to
    except RuntimeError:
        return False
