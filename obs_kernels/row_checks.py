# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments of row curvature, in the manner of ``checks``: metadata only, unless they say that they read."""

from __future__ import annotations

from torch import Tensor

from obs_kernels.checks import (
    FISHER_DTYPES,
    FLOAT_DTYPES,
    check_choice,
    check_counts,
    check_damp,
    check_dtype,
    check_finite,
    check_mask,
    check_matrix,
    check_owned,
    check_same_device,
)
from obs_kernels.errors import ConfigError, ShapeNotSupportedError, SingularBlockError
from obs_kernels.patterns import BlockPattern, NMPattern, Pattern, VNMPattern, parse_pattern

SWEEP_METHODS = ("combinatorial", "sparsegpt")


def check_hessian(hessian: Tensor) -> None:
    """Check that ``hessian`` is one square matrix [C, C] of f32 or f64."""
    check_dtype("hessian", hessian, FISHER_DTYPES)
    if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1]:
        raise ShapeNotSupportedError(
            f"hessian must be one matrix [C, C] for all rows, got {list(hessian.shape)}; a batch of blocks is for "
            f"search_nm"
        )


def check_accumulate_hessian(
    hessian: Tensor, x: Tensor, token_weight: Tensor | None, origin: Tensor | None = None
) -> None:
    """Check the arguments of ``accumulate_hessian_``; ``x`` [T, C] is flat."""
    check_hessian(hessian)
    check_matrix("x", x)
    if x.shape[1] != hessian.shape[0]:
        raise ShapeNotSupportedError(
            f"x must be [..., C] with C = {hessian.shape[0]} of hessian {list(hessian.shape)}, got C = {x.shape[1]}; "
            f"take a hessian of x.shape[-1]"
        )
    if token_weight is not None:
        check_dtype("token_weight", token_weight, FLOAT_DTYPES)
        if token_weight.shape != x.shape[:1]:
            raise ShapeNotSupportedError(
                f"token_weight must be one value a token [{x.shape[0]}], got {list(token_weight.shape)}; flatten it "
                f"as x"
            )
    if origin is not None and origin.shape != x.shape[1:]:
        raise ShapeNotSupportedError(
            f"origin must be one value a column [{x.shape[1]}], got {list(origin.shape)}; leave it out for 0"
        )
    check_same_device(hessian=hessian, x=x, token_weight=token_weight, origin=origin)
    check_owned("hessian", hessian)


def check_sweep(
    weight: Tensor,
    hessian: Tensor,
    pattern: str | Pattern,
    row_scale: Tensor | None,
    damp: float | Tensor,
    method: str,
    mask: Tensor | None,
    num_columns: int,
) -> Pattern:
    """Check the arguments of ``sweep_rows``; returns the parsed pattern."""
    check_matrix("weight", weight)
    check_hessian(hessian)
    if hessian.shape[0] != weight.shape[1]:
        raise ShapeNotSupportedError(
            f"hessian must be [{weight.shape[1]}, {weight.shape[1]}] for weight {list(weight.shape)}, got "
            f"{list(hessian.shape)}; it is the curvature of the inputs of this layer"
        )
    check_choice("method", method, SWEEP_METHODS)
    parsed: Pattern = parse_pattern(pattern)
    if method == "sparsegpt":
        if isinstance(parsed, (VNMPattern, BlockPattern)):
            raise ConfigError(
                f"pattern of method='sparsegpt' must be n:m or unstructured:s, got {str(parsed)!r}; use "
                f"method='combinatorial' for panels"
            )
        if row_scale is not None:
            raise ConfigError(
                "row_scale must be None for method='sparsegpt', which knows no scale of rows, got a tensor; use "
                "method='combinatorial'"
            )
    elif not isinstance(parsed, NMPattern):
        raise ConfigError(
            f"pattern of sweep_rows must be n:m or v:n:m such as '2:4' or '64:2:8', got {str(parsed)!r}; "
            f"unstructured:s needs method='sparsegpt'"
        )
    parsed.check_shape(weight.shape)
    check_mask(mask, weight)
    if row_scale is not None:
        check_dtype("row_scale", row_scale, FLOAT_DTYPES)
        if row_scale.shape != weight.shape[:1]:
            raise ShapeNotSupportedError(
                f"row_scale must be one value a row [{weight.shape[0]}], got {list(row_scale.shape)}; flatten it"
            )
    check_damp(damp, 1)
    check_same_device(weight=weight, hessian=hessian, row_scale=row_scale, mask=mask)
    if method == "combinatorial":
        assert isinstance(parsed, NMPattern)
        check_counts(parsed, method, num_columns if isinstance(parsed, VNMPattern) else None, exact_only=True)
    return parsed


def check_scale_values(row_scale: Tensor) -> None:
    """Raise for a negative or non-finite entry of ``row_scale`` (reads the values)."""
    check_finite("row_scale", row_scale)
    if row_scale.numel() and not bool((row_scale >= 0).all()):
        raise ConfigError(
            f"row_scale must be at least 0, got {row_scale.min().item()}; it multiplies the loss of a row"
        )


def check_column_pivot(info: Tensor, cols: int) -> None:
    """Raise ``SingularBlockError`` if ``info`` [1] of the Hessian, factorised from its last column to its first, is a
    failing pivot (1-based; reads the value).
    """
    pivot = int(info[0])
    if pivot:
        raise SingularBlockError(
            f"hessian must be positive definite, got pivot {pivot} of {cols} not above 0, at column {cols - pivot} "
            f"(counted from the last one down); raise damp"
        )
