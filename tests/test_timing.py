# SPDX-License-Identifier: Apache-2.0
"""Timing with a clock of its own: the arithmetic, the turns, the buffers. No test looks at how fast this machine is."""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from obs_kernels import timing
from obs_kernels.timing import Ceilings, CpuClock, CudaClock, Timed, interleave, num_buffer_sets, spread


class FakeClock:
    """Every call takes ``us[name]``; time passes only by calls."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.cost: dict[str, float] = {}
        self.last = ""
        self.samples: list[tuple[str, int, float]] = []

    def call(self, name: str, us: float, log: list[tuple[str, int]]) -> Callable[[int], object]:
        self.cost[name] = us

        def run(index: int) -> None:
            log.append((name, index))
            self.last = name

        return run

    def now(self) -> float:
        return self.seconds

    def sample(self, calls: Sequence[Callable[[], object]], *, spin_us: float) -> float:
        for call in calls:
            call()
        took = self.cost[self.last]
        self.seconds += took * len(calls) * 1e-6
        self.samples.append((self.last, len(calls), spin_us))
        return took

    def estimate(self, call: Callable[[], object]) -> tuple[float, float]:
        call()
        return self.cost[self.last], 10.0


@pytest.mark.parametrize(
    ("samples", "wanted"),
    [
        ([5.0], (5.0, 5.0, 5.0)),
        ([1.0, 2.0], (1.5, 1.2, 1.8)),
        ([3.0, 1.0, 2.0, 5.0, 4.0, 6.0], (3.5, 2.0, 5.0)),
        ([1.0] * 9 + [1000.0], (1.0, 1.0, 1.0)),
    ],
)
def test_spread(samples: list[float], wanted: tuple[float, float, float]):
    found = spread(samples)
    assert (found.us, found.p20, found.p80) == pytest.approx(wanted) and found.repeats == len(samples)


def test_spread_of_nothing_raises():
    with pytest.raises(ValueError, match="samples must not be empty"):
        spread([])


@given(st.lists(st.floats(0.1, 1e6), min_size=1, max_size=30))
def test_spread_is_ordered_and_blind_to_the_order(samples: list[float]):
    found = spread(samples)
    assert min(samples) <= found.p20 <= found.us <= found.p80 <= max(samples)
    assert found.us == pytest.approx(statistics.median(samples))
    assert spread(random.Random(0).sample(samples, len(samples))) == found


def test_variants_are_measured_in_turn():
    clock, log = FakeClock(), []
    variants = {name: Timed(clock.call(name, us, log)) for name, us in (("a", 1000.0), ("b", 3000.0), ("c", 500.0))}
    samples = interleave(variants, clock, seconds=0.0, min_repeats=4)
    assert samples == {"a": [1000.0] * 4, "b": [3000.0] * 4, "c": [500.0] * 4}
    assert [name for name, _, _ in clock.samples] == ["a", "b", "c"] * 5
    assert [name for name, _ in log[:9]] == ["a"] * 3 + ["b"] * 3 + ["c"] * 3, "three calls of each come before"


def test_consecutive_calls_never_share_a_buffer_set():
    clock, log = FakeClock(), []
    variants = {name: Timed(clock.call(name, us, log)) for name, us in (("a", 20.0), ("b", 70.0), ("c", 900.0))}
    interleave(variants, clock, num_sets=3, seconds=0.0, min_repeats=3)
    indices = [index for _, index in log]
    assert indices == [turn % 3 for turn in range(len(indices))]


def test_short_calls_are_batched_behind_a_spin_and_calls_are_not():
    clock, log = FakeClock(), []
    timed = {
        "short": Timed(clock.call("short", 4.0, log)),
        "tiny": Timed(clock.call("tiny", 0.1, log)),
        "long": Timed(clock.call("long", 9000.0, log)),
        "call": Timed(clock.call("call", 4.0, log), hide_host=False),
    }
    interleave(timed, clock, seconds=0.0, min_repeats=1)
    assert clock.samples[:3] == [(name, 1, 70.0) for name in ("short", "tiny", "long")], "to learn how long they take"
    assert clock.samples[3:] == [("short", 50, 1050.0), ("tiny", 50, 1050.0), ("long", 1, 70.0), ("call", 1, 0.0)]


def test_the_budget_is_kept_but_for_the_least_repeats():
    def repeats(us: float, **limits: float) -> int:
        clock = FakeClock()
        return len(interleave({"a": Timed(clock.call("a", us, []))}, clock, **limits)["a"])  # type: ignore[arg-type]

    assert repeats(1e6, seconds=0.5, min_repeats=5) == 5
    assert repeats(10_000, seconds=0.5) == 50
    assert repeats(1000, seconds=0.5, max_repeats=30) == 30


@pytest.mark.parametrize(
    ("set_bytes", "free", "wanted"),
    [
        (200, 10**9, 1),  # four caches: one is enough
        (199, 10**9, 1),  # one set already exceeds two caches
        (100, 10**9, 2),
        (50, 10**9, 3),
        (1, 10**9, 101),
        (10, 100, 6),  # 0.6 of what is free
        (10, 0, 1),
        (0, 100, 1),
    ],
)
def test_buffer_sets(set_bytes: int, free: int, wanted: int):
    assert num_buffer_sets(set_bytes, cache=50, free=free) == wanted


@given(st.integers(1, 10**6), st.integers(1, 10**4))
def test_buffer_sets_exceed_twice_the_cache(set_bytes: int, cache: int):
    count = num_buffer_sets(set_bytes, cache=cache, free=10**12)
    assert count * set_bytes > 2 * cache and (count - 1) * set_bytes <= 2 * cache


def test_ceilings():
    low, high = Ceilings(100.0, 3.0), Ceilings(90.0, 4.0)
    assert low.better(high) == high.better(low) == Ceilings(100.0, 4.0)
    assert low.floor_us(1e9, 0) == pytest.approx(10_000)  # 1 GB at 100 GB/s
    assert low.floor_us(1e9, 3e12) == pytest.approx(1e6)  # 3 TFLOP at 3 TFLOP/s


def test_ceilings_of_this_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timing, "_copy", lambda device: (1000, lambda _: None))
    monkeypatch.setattr(timing, "_product", lambda device: (10**6, lambda _: None))
    found = timing.measure_ceilings(torch.device("cpu"), CpuClock(), repeats=5)
    assert found.copy_gbps > 0 and found.matmul_tflops > 0
    assert timing.cache_bytes(torch.device("cpu")) > 0 and timing.free_bytes(torch.device("cpu")) > 0


def test_the_cpu_clock_counts_a_call():
    calls = []
    took = CpuClock().sample([lambda: calls.append(1)] * 4, spin_us=0.0)
    assert len(calls) == 4 and took > 0
    assert isinstance(timing.make_clock(torch.device("cpu")), CpuClock)


def test_the_cuda_clock_queues_behind_its_spin(monkeypatch: pytest.MonkeyPatch):
    """Order of what is queued, with a stand-in for torch.cuda: spin, start, calls, end, and only then a wait."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.name = "start" if "made" not in log else "end"
            log.append("made")

        def record(self) -> None:
            log.append(self.name)

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 0.6  # ms

    class Device:
        def __init__(self, device: object) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    fake = SimpleNamespace(
        Event=Event, device=Device, synchronize=lambda: log.append("idle"), _sleep=lambda n: log.append(f"spin {n}")
    )
    monkeypatch.setattr(torch, "cuda", fake)
    clock = CudaClock(torch.device("cuda", 0))
    log.clear()
    assert clock.sample([lambda: log.append("call")] * 3, spin_us=100.0) == pytest.approx(200.0)
    assert log == ["idle", "spin 200000", "start", "call", "call", "call", "end", "wait"]
    log.clear()
    clock.sample([lambda: log.append("call")], spin_us=0.0)
    assert log == ["idle", "start", "call", "end", "wait"]
    log.clear()
    clock.sample([lambda: None], spin_us=1e9)
    assert log[1] == "spin 40000000", "a long host time is not waited for in full"
    assert clock.estimate(lambda: None)[0] == pytest.approx(600.0)


def test_the_import_starts_no_cuda():
    code = "import torch, obs_kernels.timing; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
