# SPDX-License-Identifier: Apache-2.0
"""What a pruning run did, layer by layer."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from obs_kernels.errors import ConfigError


@dataclass(frozen=True)
class LayerReport:
    """One layer of one stage."""

    name: str
    shape: tuple[int, int]
    pattern: str
    sparsity: float
    saliency: float
    """Predicted loss increase of the step, 1/2 dw^T (F + damp) dw over all blocks; NaN without a Fisher.

    Under row curvature layer by layer dw is counted from the best weights for the inputs of the model pruned so far.
    """
    damp: float
    blocks_raised: int
    """Blocks whose damping had to be raised."""
    outcome: str
    """"pruned", "damping raised in ...", or "skipped: ..."."""
    seconds: float


@dataclass(frozen=True)
class PruningReport:
    """Result of ``OBSPruner.prune`` or ``sparsify_``: the layers as they are now, and sums over all stages."""

    pattern: str
    """Of the last stage that is done."""
    config: dict[str, Any]
    layers: tuple[LayerReport, ...]
    num_grads: int
    stages: tuple[str, ...]
    """Patterns of the stages done so far."""
    saliency: float
    """Predicted loss increase, summed over layers and stages."""
    seconds: float
    skipped: tuple[tuple[str, str], ...] = ()
    """(layer, reason) of candidates that were left out."""
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Share of zeros over all pruned layers."""
        sizes = [layer.shape[0] * layer.shape[1] for layer in self.layers]
        total = sum(sizes)
        return (
            sum(layer.sparsity * size for layer, size in zip(self.layers, sizes, strict=True)) / total if total else 0.0
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a loss that is not known (NaN) becomes None."""
        values = {**asdict(self), "sparsity": self.sparsity}
        for row in (values, *values["layers"]):
            row["saliency"] = None if math.isnan(row["saliency"]) else row["saliency"]
        return values

    def to_markdown(self) -> str:
        """A table of the layers and a line with the sums."""
        lines = [
            f"# Pruning report: {self.pattern}",
            "",
            f"{len(self.layers)} layers, sparsity {self.sparsity:.4f}, predicted loss increase {self.saliency:.6g}, "
            f"{self.num_grads} gradients, {self.seconds:.1f} s, stages: {', '.join(self.stages)}",
            "",
            "| layer | shape | sparsity | predicted loss increase | damp | outcome | s |",
            "|---|---|---:|---:|---:|---|---:|",
        ]
        for row in self.layers:
            lines.append(
                f"| {row.name} | {row.shape[0]} x {row.shape[1]} | {row.sparsity:.4f} | {row.saliency:.4g} | "
                f"{row.damp:.3g} | "
                f"{row.outcome} | {row.seconds:.2f} |"
            )
        lines += [f"| {name} | | | | | left out: {reason} | |" for name, reason in self.skipped]
        return "\n".join(lines) + "\n"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the report by the ending of ``path``.

        ``.json``, ``.md`` or a self-contained ``.html``; whole or not at all.
        """
        target = Path(path)
        match target.suffix:
            case ".json":
                text = json.dumps(self.to_dict(), indent=2)
            case ".md":
                text = self.to_markdown()
            case ".html":
                from obs_kernels.report.html import render_html

                text = render_html({"pruning": self.to_dict()})
            case _:
                raise ConfigError(f"path must end in .json, .md or .html, got {target.name!r}")
        from obs_kernels.files import write_text

        return write_text(target, text)


def merge_saliency(previous: float, layers: Sequence[LayerReport]) -> float:
    """Predicted loss increase so far plus that of a new stage."""
    return previous + sum(layer.saliency for layer in layers)
