# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the sweep, run as host code under sanitizers (cuda_on_cpu.h), against the reference."""

from __future__ import annotations

import subprocess
from pathlib import Path

import oracle
import pytest
import torch
from emulation import SANITIZERS, build
from torch import Tensor

from obs_kernels import reference
from obs_kernels.cuda_calls.sweep import panel_sizes, sweep_tables
from obs_kernels.patterns import NMPattern, VNMPattern, parse_pattern
from obs_kernels.reference.hessian import row_loss, upper_factor
from obs_kernels.reference.sweep import diagonal_groups

SOURCES = ["sweep/rows.cu", "sweep/panels.cu", "sweep/panel_sets.cu", "sweep/sweep.cpp"]
WIDTH = 32
"""Columns of a step here: a quarter of the threads."""
LOSS = 1e-4
"""Relative; of a group and in all, where no near tie was decided otherwise: R is irrational, and each backend rounds in
its own order."""
NEAR_TIE = 1e-3
"""Relative; a choice may differ from the reference's where the losses of its group are as near as that."""

Found = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module", params=SANITIZERS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(
        SOURCES,
        "sweep_on_cpu.cpp",
        tmp_path_factory.mktemp("emulation") / "sweep",
        sanitizer=request.param,
        empty=["0", "0", "0", "0", "0", "2", "4", "0", "0", "0", "0", "0", "0", "0", "0"],
        replaced={"sweep/sweep_config.h": [(r"kSweepWidth = \d+", f"kSweepWidth = {WIDTH}", 1)]},
    )


class Emulation:
    """``sweep_groups`` of the program, for ``reference.sweep_rows_by``; as ``cuda_calls.sweep``, a process a step."""

    def __init__(self, program: Path) -> None:
        self.program, self.paths = program, set[str]()

    def __call__(
        self,
        live: Tensor,
        factor: Tensor,
        own: Tensor,
        curvature: Tensor,
        unit: Tensor,
        pattern: NMPattern,
        row_scale: Tensor | None,
        alive: Tensor | None,
        num_columns: int,
    ) -> Found:
        (rows, cols), m = live.shape, pattern.m
        v, c = (pattern.v, num_columns) if isinstance(pattern, VNMPattern) else (0, 0)
        tables = sweep_tables(pattern.n, m, c, torch.device("cpu"))
        panel = [] if tables.panels is None else [tables.sets, *tables.panels]
        sizes = list(panel_sizes(tables).values()) if v else [0] * 4
        fixed = [factor, own, curvature, unit]
        optional = [t for t in (alive, row_scale) if t is not None]
        shapes = [(rows, cols), (rows, cols), (rows, cols // m), None, (rows // max(v, 1), cols // m, c)]
        dtypes = [torch.uint8, torch.float32, torch.float32, torch.float32, torch.uint8]
        kept, new = torch.zeros(rows, cols, dtype=torch.bool), torch.zeros(rows, cols)
        loss, columns = torch.zeros(rows, cols // m), torch.zeros(shapes[4], dtype=torch.uint8)
        most = WIDTH // 2 if v > 128 and pattern.n > 2 else WIDTH
        pushed, width = torch.zeros(rows, cols), most // m * m
        for start in range(0, cols, width):
            stop = min(start + width, cols)
            numbers = [rows, cols, start, stop - start, v, pattern.n, m, c, alive is not None, row_scale is not None]
            numbers += [tables.inner.numel(), *sizes]
            given = [live, *optional, *fixed, pushed, tables.inner, *panel]
            data = b"".join(tensor.contiguous().numpy().tobytes() for tensor in given)
            arguments = [str(int(number)) for number in numbers]
            done = subprocess.run([self.program, *arguments], input=data, capture_output=True, check=False)
            assert done.returncode == 0, done.stderr.decode()
            path, _, rest = done.stdout.partition(b"\n")
            self.paths.add(path.decode())
            shapes[3] = (rows, stop - start + 3)
            out = []
            for shape, dtype in zip(shapes, dtypes, strict=True):
                count = shape[0] * shape[1] * (shape[2] if len(shape) > 2 else 1)
                part, rest = rest[: count * dtype.itemsize], rest[count * dtype.itemsize :]
                out.append(torch.frombuffer(bytearray(part), dtype=dtype).view(shape) if part else torch.empty(shape))
            assert not rest
            mask, weights, losses, change, chosen = out
            assert (mask[:, start:stop] <= 1).all()
            groups = slice(start // m, stop // m)
            kept[:, start:stop], new[:, start:stop] = mask[:, start:stop].bool(), weights[:, start:stop]
            loss[:, groups] = losses[:, groups]
            change = change[:, : stop - start]
            assert torch.equal(change, new[:, start:stop] - live[:, start:stop])
            if v:
                columns[:, groups] = chosen[:, groups]
            pushed[:, stop:].addmm_(change, factor[start:stop, stop:])
        if row_scale is not None:
            loss = loss * row_scale[:, None]
        return kept, new, loss.view(rows // max(v, 1), -1, cols // m).sum(1), columns if v else columns.flatten()[:0]


def sweep(by: object, weight: Tensor, hessian: Tensor, pattern: str, **options: object) -> Found:
    given = {"row_scale": None, "damp": torch.zeros(1), "method": "combinatorial", "mask": None, "num_columns": 4}
    return reference.sweep_rows_by(by, weight, hessian, pattern, **(given | {"resolve": False} | options))


def problem(gen: torch.Generator, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, cols, generator=gen), oracle.random_spd(gen, 1, cols)[0].float()


def live_mask(gen: torch.Generator, rows: int, cols: int, m: int) -> Tensor:
    """Full, thin, single and fully dead groups."""
    share = torch.tensor([1.0, 0.7, 0.3, 0.1, 0.0])[torch.randint(0, 5, (rows, cols // m, 1), generator=gen)]
    return torch.rand(rows, cols // m, m, generator=gen).lt(share).view(rows, cols)


def assert_is_reference(
    program: Path, weight: Tensor, hessian: Tensor, pattern: str, path: str, **options: object
) -> Found:
    """Against the reference in f64: losses of the choice, its structure, and the bookkeeping of the loss."""
    emulation = Emulation(program)
    found = sweep(emulation, weight, hessian, pattern, **options)
    assert emulation.paths == {path}
    kept, new, saliency, columns = found
    parsed, mask, scale = parse_pattern(pattern), options.get("mask"), options.get("row_scale")
    wide = {name: t.double() if name == "row_scale" and t is not None else t for name, t in options.items()}
    best = sweep(reference.sweep_groups, weight.double(), hessian.double(), pattern, **wide)
    v, m = parsed.v if isinstance(parsed, VNMPattern) else 1, parsed.m

    # A row that chose otherwise once goes on with other weights: only what comes before is compared.
    differ = (kept != best[0]).view(-1, v, kept.shape[1] // m, m).any(3).any(1)
    if isinstance(parsed, VNMPattern):
        differ |= (columns != best[3]).any(2)
    upto = differ.cumsum(1)
    assert (upto > 0).float().mean() <= 0.1, "many groups differ from the reference"
    same = upto == 0
    torch.testing.assert_close(saliency[same].double(), best[2][same], rtol=LOSS, atol=1e-5)
    first = (upto == 1) & differ  # decided on equal weights: a near tie
    assert (saliency[first] <= best[2][first] * (1 + NEAR_TIE) + 1e-5).all()
    rows = (~differ.any(1)).repeat_interleave(v)
    assert (new[rows] - best[1][rows]).norm() <= 1e-4 * best[1][rows].norm() + 1e-6

    live = weight if mask is None else weight.masked_fill(~mask, 0.0)
    whole = row_loss(
        new.double() - live.double(), hessian.double(), row_scale=scale, damp=float(options.get("damp", 0))
    )
    torch.testing.assert_close(saliency.double().sum(1), whole.view(-1, v).sum(1), rtol=LOSS, atol=1e-4)
    assert not new[~kept].any() and not new[~kept].signbit().any()
    assert mask is None or not (kept & ~mask).any()
    parsed.validate_mask(kept) if options.get("num_columns", 4) == 4 else None
    return found


ROWS = [
    ("2:4", 33, 36, "rows4"), ("1:4", 5, 8, "rows4"), ("2:3", 3, 33, "rows4"), ("2:8", 33, 40, "rows8"),
    ("1:7", 2, 35, "rows8"), ("2:16", 3, 48, "rows16"), ("2:11", 2, 33, "rows16"), ("1:16", 2, 16, "rows16"),
    ("3:8", 3, 40, "rows8_4"), ("4:8", 3, 40, "rows8_4"), ("5:8", 3, 40, "rows8_7"), ("6:8", 2, 16, "rows8_7"),
    ("7:8", 2, 16, "rows8_7"), ("3:4", 2, 36, "rows8_4"),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "rows", "cols", "path"), ROWS)
def test_rows(program: Path, gen: torch.Generator, pattern: str, rows: int, cols: int, path: str) -> None:
    """Ragged numbers of rows and of columns in a step; dense, then with dead entries."""
    weight, hessian = problem(gen, rows, cols)
    mask = live_mask(gen, rows, cols, parse_pattern(pattern).m)
    assert_is_reference(program, weight, hessian, pattern, path)
    kept = assert_is_reference(program, weight, hessian, pattern, path, mask=mask, damp=torch.tensor([0.1]))[0]
    m, n = parse_pattern(pattern).m, parse_pattern(pattern).n
    assert torch.equal(kept.view(rows, -1, m).sum(2), mask.view(rows, -1, m).sum(2).clamp(max=n))


PANELS = [
    ("1:2:4", 2, 8, 4, "panels16"), ("4:2:8", 8, 40, 4, "panels16"), ("16:2:8", 16, 16, 4, "panels16"),
    ("5:2:8", 5, 8, 3, "panels16"), ("4:2:8", 4, 16, 7, "panels16"), ("4:2:8", 4, 8, 2, "panels16"),
    ("3:1:6", 3, 36, 2, "panels16"), ("4:2:16", 4, 32, 4, "panels16"), ("2:2:16", 2, 16, 14, "panels16"),
    ("17:2:8", 17, 16, 4, "panels64"), ("18:2:16", 18, 16, 4, "panels64"), ("70:2:8", 70, 16, 4, "panels256"),
    ("65:2:16", 65, 16, 4, "panels256"),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "rows", "cols", "num_columns", "path"), PANELS)
def test_panels(
    program: Path, gen: torch.Generator, pattern: str, rows: int, cols: int, num_columns: int, path: str
) -> None:
    """With scales of the rows, some of them 0; dense, then with dead entries."""
    weight, hessian = problem(gen, rows, cols)
    scale = torch.rand(rows, generator=gen) * (torch.rand(rows, generator=gen) < 0.8)
    scale[0] = 1.0
    options = {"num_columns": num_columns, "row_scale": scale}
    assert_is_reference(program, weight, hessian, pattern, path, **options)
    mask = live_mask(gen, rows, cols, parse_pattern(pattern).m)
    assert_is_reference(program, weight, hessian, pattern, path, mask=mask, **(options | {"row_scale": None}))


SETS = [
    ("1:5:8", 2, 16, 7, "sets16"), ("1:3:8", 2, 8, 8, "sets16"), ("3:5:8", 6, 40, 7, "sets16"),
    ("3:4:8", 6, 40, 6, "sets16"), ("3:3:8", 6, 40, 4, "sets16"), ("16:4:8", 16, 16, 5, "sets16"),
    ("3:5:8", 3, 16, 5, "sets16"), ("3:4:8", 3, 16, 8, "sets16"), ("3:3:8", 3, 16, 3, "sets16"),
    ("3:6:8", 3, 16, 7, "sets16"), ("3:7:8", 3, 16, 8, "sets16"), ("4:3:4", 8, 36, 3, "sets16"),
    ("5:3:7", 5, 21, 5, "sets16"), ("64:5:8", 64, 16, 7, "sets64"), ("64:4:8", 64, 16, 6, "sets64"),
    ("64:3:8", 64, 16, 4, "sets64"), ("17:6:8", 17, 8, 7, "sets64"), ("128:5:8", 128, 8, 7, "sets128"),
    ("128:4:8", 128, 8, 6, "sets128"), ("127:3:8", 127, 8, 4, "sets128"), ("256:5:8", 256, 8, 7, "sets256"),
    ("256:4:8", 256, 24, 6, "sets256"), ("250:3:8", 250, 8, 4, "sets256"), ("129:7:8", 129, 8, 8, "sets256"),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "rows", "cols", "num_columns", "path"), SETS)
def test_panels_of_more_than_two(
    program: Path, gen: torch.Generator, pattern: str, rows: int, cols: int, num_columns: int, path: str
) -> None:
    """As above; panels of more rows than the tables hold at a time, and steps of half the width."""
    test_panels(program, gen, pattern, rows, cols, num_columns, path)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("n", "num_columns"), [(5, 7), (4, 6), (3, 4), (3, 3), (6, 8)])
def test_ties_of_panels(program: Path, gen: torch.Generator, n: int, num_columns: int, masked: bool) -> None:
    """Groups and entries that know nothing of each other, small integers: the very choice of the reference."""
    for v in (1, 5, 70):
        weight = torch.randint(-2, 3, (2 * v, 16), generator=gen).float()
        mask = live_mask(gen, 2 * v, 16, 8) if masked else None
        scale = 2.0 ** torch.randint(-1, 2, (2 * v,), generator=gen)
        options = {"num_columns": num_columns, "row_scale": scale, "mask": mask}
        found, best = (
            sweep(by, weight, 0.25 * torch.eye(16), f"{v}:{n}:8", **options)
            for by in (Emulation(program), reference.sweep_groups)
        )
        for mine, wanted in zip(found, best, strict=True):
            assert torch.equal(mine, wanted)


def test_a_ladder_of_panels(program: Path, gen: torch.Generator) -> None:
    """The stages of gradual pruning: rows short of n in some column sets, and columns dead in all rows."""
    weight, hessian = problem(gen, 24, 16)
    mask, live = None, weight
    for n, num_columns, path in ((5, 7, "sets16"), (4, 6, "sets16"), (3, 4, "sets16"), (2, 4, "panels16")):
        options = {"mask": mask, "num_columns": num_columns}
        mask, live, _, _ = assert_is_reference(program, live, hessian, f"12:{n}:8", path, **options)
        assert mask.view(24, 2, 8).sum(2).max() == n


def test_panels_with_dead_columns(program: Path, gen: torch.Generator) -> None:
    """Fewer used columns than may be kept: the lowest dead ones fill up; a panel without any live entry too."""
    weight, hessian = problem(gen, 12, 16)
    mask = torch.rand(12, 16, generator=gen) < 0.7
    for panel, dead in enumerate(([0, 2, 4], [0, 1, 2, 3, 4, 6], list(range(8)))):
        mask[4 * panel : 4 * panel + 4, dead] = False
        mask[4 * panel : 4 * panel + 4, [8 + (7 - column) for column in dead]] = False
    for n, num_columns in ((2, 2), (2, 4), (3, 4), (4, 5)):
        options = {"mask": mask, "num_columns": num_columns}
        path = "panels16" if n == 2 else "sets16"
        columns = assert_is_reference(program, weight, hessian, f"4:{n}:8", path, **options)[3]
        assert columns[2].tolist() == [list(range(num_columns))] * 2


@pytest.mark.parametrize("pattern", ["2:4", "2:16", "4:8", "4:2:8", "4:3:8"])
def test_zeros(program: Path, pattern: str) -> None:
    """Nothing to tell apart: the lowest entries stay."""
    m, n = parse_pattern(pattern).m, parse_pattern(pattern).n
    kept, new, saliency, columns = sweep(Emulation(program), torch.zeros(4, 2 * m), 0.25 * torch.eye(2 * m), pattern)
    assert torch.equal(kept, torch.arange(m).lt(n).repeat(4, 2)) and not new.any() and not saliency.any()
    assert not columns.numel() or columns.flatten().tolist() == [0, 1, 2, 3] * 2


@pytest.mark.parametrize("exponent", [-30, 30])
def test_extreme_scales(program: Path, gen: torch.Generator, exponent: int) -> None:
    """A power of two in H changes nothing but the loss."""
    weight, hessian = problem(gen, 4, 16)
    for pattern in ("2:8", "4:2:8", "4:3:8"):
        plain = sweep(Emulation(program), weight, hessian, pattern)
        scaled = sweep(Emulation(program), weight, hessian * 4.0**exponent, pattern)
        assert torch.equal(plain[0], scaled[0]) and torch.equal(plain[1], scaled[1])
        assert torch.equal(plain[2] * 4.0**exponent, scaled[2])


def test_the_same_bits_again(program: Path, gen: torch.Generator) -> None:
    weight, hessian = problem(gen, 8, 40)
    for pattern in ("2:8", "4:2:8", "4:3:8"):
        first, second = (sweep(Emulation(program), weight, hessian, pattern) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_groups_of_the_factor(gen: torch.Generator) -> None:
    """What the kernel is given: R_gg and S over a power of four."""
    _, hessian = problem(gen, 1, 24)
    factor = upper_factor(hessian * 1e6)
    own, curvature, unit = diagonal_groups(factor, 8)
    torch.testing.assert_close(own[1] * unit[1].sqrt(), factor[8:16, 8:16])
    torch.testing.assert_close(own @ own.mT, curvature)
    top = curvature.diagonal(dim1=1, dim2=2).amax(1)
    assert ((top >= 0.5) & (top < 2)).all()
