# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of pairwise and greedy choices, run as host code under sanitizers, against the reference."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path
from typing import NamedTuple

import oracle
import pytest
import torch
from emulation import SANITIZERS, build
from oracle import example_c, groups_of, kept_of
from test_search_on_cpu import integer_problem, live_mask
from tolerances import EXAMPLE_F32, SALIENCY_EQUAL_BLOCK, UPDATE_RMS_F32
from torch import Tensor

from obs_kernels import reference
from obs_kernels.reference import greedy
from obs_kernels.reference.blocks import condition_groups, pair_model
from obs_kernels.reference.greedy import keep_by_greedy
from obs_kernels.reference.pairwise import keep_by_pairs

SOURCES = [f"search/{name}" for name in ("given.cu", "pairwise.cu", "greedy.cu", "panels.cu", "choice.cpp")]


@pytest.fixture(scope="module", params=SANITIZERS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(
        SOURCES,
        "choice_on_cpu.cpp",
        tmp_path_factory.mktemp("emulation") / "choice",
        sanitizer=request.param,
        empty=["finish", "0", "2", "4", "1", "0", "0", "0"],
        # so that few entries walk in strides too
        replaced={"search/choice.h": [(r"kMaxBlocks = \d+", "kMaxBlocks = 2", 1)]},
    )


def run(program: Path, arguments: list[object], given: list[Tensor]) -> tuple[str, bytes]:
    data = b"".join(tensor.contiguous().numpy().tobytes() for tensor in given)
    done = subprocess.run([program, *map(str, arguments)], input=data, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    path, _, rest = done.stdout.partition(b"\n")
    return path.decode(), rest


class Found(NamedTuple):
    path: str
    mask: Tensor
    saliency: Tensor
    info: Tensor
    weight: Tensor | None


def emulate(
    program: Path,
    weight: Tensor,
    fisher: Tensor,
    n: int,
    *,
    keep: Tensor | None = None,
    damp: Tensor | None = None,
    mask: Tensor | None = None,
    update: int = 1,
    shift: int = 0,
) -> Found:
    """``finish_nm`` of the choice ``keep``, or without it ``search_greedy``, of ``weight`` [G, m]."""
    damp = torch.zeros(1) if damp is None else damp
    groups, m = weight.shape
    operation = "greedy" if keep is None else "finish"
    arguments = [operation, groups, n, m, int(damp.numel() > 1), int(mask is not None), update, shift]
    given = [tensor for tensor in (damp, weight, fisher, mask, keep) if tensor is not None]
    path, rest = run(program, arguments, given)
    sizes = [(groups * m, torch.uint8), (groups, torch.float32), (groups, torch.int32)]
    if update:
        sizes.append((groups * m, torch.float32))
    parts: list[Tensor] = []
    for count, dtype in sizes:
        size = count * dtype.itemsize
        parts.append(torch.frombuffer(bytearray(rest[:size]), dtype=dtype))
        rest = rest[size:]
    assert not rest and (parts[0] <= 1).all()
    new = parts[3].view(groups, m) if update else None
    return Found(path, parts[0].view(groups, m).bool(), parts[1], parts[2], new)


def pairs(program: Path, weight: Tensor, inverse: Tensor, n: int, mask: Tensor | None = None, shift: int = 0) -> Tensor:
    groups, m = weight.shape
    given = [tensor for tensor in (weight, inverse, mask) if tensor is not None]
    path, rest = run(program, ["pairwise", groups, n, m, 0, int(mask is not None), 0, shift], given)
    assert path == f"pairwise{next(size for size in (4, 8, 16, 32) if m <= size)}"
    return torch.frombuffer(bytearray(rest), dtype=torch.uint8).view(groups, m).bool()


def pair_problem(
    gen: torch.Generator, groups: int, m: int, mask: Tensor | None, high: int = 3, *, coupled: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, F and F^-1 in blocks of two that are exact in f32, dead entries decoupled: many ties."""
    weight = torch.randint(-high, high + 1, (groups, m), generator=gen).float()
    scale = 2.0 ** torch.randint(0, 2, (groups, m // 2, 2), generator=gen)
    factor = torch.diag_embed(scale)
    if coupled:
        factor[..., 1, 0] = torch.randint(-1, 2, scale.shape[:2], generator=gen).float() * scale[..., 0]
    if mask is not None:  # out of the factor already, so that every pivot stays a power of four
        alive = mask.view(groups, -1, 2)
        factor[..., 1, 0].masked_fill_(~alive.all(-1), 0.0)
        factor.diagonal(dim1=2, dim2=3).masked_fill_(~alive, 1.0)
    blocks = torch.stack([torch.block_diag(*group) for group in factor])
    f = blocks @ blocks.mT
    inverse = torch.linalg.inv(f.double()).float()
    assert torch.equal(f @ inverse, torch.eye(m).expand(groups, m, m))
    return weight, f, inverse


def keep_of_pairs(weight: Tensor, fisher: Tensor, n: int, mask: Tensor | None) -> Tensor:
    alive = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
    groups, finv = condition_groups(weight, fisher, alive, torch.zeros(1), weight.shape[1])
    return keep_by_pairs(pair_model(groups, finv), n) & alive


def keep_of_greedy(weight: Tensor, fisher: Tensor, n: int, mask: Tensor | None, damp: Tensor) -> Tensor:
    alive = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
    return keep_by_greedy(condition_groups(weight, fisher, alive, damp, weight.shape[1])[0], n) & alive


def assert_finished(
    found: Found, weight: Tensor, fisher: Tensor, keep: Tensor, damp: Tensor, mask: Tensor | None = None
) -> None:
    """Saliency and new weight are those of keeping ``keep``."""
    assert not found.info.any() and torch.equal(found.mask, keep)
    live = weight.double() if mask is None else weight.double().masked_fill(~mask, 0.0)
    new = reference.obs_update(live, fisher.double(), keep, damp=damp, update="joint")
    loss = reference.loss_increase(new - live, fisher.double(), damp=damp)
    torch.testing.assert_close(found.saliency.double(), loss.view(-1), rtol=SALIENCY_EQUAL_BLOCK, atol=1e-5)
    assert found.weight is not None and not found.weight[~keep].any()
    assert (found.weight - new).norm() <= 10 * UPDATE_RMS_F32 * new.norm()


# a given choice


@pytest.mark.parametrize("m", [2, 4, 7, 8, 12, 16, 17, 32])
def test_given_choice(program: Path, gen: torch.Generator, m: int) -> None:
    """Any number of kept entries from none to all, strongly correlated; dead ones among them do not count."""
    groups = 6
    weight, fisher = torch.randn(groups, m, generator=gen), oracle.random_spd(gen, groups, m).float()
    keep = torch.rand(groups, m, generator=gen) < torch.linspace(0.0, 1.0, groups)[:, None]
    damp = torch.rand(groups, generator=gen)
    found = emulate(program, weight, fisher, 1, keep=keep, damp=damp)
    assert found.path == f"given{next(size for size in (8, 16, 32) if m <= size)}"
    assert_finished(found, weight, fisher, keep, damp)
    mask = torch.rand(groups, m, generator=gen) < 0.6
    found = emulate(program, weight, fisher, 1, keep=keep, damp=damp, mask=mask)
    assert_finished(found, weight, fisher, keep & mask, damp, mask)


@pytest.mark.parametrize("m", [8, 11])
@pytest.mark.parametrize(("shift", "update"), [(0, 0), (0, 2), (1, 1), (3, 2)])
@pytest.mark.parametrize("by_greedy", [False, True])
def test_alignment_and_in_place(
    program: Path, gen: torch.Generator, m: int, shift: int, update: int, by_greedy: bool
) -> None:
    weight, fisher = integer_problem(gen, 5, m, m, diagonal=True)
    keep = None if by_greedy else torch.rand(5, m, generator=gen) < 0.5
    plain = emulate(program, weight, fisher, 2, keep=keep)
    found = emulate(program, weight, fisher, 2, keep=keep, update=update, shift=shift)
    assert torch.equal(found.mask, plain.mask) and torch.equal(found.saliency, plain.saliency)
    assert found.weight is None or torch.equal(found.weight, plain.weight)


@pytest.mark.parametrize(("m", "by_greedy"), [(8, False), (8, True), (16, False), (16, True), (32, False)])
def test_bad_groups_are_named_and_keep_nothing(program: Path, gen: torch.Generator, m: int, by_greedy: bool) -> None:
    """Their weight stays, and the groups beside them do not notice."""
    weight, fisher = integer_problem(gen, 12, m, m)
    keep = None if by_greedy else torch.rand(12, m, generator=gen) < 0.5
    good = emulate(program, weight, fisher, 2, keep=keep)
    damp = torch.zeros(12)
    weight[1, m - 1], weight[2, 0] = torch.inf, torch.nan
    fisher[3, m - 1, 0] = torch.nan
    fisher[4, 0, 1] = fisher[4, 1, 0] = -torch.inf
    fisher[5, m - 1, m - 1] = 0.0
    fisher[6] = 0.0
    fisher[7] = 1.0
    damp[8], damp[9] = -1.0, torch.nan
    found = emulate(program, weight, fisher, 2, keep=keep, damp=damp)
    assert found.info.tolist() == [0, -1, -1, -2, -2, m, 1, 2, -3, -3, 0, 0]
    bad = found.info != 0
    assert found.weight is not None and good.weight is not None
    assert not found.mask[bad].any() and found.saliency[bad].isnan().all()
    assert torch.equal(found.weight[bad].nan_to_num(), weight[bad].nan_to_num())
    assert torch.equal(found.mask[~bad], good.mask[~bad]) and torch.equal(found.weight[~bad], good.weight[~bad])
    assert torch.equal(found.saliency[~bad], good.saliency[~bad])


# pairwise


SIZES = [2, 4, 6, 8, 16, 20, 32]


@pytest.mark.parametrize("m", SIZES)
def test_pairs_of_exact_numbers_are_the_reference(program: Path, gen: torch.Generator, m: int) -> None:
    """Ties by the dozen: dense, with dead entries, coupled pairs, equal weights, zeros; more groups than threads."""
    kinds = ((3, True, False), (3, True, True), (1, False, True), (0, True, False))
    for n, (high, coupled, masked) in itertools.product(sorted({2 % m, m // 2, m - 1} - {0}), kinds):
        mask = live_mask(gen, 131, m, m) if masked else None
        weight, fisher, inverse = pair_problem(gen, 131, m, mask, high, coupled=coupled)
        found = pairs(program, weight, inverse, n, mask)
        wanted = keep_of_pairs(weight, fisher, n, mask)
        differ = (found != wanted).any(1).nonzero().flatten()
        assert not len(differ), f"{n}:{m}, the first group that differs is {int(differ[0])}"


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 6), (2, 8), (4, 8), (5, 8), (3, 10), (5, 12)])
def test_pairs_are_the_minimum_of_their_model(program: Path, gen: torch.Generator, n: int, m: int) -> None:
    """Real numbers against all sets, of the model in f64."""
    weight, fisher = torch.randn(9, m, generator=gen), oracle.random_spd(gen, 9, m).float()
    mask = torch.rand(9, m, generator=gen) < torch.linspace(0.2, 1.2, 9)[:, None]
    for alive in (None, mask):
        f = fisher.clone()
        if alive is not None:
            f.masked_fill_(~(alive[:, :, None] & alive[:, None, :]), 0.0)
            f.diagonal(dim1=1, dim2=2).masked_fill_(~alive, 1.0)
        # any scale will do
        found = pairs(program, weight, 3.0 * torch.linalg.inv(f.double()).float(), n, alive, shift=1)
        for (row, group), problem in groups_of(weight, fisher, m, mask=alive).items():
            model = problem.pair_model()
            loss = model.losses(n)[kept_of(found, row, group, m)]
            assert loss <= model.best(n)[1] * (1 + 1e-4) + 1e-6


def test_example_d(program: Path) -> None:
    """Choice and true loss of the four n."""
    weight, fisher = example_c(torch.float32)
    inverse = torch.linalg.inv(fisher.double()).float()
    for n, kept, loss in (
        (5, (1, 2, 3, 5, 6), 5.719273), (4, (2, 3, 5, 6), 41.903370), (3, (1, 5, 6), 213.247253),
        (2, (5, 6), 256.967391),
    ):  # fmt: skip
        found = pairs(program, weight, inverse, n)
        assert kept_of(found, 0, 0, 8) == kept
        finished = emulate(program, weight, fisher, n, keep=found)
        assert float(finished.saliency) == pytest.approx(loss, rel=EXAMPLE_F32)


def test_pairs_are_not_greedy(program: Path) -> None:
    """math.md 6: taking the cheapest pair first costs 1.9, the minimum 1.2."""
    weight = torch.tensor([[0.2, 1.8, 1.8, 1.8]]).sqrt()
    inverse = torch.eye(4)[None].clone()
    inverse[0, 2, 3] = inverse[0, 3, 2] = 7 / 11
    assert pairs(program, weight, inverse, 1).tolist() == [[False, True, False, False]]


def test_no_more_than_n_of_what_is_no_number(program: Path) -> None:
    inverse = torch.full((3, 8, 8), torch.nan)
    inverse[1] = 0.0
    inverse[2] = torch.inf
    found = pairs(program, torch.ones(3, 8), inverse, 3, torch.arange(8).ne(1).expand(3, 8))
    assert (found.sum(1) <= 3).all() and not found[:, 1].any()


@pytest.mark.parametrize("m", [2, 6, 8, 32])
def test_pair_models(program: Path, gen: torch.Generator, m: int) -> None:
    inverse = oracle.random_spd(gen, 7, m).float()
    unit = 4.0 ** torch.randint(-2, 3, (7,), generator=gen)
    path, data = run(program, ["models", 7, 0, m, 0, 0, 0, 1], [inverse, unit])
    found = torch.frombuffer(bytearray(data), dtype=torch.float32).view(7, m, m)
    wanted = torch.zeros(7, m, m, dtype=torch.float64)
    for j in range(0, m, 2):
        wanted[:, j : j + 2, j : j + 2] = torch.linalg.inv(inverse[:, j : j + 2, j : j + 2].double())
    wanted *= unit[:, None, None]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=0.0)
    assert path == "pair_models" and torch.equal(found == 0, wanted == 0)


def test_sums_of_panels(program: Path, gen: torch.Generator) -> None:
    """In ascending order, each sum rounded."""
    each = torch.rand(12, 3, generator=gen) * 10.0 ** torch.randint(-4, 5, (12, 3), generator=gen)
    _, data = run(program, ["sums", 36, 4, 3, 0, 0, 0, 0], [each])
    wanted = torch.zeros(3, 3)
    for row in range(4):
        wanted += each.view(3, 4, 3)[:, row]
    assert torch.equal(torch.frombuffer(bytearray(data), dtype=torch.float32).view(3, 3), wanted)


# greedy


def power_problem(gen: torch.Generator, groups: int, m: int, high: int) -> tuple[Tensor, Tensor]:
    weight = torch.randint(-high, high + 1, (groups, m), generator=gen).float()
    return weight, torch.diag_embed(2.0 ** torch.randint(0, 3, (groups, m), generator=gen))


@pytest.mark.parametrize("m", [2, 4, 7, 8, 11, 20])
def test_greedy_of_exact_numbers_is_the_reference(program: Path, gen: torch.Generator, m: int) -> None:
    """Without correlation: equal masks whatever the ties; dense, then with dead entries."""
    for n in sorted({m // 2, m - 1}):
        for high, masked in ((3, True), (1, False), (1, True), (0, False)):
            weight, fisher = power_problem(gen, 4, m, high)
            mask = live_mask(gen, 4, m, m) if masked else None
            found = emulate(program, weight, fisher, n, mask=mask)
            wanted = keep_of_greedy(weight, fisher, n, mask, torch.zeros(1))
            assert torch.equal(found.mask, wanted), f"{n}:{m}"
            assert_finished(found, weight, fisher, wanted, torch.zeros(1), mask)


def rivals(gen: torch.Generator, n: int, m: int, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and curvature of 8 groups of which each start ends above the other, by far, on some; and ``mask``."""
    weight, fisher = torch.randn(400, m, generator=gen), oracle.random_spd(gen, 400, m).float()
    alive = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask.repeat(50, 1)
    groups, _ = condition_groups(weight, fisher, alive, torch.zeros(1), m)
    grown, shrunk = (greedy._improve(groups, *start(groups, n))[1] for start in (greedy._grow, greedy._shrink))
    order = (grown / shrunk).argsort()
    index = torch.cat([order[:4], order[-4:]])
    return weight[index], fisher[index], alive[index]


@pytest.mark.parametrize(("n", "m"), [(2, 8), (4, 8), (3, 12), (5, 16), (10, 20)])
@pytest.mark.parametrize("masked", [False, True])
def test_greedy_finds_what_the_reference_finds(
    program: Path, gen: torch.Generator, n: int, m: int, masked: bool
) -> None:
    """Strongly correlated groups where the two starts end apart: the same sets."""
    some = torch.rand(8, m, generator=gen) < 0.9 if masked else None
    weight, fisher, mask = rivals(gen, n, m, some)
    damp = torch.zeros(8)
    found = emulate(program, weight, fisher, n, damp=damp, mask=mask if masked else None)
    assert found.path == f"greedy{next(size for size in (8, 16, 32) if m <= size)}"
    wanted = keep_of_greedy(weight, fisher, n, mask, damp)
    assert (found.mask == wanted).all(1).sum() >= 7
    assert torch.equal(found.mask.sum(1), wanted.sum(1))
    assert_finished(found, weight, fisher, found.mask, damp, mask)


def test_no_exchange_improves_greedy(program: Path, gen: torch.Generator) -> None:
    weight, fisher = torch.randn(8, 8, generator=gen), oracle.random_spd(gen, 8, 8).float()
    found = emulate(program, weight, fisher, 4)
    for (row, group), problem in groups_of(weight, fisher, 8).items():
        losses = problem.losses(4)
        kept = kept_of(found.mask, row, group, 8)
        for out, into in itertools.product(kept, set(range(8)) - set(kept)):
            tried = tuple(sorted({*kept, into} - {out}))
            assert losses[kept] <= losses[tried] * (1 + 1e-4)
