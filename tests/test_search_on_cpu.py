# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the search, run as host code under sanitizers (cuda_on_cpu.h), against the reference."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path
from typing import NamedTuple

import oracle
import pytest
import torch
from emulation import SANITIZERS, build
from oracle import example_c, example_e, groups_of, kept_of
from tolerances import EXAMPLE_F32, SALIENCY_EQUAL_BLOCK, SEARCH_LOSS_EQUAL_BLOCK, UPDATE_RMS_F32
from torch import Tensor

from obs_kernels import reference
from obs_kernels.cuda_calls.column_tables import column_tables
from obs_kernels.errors import SingularBlockError

SOURCES = [f"search/{name}" for name in ("pairs.cu", "wide.cu", "sets.cu", "wide_sets.cu", "panels.cu", "search.cpp")]
PATHS = {4: "pairs4", 8: "pairs8", 16: "pairs16", 32: "wide"}


@pytest.fixture(scope="module", params=SANITIZERS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(
        SOURCES,
        "search_on_cpu.cpp",
        tmp_path_factory.mktemp("emulation") / "search",
        sanitizer=request.param,
        empty=["0", "2", "4", "1", "0", "0", "0"],
        # few groups walk in strides too; a thread here is one of the system's, and 512 of them take their time
        replaced={
            "search/search_config.h": [
                (r"kMaxBlocks = \d+", "kMaxBlocks = 2", 1),
                (r"PanelConfig<512,", "PanelConfig<96,", 1),
            ]
        },
    )


class Found(NamedTuple):
    path: str
    mask: Tensor
    saliency: Tensor
    info: Tensor
    weight: Tensor | None
    columns: Tensor | None = None


def emulate(
    program: Path,
    weight: Tensor,
    fisher: Tensor,
    pattern: str,
    *,
    damp: Tensor | None = None,
    mask: Tensor | None = None,
    num_columns: int = 4,
    update: int = 1,
    shift: int = 0,
    panel_rows: int = 1,
) -> Found:
    """The kernels on f32 ``weight`` [R, C] with D = m; ``saliency`` is that of groups, or of panels."""
    *v, n, m = (int(part) for part in pattern.split(":"))
    damp = torch.zeros(1) if damp is None else damp
    (rows, cols), groups = weight.shape, weight.numel() // m
    arguments = [groups, n, m, int(damp.numel() > 1), int(mask is not None), update, shift]
    given = [damp, weight, fisher, *([] if mask is None else [mask])]
    if v:
        tables = column_tables(n, m, num_columns, torch.device("cpu"))
        sizes = [tables.derived.shape[1], *tables.lists.shape]
        arguments += [v[0], cols // m, num_columns, *sizes, panel_rows]
        given += list(tables)
    data = b"".join(tensor.contiguous().numpy().tobytes() for tensor in given)
    done = subprocess.run([program, *map(str, arguments)], input=data, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    path, _, rest = done.stdout.partition(b"\n")

    def take(count: int, dtype: torch.dtype) -> Tensor:
        nonlocal rest
        size = count * dtype.itemsize
        part, rest = rest[:size], rest[size:]
        return torch.frombuffer(bytearray(part), dtype=dtype) if part else torch.empty(0, dtype=dtype)

    kept = take(rows * cols, torch.uint8)
    assert (kept <= 1).all()
    saliency, info = take(groups, torch.float32).view(rows, cols // m), take(groups, torch.int32)
    new = take(rows * cols, torch.float32).view(rows, cols) if update else None
    columns = None
    if v:
        columns = take(groups // v[0] * num_columns, torch.uint8).view(rows // v[0], cols // m, num_columns)
        saliency = take(groups // v[0], torch.float32).view(rows // v[0], cols // m)
    assert not rest
    return Found(path.decode(), kept.view(rows, cols).bool(), saliency, info, new, columns)


def integer_problem(
    gen: torch.Generator, rows: int, cols: int, m: int, *, diagonal: bool = False, low: int = -3, high: int = 3
) -> tuple[Tensor, Tensor]:
    """Small integers, so that every product is exact and ties are many."""
    groups = rows * cols // m
    weight = torch.randint(low, high + 1, (rows, cols), generator=gen).float()
    if diagonal:
        return weight, torch.diag_embed(torch.randint(1, 4, (groups, m), generator=gen).float())
    g = torch.randint(-1, 2, (groups, 3, m), generator=gen).float()
    return weight, g.mT @ g + torch.eye(m)


def live_mask(gen: torch.Generator, rows: int, cols: int, m: int) -> Tensor:
    """Full, thin, single and fully dead groups."""
    share = torch.tensor([1.0, 0.7, 0.3, 0.1, 0.0])[torch.randint(0, 5, (rows, cols // m), generator=gen)]
    return torch.rand(rows, cols // m, m, generator=gen).lt(share[:, :, None]).view(rows, cols)


def assert_is_reference(
    found: Found,
    weight: Tensor,
    fisher: Tensor,
    pattern: str,
    *,
    damp: Tensor | None = None,
    mask: Tensor | None = None,
    num_columns: int = 4,
) -> None:
    """Equal masks and columns; saliency and new weight within rounding."""
    damp = torch.zeros(1) if damp is None else damp
    options = {"damp": damp, "method": "combinatorial", "mask": mask}
    assert not found.info.any()
    if pattern.count(":") == 2:
        wanted, saliency, columns = reference.search_vnm(weight, fisher, pattern, num_columns=num_columns, **options)
        assert found.columns is not None and torch.equal(found.columns, columns)
    else:
        wanted, saliency = reference.search_nm(weight, fisher, pattern, **options)
    differ = (found.mask != wanted).nonzero()
    assert not len(differ), f"{pattern}: the first difference is at {differ[0].tolist()}"
    torch.testing.assert_close(found.saliency, saliency, rtol=SALIENCY_EQUAL_BLOCK, atol=1e-5)
    if found.weight is not None:
        live = weight if mask is None else weight.masked_fill(~mask, 0.0)
        new = reference.obs_update(live, fisher, wanted, damp=damp, update="joint")
        error = (found.weight - new).norm() / new.norm().clamp_min(1e-30)
        assert error <= UPDATE_RMS_F32 or float(new.norm()) == 0
        assert not found.weight[~wanted].any()


def assert_is_optimum(found: Found, weight: Tensor, fisher: Tensor, pattern: str, mask: Tensor | None) -> None:
    """The loss is the least in f64, and the new weight that of the joint update."""
    options = {"damp": torch.zeros(1), "method": "combinatorial", "mask": mask}
    best, least = reference.search_nm(weight.double(), fisher.double(), pattern, **options)
    assert not found.info.any() and torch.equal(found.mask.sum(1), best.sum(1))
    assert mask is None or not (found.mask & ~mask).any()
    assert (found.saliency <= least * (1 + SEARCH_LOSS_EQUAL_BLOCK) + 1e-6).all()
    live = weight.double() if mask is None else weight.double().masked_fill(~mask, 0.0)
    new = reference.obs_update(live, fisher.double(), found.mask, damp=torch.zeros(1), update="joint")
    assert found.weight is not None and (found.weight - new).norm() <= 1e-4 * new.norm()
    loss = reference.loss_increase(new - live, fisher.double(), damp=torch.zeros(1)).view(-1, 1)
    torch.testing.assert_close(found.saliency.double(), loss, rtol=SALIENCY_EQUAL_BLOCK, atol=1e-6)


SIZES = [2, 3, 4, 5, 7, 8, 11, 14, 16, 17, 24, 32]


@pytest.mark.parametrize("m", SIZES)
@pytest.mark.parametrize("n", [1, 2])
def test_integers_give_equal_masks(program: Path, gen: torch.Generator, n: int, m: int) -> None:
    """More groups than a block of threads takes, the last one not full; dense, then with dead entries; ties."""
    if n >= m:
        pytest.skip("n < m")
    rows = {4: 67, 8: 67, 16: 35}.get(next(s for s in (4, 8, 16, 32) if m <= s), 3)
    for diagonal, high in ((False, 3), (True, 1), (False, 0)):
        weight, fisher = integer_problem(gen, rows, 2 * m, m, diagonal=diagonal, low=-high, high=high)
        damp = torch.randint(0, 3, (2 * rows,), generator=gen).float()
        for mask in (None, live_mask(gen, rows, 2 * m, m)):
            found = emulate(program, weight, fisher, f"{n}:{m}", damp=damp, mask=mask)
            assert_is_reference(found, weight, fisher, f"{n}:{m}", damp=damp, mask=mask)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (2, 8), (2, 16), (1, 6), (2, 32)])
@pytest.mark.parametrize(("shift", "update"), [(0, 0), (0, 2), (1, 1), (3, 2)])
def test_alignment_and_in_place(program: Path, gen: torch.Generator, n: int, m: int, shift: int, update: int) -> None:
    weight, fisher = integer_problem(gen, 5, m, m)
    found = emulate(program, weight, fisher, f"{n}:{m}", update=update, shift=shift)
    ragged = "_ragged" if m not in PATHS or (shift and m != 32) else ""
    assert found.path == PATHS[next(size for size in PATHS if m <= size)] + ragged
    assert_is_reference(found, weight, fisher, f"{n}:{m}")


@pytest.mark.parametrize("m", [4, 8, 16, 32])
def test_bad_groups_are_named_and_keep_nothing(program: Path, gen: torch.Generator, m: int) -> None:
    """Their weight stays, and the groups beside them do not notice."""
    weight, fisher = integer_problem(gen, 12, m, m)
    good = emulate(program, weight, fisher, f"2:{m}")
    assert good.weight is not None
    damp = torch.zeros(12)
    weight[1, m - 1], weight[2, 0] = torch.inf, torch.nan
    fisher[3, m - 1, 0] = torch.nan  # below the diagonal, which the choice does not read
    fisher[4, 0, 1] = fisher[4, 1, 0] = -torch.inf
    fisher[5, m - 1, m - 1] = 0.0
    fisher[6] = 0.0
    fisher[7] = 1.0
    damp[8], damp[9] = -1.0, torch.nan
    found = emulate(program, weight, fisher, f"2:{m}", damp=damp)
    assert found.weight is not None
    assert found.info.tolist() == [0, -1, -1, -2, -2, m, 1, 2, -3, -3, 0, 0]
    bad = found.info != 0
    assert not found.mask[bad].any() and found.saliency[bad].isnan().all()
    assert torch.equal(found.weight[bad].nan_to_num(), weight[bad].nan_to_num())
    assert torch.equal(found.mask[~bad], good.mask[~bad]) and torch.equal(found.weight[~bad], good.weight[~bad])
    assert torch.equal(found.saliency[~bad], good.saliency[~bad])
    with pytest.raises(SingularBlockError, match=f"block 0 at pivot {m}"):
        reference.search_nm(weight[5:6], fisher[5:6], f"2:{m}", damp=torch.zeros(1), method="combinatorial", mask=None)


@pytest.mark.parametrize("m", [4, 8, 16, 32])
def test_zeros(program: Path, m: int) -> None:
    """Nothing to tell apart: the lowest entries stay; damping alone makes a block of zeros regular."""
    zeros, blocks = torch.zeros(3, m), torch.zeros(3, m, m)
    for weight in (zeros, zeros + 1):
        found = emulate(program, weight, blocks, f"2:{m}", damp=torch.tensor([0.25]))
        assert not found.info.any() and torch.equal(found.mask, torch.arange(m).lt(2).expand(3, m))
        assert torch.equal(found.weight, weight * found.mask)
        torch.testing.assert_close(found.saliency.view(-1), 0.125 * (weight * ~found.mask).sum(1))


@pytest.mark.parametrize("m", [4, 8, 16, 32])
def test_dead_entries_of_every_number(program: Path, gen: torch.Generator, m: int) -> None:
    """Whatever stands in their rows and columns does not count, even where the block would be singular."""
    weight, fisher = integer_problem(gen, m + 1, m, m)
    mask = torch.rand(m + 1, m, generator=gen).argsort(1).argsort(1) < torch.arange(m + 1)[:, None]
    dead = ~mask
    coupled = fisher.masked_fill(dead[:, :, None] | dead[:, None, :], 7.0)
    for n in (1, 2):
        found = emulate(program, weight, coupled, f"{n}:{m}", mask=mask)
        assert_is_reference(found, weight, coupled, f"{n}:{m}", mask=mask)
        assert torch.equal(found.mask.sum(1), mask.sum(1).clamp(max=n))


@pytest.mark.parametrize("exponent", [-40, 40])
@pytest.mark.parametrize("m", [4, 8, 16, 32])
def test_extreme_scales(program: Path, gen: torch.Generator, m: int, exponent: int) -> None:
    """Gains are of the third order in F, and would leave the range of f32."""
    weight, fisher = integer_problem(gen, 5, m, m)
    plain = emulate(program, weight, fisher, f"2:{m}")
    scaled = emulate(program, weight, fisher * 2.0 ** (2 * exponent), f"2:{m}")
    assert torch.equal(scaled.mask, plain.mask) and torch.equal(scaled.weight, plain.weight)
    assert torch.equal(scaled.saliency, plain.saliency * 2.0 ** (2 * exponent))


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (2, 8), (2, 12), (2, 16), (2, 32)])
def test_loss_is_that_of_the_optimum(program: Path, gen: torch.Generator, n: int, m: int) -> None:
    """Real numbers, strongly correlated, against brute force in f64."""
    weight = torch.randn(7, m, generator=gen)
    fisher = oracle.random_spd(gen, 7, m).float()
    found = emulate(program, weight, fisher, f"{n}:{m}")
    assert not found.info.any()
    for (row, group), problem in groups_of(weight, fisher, m).items():
        losses = problem.losses(n)
        loss, (_, least) = losses[kept_of(found.mask, row, group, m)], problem.best(n)
        assert loss <= least * (1 + SEARCH_LOSS_EQUAL_BLOCK)
        assert float(found.saliency[row, group]) == pytest.approx(loss, rel=SALIENCY_EQUAL_BLOCK)


def test_example_c(program: Path) -> None:
    weight, fisher = example_c(torch.float32)
    found = emulate(program, weight, fisher, "2:8")
    assert kept_of(found.mask, 0, 0, 8) == (3, 6) and found.weight is not None
    assert float(found.saliency) == pytest.approx(187.4, rel=EXAMPLE_F32)
    assert found.weight[0, [3, 6]].tolist() == pytest.approx([3.8, -4.2], rel=EXAMPLE_F32)


# n > 2


@pytest.mark.parametrize(
    ("n", "m"), [(3, 4), (3, 5), (4, 8), (3, 8), (6, 8), (7, 8), (5, 9), (3, 12), (5, 16), (9, 16), (13, 16), (15, 16)]
)
def test_larger_sets_of_integers_with_diagonal_blocks(program: Path, gen: torch.Generator, n: int, m: int) -> None:
    """Gains are integers: equal masks; dense, then with dead entries; ties."""
    rows = 5 if m > 8 else 11
    for high in (3, 1, 0):
        weight, fisher = integer_problem(gen, rows, m, m, diagonal=True, low=-high, high=high)
        damp = torch.randint(0, 3, (rows,), generator=gen).float()
        for mask in (None, live_mask(gen, rows, m, m)):
            found = emulate(program, weight, fisher, f"{n}:{m}", damp=damp, mask=mask)
            assert found.path == ("sets8" if m <= 8 else "sets16")
            assert_is_reference(found, weight, fisher, f"{n}:{m}", damp=damp, mask=mask)


@pytest.mark.parametrize(
    ("n", "m"), [(3, 4), (4, 7), (4, 8), (5, 8), (3, 10), (4, 12), (11, 12), (5, 16), (9, 16), (14, 16)]
)
def test_larger_sets_reach_the_optimum(program: Path, gen: torch.Generator, n: int, m: int) -> None:
    """Strongly correlated blocks and dead entries, against f64; the new weight is that of the joint update."""
    weight = torch.randn(4, m, generator=gen)
    fisher = oracle.random_spd(gen, 4, m).float()
    mask = torch.rand(4, m, generator=gen) < torch.tensor([1.0, 0.8, 0.5, 0.9])[:, None]
    for alive in (None, mask):
        found = emulate(program, weight, fisher, f"{n}:{m}", mask=alive)
        assert_is_optimum(found, weight, fisher, f"{n}:{m}", alive)


def powers_of_two(gen: torch.Generator, groups: int, m: int) -> Tensor:
    """Diagonal blocks whose inverse is exact."""
    return torch.diag_embed(2.0 ** torch.randint(-1, 3, (groups, m), generator=gen))


@pytest.mark.parametrize(
    ("n", "m"), [(3, 17), (14, 17), (15, 18), (4, 18), (7, 17), (10, 17), (3, 32), (29, 32), (30, 32), (31, 32)]
)
def test_sets_of_wide_groups_of_integers(program: Path, gen: torch.Generator, n: int, m: int) -> None:
    """By their kept or their pruned entries, which depends on the live ones of a group; equal masks; ties."""
    few = min(n, m - n) > 5  # thousands of sets of threads in step
    weight = torch.randint(-3, 4, (5, m), generator=gen).float()
    weight[1:3].clamp_(-1, 1)
    weight[3] = 1.0
    fisher = powers_of_two(gen, 5, m)
    fisher[3] = torch.eye(m)
    live = torch.rand(5, m, generator=gen).argsort(1).argsort(1)
    live = live < torch.tensor([m - 1, n + 1, m, m - 2, n - 1])[:, None]  # whatever the order, ties among the rest
    for mask in (None, live):
        if few and mask is None:
            continue
        found = emulate(program, weight, fisher, f"{n}:{m}", mask=mask)
        assert found.path == "wide_sets"
        assert_is_reference(found, weight, fisher, f"{n}:{m}", mask=mask)


@pytest.mark.parametrize(("n", "m"), [(3, 17), (13, 17), (4, 20), (28, 31), (3, 32), (30, 32)])
def test_sets_of_wide_groups_reach_the_optimum(program: Path, gen: torch.Generator, n: int, m: int) -> None:
    """Strongly correlated blocks and dead entries, against f64; the new weight is that of the joint update."""
    weight = torch.randn(3, m, generator=gen)
    fisher = oracle.random_spd(gen, 3, m).float()
    mask = torch.rand(3, m, generator=gen).argsort(1).argsort(1) < torch.tensor([m - 1, n + 2, m // 2])[:, None]
    for alive in (None, mask):
        found = emulate(program, weight, fisher, f"{n}:{m}", mask=alive)
        assert_is_optimum(found, weight, fisher, f"{n}:{m}", alive)


@pytest.mark.parametrize(("n", "m"), [(3, 19), (30, 32)])
def test_bad_wide_groups(program: Path, gen: torch.Generator, n: int, m: int) -> None:
    """They are named and keep nothing, their weight stays; blocks of zeros with damping; alignment, in place."""
    weight, fisher = torch.randint(-3, 4, (9, m), generator=gen).float(), powers_of_two(gen, 9, m)
    damp = torch.zeros(9)
    good = emulate(program, weight, fisher, f"{n}:{m}", update=2, shift=1)
    assert_is_reference(good, weight, fisher, f"{n}:{m}")
    weight[1, 2], fisher[2, 1, 0], damp[3] = torch.nan, torch.inf, -1.0
    fisher[4], fisher[5, m - 1, m - 1], fisher[6] = 0.0, -1.0, 0.0
    damp[6] = 0.25
    found = emulate(program, weight, fisher, f"{n}:{m}", damp=damp, update=2, shift=3)
    assert found.info.tolist() == [0, -1, -2, -3, 1, m, 0, 0, 0]
    bad = found.info != 0
    assert found.weight is not None and good.weight is not None
    assert not found.mask[bad].any() and found.saliency[bad].isnan().all()
    assert torch.equal(found.weight[bad].nan_to_num(), weight[bad].nan_to_num())
    same = ~bad & (damp == 0)
    assert torch.equal(found.mask[same], good.mask[same]) and torch.equal(found.weight[same], good.weight[same])
    scaled = emulate(program, weight[6:7], torch.eye(m)[None], f"{n}:{m}")  # as zeros and damping, but for the scale
    assert torch.equal(found.mask[6:7], scaled.mask) and torch.equal(found.weight[6:7], scaled.weight)


def test_more_groups_than_blocks(program: Path, gen: torch.Generator) -> None:
    """Blocks walk over the groups; bad ones among them are named."""
    weight, fisher = integer_problem(gen, 19, 16, 8, diagonal=True)
    good = emulate(program, weight, fisher, "4:8")
    assert_is_reference(good, weight, fisher, "4:8")
    fisher[7, 2, 2], weight[9, 1] = -1.0, torch.inf
    found = emulate(program, weight, fisher, "4:8")
    assert found.info.nonzero().flatten().tolist() == [7, 18] and found.info[7] == 3 and found.info[18] == -1
    same = found.info.view(19, 2) == 0
    assert torch.equal(found.saliency[same], good.saliency[same])


# panels


def test_example_e(program: Path) -> None:
    weight, fisher = example_e(torch.float32)
    found = emulate(program, weight, fisher, "4:2:8", damp=torch.ones(1))
    assert found.columns is not None and found.columns.flatten().tolist() == [0, 4, 5, 6]
    assert float(found.saliency) == pytest.approx(839.487105, rel=EXAMPLE_F32)
    assert [kept_of(found.mask, row, 0, 8) for row in range(4)] == [(0, 4), (5, 6), (5, 6), (4, 6)]


PANELS = [
    ("1:2:4", 3, 4), ("3:2:4", 2, 2), ("16:2:8", 2, 4), ("17:2:8", 1, 4), ("5:2:8", 2, 3), ("4:2:8", 2, 7),
    ("4:2:8", 2, 8), ("3:1:8", 2, 4), ("4:1:6", 2, 1), ("9:2:16", 1, 4), ("8:2:16", 1, 2), ("2:2:16", 1, 6),
    ("3:1:16", 1, 4), ("4:2:11", 1, 5), ("3:2:24", 1, 4), ("3:1:32", 1, 2), ("2:2:20", 1, 3),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "wide", "num_columns"), PANELS)
def test_panels_of_integers_are_the_reference(
    program: Path, gen: torch.Generator, pattern: str, wide: int, num_columns: int
) -> None:
    v, _, m = (int(part) for part in pattern.split(":"))
    rows, cols = 3 * v, wide * m
    for diagonal, high in ((False, 3), (True, 1)):
        weight, fisher = integer_problem(gen, rows, cols, m, diagonal=diagonal, low=-high, high=high)
        damp = torch.randint(0, 3, (rows * wide,), generator=gen).float()
        for mask in (None, live_mask(gen, rows, cols, m)):
            options = {"damp": damp, "mask": mask, "num_columns": num_columns}
            found = emulate(program, weight, fisher, pattern, panel_rows=2, **options)
            assert_is_reference(found, weight, fisher, pattern, **options)


LARGER_PANELS = [
    ("3:3:4", 2, 3), ("3:3:5", 1, 4), ("4:3:8", 1, 4), ("2:4:8", 2, 6), ("3:5:8", 1, 7), ("2:3:8", 1, 3),
    ("2:7:8", 1, 8), ("3:3:16", 1, 4), ("5:5:12", 1, 7), ("3:9:13", 1, 11), ("3:9:16", 1, 11), ("2:8:16", 1, 9),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "wide", "num_columns"), LARGER_PANELS)
def test_panels_of_larger_sets_are_the_reference(
    program: Path, gen: torch.Generator, pattern: str, wide: int, num_columns: int
) -> None:
    """Tables of static and of dynamic size, all numbers of rows at once, chunks and passes; ties; partly dead."""
    v, n, m = (int(part) for part in pattern.split(":"))
    rows, cols = 2 * v, wide * m
    for high, masked in ((3, False), (1, True), (0, True)):
        weight, fisher = integer_problem(gen, rows, cols, m, diagonal=True, low=-high, high=high)
        damp = torch.randint(0, 3, (rows * wide,), generator=gen).float()
        mask = live_mask(gen, rows, cols, m) if masked else None
        options = {"damp": damp, "mask": mask, "num_columns": num_columns}
        found = emulate(program, weight, fisher, pattern, panel_rows=1 + masked, **options)
        path = "panels_small" if math.comb(m, num_columns) <= 128 else "panels_medium"
        assert found.path == (path if math.comb(m, n) <= 768 else "panels_large")
        assert_is_reference(found, weight, fisher, pattern, **options)


@pytest.mark.parametrize(("pattern", "num_columns"), [("4:4:8", 6), ("3:3:8", 4), ("2:6:12", 9), ("2:3:14", 5)])
def test_panels_of_larger_sets_reach_the_optimum(
    program: Path, gen: torch.Generator, pattern: str, num_columns: int
) -> None:
    """Correlated blocks, where a closed column still counts in u and in the loss, against f64; the new weight too."""
    v, _, m = (int(part) for part in pattern.split(":"))
    weight = torch.randn(2 * v, m, generator=gen)
    fisher = oracle.random_spd(gen, 2 * v, m).float()
    options = {"damp": torch.zeros(1), "method": "combinatorial", "num_columns": num_columns}
    for alive in (None, torch.rand(2 * v, m, generator=gen) < 0.8):
        found = emulate(program, weight, fisher, pattern, mask=alive, num_columns=num_columns)
        best, least, columns = reference.search_vnm(weight.double(), fisher.double(), pattern, mask=alive, **options)
        assert not found.info.any() and torch.equal(found.mask, best)
        assert found.columns is not None and torch.equal(found.columns, columns)
        torch.testing.assert_close(found.saliency.double(), least, rtol=SALIENCY_EQUAL_BLOCK, atol=1e-6)
        live = weight.double() if alive is None else weight.double().masked_fill(~alive, 0.0)
        new = reference.obs_update(live, fisher.double(), found.mask, damp=torch.zeros(1), update="joint")
        assert found.weight is not None and (found.weight - new).norm() <= 1e-4 * new.norm()


def test_bad_groups_of_larger_panels(program: Path, gen: torch.Generator) -> None:
    """They are named and keep nothing; panels beside them do not notice."""
    weight, fisher = integer_problem(gen, 8, 16, 8, diagonal=True)
    good = emulate(program, weight, fisher, "4:4:8", num_columns=6)
    weight[1, 3], fisher[4] = torch.nan, -1.0  # row 1 of panel 0 and row 2, both in the first groups
    found = emulate(program, weight, fisher, "4:4:8", num_columns=6)
    assert found.info.nonzero().flatten().tolist() == [2, 4] and found.info[2] == -1 and found.info[4] == 1
    assert not found.mask[1:3, :8].any() and found.saliency[0, 0].isnan()
    assert torch.equal(found.mask[4:], good.mask[4:]) and torch.equal(found.mask[:, 8:], good.mask[:, 8:])
    assert torch.equal(found.saliency[1], good.saliency[1])


def test_panels_with_dead_columns(program: Path, gen: torch.Generator) -> None:
    """Fewer used columns than may be kept: the lowest dead ones fill up; panels without any live entry too."""
    weight, fisher = integer_problem(gen, 24, 16, 8)
    mask = torch.rand(24, 16, generator=gen) < 0.7
    for panel, dead in enumerate(([0], [1, 2], [0, 2, 4], [1, 3, 5, 6], [0, 1, 2, 3, 4, 6], list(range(8)))):
        mask[4 * panel : 4 * panel + 4, dead] = False
        mask[4 * panel : 4 * panel + 4, [8 + (7 - column) for column in dead]] = False
    _, diagonal = integer_problem(gen, 24, 16, 8, diagonal=True)
    for pattern, blocks, num_columns in (
        ("4:2:8", fisher, 2), ("4:2:8", fisher, 4), ("4:2:8", fisher, 6), ("4:3:8", diagonal, 4), ("4:4:8", diagonal, 6)
    ):  # fmt: skip
        found = emulate(program, weight, blocks, pattern, mask=mask, num_columns=num_columns)
        assert_is_reference(found, weight, blocks, pattern, mask=mask, num_columns=num_columns)
