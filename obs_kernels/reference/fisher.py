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
CACHE_BYTES = 2 << 20
"""The same where a step passes over its data several times and gains from finding it in the cache."""
SWEEP_SIZE = 16
"""Largest D that ``invert_spd`` sweeps: LAPACK spends more on a call than on such a block. On one core the sweep
took 0.25 of the time of Cholesky at D = 4, 0.6 at D = 16, and 1.0 at D = 32."""


def chunks(
    total: int, bytes_each: int, device: torch.device | None = None, *, limit: int | None = None
) -> Iterator[slice]:
    """Slices over ``total`` items so that one slice stays below ``limit`` (``CHUNK_BYTES``), 16 times that on a GPU."""
    most = (CHUNK_BYTES if limit is None else limit) * (16 if device is not None and device.type == "cuda" else 1)
    step = max(1, most // max(1, bytes_each))
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def accumulate_fisher_(fisher: Tensor, grads: Tensor, *, scale: float) -> Tensor:
    """Add ``scale * sum_s g_s g_s^T`` to every block of ``fisher`` [B, D, D], in place; ``grads`` is [S, B * D]."""
    num_blocks, size, _ = fisher.shape
    samples = grads.shape[0]
    blocks = grads.unflatten(1, (num_blocks, size)) if num_blocks else grads.new_zeros(samples, 0, size)
    # Another dtype is cast chunk by chunk, and the product finds the copy in the cache; else nothing is copied.
    limit = CHUNK_BYTES if grads.dtype == fisher.dtype else CACHE_BYTES
    for part in chunks(num_blocks, 2 * samples * size * fisher.element_size(), fisher.device, limit=limit):
        g = blocks[:, part].to(fisher.dtype).transpose(0, 1)  # [b, S, D]
        if samples == 1:  # the batched product takes up to 6 times as long for it
            fisher[part].addcmul_(g.mT, g, value=scale)
        else:
            fisher[part].baddbmm_(g.mT, g, alpha=scale)
    return fisher


def invert_spd(matrices: Tensor, *, damp: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of ``matrices + damp * I``, [B, D, D], and ``info`` [B] int32: 0, or the failing pivot (1-based).

    By sweeps up to ``SWEEP_SIZE``, else by Cholesky. ``matrices`` must be symmetric, ``damp`` is one value or [B]. A
    block that is not positive definite comes out as zeros, the others right; the result is exactly symmetric.
    """
    inverse = torch.empty_like(matrices, memory_format=torch.contiguous_format)
    info = torch.zeros(matrices.shape[0], dtype=torch.int32, device=matrices.device)
    size = matrices.shape[1]
    bytes_each = size * size * matrices.element_size()
    invert = _invert_by_sweeps if size <= SWEEP_SIZE else _invert_by_cholesky
    for part in chunks(matrices.shape[0], bytes_each, matrices.device, limit=CACHE_BYTES):
        invert(matrices[part], damp if damp.numel() == 1 else damp[part], inverse[part], info[part])
    return inverse, info


def _invert_by_sweeps(matrices: Tensor, damp: Tensor, inverse: Tensor, info: Tensor) -> None:
    """``invert_spd`` of ``matrices`` [b, D, D] into ``inverse`` and ``info``, by D sweeps over all b at once.

    A sweep of pivot p = a_kk > 0 (Gauss-Jordan of a symmetric matrix; Beaton 1964) is
    ``a_ij -= a_ik a_kj / p``, then ``a_ik = a_ki = a_ik / p`` and ``a_kk = -1 / p``; after D of them a is the inverse,
    negated. Its pivots are the squares of Cholesky's.
    """
    count, size, _ = matrices.shape
    # Always a copy: for b = 1 the transpose alone counts as contiguous and would be the caller's memory.
    a = matrices.reshape(count, size * size).t().clone(memory_format=torch.contiguous_format).view(size, size, count)
    diagonal = a.diagonal()  # [b, D]
    diagonal.add_(damp.to(a.dtype).reshape(-1, 1))
    finite = torch.isfinite(a.amax((0, 1))) & torch.isfinite(a.amin((0, 1)))
    pivots = a.new_empty(size, count)
    for k in range(size):
        pivot = pivots[k].copy_(a[k, k])
        root = pivot.rsqrt()
        row = a[k] * root
        a.addcmul_(row[:, None], row, value=-1)
        row *= root
        a[k] = row
        a[:, k] = row
        a[k, k] = -1 / pivot
    for k in range(size - 1):  # a vector register and the tail of its loop may round a_ij and a_ji differently
        a[k, k + 1 :] = a[k + 1 :, k]
    # Diagonals, now negative, tell of any overflow: each subtracted |row_i row_j| is at most row_i^2 or row_j^2.
    finite &= torch.isfinite(diagonal.amin(1))
    info.copy_(_first_bad_pivot(pivots.t(), finite))
    a.neg_().masked_fill_(info != 0, 0.0)
    inverse.view(count, size * size).copy_(a.view(size * size, count).t())


def _invert_by_cholesky(matrices: Tensor, damp: Tensor, inverse: Tensor, info: Tensor) -> None:
    """``invert_spd`` of ``matrices`` [b, D, D] into ``inverse`` and ``info``."""
    factor, failed = factor_spd(add_damp(matrices, damp))
    result = torch.cholesky_inverse(factor)
    finite = torch.isfinite(result.diagonal(dim1=1, dim2=2)).all(1)  # the inverse of 1e-39 is no float32
    info.copy_(torch.where((failed == 0) & ~finite, matrices.shape[1], failed))
    result.mul_(0.5).masked_fill_((info != 0)[:, None, None], 0.0)
    torch.add(result, result.mT, out=inverse)  # exactly symmetric, also where cholesky_inverse is not


def add_damp(matrices: Tensor, damp: Tensor) -> Tensor:
    """A copy of ``matrices`` [B, D, D] with ``damp`` (one value or [B]) added to each diagonal."""
    out = matrices.clone(memory_format=torch.contiguous_format)
    out.diagonal(dim1=1, dim2=2).add_(damp.to(out.dtype).reshape(-1, 1))
    return out


def factor_spd(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factors and ``info`` [B] int32; a failed block has info > 0 and the identity as its factor.

    ``cholesky_ex`` reads one triangle and may report success with a non-finite factor, so all entries of ``matrices``
    are checked, and the pivots: a non-finite entry in row i of the factor makes pivot i fail.
    """
    count, size, _ = matrices.shape
    if matrices.numel() == 0:
        return matrices.clone(), torch.zeros(count, dtype=torch.int32, device=matrices.device)
    factor, info = torch.linalg.cholesky_ex(matrices)
    finite = rows_finite(matrices.reshape(count, size * size))
    diagonal = factor.diagonal(dim1=1, dim2=2)
    info = torch.where(info == 0, _first_bad_pivot(diagonal, finite), info.to(torch.int32))
    failed = info != 0
    factor.masked_fill_(failed[:, None, None], 0.0)
    diagonal.masked_fill_(failed[:, None], 1.0)
    return factor, info


def rows_finite(values: Tensor) -> Tensor:
    """[b]: whether a row of ``values`` [b, N] holds no NaN or Inf; no mask of that size is made."""
    if not values.numel():
        return torch.ones(values.shape[0], dtype=torch.bool, device=values.device)
    return torch.isfinite(values.amax(1)) & torch.isfinite(values.amin(1))


def _first_bad_pivot(pivots: Tensor, finite: Tensor) -> Tensor:
    """``info`` [B] int32: the first of ``pivots`` [B, D] that is not positive and finite, else D if not ``finite``."""
    size = pivots.shape[1]
    good = (pivots > 0) & (pivots < torch.inf)
    place = torch.arange(1, size + 1, dtype=torch.int32, device=pivots.device)
    first = torch.where(good, size + 1, place).amin(1)  # argmax of a mask is several times slower
    return torch.where(first <= size, first, torch.where(finite, 0, size).to(torch.int32))
