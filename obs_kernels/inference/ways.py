# SPDX-License-Identifier: Apache-2.0
"""Ways to run one forward: eager or compiled, each also as a CUDA graph. A GPU has all four, a CPU eager alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from obs_kernels.errors import ConfigError

Call = Callable[[], Tensor]
WAYS = ("eager", "graph", "compiled", "compiled graph")
GPU_ONLY = ("graph", "compiled graph")
COMPILED = ("compiled", "compiled graph")
_WARM_UP = 3


def check_ways(ways: Sequence[str] | None, device: torch.device) -> tuple[str, ...]:
    """The ways that were asked for; None is all that ``device`` has.

    Raises:
        ConfigError: an unknown one, or one that needs a GPU.
    """
    gpu = device.type == "cuda"
    if ways is None:
        return WAYS if gpu else ("eager",)
    for way in ways:
        if way not in WAYS:
            raise ConfigError(f"way must be one of {', '.join(WAYS)}, got {way!r}")
        if way in GPU_ONLY and not gpu:
            raise ConfigError(f"way {way!r} needs a GPU, got device {device.type}; use eager or compiled")
    return tuple(dict.fromkeys(ways))


def first_tensor(output: Any) -> Tensor:
    """The first tensor of what a model returned."""
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


def make_call(model: nn.Module, inputs: dict[str, Tensor], way: str) -> Call:
    """One forward of ``model`` on ``inputs``, warmed up: what it compiles, packs or captures is done.

    A graph replays on the memory of its capture: its output is overwritten by the next call.
    """
    runs = torch.compile(model, dynamic=False) if way in COMPILED else model
    call = partial(_forward, runs, inputs)
    for _ in range(_WARM_UP):
        call()
    return _captured(call, next(iter(inputs.values())).device) if way in GPU_ONLY else call


@torch.no_grad()
def _forward(run: Callable[..., Any], inputs: dict[str, Tensor]) -> Tensor:
    return first_tensor(run(**inputs))


def _captured(call: Call, device: torch.device) -> Call:
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # lazily made workspaces must not be made inside the capture
            for _ in range(_WARM_UP):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay
