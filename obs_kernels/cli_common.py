# SPDX-License-Identifier: Apache-2.0
"""What all commands share: options, errors, and how a report is shown. Imported by ``cli`` once typer is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from obs_kernels.cli_words import in_option_words
from obs_kernels.errors import ObsKernelsError
from obs_kernels.report.values import json_text

Model = Annotated[str, typer.Option(help="Folder or hub name of a question answering model.")]
Data = Annotated[str, typer.Option(help="Questions to evaluate on: SQuAD v1.1 .json[.gz], or a hub name.")]
Train = Annotated[str | None, typer.Option(help="Questions for the gradients: a file, or a hub name.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda[:n].")]
BatchSize = Annotated[int, typer.Option(help="Windows a batch.")]
MaxEval = Annotated[int | None, typer.Option(help="Evaluate on that many questions, chosen by the seed.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a folder of an earlier run.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout, and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@contextmanager
def errors(as_json: bool, debug: bool, command: Callable[..., Any]) -> Iterator[None]:
    """Errors of the package, and of the system, as one block on stderr and exit code 1; Ctrl-C as a line and 130.

    They speak of the options of ``command`` as those are typed.
    """
    try:
        yield
    except (ObsKernelsError, OSError) as error:
        if debug or isinstance(error, BrokenPipeError):
            raise
        message = in_option_words(str(error), command)
        typer.echo(f"{type(error).__name__}: {message}", err=True)
        if as_json:
            typer.echo(json_text({"error": {"type": type(error).__name__, "message": message}}))
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("interrupted; nothing was left half-written", err=True)
        raise typer.Exit(130) from None


def show(report: dict[str, Any], as_json: bool) -> None:
    """The report of a job on stdout: one JSON object, or tables."""
    if as_json:
        typer.echo(json_text(report))
        return
    from obs_kernels.report.tables import print_report

    print_report(report)


def say(line: str) -> None:
    """A line of progress, on stderr."""
    typer.echo(line, err=True)
