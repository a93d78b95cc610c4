# SPDX-License-Identifier: Apache-2.0
"""Row curvature layer by layer: inputs from the model pruned so far, weights of tokens and aims from the dense model.

One pass with gradients over the dense model says how much each token counts for each layer. Then every layer, in the
order they run, sees each batch twice, once in the dense model and once in the pruned one, both only as far as the layer
goes: the difference of its outputs is the error that the layers before left, which its weights and bias make up for
together with its own pruning. Where the output goes into a residual stream it is the error of the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from obs_kernels.errors import ConfigError, NonFiniteError
from obs_kernels.ops.dispatch import no_autocast
from obs_kernels.pruning.block_chain import Batches, KeptActivations, find_chains
from obs_kernels.pruning.calibration import LossFn, collect_gradients, device_batches, find_row_clusters, move, seeded
from obs_kernels.pruning.config import OBSConfig
from obs_kernels.pruning.gradient_buffer import allocate_sums
from obs_kernels.pruning.layer import PrunedLayer
from obs_kernels.pruning.modes import eval_mode
from obs_kernels.pruning.output_watch import Expected, Seen, expected_of, watch
from obs_kernels.pruning.phase_times import PhaseTimes, phase
from obs_kernels.pruning.row_layer import RowLayer, require_row_layers
from obs_kernels.pruning.samples import as_tokens
from obs_kernels.pruning.token_weights import TokenWeights

WAITING_BYTES = (1 << 25, 1 << 28)
"""Tokens of a layer that are added at once, on a CPU and on a GPU."""


class Snapshot:
    """Weights and biases of layers as they are now, to be put back, or put in for a while."""

    def __init__(self, layers: Sequence[PrunedLayer]) -> None:
        found = {id(p): p for layer in layers for p in (layer.weight, layer.bias) if p is not None}  # each once
        self._saved = [(parameter, parameter.detach().clone()) for parameter in found.values()]
        self._inside: dict[nn.Module, list[int]] = {}

    @torch.no_grad()
    def restore(self) -> None:
        """Put the values back."""
        torch.clear_autocast_cache()
        for parameter, value in self._saved:
            parameter.copy_(value)

    @contextmanager
    def in_place(self, part: nn.Module) -> Iterator[None]:
        """The saved values of what ``part`` holds in the model, without a copy; afterwards those that were there."""
        places = self._places_of(part)
        self._swap(places)
        try:
            yield
        finally:
            self._swap(places)

    def _swap(self, places: Sequence[int]) -> None:
        torch.clear_autocast_cache()  # of the weights that go, rounded
        for i in places:
            parameter, value = self._saved[i]
            self._saved[i] = (parameter, parameter.data)
            parameter.data = value

    def _places_of(self, part: nn.Module) -> Sequence[int]:
        if part not in self._inside:
            inside = {id(parameter) for parameter in part.parameters()}
            self._inside[part] = [i for i, (parameter, _) in enumerate(self._saved) if id(parameter) in inside]
        return self._inside[part]


@dataclass(eq=False)
class _Waiting:
    """Tokens of one layer on their way into its sums: few large products instead of many small ones."""

    layer: RowLayer
    parts: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    """x [t, C], weight [t, k], error [t, R]."""

    def add(self, x: Tensor, weight: Tensor, error: Tensor) -> None:
        self.parts.append((x, weight, error))
        limit = WAITING_BYTES[x.device.type == "cuda"]
        if sum(x.nbytes + error.nbytes for x, _, error in self.parts) >= limit:
            self.flush()

    def flush(self) -> None:
        if self.parts:
            x, weight, error = (torch.cat(column) for column in zip(*self.parts, strict=True))
            self.layer.add_inputs(x, weight, error)
        self.parts.clear()


class DenseModel:
    """What the dense model says of tokens and outputs, for a model that is being pruned layer by layer.

    Args:
        model: still dense.
        layers: all that will be pruned.
        loader: the same batches in the same order at every pass.
        loss_fn: see ``OBSPruner.collect``.
        snapshot: of ``layers``.

    Raises:
        What ``collect_gradients`` does.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[PrunedLayer],
        loader: Iterable[Any],
        loss_fn: LossFn,
        cfg: OBSConfig,
        snapshot: Snapshot,
        timings: PhaseTimes | None = None,
    ) -> None:
        rows = require_row_layers(layers)
        self.model, self.loader, self.loss_fn, self.cfg = model, loader, loss_fn, cfg
        self.snapshot, self.timings = snapshot, timings
        self.device = layers[0].weight.device
        find_row_clusters(model, rows, loader, loss_fn, cfg, timings)
        self.weights = TokenWeights(rows, timings)
        self._marks: list[tuple[str, ...]] = []
        collect_gradients(
            model,
            rows,
            self._marked(loader),
            loss_fn,
            num_grads=cfg.num_grads,
            gradients=cfg.gradients,
            on_nonfinite=cfg.on_nonfinite,
            seed=cfg.seed,
            sink=self.weights,
            timings=timings,
        )
        first = self._first_run()
        with eval_mode(model), seeded(self.device, cfg.seed):
            self.expected: Expected = expected_of(rows, watch(rows, first))
            chains = find_chains(model, rows, first)
        self._kept = KeptActivations(chains, self._whole, len(self.weights), snapshot.in_place, self.device)

    def begin_stage(self) -> None:
        """To be called when what was pruned is written: kept activations are of the model before."""
        self._kept.drop()

    def collect(self, layers: Sequence[PrunedLayer]) -> None:
        """Sums of ``layers``, with inputs and errors of the model as it is now.

        Raises:
            ConfigError: other batches than at the first pass, or other tokens in a layer than in the dense model.
            NonFiniteError: names layer and batch.
        """
        rows = require_row_layers(layers)
        allocate_sums(rows, "Hessian and aims", "; prune fewer layers at a time")
        finite = self._pass(rows)
        if finite is None:  # a sum is made outside of the block: only the whole model shows it
            self._kept.refuse(rows)
            finite = self._pass(rows) or []
        self._require_finite(rows, finite)
        for layer in rows:
            sums = self.weights.row_sums.get(layer)
            assert layer.row_sum is not None
            if sums is not None:
                layer.row_sum[: sums.shape[0]] = sums
            layer.count(self.weights.num_grads)

    def _pass(self, rows: Sequence[RowLayer]) -> list[tuple[int, Tensor]] | None:
        """Add every batch; what of each is finite, or None, before the first, where a block does not show all sums."""
        from tqdm import tqdm

        expected: Expected = {row: self.expected[row] for row in rows}
        finite: list[tuple[int, Tensor]] = []
        waiting = {row: _Waiting(row) for row in rows}
        bar = tqdm(total=self.weights.num_grads, desc=rows[0].name, unit="sample", leave=False, disable=None, delay=2)
        with eval_mode(self.model), seeded(self.device, self.cfg.seed), bar:
            for index, padding, run in self._kept.batches(rows):
                count = self.weights.counts[index]
                with phase(self.timings, "forward"):
                    with self.snapshot.in_place(run.part):
                        wanted = watch(rows, partial(run, dense=True), expected, with_inputs=False)
                    given = watch(rows, partial(run, dense=False), expected)
                if run.part is not self.model and not finite and expected_of(rows, given) != expected:
                    return None
                with phase(self.timings, "accumulate"), torch.no_grad(), no_autocast():
                    finite.append((index, self._add(waiting, index, count, padding, wanted, given)))
                bar.update(count)
            with phase(self.timings, "accumulate"), torch.no_grad(), no_autocast():
                for tokens in waiting.values():
                    tokens.flush()
        return finite

    def _add(
        self,
        waiting: Mapping[RowLayer, _Waiting],
        index: int,
        count: int,
        padding: Tensor | None,
        wanted: Sequence[Seen],
        given: Sequence[Seen],
    ) -> Tensor:
        """Add a batch to every layer; [layers] bool, whether what came is finite."""
        finite = []
        for layer, tokens in waiting.items():
            weights = self.weights.of(index, layer)
            aims, uses = ([found for found in seen if found.layer is layer] for seen in (wanted, given))
            good = torch.ones((), dtype=torch.bool, device=layer.weight.device)
            if weights:
                _require_same_tokens(layer, index, weights, aims, uses, count)
            for weight, aim, use in zip(weights, aims, uses, strict=False):
                x = as_tokens(use.input, use.input.shape[0], padding)[:count]
                error = as_tokens(aim.output.float() - use.output.float(), use.output.shape[0], padding)[:count]
                x, error = x.reshape(-1, x.shape[-1]), error.reshape(-1, error.shape[-1])
                good = torch.isfinite(x.sum(dtype=torch.float32) + error.sum()) & good
                tokens.add(x, weight.reshape(-1, weight.shape[-1]), error)
            finite.append(good)
        return torch.stack(finite)

    def _require_finite(self, rows: Sequence[RowLayer], finite: Sequence[tuple[int, Tensor]]) -> None:
        if not finite:
            return
        good = torch.stack([flags for _, flags in finite])  # one wait for all batches
        if bool(good.all()):
            return
        batch, layer = (~good).nonzero()[0].tolist()
        for row in rows:
            row.clear()
        raise NonFiniteError(
            f"{rows[layer].name}: inputs and outputs must be finite, got NaN or Inf in batch {finite[batch][0]} of the "
            f"model pruned so far; raise damp, or prune in float32"
        )

    def _first_run(self) -> Callable[[], Tensor]:
        batch = move(next(iter(self.loader)), self.device)
        return lambda: self.loss_fn(self.model, batch)

    def _whole(self) -> Batches:
        for index, batch, padding in device_batches(self._checked(self.loader), self.device, self.timings):
            if index in self.weights.counts:
                yield index, padding, _WholeRun(self.model, batch, self.loss_fn)

    def _marked(self, loader: Iterable[Any]) -> Iterator[Any]:
        for batch in loader:
            self._marks.append(tuple(_mark(batch)))
            yield batch

    def _checked(self, loader: Iterable[Any]) -> Iterator[Any]:
        """As many batches as at the first pass, the same ones."""
        batches = iter(loader)
        for index in range(max(self.weights.counts) + 1):
            batch = next(batches, None)
            if batch is None or tuple(_mark(batch)) != self._marks[index]:
                raise ConfigError(
                    f"loader must give the same batches in the same order at every pass, got "
                    f"{'none' if batch is None else 'another'} at batch {index}; turn shuffling off, or pass a list"
                )
            yield batch


@dataclass(frozen=True, eq=False)
class _WholeRun:
    """All of a model on one batch, as a ``Run``."""

    model: nn.Module
    batch: Any
    loss_fn: LossFn

    @property
    def part(self) -> nn.Module:
        """The model."""
        return self.model

    def __call__(self, *, dense: bool) -> Tensor:
        """Run it with the weights that are in place."""
        return self.loss_fn(self.model, self.batch)


def _mark(batch: Any) -> Iterator[str]:
    """A number for each tensor of a batch that tells it from others, order included; as text, so that NaN is NaN."""
    if isinstance(batch, Tensor):
        values = batch.detach().reshape(-1)
        # f64: exact for token ids, and the same bits for the same tensor
        places = torch.arange(1, values.numel() + 1, dtype=torch.float64, device=values.device)
        yield repr(float(values.double() @ places))
    elif hasattr(batch, "values"):
        for value in batch.values():
            yield from _mark(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from _mark(value)


def _require_same_tokens(
    layer: RowLayer, batch: int, weights: Sequence[Tensor], aims: Sequence[Seen], uses: Sequence[Seen], count: int
) -> None:
    counts = [weight[..., 0].numel() for weight in weights]
    for seen in (aims, uses):
        found = [f.output[:count].numel() // f.output.shape[-1] for f in seen]
        if found != counts:
            raise ConfigError(
                f"{layer.name}: the same tokens must reach it in the dense and in the pruned model, got {found} of "
                f"{counts} at batch {batch}, as where a router chooses; use sequential=False, or ignore the layer"
            )
