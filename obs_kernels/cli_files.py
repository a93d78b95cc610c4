# SPDX-License-Identifier: Apache-2.0
"""``obs-kernels compress`` and ``convert``: model folders from one form into another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from obs_kernels.cli_common import Debug, Json, Overwrite, errors, show
from obs_kernels.cli_words import in_option_words

Source = Annotated[Path, typer.Argument(help="Folder of a transformers model.")]
Out = Annotated[Path, typer.Option(help="Folder to write; it appears whole.")]
FoundPattern = Annotated[str | None, typer.Option(help="Pattern of a dense folder; left out: found in the zeros.")]
DType = Annotated[str | None, typer.Option(help="bf16, f16 or f32, also as bfloat16 or fp16; left out: as it is.")]
ShardSize = Annotated[str, typer.Option(help="Largest file of weights, as 5GB or 500MB.")]


def compress(
    source: Source,
    out: Out,
    pattern: FoundPattern = None,
    tokens: Annotated[
        int | None, typer.Option(help="Batch x length of a call: layers that lose there stay dense.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time the layers here instead of reading the measured rows.")
    ] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read the folder back, compare all weights.")] = False,
    device: Annotated[str, typer.Option(help="For --measure: auto, cpu or cuda[:n].")] = "auto",
    dtype: DType = None,
    max_shard_size: ShardSize = "5GB",
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Pack a dense pruned model folder: the checkpoint of sparse layers. Layers that stay dense are listed with why."""
    with errors(as_json, debug, compress):
        from obs_kernels.sparse.convert import compress_folder
        from obs_kernels.training.models import pick_device

        report = compress_folder(
            source,
            out,
            pattern=pattern,
            tokens=tokens,
            measure=measure,
            device=pick_device(device) if measure else "cpu",
            dtype=dtype,
            verify=verify,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
        )
        if not as_json:  # for who reads them: what to type instead
            report["dense_layers"] = {k: in_option_words(v, compress) for k, v in report["dense_layers"].items()}
        show(report, as_json)


def convert(
    source: Source,
    out: Out,
    to: Annotated[str, typer.Option(help="packed, dense (zeros, any tool reads it) or semi-structured (torch's).")],
    pattern: FoundPattern = None,
    dtype: DType = None,
    max_shard_size: ShardSize = "5GB",
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Turn a model folder into another form; sizes before and after are reported."""
    with errors(as_json, debug, convert):
        from obs_kernels.sparse.convert import convert as run

        report = run(
            source,
            out,
            to,
            pattern=pattern,
            dtype=dtype,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
        )
        show(report, as_json)
