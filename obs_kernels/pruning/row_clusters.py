# SPDX-License-Identifier: Apache-2.0
"""Rows of a weight with like weights of tokens, so that each cluster of them can have a Hessian of its own.

Row r's own Hessian is ``H_r = sum_t dy_tr^2 x_t x_t^T``: two rows may share one as far as ``H_r / h_r`` are alike. That
matrix is too large to have for each row, so rows are compared by what it gives for a few random directions u,
``u^T H_r u / h_r``: a mean of ``(u^T x_t)^2`` by the row's weights of the tokens. Weights that differ between tokens
with like inputs do not count, as they make no difference to H.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from obs_kernels.ops.dispatch import no_autocast
from obs_kernels.pruning.phase_times import PhaseTimes, phase
from obs_kernels.pruning.row_layer import RowLayer
from obs_kernels.pruning.samples import Samples
from obs_kernels.reference.hessian import squared
from obs_kernels.reference.precision import exact_products

DIRECTIONS = 64
"""Random directions; distances between rows are kept to about the square root of 2 / 64."""
ROUNDS, RUNS = 50, 8
"""Of k-means: at most so many rounds, from so many starts."""


class RowSignatures:
    """Where samples go in the pass that clusters rows; stands for ``RowSums``.

    Inputs are measured from the mean of the first ones, in units of their spread, channel by channel: a channel with
    large values is no more important to the choice than another, as the damped inverse of H evens them out.
    """

    def __init__(self, layers: Sequence[RowLayer], seed: int, timings: PhaseTimes | None = None) -> None:
        self.layers = tuple(layers)
        self._timings, self._seed, self._pushed = timings, seed, 0
        self._maps: dict[RowLayer, tuple[Tensor, Tensor]] = {}
        """[C] mean of the first inputs, and directions [C, DIRECTIONS] in the units above."""
        self._sums: dict[RowLayer, Tensor] = {}
        """[R, DIRECTIONS + 1] f64, sum of ``dy^2 ((u^T x)^2, 1)``."""

    def __len__(self) -> int:
        """Return the number of batches."""
        return self._pushed

    def push_samples(self, count: int, samples: Samples, batch: int) -> None:
        """Take the first ``count`` samples of batch number ``batch``."""
        with phase(self._timings, "accumulate"), torch.no_grad(), no_autocast(), exact_products():
            for layer in self.layers:
                for piece in samples.pieces[layer]:
                    x = samples.inputs[piece.input][:count].float()
                    self._add(layer, x.reshape(-1, x.shape[-1]), squared(piece.dy[:count], samples.scale))
        self._pushed += 1

    def _add(self, layer: RowLayer, x: Tensor, squares: Tensor) -> None:
        if layer not in self._maps:
            generator = torch.Generator().manual_seed(self._seed)
            directions = torch.randn(x.shape[1], DIRECTIONS, generator=generator).to(x.device) / x.shape[1] ** 0.5
            spread = x.std(0, unbiased=False)
            # a channel that does not differ has no scale, and nothing to tell
            directions = torch.where(spread > 0, 1.0 / spread.clamp_min(1e-30), 0.0)[:, None] * directions
            self._maps[layer] = (x.mean(0), directions)
        mean, directions = self._maps[layer]
        seen = ((x - mean) @ directions).square()
        found = squares.reshape(-1, squares.shape[-1]).mT @ torch.cat([seen, seen.new_ones(seen.shape[0], 1)], 1)
        self._sums[layer] = self._sums.get(layer, 0.0) + found.double()

    def assign(self, unit_rows: int) -> None:
        """Give each layer its clusters, of whole units of ``unit_rows`` rows."""
        for layer in self.layers:
            rows, sums = layer.padded[0], torch.zeros(layer.padded[0], DIRECTIONS + 1, dtype=torch.float64)
            if layer in self._sums:
                sums[: layer.mask.shape[0]] = self._sums[layer].cpu()
            units = sums.view(rows // unit_rows, unit_rows, -1).sum(1)
            weight = units[:, -1]
            own = like_units(units[:, :-1] / weight.clamp_min(1e-300)[:, None], weight, layer.num_clusters, self._seed)
            layer.clusters = own.repeat_interleave(unit_rows).to(layer.weight.device)

    def shrink(self) -> bool:
        """There is nothing to give back."""
        return False

    def close(self) -> None:
        """Nothing is left open."""


def like_units(points: Tensor, weight: Tensor, count: int, seed: int) -> Tensor:
    """[U] int64: the cluster, 0 to count - 1, of each of ``points`` [U, J] f64 that weigh ``weight`` [U]; by k-means.

    The best of a few runs, whose starts are drawn by their distance to those before (k-means++). No cluster is empty;
    ``count`` is at most U.
    """
    if count == points.shape[0]:
        return torch.arange(count)
    generator = torch.Generator().manual_seed(seed)
    weight = weight.clamp_min(1e-12 * float(weight.sum()) + 1e-300)  # a unit without weight goes somewhere, too
    runs = [_k_means(points, weight, count, generator) for _ in range(RUNS)]
    return min(runs, key=lambda run: run[0])[1]


def _k_means(points: Tensor, weight: Tensor, count: int, generator: torch.Generator) -> tuple[float, Tensor]:
    """Sum of the weighted squared distances, and the clusters."""
    centers = points[torch.multinomial(weight, 1, generator=generator)]
    for _ in range(1, count):
        chance = weight * _distances(points, centers).amin(1) + 1e-300
        centers = torch.cat([centers, points[torch.multinomial(chance, 1, generator=generator)]])
    own = torch.full((points.shape[0],), -1)
    for _ in range(ROUNDS):
        now = _without_empty(_distances(points, centers), weight)
        if torch.equal(now, own):
            break
        own = now
        share = torch.nn.functional.one_hot(own, count).double() * weight[:, None]
        centers = share.mT @ points / share.sum(0)[:, None]
    return float(weight @ (points - centers[own]).square().sum(1)), own


def _distances(points: Tensor, centers: Tensor) -> Tensor:
    """[U, k] squared."""
    return torch.cdist(points, centers, compute_mode="donot_use_mm_for_euclid_dist").square()


def _without_empty(distances: Tensor, weight: Tensor) -> Tensor:
    """The nearest cluster of each unit; one that none is nearest to takes the unit that costs most where it is."""
    own = distances.argmin(1)
    for cluster in range(distances.shape[1]):
        counts = own.bincount(minlength=distances.shape[1])
        if counts[cluster] == 0:
            cost = weight * distances.gather(1, own[:, None])[:, 0]
            own[cost.masked_fill(counts[own] == 1, -1.0).argmax()] = cluster
    return own
