# SPDX-License-Identifier: Apache-2.0
"""Recipes from plain values: unknown keys by name, types by pydantic, meaning by the records themselves."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Any

from obs_kernels.errors import ConfigError, MissingDependencyError
from obs_kernels.pruning.config import FOREIGN_KEYS, REMOVED, OBSConfig, without_removed
from obs_kernels.pruning.schedule import PruningSchedule
from obs_kernels.recipes.model import (
    FORMAT_VERSION,
    DistillationSettings,
    LayerDropSettings,
    Recipe,
    TrainingSettings,
)
from obs_kernels.recipes.yaml_text import read_value

SECTIONS: dict[str, type] = {
    "pruning": OBSConfig,
    "schedule": PruningSchedule,
    "training": TrainingSettings,
    "distillation": DistillationSettings,
    "layer_drop": LayerDropSettings,
}
TEXTS = ("name", "description")

# names of other tools, explained instead of accepted in silence
FOREIGN = {
    **{key: f"pruning.{value}" for key, value in FOREIGN_KEYS.items()},
    **{key: FOREIGN_KEYS[key] for key in REMOVED},
    "sparsity": "pruning.pattern, for example 'unstructured:0.9' or 'block4:0.8'",
    "training_modifiers": "section training",
    "pruning_modifiers": "sections pruning and schedule",
    "distillation_modifiers": "section distillation",
    "constant_modifiers": "schedule.shape: constant",
    "regularization_modifiers": "training.weight_decay",
    "quantization_modifiers": "nothing: quantisation is not a part of a recipe, masks survive a training that does it",
    "layer_pruning_modifiers": "section layer_drop",
    "prune": "section pruning",
    "init_sparsity": "schedule.initial_sparsity",
    "inter_func": "schedule.shape",
    "nm_decay": "schedule.ladder, with schedule.shape: structure_decay",
    "leave_enabled": "nothing: masks always stay on",
    "grad_sampler_kwargs": "training.gradient_batch_size and pruning.gradients",
    "num_epochs": "training.epochs",
    "init_lr": "training.learning_rate",
    "final_lr": "training.final_learning_rate",
    "lr_func": "training.lr_schedule",
    "cycle_epochs": "training.lr_cycle_epochs",
    "distill_output_keys": "distillation.outputs",
    "teacher_input_keys": "nothing: the teacher sees what the model sees",
    "one_shot": "a schedule with one pruning, and training.epochs: 0",
    "eval": "nothing: values are not computed here",
}


def recipe_from_dict(values: Any, source: str = "recipe") -> Recipe:
    """The recipe of plain ``values``, the inverse of ``Recipe.to_dict``; ``source`` names it in errors.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a bad value, or parts that do not go together.
        MissingDependencyError: pydantic is not installed.
    """
    try:
        return _recipe(values)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def with_overrides(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` of a recipe with others in their place, by dotted key ("schedule.end_epoch") or by a short one that
    only one section knows ("end_epoch"). Texts are read as YAML values; null for a section leaves it out.

    Raises:
        ConfigError: an unknown key, or a short key of several sections.
    """
    found = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    for key, value in overrides.items():
        section, name = _place(key.strip())
        read = read_value(value) if isinstance(value, str) else value
        if name is None:
            if section not in TEXTS and read is not None:
                raise ConfigError(f"section {section!r} can only be left out, by {section}=null; got {value!r}")
            if section in TEXTS:
                found[section] = str(value)
            else:
                found.pop(section, None)
        else:
            found[section] = (found.get(section) or {}) | {name: read}
    return found


@lru_cache(maxsize=1)
def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors."""
    schema: dict[str, Any] = _adapters()[Recipe].json_schema()
    for part in schema["$defs"].values():
        part["additionalProperties"] = False
    schema["properties"] = {"obs_kernels": {"const": FORMAT_VERSION}} | schema["properties"]
    return schema


def _recipe(values: Any) -> Recipe:
    if not isinstance(values, Mapping):
        raise ConfigError(f"a recipe is a mapping with the sections {', '.join(SECTIONS)}, got {type(values).__name__}")
    version = values.get("obs_kernels")
    _check_keys(values, ("obs_kernels", *TEXTS, *SECTIONS), "")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise ConfigError(f"obs_kernels must be {FORMAT_VERSION}, the version of the format, got {version!r}")
    parts: dict[str, Any] = {key: values[key] for key in TEXTS if key in values}
    for key, kind in SECTIONS.items():
        section = values.get(key)
        if section is None:
            continue
        if not isinstance(section, Mapping):
            raise ConfigError(f"section {key} must be a mapping of its fields, got {section!r}")
        if kind is OBSConfig:
            section = without_removed(section)
        known = [field.name for field in fields(kind)]
        _check_keys(section, known, f"{key}.")
        try:
            parts[key] = OBSConfig.from_dict(dict(section)) if kind is OBSConfig else _validated(kind, dict(section))
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from None
    for key in ("name", "training"):
        if key not in parts:
            raise ConfigError(f"{key} is missing; add it, as in `obs-kernels recipes show 30epochs_dense_squad`")
    recipe: Recipe = _validated(Recipe, parts)
    return recipe


def _check_keys(values: Mapping[Any, Any], known: Any, prefix: str) -> None:
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown key {prefix}{key}; {_advice(key, list(known))}")


def _advice(key: Any, known: list[str]) -> str:
    text = str(key)
    if text in FOREIGN:
        return f"here it is {FOREIGN[text]}"
    owners = [f"{section}.{text}" for section, kind in SECTIONS.items() if text in {f.name for f in fields(kind)}]
    if owners:
        return f"did you mean {' or '.join(owners)}?"
    near = difflib.get_close_matches(text, known, 1) or difflib.get_close_matches(text, [*SECTIONS, *TEXTS], 1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def _place(key: str) -> tuple[str, str | None]:
    """Section and field of a key of ``--recipe-args``; no field for a whole section, the name or the description."""
    by_section = {section: [field.name for field in fields(kind)] for section, kind in SECTIONS.items()}
    if key in SECTIONS or key in TEXTS:
        return key, None
    section, dot, name = key.partition(".")
    if dot:
        if section not in by_section:
            raise ConfigError(f"unknown key {key}; sections are {', '.join(by_section)}")
        _check_keys({name: None}, by_section[section], f"{section}.")
        return section, name
    owners = [section for section, names in by_section.items() if key in names]
    if len(owners) > 1:
        choices = " or ".join(f"{owner}.{key}" for owner in owners)
        raise ConfigError(f"key {key} is of several sections; write {choices}")
    if not owners:
        everything = sorted({name for names in by_section.values() for name in names})
        raise ConfigError(f"unknown key {key}; {_advice(key, everything)}")
    return owners[0], key


def _validated(kind: type, values: dict[str, Any]) -> Any:
    adapter = _adapters()[kind]
    from pydantic import ValidationError

    try:
        return adapter.validate_python(values)
    except ValidationError as error:
        raise ConfigError(_words(error.errors()[0])) from None


def _words(error: Any) -> str:
    """One error of pydantic in the manner of this package."""
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return str(cause)
    place = ".".join(str(part) for part in error["loc"] if not str(part).startswith(("function-", "tuple[", "list[")))
    if error["type"] == "missing":
        return f"{place} is missing; add it"
    return f"{place}: {error['msg'][:1].lower()}{error['msg'][1:]}, got {error['input']!r}"


@lru_cache(maxsize=1)
def _adapters() -> dict[type, Any]:
    try:
        from pydantic import TypeAdapter
    except ImportError:
        raise MissingDependencyError(
            "recipes need PyYAML and pydantic, which are not installed. Fix: pip install 'obs_kernels[recipes]'"
        ) from None
    return {kind: TypeAdapter(kind) for kind in (Recipe, *SECTIONS.values()) if kind is not OBSConfig}
