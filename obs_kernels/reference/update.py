# SPDX-License-Identifier: Apache-2.0
"""OBS update of the kept weights, loss increase of a change, and saliency of blocks, in plain torch.

Joint: minimise ``1/2 dw^T F dw`` with ``dw_P = -w_P`` over the whole Fisher block, so ``w_K += F_KK^-1 F_KP w_P``. The
sum of single updates of the reference systems (``single``) ignores the cross terms between pruned weights and can be
worse than none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from obs_kernels.checks import check_damp_values, check_finite, check_info
from obs_kernels.reference.blocks import compute_dtype, damp_blocks, factor_or_raise, solve_kept, weight_blocks
from obs_kernels.reference.fisher import chunks


def obs_update(weight: Tensor, fisher: Tensor | None, mask: Tensor, *, damp: Tensor, update: str) -> Tensor:
    """New weight of the same shape and dtype; pruned entries are +0. Arguments as in ``ops.obs_update``."""
    check_finite("weight", weight)
    if update == "none" or fisher is None or weight.numel() == 0:
        return weight.masked_fill(~mask, 0.0)
    check_finite("fisher", fisher)
    check_damp_values(damp)
    return update_kept(weight, fisher, mask, damp=damp, update=update, info=None)


def update_kept(
    weight: Tensor, fisher: Tensor, mask: Tensor, *, damp: Tensor, update: str, info: Tensor | None
) -> Tensor:
    """``obs_update`` of values that are not looked at.

    With ``info`` [B], for the joint update, a kept part that is not positive definite is reported there instead of
    raised, for blocks that are not reported already.
    """
    num_blocks, size, _ = fisher.shape
    dtype = compute_dtype(weight, fisher)
    w, keep = weight_blocks(weight, num_blocks, size).to(dtype), weight_blocks(mask, num_blocks, size)
    real = weight_blocks(torch.ones_like(mask), num_blocks, size)  # False in the tail of the last block
    new = torch.empty_like(w)
    for part in chunks(num_blocks, 5 * size * size * w.element_size()):
        f = damp_blocks(fisher[part], real[part], damp if damp.numel() == 1 else damp[part], dtype)
        if update == "joint":
            new[part], failed = _joint(f, w[part], keep[part])
            if info is None:
                check_info("kept part of fisher", failed, part.start)
            else:
                info[part] = torch.where(info[part] == 0, failed, info[part])
        else:
            new[part] = _single(f, w[part], keep[part], part.start)
    return new.view(-1)[: weight.numel()].view(weight.shape).masked_fill(~mask, 0.0).to(weight.dtype)


def loss_increase(change: Tensor, fisher: Tensor, *, damp: Tensor) -> Tensor:
    """``1/2 dw^T (F + damp I) dw`` of each Fisher block, [B], for a ``change`` dw of the weight."""
    check_damp_values(damp)
    num_blocks, size, _ = fisher.shape
    dtype = compute_dtype(change, fisher)
    dw = weight_blocks(change, num_blocks, size).to(dtype)
    quadratic = torch.empty(num_blocks, dtype=dtype, device=change.device)
    for part in chunks(num_blocks, 2 * size * size * dw.element_size()):
        quadratic[part] = ((fisher[part].to(dtype) @ dw[part][:, :, None])[:, :, 0] * dw[part]).sum(1)
    return 0.5 * (quadratic + damp.to(dtype) * (dw * dw).sum(1))


def block_saliency(
    weight: Tensor, fisher: Tensor | None, block: int, *, damp: Tensor, method: str, mask: Tensor | None
) -> Tensor:
    """Saliency of each run of ``block`` weights of the flattened weight, [R * C / block].

    Arguments as in ``ops.block_saliency``.
    """
    check_finite("weight", weight)
    dtype = compute_dtype(weight, fisher)
    alive = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
    if method == "magnitude" or fisher is None:
        units = weight.to(dtype).masked_fill(~alive, 0.0).reshape(-1, block)
        return units.abs()[:, 0] if block == 1 else (units * units).sum(1)
    check_finite("fisher", fisher)
    check_damp_values(damp)
    num_blocks, size, _ = fisher.shape
    live, w = weight_blocks(alive, num_blocks, size), weight_blocks(weight, num_blocks, size).to(dtype)
    w = w.masked_fill(~live, 0.0)
    out = torch.empty(num_blocks, size // block, dtype=dtype, device=weight.device)
    for part in chunks(num_blocks, 4 * size * size * w.element_size()):
        f = damp_blocks(fisher[part], live[part], damp if damp.numel() == 1 else damp[part], dtype)
        if method == "diagonal":
            out[part] = (0.5 * f.diagonal(dim1=1, dim2=2) * w[part] ** 2).unflatten(1, (-1, block)).sum(2)
            continue
        finv = torch.cholesky_inverse(factor_or_raise(f, "fisher", part.start))
        units = w[part].reshape(-1, block)
        inner = finv.view(-1, size // block, block, size // block, block).diagonal(dim1=1, dim2=3)
        inner = inner.permute(0, 3, 1, 2).reshape(-1, block, block)
        solved = torch.cholesky_solve(units[:, :, None], factor_or_raise(inner, "inverse fisher of a block"))[:, :, 0]
        out[part] = 0.5 * (units * solved).sum(1).view(-1, size // block)
    return out.view(-1)[: weight.numel() // block]


def _joint(f: Tensor, w: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """w_K + F_KK^-1 F_KP w_P, blocks gathered to the widest kept set of the chunk; and ``info`` [b] of F_KK."""
    width = max(1, int(keep.sum(1).max()))
    index = keep.sort(dim=1, descending=True, stable=True).indices[:, :width]
    valid = keep.gather(1, index)
    rhs = (f @ w.masked_fill(keep, 0.0)[:, :, None])[:, :, 0].gather(1, index)
    kept = f.gather(1, index[:, :, None].expand(-1, -1, f.shape[1])).gather(2, index[:, None].expand(-1, width, -1))
    change, info = solve_kept(kept, rhs, valid)
    return w.scatter_add(1, index, change), info


def _single(f: Tensor, w: Tensor, keep: Tensor, offset: int) -> Tensor:
    """w - sum over pruned p of F^-1[:, p] w_p / F^-1_pp."""
    finv = torch.cholesky_inverse(factor_or_raise(f, "fisher", offset))
    shares = (w / finv.diagonal(dim1=1, dim2=2)).masked_fill(keep, 0.0)
    return w - (finv @ shares[:, :, None])[:, :, 0]
