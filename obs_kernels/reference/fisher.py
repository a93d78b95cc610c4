# SPDX-License-Identifier: Apache-2.0
"""Block Fisher accumulation and batched inverse in plain torch: the oracle of every backend, and the path on a CPU.

The empirical block Fisher is ``F_b = damp * I + 1/S sum_s g_s g_s^T`` over slices g_s of D consecutive weights (oBERT,
Kurtic et al. 2022, eq. 5). F is accumulated and inverted once, instead of updating F^-1 rank by rank
(Sherman-Morrison): order-free, additive over ranks, and damp may change after collection.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_BYTES = 128 << 20
"""Working memory that one step of a chunked op may take."""


def chunks(total: int, bytes_each: int, device: torch.device | None = None) -> Iterator[slice]:
    """Slices over ``total`` items so that one slice stays below ``CHUNK_BYTES``, 16 times that on a GPU."""
    limit = CHUNK_BYTES * (16 if device is not None and device.type == "cuda" else 1)
    step = max(1, limit // max(1, bytes_each))
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def accumulate_fisher_(fisher: Tensor, grads: Tensor, *, scale: float) -> Tensor:
    """Add ``scale * sum_s g_s g_s^T`` to every block of ``fisher`` [B, D, D], in place; ``grads`` is [S, B * D]."""
    num_blocks, size, _ = fisher.shape
    blocks = grads.unflatten(1, (num_blocks, size)) if num_blocks else grads.new_zeros(grads.shape[0], 0, size)
    for part in chunks(num_blocks, 3 * grads.shape[0] * size * fisher.element_size()):
        g = blocks[:, part].to(fisher.dtype).transpose(0, 1)  # [b, S, D]
        fisher[part].baddbmm_(g.mT, g, alpha=scale)
    return fisher


def invert_spd(matrices: Tensor, *, damp: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of ``matrices + damp * I`` by Cholesky, [B, D, D], and ``info`` [B] int32: 0, or the failing pivot
    (1-based).

    ``damp`` is one value or [B]. A block that is not positive definite comes out as zeros, the others right.
    """
    inverse = torch.empty_like(matrices, memory_format=torch.contiguous_format)
    info = torch.zeros(matrices.shape[0], dtype=torch.int32, device=matrices.device)
    for part in chunks(matrices.shape[0], 4 * matrices[:1].numel() * matrices.element_size()):
        factor, info[part] = factor_spd(add_damp(matrices[part], damp if damp.numel() == 1 else damp[part]))
        result = torch.cholesky_inverse(factor)
        inverse[part] = torch.where((info[part] == 0)[:, None, None], 0.5 * (result + result.mT), 0.0)
    return inverse, info


def add_damp(matrices: Tensor, damp: Tensor) -> Tensor:
    """A copy of ``matrices`` [B, D, D] with ``damp`` (one value or [B]) added to each diagonal."""
    out = matrices.clone(memory_format=torch.contiguous_format)
    out.diagonal(dim1=1, dim2=2).add_(damp.to(out.dtype).reshape(-1, 1))
    return out


def factor_spd(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factors and ``info`` [B] int32; a failed block has info > 0 and the identity as its factor.

    ``cholesky_ex`` may report success with a non-finite factor, so both are checked.
    """
    if matrices.numel() == 0:
        return matrices.clone(), torch.zeros(matrices.shape[0], dtype=torch.int32, device=matrices.device)
    factor, info = torch.linalg.cholesky_ex(matrices)
    # only the lower triangle is read by the factorisation
    bad_row = ~torch.isfinite(matrices).all(2)
    info = torch.where(bad_row.any(1), (bad_row.int().argmax(1) + 1).to(info.dtype), info)
    diagonal = factor.diagonal(dim1=1, dim2=2)
    bad_pivot = ~(torch.isfinite(diagonal) & (diagonal > 0))
    first_bad = (bad_pivot.int().argmax(1) + 1).to(info.dtype)
    info = torch.where((info == 0) & bad_pivot.any(1), first_bad, info)
    info = torch.where((info == 0) & ~torch.isfinite(factor).all(2).all(1), matrices.shape[1], info).to(torch.int32)
    identity = torch.eye(matrices.shape[1], dtype=matrices.dtype, device=matrices.device)
    return torch.where((info == 0)[:, None, None], factor, identity), info
