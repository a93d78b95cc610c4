# SPDX-License-Identifier: Apache-2.0
"""The sweep of row curvature by the compiled module: a kernel and a matrix product a block of columns.

``reference.sweep_rows_by`` has what comes before and after, and the formulas.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from obs_kernels import _ext
from obs_kernels.checks import check_info
from obs_kernels.cuda_calls.column_tables import ColumnTables, column_tables, listed_sets
from obs_kernels.cuda_calls.device import check_gpu, check_on_cuda
from obs_kernels.cuda_calls.inverse import launch_invert_spd
from obs_kernels.errors import DTypeNotSupportedError, ShapeNotSupportedError
from obs_kernels.launch_plan import LaunchPlan
from obs_kernels.patterns import NMPattern, VNMPattern

NAMED = 128
"""Columns that an error of a kept set names together, as the reference does."""


class SweepTables(NamedTuple):
    """Kept sets for the kernel (``obs_kernels/sweep.h``): 4 bits a member in an int32, where nothing else is said."""

    inner: Tensor
    """[inner sets]: among the columns of a panel, without panels among the m of a group."""
    sets: Tensor
    """[sets]: among the m of a group. For panels of n > 2 a bit a member, and after the kept sets all smaller ones."""
    num_kept: int
    """How many of ``sets`` have n members."""
    panels: ColumnTables | None


def sweep_groups(
    live: Tensor,
    factor: Tensor,
    own: Tensor,
    curvature: Tensor,
    unit: Tensor,
    pattern: NMPattern,
    row_scale: Tensor | None,
    alive: Tensor | None,
    num_columns: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Kept [R, C], weights [R, C], saliency and columns; arguments as in ``reference.sweep_groups``, all f32.

    Raises:
        SingularBlockError: a kept set is not positive definite. All sets are looked at, those with dead entries too.
        BackendUnavailableError, DeviceMismatchError, UnsupportedGPUError, DTypeNotSupportedError: as named.
    """
    (rows, cols), m, device = live.shape, pattern.m, live.device
    panels = isinstance(pattern, VNMPattern)
    units = rows // pattern.v if isinstance(pattern, VNMPattern) else rows
    live, factor = live.contiguous(), factor.contiguous()
    alive = None if alive is None else alive.contiguous()
    kept = torch.empty(rows, cols, dtype=torch.bool, device=device)
    new = torch.empty_like(live)
    loss = torch.empty(rows, cols // m, dtype=torch.float32, device=device)
    columns = torch.empty((units, cols // m, num_columns) if panels else 0, dtype=torch.uint8, device=device)
    if live.numel() == 0:
        return kept, new, loss.new_zeros(units, cols // m), columns
    width = _ext.load().sweep_width(v=pattern.v if isinstance(pattern, VNMPattern) else 0, n=pattern.n, m=m)
    _check_kept_sets(curvature, pattern)
    tables = sweep_tables(pattern.n, m, num_columns if panels else 0, device)
    groups = own.contiguous(), curvature.contiguous(), unit.contiguous()
    scale = None if row_scale is None else row_scale.contiguous()
    pushed, change = torch.zeros_like(live), live.new_empty(rows, width)  # pushed = (dw of the settled columns) R
    out = kept, new, loss, columns, change
    for start in range(0, cols, width):
        stop = min(start + width, cols)
        launch_sweep_columns(live, alive, scale, factor, groups, pushed, out, tables, pattern, slice(start, stop))
        pushed[:, stop:].addmm_(change[:, : stop - start], factor[start:stop, stop:])
    if row_scale is not None:
        loss = loss * row_scale[:, None]
    return kept, new, loss.view(units, -1, cols // m).sum(1), columns


def launch_sweep_columns(
    live: Tensor,
    alive: Tensor | None,
    row_scale: Tensor | None,
    factor: Tensor,
    groups: tuple[Tensor, Tensor, Tensor],
    pushed: Tensor,
    out: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    tables: SweepTables,
    pattern: NMPattern,
    span: slice,
) -> LaunchPlan:
    """Settle the columns ``span`` of all rows; ``groups`` are own, curvature and unit of ``diagonal_groups``.

    ``out`` are kept [R, C], weights [R, C], loss [R, C/m], columns and change [R, width], which are filled in.
    """
    native = _ext.load()
    (own, curvature, unit), (kept, new, loss, columns, change) = groups, out
    (rows, cols), n, m = live.shape, pattern.n, pattern.m
    floats = {"live": live, "factor": factor, "own": own, "curvature": curvature, "unit": unit, "pushed": pushed}
    floats |= {"new": new, "loss": loss, "change": change} | ({} if row_scale is None else {"row_scale": row_scale})
    bools = {"kept": kept} | ({} if alive is None else {"alive": alive})
    check_on_cuda(**floats, **bools, columns=columns, inner=tables.inner, sets=tables.sets)
    if any(t.dtype != torch.float32 for t in floats.values()) or any(t.dtype != torch.bool for t in bools.values()):
        raise DTypeNotSupportedError(
            f"{', '.join(floats)} must be float32 and {', '.join(bools)} bool on the cuda backend, got "
            f"{[t.dtype for t in (*floats.values(), *bools.values())]}; use backend='reference'"
        )
    wide = cols // m
    v, num_columns = (pattern.v, columns.shape[2]) if isinstance(pattern, VNMPattern) else (0, 0)
    wanted = {"factor": (cols, cols), "own": (wide, m, m), "curvature": (wide, m, m), "unit": (wide,)}
    wanted |= {"pushed": (rows, cols), "kept": (rows, cols), "new": (rows, cols), "loss": (rows, wide)}
    wanted |= {"alive": (rows, cols), "row_scale": (rows,)}
    found = {name: tuple(t.shape) for name, t in (floats | bools).items() if name in wanted}
    if found != {name: wanted[name] for name in found} or change.shape[0] != rows:
        raise ShapeNotSupportedError(
            f"tensors must have the shapes {wanted} and change {rows} rows for live {list(live.shape)} and pattern "
            f"{pattern}, got {found} and {list(change.shape)}"
        )
    if v and tuple(columns.shape) != (rows // v, wide, num_columns):
        raise ShapeNotSupportedError(f"columns must be [{rows // v}, {wide}, c], got {list(columns.shape)}")
    check_gpu(live.device.index)
    plan = native.sweep_columns(
        live=live.data_ptr(),
        alive=0 if alive is None else alive.data_ptr(),
        row_scale=0 if row_scale is None else row_scale.data_ptr(),
        factor=factor.data_ptr(),
        own=own.data_ptr(),
        curvature=curvature.data_ptr(),
        unit=unit.data_ptr(),
        pushed=pushed.data_ptr(),
        mask=kept.data_ptr(),
        new_weight=new.data_ptr(),
        change=change.data_ptr(),
        loss=loss.data_ptr(),
        columns=columns.data_ptr() if v else 0,
        inner=tables.inner.data_ptr(),
        num_inner=tables.inner.numel(),
        **_panel_tables(tables),
        rows=rows,
        cols=cols,
        first=span.start,
        count=span.stop - span.start,
        change_stride=change.shape[1],
        v=v,
        n=n,
        m=m,
        num_columns=num_columns,
        device=live.device.index,
        stream=torch.cuda.current_stream(live.device).cuda_stream,
    )
    return LaunchPlan(*plan)


@lru_cache(maxsize=32)
def sweep_tables(n: int, m: int, num_columns: int, device: torch.device) -> SweepTables:
    """Tables of n of m; ``num_columns`` is 0 without panels."""
    kept = _packed_sets(n, m)
    sets = _subsets(n, m) if num_columns and n > 2 else kept
    return SweepTables(
        _packed_sets(n, num_columns or m).to(device),
        sets.to(device),
        kept.numel(),
        column_tables(n, m, num_columns, device) if num_columns else None,
    )


def _packed_sets(n: int, m: int) -> Tensor:
    sets = [sum(member << 4 * k for k, member in enumerate(kept)) for kept in combinations(range(m), n)]
    return torch.tensor(sets, dtype=torch.int32)


def _subsets(n: int, m: int) -> Tensor:
    """Bits of all sets of n of m in the order of ``ColumnTables.lists``, then of all smaller ones."""
    smaller = [sum(1 << member for member in kept) for size in range(n) for kept in combinations(range(m), size)]
    return torch.cat([(1 << listed_sets(n, m)).sum(1), torch.tensor(smaller)]).to(torch.int32)


def panel_sizes(tables: SweepTables) -> dict[str, int]:
    """Sizes of the tables of panels, as the kernel takes them."""
    assert tables.panels is not None
    derived, lists, _ = tables.panels
    return {
        "num_sets": tables.num_kept,
        "num_derived": derived.shape[1] + tables.sets.numel() - tables.num_kept,
        "length": lists.shape[0],
        "num_column_sets": lists.shape[1],
    }


def _panel_tables(tables: SweepTables) -> dict[str, int]:
    if tables.panels is None:
        names = ("sets", "derived", "lists", "column_sets", "num_sets", "num_derived", "length", "num_column_sets")
        return dict.fromkeys(names, 0)
    derived, lists, columns = tables.panels
    pointers = {"sets": tables.sets, "derived": derived, "lists": lists, "column_sets": columns}
    return {name: tensor.data_ptr() for name, tensor in pointers.items()} | panel_sizes(tables)


@lru_cache(maxsize=32)
def _kept_sets(n: int, m: int, device: torch.device) -> Tensor:
    """[sets, n]: all sets of n of m."""
    return torch.tensor(list(combinations(range(m), n))).to(device)


def _check_kept_sets(curvature: Tensor, pattern: NMPattern) -> None:
    """Raise as the reference does unless S_KK of every kept set has an inverse; one read of the host."""
    n, m = pattern.n, pattern.m
    width = NAMED // m * m
    sets = _kept_sets(n, m, curvature.device)
    kept = curvature[:, sets[:, :, None], sets[:, None, :]].view(-1, n, n)
    info = torch.empty(kept.shape[0], dtype=torch.int32, device=kept.device)
    launch_invert_spd(kept, kept.new_zeros(1), kept, info)
    if not bool((info != 0).any()):
        return
    for part, start in zip(info.split(width // m * len(sets)), range(0, info.numel() * m, width), strict=False):
        stop = min(start + width, curvature.shape[0] * m)
        check_info(f"kept sets of hessian in columns {start} to {stop - 1}", part)
