# SPDX-License-Identifier: Apache-2.0
"""``obs-kernels train`` on each task: what it writes, resuming, several recipes, and what it refuses."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

import obs_kernels as obs
from obs_kernels.cli import app
from obs_kernels.errors import ConfigError, DataFormatError, MissingDependencyError
from obs_kernels.recipes import TrainingSettings, load_recipe
from obs_kernels.training.demo_corpus import make_corpus
from obs_kernels.training.layer_drop import drop_layers_
from obs_kernels.training.masked_text import read_lines
from obs_kernels.training.tasks import load_task
from obs_kernels.training.text_pairs import load_pairs
from tests.tiny_folders import save_tiny_bert, write_questions
from tests.tiny_training import tiny_model

pytest.importorskip("transformers")
pytest.importorskip("pydantic")
pytest.importorskip("accelerate")

SHORT = ["epochs=2", "max_length=64", "doc_stride=16", "batch_size=4", "precision=fp32", "num_grads=8"]
SHORT += ["learning_rate=1e-2", "final_learning_rate=1e-3"]
GRADUAL = [*SHORT, "start_epoch=0.5", "end_epoch=1.5", "update_frequency=0.5", "shape=linear"]
GRADUAL += ["initial_sparsity=0.375"]
"""n = 5, 3, 2 of 8."""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random two-layer BERTs with the demo's tokenizer, and a few generated samples of each task."""
    from transformers import BertForMaskedLM, BertForQuestionAnswering, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("train")
    torch.manual_seed(0)
    pair = BertForSequenceClassification
    models = {"qa": BertForQuestionAnswering, "mlm": BertForMaskedLM, "mnli": pair, "qqp": pair}
    for name, kind in models.items():
        save_tiny_bert(folder / name, kind, layers=2, num_labels=3 if name == "mnli" else 2)
    save_tiny_bert(folder / "deep", BertForQuestionAnswering, layers=3)
    write_questions(folder, dev="dev.json", paragraphs=4, questions=2)
    texts = [
        p["context"] for a in make_corpus(num_paragraphs=12, split="train", seed=1)["data"] for p in a["paragraphs"]
    ]
    (folder / "text.txt").write_text("\n".join(texts))
    classes = ("entailment", "neutral", "contradiction")
    rows = [(texts[i % 12][:60], texts[(i + 1) % 12][:60], classes[i % 3]) for i in range(9)]
    (folder / "mnli.tsv").write_text("\n".join("\t".join(r) for r in (("sentence1", "sentence2", "gold_label"), *rows)))
    pairs = [{"question1": a, "question2": b, "is_duplicate": i % 2} for i, (a, b, _) in enumerate(rows)]
    (folder / "qqp.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, pairs)).encode()))
    return folder


@pytest.fixture
def command(work: Path, tmp_path: Path) -> Callable[..., list[object]]:
    """Arguments of a run that is fine; keywords replace some, None takes one out."""

    def make(*recipe_args: str, **changed: object) -> list[object]:
        options: dict[str, object] = {
            "model": work / "qa",
            "data": work / "dev.json",
            "train": work / "train.json",
            "recipe": "oBERT_28_gradual",
            "teacher": "self",
            "out": tmp_path / "out",
            "device": "cpu",
        } | changed
        pairs = [(f"--{name.replace('_', '-')}", value) for name, value in options.items() if value is not None]
        last = {text.partition("=")[0]: text for text in recipe_args or GRADUAL}  # of a key that comes twice
        args = [part for text in last.values() for part in ("--recipe-args", text)]
        return ["train", *(part for pair in pairs for part in pair), *args]

    return make


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_json(*arguments: object) -> Any:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def weights_of(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def trained(work: Path) -> tuple[Path, dict[str, Any]]:
    out = work / "trained"
    args = [part for text in GRADUAL for part in ("--recipe-args", text)]
    sources = ["--model", work / "qa", "--data", work / "dev.json", "--train", work / "train.json", "--device", "cpu"]
    more = ["--recipe", "oBERT_28_gradual", "--teacher", "self", "--out", out, "--logging-steps", 1]
    return out, run_json("train", *sources, *more, *args)


def test_what_a_run_writes(trained: tuple[Path, dict[str, Any]]) -> None:
    out, report = trained
    assert {path.name for path in out.iterdir()} == {"dense", "packed", "report.json", "report.md", "report.html"}
    assert json.loads((out / "report.json").read_text()) == report
    assert report["checks"] == {"violations": 0, "violations_in_file": 0}
    assert list(report["accuracy"]) == ["before", "pruned"] and "f1_share" in report["accuracy"]["pruned"]
    assert report["pruning"]["stages"] == ["5:8", "3:8", "2:8"]
    assert report["pruning"]["sparsity"] == 0.75 and len(report["pruning"]["layers"]) == 12
    assert report["packed"]["max_difference"] < 1e-4
    rates = {row["step"] - 1: row["learning_rate"] for row in report["history"] if "learning_rate" in row}
    pruned = [row["step"] for row in report["history"] if "obs/prunings_done" in row]
    assert len(pruned) == 3 and all(rates[step] == 1e-2 for step in (0, *pruned))  # from the top after each pruning
    for step in (*pruned, max(rates) + 1):
        assert rates[step - 1] == pytest.approx(1e-3) or step - 1 in (0, *pruned)  # a fall of one step has no end
    assert not out.with_name("trained.work").exists()
    packed, dense = obs.load(out / "packed"), weights_of(out / "dense")
    assert packed.config.num_hidden_layers == 2
    kept = dense["bert.encoder.layer.0.output.dense.weight"].unflatten(1, (-1, 8)) != 0
    assert int(kept.sum(2).max()) == 2


@pytest.mark.parametrize(("step", "where"), [(1, "training_step"), (3, "on_save")])
def test_a_killed_job_resumes_bit_for_bit(
    step: int,
    where: str,
    command: Callable[..., list[object]],
    tmp_path: Path,
    trained: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from obs_kernels.training.trainer import TaskTrainer, WholeCheckpoints

    # at a save, the checkpoint of the next step is there but for its mark: it does not count
    kind = TaskTrainer if where == "training_step" else WholeCheckpoints
    original = getattr(kind, where)

    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (self.state if where == "training_step" else args[1]).global_step == step + (where == "on_save"):
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    arguments = command(save_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(kind, where, killed)
        assert run(*arguments).exit_code == 130
    assert [path.name for path in tmp_path.iterdir()] == ["out.work"]
    done = run(*arguments)
    assert done.exit_code == 1 and "holds a run that was cut off; pass --resume" in done.stderr
    done = run(*command(*GRADUAL, "damp=1e-3", save_steps=1), "--resume")
    assert done.exit_code == 1 and "differs in recipe.pruning.damp" in done.stderr
    done = run(*arguments, "--resume")
    assert done.exit_code == 0, done.stderr
    assert f"resuming from checkpoint-{step}" in done.stderr
    again, before = weights_of(tmp_path / "out" / "dense"), weights_of(trained[0] / "dense")
    assert all(torch.equal(again[key], before[key]) for key in before)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_finished_part_of_an_epoch_is_not_trained_further_when_resumed(
    command: Callable[..., list[object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from obs_kernels.training import train_job

    arguments = command(
        *SHORT[1:], "epochs=1.5", "start_epoch=0", "end_epoch=0.5", "update_frequency=0.5", save_steps=1
    )
    seen: list[dict[str, Tensor]] = []

    def stop(run: Any, *_: Any) -> None:
        seen.append({name: value.clone() for name, value in run.net.state_dict().items()})
        raise KeyboardInterrupt

    monkeypatch.setattr(train_job, "_write", stop)
    for more in ((), ("--resume",)):
        assert run(*arguments, *more).exit_code == 130
    steps = [int(path.name.split("-")[1]) for path in (tmp_path / "out.work").glob("checkpoint-*")]
    assert max(steps) == 6  # four steps an epoch
    assert all(torch.equal(value, seen[1][name]) for name, value in seen[0].items())


def test_the_learning_rate_follows_the_step_where_fp16_skips_some(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The falls of the rate end at the prunings, also where an overflow let a step be skipped."""
    import warnings

    from accelerate import Accelerator
    from transformers import TrainerCallback

    from obs_kernels.training.train_job import run_train_job

    class Rates(TrainerCallback):
        def __init__(self) -> None:
            self.found: list[float] = []

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.found.append(kwargs["optimizer"].param_groups[0]["lr"])

    overrides = dict(text.split("=") for text in GRADUAL) | {"epochs": "3", "batch_size": "2"}
    sources = {"model": work / "qa", "data": work / "dev.json", "train": work / "train.json", "teacher": "self"}
    recipe = load_recipe("oBERT_28_gradual", overrides)
    rates = []
    for skipped in ((), (0, 3, 4)):
        watch = Rates()
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("error")
            overflows = property(lambda _, w=watch, s=skipped: len(w.found) - 1 in s)
            patch.setattr(Accelerator, "optimizer_step_was_skipped", overflows)
            run_train_job(**sources, recipe=recipe, out=tmp_path / str(len(skipped)), callbacks=[watch])
        rates.append(watch.found)
    assert len(set(rates[0])) > 2 and rates[0] == rates[1]


def test_layers_are_dropped_for_good(command: Callable[..., list[object]], tmp_path: Path) -> None:
    report = run_json(*command(*SHORT[:5], "keep=[1]", recipe="layer_drop6_squad", teacher=None))
    assert "1 layers were removed: bert.encoder.layer.0" in report["notes"] and "pruning" not in report
    assert list(report["accuracy"]) == ["before", "trained"] and not (tmp_path / "out" / "packed").exists()
    dense = weights_of(tmp_path / "out" / "dense")
    assert not any("encoder.layer.1" in name for name in dense)
    assert json.loads((tmp_path / "out" / "dense" / "config.json").read_text())["num_hidden_layers"] == 1


def test_hidden_states_of_a_recipe_are_in_the_loss(command: Callable[..., list[object]], tmp_path: Path) -> None:
    losses = []
    for hidden in (0, 5):
        short = [*SHORT[:5], "keep=[1]", f"hidden={hidden}"]
        changed = {"recipe": "layer_drop6_squad", "out": tmp_path / str(hidden), "logging_steps": 1}
        report = run_json(*command(*short, **changed))
        losses.append(next(row["loss"] for row in report["history"] if "loss" in row))
    assert losses[1] > losses[0] + 0.1


def test_dropping_keeps_the_chosen_layers() -> None:
    model = tiny_model(layers=4)
    wanted = [model.bert.encoder.layer[i].output.dense.weight.clone() for i in (0, 3)]  # type: ignore[union-attr, index]
    assert drop_layers_(model, [0, 3]) == ["bert.encoder.layer.1", "bert.encoder.layer.2"]
    assert model.config.num_hidden_layers == 2  # type: ignore[union-attr]
    for weight, layer in zip(wanted, model.bert.encoder.layer, strict=True):  # type: ignore[union-attr, arg-type]
        assert torch.equal(weight, layer.output.dense.weight)
    for keep in ([], [1, 0], [0, 5], [0, 0]):
        with pytest.raises(ConfigError, match=r"layer_drop\.keep must ascend within 0 to 1"):
            drop_layers_(model, keep)
    with pytest.raises(ConfigError, match="needs a model with one list of"):
        drop_layers_(torch.nn.Linear(2, 2), [0])


def test_upstream_pruning_and_sparse_transfer(command: Callable[..., list[object]], work: Path, tmp_path: Path) -> None:
    """A masked language model is pruned upstream; its zeros are held while a head is trained on questions."""
    text = {"data": work / "text.txt", "train": work / "text.txt", "model": work / "mlm"}
    steps = [*SHORT, "start_epoch=0", "end_epoch=1.5", "update_frequency=0.5", "gradient_accumulation=2"]
    report = run_json(*command(*steps, recipe="3epochs_unstructured90_mlm", out=tmp_path / "up", **text))
    assert report["accuracy"]["pruned"]["perplexity"] > 1 and report["checks"]["violations"] == 0
    assert report["pruning"]["sparsity"] == pytest.approx(0.9, abs=1e-3)
    up = weights_of(tmp_path / "up" / "dense")
    transfer = {"recipe": "8epochs_sparse_transfer_squad", "model": tmp_path / "up" / "dense", "teacher": work / "qa"}
    report = run_json(*command(*SHORT, "end_epoch=1.5", "start_epoch=0.5", "update_frequency=1", **transfer))
    assert list(report["accuracy"]) == ["before", "teacher", "pruned"]
    down = weights_of(tmp_path / "out" / "dense")
    pruned = [name for name in up if "encoder" in name and name.endswith("dense.weight")]
    for name in pruned:
        assert torch.equal(down[name] == 0, up[name] == 0) and not torch.equal(down[name], up[name])
    done = run(
        *command(
            *SHORT,
            "end_epoch=2",
            "start_epoch=1",
            "update_frequency=1",
            **transfer | {"model": work / "qa"},
            out=tmp_path / "no",
        )
    )
    assert done.exit_code == 1 and "the model must come with 0.9 of its weights pruned" in done.stderr


@pytest.mark.parametrize(("task", "model", "data"), [("mnli", "mnli", "mnli.tsv"), ("qqp", "mlm", "qqp.jsonl.gz")])
def test_pairs_of_texts(task: str, model: str, data: str, command: Callable[..., list[object]], work: Path) -> None:
    sources = {"data": work / data, "train": work / data, "model": work / model}
    steps = [*SHORT[:-2], "start_epoch=0", "end_epoch=1", "update_frequency=1", "learning_rate=1e-2"]
    report = run_json(*command(*steps, recipe=f"30epochs_unstructured80_{task}", **sources))
    assert report["checks"]["violations"] == 0 and 0 <= report["accuracy"]["pruned"]["accuracy"] <= 100
    assert report["accuracy"]["pruned"]["samples"] == 9 and ("f1" in report["accuracy"]["pruned"]) == (task == "qqp")


def test_a_row_recipe_in_bf16(command: Callable[..., list[object]]) -> None:
    steps = [*GRADUAL, "precision=bf16", "gradient_accumulation=2", "start_epoch=0", "end_epoch=1"]
    report = run_json(*command(*steps, recipe="gradual_row_28"))
    assert report["config"]["curvature"] == "row" and report["config"]["sequential"]
    assert report["checks"] == {"violations": 0, "violations_in_file": 0}


def test_no_epochs_prune_in_one_shot(command: Callable[..., list[object]]) -> None:
    steps = [text for text in SHORT if not text.startswith("epochs")]
    report = run_json(*command(*steps, "epochs=0", recipe="oneshot_oBERT_28"))
    assert report["pruning"]["stages"] == ["2:8"] and report["history"] == []
    assert report["checks"] == {"violations": 0, "violations_in_file": 0}


def test_gradients_of_pruned_weights_leave_the_clipped_norm(work: Path, tmp_path: Path) -> None:
    from transformers import TrainerCallback

    from obs_kernels.training.train_job import run_train_job

    found = []

    class Probe(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            weight = kwargs["model"].bert.encoder.layer[0].output.dense.weight
            dead = weight == 0
            found.append((int(dead.sum()), bool(weight.grad[dead].any()), bool(weight.grad[~dead].any())))

    overrides = dict(text.split("=") for text in [*GRADUAL, "gradient_accumulation=2"])
    sources = {"model": work / "qa", "data": work / "dev.json", "train": work / "train.json", "out": tmp_path / "out"}
    run_train_job(**sources, recipe=load_recipe("oBERT_28_gradual", overrides), teacher="self", callbacks=[Probe()])
    assert found[-1][0] > 0 and all(not dead and live for _, dead, live in found)


def refused(*arguments: object) -> str:
    done = run(*arguments)
    assert done.exit_code == 1, (done.exit_code, done.stderr, done.stdout)
    return done.stderr


def test_bad_input_is_refused_before_anything_is_written(
    command: Callable[..., list[object]], work: Path, tmp_path: Path
) -> None:
    without = json.loads((work / "train.json").read_text())
    without["data"][0]["paragraphs"][0]["qas"][0]["answers"] = []
    (work / "unanswered.json").write_text(json.dumps(without))
    (work / "test.tsv").write_text("sentence1\tsentence2\nA text.\tAnother.")
    cases = {
        "targets ['Conv2d'] match nothing": command(*GRADUAL, "targets=[Conv2d]"),
        "end_epoch must be at least start_epoch": command(*SHORT, "start_epoch=1", "end_epoch=0.5"),
        "has no trained head for question-answering": command(teacher=work / "mlm"),
        "got none; pass --teacher FOLDER": command(teacher=None),
        "unknown key mask_structure": command(*GRADUAL, "mask_structure=2:4"),
        "is neither a file nor a name of a recipe": command(recipe="nothing_of_the_kind"),
        "'answers' must hold at least one answer": command(train=work / "unanswered.json"),
        "got none; give a labelled part": command(
            *SHORT,
            "end_epoch=1.5",
            "start_epoch=0.5",
            "update_frequency=1",
            recipe="30epochs_unstructured80_mnli",
            model=work / "mnli",
            data=work / "test.tsv",
        ),
        "teacher with the student's 2 layers, or a multiple": command(*GRADUAL, "hidden=1", teacher=work / "deep"),
        "teacher with the student's 2 layers": command(
            *SHORT[:5], "keep=[0, 1]", "hidden=1", recipe="layer_drop6_squad", model=work / "deep"
        ),
        "must be fp32 or bf16 on a CPU": command(*GRADUAL, "precision=fp16"),
        "train must name the samples": command(train=None),
        "does not exist; check the path": command(model=tmp_path / "nowhere"),
    }
    pairs = {"recipe": "30epochs_unstructured80_mnli", "model": work / "mnli", "data": work / "mnli.tsv"}
    three = command(
        *SHORT,
        "end_epoch=1.5",
        "start_epoch=0.5",
        "update_frequency=1",
        teacher=work / "qqp",
        train=work / "mnli.tsv",
        **pairs,
    )
    cases["logits of the teacher must be [1, 3] as the student's, got [1, 2]"] = three
    cases["rows % 64 == 0"] = command(*GRADUAL, "pattern=64:2:8", "targets=[query, qa_outputs]", "ignore=[]")
    found = {text: refused(*arguments) for text, arguments in cases.items()}
    wrong = {text: message for text, message in found.items() if text not in message}
    assert not wrong
    assert list(tmp_path.iterdir()) == []


def test_files_of_pairs(tmp_path: Path, work: Path) -> None:
    assert [pair.label for pair in load_pairs(work / "mnli.tsv", "mnli")] == [0, 1, 2] * 3
    assert [pair.label for pair in load_pairs(work / "qqp.jsonl.gz", "qqp")] == [0, 1] * 4 + [0]
    whole = tmp_path / "a.json"
    whole.write_text(json.dumps({"data": [{"premise": "a", "hypothesis": "b", "label": 2}]}))
    assert load_pairs(whole, "mnli")[0].label == 2
    rows = 'sentence1\tsentence2\tgold_label\na\tb\t-\nc\t"d\tneutral'
    (tmp_path / "b.tsv").write_text(rows)
    found = load_pairs(tmp_path / "b.tsv", "mnli")  # no agreement: left out; quotes are text
    assert [(pair.second, pair.label) for pair in found] == [('"d', 1)]
    for content, text in (
        ("[1]", "holds no list of objects"),
        ("{", "damaged"),
        ('[{"premise": "a", "label": 1}]', "columns premise and hypothesis or sentence1 and sentence2 must hold texts"),
        ('[{"premise": "a", "hypothesis": "b", "label": -1}]', "got -1; give a labelled part"),
        ("[]", "at least one labelled pair"),
    ):
        whole.write_text(content)
        with pytest.raises(DataFormatError, match=text):
            load_pairs(whole, "mnli")
    with pytest.raises(DataFormatError, match="does not exist"):
        load_pairs(tmp_path / "no.tsv", "qqp")


def test_hub_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*names: str, split: str) -> Any:
        asked.append((*names, split))
        if split == "test":
            raise ValueError("Unknown split test")
        if names[0] == "owner/text":
            return {"text": ["one", " ", "two"]}
        return [{"premise": "a", "hypothesis": "b", "label": 1}, {"premise": "c", "hypothesis": "d", "label": 0}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert [pair.label for pair in load_pairs("owner/glue:mnli", "mnli")] == [1, 0]
    assert load_pairs("owner/glue:mnli", "mnli", split="train")[1].second == "d"
    assert read_lines("owner/text", split="train") == ["one", "two"]
    assert asked == [
        ("owner/glue", "mnli", "validation_matched"),
        ("owner/glue", "mnli", "train"),
        ("owner/text", "train"),
    ]
    for read in (lambda: load_pairs("owner/glue", "qqp", split="test"), lambda: read_lines("owner/text", split="test")):
        with pytest.raises(DataFormatError, match=r"split='test' \(Unknown split test\); check the name"):
            read()
    monkeypatch.setitem(sys.modules, "datasets", None)
    for read in (lambda: load_pairs("owner/glue", "qqp"), lambda: read_lines("owner/text", split="train")):
        with pytest.raises(MissingDependencyError, match="is a hub name and needs the datasets library"):
            read()


def test_masked_text_depends_on_epoch_and_samples_alone(work: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work / "mlm")
    settings = TrainingSettings(task="mlm", max_length=32)
    text = work / "text.txt"
    data = load_task(settings, torch.nn.Linear(1, 1), tokenizer, data=text, train=text)
    rows = torch.arange(min(32, len(data.lengths)))
    torch.manual_seed(1)
    first, again, later = data.batch(rows), data.batch(rows), data.batch(rows, epoch=1)
    assert torch.equal(first["labels"], again["labels"]) and torch.equal(first["input_ids"], again["input_ids"])
    assert not torch.equal(first["labels"], later["labels"])
    asked = first["labels"] != -100
    assert 0.1 < float(asked.double().mean()) < 0.2
    special = torch.isin(first["labels"], torch.tensor(tokenizer.all_special_ids))
    assert not special.any()
    masked = first["input_ids"][asked] == tokenizer.mask_token_id
    assert 0.7 < float(masked.double().mean()) < 0.9
    assert (first["input_ids"][~asked] == data.table.input_ids[rows][~asked]).all()  # type: ignore[attr-defined]


def test_the_squad_module_is_the_train_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "obs_kernels.training.squad", "--help"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "--recipe" in done.stdout and "obs-kernels train" in done.stdout, done.stderr


def test_shipped_recipes_that_name_tasks_have_data_of_them() -> None:
    assert load_recipe("8epochs_sparse_transfer_qqp").training.task == "qqp"
