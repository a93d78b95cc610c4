# SPDX-License-Identifier: Apache-2.0
"""Layout of what products take: one feature-major x for several of them."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from obs_kernels import checks
from obs_kernels.errors import ShapeNotSupportedError
from obs_kernels.ops.dispatch import (
    MODULES,
    asked_of_process,
    constant_when_compiled,
    kernel,
    resolve,
    run_as_it_is,
    unavailable,
)
from obs_kernels.ops.matmul import is_heard
from obs_kernels.packed_format import runs_as_two_of_four
from obs_kernels.patterns import NMPattern, parse_pattern

NEVER = 1 << 62
_MOST_TOKENS = 1 << 24


def feature_major(x: Tensor, *, backend: str | None = None) -> Tensor:
    """``x`` itself in value and shape, its memory ordered as [C, ...]: what ``sparse_linear`` gathers columns from.

    Args:
        x: [..., C] float, at least two dimensions.
        backend: None, or a name of ``dispatch.BACKENDS``.

    Returns:
        [..., C] of strides (..., product of the others). Gradients pass.

    Raises:
        ShapeNotSupportedError, DTypeNotSupportedError: as named.
    """
    checks.check_dtype("x", x, checks.FLOAT_DTYPES)
    if x.dim() < 2:
        raise ShapeNotSupportedError(f"x must be [..., C] of two dimensions or more, got {list(x.shape)}")
    return _turned(x, resolve("feature_major", backend, x))


@run_as_it_is
def _turned(x: Tensor, backend: str) -> Tensor:
    if is_heard(x):
        y: Tensor = torch.ops.obs_kernels.feature_major(x, backend=backend)
    else:
        y = kernel("feature_major", backend)(x)
    return y


@torch.library.custom_op("obs_kernels::feature_major", mutates_args=())
def _feature_major(x: Tensor, *, backend: str) -> Tensor:
    given = x.clone() if x.movedim(-1, 0).is_contiguous() else x  # an op of torch.library returns no alias
    y: Tensor = kernel("feature_major", backend)(given)
    return y


@_feature_major.register_fake
def _(x: Tensor, *, backend: str) -> Tensor:
    return x.new_empty((x.shape[-1], *x.shape[:-1])).movedim(0, -1)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    return grad


_feature_major.register_autograd(_backward)


def is_feature_major(x: Tensor) -> bool:
    """Whether ``x`` [..., C] lies as [C, ...] and not as [..., C] too."""
    return x.dim() > 1 and not x.is_contiguous() and x.movedim(-1, 0).is_contiguous()


def shares_layout(x: Tensor) -> bool:
    """Whether several products read ``feature_major(x)`` in place: 16-bit values, of whole pieces either way."""
    if x.dtype not in (torch.float16, torch.bfloat16) or asked_of_process() not in (None, "cuda"):
        return False
    if torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type) != x.dtype:
        return False  # each layer will make a copy of its own
    cols = x.shape[-1]
    return cols % checks.PIECE == 0 and x.numel() // max(cols, 1) % checks.PIECE == 0


@constant_when_compiled
@lru_cache(maxsize=1024)
def shared_from(rows: tuple[int, ...], patterns: tuple[str, ...], cols: int, device_type: str, device: int) -> int:
    """The fewest tokens from which on packed weights [R, cols] gain by one feature-major x; ``NEVER`` if they do not.

    ``NEVER`` too where the products do not run on the kernels of ``cuda``, which alone gather.
    """
    if device_type != "cuda" or unavailable("sparse_linear", "cuda", device_type) is not None:
        return NEVER
    weights: list[tuple[int, NMPattern]] = [(r, parse_pattern(p)) for r, p in zip(rows, patterns, strict=True)]
    if not all(runs_as_two_of_four(pattern) for _, pattern in weights):
        return NEVER
    gains = import_module(f"{MODULES['cuda']}.layout").sharing_gains
    found, tokens = NEVER, 64
    while tokens <= _MOST_TOKENS:
        if not gains(weights, cols, tokens, device):
            found = NEVER
        elif found == NEVER:
            found = tokens
        tokens += tokens // 2 if tokens & (tokens - 1) == 0 else tokens // 3  # 64, 96, 128, 192, ...
    return found
