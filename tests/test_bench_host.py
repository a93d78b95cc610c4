# SPDX-License-Identifier: Apache-2.0
"""The bench of what the host takes for a call, as far as a CPU goes: its calls, its table, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import host_cost
from obs_kernels.errors import BackendUnavailableError
from obs_kernels.ops.layout import is_feature_major


def test_calls_are_one_product_each_of_the_size_and_layout_they_say() -> None:
    with torch.no_grad():
        calls = host_cost.calls(256, 128, 24, torch.device("cpu"))
        assert [name for name, *_ in calls].count("SparseLinear") == len(host_cost.WEIGHTS)
        results = {(name, pattern, layout): call() for name, pattern, layout, call in calls}
    for (name, pattern, layout), y in results.items():
        assert isinstance(y, torch.Tensor) and y.shape == (24, 256) and y.abs().sum() > 0
        if name == "SparseLinear":  # the op below it gives the same
            assert torch.equal(y, results["ops.sparse_linear", pattern, layout])


def test_every_call_reads_the_same_inputs_in_the_layout_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[torch.Tensor] = []
    dense: list[torch.Tensor] = []
    monkeypatch.setattr(host_cost, "_bound", lambda layer, x: read.append(x))
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda layer, x: dense.append(x))
    calls = host_cost.calls(256, 128, 24, torch.device("cpu"))
    calls[0][-1]()
    assert [is_feature_major(x) for x in read] == [layout == "feature" for _, layout in host_cost.WEIGHTS]
    assert len(dense) == 1 and all(torch.equal(x, dense[0]) for x in read)


def test_the_table_shows_each_call_and_its_gap() -> None:
    spread = {"us": 7.04, "p20": 6.96, "p80": 8.0, "repeats": 20}
    row: dict[str, Any] = {
        "rows": 768,
        "cols": 512,
        "tokens": 128,
        "call": "nn.Linear",
        "pattern": "dense",
        "x": "token",
    }
    row |= {"host": spread, "graph": spread | {"us": 3.5}, "kernels_us": 3.2, "kernels": 1.0, "gap_us": 0.3}
    machine = {"device": "GPU", "versions": {"torch": "2.0"}}
    text = host_cost.to_markdown({"commit": "0123456789", "dirty": False, "machine": machine, "rows": [row, row]})
    line = "| 768 x 512, 128 | nn.Linear | dense | token-major | 7.0 (7.0-8.0) | 3.5 | 3.2 | 1 | 0.3 |"
    assert text.count(line) == 2 and "commit 0123456." in text


def test_without_a_gpu_nothing_is_measured_or_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailableError, match="needs a GPU"):
        host_cost.main(["--json", str(tmp_path / "h.json")])
    assert not list(tmp_path.iterdir())


def test_the_stored_table_is_that_of_the_stored_figures() -> None:
    stored = json.loads(host_cost.RESULTS.read_text())
    assert host_cost.RESULTS.with_suffix(".md").read_text() == host_cost.to_markdown(stored)
    assert not stored["dirty"] and len(stored["rows"]) == len(host_cost.SHAPES) * (1 + 2 * len(host_cost.WEIGHTS))
