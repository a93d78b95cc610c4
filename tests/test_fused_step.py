# SPDX-License-Identifier: Apache-2.0
"""The step of D = m on the Fisher sum itself: the results of search and update on a copy, without that copy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_pruner import batches, bits, broken_fishers, collected, config, damps_of, equal, loss_fn, mlp, weights
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from obs_kernels import OBSPruner, ops
from obs_kernels.errors import ConfigError, NonFiniteError, SingularBlockError
from obs_kernels.patterns import parse_pattern
from obs_kernels.pruning import fused_step, step
from obs_kernels.pruning.layer import PrunedLayer
from obs_kernels.reference import update

PATTERNS = ["2:4", "4:8", "2:8", "2:16", "1:4", "16:2:8", "8:2:16"]
LOSS = 2e-5
"""Relative; two f32 sums of the same change."""


def with_zeros(model: nn.Module, share: float = 0.3) -> nn.Module:
    """Zeros from before any pruning, some groups of them wholly."""
    gen = torch.Generator().manual_seed(5)
    for layer in model:
        if isinstance(layer, nn.Linear):
            layer.weight.data[torch.rand(layer.weight.shape, generator=gen) < share] = 0.0
            layer.weight.data[0, :16] = 0.0
    return model


def run(pattern: str, *, dead: bool = False, broken: tuple[int, ...] = (), parts: int = 1, **changes: Any) -> OBSPruner:
    """A pruned model; ``broken`` blocks of layer 2 are not positive definite."""
    model = with_zeros(mlp()) if dead else mlp()
    pruner = OBSPruner(model, config(pattern, recomputations=parts, **changes))
    for _ in pruner.stages:
        pruner.collect(batches(), loss_fn)
        if broken:
            pruner.set_fishers(broken_fishers(pruner, "2", list(broken)), 24)
        pruner.prune()
    return pruner


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "an absolute damping": {"damp": 1e-3},
    "a live mask": {"dead": True},
    "parts": {"parts": 3},
    "parts and a live mask": {"parts": 3, "dead": True},
    "raised damping": {"broken": (1, 4, 40), "on_singular": "increase_damp"},
    "raised damping and a live mask": {"broken": (1, 4), "on_singular": "increase_damp", "dead": True},
    "raised damping in parts": {"broken": (1, 4), "on_singular": "increase_damp", "parts": 2},
    "a layer skipped": {"broken": (3,), "on_singular": "skip"},
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_separate_steps(monkeypatch, pattern, case):
    fused = run(pattern, **CASES[case])
    monkeypatch.setattr(step, "is_fused", lambda *_: False)
    apart = run(pattern, **CASES[case])
    assert equal(fused.masks(), apart.masks())
    for one, two in zip(fused.model.parameters(), apart.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
    for one, two in zip(fused.report().layers, apart.report().layers, strict=True):
        assert one.saliency == pytest.approx(two.saliency, rel=1e-4)
        assert one.damp == pytest.approx(two.damp, rel=1e-4)  # parts: F of the weights that the last part left
        assert (one.blocks_raised, one.outcome, one.sparsity) == (two.blocks_raised, two.outcome, two.sparsity)
    assert fused.verify() == 0


def test_which_steps_are_fused():
    for changes, wanted in (
        ({}, True),
        ({"pattern": "16:2:8"}, True),
        ({"pattern": "16:2:8", "passes": 3}, True),
        ({"fisher_block_size": 16}, False),
        ({"method": "pairwise"}, False),
        ({"method": "magnitude"}, False),
        ({"update": "single"}, False),
        ({"update": "none"}, False),
        ({"pattern": "unstructured:0.5"}, False),
        ({"pattern": "block4:0.5"}, False),
    ):
        cfg = config(**({"pattern": "2:8"} | changes))
        layer = OBSPruner(mlp(), cfg).layers[0]
        assert fused_step.is_fused(layer, cfg.parsed_pattern, cfg) == wanted, changes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("pattern", ["2:4", "2:8", "16:2:8"])
def test_predicted_loss_is_that_of_the_change(pattern, dtype):
    model = with_zeros(mlp()).to(dtype)
    before = weights(model)
    pruner = collected(model, config(pattern))
    fishers = pruner.fishers()
    for row in pruner.prune().layers:
        name = f"{row.name}.weight"
        change = model.get_parameter(name).detach().double() - before[name].double()
        total = ops.loss_increase(change, fishers[name].double(), damp=row.damp).sum()
        assert row.saliency == pytest.approx(float(total), rel=LOSS)


# what is read, copied and waited for


class Watch(TorchDispatchMode):
    """Operators called, and the elements of the largest new tensor; ops of the package count as one."""

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        self.known = known.untyped_storage().data_ptr()
        self.called: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.called.add(func.name())
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() != self.known:
                self.largest = max(self.largest, value.untyped_storage().nbytes() // value.element_size())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["2:4", "2:8", "16:2:8"])
def test_the_fisher_is_not_copied_and_nothing_waits(pattern, dtype):
    """The host reads its numbers once, by a list; operators whose result it would have to look at do not occur."""
    pruner = collected(with_zeros(mlp()).to(dtype), config(pattern))
    for layer in pruner.layers:
        with Watch(layer.require_sum()) as watch:
            fused_step.prune_fused(layer, parse_pattern(pattern), pruner.config)
        assert watch.largest <= layer.weight.numel()
        assert not watch.called & {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"}
        own = {name for name in watch.called if name.startswith("obs_kernels")}
        assert len(own) == (1 if dtype == torch.float32 else 2), own


@pytest.mark.parametrize("pattern", ["2:8", "16:2:8"])
def test_no_mean_is_formed_and_the_sum_stays(monkeypatch, pattern):
    pruner = collected(mlp(), config(pattern))
    before = bits(pruner)

    def fail(_: PrunedLayer) -> Tensor:
        raise AssertionError("a copy of the Fisher")

    monkeypatch.setattr(PrunedLayer, "mean_fisher", fail)
    staged = pruner.stage_layers()
    assert equal(before, bits(pruner))
    pruner.commit(staged)
    assert pruner.verify() == 0


# bad blocks


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("pattern", ["2:8", "16:2:8"])
def test_only_failed_blocks_get_more_damping(monkeypatch, pattern, chunk):
    """Against one call with the damping of each block as it must end: times ten until F + damp is positive definite."""
    if chunk is not None:
        monkeypatch.setattr("obs_kernels.reference.fisher.CHUNK_BYTES", chunk)
    model = mlp()
    old = weights(model)["2.weight"]
    pruner = collected(model, config(pattern, on_singular="increase_damp", damp=0.02))
    fishers = pruner.fishers()
    fisher = fishers["2.weight"]
    needed = {3: 0.01, 5: 1.0, 40: 30.0, 41: 1e6}  # minus the smallest eigenvalue
    damp = torch.full((fisher.shape[0],), 0.02, dtype=torch.float64)
    for block, lowest in needed.items():
        fisher[block] = torch.eye(8)
        fisher[block, 2, 2] = -lowest
        while damp[block] <= lowest:
            damp[block] *= 10
    pruner.set_fishers(fishers, 24)
    row = {r.name: r for r in pruner.prune().layers}["2"]
    call = ops.prune_vnm if pattern == "16:2:8" else ops.prune_nm
    wanted = call(old, fisher, pattern, damp=damp)
    assert (row.blocks_raised, row.damp) == (3, 0.02) and row.outcome == "damping raised in 3 blocks"
    assert torch.equal(pruner.masks()["2.weight"], wanted.mask)
    torch.testing.assert_close(model[2].weight.detach(), wanted.weight, rtol=1e-4, atol=1e-5)
    assert row.saliency == pytest.approx(float(wanted.saliency.double().sum()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predicted_loss_with_raised_damping(dtype):
    model = mlp().to(dtype)
    old = weights(model)["2.weight"].double()
    pruner = collected(model, config("2:8", on_singular="increase_damp", damp=0.5))
    pruner.set_fishers(broken_fishers(pruner, "2", [1, 4]), 24)
    fisher, damp = pruner.fishers()["2.weight"], torch.full((192,), 0.5)
    damp[[1, 4]] = 5.0
    row = {r.name: r for r in pruner.prune().layers}["2"]
    loss = ops.loss_increase(model[2].weight.detach().double() - old, fisher.double(), damp=damp).sum()
    assert row.blocks_raised == 2 and row.saliency == pytest.approx(float(loss), rel=LOSS)


def test_errors_change_nothing_and_say_what_the_op_found():
    pruner = collected(mlp(), config("2:8"))
    pruner.set_fishers(broken_fishers(pruner, "2", [3, 9]), 24)
    before = bits(pruner)
    text = (
        r"^2: fisher: 2 of 192 blocks are not positive definite, the first is block 3 at pivot 2; raise damp, or set on"
    )
    with pytest.raises(SingularBlockError, match=text):
        pruner.prune()
    assert equal(before, bits(pruner))


@pytest.mark.parametrize("on_singular", ["raise", "increase_damp", "skip"])
def test_values_that_are_not_finite_are_refused_in_any_mode(on_singular):
    pruner = collected(mlp(), config("2:8", on_singular=on_singular))
    fishers = broken_fishers(pruner, "2", [1])
    fishers["2.weight"][5, 0, 3] = torch.nan
    pruner.set_fishers(fishers, 24)
    before = weights(pruner.model)
    with pytest.raises(NonFiniteError, match=r"fisher must be finite, got 1 NaN or Inf, the first at \[5, 0, 3\]"):
        pruner.prune()
    assert equal(before, weights(pruner.model)) and all(m.all() for m in pruner.masks().values())
    with torch.no_grad():
        pruner.model[2].weight[1, 2] = torch.inf
    with pytest.raises(NonFiniteError, match=r"weight must be finite, got 1 NaN or Inf, the first at \[1, 2\]"):
        pruner.prune()


def test_damping_beyond_f32_is_refused():
    pruner = collected(mlp(), config("2:8", damp=3e38))
    before = bits(pruner)
    with pytest.raises(ConfigError, match="damp must be finite"):
        pruner.prune()
    assert equal(before, bits(pruner))


def test_a_kept_part_that_fails_gets_more_damping(monkeypatch):
    """The factor of F may pass by rounding and that of F_KK fail: that is a bad block like any other."""
    real, calls = update.solve_kept, []

    def fail_once(kept: Tensor, rhs: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        change, info = real(kept, rhs, valid)
        calls.append(len(kept))
        if len(calls) == 1:
            info[7] = 2
        return change, info

    monkeypatch.setattr(update, "solve_kept", fail_once)
    pruner = collected(mlp(), config("2:8", on_singular="increase_damp"))
    rows = pruner.prune().layers
    assert [row.blocks_raised for row in rows] == [1, 0, 0] and calls == [64, 1, 192, 96]


def test_damping_of_the_definition():
    for dead in (False, True):
        pruner = collected(with_zeros(mlp()) if dead else mlp(), config("2:8"))
        wanted = damps_of(pruner)
        for layer in pruner.layers:
            found = layer.live_damp(pruner.config)
            assert found.dtype == torch.float64 and float(found) == pytest.approx(wanted[layer.name], rel=1e-6)
    layer.set_fisher(torch.zeros_like(layer.require_sum()), 1)
    assert float(layer.live_damp(pruner.config)) == 1e-12
