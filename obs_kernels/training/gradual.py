# SPDX-License-Identifier: Apache-2.0
"""Gradual pruning in any training loop: prune at the scheduled optimizer steps, hold the masks after every step.

    gradual = GradualPruning(pruner, schedule, calibration, loss_fn, steps_per_epoch=len(train))
    for step, batch in enumerate(batches):
        gradual.before_step(step, optimizer)
        loss = train_loss(model, batch)
        loss.backward()
        optimizer.step()
        gradual.after_step(optimizer)
        optimizer.zero_grad()
    gradual.finish()

The Fisher comes from batches and a loss of its own, in eval mode, at the moment of the pruning: accumulation, clipping,
scaling and dropout of the training do not reach it, and it leaves gradients, modes and random generators alone. Under
torch.distributed every process has the same batches for it and takes its share; see ``pruning.distributed``. Where
gradients are clipped, ``gradual.masks.mask_gradients()`` before it keeps those of pruned weights out of the norm. A
checkpoint of the loop holds ``gradual.state_dict()``; ``pruning.state_files`` writes it without pickle.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import nn

from obs_kernels.errors import ConfigError, ResumeMismatchError
from obs_kernels.pruning import OBSPruner, PruningReport, gradual_step
from obs_kernels.pruning.calibration import LossFn
from obs_kernels.pruning.config import without_removed
from obs_kernels.pruning.distributed import distributed_step, is_distributed
from obs_kernels.pruning.held_masks import HeldMasks
from obs_kernels.pruning.state import check_state, check_weights

if TYPE_CHECKING:
    from obs_kernels.pruning.schedule import PruningSchedule

log = logging.getLogger("obs_kernels")


class GradualPruning:
    """The prunings of a schedule on their way, and the masks between them.

    Args:
        pruner: of the unwrapped model; it prunes to the patterns that ``schedule`` makes of its config's.
        schedule: when, and to what; a constant one holds the zeros that the model comes with and never prunes (sparse
            transfer).
        loader: batches for the curvature, re-iterable; None where the config needs none.
        loss_fn: ``loss_fn(model, batch)`` for the curvature, see ``OBSPruner.collect``.
        steps_per_epoch: optimizer steps an epoch (not batches, where gradients are accumulated).

    Raises:
        ConfigError: the schedule does not go with the pattern, curvature is needed without a loader, or the model of a
            constant schedule is not at the pattern.
    """

    def __init__(
        self,
        pruner: OBSPruner,
        schedule: PruningSchedule,
        loader: Iterable[Any] | None = None,
        loss_fn: LossFn | None = None,
        *,
        steps_per_epoch: int,
    ) -> None:
        if steps_per_epoch < 1:
            raise ConfigError(f"steps_per_epoch must be at least 1, got {steps_per_epoch}; count optimizer steps")
        pattern = pruner.config.parsed_pattern
        self.pruner, self.schedule, self.loader, self.loss_fn = pruner, schedule, loader, loss_fn
        self.prunings = schedule.prunings(pattern, steps_per_epoch)
        if self.prunings and pruner.config.needs_fisher and (loader is None or loss_fn is None):
            raise ConfigError(
                f"loader and loss_fn are needed for method={pruner.config.method!r} with "
                f"update={pruner.config.update!r}, got None; pass batches for the curvature and their loss"
            )
        self.position = 0
        """Prunings done."""
        for layer in pruner.layers:  # a Trainer may have moved the model since the pruner was built
            device = layer.weight.device
            layer.mask, layer.first_mask = layer.mask.to(device), layer.first_mask.to(device)
        if not self.prunings and pruner.stage == 0:
            pruner.hold()
        self.masks = HeldMasks(pruner.layers)
        self.masks.apply()

    @property
    def is_due(self) -> int | None:
        """The optimizer step of the next pruning; None when all are done."""
        return self.prunings[self.position].step if self.position < len(self.prunings) else None

    def before_step(self, step: int, optimizer: Any = None) -> PruningReport | None:
        """Prune if a pruning is due; before the forward of the optimizer step number ``step``, counted from 0.

        Args:
            step: optimizer steps done so far. Called with the same one again it does nothing.
            optimizer: what it keeps of newly pruned weights is zeroed at once.

        Returns:
            The report of a pruning, None where none was due.
        """
        report = None
        while (due := self.is_due) is not None and due <= step:
            pattern = self.prunings[self.position].pattern
            prune = distributed_step if is_distributed() else gradual_step
            report = prune(self.pruner, pattern, self.loader, self.loss_fn)
            self.position += 1
            log.info("pruned to %s before step %d: sparsity %.4f", pattern, step, report.sparsity)
        if report is not None:
            self.masks.refresh()
            self.masks.apply(optimizer)
        return report

    def after_step(self, optimizer: Any = None, averaged: nn.Module | None = None) -> None:
        """Zeros at pruned places again; after each optimizer step, also one that a GradScaler skipped.

        Args: see ``HeldMasks.apply``.
        """
        self.masks.apply(optimizer, averaged)

    def finish(self) -> PruningReport:
        """Check that all is done and nothing grew back, and leave pattern and masks on the model for ``compress_``.

        Raises:
            ConfigError: the training ended before the last pruning, or the model breaks its masks.
        """
        if (due := self.is_due) is not None:
            last = self.prunings[-1]
            raise ConfigError(
                f"training ended after {self.position} of {len(self.prunings)} prunings; the next is due at step "
                f"{due}, the last ({last.pattern}) at step {last.step}: train longer, or end the schedule earlier"
            )
        return self.pruner.finalize()

    @property
    def sparsity(self) -> float:
        """Share of pruned weights over all layers that are pruned; waits for the device."""
        masks = [layer.mask for layer in self.pruner.layers]
        return 1.0 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)

    def logs(self) -> dict[str, float]:
        """Numbers of the state as it is, by the names that trackers get; waits for the device."""
        report = self.pruner.report()
        found = {"sparsity/global": self.sparsity}
        for layer in self.pruner.layers:
            found[f"sparsity/{layer.name}"] = 1.0 - float(layer.mask.double().mean())
        if not math.isnan(report.saliency):
            found["obs/saliency_removed"] = report.saliency
        found["obs/damp_used"] = max((row.damp for row in report.layers), default=0.0)
        skipped = sum(row.outcome.startswith("skipped") for row in report.layers)
        found["obs/skipped_layers"] = float(skipped + len(report.skipped))
        found["obs/mask_violations"] = float(self.pruner.verify())
        found["obs/prunings_done"] = float(self.position)
        return found

    def identity(self) -> dict[str, Any]:
        """What decides the run, plain values: settings, schedule, and the steps and patterns they make."""
        return {
            "config": self.pruner.config.to_dict(),
            "schedule": _plain(asdict(self.schedule)),
            "prunings": [[pruning.step, str(pruning.pattern)] for pruning in self.prunings],
        }

    def state_dict(self) -> dict[str, Any]:
        """Position, masks and all else of the pruner: tensors and plain values; see ``state_files`` for writing it."""
        return {"identity": self.identity(), "position": self.position, "pruner": self.pruner.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken, on a model that has the weights of that moment; nothing changes on an error.

        Raises:
            ResumeMismatchError: the state is of another recipe, with the keys that differ, or damaged; weights of the
            model are not zero where a mask of the state prunes, with the layer.
        """
        position = state.get("position")
        if not isinstance(position, int) or not 0 <= position <= len(self.prunings):
            raise ResumeMismatchError(f"state['position'] must be 0 to {len(self.prunings)}, got {position!r}")
        check_identity(state.get("identity"), self.identity())
        if not isinstance(state.get("pruner"), Mapping):
            raise ResumeMismatchError("state['pruner'] is missing or damaged; save it again")
        check_state(state["pruner"], self.pruner.config, self.pruner.layers)
        check_weights(state["pruner"]["masks"], self.pruner.layers)
        self.pruner.load_state_dict(state["pruner"])
        self.position = position
        self.masks.refresh()


def check_identity(theirs: Any, mine: Mapping[str, Any]) -> None:
    """Raise ``ResumeMismatchError`` with the keys that differ unless ``theirs`` equals ``mine``; both plain values."""
    if not isinstance(theirs, Mapping):
        raise ResumeMismatchError("the state does not say what run it is of; save it again")
    differing = sorted(_differing(theirs, _plain(dict(mine)), ""))
    if differing:
        raise ResumeMismatchError(
            f"the run to resume was made with another recipe (differs in {', '.join(differing)}); use the same, or "
            f"start anew in another folder"
        )


def _differing(theirs: Any, mine: Any, place: str) -> list[str]:
    if isinstance(theirs, Mapping) and isinstance(mine, Mapping):
        found = []
        for key in {*without_removed(theirs), *mine}:
            found += _differing(theirs.get(key), mine.get(key), f"{place}.{key}" if place else str(key))
        return found
    return [] if _plain(theirs) == mine else [place]


def _plain(value: Any) -> Any:
    """As it is after a way through JSON."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)
