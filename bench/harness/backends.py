# SPDX-License-Identifier: Apache-2.0
"""Which backends of an op a case measures."""

from __future__ import annotations

from typing import Any

import torch

from bench.harness.case import Selection
from obs_kernels.ops import dispatch


def runnable(op: str, selection: Selection, *like: Any) -> list[str]:
    """Backends of ``op`` that were asked for and can run on tensors such as ``like``, the best first.

    Those that cannot run on the device at all are named in the header of the result (``env["unavailable"]``).
    """
    kind = selection.device.type
    asked = selection.pick(dispatch.TABLE[op], selection.backends)
    return [backend for backend in asked if dispatch.unavailable(op, backend, kind, *like) is None]


def called(op: str, selection: Selection, *like: Any) -> str | None:
    """The backend of the row of the public op: what ``backend=None`` takes, or the first that was asked for."""
    if selection.backends is None:
        return dispatch.resolve(op, None, *like)
    return next(iter(runnable(op, selection, *like)), None)


def some_blocks(count: int, *, most: int = 96) -> torch.Tensor:
    """Numbers of blocks to check: the first, the last, and an even spread between, where offsets are large."""
    if count <= most:
        return torch.arange(count)
    third = most // 3
    middle = torch.linspace(third, count - third - 1, most - 2 * third).long()
    return torch.cat([torch.arange(third), middle, torch.arange(count - third, count)]).unique()
