# SPDX-License-Identifier: Apache-2.0
"""The rows of ``bench.squad_gradual``: what each trains, prunes and when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from obs_kernels import OBSConfig, parse_pattern
from obs_kernels.patterns import NMPattern
from obs_kernels.pruning.schedule import PruningSchedule, structure_ladder

DENSE, ONESHOT, GRADUAL = "dense", "one-shot", "gradual"
N_TO_M = ("2:4", "2:8", "64:2:8", "128:2:8", "2:16", "64:2:16")
THRESHOLDS = ("block8:0.75", "unstructured:0.75", "unstructured:0.9")
THRESHOLD_PRUNINGS = 4
"""Prunings of a gradual row to a pattern without counts."""


@dataclass(frozen=True)
class Row:
    """One training."""

    way: str
    pattern: str = ""
    curvature: str = ""
    method: str = ""
    seed: int = 0
    must: bool = False

    @property
    def key(self) -> str:
        """A text that names the row."""
        return "/".join(
            part for part in (self.way, self.pattern, self.curvature, self.method, f"seed{self.seed}") if part
        )


def all_rows(seeds: int = 3) -> list[Row]:
    """Every row, in the order they are run: those that must be there, the other patterns, the baselines, the seeds."""
    must = [Row(DENSE, must=True)]
    must += [Row(GRADUAL, p, "row", "combinatorial", must=True) for p in ("2:4", "2:8", "64:2:8", "128:2:8")]
    must += [Row(GRADUAL, "64:2:8", "block", method, must=True) for method in ("combinatorial", "magnitude")]
    more = [Row(GRADUAL, p, "row", "combinatorial") for p in N_TO_M]
    more += [Row(GRADUAL, p, "block", "combinatorial") for p in N_TO_M + THRESHOLDS]
    more += [Row(GRADUAL, p, "block", "pairwise") for p in N_TO_M]
    more += [Row(GRADUAL, p, "block", "magnitude") for p in N_TO_M + THRESHOLDS]
    more += [Row(ONESHOT, p, "row", "combinatorial") for p in N_TO_M]
    more += [Row(ONESHOT, p, "block", "combinatorial") for p in N_TO_M + THRESHOLDS]
    again = [
        Row(GRADUAL, "64:2:8", curvature, method, seed)
        for seed in range(1, seeds)
        for curvature, method in (
            ("row", "combinatorial"),
            ("block", "combinatorial"),
            ("block", "pairwise"),
            ("block", "magnitude"),
        )
    ]
    rows: dict[str, Row] = {}
    for row in (*must, *more, *again):
        rows.setdefault(row.key, row)
    return list(rows.values())


def config_of(row: Row, *, num_grads: int, dampening_frac: float, block_size: int) -> OBSConfig | None:
    """What a row prunes and how; None for the dense one."""
    if row.way == DENSE:
        return None
    fixed = parse_pattern(row.pattern).fixed_count
    shared: dict[str, Any] = {
        "num_grads": num_grads,
        "dampening_frac": dampening_frac,
        "seed": row.seed,
        "on_singular": "increase_damp",
    }
    if row.curvature == "row":
        return OBSConfig(pattern=row.pattern, curvature="row", sequential=True, **shared)
    return OBSConfig(
        pattern=row.pattern,
        curvature="block",
        method=row.method,
        update="none" if row.method == "magnitude" else "joint",
        fisher_block_size=block_size,
        global_sparsity=not fixed,
        **shared,
    )


def schedule_of(row: Row, *, prune_every: float) -> PruningSchedule | None:
    """One pruning before the first step, or from there on one every ``prune_every`` epochs: the pattern's ladder of
    counts, else a cubic rise of the sparsity.
    """
    if row.way == DENSE:
        return None
    if row.way == ONESHOT:
        return PruningSchedule(start_epoch=0.0, end_epoch=0.0)
    pattern = parse_pattern(row.pattern)
    if isinstance(pattern, NMPattern):
        end = (len(structure_ladder(pattern)) - 1) * prune_every
        return PruningSchedule(start_epoch=0.0, end_epoch=end, update_frequency=prune_every, shape="structure_decay")
    return PruningSchedule(
        start_epoch=0.0,
        end_epoch=(THRESHOLD_PRUNINGS - 1) * prune_every,
        update_frequency=prune_every,
        shape="cubic",
        initial_sparsity=0.7 if pattern.sparsity > 0.8 else 0.5,
    )
