# SPDX-License-Identifier: Apache-2.0
"""What a run will do and how much memory it needs, before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from obs_kernels.errors import MemoryBudgetError
from obs_kernels.pruning.layer import PrunedLayer, SkippedLayer

FREE_SHARE = 0.6
"""Share of the free memory that Fisher sums may take; the rest is for activations, gradients and working copies."""


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

    @property
    def num_groups(self) -> int:
        """Passes over the calibration data."""
        return max((layer.group for layer in self.layers), default=-1) + 1

    @property
    def fisher_bytes(self) -> int:
        """Bytes of all Fisher sums together."""
        return sum(layer.fisher_bytes for layer in self.layers)

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
            "num_groups": self.num_groups,
            "num_weights": self.num_weights,
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
            f"{self.num_weights:,} weights; Fisher {self.fisher_bytes / 1e6:,.0f} MB of a budget of "
            f"{self.budget / 1e6:,.0f} MB; "
            f"{self.num_groups} pass{'es' if self.num_groups != 1 else ''} over the calibration data"
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
) -> PruningPlan:
    """Assign layers to groups whose Fisher sums fit ``budget`` bytes (None: a share of the free memory)."""
    limit = budget if budget is not None else _free_bytes(layers[0].weight.device)
    rows, group, used = [], 0, 0
    for layer in layers:
        size = layer.fisher_bytes if needs_fisher else 0
        if used and used + size > limit:
            group, used = group + 1, 0
        used += size
        shape = tuple(layer.mask.shape)
        note = "" if layer.padded == shape else f"padded to {list(layer.padded)}"
        rows.append(PlannedLayer(layer.name, shape, pattern, layer.block_size, size, group, note))
    rows += [PlannedLayer(s.name, s.shape, pattern, 0, 0, -1, s.reason) for s in skipped]
    return PruningPlan(tuple(rows), limit)


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


def readable(size: int) -> str:
    """Bytes as B, kB, MB or GB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size} B"


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * FREE_SHARE)
    return int(_free_host_bytes() * FREE_SHARE)


def _free_host_bytes() -> int:
    try:
        import psutil

        return int(psutil.virtual_memory().available)
    except ImportError:
        pass
    try:
        with open("/proc/meminfo") as file:
            values = dict(line.split(":") for line in file)
        return int(values["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return 8 << 30  # unknown system: assume a small machine
