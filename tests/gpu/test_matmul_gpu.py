# SPDX-License-Identifier: Apache-2.0
"""The sparse product by ``wgmma.sp`` against a float64 product of the weight, on torch's streams, inside its output."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from fisher_checks import Guarded, needs
from product_checks import (
    DEVICE,
    DTYPES,
    GRADIENT,
    INF,
    NAN,
    assert_exact,
    every_place,
    hopper,
    integer_weight,
    integers,
    matmul,
    normal,
    normal_weight,
    same_bits,
)
from test_matmul import ACTIVATIONS, check, expected
from torch import Tensor

from obs_kernels import _ext, parse_pattern
from obs_kernels.errors import BackendUnavailableError
from obs_kernels.ops import SparseWeight, feature_major, pack, sparse_linear
from obs_kernels.ops.layout import NEVER, shared_from
from obs_kernels.patterns import NMPattern

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]
__all__ = ["hopper", "matmul"]  # fixtures

PATTERNS = ["2:4", "2:8", "2:16", "1:4", "4:2:4", "4:2:8", "4:2:16"]
TOKENS = (0, 1, 7, 8, 9, 127, 128, 129, 255, 257, 1000)
ROWS = (1, 8, 64, 72, 77, 100, 128, 200, 768)
COLS = (4, 16, 20, 24, 64, 72, 776, 3072)
"""4 and 20: rows of x that are no multiple of the 16 bytes that bulk copies need."""
RAGGED = [
    pytest.param(130, 72, 40, "4:2:8", marks=pytest.mark.sanitizer),
    pytest.param(7, 328, 64, "1:4", marks=pytest.mark.sanitizer),
    (257, 200, 136, "2:8"),
    (129, 77, 776, "2:4"),
    (300, 65, 144, "2:16"),
    (1000, 768, 3072, "128:2:8"),
]
"""(tokens, rows, cols, pattern); small ones under a sanitizer."""


@pytest.fixture
def gen() -> torch.Generator:
    return torch.Generator(device=DEVICE).manual_seed(20240)


def product(x: Tensor, sparse: SparseWeight, bias: Tensor | None = None, **options: str | None) -> Tensor:
    return sparse_linear(x, sparse, bias, backend="cuda", **options)  # type: ignore[arg-type]


def between_nans(x: Tensor, shift: int) -> Tensor:
    """A copy in a buffer of NaN, ``shift`` elements off its alignment: what is read outside of x shows in y."""
    buffer = torch.full((x.numel() + 256,), NAN, dtype=x.dtype, device=x.device)
    return buffer[128 + shift :][: x.numel()].view(x.shape).copy_(x)


# Sums, at every shape and by every configuration


def shapes(pattern: NMPattern) -> Iterator[tuple[int, int, int]]:
    """(tokens, rows, cols): each two of the three lists in every combination, as far as the pattern allows."""
    need_rows, need_cols = pattern.multiples()
    rows, cols = [r for r in ROWS if r % need_rows == 0], [c for c in COLS if c % need_cols == 0]
    yield from itertools.product((129,), rows, cols)
    yield from itertools.product(TOKENS, rows, (64,))
    yield from itertools.product(TOKENS, (72,), cols)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", PATTERNS)
def test_integers_are_exact_at_every_shape(gen, text, dtype):
    for tokens, rows, cols in shapes(parse_pattern(text)):
        sparse, dense = integer_weight(rows, cols, text, dtype)
        x, bias = integers(gen, 7, (tokens, cols), dtype), integers(gen, 7, (rows,), dtype)
        assert_exact(product(x, sparse, bias), x, dense, bias, (tokens, rows, cols))


def launch(matmul: ModuleType, config: str, x: Tensor, sparse: SparseWeight, bias: Tensor, y_layout: str) -> Tensor:
    """y [T, R] by a forced configuration, written into NaN between guards."""
    packed = matmul.prepack(sparse.values, sparse.codes, sparse.columns_or_empty(), str(sparse.pattern))
    rows, cols = sparse.shape
    shape = (len(x), rows) if y_layout == "token" else (rows, len(x))
    y = Guarded(torch.full(shape, NAN, dtype=x.dtype, device=DEVICE), 0)
    plan = matmul.launch_sparse_linear(
        x, packed, bias, y.tensor, rows=rows, cols=cols, activation="", y_layout=y_layout, config=config
    )
    assert plan.config == config
    y.assert_unharmed()
    return y.tensor if y_layout == "token" else y.tensor.T


@pytest.mark.parametrize("y_layout", ["token", "feature"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "rows", "cols", "text"), RAGGED)
def test_every_configuration(gen, matmul, tokens, rows, cols, text, dtype, y_layout):
    """All of y is written, and nothing around it; what lies around x counts nowhere."""
    sparse, dense = integer_weight(rows, cols, text, dtype)
    x = between_nans(integers(gen, 7, (tokens, cols), dtype), 0)
    bias = integers(gen, 7, (rows,), dtype)
    for config in matmul.CONFIGS:
        assert_exact(launch(matmul, config, x, sparse, bias, y_layout), x, dense, bias, config)


@pytest.mark.parametrize("y_layout", ["token", "feature"])
def test_runs_give_the_same_bits(gen, matmul, y_layout):
    sparse, dense = normal_weight(gen, 768, 3072, "2:8", torch.bfloat16)
    x, bias = normal(gen, (1000, 3072), torch.bfloat16), normal(gen, (768,), torch.bfloat16)
    for config in matmul.CONFIGS:
        first, *others = (launch(matmul, config, x, sparse, bias, y_layout) for _ in range(3))
        check(first.contiguous(), x, dense, bias, None)
        assert all(same_bits(first, other) for other in others), config


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("tokens", "rows", "cols", "text"), RAGGED)
def test_random_inputs(gen, tokens, rows, cols, text, activation, dtype):
    """A bias of both signs, on either side of every activation; y turned has the same bits."""
    sparse, dense = normal_weight(gen, rows, cols, text, dtype)
    x = normal(gen, (tokens, cols), dtype)
    for bias in (None, torch.linspace(-6, 6, rows, device=DEVICE).to(dtype)):
        y = product(x, sparse, bias, activation=activation)
        check(y, x, dense, bias, activation)
        turned = product(x, sparse, bias, activation=activation, y_layout="feature")
        assert turned.shape == (rows, tokens) and turned.is_contiguous() and same_bits(turned.T, y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name is not None])
def test_activations_along_a_line(activation, dtype):
    """Sums that are exact, from tail to tail and beyond: half a unit of the output, and 5e-7 of the activation."""
    values = torch.cat([torch.linspace(-12, 12, 4097), torch.tensor([-3e4, -90.0, 0.0, 90.0, 3e4])]).to(DEVICE, dtype)
    x = torch.zeros(len(values), 64, dtype=dtype, device=DEVICE)
    x[:, 0] = values
    dense = torch.zeros(64, 64, dtype=dtype, device=DEVICE)
    dense[:, 0] = 1.0
    y = product(x, pack(dense, dense != 0, "2:4"), activation=activation)
    wanted = ACTIVATIONS[activation](values.double())[:, None]
    bound = 0.5 * torch.finfo(dtype).eps * wanted.abs() + 5e-7
    assert ((y.double() - wanted).abs() <= bound).all(), ((y.double() - wanted).abs() / bound).max()


def test_overflow_becomes_infinity(gen):
    sparse, dense = integer_weight(72, 64, "2:4", torch.float16)
    x = 30000 * integers(gen, 1, (9, 64), torch.float16)
    wanted = expected(x, dense, None, None).to(torch.float16)
    assert wanted.isinf().any() and wanted.isfinite().any()
    assert torch.equal(product(x, sparse), wanted)


# Places: codes, columns, and what a row does not keep


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", ["2:4", "2:8", "2:16", "64:2:4", "64:2:8", "128:2:8", "64:2:16", "256:2:16"])
def test_every_code_and_column_in_every_position(gen, text, dtype):
    """The product with the identity is the weight, bit for bit."""
    mask = every_place(768, 128, parse_pattern(text))
    weight = normal(gen, (768, 128), dtype).masked_fill(~mask, 0.0)
    y = product(torch.eye(128, dtype=dtype, device=DEVICE), pack(weight, mask, text), y_layout="feature")
    assert torch.equal(y, weight)


@pytest.mark.parametrize("text", ["2:4", "2:8", "2:16", "64:2:8", "64:2:16"])
@pytest.mark.parametrize(("bad", "activation"), [(INF, None), (-INF, None), *((NAN, name) for name in ACTIVATIONS)])
def test_nan_and_inf_reach_the_rows_that_keep_the_column(gen, text, bad, activation):
    """All else keeps its bits, but rows with a free slot beside the column.

    The tensor core takes two of every aligned four columns. Where a row keeps fewer, it multiplies +0 by some other.
    """
    rows, cols = 256, 144
    mask = every_place(rows, cols, parse_pattern(text))
    sparse = pack(normal(gen, (rows, cols), torch.bfloat16), mask, text)
    x = normal(gen, (200, cols), torch.bfloat16)
    clean = product(x, sparse, activation=activation)
    free = mask.unflatten(1, (-1, 4)).sum(2) < 2
    missed = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for token, column in itertools.product((0, 130, 199), (0, 1, 7, 66, 143)):
        dirty = x.clone()
        dirty[token, column] = bad
        y = product(dirty, sparse, activation=activation)
        hit = mask[:, column]
        apart = ~hit & ~free[:, column // 4]
        assert not y[token, hit].isfinite().any() and hit.any(), (token, column)
        assert same_bits(y[token, apart], clean[token, apart]), (token, column)
        y[token], missed = clean[token], missed + apart.sum()
        assert same_bits(y, clean), "another token changed"
    assert missed > 0 and (text != "2:4" or not free.any())


# The public op


def test_any_strides(gen):
    sparse, dense = integer_weight(72, 136, "2:8", torch.float16)
    big = integers(gen, 7, (264, 280), torch.float16)
    bias = integers(gen, 7, (146,), torch.float16)
    views = {
        "turned": big[:136, :130].contiguous().T,
        "every other": big[::2, :272:2],
        "rows apart": big[:, :136],
        "one token": big[:1, :136].expand(9, 136),
        "off by one": between_nans(big[:130, :136].contiguous(), 1),
        "off by eight": between_nans(big[:130, :136].contiguous(), 8),
    }
    for name, x in views.items():
        before = x.clone()
        for b in (bias[1:73], bias[::2][:72]):
            assert_exact(product(x, sparse, b), x, dense, b, name)
            assert_exact(product(x.T, sparse, b, x_layout="feature"), x, dense, b, name)
            y = product(x.T, sparse, b, x_layout="feature", y_layout="feature")
            assert_exact(y.T, x, dense, b, name)
        assert torch.equal(x, before), f"{name}: x was changed"


def test_nothing_to_do(gen):
    sparse, _ = integer_weight(72, 64, "2:8", torch.float16)
    x = integers(gen, 7, (9, 64), torch.float16)
    product(x, sparse)
    before = _ext.load().launch_count()
    assert product(x[:0], sparse).shape == (0, 72)
    assert product(x[:0], sparse, y_layout="feature").shape == (72, 0)
    assert _ext.load().launch_count() == before
    for rows, cols in ((72, 0), (0, 48), (0, 0)):
        weight = x.new_zeros(rows, cols)
        sparse = pack(weight, weight != 0, "2:8")
        assert torch.equal(product(x.new_ones(3, cols), sparse, x.new_ones(rows)), x.new_ones(3, rows))
        assert torch.equal(product(x.new_ones(3, cols), sparse), x.new_zeros(3, rows))


def test_a_cast_weight_is_another_weight(gen):
    """The kernel layout of the first use belongs to the old dtype."""
    sparse, dense = integer_weight(72, 64, "4:2:8", torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        sparse, x = sparse.to(dtype), integers(gen, 7, (9, 64), dtype)
        assert_exact(product(x, sparse), x, dense)


def test_what_the_kernel_takes(gen):
    """A forced backend refuses the rest; left to choose, the package runs the kernel where it can."""
    for text, dtype in (("4:8", torch.float16), ("2:4", torch.float32)):
        sparse, dense = normal_weight(gen, 72, 64, text, dtype)
        x = normal(gen, (9, 64), dtype)
        with pytest.raises(BackendUnavailableError, match="sparse_linear"):
            product(x, sparse)
        check(sparse_linear(x, sparse), x, dense, None, None)
    sparse, dense = integer_weight(72, 64, "4:2:8", torch.float16)
    before, x = _ext.load().launch_count(), integers(gen, 7, (9, 64), torch.float16)
    assert_exact(sparse_linear(x, sparse), x, dense)
    assert _ext.load().launch_count() > before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("y_layout", ["token", "feature"])
def test_gradients(gen, y_layout, activation, dtype):
    sparse, dense = normal_weight(gen, 72, 136, "2:8", dtype)
    inputs = [normal(gen, (129, 136), dtype).requires_grad_(), normal(gen, (72,), dtype).requires_grad_()]
    y = product(inputs[0], sparse, inputs[1], activation=activation, y_layout=y_layout)
    grad = normal(gen, tuple(y.shape), dtype)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = expected(wide[0], dense, wide[1], activation)
    wanted = torch.autograd.grad(exact, wide, (grad if y_layout == "token" else grad.T).double())
    for ours, theirs in zip(torch.autograd.grad(y, inputs, grad), wanted, strict=True):
        tolerance = GRADIENT * torch.finfo(dtype).eps * theirs.abs().max().item()
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=tolerance)


# Streams, graphs, devices, and more than 2^31 elements


def new_problem(gen: torch.Generator) -> tuple[SparseWeight, Tensor, Tensor]:
    """(packed, dense, x) with a weight that was never used; the kernel itself is loaded."""
    sparse, dense = integer_weight(768, 776, "2:8", torch.float16)
    x = integers(gen, 7, (257, 776), torch.float16)
    product(x, sparse)
    fresh = pack(dense, dense != 0, "2:8")
    torch.cuda.synchronize()
    return fresh, dense, x


def test_two_streams(gen):
    """Inputs arrive late, each on its stream: a launch on any other would take the zeros before them."""
    sparse, dense, _ = new_problem(gen)
    sources = [integers(gen, 7, (257, 776), torch.float16) for _ in range(2)]
    inputs = [torch.zeros_like(source) for source in sources]
    product(inputs[0], sparse)
    torch.cuda.synchronize()
    found = []
    for x, source in zip(inputs, sources, strict=True):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)  # cycles: some 50 ms
            x.copy_(source)
            found.append([product(x, sparse) for _ in range(8)])
            assert not stream.query(), "the call waited for the device"
    torch.cuda.synchronize()
    for source, outputs in zip(sources, found, strict=True):
        for y in outputs:
            assert_exact(y, source, dense)


def test_first_use_on_another_stream(gen):
    """The kernel layout is made behind a long wait, and the second stream must not read it before."""
    sparse, dense, x = new_problem(gen)
    found = []
    for cycles in (100_000_000, 0):
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(cycles)
            found.append(product(x, sparse))
    torch.cuda.synchronize()
    for y in found:
        assert_exact(y, x, dense)


@pytest.mark.parametrize("used", [True, False])
def test_cuda_graph(gen, used):
    """Replays take new input. What a capture records has not run: a layout made there is not there for other calls."""
    sparse, dense, x = new_problem(gen)
    bias = integers(gen, 7, (768,), torch.float16)
    if used:
        product(x, sparse, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = product(x, sparse, bias)
    assert_exact(product(x, sparse, bias), x, dense, bias, "outside of the graph")
    for _ in range(2):
        x.copy_(integers(gen, 7, (257, 776), torch.float16))
        graph.replay()
        assert_exact(y, x, dense, bias)


@pytest.mark.multigpu
def test_device_of_the_tensors_counts(gen):
    sparse, dense = integer_weight(72, 64, "4:2:8", torch.float16)
    for index in (1, 0, 1):
        x = integers(gen, 7, (9, 64), torch.float16).to(f"cuda:{index}")
        y = product(x, sparse.to(x.device))
        assert y.device == x.device and torch.cuda.current_device() == 0
        assert_exact(y, x, dense.to(x.device))


@pytest.mark.big
@pytest.mark.parametrize("y_layout", ["token", "feature"])
@pytest.mark.parametrize(("rows", "cols"), [(8200, 64), (64, 8200)])
def test_beyond_31_bits(gen, rows, cols, y_layout):
    """y or x has more than 2^31 elements: the first tokens, those around that element, and the last."""
    needs(24)
    tokens = 2**18 + 1
    assert tokens * max(rows, cols) > 2**31
    sparse, dense = normal_weight(gen, rows, cols, "2:8", torch.bfloat16)
    x = torch.randn(tokens, cols, generator=gen, device=DEVICE, dtype=torch.bfloat16)
    y = product(x, sparse, y_layout=y_layout)
    y = y if y_layout == "token" else y.T
    assert y.shape == (tokens, rows) and not y.isnan().any()
    for start in (0, 2**31 // 8200 - 50, tokens - 100):
        part = slice(start, start + 100)
        check(y[part].contiguous(), x[part], dense, None, None)


@pytest.mark.parametrize("shape", [(8, 64), (2, 20, 72), (3, 77, 64), (16, 12), (0, 64)])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
def test_feature_major_changes_the_layout_alone(gen, shape, dtype):
    """By the kernel where tokens and columns are multiples of 8, by torch elsewhere; the product reads it in place."""
    x = normal(gen, shape, torch.float32).to(dtype)
    y = feature_major(x)
    assert torch.equal(x, y) and y.movedim(-1, 0).is_contiguous() and same_layout(feature_major(y), y)


def same_layout(one: Tensor, other: Tensor) -> bool:
    return one.stride() == other.stride() and torch.equal(one, other)


def test_three_layers_share_an_input_where_they_gain(gen):
    """From few tokens to many the answer changes once, and shared products are those of their own."""
    key = ((1024,) * 3, ("128:2:16",) * 3, 1024, "cuda", 0)
    start = shared_from(*key)
    assert start < NEVER and shared_from((64,), ("2:4",), 64, "cuda", 0) == NEVER
    sparse, dense = normal_weight(gen, 1024, 1024, "128:2:16", torch.bfloat16)
    x = normal(gen, (start, 1024), torch.bfloat16)
    shared = feature_major(x)
    check(product(shared.T, sparse, x_layout="feature"), x, dense, None, None)
