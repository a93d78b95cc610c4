# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the joint update, run as host code under sanitizers (cuda_on_cpu.h), against float64."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from emulation import SANITIZERS, build
from tolerances import EPS32, EXAMPLE_F32, UPDATE_RMS_F32
from torch import Tensor

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
SIZES = [
    (1, "columns4"),
    (2, "columns4"),
    (3, "columns4"),
    (4, "columns4"),
    (7, "columns8"),
    (8, "columns8"),
    (16, "columns16"),
    (31, "columns32"),
    (32, "columns32"),
    (50, "columns64"),
    (64, "columns64"),
    (100, "columns128"),
    (128, "columns128"),
]


@pytest.fixture(scope="module", params=SANITIZERS)
def update_on_cpu(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(
        "update/update.cu",
        "update_on_cpu.cpp",
        tmp_path_factory.mktemp("emulation") / "update",
        sanitizer=request.param,
        empty=["0", "0", "8", "1", "0", "0", "0"],
    )


def emulate(
    program: Path,
    weight: Tensor,
    fisher: Tensor,
    mask: Tensor,
    damp: Tensor | float = 0.0,
    *,
    in_place: bool = False,
    shift: int = 0,
) -> tuple[str, Tensor, Tensor]:
    """(path, updated weight, info) of a flat ``weight``."""
    blocks, size, _ = fisher.shape
    damps = torch.as_tensor(damp, dtype=torch.float32).reshape(-1)
    arguments = [weight.numel(), blocks, size, int(damps.numel() > 1), TYPES[weight.dtype], int(in_place), shift]
    given = b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in (damps, fisher, weight, mask))
    done = subprocess.run([program, *map(str, arguments)], input=given, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    path, _, rest = done.stdout.partition(b"\n")
    end = weight.numel() * weight.element_size()
    updated = torch.frombuffer(bytearray(rest[:end]), dtype=weight.dtype)
    info = torch.frombuffer(bytearray(rest[end:]), dtype=torch.int32)
    assert info.shape == (blocks,)
    return path.decode(), updated, info


def mixed_masks(gen: torch.Generator, size: int) -> Tensor:
    """[blocks * D]: kept counts 0, 1, D/4, D/2, D - 1 and D at random places, and in an order that mixes a warp."""
    counts = [size // 2, 0, size, 1, size - 1, size // 4, size, size // 2, 0]
    counts = counts * 2 if size <= 16 else counts[:7]
    masks = torch.zeros(len(counts), size, dtype=torch.bool)
    for mask, count in zip(masks, counts, strict=True):
        mask[torch.randperm(size, generator=gen)[:count]] = True
    return masks.flatten()


def expected(weight: Tensor, fisher: Tensor, mask: Tensor, damp: Tensor | float) -> np.ndarray:
    new, keep = oracle.numpy(weight).copy(), mask.numpy()
    for span, f in oracle.blocks_of(weight, fisher, damp):
        new[span] = oracle.constrained_minimiser(f, new[span], keep[span])
    return new


def check(updated: Tensor, wanted: np.ndarray, mask: Tensor, bound: float = UPDATE_RMS_F32) -> None:
    """RMS error within the bound (and half an ulp of a half), pruned entries +0."""
    assert not updated[~mask].view(torch.int32 if updated.dtype == torch.float32 else torch.int16).any()
    rounding = torch.finfo(updated.dtype).eps if updated.dtype != torch.float32 else 0.0
    error = np.sqrt(((oracle.numpy(updated) - wanted) ** 2).mean())
    scale = np.sqrt((wanted**2).mean()) + 1
    assert error <= (bound + rounding) * scale, f"{error:.3g} above {bound:.3g} of {scale:.3g}"


# The conversion of a half does not depend on the size.
CASES = [(*case, dtype) for dtype in TYPES for case in SIZES if dtype == torch.float32 or case[0] in (7, 16, 50)]


@pytest.mark.parametrize(("size", "path", "dtype"), CASES)
def test_every_kernel_updates(
    update_on_cpu: Path, gen: torch.Generator, size: int, path: str, dtype: torch.dtype
) -> None:
    """Kept counts of all kinds side by side, a short last block, one value of damping a block."""
    mask = mixed_masks(gen, size)
    blocks = mask.numel() // size
    mask = mask[: mask.numel() - size // 3]
    weight = torch.randn(mask.numel(), generator=gen).to(dtype)
    fisher = oracle.random_spd(gen, blocks, size).float()
    damp = torch.linspace(0.01, 0.5, blocks)
    taken, updated, info = emulate(update_on_cpu, weight, fisher, mask, damp)
    assert taken == path and not info.any()
    check(updated, expected(weight, fisher, mask, damp), mask)
    assert torch.equal(updated[2 * size : 3 * size], weight[2 * size : 3 * size]), "nothing was pruned there"


@pytest.mark.parametrize("size", [3, 8, 16, 32, 50])
@pytest.mark.parametrize(("shift", "in_place"), [(1, False), (2, True), (0, True)])
def test_alignment_and_in_place(
    update_on_cpu: Path, gen: torch.Generator, size: int, shift: int, in_place: bool
) -> None:
    mask = mixed_masks(gen, size)[: 3 * size]
    fisher = oracle.random_spd(gen, 3, size).float()
    for dtype in (torch.float32, torch.float16):
        weight = torch.randn(3 * size, generator=gen).to(dtype)
        _, updated, info = emulate(update_on_cpu, weight, fisher, mask, 0.1, shift=shift, in_place=in_place)
        assert not info.any()
        check(updated, expected(weight, fisher, mask, 0.1), mask)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_block_that_keeps_all_keeps_its_bits(update_on_cpu: Path, gen: torch.Generator, dtype: torch.dtype) -> None:
    """Also -0, which a sum with +0 would lose, and pruned zeros, which ask for no change."""
    weight = torch.randn(24, generator=gen).to(dtype)
    weight[[3, 12]] = -0.0
    mask = torch.ones(24, dtype=torch.bool)
    weight[17], mask[17] = 0.0, False
    fisher = oracle.random_spd(gen, 3, 8).float()
    _, updated, _ = emulate(update_on_cpu, weight, fisher, mask)
    same = torch.arange(24) != 17
    assert torch.equal(updated[same].view(torch.uint8), weight[same].view(torch.uint8))


def test_halves_are_rounded_once(update_on_cpu: Path, gen: torch.Generator) -> None:
    """To nearest, ties to even, as torch does: the same sums in f32, then one conversion."""
    weight = torch.randn(64, generator=gen)
    fisher, mask = oracle.random_spd(gen, 4, 16).float(), torch.rand(64, generator=gen) < 0.6
    for dtype in (torch.float16, torch.bfloat16):
        half = weight.to(dtype)
        _, exact, _ = emulate(update_on_cpu, half.float(), fisher, mask, 0.1)
        _, updated, _ = emulate(update_on_cpu, half, fisher, mask, 0.1)
        assert torch.equal(updated, exact.to(dtype))


def test_worked_examples(update_on_cpu: Path) -> None:
    """Examples C and G of the project's mathematics: a group of its own block, and two groups of one block."""
    weight, fisher = oracle.example_c(torch.float32)
    wider, joint = oracle.example_g(torch.float32)
    for w, f, damp, kept, wanted in [
        (weight, fisher, 0.0, [3, 6], [3.8, -4.2]),
        (weight, fisher, 0.0, [2, 3], [3.529412, 4.0625]),
        (wider, joint, 0.5, [0, 7, 11, 12], [-5.262626, 0.302224, -4.722005, 2.817997]),
        (wider, joint, 0.5, [0, 2, 11, 12], [-5.156345, -6.615697, -3.077356, 4.945272]),
    ]:
        mask = torch.zeros(w.numel(), dtype=torch.bool)
        mask[kept] = True
        _, updated, info = emulate(update_on_cpu, w.flatten(), f, mask, damp)
        assert not info.any() and not updated[~mask].any()
        torch.testing.assert_close(updated[mask], torch.tensor(wanted), rtol=EXAMPLE_F32, atol=0)


@pytest.mark.parametrize("size", [1, 4, 7, 16, 32, 50, 100])
def test_failing_pivots_are_counted_among_the_kept(update_on_cpu: Path, gen: torch.Generator, size: int) -> None:
    """The block only loses its pruned weights; what shares a warp with it does not notice."""
    good = oracle.random_spd(gen, 2, size).float()
    pivots = sorted({0, size // 2, size - 1})
    bad = torch.eye(size).repeat(2 * len(pivots), 1, 1)
    for at, pivot in enumerate(pivots):
        bad[2 * at, pivot, pivot], bad[2 * at + 1, pivot, pivot] = 0.0, -1.0
    fisher = torch.cat([good[:1], bad, good[1:]])
    weight = torch.randn(len(fisher), size, generator=gen)
    mask = torch.ones(len(fisher), size, dtype=torch.bool)
    mask[:, size // 4] = size == 1  # unless it is the failing one, the pivots beyond move one place down
    _, updated, info = emulate(update_on_cpu, weight.flatten(), fisher, mask.flatten())
    ranks = [0 if not mask[0, p] else int(mask[0, : p + 1].sum()) for p in pivots for _ in range(2)]
    assert info.tolist() == [0, *ranks, 0]
    lost = torch.tensor([0, *ranks, 0]) > 0
    assert torch.equal(updated.view_as(weight)[lost], weight.masked_fill(~mask, 0.0)[lost])
    alone = emulate(update_on_cpu, weight[[0, -1]].flatten(), good, mask[[0, -1]].flatten())[1]
    assert torch.equal(updated.view_as(weight)[[0, -1]].flatten(), alone)


@pytest.mark.parametrize("size", [2, 8, 16, 33, 72])
def test_rank_deficient_blocks_need_damping(update_on_cpu: Path, gen: torch.Generator, size: int) -> None:
    """A kept part of rank one fails at the second kept entry; a pruned dead input does no harm."""
    weight = torch.randn(3 * size, generator=gen)
    mask = torch.ones(3, size, dtype=torch.bool)
    mask[2] = False
    mask[2, -1] = True  # one kept entry alone is positive definite
    ones = torch.ones(3, size, size)
    _, updated, info = emulate(update_on_cpu, weight, ones, mask.flatten())
    assert info.tolist() == [2, 2, 0]
    assert updated[-1] == pytest.approx(float(weight[2 * size :].double().sum()), rel=1e-5, abs=1e-5)
    mask[0, 0] = False
    _, updated, info = emulate(update_on_cpu, weight, ones, mask.flatten(), 0.5)
    assert not info.any()
    check(updated, expected(weight, ones, mask.flatten(), 0.5), mask.flatten())
    dead = torch.diag(torch.tensor([2.0, 0.0, 3.0, 0.0]))[None]
    _, updated, info = emulate(update_on_cpu, weight[:4], dead, torch.tensor([True, False, True, False]))
    assert not info.any() and torch.equal(updated[::2], weight[:4][::2])


@pytest.mark.parametrize("size", [1, 3, 8, 16, 32, 50, 100])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_anything_not_finite_is_reported(update_on_cpu: Path, gen: torch.Generator, size: int, value: float) -> None:
    """In weights and in any place of F: kept, pruned, or beyond the end of a short last block."""
    blocks = 9
    mask = (torch.rand(blocks * size, generator=gen) < 0.5)[: blocks * size - size // 3]
    fisher = oracle.random_spd(gen, blocks, size).float()
    weight = torch.randn(mask.numel(), generator=gen)
    spoilt = torch.zeros(blocks, dtype=torch.bool)
    spoilt[[1, 2, 5, 8]] = True
    fisher[1, 0, -1] = fisher[2, size // 2, size // 2] = fisher[8, -1, -1] = value
    weight[5 * size + size // 3] = value
    _, _, info = emulate(update_on_cpu, weight, fisher, mask, 0.1)
    assert torch.equal(info < 0, spoilt), info


def test_damping_must_be_finite_and_not_negative(update_on_cpu: Path, gen: torch.Generator) -> None:
    fisher = oracle.random_spd(gen, 5, 8).float()
    weight, mask = torch.randn(40, generator=gen), torch.rand(40, generator=gen) < 0.5
    damp = torch.tensor([0.0, -1e-3, 0.1, float("nan"), float("inf")])
    assert (emulate(update_on_cpu, weight, fisher, mask, damp)[2] < 0).tolist() == [False, True, False, True, True]


@pytest.mark.parametrize("exponent", [-140, -100, 100])
def test_extreme_scales(update_on_cpu: Path, gen: torch.Generator, exponent: int) -> None:
    """A power of two cancels; at 2^-140 F is subnormal and has few digits, but a solution."""
    fisher, weight = oracle.random_spd(gen, 3, 8, floor=1.0).float(), torch.randn(24, generator=gen)
    mask = mixed_masks(gen, 8)[:24]
    _, wanted, _ = emulate(update_on_cpu, weight, fisher, mask)
    _, updated, info = emulate(update_on_cpu, weight, fisher * 2.0**exponent, mask)
    assert not info.any()
    if exponent == -140:
        assert updated.isfinite().all()
    else:
        torch.testing.assert_close(updated, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_ill_conditioned(update_on_cpu: Path, gen: torch.Generator, size: int, condition: float) -> None:
    """The error of the change grows with the condition of the kept part, as that of any solver."""
    q, _ = torch.linalg.qr(torch.randn(2, size, size, generator=gen, dtype=torch.float64))
    spectrum = torch.logspace(0, -float(np.log10(condition)), size, dtype=torch.float64)
    fisher = ((q * spectrum) @ q.mT).float()
    fisher = 0.5 * (fisher + fisher.mT)
    weight, mask = torch.randn(2 * size, generator=gen), torch.rand(2 * size, generator=gen) < 0.75
    _, updated, info = emulate(update_on_cpu, weight, fisher, mask)
    assert not info.any()
    check(updated, expected(weight, fisher, mask, 0.0), mask, bound=4 * EPS32 * condition)
