# SPDX-License-Identifier: Apache-2.0
"""Exact n:m and v:n:m mask search."""

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
class Selection:
    """What a search or a sweep over rows chose."""

    mask: Tensor
    """[R, C] bool, True = kept."""
    saliency: Tensor
    """[R, C/m], panels [R/v, C/m]: loss increase of the choice, 1/2 dw^T F dw; f32 (f64 for f64 input)."""
    columns: Tensor | None = None
    """[R/v, C/m, num_columns] uint8, ascending: the kept columns of each panel; None without panels."""
    weight: Tensor | None = None
    """[R, C] of the given dtype: the compensated weight of a sweep over rows; None from a search, which changes none.
    """


@torch.no_grad()
def search_nm(
    weight: Tensor,
    fisher: Tensor | None,
    pattern: str | Pattern,
    *,
    damp: float | Tensor = 0.0,
    method: str = "combinatorial",
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Selection:
    """Choose which n of m neighbours to keep in every group of a weight.

    The loss of keeping K is ``1/2 (w^T F' w - u_K^T (F'_KK)^-1 u_K)`` with ``F' = [(F^-1)_GG]^-1`` and ``u = F' w``.

    Args:
        weight: [R, C] float; finite.
        fisher: [B, D, D] float32 or float64, D % m == 0 and C % D == 0, B = R * C / D; None only for
            ``method="magnitude"``.
        pattern: ``"n:m"``, keep n of m.
        damp: added to the diagonal of each block; a number or [B].
        method: "combinatorial" (exact optimum), "pairwise" (exact optimum of the model of adjacent pairs), "greedy"
            (one entry at a time, then exchanges while one helps: for counts beyond the exact bound), "diagonal"
            (1/2 (F_ii + damp) w_i^2) or "magnitude".
        mask: [R, C] bool, entries still alive. Dead entries leave the matrix before damping and are never kept; a group
            with fewer than n live entries keeps them all.
        backend: None, or a name of ``dispatch.BACKENDS``.

    Returns:
        ``Selection``; ties go to the lower index. For "diagonal" and "magnitude" the saliency is that of the method's
        own model (nothing is compensated); for "pairwise" it is the true joint loss of the choice.

    Raises:
        ShapeNotSupportedError, DTypeNotSupportedError, ConfigError: arguments that do not fit.
        NonFiniteError: NaN or Inf in weight or fisher. SingularBlockError: a block is not positive definite.

    Source: complement identity of the OBS saliency (oBERT eq. 7); the pair model is VENOM's (Castro et al. 2023).
    """
    parsed = checks.check_search(weight, fisher, pattern, damp, method, mask, None)
    chosen, saliency = torch.ops.obs_kernels.search_nm(
        weight,
        fisher,
        str(parsed),
        damp_tensor(damp, weight, fisher),
        method,
        mask,
        backend=resolve("search_nm", backend, weight, fisher, parsed, method),
    )
    return Selection(chosen, saliency)


@torch.no_grad()
def search_vnm(
    weight: Tensor,
    fisher: Tensor | None,
    pattern: str | Pattern,
    *,
    damp: float | Tensor = 0.0,
    method: str = "combinatorial",
    mask: Tensor | None = None,
    num_columns: int = 4,
    backend: str | None = None,
) -> Selection:
    """Choose jointly, for every panel of v rows, ``num_columns`` of m columns and n of those in each row.

    The column set minimises the sum over rows of the least loss inside it, over all column sets and kept sets.

    Args:
        weight: [R, C], R % v == 0, C % m == 0.
        fisher, damp, method, mask, backend: as in ``search_nm``; a row with fewer than n live entries in the panel's
            columns keeps those it has.
        pattern: ``"v:n:m"``.
        num_columns: columns a panel keeps, n to m; 4 in the stored format, more in the middle stages of a schedule.

    Returns:
        ``Selection`` with ``columns``; saliency [R/v, C/m] is summed over the rows of the panel.
    """
    parsed = checks.check_search(weight, fisher, pattern, damp, method, mask, num_columns)
    chosen, saliency, columns = torch.ops.obs_kernels.search_vnm(
        weight,
        fisher,
        str(parsed),
        damp_tensor(damp, weight, fisher),
        method,
        mask,
        num_columns,
        backend=resolve("search_vnm", backend, weight, fisher, parsed, method),
    )
    return Selection(chosen, saliency, columns)


@torch.library.custom_op("obs_kernels::search_nm", mutates_args=())
def _search_nm(
    weight: Tensor, fisher: Tensor | None, pattern: str, damp: Tensor, method: str, mask: Tensor | None, *, backend: str
) -> tuple[Tensor, Tensor]:
    return kernel("search_nm", backend)(weight, fisher, pattern, damp=damp, method=method, mask=mask)


@_search_nm.register_fake
def _(
    weight: Tensor, fisher: Tensor | None, pattern: str, damp: Tensor, method: str, mask: Tensor | None, *, backend: str
) -> tuple[Tensor, Tensor]:
    parsed = checks.check_search(weight, fisher, pattern, damp, method, mask, None)
    rows, cols = weight.shape
    chosen = weight.new_empty(rows, cols, dtype=torch.bool)
    return chosen, weight.new_empty(rows, cols // parsed.m, dtype=compute_dtype(weight, fisher))


@torch.library.custom_op("obs_kernels::search_vnm", mutates_args=())
def _search_vnm(
    weight: Tensor,
    fisher: Tensor | None,
    pattern: str,
    damp: Tensor,
    method: str,
    mask: Tensor | None,
    num_columns: int,
    *,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return kernel("search_vnm", backend)(
        weight, fisher, pattern, damp=damp, method=method, mask=mask, num_columns=num_columns
    )


@_search_vnm.register_fake
def _(
    weight: Tensor,
    fisher: Tensor | None,
    pattern: str,
    damp: Tensor,
    method: str,
    mask: Tensor | None,
    num_columns: int,
    *,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    parsed = checks.check_search(weight, fisher, pattern, damp, method, mask, num_columns)
    assert isinstance(parsed, VNMPattern)
    rows, cols = weight.shape
    panels, wide = rows // parsed.v, cols // parsed.m
    return (
        weight.new_empty(rows, cols, dtype=torch.bool),
        weight.new_empty(panels, wide, dtype=compute_dtype(weight, fisher)),
        weight.new_empty(panels, wide, num_columns, dtype=torch.uint8),
    )
