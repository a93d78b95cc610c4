# SPDX-License-Identifier: Apache-2.0
"""``SparseLinear``, and the exchange of ``nn.Linear`` for it and back."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor, nn

from obs_kernels.errors import ConfigError, SparsityPatternError
from obs_kernels.ops import SparseWeight, pack, sparse_linear
from obs_kernels.patterns import NMPattern, Pattern, VNMPattern, parse_pattern

log = logging.getLogger("obs_kernels")
PRUNED_ATTRIBUTE = "obs_kernels_pruned"
"""Set by ``OBSPruner.finalize``: {"pattern": text, "masks": {module name: mask}}."""

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


class SparseLinear(nn.Module):
    """``nn.Linear`` with a packed weight.

    Buffers ``values``, ``codes``, ``columns`` (panels only) and the bias as before.
    """

    values: Tensor
    codes: Tensor
    columns: Tensor | None

    def __init__(
        self, sparse: SparseWeight, bias: nn.Parameter | None = None, *, activation: str | None = None
    ) -> None:
        super().__init__()
        self.pattern = sparse.pattern
        self.out_features, self.in_features = sparse.shape
        self.activation = activation
        self.register_buffer("values", sparse.values)
        self.register_buffer("codes", sparse.codes)
        self.register_buffer("columns", sparse.columns)
        self.bias = bias

    @property
    def sparse(self) -> SparseWeight:
        """The packed weight, made of the buffers as they are now."""
        return SparseWeight(self.values, self.codes, self.columns, self.pattern, (self.out_features, self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """``activation(x W^T + bias)``, x [..., C] -> [..., R]."""
        return sparse_linear(x, self.sparse, self.bias, activation=self.activation)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"{self.in_features}, {self.out_features}, pattern={self.pattern}, bias={self.bias is not None}"

    @classmethod
    def from_linear(cls, linear: nn.Linear, pattern: str | Pattern, mask: Tensor | None = None) -> SparseLinear:
        """Pack a pruned ``nn.Linear``; ``mask`` defaults to ``weight != 0``."""
        weight = linear.weight.detach()
        return cls(pack(weight, weight != 0 if mask is None else mask, pattern), linear.bias)

    def to_linear(self) -> nn.Linear:
        """The dense module with zeros."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta", dtype=self.values.dtype)
        linear.weight = nn.Parameter(self.sparse.to_dense(), requires_grad=False)
        linear.bias = self.bias  # type: ignore[assignment]
        return linear


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


def compress_(model: nn.Module, tokens: int | None = None, *, pattern: str | None = None) -> dict[str, str]:
    """Replace pruned ``nn.Linear`` modules by ``SparseLinear``, in place; returns {module name: pattern}.

    Masks and pattern come from ``OBSPruner.finalize``; in a model without them, ``pattern`` or the zeros decide. Layers
    that are not pruned, or whose pattern has no packed format, stay dense.

    Args:
        model: changed in place; names, bias, dtype and device stay.
        tokens: tokens that a call will carry. Not used in this version: every layer that fits is packed.
        pattern: the pattern to pack, for a model that was not pruned in this process.

    Raises:
        ConfigError: nothing to compress. SparsityPatternError: a weight breaks the pattern; nothing is changed.
    """
    known: dict[str, Any] = getattr(model, PRUNED_ATTRIBUTE, {})
    wanted = pattern if pattern is not None else known.get("pattern")
    parsed = None if wanted is None else parse_pattern(wanted)
    if parsed is not None and not isinstance(parsed, NMPattern):
        raise ConfigError(
            f"pattern {parsed} has no packed format; only n:m and v:2:m are packed, save it dense with zeros"
        )
    _check_has_parents(model)
    packed: dict[str, SparseLinear] = {}
    for name, module in model.named_modules():
        if type(module) is not nn.Linear:
            continue
        mask = known.get("masks", {}).get(name)
        if known and mask is None:
            continue
        fits = parsed if parsed is not None else detect_pattern(module.weight.detach())
        if fits is None or (not known and parsed is not None and bool((module.weight != 0).all())):
            continue
        if mask is not None and bool((module.weight.detach().masked_fill(mask, 0.0) != 0).any()):
            raise SparsityPatternError(
                f"{name}: pruned weights are no longer zero; call pruner.apply_masks() before compress_"
            )
        try:
            packed[name] = SparseLinear.from_linear(module, fits, mask)
        except SparsityPatternError as error:
            raise SparsityPatternError(f"{name}: {error}") from None
    if not packed:
        raise ConfigError("no pruned nn.Linear in the model; prune it first, or give pattern=")
    left = [name for name in known.get("masks", {}) if type(model.get_submodule(name)) is not nn.Linear]
    if left:
        log.warning("%d pruned layers are no nn.Linear and stay dense, with zeros: %s", len(left), ", ".join(left[:3]))
    for name, sparse in packed.items():
        replace_module(model, model.get_submodule(name), sparse)
    return {name: str(sparse.pattern) for name, sparse in packed.items()}


def decompress_(model: nn.Module) -> list[str]:
    """Replace every ``SparseLinear`` by an ``nn.Linear`` with zeros, in place; returns their names."""
    _check_has_parents(model)
    found = {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    for module in found.values():
        replace_module(model, module, module.to_linear())
    return list(found)


def _check_has_parents(model: nn.Module) -> None:
    if isinstance(model, (nn.Linear, SparseLinear)):
        raise ConfigError(
            f"model must contain the layers to replace, got a bare {type(model).__name__}; wrap it in nn.Sequential"
        )


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` stands; a shared module stays shared."""
    new.train(old.training)
    for parent in model.modules():
        for child, module in _children(parent):
            if module is old:
                setattr(parent, child, new)


def _children(parent: nn.Module) -> list[tuple[str, nn.Module]]:
    """All children, also those that ``named_children`` leaves out because the module came before under another name."""
    return [(name, module) for name, module in parent._modules.items() if module is not None]


def empty_sparse_linear(linear: nn.Linear, pattern: NMPattern, tensors: dict[str, Tensor]) -> SparseLinear:
    """A ``SparseLinear`` in place of ``linear`` around loaded tensors ``values``, ``codes`` and ``columns``."""
    shape = (linear.out_features, linear.in_features)
    sparse = SparseWeight(tensors["values"], tensors["codes"], tensors.get("columns"), pattern, shape)
    sparse.validate()
    return SparseLinear(sparse, linear.bias)


__all__ = [
    "PRUNED_ATTRIBUTE",
    "SparseLinear",
    "compress_",
    "decompress_",
    "detect_pattern",
    "empty_sparse_linear",
    "replace_module",
]
