# SPDX-License-Identifier: Apache-2.0
"""What a run will do and how much memory it needs, before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from obs_kernels.errors import MemoryBudgetError
from obs_kernels.patterns import parse_pattern
from obs_kernels.pruning.gradient_buffer import MAX_ROWS, buffer_room, choose_rows, most_rows, row_bytes
from obs_kernels.pruning.layer import PrunedLayer, SkippedLayer
from obs_kernels.pruning.memory import free_bytes, readable
from obs_kernels.pruning.row_layer import RowLayer

FREE_SHARE = 0.6
"""Share of the free memory that Fisher sums may take; the rest is for gradients, activations and working copies."""


@dataclass(frozen=True)
class PlannedLayer:
    """A row of the plan."""

    name: str
    shape: tuple[int, ...]
    pattern: str
    block_size: int
    fisher_bytes: int
    group: int
    """Layers of one group are collected together; -1 for a skipped layer."""
    reason: str
    """Why a layer is skipped, "padded to ..." for a padded one, else empty."""


@dataclass(frozen=True)
class PruningPlan:
    """Layers, memory, and what is skipped and why; ``print(plan)`` shows a table."""

    layers: tuple[PlannedLayer, ...]
    budget: int
    """Bytes that Fisher sums may take."""
    buffer_rows: tuple[int, ...] = ()
    """Gradients that are buffered between two passes over the Fisher, S of each group."""
    buffer_bytes: tuple[int, ...] = ()
    """Bytes of these rows, of each group; as if gradients came in the dtype of the weights, autocast takes less."""
    layer_by_layer: bool = False
    """Whether each group sees the model that the groups before it have pruned; rows are then in their order."""
    way: str = ""
    """In words: which passes over the calibration data there are."""

    @property
    def peak_bytes(self) -> int:
        """Most bytes of Fisher sums and gradient buffer together, beside the model and what a batch takes."""
        groups = enumerate(self.buffer_bytes)
        return max(
            (size + sum(row.fisher_bytes for row in self.layers if row.group == g) for g, size in groups), default=0
        )

    @property
    def num_groups(self) -> int:
        """Groups of layers whose sums are held together; each is collected by itself."""
        return max((layer.group for layer in self.layers), default=-1) + 1

    @property
    def groups(self) -> list[list[str]]:
        """Names of the layers of each group."""
        return [[row.name for row in self.layers if row.group == g] for g in range(self.num_groups)]

    @property
    def fisher_bytes(self) -> int:
        """Bytes of all Fisher sums together, those of groups that are never there at once too."""
        return sum(layer.fisher_bytes for layer in self.layers)

    @property
    def fisher_peak_bytes(self) -> int:
        """Most bytes of Fisher sums at once: those of the largest group."""
        sizes = [0] * self.num_groups
        for row in self.layers:
            if row.group >= 0:
                sizes[row.group] += row.fisher_bytes
        return max(sizes, default=0)

    @property
    def num_weights(self) -> int:
        """Weights that are pruned."""
        return sum(layer.shape[0] * layer.shape[1] for layer in self.layers if layer.group >= 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "layers": [{**asdict(layer), "shape": list(layer.shape)} for layer in self.layers],
            "budget": self.budget,
            "fisher_bytes": self.fisher_bytes,
            "fisher_peak_bytes": self.fisher_peak_bytes,
            "buffer_rows": list(self.buffer_rows),
            "buffer_bytes": list(self.buffer_bytes),
            "peak_bytes": self.peak_bytes,
            "num_groups": self.num_groups,
            "num_weights": self.num_weights,
            "layer_by_layer": self.layer_by_layer,
            "way": self.way,
        }

    def to_markdown(self) -> str:
        """A table of the layers and a line with the sums."""
        lines = ["| layer | shape | pattern | D | Fisher MB | pass | note |", "|---|---|---|---:|---:|---:|---|"]
        for row in self.layers:
            shape = " x ".join(map(str, row.shape))
            note = row.reason if row.group >= 0 else f"skipped: {row.reason}"
            turn = str(row.group + 1) if row.group >= 0 else "-"
            lines.append(
                f"| {row.name} | {shape} | {row.pattern} | {row.block_size} | {row.fisher_bytes / 1e6:.1f} | "
                f"{turn} | {note} |"
            )
        lines.append("")
        lines.append(
            f"{self.num_weights:,} weights; Fisher {self.fisher_peak_bytes / 1e6:,.0f} MB at once of a budget of "
            f"{self.budget / 1e6:,.0f} MB; {self.way}"
        )
        if any(self.buffer_rows):
            lines.append(
                f"{max(self.buffer_rows)} gradients buffered in {max(self.buffer_bytes) / 1e6:,.0f} MB; at most "
                f"{self.peak_bytes / 1e6:,.0f} MB at once, beside the model and what a batch takes"
            )
        return "\n".join(lines)

    __str__ = to_markdown


def make_plan(
    layers: Sequence[PrunedLayer],
    skipped: Sequence[SkippedLayer],
    pattern: str,
    *,
    needs_fisher: bool,
    budget: int | None,
    num_grads: int = MAX_ROWS,
    sequential: bool = False,
    order: Sequence[Sequence[str]] | None = None,
) -> PruningPlan:
    """Assign layers to groups whose Fisher sums fit ``budget`` bytes (None: a share of the free memory).

    Args:
        num_grads: gradients that will come; more rows than these are never buffered.
        sequential: groups follow each other as they run, each on the model pruned so far.
        order: of ``execution_groups``, for ``sequential``; None takes the layers one by one in the order of their
            names in the model.
    """
    device = layers[0].weight.device
    free = free_bytes(device)
    limit = budget if budget is not None else int(free * FREE_SHARE)
    sizes = {layer.name: layer.fisher_bytes if needs_fisher else 0 for layer in layers}
    if sequential:
        groups = _groups_as_they_run(order or [[layer.name] for layer in layers], sizes, limit)
    else:
        groups = _groups_that_fit(sizes, limit)
    by_name = {layer.name: layer for layer in layers}
    rows = []
    for number, names in enumerate(groups):
        for layer in (by_name[name] for name in names):
            shape = tuple(layer.mask.shape)
            own = str(layer.pattern_at(parse_pattern(pattern)))
            note = "" if layer.padded == shape else f"padded to {list(layer.padded)}"
            rows.append(PlannedLayer(layer.name, shape, own, layer.block_size, sizes[layer.name], number, note))
    rows += [PlannedLayer(s.name, s.shape, pattern, 0, 0, -1, s.reason) for s in skipped]
    none = (0,) * len(groups)
    if not needs_fisher:
        return PruningPlan(tuple(rows), limit, way="no pass over data: magnitudes alone decide")
    if sequential:
        way = _way_by_layer(len(groups), weighted=isinstance(layers[0], RowLayer) and layers[0].weighted)
        way += "" if order else ", counted as if no two layers read the same input"
        return PruningPlan(tuple(rows), limit, none, none, layer_by_layer=True, way=way)
    way = f"{len(groups)} pass{'es' if len(groups) != 1 else ''} over the calibration data"
    if isinstance(layers[0], RowLayer):  # tokens are added as they come
        return PruningPlan(tuple(rows), limit, none, none, way=way)
    members = [[by_name[name] for name in names] for names in groups]
    buffered = []
    for part in members:
        # sums that are there already are not free any more, so only the others come off
        room = buffer_room(device, sum(layer.fisher_bytes for layer in part if not layer.has_fisher), free)
        sized_for = layers if device.type == "cpu" else part
        buffered.append(choose_rows(row_bytes(sized_for), room, most_rows(num_grads, device)))
    buffers = [count * row_bytes(part) for count, part in zip(buffered, members, strict=True)]
    return PruningPlan(tuple(rows), limit, tuple(buffered), tuple(buffers), way=way)


def _groups_that_fit(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Layers in their order, a new group where the sums would no longer fit."""
    groups, used = list[list[str]]([[]]), 0
    for name, size in sizes.items():
        if used and used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups


def _groups_as_they_run(order: Iterable[Sequence[str]], sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Groups of ``order``; one that does not fit is cut into single layers."""
    groups = list[list[str]]()
    for names in order:
        fits = sum(sizes[name] for name in names) <= limit
        groups += [list(names)] if fits else [[name] for name in names]
    return groups


def _way_by_layer(groups: int, *, weighted: bool) -> str:
    if not weighted:
        return f"layer by layer: {groups} groups as they run, a pass each over the model pruned so far"
    return (
        f"layer by layer: one pass with gradients over the dense model, which keeps a number for each token and layer, "
        f"then {groups} groups as they run, each with a pass over the dense and the pruned model as far as the group"
    )


def check_fits(layers: Sequence[PrunedLayer], budget: int, *, held: int = 0, advice: str) -> None:
    """Raise ``MemoryBudgetError`` with the numbers if the Fisher sums of ``layers`` do not fit ``budget``.

    ``held``: bytes that sums of other layers hold already.
    """
    total = sum(layer.fisher_bytes for layer in layers)
    if total + held <= budget:
        return
    largest = max(layers, key=lambda layer: layer.fisher_bytes)
    others = f", {readable(held)} are held by other layers" if held else ""
    raise MemoryBudgetError(
        f"the Fisher of {len(layers)} layers needs {readable(total)} (largest: {largest.name} with "
        f"{readable(largest.fisher_bytes)} at D = {largest.block_size}), the budget is "
        f"{readable(budget)}{others}; {advice}"
    )
