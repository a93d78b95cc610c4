# SPDX-License-Identifier: Apache-2.0
"""Tolerances of the tests, each with its reason. Measured on the reference backend, then tightened."""

from __future__ import annotations

import torch

EPS32 = torch.finfo(torch.float32).eps
EPS64 = torch.finfo(torch.float64).eps

EXAMPLE_F32 = 1e-5
"""Relative; worked numbers of math.md in f32 (its section 13)."""
EXAMPLE_F64 = 1e-6
"""Absolute; the worked numbers are printed with six decimals."""

FISHER_RMS_PER_SQRT_SAMPLE = 1e-6
"""RMS error / RMS reference, times sqrt(S): S rounded products are summed in f32."""
FISHER_RMS_F64 = 1e-14
"""The same in f64, where 1e-16 was measured."""

INVERSE_RESIDUAL = 2.0
"""max |F finv - I| <= this * sqrt(D) * eps * cond(F): single entries mean little if ill-conditioned. Measured without
sqrt(D): 1.4 at D = 1 (a root, a quotient, two products), 0.3 to 0.7 at D = 4 to 50; tighter than c * D * eps * cond."""
INVERSE_RESIDUAL_MOST = 6.0
"""What the factor before eps * cond(F) need not exceed at any D; at condition 1e6 the bound is then 0.72, and zeros for
an inverse would give 1. Measured on 100003 blocks of that condition: sweeps 2.8 at D = 7 to 16 and less beyond,
Cholesky 0.9;
sweeps of D = 100 and 128 on a GPU 4.2 at condition 1."""


def inverse_residual(size: int, eps: float) -> float:
    """Bound on ``max |F finv - I| / cond(F)`` of blocks of ``size``."""
    return min(INVERSE_RESIDUAL * size**0.5, INVERSE_RESIDUAL_MOST) * eps


SEARCH_LOSS_EQUAL_BLOCK = 1e-4
"""Relative excess of the chosen loss over the f64 optimum for D = m: near-ties may fall either way."""
SEARCH_LOSS_CONDITIONAL = 1e-3
"""The same for D > m, where two f32 inversions stand before the choice."""
SEARCH_GAP_F64 = 1e-9
"""In f64 the set must be the optimum's unless the runner-up is closer than this (relative)."""

SALIENCY_EQUAL_BLOCK = 1e-4
"""Relative; reported saliency (f32) against the f64 loss of the same set, D = m (math.md 13: 4e-5 at condition 6e5)."""
SALIENCY_CONDITIONAL = 2e-3
"""The same for D > m (math.md 13, condition <= 1e6)."""
SALIENCY_F64 = 1e-9
"""Relative; f64 against the definition by another route, well-conditioned blocks."""

UPDATE_RMS_F32 = 2e-5
"""RMS error / RMS weight of an f32 update against the f64 solve, condition <= 1e3; measured 1e-6."""
UPDATE_F64 = 1e-9
"""Relative; an f64 update against the f64 constrained minimiser."""

SWEEP_IDENTITY = {torch.float32: 2e-5, torch.float64: 1e-12}
"""Relative; saliency of a sweep, summed over the groups, against the loss of its weights in f64."""

MATMUL_SUM = 2.0
"""Absolute error <= this * sqrt(cols) * eps32 * (|x| |W|' + |b|) + half an ulp of y: f32 sums, rounded once."""


def output_rounding(dtype: torch.dtype) -> float:
    """Relative rounding of one result stored in ``dtype``."""
    return 0.5 * torch.finfo(dtype).eps


HESSIAN_HALVES = 2e-5
"""RMS error / RMS reference of products of bf16 halves on a GPU: 16 bits of each factor, and what tensor cores cut off
in sums of 8,192 tokens."""
HESSIAN_HALVES_CUT = 4e-5
"""The same in Triton's interpreter, which cuts bf16 off instead of rounding it; 2.5e-5 was measured. Without the lower
halves it would be 4e-3."""
TOKEN_SUMS = 1e-6
"""Relative to the sum of magnitudes; f32 sums of 32 tokens, added in f64."""
