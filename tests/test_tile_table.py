# SPDX-License-Identifier: Apache-2.0
"""The table of tiles of the sparse product: the least of all estimates is chosen, and it is what the bench measured."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obs_kernels.patterns import VNMPattern, parse_pattern
from obs_kernels.timing import is_steady

ROOT = Path(__file__).resolve().parents[1]
MULTIPROCESSORS = 132
STEP = 64
MEAN_LOSS, MOST_LOSS = 0.005, 0.15
"""Of time, to the faster way by the stored bench: of all its products together, and of one. (Of few tokens times differ
by 10 to 20 percent from those in graphs, which the tiles were fitted to.)
"""


class Product(NamedTuple):
    """A product of a weight [rows, cols] in panels v:2:m (v = 0: none)."""

    rows: int
    cols: int
    tokens: int
    v: int
    m: int
    feature_x: bool


class Answer(NamedTuple):
    tile: str
    cycles: int
    gather_tile: str
    gather_cycles: int
    gathers: bool


class Tile(NamedTuple):
    kind: str
    name: str
    rows: int
    tokens: int
    cluster: int
    split: int
    step_cycles: int
    tile_cycles: int


Ask = Callable[[list[Product]], tuple[list[Tile], list[Answer]]]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Ask:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ was not found")
    program = tmp_path_factory.mktemp("tile_table") / "program"
    source = ROOT / "tests" / "tile_table_on_cpu.cpp"
    flags = ["-std=c++17", "-O1", "-Wall", "-Werror", "-fsanitize=undefined", "-fno-sanitize-recover=all"]
    subprocess.run([compiler, *flags, f"-I{ROOT / 'csrc'}", "-o", program, source], check=True)

    def asked(products: list[Product]) -> tuple[list[Tile], list[Answer]]:
        given = "\n".join(" ".join(str(int(value)) for value in product) for product in products)
        text = subprocess.run([program], input=given, capture_output=True, text=True, check=True).stdout
        lines = [line.split(",") for line in text.splitlines()]
        tiles = [Tile(kind, name, *map(int, sizes)) for kind, name, *sizes in lines if kind in ("sparse", "gather")]
        answers = [
            Answer(tile, int(cycles), gather_tile, int(gather_cycles), gathers == "1")
            for tile, cycles, gather_tile, gather_cycles, gathers in lines[len(tiles) :]
        ]
        assert len(answers) == len(products)
        return tiles, answers

    return asked


def estimate(tile: Tile, product: Product, kept: int) -> int | None:
    """Cycles of a product of so many columns by ``tile``, written down anew; None if it does not fit."""
    if tile.kind == "gather" and (product.v == 0 or product.v % tile.rows):
        return None
    steps = -(-kept // STEP)
    split = max(1, min(tile.split, steps))
    ctas = tile.cluster * split
    more_rows, more_tokens = (tile.cluster, 1) if tile.kind == "sparse" else (1, tile.cluster)
    tiles = -(-product.rows // (tile.rows * more_rows)) * -(-product.tokens // (tile.tokens * more_tokens))
    at_once = (MULTIPROCESSORS if ctas <= 2 else MULTIPROCESSORS * 9 // 10) // ctas
    return -(-tiles // at_once) * (-(-steps // split) * tile.step_cycles + tile.tile_cycles)


products = st.builds(
    lambda panels, rows, groups, tokens, feature_x: Product(
        rows * max(panels[0], 8), groups * panels[1], tokens, *panels, feature_x
    ),
    st.sampled_from([(0, 4), (64, 8), (128, 8), (256, 8), (64, 16), (128, 32), (192, 16)]),
    st.integers(1, 64),
    st.integers(1, 1024),
    st.integers(1, 20_000),
    st.booleans(),
)


@given(st.lists(products, min_size=40, max_size=40))
def test_the_least_estimate_is_chosen(ask: Ask, asked: list[Product]) -> None:
    """Over all tiles that fit; of two equal ones the first of the table."""
    tiles, answers = ask(asked)
    for product, answer in zip(asked, answers, strict=True):
        whole = {t.name: estimate(t, product, product.cols) for t in tiles if t.kind == "sparse"}
        kept = product.cols // product.m * 4
        gathered = {t.name: c for t in tiles if t.kind == "gather" if (c := estimate(t, product, kept)) is not None}
        assert answer.cycles == min(c for c in whole.values() if c is not None) == whole[answer.tile]
        assert answer.tile == next(name for name, cycles in whole.items() if cycles == answer.cycles)
        assert (answer.gather_tile == "-") == (not gathered)
        if gathered:
            least = min(gathered.values())
            assert answer.gather_tile == next(name for name, cycles in gathered.items() if cycles == least)
            turning = answer.gather_cycles - least
            assert (turning == 0) == product.feature_x and turning >= 0
        assert answer.gathers == (bool(gathered) and answer.gather_cycles < answer.cycles)


@given(products, st.integers(1, 4096))
def test_more_tokens_never_cost_less(ask: Ask, product: Product, more: int) -> None:
    _, (few, many) = ask([product, product._replace(tokens=product.tokens + more)])
    assert many.cycles >= few.cycles and many.gather_cycles >= few.gather_cycles


def test_the_faster_way_of_the_bench_is_taken(ask: Ask) -> None:
    """As 2:4 or gathered, by the stored steady times of both: all that run as 2:4 on token-major x are one product."""
    rows = json.loads((ROOT / "bench" / "results" / "matmul.json").read_text(encoding="utf-8"))["rows"]
    ours = [r for r in rows if r["path"] == "kernel" and r["config"].get("backend") == "cuda"]
    ours = [r for r in ours if is_steady(r["p20"], r["p80"])]
    as_two_of_four = [r for r in ours if r["config"]["as"] == "2:4" and "x" not in r["config"]]
    as_two_of_four.sort(key=lambda row: row["pattern"] == "2:4")  # its own row last, which stays
    whole = {tuple(r["shape"].values()): r["us"] for r in as_two_of_four}
    both: list[tuple[Product, float, float]] = []
    for row in ours:
        pattern = parse_pattern(row["pattern"])
        if isinstance(pattern, VNMPattern) and row["config"]["as"] == "gathered":
            shape = row["shape"]
            feature_x = row["config"].get("x") == "feature-major"
            product = Product(shape["R"], shape["C"], shape["T"], pattern.v, pattern.m, feature_x)
            both.append((product, whole[tuple(shape.values())], row["us"]))
    assert len(both) > 200 and {product.feature_x for product, *_ in both} == {True, False}
    _, answers = ask([product for product, *_ in both])
    losses = {
        product: (gathered if answer.gathers else as_whole) / min(as_whole, gathered) - 1
        for (product, as_whole, gathered), answer in zip(both, answers, strict=True)
    }
    worst = sorted(losses, key=losses.__getitem__)[-5:]
    assert sum(losses.values()) / len(losses) < MEAN_LOSS, worst
    assert losses[worst[-1]] < MOST_LOSS, worst
