# SPDX-License-Identifier: Apache-2.0
"""What equal calls of the sparse product do again, without a GPU: a module that counts stands in for the compiled one,
and the tensors of the CPU say that they are on a GPU.
"""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from masks import random_mask
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from obs_kernels import _ext, parse_pattern, reference
from obs_kernels.cuda_calls import matmul, prepacked, product_plan, wgmma
from obs_kernels.errors import ConfigError, DTypeNotSupportedError, ShapeNotSupportedError
from obs_kernels.ops import SparseWeight, dispatch, sparse_linear
from obs_kernels.sparse import SparseLinear

GATHERED, WHOLE, UNPANELLED = "64:2:16", "4:2:16", "2:8"
ROWS, COLS = 128, 64


@dataclass
class Played:
    """What was done: how often each thing, and the addresses of the last launch."""

    counts: Counter[str] = field(default_factory=Counter)
    addresses: tuple[int, ...] = ()
    stream: int = 7
    waited: list[int] = field(default_factory=list)
    capturing: bool = False

    def since(self, before: Counter[str]) -> dict[str, int]:
        return dict(self.counts - before)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[Played]:
    made = Played()

    def product(count: int) -> Callable[..., SimpleNamespace]:
        def make(**fields: Any) -> SimpleNamespace:
            made.counts["product"] += 1

            def launch(*addresses: int) -> None:
                assert len(addresses) == count
                made.counts["launch"] += 1
                made.addresses = addresses

            return SimpleNamespace(run=launch)

        return make

    def counted(name: str, result: Any) -> Any:
        def call(**options: Any) -> Any:
            made.counts[name] += 1
            return result

        return call

    def current_stream(device: object = None) -> SimpleNamespace:
        return SimpleNamespace(cuda_stream=made.stream, wait_event=lambda event: made.waited.append(made.stream))

    module = SimpleNamespace(
        SPARSE_TILES=("a",),
        GATHER_TILES=("b",),
        SparseLinear=product(4),
        GatherLinear=product(5),  # x, turned x, bias, y, stream
        prepack=counted("prepack", None),
        gather_is_faster=counted("question", True),
        prepacked_bytes=lambda rows, cols: 16,
    )
    monkeypatch.setattr(_ext, "load", lambda: module)
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda stream: None))
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
    monkeypatch.setattr(Tensor, "is_cuda", True, raising=False)
    for place in (matmul, product_plan):
        monkeypatch.setattr(place, "raw_stream", lambda device: made.stream)
    for place in (wgmma, prepacked):
        monkeypatch.setattr(place, "check_sparse_gpu", lambda device: None)
    monkeypatch.setattr(prepacked, "_is_capturing", lambda device: made.capturing)
    monkeypatch.setattr(prepacked, "_lasting_memory", prepacked._memory)
    monkeypatch.setattr(prepacked, "_PREPACKED", {})
    monkeypatch.setattr(product_plan, "_WEIGHTS", {})
    monkeypatch.setattr(dispatch, "_no_cuda", lambda device_type: None)
    monkeypatch.setitem(dispatch.GPU_LIMITS, ("sparse_linear", "cuda"), lambda device: None)

    def allocating(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate(*args: Any, **options: Any) -> Tensor:
            made.counts["memory"] += 1
            return function(*args, **options)

        return allocate

    monkeypatch.setattr(Tensor, "new_empty", allocating(Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", allocating(torch.empty_like))
    monkeypatch.delenv("OBS_KERNELS_BACKEND", raising=False)
    with torch.no_grad():
        yield made


def weight(gen: torch.Generator, text: str = GATHERED) -> SparseWeight:
    mask = random_mask(gen, ROWS, COLS, parse_pattern(text))
    packed = reference.pack(torch.randn(ROWS, COLS, generator=gen).half(), mask, text)
    values, codes, columns = packed
    return SparseWeight(values, codes, columns if columns.numel() else None, parse_pattern(text), (ROWS, COLS))


def inputs(gen: torch.Generator, *lead: int) -> Tensor:
    return torch.randn(*lead, COLS, generator=gen).half()


# An equal call


@pytest.mark.parametrize("lead", [(16,), (2, 8), (), (13,)])
@pytest.mark.parametrize("text", [GATHERED, WHOLE, UNPANELLED])
def test_an_equal_call_decides_nothing(gen: torch.Generator, played: Played, text: str, lead: tuple[int, ...]) -> None:
    """It allocates y, and memory for x where that is turned, and launches once; with the addresses of this call."""
    sparse, x, bias = weight(gen, text), inputs(gen, *lead), torch.zeros(ROWS).half()
    first = sparse_linear(x, sparse, bias, activation="relu")
    assert played.counts["product"] == played.counts["prepack"] == played.counts["launch"] == 1
    turns = text == GATHERED
    for other in (x, x.clone()):
        before = played.counts.copy()
        y = sparse_linear(other, sparse, bias, activation="relu")
        assert played.since(before) == {"memory": 1 + turns, "launch": 1}
        assert y.shape == first.shape == (*lead, ROWS) and y.dtype == x.dtype
        assert (played.addresses[0], *played.addresses[-3:]) == (other.data_ptr(), bias.data_ptr(), y.data_ptr(), 7)


@pytest.mark.parametrize("y_layout", ["token", "feature"])
@pytest.mark.parametrize("text", [GATHERED, UNPANELLED])
def test_feature_major(gen: torch.Generator, played: Played, text: str, y_layout: str) -> None:
    sparse, x = weight(gen, text), inputs(gen, 16).T.contiguous()
    for calls in (1, 2, 3):
        y = sparse_linear(x, sparse, x_layout="feature", y_layout=y_layout)
        assert y.shape == ((16, ROWS) if y_layout == "token" else (ROWS, 16))
        assert played.counts["product"] == 1 and played.counts["launch"] == calls
        assert played.addresses[0] == x.data_ptr() and played.addresses[-2] == y.data_ptr()


@pytest.mark.parametrize("x_layout", ["token", "feature"])
@pytest.mark.parametrize("text", [GATHERED, UNPANELLED])
def test_x_that_must_be_copied_is_copied_each_time(
    gen: torch.Generator, played: Played, text: str, x_layout: str
) -> None:
    """Off its alignment: the kernel is given a copy with the contents of this call."""
    sparse, memory = weight(gen, text), torch.zeros(16 * COLS + 1).half()
    x = memory[1:].view(16, COLS) if x_layout == "token" else memory[1:].view(COLS, 16)
    for _ in range(3):
        sparse_linear(x, sparse, x_layout=x_layout)
        assert played.addresses[0] not in (0, x.data_ptr()) and played.addresses[0] % 16 == 0
    assert played.counts["product"] == 1


@pytest.mark.parametrize("text", [GATHERED, UNPANELLED])
def test_the_same_of_many_dimensions(gen: torch.Generator, played: Played, text: str) -> None:
    sparse, x = weight(gen, text), torch.zeros(16 * COLS + 1).half()[1:].view(2, 8, COLS)
    for _ in range(3):
        assert sparse_linear(x, sparse).shape == (2, 8, ROWS)
        assert played.addresses[0] not in (0, x.data_ptr()) and played.addresses[0] % 16 == 0
    assert played.counts["product"] == 1


def test_strided_x_of_many_dimensions(gen: torch.Generator, played: Played) -> None:
    sparse, x = weight(gen), inputs(gen, 3, 2, 8).transpose(0, 1)
    for _ in range(3):
        assert sparse_linear(x, sparse).shape == (2, 3, 8, ROWS)
        assert played.addresses[0] != x.data_ptr()
    assert played.counts["product"] == 1


def test_through_the_dispatcher(gen: torch.Generator, played: Played) -> None:
    """As compiled models call it."""
    sparse, x = weight(gen), inputs(gen, 16)
    assert sparse.columns is not None
    for calls in (1, 2, 3):
        torch.ops.obs_kernels.sparse_linear(
            x, sparse.values, sparse.codes, sparse.columns, None, GATHERED, activation="", x_layout="token",
            y_layout="token", backend="cuda",
        )  # fmt: skip
        assert played.counts["product"] == 1 and played.counts["launch"] == calls


# Another one


def variants(gen: torch.Generator) -> dict[str, dict[str, Any]]:
    apart = torch.zeros(16, COLS + 8).half()
    return {
        "tokens": {"x": inputs(gen, 24)},
        "dimensions": {"x": inputs(gen, 2, 8)},
        "strides": {"x": apart[:, :COLS]},
        "alignment": {"x": torch.zeros(16 * COLS + 1).half()[1:].view(16, COLS)},
        "no bias": {"bias": None},
        "activation": {"activation": "gelu"},
        "layout of y": {"y_layout": "feature"},
    }


@pytest.mark.parametrize("name", variants(torch.Generator()))
def test_another_question_is_decided_anew(gen: torch.Generator, played: Played, name: str) -> None:
    given: dict[str, Any] = {"x": inputs(gen, 16), "bias": torch.zeros(ROWS).half()}
    sparse, other = weight(gen), given | variants(gen)[name]
    sparse_linear(sparse=sparse, **given)
    before = played.counts["product"]
    for _ in range(2):
        y = sparse_linear(sparse=sparse, **other)
        lead = other["x"].shape[:-1]
        assert y.shape == ((ROWS, *lead) if name == "layout of y" else (*lead, ROWS))
    # 2 x 8 tokens lie as 16 do
    assert played.counts["product"] == before + (name != "dimensions")
    assert played.counts["prepack"] == 1


@pytest.mark.parametrize("part", ["values", "codes", "columns"])
def test_a_write_to_the_weight_packs_and_decides_anew(gen: torch.Generator, played: Played, part: str) -> None:
    sparse, x = weight(gen), inputs(gen, 16)
    sparse_linear(x, sparse)
    sparse_linear(x, sparse)
    getattr(sparse, part).mul_(1)
    before = played.counts.copy()
    for _ in range(2):
        sparse_linear(x, sparse)
    done = played.since(before)
    assert (done["prepack"], done["product"], done["launch"]) == (1, 1, 2)
    (found,) = product_plan._WEIGHTS.values()
    assert len(found.plans) > 0 and all(plan.weight in prepacked._PREPACKED.values() for plan in found.plans.values())


def test_values_that_lie_elsewhere_are_another_weight(gen: torch.Generator, played: Played) -> None:
    sparse, x = weight(gen), inputs(gen, 16)
    sparse_linear(x, sparse)
    before = sparse.values._version
    sparse.values.data = sparse.values.clone()
    assert sparse.values._version == before
    sparse_linear(x, sparse)
    assert played.counts["prepack"] == played.counts["product"] == 2


@pytest.mark.parametrize("part", ["values", "codes", "columns"])
def test_the_address_of_another_storage_is_another_weight(gen: torch.Generator, played: Played, part: str) -> None:
    """As after ``resize_(0)`` of a storage that lives on: another one may get its memory, with as many writes."""
    sparse, x = weight(gen), inputs(gen, 16)
    given = getattr(sparse, part)
    memory = bytearray(given.numpy().tobytes())
    first, second = (
        replace(sparse, **{part: torch.frombuffer(memory, dtype=given.dtype).view(given.shape)}) for _ in range(2)
    )
    assert getattr(first, part).data_ptr() == getattr(second, part).data_ptr()
    for calls, other in ((1, first), (2, second)):
        for _ in range(2):
            sparse_linear(x, other)
        assert played.counts["prepack"] == played.counts["product"] == calls
    sparse_linear(x, first)
    assert played.counts["product"] == 2


@pytest.mark.parametrize("part", ["values", "codes", "columns"])
def test_a_storage_that_died_is_not_the_one_at_its_address(
    gen: torch.Generator, played: Played, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Even if no one is told before the next call."""
    monkeypatch.setattr(weakref, "finalize", lambda *_: SimpleNamespace())
    sparse, x = weight(gen), inputs(gen, 16)
    given = getattr(sparse, part)
    memory = bytearray(given.numpy().tobytes())
    for calls in (1, 2, 3):
        sparse_linear(x, replace(sparse, **{part: torch.frombuffer(memory, dtype=given.dtype).view(given.shape)}))
        assert played.counts["product"] == calls


@pytest.mark.parametrize("made_inside", [True, False])
@pytest.mark.parametrize("text", [GATHERED, UNPANELLED])
def test_inference_mode(gen: torch.Generator, played: Played, text: str, made_inside: bool) -> None:
    """Weights of that mode count no writes."""
    with torch.inference_mode(made_inside):
        sparse, x = weight(gen, text), inputs(gen, 16)
    with torch.inference_mode():
        sparse_linear(x, sparse)
        before = played.counts.copy()
        for _ in range(2):
            sparse_linear(x, sparse)
    sparse_linear(x, sparse)
    assert played.since(before) == {"memory": 3 * (2 if text == GATHERED else 1), "launch": 3}


# Streams and graphs


def test_another_stream_waits_for_the_packing(gen: torch.Generator, played: Played) -> None:
    """Once: what comes later on it comes after that."""
    sparse, x = weight(gen), inputs(gen, 16)
    for _ in range(2):
        sparse_linear(x, sparse)
    assert not played.waited
    for stream in (8, 8, 9, 7, 8):
        played.stream = stream
        sparse_linear(x, sparse)
        assert played.addresses[-1] == stream
    assert played.waited == [8, 9] and played.counts["product"] == 1
    sparse.values.mul_(1)
    for stream in (9, 8, 8):
        played.stream = stream
        sparse_linear(x, sparse)
    assert played.waited == [8, 9, 9, 8], "the new packing waits for the old one"


def test_a_capture_on_another_stream_does_not_wait(gen: torch.Generator, played: Played) -> None:
    """It begins with a sync; and what it does not do is not taken for done after it."""
    sparse, x = weight(gen), inputs(gen, 16)
    sparse_linear(x, sparse)
    played.stream, played.capturing = 8, True
    sparse_linear(x, sparse)
    assert not played.waited
    played.capturing = False
    sparse_linear(x, sparse)
    assert played.waited == [8]


def test_a_first_call_inside_a_capture_leaves_nothing(gen: torch.Generator, played: Played) -> None:
    """Its packed weight is memory of the graph."""
    sparse, x = weight(gen), inputs(gen, 16)
    played.capturing = True
    for calls in (1, 2):
        sparse_linear(x, sparse)
        assert played.counts["prepack"] == calls and not product_plan._WEIGHTS
    played.capturing = False
    for _ in range(2):
        sparse_linear(x, sparse)
    assert played.counts["prepack"] == 3


# How long, and how many


@pytest.mark.parametrize(
    ("text", "part"),
    [(GATHERED, "values"), (GATHERED, "codes"), (GATHERED, "columns"), (UNPANELLED, "values"), (UNPANELLED, "codes")],
)
def test_a_part_that_is_freed_leaves_no_plan(gen: torch.Generator, played: Played, text: str, part: str) -> None:
    sparse, x = weight(gen, text), inputs(gen, 16)
    for _ in range(2):
        sparse_linear(x, sparse)
    assert product_plan._WEIGHTS and prepacked._PREPACKED
    sparse = replace(sparse, **{part: getattr(sparse, part).clone()})
    gc.collect()
    assert not product_plan._WEIGHTS and not prepacked._PREPACKED


def test_the_oldest_of_many_plans_goes(gen: torch.Generator, played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_plan, "MAX_PLANS", 4)
    sparse = weight(gen)
    for tokens in range(1, 20):
        sparse_linear(inputs(gen, tokens), sparse)
        (found,) = product_plan._WEIGHTS.values()
        assert len(found.plans) <= 4
    before = played.counts["product"]
    sparse_linear(inputs(gen, 19), sparse)
    assert played.counts["product"] == before
    sparse_linear(inputs(gen, 1), sparse)
    assert played.counts["product"] == before + 1


def test_threads(gen: torch.Generator, played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_plan, "MAX_PLANS", 3)
    weights, given = [weight(gen) for _ in range(5)], [inputs(gen, tokens) for tokens in range(1, 9)]
    failed: list[BaseException] = []

    def work() -> None:
        try:
            with torch.no_grad():
                for _ in range(5):
                    for x in given:
                        for sparse in weights:
                            assert sparse_linear(x, sparse).shape == (len(x), ROWS)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and all(len(found.plans) <= 3 for found in product_plan._WEIGHTS.values())


# What calls may ask for in between


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"x": torch.zeros(16, COLS - 1).half()}, ShapeNotSupportedError),
        ({"x": torch.zeros(16, COLS)}, DTypeNotSupportedError),
        ({"x": torch.zeros(16, COLS).bfloat16()}, DTypeNotSupportedError),
        ({"bias": torch.zeros(ROWS)}, DTypeNotSupportedError),
        ({"bias": torch.zeros(ROWS, 1).half()}, ShapeNotSupportedError),
        ({"activation": "tanh"}, ConfigError),
        ({"activation": ["relu"]}, ConfigError),
        ({"y_layout": "row"}, ConfigError),
        ({"backend": "fast"}, ConfigError),
    ],
)
def test_bad_input_is_refused_each_time(
    gen: torch.Generator, played: Played, changes: dict[str, Any], error: type[Exception]
) -> None:
    sparse, good = weight(gen), {"x": inputs(gen, 16), "bias": torch.zeros(ROWS).half()}
    for _ in range(2):
        sparse_linear(sparse=sparse, **good)
        before = played.counts["launch"]
        for _ in range(2):
            with pytest.raises(error):
                sparse_linear(sparse=sparse, **(good | changes))
        assert played.counts["launch"] == before


def test_a_weight_of_another_shape_is_refused(gen: torch.Generator, played: Played) -> None:
    sparse, x = weight(gen), inputs(gen, 16)
    sparse_linear(x, sparse)
    wrong = SparseWeight(sparse.values, sparse.codes, sparse.columns, sparse.pattern, (ROWS, COLS // 2))
    for _ in range(2):
        with pytest.raises(ShapeNotSupportedError, match="C = 32"):
            sparse_linear(x, wrong)


def test_values_that_ask_for_a_gradient_are_refused(gen: torch.Generator, played: Played) -> None:
    sparse, x = weight(gen), inputs(gen, 16)
    sparse_linear(x, sparse)
    sparse.values.requires_grad_()
    for _ in range(2):
        with pytest.raises(ConfigError, match="packed values take no gradient"):
            sparse_linear(x, sparse)


def test_another_backend_may_be_asked_for(
    gen: torch.Generator, played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse, x = weight(gen), inputs(gen, 16)
    sparse_linear(x, sparse)
    before = played.counts["launch"]
    wanted = sparse_linear(x, sparse, backend="reference")
    monkeypatch.setenv("OBS_KERNELS_BACKEND", "reference")
    assert torch.equal(sparse_linear(x, sparse), wanted) and played.counts["launch"] == before
    monkeypatch.delenv("OBS_KERNELS_BACKEND")
    sparse_linear(x, sparse)
    assert played.counts["launch"] == before + 1


def test_a_mode_still_sees_the_op(gen: torch.Generator, played: Played) -> None:
    heard: list[str] = []

    class Listener(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            heard.append(str(func))
            return func(*args, **(kwargs or {}))

    sparse, x = weight(gen), inputs(gen, 16)
    sparse_linear(x, sparse)
    with Listener():
        sparse_linear(x, sparse)
    assert "obs_kernels.sparse_linear_inference.default" in heard


# The layer


def test_the_layer_plans_once_and_keeps_no_tensor(gen: torch.Generator, played: Played) -> None:
    layer = SparseLinear(weight(gen), torch.nn.Parameter(torch.zeros(ROWS).half()))
    x = inputs(gen, 2, 8)
    layer(x)
    before = played.counts.copy()
    layer(x)
    assert played.since(before) == {"memory": 2, "launch": 1}
    old = weakref.ref(layer.values)
    layer.values = layer.values.clone()
    gc.collect()
    assert old() is None
    layer(x)
    assert played.counts["prepack"] == 2
    layer.load_state_dict({name: tensor.clone() for name, tensor in layer.state_dict().items()})
    layer(x)
    assert played.counts["prepack"] == 3, "written in place"
    layer.to(torch.bfloat16)
    assert layer(x.bfloat16()).dtype == torch.bfloat16 and played.counts["prepack"] == 4


def test_a_copied_layer_has_a_weight_of_its_own(gen: torch.Generator, played: Played) -> None:
    layer = SparseLinear(weight(gen))
    x = inputs(gen, 16)
    layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        before = played.counts["prepack"]
        other(x)
        assert played.counts["prepack"] == before + 1
