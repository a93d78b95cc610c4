# SPDX-License-Identifier: Apache-2.0
"""``pack`` of the compiled module."""

from __future__ import annotations

import torch
from torch import Tensor

from obs_kernels import _ext
from obs_kernels.checks import check_pack
from obs_kernels.cuda_calls.device import check_gpu, check_on_cuda
from obs_kernels.errors import DTypeNotSupportedError, ShapeNotSupportedError
from obs_kernels.launch_plan import LaunchPlan
from obs_kernels.packed_format import packed_shapes
from obs_kernels.patterns import NMPattern, VNMPattern


def pack(weight: Tensor, mask: Tensor, pattern: str) -> tuple[Tensor, Tensor, Tensor]:
    """(values, codes, columns) of ``weight`` [R, C] at the kept entries of ``mask``, which must satisfy ``pattern``.

    Raises:
        BackendUnavailableError: the compiled module is absent.
        DeviceMismatchError: a tensor is not on a CUDA device.
        UnsupportedGPUError: the module holds no code for this GPU.
    """
    _ext.load()
    parsed = check_pack(weight, mask, pattern)
    check_on_cuda(weight=weight, mask=mask)
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
    check_on_cuda(weight=weight, mask=mask, values=values, codes=codes, columns=columns)
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
    check_gpu(weight.device.index)
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
