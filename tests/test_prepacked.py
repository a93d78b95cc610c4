# SPDX-License-Identifier: Apache-2.0
"""Which weights the sparse product packs anew, and for how long: the cache without a GPU behind it."""

from __future__ import annotations

import gc
import threading
import time
import weakref
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


@pytest.mark.parametrize("part", [0, 1, 2])
def test_the_address_of_another_storage_is_another_weight(made: list[Tensor], gen: torch.Generator, part: int) -> None:
    """As after ``resize_(0)`` of a storage that lives on: another one may get its memory, with as many writes."""
    weight = list(parts(gen))
    memory = bytearray(weight[part].numpy().tobytes())
    old, new = (torch.frombuffer(memory, dtype=weight[part].dtype).view(weight[part].shape) for _ in range(2))
    assert old.data_ptr() == new.data_ptr() and old._version == new._version
    weight[part] = old
    first = prepacked.prepacked(*weight, "8:2:4")
    weight[part] = new
    assert prepacked.prepacked(*weight, "8:2:4").packed is not first.packed and len(made) == 2
    weight[part] = old
    assert prepacked.prepacked(*weight, "8:2:4") is first


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_storage_that_died_is_not_the_one_at_its_address(
    made: list[Tensor], gen: torch.Generator, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    """Even if no one is told before the next call."""
    monkeypatch.setattr(weakref, "finalize", lambda *_: SimpleNamespace())
    weight = list(parts(gen))
    memory, dtype, shape = bytearray(weight[part].numpy().tobytes()), weight[part].dtype, weight[part].shape
    for calls in (1, 2, 3):
        weight[part] = torch.frombuffer(memory, dtype=dtype).view(shape)
        prepacked.prepacked(*weight, "8:2:4")
        assert len(made) == calls


@pytest.mark.parametrize("part", [0, 1, 2])
def test_forgotten_with_any_part(made: list[Tensor], gen: torch.Generator, part: int) -> None:
    weight = list(parts(gen))
    prepacked.prepacked(*weight, "8:2:4")
    view = weight[part][:1]
    weight[part] = weight[part].clone()
    gc.collect()
    assert len(prepacked._PREPACKED) == 1, "a view keeps the storage"
    del view
    gc.collect()
    assert not prepacked._PREPACKED


@pytest.mark.parametrize("replaced", [0, 1, 2])
def test_parts_that_come_and_go_leave_nothing(made: list[Tensor], gen: torch.Generator, replaced: int) -> None:
    """Neither packed copies, nor those who wait for the end of the parts that stay."""
    weight, before = list(parts(gen)), len(weakref.finalize._registry)  # type: ignore[attr-defined]
    for _ in range(5):
        weight[replaced] = weight[replaced].clone()
        prepacked.prepacked(*weight, "8:2:4")
    gc.collect()
    assert len(prepacked._PREPACKED) == 1
    assert len(weakref.finalize._registry) <= before + 3  # type: ignore[attr-defined]


def test_a_write_leaves_one_entry(made: list[Tensor], gen: torch.Generator) -> None:
    weight = list(parts(gen))
    for part in (0, 1, 2, 0):
        weight[part].add_(1)
        prepacked.prepacked(*weight, "8:2:4")
    assert len(prepacked._PREPACKED) == 1
    del weight[1]
    gc.collect()
    assert not prepacked._PREPACKED


def test_threads_pack_a_weight_once_and_again_after_a_write(
    made: list[Tensor], gen: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, fast = 4, prepacked.prepack
    together = threading.Barrier(at_once)

    def slow(*arguments: object, **options: object) -> Tensor:
        time.sleep(0.005)  # the others come meanwhile
        return fast(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(prepacked, "prepack", slow)
    weights = [parts(gen) for _ in range(20)]
    found: list[Tensor] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for weight in weights:
                together.wait()
                found.append(prepacked.prepacked(*weight, "8:2:4").packed)
        except BaseException as error:
            together.abort()
            failed.append(error)

    for round_number in (1, 2):
        threads = [threading.Thread(target=work) for _ in range(at_once)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed and len(prepacked._PREPACKED) == len(weights)
        assert len(made) == round_number * len(weights), "each weight was packed by one of the threads"
        assert len({id(packed) for packed in found}) == len(weights), "into the same memory"
        for values, _, _ in weights:
            values.add_(1)
