# SPDX-License-Identifier: Apache-2.0
"""Many Fisher blocks at once, checked in float64 on the device where they are: shared by the tests of CPU and GPU.

Nothing in this file imports the package.
"""

from __future__ import annotations

import pytest
import torch
from tolerances import FISHER_RMS_F64, FISHER_RMS_PER_SQRT_SAMPLE, inverse_residual
from torch import Tensor

SIZES = (1, 2, 3, 4, 7, 8, 16, 31, 32, 50, 64, 100, 128)
SAMPLES = (0, 1, 5, 33, 256)
EACH_KERNEL = (3, 4, 8, 16, 31, 32, 50, 64, 100, 128)
"""Sizes that reach each variant of the GPU kernels, full and with a ragged edge."""
SOME = (4, 8, 16, 50, 128)
"""One for each family of them, where the size itself is not in question."""


def ragged(size: int) -> int:
    """A number of blocks, small enough for a sanitizer, that leaves some thread of the last block without work."""
    return 133 if size <= 16 else 37 if size <= 50 else 5


def needs(gib: float) -> None:
    """Skip where that much GPU memory is not free."""
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib:.0f} GiB of free GPU memory, found {free:.0f}")


def spd(gen: torch.Generator, count: int, size: int, condition: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """[count, size, size] on the device of ``gen``: eigenvalues even on a logarithmic scale, random eigenvectors.

    Rounding to f32 moves the smallest eigenvalue by a sixth at most, up to a condition number of 1e6.
    """
    made = torch.empty(count, size, size, dtype=dtype, device=gen.device)
    spectrum = condition ** -torch.linspace(0, 1, size, dtype=torch.float64, device=gen.device)
    for part in parts_of(count, size * size):
        length = len(range(*part.indices(count)))
        a = torch.diag(spectrum).expand(length, size, size)
        for _ in range(2):  # reflections: cheaper than a random orthogonal matrix each
            v = torch.randn(length, size, 1, generator=gen, dtype=torch.float64, device=gen.device)
            v = v / v.norm(dim=1, keepdim=True)
            a = a - 2 * v @ (v.mT @ a)
            a = a - 2 * (a @ v) @ v.mT
        unit = 0.25 + 4 * torch.rand(length, 1, 1, generator=gen, dtype=torch.float64, device=gen.device)
        made[part] = (unit * (0.5 * (a + a.mT))).to(dtype)
    return made


def parts_of(count: int, elements: int) -> list[slice]:
    """``count`` blocks cut so that a part in f64 takes 128 MiB."""
    step = max(1, (1 << 24) // elements)
    return [slice(start, start + step) for start in range(0, count, step)]


def assert_accumulated(result: Tensor, before: Tensor, grads: Tensor, scale: float) -> None:
    """``result`` is ``before + scale * sum_s g_s g_s'``: f64 products in parts, on the device where the tensors are."""
    samples, (count, size, _) = grads.shape[0], before.shape
    assert result.shape == before.shape and result.dtype == before.dtype
    bound = FISHER_RMS_PER_SQRT_SAMPLE if result.dtype == torch.float32 else FISHER_RMS_F64
    for part in parts_of(count, max(size, samples) * size):
        columns = slice(part.start * size, part.stop * size)
        g = grads[:, columns].double().unflatten(1, (-1, size)).transpose(0, 1)  # [b, S, D]
        start, change = before[part].double(), scale * (g.mT @ g)
        error = (result[part].double() - start - change).norm(dim=(1, 2))
        worst = error / (start.norm(dim=(1, 2)) + change.norm(dim=(1, 2)))
        bad = (~(error == 0) & ~(worst <= bound * samples**0.5)).nonzero().flatten().tolist()
        case = f"B={count} D={size} S={samples} {grads.dtype}"
        assert not bad, f"{case}: block {part.start + bad[0]}: relative error {worst[bad[0]]:.3g}"


def damped(matrices: Tensor, damp: float | Tensor) -> Tensor:
    """``matrices`` in f64 with ``damp`` (a number, or one value a block) on the diagonal."""
    identity = torch.eye(matrices.shape[1], dtype=torch.float64, device=matrices.device)
    each = damp.double().reshape(-1, 1, 1) if isinstance(damp, Tensor) else damp
    return matrices.double() + each * identity


def assert_inverse(
    matrices: Tensor,
    inverse: Tensor,
    info: Tensor,
    condition: float | Tensor,
    *,
    damp: float | Tensor = 0.0,
) -> None:
    """Residual in f64, on the device where the tensors are; ``condition`` is that of the damped blocks."""
    count, size, _ = matrices.shape
    assert inverse.shape == matrices.shape and inverse.dtype == matrices.dtype
    assert info.shape == (count,) and info.dtype == torch.int32 and not info.any()
    assert torch.equal(inverse, inverse.mT), f"D={size}: not symmetric"
    identity = torch.eye(size, dtype=torch.float64, device=matrices.device)
    for part in parts_of(count, size * size):
        each = damp[part] if isinstance(damp, Tensor) and damp.dim() else damp
        residual = (damped(matrices[part], each) @ inverse[part].double() - identity).abs().amax((1, 2))
        worst = residual / (condition[part] if isinstance(condition, Tensor) else condition)
        bound = inverse_residual(size, torch.finfo(matrices.dtype).eps)
        bad = (~(worst <= bound)).nonzero().flatten().tolist()  # NaN is bad
        assert not bad, f"B={count} D={size}: block {part.start + bad[0]}: {worst[bad[0]]:.3g} above {bound:.3g}"


def bad_block(kind: str, size: int) -> Tensor:
    """[size, size] f32 with size > 3: what an inverse must refuse."""
    block = torch.eye(size)
    match kind:
        case "zero":
            return torch.zeros(size, size)
        case "negative pivot":
            block[2, 2] = -1.0
        case "indefinite":
            block[0, 1] = block[1, 0] = 2.0
        case "rank one":
            return torch.ones(size, size)
        case "nan diagonal":
            block[1, 1] = float("nan")
        case "nan off the diagonal":
            block[3, 1] = block[1, 3] = float("nan")
        case "inf diagonal":
            block[2, 2] = float("inf")
        case "minus inf":
            block[0, 0] = -float("inf")
        case "inf off the diagonal":
            block[3, 0] = block[0, 3] = float("inf")
    return block


FAILING_PIVOT = {
    "zero": (1,),
    "negative pivot": (3,),
    "indefinite": (2,),
    "rank one": (2,),
    "nan diagonal": (2,),
    "nan off the diagonal": (2, 4),  # the first row that holds it, or the pivot where the elimination meets it
    "inf diagonal": (3, 4),  # LAPACK notices it one pivot later, when it multiplies by zero
    "minus inf": (1,),
    "inf off the diagonal": (1, 4),
}
"""1-based; where two are named a backend may give either."""


class Guarded:
    """A copy of ``source`` between guard values, its first element ``shift`` elements off the buffer's alignment.

    None: no guards, the tensor is all of the buffer.
    """

    GUARD = 77

    def __init__(self, source: Tensor, shift: int | None) -> None:
        guards = 0 if shift is None else 128
        self.before = guards + (shift or 0)
        self.after = self.before + source.numel()
        self.buffer = torch.full((self.after + guards,), self.GUARD, dtype=source.dtype, device=source.device)
        self.tensor = self.buffer[self.before : self.after].view(source.shape)
        self.tensor.copy_(source)

    def assert_unharmed(self) -> None:
        assert bool((self.buffer[: self.before] == self.GUARD).all()), "written before the tensor"
        assert bool((self.buffer[self.after :] == self.GUARD).all()), "written after the tensor"
