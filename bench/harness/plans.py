# SPDX-License-Identifier: Apache-2.0
"""What a backend chose for a call: the plans that its launchers return."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from obs_kernels.ops.dispatch import MODULES


def plan_of(backend: str, call: Callable[[], object]) -> dict[str, Any]:
    """Run ``call`` once and return the plan of its first launch as plain values: path, grid, tuning record.

    Backend functions return tensors; the ``launch_*`` function inside each returns the plan. So the launchers of the
    backend are watched for this one call. {} where the backend has none (reference).
    """
    seen: list[Any] = []
    with _watched(MODULES.get(backend, ""), seen):
        call()
    if not seen or not dataclasses.is_dataclass(seen[0]) or isinstance(seen[0], type):
        return {}
    found = {key: _plain(value) for key, value in dataclasses.asdict(seen[0]).items() if key != "op"}
    if len(seen) > 1:
        found["launches"] = len(seen)
    return {key: value for key, value in found.items() if value != ""}


@contextmanager
def _watched(package: str, seen: list[Any]) -> Iterator[None]:
    replaced: list[tuple[Any, str, Any]] = []
    modules = [m for name, m in sys.modules.items() if package and (name == package or name.startswith(f"{package}."))]
    for module in modules:
        for name, function in list(vars(module).items()):
            if name.startswith("launch_") and callable(function):
                replaced.append((module, name, function))
                setattr(module, name, _noting(function, seen))
    try:
        yield
    finally:
        for module, name, function in replaced:
            setattr(module, name, function)


def _noting(function: Callable[..., Any], seen: list[Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        plan = function(*args, **kwargs)
        seen.append(plan)
        return plan

    return call


def _plain(value: Any) -> Any:
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else str(value)
