# SPDX-License-Identifier: Apache-2.0
"""How much every token of every sample counts for a layer, from one pass over the dense model.

``|dy_t|^2`` of the output gradients takes four bytes a token, layer and cluster of rows, so it is kept while the
Hessians, which need the inputs of the model pruned so far, are made layer by layer without another backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from obs_kernels.pruning.phase_times import PhaseTimes, phase
from obs_kernels.pruning.row_layer import RowLayer
from obs_kernels.pruning.samples import Samples


class TokenWeights:
    """Where samples go in the pass over the dense model; stands for ``RowSums``."""

    def __init__(self, layers: Sequence[RowLayer], timings: PhaseTimes | None = None) -> None:
        self.layers = tuple(layers)
        self.counts: dict[int, int] = {}
        """Samples that count of each batch; a batch that was skipped is not there."""
        self.row_sums: dict[RowLayer, Tensor] = {}
        """[R] f64, the sum of dy^2 over all tokens."""
        self._weights: dict[tuple[int, RowLayer], list[Tensor]] = {}
        self._timings = timings

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.counts)

    @property
    def num_grads(self) -> int:
        """Samples of all batches."""
        return sum(self.counts.values())

    def of(self, batch: int, layer: RowLayer) -> list[Tensor]:
        """[n, T, k] f32, k clusters of rows, of each use of ``layer`` by a batch that counts."""
        return self._weights.get((batch, layer), [])

    def push_samples(self, count: int, samples: Samples, batch: int) -> None:
        """Take the first ``count`` samples of batch number ``batch``."""
        with phase(self._timings, "accumulate"):
            for layer in self.layers:
                for piece in samples.pieces[layer]:
                    dy = piece.dy[:count]
                    if layer not in self.row_sums:
                        self.row_sums[layer] = torch.zeros(dy.shape[2], dtype=torch.float64, device=dy.device)
                    weight = layer.weigh_tokens(dy.reshape(-1, dy.shape[2]), samples.scale, self.row_sums[layer])
                    self._weights.setdefault((batch, layer), []).append(
                        weight.reshape(*dy.shape[:2], layer.num_clusters)
                    )
        self.counts[batch] = count

    def shrink(self) -> bool:
        """There is nothing to give back."""
        return False

    def close(self) -> None:
        """Nothing is left open."""
