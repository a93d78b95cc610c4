# SPDX-License-Identifier: Apache-2.0
"""``obs_update``, ``loss_increase`` and ``block_saliency`` of the compiled module."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from obs_kernels.checks import check_damp_values, check_finite, check_info
from obs_kernels.cuda_calls.inverse import launch_invert_spd
from obs_kernels.cuda_calls.update_launches import launch_loss_increase, launch_update_joint, launch_update_single
from obs_kernels.errors import ConfigError

SCRATCH_BYTES = 256 << 20
"""Of each temporary of blocks: ``block_saliency`` holds up to three at a time, ``obs_update`` one."""


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
