# SPDX-License-Identifier: Apache-2.0
"""``accumulate_fisher_`` on a GPU: every backend of the dispatch table but the reference."""

from __future__ import annotations

import pytest
import torch
from fisher_checks import EACH_KERNEL, SAMPLES, SIZES, SOME, Guarded, assert_accumulated, needs, ragged
from torch import Tensor

from obs_kernels import ops
from obs_kernels.errors import BackendUnavailableError
from obs_kernels.ops import dispatch

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
MANY = 100_003  # a prime: the last block of threads is never full
BACKENDS = [name for name in dispatch.TABLE["accumulate_fisher_"] if name != "reference"]

on_each = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture
def gen() -> torch.Generator:
    return torch.Generator(device=DEVICE).manual_seed(20240)


def randn(gen: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=gen, dtype=dtype, device=DEVICE)


def symmetric(gen: torch.Generator, count: int, size: int) -> Tensor:
    """What the op expects to find: a backend may read one triangle only."""
    fisher = randn(gen, count, size, size)
    return fisher + fisher.mT


def zeros(count: int, size: int) -> Tensor:
    return torch.zeros(count, size, size, device=DEVICE)


def accumulate(backend: str, fisher: Tensor, grads: Tensor, scale: float = 1.0) -> Tensor:
    """The public op; skips with the reason if the backend refuses these tensors."""
    try:
        return ops.accumulate_fisher_(fisher, grads, scale=scale, backend=backend)
    except BackendUnavailableError as error:
        pytest.skip(str(error))


@on_each
@pytest.mark.parametrize("size", SIZES)
def test_sizes_blocks_and_samples(gen: torch.Generator, backend: str, size: int) -> None:
    needs(2 + (4 * SAMPLES[-1] + 8 * size) * MANY * size / 2**30)
    start, grads = symmetric(gen, MANY, size), randn(gen, SAMPLES[-1], MANY * size)
    for count in (0, 1, 3, 1000, MANY):
        for samples in SAMPLES if count > 1 else (5,):
            part = grads[:samples, : count * size]  # rows apart by another stride than their length
            for given in (part, part.contiguous()) if count == 3 else (part,):
                fisher = start[:count].clone()
                assert accumulate(backend, fisher, given, 0.37) is fisher
                assert_accumulated(fisher, start[:count], part, 0.37)


@on_each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", (3, *SOME))
def test_half_precision(gen: torch.Generator, backend: str, size: int, dtype: torch.dtype) -> None:
    """Products of 16-bit gradients are exact in f32: the bound is that of f32 gradients."""
    for count, samples in ((1000, 1), (1003, 5), (1003, 33), (77, 256)):
        start, grads = symmetric(gen, count, size), randn(gen, samples, count * size).to(dtype)
        before = grads.clone()
        assert_accumulated(accumulate(backend, start.clone(), grads, 1 / samples), start, grads, 1 / samples)
        assert torch.equal(grads, before)


@on_each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", EACH_KERNEL)
def test_is_exact_on_integers(gen: torch.Generator, backend: str, size: int, dtype: torch.dtype) -> None:
    for samples in (1, 33):
        grads = torch.randint(-8, 9, (samples, 203 * size), generator=gen, device=DEVICE).to(dtype)
        fisher = accumulate(backend, torch.ones(203, size, size, device=DEVICE), grads, 0.5)
        g = grads.double().unflatten(1, (203, size)).transpose(0, 1)
        assert torch.equal(fisher.double(), 1 + 0.5 * (g.mT @ g))


@on_each
@pytest.mark.parametrize("size", SOME)
def test_any_strides(gen: torch.Generator, backend: str, size: int) -> None:
    wide = randn(gen, 10, 2 * 21 * size + 5)
    views = {
        "transposed": randn(gen, 21 * size, 10).t(),
        "every other": wide[::2, 3 : 3 + 42 * size : 2],
        "rows one element off": wide[:, 1 : 1 + 21 * size],
        "expanded": wide[:1, : 21 * size].expand(7, -1),
    }
    for grads in views.values():
        fisher = accumulate(backend, zeros(21, size), grads)
        assert_accumulated(fisher, zeros(21, size), grads, 1.0)
    large = torch.full((42, size, 2 * size), 7.0, device=DEVICE)
    inside = large[::2, :, 1::2]
    accumulate(backend, inside, views["transposed"])
    assert_accumulated(inside, torch.full_like(inside, 7.0), views["transposed"], 1.0)
    assert (large[1::2] == 7).all() and (large[:, :, ::2] == 7).all()


@pytest.mark.sanitizer
@on_each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", EACH_KERNEL)
def test_between_guards(backend: str, size: int, dtype: torch.dtype) -> None:
    """Bases one element off any alignment; whatever stands before and after stays.

    First without guards, so that a sanitizer sees each byte beyond. The rest of the work is the CPU's, for its sake.
    """
    count, gen = ragged(size), torch.Generator().manual_seed(7)
    start = torch.randn(count, size, size, generator=gen)
    start = start + start.mT
    for samples, shift in ((5, None), (5, 0), (33, 1)):
        given = torch.randn(samples, count * size, generator=gen).to(dtype)
        fisher, grads = Guarded(start.to(DEVICE), shift), Guarded(given.to(DEVICE), shift)
        accumulate(backend, fisher.tensor, grads.tensor, 0.5)
        assert_accumulated(fisher.tensor.cpu(), start, given, 0.5)
        fisher.assert_unharmed()
        grads.assert_unharmed()
        assert torch.equal(grads.tensor.cpu(), given)


@on_each
def test_f64_is_for_the_reference(gen: torch.Generator, backend: str) -> None:
    start, grads = randn(gen, 9, 8, 8).double(), randn(gen, 5, 72).double()
    assert_accumulated(ops.accumulate_fisher_(start.clone(), grads, scale=0.5), start, grads, 0.5)
    with pytest.raises(BackendUnavailableError, match=f"{backend!r} cannot run accumulate_fisher_: .*float64"):
        ops.accumulate_fisher_(start, grads, scale=0.5, backend=backend)


@pytest.mark.parametrize("size", [1, 8, 33])
def test_reference_on_this_device(gen: torch.Generator, size: int) -> None:
    """What runs where a kernel refuses."""
    start, grads = randn(gen, 37, size, size), randn(gen, 5, 37 * size)
    for given in (grads, grads.half(), grads[:1]):
        assert_accumulated(accumulate("reference", start.clone(), given), start, given, 1.0)


# Choice, repetition, streams, graphs, devices, size


@on_each
def test_kernel_is_preferred(gen: torch.Generator, backend: str) -> None:
    fisher, grads = zeros(2, 8), randn(gen, 5, 16)
    accumulate(backend, fisher, grads)
    assert dispatch.resolve("accumulate_fisher_", None, fisher, grads) == BACKENDS[0]


@on_each
@pytest.mark.parametrize("size", SOME)
def test_three_times_the_same_bits(gen: torch.Generator, backend: str, size: int) -> None:
    start, grads = symmetric(gen, 1003, size), randn(gen, 64, 1003 * size)
    first, *others = (accumulate(backend, start.clone(), grads) for _ in range(3))
    assert all(torch.equal(first, other) for other in others)


@on_each
@pytest.mark.parametrize("size", SOME)
def test_on_the_current_stream(gen: torch.Generator, backend: str, size: int) -> None:
    """The gradients arrive late on a side stream: a launch on any other would add the zeros before them."""
    late = randn(gen, 33, 203 * size)
    grads, fisher = torch.zeros_like(late), zeros(203, size)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        accumulate(backend, fisher, grads)  # compiles and loads, which may wait for the device
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000_000)  # cycles: some 0.1 s
        grads.copy_(late)
        accumulate(backend, fisher, grads)
        assert not stream.query(), "the call waited for the device"
    stream.synchronize()
    assert_accumulated(fisher, zeros(203, size), late, 1.0)


@on_each
@pytest.mark.parametrize("size", SOME)
def test_in_a_cuda_graph(gen: torch.Generator, backend: str, size: int) -> None:
    grads, fisher = randn(gen, 33, 203 * size), zeros(203, size)
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        accumulate(backend, fisher, grads)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        accumulate(backend, fisher, grads)
    for _ in range(2):
        fisher.copy_(symmetric(gen, 203, size))
        grads.copy_(randn(gen, *grads.shape))
        before = fisher.clone()
        graph.replay()
        torch.cuda.synchronize()
        assert_accumulated(fisher, before, grads, 1.0)


@pytest.mark.multigpu
@on_each
def test_device_of_the_tensors_counts(gen: torch.Generator, backend: str) -> None:
    start, grads = symmetric(gen, 37, 8), randn(gen, 5, 37 * 8)
    assert torch.cuda.current_device() == 0
    for index in (1, 0, 1):
        there, given = start.to(f"cuda:{index}"), grads.to(f"cuda:{index}")
        assert_accumulated(accumulate(backend, there.clone(), given), there, given, 1.0)
        assert torch.cuda.current_device() == 0


@pytest.mark.big
@on_each
@pytest.mark.parametrize(("size", "samples"), [(4, 5), (128, 160)])
def test_beyond_31_bits(backend: str, size: int, samples: int) -> None:
    """Both the Fisher and the gradients; the first blocks, the last, and those around each element 2^31."""
    count = 2**31 // size**2 + 1003
    assert count * size**2 > 2**31 and samples * count * size > 2**31
    needs(20)
    grads = torch.empty(samples, count * size, dtype=torch.bfloat16, device=DEVICE).normal_()
    fisher = zeros(count, size)
    accumulate(backend, fisher, grads)
    column = 2**31 % (count * size) // size  # block of gradient element 2^31
    for block in (0, column, 2**31 // size**2, count):
        part = slice(max(0, min(block, count) - 500), min(block + 500, count))
        given = grads[:, part.start * size : part.stop * size]
        assert_accumulated(fisher[part], torch.zeros_like(fisher[part]), given, 1.0)
