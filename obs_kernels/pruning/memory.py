# SPDX-License-Identifier: Apache-2.0
"""How much memory is free, and bytes as text."""

from __future__ import annotations

import torch

UNKNOWN_HOST_BYTES = 8 << 30
"""Taken for a system that does not tell: a small machine."""


def free_bytes(device: torch.device) -> int:
    """Bytes that new tensors may take on ``device``: free ones, and those that torch's cache holds without use."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    return _free_host_bytes()


def readable(size: int) -> str:
    """Bytes as B, kB, MB or GB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size} B"


def _free_host_bytes() -> int:
    try:
        import psutil

        return int(psutil.virtual_memory().available)
    except ImportError:
        pass
    try:
        with open("/proc/meminfo") as file:
            values = dict(line.split(":") for line in file)
        return int(values["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return UNKNOWN_HOST_BYTES
