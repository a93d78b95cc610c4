# SPDX-License-Identifier: Apache-2.0
"""Choices by the pair model: of F^-1 only the 2 x 2 blocks of adjacent entries count, and the loss of what is chosen.

Some Fisher blocks at a time: their inverses, the choice in the model, then its true joint loss. The inverses serve the
curvature of the groups too where D > m.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from obs_kernels import _ext
from obs_kernels.cuda_calls.conditional import InvertedBlocks, curvature_of, inverted_blocks, worst_info
from obs_kernels.cuda_calls.device import check_gpu, check_on_cuda
from obs_kernels.cuda_calls.group_launches import launch_groups
from obs_kernels.errors import DTypeNotSupportedError, ShapeNotSupportedError
from obs_kernels.launch_plan import LaunchPlan
from obs_kernels.patterns import NMPattern, VNMPattern


def choose_groups_by_pairs(
    weight: Tensor, fisher: Tensor, pattern: NMPattern, damp: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mask [R, C], saliency [R, C/m] and ``info`` [B] of the n:m choice; f32 ``fisher``."""
    (rows, cols), m = weight.shape, pattern.m
    w, fisher, damp, alive = _plain(weight, fisher, damp, mask, m)
    kept = torch.empty(w.shape, dtype=torch.bool, device=w.device)
    saliency = torch.empty(w.shape[0], dtype=torch.float32, device=w.device)
    info = torch.empty(fisher.shape[0], dtype=torch.int32, device=w.device)
    for part in inverted_blocks(fisher, damp, alive, m):
        own_alive = None if alive is None else alive[part.groups]
        launch_search_pairwise(w[part.groups], part.inverse, own_alive, kept[part.groups], pattern=pattern)
        info[part.blocks] = _finish(
            part, part.info, w, fisher, damp, alive, kept[part.groups], saliency[part.groups], pattern
        )
    return kept.view(rows, cols), saliency.view(rows, cols // m), info


def choose_panels_by_pairs(
    weight: Tensor,
    fisher: Tensor,
    pattern: VNMPattern,
    damp: Tensor,
    mask: Tensor | None,
    num_columns: int,
    *,
    search: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mask [R, C], saliency [R/v, C/m], columns and ``info`` [B] of the v:n:m choice.

    ``search`` is the joint search with a curvature [m, m] for each group, which is that of the model here.
    """
    (rows, cols), v, m = weight.shape, pattern.v, pattern.m
    wide, panels, size = cols // m, rows // v, fisher.shape[1]
    w, fisher, damp, alive = _plain(weight, fisher, damp, mask, m)
    kept = torch.empty(w.shape, dtype=torch.bool, device=w.device)
    each = torch.empty(rows, wide, dtype=torch.float32, device=w.device)
    saliency = torch.empty(panels, wide, dtype=torch.float32, device=w.device)
    columns = torch.empty(panels, wide, num_columns, dtype=torch.uint8, device=w.device)
    info = torch.empty(fisher.shape[0], dtype=torch.int32, device=w.device)
    zero = torch.zeros(1, dtype=torch.float32, device=w.device)
    for part in inverted_blocks(fisher, damp, alive, m, multiple=v * cols // size):
        model = torch.empty_like(part.inverse)
        launch_pair_models(part.inverse, part.unit, model)
        few = slice(part.groups.start // (v * wide), part.groups.stop // (v * wide))
        own_alive = None if alive is None else alive[part.groups].view(-1, cols)
        chosen, _, _, columns[few], failed = search(
            w[part.groups].view(-1, cols), model, pattern, zero, own_alive, num_columns, update=False
        )
        kept[part.groups] = chosen.view(-1, m)
        known = worst_info(part.info, failed)
        info[part.blocks] = _finish(
            part, known, w, fisher, damp, alive, kept[part.groups], each.view(-1)[part.groups], pattern
        )
    launch_sum_panels(each, saliency, v)
    return kept.view(rows, cols), saliency, columns, info


def _plain(
    weight: Tensor, fisher: Tensor, damp: Tensor, mask: Tensor | None, m: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Contiguous f32 ``weight`` [groups, m], ``fisher`` and ``damp``, and ``mask`` [groups, m]."""
    w = weight.to(torch.float32).contiguous().view(-1, m)
    alive = None if mask is None else mask.contiguous().view(-1, m)
    return w, fisher.contiguous(), damp.to(torch.float32).contiguous(), alive


def _finish(
    part: InvertedBlocks,
    known: Tensor,
    weight: Tensor,
    fisher: Tensor,
    damp: Tensor,
    alive: Tensor | None,
    kept: Tensor,
    saliency: Tensor,
    pattern: NMPattern,
) -> Tensor:
    """True joint loss of ``kept`` into ``saliency``, both of the groups of ``part``; returns ``info`` of its blocks.

    ``known`` is what is known of the blocks; groups of a bad one keep nothing.
    """
    if fisher.shape[1] == pattern.m:
        curvature, own_damp = fisher[part.blocks], damp if damp.numel() == 1 else damp[part.blocks]
    else:
        curvature, failed = curvature_of(part)
        known, own_damp = torch.where(known != 0, known, failed), torch.zeros_like(damp[:1])
    own_alive = None if alive is None else alive[part.groups]
    info = torch.empty_like(saliency, dtype=torch.int32)
    launch_groups(
        "finish_nm", weight[part.groups], curvature, own_alive, own_damp, kept, saliency, None, info, pattern=pattern
    )
    bad = (known != 0).repeat_interleave(kept.shape[0] // known.shape[0])
    kept.masked_fill_(bad[:, None], False)
    saliency.masked_fill_(bad, torch.nan)
    return worst_info(known, info)


def launch_search_pairwise(
    weight: Tensor, inverse: Tensor, mask: Tensor | None, kept: Tensor, *, pattern: NMPattern
) -> LaunchPlan:
    """Fill ``kept`` [groups, m] with the minimum of the pair model of ``inverse`` [groups, m, m]."""
    native, m = _ext.load(), pattern.m
    groups = weight.numel() // m
    wanted = {"weight": (weight, torch.float32, (groups, m)), "inverse": (inverse, torch.float32, (groups, m, m))}
    wanted |= {"kept": (kept, torch.bool, (groups, m))}
    _check(wanted if mask is None else wanted | {"mask": (mask, torch.bool, (groups, m))})
    plan = native.search_pairwise(
        weight=weight.data_ptr(),
        inverse=inverse.data_ptr(),
        alive=0 if mask is None else mask.data_ptr(),
        mask=kept.data_ptr(),
        num_groups=groups,
        n=pattern.n,
        m=m,
        **_place(weight),
    )
    return LaunchPlan(*plan)


def launch_pair_models(inverse: Tensor, unit: Tensor, model: Tensor) -> LaunchPlan:
    """Fill ``model`` [groups, m, m] with the pair model of ``inverse`` as a curvature, times ``unit`` [groups]."""
    native, (groups, m, _) = _ext.load(), inverse.shape
    blocks = torch.float32, (groups, m, m)
    _check({"inverse": (inverse, *blocks), "model": (model, *blocks), "unit": (unit, torch.float32, (groups,))})
    plan = native.pair_models(
        inverse=inverse.data_ptr(),
        unit=unit.data_ptr(),
        model=model.data_ptr(),
        num_groups=groups,
        m=m,
        **_place(inverse),
    )
    return LaunchPlan(*plan)


def launch_sum_panels(each: Tensor, saliency: Tensor, v: int) -> LaunchPlan:
    """Sums of ``each`` [R, wide] over the ``v`` rows of a panel into ``saliency`` [R/v, wide], in ascending order."""
    native, (rows, wide) = _ext.load(), each.shape
    panels = torch.float32, (rows // v, wide)
    _check({"each": (each, torch.float32, (rows // v * v, wide)), "saliency": (saliency, *panels)})
    plan = native.sum_panels(
        each=each.data_ptr(),
        sums=saliency.data_ptr(),
        num_groups=each.numel(),
        v=v,
        wide=wide,
        **_place(each),
    )
    return LaunchPlan(*plan)


def _check(wanted: Mapping[str, tuple[Tensor, torch.dtype, tuple[int, ...]]]) -> None:
    check_on_cuda(**{name: tensor for name, (tensor, _, _) in wanted.items()})
    for name, (tensor, dtype, shape) in wanted.items():
        if tensor.dtype != dtype:
            raise DTypeNotSupportedError(f"{name} must be {dtype}, got {tensor.dtype}; convert it with .to({dtype})")
        if tensor.shape != shape:
            raise ShapeNotSupportedError(f"{name} must be {list(shape)}, got {list(tensor.shape)}; pass groups of m")


def _place(tensor: Tensor) -> dict[str, object]:
    check_gpu(tensor.device.index)
    return {"device": tensor.device.index, "stream": torch.cuda.current_stream(tensor.device).cuda_stream}
