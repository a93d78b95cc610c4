# SPDX-License-Identifier: Apache-2.0
"""Accumulation of the block Fisher: one pass over F, one read of the gradients, products on tensor cores.

Every Fisher block is G^T G of its own slice of the gradients, a product with S as the inner dimension. Blocks smaller
than a tensor-core tile share one: the tile computes all products between them, and only those on its diagonal are kept.
The wasted products are free, since the bytes of F and of the gradients decide.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from obs_kernels.launch_plan import LaunchPlan
from obs_kernels.triton_kernels.tuning import FisherConfig, fisher_config, slot_width

__all__ = ["accumulate_fisher_", "launch_accumulate_fisher"]


@triton.jit
def _load_gradients(
    grads,  # [S, B * D]
    row_stride,
    sample,  # [SAMPLES] int64
    num_samples,
    unit,  # [TILES] int64
    first,  # first column of the tile inside its Fisher block
    num_blocks,
    D: tl.constexpr,
    SLOT: tl.constexpr,
    SIDE: tl.constexpr,
    PACK: tl.constexpr,
):
    # [SAMPLES, TILES, SIDE]: the slice of each sample that a tile needs; zeros outside
    at = tl.arange(0, SIDE)
    block = unit[:, None] * PACK + (at // SLOT)[None, :]  # [TILES, SIDE]
    inside = first + at % SLOT
    if SLOT == D:
        column = unit[:, None] * (PACK * D) + (first + at)[None, :]  # neighbours in memory, and Triton sees it
    else:
        column = block * D + inside[None, :]
    live = (block < num_blocks) & (inside < D)[None, :]
    return tl.load(
        grads + sample[:, None, None] * row_stride + column[None, :, :],
        mask=(sample < num_samples)[:, None, None] & live[None, :, :],
        other=0.0,
    )


@triton.jit
def _accumulate_fisher_kernel(
    fisher,  # [B, D, D] f32, contiguous
    grads,  # [S, B * D] f32, bf16 or f16, rows contiguous
    row_stride,  # elements from one gradient to the next
    num_blocks,  # B
    num_samples,  # S
    scale,
    D: tl.constexpr,
    SLOT: tl.constexpr,  # D rounded up to a power of two
    SIDE: tl.constexpr,  # of a tile
    PACK: tl.constexpr,  # Fisher blocks on the diagonal of a tile
    PARTS: tl.constexpr,  # tiles along one side of a Fisher block
    TILES: tl.constexpr,  # tiles of a program
    SAMPLES: tl.constexpr,  # gradients of one product
    PRECISION: tl.constexpr,
):
    # Adds scale * G^T G to part (i, j) of the Fisher blocks of TILES neighbouring units (PACK blocks each).
    tl.static_assert(PACK == 1 or PARTS == 1, "launcher promised one tile a block, or several blocks a tile")
    program = tl.program_id(0).to(tl.int64)
    part = (program % (PARTS * PARTS)).to(tl.int32)  # parts of a block run side by side: its gradients stay in L2
    unit = program // (PARTS * PARTS) * TILES + tl.arange(0, TILES)
    first_i = part // PARTS * SIDE
    first_j = part % PARTS * SIDE

    # F is asked for first: its bytes and those of the gradients are in flight together
    at = tl.arange(0, SIDE)
    slot = at // SLOT
    inside_i = first_i + at % SLOT
    inside_j = first_j + at % SLOT
    block = unit[:, None] * PACK + slot[None, :]  # [TILES, SIDE]
    live_i = (block < num_blocks) & (inside_i < D)[None, :]
    live = live_i[:, :, None] & ((slot[:, None] == slot[None, :]) & (inside_j < D)[None, :])[None, :, :]
    # [TILES, SIDE, SIDE]
    place = fisher + (block * (D * D) + (inside_i * D)[None, :])[:, :, None] + inside_j[None, None, :]
    old = tl.load(place, mask=live, other=0.0)

    total = tl.zeros([TILES, SIDE, SIDE], dtype=tl.float32)
    for start in range(0, num_samples, SAMPLES):
        sample = start + tl.arange(0, SAMPLES).to(tl.int64)
        g_i = _load_gradients(
            grads, row_stride, sample, num_samples, unit, first_i, num_blocks, D, SLOT, SIDE, PACK
        )  # [SAMPLES, TILES, SIDE]
        if PARTS == 1:
            g_j = g_i
        else:
            g_j = _load_gradients(
                grads, row_stride, sample, num_samples, unit, first_j, num_blocks, D, SLOT, SIDE, PACK
            )
        if TILES == 1:
            left = tl.reshape(g_i, [SAMPLES, SIDE])
            right = tl.reshape(g_j, [SAMPLES, SIDE])
            product = tl.dot(tl.trans(left), right, input_precision=PRECISION)
            total += tl.reshape(product, [TILES, SIDE, SIDE])
        else:
            left = tl.permute(g_i, [1, 2, 0])
            right = tl.permute(g_j, [1, 0, 2])
            total += tl.dot(left, right, input_precision=PRECISION)
    tl.store(place, old + scale * total, mask=live)


def launch_accumulate_fisher(
    fisher: Tensor, grads: Tensor, *, scale: float, config: FisherConfig | None = None
) -> LaunchPlan:
    """Add to ``fisher`` [B, D, D] f32, contiguous; ``grads`` [S, B * D] has contiguous rows, any row stride."""
    num_blocks, size, _ = fisher.shape
    num_samples = grads.shape[0]
    if not num_blocks or not num_samples or not size:
        return LaunchPlan("accumulate_fisher_", "empty", 0, 0)
    chosen = fisher_config(size, num_samples, config=config)
    slot = slot_width(size)
    pack = max(1, chosen.side // slot)
    parts = max(1, slot // chosen.side)
    units = triton.cdiv(num_blocks, pack)
    grid = triton.cdiv(units, chosen.tiles) * parts * parts
    with torch.cuda.device_of(fisher):
        _accumulate_fisher_kernel[(grid,)](
            fisher,
            grads,
            grads.stride(0),
            num_blocks,
            num_samples,
            scale,
            D=size,
            SLOT=slot,
            SIDE=chosen.side,
            PACK=pack,
            PARTS=parts,
            TILES=chosen.tiles,
            SAMPLES=chosen.samples,
            PRECISION=chosen.precision,
            num_warps=chosen.warps,
            num_stages=chosen.stages,
            enable_fp_fusion=True,  # a fused multiply-add rounds once less, and a default may change
        )
    path = "packed" if pack > 1 else "parts" if parts > 1 else "tile"
    return LaunchPlan("accumulate_fisher_", path, grid, 32 * chosen.warps, str(chosen))


def accumulate_fisher_(fisher: Tensor, grads: Tensor, *, scale: float) -> Tensor:
    """Add ``scale * sum_s g_s g_s^T`` to every block of ``fisher`` [B, D, D] f32, in place; ``grads`` is [S, B * D]."""
    rows = grads if grads.stride(1) == 1 or grads.shape[1] <= 1 else grads.contiguous()
    if fisher.is_contiguous():
        launch_accumulate_fisher(fisher, rows, scale=scale)
    else:
        whole = fisher.contiguous()
        launch_accumulate_fisher(whole, rows, scale=scale)
        fisher.copy_(whole)
    return fisher
