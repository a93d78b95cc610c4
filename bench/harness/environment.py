# SPDX-License-Identifier: Apache-2.0
"""The header of a result: machine, versions, commit, and which backends cannot run here."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import torch

from bench import gpu_report
from obs_kernels.ops.dispatch import TABLE, unavailable
from obs_kernels.timing import cache_bytes

_CLOCKS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")


def environment(device: torch.device, *, commit: str | None = None) -> dict[str, Any]:
    """What a number needs beside it; null for what this machine has not.

    Args:
        device: of the measurement.
        commit: of this tree where there is no git; says that it is clean.
    """
    gpu = device.type == "cuda"
    tree = gpu_report.describe_tree(commit)
    known = tree["commit"] != "unknown"
    return {
        "label": "GPU" if gpu else "CPU",
        "device": torch.cuda.get_device_name(device) if gpu else _processor(),
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability(device))) if gpu else None,
        "driver": _smi(device, ("driver_version",)).get("driver_version") if gpu else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _triton(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cache_bytes": cache_bytes(device),
        "clocks": _smi(device, _CLOCKS) if gpu else None,
        "commit": tree["commit"] if known else None,
        "dirty": bool(tree["dirty"]) if known else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def missing_backends(device: torch.device, ops: Sequence[str]) -> dict[str, dict[str, str]]:
    """{op: {backend: why it cannot run here}} for the backends that the op has."""
    found: dict[str, dict[str, str]] = {}
    for op in ops:
        reasons = {b: unavailable(op, b, device.type) for b in TABLE.get(op, ())}
        missing = {backend: reason for backend, reason in reasons.items() if reason is not None}
        if missing:
            found[op] = missing
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _triton() -> str | None:
    version = _version("triton")
    return f"{version} (interpreter)" if version and os.environ.get("TRITON_INTERPRET") == "1" else version


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _smi(device: torch.device, fields: Sequence[str]) -> dict[str, str]:
    """Fields of nvidia-smi by name; {} where it is missing or fails. Read only: nothing is set."""
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    query = [f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    # torch counts the visible devices, nvidia-smi all: so by name, unless a container hides the names
    for which in (["-i", uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"], []):
        try:
            done = subprocess.run(
                ["nvidia-smi", *which, *query], capture_output=True, text=True, check=True, timeout=30
            )
        except (OSError, subprocess.SubprocessError):
            continue
        values = [part.strip() for part in done.stdout.strip().partition("\n")[0].split(",")]
        if len(values) == len(fields):
            return dict(zip(fields, values, strict=True))
    return {}
