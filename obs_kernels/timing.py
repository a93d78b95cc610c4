# SPDX-License-Identifier: Apache-2.0
"""Timing of calls on any device: spread of samples, interleaving, rotated buffers, and the ceilings of a machine.

Nothing here starts CUDA before a ``CudaClock`` is made. A clock gives samples in microseconds a call; what is done with
them is plain arithmetic, so that tests drive it with a clock of their own.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

__all__ = [
    "Ceilings",
    "Clock",
    "CpuClock",
    "CudaClock",
    "Spread",
    "Timed",
    "cache_bytes",
    "free_bytes",
    "interleave",
    "is_steady",
    "make_clock",
    "measure_ceilings",
    "num_buffer_sets",
    "spread",
]

BATCH_US = 200.0
"""A sample holds so many calls that it lasts this long: an event has a resolution of about half a microsecond."""
MOST_CALLS = 50
"""Calls of a sample at most, so that the launch queue (1024 deep) never fills."""
LONGEST_SPIN_US = 20_000.0
SPIN_CYCLES_PER_US = 2000
"""Of the fastest clock of the GPUs that we know; on a slower one the spin lasts longer, which does no harm."""
STEADY = 1.25
"""Times the 20th percentile that the 80th of a row's samples may be."""
CPU_CACHE_LIMIT = 64 << 20
"""A virtual machine may show the last level cache of its whole host, of which it has a part."""


@dataclass(frozen=True)
class Spread:
    """Median, 20th and 80th percentile of samples, in microseconds."""

    us: float
    p20: float
    p80: float
    repeats: int


def spread(samples: Sequence[float]) -> Spread:
    """The spread of samples; quantiles are interpolated between neighbours.

    Raises:
        ValueError: there is no sample.
    """
    if not samples:
        raise ValueError("samples must not be empty; measure at least once")
    ordered = sorted(samples)
    return Spread(_quantile(ordered, 0.5), _quantile(ordered, 0.2), _quantile(ordered, 0.8), len(ordered))


def is_steady(p20: float, p80: float) -> bool:
    """Whether the percentiles of a row's samples lie so close that a ratio of its median says something."""
    return p80 <= STEADY * p20


def _quantile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


class Clock(Protocol):
    """Something that times a batch of calls."""

    def now(self) -> float:
        """Seconds of the host, for budgets only."""

    def sample(self, calls: Sequence[Callable[[], object]], *, spin_us: float) -> float:
        """Run ``calls`` one after the other; microseconds a call. ``spin_us`` hides so much host time, 0 none."""

    def estimate(self, call: Callable[[], object]) -> tuple[float, float]:
        """Run ``call`` once: microseconds until it is done, and until the host is free again."""


class CpuClock:
    """``time.perf_counter`` around the calls: on a CPU the host is the device."""

    def now(self) -> float:
        """Seconds of the host."""
        return time.perf_counter()

    def sample(self, calls: Sequence[Callable[[], object]], *, spin_us: float) -> float:
        """Microseconds a call; there is nothing to hide, so ``spin_us`` has no effect."""
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls) * 1e6

    def estimate(self, call: Callable[[], object]) -> tuple[float, float]:
        """Microseconds of one call, twice: the host is free when it is done."""
        took = self.sample([call], spin_us=0.0)
        return took, took


class CudaClock:
    """CUDA events around a batch of calls on the current stream; the host's clock serves for budgets only.

    A kernel of a few microseconds takes longer to launch than to run, and events around such launches measure the
    host. So the stream first spins (``torch.cuda._sleep``) for about twice the time that the host needs to queue the
    start event, the batch and the end event; when the spin ends all of it is queued, and the GPU runs it back to back.
    A call that waits for the device itself (as torch.linalg.cholesky does to read its error code) cannot be hidden
    that way: its wait counts, as it does for its caller. With ``spin_us=0`` the device is idle at the start event and
    host time counts: what a caller sees ("call").
    """

    def __init__(self, device: torch.device) -> None:
        """Time calls on ``device``."""
        self.device = device
        with torch.cuda.device(device):
            self._start = torch.cuda.Event(enable_timing=True)
            self._end = torch.cuda.Event(enable_timing=True)

    def now(self) -> float:
        """Seconds of the host."""
        return time.perf_counter()

    def sample(self, calls: Sequence[Callable[[], object]], *, spin_us: float) -> float:
        """Microseconds a call between the events."""
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            if spin_us > 0:
                torch.cuda._sleep(int(min(spin_us, LONGEST_SPIN_US) * SPIN_CYCLES_PER_US))
            self._start.record()
            for call in calls:
                call()
            self._end.record()
            self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) * 1e3 / len(calls)

    def estimate(self, call: Callable[[], object]) -> tuple[float, float]:
        """Microseconds of one call by events, and of the host to queue it."""
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            start = time.perf_counter()
            self._start.record()
            call()
            self._end.record()
            host = time.perf_counter() - start
            self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) * 1e3, host * 1e6


def make_clock(device: torch.device) -> Clock:
    """The clock of ``device``."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


@dataclass(frozen=True)
class Timed:
    """A call to time: ``run`` takes the number of the buffer set that it works on."""

    run: Callable[[int], object]
    hide_host: bool = True
    """Kernel time behind a spin; False: host time counts, and every sample is one call on an idle device."""


def interleave(
    variants: Mapping[str, Timed],
    clock: Clock,
    *,
    num_sets: int = 1,
    seconds: float = 0.5,
    min_repeats: int = 5,
    max_repeats: int = 200,
) -> dict[str, list[float]]:
    """Samples of each variant, in microseconds a call, taken in turn: a slow spell of the machine meets all alike.

    Consecutive calls, of whatever variant, work on consecutive buffer sets, so that no call finds in the cache what
    the one before it left there.

    Args:
        variants: calls by name.
        clock: of the device.
        num_sets: number of buffer sets, see ``num_buffer_sets``.
        seconds: budget for each variant; ``min_repeats`` samples are taken whatever they cost.
        min_repeats: samples of each variant at least.
        max_repeats: samples of each variant at most.
    """
    turn = 0

    def batch_of(timed: Timed, count: int) -> list[Callable[[], object]]:
        nonlocal turn
        calls = [partial(timed.run, (turn + i) % num_sets) for i in range(count)]
        turn += count
        return [*calls]

    counts: dict[str, int] = {}
    spins: dict[str, float] = {}
    for name, timed in variants.items():
        clock.estimate(batch_of(timed, 1)[0])  # compiles, allocates, fills caches of the host
        took, host = clock.estimate(batch_of(timed, 1)[0])
        if timed.hide_host:  # the events of the estimate still hold the launch of a short kernel
            took = clock.sample(batch_of(timed, 1), spin_us=_spin(host, 1))
        fits = math.ceil(BATCH_US / max(took, 1e-3))
        counts[name] = max(1, min(fits, MOST_CALLS)) if timed.hide_host else 1
        spins[name] = _spin(host, counts[name]) if timed.hide_host else 0.0
    samples: dict[str, list[float]] = {name: [] for name in variants}
    deadline = clock.now() + seconds * len(variants)
    for repeat in range(max_repeats):
        if repeat >= min_repeats and clock.now() >= deadline:
            break
        for name, timed in variants.items():
            samples[name].append(clock.sample(batch_of(timed, counts[name]), spin_us=spins[name]))
    return samples


def _spin(host_us: float, count: int) -> float:
    """Twice what the host needs to queue ``count`` calls, and some for the events."""
    return 2.0 * host_us * count + 50.0


def num_buffer_sets(set_bytes: int, *, cache: int, free: int) -> int:
    """Buffer sets to rotate so that together they exceed twice the cache, as far as ``free`` bytes allow.

    One set that is four times the cache by itself needs no other: most of it is gone when its turn comes again.
    """
    if set_bytes <= 0 or set_bytes >= 4 * cache:
        return 1
    wanted = 2 * cache // set_bytes + 1
    fitting = int(0.6 * free) // set_bytes  # the rest is for what the calls allocate
    return max(1, min(wanted, fitting))


def cache_bytes(device: torch.device) -> int:
    """Size of the last level cache: L2 of a GPU, else what the system says of the CPU's L3, 64 MB at most."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    try:
        known = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    except (AttributeError, ValueError, OSError):
        known = 0
    return min(known, CPU_CACHE_LIMIT) if known > 0 else CPU_CACHE_LIMIT


def free_bytes(device: torch.device) -> int:
    """Memory that new tensors can have: the GPU's free memory and torch's own cache, or what the system has."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 4 << 30


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do at best: copied bytes (read + written) and dense product."""

    copy_gbps: float
    matmul_tflops: float

    def better(self, other: Ceilings) -> Ceilings:
        """The higher of each."""
        return Ceilings(max(self.copy_gbps, other.copy_gbps), max(self.matmul_tflops, other.matmul_tflops))

    def floor_us(self, num_bytes: float, num_flops: float) -> float:
        """Least time for so many bytes and operations: the larger of the two."""
        return max(num_bytes / (self.copy_gbps * 1e3), num_flops / (self.matmul_tflops * 1e6))


def measure_ceilings(device: torch.device, clock: Clock, *, repeats: int = 20) -> Ceilings:
    """Medians of a copy from device memory to device memory and of a square product.

    On a GPU 1 GiB is copied and 8192 x 8192 bf16 multiplied, random data (zeros draw less power and run faster). On a
    CPU 128 MiB and 1024 x 1024 f32.
    """
    copied, copy = _copy(device)
    copy_us = _median(copy, clock, repeats)
    del copy  # its buffers too, before the next ones come
    flops, product = _product(device)
    return Ceilings(copied / copy_us / 1e3, flops / _median(product, clock, repeats) / 1e6)


def _copy(device: torch.device) -> tuple[int, Callable[[int], object]]:
    """Bytes read and written, and the copy."""
    source = torch.empty((1 << 30) if device.type == "cuda" else (128 << 20), dtype=torch.uint8, device=device)
    source.random_()
    target = torch.empty_like(source)
    return 2 * source.numel(), lambda _: target.copy_(source)


def _product(device: torch.device) -> tuple[int, Callable[[int], object]]:
    """Operations, and the product."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in "ab")
    out = torch.empty_like(left)
    return 2 * size**3, lambda _: torch.matmul(left, right, out=out)


def _median(run: Callable[[int], object], clock: Clock, repeats: int) -> float:
    return spread(interleave({"it": Timed(run)}, clock, max_repeats=repeats)["it"]).us
