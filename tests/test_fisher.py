# SPDX-License-Identifier: Apache-2.0
"""Accumulation of the block Fisher, and the batched inverse."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from fisher_checks import FAILING_PIVOT, SAMPLES, SIZES, assert_accumulated, assert_inverse, bad_block, damped, spd
from hypothesis import given
from hypothesis import strategies as st
from tolerances import (
    EPS32,
    EPS64,
    EXAMPLE_F32,
    EXAMPLE_F64,
    FISHER_RMS_F64,
    FISHER_RMS_PER_SQRT_SAMPLE,
    inverse_residual,
)

import obs_kernels as obs
from obs_kernels.ops import accumulate_fisher_, invert_spd

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
EXAMPLE_TOLERANCE = {
    torch.float32: {"rtol": EXAMPLE_F32, "atol": EXAMPLE_F32},
    torch.float64: {"rtol": 0, "atol": EXAMPLE_F64},
}


def rms(a: np.ndarray) -> float:
    return float(np.sqrt((a**2).mean())) if a.size else 0.0


# accumulate_fisher_


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_example_a(dtype):
    """Per-sample and batch gradients of a Linear with two tokens."""
    x = torch.tensor([[[1, 2], [0, 1]], [[3, -1], [1, 1]]], dtype=dtype)
    dy = torch.tensor([[[1, 0], [2, -1]], [[0, 1], [1, 2]]], dtype=dtype)
    grads = torch.einsum("itr,itc->irc", dy, x)  # G_i of math.md 2
    assert grads.tolist() == [[[1, 4], [0, -1]], [[1, 1], [5, 1]]]
    sample = accumulate_fisher_(torch.zeros(2, 2, 2, dtype=dtype), grads.reshape(2, 4), scale=1 / 2)
    assert sample.tolist() == [[[1, 2.5], [2.5, 8.5]], [[12.5, 2.5], [2.5, 1]]]
    batch = accumulate_fisher_(torch.zeros(2, 2, 2, dtype=dtype), grads.mean(0).reshape(1, 4), scale=1.0)
    assert batch.tolist() == [[[1, 2.5], [2.5, 6.25]], [[6.25, 0], [0, 0]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_example_b(dtype):
    """The Sherman-Morrison recursion gives the inverse of what is accumulated, after one gradient and after two."""
    grads = torch.tensor([[1, 2], [3, -1]], dtype=dtype)
    expected = [[[1.666667, -0.666667], [-0.666667, 0.666667]], [[0.184615, 0.030769], [0.030769, 0.338462]]]
    fisher = torch.zeros(1, 2, 2, dtype=dtype)
    tolerance = {torch.float32: {"rtol": EXAMPLE_F32, "atol": EXAMPLE_F32}}.get(dtype, {"rtol": 0, "atol": EXAMPLE_F64})
    for sample in range(2):
        accumulate_fisher_(fisher, grads[sample : sample + 1], scale=1 / 2)
        inverse, info = invert_spd(fisher, damp=0.5)
        torch.testing.assert_close(inverse[0], torch.tensor(expected[sample], dtype=dtype), **tolerance)
        assert info.tolist() == [0]
    assert (fisher[0] + 0.5 * torch.eye(2)).tolist() == [[5.5, -0.5], [-0.5, 3.0]]


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("fisher_dtype", [torch.float32, torch.float64])
def test_against_outer_products(gen, fisher_dtype, grad_dtype):
    """Odd D; 1 and prime S; D = 1 is the diagonal Fisher. Half-precision gradients are exact after the cast."""
    for blocks, size, samples in [(3, 1, 5), (2, 7, 1), (5, 8, 13), (1, 50, 4), (2, 33, 64)]:
        start = oracle.random_spd(gen, blocks, size).to(fisher_dtype)
        grads = torch.randn(samples, blocks * size, generator=gen).to(grad_dtype)
        before = grads.clone()
        fisher = start.clone()
        assert accumulate_fisher_(fisher, grads, scale=0.37) is fisher
        expected = oracle.accumulate(start, grads, 0.37)
        tolerance = FISHER_RMS_PER_SQRT_SAMPLE * samples**0.5 if fisher_dtype == torch.float32 else FISHER_RMS_F64
        assert rms(oracle.numpy(fisher) - expected) <= tolerance * rms(expected)
        assert torch.equal(grads, before)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_blocks_and_samples(gen, size):
    start = torch.randn(1000, size, size, generator=gen)
    grads = torch.randn(SAMPLES[-1], 1000 * size, generator=gen)
    half = grads.bfloat16()
    for blocks in (0, 1, 3, 1000):
        for samples in SAMPLES:
            source = half if (blocks + samples) % 2 else grads  # each number of samples meets both
            part = source[:samples, : blocks * size]
            fisher = start[:blocks].clone()
            accumulate_fisher_(fisher, part, scale=0.37)
            assert_accumulated(fisher, start[:blocks], part, 0.37)


@pytest.mark.parametrize("samples", [1, 2, 31])
@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_are_exact(gen, samples, dtype):
    grads = torch.randint(-8, 9, (samples, 3 * 12), generator=gen).to(dtype)
    fisher = accumulate_fisher_(torch.ones(3, 12, 12), grads, scale=0.5)
    assert np.array_equal(oracle.numpy(fisher), oracle.accumulate(torch.ones(3, 12, 12), grads, 0.5))


def test_batches_and_order_do_not_matter(gen):
    grads = torch.randint(-8, 9, (12, 2 * 8), generator=gen).float()
    whole = accumulate_fisher_(torch.zeros(2, 8, 8), grads, scale=0.5)
    parts = torch.zeros(2, 8, 8)
    for part in (grads[7:], grads[:3], grads[3:7]):
        accumulate_fisher_(parts, part, scale=0.5)
    assert torch.equal(whole, parts)
    assert torch.equal(
        whole, accumulate_fisher_(torch.zeros(2, 8, 8), grads[torch.randperm(12, generator=gen)], scale=0.5)
    )


@pytest.mark.parametrize("shape", [(0, 8, 5), (2, 8, 0), (0, 8, 0)])
def test_empty(shape):
    blocks, size, samples = shape
    fisher = torch.full((blocks, size, size), 3.0)
    accumulate_fisher_(fisher, torch.zeros(samples, blocks * size), scale=1.0)
    assert torch.equal(fisher, torch.full((blocks, size, size), 3.0))


def test_strided_arguments(gen):
    """Transposed, sliced and expanded gradients; a Fisher that is a slice of a larger tensor is updated in place."""
    grads = torch.randn(16, 5, generator=gen).T
    expected = accumulate_fisher_(torch.zeros(2, 8, 8), grads.contiguous(), scale=1.0)
    assert torch.equal(accumulate_fisher_(torch.zeros(2, 8, 8), grads, scale=1.0), expected)
    wide = torch.randn(10, 40, generator=gen)
    assert torch.equal(
        accumulate_fisher_(torch.zeros(2, 8, 8), wide[::2, 3:35:2], scale=1.0),
        accumulate_fisher_(torch.zeros(2, 8, 8), wide[::2, 3:35:2].contiguous(), scale=1.0),
    )
    one = torch.randn(1, 16, generator=gen)
    torch.testing.assert_close(
        accumulate_fisher_(torch.zeros(2, 8, 8), one.expand(4, 16), scale=0.25),
        accumulate_fisher_(torch.zeros(2, 8, 8), one, scale=1.0),
    )
    large = torch.zeros(4, 8, 16)
    accumulate_fisher_(large[::2, :, 1::2], grads, scale=1.0)
    torch.testing.assert_close(large[::2, :, 1::2], expected)
    assert not large[1::2].any() and not large[:, :, ::2].any()


def small_chunks(monkeypatch, num_bytes):
    monkeypatch.setattr("obs_kernels.reference.fisher.CHUNK_BYTES", num_bytes)
    monkeypatch.setattr("obs_kernels.reference.fisher.CACHE_BYTES", num_bytes)


@pytest.mark.parametrize("samples", [1, 9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_give_the_same(gen, monkeypatch, samples, dtype):
    grads = torch.randn(samples, 5 * 8, generator=gen).to(dtype)
    whole = accumulate_fisher_(torch.zeros(5, 8, 8), grads, scale=1.0)
    for num_bytes in (1, 2 * 2 * samples * 8 * 4):  # one block, and two blocks with an odd one left
        small_chunks(monkeypatch, num_bytes)
        parts = accumulate_fisher_(torch.zeros(5, 8, 8), grads, scale=1.0)
        torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)


@given(st.integers(0, 4), st.integers(1, 20), st.integers(0, 9), st.integers(0, 2**31))
def test_any_shape(blocks, size, samples, seed):
    gen = torch.Generator().manual_seed(seed)
    fisher, grads = torch.randn(blocks, size, size, generator=gen), torch.randn(samples, blocks * size, generator=gen)
    expected = oracle.accumulate(fisher, grads, 2.0)
    np.testing.assert_allclose(
        oracle.numpy(accumulate_fisher_(fisher, grads, scale=2.0)), expected, rtol=1e-5, atol=1e-4
    )


# invert_spd


def check_residual(matrices: torch.Tensor, inverse: torch.Tensor, damp: np.ndarray, eps: float) -> None:
    """max |F finv - I| <= c eps cond(F) for each block, and exact symmetry."""
    f, finv = oracle.numpy(matrices), oracle.numpy(inverse)
    size = f.shape[1]
    assert torch.equal(inverse, inverse.mT)
    for block in range(f.shape[0]):
        damped = f[block] + damp[block] * np.eye(size)
        bound = inverse_residual(size, eps) * np.linalg.cond(damped)
        residual = np.abs(damped @ finv[block] - np.eye(size)).max()
        assert residual <= bound, f"block {block}: residual {residual:.3g} above {bound:.3g}"


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("size", SIZES)
def test_inverse_of_sizes_blocks_and_conditions(gen, size, condition):
    matrices = spd(gen, 1000, size, condition)
    before = matrices.clone()
    for blocks in (0, 1, 3, 1000):
        assert_inverse(matrices[:blocks], *invert_spd(matrices[:blocks]), condition)
    exact = spd(gen, 5, size, condition**1.5, torch.float64)
    assert_inverse(exact, *invert_spd(exact), condition**1.5)
    assert torch.equal(matrices, before)


@pytest.mark.parametrize("condition", [1e7, 1e8, 1e10, 1e14])
@pytest.mark.parametrize("size", SIZES[1:])
def test_no_bound_but_finite_and_symmetric_beyond(gen, size, condition):
    """Rounded to f32 such blocks may be indefinite: either a report and zeros, or something finite."""
    inverse, info = invert_spd(spd(gen, 50, size, condition))
    assert torch.equal(inverse, inverse.mT) and inverse.isfinite().all()
    assert not inverse[info != 0].any() and inverse[info == 0].diagonal(dim1=1, dim2=2).gt(0).all()
    assert ((info >= 0) & (info <= size)).all()


@pytest.mark.parametrize("size", SIZES[1:])
def test_rank_deficient_blocks_with_damp(gen, size):
    samples = (size + 1) // 2
    fisher = accumulate_fisher_(
        torch.zeros(9, size, size), torch.randn(samples, 9 * size, generator=gen), scale=1 / samples
    )
    for damp in (0.01, torch.logspace(-3, 1, 9)):
        condition = torch.linalg.cond(damped(fisher, damp))
        assert_inverse(fisher, *invert_spd(fisher, damp=damp), condition, damp=damp)


@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, EPS32), (torch.float64, EPS64)])
@pytest.mark.parametrize("size", [1, 2, 8, 17, 32, 50])
@pytest.mark.parametrize("floor", [1.0, 1e-2, 1e-4])
def test_inverse_residual(gen, size, dtype, eps, floor):
    matrices = oracle.random_spd(gen, 6, size, floor=floor).to(dtype)
    before = matrices.clone()
    inverse, info = invert_spd(matrices)
    assert inverse.dtype == dtype and info.dtype == torch.int32 and not info.any()
    check_residual(matrices, inverse, np.zeros(6), eps)
    expected = np.linalg.inv(oracle.numpy(matrices))
    worst = max(np.linalg.cond(f) for f in oracle.numpy(matrices))
    assert rms(oracle.numpy(inverse) - expected) <= 2 * size * eps * worst * rms(expected)
    assert torch.equal(matrices, before)


def test_damp_number_and_per_block(gen):
    matrices = oracle.random_spd(gen, 3, 8).float()
    damp = torch.tensor([0.5, 0.0, 2.0])
    per_block, info = invert_spd(matrices, damp=damp)
    assert info.tolist() == [0, 0, 0]
    check_residual(matrices, per_block, damp.double().numpy(), EPS32)
    for block in range(3):
        one, _ = invert_spd(matrices[block : block + 1], damp=float(damp[block]))
        torch.testing.assert_close(one[0], per_block[block], rtol=1e-6, atol=1e-6)
    everywhere, _ = invert_spd(matrices, damp=0.5)
    check_residual(matrices, everywhere, np.full(3, 0.5), EPS32)
    for form in (
        torch.tensor(0.5),
        torch.tensor([0.5]),
        torch.full((3,), 0.5),
        torch.full((3,), 0.5, dtype=torch.float64),
    ):
        assert torch.equal(invert_spd(matrices, damp=form)[0], everywhere)
    assert torch.equal(invert_spd(matrices, damp=1)[0], invert_spd(matrices, damp=1.0)[0])


def test_damp_makes_rank_one_invertible():
    grads = torch.tensor([[1.0, 2.0, 3.0]])
    fisher = accumulate_fisher_(torch.zeros(1, 3, 3), grads, scale=1.0)
    assert invert_spd(fisher)[1].item() > 0
    inverse, info = invert_spd(fisher, damp=1e-2)
    assert info.item() == 0
    check_residual(fisher, inverse, np.array([1e-2]), EPS32)


BOTH_WAYS = [5, 33]
"""A size that is swept, and one for Cholesky."""


@pytest.mark.parametrize("size", BOTH_WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", FAILING_PIVOT)
def test_bad_blocks_are_zeros_and_the_others_right(gen, kind, dtype, size):
    good = oracle.random_spd(gen, 4, size).to(dtype)
    alone, _ = invert_spd(good)
    bad = bad_block(kind, size).to(dtype)
    inverse, info = invert_spd(torch.stack([good[0], bad, good[1], good[2], bad, good[3]]))
    assert info[[0, 2, 3, 5]].tolist() == [0, 0, 0, 0]
    assert info[1] in FAILING_PIVOT[kind] and info[4] in FAILING_PIVOT[kind]
    assert torch.equal(inverse[[1, 4]], torch.zeros(2, size, size, dtype=dtype))
    torch.testing.assert_close(inverse[[0, 2, 3, 5]], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", BOTH_WAYS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 3), (3, 0)])
def test_one_sided_faults_are_reported(size, value, place):
    """Of the caller's two triangles, whichever holds it; other backends may read only one."""
    block = torch.eye(size)[None].clone()
    block[(0, *place)] = value
    inverse, info = invert_spd(block)
    assert info.item() > 0 and not inverse.any()


@pytest.mark.parametrize("size", BOTH_WAYS)
def test_an_inverse_that_overflows_is_reported(size):
    block = torch.eye(size)[None].clone()
    block[0, 2, 2] = 1e-39
    inverse, info = invert_spd(block)
    assert info.item() > 0 and not inverse.any()
    assert invert_spd(block.double())[1].item() == 0


@pytest.mark.parametrize("size", BOTH_WAYS)
def test_inverse_is_symmetric_also_if_the_matrix_is_not(gen, size):
    matrices = spd(gen, 7, size, 1e2)
    inverse, info = invert_spd(matrices * (1 + 1e-6 * torch.rand(7, size, size, generator=gen)))
    assert torch.equal(inverse, inverse.mT) and not info.any()


@pytest.mark.parametrize("damp", [float("nan"), float("inf")])
def test_not_a_damp(damp):
    with pytest.raises(obs.ops.fisher.checks.ConfigError, match="damp must be finite"):
        invert_spd(torch.eye(2)[None], damp=torch.tensor([damp]))


def test_out(gen):
    matrices = oracle.random_spd(gen, 3, 6).float()
    expected, _ = invert_spd(matrices, damp=0.1)
    out = torch.full_like(matrices, float("nan"))
    result, info = invert_spd(matrices, damp=0.1, out=out)
    assert result is out and torch.equal(out, expected) and not info.any()
    strided = torch.full((3, 6, 12), float("nan"))
    invert_spd(matrices, damp=0.1, out=strided[:, :, ::2])
    assert torch.equal(strided[:, :, ::2], expected) and strided[:, :, 1::2].isnan().all()
    result, _ = invert_spd(matrices, damp=0.1, out=matrices)
    assert result is matrices and torch.equal(matrices, expected)


def test_inverse_of_strided_and_empty(gen):
    matrices = oracle.random_spd(gen, 4, 6).float()
    strided = torch.full((8, 6, 12), float("nan"))
    strided[::2, :, ::2] = matrices
    torch.testing.assert_close(invert_spd(strided[::2, :, ::2])[0], invert_spd(matrices)[0])
    one = matrices[:1].expand(3, 6, 6)
    torch.testing.assert_close(invert_spd(one)[0], invert_spd(matrices[:1])[0].expand(3, 6, 6))
    inverse, info = invert_spd(torch.zeros(0, 6, 6))
    assert inverse.shape == (0, 6, 6) and info.shape == (0,) and info.dtype == torch.int32


@pytest.mark.parametrize("size", BOTH_WAYS)
def test_inverse_in_chunks(gen, monkeypatch, size):
    matrices = torch.cat([oracle.random_spd(gen, 5, size).float(), torch.zeros(1, size, size)])
    damp = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.0])
    whole, info = invert_spd(matrices, damp=damp)
    for num_bytes in (1, 4 * size * size * 4):  # one block, and four with two left
        small_chunks(monkeypatch, num_bytes)
        parts, parts_info = invert_spd(matrices, damp=damp)
        torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)
        assert torch.equal(info, parts_info) and info.tolist() == [0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("exponent", [-100, -60, 60, 100])
def test_inverse_at_extreme_scales(gen, exponent):
    """Powers of two only move the exponent, so the inverse must move with them (the square root halves it)."""
    matrices = oracle.random_spd(gen, 3, 8).float()
    inverse, _ = invert_spd(matrices)
    scaled, info = invert_spd(matrices * 2.0**exponent)
    assert not info.any()
    torch.testing.assert_close(scaled * 2.0**exponent, inverse)


def test_residual_at_condition_numbers_up_to_1e14(gen):
    """f64 blocks of a given condition number, as promises.md hazard 2 wants; f32 must fail or stay inside its bound."""
    for condition in (1e4, 1e8, 1e12):
        q, _ = torch.linalg.qr(torch.randn(4, 12, 12, generator=gen, dtype=torch.float64))
        spectrum = torch.logspace(0, -np.log10(condition), 12, dtype=torch.float64)
        matrices = (q * spectrum) @ q.mT
        matrices = 0.5 * (matrices + matrices.mT)
        inverse, info = invert_spd(matrices)
        assert not info.any()
        check_residual(matrices, inverse, np.zeros(4), EPS64)
        single = matrices.float()
        inverse, info = invert_spd(single)
        right = info == 0
        assert (inverse[~right] == 0).all()
        if condition == 1e4:
            assert right.all()
            check_residual(single, inverse, np.zeros(4), EPS32)
