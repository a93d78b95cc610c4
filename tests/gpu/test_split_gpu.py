# SPDX-License-Identifier: Apache-2.0
"""Tiles whose columns several CTAs share out, for few tokens: every share, ragged on all sides, both kernels."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from product_checks import (
    DEVICE,
    NAN,
    assert_exact,
    hopper,
    integer_weight,
    integers,
    matmul,
    prepacked_kept,
    same_bits,
)
from torch import Tensor

from obs_kernels.launch_plan import LaunchPlan

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]
__all__ = ["hopper", "matmul"]  # fixtures

PANELS = "128:2:8"
KERNELS = ("2:4", PANELS)
STEP = {"2:4": 64, PANELS: 128}
"""Columns of W that a step takes: the kept ones are half of those of a panel."""


def is_split(name: str) -> bool:
    """Whether a tile is of those that add up, shares of one included."""
    return "split" in name or name.split()[-1] in ("64x64", "128x64")


def tiles(matmul: ModuleType, text: str) -> list[str]:
    found = [name for name in (matmul.GATHER_CONFIGS if text == PANELS else matmul.CONFIGS) if is_split(name)]
    assert {"split" in name for name in found} == {True, False}
    return found


def run(
    matmul: ModuleType,
    text: str,
    case: tuple[int, int, int],
    tile: str | None,
    y_layout: str,
    *,
    x_layout: str = "token",
    seen: list[LaunchPlan] | None = None,
) -> Tensor:
    """y [T, R] of (tokens, rows, cols), checked against the exact product. ``seen`` is told what was launched."""
    tokens, rows, cols = case
    gen = torch.Generator(DEVICE).manual_seed(tokens + rows + cols)
    sparse, dense = integer_weight(rows, cols, text, torch.bfloat16)
    x, bias = integers(gen, 7, (tokens, cols), torch.bfloat16), integers(gen, 7, (rows,), torch.bfloat16)
    y = torch.full((tokens, rows) if y_layout == "token" else (rows, tokens), NAN, device=DEVICE).to(x)
    options = {"rows": rows, "cols": cols, "activation": "", "y_layout": y_layout, "config": tile}
    if text == PANELS:
        given, packed = matmul.as_gathered(x, "token"), prepacked_kept(matmul, sparse)
        plan = matmul.launch_gather_linear(given, sparse.columns, packed, bias, y, v=128, **options)
    else:
        packed = matmul.prepack(sparse.values, sparse.codes, sparse.columns_or_empty(), text)
        given = x if x_layout == "token" else x.T.contiguous()
        plan = matmul.launch_sparse_linear(given, packed, bias, y, x_layout=x_layout, **options)
    assert tile is None or plan.config == tile
    y = y if y_layout == "token" else y.T
    assert_exact(y, x, dense, bias, (case, tile, y_layout, x_layout))
    if seen is not None:
        seen.append(plan)
    return y


@pytest.mark.parametrize("y_layout", ["token", "feature"])
@pytest.mark.parametrize("text", KERNELS)
def test_every_number_of_steps_is_shared_out(matmul, text, y_layout):
    """One step and more, fewer than CTAs, odd numbers, more than there are stages; a last step that is not whole."""
    for steps in (*range(1, 14), 37, 81):
        cols = STEP[text] * steps - (0 if steps % 3 else STEP[text] // 2)
        for tile in tiles(matmul, text):
            run(matmul, text, (72, 256, cols), tile, y_layout)


@pytest.mark.parametrize("y_layout", ["token", "feature"])
@pytest.mark.parametrize("text", KERNELS)
def test_ragged_tokens_and_rows(matmul, text, y_layout):
    """By the copy engine (multiples of 8) and element by element; more tiles than multiprocessors."""
    for tokens in (1, 7, 8, 63, 64, 65, 136, 2504):
        for rows in (128, 384) if text == PANELS else (8, 77, 200, 384):
            for tile in tiles(matmul, text):
                run(matmul, text, (tokens, rows, STEP[text] * 5), tile, y_layout)


@pytest.mark.sanitizer
@pytest.mark.parametrize("text", KERNELS)
def test_under_sanitizers(matmul, text):
    for tile in tiles(matmul, text):
        run(matmul, text, (72, 128, STEP[text] * 5), tile, "token")


@pytest.mark.parametrize("y_layout", ["token", "feature"])
def test_x_feature_major(matmul, y_layout):
    for tokens in (8, 72, 264):
        for tile in tiles(matmul, "2:4"):
            run(matmul, "2:4", (tokens, 200, 64 * 5), tile, y_layout, x_layout="feature")


@pytest.mark.parametrize("text", KERNELS)
def test_runs_and_layouts_give_the_same_bits(matmul, text):
    for tile in tiles(matmul, text):
        first, *others = (run(matmul, text, (200, 384, 3072), tile, layout) for layout in ("token", "feature") * 3)
        assert all(same_bits(first, other) for other in others), tile


@pytest.mark.parametrize("text", KERNELS)
def test_few_tokens_are_split_and_many_are_not(matmul, text):
    """What the table chooses; a call has a cluster for every tile."""
    for tokens, wanted in ((64, True), (12288, False)):
        seen: list[LaunchPlan] = []
        run(matmul, text, (tokens, 768, 3072), None, "token", seen=seen)
        assert is_split(seen[0].config) == wanted, seen
