# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments, shared by public ops, their fake kernels and the backends.

Everything here but ``check_finite`` reads only shapes, dtypes and devices, so that fake kernels raise the same text
as real calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from math import comb
from typing import Any

import torch
from torch import Tensor

from obs_kernels.errors import (
    ConfigError,
    DeviceMismatchError,
    DTypeNotSupportedError,
    NonFiniteError,
    ShapeNotSupportedError,
    SingularBlockError,
)
from obs_kernels.patterns import NMPattern, Pattern, VNMPattern, parse_pattern

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PACK_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FISHER_DTYPES = (torch.float32, torch.float64)
METHODS = ("combinatorial", "pairwise", "greedy", "diagonal", "magnitude")
UPDATES = ("joint", "single", "none")
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
LAYOUTS = ("token", "feature")
PIECE = 8
"""16-bit values in 16 bytes: the products' and the transposing kernel's lines of x are whole multiples of it."""

MAX_KEPT_SETS = 20_000
"""Exact search visits every kept set of a group; beyond this many it is refused."""
MAX_PANEL_CANDIDATES = 500_000
"""Column sets times kept sets inside them, for the joint search of a panel."""


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ``ConfigError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_number(name: str, value: Any) -> float:
    """``value`` as a finite float of at least 0; strings such as "1e-7" are read. Raises ``ConfigError``."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{name} must be a number, got {value!r}") from None
    if isinstance(value, bool) or not math.isfinite(number) or number < 0:
        raise ConfigError(f"{name} must be finite and at least 0, got {value!r}")
    return number


def check_dtype(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """Raise ``DTypeNotSupportedError`` unless the dtype of ``tensor`` is in ``dtypes``."""
    if not isinstance(tensor, Tensor):
        raise DTypeNotSupportedError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise DTypeNotSupportedError(
            f"{name} must be {names}, got {str(tensor.dtype).removeprefix('torch.')}; convert it first"
        )


def check_same_device(**tensors: Tensor | None) -> None:
    """Raise ``DeviceMismatchError`` unless all tensors given share a device."""
    found = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(found.values())) > 1:
        text = ", ".join(f"{name} on {device}" for name, device in found.items())
        raise DeviceMismatchError(f"tensors must share a device, got {text}; move them with .to(device)")


def check_matrix(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype] = FLOAT_DTYPES) -> None:
    """Check that ``tensor`` is a float matrix [R, C]."""
    check_dtype(name, tensor, dtypes)
    if tensor.dim() != 2:
        raise ShapeNotSupportedError(f"{name} must be a matrix [R, C], got shape {list(tensor.shape)}")


def check_square_blocks(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype] = FISHER_DTYPES) -> None:
    """Check that ``tensor`` is [B, D, D] of a float dtype."""
    check_dtype(name, tensor, dtypes)
    if tensor.dim() != 3 or tensor.shape[1] != tensor.shape[2] or tensor.shape[1] == 0:
        raise ShapeNotSupportedError(f"{name} must be [B, D, D] with D > 0, got {list(tensor.shape)}")


def check_fisher(fisher: Tensor, grads: Tensor) -> None:
    """Check the arguments of ``accumulate_fisher_``."""
    check_square_blocks("fisher", fisher)
    check_dtype("grads", grads, FLOAT_DTYPES)
    if grads.dim() != 2 or grads.shape[1] != fisher.shape[0] * fisher.shape[1]:
        raise ShapeNotSupportedError(
            f"grads must be [S, B * D] = [S, {fisher.shape[0] * fisher.shape[1]}] for fisher {list(fisher.shape)}, "
            f"got {list(grads.shape)}; pad the last block with zeros"
        )
    check_same_device(fisher=fisher, grads=grads)
    check_owned("fisher", fisher)


def check_owned(name: str, tensor: Tensor) -> None:
    """Check that a tensor that is written in place is no expanded one."""
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        raise ShapeNotSupportedError(
            f"{name} must own each of its elements, got an expanded tensor with strides {tensor.stride()}; pass "
            f"{name}.clone()"
        )


def check_damp(damp: float | Tensor, num_blocks: int) -> None:
    """Check that ``damp`` is a finite number >= 0, or one value a block ([B] float tensor.

    Values are checked in the op).
    """
    if isinstance(damp, Tensor):
        check_dtype("damp", damp, FLOAT_DTYPES)
        if damp.dim() > 1 or (damp.dim() == 1 and damp.shape[0] not in (1, num_blocks)):
            raise ShapeNotSupportedError(
                f"damp must be a number or one value a block [{num_blocks}], got {list(damp.shape)}"
            )
        return
    if isinstance(damp, bool) or not isinstance(damp, (int, float)):
        raise ConfigError(f"damp must be a number or a tensor, got {type(damp).__name__} {damp!r}")
    if not (damp >= 0 and math.isfinite(damp)):
        raise ConfigError(f"damp must be finite and at least 0, got {damp}; it is added to the diagonal of each block")


def check_blocks_of_weight(weight: Tensor, fisher: Tensor) -> None:
    """Check that ``fisher`` [B, D, D] holds the blocks of the flattened ``weight``: B = ceil(R * C / D)."""
    check_square_blocks("fisher", fisher)
    size = fisher.shape[1]
    if fisher.shape[0] != -(-weight.numel() // size):
        raise ShapeNotSupportedError(
            f"fisher must be [{-(-weight.numel() // size)}, {size}, {size}] for weight {list(weight.shape)} and "
            f"D = {size}, "
            f"got {list(fisher.shape)}"
        )


def check_mask(mask: Tensor | None, weight: Tensor) -> None:
    """Check that ``mask`` is None or a bool tensor of the weight's shape."""
    if mask is None:
        return
    check_dtype("mask", mask, (torch.bool,))
    if mask.shape != weight.shape:
        raise ShapeNotSupportedError(f"mask must have the shape of weight {list(weight.shape)}, got {list(mask.shape)}")


def check_search(
    weight: Tensor,
    fisher: Tensor | None,
    pattern: str | Pattern,
    damp: float | Tensor,
    method: str,
    mask: Tensor | None,
    num_columns: int | None,
) -> NMPattern:
    """Check the arguments of ``search_nm`` (``num_columns`` None) or ``search_vnm``; returns the parsed pattern."""
    check_matrix("weight", weight)
    parsed = parse_pattern(pattern)
    panels = num_columns is not None
    if not isinstance(parsed, NMPattern) or isinstance(parsed, VNMPattern) != panels:
        op, wanted = ("search_vnm", "v:n:m such as '64:2:8'") if panels else ("search_nm", "n:m such as '2:4'")
        raise ConfigError(f"pattern of {op} must be {wanted}, got {str(parsed)!r}")
    parsed.check_shape(weight.shape)
    check_choice("method", method, METHODS)
    check_mask(mask, weight)
    if fisher is None:
        if method != "magnitude":
            raise ConfigError(f"fisher may be None only for method='magnitude', got method={method!r}; pass [B, D, D]")
    else:
        check_blocks_of_weight(weight, fisher)
        block = fisher.shape[1]
        if block % parsed.m or (weight.shape[1] % block and weight.numel()):
            raise ShapeNotSupportedError(
                f"fisher blocks of D = {block} do not fit pattern {parsed} on cols = {weight.shape[1]}: "
                f"D % m and cols % D must be 0; use D = {parsed.m}"
            )
        check_damp(damp, fisher.shape[0])
    check_same_device(weight=weight, fisher=fisher, mask=mask)
    check_counts(parsed, method, num_columns)
    return parsed


def check_prune(
    weight: Tensor,
    fisher: Tensor,
    pattern: str | Pattern,
    damp: float | Tensor,
    mask: Tensor | None,
    num_columns: int | None,
) -> NMPattern:
    """Check the arguments of ``prune_nm`` (``num_columns`` None) or ``prune_vnm``; returns the parsed pattern."""
    parsed = check_search(weight, fisher, pattern, damp, "combinatorial", mask, num_columns)
    check_own_blocks(fisher, parsed)
    return parsed


def check_own_blocks(fisher: Tensor, pattern: NMPattern) -> None:
    """Check that each group of ``pattern`` is a Fisher block of its own: D = m."""
    if fisher.shape[1] != pattern.m:
        raise ShapeNotSupportedError(
            f"fisher must be [B, {pattern.m}, {pattern.m}] for choice and update in one pass of pattern {pattern}, got "
            f"{list(fisher.shape)}; search first, then update"
        )


def check_counts(pattern: NMPattern, method: str, num_columns: int | None, *, exact_only: bool = False) -> None:
    """Check that ``method`` can go over the candidates of ``pattern``; ``exact_only``: there is no other method."""
    other, instead = "method='greedy' or ", "method='greedy' or method='pairwise'"
    if exact_only:
        other, instead = "", "a smaller m"
    n, m = pattern.n, pattern.m
    if method == "pairwise" and m % 2:
        raise ConfigError(f"method='pairwise' needs an even m, got pattern {pattern}; use 'combinatorial'")
    if num_columns is not None:
        if not n <= num_columns <= m:
            raise ConfigError(f"num_columns must be n to m = {n} to {m} for pattern {pattern}, got {num_columns}")
        candidates = comb(m, num_columns) * comb(num_columns, n)
        if comb(m, n) > MAX_KEPT_SETS:
            raise ConfigError(
                f"pattern {pattern} with {num_columns} columns has {candidates} candidates a panel and {comb(m, n)} "
                f"kept sets a row, above the exact bound of {MAX_KEPT_SETS}; use a smaller m"
            )
        if candidates > MAX_PANEL_CANDIDATES and method != "greedy":
            raise ConfigError(
                f"pattern {pattern} with {num_columns} columns has {candidates} candidates a panel, above the "
                f"exact bound of {MAX_PANEL_CANDIDATES}; use {other}a smaller m"
            )
    elif method == "combinatorial" and comb(m, n) > MAX_KEPT_SETS:
        raise ConfigError(
            f"pattern {pattern} has {comb(m, n)} kept sets a group, above the exact bound of {MAX_KEPT_SETS}; "
            f"use {instead}"
        )


def check_obs_update(weight: Tensor, fisher: Tensor | None, mask: Tensor, damp: float | Tensor, update: str) -> None:
    """Check the arguments of ``obs_update``."""
    check_dtype("weight", weight, FLOAT_DTYPES)
    check_choice("update", update, UPDATES)
    if mask is None:
        raise ConfigError("mask must be a bool tensor of the weight's shape, got None")
    check_mask(mask, weight)
    if fisher is None:
        if update != "none":
            raise ConfigError(f"fisher may be None only for update='none', got update={update!r}; pass [B, D, D]")
    else:
        check_blocks_of_weight(weight, fisher)
        check_damp(damp, fisher.shape[0])
    check_same_device(weight=weight, fisher=fisher, mask=mask)


def check_pack(weight: Tensor, mask: Tensor, pattern: str | Pattern) -> NMPattern:
    """Check the arguments of ``pack``; returns the parsed pattern."""
    check_matrix("weight", weight, PACK_DTYPES)
    parsed = parse_pattern(pattern)
    if not isinstance(parsed, NMPattern):
        raise ConfigError(f"pattern {parsed} has no packed format; pack n:m or v:2:m, keep {parsed} dense with zeros")
    if isinstance(parsed, VNMPattern) and (parsed.n != 2 or parsed.num_columns != 4):
        raise ConfigError(
            f"pattern {parsed} has no packed format: panels are packed for n = 2 of 4 columns, m >= 4; got n = "
            f"{parsed.n} of {parsed.num_columns}"
        )
    if mask is None:
        raise ConfigError("mask must be a bool tensor of the weight's shape, got None; use weight != 0")
    check_mask(mask, weight)
    parsed.check_shape(weight.shape)
    check_same_device(weight=weight, mask=mask)
    return parsed


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise ``NonFiniteError`` naming the first NaN or Inf of ``tensor`` (reads the values: one sync on a GPU)."""
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        where = (~finite).nonzero()[0].tolist()
        raise NonFiniteError(
            f"{name} must be finite, got {int((~finite).sum())} NaN or Inf, the first at {where}; clean the "
            f"tensor first"
        )


def check_damp_values(damp: Tensor) -> None:
    """Raise ``ConfigError`` for a negative or non-finite entry of ``damp`` (reads the values)."""
    if damp.numel() and not bool(((damp >= 0) & torch.isfinite(damp)).all()):
        raise ConfigError(
            f"damp must be finite and at least 0, got {damp.min().item()}; it is added to the diagonal of each block"
        )


def check_info(what: str, info: Tensor, offset: int = 0) -> None:
    """Raise ``SingularBlockError`` naming the first of the blocks [B] whose ``info`` is not 0 (reads the values)."""
    if not bool((info != 0).any()):
        return
    bad = (info != 0).nonzero().flatten()
    first = int(bad[0])
    raise SingularBlockError(
        f"{what}: {bad.numel()} of {info.shape[0]} blocks are not positive definite, the first is block "
        f"{first + offset} at pivot {int(info[first])}; raise damp, or set on_singular='increase_damp'"
    )


def check_step_info(info: Tensor, weight: Tensor, fisher: Tensor, damp: Tensor) -> None:
    """Raise what ``info`` [B] of a search or a pruning step tells of, non-finite values first (reads the values)."""
    if not bool((info != 0).any()):
        return
    check_finite("weight", weight)
    check_finite("fisher", fisher)
    check_damp_values(damp)
    check_info("fisher", info)
