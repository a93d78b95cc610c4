# SPDX-License-Identifier: Apache-2.0
"""``sparse_linear`` of panels: when it gathers, what later calls reuse, graphs, streams, gradients and devices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from product_checks import (
    DEVICE,
    GRADIENT,
    NAN,
    assert_exact,
    fresh,
    gen,
    hopper,
    integer_weight,
    integers,
    matmul,
    normal,
    normal_weight,
    taken,
    takes_gather,
)
from test_matmul import check, expected
from torch import Tensor

from obs_kernels import _ext
from obs_kernels.cuda_calls.product_plan import ProductPlan
from obs_kernels.ops import sparse_linear, unpack

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]
__all__ = ["gen", "hopper", "matmul"]  # fixtures


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[ProductPlan]:
    """The plan of each launch that gathers."""
    seen: list[ProductPlan] = []
    original = ProductPlan.run

    def counted(plan, *args):
        if isinstance(plan.launch.__self__, _ext.load().GatherLinear):
            seen.append(plan)
        return original(plan, *args)

    monkeypatch.setattr(ProductPlan, "run", counted)
    return seen


LARGE = (4096, 4096, 4096, "128:2:16")
"""(tokens, rows, cols, pattern) for which a quarter of the columns is far less work, transposed or not."""
SMALL = (8, 64, 64, "64:2:16")
"""One step as 2:4."""


def as_given(x: Tensor, x_layout: str) -> Tensor:
    return x if x_layout == "token" else x.T.contiguous()


@pytest.mark.parametrize("x_layout", ["feature", "token"])
def test_the_op_gathers_where_that_is_faster(gen, matmul, launches, x_layout):
    """A large weight and a small one by turns: each keeps a packed order of its own."""
    assert takes_gather(matmul, LARGE, x_layout) and not takes_gather(matmul, SMALL, "token")
    cases = []
    for case, layout in ((LARGE, x_layout), (SMALL, "token")):
        tokens, rows, cols, text = case
        sparse, dense = normal_weight(gen, rows, cols, text, torch.bfloat16)
        x, bias = normal(gen, (tokens, cols), torch.bfloat16), normal(gen, (rows,), torch.bfloat16)
        cases.append((case is LARGE, layout, sparse, dense, x, bias))
    for gathering, layout, sparse, dense, x, bias in cases * 2:
        for y_layout in ("token", "feature"):
            before = len(launches)
            y = sparse_linear(
                as_given(x, layout), sparse, bias, activation="gelu", x_layout=layout, y_layout=y_layout, backend="cuda"
            )
            assert len(launches) - before == gathering
            check(y if y_layout == "token" else y.T.contiguous(), x, dense, bias, "gelu")


def test_one_weight_both_ways(gen, matmul, launches):
    """Many tokens are worth a transposition, a few are not; neither order of the weight is taken for the other."""
    rows, cols, text = 4096, 1024, "128:2:16"
    sparse, dense = integer_weight(rows, cols, text, torch.float16)
    for tokens, gathering in ((4096, True), (8, False), (4093, True), (7, False)):
        assert takes_gather(matmul, (tokens, rows, cols, text), "token") == gathering, "take other sizes"
        x, before = integers(gen, 7, (tokens, cols), torch.float16), len(launches)
        assert_exact(sparse_linear(x, sparse, backend="cuda"), x, dense, None, tokens)
        assert len(launches) - before == gathering


def test_the_op_takes_any_strides(gen, matmul, launches):
    tokens, rows, cols, text = LARGE
    sparse, dense = integer_weight(rows, cols, text, torch.float16)
    big = integers(gen, 7, (tokens + 8, cols + 16), torch.float16)
    views = {
        "turned": big[:tokens, :cols].T.contiguous().T,
        "rows apart": big[:tokens, 8 : 8 + cols],
        "odd tokens": big[: tokens - 3, :cols],
        "off by one": big[:tokens, 1 : 1 + cols],
        "one token": big[:1, :cols].expand(tokens, cols),
    }
    for name, x in views.items():
        before = x.clone()
        assert_exact(sparse_linear(x, sparse, backend="cuda"), x, dense, None, name)
        assert_exact(sparse_linear(x.T, sparse, x_layout="feature", backend="cuda"), x, dense, None, name)
        assert torch.equal(x, before), f"{name}: x was changed"
    assert len(launches) == 2 * len(views)


@pytest.mark.parametrize("x_layout", ["feature", "token"])
def test_an_equal_call_launches_alone(gen, matmul, launches, x_layout):
    """Nothing is packed again, and no memory taken but for y and the transposed x; results are those of new inputs."""
    tokens, rows, cols, text = LARGE
    sparse, dense = integer_weight(rows, cols, text, torch.float16)
    options = {"x_layout": x_layout, "backend": "cuda"}
    for call in range(3):
        x, bias = integers(gen, 7, (tokens, cols), torch.float16), integers(gen, 7, (rows,), torch.float16)
        given = as_given(x, x_layout)
        before = taken()
        y = sparse_linear(given, sparse, bias, **options)
        launched, allocated = (now - then for now, then in zip(taken(), before, strict=True))
        assert_exact(y, x, dense, bias, call)
        assert call == 0 or launched == allocated == (2 if x_layout == "token" else 1)
    assert len(launches) == 3 and launches[1] is launches[2]


def test_columns_off_their_alignment(gen, matmul, launches):
    """As in a file that was mapped: four bytes are read at once."""
    tokens, rows, cols, text = LARGE
    sparse, dense = integer_weight(rows, cols, text, torch.float16)
    memory = torch.empty(sparse.columns.numel() + 1, dtype=torch.uint8, device=DEVICE)
    shifted = replace(fresh(sparse), columns=memory[1:].view(sparse.columns.shape).copy_(sparse.columns))
    x = integers(gen, 7, (tokens, cols), torch.float16)
    assert_exact(sparse_linear(x, shifted, backend="cuda"), x, dense)
    assert len(launches) == 1


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("x_layout", ["feature", "token"])
def test_cuda_graph(gen, matmul, launches, x_layout, used):
    """Replays take new input, transposed anew; what a capture packed is not there for other calls."""
    tokens, rows, cols, text = LARGE
    known, dense = integer_weight(rows, cols, text, torch.float16)
    x, bias = integers(gen, 7, (tokens, cols), torch.float16), integers(gen, 7, (rows,), torch.float16)
    given, options = as_given(x, x_layout), {"x_layout": x_layout, "backend": "cuda"}
    sparse_linear(given, known, bias, **options)  # loads the kernels
    sparse = fresh(known)
    if used:
        sparse_linear(given, sparse, bias, **options)
    torch.cuda.synchronize()
    graph, before = torch.cuda.CUDAGraph(), len(launches)
    with torch.cuda.graph(graph):
        y = sparse_linear(given, sparse, bias, **options)
    assert len(launches) == before + 1
    assert_exact(sparse_linear(given, sparse, bias, **options), x, dense, bias, "outside of the graph")
    for _ in range(2):
        x = integers(gen, 7, (tokens, cols), torch.float16)
        given.copy_(as_given(x, x_layout))
        y.fill_(NAN)
        graph.replay()
        assert_exact(y, x, dense, bias)


@pytest.mark.parametrize("warm", [True, False])
def test_a_graph_follows_its_weight(gen, matmul, launches, warm):
    """Values by the memory into which a later eager call packs what was written; columns are read where they lie."""
    tokens, rows, cols, text = LARGE
    known, _ = integer_weight(rows, cols, text, torch.float16)
    x = integers(gen, 7, (tokens, cols), torch.float16)
    given, options = x.T.contiguous(), {"x_layout": "feature", "backend": "cuda"}
    sparse_linear(given, known, **options)  # loads the kernels
    sparse = fresh(known)
    if warm:
        sparse_linear(given, sparse, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sparse_linear(given, sparse, **options)
    sparse.values.mul_(2)
    sparse.columns.copy_(15 - sparse.columns.flip(2))  # ascending again
    dense = unpack(sparse, backend="reference")
    assert not torch.equal(dense, 2 * unpack(known, backend="reference"))
    assert_exact(sparse_linear(given, sparse, **options), x, dense, None, "outside of the graph")
    graph.replay()
    assert_exact(y, x, dense)
    assert len(launches) == 3 + warm


def test_streams(gen, matmul, launches):
    """x arrives late, each on its stream: a launch on any other, of either kernel, would take the zeros before."""
    tokens, rows, cols, text = LARGE
    sparse, dense = integer_weight(rows, cols, text, torch.float16)
    sources = [integers(gen, 7, (tokens, cols), torch.float16) for _ in range(2)]
    inputs = [torch.zeros_like(source) for source in sources]
    sparse_linear(inputs[0], sparse, backend="cuda")
    torch.cuda.synchronize()
    found = []
    for x, source in zip(inputs, sources, strict=True):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)  # cycles: some 50 ms
            x.copy_(source)
            found.append(sparse_linear(x, sparse, backend="cuda"))
            assert not stream.query(), "the call waited for the device"
    torch.cuda.synchronize()
    for y, source in zip(found, sources, strict=True):
        assert_exact(y, source, dense)
    assert len(launches) == 3


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("x_layout", ["feature", "token"])
def test_gradients(gen, matmul, launches, x_layout, activation):
    """With an activation the backward runs the product again."""
    tokens, rows, cols, text = LARGE
    dtype = torch.bfloat16
    sparse, dense = normal_weight(gen, rows, cols, text, dtype)
    x = normal(gen, (tokens, cols), dtype)
    inputs = [as_given(x, x_layout).requires_grad_(), normal(gen, (rows,), dtype).requires_grad_()]
    y = sparse_linear(inputs[0], sparse, inputs[1], activation=activation, x_layout=x_layout, backend="cuda")
    grad = normal(gen, tuple(y.shape), dtype)
    ours = list(torch.autograd.grad(y, inputs, grad))
    assert len(launches) == (1 if activation is None else 2)
    assert ours[0].shape == inputs[0].shape
    ours[0] = ours[0] if x_layout == "token" else ours[0].T
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, inputs[1])]
    wanted = torch.autograd.grad(expected(wide[0], dense, wide[1], activation), wide, grad.double())
    for mine, theirs in zip(ours, wanted, strict=True):
        tolerance = GRADIENT * torch.finfo(dtype).eps * theirs.abs().max().item()
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=tolerance)


@pytest.mark.multigpu
def test_device_of_the_tensors_counts(gen, matmul, launches):
    tokens, rows, cols, text = LARGE
    sparse, dense = integer_weight(rows, cols, text, torch.float16)
    for index in (1, 0, 1):
        x = integers(gen, 7, (tokens, cols), torch.float16).to(f"cuda:{index}")
        y = sparse_linear(x, sparse.to(x.device), backend="cuda")
        assert y.device == x.device and torch.cuda.current_device() == 0
        assert_exact(y, x, dense.to(x.device))
    assert len(launches) == 3
