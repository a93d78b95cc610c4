# SPDX-License-Identifier: Apache-2.0
"""Training with pruning: callback and parts for own loops, distillation, learning rates, tasks, and the demo."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from obs_kernels.training.callback import OBSPruningCallback
    from obs_kernels.training.distillation import Distiller
    from obs_kernels.training.gradual import GradualPruning
    from obs_kernels.training.learning_rates import learning_rate_schedule

_PLACES = {
    "Distiller": "distillation",
    "GradualPruning": "gradual",
    "OBSPruningCallback": "callback",
    "learning_rate_schedule": "learning_rates",
}

__all__ = ["Distiller", "GradualPruning", "OBSPruningCallback", "learning_rate_schedule"]


def __getattr__(name: str) -> Any:
    """Import each name when it is asked for: the callback needs transformers, the rest does not."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
