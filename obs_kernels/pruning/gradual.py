# SPDX-License-Identifier: Apache-2.0
"""One pruning in the middle of a training: gradients, choice, update, by any curvature; then training goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from obs_kernels.patterns import Pattern
from obs_kernels.pruning.calibration import LossFn, seeded
from obs_kernels.pruning.layerwise import Snapshot
from obs_kernels.pruning.phase_times import PhaseTimes
from obs_kernels.pruning.pruner import OBSPruner
from obs_kernels.pruning.report import PruningReport
from obs_kernels.pruning.sparsify import run_until
from obs_kernels.pruning.step import StagedLayer


def gradual_step(
    pruner: OBSPruner,
    pattern: str | Pattern,
    loader: Iterable[Any] | None,
    loss_fn: LossFn | None,
    *,
    timings: PhaseTimes | None = None,
    stage: Callable[[Sequence[str]], list[StagedLayer]] | None = None,
) -> PruningReport:
    """Prune the model of ``pruner`` to ``pattern`` now, in ``config.recomputations`` parts; ``collect`` and ``prune``
    in one call, and the way to prune under ``sequential``.

    The model may be in training mode and its parameters in an optimizer: weights and biases change in place, in the
    same memory; modes, ``requires_grad``, ``.grad`` and torch's generators are afterwards as they were. Masks are
    applied first. Gradients that ``pruner`` held before are dropped: they are of weights that training has moved.
    Under ``sequential`` the dense model is the one that is given, as trained so far.

    Args:
        pruner: built once, before the first pruning; it holds the position between the calls.
        pattern: a stage on the way to the config's pattern, or that itself; see ``PruningSchedule.prunings``.
        loader: batches for the gradients; re-iterable for ``sequential``, several parts, or where memory needs several
            passes. None only where no gradient is needed (``config.needs_fisher``).
        loss_fn: ``loss_fn(model, batch)``, see ``OBSPruner.collect``: the loss of the task, without a teacher's.
        timings: seconds of each phase are added to it.
        stage: in place of ``OBSPruner.stage_layers``; for ``distributed``.

    Returns:
        The report of the pattern reached; ``pruner.verify()`` judges against it.

    Raises:
        What ``OBSPruner.prune`` and ``sparsify_`` do; weights, masks and position are then as before the call.
    """
    stages = pruner.stages_to(pattern, pruner.config.recomputations)
    with _unchanged_on_error(pruner, parts=len(stages)):
        pruner.apply_masks()
        for layer in pruner.layers:
            layer.clear()
        pruner.aim_at(stages)
        with seeded(pruner.layers[0].weight.device, pruner.config.seed):
            run_until(pruner.stage + len(stages), pruner, loader, loss_fn, timings=timings, stage=stage)
    return pruner.report()


@contextmanager
def _unchanged_on_error(pruner: OBSPruner, *, parts: int) -> Iterator[None]:
    """Position, masks and weights of ``pruner`` as they were, if an error comes; what was collected is dropped."""
    position = {name: getattr(pruner, name) for name in ("stages", "stage", "_saliency", "_seconds", "_num_grads")}
    reports, masks = dict(pruner._reports), [layer.mask for layer in pruner.layers]
    # a part that is whole is written before the next one begins; within one, nothing is written before it is whole
    weights = Snapshot(pruner.layers) if parts > 1 else None
    try:
        yield
    except BaseException:
        for layer, mask in zip(pruner.layers, masks, strict=True):
            layer.clear()
            layer.mask = mask
        if weights is not None:
            weights.restore()
        for name, value in position.items():
            setattr(pruner, name, value)
        pruner._reports = reports
        raise
