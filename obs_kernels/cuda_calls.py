# SPDX-License-Identifier: Apache-2.0
"""Ops of the compiled module, with the names and parameters of ``obs_kernels.reference``.

The only file that takes ``data_ptr()``: whatever reaches an address here has been checked for device, dtype, shape and
contiguity. Outputs are allocated through torch and work is queued on torch's current stream without waiting, so that
side streams and CUDA graphs behave as they do for torch's own ops.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from obs_kernels import _ext
from obs_kernels.checks import check_fisher, check_pack, check_square_blocks
from obs_kernels.errors import (
    ConfigError,
    DeviceMismatchError,
    DTypeNotSupportedError,
    ShapeNotSupportedError,
    UnsupportedGPUError,
)
from obs_kernels.launch_plan import LaunchPlan
from obs_kernels.packed_format import packed_shapes
from obs_kernels.patterns import NMPattern, VNMPattern

__all__ = [
    "accumulate_fisher_",
    "invert_spd",
    "invert_spd_into",
    "launch_accumulate_fisher",
    "launch_invert_spd",
    "launch_pack",
    "pack",
    "runs_on",
]

_GRAD_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""``GradType`` of obs_kernels/accumulate.h."""


def pack(weight: Tensor, mask: Tensor, pattern: str) -> tuple[Tensor, Tensor, Tensor]:
    """(values, codes, columns) of ``weight`` [R, C] at the kept entries of ``mask``, which must satisfy ``pattern``.

    Raises:
        BackendUnavailableError: the compiled module is absent.
        DeviceMismatchError: a tensor is not on a CUDA device.
        UnsupportedGPUError: the module holds no code for this GPU.
    """
    _ext.load()
    parsed = check_pack(weight, mask, pattern)
    _check_on_cuda(weight=weight, mask=mask)
    device = weight.device
    values_shape, codes_shape, columns_shape = packed_shapes(parsed, *weight.shape)
    values = torch.empty(values_shape, dtype=weight.dtype, device=device)
    codes = torch.empty(codes_shape, dtype=torch.uint8, device=device)
    columns = torch.empty(columns_shape or (0,), dtype=torch.uint8, device=device)
    launch_pack(weight, mask, values, codes, columns, pattern=parsed)
    return values, codes, columns


def launch_pack(
    weight: Tensor, mask: Tensor, values: Tensor, codes: Tensor, columns: Tensor, *, pattern: NMPattern
) -> LaunchPlan:
    """Fill the outputs of ``pack``, which the caller has allocated; returns what was launched."""
    native = _ext.load()
    check_pack(weight, mask, pattern)
    _check_on_cuda(weight=weight, mask=mask, values=values, codes=codes, columns=columns)
    rows, cols = weight.shape
    shapes = [tuple(tensor.shape) for tensor in (values, codes, columns)]
    wanted = [shape or (0,) for shape in packed_shapes(pattern, rows, cols)]
    if shapes != wanted:
        raise ShapeNotSupportedError(f"values, codes and columns must be {wanted} for pattern {pattern}, got {shapes}")
    if values.dtype != weight.dtype or codes.dtype != torch.uint8 or columns.dtype != torch.uint8:
        raise DTypeNotSupportedError(
            f"values, codes and columns must be {weight.dtype}, uint8 and uint8, "
            f"got {values.dtype}, {codes.dtype} and {columns.dtype}"
        )
    _check_gpu(weight.device.index)
    plan = native.pack(
        weight=weight.data_ptr(),
        mask=mask.data_ptr(),
        values=values.data_ptr(),
        codes=codes.data_ptr(),
        columns=columns.data_ptr(),
        rows=rows,
        cols=cols,
        v=pattern.v if isinstance(pattern, VNMPattern) else 0,
        n=pattern.n,
        m=pattern.m,
        element_size=weight.element_size(),
        device=weight.device.index,
        stream=torch.cuda.current_stream(weight.device).cuda_stream,
    )
    return LaunchPlan(*plan)


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
    _check_on_cuda(matrices=matrices, damp=damp, inverse=inverse, info=info)
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
    _check_gpu(matrices.device.index)
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
    _check_on_cuda(fisher=fisher, grads=grads[:1])
    if not num_blocks or not grads.shape[0]:
        return LaunchPlan("accumulate_fisher_", "empty", 0, 0)
    _check_gpu(fisher.device.index)
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


def runs_on(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """True if code for ``architectures`` (as CMake writes them: "80", "90a", "86-real") runs on ``capability``."""
    return any(_covers(architecture, capability) for architecture in architectures)


def _covers(architecture: str, capability: tuple[int, int]) -> bool:
    found = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", architecture)
    if found is None:
        raise ConfigError(f"architecture must look like '80', '90a' or '86-real', got {architecture!r}")
    target = int(found[1]), int(found[2])
    if found[3] == "a":
        return capability == target
    same_family = capability[0] == target[0] and capability[1] >= target[1]
    if found[3] == "f" or found[4] == "-real":
        return same_family
    return capability >= target  # the PTX inside is compiled by the driver of any later GPU


@functools.cache
def _check_gpu(device: int) -> None:
    architectures = _ext.load().build_info()["architectures"]
    capability = torch.cuda.get_device_capability(device)
    if not runs_on(capability, architectures):
        raise UnsupportedGPUError(
            f"cuda:{device} has compute capability {capability[0]}.{capability[1]}; the compiled module holds code for "
            f"{', '.join(architectures)}. Fix: use backend='reference', or build with CMAKE_CUDA_ARCHITECTURES="
            f"{capability[0]}{capability[1]}"
        )


def _check_on_cuda(**tensors: Tensor) -> None:
    device = next(iter(tensors.values())).device
    for name, tensor in tensors.items():
        if not tensor.is_cuda:
            raise DeviceMismatchError(f"{name} must be on a CUDA device, got {tensor.device}; move it with .to('cuda')")
        if tensor.device != device:
            raise DeviceMismatchError(f"tensors must share a device, got {name} on {tensor.device}, others on {device}")
        if not tensor.is_contiguous():
            raise ShapeNotSupportedError(
                f"{name} must be contiguous, got strides {tensor.stride()} for shape {list(tensor.shape)}; "
                f"call .contiguous()"
            )
