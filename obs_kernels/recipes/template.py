# SPDX-License-Identifier: Apache-2.0
"""A recipe to start from, for a model and a pattern: what the shipped ones do, checked against the model's shapes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from obs_kernels.errors import ConfigError, MissingDependencyError
from obs_kernels.patterns import Pattern, parse_pattern
from obs_kernels.pruning.find_layers import find_layers
from obs_kernels.pruning.schedule import structure_ladder
from obs_kernels.recipes.model import TASK_OUTPUTS, Recipe
from obs_kernels.recipes.read import recipe_from_dict, with_overrides
from obs_kernels.recipes.shipped import load_recipe

COUNTS_BASE, THRESHOLD_BASE = "gradual_row_28", "10epochs_unstructured90_squad"
HEADS = {
    "squad": "AutoModelForQuestionAnswering",
    "mnli": "AutoModelForSequenceClassification",
    "qqp": "AutoModelForSequenceClassification",
    "mlm": "AutoModelForMaskedLM",
}
TASK_OF_HEAD = {"QuestionAnswering": "squad", "SequenceClassification": "mnli", "MaskedLM": "mlm"}


def new_recipe(
    model: str | os.PathLike[str],
    pattern: str | Pattern,
    *,
    task: str | None = None,
    name: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Recipe:
    """A recipe that prunes ``model`` to ``pattern`` step by step while it is trained.

    n:m and v:n:m take row curvature, layer by layer, and counts that fall at half epochs; unstructured and block
    patterns the block Fisher, one threshold and a cubic schedule.

    Args:
        model: folder or hub name; its configuration is read, no weight.
        pattern: where the schedule ends.
        task: "squad", "mnli", "qqp" or "mlm"; None goes by the head that the configuration names.
        name: of the recipe; None is made of model and pattern.
        overrides: see ``load_recipe``.

    Raises:
        ConfigError: no such model, no head that tells the task, targets that match nothing, a bad value.
        ShapeNotSupportedError: a layer that the pattern does not fit. MissingDependencyError: transformers is missing.
    """
    parsed: Pattern = parse_pattern(pattern)
    config = _model_config(os.fspath(model))
    chosen = task or _task_of(config, os.fspath(model))
    if chosen not in TASK_OUTPUTS:
        raise ConfigError(f"task must be one of {', '.join(TASK_OUTPUTS)}, got {chosen!r}")
    changes = _changes(parsed, chosen, config) | {
        "name": name or re.sub(r"[^A-Za-z0-9.]+", "_", f"{Path(os.fspath(model)).name}_{parsed}").strip("_"),
        "description": f"{parsed} step by step while the model is trained for {chosen}",
    }
    values = load_recipe(COUNTS_BASE if parsed.fixed_count else THRESHOLD_BASE).to_dict()
    recipe = recipe_from_dict(with_overrides(with_overrides(values, changes), overrides or {}), "new recipe")
    if recipe.pruning is not None:
        find_layers(_without_weights(config, HEADS[recipe.training.task]), recipe.pruning)
    return recipe


def _changes(pattern: Pattern, task: str, config: Any) -> dict[str, Any]:
    """What differs from the shipped recipe that is taken as a base."""
    positions = int(getattr(config, "max_position_embeddings", None) or 512)
    length = min({"squad": 384, "mlm": 512}.get(task, 128), positions)
    changes: dict[str, Any] = {
        "pruning.pattern": str(pattern),
        "training.task": task,
        "training.max_length": length,
        "training.doc_stride": min(128, length // 3),
        "distillation.outputs": list(TASK_OUTPUTS[task]),
        "distillation.teacher": "self",
        "training.precision": "bf16",
    }
    if pattern.fixed_count:
        ladder = structure_ladder(pattern)
        changes["schedule.ladder"], changes["schedule.end_epoch"] = list(ladder), (len(ladder) - 1) * 0.5
        return changes
    changes["pruning.fisher_block_size"] = None  # the pattern's own
    changes["schedule.initial_sparsity"] = round(pattern.sparsity / 2, 4)
    return changes


def _model_config(model: str) -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingDependencyError(
            "transformers is needed to read a model's configuration; pip install 'obs_kernels[train]'"
        ) from None
    try:
        return transformers.AutoConfig.from_pretrained(model)
    except Exception as error:  # OSError, ValueError, KeyError and more, for what is missing or damaged
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"model {model!r} has no configuration that transformers reads ({first}); check the folder or the hub name"
        ) from None


def _task_of(config: Any, model: str) -> str:
    for architecture in getattr(config, "architectures", None) or ():
        for head, task in TASK_OF_HEAD.items():
            if architecture.endswith(f"For{head}"):
                return task
    raise ConfigError(f"model {model!r} names no head that tells the task; give --task {'|'.join(TASK_OUTPUTS)}")


def _without_weights(config: Any, head: str) -> nn.Module:
    import transformers

    with torch.device("meta"):
        model: nn.Module = getattr(transformers, head).from_config(config)
    return model
