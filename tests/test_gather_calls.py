# SPDX-License-Identifier: Apache-2.0
"""What the host does around the product that gathers: which columns, which way, which memory, without a GPU."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from masks import random_mask
from torch import Tensor

from obs_kernels import _ext, parse_pattern, reference
from obs_kernels.cuda_calls import matmul, product_plan, wgmma
from obs_kernels.cuda_calls.prepacked import Prepacked
from obs_kernels.errors import DeviceMismatchError, ShapeNotSupportedError
from obs_kernels.ops import SparseWeight, pack, unpack
from obs_kernels.packed_format import packed_shapes
from obs_kernels.patterns import VNMPattern

CPU = torch.device("cpu")
TILES = ("gather 128x256", "gather 64x256")


def weight(gen: torch.Generator, rows: int, cols: int, text: str) -> SparseWeight:
    mask = random_mask(gen, rows, cols, parse_pattern(text), drop=0.1)
    return pack(torch.randint(-3, 4, (rows, cols), generator=gen).half(), mask, text)


def panels(text: str) -> VNMPattern:
    parsed = parse_pattern(text)
    assert isinstance(parsed, VNMPattern)
    return parsed


# The kept columns as a 2:4 weight


@pytest.mark.parametrize("groups", [1, 2, 5, 16, 17, 33])
@pytest.mark.parametrize("text", ["4:2:4", "4:2:8", "2:2:12", "8:2:16"])
def test_kept_columns_are_two_of_four(gen: torch.Generator, text: str, groups: int) -> None:
    """Of four columns a group, times those of x: the product by the weight. Odd numbers of groups end in half a byte of
    codes.
    """
    pattern = panels(text)
    v, m, rows, cols = pattern.v, pattern.m, 3 * pattern.v, groups * pattern.m
    sparse = weight(gen, rows, cols, text)
    values, codes, none = matmul.kept_columns(sparse.values, sparse.codes, sparse.columns_or_empty())
    assert [tuple(part.shape) for part in (values, codes)] == [
        *packed_shapes(parse_pattern("2:4"), rows, 4 * groups)[:2]
    ]
    assert none.shape == (0,) and none.dtype == torch.uint8
    kept = unpack(SparseWeight(values, codes, None, parse_pattern("2:4"), (rows, 4 * groups))).double()
    x = torch.randint(-7, 8, (9, cols), generator=gen).double()
    assert sparse.columns is not None
    at = (sparse.columns.long() + m * torch.arange(groups)[:, None]).flatten(1)  # [R / v, 4 groups]
    found = torch.cat([x[:, at[panel]] @ kept[panel * v : (panel + 1) * v].T for panel in range(3)], 1)
    assert torch.equal(found, x @ unpack(sparse).double().T) and found.any()


def test_kept_columns_are_views(gen: torch.Generator) -> None:
    """The packed copy lives as long as the weight, and is made anew after a write to any part."""
    sparse = weight(gen, 8, 48, "4:2:16")
    assert sparse.columns is not None
    parts = matmul.kept_columns(sparse.values, sparse.codes, sparse.columns)
    sources = (sparse.values, sparse.codes, sparse.columns)
    for part, source in zip(parts, sources, strict=True):
        before = part._version
        source.add_(0)
        assert part._version == before + 1
        assert part.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()


# Which way


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The questions that a module which always says yes was asked."""
    seen: list[dict[str, Any]] = []

    def gather_is_faster(**question: Any) -> bool:
        seen.append(question)
        return True

    monkeypatch.setattr(_ext, "load", lambda: SimpleNamespace(gather_is_faster=gather_is_faster))
    return seen


@pytest.mark.parametrize(("text", "cols"), [("32:2:16", 512), ("96:2:16", 512), ("64:1:16", 512), ("64:2:16", 0)])
def test_what_never_gathers(asked: list[dict[str, Any]], text: str, cols: int) -> None:
    assert not matmul.gathers(panels(text), 192, cols, 100, "feature", CPU) and not asked


@pytest.mark.parametrize("layout", ["token", "feature"])
@pytest.mark.parametrize("v", [64, 128, 192])
def test_the_module_is_asked(asked: list[dict[str, Any]], v: int, layout: str) -> None:
    device = torch.device("cuda", 1)
    assert matmul.gathers(panels(f"{v}:2:16"), 384, 512, 100, layout, device) is True
    wanted = {"rows": 384, "cols": 512, "tokens": 100, "v": v, "m": 16, "feature_x": layout == "feature", "device": 1}
    assert asked == [wanted]


def test_its_no_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ext, "load", lambda: SimpleNamespace(gather_is_faster=lambda **question: False))
    assert matmul.gathers(panels("64:2:16"), 384, 512, 100, "feature", CPU) is False


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("gathering", [True, False])
def test_the_product_goes_that_way(
    gen: torch.Generator, monkeypatch: pytest.MonkeyPatch, gathering: bool, shift: int
) -> None:
    """With the weight in the order of that way, and columns that four bytes can be read of at once."""
    sparse = weight(gen, 128, 48, "64:2:16")
    assert sparse.columns is not None
    memory = torch.empty(sparse.columns.numel() + shift, dtype=torch.uint8)
    columns = memory[shift:].view(sparse.columns.shape).copy_(sparse.columns)
    packed: list[tuple[int, str]] = []
    planned: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def prepacked(values: Tensor, codes: Tensor, columns: Tensor, text: str) -> Prepacked:
        packed.append((columns.numel(), text))
        return Prepacked((), (), values, None, {7})

    def product(name: str) -> Any:
        def launch(*addresses: int) -> None:
            assert len(addresses) == (5 if name.startswith("gather") else 4)
            planned[-1][-1]["addresses"] = addresses

        def make(*args: Any, **options: Any) -> SimpleNamespace:
            planned.append((name, args, options))
            return SimpleNamespace(run=launch)

        return make

    monkeypatch.setattr(matmul, "gathers", lambda *question: gathering)
    monkeypatch.setattr(matmul, "prepacked", prepacked)
    monkeypatch.setattr(product_plan, "raw_stream", lambda device: 7)
    for name in ("gather_product", "sparse_product"):
        monkeypatch.setattr(matmul, name, product(name))
    x = torch.randn(48, 16, generator=gen).half()
    y = matmul.sparse_linear(
        x, sparse.values, sparse.codes, columns, None, "64:2:16", activation="", x_layout="feature", y_layout="token"
    )
    assert y.shape == (16, 128)
    ((name, args, options),) = planned
    assert args[0] is x and args[-1] is y and (options["rows"], options["cols"]) == (128, 48)
    assert options["addresses"] == (x.data_ptr(), *([0] if gathering else []), 0, y.data_ptr(), 7)  # turned x, bias
    if gathering:
        assert packed == [(0, "2:4")] and (name, options["v"]) == ("gather_product", 64)
        assert torch.equal(args[1], columns) and args[1].data_ptr() % 4 == 0
        assert (args[1].data_ptr() == columns.data_ptr()) == (shift == 0)
    else:
        assert packed == [(columns.numel(), "64:2:16")] and name == "sparse_product"


# x as the kernel takes it


def apart(x: Tensor, stride: int, offset: int) -> Tensor:
    """A copy with rows of ``stride`` elements, ``offset`` elements off its alignment."""
    buffer = torch.full((x.shape[0] * stride + 64,), float("nan"), dtype=x.dtype)
    start = -buffer.data_ptr() // 2 % 8 + offset
    return buffer.as_strided(x.shape, (stride, 1), start).copy_(x)


@pytest.mark.parametrize(
    ("tokens", "stride", "offset", "taken"),
    [
        (16, 16, 0, True),
        (16, 24, 8, True),
        (13, 16, 0, True),
        (1, 8, 0, True),
        (13, 13, 0, False),
        (16, 20, 0, False),
        (16, 16, 1, False),
        (16, 16, 4, False),
        (16, 0, 0, False),
        (16, 8, 0, False),
    ],
)
def test_feature_major_x(gen: torch.Generator, tokens: int, stride: int, offset: int, taken: bool) -> None:
    """Itself if columns begin at multiples of 16 bytes and lie apart, else a copy of which that is true."""
    values = torch.randn(24, tokens, generator=gen).half()
    x = apart(values, stride, offset) if stride >= tokens else apart(values, 8, 0).as_strided((24, tokens), (stride, 1))
    before = x.clone()
    found = matmul.as_gathered(x, "feature")
    assert (found.data_ptr() == x.data_ptr()) == taken
    assert torch.equal(found, before) and torch.equal(x, before)
    assert found.stride(1) == 1 and found.stride(0) % 8 == 0 and found.stride(0) >= tokens
    assert found.data_ptr() % 16 == 0


@pytest.mark.parametrize("tokens", [1, 8, 13, 16])
def test_turned_x(gen: torch.Generator, tokens: int) -> None:
    x = torch.randn(tokens, 24, generator=gen).half().T
    found = matmul.as_gathered(x, "feature")
    assert torch.equal(found, x) and found.stride(1) == 1 and found.stride(0) % 8 == 0


def memory(pointer: int, shape: tuple[int, int]) -> Tensor:
    """16-bit elements at an address."""
    count = shape[0] * shape[1]
    return torch.frombuffer((ctypes.c_int16 * count).from_address(pointer), dtype=torch.int16).view(shape)


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A module on the CPU: it transposes, and tells what it was asked to multiply."""
    calls: list[dict[str, Any]] = []

    def transpose(*, x: int, out: int, tokens: int, cols: int, out_stride: int, device: object, stream: int) -> None:
        assert x % 16 == 0 and out % 16 == 0 and cols % 8 == 0 and out_stride == -(-tokens // 8) * 8
        memory(out, (cols, out_stride)).zero_()[:, :tokens] = memory(x, (tokens, cols)).T

    def gather_linear(**options: Any) -> SimpleNamespace:
        def launch(x: int, turned: int, bias: int, y: int, stream: int) -> tuple[str, str, int, int]:
            calls.append({**options, "x": x, "turned": turned, "bias": bias, "y": y, "stream": stream})
            return "sparse_linear", TILES[options["config"]], 1, 384

        return SimpleNamespace(launch=launch)

    module = SimpleNamespace(
        transpose=transpose, GatherLinear=gather_linear, GATHER_TILES=TILES, prepacked_bytes=lambda rows, cols: 4608
    )
    monkeypatch.setattr(_ext, "load", lambda: module)
    monkeypatch.setattr(matmul, "raw_stream", lambda device: 7)
    return calls


@pytest.mark.parametrize("tokens", [1, 8, 13, 16])
@pytest.mark.parametrize("cols", [4, 12, 16, 24])
def test_token_major_x(gen: torch.Generator, native: list[dict[str, Any]], cols: int, tokens: int) -> None:
    """Padded to whole 16 bytes before; columns beyond its own are zeros."""
    values = torch.randn(tokens, cols, generator=gen).half()
    for x in (values, apart(values, 32, 0), apart(values, cols, 3), values.T.contiguous().T):
        found = matmul.as_gathered(x, "token")
        assert torch.equal(found[:cols], values.T) and not found[cols:].any()
        assert found.stride() == (-(-tokens // 8) * 8, 1) and found.data_ptr() % 16 == 0


# The launcher


def arguments(gen: torch.Generator, tokens: int) -> dict[str, Any]:
    x = matmul.as_gathered(torch.randn(tokens, 48, generator=gen).half(), "token")
    columns = torch.arange(12, dtype=torch.uint8).view(1, 3, 4)
    return {
        "x": x, "columns": columns, "packed": torch.zeros(4608, dtype=torch.uint8), "bias": None,
        "y": x.new_zeros(tokens, 64), "rows": 64, "cols": 48, "v": 64, "activation": "relu", "y_layout": "token",
        "config": TILES[1],
    }  # fmt: skip


@pytest.fixture
def as_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that say they are on a GPU which has the kernel."""
    monkeypatch.setattr(Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(wgmma, "check_sparse_gpu", lambda device: None)


@pytest.mark.usefixtures("as_cuda")
@pytest.mark.parametrize("tokens", [1, 8, 13, 16])
def test_what_is_launched(gen: torch.Generator, native: list[dict[str, Any]], tokens: int) -> None:
    """The columns of x lie apart where their number of tokens is no multiple of 8."""
    given = arguments(gen, tokens)
    assert matmul.launch_gather_linear(**given).config == TILES[1]
    (told,) = native
    addresses = {name: given[name].data_ptr() for name in ("x", "columns", "packed", "y")}
    wanted = {
        "turned": 0, "bias": 0, "rows": 64, "cols": 12, "tokens": tokens, "x_stride": -(-tokens // 8) * 8, "v": 64,
        "m": 16, "type": 0, "activation": 1, "feature_y": False, "config": 1, "stream": 7,
    }  # fmt: skip
    assert {name: told[name] for name in (*addresses, *wanted)} == addresses | wanted


@pytest.mark.usefixtures("as_cuda")
@pytest.mark.parametrize(
    "columns", [(3, 4), (1, 3, 3), (2, 3, 4), (1, 5, 4), (1, 0, 4)], ids=["flat", "three", "panels", "groups", "none"]
)
def test_wrong_columns(gen: torch.Generator, native: list[dict[str, Any]], columns: tuple[int, ...]) -> None:
    given = arguments(gen, 8) | {"columns": torch.zeros(columns, dtype=torch.uint8)}
    with pytest.raises(ShapeNotSupportedError, match="columns must be"):
        matmul.launch_gather_linear(**given)
    assert not native


@pytest.mark.usefixtures("as_cuda")
def test_wrong_packed(gen: torch.Generator, native: list[dict[str, Any]]) -> None:
    with pytest.raises(ShapeNotSupportedError, match="packed must hold 4608 bytes for \\[64, 12\\], got 4592"):
        matmul.launch_gather_linear(**arguments(gen, 8) | {"packed": torch.zeros(4592, dtype=torch.uint8)})
    assert not native


def test_tensors_of_the_cpu(gen: torch.Generator, native: list[dict[str, Any]]) -> None:
    with pytest.raises(DeviceMismatchError, match="x must be on a CUDA device"):
        matmul.launch_gather_linear(**arguments(gen, 8))
    assert not native


def test_the_reference_is_the_same_product(gen: torch.Generator) -> None:
    """By the function that other backends are held to: gathered x times kept columns is ``reference.sparse_linear``."""
    sparse = weight(gen, 8, 5 * 12, "8:2:12")
    assert sparse.columns is not None
    x = torch.randint(-7, 8, (9, 60), generator=gen).half()
    options: dict[str, Any] = {"activation": "", "x_layout": "token", "y_layout": "token"}
    wanted = reference.sparse_linear(x, sparse.values, sparse.codes, sparse.columns, None, "8:2:12", **options)
    at = (sparse.columns[0].long() + 12 * torch.arange(5)[:, None]).flatten()
    kept = matmul.kept_columns(sparse.values, sparse.codes, sparse.columns)
    assert torch.equal(reference.sparse_linear(x[:, at], *kept, None, "2:4", **options), wanted)
