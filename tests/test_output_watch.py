# SPDX-License-Identifier: Apache-2.0
"""Which outputs go into a residual stream, what the stream holds then, and where a watched pass ends."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import obs_kernels as obs
from obs_kernels.pruning.layer import PrunedLayer
from obs_kernels.pruning.output_watch import Enough, Expected, Seen, expected_of, until_enough, watch

Use = Callable[[Tensor, Tensor], Tensor]
"""What a net does with an output y and a stream r."""


class Net(nn.Module):
    """A layer whose output is used as ``use`` says, and one that comes after it."""

    def __init__(self, use: Use, calls: int = 1) -> None:
        super().__init__()
        self.layer, self.after = nn.Linear(8, 8), nn.Linear(8, 8)
        self.use, self.calls = use, calls

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.calls):
            x = self.use(self.layer(x), x)
        y: Tensor = self.after(x.reshape(-1, 8)).tanh()
        return y


def layers_of(model: nn.Module, target: str = "Linear") -> list[PrunedLayer]:
    return obs.OBSPruner(model, obs.OBSConfig(pattern="2:4", curvature="row", targets=(target,))).layers


def only(model: nn.Module, name: str) -> list[PrunedLayer]:
    return [layer for layer in layers_of(model) if layer.name == name]


def is_sum(net: Net, x: Tensor) -> bool:
    (found,) = watch(only(net, "layer"), lambda: net(x))
    return found.is_sum


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def add_in_place(y: Tensor, r: Tensor) -> Tensor:
    y += r
    return y


def add_into_the_stream(y: Tensor, r: Tensor) -> Tensor:
    r = r.clone()
    r += y
    return r


SUMS: dict[str, Use] = {
    "y + r": lambda y, r: y + r,
    "r + y": lambda y, r: r + y,
    "y += r": add_in_place,
    "r += y": add_into_the_stream,
    "torch.add": torch.add,
    "torch.add of r": lambda y, r: torch.add(r, y),
    "add_": lambda y, r: y.add_(r),
    "add": lambda y, r: r.add(y),
    "reshaped": lambda y, r: (y.reshape(-1, 8) + r.reshape(-1, 8)).view(y.shape),
    "reshaped in place": lambda y, r: y.view(y.shape[0], -1).add_(r.flatten(1)).view(y.shape),
    "dropout": lambda y, r: F.dropout(y, 0.5, training=False) + r,
    "dtype it has": lambda y, r: r + y.float(),
}
NO_SUMS: dict[str, Use] = {
    "unused": lambda y, r: r * 2.0,
    "alone": lambda y, r: y.tanh(),
    "scaled": lambda y, r: 0.5 * y + r,
    "activated": lambda y, r: y.relu() + r,
    "part": lambda y, r: torch.cat([y[..., :4] + r[..., :4], y[..., 4:]], -1),
    "transposed": lambda y, r: (y.mT + r.mT).mT,
    "broadcast to more": lambda y, r: (y + r.new_zeros(3, 1, 1, 1))[0],
    "gelu by hand": lambda y, r: 0.5 * y * (1.0 + torch.tanh(0.8 * (y + 0.04 * y.pow(3)))),
    "to itself activated": lambda y, r: y + y.sigmoid(),
    "to itself turned": lambda y, r: y + torch.cat([y[..., 4:], y[..., :4]], -1),
    "to itself in chunks": lambda y, r: y + torch.cat(y.chunk(2, -1)[::-1], -1),
    "doubled": lambda y, r: y + y,
    "with a factor": lambda y, r: torch.add(r, y, alpha=0.5),
    "with a factor in place": lambda y, r: r.clone().add_(y, alpha=0.5),
}


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("shape", [(4, 8), (2, 5, 8)])
def test_sums(name: str, shape: tuple[int, ...], gen: torch.Generator) -> None:
    """They count, and the value is output plus stream whatever is done in place."""
    x = torch.randn(*shape, generator=gen)
    net = Net(SUMS[name])
    layers = only(net, "layer")
    expected = expected_of(layers, watch(layers, lambda: net(x)))
    assert expected == {layers[0]: (True,)}
    (found,) = watch(layers, lambda: net(x), expected)
    wanted = F.linear(x.double(), net.layer.weight.double(), net.layer.bias.double()) + x.double()
    assert found.layer is layers[0] and found.is_sum and found.output.shape == x.shape
    assert torch.equal(found.input, x)
    torch.testing.assert_close(found.output.double(), wanted.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NO_SUMS)
def test_what_is_no_sum(name: str, gen: torch.Generator) -> None:
    """What the output goes into is not the output plus something that has nothing to do with it."""
    x = torch.randn(2, 5, 8, generator=gen)
    assert not is_sum(Net(NO_SUMS[name]), x)


def test_an_output_changed_in_place_is_none_any_more(gen: torch.Generator) -> None:
    """A stream that gets relu(y) does not get y."""
    x = torch.randn(2, 5, 8, generator=gen)
    assert not is_sum(Net(lambda y, r: r + y.relu_()), x)


def test_own_output_is_a_copy(gen: torch.Generator) -> None:
    """Of a layer whose output goes into no sum; what comes next works in place."""
    x = torch.randn(4, 8, generator=gen)
    net = Net(lambda y, r: y.mul_(0.0))
    layers = layers_of(net)
    found = watch(layers, lambda: net(x), dict.fromkeys(layers, (False,)))
    assert [item.layer.name for item in found] == ["layer", "after"]
    torch.testing.assert_close(found[0].output, (x @ net.layer.weight.T + net.layer.bias).detach())


def test_the_sum_is_a_copy(gen: torch.Generator) -> None:
    class Late(Net):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x)
            y += x
            z = self.layer(y)
            y.zero_()
            return self.after(z) + y

    x = torch.randn(4, 8, generator=gen)
    net = Late(torch.add)
    layers = layers_of(net)
    by_name = {layer.name: layer for layer in layers}
    expected: Expected = {by_name["layer"]: (True, False), by_name["after"]: (True,)}
    found = watch(layers, lambda: net(x), expected)
    stream = (x @ net.layer.weight.T + net.layer.bias + x).detach()
    torch.testing.assert_close(found[0].output, stream)
    assert torch.equal(found[0].input, x)


def test_a_pass_ends_with_the_sum(gen: torch.Generator) -> None:
    """Nothing that comes later runs; without ``expected`` all does."""
    x = torch.randn(4, 8, generator=gen)
    net = Net(torch.add)
    ran: list[str] = []
    for name in ("layer", "after"):
        getattr(net, name).register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    layers = only(net, "layer")
    expected = expected_of(layers, watch(layers, lambda: net(x)))
    assert ran == ["layer", "after"]
    watch(layers, lambda: net(x), expected)
    assert ran == ["layer", "after", "layer"]


def test_a_pass_ends_with_the_last_of_several(gen: torch.Generator) -> None:
    """An output that is no sum is enough by itself, once the others came."""
    x = torch.randn(4, 8, generator=gen)
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    ran: list[int] = []
    for i, module in enumerate(net):
        module.register_forward_hook(lambda *_, i=i: ran.append(i))
    layers = layers_of(net)[1:3]
    found = watch(layers, lambda: net(x), dict.fromkeys(layers, (False,)))
    assert ran == [0, 1, 2] and [item.layer for item in found] == layers
    for item, upto in zip(found, (2, 3), strict=True):
        assert torch.equal(item.output, net[:upto](x).detach())


def test_a_layer_called_twice(gen: torch.Generator) -> None:
    """The pass ends after the second; each call has its own stream."""
    x = torch.randn(2, 5, 8, generator=gen)
    net = Net(torch.add, calls=2)
    after: list[int] = []
    net.after.register_forward_pre_hook(lambda *_: after.append(1))
    layers = only(net, "layer")
    expected = expected_of(layers, watch(layers, lambda: net(x)))
    assert expected == {layers[0]: (True, True)} and len(after) == 1
    found = watch(layers, lambda: net(x), expected)
    assert len(after) == 1 and len(found) == 2
    stream = x
    for item in found:
        assert torch.equal(item.input, stream)
        stream = (net.layer(stream) + stream).detach()
        assert torch.equal(item.output, stream)


def test_calls_of_two_kinds(gen: torch.Generator) -> None:
    """Once into the stream, once not."""
    flags = iter([True, False] * 2)
    net = Net(lambda y, r: y + r if next(flags) else y.tanh(), calls=2)
    x = torch.randn(4, 8, generator=gen)
    layers = only(net, "layer")
    expected = expected_of(layers, watch(layers, lambda: net(x)))
    assert expected[layers[0]] == (True, False)
    first, second = watch(layers, lambda: net(x), expected)
    stream = (net.layer(x) + x).detach()
    assert torch.equal(first.output, stream) and torch.equal(second.output, net.layer(stream).detach())


def test_a_layer_that_does_not_run(gen: torch.Generator) -> None:
    x = torch.randn(4, 8, generator=gen)
    net = Net(torch.add)
    layers = layers_of(net)
    expected = expected_of(layers, watch(layers, lambda: net.layer(x)))
    assert expected == {layer: (False,) if layer.name == "layer" else () for layer in layers}


def test_two_layers_into_one_sum(gen: torch.Generator) -> None:
    """As where attention and feed-forward run side by side: both see the same sum."""

    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + (self.left(x) + self.right(x.tanh()))

    x = torch.randn(4, 8, generator=gen)
    net = Parallel()
    layers = layers_of(net)
    expected = expected_of(layers, watch(layers, lambda: net(x)))
    assert set(expected.values()) == {(True,)}
    for item in watch(layers, lambda: net(x), expected):
        assert torch.equal(item.output, (net.left(x) + net.right(x.tanh())).detach())


@pytest.mark.parametrize("with_expected", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_hooks_go_after_an_error(with_expected: bool, error: type[BaseException], gen: torch.Generator) -> None:
    def broken(y: Tensor, r: Tensor) -> Tensor:
        raise error("broken")

    x = torch.randn(4, 8, generator=gen)
    net = Net(broken)
    layers = layers_of(net)
    with pytest.raises(error, match="broken"):
        watch(layers, lambda: net(x), dict.fromkeys(layers, (True,)) if with_expected else None)
    assert hooks_of(net) == 0
    net.use = torch.add
    assert torch.isfinite(net(x)).all(), "no mode is left that ends the pass"
    assert torch.is_grad_enabled()


def test_hooks_go_after_an_early_end(gen: torch.Generator) -> None:
    net = Net(torch.add)
    layers = layers_of(net)
    watch(layers, lambda: net(torch.ones(4, 8)), dict.fromkeys(layers, (True,)) | {layers[1]: ()})
    assert hooks_of(net) == 0 and torch.isfinite(net(torch.ones(4, 8))).all()


def test_an_early_end_is_no_exception_of_the_model(gen: torch.Generator) -> None:
    """A model that catches what goes wrong inside does not go on."""

    class Careful(Net):
        def forward(self, x: Tensor) -> Tensor:
            with suppress(Exception):
                x = self.layer(x) + x
            y: Tensor = self.after(x)
            return y

    net = Careful(torch.add)
    ran: list[int] = []
    net.after.register_forward_pre_hook(lambda *_: ran.append(1))
    layers = only(net, "layer")
    watch(layers, lambda: net(torch.ones(4, 8)), {layers[0]: (True,)})
    assert not ran


def test_a_device_of_the_model_for_a_while(gen: torch.Generator) -> None:
    """``torch.device`` as a context sees all functions too; the addition comes after it."""

    class Placed(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.device("meta"):
                y = self.layer(x)
            assert torch.zeros(1).device.type == "cpu"
            y = y + x
            return self.after(y)

    x = torch.randn(4, 8, generator=gen)
    net = Placed(torch.add)
    assert is_sum(net, x)
    assert torch.zeros(1).device.type == "cpu"


def test_until_enough() -> None:
    def end() -> None:
        raise Enough

    until_enough(end)
    until_enough(lambda: None)
    with pytest.raises(ValueError, match="other"):
        until_enough(lambda: (_ for _ in ()).throw(ValueError("other")))


transformers = pytest.importorskip("transformers")


def bert() -> nn.Module:
    cfg = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    model: nn.Module = transformers.BertModel(cfg)
    return model


def gpt2(activation: str = "gelu_new") -> nn.Module:
    cfg = transformers.GPT2Config(
        vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2, activation_function=activation
    )
    model: nn.Module = transformers.GPT2Model(cfg)
    return model


def llama() -> nn.Module:
    cfg = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    model: nn.Module = transformers.LlamaModel(cfg)
    return model


def given_to(module: nn.Module) -> Callable[[Callable[[], object]], Tensor]:
    """The first argument of ``module`` in a run."""

    def run_it(run: Callable[[], object]) -> Tensor:
        found: list[Tensor] = []
        handle = module.register_forward_pre_hook(lambda _, args: found.append(args[0].detach().clone()))
        run()
        handle.remove()
        return found[0]

    return run_it


MODELS: dict[str, tuple[Callable[[], nn.Module], str, dict[str, str]]] = {
    "bert": (
        bert,
        "Linear",
        {
            "encoder.layer.{}.attention.output.dense": "encoder.layer.{}.attention.output.LayerNorm",
            "encoder.layer.{}.output.dense": "encoder.layer.{}.output.LayerNorm",
        },
    ),
    "gpt2": (gpt2, "Conv1D", {"h.{}.attn.c_proj": "h.{}.ln_2", "h.{}.mlp.c_proj": "h.{next}.ln_1"}),
    "gpt2 gelu": (
        lambda: gpt2("gelu"),
        "Conv1D",
        {"h.{}.attn.c_proj": "h.{}.ln_2", "h.{}.mlp.c_proj": "h.{next}.ln_1"},
    ),
    "llama": (
        llama,
        "Linear",
        {
            "layers.{}.self_attn.o_proj": "layers.{}.post_attention_layernorm",
            "layers.{}.mlp.down_proj": "layers.{next}.input_layernorm",
        },
    ),
}
"""Of each: how to make one, what to prune, and which layers add to the stream, with the norm that reads it next."""
LAST_NORM = {"gpt2": "ln_f", "gpt2 gelu": "ln_f", "llama": "norm"}


def places(kind: str) -> dict[str, str]:
    found = {}
    for i in range(2):
        for layer, norm in MODELS[kind][2].items():
            name = norm.replace("{next}", str(i + 1)).format(i)
            found[layer.format(i)] = LAST_NORM[kind] if i == 1 and "{next}" in norm else name
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_transformers(kind: str, gen: torch.Generator) -> None:
    """Attention output and down projection, and no other; sums are what the next norm gets."""
    torch.manual_seed(0)
    make, target, _ = MODELS[kind]
    model = make().eval()
    ids = torch.randint(0, 40, (3, 7), generator=gen)
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[1, 5:] = 0

    def run() -> object:
        return model(input_ids=ids, attention_mask=mask)

    layers = layers_of(model, target)
    expected = expected_of(layers, watch(layers, run))
    wanted = places(kind)
    assert len(wanted) == 4 and wanted.keys() < {layer.name for layer in layers}
    assert {layer.name: calls for layer, calls in expected.items()} == {
        layer.name: (layer.name in wanted,) for layer in layers
    }
    for layer in layers:
        if layer.name in wanted:
            stream = given_to(model.get_submodule(wanted[layer.name]))(run)
            (found,) = watch([layer], run, {layer: (True,)})
            assert found.is_sum and torch.equal(found.output, stream)
    assert hooks_of(model) == 0


@pytest.mark.parametrize("kind", MODELS)
def test_transformers_end_early(kind: str, gen: torch.Generator) -> None:
    """The norm that reads the stream does not run any more."""
    make, target, _ = MODELS[kind]
    model = make().eval()
    ids = torch.randint(0, 40, (2, 5), generator=gen)
    found: Seen
    for name, norm in places(kind).items():
        layer = next(x for x in layers_of(model, target) if x.name == name)
        ran: list[str] = []
        handle = model.get_submodule(norm).register_forward_pre_hook(lambda *_, ran=ran: ran.append("norm"))
        (found,) = watch([layer], lambda: model(input_ids=ids), {layer: (True,)})
        handle.remove()
        assert found.is_sum and not ran


def test_one_token_and_one_head(gen: torch.Generator) -> None:
    """Shapes of 1, where reshaping and transposing are the same: query, key and value are no sums."""
    cfg = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    model = transformers.LlamaModel(cfg).eval()
    layers = layers_of(model)
    expected = expected_of(layers, watch(layers, lambda: model(input_ids=torch.tensor([[3]]))))
    names = {layer.name.rsplit(".", 1)[1] for layer, calls in expected.items() if calls == (True,)}
    assert names == {"o_proj", "down_proj"}
