# SPDX-License-Identifier: Apache-2.0
"""Which patterns lead to the final one, and when: parts of a pruning step, and prunings spread over a training.

Pure functions of numbers: nothing here sees a model. A stage is a pattern with whole counts, never a float that is
looked up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from obs_kernels import checks
from obs_kernels.errors import ConfigError
from obs_kernels.patterns import NMPattern, Pattern, UnstructuredPattern, VNMPattern

SHAPES = ("cubic", "linear", "inverse_cubic", "structure_decay", "constant")
CURVES = {
    "linear": lambda x: x,
    "cubic": lambda x: 1.0 - (1.0 - x) ** 3,
    "inverse_cubic": lambda x: 1.0 - (1.0 - x) ** (1.0 / 3.0),
}
"""Share of the way from the initial to the final sparsity, by the share x of the way in time."""
EPSILON = 1e-9
"""Of epochs, counts and sparsities: differences that rounding makes."""


def recomputation_stages(
    pattern: Pattern, recomputations: int, *, reached: Pattern | None = None
) -> tuple[Pattern, ...]:
    """The step to ``pattern`` in ``recomputations`` parts, new gradients and a new Fisher for each.

    Thresholded patterns: equal parts of the sparsity from ``reached`` (None: 0) on. n:m: ``n_i = n_0 - floor(i (n_0 -
    n) / R + 1/2)``, n_0 that of ``reached`` (None: m), R capped at n_0 - n; the columns of v:n:m follow n (see
    ``VNMPattern.num_columns``). Unlike a float, n never misses a stage.
    """
    if isinstance(pattern, NMPattern):
        first = reached.n if isinstance(reached, NMPattern) else pattern.m
        parts = min(recomputations, first - pattern.n)
        counts = [first - int(i * (first - pattern.n) / parts + 0.5) for i in range(1, parts + 1)]
        return tuple(_with_count(pattern, n) for n in counts)
    thresholded = cast(UnstructuredPattern, pattern)
    start = 0.0 if reached is None else reached.sparsity
    way = thresholded.target - start
    return tuple(
        replace(thresholded, target=round(start + way * i / recomputations, 12)) for i in range(1, recomputations + 1)
    )


def check_reachable(pattern: Pattern, *, reached: Pattern | None, final: Pattern) -> None:
    """Raise ``ConfigError`` unless ``pattern`` leads from ``reached`` (None: dense) on to ``final``.

    It must be of the kind of ``final``, keep no less than that, and less than ``reached``: a pattern that keeps as
    much or more would open what is pruned.
    """
    if _kind(pattern) != _kind(final):
        raise ConfigError(
            f"pattern {pattern} is no stage on the way to {final}: kind, v, m and block size must be the same; use a "
            f"stage such as {_example(final)}"
        )
    if pattern.sparsity > final.sparsity + EPSILON:
        raise ConfigError(
            f"pattern {pattern} prunes more than the config's pattern {final}; stop at {final}, or build the pruner "
            f"with another pattern"
        )
    if reached is not None and pattern.sparsity <= reached.sparsity + EPSILON:
        raise ConfigError(
            f"pattern {pattern} prunes no more than {reached}, which is reached: it would open weights or do nothing; "
            f"give a pattern that prunes more, at most {final}"
        )


@dataclass(frozen=True)
class ScheduledPruning:
    """One pruning of a training."""

    step: int
    """Optimizer steps done before it."""
    pattern: Pattern


@dataclass(frozen=True)
class PruningSchedule:
    """When to prune in a training, and to what: prunings at ``start_epoch``, every ``update_frequency`` epochs from
    there on, and at ``end_epoch``.

    Attributes:
        start_epoch: of the first pruning; may be a fraction, as all epochs here.
        end_epoch: of the last pruning, which is to the final pattern. Equal to ``start_epoch``: one pruning.
        update_frequency: epochs between two prunings.
        shape: "linear", "cubic" or "inverse_cubic" for the sparsity between the first and the last pruning (n:m and
            v:n:m: the count that comes nearest), "structure_decay" for the counts of ``ladder``, "constant" for no
            pruning at all: the zeros that the model comes with are held.
        initial_sparsity: of the first pruning, 0 to 1.
        ladder: what each pruning of a structure decay keeps: n of n:m and v:n:m, for the other patterns the sparsity;
            the last is the final pattern's. A text "3/5" is n and the columns of a panel where they are not the usual
            ones (7, 6, 4, 4 for n = 5, 4, 3, 2; "3/5" in the middle leaves no row short). None takes
            ``structure_ladder``.

    Raises:
        ConfigError: a schedule that ends before it starts, a frequency that is not positive, a value out of range.

    Source: cubic sparsity of Zhu and Gupta 2017 (arXiv:1710.01878); structure decay of VENOM (Castro et al. 2023).
    """

    start_epoch: float
    end_epoch: float
    update_frequency: float = 1.0
    shape: str = "cubic"
    initial_sparsity: float = 0.0
    ladder: tuple[int | float | str, ...] | None = None

    def __post_init__(self) -> None:
        """Validate and normalise."""
        for name in ("start_epoch", "end_epoch", "update_frequency", "initial_sparsity"):
            object.__setattr__(self, name, checks.check_number(name, getattr(self, name)))
        checks.check_choice("shape", self.shape, SHAPES)
        if self.end_epoch < self.start_epoch:
            raise ConfigError(
                f"end_epoch must be at least start_epoch = {self.start_epoch:g}, got {self.end_epoch:g}: the schedule "
                f"would end before it starts; exchange the two"
            )
        if self.update_frequency <= 0:
            raise ConfigError(
                f"update_frequency must be greater than 0 epochs, got {self.update_frequency:g}; 1 prunes once an epoch"
            )
        if self.initial_sparsity >= 1:
            raise ConfigError(
                f"initial_sparsity must be at least 0 and below 1, got {self.initial_sparsity:g}; 0.5 prunes 50 %"
            )
        if self.shape in ("structure_decay", "constant") and self.initial_sparsity:
            raise ConfigError(
                f"initial_sparsity has no meaning with shape={self.shape!r}, got {self.initial_sparsity:g}; leave it "
                f"out" + (" and say it by ladder" if self.shape == "structure_decay" else "")
            )
        if self.ladder is not None:
            if self.shape != "structure_decay":
                raise ConfigError(f"ladder needs shape='structure_decay', got {self.shape!r}; leave one of them out")
            object.__setattr__(self, "ladder", _ladder(self.ladder))

    def epochs(self) -> tuple[float, ...]:
        """Epochs of the prunings, ascending; none for a constant schedule."""
        if self.shape == "constant":
            return ()
        way = self.end_epoch - self.start_epoch
        whole = math.floor(way / self.update_frequency + EPSILON)
        found = [self.start_epoch + k * self.update_frequency for k in range(whole + 1)]  # no sum: it would drift
        if found[-1] < self.end_epoch - EPSILON * max(1.0, self.end_epoch):
            found.append(self.end_epoch)
        else:
            found[-1] = self.end_epoch
        return tuple(found)

    def sparsity(self, epoch: float, final: float) -> float:
        """Sparsity at ``epoch`` of a linear, cubic or inverse cubic schedule that ends at ``final``."""
        if self.shape not in CURVES:
            raise ConfigError(f"shape={self.shape!r} has no sparsity between its prunings; use one of {list(CURVES)}")
        way = self.end_epoch - self.start_epoch
        x = 1.0 if way <= 0 else min(max((epoch - self.start_epoch) / way, 0.0), 1.0)
        if epoch < self.start_epoch:
            x = 0.0
        return self.initial_sparsity + CURVES[self.shape](x) * (final - self.initial_sparsity)

    def patterns(self, pattern: Pattern) -> tuple[Pattern, ...]:
        """The pattern at each of ``epochs``; the last one is ``pattern``. Equal ones may follow each other.

        Raises:
            ConfigError: the schedule starts beyond ``pattern``; a ladder that does not end at it, does not fall, or
            has another length than ``epochs``.
        """
        epochs = self.epochs()
        if not epochs:
            return ()
        if self.shape == "structure_decay":
            return self._by_ladder(pattern, len(epochs))
        if self.initial_sparsity > pattern.sparsity + EPSILON:
            raise ConfigError(
                f"initial_sparsity must be at most {pattern.sparsity:g}, the sparsity of pattern {pattern}, got "
                f"{self.initial_sparsity:g}; lower it"
            )
        return (*(_at_sparsity(pattern, self.sparsity(epoch, pattern.sparsity)) for epoch in epochs[:-1]), pattern)

    def prunings(self, pattern: Pattern, steps_per_epoch: int) -> tuple[ScheduledPruning, ...]:
        """Every pruning of a training to ``pattern``, in ascending optimizer steps, the last one to ``pattern`` itself.

        An epoch is rounded to the nearest step, halves up. Of prunings that fall on one step only the last, the
        sparsest, is done. A pruning that would prune nothing (sparsity 0, or the same pattern as the one before, as
        where the count of n:m does not change) is left out.

        Args:
            pattern: the final one.
            steps_per_epoch: optimizer steps, not batches, where gradients are accumulated.

        Raises:
            ConfigError: as ``patterns``; ``steps_per_epoch`` is not a positive integer.
        """
        if isinstance(steps_per_epoch, bool) or not isinstance(steps_per_epoch, int) or steps_per_epoch < 1:
            raise ConfigError(f"steps_per_epoch must be an integer of at least 1, got {steps_per_epoch!r}")
        by_step: dict[int, Pattern] = {}
        for epoch, stage in zip(self.epochs(), self.patterns(pattern), strict=True):
            by_step[step_of(epoch, steps_per_epoch)] = stage
        found: list[ScheduledPruning] = []
        before: Pattern | None = None
        for step, stage in by_step.items():
            if stage.sparsity > (0.0 if before is None else before.sparsity) + EPSILON:
                found.append(ScheduledPruning(step, stage))
                before = stage
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON and YAML."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def _by_ladder(self, pattern: Pattern, length: int) -> tuple[Pattern, ...]:
        ladder = structure_ladder(pattern) if self.ladder is None else self.ladder
        stages: list[Pattern] = []
        for rung in ladder:
            stages.append(_at_rung(pattern, rung))
            if len(stages) > 1 and stages[-1].sparsity <= stages[-2].sparsity:
                raise ConfigError(f"ladder must keep less with every pruning, got {list(ladder)}; put it in order")
        if stages[-1] != pattern:
            raise ConfigError(
                f"ladder must end at pattern {pattern}, got {list(ladder)}, which ends at {stages[-1]}; add "
                f"{pattern.n if isinstance(pattern, NMPattern) else pattern.sparsity:g} at its end"
            )
        if len(stages) != length:
            needed = self.start_epoch + (len(stages) - 1) * self.update_frequency
            raise ConfigError(
                f"ladder {list(ladder)} has {len(stages)} prunings, but epochs {self.start_epoch:g} to "
                f"{self.end_epoch:g} every {self.update_frequency:g} are {length}; use end_epoch = {needed:g}"
            )
        return tuple(stages)


def step_of(epoch: float, steps_per_epoch: int) -> int:
    """Optimizer steps done at ``epoch``: the nearest whole number, halves up."""
    return math.floor(epoch * steps_per_epoch + 0.5 + EPSILON)


def structure_ladder(pattern: Pattern) -> tuple[int, ...]:
    """The counts n of a structure decay to ``pattern`` that is not given one: 5, 4, 3, 2 for 2:8 and 9, 7, 5, 4, 3, 2
    for 2:16, as published; others by the same rule, from the middle of m and n on, a quarter less each time.

    Raises:
        ConfigError: ``pattern`` has no fixed count.
    """
    if not isinstance(pattern, NMPattern):
        raise ConfigError(f"pattern {pattern} has no count n that could fall; give ladder as sparsities, or a shape")
    counts = [(pattern.m + pattern.n) // 2]
    while counts[-1] > pattern.n:
        counts.append(max(pattern.n, counts[-1] - max(1, (counts[-1] + 1) // 4)))
    return tuple(counts)


def _at_sparsity(pattern: Pattern, sparsity: float) -> Pattern:
    """``pattern`` with a lower sparsity, for n:m the nearest count (halves prune more); a whole group is sparsity 0."""
    if sparsity >= pattern.sparsity - EPSILON:
        return pattern
    if isinstance(pattern, NMPattern):
        pruned = math.floor(pattern.m * sparsity + 0.5 + EPSILON)
        return _with_count(pattern, pattern.m - pruned) if pruned else UnstructuredPattern(0.0)
    return replace(cast(UnstructuredPattern, pattern), target=round(sparsity, 12))


def _with_count(pattern: NMPattern, n: int) -> NMPattern:
    """``pattern`` with n kept; of a panel in the usual columns, the final pattern in its own."""
    if n == pattern.n:
        return pattern
    return replace(pattern, n=n, columns=None) if isinstance(pattern, VNMPattern) else replace(pattern, n=n)


def _at_rung(pattern: Pattern, rung: int | float | str) -> Pattern:
    if isinstance(rung, str):
        n, columns = map(int, rung.split("/"))
        if not isinstance(pattern, VNMPattern):
            raise ConfigError(f"ladder gives columns to {rung!r}, but pattern {pattern} has no panels; give n alone")
        return replace(pattern, n=n, columns=columns)
    if isinstance(pattern, NMPattern):
        if not isinstance(rung, int) or not 0 < rung < pattern.m:
            raise ConfigError(
                f"ladder of pattern {pattern} must hold counts n, 1 to {pattern.m - 1}, got {rung!r}; for example "
                f"{list(structure_ladder(pattern))}"
            )
        return _with_count(pattern, rung)
    if not 0 < rung < 1:
        raise ConfigError(f"ladder of pattern {pattern} must hold sparsities between 0 and 1, got {rung!r}")
    return replace(cast(UnstructuredPattern, pattern), target=float(rung))


def _kind(pattern: Pattern) -> tuple[Any, ...]:
    """All of a pattern but how much it prunes."""
    return type(pattern), getattr(pattern, "m", None), getattr(pattern, "v", None), getattr(pattern, "size", None)


def _example(final: Pattern) -> str:
    return str(replace(final, n=final.n + 1) if isinstance(final, NMPattern) and final.n + 1 < final.m else final)


def _ladder(value: Any) -> tuple[int | float | str, ...]:
    rungs = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
    if not rungs or not all(_is_rung(rung) for rung in rungs):
        raise ConfigError(f"ladder must be a list of counts or sparsities, got {value!r}; for example [5, 4, 3, 2]")
    return rungs


def _is_rung(rung: Any) -> bool:
    if isinstance(rung, str):
        return re.fullmatch(r"\d+/\d+", rung) is not None
    return isinstance(rung, (int, float)) and not isinstance(rung, bool)
