# SPDX-License-Identifier: Apache-2.0
"""The sparse product where a CTA computes several tiles, under torch.compile, and when its weight changes."""

from __future__ import annotations

import pytest
import torch
from product_checks import DEVICE, NAN, assert_exact, fresh, hopper, integer_weight, integers, matmul, taken

from obs_kernels.ops import sparse_linear
from obs_kernels.ops.self_check import check_ops

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]
__all__ = ["hopper", "matmul"]  # fixtures


@pytest.fixture
def gen() -> torch.Generator:
    return torch.Generator(device=DEVICE).manual_seed(7)


@pytest.mark.parametrize("y_layout", ["token", "feature"])
@pytest.mark.parametrize("x_layout", ["token", "feature"])
@pytest.mark.parametrize("rows", [128 * 21 + 8, 128 * 21 + 3])
def test_several_tiles_of_a_block(gen, matmul, rows, x_layout, y_layout):
    """Stages, buffers and bias go on from tile to tile; an odd number of row tiles, ragged on both sides."""
    tokens, cols = 2504, 72
    sparse, dense = integer_weight(rows, cols, "2:4", torch.bfloat16)
    x, bias = integers(gen, 7, (tokens, cols), torch.bfloat16), integers(gen, 7, (rows,), torch.bfloat16)
    packed = matmul.prepack(sparse.values, sparse.codes, sparse.columns_or_empty(), "2:4")
    given = x if x_layout == "token" else x.T.contiguous()
    for config in matmul.CONFIGS:
        y = torch.full((tokens, rows) if y_layout == "token" else (rows, tokens), NAN, device=DEVICE).to(x)
        matmul.launch_sparse_linear(
            given, packed, bias, y, rows=rows, cols=cols, activation="", x_layout=x_layout, y_layout=y_layout,
            config=config,
        )  # fmt: skip
        assert_exact(y if y_layout == "token" else y.T, x, dense, bias, (config, rows))


def test_an_equal_call_launches_once(gen):
    """No weight is packed again, and only y takes memory; a write and other inputs are seen all the same."""
    known, dense = integer_weight(72, 64, "2:4", torch.bfloat16)
    sparse = fresh(known)
    bias = integers(gen, 7, (72,), torch.bfloat16)
    for call in range(6):
        x = integers(gen, 7, (2, 9, 64), torch.bfloat16)
        if call == 3:
            sparse.values.mul_(2)
            dense = 2 * dense
        before = taken()
        y = sparse_linear(x, sparse, bias)
        after = taken()
        assert_exact(y.flatten(0, 1), x.flatten(0, 1), dense, bias, call)
        assert call in (0, 3) or (after[0] - before[0], after[1] - before[1]) == (1, 1)


def test_equal_calls_in_a_graph_and_on_other_streams(gen):
    """What an earlier call decided is taken by a capture, and by a stream that has to wait for its packing."""
    known, dense = integer_weight(72, 64, "2:4", torch.bfloat16)
    sparse = fresh(known)
    x = integers(gen, 7, (16, 64), torch.bfloat16)
    assert_exact(sparse_linear(x, sparse), x, dense)  # loads the kernels
    torch.cuda.synchronize()
    found = []
    for cycles in (100_000_000, 0, 0):
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(cycles)
            if cycles:
                sparse.values.mul_(2)
            found.append(sparse_linear(x, sparse))
    torch.cuda.synchronize()
    for y in found:
        assert_exact(y, x, 2 * dense)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sparse_linear(x, sparse)
    x.copy_(integers(gen, 7, (16, 64), torch.bfloat16))
    graph.replay()
    assert_exact(y, x, 2 * dense)


@pytest.mark.usefixtures("traceable")
@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("options", [{"backend": "aot_eager"}, {"mode": "reduce-overhead"}], ids=["eager", "graphs"])
def test_compiled(gen, options, warm):
    """One graph without breaks; tokens vary."""
    known, dense = integer_weight(72, 64, "2:4", torch.bfloat16)
    sparse = fresh(known)
    compiled = torch.compile(lambda x: sparse_linear(x, sparse, activation="relu") + 1, fullgraph=True, **options)
    if warm:
        sparse_linear(integers(gen, 7, (8, 64), torch.bfloat16), sparse)
    for tokens in (16, 24, 24, 40, 24):
        x = integers(gen, 7, (tokens, 64), torch.bfloat16)
        wanted = (x.double() @ dense.double().T).relu().to(torch.bfloat16) + 1
        assert torch.equal(compiled(x), wanted)


@pytest.mark.parametrize("warm", [True, False])
def test_a_graph_follows_its_weight(gen, warm):
    """Captured with a packed weight it reads that memory, into which a later eager call packs what was written."""
    known, dense = integer_weight(72, 64, "2:4", torch.bfloat16)
    sparse = fresh(known)
    x = integers(gen, 7, (16, 64), torch.bfloat16)
    if warm:
        sparse_linear(x, sparse)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sparse_linear(x, sparse)
    sparse.values.mul_(2)
    assert_exact(sparse_linear(x, sparse), x, 2 * dense)
    graph.replay()
    assert_exact(y, x, 2 * dense)


def test_doctor_checks_it():
    found = [result for result in check_ops(DEVICE) if (result.op, result.backend) == ("sparse_linear", "cuda")]
    assert [result.ok for result in found] == [True], found
