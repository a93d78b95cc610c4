# SPDX-License-Identifier: Apache-2.0
"""Launches of the compiled module's functions of groups, each with a Fisher block of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from obs_kernels import _ext
from obs_kernels.cuda_calls.device import check_gpu, check_on_cuda
from obs_kernels.errors import DTypeNotSupportedError, ShapeNotSupportedError
from obs_kernels.launch_plan import LaunchPlan
from obs_kernels.patterns import NMPattern


def launch_groups(
    function: str,
    weight: Tensor,
    fisher: Tensor,
    mask: Tensor | None,
    damp: Tensor,
    kept: Tensor,
    saliency: Tensor,
    new_weight: Tensor | None,
    info: Tensor,
    *,
    pattern: NMPattern,
) -> LaunchPlan:
    """``function`` ("search_nm", "search_greedy", or "finish_nm" of the choice in ``kept``) into the outputs.

    f32 ``weight`` of groups of m, ``fisher`` [groups, m, m] and ``damp`` (one value or [groups]).
    """
    arguments = group_arguments(weight, fisher, mask, damp, kept, saliency, new_weight, info, pattern)
    return LaunchPlan(*getattr(_ext.load(), function)(**arguments))


def group_arguments(
    weight: Tensor,
    fisher: Tensor,
    mask: Tensor | None,
    damp: Tensor,
    kept: Tensor,
    saliency: Tensor,
    new_weight: Tensor | None,
    info: Tensor,
    pattern: NMPattern,
) -> dict[str, object]:
    """What the module's functions of groups take, checked; a group is a row of m and has a block [m, m]."""
    m, groups = pattern.m, weight.numel() // pattern.m
    optional = {"mask": mask, "new_weight": new_weight}
    given = {"weight": weight, "fisher": fisher, "damp": damp, "kept": kept, "saliency": saliency, "info": info}
    check_on_cuda(**given, **{name: tensor for name, tensor in optional.items() if tensor is not None})
    floats = [weight, fisher, damp, saliency, *([] if new_weight is None else [new_weight])]
    if any(tensor.dtype != torch.float32 for tensor in floats) or info.dtype != torch.int32:
        raise DTypeNotSupportedError("weight, fisher, damp, saliency and new_weight must be float32 and info int32")
    if any(tensor is not None and tensor.dtype != torch.bool for tensor in (kept, mask)):
        raise DTypeNotSupportedError("kept and mask must be bool")
    sizes = {"kept": weight.numel(), "saliency": groups, "info": groups, "fisher": groups * m * m}
    found = {"kept": kept.numel(), "saliency": saliency.numel(), "info": info.numel(), "fisher": fisher.numel()}
    sizes |= {name: weight.numel() for name, tensor in optional.items() if tensor is not None}
    found |= {name: tensor.numel() for name, tensor in optional.items() if tensor is not None}
    if found != sizes or damp.numel() not in (1, groups):
        raise ShapeNotSupportedError(
            f"tensors must have {sizes} elements and damp 1 or {groups} for weight {list(weight.shape)} and pattern "
            f"{pattern}, got {found} and {damp.numel()}"
        )
    check_gpu(weight.device.index)
    return {
        "weight": weight.data_ptr(),
        "fisher": fisher.data_ptr(),
        "damp": damp.data_ptr(),
        "damp_each": damp.numel() > 1,
        "alive": 0 if mask is None else mask.data_ptr(),
        "mask": kept.data_ptr(),
        "saliency": saliency.data_ptr(),
        "new_weight": 0 if new_weight is None else new_weight.data_ptr(),
        "info": info.data_ptr(),
        "num_groups": groups,
        "n": pattern.n,
        "m": m,
        "device": weight.device.index,
        "stream": torch.cuda.current_stream(weight.device).cuda_stream,
    }
