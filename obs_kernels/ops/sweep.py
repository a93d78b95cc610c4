# SPDX-License-Identifier: Apache-2.0
"""Row curvature: choice and compensation of whole rows with one Hessian for all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from obs_kernels import checks, row_checks
from obs_kernels.ops import dispatch
from obs_kernels.ops.fisher import damp_tensor
from obs_kernels.ops.search import Selection
from obs_kernels.patterns import NMPattern, Pattern, VNMPattern
from obs_kernels.reference import resolve as reference_resolve
from obs_kernels.reference.blocks import compute_dtype
from obs_kernels.reference.sweep import BLOCK


@torch.no_grad()
def sweep_rows(
    weight: Tensor,
    hessian: Tensor,
    pattern: str | Pattern,
    *,
    row_scale: Tensor | None = None,
    damp: float | Tensor = 0.0,
    method: str = "combinatorial",
    mask: Tensor | None = None,
    num_columns: int = 4,
    resolve: bool = True,
    backend: str | None = None,
) -> Selection:
    """Choose what every row keeps, group by group from left to right, and move the rest of the row to make up for it.

    A group is chosen exactly on the weights compensated so far, with all later columns free:
    ``loss_r(K) = row_scale_r / 2 (w^T S w - u_K^T S_KK^-1 u_K)``, ``u = S w``, S = ``R_gg R_gg^T`` of ``H = R R^T`` (R
    upper). Its kept weights become ``S_KK^-1 u_K`` and the later columns of the row take the error. A panel takes the
    columns with the least sum over its rows. At the end each row may be solved anew over all that it keeps.

    Args:
        weight: [R, C] float; finite.
        hessian: H [C, C] float32 or float64, symmetric, for all rows (``accumulate_hessian_``).
        pattern: ``"n:m"`` or ``"v:n:m"`` of at most 20,000 kept sets; for ``method="sparsegpt"`` ``"n:m"`` or
            ``"unstructured:s"``.
        row_scale: [R] float, not negative: multiplies the loss of a row as given, and so decides between the rows of a
            panel. None for ones.
        damp: added to the diagonal of H before anything else; a number or a tensor of one value.
        method: "combinatorial" (as above), or "sparsegpt", the published sweep: scores ``w^2 / U_jj^2`` with U
            the upper factor of H^-1 = U^T U, one column at a time; inputs that were always zero (H_jj = 0) get weight
            0. It takes no ``row_scale``.
        mask: [R, C] bool, entries still alive. Dead entries count as weight 0 and are never kept; a group with fewer
            than n live entries keeps them all. H belongs to all rows, so a dead entry stays in it: like one that will
            be pruned, it counts as free until its group is reached.
        num_columns: columns that a panel keeps, n to m; without panels it has no meaning.
        resolve: solve ``w_K = H_KK^-1 (H w)_K`` of each row at the end. Never raises the loss of a row, as computed in
            the arithmetic at hand: a row that does not gain keeps its swept weights. Rows that keep at most 128
            entries are factorised; wider ones take conjugate gradients until the residual is 1e-6 (f64: 1e-12) of
            ``(H w)_K``, or at most 300 products by H.
        backend: None, or a name of ``dispatch.BACKENDS``.

    Returns:
        ``Selection`` with ``weight`` [R, C] of the given dtype, pruned entries at +0, and ``columns`` for panels.
        ``saliency`` [R, C/m] (panels [R/v, C/m], unstructured [R, C/128] rounded up) is the loss of each group in the
        sweep, ``row_scale`` included, before ``resolve`` and before rounding to the dtype: its sum is ``row_scale_r / 2
        dw^T (H + damp I) dw`` of the swept rows. Arithmetic is f32, or f64 if an input is. Ties go to the lower index.

    Raises:
        ShapeNotSupportedError, DTypeNotSupportedError, DeviceMismatchError, ConfigError: arguments that do not fit.
        NonFiniteError: NaN or Inf in weight, hessian or row_scale. SingularBlockError: H + damp I is not positive
        definite; names the pivot.

    Source: sweep over columns of Frantar and Alistarh 2023 (SparseGPT, algorithm 1), with the set choice of oBERT
    (Kurtic et al. 2022, eq. 7) inside a group; the shared H with a scale a row is this package's.
    """
    parsed = row_checks.check_sweep(weight, hessian, pattern, row_scale, damp, method, mask, num_columns)
    if isinstance(damp, Tensor):
        checks.check_same_device(damp=damp, hessian=hessian)
    chosen, new, saliency, columns = torch.ops.obs_kernels.sweep_rows(
        weight,
        hessian,
        str(parsed),
        row_scale,
        damp_tensor(damp, weight, row_scale, hessian),
        method,
        mask,
        num_columns,
        resolve,
        backend=dispatch.resolve("sweep_rows", backend, weight, hessian, row_scale, parsed, method),
    )
    return Selection(chosen, saliency, columns if isinstance(parsed, VNMPattern) else None, new)


def resolve_rows(weight: Tensor, swept: Tensor, hessian: Tensor, mask: Tensor) -> Tensor:
    """``reference.resolve.resolve_rows`` with the conjugate gradients of the backend that has them; no public op."""
    gradients = dispatch.inner_step("conjugate_gradients", hessian.device.type, hessian.dtype)
    return reference_resolve.resolve_rows(weight, swept, hessian, mask, gradients)


@torch.library.custom_op("obs_kernels::sweep_rows", mutates_args=())
def _sweep_rows(
    weight: Tensor,
    hessian: Tensor,
    pattern: str,
    row_scale: Tensor | None,
    damp: Tensor,
    method: str,
    mask: Tensor | None,
    num_columns: int,
    resolve: bool,
    *,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return dispatch.kernel("sweep_rows", backend)(
        weight,
        hessian,
        pattern,
        row_scale=row_scale,
        damp=damp,
        method=method,
        mask=mask,
        num_columns=num_columns,
        resolve=resolve,
    )


@_sweep_rows.register_fake
def _(
    weight: Tensor,
    hessian: Tensor,
    pattern: str,
    row_scale: Tensor | None,
    damp: Tensor,
    method: str,
    mask: Tensor | None,
    num_columns: int,
    resolve: bool,
    *,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parsed = row_checks.check_sweep(weight, hessian, pattern, row_scale, damp, method, mask, num_columns)
    rows, cols = weight.shape
    panels = parsed if isinstance(parsed, VNMPattern) else None
    units, wide = (
        rows // panels.v if panels else rows,
        -(-cols // (parsed.m if isinstance(parsed, NMPattern) else BLOCK)),
    )
    return (
        weight.new_empty(rows, cols, dtype=torch.bool),
        weight.new_empty(rows, cols),
        weight.new_empty(units, wide, dtype=compute_dtype(weight, hessian, row_scale)),
        weight.new_empty((units, wide, num_columns) if panels else (0,), dtype=torch.uint8),
    )
