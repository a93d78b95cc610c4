# SPDX-License-Identifier: Apache-2.0
"""Which damping and how many gradients suit a model: one-shot pruning over a grid of both, each cell scored.

Gradients are collected once for each number of them and block size; another damping costs a choice, an update and an
evaluation only.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from obs_kernels.errors import ConfigError, SingularBlockError
from obs_kernels.pruning import OBSConfig
from obs_kernels.training.environment import environment
from obs_kernels.training.evaluate import evaluate_squad
from obs_kernels.training.job_questions import calibration_of, choose_questions, job_windows, load_questions
from obs_kernels.training.model_folder import make_trainable
from obs_kernels.training.models import load_qa_model, pick_device
from obs_kernels.training.oneshot import Cell, OneShotTable

PATTERNS = ("unstructured:0.5", "unstructured:0.7")
NUM_GRADS = (256, 512, 1024, 2048)
DAMPS = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8)


def run_damping_job(
    *,
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    train: str | os.PathLike[str] | None = None,
    patterns: Sequence[str] = PATTERNS,
    num_grads: Sequence[int] = NUM_GRADS,
    damps: Sequence[float] = DAMPS,
    method: str = "combinatorial",
    update: str = "joint",
    fisher_block_size: int | None = None,
    seed: int = 0,
    device: str = "auto",
    max_eval: int | None = None,
    batch_size: int = 32,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Prune ``model`` in one shot by the block Fisher at every damping, number of gradients and pattern; write nothing.

    Args:
        model, data, train, device, max_eval, batch_size: as in ``run_prune_job``; the same questions score all cells.
        patterns: thresholds run over all layers.
        num_grads: each at least 1; a number beyond the questions takes all of them.
        damps: absolute values added to the diagonal of the Fisher, each above 0.
        method, update, fisher_block_size, seed: as in ``OBSConfig``.
        on_row: called with each row as it comes.

    Returns:
        {"job": "damping", "accuracy": {"dense": ...}, "rows": [{"pattern", "num_grads", "damp", "f1", "f1_share",
        "exact_match", "predicted_loss", "sparsity", "violations"} or with "failed" in place of the scores],
        "best": {pattern: row}, ...}.

    Raises:
        ConfigError: a bad value, or nothing to search over. DataFormatError: a bad data file.
    """
    start = time.perf_counter()
    for name, values in (("patterns", patterns), ("num_grads", num_grads), ("damps", damps)):
        if not values:
            raise ConfigError(f"{name} must hold at least one value, got none; leave it out for {_DEFAULTS[name]}")
    settings: dict[str, Any] = {"method": method, "update": update, "fisher_block_size": fisher_block_size}
    settings |= {"curvature": "block", "seed": seed}
    for pattern in patterns:  # what is refused is refused before the first gradient
        for count, damp in ((count, damp) for count in num_grads for damp in damps):
            base = OBSConfig(pattern=pattern, num_grads=count, damp=damp, **settings)
    if not base.needs_fisher:
        raise ConfigError(
            f"method and update must need gradients, got {method!r} with {update!r}; damping changes nothing there"
        )
    net, tokenizer = load_qa_model(model, device=pick_device(device))
    make_trainable(net)
    notes: list[str] = []
    evaluation, calibration = load_questions(data, train, replace(base, num_grads=max(num_grads)), notes)
    evaluation = choose_questions(evaluation, max_eval, seed, notes)
    windows = job_windows(evaluation, net, tokenizer, with_labels=False)
    dense = evaluate_squad(net, tokenizer, windows, batch_size=batch_size)
    rows: list[dict[str, Any]] = []
    seconds_gradients = 0.0
    for count in num_grads:
        base = replace(base, num_grads=count)
        loader = calibration_of(calibration, net, tokenizer, base, batch_size, notes)
        table = OneShotTable(net, loader, lambda m: evaluate_squad(m, tokenizer, windows, batch_size=batch_size), base)
        table.dense = dense
        for pattern in patterns:
            for damp in damps:
                table.base = replace(base, damp=damp)
                rows.append({"pattern": pattern, "num_grads": count, "damp": damp} | _score(table, pattern))
                if on_row is not None:
                    on_row(rows[-1])
        seconds_gradients += table.seconds_gradients
    scores = {"exact_match": dense.exact_match, "f1": dense.f1, "questions": dense.total, "seconds": dense.seconds}
    return {
        "job": "damping",
        "model": os.fspath(model),
        "data": os.fspath(data),
        "train": None if train is None else os.fspath(train),
        "config": settings,
        "accuracy": {"dense": scores},
        "rows": rows,
        "best": _best(rows),
        "environment": environment(next(net.parameters()).device),
        "notes": list(dict.fromkeys(notes)),
        "seconds_gradients": seconds_gradients,
        "seconds": time.perf_counter() - start,
    }


_DEFAULTS = {"patterns": PATTERNS, "num_grads": NUM_GRADS, "damps": DAMPS}


def _score(table: OneShotTable, pattern: str) -> dict[str, Any]:
    """A cell's scores; of a Fisher that does not factorise with so little damping, that."""
    try:
        found = table.run_cell(Cell(pattern, table.base.method, table.base.update))
    except SingularBlockError as error:
        return {"failed": str(error)}
    keys = ("f1", "f1_share", "exact_match", "predicted_loss", "sparsity", "violations", "seconds_prune")
    return {key: getattr(found, key) for key in keys} | {"received": found.num_grads}


def _best(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The row of the best F1 of each pattern; of equal ones the one with fewer gradients, then more damping."""
    found: dict[str, dict[str, Any]] = {}
    for row in sorted((r for r in rows if "f1" in r), key=lambda r: (-r["f1"], r["num_grads"], -r["damp"])):
        found.setdefault(row["pattern"], row)
    return found
