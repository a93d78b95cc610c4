# SPDX-License-Identifier: Apache-2.0
"""The transposition of a token-major x, for products that gather its columns."""

from __future__ import annotations

import itertools

import pytest
import torch
from fisher_checks import Guarded
from product_checks import DEVICE, DTYPES, gen, hopper, matmul, rows_between_nans
from torch import Tensor

from obs_kernels import _ext

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]
__all__ = ["gen", "hopper", "matmul"]  # fixtures


def random_bits(gen: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """All 16-bit patterns, NaN and infinity among them."""
    bits = torch.randint(-(2**15), 2**15, shape, generator=gen, device=DEVICE, dtype=torch.int32)
    return bits.to(torch.int16).view(dtype)


def test_transposition(gen, matmul):
    """x.T bit for bit, and zeros up to the 16 bytes; 20: columns that are padded too."""
    sizes = itertools.product((1, 7, 8, 9, 63, 64, 77, 129, 2050), (8, 20, 24, 64, 1032, 4096))
    for (tokens, cols), dtype in zip(sizes, itertools.cycle(DTYPES)):
        x = random_bits(gen, (tokens, cols), dtype)
        for given in (x, rows_between_nans(x), x.T.contiguous().T):
            before = given.contiguous().view(torch.int16).clone()
            found = matmul.as_gathered(given, "token")
            stride, height = found.stride(0), found.shape[0]
            assert (stride, height) == (-(-tokens // 8) * 8, -(-cols // 8) * 8) and found.data_ptr() % 16 == 0
            wanted = torch.zeros(height, stride, dtype=torch.int16, device=DEVICE)
            wanted[:cols, :tokens] = before.T
            assert torch.equal(found.as_strided(wanted.shape, (stride, 1)).view(torch.int16), wanted), (
                tokens,
                cols,
            )
            assert torch.equal(given.contiguous().view(torch.int16), before), "x was changed"


@pytest.mark.sanitizer
@pytest.mark.parametrize(("tokens", "cols"), [(1, 8), (77, 24), (129, 72), (2050, 1032)])
def test_transposition_stays_inside(gen, tokens, cols):
    stride = -(-tokens // 8) * 8
    x = random_bits(gen, (tokens, cols), torch.float16)
    out = Guarded(torch.full((cols, stride), 5, dtype=torch.int16, device=DEVICE), 0)
    _ext.load().transpose(
        x=x.data_ptr(), out=out.tensor.data_ptr(), tokens=tokens, cols=cols, out_stride=stride, device=0,
        stream=torch.cuda.current_stream().cuda_stream,
    )  # fmt: skip
    out.assert_unharmed()
    assert torch.equal(out.tensor[:, :tokens], x.view(torch.int16).T) and not out.tensor[:, tokens:].any()
