# SPDX-License-Identifier: Apache-2.0
"""OBS update, loss increase and saliency of blocks, against the constrained minimiser and the definition with F^-1."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import blocks_of, constrained_minimiser, numpy, quadratic, set_change, set_saliency, summed_single_updates
from tolerances import EXAMPLE_F32, EXAMPLE_F64, SALIENCY_F64, UPDATE_F64, UPDATE_RMS_F32
from torch import Tensor

from obs_kernels.ops import block_saliency, loss_increase, obs_update, search_nm

F32, F64 = torch.float32, torch.float64


def close(actual: Tensor, expected: float | list[float], dtype: torch.dtype) -> None:
    """A worked number of math.md: 1e-5 relative in f32, 1e-6 absolute in f64 (printed with six decimals)."""
    tolerance = {"rtol": EXAMPLE_F32, "atol": 0.0} if dtype == F32 else {"rtol": 0.0, "atol": EXAMPLE_F64}
    torch.testing.assert_close(
        actual.to(dtype).reshape(-1), torch.tensor(expected, dtype=dtype).reshape(-1), **tolerance
    )


def positive_zero(values: Tensor) -> bool:
    return bool((values == 0).all()) and not bool(torch.signbit(values).any())


def keep_only(shape: tuple[int, ...], *kept: int) -> Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    mask.view(-1)[list(kept)] = True
    return mask


def problem(gen: torch.Generator, shape: tuple[int, ...], size: int) -> tuple[Tensor, Tensor]:
    weight = torch.randn(shape, generator=gen, dtype=F64)
    return weight, oracle.random_spd(gen, -(-weight.numel() // size), size)


def masks(gen: torch.Generator, shape: tuple[int, ...]) -> dict[str, Tensor]:
    numel = int(np.prod(shape))
    random = torch.rand(shape, generator=gen)
    return {
        "half": random < 0.5,
        "few kept": random < 0.1,
        "few pruned": random < 0.9,
        "none kept": torch.zeros(shape, dtype=torch.bool),
        "all kept": torch.ones(shape, dtype=torch.bool),
        "first half dead": (torch.arange(numel) >= numel // 2).view(shape),
    }


def expected_update(weight: Tensor, fisher: Tensor, mask: Tensor, damp: float | Tensor, update: str) -> np.ndarray:
    new, keep = numpy(weight).reshape(-1).copy(), mask.reshape(-1).numpy()
    rule = constrained_minimiser if update == "joint" else summed_single_updates
    for span, f in blocks_of(weight, fisher, damp):
        new[span] = rule(f, new[span], keep[span])
    return new.reshape(weight.shape)


# worked examples


@pytest.mark.parametrize("dtype", [F32, F64])
def test_example_c(dtype):
    weight, fisher = oracle.example_c(dtype)
    close(loss_increase(-weight, fisher), 460.0, dtype)
    for kept, values, loss in [((3, 6), [3.8, -4.2], 187.4), ((2, 3), [3.529412, 4.0625], 222.086397)]:
        mask = keep_only((1, 8), *kept)
        new = obs_update(weight, fisher, mask)
        close(new[mask], values, dtype)
        assert positive_zero(new[~mask])
        close(loss_increase(new - weight, fisher), loss, dtype)
    for kept, loss in [((2, 3), 240.5), ((3, 6), 199.0)]:
        new = obs_update(weight, fisher, keep_only((1, 8), *kept), update="none")
        close(loss_increase(new - weight, fisher), loss, dtype)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_example_c_saliencies(dtype):
    weight, fisher = oracle.example_c(dtype)
    singles = [2.144581, 26.921868, 51.368287, 59.678707, 2.160319, 53.793988, 22.747155, 4.001403]
    close(block_saliency(weight, fisher, 1), singles, dtype)
    close(block_saliency(weight, fisher, 4), [190.384583, 193.717795], dtype)
    close(block_saliency(weight, fisher, 2), [39.407071, 77.455087, 67.920352, 46.698217], dtype)  # P_j of example D


@pytest.mark.parametrize("dtype", [F32, F64])
def test_example_g(dtype):
    weight, fisher = oracle.example_g(dtype)
    close(fisher[0, 0, :4] + torch.tensor([0.5, 0, 0, 0], dtype=dtype), [24.791667, 5.166667, 2.458333, -0.125], F32)
    mask = keep_only((1, 16), 0, 7, 11, 12)
    for update, loss in [("none", 797.583333), ("single", 1048.629504), ("joint", 748.577367)]:
        new = obs_update(weight, fisher, mask, damp=0.5, update=update)
        close(loss_increase(new - weight, fisher, damp=0.5), loss, dtype)
        assert positive_zero(new[~mask])
    close(new[mask], [-5.262626, 0.302224, -4.722005, 2.817997], dtype)
    better = keep_only((1, 16), 0, 2, 11, 12)
    new = obs_update(weight, fisher, better, damp=0.5)
    close(loss_increase(new - weight, fisher, damp=0.5), 363.614434, dtype)
    close(new[better], [-5.156345, -6.615697, -3.077356, 4.945272], dtype)


def test_example_g_magnitude_sets():
    weight, fisher = oracle.example_g()
    new = obs_update(weight, fisher, keep_only((1, 16), 0, 2, 9, 11), damp=0.5)
    assert loss_increase(new - weight, fisher, damp=0.5).item() == pytest.approx(526.07, abs=0.005)


# against the definition


@pytest.mark.parametrize("update", ["joint", "single"])
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((4, 16), 8),  # blocks inside a row
        ((4, 16), 16),
        ((3, 10), 12),  # blocks straddle rows, the last one is short
        ((5, 7), 6),  # the last block has 5 entries
        ((1, 9), 8),  # the last block has one entry
        ((2, 3), 50),  # one short block
        ((4, 5), 1),  # the diagonal Fisher
        ((37,), 5),
        ((2, 3, 4), 7),
    ],
)
def test_update_is_the_definition(gen, shape, size, update):
    weight, fisher = problem(gen, shape, size)
    for name, mask in masks(gen, shape).items():
        expected = expected_update(weight, fisher, mask, 0.02, update)
        before = weight.clone(), fisher.clone(), mask.clone()
        new = obs_update(weight, fisher, mask, damp=0.02, update=update)
        assert new.shape == weight.shape and new.dtype == F64 and new.is_contiguous()
        np.testing.assert_allclose(numpy(new), expected, rtol=UPDATE_F64, atol=UPDATE_F64, err_msg=name)
        assert positive_zero(new[~mask])
        assert torch.equal(weight, before[0]) and torch.equal(fisher, before[1]) and torch.equal(mask, before[2])
        single = obs_update(weight.float(), fisher.float(), mask, damp=0.02, update=update)
        assert single.dtype == F32 and positive_zero(single[~mask])
        error = np.sqrt(((numpy(single) - expected) ** 2).mean())
        assert error <= UPDATE_RMS_F32 * (np.sqrt((expected**2).mean()) + 1), name


def test_joint_equals_the_definition_with_the_inverse(gen):
    """-F^-1[:, P] [(F^-1)_PP]^-1 w_P, the form of the references."""
    weight, fisher = problem(gen, (1, 12), 12)
    mask = torch.rand(1, 12, generator=gen) < 0.4
    finv = np.linalg.inv(numpy(fisher)[0])
    pruned = tuple((~mask).flatten().nonzero().flatten().tolist())
    expected = numpy(weight)[0] + set_change(finv, numpy(weight)[0], pruned)
    np.testing.assert_allclose(numpy(obs_update(weight, fisher, mask))[0], expected, atol=UPDATE_F64)
    loss = loss_increase(obs_update(weight, fisher, mask) - weight, fisher).item()
    assert loss == pytest.approx(set_saliency(finv, numpy(weight)[0], pruned), rel=1e-9)


def test_one_pruned_weight_a_block_makes_single_exact(gen):
    weight, fisher = problem(gen, (4, 8), 8)
    mask = torch.ones(4, 8, dtype=torch.bool)
    mask[range(4), [0, 3, 5, 7]] = False
    torch.testing.assert_close(obs_update(weight, fisher, mask, update="single"), obs_update(weight, fisher, mask))


@pytest.mark.parametrize("update", ["joint", "single", "none"])
def test_kept_weights_of_an_untouched_block_keep_their_bits(gen, update):
    weight, fisher = problem(gen, (2, 16), 8)
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[0, 3] = False  # block 0 only
    for dtype in (torch.float16, torch.bfloat16, F32, F64):
        w = weight.to(dtype)
        new = obs_update(w, fisher if dtype == F64 else fisher.float(), mask, update=update)
        assert new.dtype == dtype
        assert torch.equal(new.view(4, 8)[1:], w.view(4, 8)[1:])
        assert (not torch.equal(new[0, 4:8], w[0, 4:8])) == (update != "none")


@pytest.mark.parametrize("fisher_given", [True, False])
def test_none_only_prunes(gen, fisher_given):
    weight, fisher = problem(gen, (3, 8), 8)
    mask = torch.rand(3, 8, generator=gen) < 0.5
    new = obs_update(-weight.abs(), fisher if fisher_given else None, mask, update="none")
    assert torch.equal(new[mask], -weight.abs()[mask]) and positive_zero(new[~mask])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_are_updated_in_f32(gen, dtype):
    weight, fisher = problem(gen, (4, 16), 8)
    weight, fisher = weight.to(dtype), fisher.float()
    mask = torch.rand(4, 16, generator=gen) < 0.5
    new = obs_update(weight, fisher, mask, damp=0.1)
    assert new.dtype == dtype and positive_zero(new[~mask])
    assert torch.equal(new, obs_update(weight.float(), fisher, mask, damp=0.1).to(dtype))


@pytest.mark.parametrize("update", ["joint", "single"])
def test_damp_of_each_block(gen, update):
    weight, fisher = problem(gen, (5, 7), 6)
    mask = torch.rand(5, 7, generator=gen) < 0.5
    damp = torch.tensor([0.0, 0.5, 3.0, 0.1, 20.0, 1.0], dtype=F64)
    new = obs_update(weight, fisher, mask, damp=damp, update=update)
    np.testing.assert_allclose(numpy(new), expected_update(weight, fisher, mask, damp, update), atol=UPDATE_F64)
    assert not torch.allclose(new, obs_update(weight, fisher, mask, damp=0.0, update=update))
    assert torch.equal(
        obs_update(weight, fisher, mask, damp=0.5, update=update),
        obs_update(weight, fisher, mask, damp=torch.full((6,), 0.5, dtype=F64), update=update),
    )


def test_joint_needs_only_the_kept_part_positive_definite():
    """math.md 10: F_KK alone is factorised, so pruned dead inputs do no harm."""
    fisher = torch.diag(torch.tensor([2.0, 0.0, 3.0, 0.0]))[None]
    mask = torch.tensor([True, False, True, False])
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert torch.equal(obs_update(weight, fisher, mask), torch.tensor([1.0, 0.0, 3.0, 0.0]))


def test_perturbing_the_joint_update_never_helps(gen):
    weight, fisher = problem(gen, (3, 8), 12)
    mask = torch.rand(3, 8, generator=gen) < 0.5
    new = obs_update(weight, fisher, mask, damp=0.05)
    least = loss_increase(new - weight, fisher, damp=0.05).sum()
    for scale in (1e-3, 1e-1, 1.0):
        for _ in range(10):
            moved = new + scale * torch.randn(3, 8, generator=gen, dtype=F64) * mask
            assert loss_increase(moved - weight, fisher, damp=0.05).sum() > least


@given(st.integers(1, 4), st.integers(1, 20), st.integers(1, 24), st.floats(0.05, 0.95), st.integers(0, 2**31))
def test_joint_is_never_above_the_other_updates(rows, cols, size, share, seed):
    gen = torch.Generator().manual_seed(seed)
    weight, fisher = problem(gen, (rows, cols), size)
    mask = torch.rand(rows, cols, generator=gen) < share
    losses = {}
    for update in ("joint", "single", "none"):
        new = obs_update(weight, fisher, mask, damp=0.01, update=update)
        assert positive_zero(new[~mask])
        losses[update] = loss_increase(new - weight, fisher, damp=0.01)
    slack = 1e-9 * (1 + losses["none"])
    assert (losses["joint"] <= losses["single"] + slack).all() and (losses["joint"] <= losses["none"] + slack).all()


def test_stage_losses_add_up(gen):
    """math.md 7: under a fixed F, pruning in nested stages costs in sum what the last mask costs at once."""
    weight, fisher = problem(gen, (4, 24), 8)
    now, mask, total = weight, torch.ones(4, 24, dtype=torch.bool), torch.zeros(12, dtype=F64)
    for share in (0.8, 0.6, 0.3, 0.0):
        mask = mask & (torch.rand(4, 24, generator=gen) < share)
        new = obs_update(now, fisher, mask, damp=0.1)
        total += loss_increase(new - now, fisher, damp=0.1)
        now = new
        torch.testing.assert_close(loss_increase(now - weight, fisher, damp=0.1), total)
        torch.testing.assert_close(now, obs_update(weight, fisher, mask, damp=0.1))  # the path does not matter


def test_update_in_chunks(gen, monkeypatch):
    weight, fisher = problem(gen, (5, 7), 6)
    mask = torch.rand(5, 7, generator=gen) < 0.5
    damp = torch.rand(6, generator=gen, dtype=F64)

    def run() -> list[Tensor]:
        updates = [obs_update(weight, fisher, mask, damp=damp, update=update) for update in ("joint", "single")]
        saliency = [block_saliency(weight[:, :6], fisher[:5], b, damp=damp[:5], mask=mask[:, :6]) for b in (1, 3)]
        return [*updates, *saliency, loss_increase(weight, fisher, damp=damp)]

    whole = run()
    monkeypatch.setattr("obs_kernels.reference.fisher.CHUNK_BYTES", 1)
    for part, expected in zip(run(), whole, strict=True):
        torch.testing.assert_close(part, expected)


@pytest.mark.parametrize("update", ["joint", "single", "none"])
def test_strided_arguments(gen, update):
    weight = torch.randn(16, 4, generator=gen).T
    fisher = oracle.random_spd(gen, 16, 8).float()[::2]
    mask = (torch.rand(8, 32, generator=gen) < 0.5)[::2, ::2]
    damp = torch.rand(16, generator=gen)[::2]
    new = obs_update(weight, fisher, mask, damp=damp, update=update)
    assert torch.equal(
        new,
        obs_update(weight.contiguous(), fisher.contiguous(), mask.contiguous(), damp=damp.contiguous(), update=update),
    )
    assert new.is_contiguous()  # as the fake kernel says
    one = torch.randn(1, 16, generator=gen).expand(4, 16)
    assert torch.equal(
        obs_update(one, fisher, mask, update=update), obs_update(one.contiguous(), fisher, mask, update=update)
    )


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0,)])
def test_empty(shape):
    weight, fisher, mask = torch.zeros(shape), torch.zeros(0, 8, 8), torch.zeros(shape, dtype=torch.bool)
    for update in ("joint", "single", "none"):
        assert obs_update(weight, fisher, mask, update=update).shape == shape
    assert loss_increase(weight, fisher).shape == (0,)
    assert block_saliency(weight, fisher, 4).shape == (0,)
    assert block_saliency(weight, None, 4, method="magnitude").shape == (0,)


def test_damp_keeps_its_digits_in_mixed_precision(gen):
    weight, fisher = problem(gen, (4, 16), 8)
    fisher, mask = fisher.float(), torch.rand(4, 16, generator=gen) < 0.5
    new, same = (obs_update(weight, f, mask, damp=0.1) for f in (fisher, fisher.double()))
    torch.testing.assert_close(new, same, rtol=1e-12, atol=1e-12)


# loss_increase


@pytest.mark.parametrize(("shape", "size"), [((4, 16), 8), ((3, 10), 12), ((5, 7), 6), ((2, 3), 50), ((37,), 5)])
def test_loss_increase(gen, shape, size):
    change, fisher = problem(gen, shape, size)
    damp = torch.rand(fisher.shape[0], generator=gen, dtype=F64)
    for value in (0.0, 0.7, damp):
        expected = [quadratic(numpy(change).reshape(-1)[span], f) for span, f in blocks_of(change, fisher, value)]
        actual = loss_increase(change, fisher, damp=value)
        assert actual.dtype == F64
        np.testing.assert_allclose(numpy(actual), expected, rtol=1e-12)
        single = value.float() if isinstance(value, Tensor) else value
        half = loss_increase(change.float(), fisher.float(), damp=single)
        assert half.dtype == F32
        np.testing.assert_allclose(numpy(half), expected, rtol=1e-5)


def test_loss_increase_of_halves(gen):
    change, fisher = problem(gen, (2, 16), 8)
    for dtype in (torch.float16, torch.bfloat16):
        actual = loss_increase(change.to(dtype), fisher.float())
        assert actual.dtype == F32
        torch.testing.assert_close(actual, loss_increase(change.to(dtype).float(), fisher.float()))


# block_saliency


@pytest.mark.parametrize(("block", "size"), [(1, 1), (1, 8), (2, 8), (4, 4), (4, 8), (4, 16), (8, 8), (8, 24)])
def test_block_saliency_is_the_definition(gen, block, size):
    """blockN inside Fisher blocks of D = N (no cross terms) and larger."""
    weight, fisher = problem(gen, (3, 16), size)
    damp = torch.rand(fisher.shape[0], generator=gen, dtype=F64)
    expected = []
    for span, f in blocks_of(weight, fisher, damp):
        finv, w = np.linalg.inv(f), numpy(weight).reshape(-1)[span]
        expected += [set_saliency(finv, w, tuple(range(at, at + block))) for at in range(0, len(w), block)]
    actual = block_saliency(weight, fisher, block, damp=damp)
    assert actual.shape == (48 // block,) and actual.dtype == F64
    np.testing.assert_allclose(numpy(actual), expected, rtol=SALIENCY_F64)
    single = block_saliency(weight.float(), fisher.float(), block, damp=damp.float())
    assert single.dtype == F32
    np.testing.assert_allclose(numpy(single), expected, rtol=2e-3 if size > block else 1e-4)


def test_block_saliency_of_a_short_last_block(gen):
    weight, fisher = problem(gen, (5, 7), 6)
    expected = []
    for span, f in blocks_of(weight, fisher, 0.1):
        finv = np.linalg.inv(f)
        expected += [0.5 * x * x / finv[i, i] for i, x in enumerate(numpy(weight).reshape(-1)[span])]
    np.testing.assert_allclose(numpy(block_saliency(weight, fisher, 1, damp=0.1)), expected, rtol=SALIENCY_F64)


@pytest.mark.parametrize("block", [1, 4])
def test_block_saliency_with_dead_entries(gen, block):
    """Dead rows and columns leave F before damping; a dead entry costs nothing; masked gradients change nothing."""
    weight, fisher = problem(gen, (3, 16), 16)
    mask = torch.rand(3, 16, generator=gen) < 0.6
    mask[1, 4:8] = False
    expected = []
    for row in range(3):
        live = mask[row].nonzero().flatten().tolist()
        finv = np.linalg.inv(numpy(fisher)[row][np.ix_(live, live)] + 0.1 * np.eye(len(live)))
        w = numpy(weight)[row][live]
        for at in range(0, 16, block):
            inside = tuple(k for k, i in enumerate(live) if at <= i < at + block)
            expected.append(set_saliency(finv, w, inside))
    actual = block_saliency(weight, fisher, block, damp=0.1, mask=mask)
    np.testing.assert_allclose(numpy(actual), expected, rtol=SALIENCY_F64, atol=1e-12)
    live = mask.double()
    masked = fisher * live[:, :, None] * live[:, None, :]
    assert torch.equal(block_saliency(weight * mask, masked, block, damp=0.1, mask=mask), actual)
    diagonal = block_saliency(weight, fisher, block, damp=0.1, method="diagonal", mask=mask)
    cost = 0.5 * (fisher.diagonal(dim1=1, dim2=2) + 0.1) * weight**2 * mask
    torch.testing.assert_close(diagonal, cost.view(-1, block).sum(1))


@pytest.mark.parametrize("block", [1, 4])
def test_block_saliency_by_score(gen, block):
    weight, fisher = problem(gen, (3, 16), 8)
    cost = 0.5 * (fisher.diagonal(dim1=1, dim2=2) + 0.3).reshape(3, 16) * weight**2
    torch.testing.assert_close(
        block_saliency(weight, fisher, block, damp=0.3, method="diagonal"), cost.view(-1, block).sum(1)
    )
    magnitude = weight.abs().flatten() if block == 1 else (weight**2).view(-1, block).sum(1)
    torch.testing.assert_close(block_saliency(weight, None, block, method="magnitude"), magnitude)
    torch.testing.assert_close(block_saliency(weight, fisher, block, method="magnitude"), magnitude)


@pytest.mark.parametrize("block", [1, 4])
def test_magnitude_saliency_with_dead_entries(gen, block):
    weight, _ = problem(gen, (3, 16), 16)
    mask = torch.rand(3, 16, generator=gen) < 0.6
    assert torch.equal(
        block_saliency(weight, None, block, method="magnitude", mask=mask),
        block_saliency(weight * mask, None, block, method="magnitude"),
    )


def test_pruning_the_cheapest_single_costs_its_saliency(gen):
    weight, fisher = problem(gen, (1, 8), 8)
    saliency = block_saliency(weight, fisher, 1)
    for i in range(8):
        mask = torch.ones(1, 8, dtype=torch.bool)
        mask[0, i] = False
        loss = loss_increase(obs_update(weight, fisher, mask) - weight, fisher)
        torch.testing.assert_close(loss[0], saliency[i])


@pytest.mark.parametrize("exponent", [-100, -60, 60, 100])
def test_scale_of_the_fisher_does_not_matter(gen, exponent):
    weight, fisher = problem(gen, (4, 16), 16)
    weight, fisher = weight.float(), fisher.float()
    scaled = fisher * 2.0**exponent
    mask = search_nm(weight, fisher, "2:8").mask
    for update in ("joint", "single"):
        torch.testing.assert_close(
            obs_update(weight, scaled, mask, update=update), obs_update(weight, fisher, mask, update=update)
        )
    torch.testing.assert_close(block_saliency(weight, scaled, 4) * 2.0**-exponent, block_saliency(weight, fisher, 4))
