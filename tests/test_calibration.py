# SPDX-License-Identifier: Apache-2.0
"""Gradients for the Fisher: per-sample gradients of one backward pass against a loop of single ones in float64."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from obs_kernels import OBSConfig, OBSPruner
from obs_kernels.errors import ConfigError, NonFiniteGradientError, ShapeNotSupportedError

D = 128
"""Above every layer here: one Fisher block holds the outer product of the whole gradient."""
RELATIVE = 2e-6
"""Of the largest entry: f32 forward, backward and sums of some tens of products; measured 4e-7."""


def config(**changes) -> OBSConfig:
    values = {"pattern": "unstructured:0.5", "fisher_block_size": D, "num_grads": 1000, "ignore": ()}
    return OBSConfig(**(values | changes))


def mean_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return each_loss(model, batch).mean()


def each_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    out = model(batch["x"])
    return (out - batch["y"]).square().flatten(1).sum(1)


def fishers_by_loop(
    model: nn.Module, samples: list[dict[str, Tensor]], loss_fn: Callable, names: list[str]
) -> dict[str, Tensor]:
    """1/S sum g g' in float64, one ordinary backward pass a sample."""
    exact = copy.deepcopy(model).double().eval()
    for parameter in exact.parameters():
        parameter.requires_grad_(True)
    totals = dict.fromkeys(names, 0.0)
    for sample in samples:
        exact.zero_grad(set_to_none=True)
        loss_fn(exact, {k: v.double() if v.is_floating_point() else v for k, v in sample.items()}).sum().backward()
        for name in names:
            weight = exact.get_parameter(name)
            g = torch.zeros_like(weight) if weight.grad is None else weight.grad
            g = F.pad(g.flatten(), (0, D - g.numel()))
            totals[name] = totals[name] + torch.outer(g, g)
    return {name: total[None] / len(samples) for name, total in totals.items()}


def split(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{k: v[i : i + 1] for k, v in batch.items()} for i in range(len(next(iter(batch.values()))))]


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], relative: float = RELATIVE) -> None:
    assert set(found) == set(wanted)
    for name in wanted:
        error = (found[name].double() - wanted[name]).abs().max()
        assert error <= relative * wanted[name].abs().max(), f"{name}: {error} of {wanted[name].abs().max()}"


def data(gen: torch.Generator, *shape: int, batches: int = 2, batch: int = 3, out: int = 4) -> list[dict[str, Tensor]]:
    return [
        {"x": torch.randn(batch, *shape, generator=gen), "y": torch.randn(batch, *shape[:-1], out, generator=gen)}
        for _ in range(batches)
    ]


class Net(nn.Module):
    """6 -> 8 -> 8 -> 4 with a choice of what happens in between."""

    def __init__(self, forward: Callable[[Net, Tensor], Tensor], *, bias: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8, bias=bias), nn.Linear(8, 8, bias=bias), nn.Linear(8, 4, bias=bias)
        self.body = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def plain(net: Net, x: Tensor) -> Tensor:
    return net.c(F.gelu(net.b(F.gelu(net.a(x)))))


def used_twice(net: Net, x: Tensor) -> Tensor:
    return net.c(torch.tanh(net.b(torch.tanh(net.b(torch.tanh(net.a(x)))))))


def in_place(net: Net, x: Tensor) -> Tensor:
    return net.c(net.b(net.a(x).relu_()).mul_(2.0).tanh_())


def in_place_on_input(net: Net, x: Tensor) -> Tensor:
    """The captured input of b is what b saw, not what x became; b's own product needs no saved input twice."""
    return net.c(net.b(F.gelu(net.a(x)).add_(1.0)).sigmoid_())


def in_branches(net: Net, x: Tensor) -> Tensor:
    y = net.b(F.gelu(net.a(x)))
    return net.c(y * torch.sigmoid(y) + y.detach() + y.roll(1, -1)) + net.c(y)


def in_checkpoint(net: Net, x: Tensor) -> Tensor:
    return net.c(checkpoint(lambda z: F.gelu(net.b(F.gelu(net.a(z)))), x, use_reentrant=False))


def residual(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    return net.c(y + net.b(F.layer_norm(y, (8,))))


def mixing_tokens(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    return net.c(torch.softmax(y @ y.mT, -1) @ net.b(y))


def strided(net: Net, x: Tensor) -> Tensor:
    y = net.a(x).mT.contiguous().mT
    return net.c(net.b(y)[..., ::1])


def one_unused(net: Net, x: Tensor) -> Tensor:
    net.b(x.new_zeros(x.shape[0], 8))
    return net.c(net.a(x))


def heads(net: Net, x: Tensor) -> Tensor:
    """4-D inputs: [B, heads, T, C]."""
    y = net.a(x)[:, None].expand(-1, 2, -1, -1)
    return net.c(net.b(y).tanh().sum(1))


ALL_NETS = [plain, used_twice, in_place, in_place_on_input, in_branches, in_checkpoint, residual, strided, one_unused]


@pytest.mark.parametrize("shape", [(6,), (5, 6)], ids=["2d", "3d"])
@pytest.mark.parametrize("loss_fn", [mean_loss, each_loss])
@pytest.mark.parametrize("forward", ALL_NETS)
def test_sample_gradients_equal_a_loop(gen, forward, loss_fn, shape):
    model, batches = Net(forward), data(gen, *shape)
    pruner = OBSPruner(model, config())
    assert pruner.collect(batches, loss_fn) == 6
    names = ["a.weight", "b.weight", "c.weight"]
    wanted = fishers_by_loop(model, [s for b in batches for s in split(b)], each_loss, names)
    found = pruner.fishers()
    if forward is one_unused:
        assert not found["b.weight"].any() and not wanted["b.weight"].any()
    assert_close(found, wanted)
    assert [layer.num_grads for layer in pruner.layers] == [6, 6, 6]


@pytest.mark.parametrize("forward", [mixing_tokens, heads])
@pytest.mark.parametrize("bias", [True, False])
def test_sample_gradients_of_sequences(gen, forward, bias):
    model, batches = Net(forward, bias=bias), data(gen, 5, 6)
    pruner = OBSPruner(model, config())
    pruner.collect(batches, mean_loss)
    wanted = fishers_by_loop(
        model, [s for b in batches for s in split(b)], each_loss, ["a.weight", "b.weight", "c.weight"]
    )
    assert_close(pruner.fishers(), wanted)


def test_example_a(gen):
    """math.md 2, example A, through the collector: loss = sum of dy * y gives exactly that dy."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    batch = {
        "x": torch.tensor([[[1.0, 2], [0, 1]], [[3, -1], [1, 1]]]),
        "dy": torch.tensor([[[1.0, 0], [2, -1]], [[0, 1], [1, 2]]]),
    }

    def each(m, b):
        return (m(b["x"]) * b["dy"]).sum((1, 2))

    cfg = config(fisher_block_size=2)
    pruner = OBSPruner(model, cfg)
    pruner.collect([batch], each)
    assert pruner.fishers()["0.weight"].tolist() == [[[1, 2.5], [2.5, 8.5]], [[12.5, 2.5], [2.5, 1]]]
    pruner = OBSPruner(model, config(fisher_block_size=2, gradients="batch"))
    pruner.collect([batch], lambda m, b: each(m, b).mean())
    assert pruner.fishers()["0.weight"].tolist() == [[[1, 2.5], [2.5, 6.25]], [[6.25, 0], [0, 0]]]


@pytest.mark.parametrize("loss_fn", [mean_loss, each_loss])
@pytest.mark.parametrize("forward", [plain, used_twice, in_place, one_unused])
def test_batch_mode_is_the_gradient_of_the_mean(gen, forward, loss_fn):
    model, batches = Net(forward), data(gen, 5, 6, batches=3)
    pruner = OBSPruner(model, config(gradients="batch"))
    assert pruner.collect(batches, loss_fn) == 3
    wanted = fishers_by_loop(model, batches, mean_loss, ["a.weight", "b.weight", "c.weight"])
    assert_close(pruner.fishers(), wanted)


def test_manual_loop_equals_collect_in_batch_mode(gen):
    model, batches = Net(plain), data(gen, 6, batches=3)
    one, two = (OBSPruner(model, config(gradients="batch")) for _ in range(2))
    one.collect(batches, mean_loss)
    model.eval()
    for batch in batches:
        model.zero_grad()
        mean_loss(model, batch).backward()
        before = model.a.weight.grad.clone()
        two.accumulate()
        assert torch.equal(model.a.weight.grad, before)  # not cleared
    assert all(torch.equal(one.fishers()[k], two.fishers()[k]) for k in one.fishers())
    assert [layer.num_grads for layer in two.layers] == [3, 3, 3]


def test_accumulate_without_gradients(gen):
    model = Net(plain)
    pruner = OBSPruner(model, config())
    with pytest.raises(ConfigError, match=r"a\.weight\.grad is None.*loss\.backward"):
        pruner.accumulate()
    mean_loss(model, data(gen, 6)[0]).backward()
    model.c.weight.grad = None
    with pytest.raises(ConfigError, match=r"c\.weight\.grad is None"):
        pruner.accumulate()
    assert [layer.num_grads for layer in pruner.layers] == [0, 0, 0]
    assert all(layer.fisher_sum is None for layer in pruner.layers)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("layer", ["a", "b", "c"])
def test_accumulate_refuses_non_finite(gen, layer, value):
    """1e30 is finite, its square in the Fisher is not."""
    model = Net(plain)
    pruner = OBSPruner(model, config())
    mean_loss(model, data(gen, 6)[0]).backward()
    pruner.accumulate()
    before = {k: v.clone() for k, v in pruner.fishers().items()}
    getattr(model, layer).weight.grad[3, 2] = value
    with pytest.raises(NonFiniteGradientError, match=rf"{layer}: 1 NaN or Inf in the gradients of batch 1"):
        pruner.accumulate()
    assert all(torch.equal(before[k], v) for k, v in pruner.fishers().items())
    assert [x.num_grads for x in pruner.layers] == [1, 1, 1]


# how many gradients


@pytest.mark.parametrize(
    ("num_grads", "gradients"), [(1, "sample"), (4, "sample"), (5, "sample"), (6, "sample"), (1, "batch"), (2, "batch")]
)
def test_num_grads_cuts_inside_a_batch(gen, num_grads, gradients):
    model, batches = Net(plain), data(gen, 5, 6, batches=3, batch=3)
    pruner = OBSPruner(model, config(num_grads=num_grads, gradients=gradients))
    assert pruner.collect(batches, mean_loss) == num_grads
    samples = [s for b in batches for s in split(b)] if gradients == "sample" else batches
    wanted = fishers_by_loop(model, samples[:num_grads], mean_loss, ["a.weight", "b.weight", "c.weight"])
    assert_close(pruner.fishers(), wanted)


def test_infinite_loader_and_uneven_batches(gen):
    model, batches = Net(plain), data(gen, 6, batches=2, batch=3)
    small = {k: v[:1] for k, v in batches[0].items()}
    asked = 0

    def endless() -> Iterator[dict[str, Tensor]]:
        nonlocal asked
        for batch in itertools.cycle([batches[0], small, batches[1]]):
            asked += 1
            yield batch

    pruner = OBSPruner(model, config(num_grads=10))
    assert pruner.collect(endless(), each_loss) == 10
    order = split(batches[0]) + split(small) + split(batches[1]) + split(batches[0])
    assert_close(pruner.fishers(), fishers_by_loop(model, order, each_loss, ["a.weight", "b.weight", "c.weight"]))
    assert asked == 4, (
        "a batch that is not needed must not be drawn: it is lost for the next collect() on the same iterator"
    )


def test_collect_twice_adds(gen):
    model, batches = Net(plain), data(gen, 6, batches=2)
    pruner = OBSPruner(model, config())
    for batch in batches:
        assert pruner.collect([batch], mean_loss) == 3
    samples = [s for b in batches for s in split(b)]
    assert_close(pruner.fishers(), fishers_by_loop(model, samples, mean_loss, ["a.weight", "b.weight", "c.weight"]))


def test_collect_some_layers(gen):
    model, batches = Net(plain), data(gen, 6)
    pruner, whole = OBSPruner(model, config()), OBSPruner(model, config())
    whole.collect(batches, mean_loss)
    pruner.collect(batches, mean_loss, layers=["c", "a"])
    assert [layer.num_grads for layer in pruner.layers] == [6, 0, 6]
    pruner.collect(batches, mean_loss, layers=["b"])
    assert all(torch.equal(whole.fishers()[k], v) for k, v in pruner.fishers().items())
    with pytest.raises(ConfigError, match=r"layers \['d'\].*known: a, b, c"):
        pruner.collect(batches, mean_loss, layers=["d"])


@pytest.mark.parametrize("gradients", ["sample", "batch"])
def test_the_size_of_the_buffer_changes_nothing(gen, monkeypatch, gradients):
    """S is a matter of memory; batches of 7 are cut where S is smaller."""
    from obs_kernels.pruning import gradient_buffer

    model, batches = Net(used_twice), data(gen, 5, 6, batch=7, batches=3)
    total = 21 if gradients == "sample" else 3
    results = []
    for rows in (128, 7, 8, 4, 2, 1):
        monkeypatch.setattr(gradient_buffer, "MAX_ROWS", rows)
        pruner = OBSPruner(model, config(gradients=gradients))
        assert pruner.collect(batches, mean_loss) == total
        assert [layer.num_grads for layer in pruner.layers] == [total] * 3
        results.append({k: v.double() for k, v in pruner.fishers().items()})
    for result in results[1:]:
        assert_close(result, results[0])


def test_empty_loader():
    pruner = OBSPruner(Net(plain), config())
    with pytest.raises(ConfigError, match="loader gave no gradient"):
        pruner.collect([], mean_loss)
    with pytest.raises(ConfigError, match=r"no gradients.*collect"):
        pruner.fishers()
    with pytest.raises(ConfigError, match="a has no gradients"):
        pruner.prune()


# what reaches loss_fn


def test_batches_are_moved_and_keep_their_kind(gen):
    """dicts, tuples, named tuples, and what is no tensor at all."""
    from collections import namedtuple

    from obs_kernels.pruning.calibration import move

    pair = namedtuple("pair", ["x", "other"])
    x = torch.zeros(2)
    batch = {"a": (x, [x, 3]), "b": pair(x, "text"), "c": None}
    moved = move(batch, torch.device("meta"))
    assert moved["a"][0].is_meta and moved["a"][1][0].is_meta and moved["a"][1][1] == 3
    assert (
        type(moved["a"]) is tuple and type(moved["b"]) is pair and moved["b"].x.is_meta and moved["b"].other == "text"
    )
    assert moved["c"] is None and not x.is_meta


def test_a_batch_encoding_keeps_its_attributes():
    """What tokenizers return is read as ``batch.input_ids`` too."""
    encoding = pytest.importorskip("transformers").BatchEncoding
    from obs_kernels.pruning.calibration import move

    moved = move(encoding({"input_ids": torch.zeros(1, 2)}), torch.device("cpu"))
    assert moved.input_ids.shape == (1, 2) and moved["input_ids"].shape == (1, 2)


# padding


def masked_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Sum over real tokens only."""
    out = model(batch["x"])
    cost = (out - batch["y"]).square().sum(2)
    return torch.where(batch["attention_mask"] != 0, cost, torch.zeros_like(cost)).sum(1)


def padded_batch(gen: torch.Generator, garbage: float) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    lengths = [5, 2, 3]
    samples = [
        {
            "x": torch.randn(1, n, 6, generator=gen),
            "y": torch.randn(1, n, 4, generator=gen),
            "attention_mask": torch.ones(1, n),
        }
        for n in lengths
    ]
    batch = {
        "x": torch.stack(
            [F.pad(s["x"][0], (0, 0, 0, 5 - n), value=garbage) for s, n in zip(samples, lengths, strict=True)]
        ),
        "y": torch.stack([F.pad(s["y"][0], (0, 0, 0, 5 - n)) for s, n in zip(samples, lengths, strict=True)]),
        "attention_mask": torch.stack(
            [F.pad(s["attention_mask"][0], (0, 5 - n)) for s, n in zip(samples, lengths, strict=True)]
        ).long(),
    }
    return batch, samples


@pytest.mark.parametrize("garbage", [0.0, 77.0, 1e18, float("inf"), float("nan")])
def test_padded_tokens_count_nowhere(gen, garbage):
    batch, samples = padded_batch(gen, garbage)
    model = Net(lambda net, x: net.c(torch.tanh(net.b(torch.tanh(net.a(x))))))
    pruner = OBSPruner(model, config())
    pruner.collect([batch], masked_loss)
    assert_close(pruner.fishers(), fishers_by_loop(model, samples, masked_loss, ["a.weight", "b.weight", "c.weight"]))


def test_padded_tokens_in_the_loss_count_nowhere(gen):
    """A loss that sums over padding too: their share of the gradient is left out (design: count nowhere)."""
    batch, samples = padded_batch(gen, 3.0)
    model = Net(plain)
    pruner = OBSPruner(model, config())
    pruner.collect([batch], lambda m, b: (m(b["x"]) - b["y"]).square().sum((1, 2)))
    assert_close(pruner.fishers(), fishers_by_loop(model, samples, masked_loss, ["a.weight", "b.weight", "c.weight"]))


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    return transformers.BertForQuestionAnswering(
        transformers.BertConfig(
            vocab_size=30,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=12,
            max_position_embeddings=16,
        )
    )


def bert_batch(gen: torch.Generator, lengths: list[int]) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    width = max(lengths)
    ids = torch.randint(1, 30, (len(lengths), width), generator=gen)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": (torch.arange(width) > 1).long().expand_as(ids).contiguous(),
        "start_positions": torch.tensor([i % n for i, n in enumerate(lengths)]),
        "end_positions": torch.tensor([n - 1 for n in lengths]),
    }
    samples = [
        {k: v[i : i + 1] if v.dim() == 1 else v[i : i + 1, :n] for k, v in batch.items()} for i, n in enumerate(lengths)
    ]
    return batch, samples


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padded_bert_equals_single_unpadded_samples(gen, bert, attention):
    from obs_kernels.training.squad_batches import squad_loss

    bert.set_attn_implementation(attention)
    batch, samples = bert_batch(gen, [9, 4, 6, 2])
    cfg = config(ignore=("re:.*qa_outputs",))
    pruner = OBSPruner(bert, cfg)
    assert len(pruner.layers) == 12 and [s.name for s in pruner.skipped] == ["qa_outputs"]
    assert pruner.collect([batch], squad_loss) == 4
    names = [layer.parameter_name for layer in pruner.layers]
    assert_close(pruner.fishers(), fishers_by_loop(bert, samples, squad_loss, names), 1e-5)
    singles = OBSPruner(bert, cfg)
    singles.collect(samples, squad_loss)
    assert_close(singles.fishers(), {k: v.double() for k, v in pruner.fishers().items()}, 1e-5)


@pytest.mark.parametrize("gradients", ["sample", "batch"])
def test_bert_with_its_own_mean_loss(gen, bert, gradients):
    """The loss of transformers is a mean over the samples of a batch."""
    batch, samples = bert_batch(gen, [6, 6, 6])
    pruner = OBSPruner(bert, config(ignore=("re:.*qa_outputs",), gradients=gradients))
    pruner.collect([batch], lambda m, b: m(**b).loss)
    wanted = fishers_by_loop(
        bert,
        samples if gradients == "sample" else [batch],
        lambda m, b: m(**b).loss,
        [layer.parameter_name for layer in pruner.layers],
    )
    assert_close(pruner.fishers(), wanted, 1e-5)


# the model comes back as it was


def snapshot(model: nn.Module) -> dict[str, object]:
    return {
        "training": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "weights": [p.detach().clone() for p in model.parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        "parameter_hooks": [len(p._backward_hooks or ()) for p in model.parameters()],
        "rng": torch.get_rng_state(),
        "grad_mode": torch.is_grad_enabled(),
    }


def same(one: object, two: object) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return torch.equal(one, two)
    if isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two)


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    for key in before:
        assert same(before[key], after[key]), key


@pytest.fixture
def odd_model(gen) -> Net:
    """Some modules in training mode, some weights frozen, gradients and hooks of others present."""
    model = Net(lambda net, x: net.c(F.dropout(net.b(net.a(x)).relu_(), 0.5, net.b.training)))
    model.train()
    model.c.eval()
    model.a.weight.requires_grad_(False)
    model.c.bias.requires_grad_(False)
    model.b.weight.grad = torch.full((8, 8), 2.0)
    model.b.register_forward_hook(lambda *_: None)
    return model


class Stop(Exception):
    pass


@pytest.mark.parametrize("gradients", ["sample", "batch"])
@pytest.mark.parametrize("failure", ["none", "loader", "loss", "forward", "loss_shape", "non_finite"])
def test_the_model_comes_back_as_it_was(gen, odd_model, gradients, failure):
    batches = data(gen, 6, batches=3)
    pruner = OBSPruner(odd_model, config(gradients=gradients))

    def loader():
        yield batches[0]
        if failure == "loader":
            raise Stop
        yield batches[1]

    calls = 0

    def loss_fn(model, batch):
        nonlocal calls
        calls += 1
        assert not any(m.training for m in model.modules())
        loss = each_loss(model, batch)
        if calls == 2 and failure == "loss":
            raise Stop
        if calls == 2 and failure == "loss_shape":
            return loss[:, None]
        return loss * float("nan") if calls == 2 and failure == "non_finite" else loss

    if failure == "forward":

        def break_second(*_):
            if calls == 2:
                raise Stop

        odd_model.c.register_forward_pre_hook(break_second)
    before = snapshot(odd_model)
    if failure == "none":
        pruner.collect(loader(), loss_fn)
    else:
        with pytest.raises((Stop, ConfigError, NonFiniteGradientError)):
            pruner.collect(loader(), loss_fn)
    assert_same(before, snapshot(odd_model))
    calls = 0
    # nothing of a batch that failed is in the Fisher
    per_batch = 3 if gradients == "sample" else 1
    assert {layer.num_grads for layer in pruner.layers} == {per_batch * (2 if failure == "none" else 1)}
    first = fishers_by_loop(
        odd_model,
        split(batches[0]) if gradients == "sample" else batches[:1],
        mean_loss,
        ["a.weight", "b.weight", "c.weight"],
    )
    if failure != "none":
        assert_close(pruner.fishers(), first)


def test_collect_of_frozen_model_without_grad_mode(gen):
    model, batches = Net(plain), data(gen, 6)
    pruner = OBSPruner(model.requires_grad_(False), config())
    with torch.no_grad():
        pruner.collect(batches, mean_loss)
        assert not torch.is_grad_enabled()
    assert not any(p.requires_grad for p in model.parameters())
    wanted = fishers_by_loop(
        model, [s for b in batches for s in split(b)], mean_loss, ["a.weight", "b.weight", "c.weight"]
    )
    assert_close(pruner.fishers(), wanted)


@pytest.mark.parametrize("workers_loader", [False, True])
def test_the_global_random_state_is_untouched(gen, workers_loader):
    """Also where a model draws in eval mode, or a DataLoader draws its seed (promises, row 31)."""
    model = Net(lambda net, x: net.c(F.dropout(net.b(net.a(x)), 0.5, True)))
    batches = data(gen, 6)
    loader = (
        torch.utils.data.DataLoader([s for b in batches for s in split(b)], batch_size=None)
        if workers_loader
        else batches
    )
    pruner = OBSPruner(model, config())
    before = torch.get_rng_state()
    pruner.collect(loader, mean_loss)
    assert torch.equal(before, torch.get_rng_state())


def test_no_captured_tensors_stay_alive(gen):
    """Hooks and activations of the last batch are gone when collect returns."""
    import gc
    import weakref

    model, batches = Net(plain), data(gen, 6)
    pruner = OBSPruner(model, config())
    seen = []

    def loss_fn(m, batch):
        hidden = m.a(batch["x"])
        seen.append(weakref.ref(hidden))
        return (m.c(m.b(hidden)) - batch["y"]).square().sum(1)

    pruner.collect(batches, loss_fn)
    gc.collect()
    assert all(ref() is None for ref in seen)


def test_no_output(gen, capfd):
    OBSPruner(Net(plain), config()).collect(data(gen, 6), mean_loss)
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


# precision


def test_autocast_bf16(gen):
    model, batches = Net(plain), data(gen, 5, 6)

    def loss_fn(m, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return each_loss(m, batch)

    pruner = OBSPruner(model, config())
    pruner.collect(batches, loss_fn)
    found = pruner.fishers()
    assert all(f.dtype == torch.float32 for f in found.values())
    wanted = fishers_by_loop(
        model, [s for b in batches for s in split(b)], each_loss, ["a.weight", "b.weight", "c.weight"]
    )
    assert_close(found, wanted, 0.1)  # bf16 carries 8 bits through three layers, squared in the Fisher


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gradients", ["sample", "batch"])
def test_half_precision_models(gen, dtype, gradients):
    model = Net(plain).to(dtype)
    batches = [{k: v.to(dtype) for k, v in b.items()} for b in data(gen, 5, 6)]
    pruner = OBSPruner(model, config(gradients=gradients))
    pruner.collect(batches, lambda m, b: each_loss(m, b).float())
    samples = [s for b in batches for s in split(b)] if gradients == "sample" else batches
    wanted = fishers_by_loop(model, samples, mean_loss, ["a.weight", "b.weight", "c.weight"])
    assert_close(pruner.fishers(), wanted, 0.1)


def test_mean_loss_is_not_scaled_in_half_precision(gen):
    """B times dy is formed in f32: 60000 fits float16, 3 * 60000 does not."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False)).half()
    batch = {"x": torch.full((3, 2), 1e-3).half(), "dy": torch.full((3, 2), 60000.0).half()}
    pruner = OBSPruner(model, config(fisher_block_size=2))
    # the gradient of the mean arrives in float16 as 60000; the sample's own is three times that
    pruner.collect([batch], lambda m, b: (m(b["x"]) * b["dy"]).float().sum())
    x = float(torch.tensor(1e-3).half())
    assert torch.allclose(pruner.fishers()["0.weight"], torch.full((2, 2, 2), (3 * 60000.0 * x) ** 2), rtol=1e-5)


# NaN and Inf


BAD = [float("nan"), float("inf"), -float("inf")]


class Poison(nn.Module):
    """Identity that writes ``value`` at one place of one batch."""

    def __init__(self, value: float, backward: bool = False) -> None:
        super().__init__()
        self.value, self.calls, self.at, self.backward_pass = value, 0, 1, backward

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls - 1 != self.at:
            return x
        if self.backward_pass:
            x.register_hook(self.poison)
            return x
        return self.poison(x)

    def poison(self, x: Tensor) -> Tensor:
        x = x.clone()
        x.view(-1)[x.numel() // 2] = self.value
        return x


def poisoned(place: int, value: float, backward: bool) -> nn.Sequential:
    """Three Linears; the poison stands before number ``place`` (3: before the loss)."""
    parts: list[nn.Module] = [nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)]
    parts.insert(place, Poison(value, backward))
    return nn.Sequential(*parts)


def poison_of(model: nn.Sequential) -> Poison:
    return next(m for m in model if isinstance(m, Poison))


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("gradients", ["sample", "batch"])
@pytest.mark.parametrize(
    ("place", "backward"), [(0, False), (1, False), (2, False), (3, False), (1, True), (2, True), (3, True)]
)
def test_non_finite_is_named_and_leaves_the_fisher(gen, value, gradients, place, backward):
    model = poisoned(place, value, backward)
    batches = data(gen, 5, 6, batches=3)
    pruner = OBSPruner(model, config(gradients=gradients))
    clean = OBSPruner(model, config(gradients=gradients))
    with pytest.raises(NonFiniteGradientError) as caught:
        pruner.collect(batches, mean_loss)
    assert isinstance(caught.value, FloatingPointError)
    if (place, backward) != (3, False):  # there only the loss is not finite, and every gradient is
        assert isinstance(model.get_submodule(str(caught.value).split(":")[0]), nn.Linear)
    assert "batch 1" in str(caught.value) and "skip_batch" in str(caught.value)
    poison_of(model).at = -1
    clean.collect(batches[:1], mean_loss)
    assert [x.num_grads for x in pruner.layers] == [x.num_grads for x in clean.layers]
    assert all(torch.equal(clean.fishers()[k], v) for k, v in pruner.fishers().items())


@pytest.mark.parametrize("value", BAD)
def test_non_finite_input_of_the_first_batch(gen, value):
    """Nothing is there before and nothing after."""
    batches = data(gen, 6)
    batches[0]["x"][1, 3] = value
    pruner = OBSPruner(Net(plain), config())
    with pytest.raises(NonFiniteGradientError, match="batch 0"):
        pruner.collect(batches, mean_loss)
    assert all(layer.fisher_sum is None and layer.num_grads == 0 for layer in pruner.layers)


@pytest.mark.parametrize("gradients", ["sample", "batch"])
@pytest.mark.parametrize("loss_fn", [mean_loss, each_loss])
@pytest.mark.parametrize("value", BAD)
def test_non_finite_loss_with_finite_gradients(gen, gradients, loss_fn, value):
    """A constant NaN in the loss has no gradient, and still says that the batch is no good."""
    pruner = OBSPruner(Net(plain), config(gradients=gradients))
    with pytest.raises(NonFiniteGradientError, match="batch 0"):
        pruner.collect(data(gen, 6), lambda m, b: loss_fn(m, b) + value)
    assert all(layer.num_grads == 0 for layer in pruner.layers)


@pytest.mark.parametrize("gradients", ["sample", "batch"])
def test_skip_batch(gen, gradients):
    batches = data(gen, 5, 6, batches=4)
    model = poisoned(1, float("nan"), False)
    pruner = OBSPruner(
        model, config(gradients=gradients, on_nonfinite="skip_batch", num_grads=3 * (3 if gradients == "sample" else 1))
    )
    pruner.collect(batches, mean_loss)
    poison_of(model).at = -1
    clean = OBSPruner(model, config(gradients=gradients))
    clean.collect([batches[0], batches[2], batches[3]], mean_loss)
    assert all(torch.equal(clean.fishers()[k], v) for k, v in pruner.fishers().items())


@pytest.mark.parametrize("gradients", ["sample", "batch"])
def test_all_batches_skipped(gen, gradients):
    pruner = OBSPruner(Net(plain), config(gradients=gradients, on_nonfinite="skip_batch"))
    with pytest.raises(ConfigError, match="no gradient"):
        pruner.collect(data(gen, 6), lambda m, b: mean_loss(m, b) * float("nan"))
    assert all(layer.fisher_sum is None for layer in pruner.layers)


@pytest.mark.timeout(20)
def test_skip_batch_gives_up_on_an_endless_loader(gen):
    """promises.md, row 2: too many non-default outcomes raise; a loader of NaN alone must not run for ever."""
    drawn = 0

    def endless():
        nonlocal drawn
        for batch in itertools.cycle(data(gen, 6)):
            drawn += 1
            assert drawn < 3000, "still drawing"
            yield batch

    pruner = OBSPruner(Net(plain), config(on_nonfinite="skip_batch", num_grads=4))
    with pytest.raises((ConfigError, NonFiniteGradientError)):
        pruner.collect(endless(), lambda m, b: mean_loss(m, b) * float("nan"))


@pytest.mark.parametrize("gradients", ["sample", "batch"])
def test_squares_that_overflow_are_refused(gen, gradients):
    """Gradients near 1e20 are finite, their products are not."""
    calls = itertools.count()
    pruner = OBSPruner(Net(plain), config(gradients=gradients))
    with pytest.raises(NonFiniteGradientError, match="batch 1"):
        pruner.collect(data(gen, 6), lambda m, b: mean_loss(m, b) * (1e22 if next(calls) else 1.0))
    assert all(torch.isfinite(f).all() for f in pruner.fishers().values())


def test_large_gradients_that_fit_are_taken(gen):
    """The quick check is a bound; beyond it the gradients themselves decide."""
    model, batches = Net(plain), data(gen, 6)
    pruner = OBSPruner(model, config())
    pruner.collect(batches, lambda m, b: each_loss(m, b) * 1e15)
    wanted = fishers_by_loop(
        model,
        [s for b in batches for s in split(b)],
        lambda m, b: each_loss(m, b) * 1e15,
        ["a.weight", "b.weight", "c.weight"],
    )
    assert_close(pruner.fishers(), wanted)


def test_fp16_overflow(gen):
    model = Net(plain).half()
    batches = [{k: v.half() for k, v in b.items()} for b in data(gen, 6)]
    pruner = OBSPruner(model, config())
    with pytest.raises(NonFiniteGradientError):
        pruner.collect(batches, lambda m, b: each_loss(m, b) * 60000)
    assert all(layer.num_grads == 0 for layer in pruner.layers)


# losses and models that do not fit


@pytest.mark.parametrize("gradients", ["sample", "batch"])
@pytest.mark.parametrize(
    ("loss_fn", "words"),
    [
        (lambda m, b: mean_loss(m, b).detach(), ["without gradient", "detach"]),
        (lambda m, b: torch.tensor(1.0), ["without gradient"]),
        (lambda m, b: m(b["x"]), ["scalar", "[B]", "[3, 4]"]),
        (lambda m, b: mean_loss(m, b).item(), ["float"]),
        (lambda m, b: None, ["NoneType"]),
        (lambda m, b: each_loss(m, b)[:0], ["[0]"]),
        (lambda m, b: (mean_loss(m, b),), ["tuple"]),
    ],
)
def test_losses_of_another_kind(gen, gradients, loss_fn, words):
    pruner = OBSPruner(Net(plain), config(gradients=gradients))
    with pytest.raises(ConfigError) as caught:
        pruner.collect(data(gen, 6), loss_fn)
    for word in words:
        assert word in str(caught.value)
    assert all(layer.num_grads == 0 for layer in pruner.layers)


@pytest.mark.parametrize("gradients", ["sample", "batch"])
def test_a_loss_that_reaches_no_pruned_layer(gen, gradients):
    """It depends on a parameter, but on none that is pruned: not one gradient came."""
    model = Net(plain)
    model.scale = nn.Parameter(torch.ones(()))

    def loss_fn(m, batch):
        with torch.no_grad():
            out = m(batch["x"])
        return (out * m.scale).square().sum(1)

    pruner = OBSPruner(model, config(gradients=gradients))
    with pytest.raises(ConfigError):
        pruner.collect(data(gen, 6), loss_fn)

    def cut(m, batch):
        return (m(batch["x"]).detach() * m.scale).square().sum(1)

    pruner = OBSPruner(model, config(gradients=gradients))
    with pytest.raises(ConfigError):
        pruner.collect(data(gen, 6), cut)


@pytest.mark.parametrize("loss_fn", [mean_loss, each_loss])
@pytest.mark.parametrize("before", [False, True])
def test_no_layer_is_called_with_gradients(gen, loss_fn, before):
    model, batches = Net(plain), data(gen, 6)
    model.scale = nn.Parameter(torch.ones(()))
    pruner = OBSPruner(model, config())
    if before:
        pruner.collect(batches, loss_fn)

    def cut(m, batch):
        with torch.no_grad():
            out = m(batch["x"])
        return loss_fn(lambda _: out * m.scale, batch)

    with pytest.raises(ConfigError, match="reaches no selected layer"):
        pruner.collect(batches, cut)
    assert [layer.num_grads for layer in pruner.layers] == [6 * before] * 3


class Positive(nn.Linear):
    """Linear where all is positive, and its backward reads the output that it returned."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


@pytest.mark.parametrize("kind", ["subclass", "hook", "own forward"])
def test_an_output_that_backward_reads_is_not_changed_in_place(gen, kind):
    """Memory may be shared with the output of a plain linear only: here somebody else holds it."""
    torch.manual_seed(1)
    inner = Positive(6, 4, bias=False) if kind == "subclass" else nn.Linear(6, 4, bias=False)
    inner.weight.data.abs_()
    model = nn.Sequential(inner)
    batch = {"x": torch.rand(3, 5, 6, generator=gen), "y": torch.rand(3, 5, 4, generator=gen)}
    if kind == "hook":
        inner.register_forward_hook(lambda module, args, output: F.relu(output))
    elif kind == "own forward":
        inner.forward = lambda x: F.relu(F.linear(x, inner.weight))

    def in_place(m, b):
        return (m(b["x"]).mul_(-1.0) - b["y"]).square().sum((1, 2))

    pruner = OBSPruner(model, config(targets=(type(inner).__name__,)))
    pruner.collect([batch], in_place)
    plain_model = nn.Sequential(nn.Linear(6, 4, bias=False))
    plain_model[0].weight.data = inner.weight.data
    wanted = fishers_by_loop(
        plain_model, split(batch), lambda m, b: (-m(b["x"]) - b["y"]).square().sum((1, 2)), ["0.weight"]
    )
    assert_close(pruner.fishers(), wanted)


def test_the_batch_must_come_first(gen):
    """Rows of the input are tokens of all samples: [B * T, C], or [T, B, C]."""
    flat = Net(lambda net, x: net.c(net.b(net.a(x.flatten(0, 1)))).unflatten(0, x.shape[:2]))
    turned = Net(lambda net, x: net.c(net.b(net.a(x.transpose(0, 1)))).transpose(0, 1))
    for model in (flat, turned):
        batches = data(gen, 5, 6)
        pruner = OBSPruner(model, config())
        with pytest.raises(
            ShapeNotSupportedError,
            match=r"a: input has (15|5) rows for 3 samples.*first.*gradients='batch'",
        ):
            pruner.collect(batches, each_loss)
        assert all(layer.num_grads == 0 for layer in pruner.layers)
        by_batch = OBSPruner(model, config(gradients="batch"))
        by_batch.collect(batches, each_loss)
        assert_close(
            by_batch.fishers(), fishers_by_loop(model, batches, mean_loss, ["a.weight", "b.weight", "c.weight"])
        )


def test_the_batch_must_come_first_with_a_mean_loss(gen):
    """The number of samples cannot be read off a scalar, but layers that disagree give it away."""
    model = Net(lambda net, x: net.c(net.b(net.a(x)).flatten(0, 1)).unflatten(0, x.shape[:2]))
    pruner = OBSPruner(model, config())
    with pytest.raises(ShapeNotSupportedError, match="c: input has 15 rows for 3 samples"):
        pruner.collect(data(gen, 5, 6), mean_loss)


def test_flattened_tokens_with_a_mean_loss_are_not_taken_for_samples(gen):
    """All layers agree on B * T rows; the batch itself says B."""
    model = Net(lambda net, x: net.c(net.b(net.a(x.flatten(0, 1)))).unflatten(0, x.shape[:2]))
    batches = data(gen, 5, 6)
    pruner = OBSPruner(model, config())
    try:
        pruner.collect(batches, mean_loss)
    except ShapeNotSupportedError:
        return
    wanted = fishers_by_loop(
        model, [s for b in batches for s in split(b)], each_loss, ["a.weight", "b.weight", "c.weight"]
    )
    assert_close(pruner.fishers(), wanted)


def test_keyword_input(gen):
    model = Net(lambda net, x: net.c(net.b(input=F.gelu(net.a(x)))))
    batches = data(gen, 6)
    pruner = OBSPruner(model, config())
    pruner.collect(batches, mean_loss)
    wanted = fishers_by_loop(
        model, [s for b in batches for s in split(b)], mean_loss, ["a.weight", "b.weight", "c.weight"]
    )
    assert_close(pruner.fishers(), wanted)


@pytest.mark.parametrize("also_called", [False, True])
def test_a_weight_used_outside_of_its_module(gen, also_called):
    """``F.linear(x, layer.weight)`` passes no hook: the gradient must be right, or refused, never a part of it."""

    def forward(net, x):
        y = F.gelu(net.a(x))
        y = F.linear(net.b(y) if also_called else y, net.b.weight)
        return net.c(y)

    model, batches = Net(forward), data(gen, 6)
    pruner = OBSPruner(model, config())
    try:
        pruner.collect(batches, mean_loss)
    except (ConfigError, ShapeNotSupportedError) as error:
        assert "b" in str(error)
        return
    wanted = fishers_by_loop(
        model, [s for b in batches for s in split(b)], mean_loss, ["a.weight", "b.weight", "c.weight"]
    )
    assert_close(pruner.fishers(), wanted)


def test_a_module_that_is_not_called_through_linear(gen):
    """A custom module with a matrix as its weight may be a target in batch mode."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 6))

        def forward(self, x):
            return 2.0 * x @ self.weight.T

    model = nn.Sequential(Scaled())
    batches = data(gen, 6)
    pruner = OBSPruner(model, config(targets=("Scaled",), gradients="batch"))
    pruner.collect(batches, mean_loss)
    assert_close(pruner.fishers(), fishers_by_loop(model, batches, mean_loss, ["0.weight"]))
    pruner = OBSPruner(model, config(targets=("Scaled",)))
    try:
        pruner.collect(batches, mean_loss)
    except (ConfigError, ShapeNotSupportedError):
        return
    assert_close(
        pruner.fishers(), fishers_by_loop(model, [s for b in batches for s in split(b)], mean_loss, ["0.weight"])
    )
