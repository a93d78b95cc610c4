# SPDX-License-Identifier: Apache-2.0
"""``obs-kernels damping``: one-shot pruning over a grid of dampings and numbers of gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from obs_kernels.cli_common import BatchSize, Data, Debug, Device, Json, MaxEval, Model, Train, errors, say, show
from obs_kernels.report.values import json_text

T = TypeVar("T")


def damping(
    model: Model,
    data: Data,
    train: Train = None,
    pattern: Annotated[str | None, typer.Option(help="Patterns with commas; left out: unstructured 0.5, 0.7.")] = None,
    num_grads: Annotated[str | None, typer.Option(help="Numbers with commas; left out: 256 to 2048.")] = None,
    damp: Annotated[str | None, typer.Option(help="Absolute dampings with commas; left out: 1e-4 to 1e-8.")] = None,
    method: Annotated[str, typer.Option(help="combinatorial, pairwise, greedy or diagonal.")] = "combinatorial",
    update: Annotated[str, typer.Option(help="joint, single or none.")] = "joint",
    fisher_block_size: Annotated[int | None, typer.Option(help="D; left out: the pattern's own.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    device: Device = "auto",
    batch_size: BatchSize = 32,
    max_eval: MaxEval = None,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Damping search: F1 after one-shot pruning for each damping; gradients are collected once for each number."""
    counts, values = _list("--num-grads", num_grads, int), _list("--damp", damp, float)
    with errors(as_json, debug, damping):
        from obs_kernels.files import write_text
        from obs_kernels.training.damping_search import DAMPS, NUM_GRADS, PATTERNS, run_damping_job

        report = run_damping_job(
            model=model,
            data=data,
            train=train,
            patterns=_list("--pattern", pattern, str) or PATTERNS,
            num_grads=counts or NUM_GRADS,
            damps=values or DAMPS,
            method=method,
            update=update,
            fisher_block_size=fisher_block_size,
            seed=seed,
            device=device,
            max_eval=max_eval,
            batch_size=batch_size,
            on_row=lambda row: say(_line(row)),
        )
        if out is not None:
            write_text(out, json_text(report) + "\n")
        show(report, as_json)


def _line(row: dict[str, Any]) -> str:
    scored = f"F1 {row['f1']:.2f}" if "f1" in row else f"failed: {row['failed']}"
    return f"{row['pattern']}, {row['num_grads']} gradients, damp {row['damp']:g}: {scored}"


def _list(option: str, text: str | None, kind: Callable[[str], T]) -> list[T] | None:
    if text is None:
        return None
    try:
        return [kind(part.strip()) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"must be numbers with commas, got {text!r}", param_hint=option) from None
