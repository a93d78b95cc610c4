# SPDX-License-Identifier: Apache-2.0
"""``sparse_linear`` under the transforms of ``torch.func``, against the dense product under the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functionalize, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, vjp, vmap

from obs_kernels.ops import sparse_linear
from obs_kernels.sparse.linear import SparseLinear

TOKENS, COLS, ROWS = 3, 16, 8
ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {None: lambda y: y, "gelu": F.gelu, "relu": torch.relu}
LAYOUTS = (("token", "token"), ("feature", "feature"), ("feature", "token"))

Function = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture
def layer(gen: torch.Generator) -> SparseLinear:
    linear = nn.Linear(COLS, ROWS, dtype=torch.float64)  # second derivatives cancel
    with torch.no_grad():
        linear.weight.copy_(torch.randn(ROWS, COLS, generator=gen, dtype=torch.float64)).view(ROWS, -1, 4)[..., 1:3] = 0
    return SparseLinear.from_linear(linear, "2:4")


@pytest.fixture(params=[(a, *layouts) for a in ACTIVATIONS for layouts in LAYOUTS], ids=str)
def twins(request: pytest.FixtureRequest, layer: SparseLinear) -> tuple[Function, Function, Callable[[Tensor], Tensor]]:
    """The sparse function, the dense one, and x [T, C] as both take it."""
    activation, x_layout, y_layout = request.param
    dense = layer.to_linear().weight.detach()  # type: ignore[operator]

    def given(x: Tensor) -> Tensor:
        return x if x_layout == "token" else x.mT.contiguous()

    def wanted(x: Tensor, bias: Tensor) -> Tensor:
        y = ACTIVATIONS[activation](F.linear(given(x), dense, bias))
        return y if y_layout == "token" else y.mT

    options = {"activation": activation, "x_layout": x_layout, "y_layout": y_layout}
    return partial(_sparse, layer, options), wanted, given


def _sparse(layer: SparseLinear, options: dict[str, str], x: Tensor, bias: Tensor) -> Tensor:
    return sparse_linear(x, layer.sparse, bias, **options)


def summed(function: Function) -> Function:
    """A scalar that depends on every output in its own way."""
    return lambda x, bias: function(x, bias).sin().sum()


def close(found: object, wanted: object) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_give_what_they_give_of_the_dense_product(twins, gen) -> None:
    sparse, dense, given = twins
    x, bias = (
        given(torch.randn(TOKENS, COLS, generator=gen, dtype=torch.float64)),
        torch.randn(ROWS, generator=gen, dtype=torch.float64),
    )
    for at in (0, 1, (0, 1)):
        close(grad(summed(sparse), at)(x, bias), grad(summed(dense), at)(x, bias))
    close(grad_and_value(summed(sparse))(x, bias), grad_and_value(summed(dense))(x, bias))
    close(jacrev(sparse, (0, 1))(x, bias), jacrev(dense, (0, 1))(x, bias))
    (y, pull), (z, pull_dense) = vjp(sparse, x, bias), vjp(dense, x, bias)
    close((y, pull(y.cos())), (z, pull_dense(z.cos())))
    close(jvp(sparse, (x, bias), (x, bias)), jvp(dense, (x, bias), (x, bias)))
    samples = torch.stack([x, -2 * x])  # per-sample gradients
    close(*(vmap(grad(summed(f), 1), (0, None))(samples, bias) for f in (sparse, dense)))
    close(*(grad(lambda x, f=f: grad(summed(f))(x, bias).square().sum())(x) for f in (sparse, dense)))
    close(*(hessian(summed(f), 1)(x, bias) for f in (sparse, dense)))
    close(*(jvp(grad(summed(f), 1), (x, bias), (x, bias)) for f in (sparse, dense)))
    close(*(jvp(lambda b, f=f: jvp(partial(f, x), (b,), (b.cos(),))[1], (bias,), (bias,)) for f in (sparse, dense)))
    close(*(jvp(lambda b, f=f: grad(summed(f))(x, b), (bias,), (bias.cos(),)) for f in (sparse, dense)))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_look_where_gradients_are_off(twins, gen) -> None:
    sparse, dense, given = twins
    x, bias = (
        given(torch.randn(TOKENS, COLS, generator=gen, dtype=torch.float64)),
        torch.zeros(ROWS, dtype=torch.float64),
    )
    close(*(jacfwd(jacfwd(summed(f), 1), 1)(x, bias) for f in (sparse, dense)))
    close(functionalize(sparse)(x, bias), dense(x, bias))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "relu", None])
def test_forward_over_reverse_without_a_transform(layer: SparseLinear, gen: torch.Generator, activation) -> None:
    x, change = torch.randn(2, TOKENS, COLS, generator=gen, dtype=torch.float64)

    def second(function: Callable[[Tensor], Tensor]) -> Tensor:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.clone().requires_grad_(), change)
            (found,) = torch.autograd.grad(function(dual).sin().sum(), dual, create_graph=True)
            tangent: Tensor | None = forward_ad.unpack_dual(found).tangent
        assert tangent is not None
        return tangent

    dense, bias = layer.to_linear().weight.detach(), layer.bias  # type: ignore[operator]
    apart = {"gelu_tanh": lambda y: F.gelu(y, approximate="tanh"), "silu": lambda y: y * torch.sigmoid(y)}
    act = (ACTIVATIONS | apart)[activation]
    close(
        second(lambda x: sparse_linear(x, layer.sparse, bias, activation=activation)),
        second(lambda x: act(F.linear(x, dense, bias))),
    )


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_outside_of_transforms_and_of_gradients_nothing_changes(layer: SparseLinear, gen: torch.Generator) -> None:
    x = torch.randn(TOKENS, COLS, generator=gen, dtype=torch.float64)
    y = layer(x)
    close(vmap(layer)(x), y)
    inside = grad(lambda x: layer(x).sum())(x)
    x.requires_grad_()
    layer(x).sum().backward()
    close(x.grad, inside)
    with torch.no_grad():
        assert torch.equal(layer(x), y.detach())


def test_a_model_of_packed_layers_has_gradients_by_functional_call(layer: SparseLinear, gen: torch.Generator) -> None:
    model = nn.Sequential(layer, nn.GELU(), nn.Linear(ROWS, 2)).double()
    x = torch.randn(TOKENS, COLS, generator=gen, dtype=torch.float64)
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    assert "0.bias" in parameters and "0.values" not in parameters
    found = grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())(parameters)
    model(x).square().sum().backward()
    close(found, {name: value.grad for name, value in model.named_parameters()})
