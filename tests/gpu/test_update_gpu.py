# SPDX-License-Identifier: Apache-2.0
"""``obs_update``, ``loss_increase`` and ``block_saliency`` on a GPU, against the reference in f64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fisher_checks import EACH_KERNEL, SIZES, SOME, Guarded, needs, ragged, spd
from tolerances import EPS32, SALIENCY_CONDITIONAL, UPDATE_RMS_F32
from torch import Tensor

from obs_kernels import ops
from obs_kernels.errors import BackendUnavailableError, ConfigError, NonFiniteError, ObsKernelsError, SingularBlockError
from obs_kernels.ops import dispatch

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
MANY = 20_011  # a prime: the last block of threads is never full
BACKENDS = [name for name in dispatch.TABLE["obs_update"] if name != "reference"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

on_each = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture
def gen() -> torch.Generator:
    return torch.Generator(device=DEVICE).manual_seed(20240)


def mixed_mask(gen: torch.Generator, count: int, size: int) -> Tensor:
    """[count * size]: shares from none to all kept, a block each."""
    share = torch.rand(count, 1, generator=gen, device=gen.device) * 1.4 - 0.2
    return (torch.rand(count, size, generator=gen, device=gen.device) < share).flatten()


def problem(gen: torch.Generator, count: int, size: int, condition: float = 1e2) -> tuple[Tensor, Tensor, Tensor]:
    """(weight, fisher, mask) with a short last block where D > 2."""
    end = count * size - size // 3
    weight = torch.randn(count * size, generator=gen, device=gen.device)[:end]
    return weight, spd(gen, count, size, condition), mixed_mask(gen, count, size)[:end]


def assert_update(new: Tensor, weight: Tensor, fisher: Tensor, mask: Tensor, condition: float, **how: object) -> None:
    """Pruned entries +0; RMS error against the reference in f64, the rounding of a half beside."""
    assert new.shape == weight.shape and new.dtype == weight.dtype
    assert not new[~mask].view(torch.int32 if new.dtype == torch.float32 else torch.int16).any()
    how = {name: value.double() if isinstance(value, Tensor) else value for name, value in how.items()}
    exact = ops.obs_update(weight.double(), fisher.double(), mask, backend="reference", **how)  # type: ignore[arg-type]
    rounding = torch.finfo(new.dtype).eps if new.dtype != torch.float32 else 0.0
    bound = max(UPDATE_RMS_F32, 4 * EPS32 * condition) + rounding
    error = (new.double() - exact).square().mean().sqrt()
    assert error <= bound * (exact.square().mean().sqrt() + 1), f"D={fisher.shape[1]}: {error:.3g}"


# values


@on_each
@pytest.mark.parametrize("update", ["joint", "single"])
@pytest.mark.parametrize("condition", [1e2, 1e4])
@pytest.mark.parametrize("size", SIZES)
def test_update_of_sizes_and_counts(
    gen: torch.Generator, backend: str, size: int, condition: float, update: str
) -> None:
    most = MANY if update == "joint" and condition == 1e2 else 1003
    needs(2 + 64 * most * size**2 / 2**30)
    for count in (1, 3, most):
        weight, fisher, mask = problem(gen, count, size, condition)
        before = weight.clone(), fisher.clone(), mask.clone()
        damp = torch.linspace(0.0, 0.5, count, device=DEVICE)
        for value in (0.01, damp):
            new = ops.obs_update(weight, fisher, mask, damp=value, update=update, backend=backend)
            assert_update(new, weight, fisher, mask, condition, damp=value, update=update)
        assert all(torch.equal(a, b) for a, b in zip(before, (weight, fisher, mask), strict=True))
        kept = mask[: mask.numel() // size * size].view(-1, size).all(1).nonzero().flatten().tolist()
        for block in kept[:50]:
            span = slice(block * size, block * size + size)
            assert torch.equal(new[span], weight[span]), "nothing was pruned there"


@on_each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SOME)
def test_update_of_dtypes_shapes_and_strides(gen: torch.Generator, backend: str, size: int, dtype: torch.dtype) -> None:
    weight = torch.randn(size, 42, generator=gen, device=DEVICE).to(dtype).T
    fisher = spd(gen, 42, size, 1e2)
    mask = mixed_mask(gen, 42, size).view(42, size)
    wide = fisher.repeat_interleave(2, 0)[::2]
    for update in ("joint", "single", "none"):
        new = ops.obs_update(weight, wide, mask, damp=0.1, update=update, backend=backend)
        assert new.is_contiguous()
        assert_update(new, weight, fisher, mask, 1e2, damp=0.1, update=update)


@on_each
@pytest.mark.parametrize("size", SIZES)
def test_loss_increase(gen: torch.Generator, backend: str, size: int) -> None:
    needs(2 + 32 * MANY * size**2 / 2**30)
    for dtype in DTYPES:
        change, fisher, _ = problem(gen, MANY if dtype == torch.float32 else 37, size)
        change, damp = change.to(dtype), torch.rand(len(fisher), generator=gen, device=DEVICE)
        for value in (0.0, damp):
            loss = ops.loss_increase(change, fisher, damp=value, backend=backend)
            exact = ops.loss_increase(change.double(), fisher.double(), damp=value, backend="reference")
            assert loss.dtype == torch.float32
            torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)


@on_each
@pytest.mark.parametrize(("size", "block"), [(1, 1), (7, 1), (8, 4), (32, 1), (32, 8), (50, 1), (64, 4), (128, 8)])
def test_block_saliency(gen: torch.Generator, backend: str, size: int, block: int) -> None:
    weight = torch.randn(1003 * size - size // block // 2 * block, generator=gen, device=DEVICE)
    fisher, mask = spd(gen, 1003, size, 1e3), mixed_mask(gen, 1003, size)[: weight.numel()]
    for alive in (None, mask):
        scores = ops.block_saliency(weight, fisher, block, damp=0.01, mask=alive, backend=backend)
        exact = ops.block_saliency(weight.double(), fisher.double(), block, damp=0.01, mask=alive, backend="reference")
        torch.testing.assert_close(scores.double(), exact, rtol=SALIENCY_CONDITIONAL, atol=1e-7)


@pytest.mark.sanitizer
@on_each
@pytest.mark.parametrize("size", EACH_KERNEL)
def test_between_guards(backend: str, size: int) -> None:
    """Bases up to two elements off any alignment, a short last block. The rest of the work is the CPU's.

    First without guards, so that a sanitizer sees each byte beyond.
    """
    cpu = torch.Generator().manual_seed(7)
    weight, fisher, mask = problem(cpu, ragged(size), size)
    damp = torch.linspace(0.01, 0.1, len(fisher))
    for shift, dtype in ((None, torch.float32), (0, torch.float32), (1, torch.float16), (2, torch.bfloat16)):
        cases = [Guarded(t.to(DEVICE), shift) for t in (weight.to(dtype), fisher, mask, damp)]
        w, f, m, d = (case.tensor for case in cases)
        for update in ("joint", "single"):
            new = ops.obs_update(w, f, m, damp=d, update=update, backend=backend).cpu()
            assert_update(new, weight.to(dtype), fisher, mask, 1e2, damp=damp, update=update)
        loss = ops.loss_increase(w, f, damp=d, backend=backend).cpu()
        exact = ops.loss_increase(weight.to(dtype).double(), fisher.double(), damp=damp, backend="reference")
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
        for case in cases[:2] + cases[3:]:
            case.assert_unharmed()


# errors


def texts(run: Callable[[str], object], backend: str) -> list[str]:
    found = []
    for name in ("reference", backend):
        with pytest.raises(ObsKernelsError) as caught:
            run(name)
        found.append(f"{type(caught.value).__name__}: {caught.value}")
    return found


@on_each
@pytest.mark.parametrize("update", ["joint", "single"])
@pytest.mark.parametrize("size", SOME)
def test_refuses_what_the_reference_refuses(gen: torch.Generator, backend: str, size: int, update: str) -> None:
    weight, fisher, mask = problem(gen, 37, size)
    damp = torch.full((37,), 0.1, device=DEVICE)

    def spoilt(name: str, place: tuple[int, ...], value: float, wanted: type[Exception]) -> None:
        given = {"weight": weight.clone(), "fisher": fisher.clone(), "damp": damp.clone()}
        given[name][place] = value

        def run(backend: str) -> None:
            ops.obs_update(given["weight"], given["fisher"], mask, damp=given["damp"], update=update, backend=backend)

        first, second = texts(run, backend)
        assert first == second and first.startswith(wanted.__name__)

    for value in (float("nan"), float("inf"), -float("inf")):
        spoilt("weight", (2 * size,), value, NonFiniteError)
        for place in ((0, 0, 0), (5, 0, size - 1), (36, size - 1, size - 1), (17, size // 2, 0)):
            spoilt("fisher", place, value, NonFiniteError)
        spoilt("damp", (3,), value, ConfigError)
    spoilt("damp", (3,), -1.0, ConfigError)
    mask[5 * size : 6 * size] = True
    fisher[5] = torch.eye(size, device=DEVICE)
    spoilt("fisher", (5, size // 2, size // 2), -1.0, SingularBlockError)


@on_each
def test_limits_are_told(gen: torch.Generator, backend: str) -> None:
    weight, fisher, mask = problem(gen, 3, 130)
    for w, f in ((weight, fisher), (weight.double(), fisher[:, :8, :8]), (weight, fisher.double()[:, :8, :8])):
        f = f.repeat(-(-w.numel() // f.shape[1]), 1, 1)[: -(-w.numel() // f.shape[1])]
        assert dispatch.resolve("obs_update", None, w, f) == "reference"
        for run in (
            lambda w=w, f=f: ops.obs_update(w, f, mask, damp=0.1, backend=backend),
            lambda w=w, f=f: ops.loss_increase(w, f, damp=0.1, backend=backend),
        ):
            with pytest.raises(BackendUnavailableError, match="cannot run"):
                run()
    fisher = spd(gen, 5, 8, 1e2)
    with pytest.raises(BackendUnavailableError, match="combinatorial"):
        ops.block_saliency(weight[:40], fisher, 1, method="diagonal", backend=backend)
    ops.block_saliency(weight[:40], fisher, 1, method="diagonal")


# choice, repetition, streams, graphs, devices, size


@on_each
def test_kernel_is_preferred(gen: torch.Generator, backend: str) -> None:
    weight, fisher, mask = problem(gen, 3, 8)
    ops.obs_update(weight, fisher, mask, damp=0.1, backend=backend)
    for op in ("obs_update", "loss_increase", "block_saliency"):
        assert dispatch.resolve(op, None, weight, fisher) == BACKENDS[0]


@on_each
@pytest.mark.parametrize("size", SOME)
def test_three_times_the_same_bits(gen: torch.Generator, backend: str, size: int) -> None:
    weight, fisher, mask = problem(gen, 1003, size, 1e4)

    def run() -> list[Tensor]:
        updates = [ops.obs_update(weight, fisher, mask, update=u, backend=backend) for u in ("joint", "single")]
        return [*updates, ops.loss_increase(weight, fisher, backend=backend)]

    first = run()
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@on_each
@pytest.mark.parametrize("size", SOME)
def test_on_the_current_stream(gen: torch.Generator, backend: str, size: int) -> None:
    weight, late, mask = problem(gen, 203, size)
    fisher = torch.eye(size, device=DEVICE).repeat(203, 1, 1)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        ops.loss_increase(weight, fisher, backend=backend)
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000_000)
        fisher.copy_(late)
        loss = ops.loss_increase(weight, fisher, backend=backend)
        assert not stream.query(), "the call waited for the device"
        new = ops.obs_update(weight, fisher, mask, damp=0.01, backend=backend)
    stream.synchronize()
    assert_update(new, weight, late, mask, 1e2, damp=0.01)
    exact = ops.loss_increase(weight.double(), late.double(), backend="reference")
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)


@on_each
@pytest.mark.parametrize("update", ["joint", "single"])
@pytest.mark.parametrize("size", SOME)
def test_in_a_cuda_graph(gen: torch.Generator, backend: str, size: int, update: str) -> None:
    """Values are not looked at; a block that turns bad between replays only loses its pruned weights."""
    weight, fisher, mask = problem(gen, 203, size)
    damp = torch.full((203,), 0.01, device=DEVICE)
    mask[5 * size] = True  # a block with nothing kept cannot fail in the joint update

    def run() -> tuple[Tensor, Tensor]:
        new = ops.obs_update(weight, fisher, mask, damp=damp, update=update, backend=backend)
        return new, ops.loss_increase(weight, fisher, damp=damp, backend=backend)

    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        new, loss = run()
    for _ in range(2):
        good = spd(gen, 203, size, 1e2)
        fisher.copy_(good)
        fisher[5] = -torch.eye(size, device=DEVICE)
        weight.normal_(generator=gen)
        damp.uniform_(0.01, 0.1)
        graph.replay()
        torch.cuda.synchronize()
        span = slice(5 * size, 6 * size)
        assert torch.equal(new[span], weight[span].masked_fill(~mask[span], 0.0))
        exact = ops.loss_increase(weight.double(), fisher.double(), damp=damp, backend="reference")
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
        rest = torch.ones_like(mask)
        rest[span] = False
        wanted = ops.obs_update(weight, good, mask, damp=damp, update=update, backend=backend)
        assert torch.equal(new[rest], wanted[rest])


@pytest.mark.multigpu
@on_each
def test_device_of_the_tensors_counts(gen: torch.Generator, backend: str) -> None:
    problem_here = problem(gen, 37, 8)
    for index in (1, 0, 1):
        weight, fisher, mask = (t.to(f"cuda:{index}") for t in problem_here)
        new = ops.obs_update(weight, fisher, mask, damp=0.1, backend=backend)
        assert new.device == weight.device and torch.cuda.current_device() == 0
        assert_update(new, weight, fisher, mask, 1e2, damp=0.1)


@pytest.mark.big
@on_each
@pytest.mark.parametrize("size", [4, 16, 32, 128])
def test_beyond_31_bits(gen: torch.Generator, backend: str, size: int) -> None:
    """Equal blocks have equal updates and losses, bit for bit, wherever they stand."""
    needs(16)
    count = 509
    fisher = spd(gen, count, size, 1e2)
    weight = torch.randn(count * size, generator=gen, device=DEVICE)
    mask = mixed_mask(gen, count, size)
    copies = 2**31 // fisher.numel() + 2
    wanted = ops.obs_update(weight, fisher, mask, damp=0.1, backend=backend)
    assert_update(wanted, weight, fisher, mask, 1e2, damp=0.1)
    loss = ops.loss_increase(weight, fisher, damp=0.1, backend=backend)
    many = fisher.repeat(copies, 1, 1)
    assert many.numel() > 2**31
    new = ops.obs_update(weight.repeat(copies), many, mask.repeat(copies), damp=0.1, backend=backend)
    assert (new.view(copies, -1) == wanted).all()
    losses = ops.loss_increase(weight.repeat(copies), many, damp=0.1, backend=backend)
    assert (losses.view(copies, -1) == loss).all()
