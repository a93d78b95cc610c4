# SPDX-License-Identifier: Apache-2.0
"""The recipes that come with the package, and how a name or a path becomes a recipe.

A file of ``data`` is a family: ``base`` is a recipe, and each of ``recipes`` is a name with what differs from it, by
dotted keys, as in ``--recipe-args``.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from obs_kernels.errors import ConfigError
from obs_kernels.recipes.model import Recipe
from obs_kernels.recipes.read import recipe_from_dict, with_overrides
from obs_kernels.recipes.yaml_text import read_yaml

SUFFIXES = (".yaml", ".yml", ".sh", ".py", ".ipynb")
"""Endings of files of the reference systems, whose names are names of recipes here."""


def load_recipe(name_or_path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe by name (``recipe_names``, ``recipe_aliases``) or from a YAML file.

    Args:
        name_or_path: a name, also with the ending of a file of the reference systems; or an existing file.
        overrides: values in place of the recipe's own, by dotted key ("schedule.end_epoch") or by a short one that only
            one section knows; texts are read as on the command line.

    Raises:
        ConfigError: no such recipe (with the nearest name), an unknown key, a bad value, or parts that do not go
        together. MissingDependencyError: PyYAML or pydantic is not installed.
    """
    text = os.fspath(name_or_path)
    path = Path(text).expanduser()
    if path.suffix in (".yaml", ".yml") and path.is_file():
        values = _file_values(path)
    else:
        values = _shipped_values(text)
    source = f"recipe {text!r}"
    try:
        values = with_overrides(values, overrides or {})
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    return recipe_from_dict(values, source)


def recipe_names() -> tuple[str, ...]:
    """Names of the recipes that come with the package, in the order of their families."""
    return tuple(name for name, _ in _families().items())


def recipe_aliases() -> dict[str, str]:
    """Other names, of the scripts and modifiers of the reference systems and spellings of them: alias to name."""
    return dict(_index()["aliases"])


def _file_values(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {str(path)!r} cannot be read ({error}); check the path") from None
    values = read_yaml(text, f"recipe {str(path)!r}")
    if isinstance(values, Mapping):
        return {"name": path.stem, **values}
    raise ConfigError(f"recipe {str(path)!r} must be a mapping with sections, got {type(values).__name__}")


def _shipped_values(text: str) -> dict[str, Any]:
    name = text
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    index = _index()
    if name in index["broken"]:
        raise ConfigError(f"recipe {text!r}: {index['broken'][name]}")
    found = _families().get(index["aliases"].get(name, name))
    if found is None:
        near = difflib.get_close_matches(name, [*_families(), *index["aliases"]], 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`obs-kernels recipes` lists them"
        raise ConfigError(f"recipe {text!r} is neither a file nor a name of a recipe; {hint}")
    return found


@lru_cache(maxsize=1)
def _families() -> dict[str, dict[str, Any]]:
    """{name: values} of every recipe of the package."""
    found: dict[str, dict[str, Any]] = {}
    for file in _index()["families"]:
        family = read_yaml(_data(f"{file}.yaml"), file)
        base = family["base"]
        for name, changes in family["recipes"].items():
            found[name] = with_overrides({"obs_kernels": 1, "name": name, "description": "", **base}, changes)
    return found


@lru_cache(maxsize=1)
def _index() -> dict[str, Any]:
    """Families in the order of the list, aliases, and names that are not offered with the reason."""
    index: dict[str, Any] = read_yaml(_data("index.yaml"), "index")
    return index


def _data(name: str) -> str:
    return files("obs_kernels.recipes").joinpath("data", name).read_text(encoding="utf-8")
