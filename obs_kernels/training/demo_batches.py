# SPDX-License-Identifier: Apache-2.0
"""Training data of the demo model: passages that worker processes make ahead, and a window of them on the device."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from random import Random
from typing import TYPE_CHECKING

from obs_kernels.training.demo_corpus import Split, make_passage
from obs_kernels.training.demo_tokens import encode_passages

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

_PASSAGES_PER_CHUNK = 500
_QUESTIONS_PER_PASSAGE = 8
_WINDOW_CHUNKS, _FIRST_CHUNKS = 48, 6


@dataclass(frozen=True)
class DemoModelConfig:
    """Everything that decides the demo model; see ``--help`` for the meanings."""

    seed: int = 0
    steps: int = 8000
    batch_size: int = 256
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup_steps: int = 300
    cooldown_fraction: float = 0.25
    cooldown_steps: int = 600
    target_f1: float = 98.5
    aux_weight: float = 1.0
    easy_steps: int = 800
    layers: int = 4
    hidden: int = 256
    heads: int = 4
    ffn: int = 1024
    max_positions: int = 136
    refresh_steps: int = 16
    report_steps: int = 250
    minutes_limit: float = 0.0
    device: str = "auto"
    workers: int = 2


def make_chunk(index: int, *, config: DemoModelConfig, vocab: dict[str, int], split: Split = "train") -> np.ndarray:
    """Encoded questions of ``_PASSAGES_PER_CHUNK`` passages, those of chunk ``index``; easy ones first."""
    rng = Random(f"{split}-{config.seed}-chunk-{index}")
    easy = split == "train" and index * config.refresh_steps < config.easy_steps
    passages = [
        make_passage(rng, split=split, entities=(2, 3) if easy else (4, 6), max_questions=_QUESTIONS_PER_PASSAGE)
        for _ in range(_PASSAGES_PER_CHUNK)
    ]
    return encode_passages(passages, vocab, length=config.max_positions)


@contextmanager
def chunk_source(config: DemoModelConfig, vocab: dict[str, int]) -> Iterator[Iterator[np.ndarray]]:
    """Chunks of training data in a fixed order, made ahead by worker processes that start before CUDA does."""
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    make = partial(make_chunk, config=config, vocab=vocab)
    with multiprocessing.get_context(method).Pool(config.workers) as pool:

        def chunks() -> Iterator[np.ndarray]:
            ahead = config.workers * 4
            pending = deque(pool.apply_async(make, (i,)) for i in range(ahead))
            for index in count(ahead):
                yield pending.popleft().get()
                pending.append(pool.apply_async(make, (index,)))

        yield chunks()


class Window:
    """The newest chunks of training data as one tensor on the device; batches are drawn from it there."""

    def __init__(self, chunks: Iterator[np.ndarray], config: DemoModelConfig, device: torch.device) -> None:
        import torch

        self._chunks = chunks
        self._room = _WINDOW_CHUNKS * _PASSAGES_PER_CHUNK * _QUESTIONS_PER_PASSAGE
        self._rows = torch.zeros(self._room, 2, config.max_positions + 2, dtype=torch.int16, device=device)
        self._filled = self._next = 0
        self._generator = torch.Generator(device=device).manual_seed(config.seed)
        for _ in range(_FIRST_CHUNKS):
            self.refresh()

    def refresh(self) -> None:
        """Take in one more chunk, in place of the oldest rows once the window is full."""
        import torch

        chunk = torch.from_numpy(next(self._chunks)).to(self._rows.device)
        first = min(len(chunk), self._room - self._next)
        self._rows[self._next : self._next + first] = chunk[:first]
        self._rows[: len(chunk) - first] = chunk[first:]
        self._next = (self._next + len(chunk)) % self._room
        self._filled = min(self._room, self._filled + len(chunk))

    def batch(self, size: int) -> Tensor:
        """Draw ``[size, 2, length + 2]`` rows with replacement."""
        import torch

        device = self._rows.device
        return self._rows[torch.randint(self._filled, (size,), device=device, generator=self._generator)]
