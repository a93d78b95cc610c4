# SPDX-License-Identifier: Apache-2.0
"""OBS update of the kept weights, and the saliencies that thresholds need."""

from __future__ import annotations

import torch
from torch import Tensor

from obs_kernels import checks
from obs_kernels.errors import ShapeNotSupportedError
from obs_kernels.ops.dispatch import kernel, resolve
from obs_kernels.ops.fisher import damp_tensor
from obs_kernels.reference.blocks import compute_dtype


@torch.no_grad()
def obs_update(
    weight: Tensor,
    fisher: Tensor | None,
    mask: Tensor,
    *,
    damp: float | Tensor = 0.0,
    update: str = "joint",
    backend: str | None = None,
) -> Tensor:
    """New weight with the pruned entries at +0 and the kept ones moved to make up for them.

    Args:
        weight: any shape, float, finite; flattened row-major into blocks of D, the last one may be short.
        fisher: [B, D, D] float32 or float64, B = ceil(numel / D); None only for ``update="none"``.
        mask: bool of the weight's shape, True = kept.
        damp: added to the diagonal of each block; a number or [B].
        update: "joint" (``w_K + F_KK^-1 F_KP w_P``, the minimum of ``1/2 dw^T F dw`` over the whole block), "single"
            (sum of the updates of single weights, as sparseml does) or "none".
        backend: None, or a name of ``dispatch.BACKENDS``.

    Returns:
        A tensor of the weight's shape and dtype; arithmetic in f32 (f64 for f64 input).

    Source: Hassibi and Stork 1993; oBERT eq. 8 for a set of weights.
    """
    checks.check_obs_update(weight, fisher, mask, damp, update)
    return torch.ops.obs_kernels.obs_update(
        weight,
        fisher,
        mask,
        damp_tensor(damp, weight, fisher),
        update,
        backend=resolve("obs_update", backend, weight, fisher),
    )


@torch.no_grad()
def loss_increase(change: Tensor, fisher: Tensor, *, damp: float | Tensor = 0.0, backend: str | None = None) -> Tensor:
    """``1/2 dw^T (F + damp I) dw`` of every Fisher block, [B], for a ``change`` dw of the weight's shape.

    Args:
        change: new weight minus old, any shape. fisher: [B, D, D], B = ceil(numel / D). damp: a number or [B].
        backend: None, or a name of ``dispatch.BACKENDS``.
    """
    _check_loss_increase(change, fisher, damp)
    _check_one_value(damp)
    return torch.ops.obs_kernels.loss_increase(
        change, fisher, damp_tensor(damp, change, fisher), backend=resolve("loss_increase", backend, change, fisher)
    )


@torch.no_grad()
def block_saliency(
    weight: Tensor,
    fisher: Tensor | None,
    block: int,
    *,
    damp: float | Tensor = 0.0,
    method: str = "combinatorial",
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Saliency of every run of ``block`` weights: 1 for unstructured pruning, N for blockN.

    Args:
        weight: any shape; numel % block == 0.
        fisher: [B, D, D] with D % block == 0; None only for ``method="magnitude"``.
        block: weights that fall together.
        method: "combinatorial" (``1/2 w_Q^T [(F^-1)_QQ]^-1 w_Q``), "diagonal" (sum of ``1/2 (F_ii + damp) w_i^2``) or
            "magnitude" (absolute value; sum of squares for blocks).
        damp, mask, backend: as in ``search_nm``.

    Returns:
        [numel / block] f32 (f64 for f64 input), in the order of the flattened weight.
    """
    _check_block_saliency(weight, fisher, block, damp, method, mask)
    return torch.ops.obs_kernels.block_saliency(
        weight,
        fisher,
        block,
        damp_tensor(damp, weight, fisher),
        method,
        mask,
        backend=resolve("block_saliency", backend, weight, fisher, method),
    )


def _check_one_value(damp: float | Tensor) -> None:
    """In the op one value on a GPU counts as checked, so that a number need not be read back."""
    if isinstance(damp, Tensor) and damp.is_cuda and damp.numel() == 1:
        checks.check_damp_values(damp)


def _check_loss_increase(change: Tensor, fisher: Tensor, damp: float | Tensor) -> None:
    checks.check_dtype("change", change, checks.FLOAT_DTYPES)
    checks.check_blocks_of_weight(change, fisher)
    checks.check_damp(damp, fisher.shape[0])
    checks.check_same_device(change=change, fisher=fisher)


def _check_block_saliency(
    weight: Tensor, fisher: Tensor | None, block: int, damp: float | Tensor, method: str, mask: Tensor | None
) -> None:
    checks.check_dtype("weight", weight, checks.FLOAT_DTYPES)
    checks.check_choice("method", method, ("combinatorial", "diagonal", "magnitude"))
    checks.check_mask(mask, weight)
    if fisher is not None:
        checks.check_blocks_of_weight(weight, fisher)
        checks.check_damp(damp, fisher.shape[0])
    elif method != "magnitude":
        raise checks.ConfigError(
            f"fisher may be None only for method='magnitude', got method={method!r}; pass [B, D, D]"
        )
    size = block if fisher is None else fisher.shape[1]
    if block < 1 or weight.numel() % block or size % block:
        raise ShapeNotSupportedError(
            f"block must divide the weight's {weight.numel()} entries and the Fisher block D = {size}, got {block}"
        )
    checks.check_same_device(weight=weight, fisher=fisher, mask=mask)


@torch.library.custom_op("obs_kernels::obs_update", mutates_args=())
def _obs_update(
    weight: Tensor, fisher: Tensor | None, mask: Tensor, damp: Tensor, update: str, *, backend: str
) -> Tensor:
    return kernel("obs_update", backend)(weight, fisher, mask, damp=damp, update=update)


@_obs_update.register_fake
def _(weight: Tensor, fisher: Tensor | None, mask: Tensor, damp: Tensor, update: str, *, backend: str) -> Tensor:
    checks.check_obs_update(weight, fisher, mask, damp, update)
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


@torch.library.custom_op("obs_kernels::loss_increase", mutates_args=())
def _loss_increase(change: Tensor, fisher: Tensor, damp: Tensor, *, backend: str) -> Tensor:
    return kernel("loss_increase", backend)(change, fisher, damp=damp)


@_loss_increase.register_fake
def _(change: Tensor, fisher: Tensor, damp: Tensor, *, backend: str) -> Tensor:
    _check_loss_increase(change, fisher, damp)
    return fisher.new_empty(fisher.shape[0], dtype=compute_dtype(change, fisher))


@torch.library.custom_op("obs_kernels::block_saliency", mutates_args=())
def _block_saliency(
    weight: Tensor, fisher: Tensor | None, block: int, damp: Tensor, method: str, mask: Tensor | None, *, backend: str
) -> Tensor:
    return kernel("block_saliency", backend)(weight, fisher, block, damp=damp, method=method, mask=mask)


@_block_saliency.register_fake
def _(
    weight: Tensor, fisher: Tensor | None, block: int, damp: Tensor, method: str, mask: Tensor | None, *, backend: str
) -> Tensor:
    _check_block_saliency(weight, fisher, block, damp, method, mask)
    return weight.new_empty(weight.numel() // block, dtype=compute_dtype(weight, fisher))
