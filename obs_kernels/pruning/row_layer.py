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
import torch.nn.functional as F
from torch import Tensor

from obs_kernels.errors import ConfigError
from obs_kernels.ops import accumulate_hessian_
from obs_kernels.ops.dispatch import no_autocast
from obs_kernels.pruning.config import OBSConfig
from obs_kernels.pruning.gradient_buffer import allocate_sums
from obs_kernels.pruning.layer import PrunedLayer
from obs_kernels.pruning.phase_times import PhaseTimes, phase
from obs_kernels.pruning.samples import Samples
from obs_kernels.reference.hessian import add_product_, from_origin, halves_of
from obs_kernels.reference.precision import exact_products


@dataclass(frozen=True)
class RowMoments:
    """What a step needs of the tokens: means over the samples, of the padded shape.

    With e the error of an output that weights or bias are to make up for, 0 without a target: the loss of a change dW,
    db is ``1/2 sum_t |dy_t|^2 |dW x_t + db - e_t|^2``.
    """

    hessian: Tensor
    """[C, C] mean of ``|dy|^2 x x^T``; of x less its mean where the bias is free."""
    mean_diagonal: float
    """Of ``|dy|^2 x x^T`` with the mean in: what damping is a share of."""
    pull: Tensor | None
    """[R, C] mean of ``|dy|^2 e x^T``, both less their means where the bias is free; None without a target."""
    mean_input: Tensor | None
    """[C] mean of x by the weights of the tokens; None where the bias stays."""
    mean_error: Tensor | None
    """[R] mean of e by the weights of the tokens; None where the bias stays or without a target."""

    def bias_change(self, change: Tensor) -> Tensor | None:
        """[R]: the best db for a change [R, C] of the weights; None where the bias stays."""
        if self.mean_input is None:
            return None
        moved = -(change.to(self.mean_input.dtype) @ self.mean_input)
        return moved if self.mean_error is None else moved + self.mean_error


@dataclass(eq=False)
class RowLayer(PrunedLayer):
    """``fisher_sum`` is the sum of the Hessian, [1, C, C] of the padded width; ``row_sum`` [R] f64 that of the rows.

    Inputs are measured from ``origin``, about their mean: a large mean in common would take the digits of what differs.
    """

    weighted: bool = True
    """Whether tokens and rows weigh as the loss says, or all alike (``curvature="layer"``)."""
    has_target: bool = False
    """Whether the outputs of the dense model are aimed at, for which ``target_sum`` takes memory."""
    row_sum: Tensor | None = field(default=None, init=False, repr=False)
    origin: Tensor | None = field(default=None, init=False, repr=False)
    """[C] f32 of the layer's own width: mean of the first inputs, None before them."""
    input_sum: Tensor | None = field(default=None, init=False, repr=False)
    """[C + 1] f64, sum of ``|dy|^2 (x - origin, 1)``."""
    target_sum: Tensor | None = field(default=None, init=False, repr=False)
    """[R, C + 1] f32, sum of ``|dy|^2 e (x - origin, 1)^T``; None before the first target."""

    @property
    def num_blocks(self) -> int:
        """One matrix for all rows."""
        return 1

    @property
    def fisher_bytes(self) -> int:
        """Bytes of the Hessian, and of the sum of targets where there are any."""
        rows, cols = self.padded
        return super().fisher_bytes + (4 * rows * (cols + 1) if self.has_target else 0)

    def allocate(self) -> Tensor:
        """Memory of the sums that every token goes into."""
        if self.row_sum is None:
            rows, cols = self.padded
            self.row_sum = torch.zeros(rows, dtype=torch.float64, device=self.weight.device)
            self.input_sum = torch.zeros(cols + 1, dtype=torch.float64, device=self.weight.device)
        return super().allocate()

    def drop_empty(self) -> None:
        """Give back the memory of sums that hold nothing."""
        super().drop_empty()
        if not self.has_fisher:
            self.row_sum = self.origin = self.input_sum = self.target_sum = None

    def set_fisher(self, fisher_sum: Tensor | None, num_grads: int) -> None:
        """Take a sum [1, C, C] about ``origin``; it and the other sums are set after it."""
        super().set_fisher(fisher_sum, num_grads)
        self.row_sum = self.origin = self.input_sum = self.target_sum = None

    def add_tokens(self, x: Tensor, dy: Tensor, scale: float) -> None:
        """Add tokens x [N, T, C] whose outputs have the gradients ``scale * dy`` [N, T, R]."""
        self.allocate()
        rows, cols = self.mask.shape
        assert self.row_sum is not None
        if not self.weighted:
            self.row_sum[:rows] += 1.0
            self.add_inputs(x.reshape(-1, cols), None)
            return
        squares = squared(dy, scale).reshape(-1, rows)
        self.row_sum[:rows] += squares.sum(0, dtype=torch.float64)
        self.add_inputs(x.reshape(-1, cols), squares.sum(1))

    def add_inputs(self, x: Tensor, token_weight: Tensor | None, error: Tensor | None = None) -> None:
        """Add inputs x [t, C] of weight [t] f32 (None: 1), and the errors [t, R] f32 of their outputs."""
        with exact_products(), no_autocast():
            self._add_inputs(x, token_weight, error)

    def _add_inputs(self, x: Tensor, token_weight: Tensor | None, error: Tensor | None) -> None:
        hessian = self.allocate()[0]
        rows, cols = self.mask.shape
        weight = x.new_ones(x.shape[0], dtype=torch.float32) if token_weight is None else token_weight
        if self.origin is None:
            self.origin = (weight[None] @ x.float())[0] / weight.sum().clamp_min(1e-30)
        part = hessian if cols == hessian.shape[0] else hessian[:cols, :cols].contiguous()
        accumulate_hessian_(part, x, token_weight=token_weight, origin=self.origin, scale=1.0)
        if part is not hessian:  # columns that the pattern pads are never used
            hessian[:cols, :cols] = part
        assert self.input_sum is not None
        moved = from_origin(x, self.origin, torch.float32)
        self.input_sum[:cols] += (weight[None] @ moved)[0]
        self.input_sum[-1] += weight.sum()
        if error is None:
            return
        if self.target_sum is None:
            shape = (self.padded[0], self.padded[1] + 1)
            self.target_sum = torch.zeros(shape, dtype=torch.float32, device=self.weight.device)
        weighted = error * weight[:, None]
        add_product_(self.target_sum[:rows, :cols], halves_of(weighted, x), halves_of(moved, x))
        self.target_sum[:rows, -1] += weighted.sum(0)

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

    def mean_fisher(self) -> Tensor:
        """[1, C, C] undamped mean of ``|dy|^2 x x^T``, a new tensor."""
        return self._moved(self.require_sum()[0], self._origin()).float()[None] / self.num_grads

    def moments(self, *, free_bias: bool) -> RowMoments:
        """Means of what was collected; new tensors."""
        sums, origin = self.require_sum()[0], self._origin()
        assert self.input_sum is not None
        total = float(self.input_sum[-1])
        raw = self._moved(sums, origin)
        diagonal = float(raw.diagonal()[: self.mask.shape[1]].mean()) / self.num_grads
        target = None if self.target_sum is None else self.target_sum.double()
        if not free_bias or total <= 0:
            pull = None if target is None else target[:, :-1] + torch.outer(target[:, -1], origin)
            return RowMoments(self._mean(raw), diagonal, None if pull is None else self._mean(pull), None, None)
        shift = self.input_sum[:-1] / total
        hessian = self._mean(self._moved(sums, -shift))
        if target is None:
            return RowMoments(hessian, diagonal, None, origin + shift, None)
        pull = self._mean(target[:, :-1] - torch.outer(target[:, -1], shift))
        return RowMoments(hessian, diagonal, pull, origin + shift, target[:, -1] / total)

    def move_origin(self, origin: Tensor) -> None:
        """Measure the sums from ``origin`` [C] f32 of the layer's own width, so that they add to others from there."""
        assert self._sum is not None and self.input_sum is not None
        wanted = F.pad(origin.double(), (0, self.padded[1] - origin.numel()))
        by = self._origin() - wanted
        self._sum = self._moved(self._sum[0], by).float()[None]
        if self.target_sum is not None:
            self.target_sum[:, :-1] += torch.outer(self.target_sum[:, -1].double(), by).float()
        self.input_sum[:-1] += self.input_sum[-1] * by
        self.origin = origin

    def _moved(self, sums: Tensor, by: Tensor) -> Tensor:
        """[C, C] f64: ``sum |dy|^2 u u^T`` as that of ``u + by``."""
        assert self.input_sum is not None
        first, total = self.input_sum[:-1], self.input_sum[-1]
        moved = sums.double()
        half = first + 0.5 * total * by
        return moved.addr_(half, by).addr_(by, half)

    def _origin(self) -> Tensor:
        """[C] f64 of the padded width."""
        if self.origin is None:  # no token came
            return torch.zeros(self.padded[1], dtype=torch.float64, device=self.weight.device)
        return F.pad(self.origin.double(), (0, self.padded[1] - self.origin.numel()))

    def _mean(self, sums: Tensor) -> Tensor:
        return (sums / self.num_grads).float()

    @staticmethod
    def damp_of(moments: RowMoments, cfg: OBSConfig) -> float:
        """Absolute damping: ``cfg.damp``, or the share of the mean diagonal of H (tiny if that is 0)."""
        damp = cfg.dampening_frac * moments.mean_diagonal if cfg.damp is None else cfg.damp
        return damp if damp > 0 else 1e-12


def squared(dy: Tensor, scale: float) -> Tensor:
    """f32 squares of ``scale * dy``; a new tensor, as layers whose outputs are added get one and the same dy."""
    return dy.float().square().mul_(scale * scale)


class RowSums:
    """Where samples go under row curvature; stands for ``GradientBuffer``, without rows that wait."""

    def __init__(self, layers: Sequence[RowLayer], timings: PhaseTimes | None = None) -> None:
        self.layers = tuple(layers)
        self._timings = timings
        allocate_sums(self.layers, "Hessian", "; collect fewer layers at a time (layers=)")

    def push_samples(self, count: int, samples: Samples, batch: int) -> None:
        """Take the first ``count`` samples of batch number ``batch``."""
        try:
            with phase(self._timings, "accumulate"):
                for layer in self.layers:
                    for piece in samples.pieces[layer]:
                        layer.add_tokens(samples.inputs[piece.input][:count], piece.dy[:count], samples.scale)
        except BaseException:
            for layer in self.layers:  # some hold a part of the batch
                layer.clear()
            raise
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
