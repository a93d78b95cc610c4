# SPDX-License-Identifier: Apache-2.0
"""The bench of gradual pruning, before a GPU runs it: its rows, a run in pieces, and its table."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import squad_gradual
from bench.gradual_run import Trainee
from bench.gradual_table import MUST, to_markdown
from obs_kernels.errors import ConfigError
from obs_kernels.recipes import load_recipe
from tests.tiny_folders import save_tiny_bert, write_questions

pytest.importorskip("transformers")
pytest.importorskip("pydantic")


def test_every_row_has_settings_and_a_schedule_that_ends_at_its_pattern() -> None:
    rows = squad_gradual.all_rows()
    assert len({row.key for row in rows}) == len(rows)
    must = [row for row in rows if row.must]
    assert must == rows[: len(must)] and len(must) == 7
    for row in rows:
        config = squad_gradual.config_of(row, num_grads=8, dampening_frac=0.01, block_size=64)
        schedule = squad_gradual.schedule_of(row, prune_every=0.5)
        if row.way == squad_gradual.DENSE:
            assert config is None and schedule is None
            continue
        assert config is not None and schedule is not None and config.curvature == row.curvature
        prunings = schedule.prunings(config.parsed_pattern, 100)
        assert prunings[-1].pattern == config.parsed_pattern and prunings[-1].step <= 250
        assert len(prunings) == (1 if row.way == squad_gradual.ONESHOT else len(prunings)) and prunings[0].step == 0
        assert len(prunings) > 1 or row.way == squad_gradual.ONESHOT
    patterns = {row.pattern for row in rows if row.way == squad_gradual.GRADUAL and row.curvature == "row"}
    recipe = load_recipe("gradual_row_28v64")
    row = squad_gradual.Row(squad_gradual.GRADUAL, "64:2:8", "row", "combinatorial")
    assert squad_gradual.schedule_of(row, prune_every=0.5) == recipe.schedule and recipe.schedule is not None
    assert set(MUST) <= patterns


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertForQuestionAnswering

    folder = tmp_path_factory.mktemp("bench")
    torch.manual_seed(0)
    save_tiny_bert(folder / "model", BertForQuestionAnswering)
    write_questions(folder, dev="dev.json", paragraphs=6, questions=4)
    return folder


def arguments(work: Path, out: Path, *more: str) -> list[str]:
    sources = ["--model", str(work / "model"), "--data", str(work / "dev.json"), "--train", str(work / "train.json")]
    sources += ["--work", str(out / "work"), "--json", str(out / "r.json"), "--device", "cpu", "--commit", "0123456789"]
    sizes = ["--max-length", "96", "--batch-size", "4", "--epochs", "2", "--prune-every", "0.4", "--num-grads", "8"]
    return [*sources, *sizes, "--calibration-batch-size", "4", "--fisher-block-size", "16", "--hardness", "0.5", *more]


def killed_at(*numbers: int) -> Callable[[Trainee], None]:
    """A step that ends the run by an exception at some calls."""
    original, calls = Trainee._one_step, count(1)

    def step(self: Trainee) -> None:
        if next(calls) in numbers:
            raise KeyboardInterrupt
        original(self)

    return step


@pytest.mark.parametrize("only", ["gradual/2:8/row", "gradual/2:8/block/combinatorial"])
def test_a_run_in_pieces_gives_the_same_figures(
    only: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results: list[dict[str, Any]] = []
    for pieces in (False, True):
        out = tmp_path / str(pieces)
        command = arguments(work, out, "--only", only)
        if pieces:
            with monkeypatch.context() as patch:
                patch.setattr(Trainee, "_one_step", killed_at(4, 12))
                for _ in range(2):
                    with pytest.raises(KeyboardInterrupt):
                        squad_gradual.main(command)
            squad_gradual.main([*command, "--minutes", "0.000001"])
            assert not json.loads((out / "r.json").read_text())["rows"]
        assert squad_gradual.main(command) == 0
        (row,) = json.loads((out / "r.json").read_text())["rows"].values()
        assert row["violations"] == 0 and row["sparsity"] == 0.75 and row["stages"] == ["5:8", "4:8", "3:8", "2:8"]
        assert not list((out / "work").glob("*"))
        results.append({key: value for key, value in row.items() if not key.startswith("seconds")})
        assert squad_gradual.main(command) == 0  # nothing is left to do
    assert results[0] == results[1]
    capsys.readouterr()
    with pytest.raises(ConfigError, match=r"made with other settings \(learning_rate\)"):
        squad_gradual.main([*command, "--learning-rate", "1e-3"])


def test_the_dense_row_and_the_table(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = arguments(work, tmp_path, "--only", "dense/")
    squad_gradual.main([*dense, "--minutes", "1", "--whole"])
    stored = json.loads((tmp_path / "r.json").read_text())
    (row,) = stored["rows"].values()
    assert row["sparsity"] == 0 and len(row["f1_by_epoch"]) == len(row["loss_by_epoch"]) == 2
    text = (tmp_path / "r.md").read_text()
    assert text == to_markdown(stored) and text.strip() in capsys.readouterr().out
    assert text.count("not run |") > 30 and "| dense (must) | - | - | - | 0 |" in text
    assert "| 2:4 | not run | not run |" in text and "98 | not run |" in text


def test_it_needs_neither_pydantic_nor_datasets() -> None:
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pydantic", "datasets", "yaml", "typer"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
from bench import squad_gradual
for row in squad_gradual.all_rows():
    squad_gradual.config_of(row, num_grads=8, dampening_frac=0.01, block_size=64)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
