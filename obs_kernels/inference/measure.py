# SPDX-License-Identifier: Apache-2.0
"""One cell: a dense model and its sparse twins at one batch and length, timed in turn, the same ways."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from obs_kernels.inference.encoders import IN_BLOCK, hollow_twin, layer_groups, make_inputs, sparse_layers, sparse_twin
from obs_kernels.inference.power import EnergyMeter
from obs_kernels.inference.predict import predict, predict_from_products
from obs_kernels.inference.ways import COMPILED, Call, first_tensor, make_call
from obs_kernels.ops import feature_major
from obs_kernels.ops.layout import is_feature_major
from obs_kernels.sparse.compress import CompressionReport, decompress_
from obs_kernels.sparse.crossover import KernelTable
from obs_kernels.sparse.linear import DENSE_ACTIVATIONS, SparseLinear
from obs_kernels.timing import Clock, Spread, Timed, interleave, spread

LAYERS = ("all", "rows", "measure")
"""Which layers of the sparse model are packed: all that fit; those that win by kernel rows, or as timed here."""
_MOST_GRAPHS = 64
DENSE, HOLLOW = "dense", "hollow"


@dataclass(frozen=True)
class Plan:
    """What is measured in every cell."""

    patterns: tuple[str, ...]
    ways: tuple[str, ...]
    layers: str = "all"
    fuse_ffn: str | None = "feature"
    seconds: float = 0.5
    """Budget of one way of one model."""
    energy_seconds: float = 1.0
    table: KernelTable | None = None


@dataclass
class Measured:
    """One model in one cell."""

    spreads: dict[str, Spread] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    """Reason by way."""
    peak_bytes: int | None = None
    joules: float | None = None

    @property
    def best(self) -> str | None:
        """The fastest way."""
        return min(self.spreads, key=lambda way: self.spreads[way].us) if self.spreads else None

    @property
    def us(self) -> float | None:
        """Its median, in microseconds."""
        return self.spreads[self.best].us if self.best is not None else None

    def to_dict(self, batch: int) -> dict[str, Any]:
        """Plain values for JSON."""
        found = self.spreads.get(self.best or "")
        return {
            "way": self.best,
            "us": None if found is None else found.us,
            "p20": None if found is None else found.p20,
            "p80": None if found is None else found.p80,
            "samples_per_s": None if found is None else batch / found.us * 1e6,
            "peak_bytes": self.peak_bytes,
            "joules": self.joules,
            "ways": {way: part.us for way, part in self.spreads.items()},
            "failed": self.failed,
        }


@dataclass(frozen=True)
class Twin:
    """A sparse model, how it came about, and the bytes that it and its kernels keep."""

    model: nn.Module
    report: CompressionReport
    imposed: int
    resident: int


def make_twin(dense: nn.Module, pattern: str, inputs: dict[str, Tensor], plan: Plan) -> Twin:
    """The sparse model of a pattern, run once: kernels make their copies of the weights at the first call."""
    device = next(dense.parameters()).device
    tokens = None if plan.layers == "all" else next(iter(inputs.values())).numel()
    before = _allocated(device)
    made = sparse_twin(dense, pattern, tokens=tokens, measure=plan.layers == "measure", fuse_ffn=plan.fuse_ffn)
    _run_once(made[0], inputs)
    gc.collect()
    grown = _allocated(device) - before if device.type == "cuda" else _resident_bytes(made[0])
    return Twin(*made, grown)


def grown_twin(twin: Twin, inputs: dict[str, Tensor]) -> Twin:
    """The twin of an earlier cell, run once on these inputs: another number of tokens may want another copy."""
    device = next(iter(inputs.values())).device
    before = _allocated(device)
    _run_once(twin.model, inputs)
    gc.collect()
    return replace(twin, resident=twin.resident + max(0, _allocated(device) - before))


def measure_cell(
    dense: nn.Module,
    batch: int,
    length: int,
    plan: Plan,
    clock: Clock,
    *,
    say: Callable[[str], None] = lambda line: None,
    twins: dict[str, Twin] | None = None,
) -> dict[str, Any]:
    """Time ``dense`` and one sparse twin for each pattern, all ways in turn on the same inputs.

    The share of the linear layers is by subtraction: the same model with ``Hollow`` in their place, best way against
    best way, of those that compile nothing: a compiler drops what only ``Hollow`` would have used. Peak memory is that
    of an eager call: what it allocates, and the model itself with what its kernels keep.

    Args:
        dense: from ``encoders.build``.
        batch: sequences of a call.
        length: tokens of a sequence.
        plan: patterns, ways, budgets.
        clock: of the device.
        say: called with a line of progress.
        twins: sparse models of earlier cells by pattern, added to; used where the cell does not choose the layers.

    Returns:
        {"batch", "length", "tokens", "dense": {...}, "sparse": {pattern: {...}}, "layers": {pattern: [...]}}.

    Raises:
        ConfigError: the model takes no such length, or a pattern fits no layer.
    """
    device = next(dense.parameters()).device
    inputs = make_inputs(dense, batch, length)
    tokens = batch * length
    torch._dynamo.reset()  # the code of all cells is the same, and its cache holds a few shapes only
    _run_once(dense, inputs)  # what libraries allocate at their first call is no model's
    kept = twins if twins is not None and plan.layers == "all" else {}
    for pattern in plan.patterns:
        if pattern not in kept:
            kept[pattern] = make_twin(dense, pattern, inputs, plan)
        else:
            kept[pattern] = grown_twin(kept[pattern], inputs)
    chosen = {pattern: kept[pattern] for pattern in plan.patterns}
    sizes = {DENSE: _resident_bytes(dense), **{pattern: twin.resident for pattern, twin in chosen.items()}}
    models = {DENSE: dense, HOLLOW: hollow_twin(dense), **{pattern: twin.model for pattern, twin in chosen.items()}}
    measured = _time_all(models, inputs, plan, clock, sizes, say)
    base = measured[DENSE].us
    cell: dict[str, Any] = {"batch": batch, "length": length, "tokens": tokens}
    cell["dense"] = measured[DENSE].to_dict(batch) | {"linear_share": _linear_share(measured, DENSE)}
    cell["sparse"], cell["layers"] = {}, {}
    for pattern, twin in chosen.items():
        found = measured[pattern]
        packed = sparse_layers(twin.model)
        feature = _feature_major_inputs(twin.model, inputs)
        layers = _layer_times(dense, packed, feature, tokens, clock, plan.seconds)
        layers += _shared_times(twin.model, twin.report.shared, feature, tokens, clock, plan.seconds)
        values = found.to_dict(batch) | {
            "speedup": base / found.us if base and found.us else None,
            "linear_share": _linear_share(measured, pattern),
            "predicted": predict(packed, tokens, base, plan.table, feature_major=feature) if base else None,
            "predicted_here": predict_from_products(layers, base) if base else None,
            "max_difference": _difference(twin.model, inputs),
            "packed_layers": len(packed),
            "dense_layers": twin.report.dense,
            "imposed_by_magnitude": twin.imposed,
        }
        cell["sparse"][pattern] = values
        cell["layers"][pattern] = layers
        text = "no time" if values["speedup"] is None else f"{values['speedup']:.2f} x"
        say(f"  {pattern}: {text} over the best dense ({measured[DENSE].best}), {found.best}")
    del models, chosen, kept
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return cell


def why_failed(error: Exception) -> str:
    """A line that says why a call could not be made: of what a compiler met, not of the compiler alone."""
    met = getattr(error, "inner_exception", error)  # torch._dynamo.exc.BackendCompilerFailed
    if isinstance(met, torch.OutOfMemoryError):
        return "out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join([f"{type(error).__name__}:", *lines[: 2 if lines and lines[0].endswith(":") else 1]])


def _time_all(
    models: Mapping[str, nn.Module],
    inputs: dict[str, Tensor],
    plan: Plan,
    clock: Clock,
    sizes: Mapping[str, int],
    say: Callable[[str], None],
) -> dict[str, Measured]:
    device = next(iter(inputs.values())).device
    measured = {name: Measured() for name in models}
    calls: dict[str, Call] = {}
    for way in plan.ways:
        for name, model in models.items():
            if name == HOLLOW and way in COMPILED:
                continue
            try:
                # each model is one more entry of the same code: beyond the limit dynamo would fall back in silence
                with torch._dynamo.config.patch(recompile_limit=_MOST_GRAPHS, fail_on_recompile_limit_hit=True):
                    calls[f"{name}|{way}"] = make_call(model, inputs, way)
            except Exception as error:  # a compiler or a capture may fail in any way, and the other ways still count
                measured[name].failed[way] = why_failed(error)
        for name in models:
            if way in measured[name].failed:
                say(f"  {name}, {way}: {measured[name].failed[way]}")
    timed = {key: Timed(lambda _, call=call: call(), hide_host=False) for key, call in calls.items()}  # type: ignore[misc]
    samples = interleave(timed, clock, seconds=plan.seconds, max_repeats=100) if timed else {}
    for key, found in samples.items():
        name, way = key.split("|")
        measured[name].spreads[way] = spread(found)
    meter = EnergyMeter(device)
    for name, result in measured.items():
        if name == HOLLOW or result.best is None:
            continue
        result.joules = meter.joules(calls[f"{name}|{result.best}"], seconds=plan.energy_seconds)
        result.peak_bytes = _peak_bytes(models[name], inputs, sizes[name])
    return measured


def _linear_share(measured: Mapping[str, Measured], name: str) -> float | None:
    """Share of the model's best time that is not the hollow model's best time; None if every way compiles."""
    whole, rest = (
        min((found.us for way, found in measured[model].spreads.items() if way not in COMPILED), default=None)
        for model in (name, HOLLOW)
    )
    return max(0.0, 1.0 - rest / whole) if whole and rest else None


@torch.no_grad()
def _difference(model: nn.Module, inputs: dict[str, Tensor]) -> float:
    """Largest difference to the same weights as dense products, over the largest output: that the kernels are right."""
    other = copy.deepcopy(model)
    decompress_(other)
    found, wanted = (first_tensor(net(**inputs)).float() for net in (model, other))
    return float((found - wanted).abs().max() / wanted.abs().max())


@torch.no_grad()
def _feature_major_inputs(model: nn.Module, inputs: dict[str, Tensor]) -> set[str]:
    """Names of the packed layers that get x feature-major in ``model``."""
    found: set[str] = set()

    def watch(name: str, layer: nn.Module) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if is_feature_major(args[0]):
                found.add(name)

        return layer.register_forward_pre_hook(hook)

    handles = [watch(name, layer) for name, layer in sparse_layers(model).items()]
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def _layer_times(
    dense: nn.Module,
    packed: Mapping[str, SparseLinear],
    feature: Collection[str],
    tokens: int,
    clock: Clock,
    seconds: float,
) -> list[dict[str, Any]]:
    """Products of each kind of layer as the sparse model runs them, timed here: host time hidden, inputs warm.

    With the layouts and the activation that they have there; dense with the same activation behind it.
    """
    times: dict[Any, tuple[float, float]] = {}
    rows = []
    kinds = {IN_BLOCK.sub(r"\1*.", name): name for name in packed}
    for kind, (height, width, count) in layer_groups(dense).items():
        name = kinds.get(kind)
        sparse_us = dense_us = None
        if name is not None:
            layer = packed[name]
            key = (height, width, name in feature, layer.y_layout, layer.activation)
            if key not in times:
                times[key] = _product_times(layer, name in feature, tokens, clock, seconds / 4)
            sparse_us, dense_us = times[key]
        rows.append(
            {"name": kind, "rows": height, "cols": width, "count": count, "dense_us": dense_us, "sparse_us": sparse_us}
        )
    return rows


@torch.no_grad()
def _shared_times(
    model: nn.Module, blocks: Collection[str], feature: Collection[str], tokens: int, clock: Clock, seconds: float
) -> list[dict[str, Any]]:
    """What attention blocks take to make the feature-major input that their layers share, as further layers."""
    names = {block: next((n for n in feature if n.startswith(f"{block}.")), None) for block in blocks}
    found: dict[str, list[SparseLinear]] = {}
    for block, name in names.items():
        if name is not None:
            kind = IN_BLOCK.sub(r"\1*.", block) + " (shared input)"
            found.setdefault(kind, []).append(model.get_submodule(name))  # type: ignore[arg-type]
    rows = []
    for kind, layers in found.items():
        values, cols = layers[0].values, layers[0].in_features
        x = torch.zeros(tokens, cols, dtype=values.dtype, device=values.device)
        times = interleave({"made": Timed(lambda _, x=x: feature_major(x))}, clock, seconds=seconds / 4, min_repeats=3)  # type: ignore[misc]
        us = spread(times["made"]).us
        rows.append({"name": kind, "rows": cols, "cols": cols, "count": len(layers), "dense_us": 0.0, "sparse_us": us})
    return rows


def _product_times(
    layer: SparseLinear, feature: bool, tokens: int, clock: Clock, seconds: float
) -> tuple[float, float]:
    values = layer.values
    generator = torch.Generator(values.device).manual_seed(0)
    x = torch.empty(tokens, layer.in_features, dtype=values.dtype, device=values.device).normal_(generator=generator)
    own, linear = (x.T.contiguous().T if feature else x), layer.to_linear()
    activation = (lambda y: y) if layer.activation is None else DENSE_ACTIVATIONS[layer.activation]
    ways = {"sparse": Timed(lambda _: layer(own)), "dense": Timed(lambda _: activation(linear(x)))}
    found = interleave(ways, clock, seconds=seconds, min_repeats=3)
    return spread(found["sparse"]).us, spread(found["dense"]).us


@torch.no_grad()
def _run_once(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    model(**inputs)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _resident_bytes(model: nn.Module) -> int:
    tensors = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


@torch.no_grad()
def _peak_bytes(model: nn.Module, inputs: dict[str, Tensor], resident: int) -> int | None:
    device = next(iter(inputs.values())).device
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = _allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    model(**inputs)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before + resident
