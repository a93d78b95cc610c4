# SPDX-License-Identifier: Apache-2.0
"""Recipes: every name of the reference systems with its settings, files and overrides, errors that name the fix."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import obs_kernels as obs
from obs_kernels.cli import app
from obs_kernels.errors import ConfigError, MissingDependencyError, ShapeNotSupportedError
from obs_kernels.patterns import parse_pattern
from obs_kernels.pruning import OBSConfig, PruningSchedule
from obs_kernels.pruning.find_layers import find_layers
from obs_kernels.recipes import (
    DistillationSettings,
    LayerDropSettings,
    Recipe,
    TrainingSettings,
    json_schema,
    load_recipe,
    recipe_aliases,
    recipe_from_dict,
    recipe_names,
)
from obs_kernels.recipes.template import new_recipe
from obs_kernels.recipes.yaml_text import dump_yaml, read_value, read_yaml

yaml = pytest.importorskip("yaml")
pytest.importorskip("pydantic")

ROOT = Path(__file__).resolve().parents[1]
LR_SQUAD, LR_GLUE = (8e-5, 8e-6, "cyclic_linear"), (5e-5, 5e-6, "cyclic_linear")

VENOM = {
    # name: pattern, method, D, epochs of the prunings, n of each, batch of the gradients
    "oBERT_28_gradual": ("2:8", "combinatorial", 8, range(2, 15, 4), (5, 4, 3, 2), 8),
    "oBERT_216_gradual": ("2:16", "combinatorial", 16, range(2, 23, 4), (9, 7, 5, 4, 3, 2), 8),
    "oBERT_28v64_gradual": ("64:2:8", "combinatorial", 8, range(2, 15, 4), (5, 4, 3, 2), 8),
    "oBERT_28v128_gradual": ("128:2:8", "combinatorial", 8, range(2, 19, 4), (6, 5, 4, 3, 2), 8),
    "oBERT_216v64_gradual": ("64:2:16", "combinatorial", 16, range(2, 15, 4), (5, 4, 3, 2), 8),
    "oBERT_216v128_gradual": ("128:2:16", "combinatorial", 16, range(2, 15, 4), (5, 4, 3, 2), 8),
    "obs_28_gradual_pair": ("2:8", "pairwise", 8, range(2, 15, 4), (5, 4, 3, 2), 8),
    "obs_216_gradual_pair": ("2:16", "pairwise", 16, range(2, 31, 4), (9, 8, 7, 6, 5, 4, 3, 2), 8),
    "obs_28v64_gradual_pair": ("64:2:8", "pairwise", 32, range(2, 15, 4), (5, 4, 3, 2), 8),
    "obs_28v128_gradual_pair": ("128:2:8", "pairwise", 32, range(2, 15, 4), (5, 4, 3, 2), 8),
    "obs_216v64_gradual_pair": ("64:2:16", "pairwise", 32, range(2, 31, 4), (9, 8, 7, 6, 5, 4, 3, 2), 16),
    "obs_216v128_gradual_pair": ("128:2:16", "pairwise", 32, range(2, 31, 4), (9, 8, 7, 6, 5, 4, 3, 2), 16),
}
ONESHOT = {
    "oneshot_oBERT_28": ("2:8", 8, 16),
    "oneshot_oBERT_216": ("2:16", 16, 8),
    "oneshot_oBERT_28v64": ("64:2:8", 8, 16),
    "oneshot_oBERT_28v128": ("128:2:8", 8, 16),
    "oneshot_oBERT_216v64": ("64:2:16", 16, 8),
    "oneshot_oBERT_216v128": ("128:2:16", 16, 8),
}
THRESHOLDS = {
    # name: pattern, first sparsity, D, task, learning rates, batch of the gradients, maximal length, batch
    "30epochs_8block75_squad": ("block8:0.75", 0.5, 32, "squad"),
    "30epochs_8block875_squad": ("block8:0.875", 0.7, 32, "squad"),
    **{
        f"30epochs_unstructured{s}_{t}": (f"unstructured:0.{s}", 0.7, 50, t)
        for s in (80, 90, 97)
        for t in ("squad", "mnli", "qqp")
    },
    **{f"30epochs_4block{s}_squad": (f"block4:0.{s}", 0.7, 32, "squad") for s in (80, 90)},
    **{f"30epochs_init30_unstructured{s}_squad": (f"unstructured:0.{s}", 0.3, 50, "squad") for s in (80, 90)},
    **{f"30epochs_init30_4block{s}_squad": (f"block4:0.{s}", 0.3, 32, "squad") for s in (80, 90)},
}
OTHERS = [
    "30epochs_dense_squad",
    "3epochs_unstructured90_mlm",
    "3epochs_unstructured97_mlm",
    "8epochs_sparse_transfer_squad",
    "8epochs_sparse_transfer_mnli",
    "8epochs_sparse_transfer_qqp",
]
KINDS = ("gradual_row", "oneshot_row", "gradual_block", "gradual_pair", "gradual_magnitude")
SHAPES = {"24": "2:4", "28": "2:8", "28v64": "64:2:8", "28v128": "128:2:8", "216": "2:16", "216v64": "64:2:16"}
OURS = [f"{kind}_{shape}" for kind in KINDS for shape in SHAPES]
LAST = ["gradual_8block75", "gradual_unstructured75", "gradual_unstructured90", "8epochs_dense_squad"]
SCRIPTS = [
    "30epochs_gradual_pruning_squad_block8.sh",
    "30epochs_gradual_pruning_squad_block8_875.sh",
    "oBERT28_squad.sh",
    "oBERT216_squad.sh",
    "oBERTnm8v64_squad.sh",
    "oBERTnm8v128_squad.sh",
    "oBERTnm16v64_squad.sh",
    "oBERTnm16v128_squad.sh",
    "oBERT28_squad_gradual.sh",
    "oBERT216_squad_gradual.sh",
    "oBERT28v64_squad_gradual.sh",
    "oBERT28v128_squad_gradual.sh",
    "oBERT216v64_squad_gradual.sh",
    "oBERT216v128_squad_gradual.sh",
    "obs28_squad_gradual_pair.sh",
    "obs216_squad_gradual_pair.sh",
    "obs28v64_squad_gradual_pair.sh",
    "obs28v128_squad_gradual_pair.sh",
    "obs216v64_squad_gradual_pair.sh",
    "obs216v128_squad_gradual_pair.sh",
    "30epochs_gradual_pruning_squad.sh",
    "30epochs_gradual_pruning_mnli_qqp.sh",
    "3epochs_gradual_pruning_mlm.sh",
    "8epochs_sparse_transfer_squad.sh",
    "8epochs_sparse_transfer_mnli_qqp.sh",
]
MODIFIERS = {
    "modifier_pruning_obs": ("block8:0.75", "combinatorial"),
    "modifier_pruning_obs_28": ("2:8", "combinatorial"),
    "modifier_pruning_obs_216": ("2:16", "combinatorial"),
    "modifier_pruning_obs_28_gradual": ("2:8", "combinatorial"),
    "modifier_pruning_obs_216_gradual": ("2:16", "combinatorial"),
    "modifier_pruning_28_pairwise_obs": ("2:8", "pairwise"),
    "modifier_pruning_216_pairwise_obs": ("2:16", "pairwise"),
    "modifier_pruning_obs_28v64": ("64:2:8", "combinatorial"),
    "modifier_pruning_obs_28v128": ("128:2:8", "combinatorial"),
    "modifier_pruning_obs_216v64": ("64:2:16", "combinatorial"),
    "modifier_pruning_obs_216v128": ("128:2:16", "combinatorial"),
    "modifier_pruning_obs_28v64_gradual": ("64:2:8", "combinatorial"),
    "modifier_pruning_obs_28v128_gradual": ("128:2:8", "combinatorial"),
    "modifier_pruning_obs_216v64_gradual": ("64:2:16", "combinatorial"),
    "modifier_pruning_obs_216v128_gradual": ("128:2:16", "combinatorial"),
    **{
        f"modifier_{p}{m}_pairwise_obs_v{v}": (f"{v}:2:{m[1:]}", "pairwise")
        for p in ("", "pruning_")
        for m in ("28", "216")
        for v in (64, 128)
    },
}


def prunings(recipe: Recipe, steps: int = 100) -> list[tuple[float, str]]:
    assert recipe.schedule is not None and recipe.pruning is not None
    return [(p.step / steps, str(p.pattern)) for p in recipe.schedule.prunings(recipe.pruning.parsed_pattern, steps)]


def rates(recipe: Recipe) -> tuple[float, float, str]:
    training = recipe.training
    return training.learning_rate, training.final_learning_rate, training.lr_schedule


def values(**changes: Any) -> dict[str, Any]:
    found = {"obs_kernels": 1, "name": "mine", "training": {"epochs": 3}, "pruning": {"pattern": "2:8"}} | changes
    return {key: value for key, value in found.items() if value is not None}


def cli(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["recipes", *map(str, arguments)])


# the names, and what stands behind them


def test_the_list_is_whole() -> None:
    names = recipe_names()
    assert len(set(names)) == len(names)
    assert {*VENOM, *ONESHOT, *THRESHOLDS, *OTHERS, *OURS, *LAST} <= set(names)
    assert not set(recipe_aliases()) & set(names)
    assert set(recipe_aliases().values()) <= set(names)
    for name in names:
        recipe = load_recipe(name)
        assert recipe.name == name and recipe.description and "\n" not in recipe.description
        assert recipe == load_recipe(f"{name}.yaml"), "with the ending of the file there"


@pytest.mark.parametrize("name", VENOM)
def test_gradual_structure(name: str) -> None:
    pattern, method, size, epochs, counts, batch = VENOM[name]
    recipe = load_recipe(name)
    assert recipe.pruning is not None and recipe.distillation is not None
    head = pattern.rpartition("2:")[0]
    group = pattern.rpartition(":")[2]
    assert prunings(recipe) == [(e, f"{head}{n}:{group}") for e, n in zip(epochs, counts, strict=True)]
    assert (recipe.pruning.method, recipe.pruning.fisher_block_size) == (method, size)
    check_shared(recipe, batch)
    assert recipe.training.epochs == 50 and rates(recipe) == LR_SQUAD and recipe.distillation.temperature == 2.0
    starts = recipe.cycle_starts(100)
    assert starts == (0, *range(200, 5000, 400)), "cycles of four epochs to the end"
    assert {round(100 * epoch) for epoch, _ in prunings(recipe)} <= set(starts), "prunings fall on starts of cycles"


def check_shared(recipe: Recipe, batch: int) -> None:
    """What all recipes of the reference systems have in common."""
    pruning, training, teacher = recipe.pruning, recipe.training, recipe.distillation
    assert pruning is not None and teacher is not None
    assert (pruning.num_grads, pruning.damp, pruning.gradients, pruning.recomputations) == (1024, 1e-7, "batch", 1)
    assert (pruning.curvature, pruning.update) == ("block", "joint")
    assert pruning.global_sparsity is (not pruning.parsed_pattern.fixed_count)
    assert training.gradient_batch_size == batch and training.precision == "fp16" and training.seed == 42
    squad = training.task == "squad"
    sizes = (training.batch_size, training.eval_batch_size, training.max_length)
    assert sizes == ((16, 16, 384) if squad else (32, 32, 128)) and training.doc_stride == 128
    assert teacher.hardness == 1.0
    assert teacher.outputs == (("start_logits", "end_logits") if squad else ("logits",))


@pytest.mark.parametrize("name", ONESHOT)
def test_oneshot_structure(name: str) -> None:
    pattern, size, batch = ONESHOT[name]
    recipe = load_recipe(name)
    assert recipe.pruning is not None and recipe.distillation is not None
    assert prunings(recipe) == [(0, pattern)] and recipe.pruning.fisher_block_size == size
    check_shared(recipe, batch)
    assert rates(recipe) == (1.5e-4, 1.5e-6, "linear") and recipe.training.lr_start_epoch == 1
    assert recipe.training.epochs == 30 and recipe.distillation.temperature == 5.5
    assert recipe.cycle_starts(100) == (0,)


@pytest.mark.parametrize("name", THRESHOLDS)
def test_gradual_thresholds(name: str) -> None:
    pattern, first, size, task = THRESHOLDS[name]
    recipe = load_recipe(name)
    assert recipe.pruning is not None and recipe.schedule is not None and recipe.distillation is not None
    found = prunings(recipe)
    assert [epoch for epoch, _ in found] == list(range(2, 27, 4)) and found[-1][1] == str(parse_pattern(pattern))
    assert parse_pattern(found[0][1]).sparsity == first and recipe.schedule.shape == "cubic"
    assert recipe.pruning.fisher_block_size == size and recipe.training.task == task
    check_shared(recipe, 8 if task == "squad" else 16)
    assert rates(recipe) == (LR_SQUAD if task == "squad" else LR_GLUE) and recipe.training.epochs == 30
    assert recipe.cycle_starts(10) == (0, *range(20, 300, 40)) and recipe.distillation.temperature == 2.0


@pytest.mark.parametrize("share", ["90", "97"])
def test_upstream(share: str) -> None:
    recipe = load_recipe(f"3epochs_unstructured{share}_mlm")
    assert recipe.pruning is not None and recipe.distillation is not None
    found = prunings(recipe, 1000)
    last = recipe.pruning.parsed_pattern.sparsity
    assert found[-1][1] == f"unstructured:{last}" and float(f"0.{share}") == last
    assert [epoch for epoch, _ in found] == [k / 4 for k in range(12)]
    assert found[0][1] == "unstructured:0.7" and recipe.pruning.fisher_block_size == 50
    training = recipe.training
    assert (training.task, training.max_length, training.epochs) == ("mlm", 512, 3)
    assert training.batch_size * training.gradient_accumulation * 4 == 256 and training.eval_batch_size == 16
    assert training.weight_decay == 0.01 and training.gradient_batch_size == 16
    assert rates(recipe) == (5e-4, 5e-6, "cyclic_linear") and recipe.cycle_starts(1000) == tuple(range(0, 3000, 250))
    assert recipe.distillation == DistillationSettings(1.0, 5.5, "self", ("logits",))


@pytest.mark.parametrize("task", ["squad", "mnli", "qqp"])
def test_sparse_transfer(task: str) -> None:
    recipe = load_recipe(f"8epochs_sparse_transfer_{task}")
    assert recipe.schedule is not None and recipe.schedule.shape == "constant" and prunings(recipe) == []
    assert (recipe.schedule.start_epoch, recipe.schedule.end_epoch, recipe.training.epochs) == (0, 8, 8)
    assert rates(recipe) == (1.5e-4, 1.5e-6, "linear") and recipe.training.task == task
    assert recipe.distillation is not None and recipe.distillation.temperature == 5.5
    other = load_recipe(recipe.name, {"pattern": "unstructured:0.97"})
    assert other.pruning is not None and other.pruning.pattern == "unstructured:0.97"


def test_dense_and_layer_dropping() -> None:
    dense = load_recipe("30epochs_dense_squad")
    assert dense.pruning is None and dense.schedule is None and dense.layer_drop is None
    assert rates(dense) == LR_SQUAD and dense.cycle_starts(100) == (0, *range(200, 3000, 400))
    for layers, keep in ((3, (0, 5, 11)), (6, (0, 2, 4, 7, 9, 11))):
        upstream, squad = load_recipe(f"layer_drop{layers}_mlm"), load_recipe(f"layer_drop{layers}_squad")
        assert upstream.layer_drop == squad.layer_drop == LayerDropSettings(keep) and len(keep) == layers
        assert upstream.training.task == "mlm" and rates(squad) == LR_SQUAD and squad.training.epochs == 30
        assert squad.cycle_starts(100) == dense.cycle_starts(100)
        assert squad.distillation is not None and squad.distillation.outputs == ("start_logits", "end_logits")


def test_oneshot_in_parts() -> None:
    for share in (70, 80, 90):
        recipe = load_recipe(f"oneshot_unstructured{share}_squad", {"recomputations": "4"})
        assert recipe.pruning is not None and recipe.pruning.recomputations == 4 and recipe.training.epochs == 0
        assert recipe.pruning.parsed_pattern.sparsity == share / 100


def test_json_before_the_name_of_the_command_holds_too() -> None:
    for words in (("show", "gradual_row_28"), ("schema",)):
        before, after = cli("--json", *words), cli(*words, "--json")
        assert before.exit_code == 0 and before.stdout == after.stdout
        json.loads(before.stdout)
    done = cli("--json", "show", "nothing_of_the_kind")
    assert done.exit_code == 1 and json.loads(done.stdout)["error"]["type"] == "ConfigError"


@pytest.mark.parametrize("name", OURS)
def test_own_recipes(name: str) -> None:
    recipe = load_recipe(name)
    kind, _, shape = name.rpartition("_")
    pruning = recipe.pruning
    assert pruning is not None and pruning.pattern == SHAPES[shape]
    found = prunings(recipe)
    assert found[-1][1] == pruning.pattern and found[0][0] == 0 and (len(found) == 1) is kind.startswith("oneshot")
    method, update = {
        "gradual_pair": ("pairwise", "joint"),
        "gradual_magnitude": ("magnitude", "none"),
    }.get(kind, ("combinatorial", "joint"))
    assert (pruning.method, pruning.update, pruning.sequential) == (method, update, kind.endswith("row"))
    assert recipe.training == load_recipe("8epochs_dense_squad").training, "the same budget for all"
    assert recipe.training.epochs == 8 and recipe.distillation is not None and recipe.distillation.teacher == "self"


def test_own_thresholds_and_the_dense_model() -> None:
    for name, first, last in ((LAST[0], 0.5, 0.75), (LAST[1], 0.5, 0.75), (LAST[2], 0.7, 0.9)):
        recipe = load_recipe(name)
        found = [parse_pattern(text).sparsity for _, text in prunings(recipe)]
        assert len(found) == 4 and (found[0], found[-1]) == (first, last)
        assert recipe.training == load_recipe(LAST[3]).training
    assert load_recipe(LAST[3]).pruning is None and load_recipe(LAST[3]).schedule is None


@pytest.mark.parametrize("name", [*SCRIPTS, *(f"{name}.py" for name in MODIFIERS)])
def test_names_of_scripts_and_modifiers(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name in recipe_names() and recipe == load_recipe(name.rpartition(".")[0])
    if name.endswith(".py"):
        assert recipe.pruning is not None
        assert (recipe.pruning.pattern, recipe.pruning.method) == MODIFIERS[name.removesuffix(".py")]
        stages = [pattern for _, pattern in prunings(recipe)]
        gradual = "gradual" in name or "pairwise" in name or name == "modifier_pruning_obs.py"
        assert (len(stages) > 1) is gradual


@pytest.mark.parametrize("head", ["squad", "mnli", "mlm"])
def test_what_is_pruned_of_bert(head: str) -> None:
    """The six weights of each encoder layer, 72 for 12 layers, and nothing else."""
    import transformers

    kinds = {
        "squad": transformers.BertForQuestionAnswering,
        "mnli": transformers.BertForSequenceClassification,
        "mlm": transformers.BertForMaskedLM,
    }
    with torch.device("meta"):
        model = kinds[head](transformers.BertConfig())
    names = {"squad": "oBERT_28v128_gradual", "mnli": "30epochs_unstructured90_mnli", "mlm": OTHERS[1]}
    recipe = load_recipe(names[head])
    assert recipe.pruning is not None
    layers, _ = find_layers(model, recipe.pruning)
    assert len(layers) == 72 and sum(layer.mask.numel() for layer in layers) == 84_934_656
    assert all(".encoder.layer." in layer.name for layer in layers)


# names that are not offered, or none at all


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("oBERT_28_gradul", "oBERT_28_gradual"),
        ("30epochs_unstructured80_sqad", "30epochs_unstructured80_squad"),
        ("obs_28_gradual", "2:8 cannot have.*oBERT_28_gradual"),
        ("obs_216_gradual.yaml", "does not exist.*oBERT_216_gradual"),
        ("sparseml_SS1.sh", "job of a cluster"),
        ("zzz", "obs-kernels recipes"),
        ("", "neither a file nor a name"),
        ("no/such/folder/recipe.yaml", "neither a file nor a name"),
    ],
)
def test_unknown_names(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_recipe(name)


# files and overrides


@pytest.mark.parametrize("name", recipe_names())
def test_round_trip_through_a_file(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    path = tmp_path / "mine.yaml"
    path.write_text(recipe.to_yaml())
    assert load_recipe(path) == recipe and recipe_from_dict(recipe.to_dict()) == recipe
    assert yaml.safe_load(recipe.to_yaml()) == json.loads(json.dumps(recipe.to_dict())), "any other reader too"
    assert hash(recipe) == hash(load_recipe(name))
    older = recipe.to_dict()
    if recipe.pruning is not None:
        older["pruning"] |= {"refit_norms": False}
    assert recipe_from_dict(older) == recipe


def test_a_file_as_people_write_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.yml"
    path.write_text(
        """
obs_kernels: 1
pruning:
  pattern: 64:2:8      # no quotes
  damp: 1e-7
  targets: [Linear]
  num_grads: 1_024
schedule: {start_epoch: 0, end_epoch: 1.5, update_frequency: .5, shape: structure_decay, ladder: [5, 4, 3, 2]}
training:
  epochs: 3
  learning_rate: 1e-4
"""
    )
    recipe = load_recipe(path)
    assert recipe.name == "mine" and recipe.pruning == OBSConfig(pattern="64:2:8", damp=1e-7)
    assert recipe.schedule == PruningSchedule(0, 1.5, 0.5, "structure_decay", ladder=(5, 4, 3, 2))
    assert recipe.training == TrainingSettings(epochs=3.0, learning_rate=1e-4) and recipe.distillation is None


def test_overrides() -> None:
    recipe = load_recipe(
        "gradual_row_28",
        {
            "pattern": "64:2:16",
            "end_epoch": "5",
            "schedule.update_frequency": " 1",
            "ladder": "[9, 7, 5, 4, 3, 2]",
            "pruning.seed": "7",
            "training.seed": "8",
            "teacher": "null",
            "sequential": "false",
            "learning_rate": "1e-4",
            "name": "other",
            "epochs": 6,
        },
    )
    assert recipe.pruning is not None and recipe.schedule is not None and recipe.distillation is not None
    assert (recipe.pruning.pattern, recipe.pruning.seed, recipe.training.seed) == ("64:2:16", 7, 8)
    assert recipe.schedule.ladder == (9, 7, 5, 4, 3, 2) and recipe.schedule.end_epoch == 5
    assert recipe.distillation.teacher is None and not recipe.pruning.sequential
    assert (recipe.training.learning_rate, recipe.training.epochs, recipe.name) == (1e-4, 6, "other")
    without = load_recipe("gradual_row_28", {"distillation": "null", "schedule": None})
    assert without.distillation is None and without.schedule is None
    added = load_recipe("30epochs_dense_squad", {"layer_drop.keep": "[0, 1]", "training.lr_cycle_epochs": "5"})
    assert added.layer_drop == LayerDropSettings((0, 1)) and added.cycle_starts(1) == (0, 2, 7, 12, 17, 22, 27)
    assert load_recipe("gradual_row_28") == load_recipe("gradual_row_28", {}), "and the shipped one is as it was"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"seed": "1"}, "pruning.seed or training.seed"),
        ({"lerning_rate": "1"}, "did you mean 'learning_rate'"),
        ({"training.lerning_rate": "1"}, "training.lerning_rate; did you mean 'learning_rate'"),
        ({"train.epochs": "1"}, "sections are pruning, schedule, training"),
        ({"training.pattern": "2:4"}, "did you mean pruning.pattern"),
        ({"mask_type": "2:4"}, "pruning.pattern"),
        ({"init_lr": "1"}, "training.learning_rate"),
        ({"training": "fast"}, "left out, by training=null"),
        ({"training": "null"}, "training is missing"),
        ({"epochs": "soon"}, "training: epochs.*number.*'soon'"),
        ({"epochs": "true"}, "epochs"),
        ({"batch_size": "1.5"}, "batch_size.*1.5"),
        ({"batch_size": "0"}, "batch_size must be an integer of at least 1"),
        ({"hardness": "1.5"}, "hardness"),
        ({"precision": "int8"}, "precision.*int8"),
        ({"pattern": "2:3:x"}, "pattern must be one of"),
        ({"pattern": "2:16"}, "6 prunings.*are 4.*end_epoch = 2.5"),
        ({"end_epoch": "-1"}, "end_epoch"),
        ({"start_epoch": "2"}, "end before it starts"),
        ({"end_epoch": "9.5", "ladder": "[5, 2]", "update_frequency": "9.5"}, "training.epochs = 8, got 9.5"),
        ({"epochs": "1.5"}, "training.epochs = 1.5, got 1.5.*no step is left"),
        ({"epochs": "0"}, "training.epochs = 0, got 1.5"),
        ({"ladder": "[5, 4, 3]", "end_epoch": "1"}, "end at pattern 2:8"),
        ({"outputs": "[logits]"}, "start_logits"),
        ({"pruning": "null"}, "schedule needs a pruning section"),
        ({"keep": "[2, 1]"}, "ascending"),
        ({"keep": "[]"}, "ascending"),
        ({"keep": "three"}, "layer_drop: keep"),
        ({"lr_cycle_epochs": "1"}, "needs lr_schedule='cyclic_linear'"),
        ({"final_learning_rate": "1"}, "at most learning_rate"),
        ({"doc_stride": "384"}, "doc_stride must be below"),
        ({"lr_schedule": "cosine"}, "lr_schedule.*cosine"),
        ({"task": "ner"}, "task.*ner"),
    ],
)
def test_overrides_that_are_refused(overrides: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        load_recipe("gradual_row_28", overrides)
    assert "recipe 'gradual_row_28'" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"obs_kernels": None}, "obs_kernels must be 1"),
        ({"obs_kernels": 2}, "obs_kernels must be 1.*got 2"),
        ({"obs_kernels": True}, "obs_kernels must be 1"),
        ({"prunning": {}}, "unknown key prunning; did you mean 'pruning'"),
        ({"training_modifiers": []}, "here it is section training"),
        ({"pruning_modifiers": []}, "sections pruning and schedule"),
        ({"pattern": "2:8"}, "did you mean pruning.pattern"),
        ({"training": None}, "training is missing"),
        ({"training": []}, "must be a mapping"),
        ({"name": None}, "name is missing"),
        ({"name": 5}, "name: input should be a valid string, got 5"),
        ({"pruning": {"patern": "2:8"}}, "pruning.patern; did you mean 'pattern'"),
        ({"pruning": {"pattern": "2:8", "mask_structure": "2:4"}}, "pruning.mask_structure; here it is.*keeps n of m"),
        ({"pruning": {"pattern": "2:8", "num_recomputations": 4}}, "pruning.recomputations"),
        ({"pruning": {"pattern": "2:8", "refit_norms": True}}, "pruning.refit_norms; here it is nothing any more"),
        ({"pruning": {}}, "pruning: pattern is missing"),
        ({"schedule": {"start_epoch": 0}}, "schedule: end_epoch is missing"),
        ({"schedule": {"start_epoch": 0, "end_epoch": 1, "inter_func": "cubic"}}, "here it is schedule.shape"),
        ({"schedule": {"start_epoch": 0, "end_epoch": 1, "init_sparsity": 0.5}}, "schedule.initial_sparsity"),
        ({"training": {"num_epochs": 3}}, "here it is training.epochs"),
        ({"training": {"lr_func": "linear"}}, "training.lr_schedule"),
        ({"training": {"lr_schedule": "cyclic_linear"}}, "set training.lr_cycle_epochs"),
        ({"distillation": {"distill_output_keys": []}}, "distillation.outputs"),
        ({"distillation": {"temperature": 0}}, "temperature"),
    ],
)
def test_files_that_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        recipe_from_dict(values(**changes))
    if "name" not in changes:  # the file's own name
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(values(**changes)))
        with pytest.raises(ConfigError, match=words) as caught:
            load_recipe(path)
        assert "mine.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "no YAML of one document in line"),
        ("a: 1\n---\nb: 2", "no YAML of one document"),
        ("pruning_modifiers:\n  - !OBSPruningModifier\n    params: [x]", "tag !OBSPruningModifier.*sections pruning"),
        ("x: !!python/object/apply:os.system ['true']", "no YAML"),
        ("a: 1\na: 2", "key 'a' stands twice"),
        ("training: {epochs: 1, epochs: 2}", "key 'epochs' stands twice"),
        ("- 1", "must be a mapping"),
        ("", "must be a mapping"),
        ("5", "must be a mapping"),
        ("[" * 3000, "no YAML|nested too deeply"),
        ("a: &a [*a]", "aliases are not part"),
        ("a: &a {b: 1}\nc:\n  <<: *a", "aliases are not part"),
        ("#" * (1 << 20) + "\n", "at most"),
        ("\x00", "no YAML"),
    ],
)
def test_damaged_files(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_recipe(path)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_recipe(path)
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ConfigError, match="neither a file"):
        load_recipe(tmp_path / "folder.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2:8", "2:8"),
        ("64:2:8", "64:2:8"),
        ("1e-7", 1e-7),
        ("1.5e-4", 1.5e-4),
        (".5", 0.5),
        ("3", 3),
        ("-2", -2),
        ("1_000", 1000),
        ("2020-01-02", "2020-01-02"),
        ("010", 10),
        ("true", True),
        ("null", None),
        ("[5, 4]", [5, 4]),
        ("re:.*x", "re:.*x"),
        ("a: b: c", "a: b: c"),
        ("self", "self"),
        ("e5", "e5"),
        ("1e", "1e"),
    ],
)
def test_values_as_people_write_them(text: str, value: Any) -> None:
    found = read_value(text)
    assert found == value and type(found) is type(value)
    assert read_yaml(dump_yaml({"a": found}), "x") == {"a": value}


@pytest.mark.parametrize(
    "text", ["1e-7", "12", "2:8", "null", "yes", "", " x", "a: b", "ü", "line\nbreak", "- 1", "1.0"]
)
def test_texts_come_back_as_texts(text: str) -> None:
    assert read_yaml(dump_yaml({"a": text}), "x") == {"a": text} == yaml.safe_load(dump_yaml({"a": text}))


# records


def test_records_are_frozen_and_check_themselves() -> None:
    recipe = load_recipe("gradual_row_28")
    for record in (recipe, recipe.training, recipe.distillation, LayerDropSettings((1,))):
        with pytest.raises(dataclasses.FrozenInstanceError):
            record.name = "x"  # type: ignore[union-attr, misc]
    with pytest.raises(ConfigError, match="batch_size"):
        TrainingSettings(batch_size=0)
    with pytest.raises(ConfigError, match="warmup_ratio must be a number 0 to 1"):
        TrainingSettings(warmup_ratio=2)
    direct = Recipe("x", TrainingSettings(task="mnli"), distillation=DistillationSettings())
    assert direct.distillation is not None and direct.distillation.outputs == ("logits",)


def test_the_schema_is_that_of_the_records() -> None:
    schema = json_schema()
    parts = schema["$defs"]
    assert set(parts["TrainingSettings"]["properties"]) == {f.name for f in dataclasses.fields(TrainingSettings)}
    assert set(parts["OBSConfig"]["properties"]) == {f.name for f in dataclasses.fields(OBSConfig)}
    assert all(part["additionalProperties"] is False for part in (*parts.values(), schema))
    assert schema["properties"]["obs_kernels"] == {"const": 1}
    json.dumps(schema)


def test_records_need_neither_pydantic_nor_yaml() -> None:
    code = """
import sys
sys.modules["pydantic"] = sys.modules["yaml"] = None
from obs_kernels.errors import MissingDependencyError
from obs_kernels.recipes import Recipe, TrainingSettings, load_recipe, recipe_names
Recipe("x", TrainingSettings())
for call in (recipe_names, lambda: load_recipe("gradual_row_28")):
    try:
        call()
    except MissingDependencyError as error:
        assert "obs_kernels[recipes]" in str(error)
    else:
        raise AssertionError("without PyYAML")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_pydantic(monkeypatch: pytest.MonkeyPatch) -> None:
    from obs_kernels.recipes import read

    monkeypatch.setitem(sys.modules, "pydantic", None)
    read._adapters.cache_clear()
    with pytest.raises(MissingDependencyError, match=r"obs_kernels\[recipes\]"):
        recipe_from_dict(values())
    read._adapters.cache_clear()


# the command line, and recipes for a model


def test_list() -> None:
    done = cli()
    assert done.exit_code == 0 and len(done.stdout.splitlines()) == len(recipe_names())
    assert all(line.split()[0] == name for line, name in zip(done.stdout.splitlines(), recipe_names(), strict=True))
    found = json.loads(cli("--json").stdout)
    assert [row["name"] for row in found["recipes"]] == list(recipe_names()) and found["aliases"] == recipe_aliases()


def test_show(tmp_path: Path) -> None:
    done = cli("show", "oBERT28_squad.sh", "--recipe-args", "epochs=4", "--recipe-args", "lr_start_epoch=2")
    assert done.exit_code == 0
    path = tmp_path / "again.yaml"
    path.write_text(done.stdout)
    wanted = load_recipe("oneshot_oBERT_28", {"epochs": "4", "lr_start_epoch": "2"})
    assert load_recipe(path) == wanted
    found = json.loads(cli("show", path, "--json").stdout)
    assert recipe_from_dict(found["recipe"]) == wanted


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "oBERT_28_gradul"], "did you mean oBERT_28_gradual"),
        (["show", "gradual_row_28", "--recipe-args", "epochs"], "key=value"),
        (["show", "gradual_row_28", "--recipe-args", "=3"], "key=value"),
        (["show", "gradual_row_28", "--recipe-args", "epochs=3", "--recipe-args", "epochs=4"], "twice"),
        (["new", "--model", "no/such/model/at/all", "--pattern", "2:8"], "no configuration"),
        (["new", "--model", ".", "--pattern", "2:9:x"], "pattern must be one of"),
        (["new", "--model", ".", "--pattern", "2:8", "--out", "x.json"], "out must be a new .yaml file"),
    ],
)
def test_errors_of_the_command_line(arguments: list[str], words: str) -> None:
    done = cli(*arguments)
    assert done.exit_code == 1 and words in done.stderr and done.stdout == ""
    inside = json.loads(cli(*arguments, "--json").stdout)
    assert words in inside["error"]["message"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    folder = tmp_path_factory.mktemp("bert")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        architectures=["BertForQuestionAnswering"],
    )
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pattern", ["2:4", "2:8", "16:2:8", "2:16", "unstructured:0.9", "block4:0.8", "block8:0.75"])
def test_a_recipe_for_a_model_and_a_pattern(pattern: str, bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    done = cli("new", "--model", bert, "--pattern", pattern, "--out", path, "--recipe-args", "epochs=12")
    assert done.exit_code == 0, done.stderr
    recipe = load_recipe(path)
    assert recipe.pruning is not None and recipe.pruning.pattern == pattern and recipe.training.task == "squad"
    assert prunings(recipe)[-1][1] == pattern and len(prunings(recipe)) > 1 and recipe.training.epochs == 12
    assert recipe.training.max_length == 64 and recipe.training.doc_stride < 64
    before = path.read_text()
    assert cli("new", "--model", bert, "--pattern", "2:4", "--out", path).exit_code == 1
    assert path.read_text() == before, "an existing file is kept"
    assert cli("new", "--model", bert, "--pattern", "2:4", "--out", path, "--overwrite").exit_code == 0
    assert path.read_text() != before


def test_a_recipe_for_another_head(bert: Path) -> None:
    for task, outputs in (("mnli", ("logits",)), ("mlm", ("logits",)), ("qqp", ("logits",))):
        recipe = new_recipe(bert, "2:8", task=task, name="mine")
        assert recipe.name == "mine" and recipe.training.task == task and recipe.distillation is not None
        assert recipe.distillation.outputs == outputs
    shown = cli("new", "--model", bert, "--pattern", "2:8")
    assert recipe_from_dict(yaml.safe_load(shown.stdout)).name.endswith("_2_8")


@pytest.mark.parametrize(
    ("pattern", "changes", "error", "words"),
    [
        ("32:2:8", {}, ShapeNotSupportedError, "rows % 32 == 0"),
        ("2:32", {}, ShapeNotSupportedError, "cols % 32 == 0"),
        ("2:8", {"overrides": {"targets": "[Conv2d]"}}, ConfigError, "match nothing in BertForQuestionAnswering"),
        ("2:8", {"task": "ner"}, ConfigError, "task must be one of"),
        ("2:8", {"overrides": {"curvatur": "block"}}, ConfigError, "did you mean 'curvature'"),
    ],
)
def test_a_recipe_that_does_not_fit_the_model(
    pattern: str, changes: dict[str, Any], error: type, words: str, bert: Path
) -> None:
    with pytest.raises(error, match=words):
        new_recipe(bert, pattern, **changes)


def test_a_model_without_a_head(tmp_path: Path) -> None:
    import transformers

    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"names no head.*--task"):
        new_recipe(tmp_path, "2:8")


def test_a_recipe_for_another_model_is_refused_by_the_pruner() -> None:
    recipe = load_recipe("gradual_row_28", {"targets": "[re:.*encoder.*]"})
    assert recipe.pruning is not None
    with pytest.raises(ConfigError, match="match nothing in Sequential"):
        obs.OBSPruner(nn.Sequential(nn.Linear(8, 8)), recipe.pruning)


def test_data_of_the_package() -> None:
    """Every file is listed, and has its licence; base and names, nothing else."""
    folder = ROOT / "obs_kernels" / "recipes" / "data"
    index = read_yaml((folder / "index.yaml").read_text(), "index")
    assert {path.stem for path in folder.iterdir()} == {"index", *index["families"]}
    for path in folder.iterdir():
        assert path.suffix == ".yaml" and path.read_text().startswith("# SPDX-License-Identifier: Apache-2.0\n")
    for name in index["families"]:
        family = read_yaml((folder / f"{name}.yaml").read_text(), name)
        assert set(family) == {"base", "recipes"} and family["recipes"]
    assert "recipes/data/*.yaml" in (ROOT / "pyproject.toml").read_text()
