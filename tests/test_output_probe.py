# SPDX-License-Identifier: Apache-2.0
"""Stand-in losses of outputs: the second moment of their gradients, padding, dtypes, seeds, and what is refused."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import obs_kernels as obs
from obs_kernels.errors import ConfigError

DRAWS = 200_000


def gradient(logits: Tensor, **options: Any) -> Tensor:
    """Of the sum of the losses with respect to ``logits``, which it copies."""
    leaf = logits.detach().clone().requires_grad_(True)
    (found,) = torch.autograd.grad(obs.output_probe(leaf, **options).sum(), leaf)
    return found


def covariance(logits: list[float], temperature: float) -> Tensor:
    """diag(p) - p p^T, entry by entry: the covariance of a one-hot label drawn from p."""
    weights = [math.exp(x / temperature) for x in logits]
    p = [w / sum(weights) for w in weights]
    rows = [[p[i] * ((i == j) - p[j]) for j in range(len(p))] for i in range(len(p))]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("logits", [[0.5, -1.0, 2.0, 0.0, 1.0], [6.0, -3.0, 0.0]])
def test_second_moment(logits: list[float], temperature: float) -> None:
    g = gradient(torch.tensor(logits).expand(DRAWS, -1), temperature=temperature).double()
    torch.testing.assert_close(g.mT @ g / DRAWS, covariance(logits, temperature), rtol=0.01, atol=2e-3)
    torch.testing.assert_close(g.mean(0), torch.zeros(len(logits), dtype=torch.float64), rtol=0, atol=5e-3)
    torch.testing.assert_close(g.sum(1), torch.zeros(DRAWS, dtype=torch.float64), rtol=0, atol=2e-6)


def test_temperature_is_four_by_default() -> None:
    logits = torch.randn(3, 6)
    found = []
    for options in ({}, {"temperature": 4.0}, {"temperature": 1.0}):
        torch.manual_seed(5)
        found.append(obs.output_probe(logits, **options))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("hidden", [0.0, 50.0, -torch.inf, torch.inf, torch.nan])
def test_padded_classes_count_nowhere(hidden: float) -> None:
    """Whatever stands there, the others have the covariance of the distribution over them alone."""
    padding = torch.tensor([False, True, False, False, True])
    logits = torch.tensor([1.0, hidden, 0.0, -1.0, hidden])
    leaf = logits.expand(DRAWS, -1).clone().requires_grad_(True)
    losses = obs.output_probe(leaf, temperature=1.0, padding=padding)
    assert torch.isfinite(losses).all()
    (g,) = torch.autograd.grad(losses.sum(), leaf)
    assert torch.equal(g[:, padding], torch.zeros(DRAWS, 2))
    live = g[:, ~padding].double()
    torch.testing.assert_close(live.mT @ live / DRAWS, covariance([1.0, 0.0, -1.0], 1.0), rtol=0.01, atol=2e-3)


def test_a_class_that_is_impossible_already() -> None:
    """Models mask with -inf themselves; no padding is given."""
    g = gradient(torch.tensor([[1.0, -torch.inf, 0.0]]), temperature=1.0)
    assert torch.isfinite(g).all() and g[0, 1] == 0 and g[0, 0] != 0


def test_a_row_of_padding_gives_zero() -> None:
    padding = torch.tensor([[False] * 4, [True] * 4])
    leaf = torch.full((2, 4), -torch.inf)
    leaf[0] = torch.arange(4.0)
    leaf.requires_grad_(True)
    losses = obs.output_probe(leaf, padding=padding)
    (g,) = torch.autograd.grad(losses.sum(), leaf)
    assert losses[1] == 0 and losses[0] != 0
    assert torch.equal(g[1], torch.zeros(4)) and bool((g[0] != 0).all())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_output_is_no_padding(bad: float) -> None:
    """What a model gives where nothing is padded must not pass for an empty distribution: ``on_nonfinite`` looks."""
    logits = torch.zeros(2, 4)
    logits[1, 2] = bad
    losses = obs.output_probe(logits)
    assert torch.isfinite(losses[0]) and not torch.isfinite(losses[1])


@pytest.mark.parametrize(
    ("given", "gives"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtypes(given: torch.dtype, gives: torch.dtype) -> None:
    leaf = torch.randn(3, 5).to(given).requires_grad_(True)
    losses = obs.output_probe(leaf)
    (g,) = torch.autograd.grad(losses.sum(), leaf)
    assert losses.dtype == gives and losses.shape == (3,) and g.dtype == given and bool((g != 0).all())


def test_half_precision_draws_what_float_does() -> None:
    """Only the logits are rounded."""
    logits = torch.randn(4, 6).half()
    found = []
    for values in (logits, logits.float()):
        torch.manual_seed(9)
        found.append(obs.output_probe(values))
    assert torch.equal(*found)


def test_seed() -> None:
    logits = torch.randn(3, 5)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(obs.output_probe(logits))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_positions_are_independent_and_added() -> None:
    """[N, T, K]: the second moment of all T * K gradients has the covariances on its diagonal and 0 beside them."""
    logits = torch.tensor([[1.0, 0.0, -2.0], [0.0, 3.0, 1.0]])
    g = gradient(logits.expand(DRAWS, -1, -1), temperature=1.0).double().flatten(1)
    wanted = torch.block_diag(*(covariance(row.tolist(), 1.0) for row in logits))
    torch.testing.assert_close(g.mT @ g / DRAWS, wanted, rtol=0.01, atol=2e-3)


def test_samples_are_independent() -> None:
    g = torch.stack([gradient(torch.zeros(2, 3)).double() for _ in range(4000)])
    cross = torch.einsum("dk,dl->kl", g[:, 0], g[:, 1]) / len(g)
    torch.testing.assert_close(cross, torch.zeros(3, 3, dtype=torch.float64), rtol=0, atol=0.03)


def test_a_loss_is_the_sum_over_its_own_sample() -> None:
    """Linear in the logits: its value is gradient times logits; other samples have no part in it."""
    leaf = torch.randn(3, 2, 4, 5, dtype=torch.float64).requires_grad_(True)
    losses = obs.output_probe(leaf)
    (g,) = torch.autograd.grad(losses.sum(), leaf, retain_graph=True)
    assert losses.shape == (3,)
    for n, t, u in itertools.product(range(3), range(2), range(4)):
        assert float(g[n, t, u].abs().sum()) > 0
        assert abs(float(g[n, t, u].sum())) < 1e-12
    for n in range(3):
        assert float(losses[n].detach()) == pytest.approx(float((g[n] * leaf.detach()[n]).sum()), rel=1e-10)
        (own,) = torch.autograd.grad(losses[n], leaf, retain_graph=True)
        assert torch.equal(own[n], g[n]) and not own[[i for i in range(3) if i != n]].any()


def test_padding_of_positions() -> None:
    """[N, T, 1] leaves whole positions out."""
    padding = torch.tensor([[False, True, False], [False, False, True]])
    g = gradient(torch.randn(2, 3, 4), padding=padding[..., None])
    assert not g[padding].any() and bool((g[~padding] != 0).all())


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_temperatures_that_are_none(temperature: float) -> None:
    with pytest.raises(ConfigError, match="temperature"):
        obs.output_probe(torch.zeros(2, 3), temperature=temperature)


@pytest.mark.parametrize(
    "logits",
    [
        torch.zeros(3),
        torch.zeros(()),
        torch.zeros(0, 3),
        torch.zeros(2, 0),
        torch.zeros(2, 3, dtype=torch.int64),
        torch.zeros(2, 3, dtype=torch.bool),
        torch.zeros(2, 3, dtype=torch.complex64),
    ],
    ids=lambda x: f"{list(x.shape)}-{x.dtype}",
)
def test_logits_that_are_none(logits: Tensor) -> None:
    with pytest.raises(ConfigError, match="logits"):
        obs.output_probe(logits)
