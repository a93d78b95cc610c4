# SPDX-License-Identifier: Apache-2.0
"""One pruned weight under row (or layer) curvature: a Hessian for all its rows or a few clusters, and a number a row.

``H = 1/S sum_t |dy_t|^2 x_t x_t^T`` over all tokens of S samples, ``h_r = 1/S sum_t dy_tr^2``: dy is the gradient of
the sample's own loss with respect to the output. The curvature of row r is taken as ``h_r / sum(h) H``. Under
``curvature="layer"`` every token and every row weighs 1. With clusters of rows each has an H of its own, ``|dy_t|^2``
and ``sum(h)`` being sums over its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from obs_kernels.errors import ConfigError
from obs_kernels.ops.dispatch import no_autocast
from obs_kernels.ops.hessian import accumulate_inputs_, weigh_tokens_
from obs_kernels.pruning.config import OBSConfig
from obs_kernels.pruning.gradient_buffer import allocate_sums
from obs_kernels.pruning.layer import PrunedLayer
from obs_kernels.pruning.phase_times import PhaseTimes, phase
from obs_kernels.pruning.samples import Samples
from obs_kernels.reference.hessian import add_product_, from_origin, halves_of, squared
from obs_kernels.reference.precision import exact_products


@dataclass(frozen=True)
class RowMoments:
    """What a step needs of the tokens for the rows of a cluster, R of them: means over the samples, of padded width.

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
    """``fisher_sum`` is the sum of the Hessians, [k, C, C] of the padded width; ``row_sum`` [R] f64 that of the rows.

    Inputs are measured from ``origin``, about their mean: a large mean in common would take the digits of what differs.
    """

    weighted: bool = True
    """Whether tokens and rows weigh as the loss says, or all alike (``curvature="layer"``)."""
    has_target: bool = False
    """Whether the outputs of the dense model are aimed at, for which ``target_sum`` takes memory."""
    num_clusters: int = 1
    """k, clusters of rows with a Hessian each."""
    clusters: Tensor | None = field(default=None, init=False, repr=False)
    """[R] int64 of the padded height, which cluster each row is of; needed before any token where k > 1."""
    row_sum: Tensor | None = field(default=None, init=False, repr=False)
    origin: Tensor | None = field(default=None, init=False, repr=False)
    """[C] f32 of the layer's own width: mean of the first inputs, None before them."""
    input_sum: Tensor | None = field(default=None, init=False, repr=False)
    """[k, C + 1] f64, sum of ``|dy|^2 (x - origin, 1)``."""
    target_sum: Tensor | None = field(default=None, init=False, repr=False)
    """[R, C + 1] f32, sum of ``|dy|^2 e (x - origin, 1)^T``; None before the first target."""

    @property
    def num_blocks(self) -> int:
        """One matrix a cluster."""
        return self.num_clusters

    @property
    def fisher_bytes(self) -> int:
        """Bytes of the Hessians, and of the sum of targets where there are any."""
        rows, cols = self.padded
        return super().fisher_bytes + (4 * rows * (cols + 1) if self.has_target else 0)

    def allocate(self) -> Tensor:
        """Memory of the sums that every token goes into."""
        if self.row_sum is None:
            rows, cols = self.padded
            self.row_sum = torch.zeros(rows, dtype=torch.float64, device=self.weight.device)
            self.input_sum = torch.zeros(self.num_clusters, cols + 1, dtype=torch.float64, device=self.weight.device)
        return super().allocate()

    def drop_empty(self) -> None:
        """Give back the memory of sums that hold nothing."""
        super().drop_empty()
        if not self.has_fisher:
            self.row_sum = self.origin = self.input_sum = self.target_sum = None

    def set_fisher(self, fisher_sum: Tensor | None, num_grads: int) -> None:
        """Take a sum [k, C, C] about ``origin``; it and the other sums are set after it."""
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
        weight = self.weigh_tokens(dy.reshape(-1, rows), scale, self.row_sum[:rows])
        self.add_inputs(x.reshape(-1, cols), weight)

    def weigh_tokens(self, dy: Tensor, scale: float, row_sum: Tensor) -> Tensor:
        """[t, k] f32: what tokens weigh for each cluster, whose outputs have the gradients ``scale * dy`` [t, R].

        The squares of these, summed over the tokens, are added to ``row_sum`` [R] f64.
        """
        if self.num_clusters == 1:
            return weigh_tokens_(row_sum, dy, scale=scale)[:, None]
        squares = squared(dy, scale)
        row_sum += squares.sum(0, dtype=torch.float64)
        own = F.one_hot(self._clusters(), self.num_clusters)[: dy.shape[1]]
        with exact_products(), no_autocast():
            return squares @ own.to(squares.dtype)

    def rows_of(self, cluster: int) -> Tensor | slice:
        """What indexes the rows of a cluster, of the padded height, in their order."""
        return slice(None) if self.num_clusters == 1 else (self._clusters() == cluster).nonzero().flatten()

    def _clusters(self) -> Tensor:
        assert self.clusters is not None, "clusters are found before tokens are added"
        return self.clusters

    def add_inputs(self, x: Tensor, token_weight: Tensor | None, error: Tensor | None = None) -> None:
        """Add inputs x [t, C] of weights [t, k] f32 (None: 1), and the errors [t, R] f32 of their outputs."""
        with exact_products(), no_autocast():
            self._add_inputs(x, token_weight, error)

    def _add_inputs(self, x: Tensor, token_weight: Tensor | None, error: Tensor | None) -> None:
        hessians = self.allocate()
        rows, cols = self.mask.shape
        assert self.input_sum is not None
        if self.origin is None:
            self.origin = _mean_input(x, token_weight)
        weights = [None] if token_weight is None else [own.contiguous() for own in token_weight.unbind(1)]
        for hessian, input_sum, q in zip(hessians, self.input_sum, weights, strict=True):
            own = hessian[:cols, :cols]  # columns that the pattern pads are never used
            accumulate_inputs_(own, input_sum, x, token_weight=q, origin=self.origin)
        if error is None:
            return
        if self.target_sum is None:
            shape = (self.padded[0], self.padded[1] + 1)
            self.target_sum = torch.zeros(shape, dtype=torch.float32, device=self.weight.device)
        moved = from_origin(x, self.origin, torch.float32)
        if token_weight is None:
            weighted = error
        else:
            weighted = error * (token_weight if self.num_clusters == 1 else token_weight[:, self._clusters()[:rows]])
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
        """[R] f32 of the padded height, ``h_r / sum(h)`` over the cluster's rows; 1 for all where nothing differs."""
        self.require_sum()
        assert self.row_sum is not None
        if not self.weighted:
            return torch.ones_like(self.row_sum, dtype=torch.float32)
        scale = torch.empty_like(self.row_sum)
        for cluster in range(self.num_clusters):
            rows = self.rows_of(cluster)
            scale[rows] = self.row_sum[rows] / self.row_sum[rows].sum().clamp_min(1e-300)
        return scale.float()

    def mean_fisher(self) -> Tensor:
        """[k, C, C] undamped mean of ``|dy|^2 x x^T``, a new tensor."""
        sums, origin = self.require_sum(), self._origin()
        moved = [self._moved(part, c, origin).float() for c, part in enumerate(sums)]
        return torch.stack(moved) / self.num_grads

    def moments(self, cluster: int = 0, *, free_bias: bool) -> RowMoments:
        """Means of what was collected for the rows of a cluster; new tensors."""
        sums, origin = self.require_sum()[cluster], self._origin()
        assert self.input_sum is not None
        first, total = self.input_sum[cluster, :-1], float(self.input_sum[cluster, -1])
        raw = self._moved(sums, cluster, origin)
        diagonal = float(raw.diagonal()[: self.mask.shape[1]].mean()) / self.num_grads
        target = None if self.target_sum is None else self.target_sum[self.rows_of(cluster)].double()
        if not free_bias or total <= 0:
            pull = None if target is None else target[:, :-1] + torch.outer(target[:, -1], origin)
            return RowMoments(self._mean(raw), diagonal, None if pull is None else self._mean(pull), None, None)
        shift = first / total
        hessian = self._mean(self._moved(sums, cluster, -shift))
        if target is None:
            return RowMoments(hessian, diagonal, None, origin + shift, None)
        pull = self._mean(target[:, :-1] - torch.outer(target[:, -1], shift))
        return RowMoments(hessian, diagonal, pull, origin + shift, target[:, -1] / total)

    def move_origin(self, origin: Tensor) -> None:
        """Measure the sums from ``origin`` [C] f32 of the layer's own width, so that they add to others from there."""
        assert self._sum is not None and self.input_sum is not None
        wanted = F.pad(origin.double(), (0, self.padded[1] - origin.numel()))
        by = self._origin() - wanted
        self._sum = torch.stack([self._moved(part, c, by).float() for c, part in enumerate(self._sum)])
        if self.target_sum is not None:
            self.target_sum[:, :-1] += torch.outer(self.target_sum[:, -1].double(), by).float()
        self.input_sum[:, :-1] += torch.outer(self.input_sum[:, -1], by)
        self.origin = origin

    def _moved(self, sums: Tensor, cluster: int, by: Tensor) -> Tensor:
        """[C, C] f64: ``sum |dy|^2 u u^T`` of a cluster as that of ``u + by``."""
        assert self.input_sum is not None
        first, total = self.input_sum[cluster, :-1], self.input_sum[cluster, -1]
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

    def damp_of(self, moments: RowMoments, cfg: OBSConfig, cluster: int = 0) -> float:
        """Absolute damping of a cluster's H: the share of its mean diagonal, or its share of ``cfg.damp``.

        Tiny if that is 0. By the share a row is damped as much in a cluster as it is among all rows.
        """
        if cfg.damp is None:
            damp = cfg.dampening_frac * moments.mean_diagonal
        else:
            assert self.row_sum is not None
            own = self.row_sum[self.rows_of(cluster)].sum() / self.row_sum.sum().clamp_min(1e-300)
            damp = cfg.damp * (1.0 if self.num_clusters == 1 else float(own))
        return damp if damp > 0 else 1e-12


def _mean_input(x: Tensor, token_weight: Tensor | None) -> Tensor:
    """[C] f32: mean of x [t, C] by the weights [t, k] of its tokens for all clusters."""
    if token_weight is None:
        return x.sum(0, dtype=torch.float32) / max(1, x.shape[0])
    total = token_weight.sum(1)
    return (total[None] @ x.float())[0] / total.sum().clamp_min(1e-30)


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
