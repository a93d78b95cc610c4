# SPDX-License-Identifier: Apache-2.0
"""What a file of ``bench/cases`` says about its op: sizes, inputs, check, variants, peers. All of it data.

To add an op: write ``bench/cases/<topic>.py`` with a ``CASE``, and put the topic into ``bench.cases.TOPICS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from bench.harness.rows import Row
    from bench.harness.session import Context

Inputs = dict[str, Any]
"""One buffer set: the tensors that a call reads and writes; a packed weight stands for several."""

DENSE = "dense"
"""Name of the peer that is the dense baseline: the ratio to it is ``x_dense``, in the rows of other peers too."""


WEIGHTS = {"14M": 14_155_776, "bert-base": 84_934_656}
"""Shapes by pruned weights: 6 of the 36 attention and feed-forward parts of BERT-base, and all of its encoder."""
CPU_SHARE = 256
"""On a CPU the large sizes are divided by this; a row says what it stands for in ``detail.real_shape``."""


@dataclass(frozen=True)
class Check:
    """The result of a call against float64: its error, and the error allowed."""

    error: float
    limit: float
    detail: Mapping[str, Any] = field(default_factory=dict)
    """What else the row should say of the call: its share of memory, what it stands for."""

    @property
    def ok(self) -> bool:
        """Within the limit; NaN is not."""
        return self.error <= self.limit


@dataclass(frozen=True)
class Variant:
    """One way to do the work of a ``Problem``: a backend of ours, one of its tuning records, or a peer."""

    name: str
    """Short, for messages and as the key of ``x_peer``."""
    run: Callable[[Inputs], object]
    """One call. What it returns is kept until the buffer set comes round again, so outputs are rotated too."""
    check: Callable[[Inputs], Check]
    """Runs it once on fresh inputs, and compares a part of the result with float64."""
    config: Mapping[str, Any]
    path: str = "kernel"
    """"kernel": ready tensors, host time hidden. "call": the public op with its checks, host time counts."""
    peer: bool = False
    share: float = 1.0
    """Share of the problem's work that one call does: 1/S for a peer that takes one gradient a call."""
    shape: Mapping[str, int] | None = None
    """Sizes of one call where they are not the problem's."""
    num_bytes: int | None = None
    """Least bytes of one call where they are not the problem's."""
    num_flops: int | None = None


@dataclass(frozen=True)
class Problem:
    """An op at one size: its variants are measured in turn and share their buffers."""

    op: str
    name: str
    """Of the shape: "bert-base"."""
    shape: Mapping[str, int]
    """Sizes by letter, as they are measured."""
    dtype: str
    num_bytes: int
    """Least bytes that a call must read and write: the floor."""
    num_flops: int
    set_bytes: int
    """Memory of one buffer set, outputs included."""
    make: Callable[[int], Inputs]
    """The buffer set of that number, on the device."""
    variants: tuple[Variant, ...]
    real_shape: Mapping[str, int] | None = None
    """The sizes that were cut down for a CPU."""
    pattern: str | None = None

    @property
    def label(self) -> str:
        """For messages."""
        sizes = " ".join(f"{letter}={size}" for letter, size in self.shape.items())
        return " ".join(part for part in (self.op, self.name, sizes, self.pattern, self.dtype) if part)


@dataclass(frozen=True)
class Selection:
    """What the command line asked for; None is everything."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    shapes: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    block_sizes: tuple[int, ...] | None = None
    samples: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    backends: tuple[str, ...] | None = None
    peers: bool = True
    sweep: bool = False
    """Also every tuning record that a backend can be forced to."""

    def cut(self, size: int) -> int:
        """A large size as it is measured on this device."""
        return size if self.device.type == "cuda" else max(1, size // CPU_SHARE)

    def pick(self, known: Iterable[Any], wanted: tuple[Any, ...] | None) -> list[Any]:
        """Those of ``known`` that were asked for, in the order of ``known``."""
        return [item for item in known if wanted is None or item in wanted]


@dataclass(frozen=True)
class Case:
    """An op of the bench."""

    topic: str
    """On the command line: fisher, inverse, search, ..."""
    op: str
    """In the rows: accumulate_fisher_, ..."""
    summary: str
    shapes: tuple[str, ...]
    dtypes: tuple[str, ...] = ()
    problems: Callable[[Selection], Iterable[Problem]] | None = None
    run: Callable[[Context], list[Row]] | None = None
    """Makes the rows itself instead of ``problems``: whole runs with a breakdown."""
