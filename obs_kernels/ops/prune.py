# SPDX-License-Identifier: Apache-2.0
"""The pruning step in one pass over F: damping, exact choice, joint update, mask and saliency; F^-1 is never formed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from obs_kernels import checks
from obs_kernels.ops.dispatch import kernel, resolve
from obs_kernels.ops.fisher import damp_tensor
from obs_kernels.patterns import Pattern, VNMPattern
from obs_kernels.reference.blocks import compute_dtype


@dataclass(frozen=True)
class Pruned:
    """What a pruning step chose and made of the weight."""

    mask: Tensor
    """[R, C] bool, True = kept."""
    weight: Tensor
    """[R, C] of the given dtype: pruned and dead entries at +0, kept ones at the minimum of 1/2 dw^T F dw."""
    saliency: Tensor
    """[R, C/m], panels [R/v, C/m]: loss increase, 1/2 dw^T F dw, before the weight is rounded to its dtype; f32 (f64
    for f64 input)."""
    columns: Tensor | None
    """[R/v, C/m, num_columns] uint8, ascending: the kept columns of each panel; None without panels."""
    info: Tensor
    """[B] int32: 0, the failing pivot (1-based) of a block that is not positive definite, or negative for NaN or Inf in
    weight or Fisher and for a damping that is not finite and at least 0."""


@torch.no_grad()
def prune_nm(
    weight: Tensor,
    fisher: Tensor,
    pattern: str | Pattern,
    *,
    damp: float | Tensor = 0.0,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Pruned:
    """Keep n of m neighbours in every group of a weight and move them to make up for the rest, in one pass over F.

    Equivalent to::

        chosen = search_nm(weight, fisher, pattern, damp=damp, mask=mask)
        new = obs_update(weight.masked_fill(~mask, 0), fisher, chosen.mask, damp=damp)

    but nothing is raised for a bad block and nothing waits for the device: such a group keeps nothing, its weight
    stays, its saliency is NaN, and ``info`` says why. Scaling fisher and damp alike changes neither mask nor weights.

    Args:
        weight: [R, C] float.
        fisher: [B, m, m] float32 or float64, B = R * C / m: each group is its own Fisher block (D = m).
        pattern: ``"n:m"``, keep n of m.
        damp: added to the diagonal of each block; a number or [B].
        mask: [R, C] bool, entries still alive. Dead entries leave the matrix before damping, whatever their weight, and
            are never kept; a group with fewer than n live entries keeps them all.
        backend: None, or a name of ``dispatch.BACKENDS``.

    Returns:
        ``Pruned``; ties go to the lower index.

    Raises:
        ShapeNotSupportedError, DTypeNotSupportedError, DeviceMismatchError, ConfigError: arguments that do not fit.

    Source: complement identity of the OBS saliency (oBERT eq. 7 and 8); for D = m it gives the update with the choice.
    """
    parsed = checks.check_prune(weight, fisher, pattern, damp, mask, None)
    chosen, new, saliency, info = torch.ops.obs_kernels.prune_nm(
        weight,
        fisher,
        str(parsed),
        damp_tensor(damp, weight, fisher),
        mask,
        backend=resolve("prune_nm", backend, weight, fisher, parsed),
    )
    return Pruned(chosen, new, saliency, None, info)


@torch.no_grad()
def prune_vnm(
    weight: Tensor,
    fisher: Tensor,
    pattern: str | Pattern,
    *,
    damp: float | Tensor = 0.0,
    mask: Tensor | None = None,
    num_columns: int = 4,
    backend: str | None = None,
) -> Pruned:
    """Choose jointly as ``search_vnm`` and update the kept weights, without forming F^-1; all else as in ``prune_nm``.

    Args:
        weight: [R, C], R % v == 0, C % m == 0.
        fisher, damp, mask, backend: as in ``prune_nm``.
        pattern: ``"v:n:m"``.
        num_columns: columns a panel keeps, n to m.

    Returns:
        ``Pruned`` with ``columns``; saliency [R/v, C/m] is summed over the rows of the panel. If a row of a panel is
        bad, that sum is NaN, and which columns the other rows share is not specified.
    """
    parsed = checks.check_prune(weight, fisher, pattern, damp, mask, num_columns)
    chosen, new, saliency, columns, info = torch.ops.obs_kernels.prune_vnm(
        weight,
        fisher,
        str(parsed),
        damp_tensor(damp, weight, fisher),
        mask,
        num_columns,
        backend=resolve("prune_vnm", backend, weight, fisher, parsed),
    )
    return Pruned(chosen, new, saliency, columns, info)


@torch.library.custom_op("obs_kernels::prune_nm", mutates_args=())
def _prune_nm(
    weight: Tensor, fisher: Tensor, pattern: str, damp: Tensor, mask: Tensor | None, *, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return kernel("prune_nm", backend)(weight, fisher, pattern, damp=damp, mask=mask)


@_prune_nm.register_fake
def _(
    weight: Tensor, fisher: Tensor, pattern: str, damp: Tensor, mask: Tensor | None, *, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parsed = checks.check_prune(weight, fisher, pattern, damp, mask, None)
    rows, cols = weight.shape
    return (
        weight.new_empty(rows, cols, dtype=torch.bool),
        weight.new_empty(rows, cols),
        weight.new_empty(rows, cols // parsed.m, dtype=compute_dtype(weight, fisher)),
        weight.new_empty(fisher.shape[0], dtype=torch.int32),
    )


@torch.library.custom_op("obs_kernels::prune_vnm", mutates_args=())
def _prune_vnm(
    weight: Tensor,
    fisher: Tensor,
    pattern: str,
    damp: Tensor,
    mask: Tensor | None,
    num_columns: int,
    *,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return kernel("prune_vnm", backend)(weight, fisher, pattern, damp=damp, mask=mask, num_columns=num_columns)


@_prune_vnm.register_fake
def _(
    weight: Tensor,
    fisher: Tensor,
    pattern: str,
    damp: Tensor,
    mask: Tensor | None,
    num_columns: int,
    *,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    parsed = checks.check_prune(weight, fisher, pattern, damp, mask, num_columns)
    assert isinstance(parsed, VNMPattern)
    rows, cols = weight.shape
    panels, wide = rows // parsed.v, cols // parsed.m
    return (
        weight.new_empty(rows, cols, dtype=torch.bool),
        weight.new_empty(rows, cols),
        weight.new_empty(panels, wide, dtype=compute_dtype(weight, fisher)),
        weight.new_empty(panels, wide, num_columns, dtype=torch.uint8),
        weight.new_empty(fisher.shape[0], dtype=torch.int32),
    )
