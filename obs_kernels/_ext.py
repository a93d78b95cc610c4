# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled module ``_C``, or keeps the reason why it cannot be loaded.

Nothing here starts CUDA, and nothing fails when this file is imported: the reason is raised by the first call that
needs compiled code, and printed by ``obs-kernels doctor``.
"""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from obs_kernels.errors import BackendUnavailableError

__all__ = ["build_info", "load", "reason"]

_MODULE = "obs_kernels._C"
_INTERFACE = 9  # of python_bindings/bindings.cpp; a module of another number was built from other sources
_FOLDER = Path(__file__).parent
_BUILD = "OBS_KERNELS_BUILD=on python -m pip install --no-deps --force-reinstall ."
_BUILD_CHECKOUT = "OBS_KERNELS_BUILD=on python setup.py build_ext --inplace"


def load() -> ModuleType:
    """The compiled module.

    Raises:
        BackendUnavailableError: there is none, or it does not load; the text has the reason and one command.
    """
    module, why = _try_load()
    if module is None:
        raise BackendUnavailableError(
            f"backend 'cuda' needs the compiled module {_MODULE}, which cannot be used: {why}. Fix: {_fix()}"
        )
    return module


def reason() -> str | None:
    """Why ``load`` would fail; None if it would not."""
    return _try_load()[1]


def build_info() -> dict[str, Any]:
    """``built``, ``reason``, ``architectures`` and ``cuda``: from the module, or as the install left them."""
    module, why = _try_load()
    if module is None:
        return {"architectures": [], "cuda": None, **_installed_info(), "built": False, "reason": why}
    return {**module.build_info(), "built": True, "reason": None}


@functools.cache
def _try_load() -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module(_MODULE)
    except ModuleNotFoundError as error:
        return None, _why_missing() if error.name == _MODULE else f"{error}"
    except Exception as error:  # a damaged or foreign file may fail in any way, and none may break `import obs_kernels`
        return None, f"it does not load ({type(error).__name__}: {error})"
    found = getattr(module, "INTERFACE", None)
    if found != _INTERFACE:
        return None, f"it was built from other sources (interface {found}, this package needs {_INTERFACE})"
    return module, None


def _why_missing() -> str:
    others = sorted(path.name for path in _FOLDER.glob("_C*.so"))
    if others:
        return f"{others[0]} was built for another Python"
    info = _installed_info()
    if info.get("built"):
        return "the install built it, but the file is gone"
    return str(info.get("reason") or "it was never built in this checkout")


def _installed_info() -> dict[str, Any]:
    try:
        info = json.loads((_FOLDER / "_build_info.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, dict) else {}


def _fix() -> str:
    command = _BUILD_CHECKOUT if (_FOLDER.parent / "setup.py").is_file() else f"{_BUILD} (in a checkout of obs_kernels)"
    return f"{command}, with a CUDA toolkit (nvcc) on PATH or in CUDA_HOME"
