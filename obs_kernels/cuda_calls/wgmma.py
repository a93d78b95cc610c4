# SPDX-License-Identifier: Apache-2.0
"""What the launchers of the sparse product share: the GPU and types that it takes, and checks of its operands."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from obs_kernels import _ext
from obs_kernels.cuda_calls.device import check_gpu, check_on_cuda
from obs_kernels.errors import ConfigError, DTypeNotSupportedError, ShapeNotSupportedError, UnsupportedGPUError
from obs_kernels.launch_plan import LaunchPlan

CAPABILITY = (9, 0)
ARCHITECTURE = "90a"
"""What the module must be built for: ``wgmma`` is in no other code, nor in PTX for later GPUs."""
TYPES = {torch.float16: 0, torch.bfloat16: 1}
ACTIVATIONS = {"": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}


def check_operands(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    y: Tensor,
    *,
    rows: int,
    cols: int,
    x_layout: str,
    y_layout: str,
    lines_apart: bool = False,
) -> int:
    """Tokens of ``x`` [T, C] or [C, T]; raises unless ``y`` and ``bias`` fit it and a weight [R, C], and all lie on one
    GPU with ``wgmma.sp``. What ``packed`` must hold is the caller's. ``lines_apart``: those of x may lie apart.
    """
    if x.dtype not in TYPES or y.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        raise DTypeNotSupportedError(
            f"x, y and bias must share float16 or bfloat16, got {x.dtype}, {y.dtype}"
            f"{'' if bias is None else f', {bias.dtype}'}"
        )
    check_on_cuda(x=x[:1] if lines_apart else x, packed=packed, y=y, **({} if bias is None else {"bias": bias}))
    tokens = x.shape[0] if x_layout == "token" else x.shape[1]
    shapes = [tuple(x.shape), tuple(y.shape), None if bias is None else tuple(bias.shape)]
    wanted = [
        (tokens, cols) if x_layout == "token" else (cols, tokens),
        (tokens, rows) if y_layout == "token" else (rows, tokens),
        None if bias is None else (rows,),
    ]
    if shapes != wanted:
        raise ShapeNotSupportedError(f"x, y and bias must be {wanted}, got {shapes}")
    check_sparse_gpu(x.device.index)
    return tokens


def check_packed(packed: Tensor, rows: int, cols: int) -> None:
    """Raise unless ``packed`` has the bytes of a prepacked weight [rows, cols]."""
    wanted = _ext.load().prepacked_bytes(rows=rows, cols=cols)
    if packed.numel() != wanted:
        raise ShapeNotSupportedError(f"packed must hold {wanted} bytes for [{rows}, {cols}], got {packed.numel()}")


def tile_index(config: str | None, tiles: tuple[str, ...]) -> int:
    """Number of a tile configuration; -1 lets the table choose."""
    if config is None:
        return -1
    if config not in tiles:
        raise ConfigError(f"config must be one of {', '.join(map(repr, tiles))}, got {config!r}")
    return tiles.index(config)


def plan_of(launched: tuple[str, str, int, int], tiles: tuple[str, ...]) -> LaunchPlan:
    """What the module says that it launched, with the tile as its config."""
    op, path, blocks, threads = launched
    return LaunchPlan(op, path, blocks, threads, config=path if path in tiles else "")


def check_sparse_gpu(device: int) -> None:
    """Raise UnsupportedGPUError unless GPU ``device`` runs ``wgmma.sp`` by this module."""
    check_gpu(device)
    reason = lacks_sparse_product(device)
    if reason is not None:
        raise UnsupportedGPUError(f"sparse_linear cannot run on cuda:{device}: {reason}. Fix: use backend='reference'")


@functools.cache
def lacks_sparse_product(device: int) -> str | None:
    """Why ``wgmma.sp`` does not run on GPU ``device`` by this module; None if it does."""
    found = torch.cuda.get_device_capability(device)
    if found != CAPABILITY:
        return f"it needs compute capability 9.0 (Hopper), found {found[0]}.{found[1]}"
    built = _ext.build_info()["architectures"]
    if not any(architecture.startswith(ARCHITECTURE) for architecture in built):
        return f"the compiled module holds code for {', '.join(built)}, and it needs {ARCHITECTURE}"
    return None
