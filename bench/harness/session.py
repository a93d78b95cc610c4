# SPDX-License-Identifier: Apache-2.0
"""One run of the bench: checks first, then times in turn, then a document that is whole after every problem."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from bench.harness.case import Case, Check, Problem, Selection, Variant
from bench.harness.plans import plan_of
from bench.harness.rows import Row, problem_rows, with_limit
from obs_kernels.errors import BackendUnavailableError, ConfigError
from obs_kernels.ops.dispatch import unavailable
from obs_kernels.report.bench import config_text
from obs_kernels.timing import Ceilings, Clock, Timed, cache_bytes, free_bytes, interleave, num_buffer_sets, spread


def _silent(line: str) -> None:
    pass


@dataclass
class Context:
    """What a case needs to measure, and where its results go."""

    selection: Selection
    clock: Clock
    ceilings: Ceilings
    seconds: float
    """Budget of a row."""
    say: Callable[[str], None] = _silent
    on_rows: Callable[[], None] = lambda: None
    """Called after every problem, so that what was measured is kept whatever comes."""
    deadline: float = math.inf
    """``time.monotonic()`` from which on no further problem begins."""
    rows: list[Row] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)
    """Variants whose check was red: they have no row."""
    skipped: list[dict[str, Any]] = field(default_factory=list)
    """Variants that could not be measured here (memory), and why."""

    def refuse(self, op: str, shape: Mapping[str, int], variant: str, why: str) -> None:
        """Note a red check."""
        self.refused.append({"op": op, "shape": dict(shape), "variant": variant, "why": why})
        self.say(f"  RED {variant}: {why}; no row")

    def skip(self, op: str, shape: Mapping[str, int], variant: str, why: str) -> None:
        """Note what could not be measured."""
        self.skipped.append({"op": op, "shape": dict(shape), "variant": variant, "why": why})
        self.say(f"  skipped {variant}: {why}")

    def is_over(self, op: str, shape: Mapping[str, int], variant: str) -> bool:
        """Whether the deadline has passed; what is then not measured is noted."""
        if time.monotonic() < self.deadline:
            return False
        self.skip(op, shape, variant, "not reached in the minutes given")
        return True

    def run_case(self, case: Case) -> None:
        """All rows of a case. One problem's failure does not take the others' rows with it."""
        if case.run is not None:
            self.add(case.run(self))
        for problem in case.problems(self.selection) if case.problems is not None else ():
            if self.is_over(problem.op, problem.shape, "all"):
                continue
            self.say(problem.label)
            self.add(self.measure(problem))
            gc.collect()
            if self.selection.device.type == "cuda":
                torch.cuda.empty_cache()  # the next problem has other sizes, and needs the memory whole

    def add(self, rows: list[Row]) -> None:
        """Keep rows, and let the document be written."""
        self.rows += rows
        for row in rows:
            share = with_limit(row, self.ceilings)["limit_share"]
            of_floor = f", {100 * share:.0f} % of the floor" if share is not None else ""
            self.say(f"  {row['path']:6s} {config_text(row['config'])}: {row['us']:,.1f} us{of_floor}")
        self.on_rows()

    def measure(self, problem: Problem) -> list[Row]:
        """Rows of one problem: memory, checks, times."""
        device = self.selection.device
        free = free_bytes(device)
        if problem.set_bytes > 0.95 * free:
            why = f"needs {problem.set_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            self.skip(problem.op, problem.shape, "all", why)
            return []
        num_sets = num_buffer_sets(problem.set_bytes, cache=cache_bytes(device), free=free)
        try:
            sets = [problem.make(0)]
        except torch.OutOfMemoryError:
            self.skip(problem.op, problem.shape, "all", "out of memory while the inputs were made")
            return []
        checks = self._check(problem, sets[0])
        green = [variant for variant in problem.variants if variant.name in checks]
        if not green:
            return []
        # Results stay here until their set comes round: a freed output would be handed out again by the allocator,
        # still in the cache, and the next call's writes would be free.
        kept: list[object] = [None] * num_sets

        def timed(variant: Variant) -> Timed:
            def run(index: int) -> None:
                kept[index] = variant.run(sets[index])

            return Timed(run, hide_host=variant.path == "kernel")

        most = 200 if device.type == "cuda" else 50
        least = 5 if device.type == "cuda" else 3
        try:
            sets += [problem.make(number) for number in range(1, num_sets)]
            if device.type == "cuda":  # outputs of all sets at once: to allocate one waits for the device
                for index in range(num_sets):
                    timed(green[0]).run(index)
            samples = interleave(
                {variant.name: timed(variant) for variant in green},
                self.clock,
                num_sets=num_sets,
                seconds=self.seconds,
                min_repeats=least,
                max_repeats=most,
            )
        except torch.OutOfMemoryError:
            self.skip(problem.op, problem.shape, "all", f"out of memory with {num_sets} buffer sets")
            return []
        spreads = {name: spread(found) for name, found in samples.items()}
        plans = {v.name: self._plan(v, sets) for v in green if "backend" in v.config}
        return problem_rows(problem, spreads, checks, plans, num_sets)

    def _check(self, problem: Problem, inputs: dict[str, torch.Tensor]) -> dict[str, Check]:
        """The green checks by the name of their variant; the others are noted as refused or skipped."""
        checks: dict[str, Check] = {}
        for variant in problem.variants:
            try:
                check = variant.check(inputs)
            except torch.OutOfMemoryError:
                self.skip(problem.op, problem.shape, variant.name, "out of memory")
                continue
            except Exception as error:  # a broken kernel may fail in any way, and the other variants still count
                why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                # a forced tuning record may ask for more than the device has, and a peer's library may be missing; a
                # default of ours that fails is a fault
                missing = variant.peer and isinstance(error, BackendUnavailableError)
                note = self.skip if variant.config.get("forced") or missing else self.refuse
                note(problem.op, problem.shape, variant.name, why)
                if "CUDA error" in str(error):
                    raise  # the context of the device is lost: nothing after it can be measured
                continue
            if check.ok:
                checks[variant.name] = check
            else:
                why = f"error {check.error:.3g} against float64 is above {check.limit:.3g}"
                self.refuse(problem.op, problem.shape, variant.name, why)
        return checks

    @staticmethod
    def _plan(variant: Variant, sets: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
        return plan_of(str(variant.config["backend"]), lambda: variant.run(sets[0]))


def document(
    rows: list[Row],
    *,
    env: Mapping[str, Any],
    ceilings: Ceilings,
    command: str,
    refused: list[dict[str, Any]],
    skipped: list[dict[str, Any]],
) -> dict[str, Any]:
    """The JSON of a run; every row's share of the floor is by these ceilings."""
    return {
        "env": dict(env),
        "ceilings": asdict(ceilings),
        "command": command,
        "rows": [with_limit(row, ceilings) for row in rows],
        "refused": list(refused),
        "skipped": list(skipped),
    }


def check_selection(cases: list[Case], selection: Selection) -> None:
    """Every name asked for is known to one of the cases.

    Raises:
        ConfigError: a shape or dtype that none of them has, or backends of which none runs here.
    """
    for what, wanted, known in (
        ("shape", selection.shapes, [s for case in cases for s in case.shapes]),
        ("dtype", selection.dtypes, [d for case in cases for d in case.dtypes]),
    ):
        for name in wanted or ():
            if name not in known:
                raise ConfigError(f"{what} must be one of {', '.join(dict.fromkeys(known))} or all, got {name!r}")
    reasons = {
        f"{case.op} on {backend}: {why}"
        for case in cases
        for backend in selection.backends or ()
        if (why := unavailable(case.op, backend, selection.device.type)) is not None
    }
    if selection.backends and len(reasons) == len(cases) * len(set(selection.backends)):
        raise ConfigError(f"backend must be one that runs here; {'; '.join(sorted(reasons))}")
