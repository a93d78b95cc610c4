# SPDX-License-Identifier: Apache-2.0
"""x token-major to feature-major, and whether products that share it gain by that."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from obs_kernels import _ext
from obs_kernels.checks import PIECE
from obs_kernels.cuda_calls.matmul import as_gathered
from obs_kernels.cuda_calls.wgmma import TYPES
from obs_kernels.patterns import NMPattern, VNMPattern


def feature_major(x: Tensor) -> Tensor:
    """``x`` [..., C], lying in memory as [C, ...]; by the kernel for 16-bit values, C and tokens multiples of 8."""
    lead, cols = x.shape[:-1], x.shape[-1]
    tokens = lead.numel()
    if (
        x.dtype not in TYPES
        or cols % PIECE
        or tokens % PIECE
        or not x.numel()
        or x.data_ptr() % 16
        or not x.is_contiguous()
    ):
        return x.movedim(-1, 0).contiguous().movedim(0, -1)
    return as_gathered(x.view(tokens, cols), "token").view(cols, *lead).movedim(0, -1)


def sharing_gains(weights: Iterable[tuple[int, NMPattern]], cols: int, tokens: int, device: int) -> bool:
    """Whether weights [R, cols], given as (R, pattern), take less time on one feature-major x, its making included,
    than each on the token-major one: by the tiles' fitted cycles.
    """
    native = _ext.load()
    apart, shared = 0, native.transposition_cycles(tokens=tokens, cols=cols)
    for rows, pattern in weights:
        panels = isinstance(pattern, VNMPattern) and pattern.n == 2 and pattern.v % 64 == 0
        shape = {"rows": rows, "cols": cols, "tokens": tokens, "m": pattern.m, "device": device}
        v = pattern.v if panels and isinstance(pattern, VNMPattern) else 0
        apart += native.product_cycles(**shape, v=v, feature_x=False)
        shared += native.product_cycles(**shape, v=v, feature_x=True)
    return bool(shared < apart)
