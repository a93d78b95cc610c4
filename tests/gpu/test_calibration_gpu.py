# SPDX-License-Identifier: Apache-2.0
"""Calibration on a GPU: the Fisher of a CPU, one wait of the host a batch, and memory as planned."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from obs_kernels import OBSConfig, OBSPruner
from obs_kernels.errors import NonFiniteGradientError
from obs_kernels.pruning import gradient_buffer
from obs_kernels.pruning.finite import Readings, is_safe
from obs_kernels.pruning.phase_times import PhaseTimes

pytestmark = pytest.mark.gpu

TOLERANCE = {"f32": 1e-3, "bf16": 0.1, "f16": 0.05, "autocast": 0.1}
"""RMS error / RMS of F against a CPU in f32: half precision carries 8 or 11 bits through the model, squared in F."""
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "autocast": torch.float32}


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """f32 products in f32, whatever ran before."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def config(**changes) -> OBSConfig:
    return OBSConfig(**({"pattern": "2:4", "fisher_block_size": 16, "num_grads": 1000, "curvature": "block"} | changes))


def tiny_bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    return transformers.BertForQuestionAnswering(
        transformers.BertConfig(
            vocab_size=60,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=48,
        )
    )


def bert_batches(gen: torch.Generator, *, padded: bool, sizes: tuple[int, ...] = (8, 5, 8)) -> list[dict[str, Tensor]]:
    batches = []
    for size in sizes:
        lengths = torch.randint(8, 49, (size,), generator=gen) if padded else torch.full((size,), 48)
        mask = torch.arange(48) < lengths[:, None]
        batches.append(
            {
                "input_ids": torch.randint(1, 60, (size, 48), generator=gen),
                "attention_mask": mask.long(),
                "token_type_ids": torch.zeros(size, 48, dtype=torch.long),
                "start_positions": torch.randint(8, (size,), generator=gen),
                "end_positions": torch.randint(8, (size,), generator=gen),
            }
        )
    return batches


def rms(found: Tensor, wanted: Tensor) -> float:
    return float((found.double().cpu() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", list(TOLERANCE))
@pytest.mark.parametrize("rows", [128, 4])
def test_fisher_equals_that_of_a_cpu(gen, monkeypatch, kind, padded, rows):
    from obs_kernels.training.squad_batches import squad_loss

    monkeypatch.setattr(gradient_buffer, "MAX_ROWS", rows)
    model, batches = tiny_bert(), bert_batches(gen, padded=padded)
    on_gpu = copy.deepcopy(model).to("cuda", DTYPES[kind])

    def loss_fn(m: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=kind == "autocast"):
            return squad_loss(m, batch)

    made: list[torch.dtype] = []
    real = gradient_buffer._new_rows
    monkeypatch.setattr(gradient_buffer, "_new_rows", lambda s, d, *a, **k: made.append(d) or real(s, d, *a, **k))
    pruner, reference = OBSPruner(on_gpu, config()), OBSPruner(model, config())
    assert pruner.collect(batches, loss_fn) == 21
    assert set(made) == {torch.bfloat16 if kind in ("bf16", "autocast") else torch.float32}
    reference.collect(batches, squad_loss)
    wanted = reference.fishers()
    for name, found in pruner.fishers().items():
        assert found.is_cuda and found.dtype == torch.float32
        assert rms(found, wanted[name]) < TOLERANCE[kind], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_integer_gradients_are_exact(gen, monkeypatch, dtype):
    """Any order of the sums, any S: small integers are exact in every dtype on the way."""
    model = nn.Sequential(nn.Linear(32, 16, bias=False), nn.Linear(16, 8, bias=False))
    for module in model:
        module.weight.data = torch.randint(-1, 2, module.weight.shape, generator=gen).float()
    batches = [
        {
            "x": torch.randint(-1, 2, (6, 3, 32), generator=gen).float(),
            "dy": torch.randint(-1, 2, (6, 3, 8), generator=gen).float(),
        }
        for _ in range(4)
    ]

    def loss_fn(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
        kind = next(m.parameters()).dtype
        return (m(b["x"].to(kind)).float() * b["dy"]).sum((1, 2))

    reference = OBSPruner(copy.deepcopy(model), config(pattern="unstructured:0.5"))
    reference.collect(batches, loss_fn)
    for rows in (128, 16, 4, 1):
        monkeypatch.setattr(gradient_buffer, "MAX_ROWS", rows)
        pruner = OBSPruner(copy.deepcopy(model).to("cuda", dtype), config(pattern="unstructured:0.5"))
        pruner.collect(batches, loss_fn)
        for mine, theirs in zip(pruner.layers, reference.layers, strict=True):
            assert torch.equal(mine.fisher_sum.cpu(), theirs.fisher_sum)


class Syncs:
    """Counts what waits for the device, by torch's own debug mode."""

    def __enter__(self) -> Syncs:
        self._caught = warnings.catch_warnings(record=True)
        self._found = self._caught.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(self, *error: object) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self._caught.__exit__(*error)

    @property
    def count(self) -> int:
        return sum("synchronizing CUDA operation" in str(w.message) for w in self._found)


@pytest.mark.parametrize("gradients", ["sample", "batch"])
@pytest.mark.parametrize("padded", [False, True])
def test_one_wait_a_batch(gen, monkeypatch, gradients, padded):
    """Of the batch in which the buffer is full, too, and of the first; batches come from the host."""
    monkeypatch.setattr(gradient_buffer, "MAX_ROWS", 8)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)).cuda().bfloat16()
    mask = torch.ones(4, 6)
    if padded:
        mask[1, 3:] = 0
    batches = [{"x": torch.randn(4, 6, 32, generator=gen), "attention_mask": mask} for _ in range(5)]

    def loss_fn(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
        return m(b["x"].bfloat16()).float().square().mean((1, 2))

    OBSPruner(model, config()).collect(batches, loss_fn)  # libraries load
    pruner = OBSPruner(model, config(gradients=gradients))
    with Syncs() as one:
        pruner.collect(batches[:1], loss_fn)
    with Syncs() as six:
        pruner.collect([*batches, batches[0]], loss_fn)
    # what a call costs beside its batches (the random state, free memory) cancels
    assert six.count - one.count == 5
    with Syncs() as proof:
        float(torch.ones((), device="cuda"))
    assert proof.count == 1


def test_a_mask_on_the_device_costs_no_wait(gen):
    model = nn.Sequential(nn.Linear(32, 32)).cuda()
    batch = {"x": torch.randn(4, 6, 32, generator=gen).cuda(), "attention_mask": torch.ones(4, 6, device="cuda")}

    def loss_fn(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
        return m(b["x"]).square().mean((1, 2))

    pruner = OBSPruner(model, config())
    pruner.collect([batch], loss_fn)
    with Syncs() as one:
        pruner.collect([batch], loss_fn)
    with Syncs() as three:
        pruner.collect([batch] * 3, loss_fn)
    assert three.count - one.count == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 33, 1000, 1_000_003])
def test_the_largest_magnitude_shows_every_bad_value(gen, dtype, size):
    """A maximum on a GPU must keep NaN, in every lane and block."""
    values = torch.randn(size, generator=gen).to("cuda", dtype)
    readings = Readings()
    clean = readings.add_largest(values)
    places = []
    for bad in (float("nan"), float("inf"), -float("inf")):
        for at in {0, size // 3, size // 2, size - 1}:
            spoiled = values.clone()
            spoiled[at] = bad
            places.append(readings.add_largest(spoiled))
    found = readings.read()
    assert found[clean] == float(values.abs().max())
    assert not any(is_safe(found[place]) for place in places)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bad_batch_is_named_and_leaves_the_fisher(gen, dtype, value):
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)).to("cuda", dtype)
    batches = [torch.randn(4, 6, 32, generator=gen).to(dtype) for _ in range(3)]
    bad = batches[1].clone()
    bad[2, 3, 5] = value

    def loss_fn(m: nn.Module, x: Tensor) -> Tensor:
        return m(x).float().square().mean((1, 2))

    pruner, clean = OBSPruner(model, config()), OBSPruner(model, config())
    with pytest.raises(NonFiniteGradientError, match=r"0: \d+ NaN or Inf in the gradients of batch 1"):
        pruner.collect([batches[0], bad, batches[2]], loss_fn)
    clean.collect(batches[:1], loss_fn)
    assert [one.num_grads for one in pruner.layers] == [4, 4]
    assert all(torch.equal(clean.fishers()[k], v) for k, v in pruner.fishers().items())


def test_global_flags_and_random_state_stay(gen):
    model = nn.Sequential(nn.Linear(32, 32)).cuda().bfloat16()
    batch = torch.randn(4, 6, 32, generator=gen).bfloat16()
    flags = torch.backends.cuda.matmul
    names = ("allow_tf32", "allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before, state = [getattr(flags, name) for name in names], torch.cuda.get_rng_state()
    OBSPruner(model, config()).collect(
        [batch], lambda m, x: nn.functional.dropout(m(x), 0.5, True).float().square().mean((1, 2))
    )
    assert [getattr(flags, name) for name in names] == before and torch.equal(torch.cuda.get_rng_state(), state)


# memory


WIDE, DEPTH = 1024, 24


def stack(dtype: torch.dtype) -> nn.Sequential:
    """Many equal layers and few tokens: Fisher and buffer are nearly all of the memory."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDE, WIDE, bias=False) for _ in range(DEPTH))).to("cuda", dtype)


def stack_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).float().square().mean((1, 2))


def stack_batches(dtype: torch.dtype, count: int) -> list[Tensor]:
    gen = torch.Generator().manual_seed(5)
    return [torch.randn(8, 4, WIDE, generator=gen).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [16, 64])
def test_peak_memory_is_as_planned(dtype, size):
    """promises.md, row 15: within 20 %."""
    model = stack(dtype)
    pruner = OBSPruner(model, config(fisher_block_size=size))
    plan = pruner.plan()
    if plan.num_groups > 1:
        pytest.skip("this GPU has too little free memory for one group")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    pruner.collect(stack_batches(dtype, 20), stack_loss)
    peak = torch.cuda.max_memory_allocated() - before
    assert abs(peak - plan.peak_bytes) <= 0.2 * plan.peak_bytes, (peak, plan.peak_bytes)
    # and the buffer's memory is free again
    assert torch.cuda.memory_allocated() - before <= 1.05 * plan.fisher_bytes


@pytest.fixture
def capped() -> Iterator[object]:
    """A cap on torch's share of the GPU, in bytes above what is allocated now."""
    total = torch.cuda.get_device_properties(0).total_memory

    def cap(extra: int) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + extra) / total)

    yield cap
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def test_out_of_memory_halves_the_buffer(monkeypatch, capped):
    """Free memory says 128 rows, torch may take 40 of them: S shrinks on the way, and no gradient is lost."""
    model = stack(torch.bfloat16)
    batches = stack_batches(torch.bfloat16, 20)
    whole = OBSPruner(model, config())
    whole.collect(batches, stack_loss)
    wanted = {k: v.cpu() for k, v in whole.fishers().items()}
    for one in whole.layers:
        one.clear()
    sizes: list[int] = []
    real = gradient_buffer._new_rows
    monkeypatch.setattr(gradient_buffer, "_new_rows", lambda s, *a, **k: sizes.append(s[0]) or real(s, *a, **k))
    pruner = OBSPruner(model, config())
    row = DEPTH * WIDE * WIDE * 2
    working = 1 << 30  # batch, products of the first comparison, and what the op needs of its own
    capped(pruner.plan().fisher_bytes + 40 * row + working)
    assert pruner.collect(batches, stack_loss) == 160
    assert sizes[0] == 128 and sizes[-1] < 128
    for name, found in pruner.fishers().items():
        assert rms(found, wanted[name]) < 1e-5, name


def test_memory_is_flat_over_batches():
    model = stack(torch.bfloat16)
    pruner = OBSPruner(model, config())
    batches = stack_batches(torch.bfloat16, 4)
    pruner.collect(batches, stack_loss)
    torch.cuda.synchronize()
    after = []
    for _ in range(3):
        pruner.collect(batches, stack_loss)
        torch.cuda.synchronize()
        after.append(torch.cuda.memory_allocated())
    assert len(set(after)) == 1


def test_phases_sum_to_the_whole():
    model = stack(torch.bfloat16)
    batches = stack_batches(torch.bfloat16, 20)
    OBSPruner(model, config()).collect(batches, stack_loss)
    timings = PhaseTimes(torch.device("cuda"))
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in "ab")
    start.record()
    OBSPruner(model, config()).collect(batches, stack_loss, timings=timings)
    stop.record()
    seconds = timings.device_seconds()
    stop.synchronize()
    whole = start.elapsed_time(stop) / 1e3
    assert all(seconds[name] > 0 for name in ("forward", "backward", "check", "product", "accumulate"))
    assert sum(seconds.values()) <= 1.01 * whole
