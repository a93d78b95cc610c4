# SPDX-License-Identifier: Apache-2.0
"""Buffered gradients: whatever S, dtype, memory or interruption, the Fisher that is read holds each of them once."""

from __future__ import annotations

import ast
import gc
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from obs_kernels import OBSConfig, OBSPruner
from obs_kernels.errors import ConfigError, MemoryBudgetError, NonFiniteGradientError
from obs_kernels.pruning import calibration, finite, gradient_buffer, layer, samples
from obs_kernels.pruning.gradient_buffer import GradientBuffer, buffer_room, choose_rows, row_dtype
from obs_kernels.pruning.phase_times import PHASES, PhaseTimes

PACKAGE = Path(layer.__file__).parent.parent
SIZES = [1, 2, 3, 5, 8, 128]
D = 8


def config(**changes) -> OBSConfig:
    values = {"pattern": "unstructured:0.5", "fisher_block_size": D, "num_grads": 1000, "ignore": ()}
    return OBSConfig(**(values | changes))


def make_model(wide: int = 6) -> nn.Sequential:
    """Integer weights without bias; 5 x 6 and 3 x 5 do not fill their last block of 8."""
    gen = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(wide, 5, bias=False), nn.Linear(5, 3, bias=False))
    for module in model:
        module.weight.data = torch.randint(-2, 3, module.weight.shape, generator=gen).float()
        module.weight.data[0, 0] = 1.0
    return model


def make_batches(sizes: tuple[int, ...] = (3, 4, 1, 3), wide: int = 6) -> list[dict[str, Tensor]]:
    gen = torch.Generator().manual_seed(2)
    return [
        {
            "x": torch.randint(-2, 3, (n, 2, wide), generator=gen).float(),
            "dy": torch.randint(-2, 3, (n, 2, 3), generator=gen).float(),
        }
        for n in sizes
    ]


def each_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Linear in the weights of each layer: integer gradients, below 2^24 when squared and summed."""
    return (model(batch["x"]) * batch["dy"]).sum((1, 2))


def exact_sums(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Sums of g g^T in float64, one backward pass a sample."""
    sums: dict[str, Tensor] = {}
    for batch in batches:
        for i in range(len(batch["x"])):
            loss = each_loss(model, {k: v[i : i + 1] for k, v in batch.items()}).sum()
            for (name, _), grad in zip(
                model.named_parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
            ):
                g = grad.double().flatten()
                g = nn.functional.pad(g, (0, -g.numel() % D)).view(-1, D)
                sums[name] = sums.get(name, 0.0) + g[:, :, None] * g[:, None, :]
    return sums


def assert_exact(pruner: OBSPruner, wanted: dict[str, Tensor], count: int) -> None:
    for one in pruner.layers:
        assert one.num_grads == count
        assert torch.equal(one.fisher_sum.double(), wanted[one.parameter_name]), one.name


def backward(model: nn.Module, batch: dict[str, Tensor], i: int) -> None:
    model.zero_grad()
    each_loss(model, {k: v[i : i + 1] for k, v in batch.items()}).sum().backward()


def count_flushes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every call of the op, as they come."""
    rows: list[int] = []
    real = layer.accumulate_fisher_

    def counting(fisher: Tensor, grads: Tensor, *, scale: float) -> Tensor:
        rows.append(grads.shape[0])
        return real(fisher, grads, scale=scale)

    monkeypatch.setattr(layer, "accumulate_fisher_", counting)
    return rows


@pytest.fixture
def bf16_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dtype rule of a GPU on this machine."""

    def rule(gradient: torch.dtype, device: torch.device) -> torch.dtype:
        return row_dtype(gradient, torch.device("cuda"))

    for module in (gradient_buffer, samples, calibration):
        monkeypatch.setattr(module, "row_dtype", rule)


# the result does not depend on S


@pytest.mark.parametrize("rows", SIZES)
def test_integer_gradients_are_summed_exactly(monkeypatch, rows):
    monkeypatch.setattr(gradient_buffer, "MAX_ROWS", rows)
    model, batches = make_model(), make_batches()
    pruner = OBSPruner(model, config())
    assert pruner.collect(batches, each_loss) == 11
    assert_exact(pruner, exact_sums(model, batches), 11)


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("on_unsupported", ["skip", "pad"])
def test_padded_layers(monkeypatch, rows, on_unsupported):
    """Columns that no weight has are zero in every row, also in rows that are filled a second time."""
    monkeypatch.setattr(gradient_buffer, "MAX_ROWS", rows)
    model, batches = make_model(wide=16), make_batches(wide=16)
    pruner = OBSPruner(model, config(pattern="2:8", on_unsupported=on_unsupported))
    pruner.collect(batches, each_loss)
    assert [one.padded for one in pruner.layers] == [(5, 16), (3, 8)][: len(pruner.layers)]
    for one in pruner.layers:
        total = 0.0
        for batch in batches:
            for i in range(len(batch["x"])):
                loss = each_loss(model, {k: v[i : i + 1] for k, v in batch.items()}).sum()
                g = one.pad(torch.autograd.grad(loss, [one.weight])[0]).reshape(-1, D).double()
                total = total + g[:, :, None] * g[:, None, :]
        assert torch.equal(one.fisher_sum.double(), total)


@pytest.mark.parametrize("rows", SIZES)
def test_bf16_rows_on_a_cpu(monkeypatch, bf16_rows, rows):
    """What a GPU does, with integers that bf16 holds."""
    monkeypatch.setattr(gradient_buffer, "MAX_ROWS", rows)
    model, batches = make_model(), make_batches()
    wanted = exact_sums(model, batches)
    half = make_model().bfloat16()
    batches = [{k: v.bfloat16() for k, v in b.items()} for b in batches]
    made: list[torch.dtype] = []
    real = gradient_buffer._new_rows
    monkeypatch.setattr(gradient_buffer, "_new_rows", lambda s, d, *a, **k: made.append(d) or real(s, d, *a, **k))
    pruner = OBSPruner(half, config())
    pruner.collect(batches, each_loss)
    assert set(made) == {torch.bfloat16}
    assert_exact(pruner, wanted, 11)


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_models_on_a_cpu(monkeypatch, dtype, rows):
    """Products and rows in f32 (of float64: in itself); what is converted is of the right samples."""
    monkeypatch.setattr(gradient_buffer, "MAX_ROWS", rows)
    wanted = exact_sums(make_model(), make_batches())
    pruner = OBSPruner(make_model().to(dtype), config())
    batches = [{k: v.to(dtype) for k, v in b.items()} for b in make_batches()]
    pruner.collect(batches, each_loss)
    assert_exact(pruner, wanted, 11)
    for one in pruner.layers:  # one layer: its input is the one that was converted last
        one.clear()
        pruner.collect(batches, each_loss, layers=[one.name])
    assert_exact(pruner, wanted, 11)


def test_a_dtype_that_changes_on_the_way(monkeypatch, bf16_rows):
    """f32, then bf16 under autocast, then f32 again: rows of another dtype are new rows, and none are lost."""
    model, batches = make_model(), make_batches()
    half = iter([False, True, True, False])

    def loss_fn(m: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=next(half)):
            return each_loss(m, batch)

    pruner = OBSPruner(model, config())
    flushes = count_flushes(monkeypatch)
    pruner.collect(batches, loss_fn)
    assert_exact(pruner, exact_sums(model, batches), 11)
    assert flushes == [3, 3, 5, 5, 3, 3]


def test_rows_of_ambient_autocast(monkeypatch):
    """An autocast around collect must not reach our own products."""
    model, batches = make_model(), make_batches()
    gen = torch.Generator().manual_seed(3)
    for batch in batches:
        batch["x"] += torch.rand(batch["x"].shape, generator=gen)
    results = []
    for ambient in (False, True):
        pruner = OBSPruner(model, config())

        def loss_fn(m, b):
            with torch.autocast("cpu", enabled=False):
                return each_loss(m, b)

        with torch.autocast("cpu", torch.bfloat16, enabled=ambient):
            pruner.collect(batches, loss_fn)
        results.append(pruner.fishers())
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


@pytest.mark.parametrize(
    ("gradient", "device", "wanted"),
    [
        (torch.bfloat16, "cuda", torch.bfloat16),
        (torch.bfloat16, "cpu", torch.float32),
        (torch.float16, "cuda", torch.float32),
        (torch.float16, "cpu", torch.float32),
        (torch.float32, "cuda", torch.float32),
        (torch.float64, "cuda", torch.float32),
    ],
)
def test_dtype_of_the_rows(gradient, device, wanted):
    assert row_dtype(gradient, torch.device(device)) == wanted


def test_float64_is_rounded_once():
    """x = 1e200 and dy = 1e-200 have a product of 1; in f32 they are Inf and 0."""
    model = nn.Sequential(nn.Linear(2, 4, bias=False)).double()
    batch = {"x": torch.full((3, 2), 1e200, dtype=torch.float64), "dy": torch.full((3, 4), 1e-200, dtype=torch.float64)}
    pruner = OBSPruner(model, config())
    pruner.collect([batch], lambda m, b: (m(b["x"]) * b["dy"]).sum(1))
    assert torch.allclose(pruner.layers[0].fisher_sum, torch.full((1, 8, 8), 3.0), rtol=1e-6)


# whoever reads sees all of it


READERS: dict[str, Callable[[OBSPruner], dict[str, Tensor]]] = {
    "fishers": lambda p: {k: v * 3 for k, v in p.fishers().items()},
    "state_dict": lambda p: {f"{k}.weight": v for k, v in p.state_dict()["fisher_sums"].items()},
    "fisher_sum": lambda p: {x.parameter_name: x.fisher_sum for x in p.layers},
    "mean_fisher": lambda p: {x.parameter_name: x.mean_fisher() * 3 for x in p.layers},
}


@pytest.mark.parametrize("reader", list(READERS))
def test_readers_see_what_waits(monkeypatch, reader):
    model, (batch,) = make_model(), make_batches((3,))
    pruner = OBSPruner(model, config())
    flushes = count_flushes(monkeypatch)
    for i in range(3):
        backward(model, batch, i)
        pruner.accumulate()
    assert [one.num_grads for one in pruner.layers] == [3, 3] and not flushes
    wanted = exact_sums(model, [batch])
    found = READERS[reader](pruner)
    assert flushes == [3, 3]
    assert all(torch.allclose(found[k].double(), wanted[k], rtol=1e-6) for k in wanted)
    assert_exact(pruner, wanted, 3)
    assert flushes == [3, 3]  # and they are not added again


def test_prune_sees_what_waits():
    results = []
    for early in (False, True):
        model = make_model()
        pruner = OBSPruner(model, config())
        (batch,) = make_batches((3,))
        for i in range(3):
            backward(model, batch, i)
            pruner.accumulate()
            if early:
                pruner.fishers()
        assert pruner.prune().num_grads == 3
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_nobody_else_reaches_the_sum():
    """``_sum`` is read by PrunedLayer alone, and there outside of ``fisher_sum`` only where nothing may be added."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                for node in ast.walk(function):
                    if isinstance(node, ast.Attribute) and node.attr == "_sum":
                        found.add((path.name, function.name))
    assert found == {
        *(("layer.py", name) for name in ("fisher_sum", "has_fisher", "allocate", "drop_empty", "set_fisher")),
        ("row_layer.py", "move_origin"),  # between processes, when all have added
    }


def test_state_between_two_accumulate_calls_can_be_resumed():
    model, (batch,) = make_model(), make_batches((4,))
    one = OBSPruner(model, config())
    for i in range(2):
        backward(model, batch, i)
        one.accumulate()
    two = OBSPruner(model, config())
    backward(model, batch, 0)
    two.accumulate()  # replaced by the state
    two.load_state_dict(one.state_dict())
    for pruner in (one, two):
        for i in range(2, 4):
            backward(model, batch, i)
            pruner.accumulate()
        assert_exact(pruner, exact_sums(model, [batch]), 4)


def test_set_fishers_replaces_what_waits():
    model, (batch,) = make_model(), make_batches((2,))
    pruner, other = OBSPruner(model, config()), OBSPruner(model, config())
    other.collect([batch], each_loss)
    backward(model, batch, 0)
    pruner.accumulate()
    pruner.set_fishers(other.fishers(), 2)
    assert_exact(pruner, exact_sums(model, [batch]), 2)


def test_a_second_stage_starts_empty():
    """Gradients that wait when the Fisher is dropped are dropped with it."""
    model, (batch,) = make_model(), make_batches((3,))
    pruner = OBSPruner(model, config(recomputations=2, method="magnitude", update="none"))
    backward(model, batch, 0)
    pruner.accumulate()
    pruner.prune()
    assert [one.num_grads for one in pruner.layers] == [0, 0] and not any(one.has_fisher for one in pruner.layers)
    backward(model, batch, 1)
    pruner.accumulate()
    pruner.collect([{k: v[2:] for k, v in batch.items()}], each_loss)
    assert_exact(pruner, exact_sums(model, [{k: v[1:] for k, v in batch.items()}]), 2)


def test_collect_of_a_part_between_accumulate_calls():
    model, (batch,) = make_model(), make_batches((4,))
    pruner = OBSPruner(model, config())
    backward(model, batch, 0)
    pruner.accumulate()
    for name in ("0", "1"):
        pruner.collect([{k: v[1:3] for k, v in batch.items()}], each_loss, layers=[name])
    backward(model, batch, 3)
    pruner.accumulate()
    assert_exact(pruner, exact_sums(model, [batch]), 4)


# one pass over the Fisher for S gradients


def test_one_accumulation_for_s_gradients(monkeypatch):
    monkeypatch.setattr(gradient_buffer, "MAX_ROWS", 8)
    flushes = count_flushes(monkeypatch)
    pruner = OBSPruner(make_model(), config())
    pruner.collect(make_batches((4, 4, 4, 3)), each_loss)
    assert flushes == [8, 8, 7, 7]
    flushes.clear()
    pruner.collect(make_batches((3, 3, 3, 10)), each_loss)  # 3 + 3 of 8; whole batches where they fit
    assert flushes == [6, 6, 3, 3, 8, 8, 2, 2]


def test_manual_gradients_are_buffered(monkeypatch):
    monkeypatch.setattr(gradient_buffer, "MAX_ROWS", 4)
    flushes = count_flushes(monkeypatch)
    model, (batch,) = make_model(), make_batches((10,))
    pruner = OBSPruner(model, config())
    for i in range(10):
        backward(model, batch, i)
        pruner.accumulate()
    assert flushes == [4, 4, 4, 4]
    assert_exact(pruner, exact_sums(model, [batch]), 10)
    assert flushes == [4, 4, 4, 4, 2, 2]


def test_rows_are_freed_when_collect_returns(monkeypatch):
    made = []
    real = gradient_buffer._new_rows

    def spy(*args, **kwargs):
        rows = real(*args, **kwargs)
        made.append(weakref.ref(rows))
        return rows

    monkeypatch.setattr(gradient_buffer, "_new_rows", spy)
    pruner = OBSPruner(make_model(), config())
    for failing in (False, True):

        def loss_fn(m, b, failing=failing):
            if failing and len(b["x"]) == 1:
                raise KeyError
            return each_loss(m, b)

        try:
            pruner.collect(make_batches(), loss_fn)
        except KeyError:
            assert failing
        gc.collect()
        assert len(made) == 2 * (1 + failing) and all(ref() is None for ref in made)
        assert all(one._buffer is None for one in pruner.layers)
    assert_exact(pruner, exact_sums(pruner.model, make_batches() + make_batches()[:2]), 18)


# errors on the way


def interrupted_writes(monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException) -> None:
    """Raise ``error`` once, in the middle of product number ``at``."""
    real, calls = samples.Samples.write, iter(range(10**6))

    def write(self, one, out: Tensor, part: slice) -> None:
        if next(calls) == at:
            out.fill_(float("nan"))
            raise error
        real(self, one, out, part)

    monkeypatch.setattr(samples.Samples, "write", write)


@pytest.mark.parametrize("at", range(8))
@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_product_leaves_whole_batches(monkeypatch, at, kind):
    interrupted_writes(monkeypatch, at, kind())
    model, batches = make_model(), make_batches()
    pruner = OBSPruner(model, config())
    with pytest.raises(kind):
        pruner.collect(batches, each_loss)
    whole = batches[: at // 2]
    assert [one.num_grads for one in pruner.layers] == [sum(len(b["x"]) for b in whole)] * 2
    if whole:
        assert_exact(pruner, exact_sums(model, whole), pruner.layers[0].num_grads)
    else:
        with pytest.raises(ConfigError, match="no gradients"):
            pruner.fishers()
    count = pruner.layers[0].num_grads
    pruner.collect(batches, each_loss)
    assert_exact(pruner, exact_sums(model, whole + batches), count + 11)


@pytest.mark.parametrize("at", range(8))
@pytest.mark.parametrize("rows", [128, 4, 1])
def test_out_of_memory_in_a_product_loses_nothing(monkeypatch, at, rows):
    monkeypatch.setattr(gradient_buffer, "MAX_ROWS", rows)
    interrupted_writes(monkeypatch, at, torch.OutOfMemoryError("test"))
    model, batches = make_model(), make_batches()
    pruner = OBSPruner(model, config())
    if rows == 1:
        with pytest.raises(MemoryBudgetError, match=r"one gradient of 2 layers needs .* did not fit; .*smaller batch"):
            pruner.collect(batches, each_loss)
        assert [one.num_grads for one in pruner.layers] == [at // 2] * 2  # gradients so far, whole for both layers
        if at > 1:
            assert_exact(pruner, first_samples(model, batches, at // 2), at // 2)
        return
    assert pruner.collect(batches, each_loss) == 11
    assert_exact(pruner, exact_sums(model, batches), 11)


def first_samples(model: nn.Module, batches: list[dict[str, Tensor]], count: int) -> dict[str, Tensor]:
    joined = {k: torch.cat([b[k] for b in batches])[:count] for k in batches[0]}
    return exact_sums(model, [joined])


@pytest.mark.parametrize("fitting", [1, 2, 3, 5, 16, 31])
def test_out_of_memory_while_the_buffer_grows_halves_it(monkeypatch, fitting):
    real, tried = gradient_buffer._new_rows, []

    def limited(shape, dtype, device, *, zeros):
        tried.append(shape[0])
        if shape[0] > fitting and shape[1] < 20:  # the second layer's rows: those of the first are there
            raise torch.OutOfMemoryError("test")
        return real(shape, dtype, device, zeros=zeros)

    monkeypatch.setattr(gradient_buffer, "_new_rows", limited)
    model, batches = make_model(), make_batches()
    pruner = OBSPruner(model, config())
    assert pruner.collect(batches, each_loss) == 11
    assert_exact(pruner, exact_sums(model, batches), 11)
    wanted = [2**i for i in range(5, -1, -1)]
    assert list(dict.fromkeys(tried)) == [s for s in wanted if s * 2 > fitting]


def test_a_buffer_that_does_not_fit_at_all(monkeypatch):
    def never(*_, **__):
        raise torch.OutOfMemoryError("test")

    monkeypatch.setattr(gradient_buffer, "_new_rows", never)
    pruner = OBSPruner(make_model(), config())
    with pytest.raises(MemoryBudgetError, match="fewer layers at a time"):
        pruner.collect(make_batches(), each_loss)
    assert [one.num_grads for one in pruner.layers] == [0, 0]


def test_a_fisher_that_does_not_fit_leaves_no_part_of_itself(monkeypatch):
    real = layer.PrunedLayer.allocate

    def limited(self):
        if self.name == "1" and not self.has_fisher:
            raise torch.OutOfMemoryError("test")
        return real(self)

    monkeypatch.setattr(layer.PrunedLayer, "allocate", limited)
    pruner = OBSPruner(make_model(), config())
    with pytest.raises(MemoryBudgetError, match=r"Fisher of 2 layers needs .*lower fisher_block_size"):
        pruner.collect(make_batches(), each_loss)
    assert all(one.fisher_sum is None and one.num_grads == 0 for one in pruner.layers)


@pytest.mark.parametrize("gradients", ["sample", "batch"])
@pytest.mark.parametrize("failing", [1, 3])
def test_out_of_memory_in_the_model_takes_the_buffer_back(monkeypatch, gradients, failing):
    """The batch is done again, with half the rows; without rows to give back the error is the caller's."""
    model, batches = make_model(), make_batches()
    failures = 0

    def loss_fn(m: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        nonlocal failures
        if len(batch["x"]) == 1 and failures < failing:
            failures += 1
            raise torch.OutOfMemoryError("test")
        return each_loss(m, batch)

    sizes, real = [], gradient_buffer._new_rows
    monkeypatch.setattr(gradient_buffer, "_new_rows", lambda s, *a, **k: sizes.append(s[0]) or real(s, *a, **k))
    pruner = OBSPruner(model, config(gradients=gradients))
    if failing == 1:
        pruner.collect(batches, loss_fn)
        assert sizes == [32, 32, 16, 16]
    else:
        with pytest.raises(torch.OutOfMemoryError):
            pruner.collect(batches, loss_fn)
        assert failures == 2  # once with rows, once without
        batches = batches[:2]
    if gradients == "sample":
        assert_exact(pruner, exact_sums(model, batches), sum(len(b["x"]) for b in batches))
    else:
        again = OBSPruner(make_model(), config(gradients=gradients))
        again.collect(batches, each_loss)
        assert all(torch.allclose(again.fishers()[k], v, rtol=1e-6) for k, v in pruner.fishers().items())


def test_a_flush_that_breaks_drops_the_layer_and_nothing_else(monkeypatch):
    """A part of the rows may be in the sum: no Fisher is better than a wrong one."""
    real = layer.accumulate_fisher_
    model, (batch,) = make_model(), make_batches((3,))
    pruner = OBSPruner(model, config())
    pruner.collect([batch], each_loss)
    backward(model, batch, 0)
    pruner.accumulate()

    def broken(fisher: Tensor, grads: Tensor, *, scale: float) -> Tensor:
        real(fisher[:1], grads[:, :D], scale=scale)
        if fisher.shape[0] == pruner.layers[0].num_blocks:
            raise torch.OutOfMemoryError("test")
        return real(fisher[1:], grads[:, D:], scale=scale)

    monkeypatch.setattr(layer, "accumulate_fisher_", broken)
    with pytest.raises(MemoryBudgetError, match=r"^0: out of memory while 1 gradients were added.*lost; collect again"):
        pruner.fishers()
    monkeypatch.setattr(layer, "accumulate_fisher_", real)
    first, second = pruner.layers
    assert (first.num_grads, first.fisher_sum) == (0, None) and second.num_grads == 4
    wanted = exact_sums(model, [batch, {k: v[:1] for k, v in batch.items()}])
    assert torch.equal(second.fisher_sum.double(), wanted["1.weight"])


def test_a_refused_flush_keeps_the_rows(monkeypatch):
    """A backend that cannot run is no reason to lose gradients."""
    model, (batch,) = make_model(), make_batches((3,))
    pruner = OBSPruner(model, config())
    for i in range(3):
        backward(model, batch, i)
        pruner.accumulate()
    monkeypatch.setenv("OBS_KERNELS_BACKEND", "cuda")
    with pytest.raises(ImportError):
        pruner.fishers()
    assert [one.num_grads for one in pruner.layers] == [3, 3]
    monkeypatch.delenv("OBS_KERNELS_BACKEND")
    assert_exact(pruner, exact_sums(model, [batch]), 3)


# S, and what the plan says of it


@pytest.mark.parametrize(
    ("bytes_a_row", "room", "limit", "wanted"),
    [
        (10, 1280, 128, 128),
        (10, 1279, 128, 64),
        (10, 639, 128, 32),
        (10, 0, 128, 1),
        (10, 9, 128, 1),
        (10, 120, 12, 12),  # as many as will come need no power of two
        (10, 119, 12, 8),
        (10, 10**9, 1, 1),
        (0, 5, 3, 3),
    ],
)
def test_choice_of_s(bytes_a_row, room, limit, wanted):
    assert choose_rows(bytes_a_row, room, limit) == wanted


@pytest.mark.parametrize(
    ("num_grads", "device", "wanted"), [(1000, "cuda", 128), (1000, "cpu", 32), (20, "cuda", 20), (20, "cpu", 20)]
)
def test_largest_s(num_grads, device, wanted):
    assert gradient_buffer.most_rows(num_grads, torch.device(device)) == wanted


def test_room_of_a_gpu_is_what_the_fisher_leaves(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(gradient_buffer, "free_bytes", lambda device: 1000)
    assert buffer_room(gpu, 400) == 200 and buffer_room(gpu, 2000) == 0 and buffer_room(gpu, 0, 90) == 30
    assert buffer_room(torch.device("cpu"), 10**15) == gradient_buffer.CPU_BYTES


def test_the_last_bits_do_not_depend_on_groups(monkeypatch):
    """On a CPU S is chosen for the whole model, also where a part is collected."""
    monkeypatch.setattr(gradient_buffer, "CPU_BYTES", 4 * 48 * 4)
    flushes = count_flushes(monkeypatch)
    pruner = OBSPruner(make_model(), config())
    pruner.collect(make_batches((11,)), each_loss)
    together = list(flushes)
    flushes.clear()
    for name in ("0", "1"):
        pruner.collect(make_batches((11,)), each_loss, layers=[name])
    assert together == [4, 4, 4, 4, 3, 3] and flushes == [4, 4, 3] * 2


@pytest.mark.parametrize("budget", [None, 4 * D * D * 4])
@pytest.mark.parametrize("room", [1 << 30, 4 * 48 * 5])
def test_plan_counts_the_buffer(monkeypatch, budget, room):
    monkeypatch.setattr(gradient_buffer, "CPU_BYTES", room)
    real, made = gradient_buffer._new_rows, []

    def spy(*args, **kwargs):
        rows = real(*args, **kwargs)
        made.append(rows.untyped_storage().nbytes())
        return rows

    monkeypatch.setattr(gradient_buffer, "_new_rows", spy)
    pruner = OBSPruner(make_model(), config(num_grads=9), memory_budget=budget)
    plan = pruner.plan()
    assert plan.num_groups == (1 if budget is None else 2)
    groups = [[row.name for row in plan.layers if row.group == g] for g in range(plan.num_groups)]
    peaks = []
    for names, size, rows in zip(groups, plan.buffer_bytes, plan.buffer_rows, strict=True):
        made.clear()
        pruner.collect(make_batches(), each_loss, layers=names)
        assert sum(made) == size and rows == (9 if room > 1000 else 4)
        peaks.append(size + sum(one.fisher_sum.nbytes for one in pruner.layers if one.name in names))
        for one in pruner.layers:
            one.clear()
    assert plan.peak_bytes == max(peaks)
    assert plan.to_dict()["peak_bytes"] == plan.peak_bytes and "buffered" in str(plan)


def test_plan_without_gradients_has_no_buffer():
    plan = OBSPruner(make_model(), config(method="magnitude", update="none")).plan()
    assert plan.peak_bytes == 0 and plan.buffer_rows == () and "buffered" not in str(plan)


# what a batch costs


class Counting(TorchDispatchMode):
    """Ops by name, and those that make a tensor of at least ``large`` elements of their own."""

    def __init__(self, large: int = 1 << 62) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.made: Counter[str] = Counter()
        self.large = large

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.ops[name] += 1
        alias = any(r.alias_info is not None for r in func._schema.returns)
        if isinstance(result, Tensor) and not alias and result.numel() >= self.large and name != "_unsafe_view":
            self.made[name] += 1
        return result


@pytest.mark.parametrize("gradients", ["sample", "batch"])
def test_one_wait_a_batch(monkeypatch, gradients):
    """Every read of the host goes through ``Readings.read``, once a batch, the first one included."""
    reads = []
    real = finite.Readings.read

    def read(self):
        reads.append(1)
        assert not torch.is_autocast_enabled("cpu")  # it would raise what is measured to f32
        return real(self)

    monkeypatch.setattr(finite.Readings, "read", read)
    pruner = OBSPruner(make_model(), config(gradients=gradients))
    batches = make_batches()
    with Counting() as counted, torch.autocast("cpu", torch.bfloat16):
        pruner.collect(batches, each_loss)
    assert len(reads) == len(batches)
    assert counted.ops["_local_scalar_dense"] == 0 and counted.ops["nonzero"] == 0
    backward(pruner.model, batches[0], 0)
    with Counting() as counted, torch.autocast("cpu", torch.bfloat16):
        pruner.accumulate()
    assert len(reads) == len(batches) + 1 and counted.ops["_local_scalar_dense"] == 0


class Attention(nn.Module):
    """Three linears that share their input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x)


def test_no_tensor_of_activations_is_copied(gen):
    """Beside the model's own forward and backward: no scaling, no conversion, no masking, no clone; one product."""
    model = Attention()
    batch = {"x": torch.randn(4, 50, 6, generator=gen), "attention_mask": torch.ones(4, 50)}

    def loss_fn(m, b):
        return m(b["x"]).square().mean()

    pruner = OBSPruner(model, config())
    pruner.collect([batch], loss_fn)  # the first batch is compared with autograd, too
    with Counting(large=4 * 50 * 6) as plain:
        outputs = [m(batch["x"]) for m in (model.q, model.k, model.v)]
        loss = (torch.softmax(outputs[0] @ outputs[1].mT, -1) @ outputs[2]).square().mean().float().sum()
        torch.autograd.grad(loss, outputs)
    with Counting(large=4 * 50 * 6) as ours:
        pruner.collect([batch], loss_fn)
    extra = ours.made - plain.made
    assert set(extra) == {"zeros"}, extra  # the rows
    assert ours.ops["baddbmm_"] == 3
    assert ours.ops["aminmax"] == 1 + 3 + 1  # x once for the three, each dy, the loss


def test_padding_is_masked_once_for_a_shared_input(gen):
    model = Attention()
    mask = torch.ones(4, 50)
    mask[0, 40:] = 0
    batch = {"x": torch.randn(4, 50, 6, generator=gen), "attention_mask": mask}
    pruner = OBSPruner(model, config())
    with Counting() as counted:
        pruner.collect([batch], lambda m, b: m(b["x"]).square().mean((1, 2)))
    assert counted.ops["masked_fill"] == 1 + 3


def test_a_mask_that_is_on_the_device_is_not_read():
    """Whether there is padding, a GPU tensor tells only a host that waits."""
    on_device = {"attention_mask": torch.ones(2, 3, device="meta")}
    assert samples.host_padding(on_device) is None
    assert samples.host_padding({"attention_mask": torch.ones(2, 3)}) is False
    assert samples.host_padding({"attention_mask": torch.tensor([[1, 0], [1, 1]])}) is True
    assert samples.host_padding({"x": torch.ones(2)}) is False and samples.host_padding([1]) is False


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 7, 64, 1000, 40_000])
def test_the_largest_magnitude_shows_every_bad_value(gen, dtype, size):
    values = torch.randn(size, generator=gen).to(dtype)
    readings = finite.Readings()
    places = [readings.add_largest(values), readings.add_largest(values[:0])]
    for bad in (float("nan"), float("inf"), -float("inf")):
        for at in {0, size // 2, size - 1}:
            spoiled = values.clone()
            spoiled[at] = bad
            places.append(readings.add_largest(spoiled))
    found = readings.read()
    assert found[places[0]] == float(values.abs().max()) and found[places[1]] == 0.0
    assert not any(finite.is_safe(found[place]) for place in places[2:])


def test_readings_of_several_dtypes_keep_their_places():
    readings = finite.Readings()
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float32, torch.float16, torch.bfloat16]
    places = [readings.add(torch.tensor(float(i), dtype=dtype)) for i, dtype in enumerate(dtypes)]
    assert [readings.read()[place] for place in places] == [0, 1, 2, 3, 4, 5]
    later = [readings.add(torch.tensor(7.0)), *(readings.add_largest(torch.tensor([1.0, x])) for x in (-8.0, 9.0))]
    assert [readings.read()[place] for place in later] == [7, 8, 9] and readings.read()[places[4]] == 4


def test_bounds_are_of_the_sample_not_of_its_share():
    """9e15 a sample's share of a mean loss is safe, 5000 times that is not: its square is above the f32 maximum."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    pruner = OBSPruner(model, config())
    x = torch.ones(5000, 1)
    with pytest.raises(NonFiniteGradientError, match="0: 1 NaN or Inf in the gradients of batch 0"):
        pruner.collect([x], lambda m, b: m(b).sum() * 9e15)
    pruner.collect([x], lambda m, b: m(b).sum() * 1e14)


def test_batches_of_other_kinds_are_moved_without_a_wait():
    asked = []

    class Encoding(dict):
        def to(self, device, *, non_blocking=False):
            asked.append(non_blocking)
            return self

    class Plain(dict):
        def to(self, device):
            asked.append(None)
            return self

    for batch in (Encoding(x=1), Plain(x=1)):
        assert calibration.move(batch, torch.device("cpu")) is batch
    assert asked == [True, None]


# where the time goes


@pytest.mark.parametrize("gradients", ["sample", "batch"])
def test_timings_of_the_phases(monkeypatch, gradients):
    """Each phase gets what is done in it, and together they are no more than the whole."""
    now = iter(range(10**6))
    monkeypatch.setattr("obs_kernels.pruning.phase_times.time.perf_counter", lambda: next(now))
    timings = PhaseTimes()
    pruner = OBSPruner(make_model(), config(gradients=gradients))
    pruner.collect(make_batches(), each_loss, timings=timings)
    seconds = timings.device_seconds()
    # each block is one tick: five draws (the last finds the end), four batches, one flush
    assert seconds == {"data": 5, "forward": 4, "backward": 4, "check": 4, "product": 4, "accumulate": 1}
    assert tuple(seconds) == PHASES


def test_nothing_is_timed_unasked(monkeypatch):
    def never() -> float:
        raise AssertionError("the clock was read")

    monkeypatch.setattr("obs_kernels.pruning.phase_times.time.perf_counter", never)
    OBSPruner(make_model(), config()).collect(make_batches(), each_loss)


def test_a_buffer_of_its_own():
    """The class without a pruner: rows wait, count for all layers at once, and go where they belong."""
    pruner = OBSPruner(make_model(), config())
    buffer = GradientBuffer(pruner.layers, limit=4)
    dtypes = dict.fromkeys(pruner.layers, torch.float32)

    def write(one, out: Tensor, part: slice) -> None:
        for row, i in enumerate(range(part.start, part.stop)):
            out[row] = i + 1

    buffer.push(3, dtypes, write)
    assert buffer.is_open and [buffer.waiting(one) for one in pruner.layers] == [3, 3]
    assert float(pruner.layers[0].fisher_sum[0, 0, 0]) == 1 + 4 + 9
    assert [buffer.waiting(one) for one in pruner.layers] == [0, 3]
    buffer.push(1, {pruner.layers[0]: torch.float32}, write)  # the second layer gets a zero
    buffer.close()
    assert not buffer.is_open
    assert [float(one.fisher_sum[0, 0, 0]) for one in pruner.layers] == [15, 14]
    assert [one.num_grads for one in pruner.layers] == [4, 4]


def test_an_unreached_layer_gets_zeros_where_others_were_before():
    pruner = OBSPruner(make_model(), config())
    buffer = GradientBuffer(pruner.layers, limit=2)
    dtypes = dict.fromkeys(pruner.layers, torch.float32)
    buffer.push(2, dtypes, lambda one, out, part: out.fill_(3.0))
    buffer.push(1, {pruner.layers[0]: torch.float32}, lambda one, out, part: out.fill_(1.0))
    buffer.close()
    assert [float(one.fisher_sum[0, 0, 0]) for one in pruner.layers] == [19, 18]
