# SPDX-License-Identifier: Apache-2.0
"""``invert_spd`` on a GPU: every backend of the dispatch table but the reference."""

from __future__ import annotations

import pytest
import torch
from fisher_checks import (
    EACH_KERNEL,
    FAILING_PIVOT,
    SIZES,
    SOME,
    Guarded,
    assert_inverse,
    bad_block,
    needs,
    ragged,
    spd,
)
from torch import Tensor

from obs_kernels import ops
from obs_kernels.errors import BackendUnavailableError
from obs_kernels.ops import dispatch

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
MANY = 100_003  # a prime: the last block of threads is never full
BACKENDS = [name for name in dispatch.TABLE["invert_spd"] if name != "reference"]

on_each = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture
def gen() -> torch.Generator:
    return torch.Generator(device=DEVICE).manual_seed(20240)


def invert(
    backend: str, matrices: Tensor, *, damp: float | Tensor = 0.0, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The public op; skips with the reason if the backend refuses these tensors."""
    try:
        return ops.invert_spd(matrices, damp=damp, out=out, backend=backend)
    except BackendUnavailableError as error:
        pytest.skip(str(error))


@on_each
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("size", SIZES)
def test_sizes_blocks_and_conditions(gen: torch.Generator, backend: str, size: int, condition: float) -> None:
    most = MANY if condition == 1e6 else 1003
    needs(2 + 16 * most * size**2 / 2**30)
    matrices = spd(gen, most, size, condition)
    before = matrices.clone()
    for count in (0, 1, 3, 1000, most):
        assert_inverse(matrices[:count], *invert(backend, matrices[:count]), condition)
    assert torch.equal(matrices, before)


@on_each
@pytest.mark.parametrize("condition", [1e7, 1e8, 1e10, 1e14])
@pytest.mark.parametrize("size", SIZES[1:])
def test_finite_and_symmetric_beyond(gen: torch.Generator, backend: str, size: int, condition: float) -> None:
    """Rounded to f32 such blocks may be indefinite: either a report and zeros, or something finite."""
    inverse, info = invert(backend, spd(gen, 1003, size, condition))
    assert torch.equal(inverse, inverse.mT) and inverse.isfinite().all()
    assert not inverse[info != 0].any() and (inverse[info == 0].diagonal(dim1=1, dim2=2) > 0).all()
    assert ((info >= 0) & (info <= size)).all()


@on_each
@pytest.mark.parametrize("size", SIZES[1:])
def test_rank_deficient_blocks_with_damp(gen: torch.Generator, backend: str, size: int) -> None:
    """A damping for all, or one a block in any float dtype and stride."""
    samples, count = (size + 1) // 2, 137
    g = torch.randn(count, samples, size, generator=gen, device=DEVICE)
    fisher = g.mT @ g / samples
    fisher = 0.5 * (fisher + fisher.mT)
    spectrum = torch.linalg.eigvalsh(fisher.double().cpu()).to(DEVICE)
    each = torch.logspace(-3, 1, count, device=DEVICE)
    for damp in (0.01, torch.tensor(0.01, device=DEVICE), each, each.double(), each.repeat_interleave(2)[::2]):
        condition = (spectrum[:, -1] + damp) / (spectrum[:, 0] + damp)
        assert_inverse(fisher, *invert(backend, fisher, damp=damp), condition, damp=damp)
    undamped, info = invert(backend, torch.ones(count, size, size, device=DEVICE))
    assert (info == 2).all() and not undamped.any()


@on_each
@pytest.mark.parametrize("kind", FAILING_PIVOT)
@pytest.mark.parametrize("size", [size for size in EACH_KERNEL if size > 3])
def test_bad_blocks_are_zeros_and_the_others_right(gen: torch.Generator, backend: str, size: int, kind: str) -> None:
    """Bad blocks first, last, side by side and far apart; what shares a warp with them does not notice."""
    matrices = spd(gen, 75, size, 1e3)
    alone, _ = invert(backend, matrices)
    bad = torch.tensor([0, 1, 17, 31, 32, 74], device=DEVICE)
    matrices[bad] = bad_block(kind, size).to(DEVICE)
    inverse, info = invert(backend, matrices)
    assert all(pivot in FAILING_PIVOT[kind] for pivot in info[bad].tolist()), info[bad].tolist()
    assert not inverse[bad].any()
    good = torch.ones(75, dtype=torch.bool, device=DEVICE)
    good[bad] = False
    assert not info[good].any() and torch.equal(inverse[good], alone[good])


@pytest.mark.sanitizer
@on_each
@pytest.mark.parametrize("size", EACH_KERNEL)
def test_between_guards(backend: str, size: int) -> None:
    """Bases up to two elements off any alignment, into another tensor and in place, one bad block among the rest.

    First without guards, so that a sanitizer sees each byte beyond. The rest of the work is the CPU's, for its sake.
    """
    count = ragged(size)
    matrices, damp = spd(torch.Generator().manual_seed(7), count, size, 1e3), torch.linspace(0.01, 0.1, count)
    matrices[-2] = -1.0
    good = torch.arange(count) != count - 2
    for shift_in, shift_out in ((None, None), (0, 0), (1, 0), (0, 1), (2, 2)):
        given = Guarded(matrices.to(DEVICE), shift_in)
        each = Guarded(damp.to(DEVICE), shift_in)
        out = Guarded(torch.full_like(given.tensor, float("nan")), shift_out)
        for into in (out, given):
            result, info = invert(backend, given.tensor, damp=each.tensor, out=into.tensor)
            assert result is into.tensor
            found, info = result.cpu(), info.cpu()
            assert info.nonzero().flatten().tolist() == [count - 2] and not found[-2].any()
            assert_inverse(matrices[good], found[good], info[good], 1e3, damp=damp[good])
            assert into is given or torch.equal(given.tensor.cpu(), matrices)
            for guarded in (given, each, out):
                guarded.assert_unharmed()


@on_each
@pytest.mark.parametrize("size", SOME)
def test_any_strides(gen: torch.Generator, backend: str, size: int) -> None:
    matrices = spd(gen, 21, size, 1e3)
    wide = torch.full((42, size, 2 * size), float("nan"), device=DEVICE)
    inside = wide[::2, :, 1::2]
    inside.copy_(matrices)
    for given in (matrices.mT, inside, matrices[:1].expand(21, size, size), matrices.flip(0)[::3]):
        assert_inverse(given, *invert(backend, given), 1e3)
    result, info = invert(backend, inside, out=inside)
    assert result is inside
    assert_inverse(matrices, inside, info, 1e3)
    assert wide[1::2].isnan().all() and wide[:, :, ::2].isnan().all()


@on_each
@pytest.mark.parametrize("exponent", [-100, 100])
@pytest.mark.parametrize("size", SOME)
def test_extreme_scales(gen: torch.Generator, backend: str, size: int, exponent: int) -> None:
    matrices = spd(gen, 21, size, 1e2)
    inverse, info = invert(backend, matrices * 2.0**exponent)
    assert_inverse(matrices, inverse * 2.0**exponent, info, 1e2)


@on_each
def test_of_f64_is_for_the_reference(gen: torch.Generator, backend: str) -> None:
    for size in (8, 33):
        exact = spd(gen, 9, size, 1e6, torch.float64)
        assert_inverse(exact, *ops.invert_spd(exact), 1e6)
        with pytest.raises(BackendUnavailableError, match=f"{backend!r} cannot run invert_spd: .*float64"):
            ops.invert_spd(exact, backend=backend)


@pytest.mark.parametrize("size", [1, 8, 33, 130])
def test_reference_on_this_device(gen: torch.Generator, size: int) -> None:
    """What runs where a kernel refuses."""
    matrices = spd(gen, 37, size, 1e3)
    assert_inverse(matrices, *invert("reference", matrices), 1e3)


# Choice, repetition, streams, graphs, devices, size


@on_each
def test_kernel_is_preferred(backend: str) -> None:
    matrices = torch.eye(8, device=DEVICE)[None]
    invert(backend, matrices)
    assert dispatch.resolve("invert_spd", None, matrices) == BACKENDS[0]


@on_each
@pytest.mark.parametrize("size", SOME)
def test_three_times_the_same_bits(gen: torch.Generator, backend: str, size: int) -> None:
    matrices = spd(gen, 1003, size, 1e4)
    first, *others = (invert(backend, matrices)[0] for _ in range(3))
    assert all(torch.equal(first, other) for other in others)


@on_each
@pytest.mark.parametrize("size", SOME)
def test_on_the_current_stream(gen: torch.Generator, backend: str, size: int) -> None:
    late = spd(gen, 203, size, 1e3)
    matrices = torch.zeros_like(late)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        invert(backend, matrices)
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000_000)
        matrices.copy_(late)
        inverse, info = invert(backend, matrices)
        assert not stream.query(), "the call waited for the device"
    stream.synchronize()
    assert_inverse(late, inverse, info, 1e3)


@on_each
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("size", SOME)
def test_in_a_cuda_graph(gen: torch.Generator, backend: str, size: int, each: bool) -> None:
    """A damping a block is read anew; a block that turns bad between replays is reported."""
    matrices = spd(gen, 203, size, 1e3)
    damp = torch.full((203,), 0.01, device=DEVICE) if each else 0.01
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        invert(backend, matrices, damp=damp)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        inverse, info = invert(backend, matrices, damp=damp)
    for bad in (5, 202):
        matrices.copy_(spd(gen, 203, size, 1e3))
        matrices[bad] = -1.0
        if isinstance(damp, Tensor):
            damp.uniform_(0.01, 0.1)
        graph.replay()
        torch.cuda.synchronize()
        good = torch.arange(203, device=DEVICE) != bad
        assert info.nonzero().flatten().tolist() == [bad] and not inverse[bad].any()
        chosen = damp[good] if isinstance(damp, Tensor) else damp
        assert_inverse(matrices[good], inverse[good], info[good], 1e3, damp=chosen)


@pytest.mark.multigpu
@on_each
def test_device_of_the_tensors_counts(gen: torch.Generator, backend: str) -> None:
    matrices = spd(gen, 37, 8, 1e3)
    assert torch.cuda.current_device() == 0
    for index in (1, 0, 1):
        there = matrices.to(f"cuda:{index}")
        inverse, info = invert(backend, there)
        assert inverse.device == info.device == there.device
        assert_inverse(there, inverse, info, 1e3)
        assert torch.cuda.current_device() == 0


@pytest.mark.big
@on_each
@pytest.mark.parametrize("size", [4, 8, 16, 32, 50, 128])
def test_beyond_31_bits(gen: torch.Generator, backend: str, size: int) -> None:
    """Equal blocks have equal inverses, bit for bit, wherever they stand; the last block is bad."""
    needs(14)
    few = spd(gen, 509, size, 1e3)
    copies = 2**31 // few.numel() + 2
    matrices = few.repeat(copies, 1, 1)
    assert matrices.numel() > 2**31
    matrices[-1] = 0.0
    wanted, _ = invert(backend, few)
    assert_inverse(few, wanted, torch.zeros(509, dtype=torch.int32, device=DEVICE), 1e3)
    _, info = invert(backend, matrices, out=matrices)
    assert info[-1] == 1 and not info[:-1].any() and not matrices[-1].any()
    assert torch.equal(matrices[-509:-1], wanted[:-1])
    same = (matrices[:-509].view(copies - 1, -1) == wanted.view(1, -1)).all(1)
    assert same.all(), f"copy {same.int().argmin()} of {copies} differs"
