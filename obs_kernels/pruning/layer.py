# SPDX-License-Identifier: Apache-2.0
"""One pruned weight: its mask, its Fisher sum, and the layers that a configuration selects in a model."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from obs_kernels.errors import ConfigError, DTypeNotSupportedError, NonFiniteError, ShapeNotSupportedError
from obs_kernels.ops import accumulate_fisher_
from obs_kernels.patterns import Pattern
from obs_kernels.pruning.config import OBSConfig

if TYPE_CHECKING:
    from obs_kernels.pruning.gradient_buffer import GradientBuffer


@dataclass(eq=False)
class PrunedLayer:
    """State of one weight [R, C]; ``padded`` >= [R, C] is the shape that the pattern needs (on_unsupported="pad").

    Gradients may wait in a ``GradientBuffer`` before they are added to the Fisher sum. ``fisher_sum`` and ``num_grads``
    count them: the sum itself is out of reach of other modules, and its only reader adds what waits first.
    """

    name: str
    module: nn.Module
    padded: tuple[int, int]
    block_size: int
    mask: Tensor
    """[R, C] bool on the weight's device; from ``w != 0`` once, afterwards only the mask counts."""
    first_mask: Tensor
    """[R, C] bool: the mask before any pruning."""
    transposed: bool = False
    """Whether the module stores [C, R], inputs first: GPT-2's Conv1D."""
    _sum: Tensor | None = field(default=None, init=False, repr=False)
    _added: int = field(default=0, init=False, repr=False)
    """Gradients in ``_sum``."""
    _buffer: GradientBuffer | None = field(default=None, init=False, repr=False)

    @property
    def fisher_sum(self) -> Tensor | None:
        """[B, D, D] float32, sum of g g^T over ``num_grads`` gradients; None before the first. Frees buffered rows."""
        if self._buffer is not None:
            self._buffer.release(self)
        return self._sum

    @property
    def has_fisher(self) -> bool:
        """Whether the memory of the Fisher sum is taken; asks without adding what waits."""
        return self._sum is not None

    @property
    def num_grads(self) -> int:
        """Gradients that came, buffered ones included."""
        return self._added + (0 if self._buffer is None else self._buffer.waiting(self))

    @property
    def weight(self) -> nn.Parameter:
        """The parameter, looked up afresh: wrappers may replace it."""
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def matrix(self) -> Tensor:
        """The weight as [R, C], outputs first: a view without gradient, through which the weight is written."""
        return self.as_matrix(self.weight.detach())

    def as_matrix(self, values: Tensor) -> Tensor:
        """A tensor of the weight's shape, its gradient say, as [R, C]."""
        return values.mT if self.transposed else values

    @property
    def parameter_name(self) -> str:
        """Name in ``model.named_parameters()``."""
        return f"{self.name}.weight" if self.name else "weight"

    @property
    def num_blocks(self) -> int:
        """B = ceil(R * C / D), of the padded shape."""
        return -(-self.padded[0] * self.padded[1] // self.block_size)

    @property
    def row_size(self) -> int:
        """B * D: elements of one gradient, padding included."""
        return self.num_blocks * self.block_size

    @property
    def fisher_bytes(self) -> int:
        """Bytes of the Fisher sum."""
        return 4 * self.num_blocks * self.block_size**2

    def allocate(self) -> Tensor:
        """Memory of the Fisher sum, made of zeros if there is none; for ``GradientBuffer``, which fills it."""
        if self._sum is None:
            shape = (self.num_blocks, self.block_size, self.block_size)
            self._sum = torch.zeros(shape, dtype=torch.float32, device=self.weight.device)
        return self._sum

    def drop_empty(self) -> None:
        """Give back the memory of a sum that holds nothing."""
        if not self._added:
            self._sum = None

    def add_rows(self, rows: Tensor) -> None:
        """Accumulate gradients ``rows`` [S, B * D] into the Fisher sum, in one pass over it; for ``GradientBuffer``."""
        accumulate_fisher_(self.allocate(), rows, scale=1.0)
        self._added += rows.shape[0]

    def mean_fisher(self) -> Tensor:
        """[B, D, D] undamped mean of g g^T, a new tensor."""
        return self.require_sum() / self.num_grads

    def require_sum(self) -> Tensor:
        """``fisher_sum``, itself; ``ConfigError`` if no gradient came."""
        fisher = self.fisher_sum
        if fisher is None or self.num_grads == 0:
            raise ConfigError(
                f"{self.name} has no gradients; call collect(loader, loss_fn), or loss.backward() and "
                f"accumulate(), before prune()"
            )
        return fisher

    def set_fisher(self, fisher_sum: Tensor | None, num_grads: int) -> None:
        """Take a sum [B, D, D] float32 over ``num_grads`` gradients in place of the present one and what waits."""
        if self._buffer is not None:
            self._buffer.discard(self)
        self._sum, self._added = fisher_sum, num_grads

    def clear(self) -> None:
        """Drop the Fisher sum, and the gradients that wait for it."""
        self.set_fisher(None, 0)

    def pad(self, values: Tensor) -> Tensor:
        """``values`` [..., R, C] padded with zeros (False) to the padded shape."""
        rows, cols = values.shape[-2:]
        if (rows, cols) == self.padded:
            return values
        return F.pad(values, (0, self.padded[1] - cols, 0, self.padded[0] - rows))

    def crop(self, values: Tensor) -> Tensor:
        """The [R, C] part of a padded tensor."""
        return values[: self.mask.shape[0], : self.mask.shape[1]]

    def live_damp(self, cfg: OBSConfig) -> Tensor:
        """Absolute damping of the mean Fisher, a float64 scalar on the weight's device that no one has waited for.

        ``cfg.damp``, or the share of the mean diagonal of F over live weights (tiny if that is 0).
        """
        if cfg.damp is not None:
            return torch.full((), cfg.damp, dtype=torch.float64, device=self.weight.device)
        diagonal = self.require_sum().diagonal(dim1=1, dim2=2).reshape(-1)[: self.padded[0] * self.padded[1]]
        live = self.pad(self.mask).reshape(-1)
        share = cfg.dampening_frac / (live.sum().clamp_min(1) * self.num_grads)
        damp = torch.where(live, diagonal, 0.0).sum(dtype=torch.float64) * share
        # a layer that no gradient reaches: F = 0, any positive value gives magnitude pruning
        return torch.where(damp > 0, damp, 1e-12)


@dataclass(frozen=True)
class SkippedLayer:
    """A candidate that is not pruned, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


def find_layers(model: nn.Module, cfg: OBSConfig) -> tuple[list[PrunedLayer], list[SkippedLayer]]:
    """Layers of ``model`` that ``cfg`` selects, in the order of their names in the model, and those left out with the
    reason.

    A shared module is counted once. A weight that an embedding or another module also holds is left out.

    Raises:
        ConfigError: a target matches nothing, or all is ignored. ShapeNotSupportedError, NonFiniteError: as named.
    """
    pattern: Pattern = cfg.parsed_pattern
    modules = dict(model.named_modules())
    owners = _weight_owners(modules)
    layers: list[PrunedLayer] = []
    skipped: list[SkippedLayer] = []
    matched: set[str] = set()
    for name, module in modules.items():
        hits = {t for t in cfg.targets if _matches(t, name, module)}
        matched |= hits
        weight = getattr(module, "weight", None)
        if not hits or not isinstance(weight, nn.Parameter) or weight.dim() != 2:
            continue
        shape = tuple(weight.shape[::-1] if is_transposed(module) else weight.shape)
        shared = (
            [other for other in owners[weight.data_ptr(), weight.numel()] if other != name] if weight.numel() else []
        )
        if any(_matches(t, name, module) for t in cfg.ignore):
            skipped.append(SkippedLayer(name, shape, "ignored"))
        elif isinstance(module, nn.Embedding) or shared:
            skipped.append(SkippedLayer(name, shape, f"tied with {shared[0]}" if shared else "embedding"))
        elif not weight.numel():
            skipped.append(SkippedLayer(name, shape, "empty"))
        else:
            layer = _make_layer(name, module, weight, pattern, cfg)
            layers.append(layer) if isinstance(layer, PrunedLayer) else skipped.append(layer)
    missing = [t for t in cfg.targets if t not in matched]
    if missing:
        kinds = sorted(
            {type(m).__name__ for m in modules.values() if isinstance(getattr(m, "weight", None), nn.Parameter)}
        )
        raise ConfigError(
            f"targets {missing} match nothing in {type(model).__name__}; modules with weights: {', '.join(kinds)}"
        )
    if not layers:
        reasons = "; ".join(f"{s.name}: {s.reason}" for s in skipped[:3])
        raise ConfigError(f"no layer is left to prune in {type(model).__name__} ({reasons}); change targets or ignore")
    return layers, skipped


def _make_layer(
    name: str, module: nn.Module, weight: nn.Parameter, pattern: Pattern, cfg: OBSConfig
) -> PrunedLayer | SkippedLayer:
    transposed = is_transposed(module)
    values = weight.detach().mT if transposed else weight.detach()
    shape = (int(values.shape[0]), int(values.shape[1]))
    if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise DTypeNotSupportedError(f"{name}.weight must be a float tensor, got {weight.dtype}; ignore this layer")
    padded = shape
    whole_rows = cfg.curvature != "block"
    try:
        pattern.check_shape(shape, name=f"{name}.weight")
        size = shape[1] if whole_rows else _block_size(shape, pattern, cfg, name)
    except ShapeNotSupportedError as error:
        if cfg.on_unsupported == "raise":
            raise
        if cfg.on_unsupported == "skip":
            return SkippedLayer(name, shape, str(error))
        size = cfg.block_size
        rows, cols = pattern.padded_shape(shape)
        padded = (rows, -(-cols // size) * size if pattern.fixed_count and not whole_rows else cols)
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(
            f"{name}.weight must be finite, got {int((~torch.isfinite(values)).sum())} NaN or Inf; repair the model"
        )
    alive = (values != 0).contiguous()
    if whole_rows:
        from obs_kernels.pruning.row_layer import RowLayer  # of which this module knows nothing else

        made: PrunedLayer = RowLayer(
            name, module, padded, padded[1], alive, alive.clone(), transposed, weighted=cfg.curvature == "row"
        )
        return made
    return PrunedLayer(name, module, padded, size, alive, alive.clone(), transposed)


def is_transposed(module: nn.Module) -> bool:
    """Whether the module stores its weight [inputs, outputs]: transformers' Conv1D, which GPT-2 is made of."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _block_size(shape: tuple[int, int], pattern: Pattern, cfg: OBSConfig, name: str) -> int:
    size = cfg.block_size
    if pattern.fixed_count and shape[1] % size:
        raise ShapeNotSupportedError(
            f"{name}.weight is [{shape[0]}, {shape[1]}]; fisher_block_size = {size} must divide cols for "
            f"pattern {pattern}. "
            f"Fix: fisher_block_size = {cfg.parsed_pattern.multiples()[1]}, or on_unsupported='pad' or 'skip'"
        )
    return size


def _weight_owners(modules: dict[str, nn.Module]) -> dict[tuple[int, int], list[str]]:
    owners: dict[tuple[int, int], list[str]] = {}
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault((parameter.data_ptr(), parameter.numel()), []).append(name)
    return owners


def _matches(rule: str, name: str, module: nn.Module) -> bool:
    """A rule is a class name, a module name (also below a data-parallel ``module.``), or ``re:`` and a regular
    expression.
    """
    bare = name.removeprefix("module.")
    if rule.startswith("re:"):
        try:
            return re.fullmatch(rule[3:], name) is not None or re.fullmatch(rule[3:], bare) is not None
        except re.error as error:
            raise ConfigError(f"{rule!r} is no regular expression: {error}") from None
    return rule in (type(module).__name__, name, bare, f"{bare}.weight")
