# SPDX-License-Identifier: Apache-2.0
"""OBSPruner: one-shot runs of every pattern, exact counts, predicted loss, held masks, state, errors without traces."""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import obs_kernels as obs
from obs_kernels import OBSConfig, OBSPruner, sparsify_
from obs_kernels.errors import (
    ConfigError,
    MemoryBudgetError,
    NonFiniteError,
    ResumeMismatchError,
    ShapeNotSupportedError,
    SingularBlockError,
)
from obs_kernels.patterns import parse_pattern
from obs_kernels.pruning.schedule import recomputation_stages
from obs_kernels.reference.threshold import prune_count, select_lowest

PATTERNS = ["2:4", "4:8", "2:8", "2:16", "1:4", "16:2:8", "8:2:16", "unstructured:0.75", "block4:0.75", "block8:0.5"]
THRESHOLD = [p for p in PATTERNS if p[0].isalpha()]
PREDICTION = 2e-5
"""Relative; reported f32 loss against the f64 quadratic of the same change."""


def mlp(seed: int = 0, *, sizes: tuple[int, ...] = (16, 32, 48, 16)) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def batches(seed: int = 1, *, count: int = 6, batch: int = 4, wide: int = 16) -> list[tuple[Tensor, Tensor]]:
    gen = torch.Generator().manual_seed(seed)
    mix = torch.randn(wide, wide, generator=gen)
    return [
        (torch.randn(batch, wide, generator=gen) @ mix, torch.randn(batch, 16, generator=gen)) for _ in range(count)
    ]


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0].to(next(model.parameters()).dtype)).float() - batch[1]).square().sum(1)


def config(pattern: str = "2:4", **changes) -> OBSConfig:
    return OBSConfig(**({"pattern": pattern, "num_grads": 24, "curvature": "block"} | changes))


def collected(model: nn.Module, cfg: OBSConfig, **kwargs) -> OBSPruner:
    pruner = OBSPruner(model, cfg, **kwargs)
    if cfg.needs_fisher:
        pruner.collect(batches(), loss_fn)
    return pruner


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return set(one) == set(two) and all(torch.equal(one[k], two[k]) and one[k].dtype == two[k].dtype for k in one)


def bits(pruner: OBSPruner) -> dict[str, Tensor]:
    """Everything that an error must leave alone."""
    found = {f"w.{k}": v for k, v in weights(pruner.model).items()} | {
        f"m.{k}": v.clone() for k, v in pruner.masks().items()
    }
    for layer in pruner.layers:
        found[f"f.{layer.name}"] = torch.zeros(0) if layer.fisher_sum is None else layer.fisher_sum.clone()
        found[f"s.{layer.name}"] = torch.tensor([layer.num_grads, pruner.stage])
    return found


def damps_of(pruner: OBSPruner) -> dict[str, float]:
    """The damping of the definition: a share of the mean diagonal over live weights."""
    found = {}
    for layer in pruner.layers:
        fisher, cfg = pruner.fishers()[layer.parameter_name].double(), pruner.config
        if cfg.damp is not None:
            found[layer.name] = cfg.damp
            continue
        diagonal = fisher.diagonal(dim1=1, dim2=2).flatten()[: layer.mask.numel()]
        found[layer.name] = cfg.dampening_frac * float(diagonal[layer.mask.flatten()].mean())
    return found


def quadratic(old: Tensor, new: Tensor, fisher: Tensor, damp: float) -> float:
    """1/2 dw'(F + damp)dw in float64, the last block short."""
    size = fisher.shape[1]
    change = (new.double() - old.double()).flatten()
    change = F.pad(change, (0, fisher.shape[0] * size - change.numel())).view(-1, size)
    return float(
        0.5 * (torch.einsum("bi,bij,bj->b", change, fisher.double(), change) + damp * change.square().sum(1)).sum()
    )


def obeys(mask: Tensor, pattern: str) -> bool:
    """From the definition, without the package."""
    head = pattern.split(":")[0]
    if head == "unstructured":
        return True
    if head.startswith("block"):
        blocks = mask.unflatten(1, (-1, int(head[5:]))).float().mean(2)
        return bool(((blocks == 0) | (blocks == 1)).all())
    *v, n, m = map(int, pattern.split(":"))
    fine = bool((mask.unflatten(1, (-1, m)).sum(2) <= n).all())
    if v:
        fine &= bool((mask.unflatten(0, (-1, v[0])).unflatten(2, (-1, m)).any(1).sum(2) <= 4).all())
    return fine


# one shot


def cases() -> Iterator[tuple[str, str, str]]:
    for pattern, method, update in itertools.product(
        PATTERNS, ("combinatorial", "pairwise", "diagonal", "magnitude"), ("joint", "single", "none")
    ):
        if method != "pairwise" or pattern not in THRESHOLD:
            yield pattern, method, update


@pytest.mark.parametrize(("pattern", "method", "update"), list(cases()))
def test_one_shot(pattern, method, update):
    model = mlp()
    before = weights(model)
    pruner = collected(model, config(pattern, method=method, update=update))
    fishers = pruner.fishers() if pruner.config.needs_fisher else {}
    damps = damps_of(pruner) if fishers else {}
    report = pruner.prune()
    after, total = weights(model), 0.0
    parsed = parse_pattern(pattern)
    for layer, row in zip(pruner.layers, report.layers, strict=True):
        name = layer.parameter_name
        mask = pruner.masks()[name]
        assert obeys(mask, pattern)
        assert not after[name][~mask].any() and not torch.signbit(after[name][~mask]).any()
        units = mask.numel() // getattr(parsed, "block", 1)
        if parsed.fixed_count:
            assert int(mask.sum()) == mask.numel() * parsed.n // parsed.m
        else:
            assert int((~mask).sum()) == math.floor(parsed.sparsity * units + 0.5) * (mask.numel() // units)
        assert torch.isfinite(after[name]).all()
        assert row.sparsity == pytest.approx(1 - float(mask.float().mean()), abs=1e-12)
        assert (row.name, row.shape, row.pattern, row.outcome) == (layer.name, tuple(mask.shape), pattern, "pruned")
        if update == "none":
            assert torch.equal(after[name], before[name].masked_fill(~mask, 0.0))
        if fishers:
            assert row.damp == pytest.approx(damps[layer.name], rel=1e-6)
            loss = quadratic(before[name], after[name], fishers[name], row.damp)
            assert row.saliency == pytest.approx(loss, rel=PREDICTION)
            total += loss
        else:
            assert math.isnan(row.saliency)
    assert all(torch.equal(after[k], before[k]) for k in before if k.endswith("bias"))
    if fishers:
        assert report.saliency == pytest.approx(total, rel=PREDICTION) and report.num_grads == 24
    assert pruner.verify() == 0
    assert pruner.finalize().stages == (pattern,)
    assert all(layer.fisher_sum is None for layer in pruner.layers)  # dropped after the last use


@pytest.mark.parametrize("pattern", PATTERNS)
def test_joint_update_is_the_least_of_its_mask(pattern):
    """No other values on the same mask have a smaller loss, in total and in each layer."""
    losses = {}
    for update in ("joint", "single", "none"):
        model = mlp()
        pruner = collected(model, config(pattern, method="diagonal", update=update))
        losses[update] = [row.saliency for row in pruner.prune().layers]
    for joint, single, none in zip(losses["joint"], losses["single"], losses["none"], strict=True):
        assert joint <= single * (1 + 1e-6) and joint <= none * (1 + 1e-6)
        assert joint < 0.9 * none


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "2:8", "2:16", "16:2:8", "8:2:16"])
def test_exact_choice_is_not_worse_than_others(pattern):
    """For D = m the combinatorial choice is the optimum of the loss that is reported."""
    losses = {}
    for method in ("combinatorial", "pairwise", "diagonal", "magnitude"):
        pruner = collected(mlp(), config(pattern, method=method))
        losses[method] = [row.saliency for row in pruner.prune().layers]
    for exact, *others in zip(
        losses["combinatorial"], losses["pairwise"], losses["diagonal"], losses["magnitude"], strict=True
    ):
        assert all(exact <= other * (1 + 1e-5) for other in others)
        assert exact < others[2]


@pytest.mark.parametrize("pattern", ["2:4", "unstructured:0.7", "block4:0.5"])
@pytest.mark.parametrize("size", [8, 16])
def test_larger_fisher_blocks(pattern, size):
    model = mlp()
    before = weights(model)
    pruner = collected(model, config(pattern, fisher_block_size=size))
    fishers = pruner.fishers()
    assert all(f.shape[1:] == (size, size) for f in fishers.values())
    report = pruner.prune()
    for layer, row in zip(pruner.layers, report.layers, strict=True):
        name = layer.parameter_name
        assert row.saliency == pytest.approx(
            quadratic(before[name], weights(model)[name], fishers[name], row.damp), rel=PREDICTION
        )
    assert pruner.verify() == 0


def test_blocks_straddle_rows_and_the_tail_is_short():
    """Unstructured, D = 50 on 7 x 9: 63 weights are one whole block and one of 13."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(9, 7))
    cfg = config("unstructured:0.6")
    pruner = OBSPruner(model, cfg)
    gen = torch.Generator().manual_seed(1)
    before = weights(model)
    pruner.collect([torch.randn(8, 9, generator=gen) for _ in range(3)], lambda m, x: m(x).square().sum(1))
    fisher = pruner.fishers()["0.weight"]
    assert fisher.shape == (2, 50, 50)
    assert not fisher[1, 13:].any() and not fisher[1, :, 13:].any()
    report = pruner.prune()
    assert int((model[0].weight == 0).sum()) == math.floor(0.6 * 63 + 0.5)
    assert report.layers[0].saliency == pytest.approx(
        quadratic(before["0.weight"], model[0].weight.detach(), fisher, report.layers[0].damp), rel=PREDICTION
    )


# counts and ties


def test_threshold_example_of_the_maths():
    """math.md 8: scores (1, 1, 1, 0, 2), s = 0.4 prunes indices 3 and 2."""
    scores = torch.tensor([1.0, 1, 1, 0, 2])
    assert prune_count(0.4, 5) == 2
    assert select_lowest(scores, 2).nonzero().flatten().tolist() == [2, 3]
    model = nn.Sequential(nn.Linear(5, 1, bias=False))
    model[0].weight.data = scores.clone()[None]
    pruner = OBSPruner(model, config("unstructured:0.4", method="magnitude", update="none"))
    pruner.prune()
    assert pruner.masks()["0.weight"].tolist() == [[True, True, False, False, True]]


@pytest.mark.parametrize("count", range(9))
def test_select_lowest_is_a_stable_sort(gen, count):
    for _ in range(20):
        scores = torch.randint(0, 3, (8,), generator=gen).float()
        scores[torch.rand(8, generator=gen) < 0.2] = -torch.inf
        order = sorted(range(8), key=lambda i: (float(scores[i]), -i))
        assert set(select_lowest(scores, count).nonzero().flatten().tolist()) == set(order[:count])


@pytest.mark.parametrize(
    ("sparsity", "total", "wanted"),
    [(0.5, 5, 3), (0.4, 5, 2), (0.1, 4, 0), (0.125, 4, 1), (0.0, 7, 0), (0.999, 3, 3), (0.3, 10, 3), (0.75, 3, 2)],
)
def test_prune_count(sparsity, total, wanted):
    assert prune_count(sparsity, total) == wanted == math.floor(sparsity * total + 0.5)


def test_global_threshold_takes_tensors_by_name():
    """All scores tie: the last tensor by name loses first, whatever the order in the model; higher indices first."""
    model = nn.Module()
    model.b, model.c, model.a = (nn.Linear(3, 2, bias=False) for _ in range(3))
    for layer in (model.a, model.b, model.c):
        layer.weight.data.fill_(1.0)
    pruner = OBSPruner(model, config("unstructured:0.45", method="magnitude", update="none", global_sparsity=True))
    report = pruner.prune()
    kept = {k: v.flatten().int().tolist() for k, v in pruner.masks().items()}
    # floor(.45 * 18 + .5) = 8: all six of c, then the last two of b
    assert kept == {"a.weight": [1] * 6, "b.weight": [1, 1, 1, 1, 0, 0], "c.weight": [0] * 6}
    assert report.sparsity == pytest.approx(8 / 18)


@pytest.mark.parametrize("pattern", ["unstructured:0.7", "block4:0.7"])
@pytest.mark.parametrize("method", ["combinatorial", "diagonal", "magnitude"])
def test_global_threshold(pattern, method):
    model = mlp()
    with torch.no_grad():
        model[2].weight.mul_(0.05)
    pruner = collected(model, config(pattern, method=method, global_sparsity=True))
    pruner.prune()
    parsed = parse_pattern(pattern)
    masks = list(pruner.masks().values())
    units = sum(m.numel() for m in masks) // parsed.block
    assert sum(int((~m).sum()) for m in masks) == math.floor(parsed.sparsity * units + 0.5) * parsed.block
    shares = [1 - float(m.float().mean()) for m in masks]
    assert max(shares) - min(shares) > 0.1  # one threshold, not one a layer


def test_zero_sparsity_prunes_nothing():
    model = mlp()
    before = weights(model)
    pruner = collected(model, config("unstructured:0"))
    assert pruner.prune().sparsity == 0.0
    assert equal(weights(model), before)


# zeros that are there


def with_zeros(model: nn.Module, share: float, seed: int = 9) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    zeros = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            zeros[f"{name}.weight"] = torch.rand(module.weight.shape, generator=gen) < share
            module.weight.data.masked_fill_(zeros[f"{name}.weight"], 0.0)
    return zeros


@pytest.mark.parametrize("method", ["combinatorial", "diagonal", "magnitude"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_existing_zeros_stay_and_count(pattern, method):
    model = mlp()
    zeros = with_zeros(model, 0.3)
    pruner = collected(model, config(pattern, method=method))
    pruner.prune()
    parsed = parse_pattern(pattern)
    for name, mask in pruner.masks().items():
        assert not mask[zeros[name]].any()
        assert not model.get_parameter(name)[zeros[name]].any()
        if parsed.fixed_count:
            live = (~zeros[name]).unflatten(1, (-1, parsed.m)).sum(2)
            kept = mask.unflatten(1, (-1, parsed.m)).sum(2)
            assert bool((kept <= live.clamp(max=parsed.n)).all())
            if not isinstance(parsed, obs.patterns.VNMPattern):
                assert torch.equal(kept, live.clamp(max=parsed.n))  # a short group keeps what it has
        elif parsed.block == 1:
            assert int((~mask).sum()) == math.floor(parsed.sparsity * mask.numel() + 0.5)
        else:
            blocks = mask.view(-1, parsed.block).any(1)
            assert int((~blocks).sum()) == math.floor(parsed.sparsity * blocks.numel() + 0.5)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_finalize_with_existing_zeros(pattern):
    """A kept block may hold zeros that were there before: they are no violation."""
    model = mlp()
    with_zeros(model, 0.3)
    pruner = collected(model, config(pattern))
    pruner.prune()
    assert pruner.verify() == 0
    pruner.finalize()


@pytest.mark.parametrize("method", ["combinatorial", "magnitude"])
@pytest.mark.parametrize("pattern", ["unstructured:0.5", "block4:0.5"])
def test_dead_units_go_before_live_zeros(pattern, method):
    """Both score 0. The count is exact only if the dead are taken first, whatever their index."""
    model = nn.Sequential(nn.Linear(16, 16, bias=False))
    with torch.no_grad():
        model[0].weight[0] = 0.0
    pruner = OBSPruner(model, config(pattern, method=method))
    with torch.no_grad():
        model[0].weight[8:] = 0.0  # live
    pruner.collect(batches(), loss_fn)
    pruner.prune()
    mask = pruner.masks()["0.weight"]
    assert int((~mask).sum()) == 128 and not mask[0].any() and mask[1:8].all()


def test_zeros_beyond_the_target_are_a_no_op():
    """math.md 9: a target below the present sparsity never re-opens anything."""
    model = mlp()
    zeros = with_zeros(model, 0.8)
    before = weights(model)
    pruner = collected(model, config("unstructured:0.5"))
    pruner.prune()
    assert all(torch.equal(~mask, zeros[name]) for name, mask in pruner.masks().items())
    assert equal(weights(model), before)


def test_zeros_beyond_the_target_are_said(caplog, recwarn):
    """math.md 9: a no-op with a warning."""
    model = mlp()
    with_zeros(model, 0.8)
    collected(model, config("unstructured:0.5")).prune()
    assert caplog.records or len(recwarn)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_live_weight_that_is_zero_stays_live(pattern):
    """The first mask is read once; a weight that later happens to be 0 is not dead."""
    model = mlp()
    pruner = OBSPruner(model, config(pattern))
    with torch.no_grad():
        model[0].weight[:, ::2] = 0.0
    pruner.collect(batches(), loss_fn)
    pruner.prune()
    parsed = parse_pattern(pattern)
    mask = pruner.masks()["0.weight"]
    if parsed.fixed_count:
        assert int(mask.sum()) == mask.numel() * parsed.n // parsed.m
    assert model[0].weight[:, ::2][mask[:, ::2]].any() or not mask[:, ::2].any()
    assert OBSPruner(mlp(), config(pattern)).masks()["0.weight"].all()


def test_dead_gradients_do_not_matter():
    """Rows and columns of dead entries leave the Fisher: masked and unmasked gradients give the same result."""
    results = []
    for masked in (False, True):
        model = mlp()
        with_zeros(model, 0.3)
        pruner = collected(model, config("2:8"))
        fishers = pruner.fishers()
        if masked:
            for layer in pruner.layers:
                alive = layer.mask.view(-1, 8)
                fishers[layer.parameter_name] *= alive[:, :, None] & alive[:, None, :]
        pruner.set_fishers(fishers, 32)  # a power of two: scaling by it is exact
        pruner.prune()
        results.append(weights(model))
    assert equal(*results)


# stages


@pytest.mark.parametrize(
    ("pattern", "parts", "wanted"),
    [
        ("2:4", 1, ["2:4"]),
        ("2:4", 2, ["3:4", "2:4"]),
        ("2:8", 4, ["6:8", "5:8", "3:8", "2:8"]),
        ("2:8", 6, ["7:8", "6:8", "5:8", "4:8", "3:8", "2:8"]),
        ("2:8", 16, ["7:8", "6:8", "5:8", "4:8", "3:8", "2:8"]),
        ("2:16", 4, ["12:16", "9:16", "5:16", "2:16"]),
        ("64:2:8", 2, ["64:5:8", "64:2:8"]),
        ("unstructured:0.9", 3, ["unstructured:0.3", "unstructured:0.6", "unstructured:0.9"]),
        ("block4:0.8", 4, ["block4:0.2", "block4:0.4", "block4:0.6", "block4:0.8"]),
    ],
)
def test_stages_of_recomputations(pattern, parts, wanted):
    """n_i = m - floor(i (m - n) / R + 1/2), R capped at m - n; s_i = i / R * s."""
    assert [str(p) for p in recomputation_stages(parse_pattern(pattern), parts)] == wanted


def test_columns_of_the_middle_stages():
    """math.md 7: c = 7, 6, 4, 4 for n = 5, 4, 3, 2."""
    found = {p.n: p.num_columns for p in recomputation_stages(parse_pattern("16:2:8"), 6)}
    assert found == {7: 8, 6: 8, 5: 7, 4: 6, 3: 4, 2: 4}


@pytest.mark.parametrize("parts", [3, 4, 16])
@pytest.mark.parametrize("pattern", ["2:8", "16:2:8", "unstructured:0.8", "block4:0.75"])
def test_recomputations_nest(pattern, parts):
    model = mlp()
    cfg = config(pattern, recomputations=parts)
    pruner = OBSPruner(model, cfg)
    stages = recomputation_stages(cfg.parsed_pattern, parts)
    previous, total = {k: v.clone() for k, v in pruner.masks().items()}, 0.0
    for number, stage in enumerate(stages, 1):
        with pytest.raises(ConfigError, match="stages are done"):
            pruner.finalize()
        old = weights(model)
        pruner.collect(batches(), loss_fn)
        fishers = pruner.fishers()
        report = pruner.prune()
        for layer, row in zip(pruner.layers, report.layers, strict=True):
            name = layer.parameter_name
            mask = pruner.masks()[name]
            assert not (mask & ~previous[name]).any()
            if stage.fixed_count:
                assert int(mask.unflatten(1, (-1, stage.m)).sum(2).amax()) <= stage.n
            else:
                units = mask.view(-1, stage.block).any(1)
                assert int((~units).sum()) == math.floor(stage.sparsity * units.numel() + 0.5)
            change = quadratic(old[name], weights(model)[name], fishers[name], row.damp)
            assert row.saliency == pytest.approx(change, rel=PREDICTION)
            total += change
        previous = {k: v.clone() for k, v in pruner.masks().items()}
        assert report.stages == tuple(map(str, stages[:number])) and pruner.verify() == 0
    assert report.saliency == pytest.approx(total, rel=PREDICTION)
    with pytest.raises(ConfigError, match=f"all {len(stages)} stages.*build a new pruner"):
        pruner.prune()
    assert pruner.finalize().saliency == report.saliency
    assert all(obeys(mask, pattern) for mask in pruner.masks().values())


# errors change nothing


def broken_fishers(pruner: OBSPruner, layer: str, blocks: list[int]) -> dict[str, Tensor]:
    """The Fishers with an eigenvalue of -1 along one axis of some blocks of one layer."""
    fishers = pruner.fishers()
    for block in blocks:
        fishers[f"{layer}.weight"][block] = torch.eye(fishers[f"{layer}.weight"].shape[1])
        fishers[f"{layer}.weight"][block, 1, 1] = -1.0
    return fishers


SINGULAR = [
    ("2:4", "combinatorial"),
    ("2:4", "pairwise"),
    ("16:2:8", "combinatorial"),
    ("unstructured:0.5", "combinatorial"),
    ("block4:0.5", "combinatorial"),
]


@pytest.mark.parametrize(("pattern", "method"), SINGULAR)
@pytest.mark.parametrize("layer", ["0", "2", "4"])
def test_singular_block_raises_and_changes_nothing(pattern, method, layer):
    pruner = collected(mlp(), config(pattern, method=method))
    pruner.set_fishers(broken_fishers(pruner, layer, [3]), 24)
    before = bits(pruner)
    with pytest.raises(SingularBlockError, match=rf"^{layer}: .*block 3.*increase_damp") as caught:
        pruner.prune()
    assert isinstance(caught.value, torch.linalg.LinAlgError)
    assert equal(before, bits(pruner)) and pruner.report().layers == ()


def test_rank_one_fisher_at_tiny_damp():
    """Duplicated gradients and a damping below the rounding of F: no identity in its place, an error."""
    pruner = OBSPruner(mlp(), config("2:8", damp=1e-30))
    pruner.set_fishers({x.parameter_name: torch.ones(x.num_blocks, 8, 8) for x in pruner.layers}, 1)
    before = bits(pruner)
    with pytest.raises(SingularBlockError, match="not positive definite"):
        pruner.prune()
    assert equal(before, bits(pruner))


@pytest.mark.parametrize(("pattern", "method"), SINGULAR)
def test_increase_damp_touches_only_failing_blocks(pattern, method):
    clean_model, model = mlp(), mlp()
    clean = collected(clean_model, config(pattern, method=method))
    clean.prune()
    pruner = collected(model, config(pattern, method=method, on_singular="increase_damp", damp=None))
    size = pruner.config.block_size
    pruner.set_fishers(broken_fishers(pruner, "2", [1, 4]), 24)
    damp = damps_of(pruner)["2"]
    report = pruner.prune()
    rows = {row.name: row for row in report.layers}
    assert [rows[k].blocks_raised for k in ("0", "2", "4")] == [0, 2, 0]
    assert "raised in 2 blocks" in rows["2"].outcome and rows["0"].outcome == "pruned"
    assert rows["2"].damp == pytest.approx(damp, rel=1e-6)
    assert torch.isfinite(model[2].weight).all() and pruner.verify() == 0
    if parse_pattern(pattern).fixed_count and ":" not in pattern[2:4]:
        # the damping of the layer moves with the mean diagonal; with an absolute one untouched blocks are bitwise equal
        one, two = (
            collected(mlp(), config(pattern, method=method, on_singular=mode, damp=1e-3))
            for mode in ("increase_damp", "raise")
        )
        one.set_fishers(broken_fishers(one, "2", [1, 4]), 32)
        two.set_fishers(two.fishers(), 32)
        one.prune(), two.prune()
        a, b = one.model[2].weight.view(-1, size), two.model[2].weight.view(-1, size)
        same = (a == b).all(1)
        assert [i for i in range(len(same)) if not same[i]] in ([1], [4], [1, 4], [])
        assert same.sum() >= len(same) - 2


def test_increase_damp_gives_up():
    pruner = collected(mlp(), config("2:8", on_singular="increase_damp", damp=1e-8))
    fishers = pruner.fishers()
    fishers["2.weight"][0] = -1e30 * torch.eye(8)
    pruner.set_fishers(fishers, 24)
    before = bits(pruner)
    with pytest.raises(SingularBlockError, match=r"^2: "):
        pruner.prune()
    assert equal(before, bits(pruner))


@pytest.mark.parametrize("update", ["joint", "none"])
@pytest.mark.parametrize(("pattern", "method"), SINGULAR)
def test_skip_leaves_the_layer_dense_and_says_so(pattern, method, update):
    model = mlp()
    before = weights(model)
    pruner = collected(model, config(pattern, method=method, update=update, on_singular="skip"))
    pruner.set_fishers(broken_fishers(pruner, "2", [0]), 24)
    report = pruner.prune()
    rows = {row.name: row for row in report.layers}
    assert rows["2"].outcome.startswith("skipped: ") and "positive definite" in rows["2"].outcome
    assert rows["2"].sparsity == 0.0 and "skipped" in report.to_markdown()
    assert torch.equal(model[2].weight, before["2.weight"]) and pruner.masks()["2.weight"].all()
    assert rows["0"].outcome == "pruned" and obeys(pruner.masks()["0.weight"], pattern)
    assert pruner.verify() == 0
    pruner.finalize()
    if parse_pattern(pattern).fixed_count:
        assert set(obs.compress_(model)) == {"0", "4"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("on_singular", ["raise", "increase_damp"])
def test_non_finite_fisher_is_refused(value, on_singular):
    pruner = collected(mlp(), config("2:4", on_singular=on_singular))
    fishers = pruner.fishers()
    fishers["2.weight"][2, 0, 1] = value
    before = bits(pruner)
    with pytest.raises((NonFiniteError, SingularBlockError, ConfigError)):
        pruner.set_fishers(fishers, 24)
        before = bits(pruner)
        pruner.prune()
    now = bits(pruner)
    assert all(torch.equal(before[k], now[k]) for k in before if not k.startswith("f."))


def test_set_fishers_refuses_what_does_not_fit():
    pruner = collected(mlp(), config("2:4"))
    before, good = bits(pruner), pruner.fishers()
    for bad in ({}, good | {"2.weight": good["2.weight"][:-1]}, {k: v for k, v in good.items() if k != "4.weight"}):
        with pytest.raises(ConfigError, match=r"fishers\['[024]\.weight'\] must be \[\d+, 4, 4\], got"):
            pruner.set_fishers(bad, 24)
        assert equal(before, bits(pruner))
    assert all(torch.allclose(pruner.fishers()[k], good[k], rtol=1e-6) for k in good)


@pytest.mark.parametrize("num_grads", [0, -1])
def test_set_fishers_refuses_an_impossible_count(num_grads):
    pruner = collected(mlp(), config("2:4"))
    before = bits(pruner)
    with pytest.raises(ConfigError):
        pruner.set_fishers(pruner.fishers(), num_grads)
    assert equal(before, bits(pruner))


def test_updates_beyond_the_range_of_the_weight_are_refused():
    """A compensation that float16 cannot hold must not end as inf in the model."""
    model = nn.Sequential(nn.Linear(4, 1, bias=False)).half()
    model[0].weight.data = torch.tensor([[60000.0, 60000.0, 50000.0, 50000.0]]).half()
    fisher = torch.ones(1, 4, 4) + 0.01 * torch.eye(4)
    pruner = OBSPruner(model, config("2:4"))
    pruner.set_fishers({"0.weight": fisher}, 1)
    before = bits(pruner)
    try:
        pruner.prune()
    except (NonFiniteError, ValueError, ArithmeticError):
        assert equal(before, bits(pruner))
    assert torch.isfinite(model[0].weight).all()


def test_prune_needs_gradients():
    pruner = OBSPruner(mlp(), config("2:4"))
    before = bits(pruner)
    with pytest.raises(ConfigError, match=r"0 has no gradients; call collect\(loader, loss_fn\)"):
        pruner.prune()
    assert equal(before, bits(pruner))


# which layers


class Nets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.fc1, self.fc2, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.fc2(F.gelu(self.fc1(self.embed(x))))))


def names_of(pruner: OBSPruner) -> list[str]:
    return [layer.name for layer in pruner.layers]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, ["fc1", "fc2", "head"]),
        ({"ignore": ("head",)}, ["fc1", "fc2"]),
        ({"ignore": ("re:fc.*",)}, ["head"]),
        ({"ignore": ("re:c1",)}, ["fc1", "fc2", "head"]),  # the whole name must match
        ({"targets": ("fc2",)}, ["fc2"]),
        ({"targets": ("fc2.weight", "re:fc1|nothing")}, ["fc1", "fc2"]),
        ({"targets": ("Linear", "LayerNorm", "Embedding")}, ["fc1", "fc2", "head"]),
        ({"ignore": ("nothing",)}, ["fc1", "fc2", "head"]),
    ],
)
def test_targets_and_ignore(changes, wanted):
    assert names_of(OBSPruner(Nets(), config("2:4", **changes))) == wanted


def test_module_prefix():
    """Wrappers such as DataParallel put "module." before each name."""
    wrapped = nn.Sequential()
    wrapped.add_module("module", Nets())
    cfg = config("2:4", ignore=("re:he.*",), targets=("fc1", "re:fc2", "head"))
    assert names_of(OBSPruner(wrapped, cfg)) == ["module.fc1", "module.fc2"]
    results = []
    for model in (Nets(), wrapped):
        inner = model if isinstance(model, Nets) else model.module
        inner.load_state_dict(results[0][0] if results else inner.state_dict())
        start = weights(inner)
        pruner = OBSPruner(model, cfg)
        pruner.collect([torch.arange(12).view(3, 4)], lambda m, x: m(x).square().mean((1, 2)))
        pruner.prune()
        results.append((start, weights(inner)))
    assert equal(results[0][1], results[1][1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"targets": ("Conv1d",)}, ["['Conv1d']", "match nothing", "Nets", "Linear"]),
        ({"targets": ("Linear", "fc3")}, ["['fc3']", "match nothing"]),
        ({"targets": ("re:fc[",)}, ["re:fc[", "no regular expression"]),
        ({"ignore": ("Linear",)}, ["no layer is left", "fc1: ignored", "targets or ignore"]),
        ({"targets": ("Embedding",)}, ["no layer is left", "embed: embedding"]),
        ({"targets": ()}, ["no layer is left"]),
    ],
)
def test_targets_that_do_not_fit(changes, words):
    with pytest.raises(ConfigError) as caught:
        OBSPruner(Nets(), config("2:4", **changes))
    for word in words:
        assert word in str(caught.value)


def test_tied_weights_are_left_out_and_named():
    model = Nets()
    model.head.weight = model.embed.weight
    model.fc2.weight = model.fc1.weight
    model.extra = nn.Linear(8, 8)
    pruner = OBSPruner(model, config("2:4"))
    assert names_of(pruner) == ["extra"]
    reasons = {s.name: s.reason for s in pruner.skipped}
    assert reasons == {"head": "tied with embed", "fc1": "tied with fc2", "fc2": "tied with fc1"}
    assert "tied with embed" in str(pruner.plan())


def test_a_tie_by_transposed_view_is_seen():
    model = Nets()
    model.fc2.weight = nn.Parameter(model.fc1.weight.data.t())
    assert "fc1" not in names_of(OBSPruner(model, config("2:4")))


def test_a_shared_module_is_counted_once():
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(16, 16))
    pruner = OBSPruner(model, config("2:4"))
    assert names_of(pruner) == ["0", "4"]
    pruner.collect(batches(), loss_fn)
    report = pruner.prune()
    assert len(report.layers) == 2 and pruner.verify() == 0
    assert model[0] is model[2] and obeys(model[2].weight != 0, "2:4")
    pruner.finalize()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weight_is_refused(value):
    model = mlp()
    model[2].weight.data[3, 4] = value
    with pytest.raises(NonFiniteError, match=r"2\.weight must be finite, got 1 NaN or Inf"):
        OBSPruner(model, config("2:4"))
    assert names_of(OBSPruner(model, config("2:4", ignore=("2",)))) == ["0", "4"]


def test_a_weight_that_became_nan_is_refused_and_changes_nothing():
    model = mlp()
    pruner = collected(model, config("2:4"))
    model[4].weight.data[0, 0] = float("nan")
    before = bits(pruner)
    with pytest.raises(NonFiniteError):
        pruner.prune()
    now = bits(pruner)
    assert all(torch.equal(before[k].nan_to_num(7.5), now[k].nan_to_num(7.5)) for k in before)


def test_empty_layers_are_left_out():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 0))
    pruner = OBSPruner(model, config("2:4"))
    assert names_of(pruner) == ["0"] and [(s.name, s.reason) for s in pruner.skipped] == [("1", "empty")]


# shapes that do not fit


def odd_net() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 10), nn.GELU(), nn.Linear(10, 16))


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("2:8", ["2.weight is [10, 12]", "2:8", "cols % 8 == 0", "pad to 16", "on_unsupported"]),
        ("8:2:4", ["0.weight is [12, 16]", "rows % 8 == 0", "v = 4 fits"]),
        ("block4:0.5", ["4.weight is [16, 10]", "cols % 4 == 0"]),
    ],
)
def test_unsupported_shapes_raise(pattern, words):
    model = odd_net()
    before = weights(model)
    with pytest.raises(ShapeNotSupportedError) as caught:
        OBSPruner(model, config(pattern))
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert equal(weights(model), before)


def test_a_fisher_block_that_does_not_fit_the_columns():
    with pytest.raises(
        ShapeNotSupportedError,
        match=r"2\.weight is \[10, 12\]; fisher_block_size = 8 must divide cols.*fisher_block_size = 4",
    ):
        OBSPruner(odd_net(), config("2:4", fisher_block_size=8))


@pytest.mark.parametrize(
    ("pattern", "kept"), [("2:8", ["0"]), ("8:2:4", []), ("4:2:4", ["0"]), ("block4:0.5", ["0", "2"])]
)
def test_unsupported_shapes_are_skipped_and_named(pattern, kept):
    model = odd_net()
    if not kept:
        with pytest.raises(ConfigError, match="no layer is left"):
            OBSPruner(model, config(pattern, on_unsupported="skip"))
        return
    before = weights(model)
    pruner = collected(model, config(pattern, on_unsupported="skip"))
    assert names_of(pruner) == kept
    assert {s.name for s in pruner.skipped} == {"0", "2", "4"} - set(kept)
    assert all("% " in s.reason for s in pruner.skipped)
    report = pruner.prune()
    assert {name for name, _ in report.skipped} == {"0", "2", "4"} - set(kept)
    assert all(torch.equal(weights(model)[f"{s.name}.weight"], before[f"{s.name}.weight"]) for s in pruner.skipped)
    pruner.finalize()


def padded_to(values: Tensor, shape: tuple[int, int]) -> Tensor:
    return F.pad(values, (0, shape[1] - values.shape[1], 0, shape[0] - values.shape[0]))


@pytest.mark.parametrize("method", ["combinatorial", "magnitude"])
@pytest.mark.parametrize(
    ("pattern", "shapes"),
    [
        ("2:8", [(12, 16), (10, 16), (16, 16)]),
        ("8:2:4", [(16, 16), (16, 12), (16, 12)]),
        ("8:2:16", [(16, 16), (16, 16), (16, 16)]),
        ("block4:0.5", [(12, 16), (10, 12), (16, 12)]),
        ("block8:0.5", [(12, 16), (10, 16), (16, 16)]),
    ],
)
def test_unsupported_shapes_are_padded(pattern, shapes, method):
    model = odd_net()
    before = weights(model)
    pruner = collected(model, config(pattern, on_unsupported="pad", method=method))
    plan = pruner.plan()
    for layer, row, shape in zip(pruner.layers, plan.layers, shapes, strict=True):
        assert layer.padded == shape
        assert (f"padded to {list(shape)}" in row.reason) is (shape != tuple(layer.mask.shape))
    fishers = pruner.fishers()
    report = pruner.prune()
    parsed = parse_pattern(pattern)
    for layer, row, shape in zip(pruner.layers, report.layers, shapes, strict=True):
        name = layer.parameter_name
        mask = padded_to(pruner.masks()[name], shape)
        if parsed.fixed_count:
            assert obeys(mask, pattern)
        else:  # of a block that padding cuts, the real part is kept or pruned whole
            real = padded_to(torch.ones_like(layer.mask), shape).view(-1, parsed.block)
            kept = mask.view(-1, parsed.block)
            assert bool(
                ((kept == real) | ~kept).all(1).logical_and((kept.any(1) == (kept == real).all(1)) | ~real.any(1)).all()
            )
        old, new = padded_to(before[name], shape), padded_to(weights(model)[name], shape)
        assert row.saliency == pytest.approx(quadratic(old, new, fishers[name], row.damp), rel=PREDICTION)
    assert pruner.verify() == 0
    pruner.finalize()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pad_changes_nothing_where_nothing_is_padded(pattern):
    results = []
    for mode in ("raise", "pad"):
        model = mlp()
        collected(model, config(pattern, on_unsupported=mode)).prune()
        results.append(weights(model))
    assert equal(*results)


# the plan and the memory


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("size", [None, 16])
def test_plan_says_the_bytes_that_are_allocated(pattern, size):
    model = mlp()
    before = weights(model)
    pruner = OBSPruner(model, config(pattern, fisher_block_size=size), memory_budget=1 << 30)
    plan = pruner.plan()
    assert equal(weights(model), before) and all(
        layer.fisher_sum is None for layer in pruner.layers
    )  # nothing is computed
    pruner.collect(batches(), loss_fn)
    real = {layer.name: layer.fisher_sum.untyped_storage().nbytes() for layer in pruner.layers}
    assert {row.name: row.fisher_bytes for row in plan.layers} == real
    assert plan.fisher_bytes == sum(real.values()) and plan.num_groups == 1 and plan.budget == 1 << 30
    assert plan.num_weights == sum(layer.mask.numel() for layer in pruner.layers)
    assert {row.name: row.block_size for row in plan.layers} == {
        layer.name: layer.fisher_sum.shape[1] for layer in pruner.layers
    }


def test_plan_as_text_and_json():
    pruner = OBSPruner(odd_net(), config("2:8", on_unsupported="skip"), memory_budget=10**6)
    plan = pruner.plan()
    assert json.loads(json.dumps(plan.to_dict())) == plan.to_dict()
    assert plan.to_dict()["layers"][0] == {
        "name": "0",
        "shape": [12, 16],
        "pattern": "2:8",
        "block_size": 8,
        "fisher_bytes": 4 * 24 * 64,
        "group": 0,
        "reason": "",
    }
    text = str(plan)
    assert text == plan.to_markdown() and "| 0 | 12 x 16 | 2:8 | 8 |" in text
    assert "skipped: 2.weight is [10, 12]" in text and "192 weights" in text and "1 pass " in text


def test_plan_without_gradients_needs_no_memory():
    pruner = OBSPruner(mlp(), config("2:8", method="magnitude", update="none"), memory_budget=0)
    assert pruner.plan().fisher_bytes == 0 and pruner.plan().num_groups == 1
    pruner.prune()


def test_default_budget_is_a_share_of_the_free_memory():
    budget = OBSPruner(mlp(), config("2:8")).plan().budget
    assert 1 << 20 < budget < 1 << 50


class Untouched:
    """A loader that must not be read."""

    def __iter__(self):
        raise AssertionError("the loader was read")


def test_collect_refuses_before_the_first_batch():
    pruner = OBSPruner(mlp(), config("2:8"), memory_budget=50_000)
    need = pruner.plan().fisher_bytes
    assert need == 4 * 8 * (16 * 32 + 32 * 48 + 48 * 16) > 50_000
    with pytest.raises(MemoryBudgetError) as caught:
        pruner.collect(Untouched(), loss_fn)
    for word in ("3 layers", "largest: 2", "D = 8", "the budget is", "fisher_block_size"):
        assert word in str(caught.value)
    assert all(layer.fisher_sum is None for layer in pruner.layers)
    with pytest.raises(MemoryBudgetError):
        pruner.accumulate()


def test_small_budgets_are_named_in_readable_numbers():
    """A message with "0 MB" of "0 MB" says nothing."""
    pruner = OBSPruner(mlp(), config("2:8"), memory_budget=50_000)
    with pytest.raises(MemoryBudgetError) as caught:
        pruner.collect(Untouched(), loss_fn)
    assert " 0 MB" not in str(caught.value)


def test_collected_layers_count_against_the_budget():
    """Layer by layer must not exceed what all at once may not."""
    pruner = OBSPruner(mlp(), config("2:8"), memory_budget=60_000)
    with pytest.raises(MemoryBudgetError):
        for layer in pruner.layers:
            pruner.collect(batches(), loss_fn, layers=[layer.name])


@pytest.mark.parametrize("budget", [0, 40_000])
def test_sparsify_refuses_a_layer_that_does_not_fit(budget):
    model = mlp()
    before = weights(model)
    with pytest.raises(
        MemoryBudgetError, match=r"the Fisher of \w+ \[\d+, \d+\] alone needs .* D = 8, the budget is .* k?B"
    ):
        sparsify_(model, config("2:8"), Untouched(), loss_fn, memory_budget=budget)
    assert equal(weights(model), before)


def test_a_global_threshold_is_not_done_in_groups():
    model = mlp()
    with pytest.raises(MemoryBudgetError, match="global threshold needs the Fisher of all layers at once"):
        sparsify_(
            model,
            config("unstructured:0.5", fisher_block_size=8, global_sparsity=True),
            Untouched(),
            loss_fn,
            memory_budget=50_000,
        )


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("pattern", ["2:8", "16:2:8", "block4:0.75"])
def test_groups_give_bitwise_the_same(pattern, parts):
    cfg = config(pattern, recomputations=parts, fisher_block_size=8)
    results, passes = [], []
    for budget in (1 << 30, 80_000, 49_152):
        model, drawn = mlp(), 0

        class Loader:
            def __iter__(self):
                nonlocal drawn
                drawn += 1  # at the first batch
                yield from batches()

        plan = OBSPruner(model, cfg, memory_budget=budget).plan()
        sizes = [sum(row.fisher_bytes for row in plan.layers if row.group == g) for g in range(plan.num_groups)]
        assert max(sizes) <= budget
        report = sparsify_(model, cfg, Loader(), loss_fn, memory_budget=budget)
        assert drawn == plan.num_groups * len(recomputation_stages(cfg.parsed_pattern, parts))
        assert all(row.outcome == "pruned" for row in report.layers) and report.num_grads == 24
        results.append((weights(model), report.saliency))
        passes.append(plan.num_groups)
    assert passes == [1, 2, 3]
    assert equal(results[0][0], results[1][0]) and equal(results[0][0], results[2][0])
    assert results[0][1] == results[1][1] == results[2][1]


@pytest.mark.parametrize("changes", [{"budget": 49_152}, {"recomputations": 2}])
def test_an_iterator_is_refused_where_several_passes_are_needed(changes):
    model = mlp()
    before = weights(model)
    cfg = config("2:8", recomputations=changes.get("recomputations", 1))
    loader = iter(batches())
    with pytest.raises(ConfigError, match=r"iterator.*only once.*(list|DataLoader)"):
        sparsify_(model, cfg, loader, loss_fn, memory_budget=changes.get("budget"))
    assert equal(weights(model), before) and len(list(loader)) == 6


def test_a_loader_without_a_length_is_fine_for_several_passes():
    """A DataLoader over an IterableDataset has no len(), and so no truth value."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from batches()

    model, again = mlp(), mlp()
    sparsify_(model, config("2:8", recomputations=2), torch.utils.data.DataLoader(Stream(), batch_size=None), loss_fn)
    sparsify_(again, config("2:8", recomputations=2), batches(), loss_fn)
    assert equal(weights(model), weights(again))


def test_an_iterator_is_fine_for_one_pass():
    model, again = mlp(), mlp()
    sparsify_(model, config("2:8"), iter(batches()), loss_fn)
    sparsify_(again, config("2:8"), batches(), loss_fn)
    assert equal(weights(model), weights(again))


@pytest.mark.parametrize(("loader", "fn"), [(None, loss_fn), ([], None), (None, None)])
def test_sparsify_needs_data_where_it_needs_gradients(loader, fn):
    model = mlp()
    with pytest.raises(ConfigError, match=r"loader and loss_fn are needed for method='combinatorial'"):
        sparsify_(model, config("2:8"), loader, fn)
    report = sparsify_(model, config("2:8", method="magnitude", update="none"), None, None)
    assert report.sparsity == 0.75 and report.num_grads == 0


def test_sparsify_equals_the_steps():
    one, two = mlp(), mlp()
    report = sparsify_(one, config("2:8", recomputations=2), batches(), loss_fn)
    pruner = OBSPruner(two, config("2:8", recomputations=2))
    for _ in pruner.stages:
        pruner.collect(batches(), loss_fn)
        pruner.prune()
    assert equal(weights(one), weights(two)) and pruner.finalize().saliency == report.saliency


# holding the masks


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=0.01),
    ],
)
def test_masks_hold_through_training(make, resume):
    model, data = mlp(), batches()
    optimizer = make(model.parameters())

    def train(steps):
        for batch in data[:steps]:
            optimizer.zero_grad()
            loss_fn(model, batch).mean().backward()
            optimizer.step()

    train(4)  # momentum is there before the masks are
    pruner = collected(model, config("2:8"))
    pruner.prune()
    if resume:
        state = pruner.state_dict()
        pruner = OBSPruner(model, config("2:8"))
        pruner.load_state_dict(state)
    grown = 0
    for _ in range(3):
        train(2)
        grown += pruner.verify()
        pruner.apply_masks()
        assert pruner.verify() == 0 and all(obeys(model[i].weight != 0, "2:8") for i in (0, 2, 4))
    assert grown > 100  # without apply_masks they do grow back
    train(1)
    pruner.finalize()
    assert pruner.verify() == 0


def test_apply_masks_writes_positive_zeros_over_anything():
    model = mlp()
    pruner = collected(model, config("2:4"))
    pruner.prune()
    gone = ~pruner.masks()["0.weight"]
    kept = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight[gone] = float("nan")
    assert pruner.verify() == int(gone.sum())
    with torch.no_grad():
        model[0].weight[gone] = -1e-40  # a subnormal counts too
    assert pruner.verify() == int(gone.sum())
    pruner.apply_masks()
    assert torch.equal(model[0].weight, kept) and not torch.signbit(model[0].weight[gone]).any()
    assert model[0].weight.requires_grad


def test_verify_sees_a_mask_that_breaks_the_pattern():
    model = mlp()
    pruner = collected(model, config("2:4"))
    assert pruner.verify() == 0  # nothing is promised yet
    pruner.prune()
    pruner.layers[1].mask[5, :4] = True
    assert pruner.verify() == 1
    with pytest.raises(ConfigError, match="1 violations of pattern 2:4"):
        pruner.finalize()


def test_finalize_is_idempotent_and_refuses_early():
    model = mlp()
    pruner = collected(model, config("2:8", recomputations=2))
    with pytest.raises(ConfigError, match="0 of 2 stages"):
        pruner.finalize()
    pruner.prune()
    with pytest.raises(ConfigError, match=r"1 of 2 stages are done.*collect and prune again"):
        pruner.finalize()
    pruner.collect(batches(), loss_fn)
    pruner.prune()
    first = pruner.finalize()
    after = weights(model)
    second = pruner.finalize()
    assert first == second and equal(after, weights(model))
    assert set(obs.compress_(model).values()) == {"2:8"}


# state


def saved(state: dict) -> dict:
    """Through a file, read without pickle's power."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("pattern", ["2:8", "16:2:8", "unstructured:0.8", "block4:0.75"])
@pytest.mark.parametrize("collected_before", [0, 2, 6])
def test_state_round_trip_in_the_middle(pattern, collected_before):
    """Stop after some batches of the second stage, go on in a new process's pruner: bitwise the same end."""
    cfg = config(pattern, recomputations=3, num_grads=8)
    ends, reports = [], []
    for interrupted in (False, True):
        model, data = mlp(), batches()
        pruner = OBSPruner(model, cfg)
        pruner.collect(data[:2], loss_fn)
        pruner.prune()
        if collected_before:
            pruner.collect(data[:1], loss_fn)
        if interrupted:
            state, stored = saved(pruner.state_dict()), saved(model.state_dict())
            model = mlp(seed=77)
            model.load_state_dict(stored)
            with torch.no_grad():
                model[0].weight[0, 0] = model[0].weight[0, 0]
            pruner = OBSPruner(model, cfg)
            pruner.load_state_dict(state)
        pruner.collect(data[1:], loss_fn)
        pruner.prune()
        pruner.collect(data, loss_fn)
        pruner.prune()
        reports.append(pruner.finalize())
        ends.append(weights(model) | pruner.masks())
    assert equal(*ends)
    one, two = reports
    assert (one.stages, one.saliency, one.num_grads) == (two.stages, two.saliency, two.num_grads)
    assert [row.sparsity for row in one.layers] == [row.sparsity for row in two.layers]


def test_report_after_a_restart_is_the_same():
    model = mlp()
    pruner = collected(model, config("2:8"))
    pruner.prune()
    report = pruner.finalize()
    again = OBSPruner(model, config("2:8"))
    again.load_state_dict(saved(pruner.state_dict()))
    found = again.finalize()
    assert found.layers == report.layers
    assert (found.saliency, found.stages, found.num_grads) == (report.saliency, report.stages, report.num_grads)


def test_state_is_a_copy():
    pruner = collected(mlp(), config("2:8"))
    state = pruner.state_dict()
    before = {k: v.clone() for k, v in state["fisher_sums"].items()}
    pruner.collect(batches(), loss_fn)
    pruner.layers[0].mask[0] = False
    assert all(torch.equal(before[k], v) for k, v in state["fisher_sums"].items()) and state["masks"]["0"].all()
    other = OBSPruner(mlp(), config("2:8"))
    other.load_state_dict(state)
    other.collect(batches(), loss_fn)
    assert all(torch.equal(before[k], v) for k, v in state["fisher_sums"].items())


def spoil(state: dict, how: str) -> None:
    if how.startswith("no "):
        del state[how[3:]]
    elif how == "mask shape":
        state["masks"]["2"] = state["masks"]["2"][:-1]
    elif how == "mask name":
        state["masks"]["x"] = state["masks"].pop("2")
    elif how == "mask dtype":
        state["masks"]["2"] = state["masks"]["2"].float()
    elif how == "fisher shape":
        state["fisher_sums"]["2"] = state["fisher_sums"]["2"][:-1]
    elif how == "fisher dtype":
        state["fisher_sums"]["2"] = state["fisher_sums"]["2"].long()
    elif how == "count":
        del state["num_grads"]["4"]
    elif how == "stage":
        state["stage"] = 7
    elif how == "report":
        state["reports"] = {"0": {"name": "0"}}
    else:
        raise AssertionError(how)


@pytest.mark.parametrize(
    "how",
    [f"no {key}" for key in ("config", "masks", "stage", "fisher_sums", "num_grads", "reports", "saliency")]
    + ["mask shape", "mask name", "mask dtype", "fisher shape", "fisher dtype", "count", "stage", "report"],
)
def test_damaged_state_is_refused_and_changes_nothing(how):
    source = collected(mlp(), config("2:8", recomputations=2))
    source.prune()
    source.collect(batches(), loss_fn)
    state = source.state_dict()
    spoil(state, how)
    pruner = collected(mlp(), config("2:8", recomputations=2))
    before = bits(pruner)
    with pytest.raises((ResumeMismatchError, ConfigError)):
        pruner.load_state_dict(state)
    assert equal(before, bits(pruner)) and pruner.report().layers == ()


@pytest.mark.parametrize("change", [{"num_grads": 25}, {"pattern": "2:4"}, {"method": "pairwise", "update": "none"}])
def test_state_of_another_config_is_refused(change):
    state = collected(mlp(), config("2:8")).state_dict()
    pruner = collected(mlp(), OBSConfig(**({"pattern": "2:8", "num_grads": 24, "curvature": "block"} | change)))
    before = bits(pruner)
    with pytest.raises(ResumeMismatchError, match=f"differs in .*{next(iter(change))}"):
        pruner.load_state_dict(state)
    assert equal(before, bits(pruner))


def test_a_state_of_before_refit_norms_went_is_taken():
    """It says that there was none; one of norms that were fitted is refused."""
    source = collected(mlp(), config("2:8"))
    state = source.state_dict()
    assert "norms" not in state
    older = state | {"config": state["config"] | {"refit_norms": False}, "norms": []}
    pruner = OBSPruner(mlp(), config("2:8"))
    pruner.load_state_dict(saved(older))
    assert equal(bits(source), bits(pruner))
    before = bits(pruner)
    with pytest.raises(ResumeMismatchError, match=r"unknown key 'refit_norms'; here it is nothing any more"):
        pruner.load_state_dict(older | {"config": older["config"] | {"refit_norms": True}, "norms": [{"name": "0"}]})
    assert equal(before, bits(pruner))


def test_state_of_another_model_is_refused():
    state = collected(mlp(), config("2:8")).state_dict()
    with pytest.raises(ResumeMismatchError, match="other layers or shapes"):
        OBSPruner(mlp(sizes=(16, 32, 16)), config("2:8")).load_state_dict(state)


# same bits again


@pytest.mark.parametrize("pattern", PATTERNS)
def test_two_runs_are_bitwise_equal(pattern):
    results = []
    parts = 1 if pattern.endswith(":16") else 2  # 9 of 16 are 11,440 sets a group
    for _ in range(2):
        model = mlp()
        report = sparsify_(model, config(pattern, recomputations=parts), batches(), loss_fn)
        results.append(
            (weights(model), [(row.saliency, row.damp, row.sparsity) for row in report.layers], report.saliency)
        )
    assert equal(results[0][0], results[1][0]) and results[0][1:] == results[1][1:]


def test_the_global_random_state_does_not_matter():
    results = []
    for seed in (0, 1):
        model = mlp()
        torch.manual_seed(seed)
        sparsify_(model, config("16:2:8"), batches(), loss_fn)
        results.append(weights(model))
    assert equal(*results)


# dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("pattern", ["2:4", "16:2:8", "unstructured:0.75", "block4:0.75"])
def test_other_dtypes(pattern, dtype):
    model = mlp().to(dtype)
    before = weights(model)
    pruner = collected(model, config(pattern))
    fishers = pruner.fishers()
    assert all(f.dtype == torch.float32 for f in fishers.values())
    report = pruner.prune()
    for layer, row in zip(pruner.layers, report.layers, strict=True):
        new = model.get_parameter(layer.parameter_name)
        assert new.dtype == dtype and torch.isfinite(new).all()
        loss = quadratic(before[layer.parameter_name], new.detach(), fishers[layer.parameter_name], row.damp)
        assert row.saliency == pytest.approx(loss, rel=PREDICTION)  # of the weights as they are stored
    pruner.finalize()
    assert pruner.verify() == 0


def test_a_weight_of_another_dtype_is_refused():
    model = mlp()
    model[2].weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"2\.weight must be a float tensor, got torch\.int8"):
        OBSPruner(model, config("2:4"))


# the report


def strict_json(text: str) -> dict:
    def refuse(name: str):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("changes", [{}, {"method": "magnitude", "update": "none"}, {"pattern": "unstructured:0.5"}])
def test_report_files(tmp_path: Path, changes):
    model = mlp()
    report = sparsify_(model, config(**({"pattern": "2:8"} | changes)), batches(), loss_fn)
    path = report.save(tmp_path / "deep" / "report.json")
    values = strict_json(path.read_text())
    assert values["pattern"] == report.pattern and values["sparsity"] == pytest.approx(report.sparsity)
    assert [row["name"] for row in values["layers"]] == ["0", "2", "4"]
    assert OBSConfig.from_dict(values["config"]) == config(**({"pattern": "2:8"} | changes))
    assert values["environment"]["torch"] == torch.__version__ and values["num_grads"] == report.num_grads
    text = report.save(str(tmp_path / "report.md")).read_text()
    assert text == report.to_markdown() and f"# Pruning report: {report.pattern}" in text
    assert all(f"| {name} | " in text for name in "024") and f"{report.sparsity:.4f}" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "report.md"]


def test_report_names_what_was_left_out(tmp_path: Path):
    model = odd_net()
    report = sparsify_(model, config("2:8", on_unsupported="skip"), batches(), loss_fn)
    assert {name for name, _ in report.skipped} == {"2", "4"}
    assert report.to_markdown().count("left out: ") == 2


def test_sparsity_of_the_report_is_weighted_by_size():
    model = mlp(sizes=(16, 16, 32))
    pruner = collected(model[:1], config("unstructured:0.5", method="magnitude", update="none"))
    pruner = OBSPruner(model, config("unstructured:0.5", method="magnitude", update="none", global_sparsity=True))
    with torch.no_grad():
        model[2].weight.mul_(10.0)
    report = pruner.prune()
    rows = {row.name: row.sparsity for row in report.layers}
    assert rows["0"] > rows["2"] and report.sparsity == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["report.txt", "report", "report.json.bak"])
def test_report_of_an_unknown_ending(tmp_path: Path, name):
    report = sparsify_(mlp(), config("2:8"), batches(), loss_fn)
    with pytest.raises(ConfigError, match=rf"\.json, \.md or \.html, got '{name}'"):
        report.save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", [".json", ".md"])
def test_report_in_an_unwritable_place(tmp_path: Path, ending):
    report = sparsify_(mlp(), config("2:8"), batches(), loss_fn)
    (tmp_path / "file").write_text("keep")
    with pytest.raises(OSError):
        report.save(tmp_path / "file" / f"report{ending}")
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "keep"


def test_the_library_does_not_print(capfd):
    model = mlp()
    sparsify_(model, config("2:8", recomputations=2), batches(), loss_fn).to_markdown()
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


# a transformer


@pytest.mark.parametrize("pattern", ["2:4", "8:2:8", "unstructured:0.5", "block4:0.5"])
def test_a_transformer(pattern):
    torch.manual_seed(4)
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, dropout=0.3, batch_first=True), 2, enable_nested_tensor=False
    )
    gen = torch.Generator().manual_seed(2)
    data = [torch.randn(4, 5, 16, generator=gen) for _ in range(4)]

    def loss(m, x):
        return m(x).square().sum(2).sin().mean(1)

    losses = {}
    for update in ("joint", "none"):
        pruned = copy.deepcopy(model)
        report = sparsify_(pruned, config(pattern, num_grads=16, update=update), data, loss)
        assert pruned.training and [row.name for row in report.layers] == [
            "layers.0.linear1", "layers.0.linear2", "layers.1.linear1", "layers.1.linear2"
        ]  # fmt: skip
        losses[update] = report.layers[0].saliency
        for row in report.layers:
            assert obeys(pruned.get_submodule(row.name).weight != 0, pattern)
    assert 0 < losses["joint"] < losses["none"]


def test_attention_projections_are_pruned_rightly_or_refused():
    """nn.MultiheadAttention reads ``out_proj.weight`` without calling the module; the hooks see nothing of it."""
    torch.manual_seed(4)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    data = [torch.randn(4, 5, 16)]

    def loss(m, x):
        return m(x).square().sum(2).sin().mean(1)

    cfg = config("2:4", targets=("re:.*out_proj",))
    pruner = OBSPruner(model, cfg)
    try:
        pruner.collect(data, loss)
    except (ConfigError, ShapeNotSupportedError):
        return
    assert pruner.fishers()["self_attn.out_proj.weight"].any()
