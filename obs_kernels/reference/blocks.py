# SPDX-License-Identifier: Apache-2.0
"""Fisher blocks as the search and the update see them: dead entries out, damped, factorised, cut into groups.

Rows and columns of dead entries leave the matrix before damping and conditioning, so results do not depend on whether
gradients were masked. A dead entry becomes decoupled: diagonal 1, weight 0, no gain and no coupling.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from obs_kernels.checks import check_info
from obs_kernels.reference.fisher import add_damp, factor_spd, rows_finite

WEIGHT_NOT_FINITE, FISHER_NOT_FINITE, DAMP_NOT_VALID = -1, -2, -3
"""``info`` of a block with such values, as the kernels have it; the first one counts."""


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Arithmetic is f64 if any argument is, else f32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def weight_blocks(values: Tensor, num_blocks: int, size: int) -> Tensor:
    """``values`` of any shape, flattened row-major, as [B, D]; the tail block is padded with zeros (False)."""
    flat = values.reshape(-1)
    return F.pad(flat, (0, num_blocks * size - flat.numel())).view(num_blocks, size)


def damp_blocks(fisher: Tensor, alive: Tensor, damp: Tensor, dtype: torch.dtype) -> Tensor:
    """``fisher`` [b, D, D] in ``dtype``, damped, with dead entries (``alive`` [b, D] False) decoupled: diagonal 1."""
    return decouple_(add_damp(fisher.to(dtype), damp), ~alive)


def decouple_(f: Tensor, dead: Tensor) -> Tensor:
    """``f`` [b, D, D] with rows and columns of ``dead`` [b, D] those of the identity, in place."""
    f.masked_fill_(dead[:, :, None] | dead[:, None, :], 0.0)
    f.diagonal(dim1=1, dim2=2).masked_fill_(dead, 1.0)
    return f


def solve_kept(kept: Tensor, rhs: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Solution [b, K] of ``kept`` [b, K, K] for ``rhs`` [b, K], zero where not ``valid`` [b, K], and ``info`` [b].

    For kept sets of different size, filled up to the widest with entries that are not valid. ``kept`` is overwritten; a
    block with ``info`` has ``rhs`` for a solution.
    """
    factor, info = factor_spd(decouple_(kept, ~valid))
    solved = torch.cholesky_solve(rhs.masked_fill(~valid, 0.0)[:, :, None], factor)[:, :, 0]
    return solved.masked_fill(~valid, 0.0), info


def factor_or_raise(matrices: Tensor, what: str, offset: int = 0) -> Tensor:
    """Cholesky factors, or ``SingularBlockError`` naming the first block that is not positive definite."""
    factor, info = factor_spd(matrices)
    check_info(what, info, offset)
    return factor


def find_bad_blocks(weight: Tensor, fisher: Tensor, damp: Tensor, damped: Tensor) -> Tensor:
    """``info`` [b] int32: 0, the failing pivot (1-based) of ``damped`` [b, D, D], or a negative code for bad values.

    ``weight`` [b, D] and ``fisher`` [b, D, D] count as a whole, dead entries too.
    """
    info = factor_spd(damped)[1]
    info.masked_fill_(~((damp >= 0) & torch.isfinite(damp)), DAMP_NOT_VALID)
    info.masked_fill_(~rows_finite(fisher.reshape(fisher.shape[0], -1)), FISHER_NOT_FINITE)
    return info.masked_fill_(~rows_finite(weight), WEIGHT_NOT_FINITE)


@dataclass(frozen=True)
class Groups:
    """Groups of m weights of a chunk of blocks, ready for the choice (math: complement identity).

    ``curvature`` [N, m, m]: F' = [(F^-1)_GG]^-1, the curvature with the rest of the block re-optimised (F itself for
    D = m), divided by ``scale``. ``linear`` [N, m]: u = F' w, likewise. ``weight`` [N, m]; ``alive`` [N, m].
    ``scale`` [N]: a power of two a block, which brings its largest diagonal to 1/2 .. 1. Gains are of the third order
    in F and would underflow in f32 below F = 1e-13; a power of two changes no bit otherwise.
    """

    curvature: Tensor
    linear: Tensor
    weight: Tensor
    alive: Tensor
    scale: Tensor

    def take(self, index: Tensor) -> Groups:
        """The groups restricted to the positions ``index`` [N, L], in that order; the rest counts as pruned."""
        length, m = index.shape[1], self.alive.shape[1]
        if length == m and bool((index == torch.arange(m, device=index.device)).all()):
            return self
        rows = self.curvature.gather(1, index[:, :, None].expand(-1, -1, m))
        return Groups(
            rows.gather(2, index[:, None].expand(-1, length, -1)),
            self.linear.gather(1, index),
            self.weight.gather(1, index),
            self.alive.gather(1, index),
            self.scale,
        )


def condition_groups(
    weight: Tensor,
    fisher: Tensor,
    alive: Tensor,
    damp: Tensor,
    m: int,
    offset: int = 0,
    info: Tensor | None = None,
) -> tuple[Groups, Tensor | None]:
    """Cut blocks (``weight``, ``alive`` [b, D]; ``fisher`` [b, D, D]) into groups of m with their conditional
    curvature.

    Also returns F^-1 of the groups [N, m, m] (None for D = m, where it is not needed). With ``info`` [b], for D = m
    only, a bad block is reported there instead of raised, as ``find_bad_blocks`` says, and all of it is dead.
    """
    size = fisher.shape[1]
    dtype = compute_dtype(weight, fisher)
    f = damp_blocks(fisher, alive, damp, dtype)
    if info is not None:
        info.copy_(find_bad_blocks(weight, fisher, damp, f))
        alive = alive & (info == 0)[:, None]
        decouple_(f, ~alive)
    w = weight.to(dtype).masked_fill(~alive, 0.0).view(-1, m)
    live = alive.reshape(-1, m)
    if size == m:
        if info is None:
            factor_or_raise(f, "fisher", offset)
        return _scaled_groups(f, w, live, w.new_ones(w.shape[0])), None
    f, unit = rescale(f, alive)
    factor = factor_or_raise(f, "fisher", offset)
    finv = torch.cholesky_inverse(factor).view(-1, size // m, m, size // m, m)
    finv_groups = finv.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(-1, m, m).contiguous()
    curvature = torch.cholesky_inverse(factor_or_raise(finv_groups, "inverse fisher of a group", offset))
    unit = unit.repeat_interleave(size // m)
    groups = _scaled_groups(curvature, w, live, unit)
    return groups, finv_groups * (groups.scale / unit)[:, None, None]


def plain_groups(weight: Tensor, alive: Tensor, m: int, dtype: torch.dtype) -> Groups:
    """Groups without curvature (the identity), for methods that look at single weights only."""
    w = weight.to(dtype).masked_fill(~alive, 0.0).view(-1, m)
    identity = torch.eye(m, dtype=dtype, device=w.device).expand(w.shape[0], m, m)
    return Groups(identity, w, w, alive.reshape(-1, m), w.new_ones(w.shape[0]))


def pair_model(groups: Groups, finv_groups: Tensor | None) -> Groups:
    """The pairwise model: F' replaced by the block-diagonal matrix of A_j^-1, A_j the 2 x 2 diagonal blocks of F^-1."""
    if finv_groups is None:
        finv_groups = torch.cholesky_inverse(factor_or_raise(groups.curvature, "fisher"))
    count, m, _ = finv_groups.shape
    a = finv_groups.view(count, m // 2, 2, m // 2, 2).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)  # [N, m/2, 2, 2]
    det = a[..., 0, 0] * a[..., 1, 1] - a[..., 0, 1] * a[..., 1, 0]
    inverse = torch.stack([a[..., 1, 1], -a[..., 0, 1], -a[..., 1, 0], a[..., 0, 0]], -1) / det[..., None]
    curvature = torch.zeros_like(finv_groups)
    curvature.view(count, m // 2, 2, m // 2, 2).diagonal(dim1=1, dim2=3).copy_(
        inverse.view(count, -1, 2, 2).permute(0, 2, 3, 1)
    )
    return Groups(
        curvature, (curvature @ groups.weight[:, :, None])[:, :, 0], groups.weight, groups.alive, groups.scale
    )


def _scaled_groups(curvature: Tensor, weight: Tensor, alive: Tensor, unit: Tensor) -> Groups:
    curvature, own = rescale(curvature, alive)
    return Groups(curvature, (curvature @ weight[:, :, None])[:, :, 0], weight, alive, unit * own)


def rescale(f: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    """``f`` [b, D, D] over a power of four a block near its largest live diagonal, and those powers [b].

    Of four, because the square roots of a factorisation then scale by a power of two. Dead diagonals stay 1.
    """
    top = f.diagonal(dim1=1, dim2=2).masked_fill(~alive, 0.0).amax(1)
    exponent = torch.where((top > 0) & torch.isfinite(top), torch.frexp(top).exponent, 0)
    unit = torch.ldexp(torch.ones_like(top), exponent - exponent % 2)
    f = f / unit[:, None, None]
    f.diagonal(dim1=1, dim2=2).masked_fill_(~alive, 1.0)
    return f, unit
