# SPDX-License-Identifier: Apache-2.0
"""Block Fisher accumulation and batched inverse."""

from __future__ import annotations

import torch
from torch import Tensor

from obs_kernels import checks
from obs_kernels.errors import ShapeNotSupportedError
from obs_kernels.ops.dispatch import kernel, resolve
from obs_kernels.reference.blocks import compute_dtype


@torch.no_grad()
def accumulate_fisher_(fisher: Tensor, grads: Tensor, *, scale: float, backend: str | None = None) -> Tensor:
    """Add ``scale * sum_s g_s g_s^T`` to every diagonal block of the empirical Fisher, in place.

    Equivalent to::

        g = grads.float().unflatten(1, fisher.shape[:2])
        fisher += scale * torch.einsum("sbi,sbj->bij", g, g)

    Args:
        fisher: [B, D, D] float32 (or float64), symmetric; one block a run of D consecutive weights. A backend may read
            one triangle only and write both.
        grads: [S, B * D] float16, bfloat16, float32 or float64; S gradients, the last block padded with zeros.
        scale: usually 1, or 1 / total samples; the caller owns the damping.
        backend: None, or a name of ``dispatch.BACKENDS``.

    Returns:
        ``fisher``.

    Raises:
        ShapeNotSupportedError, DTypeNotSupportedError, DeviceMismatchError: arguments that do not fit each other.

    Source: oBERT (Kurtic et al. 2022), eq. 5, accumulated instead of inverted rank by rank.
    """
    checks.check_fisher(fisher, grads)
    torch.ops.obs_kernels.accumulate_fisher_(
        fisher, grads, scale=float(scale), backend=resolve("accumulate_fisher_", backend, fisher, grads)
    )
    return fisher


@torch.no_grad()
def invert_spd(
    matrices: Tensor, *, damp: float | Tensor = 0.0, out: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Inverse of ``matrices + damp * I`` for symmetric positive definite blocks.

    Args:
        matrices: [B, D, D] float32 or float64, symmetric; a backend may read one triangle only, and a NaN in the other
            one may go unreported.
        damp: added to the diagonal; a number or one value a block, [B].
        out: optional result of the same shape and dtype; may be ``matrices`` itself, but not overlap it otherwise.
        backend: None, or a name of ``dispatch.BACKENDS``.

    Returns:
        (inverse [B, D, D], info [B] int32). ``info`` is 0, or the failing pivot (1-based) of a block that is not
        positive definite; that block of the inverse is zeros, the others are right.
    """
    checks.check_square_blocks("matrices", matrices)
    checks.check_damp(damp, matrices.shape[0])
    if out is not None:
        checks.check_dtype("out", out, (matrices.dtype,))
        checks.check_same_device(matrices=matrices, out=out)
        if out.shape != matrices.shape:
            raise ShapeNotSupportedError(
                f"out must have the shape of matrices {list(matrices.shape)}, got {list(out.shape)}"
            )
    if isinstance(damp, Tensor) and damp.is_cuda and damp.numel() == 1:
        checks.check_damp_values(damp)  # in the op one value counts as checked
    damps, chosen = damp_tensor(damp, matrices), resolve("invert_spd", backend, matrices)
    if out is None:
        inverse, info = torch.ops.obs_kernels.invert_spd(matrices, damps, backend=chosen)
        return inverse, info
    return out, torch.ops.obs_kernels.invert_spd_into(matrices, damps, out, backend=chosen)


def damp_tensor(damp: float | Tensor, *like: Tensor | None) -> Tensor:
    """``damp`` as a tensor of one value or [B] beside ``like``, in the dtype of the arithmetic on them."""
    dtype = compute_dtype(*like)
    device = next(t.device for t in like if t is not None)
    if isinstance(damp, Tensor):
        checks.check_same_device(damp=damp, fisher=like[-1])
        return damp.to(dtype).reshape(-1)
    return torch.full((1,), float(damp), dtype=dtype, device=device)


@torch.library.custom_op("obs_kernels::accumulate_fisher_", mutates_args=("fisher",))
def _accumulate_fisher(fisher: Tensor, grads: Tensor, *, scale: float, backend: str) -> None:
    kernel("accumulate_fisher_", backend)(fisher, grads, scale=scale)


@_accumulate_fisher.register_fake
def _(fisher: Tensor, grads: Tensor, *, scale: float, backend: str) -> None:
    checks.check_fisher(fisher, grads)


@torch.library.custom_op("obs_kernels::invert_spd", mutates_args=())
def _invert_spd(matrices: Tensor, damp: Tensor, *, backend: str) -> tuple[Tensor, Tensor]:
    _check_damp_values(damp)
    return kernel("invert_spd", backend)(matrices, damp=damp)


@_invert_spd.register_fake
def _(matrices: Tensor, damp: Tensor, *, backend: str) -> tuple[Tensor, Tensor]:
    checks.check_square_blocks("matrices", matrices)
    inverse = torch.empty_like(matrices, memory_format=torch.contiguous_format)
    return inverse, matrices.new_empty(matrices.shape[0], dtype=torch.int32)


def _check_damp_values(damp: Tensor) -> None:
    """Look at the values, which waits for a GPU, unless they came from a number or a CUDA graph is being captured."""
    checked = damp.is_cuda and (damp.numel() == 1 or torch.cuda.is_current_stream_capturing())
    if not checked:
        checks.check_damp_values(damp)


@torch.library.custom_op("obs_kernels::invert_spd_into", mutates_args=("out",))
def _invert_spd_into(matrices: Tensor, damp: Tensor, out: Tensor, *, backend: str) -> Tensor:
    """``info``; the inverse goes into ``out``, on the cuda backend without a second pass over memory."""
    _check_damp_values(damp)
    if backend == "cuda" and out.is_contiguous():
        info: Tensor = kernel("invert_spd_into", backend)(matrices, damp, out)
        return info
    inverse, info = kernel("invert_spd", backend)(matrices, damp=damp)
    out.copy_(inverse)
    return info


@_invert_spd_into.register_fake
def _(matrices: Tensor, damp: Tensor, out: Tensor, *, backend: str) -> Tensor:
    return matrices.new_empty(matrices.shape[0], dtype=torch.int32)
