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
from obs_kernels.checks import PIECE
from obs_kernels.cuda_calls import product_plan
from obs_kernels.cuda_calls.device import check_on_cuda, raw_stream
from obs_kernels.cuda_calls.prepacked import Prepacked, prepack, prepacked
from obs_kernels.cuda_calls.product_plan import ProductPlan, without_memory
from obs_kernels.cuda_calls.wgmma import (
    ACTIVATIONS,
    TYPES,
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
    options = (activation, x_layout, y_layout)
    panels = columns if columns.numel() else None
    plan = product_plan.find(x, values, codes, panels, bias, pattern, options)
    if plan is not None:
        return plan(x, bias)
    tokens = x.shape[0] if x_layout == "token" else x.shape[1]
    rows, kept = values.shape
    y = x.new_empty((tokens, rows) if y_layout == "token" else (rows, tokens))
    if y.numel() == 0:
        return y
    parsed: NMPattern = parse_pattern(pattern)
    cols = kept // parsed.n * parsed.m
    if x.shape[1 if x_layout == "token" else 0] != cols:
        raise ShapeNotSupportedError(f"x must have {cols} columns for x_layout={x_layout!r}, got {list(x.shape)}")
    contiguous = None if bias is None else bias.contiguous()
    if isinstance(parsed, VNMPattern) and kept and gathers(parsed, rows, cols, tokens, x_layout, x.device):
        packed = prepacked(*kept_columns(values, codes, columns), "2:4")
        at_words = columns if columns.data_ptr() % 4 == 0 else columns.clone()
        plan, given = plan_gather(
            x, at_words, packed, contiguous, y, cols=cols, v=parsed.v, activation=activation, x_layout=x_layout,
            y_layout=y_layout,
        )  # fmt: skip
        lasts = at_words is columns
    else:
        lasts = kept > 0
        if lasts:
            packed = prepacked(values, codes, columns, pattern)
        else:  # no columns: what is left is activation(bias), here of a weight of zeros
            x, x_layout = x.new_zeros(tokens, PIECE), "token"
            zeros, first_two = values.new_zeros(rows, PIECE // 2), codes.new_full((rows, 1), 0x44)
            packed = Prepacked((), (), prepack(zeros, first_two, codes.new_empty(0), "2:4"), None, set())
        plan, given = plan_sparse(x, packed, contiguous, y, activation=activation, x_layout=x_layout, y_layout=y_layout)
    if lasts:
        product_plan.keep(x, values, codes, panels, bias, pattern, options, plan)
    return plan.run(given, contiguous, y)


def plan_sparse(
    x: Tensor, packed: Prepacked, bias: Tensor | None, y: Tensor, *, activation: str, x_layout: str, y_layout: str
) -> tuple[ProductPlan, Tensor]:
    """(plan, x as it takes it) of 2:4 on all columns."""
    given, layout, cols = as_copied(x, x_layout)
    rows = y.shape[1 if y_layout == "token" else 0]
    product = sparse_product(
        given, packed.packed, bias, y, rows=rows, cols=cols, activation=activation, x_layout=layout, y_layout=y_layout
    )
    prepare = None if given is x else lambda x: as_copied(x, x_layout)[0]
    return ProductPlan(packed, product.run, without_memory(y), x.device.index, prepare=prepare), given


def plan_gather(
    x: Tensor,
    columns: Tensor,
    packed: Prepacked,
    bias: Tensor | None,
    y: Tensor,
    *,
    cols: int,
    v: int,
    activation: str,
    x_layout: str,
    y_layout: str,
) -> tuple[ProductPlan, Tensor]:
    """(plan, x as it takes it) of the kept columns alone; a token-major x is turned by the launch."""
    turns = x_layout == "token"
    given = as_copied(x, x_layout)[0] if turns else as_gathered(x, x_layout)
    rows = y.shape[1 if y_layout == "token" else 0]
    product = gather_product(
        given, columns, packed.packed, bias, y, rows=rows, cols=cols, v=v, activation=activation, x_layout=x_layout,
        y_layout=y_layout,
    )  # fmt: skip
    prepare = None if given is x else lambda x: as_copied(x, x_layout)[0] if turns else as_gathered(x, x_layout)
    plan = ProductPlan(
        packed,
        product.run,
        without_memory(y),
        x.device.index,
        prepare=prepare,
        gathers=True,
        turned_shape=turned_shape(given) if turns else None,
    )
    return plan, given


def as_copied(x: Tensor, x_layout: str) -> tuple[Tensor, str, int]:
    """(x, layout, columns) that the copy engine takes: rows and start of whole 16 bytes; x itself where it can be."""
    if x_layout == "feature" and x.shape[1] % PIECE:
        x, x_layout = x.T, "token"
    if x_layout == "token" and x.shape[1] % PIECE:
        x = F.pad(x, (0, -x.shape[1] % PIECE))  # the weight has zeros there
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
    product = sparse_product(
        x, packed, bias, y, rows=rows, cols=cols, activation=activation, x_layout=x_layout, y_layout=y_layout,
        config=config,
    )  # fmt: skip
    launched = product.launch(x.data_ptr(), address(bias), y.data_ptr(), raw_stream(x.device.index))
    return plan_of(launched, _ext.load().SPARSE_TILES)


def sparse_product(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    y: Tensor,
    *,
    rows: int,
    cols: int,
    activation: str,
    x_layout: str,
    y_layout: str,
    config: str | None = None,
) -> Any:
    """The product of the compiled module for operands such as these, which are checked."""
    native = _ext.load()
    tokens = check_operands(x, packed, bias, y, rows=rows, cols=cols, x_layout=x_layout, y_layout=y_layout)
    check_packed(packed, rows, cols)
    return native.SparseLinear(
        packed=packed.data_ptr(),
        rows=rows,
        cols=cols,
        tokens=tokens,
        type=TYPES[x.dtype],
        activation=ACTIVATIONS[activation],
        feature_x=x_layout == "feature",
        feature_y=y_layout == "feature",
        config=tile_index(config, native.SPARSE_TILES),
        device=x.device.index,
    )


def address(bias: Tensor | None) -> int:
    """0 stands for none."""
    return 0 if bias is None else bias.data_ptr()


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


def turned_shape(x: Tensor) -> tuple[int, int]:
    """Of memory for ``x`` [T, C] turned: columns of whole 16 bytes."""
    return x.shape[1], -(-x.shape[0] // PIECE) * PIECE


def as_gathered(x: Tensor, x_layout: str) -> Tensor:
    """[C, T], of columns that begin at multiples of 16 bytes: x itself where it can be, else a copy, transposed by a
    kernel of its own.
    """
    if x_layout == "token":
        tokens = x.shape[0]
        x, _, cols = as_copied(x, x_layout)
        out = x.new_empty(turned_shape(x))
        _ext.load().transpose(
            x=x.data_ptr(),
            out=out.data_ptr(),
            tokens=tokens,
            cols=cols,
            out_stride=out.stride(0),
            device=x.device.index,
            stream=raw_stream(x.device.index),
        )
        return out[:, :tokens]
    if x.stride(1) != 1 or x.stride(0) % PIECE or x.stride(0) < x.shape[1] or x.data_ptr() % 16:
        padded = (
            F.pad(x, (0, -x.shape[1] % PIECE)) if x.shape[1] % PIECE else x.clone(memory_format=torch.contiguous_format)
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
    product = gather_product(
        x, columns, packed, bias, y, rows=rows, cols=cols, v=v, activation=activation, x_layout="feature",
        y_layout=y_layout, config=config,
    )  # fmt: skip
    launched = product.launch(x.data_ptr(), 0, address(bias), y.data_ptr(), raw_stream(x.device.index))
    return plan_of(launched, _ext.load().GATHER_TILES)


def gather_product(
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
    x_layout: str,
    y_layout: str,
    config: str | None = None,
) -> Any:
    """The product of the compiled module for operands such as these, which are checked; it turns a token-major x."""
    native = _ext.load()
    turns = x_layout == "token"
    tokens = check_operands(
        x if turns else x[:cols],
        packed,
        bias,
        y,
        rows=rows,
        cols=x.shape[1] if turns else cols,
        x_layout=x_layout,
        y_layout=y_layout,
        lines_apart=not turns,
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
    return native.GatherLinear(
        columns=columns.data_ptr(),
        packed=packed.data_ptr(),
        rows=rows,
        cols=groups * KEPT,
        tokens=tokens,
        x_stride=turned_shape(x)[1] if turns else x.stride(0),
        v=v,
        m=cols // groups,
        type=TYPES[x.dtype],
        activation=ACTIVATIONS[activation],
        feature_y=y_layout == "feature",
        config=tile_index(config, native.GATHER_TILES),
        device=x.device.index,
    )
