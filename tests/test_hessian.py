# SPDX-License-Identifier: Apache-2.0
"""Accumulation of the Hessian that all rows share, its factor, and the loss of a change."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from oracle import numpy
from tolerances import FISHER_RMS_F64, FISHER_RMS_PER_SQRT_SAMPLE, TOKEN_SUMS
from torch import Tensor

from obs_kernels.errors import SingularBlockError
from obs_kernels.ops import accumulate_hessian_
from obs_kernels.ops.hessian import accumulate_inputs_, weigh_tokens_
from obs_kernels.reference import fisher as reference_fisher
from obs_kernels.reference import hessian as reference_hessian
from obs_kernels.reference.hessian import row_loss, upper_factor

F32, F64 = torch.float32, torch.float64


def symmetric(size: int, dtype: torch.dtype = F32) -> Tensor:
    return oracle.random_spd(torch.Generator().manual_seed(1), 1, size)[0].to(dtype)


def tokens(count: int, cols: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(count, cols, generator=torch.Generator().manual_seed(2), dtype=F64).to(dtype)


def weights(count: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(3), dtype=F64).to(dtype)


def wanted(hessian: Tensor, x: Tensor, q: Tensor | None, scale: float) -> np.ndarray:
    total, x_ = numpy(hessian).copy(), numpy(x)
    for t in range(x_.shape[0]):
        total += scale * (1.0 if q is None else float(q[t])) * np.outer(x_[t], x_[t])
    return total


def error(actual: Tensor, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean((numpy(actual) - expected) ** 2) / np.mean(expected**2)))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16, F32, F64])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_against_outer_products(dtype, x_dtype, weighted):
    hessian, x = symmetric(12, dtype), tokens(40, 12, x_dtype)
    q = weights(40) if weighted else None
    expected = wanted(hessian, x, q, 0.25)
    out = accumulate_hessian_(hessian, x, token_weight=q, scale=0.25)
    assert out is hessian and torch.equal(hessian, hessian.T)
    assert error(hessian, expected) < (FISHER_RMS_F64 if dtype == F64 else FISHER_RMS_PER_SQRT_SAMPLE)


def test_strips_and_chunks_of_tokens(monkeypatch):
    """Strips that do not divide C, one token a chunk: exact in f64 integers, and exactly symmetric in f32."""
    x, q = tokens(9, 11, F64).mul(4).round(), weights(9, F64).mul(8).round()
    expected = wanted(torch.eye(11, dtype=F64), x, q, 2.0)
    monkeypatch.setattr(reference_hessian, "STRIP", 4)
    monkeypatch.setattr(reference_fisher, "CHUNK_BYTES", 1)
    hessian = accumulate_hessian_(torch.eye(11, dtype=F64), x, token_weight=q, scale=2.0)
    assert np.array_equal(hessian.numpy(), expected)
    single = accumulate_hessian_(torch.zeros(11, 11), tokens(9, 11), token_weight=weights(9), scale=0.3)
    assert torch.equal(single, single.T)


def test_leading_dimensions_are_tokens():
    x, q = tokens(24, 8).view(2, 3, 4, 8), weights(24).view(2, 3, 4)
    flat = accumulate_hessian_(torch.zeros(8, 8), x.reshape(24, 8), token_weight=q.reshape(-1), scale=1.0)
    assert torch.equal(accumulate_hessian_(torch.zeros(8, 8), x, token_weight=q, scale=1.0), flat)
    assert torch.equal(accumulate_hessian_(torch.zeros(8, 8), x, token_weight=q.reshape(-1), scale=1.0), flat)
    one = x[0, 0, 0]
    torch.testing.assert_close(accumulate_hessian_(torch.zeros(8, 8), one, scale=1.0), torch.outer(one, one))


def test_any_strides():
    x, q = tokens(10, 6), weights(20)
    expected = accumulate_hessian_(symmetric(6), x, token_weight=q[::2], scale=1.0)
    wide = torch.zeros(8, 12)
    view = wide[1:7, ::2]
    view.copy_(symmetric(6))
    accumulate_hessian_(view, x.T.contiguous().T, token_weight=q[::2], scale=1.0)
    torch.testing.assert_close(view, expected)
    assert (wide[0] == 0).all() and (wide[:, 1::2] == 0).all()


@pytest.mark.parametrize("cols", [0, 4])
def test_no_tokens_or_no_columns(cols):
    hessian = symmetric(cols) if cols else torch.zeros(0, 0)
    before = hessian.clone()
    accumulate_hessian_(hessian, torch.zeros(0 if cols else 3, cols), token_weight=weights(0 if cols else 3), scale=1.0)
    assert torch.equal(hessian, before)


def test_additive_over_batches():
    x, q = tokens(30, 8, F64), weights(30, F64)
    whole = accumulate_hessian_(torch.zeros(8, 8, dtype=F64), x, token_weight=q, scale=0.1)
    parts = torch.zeros(8, 8, dtype=F64)
    for part in (slice(0, 7), slice(7, 30)):
        accumulate_hessian_(parts, x[part], token_weight=q[part], scale=0.1)
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
def test_sums_of_the_inputs(monkeypatch, weighted, chunk_bytes):
    """With the Hessian of the same call; the last value is the sum of the weights, what is before it stays."""
    monkeypatch.setattr(reference_fisher, "CHUNK_BYTES", chunk_bytes)
    x, q, origin = tokens(40, 12, torch.bfloat16) + 8, weights(40) if weighted else None, torch.full((12,), 8.25)
    hessian, total = torch.zeros(12, 12), torch.ones(16, dtype=F64)
    accumulate_inputs_(hessian, total, x, token_weight=q, origin=origin)
    alone = accumulate_hessian_(torch.zeros(12, 12), x, token_weight=q, origin=origin, scale=1.0)
    assert torch.equal(hessian, alone)
    u, factor = x.double() - 8.25, torch.ones(40, dtype=F64) if q is None else q.double()
    wanted_sum = torch.cat([factor @ u, torch.zeros(3, dtype=F64), factor.sum()[None]]) + 1
    size = float((factor[:, None] * u).abs().sum(0).max())
    torch.testing.assert_close(total, wanted_sum, rtol=TOKEN_SUMS, atol=TOKEN_SUMS * size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, F32])
def test_weights_of_tokens(dtype):
    dy, row_sum = tokens(300, 9, dtype), torch.ones(9, dtype=F64)
    found = weigh_tokens_(row_sum, dy, scale=3.0)
    squares = (3.0 * dy.double()).square()
    assert found.dtype == F32 and torch.equal(dy, tokens(300, 9, dtype))
    torch.testing.assert_close(found.double(), squares.sum(1), rtol=TOKEN_SUMS, atol=0.0)
    torch.testing.assert_close(row_sum, 1 + squares.sum(0), rtol=TOKEN_SUMS, atol=0.0)
    assert weigh_tokens_(row_sum.clone(), dy[:0], scale=3.0).shape == (0,)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_the_factor_is_upper(dtype):
    hessian = symmetric(20, dtype)
    factor = upper_factor(hessian)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor @ factor.T, hessian)
    # its inverse is the upper factor U of H^-1 = U^T U
    upper = torch.linalg.inv(factor.double())
    torch.testing.assert_close(upper.T @ upper, torch.linalg.inv(hessian.double()), rtol=1e-3, atol=1e-3)
    with pytest.raises(SingularBlockError, match="column 7 "):
        upper_factor(hessian - 1e3 * torch.diag(torch.arange(20) == 7))


def test_the_loss_of_a_change():
    hessian, change = symmetric(6, F64), tokens(3, 6, F64)
    scale = torch.tensor([1.0, 0.0, 2.0], dtype=F64)
    damped = numpy(hessian) + 0.3 * np.eye(6)
    expected = [s * oracle.quadratic(dw, damped) for s, dw in zip(scale.tolist(), numpy(change), strict=True)]
    np.testing.assert_allclose(row_loss(change, hessian, row_scale=scale, damp=0.3).numpy(), expected)
    np.testing.assert_allclose(row_loss(change, hessian, damp=0.3).numpy()[::2] * [1, 2], np.array(expected)[::2])
