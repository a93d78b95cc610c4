# SPDX-License-Identifier: Apache-2.0
"""The damping search: its rows are what pruning by hand gives, and gradients are collected once for each number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from obs_kernels.cli import app
from obs_kernels.errors import ConfigError, SingularBlockError
from obs_kernels.pruning import OBSConfig, OBSPruner
from obs_kernels.training import damping_search
from obs_kernels.training.damping_search import run_damping_job
from obs_kernels.training.oneshot import Cell, OneShotTable
from tests.tiny_folders import save_tiny_bert, write_questions

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertForQuestionAnswering

    folder = tmp_path_factory.mktemp("damping")
    torch.manual_seed(0)
    save_tiny_bert(folder / "model", BertForQuestionAnswering)
    write_questions(folder, dev="data.json", paragraphs=6, questions=2)
    return folder


def sources(work: Path) -> dict[str, Any]:
    return {"model": work / "model", "data": work / "data.json", "train": work / "train.json", "device": "cpu"}


GRID: dict[str, Any] = {"patterns": ("unstructured:0.5", "2:4"), "num_grads": (4, 8), "damps": (1e-2, 1e-5)}


def test_every_cell_is_scored_and_gradients_come_once(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collected: list[tuple[int, int]] = []
    configs: dict[tuple[str, int, float], OBSConfig] = {}
    collect, run_cell = OBSPruner.collect, OneShotTable.run_cell

    def counted(self: OBSPruner, *args: Any, **kwargs: Any) -> int:
        collected.append((self.config.num_grads, self.config.block_size))
        return collect(self, *args, **kwargs)

    def seen(self: OneShotTable, cell: Cell) -> Any:
        found = run_cell(self, cell)
        cfg = self.config(cell)
        assert cfg.damp is not None
        configs[cell.pattern, found.num_grads, cfg.damp] = cfg
        return found

    monkeypatch.setattr(OBSPruner, "collect", counted)
    monkeypatch.setattr(OneShotTable, "run_cell", seen)
    report = run_damping_job(**sources(work), **GRID)
    assert collected == [(4, 50), (4, 4), (8, 50), (8, 4)]  # not once for each damping
    rows = report["rows"]
    keys = [(row["pattern"], row["num_grads"], row["damp"]) for row in rows]
    assert keys == [(p, n, d) for n in GRID["num_grads"] for p in GRID["patterns"] for d in GRID["damps"]]
    assert set(configs) == set(keys) and configs[keys[0]].global_sparsity
    for row in rows:
        assert row["violations"] == 0 and row["sparsity"] == pytest.approx(0.5, abs=1e-3)
        assert row["received"] == row["num_grads"] and 0 <= row["f1"] <= 100
    by_damp = [next(r["predicted_loss"] for r in rows if r["num_grads"] == 8 and r["damp"] == d) for d in GRID["damps"]]
    assert by_damp[0] > by_damp[1] > 0  # the damping is part of the loss that is predicted
    for pattern, best in report["best"].items():
        assert best["f1"] == max(row["f1"] for row in rows if row["pattern"] == pattern)
    json.dumps(report)


def test_a_fisher_that_does_not_factorise_is_a_row(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_cell = OneShotTable.run_cell

    def singular(self: OneShotTable, cell: Cell) -> Any:
        if self.base.damp == 1e-5:
            raise SingularBlockError("a layer: block 0 is not positive definite")
        return run_cell(self, cell)

    monkeypatch.setattr(OneShotTable, "run_cell", singular)
    report = run_damping_job(**sources(work), **GRID | {"num_grads": (4,), "patterns": ("2:4",)})
    first, second = report["rows"]
    assert "f1" in first and second == {
        "pattern": "2:4", "num_grads": 4, "damp": 1e-5, "failed": "a layer: block 0 is not positive definite"
    }  # fmt: skip
    assert report["best"] == {"2:4": first}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"damps": ()}, "damps must hold at least one value"),
        ({"damps": (0.0,)}, "damp must be greater than 0"),
        ({"num_grads": (4, 0)}, "num_grads must be an integer of at least 1, got 0"),
        ({"patterns": ("2:4", "2;8")}, "pattern"),
        ({"method": "magnitude", "update": "none"}, "damping changes nothing there"),
    ],
)
def test_bad_values_are_refused_before_a_model_is_read(changes: dict[str, Any], text: str, work: Path) -> None:
    with pytest.raises(ConfigError, match=text):
        run_damping_job(**sources(work) | {"model": "nowhere"} | GRID | changes)


def command(work: Path, *more: object) -> Result:
    words = [part for name, value in sources(work).items() for part in (f"--{name}", value)]
    return CliRunner().invoke(app, ["damping", *map(str, (*words, *more))])


def test_on_the_command_line(work: Path, tmp_path: Path) -> None:
    grid = ("--pattern", "2:4", "--num-grads", "4,8", "--damp", "1e-3, 1e-5", "--out", tmp_path / "found.json")
    done = command(work, *grid)
    assert done.exit_code == 0, done.stderr
    assert "best at 2:4: damp 0.001" in done.stdout or "best at 2:4: damp 1e-05" in done.stdout
    assert done.stderr.count(" gradients, damp ") == 4
    report = json.loads((tmp_path / "found.json").read_text())
    shown = " ".join(done.stdout.split())
    for count in (4, 8):
        scores = [f"{row['f1']:.2f}" for row in report["rows"] if row["num_grads"] == count]
        assert f"{count} gradients {' '.join(scores)}" in shown
    assert len(json.loads(command(work, *grid, "--json").stdout)["rows"]) == 4
    for words, code, text in (
        (("--damp", "much"), 2, "must be numbers with commas"),
        (("--damp", "0"), 1, "damp must be greater than 0"),
        (("--num-grads", "0"), 1, "--num-grads must be an integer"),
    ):
        done = command(work, *words)
        assert done.exit_code == code and text in done.stderr


def test_the_grid_of_the_published_search() -> None:
    assert damping_search.PATTERNS == ("unstructured:0.5", "unstructured:0.7")
    assert damping_search.NUM_GRADS == (256, 512, 1024, 2048)
    assert damping_search.DAMPS == (1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
