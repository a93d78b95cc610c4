# SPDX-License-Identifier: Apache-2.0
"""Ops of the compiled module, with the names and parameters of ``obs_kernels.reference``.

With ``cuda_update.py`` the only file that takes ``data_ptr()``: whatever reaches an address here has been checked for
device, dtype, shape and contiguity. Outputs are allocated through torch and work is queued on torch's current stream
without waiting, so that side streams and CUDA graphs behave as they do for torch's own ops.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from obs_kernels import _ext
from obs_kernels.checks import check_damp_values, check_finite, check_info, check_pack, check_square_blocks
from obs_kernels.cuda_device import check_gpu, check_on_cuda, runs_on
from obs_kernels.cuda_update import launch_loss_increase, launch_update_joint, launch_update_single
from obs_kernels.errors import ConfigError, DTypeNotSupportedError, ShapeNotSupportedError
from obs_kernels.launch_plan import LaunchPlan
from obs_kernels.packed_format import packed_shapes
from obs_kernels.patterns import NMPattern, VNMPattern

__all__ = [
    "block_saliency",
    "invert_spd",
    "invert_spd_into",
    "launch_invert_spd",
    "launch_loss_increase",
    "launch_pack",
    "launch_update_joint",
    "launch_update_single",
    "loss_increase",
    "obs_update",
    "pack",
    "runs_on",
]

SCRATCH_BYTES = 256 << 20
"""Of each temporary of blocks: ``block_saliency`` holds up to three at a time, ``obs_update`` one."""


def pack(weight: Tensor, mask: Tensor, pattern: str) -> tuple[Tensor, Tensor, Tensor]:
    """(values, codes, columns) of ``weight`` [R, C] at the kept entries of ``mask``, which must satisfy ``pattern``.

    Raises:
        BackendUnavailableError: the compiled module is absent.
        DeviceMismatchError: a tensor is not on a CUDA device.
        UnsupportedGPUError: the module holds no code for this GPU.
    """
    _ext.load()
    parsed = check_pack(weight, mask, pattern)
    check_on_cuda(weight=weight, mask=mask)
    device = weight.device
    values_shape, codes_shape, columns_shape = packed_shapes(parsed, *weight.shape)
    values = torch.empty(values_shape, dtype=weight.dtype, device=device)
    codes = torch.empty(codes_shape, dtype=torch.uint8, device=device)
    columns = torch.empty(columns_shape or (0,), dtype=torch.uint8, device=device)
    launch_pack(weight, mask, values, codes, columns, pattern=parsed)
    return values, codes, columns


def launch_pack(
    weight: Tensor, mask: Tensor, values: Tensor, codes: Tensor, columns: Tensor, *, pattern: NMPattern
) -> LaunchPlan:
    """Fill the outputs of ``pack``, which the caller has allocated; returns what was launched."""
    native = _ext.load()
    check_pack(weight, mask, pattern)
    check_on_cuda(weight=weight, mask=mask, values=values, codes=codes, columns=columns)
    rows, cols = weight.shape
    shapes = [tuple(tensor.shape) for tensor in (values, codes, columns)]
    wanted = [shape or (0,) for shape in packed_shapes(pattern, rows, cols)]
    if shapes != wanted:
        raise ShapeNotSupportedError(f"values, codes and columns must be {wanted} for pattern {pattern}, got {shapes}")
    if values.dtype != weight.dtype or codes.dtype != torch.uint8 or columns.dtype != torch.uint8:
        raise DTypeNotSupportedError(
            f"values, codes and columns must be {weight.dtype}, uint8 and uint8, "
            f"got {values.dtype}, {codes.dtype} and {columns.dtype}"
        )
    check_gpu(weight.device.index)
    plan = native.pack(
        weight=weight.data_ptr(),
        mask=mask.data_ptr(),
        values=values.data_ptr(),
        codes=codes.data_ptr(),
        columns=columns.data_ptr(),
        rows=rows,
        cols=cols,
        v=pattern.v if isinstance(pattern, VNMPattern) else 0,
        n=pattern.n,
        m=pattern.m,
        element_size=weight.element_size(),
        device=weight.device.index,
        stream=torch.cuda.current_stream(weight.device).cuda_stream,
    )
    return LaunchPlan(*plan)


def invert_spd(matrices: Tensor, *, damp: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of ``matrices + damp * I``, [B, D, D] f32 with D <= 128, and ``info`` [B] int32.

    ``damp`` is one value or [B]. Of each matrix the lower triangle is read; a block that is not positive definite comes
    out as zeros, the others right.

    Raises:
        BackendUnavailableError: the compiled module is absent.
        DeviceMismatchError, UnsupportedGPUError, ShapeNotSupportedError, DTypeNotSupportedError: as named.
    """
    inverse = torch.empty_like(matrices, memory_format=torch.contiguous_format)
    return inverse, invert_spd_into(matrices, damp, inverse)


def invert_spd_into(matrices: Tensor, damp: Tensor, inverse: Tensor) -> Tensor:
    """``invert_spd`` into ``inverse`` (contiguous; may be ``matrices`` itself); returns ``info``."""
    info = torch.empty(matrices.shape[0], dtype=torch.int32, device=matrices.device)
    launch_invert_spd(matrices if matrices is inverse else matrices.contiguous(), damp, inverse, info)
    return info


def launch_invert_spd(matrices: Tensor, damp: Tensor, inverse: Tensor, info: Tensor) -> LaunchPlan:
    """Fill ``inverse`` and ``info``, which the caller has allocated; returns what was launched."""
    native = _ext.load()
    check_square_blocks("matrices", matrices)
    damp = damp.to(torch.float32).contiguous()
    check_on_cuda(matrices=matrices, damp=damp, inverse=inverse, info=info)
    num_blocks, size, _ = matrices.shape
    if matrices.dtype != torch.float32 or inverse.dtype != torch.float32 or info.dtype != torch.int32:
        raise DTypeNotSupportedError(
            f"matrices, inverse and info must be float32, float32 and int32, got {matrices.dtype}, {inverse.dtype} and "
            f"{info.dtype}; backend='reference' takes float64"
        )
    if size > native.MAX_INVERT_SIZE:
        raise ShapeNotSupportedError(
            f"matrices must be at most {native.MAX_INVERT_SIZE} wide on the cuda backend, got "
            f"{list(matrices.shape)}; use backend='reference'"
        )
    if inverse.shape != matrices.shape or info.shape != (num_blocks,) or damp.numel() not in (1, num_blocks):
        raise ShapeNotSupportedError(
            f"inverse, info and damp must be {list(matrices.shape)}, [{num_blocks}] and [1] or [{num_blocks}], got "
            f"{list(inverse.shape)}, {list(info.shape)} and {list(damp.shape)}"
        )
    if not num_blocks or not size:
        info.zero_()
        return LaunchPlan("invert_spd", "empty", 0, 0)
    check_gpu(matrices.device.index)
    plan = native.invert_spd(
        matrices=matrices.data_ptr(),
        damp=damp.data_ptr(),
        damp_each=damp.numel() > 1,
        inverse=inverse.data_ptr(),
        info=info.data_ptr(),
        num_blocks=num_blocks,
        size=size,
        device=matrices.device.index,
        stream=torch.cuda.current_stream(matrices.device).cuda_stream,
    )
    return LaunchPlan(*plan)


def obs_update(weight: Tensor, fisher: Tensor | None, mask: Tensor, *, damp: Tensor, update: str) -> Tensor:
    """New weight of the same shape and dtype; pruned entries are +0. D <= 128, ``fisher`` f32.

    Values are looked at once, at the end, which waits for the GPU; not while a CUDA graph is being captured, where a
    block that fails only loses its pruned weights.

    Raises:
        NonFiniteError, ConfigError, SingularBlockError: values that the reference refuses, with its texts.
        BackendUnavailableError, DeviceMismatchError, UnsupportedGPUError, DTypeNotSupportedError: as named.
    """
    if update == "none" or fisher is None or weight.numel() == 0:
        _refuse(weight, None, damp, _not_finite(weight))
        return weight.masked_fill(~mask, 0.0).contiguous()
    weight, fisher, mask = weight.contiguous(), fisher.contiguous(), mask.contiguous()
    updated = torch.empty_like(weight)
    if update == "joint":
        info = torch.empty(fisher.shape[0], dtype=torch.int32, device=fisher.device)
        launch_update_joint(weight, fisher, mask, damp, updated, info)
        _refuse(weight, fisher, damp, info < 0, torch.where(info < 0, -1 - info, info), "kept part of fisher")
        return updated
    size, flat = fisher.shape[1], weight.view(-1)
    info = torch.zeros(fisher.shape[0], dtype=torch.int32, device=fisher.device)
    for part, inverse in _inverses(fisher, damp, None, weight.numel(), info):
        span = slice(part.start * size, part.stop * size)
        launch_update_single(flat[span], inverse, mask.view(-1)[span], updated.view(-1)[span])
    _refuse(weight, fisher, damp, _not_finite(weight, fisher, damp), info, "fisher")
    return updated


def loss_increase(change: Tensor, fisher: Tensor, *, damp: Tensor) -> Tensor:
    """``1/2 dw^T (F + damp I) dw`` of each Fisher block, [B] f32. One value of ``damp`` counts as checked."""
    if damp.numel() > 1 and not torch.cuda.is_current_stream_capturing():
        check_damp_values(damp)
    loss = torch.empty(fisher.shape[0], dtype=torch.float32, device=fisher.device)
    launch_loss_increase(change.contiguous(), fisher.contiguous(), damp, loss)
    return loss


def block_saliency(
    weight: Tensor, fisher: Tensor | None, block: int, *, damp: Tensor, method: str, mask: Tensor | None
) -> Tensor:
    """``1/2 w_Q^T [(F^-1)_QQ]^-1 w_Q`` of each run of ``block`` weights; method "combinatorial" only, D <= 128."""
    if method != "combinatorial" or fisher is None:
        raise ConfigError(f"method must be 'combinatorial' on the cuda backend, got {method!r}; use 'reference'")
    num_blocks, size, _ = fisher.shape
    units = torch.empty(num_blocks * (size // block), dtype=torch.float32, device=weight.device)
    if not num_blocks:
        return units
    weight, fisher = weight.contiguous(), fisher.contiguous()
    w = weight.new_zeros(num_blocks * size, dtype=torch.float32)
    w[: weight.numel()] = (weight if mask is None else weight.masked_fill(~mask, 0.0)).view(-1)
    info = torch.zeros(num_blocks, dtype=torch.int32, device=weight.device)
    inner_info = torch.zeros(units.numel(), dtype=torch.int32, device=weight.device)
    alive = None if mask is None else mask.contiguous().view(-1)
    none = damp.new_zeros(1)
    for part, inverse in _inverses(fisher, damp, alive, weight.numel(), info):
        values = w[part.start * size : part.stop * size].view(-1, block)
        span = slice(part.start * (size // block), part.stop * (size // block))
        if block == 1:
            values = values[:, 0]
            torch.mul(values / inverse.diagonal(dim1=1, dim2=2).reshape(-1), 0.5 * values, out=units[span])
            continue
        inner = inverse.view(-1, size // block, block, size // block, block).diagonal(dim1=1, dim2=3)
        inner = inner.permute(0, 3, 1, 2).reshape(-1, block, block).contiguous()
        launch_invert_spd(inner, none, inner, inner_info[span])
        launch_loss_increase(values, inner, none, units[span])
    _refuse(weight, fisher, damp, _not_finite(weight, fisher, damp), info, "fisher")
    _refuse(weight, fisher, damp, None, inner_info, "inverse fisher of a block")
    return units[: weight.numel() // block]


def _inverses(
    fisher: Tensor, damp: Tensor, alive: Tensor | None, num_weights: int, info: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """(blocks, inverse of the damped ones) in parts that share their memory; fills ``info``.

    What lies beyond the weight, or is dead (``alive`` [num_weights] False), is decoupled first.
    """
    num_blocks, size, _ = fisher.shape
    step = min(num_blocks, max(1, SCRATCH_BYTES // (4 * size * size)))
    scratch = torch.empty(step, size, size, dtype=torch.float32, device=fisher.device)
    whole = num_weights // size if alive is None else 0  # blocks before this one are inverted as they are
    for start in range(0, num_blocks, step):
        part = slice(start, min(start + step, num_blocks))
        inverse, damps = scratch[: part.stop - start], damp if damp.numel() == 1 else damp[part]
        ready = max(0, min(part.stop, whole) - start)
        if ready:
            each = damps if damps.numel() == 1 else damps[:ready]
            launch_invert_spd(fisher[start : start + ready], each, inverse[:ready], info[start : start + ready])
        if start + ready < part.stop:
            rest = slice(start + ready, part.stop)
            blocks = _decoupled(fisher[rest], alive, rest, num_weights)
            launch_invert_spd(blocks, damps if damps.numel() == 1 else damps[ready:], inverse[ready:], info[rest])
        yield part, inverse


def _decoupled(blocks: Tensor, alive: Tensor | None, part: slice, num_weights: int) -> Tensor:
    """A copy of ``blocks`` without the rows and columns of dead entries: diagonal 1 there."""
    size = blocks.shape[1]
    live = torch.zeros(blocks.shape[0] * size, dtype=torch.bool, device=blocks.device)
    count = min(part.stop * size, num_weights) - part.start * size
    live[:count] = True if alive is None else alive[part.start * size : part.start * size + count]
    dead = ~live.view(-1, size)
    copy = blocks.masked_fill(dead[:, :, None], 0.0).masked_fill_(dead[:, None, :], 0.0)
    copy.diagonal(dim1=1, dim2=2).masked_fill_(dead, 1.0)
    return copy


def _not_finite(weight: Tensor, fisher: Tensor | None = None, damp: Tensor | None = None) -> Tensor:
    """Whether any value is NaN or Inf (of ``damp``: or negative), as a tensor of one bool; no temporaries."""
    ends = [end.float() for t in (weight, fisher, damp) if t is not None and t.numel() for end in torch.aminmax(t)]
    if not ends:
        return torch.zeros(1, dtype=torch.bool, device=weight.device)
    bad = ~torch.isfinite(torch.stack(ends)).all()
    return bad if damp is None else bad | (ends[-2] < 0)


def _refuse(
    weight: Tensor,
    fisher: Tensor | None,
    damp: Tensor,
    suspect: Tensor | None,
    info: Tensor | None = None,
    what: str = "",
) -> None:
    """Raise as the reference does if anything is ``suspect`` or ``info`` names a pivot: one look at the GPU's values.

    Nothing is looked at while a CUDA graph is being captured.
    """
    if torch.cuda.is_current_stream_capturing():
        return
    codes = [t.any() for t in (suspect, info) if t is not None]
    if not bool(torch.stack(codes).any()):
        return
    if suspect is not None and bool(suspect.any()):  # an overflow is no error of the arguments
        check_finite("weight", weight)
        if fisher is not None:
            check_finite("fisher", fisher)
            check_damp_values(damp)
    if info is not None:
        check_info(what, info)
