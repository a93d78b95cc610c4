# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the batched inverse, run as host code under sanitizers (cuda_on_cpu.h), against float64."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from emulation import SANITIZERS, build
from tolerances import EPS32, inverse_residual
from torch import Tensor


@pytest.fixture(scope="module", params=SANITIZERS)
def invert_on_cpu(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(
        "fisher/inverse.cu",
        "invert_on_cpu.cpp",
        tmp_path_factory.mktemp("emulation") / "invert",
        sanitizer=request.param,
        empty=["0", "8", "1", "0", "0"],
    )


def emulate(
    program: Path, matrices: Tensor, damp: Tensor, *, in_place: bool = False, shift: int = 0
) -> tuple[str, Tensor, Tensor]:
    """(path, inverse, info) of f32 ``matrices`` [B, D, D]."""
    blocks, size, _ = matrices.shape
    arguments = [blocks, size, int(damp.numel() > 1), int(in_place), shift]
    given = damp.numpy().tobytes() + matrices.numpy().tobytes()
    done = subprocess.run([program, *map(str, arguments)], input=given, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    path, _, rest = done.stdout.partition(b"\n")
    inverse = torch.frombuffer(bytearray(rest[: 4 * matrices.numel()]), dtype=torch.float32).view_as(matrices)
    info = torch.frombuffer(bytearray(rest[4 * matrices.numel() :]), dtype=torch.int32)
    assert info.shape == (blocks,)
    return path.decode(), inverse, info


def check_inverse(matrices: Tensor, inverse: Tensor, damp: Tensor) -> None:
    """Residual within the bound of the condition number, and symmetry bit for bit."""
    size = matrices.shape[1]
    damped = oracle.numpy(matrices) + oracle.numpy(damp).reshape(-1, 1, 1) * np.eye(size)
    bound = inverse_residual(size, EPS32) * np.linalg.cond(damped)
    residual = np.abs(damped @ oracle.numpy(inverse) - np.eye(size)).max((1, 2))
    assert (residual <= bound).all(), f"D = {size}: residual {residual.max():.3g} above {bound[residual.argmax()]:.3g}"
    assert torch.equal(inverse, inverse.mT)


PATHS = [
    *((size, "solo") for size in range(1, 9)),
    (9, "group16"),
    (14, "group16"),
    (16, "full16"),
    (31, "group32"),
    (32, "full32"),
    (33, "group48"),
    (48, "group48"),
    (49, "group52"),
    (52, "group52"),
    (53, "group64"),
    (64, "full64"),
    (65, "group96"),
    (96, "group96"),
    (100, "group128"),
    (128, "group128"),
]


@pytest.mark.parametrize(("size", "path"), PATHS)
def test_every_kernel_inverts(invert_on_cpu: Path, gen: torch.Generator, size: int, path: str) -> None:
    """More matrices than a block of threads takes, and not a multiple of it; one value of damping a matrix."""
    blocks = {"solo": 131, "group16": 35, "full16": 35, "group32": 9, "full32": 9}.get(path, 3)
    matrices = oracle.random_spd(gen, blocks, size, floor=1e-2).float()
    damp = torch.linspace(0.0, 0.5, blocks)
    taken, inverse, info = emulate(invert_on_cpu, matrices, damp)
    assert taken == path and not info.any()
    check_inverse(matrices, inverse, damp)


@pytest.mark.parametrize("size", [4, 6, 8, 16, 32, 50, 64, 96])
@pytest.mark.parametrize(("shift", "in_place"), [(1, False), (2, True), (0, True)])
def test_alignment_and_in_place(
    invert_on_cpu: Path, gen: torch.Generator, size: int, shift: int, in_place: bool
) -> None:
    """Pointers off the width of a vector take narrower accesses, and the result may overwrite the matrices."""
    matrices = oracle.random_spd(gen, 3, size, floor=1e-1).float()
    damp = torch.tensor([0.25])
    _, inverse, info = emulate(invert_on_cpu, matrices, damp, shift=shift, in_place=in_place)
    assert not info.any()
    check_inverse(matrices, inverse, damp)


@pytest.mark.parametrize("size", [3, 8, 16, 31, 50, 100])
def test_only_the_lower_triangle_is_read(invert_on_cpu: Path, gen: torch.Generator, size: int) -> None:
    matrices = oracle.random_spd(gen, 2, size).float()
    damp = torch.zeros(1)
    _, wanted, _ = emulate(invert_on_cpu, matrices, damp)
    above = torch.ones(size, size, dtype=torch.bool).triu(1)
    _, inverse, info = emulate(invert_on_cpu, matrices.masked_fill(above, 17.0), damp)
    assert torch.equal(inverse, wanted) and not info.any()


@pytest.mark.parametrize("size", [1, 4, 7, 16, 32, 50, 100])
def test_failing_blocks_are_zeros_and_name_their_pivot(invert_on_cpu: Path, gen: torch.Generator, size: int) -> None:
    good = oracle.random_spd(gen, 2, size).float()
    pivots = sorted({0, size // 2, size - 1})
    bad = torch.eye(size).repeat(4 * len(pivots), 1, 1)
    for at, pivot in enumerate(pivots):
        for kind, value in enumerate((-1.0, 0.0, float("nan"), float("inf"))):
            bad[4 * at + kind, pivot, pivot] = value
    mixed = torch.cat([good[:1], bad, good[1:]])
    _, inverse, info = emulate(invert_on_cpu, mixed, torch.zeros(1))
    _, alone, _ = emulate(invert_on_cpu, good, torch.zeros(1))
    assert info.tolist() == [0, *(pivot + 1 for pivot in pivots for _ in range(4)), 0]
    assert not inverse[1:-1].any()
    assert torch.equal(inverse[[0, -1]], alone)


@pytest.mark.parametrize("size", [2, 8, 16, 33, 72])
def test_rank_one_fails_at_two_and_damping_helps(invert_on_cpu: Path, size: int) -> None:
    ones = torch.ones(3, size, size)
    _, inverse, info = emulate(invert_on_cpu, ones, torch.zeros(1))
    assert info.tolist() == [2, 2, 2] and not inverse.any()
    _, inverse, info = emulate(invert_on_cpu, ones, torch.tensor([0.5]))
    assert not info.any()
    check_inverse(ones, inverse, torch.tensor([0.5]))


@pytest.mark.parametrize("exponent", [-100, 100])
def test_extreme_scales(invert_on_cpu: Path, gen: torch.Generator, exponent: int) -> None:
    """An even power of two only moves the exponent."""
    matrices = oracle.random_spd(gen, 3, 8).float()
    _, wanted, _ = emulate(invert_on_cpu, matrices, torch.zeros(1))
    _, inverse, info = emulate(invert_on_cpu, matrices * 2.0**exponent, torch.zeros(1))
    assert not info.any() and torch.equal(inverse * 2.0**exponent, wanted)


@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_ill_conditioned(invert_on_cpu: Path, gen: torch.Generator, size: int, condition: float) -> None:
    q, _ = torch.linalg.qr(torch.randn(2, size, size, generator=gen, dtype=torch.float64))
    spectrum = torch.logspace(0, -float(np.log10(condition)), size, dtype=torch.float64)
    matrices = ((q * spectrum) @ q.mT).float()
    matrices = 0.5 * (matrices + matrices.mT)
    _, inverse, info = emulate(invert_on_cpu, matrices, torch.zeros(1))
    assert not info.any()
    check_inverse(matrices, inverse, torch.zeros(1))
