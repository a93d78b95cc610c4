# SPDX-License-Identifier: Apache-2.0
"""Which backend runs an op: one table, no silent fallback.

``backend=None`` takes the first entry of the op's row that can run on the tensor at hand and logs the choice once; a
named backend that cannot run raises with the reason. ``OBS_KERNELS_BACKEND`` names one for the whole process.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from obs_kernels import _ext
from obs_kernels.errors import BackendUnavailableError, ConfigError

BACKENDS = ("reference", "triton", "cuda")
MODULES = {"reference": "obs_kernels.reference", "cuda": "obs_kernels.cuda_calls"}

TABLE: dict[str, tuple[str, ...]] = {
    "accumulate_fisher_": ("reference",),
    "invert_spd": ("reference",),
    "search_nm": ("reference",),
    "search_vnm": ("reference",),
    "obs_update": ("reference",),
    "block_saliency": ("reference",),
    "loss_increase": ("reference",),
    "pack": ("cuda", "reference"),
    "unpack": ("reference",),
    "sparse_linear": ("reference",),
}
"""Backends of each op in the order of preference."""

log = logging.getLogger("obs_kernels")


def resolve(op: str, backend: str | None, tensor: Tensor) -> str:
    """The backend that will run ``op`` on ``tensor``; a concrete name, never None."""
    asked = backend if backend is not None else os.environ.get("OBS_KERNELS_BACKEND") or None
    if asked is None:
        for name in TABLE[op]:
            if unavailable(op, name, tensor.device.type) is None:
                if not torch.compiler.is_compiling():
                    _log_once(op, name, tensor.device.type)
                return name
    if asked not in BACKENDS:
        raise ConfigError(f"backend must be None, {', '.join(map(repr, BACKENDS))}, got {asked!r}")
    reason = unavailable(op, asked, tensor.device.type)
    if reason is not None:
        raise BackendUnavailableError(
            f"backend {asked!r} cannot run {op}: {reason}; pass backend=None to let the package choose"
        )
    return asked


def unavailable(op: str, backend: str, device_type: str) -> str | None:
    """Why ``backend`` cannot run ``op`` on that kind of device, or None if it can."""
    if backend not in TABLE[op]:
        return f"this version has no {backend} kernel for it"
    if backend == "reference":
        return None
    if device_type != "cuda":
        return f"it needs a CUDA tensor, got {device_type}"
    return _ext.reason() if backend == "cuda" else None


def kernel(op: str, backend: str) -> Callable[..., Any]:
    """The function of ``backend`` with the name of the op.

    Autocast is off inside, the ops choose their own arithmetic.
    """
    function = getattr(import_module(MODULES[backend]), op)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with no_autocast():
            return function(*args, **kwargs)

    return call


@contextmanager
def no_autocast() -> Iterator[None]:
    """Autocast off on every device: the ops choose their own arithmetic."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@lru_cache(maxsize=256)
def _log_once(op: str, backend: str, device_type: str) -> None:
    others = [f"{b}: {r}" for b in TABLE[op] if (r := unavailable(op, b, device_type)) is not None]
    log.info("%s on %s runs on the %s backend%s", op, device_type, backend, f" ({'; '.join(others)})" if others else "")
