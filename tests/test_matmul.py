# SPDX-License-Identifier: Apache-2.0
"""The sparse product against a dense float64 product of the weight that was packed."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import EPS32, EPS64, MATMUL_SUM, output_rounding
from torch import Tensor
from torch._dynamo.testing import EagerAndRecordGraphs
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from obs_kernels import parse_pattern
from obs_kernels.errors import ConfigError, DeviceMismatchError, DTypeNotSupportedError, ShapeNotSupportedError
from obs_kernels.ops import SparseWeight, obs_update, pack, search_nm, search_vnm, sparse_linear

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
ACTIVATIONS = {
    None: lambda y: y,
    "relu": torch.relu,
    "gelu": lambda y: 0.5 * y * (1 + torch.erf(y / 2**0.5)),
    "gelu_tanh": lambda y: 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3))),
    "silu": lambda y: y / (1 + torch.exp(-y)),
}


def make(gen: torch.Generator, rows: int, cols: int, text: str, dtype: torch.dtype) -> tuple[SparseWeight, Tensor]:
    """(packed, dense) weight; the dense one is made from the mask, not by unpack."""
    weight = (torch.randn(rows, cols, generator=gen) / cols**0.5).to(dtype)
    search = search_vnm if text.count(":") == 2 else search_nm
    mask = search(weight, None, text, method="magnitude").mask
    return pack(weight, mask, text), weight.masked_fill(~mask, 0.0)


def expected(x: Tensor, dense: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    y = x.double() @ dense.double().T
    return ACTIVATIONS[activation](y if bias is None else y + bias.double())


def check(y: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None, activation: str | None) -> None:
    wanted = expected(x, dense, bias, activation)
    assert y.shape == wanted.shape and y.dtype == x.dtype and y.is_contiguous()
    size = (x.double().abs() @ dense.double().abs().T + (0 if bias is None else bias.double().abs())).clamp(min=1e-3)
    eps = EPS64 if x.dtype == torch.float64 else EPS32
    bound = MATMUL_SUM * x.shape[-1] ** 0.5 * eps * size + output_rounding(x.dtype) * wanted.abs()
    bound = (
        bound + torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
    )  # half precision may end in subnormals
    assert ((y.double() - wanted).abs() <= bound).all(), ((y.double() - wanted).abs() / bound).max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", ["2:4", "2:8", "1:4", "4:8", "2:16", "3:2:8", "6:2:16"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_product(gen, text, dtype, with_bias):
    """Ragged tokens; every pattern that packs; K % 4 odd for 1:4 and 2:16."""
    sparse, dense = make(gen, 12, 48, text, dtype)
    bias = torch.randn(12, generator=gen).to(dtype) if with_bias else None
    for tokens in (1, 7, 33):
        x = torch.randn(tokens, 48, generator=gen).to(dtype)
        check(sparse_linear(x, sparse, bias), x, dense, bias, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_integers_are_exact(gen, dtype):
    """Sums below 2^8 are exact in every dtype, whatever the order."""
    weight = torch.randint(-1, 2, (16, 64), generator=gen).to(dtype)
    sel = search_nm(weight, None, "2:8", method="magnitude")
    sparse = pack(weight, sel.mask, "2:8")
    x = torch.randint(-3, 4, (9, 64), generator=gen).to(dtype)
    bias = torch.randint(-3, 4, (16,), generator=gen).to(dtype)
    dense = weight.masked_fill(~sel.mask, 0.0)
    assert torch.equal(sparse_linear(x, sparse, bias).double(), expected(x, dense, bias, None))


@pytest.mark.parametrize("shape", [(48,), (5, 48), (2, 3, 48), (2, 3, 2, 48), (1, 48), (1, 1, 48)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_leading_dimensions(gen, shape, activation):
    sparse, dense = make(gen, 12, 48, "2:8", torch.float32)
    x, bias = torch.randn(shape, generator=gen), torch.randn(12, generator=gen)
    check(sparse_linear(x, sparse, bias, activation=activation), x, dense, bias, activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation(gen, activation, dtype):
    """Applied in f32 before the one rounding to the output dtype; large values of both signs included."""
    sparse, dense = make(gen, 8, 32, "2:4", dtype)
    x, bias = torch.randn(11, 32, generator=gen).to(dtype), torch.linspace(-6, 6, 8).to(dtype)
    check(sparse_linear(x, sparse, bias, activation=activation), x, dense, bias, activation)


@pytest.mark.parametrize("x_layout", ["token", "feature"])
@pytest.mark.parametrize("y_layout", ["token", "feature"])
@pytest.mark.parametrize("tokens", [0, 1, 13])
def test_layouts(gen, x_layout, y_layout, tokens):
    sparse, dense = make(gen, 12, 48, "3:2:8", torch.float32)
    x, bias = torch.randn(tokens, 48, generator=gen), torch.randn(12, generator=gen)
    given_x = x if x_layout == "token" else x.T.contiguous()
    y = sparse_linear(given_x, sparse, bias, activation="gelu", x_layout=x_layout, y_layout=y_layout)
    assert y.shape == ((tokens, 12) if y_layout == "token" else (12, tokens)) and y.is_contiguous()
    check((y if y_layout == "token" else y.T).contiguous(), x, dense, bias, "gelu")


def test_feature_output_of_many_dimensions(gen):
    sparse, dense = make(gen, 12, 48, "2:8", torch.float32)
    x = torch.randn(2, 3, 48, generator=gen)
    y = sparse_linear(x, sparse, y_layout="feature")
    assert y.shape == (12, 6)
    check(y.T.contiguous(), x.view(6, 48), dense, None, None)


@pytest.mark.parametrize("shape", [(0, 48), (2, 0, 48), (0, 3, 48)])
def test_no_tokens(gen, shape):
    sparse, _ = make(gen, 12, 48, "2:8", torch.float32)
    for bias in (None, torch.ones(12)):
        y = sparse_linear(torch.zeros(shape), sparse, bias, activation="silu")
        assert y.shape == (*shape[:-1], 12) and y.dtype == torch.float32


@pytest.mark.parametrize("shape", [(12, 0), (0, 48)])
def test_empty_weight(shape):
    sparse = SparseWeight(
        torch.zeros(shape[0], shape[1] // 4), torch.zeros(shape[0], shape[1] // 4, dtype=torch.uint8), None,
        parse_pattern("2:8"), shape,
    )  # fmt: skip
    sparse.validate()
    y = sparse_linear(torch.ones(3, shape[1]), sparse, torch.ones(shape[0]))
    assert torch.equal(y, torch.ones(3, shape[0]))


def test_strided_input(gen):
    sparse, dense = make(gen, 12, 48, "2:8", torch.float32)
    for x in (
        torch.randn(48, 9, generator=gen).T,
        torch.randn(18, 96, generator=gen)[::2, ::2],
        torch.randn(1, 48, generator=gen).expand(9, 48),
    ):
        before = x.clone()
        check(sparse_linear(x, sparse), x, dense, None, None)
        check(sparse_linear(x.T, sparse, x_layout="feature"), x, dense, None, None)
        assert torch.equal(x, before)


def test_inference_mode(gen):
    sparse, dense = make(gen, 12, 48, "2:8", torch.float32)
    x = torch.randn(5, 48, generator=gen)
    with torch.inference_mode():
        y = sparse_linear(x, sparse)
    check(y.clone(), x, dense, None, None)


# gradients


@pytest.mark.parametrize("text", ["2:8", "2:4", "3:2:8"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(gen, activation, text):
    """gradcheck in f64 with respect to x and bias, layouts both ways; relu is kept off its kink."""
    sparse, _ = make(gen, 6, 16, text, torch.float64)
    x = torch.randn(3, 16, generator=gen, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, generator=gen, dtype=torch.float64, requires_grad=True)
    for x_layout, y_layout in [("token", "token"), ("feature", "token"), ("token", "feature"), ("feature", "feature")]:

        def run(x: Tensor, bias: Tensor, x_layout: str = x_layout, y_layout: str = y_layout) -> Tensor:
            given_x = x if x_layout == "token" else x.T
            return sparse_linear(given_x, sparse, bias, activation=activation, x_layout=x_layout, y_layout=y_layout)

        assert torch.autograd.gradcheck(run, (x, bias))
    assert torch.autograd.gradcheck(lambda x: sparse_linear(x.view(3, 1, 16), sparse, activation=activation), (x,))
    assert torch.autograd.gradcheck(lambda b: sparse_linear(x.detach(), sparse, b, activation=activation), (bias,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_gradients_match_a_dense_linear(gen, activation, dtype):
    sparse, dense = make(gen, 12, 48, "2:8", dtype)
    grads = []
    for linear in (
        lambda x, b: sparse_linear(x, sparse, b, activation=activation),
        lambda x, b: ACTIVATIONS[activation](F.linear(x.double(), dense.double(), b.double())),
    ):
        x = torch.randn(2, 7, 48, generator=gen.manual_seed(1)).to(dtype).requires_grad_()
        bias = torch.randn(12, generator=gen.manual_seed(2)).to(dtype).requires_grad_()
        y = linear(x, bias)
        y.backward(torch.randn(y.shape, generator=gen.manual_seed(3)).to(y.dtype))
        assert x.grad.dtype == dtype and bias.grad.dtype == dtype
        grads.append((x.grad.double(), bias.grad.double()))
    for actual, wanted in zip(*grads, strict=True):
        tolerance = 30 * torch.finfo(dtype).eps
        torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item())


def test_only_the_gradients_asked_for(gen):
    sparse, _ = make(gen, 12, 48, "2:8", torch.float32)
    x, bias = torch.randn(5, 48, generator=gen), torch.randn(12, generator=gen)
    assert not sparse_linear(x, sparse, bias).requires_grad
    y = sparse_linear(x, sparse, bias.requires_grad_(), activation="relu")
    y.sum().backward()
    assert x.grad is None and bias.grad is not None
    torch.testing.assert_close(bias.grad, (y > 0).float().sum(0))


@pytest.mark.parametrize("given", ["x", "bias", "both"])
@pytest.mark.parametrize(("x_layout", "y_layout"), [("token", "token"), ("feature", "token"), ("token", "feature")])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_mode(gen, activation, x_layout, y_layout, given):
    """Tangents of x and bias come out as those of the dense layer, and can be differentiated again."""
    sparse, dense = make(gen, 12, 48, "6:2:16", torch.float64)
    x, bias = (torch.randn(*size, generator=gen, dtype=torch.float64) for size in ((5, 48), (12,)))
    changes = [torch.randn(t.shape, generator=gen, dtype=t.dtype) for t in (x, bias)]

    def tangent(run) -> tuple[Tensor, Tensor, Tensor]:
        ends = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
        with forward_ad.dual_level():
            taken = [given in (name, "both") for name in ("x", "bias")]
            duals = [
                forward_ad.make_dual(*pair) if use else pair[0] for *pair, use in zip(ends, changes, taken, strict=True)
            ]
            y, change = forward_ad.unpack_dual(run(*duals))
            assert change is not None
            grads = torch.autograd.grad((y * change).sum(), ends, allow_unused=True)
        return y, change, torch.cat([torch.zeros(0) if g is None else g.flatten() for g in grads])

    def ours(x: Tensor, bias: Tensor) -> Tensor:
        flat = x if x_layout == "token" else x.T
        y = sparse_linear(flat, sparse, bias, activation=activation, x_layout=x_layout, y_layout=y_layout)
        return y if y_layout == "token" else y.T

    for found, wanted in zip(
        tangent(ours), tangent(lambda x, bias: ACTIVATIONS[activation](x @ dense.T + bias)), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_forward_mode_of_functions(gen):
    sparse, dense = make(gen, 12, 48, "2:4", torch.float64)
    x, change = torch.randn(2, 5, 48, generator=gen, dtype=torch.float64)
    y, found = torch.func.jvp(lambda x: sparse_linear(x, sparse), (x,), (change,))
    torch.testing.assert_close((y, found), (x @ dense.T, change @ dense.T))


def test_values_take_no_gradient(gen):
    sparse, _ = make(gen, 12, 48, "2:8", torch.float32)
    sparse.values.requires_grad_()
    with pytest.raises(ConfigError, match="packed values take no gradient"):
        sparse_linear(torch.ones(2, 48), sparse)


# who listens to ops hears this one


class Listener(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.heard.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_and_a_profiler_see_the_op(gen):
    sparse, _ = make(gen, 12, 48, "2:8", torch.float32)
    x = torch.randn(5, 48, generator=gen)
    with Listener() as listener:
        y = sparse_linear(x, sparse)
    assert "obs_kernels.sparse_linear.default" in listener.heard
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert torch.equal(sparse_linear(x, sparse), y)
    assert "obs_kernels::sparse_linear" in {event.name for event in profile.events()}


def test_without_a_listener_the_dispatcher_is_left_out(gen, monkeypatch):
    sparse, _ = make(gen, 12, 48, "2:8", torch.float32)
    x = torch.randn(5, 48, generator=gen)
    wanted = sparse_linear(x.clone().requires_grad_(), sparse).detach()  # through the dispatcher
    monkeypatch.delattr(torch.ops.obs_kernels, "sparse_linear")
    assert torch.equal(sparse_linear(x, sparse), wanted)
    with torch.no_grad():
        assert torch.equal(sparse_linear(x.requires_grad_(), sparse), wanted)


def test_vmap_is_never_passed_over_in_silence(gen):
    sparse, dense = make(gen, 12, 48, "2:8", torch.float32)
    x = torch.randn(3, 5, 48, generator=gen)
    try:
        found = torch.vmap(lambda part: sparse_linear(part, sparse))(x)
    except (RuntimeError, NotImplementedError):
        return  # the op has no rule for it, and says so
    torch.testing.assert_close(found, x @ dense.T, rtol=1e-4, atol=1e-5)


def test_a_subclass_of_tensors_sees_the_op(gen):
    class Marked(Tensor):
        pass

    sparse, _ = make(gen, 12, 48, "2:8", torch.float32)
    x = torch.randn(5, 48, generator=gen)
    assert type(sparse_linear(x.as_subclass(Marked), sparse)) is Marked


# refused input


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"x": torch.ones(2, 47)}, ShapeNotSupportedError, ["x must be [..., C]", "C = 48", "[2, 47]"]),
        ({"x": torch.ones(48, 2)}, ShapeNotSupportedError, ["C = 48", "'token'", "[48, 2]"]),
        ({"x": torch.tensor(1.0)}, ShapeNotSupportedError, ["x must be", "[]"]),
        ({"x": torch.ones(47, 2), "x_layout": "feature"}, ShapeNotSupportedError, ["[C, T]", "C = 48", "[47, 2]"]),
        ({"x": torch.ones(48, 2, 2), "x_layout": "feature"}, ShapeNotSupportedError, ["[C, T]", "[48, 2, 2]"]),
        ({"bias": torch.ones(11)}, ShapeNotSupportedError, ["bias must be [12]", "[11]"]),
        ({"bias": torch.ones(12, 1)}, ShapeNotSupportedError, ["bias must be [12]", "[12, 1]"]),
        ({"x": torch.ones(2, 48).half()}, DTypeNotSupportedError, ["share a dtype", "float16", "float32"]),
        ({"bias": torch.ones(12).double()}, DTypeNotSupportedError, ["share a dtype", "float64"]),
        ({"x": torch.ones(2, 48, dtype=torch.int8)}, DTypeNotSupportedError, ["x must be", "int8"]),
        ({"x": torch.ones(2, 48, dtype=torch.complex64)}, DTypeNotSupportedError, ["x must be", "complex64"]),
        ({"activation": "tanh"}, ConfigError, ["activation", "'gelu_tanh'", "got 'tanh'"]),
        ({"activation": ""}, ConfigError, ["activation", "got ''"]),
        ({"x_layout": "row"}, ConfigError, ["x_layout", "'feature'", "got 'row'"]),
        ({"y_layout": "row"}, ConfigError, ["y_layout", "'token'", "got 'row'"]),
        ({"x": torch.ones(2, 48, device="meta")}, DeviceMismatchError, ["x on meta", "values on cpu"]),
        ({"bias": torch.ones(12, device="meta")}, DeviceMismatchError, ["bias on meta", "values on cpu"]),
    ],
)
def test_refused(gen, arguments, error, words):
    sparse, _ = make(gen, 12, 48, "2:8", torch.float32)
    given_arguments = {"x": torch.ones(2, 48), "bias": torch.ones(12)} | arguments
    with pytest.raises(error) as caught:
        sparse_linear(given_arguments.pop("x"), sparse, **given_arguments)
    for word in words:
        assert word in str(caught.value)


@settings(max_examples=50)
@given(
    st.sampled_from(["2:4", "2:8", "1:4", "4:8", "2:2:8"]),
    st.integers(1, 5),
    st.integers(1, 4),
    st.lists(st.integers(0, 4), min_size=1, max_size=3),
    st.sampled_from(list(ACTIVATIONS)),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_any_shape(text, high, wide, leading, activation, with_bias, seed):
    gen = torch.Generator().manual_seed(seed)
    rows, cols = 2 * high, wide * int(text.split(":")[-1])
    sparse, dense = make(gen, rows, cols, text, torch.float32)
    x = torch.randn(*leading, cols, generator=gen)
    bias = torch.randn(rows, generator=gen) if with_bias else None
    check(sparse_linear(x, sparse, bias, activation=activation), x, dense, bias, activation)


def test_after_search_and_update(gen):
    """The whole way: search, update, pack, product, against the dense product of the updated weight."""
    weight = torch.randn(8, 32, generator=gen)
    fisher = oracle.random_spd(gen, 16, 16).float()
    sel = search_vnm(weight, fisher, "4:2:8", damp=0.1)
    new = obs_update(weight, fisher, sel.mask, damp=0.1)
    x = torch.randn(5, 32, generator=gen)
    check(sparse_linear(x, pack(new, sel.mask, "4:2:8")), x, new, None, None)


@pytest.mark.usefixtures("traceable")
@pytest.mark.parametrize("grads", [True, False])
def test_which_op_a_compiler_sees(gen, grads):
    """The one with a formula where gradients may be wanted, else the one that costs the host less; both agree."""
    sparse, dense = make(gen, 8, 16, "2:4", torch.float32)
    x = torch.randn(3, 16, generator=gen).requires_grad_(grads)
    recorder = EagerAndRecordGraphs()
    run = torch.compile(lambda t: sparse_linear(t, sparse, activation="gelu"), backend=recorder, fullgraph=True)
    with torch.set_grad_enabled(grads):
        y = run(x)
    (graph,) = recorder.graphs
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert [name.rpartition(".")[2] for name in names if "sparse_linear" in name] == [
        "sparse_linear" if grads else "sparse_linear_inference"
    ]
    torch.testing.assert_close(y, torch.nn.functional.gelu(x @ dense.T))
    assert y.requires_grad == grads


def test_tangents_stay_where_gradients_are_off(gen):
    sparse, dense = make(gen, 8, 16, "2:4", torch.float32)
    x = torch.randn(3, 16, generator=gen)
    with torch.no_grad():
        found = torch.func.jvp(lambda t: sparse_linear(t, sparse), (x,), (x,))[1]
    torch.testing.assert_close(found, x @ dense.T)
