# SPDX-License-Identifier: Apache-2.0
"""``accumulate_fisher_`` of the compiled module."""

from __future__ import annotations

import torch
from torch import Tensor

from obs_kernels import _ext
from obs_kernels.checks import check_fisher
from obs_kernels.cuda_calls.device import check_gpu, check_on_cuda
from obs_kernels.errors import DTypeNotSupportedError, ShapeNotSupportedError
from obs_kernels.launch_plan import LaunchPlan

_GRAD_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""``GradType`` of obs_kernels/accumulate.h."""


def accumulate_fisher_(fisher: Tensor, grads: Tensor, *, scale: float) -> Tensor:
    """Add ``scale * sum_s g_s g_s^T`` to every block of ``fisher`` [B, D, D] f32, D <= 128, in place.

    ``grads`` is [S, B * D] f32, f16 or bf16. Of ``fisher``, which is symmetric, the lower triangle may be all that is
    read.

    Raises:
        BackendUnavailableError: the compiled module is absent.
        DeviceMismatchError, UnsupportedGPUError, ShapeNotSupportedError, DTypeNotSupportedError: as named.
    """
    rows = grads if grads.stride(1) == 1 or grads.shape[1] <= 1 else grads.contiguous()
    if fisher.is_contiguous():
        launch_accumulate_fisher(fisher, rows, scale=scale)
    else:
        whole = fisher.contiguous()
        launch_accumulate_fisher(whole, rows, scale=scale)
        fisher.copy_(whole)
    return fisher


def launch_accumulate_fisher(fisher: Tensor, grads: Tensor, *, scale: float) -> LaunchPlan:
    """Add to ``fisher``, contiguous; ``grads`` has contiguous rows, any row stride. Returns what was launched."""
    native = _ext.load()
    check_fisher(fisher, grads)
    if fisher.dtype != torch.float32 or grads.dtype not in _GRAD_TYPES:
        raise DTypeNotSupportedError(
            f"fisher must be float32 and grads float32, float16 or bfloat16, got {fisher.dtype} and {grads.dtype}; "
            f"backend='reference' takes float64"
        )
    num_blocks, size, _ = fisher.shape
    if size > native.MAX_ACCUMULATE_SIZE:
        raise ShapeNotSupportedError(
            f"fisher must have blocks of at most {native.MAX_ACCUMULATE_SIZE} on the cuda backend, got "
            f"{list(fisher.shape)}; use backend='triton'"
        )
    check_on_cuda(fisher=fisher, grads=grads[:1])
    if not num_blocks or not grads.shape[0]:
        return LaunchPlan("accumulate_fisher_", "empty", 0, 0)
    check_gpu(fisher.device.index)
    plan = native.accumulate_fisher(
        grads=grads.data_ptr(),
        grad_type=_GRAD_TYPES[grads.dtype],
        row_stride=grads.stride(0),
        fisher=fisher.data_ptr(),
        num_blocks=num_blocks,
        size=size,
        num_samples=grads.shape[0],
        scale=scale,
        device=fisher.device.index,
        stream=torch.cuda.current_stream(fisher.device).cuda_stream,
    )
    return LaunchPlan(*plan)
