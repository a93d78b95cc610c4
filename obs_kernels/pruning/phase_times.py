# SPDX-License-Identifier: Apache-2.0
"""Where the time of a collection goes: seconds of each phase, on the device and on the host."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

PHASES = ("data", "forward", "backward", "check", "product", "accumulate")
"""Loading and moving, the model's two passes, the checks with their sync, per-sample products, Fisher updates."""


class PhaseTimes:
    """Sums seconds of each phase; give it to ``OBSPruner.collect(timings=...)`` and read it afterwards.

    On a GPU a phase is the time between two CUDA events on the current stream: what the device took for it, including
    the time it waited for the host. Nothing waits before ``device_seconds`` is called.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        """Time on ``device``; None takes the CPU."""
        self.device = torch.device("cpu") if device is None else device
        self.host_seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        """Seconds until the host was free again; on a CPU the same as on the device."""
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the block for ``name``, one of ``PHASES``."""
        began, start = time.perf_counter(), self._mark()
        try:
            yield
        finally:
            self.host_seconds[name] += time.perf_counter() - began
            stop = self._mark()
            if start is not None and stop is not None:
                self._events.append((name, start, stop))

    def device_seconds(self) -> dict[str, float]:
        """Seconds of each phase on the device; waits for it."""
        if self.device.type != "cuda":
            return dict(self.host_seconds)
        torch.cuda.synchronize(self.device)
        seconds = dict.fromkeys(PHASES, 0.0)
        for name, start, stop in self._events:
            seconds[name] += start.elapsed_time(stop) / 1e3
        return seconds

    def _mark(self) -> torch.cuda.Event | None:
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


def phase(timings: PhaseTimes | None, name: str) -> AbstractContextManager[None]:
    """``timings.phase(name)``, or nothing at all without timings."""
    return nullcontext() if timings is None else timings.phase(name)
