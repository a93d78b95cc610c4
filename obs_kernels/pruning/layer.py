# SPDX-License-Identifier: Apache-2.0
"""One pruned weight: its mask and its Fisher sum; and a weight that is left out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from obs_kernels.errors import ConfigError
from obs_kernels.ops import accumulate_fisher_
from obs_kernels.patterns import Pattern, UnstructuredPattern
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
    share: float = 1.0
    """Its sparsity as a share of the pattern's, see ``OBSConfig.layer_sparsity``."""
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
    def bias(self) -> nn.Parameter | None:
        """The parameter [R] beside the weight, if there is one."""
        bias = getattr(self.module, "bias", None)
        return bias if isinstance(bias, nn.Parameter) and bias.shape == self.mask.shape[:1] else None

    @property
    def matrix(self) -> Tensor:
        """The weight as [R, C], outputs first: a view without gradient, through which the weight is written."""
        return self.as_matrix(self.weight.detach())

    def as_matrix(self, values: Tensor) -> Tensor:
        """A tensor of the weight's shape, its gradient say, as [R, C]."""
        return values.mT if self.transposed else values

    def pattern_at(self, stage: Pattern) -> Pattern:
        """``stage``, or what stands for it in a layer with a sparsity of its own."""
        if self.share == 1.0 or not isinstance(stage, UnstructuredPattern):
            return stage
        return replace(stage, target=round(stage.target * self.share, 12))

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
