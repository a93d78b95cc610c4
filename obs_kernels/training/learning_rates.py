# SPDX-License-Identifier: Apache-2.0
"""Learning rates of gradual pruning: one linear fall, or one after each pruning step.

A pruned model has to learn anew after each step, so the rate starts again from the top there: the first fall ends with
the first pruning, each further one with the next, and after the last pruning falls of the same length follow to the end
of the training, the last one shortened.
"""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Callable, Sequence

import torch

from obs_kernels.errors import ConfigError

SHAPES = ("constant", "linear", "cyclic_linear")


def learning_rate_factor(
    shape: str,
    *,
    total_steps: int,
    final_factor: float = 0.0,
    starts: Sequence[int] = (0,),
    warmup_steps: int = 0,
    first_step: int = 0,
) -> Callable[[int], float]:
    """Factor of the learning rate as a function of the optimizer steps done before the step that uses it.

    "linear": from 1 at ``first_step`` to ``final_factor`` at the last step. "cyclic_linear": the same between each two
    of ``starts`` and from the last of them to the end, ``1 - k / (len - 1) * (1 - final_factor)`` for the k-th of
    ``len`` steps. "constant": 1.

    Args:
        shape: one of the three.
        total_steps: of the whole training, at least 1.
        final_factor: where a fall ends, as a share of the start, 0 to 1.
        starts: for "cyclic_linear", ascending from 0, see ``Recipe.cycle_starts``.
        warmup_steps: at the very beginning the factor is also at most ``(step + 1) / (warmup_steps + 1)``.
        first_step: "linear" stays at 1 before it.

    Raises:
        ConfigError: an unknown shape, or a value out of its range.
    """
    if shape not in SHAPES:
        raise ConfigError(f"lr_schedule must be one of {', '.join(SHAPES)}, got {shape!r}")
    if total_steps < 1:
        raise ConfigError(f"total_steps must be at least 1, got {total_steps}")
    if not 0.0 <= final_factor <= 1.0:
        raise ConfigError(
            f"final_factor must be 0 to 1, the end of a fall as a share of its start, got {final_factor}; give a final "
            f"learning rate below the first one"
        )
    begins = list(starts) if shape == "cyclic_linear" else [first_step]
    if not begins or begins != sorted(set(begins)) or begins[0] < 0:
        raise ConfigError(f"starts must ascend from 0, got {begins}")
    ends = [*begins[1:], total_steps]

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / (warmup_steps + 1))
        if shape == "constant" or step < begins[0]:
            return warm
        place = bisect_right(begins, step) - 1
        length = ends[place] - begins[place]
        share = (step - begins[place]) / (length - 1) if length > 1 else 0.0
        return min(warm, 1.0 - min(share, 1.0) * (1.0 - final_factor))

    return factor


def learning_rate_schedule(
    optimizer: torch.optim.Optimizer,
    shape: str,
    *,
    total_steps: int,
    final_factor: float = 0.0,
    starts: Sequence[int] = (0,),
    warmup_steps: int = 0,
    first_step: int = 0,
) -> torch.optim.lr_scheduler.LambdaLR:
    """``learning_rate_factor`` as a scheduler of torch; call its ``step()`` after each optimizer step.

    A step that a GradScaler skips counts too, or the falls would no longer end at the prunings: see ``keep_up``.
    """
    factor = learning_rate_factor(
        shape,
        total_steps=total_steps,
        final_factor=final_factor,
        starts=starts,
        warmup_steps=warmup_steps,
        first_step=first_step,
    )
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def keep_up(schedule: torch.optim.lr_scheduler.LRScheduler, steps: int) -> None:
    """Bring ``schedule`` to ``steps`` steps done; loops that leave it behind at skipped steps call this after each."""
    while schedule.last_epoch < steps:
        with warnings.catch_warnings():  # torch warns where the first of all steps was skipped, which is meant
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            schedule.step()
