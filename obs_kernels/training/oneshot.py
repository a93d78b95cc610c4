# SPDX-License-Identifier: Apache-2.0
"""One-shot comparison: one model, many patterns, methods and updates, all from the same gradients, each scored.

The demo and ``bench.oneshot_squad`` are this table with other rows. Fishers are collected once for each block size and
are the same for all cells; a cell restores the dense weights, prunes, verifies and evaluates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from obs_kernels.errors import ConfigError
from obs_kernels.patterns import parse_pattern
from obs_kernels.pruning import OBSConfig, OBSPruner, PruningReport
from obs_kernels.pruning.sparsify import run_stages
from obs_kernels.training.evaluate import SquadResult
from obs_kernels.training.squad_batches import LOSSES, SquadLoader


@dataclass(frozen=True)
class Cell:
    """One entry of the table: how to prune."""

    pattern: str
    method: str
    update: str
    recomputations: int = 1
    curvature: str = "block"
    sequential: bool = False
    loss: str = "labels"
    """Whose curvature is taken: "labels" or "outputs", see ``LOSSES``."""

    @property
    def key(self) -> str:
        """A text that names the cell."""
        parts = [self.pattern, self.method, self.update, str(self.recomputations)]
        if self.curvature != "block":
            parts.append(self.curvature + (" sequential" if self.sequential else ""))
        if self.loss != "labels":
            parts.append(self.loss)
        return "/".join(parts)


@dataclass(frozen=True)
class CellResult:
    """What came out of a cell; F1 and EM in percent."""

    cell: Cell
    exact_match: float
    f1: float
    f1_share: float
    """F1 as a share of the dense model's, in percent."""
    predicted_loss: float
    """Predicted loss increase, 1/2 dw^T (F + damp) dw, summed over layers and stages."""
    sparsity: float
    violations: int
    num_grads: int
    block_size: int
    seconds_prune: float
    """Choice and update (with recomputations: gradients too)."""
    seconds_eval: float

    def to_dict(self) -> dict[str, Any]:
        """Flat plain values."""
        values = asdict(self)
        return values.pop("cell") | values


class OneShotTable:
    """Runs cells on ``model``; the dense weights come back after each.

    Args:
        model: a dense question answering model on its device.
        calibration: re-iterable batches of samples for the gradients.
        evaluate: ``evaluate(model) -> SquadResult`` on fixed questions.
        base: settings that all cells share (num_grads, damping, seed, block size); pattern, method, update and
            recomputations come from the cell.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: SquadLoader,
        evaluate: Callable[[nn.Module], SquadResult],
        base: OBSConfig,
    ) -> None:
        self.model, self.calibration, self.evaluate, self.base = model, calibration, evaluate, base
        self.dense_weights = {k: v.detach().clone() for k, v in model.named_parameters()}
        self.dense: SquadResult | None = None
        self.seconds_gradients = 0.0
        self._fishers: tuple[tuple[int, str], dict[str, Tensor], int] | None = None

    def dense_result(self) -> SquadResult:
        """Score of the dense model, measured once."""
        if self.dense is None:
            self.dense = self.evaluate(self.model)
        return self.dense

    def run(self, cells: Iterable[Cell]) -> Iterator[CellResult]:
        """Results in the order of ``cells``; order them by block size to collect gradients least often."""
        for cell in cells:
            yield self.run_cell(cell)

    def run_cell(self, cell: Cell) -> CellResult:
        """Prune by ``cell``, verify, evaluate, restore."""
        cfg = self.config(cell)
        dense = self.dense_result()
        try:
            if self._is_stored(cfg):
                self._fishers_of(OBSPruner(self.model, cfg), cell.loss)  # outside of the cell's time
            start = time.perf_counter()
            pruner, report = self._prune(cfg, cell.loss)
            seconds = time.perf_counter() - start
            violations = pruner.verify()
            scores = self.evaluate(self.model)
        finally:
            self.restore()
        return CellResult(
            cell=cell,
            exact_match=scores.exact_match,
            f1=scores.f1,
            f1_share=100.0 * scores.f1 / dense.f1 if dense.f1 else 0.0,
            predicted_loss=report.saliency,
            sparsity=report.sparsity,
            violations=violations,
            num_grads=report.num_grads,
            block_size=cfg.block_size,
            seconds_prune=seconds,
            seconds_eval=scores.seconds,
        )

    def config(self, cell: Cell) -> OBSConfig:
        """Settings of a cell."""
        fixed = parse_pattern(cell.pattern).fixed_count
        block = cell.curvature == "block"
        return replace(
            self.base,
            pattern=cell.pattern,
            method=cell.method,
            update=cell.update,
            recomputations=cell.recomputations,
            curvature=cell.curvature,
            sequential=cell.sequential,
            fisher_block_size=self.base.fisher_block_size if block else None,
            passes=self.base.passes if block else 0,
            global_sparsity=block and not fixed,
        )

    def prune(self, cell: Cell) -> OBSPruner:
        """Prune the model by ``cell`` and leave it so; ``restore`` brings the dense weights back."""
        return self._prune(self.config(cell), cell.loss)[0]

    @torch.no_grad()
    def restore(self) -> None:
        """Put the dense weights back."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(self.dense_weights[name])

    def _prune(self, cfg: OBSConfig, loss: str) -> tuple[OBSPruner, PruningReport]:
        pruner = OBSPruner(self.model, cfg)
        if self._is_stored(cfg):
            pruner.set_fishers(*self._fishers_of(pruner, loss))
            pruner.prune()
            return pruner, pruner.finalize()
        self._fishers = None  # both sets may not fit the memory
        return pruner, run_stages(pruner, self.calibration, LOSSES[loss])

    def _is_stored(self, cfg: OBSConfig) -> bool:
        """Whether the cell takes its curvature from what is collected once for all."""
        return cfg.recomputations == 1 and cfg.curvature == "block"

    def _fishers_of(self, pruner: OBSPruner, loss: str) -> tuple[dict[str, Tensor], int]:
        """Mean Fishers of the dense model for the block size and loss at hand, on the model's device."""
        kind = (pruner.config.block_size, loss)
        if self._fishers is None or self._fishers[0] != kind:
            self._fishers = None
            start = time.perf_counter()
            received = pruner.collect(self.calibration, LOSSES[loss])
            self._fishers = (kind, pruner.fishers(), received)
            self.seconds_gradients += time.perf_counter() - start
        return self._fishers[1], self._fishers[2]


def standard_cells(
    pattern: str, *, methods: Sequence[str], updates: Sequence[str], recomputations: Sequence[int] = (1,)
) -> list[Cell]:
    """The cells of one row of the table: methods that apply to the pattern, each with every update."""
    cells = []
    for method in methods:
        for update in updates:
            for parts in recomputations:
                cell = Cell(pattern, method, update, parts)
                try:
                    OBSConfig(pattern=pattern, method=method, update=update, recomputations=parts, curvature="block")
                except ConfigError:
                    continue  # pairwise has no meaning without pairs
                cells.append(cell)
    return cells
