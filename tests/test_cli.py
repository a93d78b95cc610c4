# SPDX-License-Identifier: Apache-2.0
"""The command line as a user meets it: outputs, exit codes, and that nothing is left half-written."""

from __future__ import annotations

import dataclasses
import gzip
import inspect
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner, Result

import obs_kernels
from obs_kernels.cli import app
from obs_kernels.errors import ConfigError
from obs_kernels.patterns import parse_pattern
from obs_kernels.pruning import OBSConfig, OBSPruner
from obs_kernels.training import model_folder, prune_job
from obs_kernels.training.demo_model import demo_model_dir
from obs_kernels.training.job_questions import load_questions
from obs_kernels.training.oneshot import Cell, CellResult
from tests.tiny_folders import save_tiny_bert, write_questions

pytest.importorskip("transformers")

PATTERN = "16:2:8"
LAYERS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_json(*arguments: object) -> Any:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)  # fails on anything beside the object


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random one-layer BERT with the demo's tokenizer, and a few generated questions."""
    from transformers import BertForQuestionAnswering

    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    save_tiny_bert(folder / "model", BertForQuestionAnswering)
    write_questions(folder, dev="data.json", paragraphs=6, questions=2)
    return folder


@pytest.fixture
def command(work: Path, tmp_path: Path) -> Callable[..., list[object]]:
    """Arguments of a run that is fine; keywords replace some, None takes one out."""

    def make(**changed: object) -> list[object]:
        options: dict[str, object] = {
            "model": work / "model",
            "data": work / "data.json",
            "train": work / "train.json",
            "pattern": PATTERN,
            "num_grads": 8,
            "out": tmp_path / "out",
            "device": "cpu",
        } | changed
        pairs = [(f"--{name.replace('_', '-')}", value) for name, value in options.items() if value is not None]
        return ["prune", *(part for pair in pairs for part in pair)]

    return make


@pytest.fixture(scope="module")
def pruned(work: Path) -> tuple[Path, dict[str, Any], Result]:
    out = work / "pruned"
    arguments = ["--model", work / "model", "--data", work / "data.json", "--train", work / "train.json"]
    done = run("prune", *arguments, "--pattern", PATTERN, "--num-grads", 8, "--out", out, "--json", "--device", "cpu")
    assert done.exit_code == 0, done.stderr
    return out, json.loads(done.stdout), done


def rows_of(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


# prune


def test_prune_writes_all_it_promises(pruned: tuple[Path, dict[str, Any], Result]):
    out, report, _ = pruned
    assert {path.name for path in out.iterdir()} == {"dense", "packed", "report.json", "report.md", "report.html"}
    assert json.loads((out / "report.json").read_text()) == report
    assert report["checks"] == {"violations": 0, "violations_in_file": 0}
    assert set(report["accuracy"]) == {"dense", "pruned"} and report["accuracy"]["dense"]["questions"] == 12
    assert report["pruning"]["sparsity"] == 0.75 and report["pruning"]["num_grads"] == 8
    for kind in ("dense", "packed"):
        assert report["sizes"][kind] == (out / kind / "model.safetensors").stat().st_size
        assert (out / kind / "tokenizer.json").is_file()
    assert report["sizes"]["packed"] < report["sizes"]["dense"]
    assert any("disjoint" in note for note in report["notes"])
    assert not list(out.parent.glob(".*")), "temporary folders are left"


def test_the_dense_file_obeys_the_pattern(pruned: tuple[Path, dict[str, Any], Result]):
    weights = rows_of(pruned[0] / "dense")
    names = [name for name in weights if name.endswith(".weight") and any(part in name for part in LAYERS)]
    assert len(names) == 6
    for name in names:
        kept = weights[name] != 0
        assert int(kept.unflatten(1, (-1, 8)).sum(2).max()) <= 2
        panels = kept.unflatten(0, (-1, 16)).unflatten(2, (-1, 8)).any(1)
        assert int(panels.sum(2).max()) <= 4
        assert float(kept.double().mean()) == 0.25


def test_dense_and_packed_answer_alike(pruned: tuple[Path, dict[str, Any], Result]):
    from transformers import AutoModelForQuestionAnswering

    out, report, _ = pruned
    dense = AutoModelForQuestionAnswering.from_pretrained(out / "dense").eval()
    packed = obs_kernels.load(out / "packed")
    ids = torch.randint(5, 200, (3, 20))
    with torch.inference_mode():
        for key in ("start_logits", "end_logits"):
            torch.testing.assert_close(packed(ids)[key], dense(ids)[key], rtol=1e-5, atol=1e-5)
    assert report["packed"]["max_difference"] <= 1e-5 and len(report["packed"]["layers"]) == 6


def test_quiet_off_a_terminal(pruned: tuple[Path, dict[str, Any], Result], command: Callable[..., list[object]]):
    done = run(*command())
    assert done.exit_code == 0, done.stderr
    for text in (pruned[2].stderr, done.stdout, done.stderr):
        assert "\x1b" not in text and "\r" not in text and "%|" not in text
    lines = done.stderr.splitlines()
    assert "peak of the Fisher" in lines[1] and lines[2].startswith("dense: EM"), "memory before the first batch"
    assert "F1" in done.stdout and "pass 1" not in pruned[2].stderr


def test_same_seed_same_weights(pruned: tuple[Path, dict[str, Any], Result], command: Any, tmp_path: Path):
    report = run_json(*command())
    again, before = rows_of(tmp_path / "out" / "dense"), rows_of(pruned[0] / "dense")
    assert again.keys() == before.keys() and all(torch.equal(again[key], before[key]) for key in again)
    assert report["accuracy"]["pruned"]["f1"] == pruned[1]["accuracy"]["pruned"]["f1"]


def test_without_train_the_file_is_split(command: Callable[..., list[object]], work: Path):
    report = run_json(*command(train=None, num_grads=4))
    assert "left out of the evaluation" in report["notes"][0]
    assert report["accuracy"]["dense"]["questions"] == 8
    rest, calibration = load_questions(
        work / "data.json", None, OBSConfig(pattern="2:4", num_grads=999, curvature="block"), []
    )
    assert not {e.context for e in rest} & {e.context for e in calibration}
    assert len(rest) == len(calibration) == 6


def test_questions_of_the_evaluation_never_give_gradients(work: Path):
    with pytest.raises(ConfigError, match="only questions of data"):
        load_questions(work / "data.json", work / "data.json", OBSConfig(pattern="2:4", curvature="block"), [])


@pytest.mark.parametrize(
    ("changed", "note"),
    [
        ({"pattern": "unstructured:0.5"}, "has no packed format"),
        ({"pattern": "24:2:8", "on_unsupported": "pad"}, "was padded"),
        ({"num_grads": 500, "max_eval": 3}, "500 gradients were asked for"),
        ({"method": "magnitude", "update": "none", "gradients": "batch"}, "needs no gradients"),
    ],
)
def test_what_was_done_otherwise_is_noted(command: Any, changed: dict[str, Any], note: str, tmp_path: Path):
    report = run_json(*command(**changed))
    assert any(note in text for text in report["notes"])
    assert report["checks"] == {"violations": 0, "violations_in_file": 0}
    assert (tmp_path / "out" / "packed").is_dir() == (report["packed"] is not None)


def test_prune_further_from_a_packed_folder(pruned: Any, command: Any, tmp_path: Path):
    report = run_json(*command(model=pruned[0] / "packed", pattern="16:2:16"))
    assert report["pruning"]["sparsity"] >= 0.875  # a chosen column may hold zeros of the first pruning
    first, second = rows_of(pruned[0] / "dense"), rows_of(tmp_path / "out" / "dense")
    name = next(key for key in first if "query.weight" in key)
    assert not bool(((first[name] == 0) & (second[name] != 0)).any())


@pytest.mark.parametrize("options", [["--curvature", "row", "--sequential"], ["--curvature", "layer"]])
def test_other_curvatures(options: list[str], command: Callable[..., list[object]], tmp_path: Path):
    pattern = PATTERN if "row" in options else "2:4"
    report = run_json(*command(pattern=pattern), *options)
    config = report["pruning"]["config"]
    assert (config["curvature"], config["sequential"]) == (options[1], "--sequential" in options)
    assert report["pruning"]["sparsity"] == pytest.approx(parse_pattern(pattern).sparsity, abs=0.02)
    assert all(layer["outcome"] == "pruned" for layer in report["pruning"]["layers"])
    assert (tmp_path / "out" / "packed" / "model.safetensors").is_file()
    planned = run_json("plan", *command(pattern=pattern)[1:3], "--pattern", pattern, *options)
    assert planned["config"]["curvature"] == options[1]


@pytest.mark.parametrize(
    ("pattern", "options", "curvature", "sequential"),
    [
        ("2:8", [], "row", True),
        (PATTERN, ["--num-grads", "4"], "row", True),
        (PATTERN, ["--curvature", "row"], "row", True),
        (PATTERN, ["--no-sequential"], "row", False),
        ("2:8", ["--method", "combinatorial", "--update", "joint", "--no-global"], "row", True),
        ("2:8", ["--sequential"], "row", True),
        ("2:8", ["--gradients", "batch"], "block", False),
        ("2:4", ["--curvature", "layer"], "layer", False),
        ("2:8", ["--method", "pairwise"], "block", False),
        ("2:8", ["--fisher-block-size", "16"], "block", False),
        ("unstructured:0.5", [], "block", False),
    ],
)
def test_which_curvature(
    pattern: str, options: list[str], curvature: str, sequential: bool, command: Callable[..., list[object]]
):
    config = run_json(*command(pattern=pattern), *options, "--dry-run")["config"]
    assert (config["curvature"], config["sequential"]) == (curvature, sequential)


@pytest.mark.parametrize(("options", "loss"), [([], "outputs"), (["--loss", "labels"], "labels")])
def test_whose_curvature(options: list[str], loss: str, command: Callable[..., list[object]]):
    assert run_json(*command(), *options)["loss"] == loss


def test_settings_from_a_file_and_options_in_front(command: Callable[..., list[object]], tmp_path: Path):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"pattern": "2:4", "num_grads": 3, "ignore": ["re:.*qa_outputs", "re:.*query"]}))
    plan = run_json(*command(pattern=None, config=file, ignore="re:.*key"), "--dry-run")
    assert plan["config"]["pattern"] == "2:4" and plan["config"]["num_grads"] == 8
    left_out = [row["name"].split(".")[-1] for row in plan["plan"]["layers"] if row["group"] < 0]
    assert left_out == ["query", "key", "qa_outputs"]
    assert not (tmp_path / "out").exists()
    file.write_text('{"mask_structure": "2:4"}')
    done = run(*command(pattern=None, config=file))
    assert done.exit_code == 1 and done.stderr.startswith("ConfigError: unknown key 'mask_structure'")


# what is refused


def damaged(kind: str, folder: Path, work: Path) -> Path:
    path = folder / ("data.json.gz" if kind == "truncated" else "data.json")
    whole = (work / "data.json").read_bytes()
    path.write_bytes(gzip.compress(whole)[:-200] if kind == "truncated" else whole[: len(whole) // 2])
    return path


def bad_model(folder: Path, work: Path) -> Path:
    shutil.copytree(work / "model", folder / "bad")
    (folder / "bad" / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    return folder / "bad"


BAD: dict[str, tuple[Callable[[Path, Path], dict[str, object]], str, str]] = {
    "no such model folder": (lambda t, w: {"model": t / "nowhere"}, "ConfigError", "nowhere"),
    "damaged model": (lambda t, w: {"model": bad_model(t, w)}, "CheckpointFormatError", "could not be loaded"),
    "no such data": (lambda t, w: {"data": t / "none.json"}, "DataFormatError", "does not exist"),
    "cut data": (lambda t, w: {"data": damaged("cut", t, w)}, "DataFormatError", "damaged or cut off"),
    "cut gzip": (lambda t, w: {"data": damaged("truncated", t, w)}, "DataFormatError", "damaged or cut off"),
    "cut train": (lambda t, w: {"train": damaged("truncated", t, w)}, "DataFormatError", "damaged or cut off"),
    "targets": (lambda t, w: {"targets": "Conv7d"}, "ConfigError", "match nothing"),
    "pattern text": (lambda t, w: {"pattern": "2;4"}, "ConfigError", "pattern"),
    "pattern shape": (lambda t, w: {"pattern": "24:2:8"}, "ShapeNotSupportedError", "rows % 24"),
    "method": (lambda t, w: {"method": "best"}, "ConfigError", "method"),
    "damp": (lambda t, w: {"damp": -1}, "ConfigError", "damp"),
    "device": (lambda t, w: {"device": "tpu"}, "ConfigError", "device"),
    "max_eval": (lambda t, w: {"max_eval": 0}, "ConfigError", "--max-eval must be"),
    "batch_size": (lambda t, w: {"batch_size": 0}, "ConfigError", "--batch-size must be"),
    "config file": (lambda t, w: {"config": t / "none.json"}, "ConfigError", "must be a JSON file"),
    "out below a file": (lambda t, w: {"out": w / "data.json" / "out"}, "ConfigError", "cannot be written"),
    "out is a file": (lambda t, w: {"out": w / "data.json"}, "ConfigError", "got the file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_fails_by_name_and_writes_nothing(name: str, command: Any, tmp_path: Path, work: Path):
    make, kind, text = BAD[name]
    changed = make(tmp_path, work)
    before = sorted(tmp_path.rglob("*"))
    done = run(*command(**changed))
    assert done.exit_code == 1
    assert f"{kind}: " in done.stderr and text in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == "" and sorted(tmp_path.rglob("*")) == before


def test_an_error_in_json(command: Callable[..., list[object]], tmp_path: Path):
    done = run(*command(model=tmp_path / "nowhere"), "--json")
    assert done.exit_code == 1
    error = json.loads(done.stdout)["error"]
    assert error["type"] == "ConfigError" and error["message"] in done.stderr
    assert isinstance(run(*command(model=tmp_path / "nowhere"), "--debug").exception, ConfigError)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["prune", "--nonsense"], "No such option"),
        (["prune", "--model", "m"], "--pattern"),
        (["prune", "--model", "m", "--pattern", "2:4"], "--data"),
        (["prune", "--model", "m", "--pattern", "2:4", "--data", "d"], "--out"),
        (["prune", "--model", "m", "--pattern", "2:4", "--num-grads", "many"], "integer"),
        (["eval", "--model", "m"], "--data"),
        (["plan", "--model", "m"], "--pattern"),
        (["polish"], "No such command"),
    ],
)
def test_wrong_usage_is_2(arguments: list[str], text: str):
    done = run(*arguments)
    assert done.exit_code == 2 and text in done.stderr and done.stdout == ""


def test_what_stands_in_out_is_kept(command: Callable[..., list[object]], tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    for extra, text in (([], "--overwrite"), (["--overwrite"], "no run wrote")):
        done = run(*command(), *extra)
        assert done.exit_code == 1 and done.stderr.startswith("ConfigError") and text in done.stderr
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    (out / "report.json").write_text("{}")  # now it looks like an earlier run
    assert run_json(*command(), "--overwrite")["job"] == "prune"
    assert not (out / "mine.txt").exists() and (out / "dense").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("where", ["run_stages", "save_pretrained", "render_html"])
def test_an_interrupt_leaves_nothing(where: str, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prune_job if where == "run_stages" else model_folder, where, interrupted)
    done = run(*command())
    assert done.exit_code == 130 and "interrupted" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(command: Callable[..., list[object]], tmp_path: Path, monkeypatch: Any):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_folder, "write_text", full)
    done = run(*command())
    assert done.exit_code == 1 and "No space left" in done.stderr and list(tmp_path.iterdir()) == []


def test_resume_goes_on_without_new_gradients(command: Any, tmp_path: Path, monkeypatch: Any, pruned: Any):
    with monkeypatch.context() as patch:
        patch.setattr(prune_job, "write_models", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(*command(), "--resume").exit_code == 130
    assert [path.name for path in tmp_path.iterdir()] == ["out.work"]
    done = run(*command(batch_size=4), "--resume")
    assert done.exit_code == 1 and done.stderr.startswith("ResumeMismatchError")
    with monkeypatch.context() as patch:
        patch.setattr(OBSPruner, "collect", lambda *_, **__: pytest.fail("gradients were collected again"))
        run_json(*command(), "--resume")
    again, before = rows_of(tmp_path / "out" / "dense"), rows_of(pruned[0] / "dense")
    assert all(torch.equal(again[key], before[key]) for key in before)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# the other commands


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_eval_gives_what_prune_measured(kind: str, pruned: tuple[Path, dict[str, Any], Result], work: Path):
    out, report, _ = pruned
    arguments = ["--data", work / "data.json", "--device", "cpu", "--baseline", work / "model"]
    found = run_json("eval", "--model", out / kind, *arguments)
    assert found["accuracy"]["model"]["f1"] == pytest.approx(report["accuracy"]["pruned"]["f1"])
    assert found["accuracy"]["baseline"]["f1"] == report["accuracy"]["dense"]["f1"]
    assert found["packed_layers"] == (6 if kind == "packed" else 0)


def test_eval_of_the_model_that_ships(work: Path):
    done = run("eval", "--model", demo_model_dir(), "--data", work / "data.json", "--max-eval", 8, "--device", "cpu")
    assert done.exit_code == 0 and "8 of 12 questions" in done.stdout
    line = next(line for line in done.stdout.splitlines() if line.strip().startswith("model"))
    assert float(line.split()[2]) >= 85


def test_plan_and_dry_run_say_the_same(command: Callable[..., list[object]], work: Path):
    plan = run_json("plan", "--model", work / "model", "--pattern", PATTERN, "--device", "cpu")["plan"]
    dry = run_json(*command(data=None, out=None), "--dry-run")["plan"]
    assert plan["layers"] == dry["layers"] and plan["num_weights"] == 4 * 32 * 32 + 2 * 32 * 64
    text = run("plan", "--model", work / "model", "--pattern", PATTERN, "--device", "cpu").stdout
    assert "bert.encoder.layer.0.attention.self.query" in text and "left out: ignored" in text and "peak" in text


def test_plan_takes_the_options_of_prune():
    from obs_kernels.cli_prune import plan, prune

    of_plan, of_prune = (
        {
            name: (p.annotation.__origin__, p.default)
            for name, p in inspect.signature(c, eval_str=True).parameters.items()
        }
        for c in (plan, prune)
    )
    assert of_plan == {name: value for name, value in of_prune.items() if name != "dry_run"}
    studies = {"refit_bias", "row_clusters", "sweep_order"}  # by --config only
    assert {field.name for field in dataclasses.fields(OBSConfig)} - studies <= set(of_plan)


@pytest.mark.parametrize("curvature", ["row", "layer"])
def test_the_plan_of_layer_by_layer_is_what_happens(
    curvature: str, command: Callable[..., list[object]], tmp_path: Path
):
    words = command(pattern="2:8", curvature=curvature, num_grads=8, loss="labels", out=tmp_path / "out")
    options = [*words, "--sequential"]
    found = run_json("plan", *options[1:])
    planned, report = found["plan"], run_json(*options)
    # query, key and value read one input; of the two layers the others follow each other
    sizes = [sum(row["group"] == group for row in planned["layers"]) for group in range(planned["num_groups"])]
    assert sizes[:4] == [3, 1, 1, 1] and planned["num_groups"] == len(sizes)
    assert report["plan"] == {key: planned[key] for key in report["plan"] if key != "budget"} | {
        "budget": report["plan"]["budget"]
    }
    sums = [row["fisher_bytes"] for row in planned["layers"]]
    assert max(sums) <= planned["peak_bytes"] == planned["fisher_peak_bytes"] < sum(sums) == planned["fisher_bytes"]
    assert found["loss"] == "labels" and found["stages"] == ["2:8"] and found["notes"] == []
    text = " ".join(run("plan", *options[1:]).stdout.split())
    assert f"layer by layer: {'one pass with gradients' if curvature == 'row' else '4 groups as they run'}" in text
    assert "8 gradients (sample) of the labels" in text and "pass 1 of" not in text


def test_a_plan_says_what_prune_would_refuse(command: Callable[..., list[object]], monkeypatch: pytest.MonkeyPatch):
    from obs_kernels.pruning import plan

    monkeypatch.setattr(plan, "free_bytes", lambda _: 1000)
    words = command(pattern="2:8", curvature="block")
    (note,) = run_json("plan", *words[1:])["notes"]
    assert note.startswith("prune would stop at this: the Fisher of ") and "lower --fisher-block-size" in note
    done = run(*words)
    assert done.exit_code == 1 and note.removeprefix("prune would stop at this: ") in done.stderr


@pytest.fixture
def quick_demo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from obs_kernels.training import demo

    def run_demo(*, on_row: Callable[[CellResult], None], out: Path | None, **_: object) -> dict[str, Any]:
        rows = [
            CellResult(Cell(pattern, method, "none"), 50.0, 60.0, 61.2, float("nan"), 0.5, 0, 8, 8, 1.0, 2.0)
            for pattern in ("2:4", "unstructured:0.75")
            for method in ("magnitude", "combinatorial")
        ]
        for row in rows:
            on_row(row)
        if out is not None:
            (out / "packed").mkdir()
        return {
            "dense": {"exact_match": 97.0, "f1": 98.0, "total": 10, "seconds": 1.0},
            "comparison": [row.to_dict() for row in rows],
            "packed": {"pattern": "2:4", "bytes": 50, "dense_bytes": 100, "max_difference": 0.0, "f1": 60.0},
            "recovered": None,
            "notes": ["synthetic"],
            "seconds": 3.0,
        }

    monkeypatch.setattr(demo, "run_demo", run_demo)
    yield


@pytest.mark.usefixtures("quick_demo")
def test_demo_prints_rows_and_writes_reports(tmp_path: Path):
    done = run("demo", "--out", tmp_path / "out", "--device", "cpu")
    assert done.exit_code == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(("2:4 ", "unstructured"))]
    assert [row[:2] for row in rows[:4]] == [
        [p, m] for p in ("2:4", "unstructured:0.75") for m in ("magnitude", "combinatorial")
    ]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"packed", "report.json", "report.md", "report.html"}
    assert run("demo", "--out", tmp_path / "out").exit_code == 1
    report = run_json("demo", "--device", "cpu")
    assert report["comparison"][0]["predicted_loss"] is None and report["sizes"] == {"dense": 100, "packed": 50}
