# SPDX-License-Identifier: Apache-2.0
"""The order in which the sparse product reads a weight: the kernel as host code, read back by the layout of the PTX.

A tile of 64 rows and 64 columns: rows of 64 bytes in 64-byte swizzle (operand A of ``wgmma.mma_async.sp`` in shared
memory, 9.7.15.5), then 4 bytes of metadata a thread (9.7.15.6).
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from emulation import SANITIZERS, build
from masks import random_mask
from torch import Tensor

from obs_kernels.packed_format import runs_as_two_of_four
from obs_kernels.patterns import VNMPattern, parse_pattern
from obs_kernels.reference import pack

TILE_ROWS, TILE_COLS, TILE_BYTES = 64, 64, 4608


@pytest.fixture(scope="module", params=SANITIZERS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(
        "matmul/prepack.cu",
        "prepack_on_cpu.cpp",
        tmp_path_factory.mktemp("emulation") / "prepack",
        sanitizer=request.param,
        empty=["0", "8", "0", "2", "4"],
    )


def read_back(packed: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """(weight [rows, cols] int16, its metadata as pairs of positions [rows, cols / 4, 2]) from the packed bytes."""
    steps = -(-cols // TILE_COLS)
    row_tiles = -(-rows // TILE_ROWS)
    tiles = packed.view(row_tiles, steps, TILE_BYTES)
    # a row is four chunks of 8 packed values, chunk c at c XOR (row / 2 mod 4)
    chunks = tiles[..., :4096].contiguous().view(torch.int16).view(row_tiles, steps, TILE_ROWS, 4, 8)
    at = torch.arange(4) ^ (torch.arange(TILE_ROWS)[:, None] // 2 % 4)
    values = chunks.gather(3, at[None, None, :, :, None].expand_as(chunks))
    values = values.view(row_tiles, steps, TILE_ROWS, 16, 2).permute(0, 2, 1, 3, 4)
    values = values.reshape(row_tiles * TILE_ROWS, steps * 16, 2)
    meta = tiles[..., 4096:].contiguous().view(torch.int32).view(row_tiles, steps, 4, 8, 4)  # warp, g, q
    nibbles = torch.stack([meta >> (4 * i) & 15 for i in range(8)], -1)  # row (or row + 8), then four groups
    nibbles = nibbles.view(row_tiles, steps, 4, 8, 4, 2, 4).permute(0, 2, 5, 3, 1, 4, 6)
    nibbles = nibbles.reshape(row_tiles * TILE_ROWS, steps * 16)
    places = torch.stack([nibbles & 3, nibbles >> 2], -1).long()
    dense = torch.zeros(row_tiles * TILE_ROWS, steps * 16, 4, dtype=torch.int16).scatter_(2, places, values)
    return dense.flatten(1), places


@pytest.mark.parametrize(
    ("text", "rows", "cols"),
    [
        ("2:4", 128, 64),
        ("2:4", 200, 20),
        ("2:8", 130, 136),
        ("2:16", 77, 144),
        ("1:4", 64, 72),
        ("1:8", 3, 8),
        ("2:12", 9, 36),
        ("4:2:4", 8, 64),
        ("64:2:8", 192, 128),
        ("8:2:16", 136, 208),
        ("16:2:32", 16, 64),
    ],
)
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_layout_is_that_of_the_instruction(
    program: Path, gen: torch.Generator, text: str, rows: int, cols: int, drop: float
) -> None:
    pattern = parse_pattern(text)
    assert runs_as_two_of_four(pattern)
    weight = torch.randint(1, 0x7F80, (rows, cols), generator=gen, dtype=torch.int16).view(torch.bfloat16)
    mask = random_mask(gen, rows, cols, pattern, drop=drop)
    values, codes, columns = pack(weight, mask, text)
    v = pattern.v if isinstance(pattern, VNMPattern) else 0
    given = b"".join(part.contiguous().view(torch.uint8).numpy().tobytes() for part in (values, codes, columns))
    arguments = [str(x) for x in (rows, cols, v, pattern.n, pattern.m)]
    done = subprocess.run([program, *arguments], input=given, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    path, _, rest = done.stdout.partition(b"\n")
    assert path == b"tiles"
    dense, places = read_back(torch.frombuffer(bytearray(rest), dtype=torch.uint8), rows, cols)
    wanted = torch.where(mask, weight.view(torch.int16), 0)
    assert torch.equal(dense[:rows, :cols], wanted)
    assert not dense[rows:].any() and not dense[:, cols:].any(), "rows and columns beyond the weight are zeros"
    assert (places[..., 0] < places[..., 1]).all(), "the hardware wants ascending positions"
