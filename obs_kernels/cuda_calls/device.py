# SPDX-License-Identifier: Apache-2.0
"""What every call checks: a CUDA device that the compiled module holds code for, and contiguous tensors."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from obs_kernels import _ext
from obs_kernels.errors import ConfigError, DeviceMismatchError, ShapeNotSupportedError, UnsupportedGPUError


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


def raw_stream(device: int) -> int:
    """Handle of torch's current stream on GPU ``device``, without the object around it, which costs the host 3 us."""
    stream: int = torch._C._cuda_getCurrentRawStream(device)  # type: ignore[attr-defined]  # missing in builds for CPU
    return stream


@functools.cache
def check_gpu(device: int) -> None:
    """Raise ``UnsupportedGPUError`` unless the compiled module runs on GPU ``device``."""
    architectures = _ext.load().build_info()["architectures"]
    capability = torch.cuda.get_device_capability(device)
    if not runs_on(capability, architectures):
        raise UnsupportedGPUError(
            f"cuda:{device} has compute capability {capability[0]}.{capability[1]}; the compiled module holds code for "
            f"{', '.join(architectures)}. Fix: use backend='reference', or build with CMAKE_CUDA_ARCHITECTURES="
            f"{capability[0]}{capability[1]}"
        )


def check_on_cuda(**tensors: Tensor) -> None:
    """Raise unless the tensors share a CUDA device and are contiguous; the first one names the device."""
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
