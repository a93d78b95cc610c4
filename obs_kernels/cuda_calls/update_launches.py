# SPDX-License-Identifier: Apache-2.0
"""Launches of ``csrc/update/``: what knows about Fisher blocks of a weight."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from obs_kernels import _ext
from obs_kernels.checks import check_blocks_of_weight, check_mask
from obs_kernels.cuda_calls.device import check_gpu, check_on_cuda
from obs_kernels.errors import DTypeNotSupportedError, ShapeNotSupportedError
from obs_kernels.launch_plan import LaunchPlan

WEIGHT_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""``WeightType`` of ``obs_kernels/update.h``."""


def launch_update_joint(
    weight: Tensor, fisher: Tensor, mask: Tensor, damp: Tensor, updated: Tensor, info: Tensor
) -> LaunchPlan:
    """Fill ``updated`` (may be ``weight``) and ``info``, which the caller has allocated; returns what was launched.

    ``info`` [B] int32: 0, or the failing pivot of the kept part; ``-1 - that`` where NaN, Inf, an overflow or a bad
    damping was met.
    """
    damp = damp.to(torch.float32).contiguous()
    native = _check(weight, fisher, damp=damp, mask=mask, updated=updated, info=info)
    _check_outputs(weight, mask, updated)
    if info.dtype != torch.int32 or info.shape != fisher.shape[:1]:
        raise ShapeNotSupportedError(f"info must be int32 [{fisher.shape[0]}], got {info.dtype} {list(info.shape)}")
    plan = native.update_joint(
        weight=weight.data_ptr(),
        mask=mask.data_ptr(),
        fisher=fisher.data_ptr(),
        damp=damp.data_ptr(),
        damp_each=damp.numel() > 1,
        updated=updated.data_ptr(),
        info=info.data_ptr(),
        **_sizes(weight, fisher),
    )
    return LaunchPlan(*plan)


def launch_update_single(weight: Tensor, inverse: Tensor, mask: Tensor, updated: Tensor) -> LaunchPlan:
    """Fill ``updated``, given the ``inverse`` [B, D, D] of the damped blocks; returns what was launched."""
    native = _check(weight, inverse, mask=mask, updated=updated)
    _check_outputs(weight, mask, updated)
    plan = native.update_single(
        weight=weight.data_ptr(),
        mask=mask.data_ptr(),
        inverse=inverse.data_ptr(),
        updated=updated.data_ptr(),
        **_sizes(weight, inverse),
    )
    return LaunchPlan(*plan)


def launch_loss_increase(change: Tensor, fisher: Tensor, damp: Tensor, loss: Tensor) -> LaunchPlan:
    """Fill ``loss`` [B] float32, which the caller has allocated; returns what was launched."""
    damp = damp.to(torch.float32).contiguous()
    native = _check(change, fisher, damp=damp, loss=loss)
    if loss.dtype != torch.float32 or loss.shape != fisher.shape[:1]:
        raise ShapeNotSupportedError(f"loss must be float32 [{fisher.shape[0]}], got {loss.dtype} {list(loss.shape)}")
    plan = native.loss_increase(
        change=change.data_ptr(),
        fisher=fisher.data_ptr(),
        damp=damp.data_ptr(),
        damp_each=damp.numel() > 1,
        loss=loss.data_ptr(),
        **_sizes(change, fisher),
    )
    return LaunchPlan(*plan)


def _check(weight: Tensor, fisher: Tensor, *, damp: Tensor | None = None, **others: Tensor) -> ModuleType:
    """The module, if it takes such a weight and such blocks."""
    native = _ext.load()
    check_blocks_of_weight(weight, fisher)
    known = {"damp": damp} if damp is not None else {}
    check_on_cuda(weight=weight, fisher=fisher, **known, **others)
    if weight.dtype not in WEIGHT_TYPES or fisher.dtype != torch.float32:
        raise DTypeNotSupportedError(
            f"weight must be float32, float16 or bfloat16 and fisher float32 on the cuda backend, got {weight.dtype} "
            f"and {fisher.dtype}; backend='reference' takes float64"
        )
    if fisher.shape[1] > native.MAX_UPDATE_SIZE:
        raise ShapeNotSupportedError(
            f"fisher must be at most {native.MAX_UPDATE_SIZE} wide on the cuda backend, got {list(fisher.shape)}; "
            f"use backend='reference'"
        )
    if damp is not None and damp.numel() not in (1, fisher.shape[0]):
        raise ShapeNotSupportedError(f"damp must be [1] or [{fisher.shape[0]}], got {list(damp.shape)}")
    if fisher.shape[0]:
        check_gpu(weight.device.index)
    return native


def _check_outputs(weight: Tensor, mask: Tensor, updated: Tensor) -> None:
    check_mask(mask, weight)
    if updated.dtype != weight.dtype or updated.shape != weight.shape:
        raise ShapeNotSupportedError(
            f"updated must be {weight.dtype} {list(weight.shape)}, got {updated.dtype} {list(updated.shape)}"
        )


def _sizes(weight: Tensor, fisher: Tensor) -> dict[str, int]:
    return {
        "num_weights": weight.numel(),
        "num_blocks": fisher.shape[0],
        "size": fisher.shape[1],
        "type": WEIGHT_TYPES[weight.dtype],
        "device": weight.device.index,
        "stream": torch.cuda.current_stream(weight.device).cuda_stream,
    }
