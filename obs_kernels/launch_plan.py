# SPDX-License-Identifier: Apache-2.0
"""What a launcher decided to launch, so that a test can assert which path ran and a bench row can name it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LaunchPlan"]


@dataclass(frozen=True)
class LaunchPlan:
    """One launch: ``path`` names the kernel variant, "empty" if there was nothing to do.

    ``blocks`` and ``threads`` are those of the grid; ``config`` is the tuning record as text ("" if there is only one).
    """

    op: str
    path: str
    blocks: int
    threads: int
    config: str = ""
