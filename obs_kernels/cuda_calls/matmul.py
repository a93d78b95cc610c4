# SPDX-License-Identifier: Apache-2.0
"""``sparse_linear`` of the compiled module: the product by ``wgmma.sp``, for GPUs of compute capability 9.0.

Every weight with at most two nonzeros in each aligned four columns runs as 2:4. Panels v:2:m of 64 rows and more can
also be run on the columns that they keep alone, four of m, gathered from feature-major x: less to multiply, more to
bring. Both read the weight in an order of its own (``prepacked``): of all its columns, or of the kept ones.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from obs_kernels import _ext
from obs_kernels.cuda_calls.device import check_on_cuda
from obs_kernels.cuda_calls.prepacked import prepack, prepacked
from obs_kernels.cuda_calls.wgmma import (
    ACTIVATIONS,
    TYPES,
    WIDTH,
    check_operands,
    check_packed,
    lacks_sparse_product,
    plan_of,
    tile_index,
)
from obs_kernels.errors import DTypeNotSupportedError, ShapeNotSupportedError
from obs_kernels.launch_plan import LaunchPlan
from obs_kernels.patterns import NMPattern, VNMPattern, parse_pattern

__all__ = ["lacks_sparse_product", "launch_gather_linear", "launch_sparse_linear", "prepack", "sparse_linear"]
KEPT = 4
"""Columns that a panel keeps of m."""


def __getattr__(name: str) -> Any:
    """``CONFIGS`` and ``GATHER_CONFIGS``: names of the tile configurations, from the compiled module."""
    if name in ("CONFIGS", "GATHER_CONFIGS"):
        return tuple(_ext.load().SPARSE_TILES if name == "CONFIGS" else _ext.load().GATHER_TILES)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def sparse_linear(
    x: Tensor,
    values: Tensor,
    codes: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    pattern: str,
    *,
    activation: str,
    x_layout: str,
    y_layout: str,
) -> Tensor:
    """``activation(x W^T + bias)`` for ``x`` [T, C] ("token") or [C, T] ("feature"); returns [T, R] or [R, T]."""
    tokens = x.shape[0] if x_layout == "token" else x.shape[1]
    rows, kept = values.shape
    y = x.new_empty((tokens, rows) if y_layout == "token" else (rows, tokens))
    if y.numel() == 0:
        return y
    bias = None if bias is None else bias.contiguous()
    parsed: NMPattern = parse_pattern(pattern)
    cols = kept // parsed.n * parsed.m
    if isinstance(parsed, VNMPattern) and kept and gathers(parsed, rows, cols, tokens, x_layout, x.device):
        packed = prepacked(*kept_columns(values, codes, columns), "2:4")
        given, columns = as_gathered(x, x_layout), columns if columns.data_ptr() % 4 == 0 else columns.clone()
        launch_gather_linear(
            given, columns, packed, bias, y, rows=rows, cols=cols, v=parsed.v, activation=activation, y_layout=y_layout
        )
        return y
    if kept == 0:  # no columns: what is left is activation(bias), here of a weight of zeros
        x, x_layout, pattern = x.new_zeros(tokens, WIDTH), "token", "2:4"
        packed = prepack(
            values.new_zeros(rows, WIDTH // 2), codes.new_full((rows, 1), 0x44), codes.new_empty(0), pattern
        )
    else:
        packed = prepacked(values, codes, columns, pattern)
    x, x_layout, cols = as_copied(x, x_layout)
    launch_sparse_linear(
        x, packed, bias, y, rows=rows, cols=cols, activation=activation, x_layout=x_layout, y_layout=y_layout
    )
    return y


def as_copied(x: Tensor, x_layout: str) -> tuple[Tensor, str, int]:
    """(x, layout, columns) that the copy engine takes: rows and start of whole 16 bytes; x itself where it can be."""
    if x_layout == "feature" and x.shape[1] % WIDTH:
        x, x_layout = x.T, "token"
    if x_layout == "token" and x.shape[1] % WIDTH:
        x = F.pad(x, (0, -x.shape[1] % WIDTH))  # the weight has zeros there
    x = x.contiguous()
    if x.data_ptr() % 16:
        x = x.clone()
    return x, x_layout, x.shape[1] if x_layout == "token" else x.shape[0]


def launch_sparse_linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    y: Tensor,
    *,
    rows: int,
    cols: int,
    activation: str,
    x_layout: str = "token",
    y_layout: str,
    config: str | None = None,
) -> LaunchPlan:
    """Fill ``y`` [T, R] or [R, T]; ``config`` forces a tile of ``CONFIGS``. Returns what was launched.

    ``x`` [T, C] or [C, T] with rows of whole 16 bytes, ``packed`` of ``prepack``, ``bias`` [R] or None.
    """
    native = _ext.load()
    tokens = check_operands(x, packed, bias, y, rows=rows, cols=cols, x_layout=x_layout, y_layout=y_layout)
    check_packed(packed, rows, cols)
    tiles = native.SPARSE_TILES
    launched = native.sparse_linear(
        x=x.data_ptr(),
        packed=packed.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        y=y.data_ptr(),
        rows=rows,
        cols=cols,
        tokens=tokens,
        type=TYPES[x.dtype],
        activation=ACTIVATIONS[activation],
        feature_x=x_layout == "feature",
        feature_y=y_layout == "feature",
        config=tile_index(config, tiles),
        device=x.device.index,
        stream=torch.cuda.current_stream(x.device).cuda_stream,
    )
    return plan_of(launched, tiles)


def gathers(pattern: VNMPattern, rows: int, cols: int, tokens: int, x_layout: str, device: torch.device) -> bool:
    """Whether a weight of panels runs on its kept columns alone, as measured tiles say that this is faster."""
    if pattern.n != 2 or pattern.v % 64 or cols == 0:
        return False
    answer: bool = _ext.load().gather_is_faster(
        rows=rows,
        cols=cols,
        tokens=tokens,
        v=pattern.v,
        m=pattern.m,
        feature_x=x_layout == "feature",
        device=device.index,
    )
    return answer


def kept_columns(values: Tensor, codes: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(values, codes, no columns): the 2:4 weight [R, 4C/m] of the columns that panels v:2:m keep. Views."""
    return values, codes, columns.flatten()[:0]


def as_gathered(x: Tensor, x_layout: str) -> Tensor:
    """[C, T], of columns that begin at multiples of 16 bytes: x itself where it can be, else a copy, transposed by a
    kernel of its own.
    """
    if x_layout == "token":
        tokens = x.shape[0]
        x, _, cols = as_copied(x, x_layout)
        stride = -(-tokens // WIDTH) * WIDTH
        out = x.new_empty(cols, stride)
        _ext.load().transpose(
            x=x.data_ptr(),
            out=out.data_ptr(),
            tokens=tokens,
            cols=cols,
            out_stride=stride,
            device=x.device.index,
            stream=torch.cuda.current_stream(x.device).cuda_stream,
        )
        return out[:, :tokens]
    if x.stride(1) != 1 or x.stride(0) % WIDTH or x.stride(0) < x.shape[1] or x.data_ptr() % 16:
        padded = (
            F.pad(x, (0, -x.shape[1] % WIDTH)) if x.shape[1] % WIDTH else x.clone(memory_format=torch.contiguous_format)
        )
        x = padded[:, : x.shape[1]]
    return x


def launch_gather_linear(
    x: Tensor,
    columns: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    y: Tensor,
    *,
    rows: int,
    cols: int,
    v: int,
    activation: str,
    y_layout: str,
    config: str | None = None,
) -> LaunchPlan:
    """Fill ``y`` [T, R] or [R, T] from the columns that panels of ``v`` rows keep; ``config`` forces a tile of
    ``GATHER_CONFIGS``. Returns what was launched.

    ``x`` [C, T] as ``as_gathered`` gives it, ``columns`` [R / v, C / m, 4] uint8 of the stored format, ``packed`` of
    ``prepack`` for ``kept_columns``, ``bias`` [R] or None.
    """
    native = _ext.load()
    tokens = check_operands(
        x[:cols], packed, bias, y, rows=rows, cols=cols, x_layout="feature", y_layout=y_layout, lines_apart=True
    )
    check_on_cuda(x=x[:1], columns=columns)
    groups = columns.shape[1] if columns.dim() == 3 else 0
    if v < 1 or groups < 1 or tuple(columns.shape) != (rows // v, groups, KEPT) or rows % v or cols % groups:
        raise ShapeNotSupportedError(
            f"columns must be [rows / v, groups, {KEPT}] with groups that divide cols = {cols}, got "
            f"{list(columns.shape)} for rows = {rows}, v = {v}"
        )
    if columns.dtype != torch.uint8:
        raise DTypeNotSupportedError(f"columns must be uint8, got {columns.dtype}; use those of the packed weight")
    check_packed(packed, rows, groups * KEPT)
    tiles = native.GATHER_TILES
    launched = native.gather_linear(
        x=x.data_ptr(),
        columns=columns.data_ptr(),
        packed=packed.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        y=y.data_ptr(),
        rows=rows,
        cols=groups * KEPT,
        tokens=tokens,
        x_stride=x.stride(0),
        v=v,
        m=cols // groups,
        type=TYPES[x.dtype],
        activation=ACTIVATIONS[activation],
        feature_y=y_layout == "feature",
        config=tile_index(config, tiles),
        device=x.device.index,
        stream=torch.cuda.current_stream(x.device).cuda_stream,
    )
    return plan_of(launched, tiles)
