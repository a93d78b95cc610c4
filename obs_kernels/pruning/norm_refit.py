# SPDX-License-Identifier: Apache-2.0
"""A fit of normalisation layers: outputs as those of the dense model, channel by channel.

A norm gives ``y = w n + b``, n the normalised input: two numbers a channel, found by least squares over all tokens from
a handful of sums. Norms are taken in the order they run, each on the inputs of the model as it is by then. Layer by
layer a norm is fitted before the layers after it are pruned, so that these are fitted to what it gives: at the end they
would be used to what it gave before. Dense and pruned model see a batch one after the other, in the same memory: beside
the sums, only the dense weights are held.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from obs_kernels.errors import ConfigError, NonFiniteError
from obs_kernels.ops.dispatch import no_autocast
from obs_kernels.pruning.block_chain import Batches, KeptActivations, find_chains
from obs_kernels.pruning.calibration import LossFn, device_batches, move, seeded
from obs_kernels.pruning.config import OBSConfig
from obs_kernels.pruning.layer import Norm, PrunedLayer
from obs_kernels.pruning.layerwise import Snapshot, WholeRun
from obs_kernels.pruning.modes import eval_mode
from obs_kernels.pruning.output_watch import Expected, Seen, expected_of, watch
from obs_kernels.pruning.phase_times import PhaseTimes, phase
from obs_kernels.pruning.report import NormReport
from obs_kernels.pruning.samples import batch_size

RIDGE = 1e-6
"""Pull towards the present weight, as a share of the mean square of n: what decides where a channel says nothing."""
SAME_FUNCTION = 0.02
"""Share by which a norm may miss ``w n + b``; half precision needs most of it."""


@dataclass(eq=False)
class _Sums:
    """Sums over tokens; y is the dense output less what the norm gives with zeros for weight and bias."""

    count: int = 0
    sums: Tensor | None = None
    """[7, C] f64 of n, y, n n, n y, y y, and of the errors and their squares as the norm is."""

    def add(self, n: Tensor, y: Tensor, error: Tensor) -> None:
        n, y, error = n.double(), y.double(), error.double()
        found = torch.stack([t.sum(0) for t in (n, y, n * n, n * y, y * y, error, error * error)])
        self.sums = found if self.sums is None else self.sums + found
        self.count += n.shape[0]

    def fit(self, weight: Tensor, *, free_bias: bool) -> tuple[Tensor, Tensor]:
        """[C] f64 each: the best weight and bias (0 where it is not free), from the present weight."""
        assert self.sums is not None
        n, y, nn_, ny, *_ = self.sums / self.count
        ridge = RIDGE * nn_.mean()
        spread, shared = (nn_ - n * n, ny - n * y) if free_bias else (nn_, ny)
        # no spread anywhere, as of inputs that are all alike: the present weight stays
        best = (shared + ridge * weight) / (spread.clamp_min(0.0) + ridge).clamp_min(1e-300)
        best = torch.where(spread + ridge > 0, best, weight)
        return best, y - best * n if free_bias else torch.zeros_like(y)

    def error(self, weight: Tensor, bias: Tensor) -> float:
        """Mean square of what is missed, over that of the dense outputs about their means."""
        assert self.sums is not None
        n, y, nn_, ny, yy, *_ = self.sums / self.count
        missed = yy - 2 * (weight * ny + bias * y) + weight * weight * nn_ + 2 * weight * bias * n + bias * bias
        return self._share(missed)

    def present_error(self) -> float:
        """The same of the norm as it is."""
        assert self.sums is not None
        return self._share(self.sums[-1] / self.count)

    def _share(self, missed: Tensor) -> float:
        assert self.sums is not None
        _, y, _, _, yy, *_ = self.sums / self.count
        return float(missed.sum().clamp_min(0.0) / (yy - y * y).sum().clamp_min(1e-300))


class NormRefit:
    """Fits weight and bias of norms in place; the first ``cfg.num_grads`` samples of each pass count.

    A norm that is never called, or whose outputs are those of the dense model already, stays as it is to the bit. After
    an error the caller puts the norms back.

    Args:
        model: dense, or pruned already.
        layers: that are pruned, for their place among the norms.
        norms: of ``find_norms``.
        loader: re-iterable batches.
        loss_fn: see ``OBSPruner.collect``; only its forward pass matters.
        dense: of ``layers`` and ``norms``, from before the pruning.

    Raises:
        ConfigError: ``loader`` gave no batch.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[PrunedLayer],
        norms: Sequence[Norm],
        loader: Iterable[Any],
        loss_fn: LossFn,
        cfg: OBSConfig,
        dense: Snapshot,
        timings: PhaseTimes | None = None,
    ) -> None:
        self.model, self.loader, self.loss_fn, self.cfg = model, loader, loss_fn, cfg
        self.dense, self.timings = dense, timings
        self.device = norms[0].weight.device
        self._counts: dict[int, int] = {}
        for index, batch, _ in self._batches():
            left = cfg.num_grads - sum(self._counts.values())
            self._counts[index] = min(batch_size(batch) or 1, left)
        if not self._counts:
            raise ConfigError("loader gave no batch for refit_norms; it must yield at least one at every pass")
        run = self._first_run()
        with eval_mode(model), seeded(self.device, cfg.seed):
            seen = watch([*layers, *norms], run)
            self._order = list(dict.fromkeys(found.layer for found in seen))
            called = [item for item in self._order if isinstance(item, Norm)]
            chains = find_chains(model, called, run)
        self._expected: Expected = {norm: (False,) * len(calls) for norm, calls in expected_of(called, seen).items()}
        self._kept = KeptActivations(chains, self._whole, len(self._counts), dense.in_place, self.device)
        self.begin_stage()

    def begin_stage(self) -> None:
        """Have all norms to do; what was pruned before is written."""
        self._kept.drop()
        self._left = [item for item in self._order if isinstance(item, Norm)]
        self.reports: list[NormReport] = []

    def refit_before(self, layers: Sequence[PrunedLayer] = ()) -> None:
        """Fit the norms left that run before all of ``layers``, which are not pruned yet; without any, all the rest.

        Raises:
            ConfigError: other tokens at a norm than in the dense model, or a norm that is not ``w n + b``.
            NonFiniteError: names the norm.
        """
        places = [self._order.index(layer) for layer in layers if layer in self._order]
        end = min(places, default=len(self._order))
        with eval_mode(self.model), seeded(self.device, self.cfg.seed), torch.no_grad():
            while self._left and self._order.index(self._left[0]) < end:
                self.reports.append(self._refit(self._left.pop(0)))

    def _refit(self, norm: Norm) -> NormReport:
        """Fit one norm and write it."""
        start = time.perf_counter()
        expected: Expected = {norm: self._expected[norm]}
        sums = _Sums()
        for index, padding, run in self._kept.batches([norm]):
            with phase(self.timings, "forward"):
                with self.dense.in_place(run.part):
                    wanted = watch([norm], partial(run, dense=True), expected, with_inputs=False)
                given = watch([norm], partial(run, dense=False), expected)
            with phase(self.timings, "accumulate"), no_autocast():
                self._add(sums, norm, index, padding, wanted, given)
        return self._written(norm, sums, start)

    def _add(
        self, sums: _Sums, norm: Norm, index: int, padding: Tensor | None, wanted: Sequence[Seen], given: Sequence[Seen]
    ) -> None:
        shapes = [[found.output.shape for found in seen] for seen in (wanted, given)]
        if shapes[0] != shapes[1] or len(given) != len(self._expected[norm]):
            raise ConfigError(
                f"{norm.name}: the same tokens must reach it in the dense and in the pruned model, got "
                f"{[list(s) for s in shapes[1]]} of {[list(s) for s in shapes[0]]} at batch {index}, as where a router "
                f"chooses; use refit_norms=False, or ignore the norm"
            )
        for aim, use in zip(wanted, given, strict=True):
            base, n = _parts(norm, use.input)
            if not sums.count:
                _require_same_function(norm, base, n, use.output)
            tokens = partial(_tokens, padding=padding, count=self._counts[index])
            base, n, aimed, output = (tokens(t) for t in (base, n, aim.output, use.output))
            y, error = aimed.to(base.dtype) - base, aimed.to(base.dtype) - output.to(base.dtype)
            if not bool(torch.isfinite(n.sum() + y.sum() + error.sum())):
                if self.cfg.on_nonfinite == "skip_batch":
                    continue
                raise NonFiniteError(
                    f"{norm.name}: inputs and outputs must be finite for refit_norms, got NaN or Inf in batch {index}; "
                    f"raise damp, or use refit_norms=False"
                )
            sums.add(n, y, error)

    def _written(self, norm: Norm, sums: _Sums, start: float) -> NormReport:
        before = 0.0 if not sums.count else sums.present_error()
        if before == 0.0:
            return NormReport(norm.name, 0.0, 0.0, refit=False, seconds=time.perf_counter() - start)
        weight, bias = sums.fit(norm.weight.detach().double(), free_bias=norm.bias is not None)
        written = [(norm.weight, weight), *([] if norm.bias is None else [(norm.bias, bias)])]
        if not all(bool(torch.isfinite(value.to(parameter.dtype)).all()) for parameter, value in written):
            raise NonFiniteError(
                f"{norm.name}: the fitted weight or bias does not fit {norm.weight.dtype}; use refit_norms=False"
            )
        torch.clear_autocast_cache()  # of the weights that go, rounded
        for parameter, value in written:
            parameter.copy_(value)
        after = sums.error(norm.weight.double(), bias if norm.bias is None else norm.bias.double())
        return NormReport(norm.name, before, after, refit=True, seconds=time.perf_counter() - start)

    def _batches(self) -> Iterator[tuple[int, Any, Tensor | None]]:
        """Batches until ``num_grads`` samples came."""
        received = 0
        for index, batch, padding in device_batches(self.loader, self.device, self.timings):
            yield index, batch, padding
            received += batch_size(batch) or 1
            if received >= self.cfg.num_grads:
                return

    def _whole(self) -> Batches:
        for index, batch, padding in self._batches():
            yield index, padding, WholeRun(self.model, batch, self.loss_fn)

    def _first_run(self) -> Callable[[], Any]:
        batch = move(next(iter(self.loader)), self.device)
        return lambda: self.loss_fn(self.model, batch)


def _parts(norm: Norm, x: Tensor) -> tuple[Tensor, Tensor]:
    """What ``norm`` gives without weight and bias, and what the weight is a factor of; in f32 or wider.

    By two calls of the module itself: whatever it divides by, and also where it takes the weight as ``1 + w``.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    zeros = {
        name: torch.zeros_like(parameter, dtype=x.dtype)
        for name, parameter in (("weight", norm.weight), ("bias", norm.bias))
        if parameter is not None
    }
    base = functional_call(norm.module, zeros, (x,))
    return base, functional_call(norm.module, zeros | {"weight": zeros["weight"] + 1.0}, (x,)) - base


def _require_same_function(norm: Norm, base: Tensor, n: Tensor, output: Tensor) -> None:
    made = base + norm.weight.to(base.dtype) * n + (0.0 if norm.bias is None else norm.bias.to(base.dtype))
    if float((made - output.to(base.dtype)).norm()) > SAME_FUNCTION * float(output.to(base.dtype).norm()):
        raise ConfigError(
            f"{norm.name}: refit_norms takes norms that give weight times the normalised input, plus a bias, got "
            f"another function in {type(norm.module).__name__}; ignore the norm, or use refit_norms=False"
        )


def _tokens(values: Tensor, padding: Tensor | None, count: int) -> Tensor:
    """[t, C]: tokens of the first ``count`` samples that are no padding."""
    if padding is not None and values.shape[:2] == padding.shape:
        values, padding = values[:count], padding[:count]
        return values[~padding].reshape(-1, values.shape[-1])
    return values[:count].reshape(-1, values.shape[-1])
