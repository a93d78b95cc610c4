# SPDX-License-Identifier: Apache-2.0
"""The bench that compares searches by predicted loss."""

from __future__ import annotations

import json
from pathlib import Path

import oracle
import pytest
import torch
from torch import nn

from bench import search_quality
from obs_kernels.errors import ConfigError

RESULTS = Path(search_quality.RESULTS)


def test_ratios_to_the_optimum(gen: torch.Generator) -> None:
    """The exact choice is 1 and the least; with D = m no mask with the same update is better."""
    layers = [
        (f"layer{i}", torch.randn(8, 32, generator=gen), oracle.random_spd(gen, 16, 16).float()) for i in range(2)
    ]
    for pattern in ("2:8", "4:2:8", "2:16"):
        cells = {c["method"]: c for c in search_quality.measure(layers, pattern, dampening_frac=0.01)}
        assert set(cells) == set(search_quality.METHODS) and cells["combinatorial"]["x_optimum"] == 1.0
        assert all(cell["x_optimum"] >= 1.0 - 1e-4 for cell in cells.values())
        assert cells["greedy"]["x_optimum"] < cells["magnitude"]["x_optimum"]


def test_sub_blocks_are_those_on_the_diagonal(gen: torch.Generator) -> None:
    fisher = torch.randn(3, 8, 8, generator=gen)
    parts = search_quality._sub_blocks(fisher, 4)
    assert parts.shape == (6, 4, 4)
    assert torch.equal(parts[0], fisher[0, :4, :4]) and torch.equal(parts[5], fisher[2, 4:, 4:])


def test_rows_come_with_their_fisher_blocks() -> None:
    model = nn.Sequential(nn.Linear(16, 512))
    count = search_quality.PANEL_ROWS
    fisher = torch.arange(1024.0)[:, None, None].expand(-1, 8, 8)
    _, weight, blocks = search_quality._some_rows(model, "0.weight", fisher, 0.5)
    first, last = model[0].weight[:count], model[0].weight[-count:]
    assert torch.equal(weight, torch.cat([first, last]))
    assert blocks[:, 0, 0].tolist() == [*range(2 * count), *range(1024 - 2 * count, 1024)]
    with pytest.raises(ConfigError, match="rows_share"):
        search_quality._some_rows(model, "0.weight", fisher, 0.0)


def test_committed_table_is_that_of_the_results() -> None:
    document = json.loads(RESULTS.read_text())
    assert RESULTS.with_suffix(".md").read_text() == search_quality.to_markdown(document)
    assert {c["method"] for c in document["cells"]} == set(search_quality.METHODS)
    assert all(c["x_optimum"] >= 1.0 - 1e-3 for c in document["cells"])
