# SPDX-License-Identifier: Apache-2.0
"""``obs-kernels recipes``: list the recipes of the package, show one, write one for a model and a pattern."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from obs_kernels.cli_common import Debug, Json, errors, say
from obs_kernels.errors import ConfigError
from obs_kernels.report.values import json_text

app = typer.Typer(help="List recipes, show one, write one.", rich_markup_mode=None)

RecipeArgs = Annotated[
    list[str] | None,
    typer.Option(
        "--recipe-args", help="key=value in place of the recipe's own, such as learning_rate=1e-4; may be repeated."
    ),
]


@app.callback(invoke_without_command=True)
def listing(context: typer.Context, as_json: Json = False, debug: Debug = False) -> None:
    """Recipes by name, one line each."""
    if context.invoked_subcommand is not None:  # what was asked for before its name holds for it too
        context.default_map = {context.invoked_subcommand: {"as_json": as_json, "debug": debug}}
        return
    with errors(as_json, debug, listing):
        from obs_kernels.recipes import load_recipe, recipe_aliases, recipe_names

        found = [load_recipe(name) for name in recipe_names()]
        if as_json:
            rows = [{"name": recipe.name, "description": recipe.description} for recipe in found]
            typer.echo(json_text({"job": "recipes", "recipes": rows, "aliases": recipe_aliases()}))
            return
        width = max(len(recipe.name) for recipe in found)
        for recipe in found:
            typer.echo(f"{recipe.name:<{width}}  {recipe.description}")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Name of a recipe, or a YAML file.")],
    recipe_args: RecipeArgs = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The whole recipe as YAML, every setting written out."""
    with errors(as_json, debug, show):
        from obs_kernels.recipes import load_recipe

        recipe = load_recipe(name, overrides_of(recipe_args))
        if as_json:
            typer.echo(json_text({"job": "recipes show", "recipe": recipe.to_dict()}))
        else:
            typer.echo(recipe.to_yaml(), nl=False)


@app.command()
def new(
    model: Annotated[str, typer.Option(help="Folder or hub name of the model; its configuration alone is read.")],
    pattern: Annotated[str, typer.Option(help="2:4, 2:8, 64:2:8, unstructured:0.9, block4:0.8; n:m keeps n of m.")],
    task: Annotated[str | None, typer.Option(help="squad, mnli, qqp or mlm; left out: by the model's head.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the recipe; left out: by model and pattern.")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; left out: stdout.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    recipe_args: RecipeArgs = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """A recipe that prunes MODEL to PATTERN step by step, to start from; shapes and targets are checked."""
    with errors(as_json, debug, new):
        from obs_kernels.files import write_text
        from obs_kernels.recipes.template import new_recipe

        if out is not None and (out.suffix not in (".yaml", ".yml") or (out.exists() and not overwrite)):
            raise ConfigError(
                f"out must be a new .yaml file, got {str(out)!r}; give another name"
                + (", or --overwrite" if out.exists() else "")
            )
        recipe = new_recipe(model, pattern, task=task, name=name, overrides=overrides_of(recipe_args))
        if out is not None:
            write_text(out, recipe.to_yaml())
            say(f"written: {out}")
        if as_json:
            written = None if out is None else str(out)
            typer.echo(json_text({"job": "recipes new", "written": written, "recipe": recipe.to_dict()}))
        elif out is None:
            typer.echo(recipe.to_yaml(), nl=False)


@app.command()
def schema(as_json: Json = False, debug: Debug = False) -> None:
    """JSON schema of a recipe, for editors."""
    with errors(as_json, debug, schema):
        from obs_kernels.recipes import json_schema

        typer.echo(json_text(json_schema()))


def overrides_of(recipe_args: list[str] | None) -> dict[str, Any]:
    """{key: text} of ``--recipe-args``, each ``key=value``."""
    found: dict[str, Any] = {}
    for text in recipe_args or []:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--recipe-args must be key=value, got {text!r}; for example learning_rate=1e-4")
        if key.strip() in found:
            raise ConfigError(f"--recipe-args gives {key.strip()} twice; give it once")
        found[key.strip()] = value.strip()
    return found
