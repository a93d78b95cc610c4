# SPDX-License-Identifier: Apache-2.0
"""The pruning step in one call: the choice of the search, the weights of the update, and ``info`` instead of errors."""

from __future__ import annotations

import oracle
import pytest
import torch
from tolerances import EXAMPLE_F32, EXAMPLE_F64, UPDATE_F64, UPDATE_RMS_F32
from torch import Tensor

from obs_kernels.errors import ConfigError, DTypeNotSupportedError, ShapeNotSupportedError
from obs_kernels.ops import Pruned, Selection, loss_increase, obs_update, prune_nm, prune_vnm, search_nm, search_vnm
from obs_kernels.patterns import VNMPattern, parse_pattern
from obs_kernels.reference import blocks

PATTERNS = ["2:4", "1:4", "4:8", "2:8", "3:7", "2:16", "2:2:8", "4:1:8", "8:2:16"]
F32, F64 = torch.float32, torch.float64


def problem(gen: torch.Generator, pattern: str, dtype: torch.dtype, rows: int = 16) -> tuple[Tensor, Tensor]:
    m = parse_pattern(pattern).m
    weight = torch.randn(rows, 3 * m, generator=gen, dtype=F64).to(dtype)
    return weight, oracle.random_spd(gen, rows * 3, m).to(dtype)


def live_mask(gen: torch.Generator, weight: Tensor) -> Tensor:
    """Rows from full to fully dead, so that groups are full, thin and empty."""
    share = torch.linspace(1.2, -0.2, weight.shape[0])[:, None]
    return torch.rand(weight.shape, generator=gen) < share


def prune(weight: Tensor, fisher: Tensor, pattern: str, **options) -> Pruned:
    call = prune_vnm if isinstance(parse_pattern(pattern), VNMPattern) else prune_nm
    return call(weight, fisher, pattern, **options)


def search(weight: Tensor, fisher: Tensor, pattern: str, **options) -> Selection:
    call = search_vnm if isinstance(parse_pattern(pattern), VNMPattern) else search_nm
    return call(weight, fisher, pattern, **options)


def same(one: Pruned, two: Pruned) -> bool:
    fields = ("mask", "weight", "saliency", "columns", "info")
    pairs = [(getattr(one, name), getattr(two, name)) for name in fields]
    return all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_equals_search_and_update(gen, pattern, dtype, masked):
    weight, fisher = problem(gen, pattern, dtype)
    damp = torch.rand(fisher.shape[0], generator=gen)
    alive = live_mask(gen, weight) if masked else None
    done = prune(weight, fisher, pattern, damp=damp, mask=alive)
    chosen = search(weight, fisher, pattern, damp=damp, mask=alive)
    assert torch.equal(done.mask, chosen.mask) and torch.equal(done.saliency, chosen.saliency)
    assert (done.columns is None and chosen.columns is None) or torch.equal(done.columns, chosen.columns)
    live = weight if alive is None else weight.masked_fill(~alive, 0.0)
    assert torch.equal(done.weight, obs_update(live, fisher, done.mask, damp=damp))
    assert not done.info.any() and done.info.dtype == torch.int32 and done.weight.dtype == dtype
    gone = done.weight[~done.mask]
    assert not gone.any() and not torch.signbit(gone).any()
    total = loss_increase(done.weight - live, fisher, damp=damp).double().sum()
    assert float(done.saliency.double().sum()) == pytest.approx(float(total), rel=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_f32_is_near_the_minimiser_of_f64(gen, pattern):
    """The kept weights against a solve of the constrained problem by the definition."""
    weight, fisher = problem(gen, pattern, F64)
    m = fisher.shape[1]
    for dtype, bound in ((F32, UPDATE_RMS_F32), (F64, UPDATE_F64)):
        done = prune(weight.to(dtype), fisher.to(dtype), pattern, damp=0.01)
        wanted = torch.zeros(weight.numel() // m, m, dtype=F64)
        damped = fisher + 0.01 * torch.eye(m)
        rows = zip(weight.view(-1, m), damped, done.mask.view(-1, m), wanted, strict=True)
        for w, f, kept, target in rows:
            target[kept] = torch.linalg.solve(f[kept][:, kept], (f @ w)[kept])
        assert (done.weight.view(-1, m) - wanted).norm() <= bound * wanted.norm()


@pytest.mark.parametrize("dtype", [F32, F64])
def test_worked_examples(dtype):
    """math.md, examples C and E."""
    tolerance = {"rel": EXAMPLE_F32} if dtype == F32 else {"abs": EXAMPLE_F64}
    weight, fisher = oracle.example_c(dtype)
    done = prune_nm(weight, fisher, "2:8")
    assert done.mask.nonzero()[:, 1].tolist() == [3, 6] and done.columns is None
    assert done.weight[done.mask].tolist() == pytest.approx([3.8, -4.2], **tolerance)
    assert float(done.saliency) == pytest.approx(187.4, **tolerance)
    weight, fisher = oracle.example_e(dtype)
    done = prune_vnm(weight, fisher, "4:2:8", damp=1.0)
    assert done.columns.flatten().tolist() == [0, 4, 5, 6]
    assert done.weight[0, [0, 4]].tolist() == pytest.approx([-6.392318, 5.665809], **tolerance)
    assert float(done.saliency) == pytest.approx(839.487105, **tolerance)


def test_ties_go_to_the_lower_index():
    weight, fisher = torch.ones(4, 8), torch.eye(8).repeat(4, 1, 1)
    assert prune_nm(weight, fisher, "2:8").mask.nonzero()[:, 1].tolist() == [0, 1] * 4
    done = prune_vnm(weight, fisher, "2:2:8")
    assert done.mask.nonzero()[:, 1].tolist() == [0, 1] * 4 and done.columns.flatten().tolist() == [0, 1, 2, 3] * 2


@pytest.mark.parametrize("pattern", ["2:8", "2:2:8"])
def test_dead_entries_do_not_matter(gen, pattern):
    """Neither their weight nor their rows and columns of F change anything, and they come out as +0."""
    weight, fisher = problem(gen, pattern, F32)
    alive = live_mask(gen, weight)
    done = prune(weight, fisher, pattern, damp=0.1, mask=alive)
    other, live = fisher.clone(), alive.view(-1, 8)
    other.masked_fill_(~(live[:, :, None] & live[:, None, :]), -7.0)
    assert same(done, prune(weight.masked_fill(~alive, -3.0), other, pattern, damp=0.1, mask=alive))
    assert not (done.mask & ~alive).any() and not done.weight[~alive].any()
    short = live.sum(1) < 2
    assert torch.equal(done.mask.view(-1, 8)[short], live[short]) or pattern != "2:8"


@pytest.mark.parametrize("pattern", ["2:4", "2:8", "3:8", "2:16", "2:2:8"])
@pytest.mark.parametrize("factor", [2.0**9, 1000.0])
def test_scaling_fisher_and_damp_alike_changes_nothing(gen, pattern, factor):
    """What lets the pruner pass the Fisher sum; exact for a power of two."""
    weight, fisher = problem(gen, pattern, F32)
    one = prune(weight, fisher, pattern, damp=0.01)
    many = prune(weight, fisher * factor, pattern, damp=0.01 * factor)
    assert torch.equal(one.mask, many.mask)
    torch.testing.assert_close(many.weight, one.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(many.saliency / factor, one.saliency, rtol=1e-4, atol=0.0)


# bad blocks


@pytest.mark.parametrize("pattern", ["2:8", "3:8", "2:2:8"])
def test_bad_blocks_are_reported_and_left_alone(gen, pattern):
    weight, fisher = problem(gen, pattern, F32)
    damp = torch.full((48,), 0.1)
    good = prune(weight, fisher, pattern, damp=damp)
    bad = {0: 3, 7: 1, 11: -2, 20: -2, 31: -1, 40: -3, 41: -3, 47: -1}
    fisher[0] = torch.eye(8)
    fisher[0, 2, 2] = -1.0
    fisher[7] = -1.0
    fisher[11, 0, 1], fisher[20, 5, 5] = torch.nan, torch.inf
    weight.view(-1, 8)[31, 4], weight.view(-1, 8)[47, 7] = torch.nan, -torch.inf
    fisher[47, 1, 1] = torch.nan  # the weight counts first
    damp[40], damp[41] = -1.0, torch.nan
    done = prune(weight, fisher, pattern, damp=damp)
    assert {int(i): int(done.info[i]) for i in done.info.nonzero().flatten()} == bad
    wrong = done.info != 0
    assert not done.mask.view(-1, 8)[wrong].any()
    kept_as_it_was = done.weight.view(-1, 8)[wrong], weight.view(-1, 8)[wrong]
    torch.testing.assert_close(*kept_as_it_was, rtol=0.0, atol=0.0, equal_nan=True)
    panels = wrong.view(-1, parse_pattern(pattern).v if ":2:" in pattern else 1, 3).any(1)
    assert torch.equal(done.saliency.isnan(), panels)
    assert torch.equal(done.saliency[~panels], good.saliency[~panels])
    if pattern != "2:2:8":  # in a panel the others share columns without the bad row
        assert torch.equal(done.weight.view(-1, 8)[~wrong], good.weight.view(-1, 8)[~wrong])
    else:
        assert int(done.mask.view(-1, 8)[~wrong].sum()) == 2 * int((~wrong).sum())


@pytest.mark.parametrize("pattern", ["2:8", "2:2:8"])
def test_all_blocks_bad(gen, pattern):
    weight, fisher = problem(gen, pattern, F32)
    done = prune(weight, -fisher, pattern)
    assert done.info.eq(1).all() and torch.equal(done.weight, weight)
    assert not done.mask.any() and done.saliency.isnan().all()
    negative = prune(weight, fisher, pattern, damp=torch.tensor(-1.0))
    assert negative.info.eq(-3).all() and not negative.mask.any()


def test_a_singular_part_of_dead_entries_does_not_matter(gen):
    weight, fisher = problem(gen, "2:8", F32)
    fisher[:, 3, :] = fisher[:, :, 3] = 0.0
    alive = (torch.arange(24) % 8 != 3).expand(16, 24)
    assert prune_nm(weight, fisher, "2:8").info.eq(4).all()
    assert not prune_nm(weight, fisher, "2:8", mask=alive).info.any()


def test_a_kept_part_that_fails_is_reported(gen, monkeypatch):
    """The factor of F may pass by rounding and that of F_KK fail: the block is bad, nothing is raised."""
    weight, fisher = problem(gen, "2:8", F32)
    fisher[5] = -1.0
    monkeypatch.setattr(blocks, "find_bad_blocks", lambda w, f, d, damped: torch.zeros(f.shape[0], dtype=torch.int32))
    done = prune_nm(weight, fisher, "2:8")
    assert done.info.nonzero().flatten().tolist() == [5] and done.info[5] > 0
    assert torch.equal(done.weight.view(-1, 8)[5], weight.view(-1, 8)[5]) and not done.mask.view(-1, 8)[5].any()


# shapes, dtypes, errors


@pytest.mark.parametrize("pattern", ["2:8", "2:2:8"])
def test_dtypes_strides_and_chunks(gen, monkeypatch, pattern):
    weight, fisher = problem(gen, pattern, F32)
    whole = prune(weight, fisher, pattern, damp=0.1, mask=live_mask(gen, weight))
    for kind in (torch.float16, torch.bfloat16):
        half = prune(weight.to(kind), fisher, pattern, damp=0.1)
        exact = prune(weight.to(kind).float(), fisher, pattern, damp=0.1)
        assert half.weight.dtype == kind and half.saliency.dtype == F32
        assert torch.equal(half.mask, exact.mask) and torch.equal(half.weight, exact.weight.to(kind))
    gen.manual_seed(20240)
    weight, fisher = problem(gen, pattern, F32)
    alive = live_mask(gen, weight)
    monkeypatch.setattr("obs_kernels.reference.fisher.CHUNK_BYTES", 1)
    strided = prune(weight.T.contiguous().T, fisher.mT.contiguous().mT, pattern, damp=0.1, mask=alive)
    assert same(whole, strided) and all(t.is_contiguous() for t in (strided.mask, strided.weight))


def test_inputs_are_left_alone(gen):
    weight, fisher = problem(gen, "2:8", F32)
    fisher[3] = -1.0
    alive = live_mask(gen, weight)
    before = [t.clone() for t in (weight, fisher, alive)]
    prune_nm(weight, fisher, "2:8", mask=alive)
    assert all(torch.equal(a, b) for a, b in zip(before, (weight, fisher, alive), strict=True))


@pytest.mark.parametrize("rows", [0, 16])
@pytest.mark.parametrize("pattern", ["2:8", "2:2:8"])
def test_empty(pattern, rows):
    cols = 8 if rows == 0 else 0
    done = prune(torch.zeros(rows, cols), torch.zeros(0, 8, 8), pattern)
    assert done.mask.shape == done.weight.shape == (rows, cols) and done.info.shape == (0,)
    assert done.saliency.numel() == 0


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (
            ShapeNotSupportedError,
            r"fisher must be \[B, 8, 8\] for choice and update in one pass of pattern 2:8, got \[2, 16, 16\]; search",
            lambda: prune_nm(torch.zeros(2, 16), torch.zeros(2, 16, 16), "2:8"),
        ),
        (ShapeNotSupportedError, r"\[4, 8, 8\]", lambda: prune_nm(torch.zeros(2, 16), torch.zeros(3, 8, 8), "2:8")),
        (ConfigError, "fisher may be None only", lambda: prune_nm(torch.zeros(2, 16), None, "2:8")),
        (ConfigError, "must be n:m", lambda: prune_nm(torch.zeros(2, 16), torch.zeros(4, 8, 8), "2:2:8")),
        (ConfigError, "must be v:n:m", lambda: prune_vnm(torch.zeros(2, 16), torch.zeros(4, 8, 8), "2:8")),
        (
            ConfigError,
            "num_columns must be n to m",
            lambda: prune_vnm(torch.zeros(2, 8), torch.zeros(2, 8, 8), "2:2:8", num_columns=1),
        ),
        (
            ConfigError,
            "damp must be finite",
            lambda: prune_nm(torch.zeros(2, 8), torch.zeros(2, 8, 8), "2:8", damp=-1.0),
        ),
        (DTypeNotSupportedError, "weight must be", lambda: prune_nm(torch.zeros(2, 8).int(), None, "2:8")),
        (
            DTypeNotSupportedError,
            "mask must be bool",
            lambda: prune_nm(torch.zeros(2, 8), torch.zeros(2, 8, 8), "2:8", mask=torch.ones(2, 8)),
        ),
        (
            ConfigError,
            "above the exact bound",
            lambda: prune_nm(torch.zeros(2, 32), torch.zeros(2, 32, 32), "8:32"),
        ),
    ],
)
def test_bad_arguments(error, match, call):
    with pytest.raises(error, match=match):
        call()
