# SPDX-License-Identifier: Apache-2.0
"""Which weights the sparse product packs anew, and for how long: the cache without a GPU behind it."""

from __future__ import annotations

import gc
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from obs_kernels import _ext
from obs_kernels.cuda_calls import prepacked


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What was packed, in the order of the calls."""
    packed: list[Tensor] = []

    def prepack(values: Tensor, codes: Tensor, columns: Tensor, pattern: str, *, out: Tensor | None = None) -> Tensor:
        packed.append(torch.zeros(4) if out is None else out)
        return packed[-1]

    stream = SimpleNamespace(cuda_stream=0, wait_event=lambda event: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda stream: None))
    monkeypatch.setattr(prepacked, "_is_capturing", lambda device: False)
    monkeypatch.setattr(prepacked, "prepack", prepack)
    monkeypatch.setattr(_ext, "load", lambda: SimpleNamespace(prepacked_bytes=lambda rows, cols: 4))
    monkeypatch.setattr(prepacked, "_PREPACKED", {})
    return packed


def parts(gen: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(8, 8, generator=gen),
        torch.zeros(8, 2, dtype=torch.uint8),
        torch.zeros(1, 4, 4, dtype=torch.uint8),
    )


def test_packed_once(made: list[Tensor], gen: torch.Generator) -> None:
    weight = parts(gen)
    first = prepacked.prepacked(*weight, "8:2:4")
    assert prepacked.prepacked(*weight, "8:2:4") is first and len(made) == 1


def test_without_columns_packed_once(made: list[Tensor], gen: torch.Generator) -> None:
    """The empty tensor in their place is another one in each call."""
    values, codes, _ = parts(gen)
    first = prepacked.prepacked(values, codes, codes.new_empty(0), "2:4")
    gc.collect()
    assert prepacked.prepacked(values, codes, codes.new_empty(0), "2:4") is first and len(made) == 1


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_write_packs_into_the_same_memory(made: list[Tensor], gen: torch.Generator, part: int) -> None:
    """A graph that was captured before reads that memory."""
    weight = parts(gen)
    first = prepacked.prepacked(*weight, "8:2:4").packed
    weight[part].add_(1)
    assert prepacked.prepacked(*weight, "8:2:4").packed is first and len(made) == 2
    assert prepacked.prepacked(*weight, "8:2:4").packed is first and len(made) == 2


@pytest.mark.parametrize("part", [0, 1, 2])
def test_other_tensors_are_another_weight(made: list[Tensor], gen: torch.Generator, part: int) -> None:
    weight = parts(gen)
    other = [*weight]
    other[part] = weight[part].clone()
    assert prepacked.prepacked(*weight, "8:2:4") is not prepacked.prepacked(*other, "8:2:4") and len(made) == 2


def test_another_layout_is_another_weight(made: list[Tensor], gen: torch.Generator) -> None:
    values, codes, columns = parts(gen)
    assert prepacked.prepacked(values, codes, columns, "8:2:4") is not prepacked.prepacked(
        values.T, codes, columns, "8:2:4"
    )


def test_a_capture_keeps_nothing(made: list[Tensor], gen: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is memory of the graph."""
    weight = parts(gen)
    monkeypatch.setattr(prepacked, "_is_capturing", lambda device: True)
    inside = prepacked.prepacked(*weight, "8:2:4")
    monkeypatch.setattr(prepacked, "_is_capturing", lambda device: False)
    assert prepacked.prepacked(*weight, "8:2:4") is not inside and len(made) == 2


def test_forgotten_with_the_values(made: list[Tensor], gen: torch.Generator) -> None:
    values, codes, columns = parts(gen)
    prepacked.prepacked(values, codes, columns, "8:2:4")
    view = values[:2]
    del values
    gc.collect()
    assert len(prepacked._PREPACKED) == 1, "a view keeps the storage"
    del view
    gc.collect()
    assert not prepacked._PREPACKED


def test_threads(made: list[Tensor], gen: torch.Generator) -> None:
    weights = [parts(gen) for _ in range(50)]
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for weight in weights:
                prepacked.prepacked(*weight, "8:2:4")
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and len(prepacked._PREPACKED) == len(weights)
