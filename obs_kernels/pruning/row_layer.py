# SPDX-License-Identifier: Apache-2.0
"""One pruned weight under row (or layer) curvature: a Hessian for all its rows, and a number a row.

``H = 1/S sum_t |dy_t|^2 x_t x_t^T`` over all tokens of S samples, ``h_r = 1/S sum_t dy_tr^2``: dy is the gradient of
the sample's own loss with respect to the output. The curvature of row r is taken as ``h_r / sum(h) H``. Under
``curvature="layer"`` every token and every row weighs 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from obs_kernels.errors import ConfigError
from obs_kernels.ops import accumulate_hessian_
from obs_kernels.pruning.config import OBSConfig
from obs_kernels.pruning.gradient_buffer import allocate_sums
from obs_kernels.pruning.layer import PrunedLayer
from obs_kernels.pruning.phase_times import PhaseTimes, phase
from obs_kernels.pruning.samples import Samples


@dataclass(eq=False)
class RowLayer(PrunedLayer):
    """``fisher_sum`` is the sum of the Hessian, [1, C, C] of the padded width; ``row_sum`` [R] f64 that of the rows."""

    weighted: bool = True
    """Whether tokens and rows weigh as the loss says, or all alike (``curvature="layer"``)."""
    row_sum: Tensor | None = field(default=None, init=False, repr=False)

    @property
    def num_blocks(self) -> int:
        """One matrix for all rows."""
        return 1

    def allocate(self) -> Tensor:
        """Memory of both sums."""
        if self.row_sum is None:
            self.row_sum = torch.zeros(self.padded[0], dtype=torch.float64, device=self.weight.device)
        return super().allocate()

    def drop_empty(self) -> None:
        """Give back the memory of sums that hold nothing."""
        super().drop_empty()
        if not self.has_fisher:
            self.row_sum = None

    def set_fisher(self, fisher_sum: Tensor | None, num_grads: int) -> None:
        """Take a sum [1, C, C]; that of the rows goes to ``row_sum``."""
        super().set_fisher(fisher_sum, num_grads)
        self.row_sum = None

    def add_tokens(self, x: Tensor, dy: Tensor, scale: float) -> None:
        """Add tokens x [N, T, C] whose outputs have the gradients ``scale * dy`` [N, T, R]."""
        hessian = self.allocate()[0]
        rows, cols = self.mask.shape
        inputs = x.reshape(-1, cols)
        weights = None
        assert self.row_sum is not None
        if self.weighted:
            # a new tensor: layers whose outputs are added get one and the same dy
            squares = dy.reshape(-1, rows).float().square().mul_(scale * scale)
            weights = squares.sum(1)
            self.row_sum[:rows] += squares.sum(0, dtype=torch.float64)
        else:
            self.row_sum[:rows] += 1.0
        if cols == hessian.shape[0]:
            accumulate_hessian_(hessian, inputs, token_weight=weights, scale=1.0)
        else:  # columns that the pattern pads are never used
            part = hessian[:cols, :cols].contiguous()
            hessian[:cols, :cols] = accumulate_hessian_(part, inputs, token_weight=weights, scale=1.0)

    @property
    def is_reached(self) -> bool:
        """Whether any token of any sample had weight in the sums."""
        return self.row_sum is not None and bool((self.row_sum > 0).any())

    def count(self, samples: int) -> None:
        """Count samples whose tokens are all added."""
        self._added += samples

    def row_scale(self) -> Tensor:
        """[R] f32 of the padded height, ``h_r / sum(h)``; 1 for all where nothing differs."""
        self.require_sum()
        assert self.row_sum is not None
        if not self.weighted:
            return torch.ones_like(self.row_sum, dtype=torch.float32)
        return (self.row_sum / self.row_sum.sum().clamp_min(1e-300)).float()

    def live_damp(self, cfg: OBSConfig) -> Tensor:
        """Absolute damping of the mean Hessian: ``cfg.damp``, or the share of its mean diagonal (tiny if that is 0)."""
        if cfg.damp is not None:
            return torch.full((), cfg.damp, dtype=torch.float64, device=self.weight.device)
        diagonal = self.require_sum()[0].diagonal()[: self.mask.shape[1]]
        damp = cfg.dampening_frac * diagonal.double().mean() / self.num_grads
        return torch.where(damp > 0, damp, 1e-12)


class RowSums:
    """Where samples go under row curvature; stands for ``GradientBuffer``, without rows that wait."""

    def __init__(self, layers: Sequence[RowLayer], timings: PhaseTimes | None = None) -> None:
        self.layers = tuple(layers)
        self._timings = timings
        allocate_sums(self.layers, "Hessian", "; collect fewer layers at a time (layers=)")

    def push_samples(self, count: int, samples: Samples) -> None:
        """Take the first ``count`` samples of a batch."""
        with phase(self._timings, "accumulate"):
            for layer in self.layers:
                for piece in samples.pieces[layer]:
                    layer.add_tokens(samples.inputs[piece.input][:count], piece.dy[:count], samples.scale)
        for layer in self.layers:
            layer.count(count)

    def shrink(self) -> bool:
        """There is nothing to give back."""
        return False

    def close(self) -> None:
        """Give back sums that hold nothing."""
        for layer in self.layers:
            layer.drop_empty()


def require_row_layers(layers: Sequence[PrunedLayer]) -> list[RowLayer]:
    """``layers`` as what they are."""
    if not all(isinstance(layer, RowLayer) for layer in layers):
        raise ConfigError("layers of block and row curvature do not mix; build the pruner with one curvature")
    return [layer for layer in layers if isinstance(layer, RowLayer)]
