# SPDX-License-Identifier: Apache-2.0
"""Energy of calls by the counter of the GPU, where NVML gives it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


class EnergyMeter:
    """Joules a call. ``reason`` says why there is no counter; then every measurement is None."""

    def __init__(self, device: torch.device) -> None:
        """Open the counter of ``device``."""
        self.device = device
        self.reason: str | None = None
        self._handle: Any = None
        self._nvml: Any = None
        if device.type != "cuda":
            self.reason = "the CPU has no energy counter that torch's process may read"
            return
        try:
            import pynvml
        except ImportError:
            self.reason = "pynvml is not installed; pip install nvidia-ml-py"
            return
        try:
            pynvml.nvmlInit()
            self._handle = _handle_of(pynvml, device)
            pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except Exception as error:  # NVML's errors derive from no common builtin
            self.reason = f"NVML: {error}"
            return
        self._nvml = pynvml

    def joules(self, call: Callable[[], object], *, seconds: float) -> float | None:
        """Energy of one call: ``call`` is repeated for ``seconds``, as the counter moves some ten times a second."""
        if self._nvml is None:
            return None
        torch.cuda.synchronize(self.device)
        start, before, count = time.perf_counter(), self._read(), 0
        while time.perf_counter() - start < seconds:
            for _ in range(4):
                call()
            torch.cuda.synchronize(self.device)
            count += 4
        return (self._read() - before) / 1e3 / count

    def _read(self) -> int:
        """Millijoules since the driver was loaded."""
        return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))


def _handle_of(nvml: Any, device: torch.device) -> Any:
    """By the UUID: NVML counts the GPUs that CUDA_VISIBLE_DEVICES hides."""
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    try:
        return nvml.nvmlDeviceGetHandleByUUID(uuid)
    except Exception:  # older bindings take bytes
        return nvml.nvmlDeviceGetHandleByUUID(uuid.encode())
