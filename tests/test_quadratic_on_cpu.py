# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the summed single updates and of the loss increase, as host code under sanitizers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from emulation import SANITIZERS, build
from test_update_on_cpu import CASES, TYPES, check, mixed_masks
from torch import Tensor


@pytest.fixture(scope="module", params=SANITIZERS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(
        "update/quadratic.cu",
        "quadratic_on_cpu.cpp",
        tmp_path_factory.mktemp("emulation") / "quadratic",
        sanitizer=request.param,
        empty=["loss", "0", "0", "8", "1", "0", "0"],
    )


def emulate(
    program: Path,
    op: str,
    weight: Tensor,
    blocks: Tensor,
    *,
    mask: Tensor | None = None,
    damp: Tensor | float = 0.0,
    shift: int = 0,
) -> tuple[str, Tensor]:
    """(op and path, result) for a flat ``weight``."""
    count, size, _ = blocks.shape
    mask = torch.ones(weight.numel(), dtype=torch.bool) if mask is None else mask
    damps = torch.as_tensor(damp, dtype=torch.float32).reshape(-1)
    arguments = [op, weight.numel(), count, size, int(damps.numel() > 1), TYPES[weight.dtype], shift]
    given = b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in (damps, blocks, weight, mask))
    done = subprocess.run([program, *map(str, arguments)], input=given, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    path, _, rest = done.stdout.partition(b"\n")
    return path.decode(), torch.frombuffer(bytearray(rest), dtype=weight.dtype if op == "single" else torch.float32)


def check_loss(loss: Tensor, change: Tensor, fisher: Tensor, damp: Tensor | float) -> None:
    parts = oracle.blocks_of(change, fisher, damp)
    wanted = [oracle.quadratic(oracle.numpy(change)[span], f) for span, f in parts]
    np.testing.assert_allclose(oracle.numpy(loss), wanted, rtol=1e-5)


@pytest.mark.parametrize(("size", "path", "dtype"), CASES)
def test_loss_of_every_size(program: Path, gen: torch.Generator, size: int, path: str, dtype: torch.dtype) -> None:
    blocks = {"columns4": 35, "columns8": 19, "columns16": 11}.get(path, 5)
    change = torch.randn(blocks * size - size // 3, generator=gen).to(dtype)
    fisher, damp = oracle.random_spd(gen, blocks, size).float(), torch.linspace(0.0, 2.0, blocks)
    for shift, value in ((0, damp), (1, 0.3)):
        taken, loss = emulate(program, "loss", change, fisher, damp=value, shift=shift)
        assert taken == f"loss_increase {path}"
        check_loss(loss, change, fisher, value)


@pytest.mark.parametrize("size", [5, 16, 50])
def test_what_lies_beyond_the_weight_has_no_part(program: Path, gen: torch.Generator, size: int) -> None:
    """A huge product there would leave Inf times zero."""
    change = torch.randn(3 * size - size // 2, generator=gen)
    fisher = oracle.random_spd(gen, 3, size).float()
    _, wanted = emulate(program, "loss", change, fisher, damp=0.1)
    fisher[-1, -1] = fisher[-1, :, -1] = 3e38
    assert torch.equal(emulate(program, "loss", change, fisher, damp=0.1)[1], wanted)


def inverses(fisher: Tensor, num_weights: int, damp: float) -> Tensor:
    """F^-1 of the damped blocks, in f32; the part beyond a short last block is decoupled."""
    count, size, _ = fisher.shape
    f = fisher.double() + damp * torch.eye(size)
    beyond = torch.arange(count * size).view(count, size) >= num_weights
    f = f.masked_fill(beyond[:, :, None] | beyond[:, None, :], 0.0)
    f.diagonal(dim1=1, dim2=2)[beyond] = 1.0
    return torch.linalg.inv(f).float()


@pytest.mark.parametrize(("size", "path", "dtype"), CASES)
def test_single_of_every_size(program: Path, gen: torch.Generator, size: int, path: str, dtype: torch.dtype) -> None:
    mask = mixed_masks(gen, size)
    blocks = mask.numel() // size
    mask = mask[: mask.numel() - size // 3]
    weight = torch.randn(mask.numel(), generator=gen).to(dtype)
    fisher = oracle.random_spd(gen, blocks, size).float()
    wanted, keep = oracle.numpy(weight).copy(), mask.numpy()
    for span, f in oracle.blocks_of(weight, fisher, 0.1):
        wanted[span] = oracle.summed_single_updates(f, wanted[span], keep[span])
    given = inverses(fisher, mask.numel(), 0.1)
    for shift in (0, 1):
        taken, updated = emulate(program, "single", weight, given, mask=mask, shift=shift)
        assert taken == f"update_single {path}"
        check(updated, wanted, mask)
        assert torch.equal(updated[2 * size : 3 * size], weight[2 * size : 3 * size]), "nothing was pruned there"


def test_single_of_a_block_without_an_inverse(program: Path, gen: torch.Generator) -> None:
    """``invert_spd`` leaves zeros: the block only loses its pruned weights."""
    given = inverses(oracle.random_spd(gen, 3, 8).float(), 24, 0.1)
    given[1] = 0.0
    weight, mask = torch.randn(24, generator=gen), mixed_masks(gen, 8)[:24]
    mask[8:16] = torch.rand(8, generator=gen) < 0.5
    _, updated = emulate(program, "single", weight, given, mask=mask)
    assert torch.equal(updated[8:16], weight[8:16].masked_fill(~mask[8:16], 0.0))
