# SPDX-License-Identifier: Apache-2.0
"""Order of input channels for panels: a study, not a part of the package (``bench.choices_squad`` has the figures).

All panels of a weight share the order of its columns. Where the layer before is a Linear with nothing but elementwise
functions in between (FFN), or the channels of one attention head (value to output), the order folds into its rows and
the model computes the same. The order is improved by exchanging columns between two groups as long as the choice by
diagonal scores 1/2 F_ii w_i^2 keeps more: they do not depend on who is whose neighbour, as cross terms would.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from obs_kernels import OBSConfig, OBSPruner
from obs_kernels.patterns import VNMPattern, parse_pattern
from obs_kernels.reference.candidates import kept_sets, sets_inside_columns
from obs_kernels.training.squad_batches import squad_loss

SCRATCH = 1 << 28
"""Elements of a table of gains at a time."""


@torch.no_grad()
def reorder_channels_(model: nn.Module, pattern: str, loader: Any, base: OBSConfig, *, rounds: int) -> dict[str, float]:
    """Reorder in place; the gain of the diagonal model over all reordered layers, after over before."""
    parsed = parse_pattern(pattern)
    assert isinstance(parsed, VNMPattern)
    pruner = OBSPruner(model, base)
    with torch.enable_grad():
        pruner.collect(loader, squad_loss)
    diagonals = {name: fisher.diagonal(dim1=1, dim2=2).reshape(-1) for name, fisher in pruner.fishers().items()}
    before = after = 0.0
    for name, producer, consumer, span in _pairs(model):
        weight = consumer.weight
        scores = 0.5 * diagonals[f"{name}.weight"].view_as(weight) * weight**2
        order = best_order(scores, parsed, span, rounds=rounds)
        before += float(_value(scores, parsed))
        after += float(_value(scores[:, order], parsed))
        consumer.weight.copy_(weight[:, order].clone())
        producer.weight.copy_(producer.weight[order].clone())
        producer.bias.copy_(producer.bias[order].clone())
    return {"kept score": after / before}


def best_order(scores: Tensor, pattern: VNMPattern, span: int, *, rounds: int, seed: int = 0) -> Tensor:
    """Order of the columns of ``scores`` [R, C]; columns stay within their ``span``."""
    m = pattern.m
    gen = torch.Generator(device=scores.device).manual_seed(seed)
    order = torch.arange(scores.shape[1], device=scores.device).view(-1, span // m, m)  # [spans, groups, m]
    groups = span // m
    out_at, in_at = torch.cartesian_prod(torch.arange(m), torch.arange(m)).to(scores.device).unbind(1)
    for _ in range(rounds):
        at = torch.rand(order.shape[:2], generator=gen, device=scores.device).argsort(1)[:, : groups // 2 * 2]
        own = order.gather(1, at[:, :, None].expand(-1, -1, m)).view(-1, 2, m)  # pairs of groups
        one = own[:, 0, None].repeat(1, m * m, 1)
        two = own[:, 1, None].repeat(1, m * m, 1)
        swap = torch.arange(m * m, device=scores.device)
        one[:, swap, out_at], two[:, swap, in_at] = own[:, 1][:, in_at], own[:, 0][:, out_at]
        now = _group_values(scores, own.reshape(-1, m), pattern).view(-1, 2).sum(1)
        then = _group_values(scores, torch.stack([one, two], 2).reshape(-1, m), pattern).view(-1, m * m, 2).sum(2)
        best, index = then.max(1)
        better = best > now * (1 + 1e-6)
        every = torch.arange(own.shape[0], device=scores.device)
        chosen = torch.stack([one[every, index], two[every, index]], 1)
        own = torch.where(better[:, None, None], chosen, own).view(order.shape[0], -1, m)
        order.scatter_(1, at[:, :, None].expand(-1, -1, m), own)
    return order.flatten()


def _value(scores: Tensor, pattern: VNMPattern) -> Tensor:
    columns = torch.arange(scores.shape[1], device=scores.device).view(-1, pattern.m)
    return _group_values(scores, columns, pattern).sum()


def _group_values(scores: Tensor, columns: Tensor, pattern: VNMPattern) -> Tensor:
    """[N] score that the best panels keep of the groups ``columns`` [N, m], summed over all panels."""
    v, n, m, kept = pattern.v, pattern.n, pattern.m, pattern.num_columns
    rows = scores.shape[0]
    sets = kept_sets(n, m).to(scores.device)
    inside = sets_inside_columns(n, m, kept).to(scores.device)
    parts = []
    for part in columns.split(max(1, SCRATCH // (rows * inside.numel()))):
        gains = scores[:, part][:, :, sets].sum(-1)  # [R, N, sets]
        best = gains[..., inside[:, 0]]  # [R, N, column sets]
        for i in range(1, inside.shape[1]):
            best = torch.maximum(best, gains[..., inside[:, i]])
        parts.append(best.view(rows // v, v, *best.shape[1:]).sum(1).amax(-1).sum(0))
    return torch.cat(parts)


def _pairs(model: nn.Module) -> list[tuple[str, nn.Linear, nn.Linear, int]]:
    """Name of the weight whose columns are reordered, the layer before, the layer, and the span columns stay in."""
    modules = dict(model.named_modules())
    found = []
    for name, module in modules.items():
        if name.endswith(".attention.output.dense"):
            attention = name.removesuffix(".output.dense") + ".self"
            found.append((name, modules[f"{attention}.value"], module, modules[attention].attention_head_size))
        elif name.endswith(".output.dense"):
            before = modules[name.removesuffix(".output.dense") + ".intermediate.dense"]
            found.append((name, before, module, module.in_features))
    if not found:
        raise SystemExit("no FFN pair was found; this study knows the modules of a BERT encoder")
    return found  # type: ignore[return-value]
