# SPDX-License-Identifier: Apache-2.0
"""``OBSPruner``: the object for own loops. Plan, collect gradients, prune, hold the masks, verify."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from obs_kernels.errors import ConfigError
from obs_kernels.patterns import Pattern, parse_pattern
from obs_kernels.pruning.calibration import LossFn, add_parameter_gradients, collect_gradients, find_row_clusters
from obs_kernels.pruning.config import OBSConfig
from obs_kernels.pruning.find_layers import find_layers
from obs_kernels.pruning.gradient_buffer import GradientBuffer
from obs_kernels.pruning.held import held_layer, require_at
from obs_kernels.pruning.layer import PrunedLayer
from obs_kernels.pruning.phase_times import PhaseTimes
from obs_kernels.pruning.plan import PruningPlan, check_fits, make_plan
from obs_kernels.pruning.report import LayerReport, PruningReport, merge_saliency
from obs_kernels.pruning.schedule import EPSILON, check_reachable, recomputation_stages
from obs_kernels.pruning.state import check_state, tables_of, take_tables
from obs_kernels.pruning.step import StagedLayer, stage_step
from obs_kernels.sparse.linear import PRUNED_ATTRIBUTE


class OBSPruner:
    """Second-order pruning of the layers of ``model`` that ``config`` selects.

    The first mask is taken from ``w != 0`` here, once; afterwards only the mask counts: zeros stay zero, a live weight
    that happens to be 0 stays live. An error in any method leaves weights and masks as they were; the
    Fisher keeps the batches before a bad one and nothing of it.

    Args:
        model: any ``nn.Module``; changed in place by ``prune`` and ``apply_masks`` only.
        config: what to prune and how.
        memory_budget: bytes that Fisher sums may take; None takes a share of the free memory.

    Raises:
        ConfigError: targets that match nothing, or nothing left to prune. ShapeNotSupportedError: a layer that does not
            fit the pattern (``on_unsupported="raise"``). NonFiniteError: NaN weights.
    """

    def __init__(self, model: nn.Module, config: OBSConfig, *, memory_budget: int | None = None) -> None:
        self.model = model
        self.config = config
        self.layers, self.skipped = find_layers(model, config)
        self.stages = recomputation_stages(config.parsed_pattern, config.recomputations)
        """Patterns on the way, the last one that of the config; ``prune(pattern)`` puts another in."""
        self.stage = 0
        """Stages done; ``prune`` runs the next one."""
        self._budget = memory_budget
        self._saliency = 0.0
        self._reports: dict[str, LayerReport] = {}
        self._seconds = 0.0
        self._num_grads = 0
        self._buffer: GradientBuffer | None = None
        """Of ``accumulate``; ``collect`` has its own."""

    def plan(self, order: Sequence[Sequence[str]] | None = None) -> PruningPlan:
        """Layers, shapes, memory, and what is skipped and why; nothing is computed.

        Args:
            order: layers as they run, of ``execution_groups``; ``sequential`` follows it.
        """
        return make_plan(
            self.layers,
            self.skipped,
            self.config.pattern,
            needs_fisher=self.config.needs_fisher,
            budget=self._budget,
            num_grads=self.config.num_grads,
            sequential=self.config.sequential,
            order=order,
        )

    def collect(
        self,
        loader: Iterable[Any],
        loss_fn: LossFn,
        *,
        layers: Sequence[str] | None = None,
        timings: PhaseTimes | None = None,
    ) -> int:
        """Add gradients of ``config.num_grads`` samples (or batches) to the Fisher; returns how many came.

        Args:
            loader: batches; moved to the model's device. A loader that ends early is fine, F is divided by what came.
            loss_fn: ``loss_fn(model, batch)``: mean loss over the samples, or per-sample losses [B].
            layers: names of the layers to collect for; None takes all.
            timings: seconds of each phase are added to it.

        Raises:
            MemoryBudgetError: the Fisher does not fit, before the first batch. NonFiniteGradientError: names layer and
            batch.
        """
        if self.config.sequential and (layers is None or self.config.curvature == "row"):
            raise ConfigError(
                "sequential takes the layers one after the other as they run, got collect of "
                f"{'all' if layers is None else 'some'}; use sparsify_ or gradual_step, which write the weights of "
                "each before they collect for the next"
            )
        chosen = self._named(layers)
        check_fits(
            [layer for layer in chosen if not layer.has_fisher],
            self.plan().budget,
            held=self._held() if self._budget is not None else 0,
            advice="lower fisher_block_size, collect fewer layers at a time (layers=), or let sparsify_ do groups",
        )
        find_row_clusters(self.model, chosen, loader, loss_fn, self.config, timings)
        return collect_gradients(
            self.model,
            chosen,
            loader,
            loss_fn,
            num_grads=self.config.num_grads,
            gradients=self.config.gradients,
            on_nonfinite=self.config.on_nonfinite,
            seed=self.config.seed,
            sized_for=self.layers,
            timings=timings,
        )

    def _require_block(self, method: str, instead: str) -> None:
        if self.config.curvature != "block":
            raise ConfigError(
                f"{method} is for curvature='block', got {self.config.curvature!r}, whose sums are over tokens; use "
                f"{instead}"
            )

    def _held(self) -> int:
        return sum(layer.fisher_bytes for layer in self.layers if layer.has_fisher)

    def accumulate(self) -> None:
        """Read ``.grad`` of the pruned weights as one gradient; call it after ``loss.backward()``, before any clipping.

        Gradients are buffered, and added to the Fisher many at a time or when it is read. ``.grad`` is not cleared.
        Raises ``NonFiniteGradientError`` and adds nothing if a gradient is not finite.
        """
        self._require_block("accumulate", "collect(loader, loss_fn), which sees the tokens")
        if not any(layer.has_fisher for layer in self.layers):
            check_fits(self.layers, self.plan().budget, advice="lower fisher_block_size or raise memory_budget")
        if self._buffer is None or not self._buffer.is_open:
            self._buffer = GradientBuffer(self.layers, limit=self.config.num_grads)
        add_parameter_gradients(self._buffer, self.layers[0].num_grads)

    def fishers(self) -> dict[str, Tensor]:
        """{parameter name: [B, D, D] f32}, the undamped mean of g g^T; under row curvature the Hessians [k, C, C]."""
        return {layer.parameter_name: layer.mean_fisher() for layer in self.layers}

    def set_fishers(self, fishers: Mapping[str, Tensor], num_grads: int) -> None:
        """Take mean Fishers [B, D, D] from elsewhere, as ``fishers`` returns them.

        ``num_grads`` is the S they are means of.
        """
        self._require_block("set_fishers", "collect(loader, loss_fn)")
        if num_grads < 1:
            raise ConfigError(
                f"num_grads must be at least 1, the number of gradients that fishers are means of, got {num_grads}"
            )
        for layer in self.layers:
            shape = (layer.num_blocks, layer.block_size, layer.block_size)
            given = fishers.get(layer.parameter_name)
            if given is None or tuple(given.shape) != shape:
                came = "nothing" if given is None else list(given.shape)
                raise ConfigError(f"fishers[{layer.parameter_name!r}] must be {list(shape)}, got {came}")
        for layer in self.layers:
            given = fishers[layer.parameter_name].to(layer.weight.device, torch.float32)
            layer.set_fisher(given * num_grads, num_grads)

    @property
    def reached(self) -> Pattern | None:
        """The pattern that the model is at; None before any stage."""
        return self.stages[self.stage - 1] if self.stage else None

    def prune(self, pattern: str | Pattern | None = None) -> PruningReport:
        """Run the next stage: masks and update in place; the Fisher is dropped.

        Args:
            pattern: None takes the next part of the config's own way to its pattern (the only one for
                ``recomputations=1``). A pattern on the way there, such as "64:5:8" on the way to "64:2:8", is pruned
                to now; what is left of the way then is the config's pattern itself.

        Raises:
            ConfigError: no gradients, all stages are done, or ``pattern`` is not on the way: of another kind, beyond
            the config's, or one that would open pruned weights. SingularBlockError: names layer and block.
        """
        before = self.stages
        if pattern is not None:
            self.aim_at(self.stages_to(pattern))
        try:
            staged = self.stage_layers()
        except BaseException:
            self.stages = before
            raise
        return self.commit(staged, keep_fisher=False)

    def stages_to(self, pattern: str | Pattern, recomputations: int = 1) -> tuple[Pattern, ...]:
        """What leads from the pattern reached to ``pattern``, in ``recomputations`` parts; nothing changes.

        Raises:
            ConfigError: as in ``prune``.
        """
        self._require_next()
        target, final = parse_pattern(pattern), self.config.parsed_pattern
        check_reachable(target, reached=self.reached, final=final)
        if target.sparsity >= final.sparsity - EPSILON:
            target = final
        return recomputation_stages(target, recomputations, reached=self.reached)

    def aim_at(self, stages: Sequence[Pattern]) -> None:
        """Make ``stages``, of ``stages_to``, the next ones; then the config's pattern, if that is not among them."""
        final = self.config.parsed_pattern
        self.stages = (*self.stages[: self.stage], *stages, *(() if stages[-1] == final else (final,)))

    def hold(self) -> PruningReport:
        """Take the zeros that the model came with for the config's pattern; nothing is pruned (sparse transfer).

        Raises:
            ConfigError: something is pruned already, or the model is not at the pattern: too many kept in a group or
            panel; of a threshold, a smaller share of pruned weights or blocks over all layers.
        """
        pattern = self.config.parsed_pattern
        if self.stage:
            raise ConfigError(f"hold() is for a model that comes pruned, {self.reached} is reached; go on with prune()")
        require_at(pattern, self.layers)
        self.stages = (pattern,)
        return self.commit([held_layer(layer) for layer in self.layers])

    def _require_next(self) -> None:
        if self.stage >= len(self.stages):
            raise ConfigError(
                f"all {len(self.stages)} stages of pattern {self.config.pattern} are done; build a new pruner to go on"
            )

    def stage_layers(self, layers: Sequence[str] | None = None) -> list[StagedLayer]:
        """Masks and weights of the next stage without writing them; for ``sparsify_``, which does layers in groups."""
        self._require_next()
        return stage_step(self._named(layers), self.stages[self.stage], self.config)

    def commit(self, staged: Sequence[StagedLayer], *, keep_fisher: bool = False) -> PruningReport:
        """Write staged masks and weights into the model and go to the next stage."""
        start = time.perf_counter()
        pattern = self.stages[self.stage]
        for item in staged:
            item.layer.mask = item.mask
            item.write()
        reports = [self._layer_report(item, str(item.layer.pattern_at(pattern))) for item in staged]
        self._num_grads = max((item.num_grads for item in staged), default=0)
        if not keep_fisher:
            for layer in self.layers:
                layer.clear()
        self._saliency = merge_saliency(self._saliency, reports)
        self._reports |= {report.name: report for report in reports}
        self._seconds += sum(report.seconds for report in reports) + time.perf_counter() - start
        self.stage += 1
        return self.report()

    def report(self) -> PruningReport:
        """The report as it stands."""
        return PruningReport(
            pattern=str(self.reached or self.config.pattern),
            config=self.config.to_dict(),
            layers=tuple(self._reports[layer.name] for layer in self.layers if layer.name in self._reports),
            num_grads=self._num_grads,
            stages=tuple(map(str, self.stages[: self.stage])),
            saliency=self._saliency,
            seconds=self._seconds,
            skipped=tuple((s.name, s.reason) for s in self.skipped),
            environment={"torch": torch.__version__, "device": _device_name(self.layers[0].weight.device)},
        )

    @torch.no_grad()
    def apply_masks(self) -> None:
        """Set pruned weights to +0 again; after each optimizer step, since momentum and decay let them grow back."""
        for layer in self.layers:
            layer.matrix.masked_fill_(~layer.mask, 0.0)

    def masks(self) -> dict[str, Tensor]:
        """{parameter name: [R, C] bool, True = kept}."""
        return {layer.parameter_name: layer.mask for layer in self.layers}

    def verify(self) -> int:
        """Violations.

        Nonzero weights at pruned places, plus groups, panel rows or blocks that break the pattern reached.
        """
        pattern = self.reached
        total = 0
        for layer in self.layers:
            total += int((layer.matrix.masked_fill(layer.mask, 0.0) != 0).sum())
            report = self._reports.get(layer.name)
            if pattern is not None and report is not None and not report.outcome.startswith("skipped"):
                total += pattern.count_violations(layer.pad(layer.mask), dead=~layer.pad(layer.first_mask))
        return total

    def finalize(self) -> PruningReport:
        """Apply the masks a last time, check them, and leave pattern and masks on the model for ``compress_``;
        idempotent.

        Raises:
            ConfigError: stages are missing, or a weight breaks its mask.
        """
        if self.stage < len(self.stages):
            raise ConfigError(
                f"{self.stage} of {len(self.stages)} stages are done, the model is not at pattern "
                f"{self.config.pattern} yet; "
                f"collect and prune again before finalize()"
            )
        self.apply_masks()
        violations = self.verify()
        if violations:
            raise ConfigError(
                f"the model has {violations} violations of pattern {self.config.pattern}; do not edit masks by hand"
            )
        masks = {
            layer.name: layer.mask
            for layer in self.layers
            if not self._reports[layer.name].outcome.startswith("skipped")
        }
        setattr(self.model, PRUNED_ATTRIBUTE, {"pattern": self.config.pattern, "masks": masks})
        return self.report()

    def state_dict(self) -> dict[str, Any]:
        """Masks, position in the stages, Fisher sums and counts: tensors and plain values only."""
        return {
            "config": self.config.to_dict(),
            "stage": self.stage,
            "stages": [str(stage) for stage in self.stages],
            "saliency": self._saliency,
            "seconds": self._seconds,
            "received": self._num_grads,
            **tables_of(self.layers),
            "reports": {
                name: report.__dict__ | {"shape": list(report.shape)} for name, report in self._reports.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state of an equal pruner; nothing changes on an error.

        Raises:
            ResumeMismatchError: another configuration or other layers.
        """
        stages = check_state(state, self.config, self.layers)
        take_tables(state, self.layers)
        self.stages, self.stage, self._saliency = stages, state["stage"], float(state["saliency"])
        self._seconds, self._num_grads = float(state["seconds"]), state["received"]
        self._reports = {k: LayerReport(**{**v, "shape": tuple(v["shape"])}) for k, v in state["reports"].items()}

    def _named(self, names: Sequence[str] | None) -> list[PrunedLayer]:
        if names is None:
            return self.layers
        by_name = {layer.name: layer for layer in self.layers}
        unknown = [name for name in names if name not in by_name]
        if unknown:
            raise ConfigError(f"layers {unknown} are not pruned by this config; known: {', '.join(by_name)}")
        return [by_name[name] for name in names]

    def _layer_report(self, item: StagedLayer, pattern: str) -> LayerReport:
        shape = (int(item.mask.shape[0]), int(item.mask.shape[1]))
        sparsity = 1.0 - float(item.mask.double().mean())
        return LayerReport(
            item.layer.name,
            shape,
            pattern,
            sparsity,
            item.saliency,
            item.damp,
            item.blocks_raised,
            item.outcome,
            item.seconds,
        )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
