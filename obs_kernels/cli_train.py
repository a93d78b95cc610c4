# SPDX-License-Identifier: Apache-2.0
"""``obs-kernels train``: options in, ``training.train_job`` does the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from obs_kernels.cli_common import Debug, Json, errors, say, show
from obs_kernels.cli_recipes import RecipeArgs, overrides_of


def train_model(
    model: Annotated[str, typer.Option(help="Folder or hub name of the model to train.")],
    data: Annotated[
        str, typer.Option(help="Samples to evaluate on: a file of the task, or a hub name owner/name[:configuration].")
    ],
    recipe: Annotated[str, typer.Option(help="Name (see obs-kernels recipes) or YAML file.")],
    out: Annotated[Path, typer.Option(help="Folder to write: dense/, packed/, report.*")],
    train: Annotated[
        str | None, typer.Option(help="Samples to train on; left out: the hub name's train split.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Folder or hub name, self (the model as it comes), disable.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="squad, mnli, qqp or mlm; left out: the recipe's.")] = None,
    recipe_args: RecipeArgs = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    max_train: Annotated[int | None, typer.Option(help="Train on that many samples, drawn by the seed.")] = None,
    max_eval: Annotated[int | None, typer.Option(help="Evaluate on that many samples, drawn by the seed.")] = None,
    save_steps: Annotated[int | None, typer.Option(help="Steps between checkpoints; left out: one an epoch.")] = None,
    logging_steps: Annotated[int, typer.Option(help="Steps between two lines of numbers.")] = 50,
    report_to: Annotated[str, typer.Option(help="Tracker of transformers, such as tensorboard.")] = "none",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run left.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in OUT.work.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a model by a recipe and prune it meanwhile; write the folder OUT. Several GPUs: run it by torchrun."""
    with errors(as_json, debug, train_model):
        from obs_kernels.recipes import load_recipe
        from obs_kernels.training.train_job import run_train_job

        overrides = overrides_of(recipe_args) | ({} if task is None else {"training.task": task})
        report = run_train_job(
            model=model,
            data=data,
            recipe=load_recipe(recipe, overrides),
            out=out,
            train=train,
            teacher=teacher,
            device=device,
            max_train=max_train,
            max_eval=max_eval,
            save_steps=save_steps,
            logging_steps=logging_steps,
            report_to=report_to,
            overwrite=overwrite,
            resume=resume,
            say=say,
        )
        if report.get("accuracy"):  # of the first process
            show(report, as_json)
