# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the Fisher accumulation, run as host code under sanitizers (cuda_on_cpu.h), against float64."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from emulation import SANITIZERS, build
from fisher_checks import assert_accumulated
from torch import Tensor

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 50, 64, 100, 128)


@pytest.fixture(scope="module", params=SANITIZERS)
def accumulate_on_cpu(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(
        "fisher/accumulate.cu",
        "accumulate_on_cpu.cpp",
        tmp_path_factory.mktemp("emulation") / "accumulate",
        sanitizer=request.param,
        empty=["0", "8", "1", "0", "0", "0", "0", "1"],
    )


def emulate(
    program: Path, fisher: Tensor, grads: Tensor, *, scale: float = 0.37, gap: int = 0, shifts: tuple[int, int] = (0, 0)
) -> tuple[str, Tensor]:
    """(path, result) of ``fisher`` [B, D, D] and ``grads`` [S, B * D].

    ``gap`` elements of NaN stand between two rows of gradients; ``shifts`` move the bases of grads and fisher.
    """
    blocks, size, _ = fisher.shape
    samples, columns = grads.shape
    padded = torch.full((samples, columns + gap), float("nan"), dtype=grads.dtype)
    padded[:, :columns] = grads
    rows = padded.flatten()[: max(0, padded.numel() - gap)]
    arguments = [blocks, size, samples, columns + gap, TYPES[grads.dtype], *shifts, scale]
    given = fisher.numpy().tobytes() + rows.view(torch.uint8).numpy().tobytes()
    done = subprocess.run([program, *map(str, arguments)], input=given, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    path, _, rest = done.stdout.partition(b"\n")
    result = torch.frombuffer(bytearray(rest), dtype=torch.float32) if rest else torch.empty(0)
    return path.decode(), result.view_as(fisher)


def ragged(size: int) -> int:
    """Blocks for two CTAs, the second one nearly empty."""
    return 131 if size <= 8 else 35 if size <= 16 else 18 if size <= 32 else 6 if size <= 64 else 2


def symmetric(gen: torch.Generator, blocks: int, size: int) -> Tensor:
    fisher = torch.randn(blocks, size, size, generator=gen)
    return fisher + fisher.mT


def check(program: Path, fisher: Tensor, grads: Tensor, **options: object) -> str:
    path, result = emulate(program, fisher, grads, **options)  # type: ignore[arg-type]
    assert_accumulated(result, fisher, grads, 0.37)
    assert torch.equal(result, result.mT)
    return path


@pytest.mark.parametrize(
    ("samples", "dtype"), [(1, torch.float32), (5, torch.bfloat16), (33, torch.float16), (70, torch.float32)]
)
@pytest.mark.parametrize("size", SIZES)
def test_sizes_and_samples(
    accumulate_on_cpu: Path, gen: torch.Generator, size: int, samples: int, dtype: torch.dtype
) -> None:
    """Fewer samples than are on their way at once, and several stages with a rest; aligned bases, dense rows."""
    blocks = ragged(size)
    grads = torch.randn(samples, blocks * size, generator=gen).to(dtype)
    path = check(accumulate_on_cpu, symmetric(gen, blocks, size), grads)
    assert path.startswith("thread" if size <= 8 else "bands" if size % 8 else "tiles")


@pytest.mark.parametrize(
    ("size", "dtype", "gap", "shifts", "path"),
    [
        (1, torch.bfloat16, 3, (1, 1), "thread"),
        (2, torch.float16, 2, (2, 0), "thread"),
        (2, torch.float16, 1, (0, 2), "thread_narrow"),
        (3, torch.bfloat16, 0, (1, 3), "thread"),
        (4, torch.bfloat16, 4, (4, 4), "thread"),
        (4, torch.bfloat16, 2, (0, 1), "thread_narrow"),
        (4, torch.float32, 0, (1, 0), "thread_narrow"),
        (6, torch.float16, 2, (2, 4), "thread"),
        (6, torch.bfloat16, 1, (0, 0), "thread_narrow"),
        (6, torch.float32, 2, (2, 1), "thread"),
        (8, torch.bfloat16, 8, (8, 0), "thread"),
        (8, torch.bfloat16, 4, (0, 2), "thread_narrow"),
        (8, torch.float32, 4, (4, 2), "thread"),
        (8, torch.float32, 1, (0, 4), "thread_narrow"),
        (16, torch.bfloat16, 8, (8, 4), "tiles"),
        (16, torch.bfloat16, 4, (0, 2), "bands_by_8_bytes"),
        (16, torch.float16, 0, (2, 1), "bands_by_4_bytes"),
        (16, torch.bfloat16, 1, (0, 0), "tiles_by_2_bytes"),
        (16, torch.float32, 0, (2, 0), "tiles_by_8_bytes"),
        (16, torch.float32, 1, (0, 2), "bands_by_4_bytes"),
        (20, torch.float32, 4, (0, 0), "bands"),
        (20, torch.float16, 8, (0, 4), "bands_by_8_bytes"),
        (31, torch.bfloat16, 0, (1, 3), "bands_by_2_bytes"),
        (31, torch.float32, 7, (1, 2), "bands_by_4_bytes"),
        (50, torch.bfloat16, 2, (2, 2), "bands_by_4_bytes"),
        (50, torch.float32, 2, (2, 1), "bands_by_8_bytes"),
        (64, torch.bfloat16, 0, (1, 2), "bands_by_2_bytes"),
        (100, torch.bfloat16, 4, (0, 4), "bands_by_8_bytes"),
        (128, torch.float32, 4, (4, 1), "bands"),
        (128, torch.float16, 0, (0, 2), "bands"),
    ],
)
def test_alignment_and_row_stride(
    accumulate_on_cpu: Path,
    gen: torch.Generator,
    size: int,
    dtype: torch.dtype,
    gap: int,
    shifts: tuple[int, int],
    path: str,
) -> None:
    """Accesses get as wide as gradients and Fisher allow; NaN between the rows is never read."""
    blocks = ragged(size)
    grads = torch.randn(19, blocks * size, generator=gen).to(dtype)
    taken = check(accumulate_on_cpu, symmetric(gen, blocks, size), grads, gap=gap, shifts=shifts)
    assert taken == path


@pytest.mark.parametrize("dtype", list(TYPES))
@pytest.mark.parametrize("size", [3, 4, 8, 12, 16, 24, 40, 50, 72, 96, 104])
def test_is_exact_on_integers(accumulate_on_cpu: Path, gen: torch.Generator, size: int, dtype: torch.dtype) -> None:
    blocks = ragged(size)
    grads = torch.randint(-8, 9, (21, blocks * size), generator=gen).to(dtype)
    _, result = emulate(accumulate_on_cpu, torch.ones(blocks, size, size), grads, scale=0.5)
    g = grads.double().unflatten(1, (blocks, size)).transpose(0, 1)
    assert torch.equal(result.double(), 1 + 0.5 * (g.mT @ g))


@pytest.mark.parametrize("size", [16, 64, 128])
def test_tiles_above_the_diagonal_are_not_read(accumulate_on_cpu: Path, gen: torch.Generator, size: int) -> None:
    fisher, grads = symmetric(gen, 2, size), torch.randn(3, 2 * size, generator=gen)
    _, wanted = emulate(accumulate_on_cpu, fisher, grads)
    tile = torch.arange(size) // 8
    path, result = emulate(accumulate_on_cpu, fisher.masked_fill(tile[:, None] < tile, float("nan")), grads)
    assert path == "tiles" and torch.equal(result, wanted)


@pytest.mark.parametrize("size", [4, 50])
def test_halves_of_every_kind(accumulate_on_cpu: Path, size: int) -> None:
    """Each finite f16 as the only gradient of its block: its square, subnormals and negative zero included."""
    every = torch.arange(2**16).to(torch.int16).view(torch.float16)
    some = every[every.isfinite()][:: 7 if size == 4 else 997]
    grads = torch.zeros(1, some.numel() * size, dtype=torch.float16)
    grads[0, ::size] = some
    _, result = emulate(accumulate_on_cpu, torch.zeros(some.numel(), size, size), grads, scale=1.0)
    assert torch.equal(result[:, 0, 0], some.float().square())
    assert result.count_nonzero() == some.float().square().count_nonzero()


@pytest.mark.parametrize(("blocks", "samples"), [(0, 5), (2, 0)])
def test_nothing_to_do_changes_nothing(accumulate_on_cpu: Path, blocks: int, samples: int) -> None:
    fisher = torch.full((blocks, 8, 8), 3.0)
    path, result = emulate(accumulate_on_cpu, fisher, torch.zeros(samples, 8 * blocks))
    assert path == "empty" and torch.equal(result, fisher)
