# SPDX-License-Identifier: Apache-2.0
"""What the commands of ``obs-kernels`` share: options, how a report is shown, how an error ends a command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from obs_kernels.errors import ObsKernelsError
from obs_kernels.report.values import json_text

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout, and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def show(report: dict[str, Any], as_json: bool) -> None:
    """The report of a job on stdout: one JSON object, or tables."""
    if as_json:
        typer.echo(json_text(report))
        return
    from obs_kernels.report.tables import print_report

    print_report(report)


@contextmanager
def errors(as_json: bool, debug: bool) -> Iterator[None]:
    """Errors of the package, and of the system, as one block on stderr and exit code 1; Ctrl-C as a line and 130."""
    try:
        yield
    except (ObsKernelsError, OSError) as error:
        if debug or isinstance(error, BrokenPipeError):
            raise
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        if as_json:
            typer.echo(json_text({"error": {"type": type(error).__name__, "message": str(error)}}))
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("interrupted; nothing was left half-written", err=True)
        raise typer.Exit(130) from None


def say(line: str) -> None:
    """A line on stderr."""
    typer.echo(line, err=True)
