# SPDX-License-Identifier: Apache-2.0
"""SparseGPT as published (Frantar and Alistarh 2023), as a peer: one column at a time, masks by a score.

With U the upper factor of ``H^-1 = U^T U``: the score of an entry is ``w^2 / U_jj^2`` on the weights compensated so
far. For n:m the n largest of each group stay, chosen when its first column is reached; unstructured, a threshold over
all rows of a block of columns decides, when its first column is reached. A settled column j leaves
``e = (w_j - q_j) / U_jj`` and the later ones take ``w -= e U_j``. Losses of the columns, ``1/2 e^2``, add up to that of
the row. Kept weights of a group are not solved jointly: what ``sweep.sweep_groups`` does beyond this.

Differences from the published code: the count of an unstructured block is ``floor(s N + 1/2)`` and ties go to the lower
index, as everywhere here; for n:m the block is a multiple of m.
"""

from __future__ import annotations

import torch
from torch import Tensor

from obs_kernels.checks import check_damp_values, check_finite
from obs_kernels.patterns import NMPattern, Pattern, parse_pattern
from obs_kernels.reference.blocks import compute_dtype
from obs_kernels.reference.hessian import damp_hessian, upper_factor
from obs_kernels.reference.precision import exact_products
from obs_kernels.reference.search import as_mask
from obs_kernels.reference.threshold import prune_count, select_lowest


@exact_products()
def sparsegpt(
    weight: Tensor, hessian: Tensor, pattern: str, *, damp: Tensor, mask: Tensor | None, block: int = 128
) -> tuple[Tensor, Tensor, Tensor]:
    """Mask [R, C], new weight [R, C] and loss a group [R, C/m], unstructured a block [R, ceil(C/block)].

    Arguments as in ``ops.sweep_rows``; ``block`` columns pass their errors on in one product.
    """
    check_finite("weight", weight)
    check_finite("hessian", hessian)
    check_damp_values(damp)
    dtype = compute_dtype(weight, hessian)
    live = weight.to(dtype) if mask is None else weight.to(dtype).masked_fill(~mask, 0.0)
    live, shared = without_dead_inputs(live, hessian.to(dtype))
    factor = upper_factor(damp_hessian(shared, damp, dtype))
    kept, new, loss = sweep_columns(live, factor, parse_pattern(pattern), mask, block)
    return kept, new.to(weight.dtype), loss


def without_dead_inputs(weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Copies with weight 0 and diagonal 1 at inputs that were always zero (H_jj = 0): their weights act on nothing."""
    dead = hessian.diagonal() == 0
    hessian = hessian.clone()
    hessian.diagonal().masked_fill_(dead, 1.0)
    return weight.masked_fill(dead, 0.0), hessian


def sweep_columns(
    live: Tensor, factor: Tensor, pattern: Pattern, alive: Tensor | None, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Kept [R, C], weights [R, C] and loss a group or block of the sweep of ``live`` with ``factor`` R, U = R^-1."""
    rows, cols = live.shape
    m = pattern.m if isinstance(pattern, NMPattern) else 0
    width = max(1, block // m) * m if m else block
    upper = torch.linalg.solve_triangular(factor, torch.eye(cols, dtype=live.dtype, device=live.device), upper=True)
    pivots = upper.diagonal()
    now = live.clone(memory_format=torch.contiguous_format)
    kept = torch.zeros(rows, cols, dtype=torch.bool, device=live.device)
    errors = torch.zeros_like(live)
    for start in range(0, cols, width):
        stop = min(start + width, cols)
        inner = now[:, start:stop]  # a view: the sweep goes on in place
        for column in range(start, stop):
            if column == start if not m else column % m == 0:
                span = slice(column, column + m if m else stop)
                score = (now[:, span] / pivots[span]).square()
                kept[:, span] = _keep_by_score(score, None if alive is None else alive[:, span], pattern)
            old = now[:, column].clone()
            now[:, column].masked_fill_(~kept[:, column], 0.0)
            errors[:, column] = (old - now[:, column]) / pivots[column]
            inner[:, column + 1 - start :].addr_(errors[:, column], upper[column, column + 1 : stop], alpha=-1.0)
        now[:, stop:].addmm_(errors[:, start:stop], upper[start:stop, stop:], alpha=-1.0)
    length = m or block
    loss = 0.5 * torch.nn.functional.pad(errors.square(), (0, -cols % length)).unflatten(1, (-1, length)).sum(2)
    return kept, now, loss


def _keep_by_score(score: Tensor, alive: Tensor | None, pattern: Pattern) -> Tensor:
    """[R, k] bool; dead entries are pruned first, and all of them."""
    if alive is not None:
        score = score.masked_fill(~alive, -1.0)
    if isinstance(pattern, NMPattern):
        best = score.sort(dim=1, descending=True, stable=True).indices[:, : pattern.n]
        kept = as_mask(best, score.shape[1])
    else:
        count = prune_count(pattern.sparsity, score.numel())
        kept = ~select_lowest(score.flatten(), count).view(score.shape)
    return kept if alive is None else kept & alive
