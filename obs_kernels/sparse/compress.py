# SPDX-License-Identifier: Apache-2.0
"""The exchange of linear layers for packed ones and back, and which of them stay dense."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from obs_kernels import checks
from obs_kernels.errors import ConfigError, SparsityPatternError
from obs_kernels.ops.dispatch import unavailable
from obs_kernels.patterns import NMPattern, VNMPattern, parse_pattern
from obs_kernels.sparse.attention import share_inputs_, unshare_
from obs_kernels.sparse.crossover import KernelTable, packaged_table
from obs_kernels.sparse.ffn import fuse_pairs_, unfuse_
from obs_kernels.sparse.linear import PRUNED_ATTRIBUTE, SparseLinear, is_packable, replace_module, weight_of
from obs_kernels.timing import Timed, interleave, make_clock, spread

log = logging.getLogger("obs_kernels")

# from the sparsest down, panels before rows of their own; a weight that fits none of them stays dense
DETECTED: tuple[NMPattern, ...] = (
    *(
        pattern
        for m in (32, 16, 8)
        for pattern in (*(VNMPattern(v=v, n=2, m=m) for v in (256, 128, 64, 32, 16)), NMPattern(2, m))
    ),
    NMPattern(1, 4),
    NMPattern(2, 4),
    NMPattern(4, 8),
)
_MEASURE_SECONDS = 0.1


class CompressionReport(dict[str, str]):
    """What ``compress_`` did: {name of a packed layer: pattern}.

    ``dense`` has {name: reason} of the pruned layers that stayed dense, ``fused`` the names of the layers that took an
    activation in, ``shared`` the attention blocks whose layers share an input, and ``notes`` what else is to be known.
    """

    def __init__(
        self, packed: dict[str, str], dense: dict[str, str], fused: list[str], shared: list[str], notes: list[str]
    ) -> None:
        super().__init__(packed)
        self.dense = dense
        self.fused = fused
        self.shared = shared
        self.notes = notes

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "packed": dict(self),
            "dense": self.dense,
            "fused": self.fused,
            "shared": self.shared,
            "notes": self.notes,
        }


@dataclass(frozen=True)
class _Candidate:
    """A layer that will be packed, unless it loses."""

    module: nn.Module
    pattern: NMPattern
    mask: Tensor | None


def detect_pattern(weight: Tensor) -> NMPattern | None:
    """The sparsest packable pattern that the zeros of ``weight`` [R, C] obey, or None."""
    mask = weight != 0
    if bool(mask.all()):
        return None
    for pattern in DETECTED:
        rows, cols = pattern.multiples()
        if mask.shape[0] % rows == 0 and mask.shape[1] % cols == 0 and pattern.count_violations(mask) == 0:
            return pattern
    return None


def compress_(
    model: nn.Module,
    tokens: int | None = None,
    *,
    pattern: str | None = None,
    measure: bool = False,
    keep_dense: bool = False,
    fuse_ffn: str | None = None,
) -> CompressionReport:
    """Replace pruned ``nn.Linear`` (and Conv1D) modules by ``SparseLinear``, in place.

    Masks and pattern come from ``OBSPruner.finalize``; in a model without them, ``pattern`` or the zeros decide. Layers
    that are not pruned, whose pattern has no packed format, or whose weight is tied to another module stay dense.

    Args:
        model: changed in place; names, bias, dtype and device stay.
        tokens: tokens (batch x length) that a call will carry. Layers that lose against the dense product there stay
            dense, by the measured rows that ship with the package (``sparse.crossover``: bare kernels in bf16, on the
            GPU they name, wherever the model is now). None packs every layer that fits.
        pattern: the pattern to pack, for a model that was not pruned in this process.
        measure: time both products at ``tokens`` here, on the model's device and in its dtype, instead of the rows.
        keep_dense: keep the dense weights too, so that ``SparseLinear.dispatch`` can switch: "auto" runs dense below
            the crossing of the rows. Takes the memory of both.
        fuse_ffn: "token" or "feature" moves the activation between the two feed-forward layers of transformers'
            BERT-like, DistilBERT and GPT-2 blocks into the first one's product; "feature" also lets what is between
            them lie feature-major. None fuses nothing.

    Query, key and value layers of transformers' attention, all packed, share one transposition of their input from the
    number of tokens on at which measured tiles say that they gain by it.

    Returns:
        {module name: pattern} of the packed layers, with the reasons for the dense ones beside it.

    Raises:
        ConfigError: nothing to compress, or a bad argument. SparsityPatternError: a weight breaks the pattern (names
        the layer, the group and its entries). Nothing is changed then.
    """
    _check_arguments(tokens, measure=measure, fuse_ffn=fuse_ffn)
    _check_has_parents(model)
    dense: dict[str, str] = {}
    found = dict(_candidates(model, pattern, dense))
    if not found:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(dense.items())[:3])
        raise ConfigError(
            f"no pruned nn.Linear in the model{f' that can be packed ({reasons})' if reasons else ''}; "
            f"prune it first, or give pattern="
        )
    table = packaged_table()
    packed: dict[str, SparseLinear] = {}
    times: dict[Any, tuple[float, float]] = {}
    for name, candidate in found.items():
        rows, cols = weight_of(candidate.module).shape
        if tokens is not None and not measure:
            reason = table.why_dense(rows, cols, tokens, candidate.pattern)
            if reason is not None:
                _check_pattern(name, candidate)
                dense[name] = reason
                continue
        layer = _pack(name, candidate, keep_dense=keep_dense, table=table)
        if tokens is not None and measure:
            reason = _loses_here(layer, candidate.module, tokens, times)
            if reason is not None:
                dense[name] = reason
                continue
        packed[name] = layer
    for name, sparse in packed.items():
        replace_module(model, model.get_submodule(name), sparse)
    fused, shared = chain_(model, fuse_ffn)
    notes = _notes(packed, tokens, measure=measure, table=table)
    for note in notes:
        log.info("compress_: %s", note)
    if dense and tokens is not None:
        log.info("compress_: %d of %d pruned layers stay dense at %d tokens", len(dense), len(found), tokens)
    return CompressionReport({name: str(layer.pattern) for name, layer in packed.items()}, dense, fused, shared, notes)


def decompress_(model: nn.Module) -> list[str]:
    """Replace every ``SparseLinear`` by the dense layer with zeros, in place; returns their names.

    Activations that were fused into a product are modules again, and no block shares an input.
    """
    _check_has_parents(model)
    found = {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    new = {name: module.to_linear() for name, module in found.items()}
    for name, module in found.items():
        replace_module(model, module, new[name])
    unfuse_(model)
    unshare_(model)
    return list(found)


def chain_(model: nn.Module, fuse_ffn: str | None) -> tuple[list[str], list[str]]:
    """What packed layers do for each other: (first layers of fused pairs, attention blocks that share an input)."""
    fused = fuse_pairs_(model, feature_major=fuse_ffn == "feature") if fuse_ffn is not None else []
    return fused, share_inputs_(model)


def _candidates(model: nn.Module, pattern: str | None, dense: dict[str, str]) -> Iterator[tuple[str, _Candidate]]:
    """Layers that can be packed; the pruned ones among the others go to ``dense`` with the reason."""
    known: dict[str, Any] = getattr(model, PRUNED_ATTRIBUTE, {})
    masks: dict[str, Tensor] = known.get("masks", {})
    wanted = pattern if pattern is not None else known.get("pattern")
    parsed = None if wanted is None else parse_pattern(wanted)
    if parsed is not None and not isinstance(parsed, NMPattern):
        raise ConfigError(
            f"pattern {parsed} has no packed format; only n:m and v:2:m are packed, save it dense with zeros"
        )
    owners = _owners(model)
    for name, module in model.named_modules():
        mask = masks.get(name)
        if not is_packable(module):
            if mask is not None and not isinstance(module, SparseLinear):
                dense[name] = f"{type(module).__name__} is no nn.Linear"
            continue
        if known and mask is None:
            continue
        weight = weight_of(module)
        fits = parsed if parsed is not None else detect_pattern(weight)
        if fits is None or (not known and parsed is not None and bool((weight != 0).all())):
            continue
        shared = [owner for owner in owners[id(module.weight)] if owner != name]
        if shared:
            dense[name] = f"tied with {shared[0]}"
            continue
        yield name, _Candidate(module, fits, mask)
    left = [name for name, reason in dense.items() if reason.endswith("is no nn.Linear")]
    if left:
        log.warning("%d pruned layers are no nn.Linear and stay dense, with zeros: %s", len(left), ", ".join(left[:3]))


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Modules by the identity of their parameters; a module under two names is one."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    return owners


def _check_zeros(name: str, candidate: _Candidate) -> None:
    """Refuse weights that grew back where the mask has pruned them."""
    if candidate.mask is not None and bool((weight_of(candidate.module).masked_fill(candidate.mask, 0.0) != 0).any()):
        raise SparsityPatternError(
            f"{name}: pruned weights are no longer zero; call pruner.apply_masks() before compress_"
        )


def _check_pattern(name: str, candidate: _Candidate) -> None:
    """What packing would refuse is refused in a layer that stays dense too."""
    _check_zeros(name, candidate)
    with _named(name, candidate):
        candidate.pattern.validate_mask(_kept(candidate))


def _pack(name: str, candidate: _Candidate, *, keep_dense: bool, table: KernelTable) -> SparseLinear:
    _check_zeros(name, candidate)
    with _named(name, candidate):
        layer = SparseLinear.from_linear(candidate.module, candidate.pattern, candidate.mask, keep_dense=keep_dense)
    if keep_dense:
        layer.sparse_from = table.sparse_from(layer.out_features, layer.in_features, layer.pattern)
    return layer


@contextmanager
def _named(name: str, candidate: _Candidate) -> Iterator[None]:
    """The layer's name in front of what is wrong with its pattern, and the entries behind it."""
    try:
        yield
    except SparsityPatternError as error:
        raise SparsityPatternError(f"{name}: {error}{_entries(candidate)}") from None


def _entries(candidate: _Candidate) -> str:
    """The kept weights of the first group with too many; nothing where a panel is at fault, whose columns are named."""
    kept, m = _kept(candidate), candidate.pattern.m
    bad = kept.unflatten(1, (-1, m)).sum(2) > candidate.pattern.n
    if not bool(bad.any()):
        return ""
    row, group = bad.nonzero()[0].tolist()
    columns = [group * m + c for c in kept[row, group * m : (group + 1) * m].nonzero().flatten().tolist()]
    weight = weight_of(candidate.module)
    return ". Entries: " + ", ".join(f"[{row}, {c}] = {float(weight[row, c]):.4g}" for c in columns)


def _kept(candidate: _Candidate) -> Tensor:
    return weight_of(candidate.module) != 0 if candidate.mask is None else candidate.mask


@torch.no_grad()
def _loses_here(
    layer: SparseLinear, linear: nn.Module, tokens: int, times: dict[Any, tuple[float, float]]
) -> str | None:
    """Time both products; equal shapes once. The host's share is hidden, as a CUDA graph hides it."""
    values, device = layer.values, layer.values.device
    key = (layer.out_features, layer.in_features, str(layer.pattern), values.dtype, device)
    if key not in times:
        generator = torch.Generator(device).manual_seed(0)
        x = torch.empty(tokens, layer.in_features, dtype=values.dtype, device=device).normal_(generator=generator)
        weight, bias, was = weight_of(linear).contiguous(), layer.bias, layer.dispatch
        layer.dispatch = "sparse"
        ways = {"sparse": Timed(lambda _: layer(x)), "dense": Timed(lambda _: F.linear(x, weight, bias))}
        found = interleave(ways, make_clock(device), seconds=_MEASURE_SECONDS, min_repeats=3)
        layer.dispatch = was
        times[key] = (spread(found["sparse"]).us, spread(found["dense"]).us)
    sparse_us, dense_us = times[key]
    if sparse_us < dense_us:
        return None
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    return f"dense is faster at {tokens:,} tokens: {dense_us:,.1f} us, sparse {sparse_us:,.1f} us (timed on {where})"


def _notes(packed: dict[str, SparseLinear], tokens: int | None, *, measure: bool, table: KernelTable) -> list[str]:
    notes = []
    if tokens is not None and not measure:
        notes.append(f"layers were chosen by kernel rows of {table.device} in bf16, commit {table.commit}")
    kinds = {layer.values.device.type for layer in packed.values()}
    for kind in sorted(kinds):
        notes += reference_note(kind)
    return notes


def reference_note(kind: str) -> list[str]:
    """That packed layers on devices of ``kind`` run without a kernel, and why; empty where there is one."""
    reason = unavailable("sparse_linear", "cuda", kind)
    if reason is None:
        return []
    return [f"sparse_linear on {kind} runs on the reference path, unpacking W in each call: cuda: {reason}"]


def _check_arguments(tokens: int | None, *, measure: bool, fuse_ffn: str | None) -> None:
    if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1):
        raise ConfigError(f"tokens must be a positive whole number (batch x length) or None, got {tokens!r}")
    if measure and tokens is None:
        raise ConfigError("measure=True needs tokens, got None; give the tokens of a call (batch x length)")
    if fuse_ffn is not None:
        checks.check_choice("fuse_ffn", fuse_ffn, checks.LAYOUTS)


def _check_has_parents(model: nn.Module) -> None:
    if is_packable(model) or isinstance(model, SparseLinear):
        raise ConfigError(
            f"model must contain the layers to replace, got a bare {type(model).__name__}; wrap it in nn.Sequential"
        )


__all__ = ["CompressionReport", "compress_", "decompress_", "detect_pattern"]
