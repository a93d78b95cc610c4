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

from bench import gradual_rows, readme, squad_gradual
from bench.gradual_run import Trainee, TrainSettings
from bench.gradual_table import MUST, over_seeds, to_markdown
from obs_kernels.errors import ConfigError
from obs_kernels.recipes import load_recipe
from tests.tiny_folders import save_tiny_bert, write_questions

pytest.importorskip("transformers")
pytest.importorskip("pydantic")


def test_every_row_has_settings_and_a_schedule_that_ends_at_its_pattern() -> None:
    rows = gradual_rows.all_rows()
    assert len({row.key for row in rows}) == len(rows)
    must = [row for row in rows if row.must]
    assert must == rows[: len(must)] and len(must) == 7
    for row in rows:
        config = gradual_rows.config_of(row, num_grads=8, dampening_frac=0.01, block_size=64)
        schedule = gradual_rows.schedule_of(row, prune_every=0.5)
        if row.way == gradual_rows.DENSE:
            assert config is None and schedule is None
            continue
        assert config is not None and schedule is not None and config.curvature == row.curvature
        prunings = schedule.prunings(config.parsed_pattern, 100)
        assert prunings[-1].pattern == config.parsed_pattern and prunings[-1].step <= 250
        assert len(prunings) == (1 if row.way == gradual_rows.ONESHOT else len(prunings)) and prunings[0].step == 0
        assert len(prunings) > 1 or row.way == gradual_rows.ONESHOT
    patterns = {row.pattern for row in rows if row.way == gradual_rows.GRADUAL and row.curvature == "row"}
    recipe = load_recipe("gradual_row_28v64")
    row = gradual_rows.Row(gradual_rows.GRADUAL, "64:2:8", "row", "combinatorial")
    assert gradual_rows.schedule_of(row, prune_every=0.5) == recipe.schedule and recipe.schedule is not None
    rows_have, training, teacher = TrainSettings(), recipe.training, recipe.distillation
    assert teacher is not None
    for name in ("epochs", "batch_size", "learning_rate", "warmup_ratio", "weight_decay", "max_grad_norm"):
        assert getattr(training, name) == getattr(rows_have, name), name
    for name in ("hardness", "temperature", "hidden"):
        assert getattr(teacher, name) == getattr(rows_have, name), name
    assert training.final_learning_rate == pytest.approx(rows_have.learning_rate * rows_have.final_factor)
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
        command = arguments(work, out, "--only", only, "--checkpoint-seconds", "0")
        if pieces:
            with monkeypatch.context() as patch:
                patch.setattr(Trainee, "_one_step", killed_at(4, 12))
                for _ in range(2):
                    with pytest.raises(KeyboardInterrupt):
                        squad_gradual.main(command)
            running = json.loads((out / "r.json").read_text())["running"]
            assert [len(row["f1_by_epoch"]) for row in running.values()] == [1]
            squad_gradual.main([*command, "--minutes", "0.000001", "--curve-every", "2"])  # it keeps its own
            assert not json.loads((out / "r.json").read_text())["rows"]
        assert squad_gradual.main(command) == 0
        (row,) = json.loads((out / "r.json").read_text())["rows"].values()
        assert row["violations"] == 0 and row["sparsity"] == 0.75 and row["stages"] == ["5:8", "4:8", "3:8", "2:8"]
        assert not list((out / "work").glob("*"))
        assert row["curve_every"] == 5 and len(row["f1_by_epoch"]) == 2
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
    assert "hidden states 10)" in text


def test_seeds_have_means_and_ranges_best_first_also_in_the_readme(monkeypatch, tmp_path) -> None:
    stored = json.loads(squad_gradual.RESULTS.read_text())
    first = {key: row for key, row in stored["rows"].items() if row["seed"] == 0}
    assert over_seeds(first) == [] and "Not run." in to_markdown(stored | {"rows": first})
    names = ("gradual", "64:2:8", "row", "combinatorial"), ("gradual", "64:2:8", "block", "magnitude")
    rows = dict(first)
    for (way, pattern, curvature, method), scores in zip(names, ((50.0, 54.0), (70.0, 71.0)), strict=True):
        for seed, f1 in enumerate(scores):
            key = f"{way}/{pattern}/{curvature}/{method}/seed{seed}"
            rows[key] = first[key.replace("seed1", "seed0")] | {"seed": seed, "f1": f1}
    assert over_seeds(rows) == [(names[1], [70.0, 71.0]), (names[0], [50.0, 54.0])]
    text = to_markdown(stored | {"rows": rows})
    assert "| gradual | 64:2:8 | row | combinatorial | 2 | 52.00 | 50.00 | 54.00 |" in text
    monkeypatch.setattr(squad_gradual, "RESULTS", tmp_path / "r.json")
    squad_gradual.RESULTS.write_text(json.dumps(stored | {"rows": rows}))
    line = readme.gradual_line()
    dense = stored["dense"]["f1"]
    assert line.count("64:2:8 row") == 1 and f"64:2:8 row 52.00 ({5200 / dense:.1f} %, 2 seeds 50.00 to 54.00)" in line
    assert line.count("64:2:8 block, magnitude") == 1 and "2 seeds 70.00 to 71.00)" in line


def test_hidden_states_are_in_the_loss_and_in_the_table(work: Path, tmp_path: Path) -> None:
    losses = []
    for hidden in ("0", "50"):
        out = tmp_path / hidden
        squad_gradual.main(arguments(work, out, "--only", "dense/", "--hidden", hidden))
        (row,) = json.loads((out / "r.json").read_text())["rows"].values()
        losses.append(row["loss_by_epoch"][0])
        assert ("hidden states 50)" in (out / "r.md").read_text()) == (hidden == "50")
    assert losses[1] > losses[0] + 1


def test_a_checkpoint_older_than_the_curve_does_not_double_an_epoch(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = arguments(work, tmp_path, "--only", "dense/", "--curve-every", "1")
    save = Trainee.save

    def save_first(self: Trainee, folder: Path) -> None:
        if self.epoch <= 1:
            save(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(Trainee, "save", save_first)
        patch.setattr(squad_gradual.Bench, "evaluate", lambda *_: {"exact_match": 0.0, "f1": 50.0})
        patch.setattr(Trainee, "is_done", property(lambda _: False))
        patch.setattr(Trainee, "_one_step", killed_at(13))  # 6 steps an epoch
        with pytest.raises(KeyboardInterrupt):
            squad_gradual.main([*command, "--checkpoint-seconds", "0"])
    (running,) = json.loads((tmp_path / "r.json").read_text())["running"].values()
    assert running["epoch"] == 2 and running["f1_by_epoch"] == [50.0, 50.0]
    squad_gradual.main(command)
    (row,) = json.loads((tmp_path / "r.json").read_text())["rows"].values()
    assert row["f1_by_epoch"][0] == 50.0 and len(row["f1_by_epoch"]) == 2
    assert row["f1_by_epoch"][1] == row["f1"]  # of the last epoch, measured again after it was done again


def test_no_checkpoint_is_written_within_the_least_time(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Path] = []
    monkeypatch.setattr(Trainee, "save", lambda _, folder: saved.append(folder))
    squad_gradual.main(arguments(work, tmp_path, "--only", "dense/", "--checkpoint-seconds", "3600"))
    assert not saved
    squad_gradual.main(arguments(work, tmp_path, "--only", "dense/", "--checkpoint-seconds", "0", "--force"))
    assert len(saved) == 2


def test_shares_take_every_row_once_whatever_is_left_out() -> None:
    rows = gradual_rows.all_rows()
    for number in (1, 2, 3):
        shares = [squad_gradual.rows_of_share(3, (first, number)) for first in range(1, number + 1)]
        assert sorted(row.key for share in shares for row in share) == sorted(row.key for row in rows)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    only = squad_gradual.rows_of_share(3, (2, 2), "/row/")
    assert only and only == [row for row in squad_gradual.rows_of_share(3, (2, 2)) if "/row/" in row.key]
    few = squad_gradual.rows_of_share(1, (2, 2))  # fewer seeds move no row to another process
    assert few == [row for row in squad_gradual.rows_of_share(3, (2, 2)) if row.seed == 0]


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/2", "1/0"])
def test_a_share_must_be_one_of_its_number(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        squad_gradual.main(["--model", "m", "--data", "d", "--train", "t", "--share", text])
    assert "must be I/N with 1 <= I <= N" in capsys.readouterr().err


def test_processes_that_share_do_not_write_one_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        squad_gradual.main(["--model", "m", "--data", "d", "--train", "t", "--share", "1/2"])
    assert "--share needs a --json of its own" in capsys.readouterr().err


def test_two_processes_share_the_rows_and_merge_their_results(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = gradual_rows.all_rows()[:3]
    monkeypatch.setattr(squad_gradual, "all_rows", lambda _=3: wanted)
    files = [tmp_path / str(i) / "r.json" for i in (1, 2)]
    for i, path in enumerate(files, 1):
        squad_gradual.main(arguments(work, path.parent, "--share", f"{i}/2", "--epochs", "1", "--prune-every", "0.2"))
    first, second = (json.loads(path.read_text()) for path in files)
    assert list(first["rows"]) == [wanted[0].key, wanted[2].key] and list(second["rows"]) == [wanted[1].key]
    second["dense"] = {"exact_match": 0.0, "f1": first["dense"]["f1"] / 2}  # as another GPU might round, but more
    second["running"] = {wanted[2].key: {"epoch": 0.5, "f1_by_epoch": []}}  # what is done elsewhere is not in work
    files[1].write_text(json.dumps(second))

    taken = [word for path in files for word in ("--take", str(path))]
    monkeypatch.setattr(squad_gradual, "Bench", None)  # merging loads no model
    capsys.readouterr()
    assert squad_gradual.main(["--merge", "--json", str(tmp_path / "m.json"), *taken]) == 0
    merged = json.loads((tmp_path / "m.json").read_text())
    assert sorted(merged["rows"]) == sorted(row.key for row in wanted) and merged["running"] == {}
    assert merged["header"] == first["header"] and merged["dense"] == first["dense"]
    share = 100 * second["rows"][wanted[1].key]["f1"] / first["dense"]["f1"]
    assert merged["rows"][wanted[1].key]["f1_share"] == pytest.approx(share)
    text = (tmp_path / "m.md").read_text()
    assert text == to_markdown(merged) and "not run |" not in text.split("## Every row")[1]
    assert not capsys.readouterr().err

    first["rows"][wanted[0].key]["f1"] += 1.0
    files[0].write_text(json.dumps(first))
    squad_gradual.main(["--merge", "--json", str(tmp_path / "m.json"), *taken])
    assert json.loads((tmp_path / "m.json").read_text()) == merged
    assert "was there already, with another result, which stays" in capsys.readouterr().err

    first["header"]["learning_rate"] = 1.0
    files[0].write_text(json.dumps(first))
    with pytest.raises(ConfigError, match=r"made with other settings \(learning_rate\)"):
        squad_gradual.main(["--merge", "--json", str(tmp_path / "m.json"), *taken])


def test_a_run_takes_the_rows_of_another(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = gradual_rows.all_rows()[:2]
    monkeypatch.setattr(squad_gradual, "all_rows", lambda _=3: wanted)
    squad_gradual.main(arguments(work, tmp_path / "a", "--share", "2/2", "--epochs", "1"))
    other = json.loads((tmp_path / "a" / "r.json").read_text())
    squad_gradual.main(arguments(work, tmp_path, "--epochs", "1", "--take", str(tmp_path / "a" / "r.json")))
    stored = json.loads((tmp_path / "r.json").read_text())
    assert sorted(stored["rows"]) == sorted(row.key for row in wanted)
    assert stored["rows"][wanted[1].key] == other["rows"][wanted[1].key]  # its seconds too: it was not run again
    with pytest.raises(ConfigError, match=r"made with other settings \(epochs\); leave it out"):
        squad_gradual.main(arguments(work, tmp_path / "b", "--take", str(tmp_path / "a" / "r.json")))


def test_what_cannot_be_merged_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--merge", "--json", str(tmp_path / "m.json")]
    with pytest.raises(ConfigError, match="--merge must have at least one result file"):
        squad_gradual.main(out)
    with pytest.raises(ConfigError, match=r"no\.json must be a result file of this bench, got"):
        squad_gradual.main([*out, "--take", str(tmp_path / "no.json")])
    (tmp_path / "no.json").write_text('{"header": {}}')
    with pytest.raises(ConfigError, match="got one without dense, rows, running"):
        squad_gradual.main([*out, "--take", str(tmp_path / "no.json")])
    with pytest.raises(SystemExit):
        squad_gradual.main(["--json", str(tmp_path / "m.json")])
    assert "--model, --data, --train must be given, except with --merge" in capsys.readouterr().err


def test_it_needs_neither_pydantic_nor_datasets() -> None:
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pydantic", "datasets", "yaml", "typer"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
from bench import gradual_rows, readme, squad_gradual
for row in gradual_rows.all_rows():
    gradual_rows.config_of(row, num_grads=8, dampening_frac=0.01, block_size=64)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
