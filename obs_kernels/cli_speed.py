# SPDX-License-Identifier: Apache-2.0
"""``obs-kernels speed``: a whole model, sparse against the best dense, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from obs_kernels.cli_common import Debug, Json, errors, say, show
from obs_kernels.report.values import json_text


def speed(
    model: Annotated[str, typer.Option(help="bert-base, bert-large, minilm, tiny (random weights), or a folder.")],
    pattern: Annotated[
        str | None, typer.Option(help="64:2:8, or several with commas; left out: found in the folder's zeros.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Sequences a call, with commas.")] = "1,8,32",
    length: Annotated[str, typer.Option(help="Tokens a sequence, with commas.")] = "128,512",
    dtype: Annotated[str, typer.Option(help="bf16, f16 or f32, also as bfloat16 or fp16.")] = "bf16",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda[:n].")] = "auto",
    ways: Annotated[
        str | None,
        typer.Option(help="eager, graph, compiled, compiled graph, with commas; left out: all that the device has."),
    ] = None,
    layers: Annotated[
        str, typer.Option(help="all: pack every layer that fits; rows or measure: leave losing ones dense.")
    ] = "all",
    fuse_ffn: Annotated[
        str, typer.Option(help="Activation inside the first feed-forward product: token, feature (layout) or none.")
    ] = "feature",
    kernel_rows: Annotated[
        Path | None, typer.Option(help="Result of bench.run --op matmul to predict from; left out: the package's.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Budget of one way of one model in one cell.")] = 0.5,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file, for obs-kernels report.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Latency, memory and energy of a whole model: sparse beside the best dense, losing cells included."""
    batches, lengths = _numbers("--batch", batch), _numbers("--length", length)
    with errors(as_json, debug, speed):
        from obs_kernels.checks import LAYOUTS, check_choice
        from obs_kernels.files import write_text
        from obs_kernels.inference.job import run_speed_job

        check_choice("fuse_ffn", fuse_ffn, (*LAYOUTS, "none"))
        report = run_speed_job(
            model=model,
            patterns=_names(pattern) or (),
            batches=batches,
            lengths=lengths,
            dtype=dtype,
            device=device,
            ways=_names(ways),
            layers=layers,
            fuse_ffn=None if fuse_ffn == "none" else fuse_ffn,
            kernel_rows=kernel_rows,
            seconds=seconds,
            say=say,
        )
        if out is not None:
            write_text(out, json_text(report) + "\n")
        show(report, as_json)


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",")]


def _numbers(option: str, text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise typer.BadParameter(f"must be positive whole numbers with commas, got {text!r}", param_hint=option)
    return found
