# SPDX-License-Identifier: Apache-2.0
"""``search_nm`` and ``search_vnm`` of the compiled module, and both fused with the update of the kept weights.

For D = m a group is its own Fisher block: one pass. For D > m the curvature of each group with the rest of its block
re-optimised, ``F' = [(F^-1)_GG]^-1``, comes first, by the batched inverse.
"""

from __future__ import annotations

from math import comb

import torch
from torch import Tensor

from obs_kernels import _ext
from obs_kernels.checks import check_own_blocks, check_search, check_step_info
from obs_kernels.cuda_calls.column_tables import column_tables
from obs_kernels.cuda_calls.conditional import conditional_curvature, worst_info
from obs_kernels.cuda_calls.device import check_on_cuda
from obs_kernels.cuda_calls.group_launches import group_arguments, launch_groups
from obs_kernels.cuda_calls.pairwise import choose_groups_by_pairs, choose_panels_by_pairs
from obs_kernels.errors import ConfigError, DTypeNotSupportedError
from obs_kernels.patterns import NMPattern, VNMPattern

GAINS_BYTES = 128 << 20
"""Scratch for the gains of the panels of one launch: some waves of blocks, and much of it stays in the cache."""
MOST_GAINS_BYTES = 1 << 30
PANELS_AT_ONCE = 528
"""As many panels as keep a large GPU busy, where they fit ``MOST_GAINS_BYTES``: 64 rows of 9:16 take 2.9 MB each."""


def search_nm(
    weight: Tensor, fisher: Tensor | None, pattern: str, *, damp: Tensor, method: str, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Mask [R, C] bool (True = kept) and saliency [R, C/m] of the n:m choice; arguments as in ``ops.search_nm``.

    Bad values are looked for with one read of the host at the end, not at all while a CUDA graph is captured: then a
    bad group keeps nothing and has a saliency of NaN.
    """
    parsed = _checked(weight, fisher, pattern, damp, method, mask, None)
    assert fisher is not None
    if method == "pairwise":
        kept, saliency, info = choose_groups_by_pairs(weight, fisher, parsed, damp, mask)
    else:
        function = "search_greedy" if method == "greedy" else "search_nm"
        kept, _, saliency, info = _run_nm(weight, fisher, parsed, damp, mask, update=False, function=function)
    raise_for(info, weight, fisher, damp)
    return kept, saliency


def search_vnm(
    weight: Tensor,
    fisher: Tensor | None,
    pattern: str,
    *,
    damp: Tensor,
    method: str,
    mask: Tensor | None,
    num_columns: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mask [R, C], saliency [R/v, C/m] and columns [R/v, C/m, num_columns] uint8 of the joint v:n:m choice."""
    parsed = _checked(weight, fisher, pattern, damp, method, mask, num_columns)
    assert fisher is not None and isinstance(parsed, VNMPattern)
    if method == "pairwise":
        kept, saliency, columns, info = choose_panels_by_pairs(
            weight, fisher, parsed, damp, mask, num_columns, search=_run_vnm
        )
    else:
        kept, _, saliency, columns, info = _run_vnm(weight, fisher, parsed, damp, mask, num_columns, update=False)
    raise_for(info, weight, fisher, damp)
    return kept, saliency, columns


def prune_nm(
    weight: Tensor, fisher: Tensor, pattern: str, *, damp: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mask, new weight, saliency and ``info`` [B] of the exact choice and joint update in one pass over F, D = m.

    ``info`` is 0, the failing pivot of the block, or negative for values that are not finite: such a group keeps
    nothing, its weight stays and its saliency is NaN. Nothing waits for the device.
    """
    parsed = _checked(weight, fisher, pattern, damp, "combinatorial", mask, None)
    check_own_blocks(fisher, parsed)
    return _run_nm(weight, fisher, parsed, damp, mask, update=True)


def prune_vnm(
    weight: Tensor, fisher: Tensor, pattern: str, *, damp: Tensor, mask: Tensor | None, num_columns: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Mask, new weight, saliency [R/v, C/m], columns and ``info`` [B]; as ``prune_nm``, and F is read twice."""
    parsed = _checked(weight, fisher, pattern, damp, "combinatorial", mask, num_columns)
    assert isinstance(parsed, VNMPattern)
    check_own_blocks(fisher, parsed)
    return _run_vnm(weight, fisher, parsed, damp, mask, num_columns, update=True)


def raise_for(info: Tensor, weight: Tensor, fisher: Tensor, damp: Tensor) -> None:
    """Raise what the reference raises if ``info`` tells of bad values; one read of the host, none in a capture."""
    if not info.numel() or torch.cuda.is_current_stream_capturing():
        return
    check_step_info(info, weight, fisher, damp)


def _checked(
    weight: Tensor,
    fisher: Tensor | None,
    pattern: str,
    damp: Tensor,
    method: str,
    mask: Tensor | None,
    num_columns: int | None,
) -> NMPattern:
    _ext.load()
    parsed = check_search(weight, fisher, pattern, damp, method, mask, num_columns)
    methods = ("combinatorial", "pairwise", "greedy") if num_columns is None else ("combinatorial", "pairwise")
    if method not in methods or fisher is None:
        raise ConfigError(
            f"method must be {', '.join(map(repr, methods))} on the cuda backend, got {method!r} for pattern {parsed}; "
            f"use backend='reference'"
        )
    if fisher.dtype != torch.float32 or weight.dtype == torch.float64:
        raise DTypeNotSupportedError(
            f"weight and fisher must be of at most 32 bits and float32 on the cuda backend, got {weight.dtype} and "
            f"{fisher.dtype}; use backend='reference'"
        )
    check_on_cuda(weight=weight.contiguous(), fisher=fisher.contiguous())
    return parsed


def _run_nm(
    weight: Tensor,
    fisher: Tensor,
    pattern: NMPattern,
    damp: Tensor,
    mask: Tensor | None,
    *,
    update: bool,
    function: str = "search_nm",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mask, new weight (or the given one), saliency and ``info`` [B]."""
    (rows, cols), m = weight.shape, pattern.m
    w = weight.to(torch.float32).contiguous()
    alive = None if mask is None else mask.contiguous()
    blocks, group_damp, block_info = _blocks_of_groups(fisher, damp, alive, m)
    kept = torch.empty(rows, cols, dtype=torch.bool, device=w.device)
    saliency = torch.empty(rows, cols // m, dtype=torch.float32, device=w.device)
    info = torch.empty(blocks.shape[0], dtype=torch.int32, device=w.device)
    new = torch.empty_like(w) if update else None
    launch_groups(function, w, blocks, alive, group_damp, kept, saliency, new, info, pattern=pattern)
    return kept, weight if new is None else new.to(weight.dtype), saliency, _info_of_blocks(info, block_info)


def _run_vnm(
    weight: Tensor,
    fisher: Tensor,
    pattern: VNMPattern,
    damp: Tensor,
    mask: Tensor | None,
    num_columns: int,
    *,
    update: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Mask, new weight (or the given one), saliency, columns and ``info`` [B]."""
    native = _ext.load()
    (rows, cols), v, n, m = weight.shape, pattern.v, pattern.n, pattern.m
    device, panels, wide = weight.device, rows // pattern.v, cols // pattern.m
    w = weight.to(torch.float32).contiguous()
    alive = None if mask is None else mask.contiguous()
    blocks, group_damp, block_info = _blocks_of_groups(fisher, damp, alive, m)
    kept = torch.empty(rows, cols, dtype=torch.bool, device=device)
    each = torch.empty(rows, wide, dtype=torch.float32, device=device)
    saliency = torch.empty(panels, wide, dtype=torch.float32, device=device)
    columns = torch.empty(panels, wide, num_columns, dtype=torch.uint8, device=device)
    bits = torch.empty(panels, wide, dtype=torch.int32, device=device)
    info = torch.empty(blocks.shape[0], dtype=torch.int32, device=device)
    new = torch.empty_like(w) if update else None
    arguments = group_arguments(w, blocks, alive, group_damp, kept, each, new, info, pattern)
    tables = column_tables(n, m, num_columns, device)
    row_floats = v * wide * (-(-comb(m, n) // 4) * 4)
    row_bytes = max(1, 4 * row_floats)
    busy = min(-(-PANELS_AT_ONCE // max(1, wide)), MOST_GAINS_BYTES // row_bytes)
    at_once = max(1, min(panels, max(busy, GAINS_BYTES // row_bytes)))
    gains = torch.empty(at_once * row_floats, dtype=torch.float32, device=device)
    native.search_vnm(
        **arguments,
        derived=tables.derived.data_ptr(),
        lists=tables.lists.data_ptr(),
        column_sets=tables.columns.data_ptr(),
        num_derived=tables.derived.shape[1],
        length=tables.lists.shape[0],
        num_sets=tables.lists.shape[1],
        columns=columns.data_ptr(),
        panel_saliency=saliency.data_ptr(),
        column_bits=bits.data_ptr(),
        gains=gains.data_ptr(),
        gains_bytes=4 * gains.numel(),
        v=v,
        wide=wide,
        num_columns=num_columns,
    )
    new_weight = weight if new is None else new.to(weight.dtype)
    return kept, new_weight, saliency, columns, _info_of_blocks(info, block_info)


def _blocks_of_groups(
    fisher: Tensor, damp: Tensor, alive: Tensor | None, m: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A block [m, m] for each group, its damping, and ``info`` of the Fisher blocks where they are wider."""
    damp = damp.to(torch.float32).contiguous()
    if fisher.shape[1] == m:
        return fisher.contiguous(), damp, None
    curvature, info = conditional_curvature(fisher, damp, alive, m)
    return curvature, torch.zeros(1, dtype=torch.float32, device=fisher.device), info


def _info_of_blocks(info: Tensor, block_info: Tensor | None) -> Tensor:
    return info if block_info is None else worst_info(block_info, info)
