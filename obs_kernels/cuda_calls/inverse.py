# SPDX-License-Identifier: Apache-2.0
"""``invert_spd`` of the compiled module."""

from __future__ import annotations

import torch
from torch import Tensor

from obs_kernels import _ext
from obs_kernels.checks import check_square_blocks
from obs_kernels.cuda_calls.device import check_gpu, check_on_cuda
from obs_kernels.errors import DTypeNotSupportedError, ShapeNotSupportedError
from obs_kernels.launch_plan import LaunchPlan


def invert_spd(matrices: Tensor, *, damp: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of ``matrices + damp * I``, [B, D, D] f32 with D <= 128, and ``info`` [B] int32.

    ``damp`` is one value or [B]. Of each matrix the lower triangle is read; a block that is not positive definite comes
    out as zeros, the others right.

    Raises:
        BackendUnavailableError: the compiled module is absent.
        DeviceMismatchError, UnsupportedGPUError, ShapeNotSupportedError, DTypeNotSupportedError: as named.
    """
    inverse = torch.empty_like(matrices, memory_format=torch.contiguous_format)
    return inverse, invert_spd_into(matrices, damp, inverse)


def invert_spd_into(matrices: Tensor, damp: Tensor, inverse: Tensor) -> Tensor:
    """``invert_spd`` into ``inverse`` (contiguous; may be ``matrices`` itself); returns ``info``."""
    info = torch.empty(matrices.shape[0], dtype=torch.int32, device=matrices.device)
    launch_invert_spd(matrices if matrices is inverse else matrices.contiguous(), damp, inverse, info)
    return info


def launch_invert_spd(matrices: Tensor, damp: Tensor, inverse: Tensor, info: Tensor) -> LaunchPlan:
    """Fill ``inverse`` and ``info``, which the caller has allocated; returns what was launched."""
    native = _ext.load()
    check_square_blocks("matrices", matrices)
    damp = damp.to(torch.float32).contiguous()
    check_on_cuda(matrices=matrices, damp=damp, inverse=inverse, info=info)
    num_blocks, size, _ = matrices.shape
    if matrices.dtype != torch.float32 or inverse.dtype != torch.float32 or info.dtype != torch.int32:
        raise DTypeNotSupportedError(
            f"matrices, inverse and info must be float32, float32 and int32, got {matrices.dtype}, {inverse.dtype} and "
            f"{info.dtype}; backend='reference' takes float64"
        )
    if size > native.MAX_INVERT_SIZE:
        raise ShapeNotSupportedError(
            f"matrices must be at most {native.MAX_INVERT_SIZE} wide on the cuda backend, got "
            f"{list(matrices.shape)}; use backend='reference'"
        )
    if inverse.shape != matrices.shape or info.shape != (num_blocks,) or damp.numel() not in (1, num_blocks):
        raise ShapeNotSupportedError(
            f"inverse, info and damp must be {list(matrices.shape)}, [{num_blocks}] and [1] or [{num_blocks}], got "
            f"{list(inverse.shape)}, {list(info.shape)} and {list(damp.shape)}"
        )
    if not num_blocks or not size:
        info.zero_()
        return LaunchPlan("invert_spd", "empty", 0, 0)
    check_gpu(matrices.device.index)
    plan = native.invert_spd(
        matrices=matrices.data_ptr(),
        damp=damp.data_ptr(),
        damp_each=damp.numel() > 1,
        inverse=inverse.data_ptr(),
        info=info.data_ptr(),
        num_blocks=num_blocks,
        size=size,
        device=matrices.device.index,
        stream=torch.cuda.current_stream(matrices.device).cuda_stream,
    )
    return LaunchPlan(*plan)
