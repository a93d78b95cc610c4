# SPDX-License-Identifier: Apache-2.0
"""Accumulation of the Hessian that all rows share: one read of x, products of bf16 halves, one pass over H.

``u_t = sqrt(q_t) (x_t - c)`` is written as two bf16 halves, hi + lo, next to each other. With ``S = hi^T hi`` and
``A = hi^T lo`` the sum of u u^T is ``S + A + A^T``; lo^T lo is below what two halves hold. Both come from one product,
``hi^T [hi | lo]``, which torch does; where C is wide in strips of rows, of which S takes the part right of the diagonal
only. What else the tokens are summed into (inputs, squares of output gradients) comes from the same passes: f32 sums of
``tokens`` tokens, which are then added in f64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from obs_kernels.launch_plan import LaunchPlan
from obs_kernels.triton_kernels.tuning import HessianConfig, hessian_config

__all__ = [
    "accumulate_hessian_",
    "accumulate_inputs_",
    "launch_accumulate_hessian",
    "launch_add_products",
    "launch_add_sums",
    "launch_square_tokens",
    "launch_weigh_inputs",
    "weigh_tokens_",
]

# Counts that differ from batch to batch are not specialized: each new remainder would be compiled anew.


@triton.jit(do_not_specialize=["num_tokens"])
def _square_tokens_kernel(
    token_weight,  # [T] f32
    partial,  # [blocks of tokens, R] f32
    dy,  # [T, R] f32, bf16 or f16, rows contiguous
    row_stride,  # elements from one token to the next
    num_tokens,  # T
    rows,  # R
    scale,
    TOKENS: tl.constexpr,  # of a program
    COLS: tl.constexpr,  # rows of the weight, columns of dy, that are read at once
):
    # Squares of scale * dy of TOKENS tokens: summed over r for each token, and over these tokens for each r.
    block = tl.program_id(0).to(tl.int64)
    token = block * TOKENS + tl.arange(0, TOKENS)  # [TOKENS]
    live = token < num_tokens
    total = tl.zeros([TOKENS, COLS], dtype=tl.float32)
    for first in range(0, rows, COLS):
        row = first + tl.arange(0, COLS)  # [COLS]
        inside = live[:, None] & (row < rows)[None, :]
        g = tl.load(dy + token[:, None] * row_stride + row[None, :], mask=inside, other=0.0)  # [TOKENS, COLS]
        g = g.to(tl.float32) * scale
        total += g * g
        tl.store(partial + block * rows + row, tl.sum(g * g, axis=0), mask=row < rows)
    tl.store(token_weight + token, tl.sum(total, axis=1), mask=live)


def launch_square_tokens(
    token_weight: Tensor, partial: Tensor, dy: Tensor, *, scale: float, config: HessianConfig
) -> LaunchPlan:
    """Write ``token_weight`` [T] f32 and ``partial`` [cdiv(T, tokens), R] f32; ``dy`` [T, R] has contiguous rows."""
    tokens, rows = dy.shape
    grid = triton.cdiv(tokens, config.tokens)
    with torch.cuda.device_of(dy):
        _square_tokens_kernel[(grid,)](
            token_weight,
            partial,
            dy,
            dy.stride(0),
            tokens,
            rows,
            scale,
            TOKENS=config.tokens,
            COLS=config.cols,
            num_warps=config.warps,
            enable_fp_fusion=True,  # a fused multiply-add rounds once less, and a default may change
        )
    return LaunchPlan("weigh_tokens_", "squares", grid, 32 * config.warps, str(config))


@triton.jit(do_not_specialize=["num_tokens", "num_written"])
def _weigh_inputs_kernel(
    halves,  # [T', 2C] bf16, contiguous: hi | lo
    partial,  # [blocks of tokens, C + 1] f32
    x,  # [T, C] bf16, rows contiguous
    row_stride,  # elements from one token to the next
    token_weight,  # q [T] f32
    origin,  # c [C] f32
    num_tokens,  # T
    num_written,  # T' >= T: zeros after T
    cols,  # C
    WEIGHTED: tl.constexpr,  # else q is 1
    MOVED: tl.constexpr,  # else c is 0
    SUMS: tl.constexpr,  # whether partial is wanted
    TOKENS: tl.constexpr,  # of a tile
    COLS: tl.constexpr,
):
    # Halves of sqrt(q) (x - c) of a tile, and the sums over its tokens of q (x - c) and q. A negative q gives NaN.
    block = tl.program_id(0).to(tl.int64)
    token = block * TOKENS + tl.arange(0, TOKENS)  # [TOKENS]
    col = tl.program_id(1).to(tl.int64) * COLS + tl.arange(0, COLS)  # [COLS]
    live = token < num_tokens
    inside = live[:, None] & (col < cols)[None, :]
    u = tl.load(x + token[:, None] * row_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    if MOVED:
        c = tl.load(origin + col, mask=col < cols, other=0.0)
        u = tl.where(live[:, None], u - c[None, :], 0.0)  # [TOKENS, COLS]
    if WEIGHTED:
        q = tl.load(token_weight + token, mask=live, other=0.0)  # [TOKENS]
    else:
        q = live.to(tl.float32)
    if SUMS:
        start = partial + block * (cols + 1)
        weighted = q[:, None] * u if WEIGHTED else u
        tl.store(start + col, tl.sum(weighted, axis=0), mask=col < cols)
        # every program of these tokens holds the same sum of q
        tl.store(start + cols, tl.sum(q, axis=0))
    if WEIGHTED:
        u = tl.sqrt_rn(q)[:, None] * u
    high = u.to(tl.bfloat16)
    low = (u - high.to(tl.float32)).to(tl.bfloat16)
    place = halves + token[:, None] * (2 * cols) + col[None, :]
    written = (token < num_written)[:, None] & (col < cols)[None, :]
    tl.store(place, high, mask=written)
    tl.store(place + cols, low, mask=written)


def launch_weigh_inputs(
    halves: Tensor,
    partial: Tensor | None,
    x: Tensor,
    *,
    token_weight: Tensor | None,
    origin: Tensor | None,
    config: HessianConfig,
) -> LaunchPlan:
    """Write ``halves`` [T', 2C] bf16, and ``partial`` [cdiv(T', tokens), C + 1] f32 unless None; ``x`` [T, C]."""
    tokens, cols = x.shape
    written = halves.shape[0]
    grid = (triton.cdiv(written, config.tokens), triton.cdiv(cols, config.cols))
    with torch.cuda.device_of(x):
        _weigh_inputs_kernel[grid](
            halves,
            halves if partial is None else partial,
            x,
            x.stride(0),
            x if token_weight is None else token_weight,
            x if origin is None else origin,
            tokens,
            written,
            cols,
            WEIGHTED=token_weight is not None,
            MOVED=origin is not None,
            SUMS=partial is not None,
            TOKENS=config.tokens,
            COLS=config.cols,
            num_warps=config.warps,
            enable_fp_fusion=True,
        )
    return LaunchPlan("accumulate_hessian_", "halves", grid[0] * grid[1], 32 * config.warps, str(config))


@triton.jit(do_not_specialize=["num_blocks"])
def _add_sums_kernel(
    total,  # [width] f64, contiguous but for the gap before the last value
    partial,  # [blocks, width] f32
    num_blocks,
    width,
    gap,  # values of total that are left out before its last one
    BLOCKS: tl.constexpr,  # read at once
    COLS: tl.constexpr,  # of a program
):
    # Adds partial, summed over its blocks in f64.
    col = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)  # [COLS]
    block = tl.arange(0, BLOCKS).to(tl.int64)
    place = total + tl.where(col == width - 1, col + gap, col)
    found = tl.load(place, mask=col < width, other=0.0)
    for start in range(0, num_blocks, BLOCKS):
        live = (start + block < num_blocks)[:, None] & (col < width)[None, :]
        part = tl.load(partial + (start + block)[:, None] * width + col[None, :], mask=live, other=0.0)
        found += tl.sum(part.to(tl.float64), axis=0)
    tl.store(place, found, mask=col < width)


def launch_add_sums(total: Tensor, partial: Tensor, *, config: HessianConfig) -> LaunchPlan:
    """Add ``partial`` [blocks, N] f32 to ``total`` f64; where that is longer, its last value is the last of N too."""
    blocks, width = partial.shape
    grid = triton.cdiv(width, config.sum_cols)
    with torch.cuda.device_of(total):
        _add_sums_kernel[(grid,)](
            total,
            partial,
            blocks,
            width,
            total.shape[0] - width,
            BLOCKS=config.sum_blocks,
            COLS=config.sum_cols,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return LaunchPlan("add_sums", "tile", grid, 128, str(config))


@triton.jit(do_not_specialize=["num_parts"])
def _add_products_kernel(
    hessian,  # [C, C] f32, rows contiguous
    row_stride,  # elements from one row of H to the next
    products,  # [parts, strip, width] f32, contiguous: rows of S from column `first` on, then of A if LOW
    num_parts,
    first,  # first row of the strip
    strip,  # rows of the strip
    cols,  # C
    scale,
    LOW: tl.constexpr,
    SIDE: tl.constexpr,  # of a tile; first and full strips are multiples of it
):
    # Adds scale * (S + A + A^T) to the upper triangle, as far as a strip of rows of S and A goes, and mirrors what is
    # complete with it. Where columns are before the strip, A belongs to rows of H above it, transposed; so a tile of H
    # is complete when the later of its two strips comes.
    tile = tl.program_id(0).to(tl.int64)
    top = first + tile * SIDE
    left = tl.program_id(1).to(tl.int64) * SIDE
    above = left < first
    upper = left >= top
    if upper | (above & LOW):
        at = tl.arange(0, SIDE)
        row = tile * SIDE + at  # of the products; [SIDE]
        col = left - first + at  # of S, and of A where that has the strip's own columns
        live = (row < strip)[:, None] & (col < cols - first)[None, :]  # [SIDE, SIDE]
        within = left < first + strip
        other_live = (col < strip)[:, None] & (row < strip)[None, :] & within & upper
        width = cols - first
        if LOW:
            width += cols
        place = row[:, None] * width + col[None, :]
        other = col[:, None] * width + row[None, :]  # the mirrored place, if this strip has it
        base = products
        value = tl.zeros([SIDE, SIDE], dtype=tl.float32)
        for _ in range(num_parts):
            value += tl.load(base + place, mask=live & upper, other=0.0)
            if LOW:
                value += tl.load(base + cols + place, mask=live, other=0.0)
                value += tl.trans(tl.load(base + cols + other, mask=other_live, other=0.0))
            base += strip * width
        if LOW:
            value = tl.where(above, tl.trans(value), value)
        # the tile of H, in its upper triangle
        i = tl.where(above, left, top) + at
        j = tl.where(above, top, left) + at
        row_end = tl.where(above, cols, first + strip)
        col_end = tl.where(above, first + strip, cols)
        live = (i < row_end)[:, None] & (j < col_end)[None, :]
        place = hessian + i[:, None] * row_stride + j[None, :]
        new = tl.load(place, mask=live, other=0.0) + scale * value
        new = tl.where(i[:, None] <= j[None, :], new, tl.trans(new))  # on the diagonal: below it is mirrored as well
        tl.store(place, new, mask=live)
        mirrored = (j < col_end)[:, None] & (i < row_end)[None, :] & (left != top)
        if LOW:
            mirrored = mirrored & (above | within)  # else another strip is still to come
        tl.store(hessian + j[:, None] * row_stride + i[None, :], tl.trans(new), mask=mirrored)


def launch_add_products(
    hessian: Tensor, products: Tensor, *, first: int, low: bool, scale: float, config: HessianConfig
) -> LaunchPlan:
    """Add to ``hessian`` [C, C] f32 what ``products`` [parts, strip, width] f32 hold of rows ``first`` on.

    Strips come in their order. ``width`` is that of S from column ``first`` on, and with ``low`` of A after it.
    """
    cols = hessian.shape[0]
    parts, strip, _ = products.shape
    grid = (triton.cdiv(strip, config.side), triton.cdiv(cols, config.side))
    with torch.cuda.device_of(hessian):
        _add_products_kernel[grid](
            hessian,
            hessian.stride(0),
            products,
            parts,
            first,
            strip,
            cols,
            scale,
            LOW=low,
            SIDE=config.side,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return LaunchPlan("accumulate_hessian_", "products", grid[0] * grid[1], 128, str(config))


def launch_accumulate_hessian(
    hessian: Tensor,
    x: Tensor,
    *,
    token_weight: Tensor | None,
    origin: Tensor | None,
    scale: float,
    input_sum: Tensor | None = None,
    config: HessianConfig | None = None,
) -> LaunchPlan:
    """Add to ``hessian`` [C, C] f32 with contiguous rows, and to ``input_sum`` [C + 1] f64 or longer if it is given.

    The plan is that of the last launch; its path is "inputs" where x itself is multiplied, which then is exact.
    """
    if not x.numel():
        return LaunchPlan("accumulate_hessian_", "empty", 0, 0)
    chosen = hessian_config(config=config)
    cols = x.shape[1]
    low = token_weight is not None or origin is not None or input_sum is not None
    q = None if token_weight is None else token_weight.to(torch.float32).contiguous()
    c = None if origin is None else origin.to(torch.float32).contiguous()
    x = x if x.stride(1) == 1 or cols == 1 else x.contiguous()
    for start in range(0, x.shape[0], chosen.part * chosen.parts):
        part = slice(start, start + chosen.part * chosen.parts)
        tokens = x[part]
        parts, length = chosen.split(tokens.shape[0])
        if low:
            factors = torch.empty(parts * length, 2 * cols, dtype=torch.bfloat16, device=x.device)
            partial = None
            if input_sum is not None:
                blocks = triton.cdiv(parts * length, chosen.tokens)
                partial = torch.empty(blocks, cols + 1, dtype=torch.float32, device=x.device)
            weights = None if q is None else q[part]
            launch_weigh_inputs(factors, partial, tokens, token_weight=weights, origin=c, config=chosen)
            if input_sum is not None and partial is not None:
                launch_add_sums(input_sum, partial, config=chosen)
        else:
            missing = parts * length - tokens.shape[0]
            factors = torch.nn.functional.pad(tokens, (0, 0, 0, missing)) if missing else tokens
        factors = factors.unflatten(0, (parts, length))
        for first in range(0, cols, chosen.strip):
            products = _products(factors[:, :, first : min(first + chosen.strip, cols)], factors[:, :, first:])
            plan = launch_add_products(hessian, products, first=first, low=low, scale=scale, config=chosen)
    return LaunchPlan(plan.op, "halves" if low else "inputs", plan.blocks, plan.threads, plan.config)


def _products(left: Tensor, right: Tensor) -> Tensor:
    """[parts, A, B] f32, ``left^T right`` of each part; [parts, T, A] and [parts, T, B] bf16."""
    if left.is_cuda:
        return torch.bmm(left.mT, right, out_dtype=torch.float32)
    return torch.bmm(left.float().mT, right.float())  # interpreted


def accumulate_hessian_(
    hessian: Tensor, x: Tensor, *, token_weight: Tensor | None, origin: Tensor | None = None, scale: float
) -> Tensor:
    """Add ``scale * sum_t q_t (x_t - c) (x_t - c)^T`` to ``hessian`` [C, C] f32, in place; ``x`` [T, C] bf16."""
    whole = hessian if hessian.stride(1) == 1 else hessian.contiguous()
    launch_accumulate_hessian(whole, x, token_weight=token_weight, origin=origin, scale=scale)
    return hessian if whole is hessian else hessian.copy_(whole)


def accumulate_inputs_(
    hessian: Tensor, input_sum: Tensor, x: Tensor, *, token_weight: Tensor | None, origin: Tensor | None
) -> Tensor:
    """``accumulate_hessian_`` by scale 1, and ``sum_t q_t (x_t - c, 1)`` into ``input_sum`` [C + 1] f64 or longer."""
    launch_accumulate_hessian(hessian, x, token_weight=token_weight, origin=origin, scale=1.0, input_sum=input_sum)
    return hessian


def weigh_tokens_(row_sum: Tensor, dy: Tensor, *, scale: float) -> Tensor:
    """[T] f32, ``sum_r (scale dy_tr)^2`` of ``dy`` [T, R]; the same summed over t is added to ``row_sum`` [R] f64."""
    config = hessian_config()
    rows = dy if dy.stride(1) == 1 or dy.shape[1] == 1 else dy.contiguous()
    if not dy.numel():
        return torch.zeros(dy.shape[0], dtype=torch.float32, device=dy.device)
    token_weight = torch.empty(dy.shape[0], dtype=torch.float32, device=dy.device)
    blocks = triton.cdiv(dy.shape[0], config.tokens)
    partial = torch.empty(blocks, dy.shape[1], dtype=torch.float32, device=dy.device)
    launch_square_tokens(token_weight, partial, rows, scale=scale, config=config)
    launch_add_sums(row_sum, partial, config=config)
    return token_weight
