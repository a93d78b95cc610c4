# SPDX-License-Identifier: Apache-2.0
"""``obs-kernels``: eval, doctor, demo, report, and the commands of the other ``cli_`` modules.

A thin layer over ``obs_kernels.training``: options in, tables out. With ``--json`` stdout holds one JSON object and
nothing else; progress goes to stderr. Exit codes: 0 fine, 1 failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

try:
    import typer
except ImportError:
    sys.exit("obs-kernels needs typer and rich, which are not installed. Fix: pip install 'obs_kernels[cli]'")

from obs_kernels import cli_recipes, cli_train
from obs_kernels.cli_common import (
    BatchSize,
    Data,
    Debug,
    Device,
    Json,
    MaxEval,
    Model,
    Overwrite,
    Train,
    errors,
    say,
    show,
)
from obs_kernels.cli_damping import damping
from obs_kernels.cli_files import compress, convert
from obs_kernels.cli_prune import plan, prune
from obs_kernels.cli_speed import speed

app = typer.Typer(
    name="obs-kernels",
    help="Second-order structured pruning of transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(cli_recipes.app, name="recipes")
app.command("train")(cli_train.train_model)
for _command in (prune, plan, compress, convert, speed, damping):
    app.command()(_command)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of ``obs-kernels``; ends the process with the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a half-written folder is removed here too
    try:
        app(None if arguments is None else list(arguments), prog_name="obs-kernels")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"obs-kernels {getattr(sys.modules['obs_kernels'], '__version__', 'unknown')}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


@app.command(name="eval")
def evaluate(
    model: Model,
    data: Data,
    baseline: Annotated[str | None, typer.Option(help="The model before pruning, for the share of its F1.")] = None,
    device: Device = "auto",
    batch_size: BatchSize = 32,
    max_eval: MaxEval = None,
    seed: Annotated[int, typer.Option(help="Chooses the questions of --max-eval.")] = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Exact match and F1 of a dense or packed model, by the official SQuAD v1.1 metric."""
    with errors(as_json, debug, evaluate):
        from obs_kernels.training.prune_job import run_eval_job

        report = run_eval_job(
            model=model,
            data=data,
            baseline=baseline,
            device=device,
            max_eval=max_eval,
            batch_size=batch_size,
            seed=seed,
            say=say,
        )
        show(report, as_json)


@app.command()
def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """Versions, GPUs, backends with reasons, and a run of each op against brute force. Exit code 1 if one fails."""
    with errors(as_json, debug, doctor):
        found = _examine()
        show(found, as_json)
        if not found["ok"]:
            raise typer.Exit(1)


@app.command()
def demo(
    model: Annotated[str | None, typer.Option(help="Folder or hub name; left out: the model of the package.")] = None,
    data: Annotated[str | None, typer.Option(help="Questions to evaluate on; left out: generated ones.")] = None,
    train: Train = None,
    recover: Annotated[
        bool, typer.Option("--recover", help="Also fine-tune the pruned model for a minute, masks held.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for report.json, report.md, report.html.")] = None,
    device: Device = "auto",
    max_eval: Annotated[int | None, typer.Option(help="Evaluate on the first so many questions.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Prune a small model to several patterns by each method, compare, pack, reload. No network, no files needed."""
    with errors(as_json, debug, demo):
        from obs_kernels.report.tables import CellRows, console
        from obs_kernels.training.demo import run_demo
        from obs_kernels.training.model_folder import write_reports
        from obs_kernels.training.prune_job import demo_report

        rows = CellRows(console(sys.stderr if as_json else sys.stdout))
        with _folder(out, overwrite=overwrite) as folder:
            report = run_demo(
                model=model,
                data=data,
                train=train,
                recover=recover,
                out=folder,
                device=device,
                max_eval=max_eval,
                on_row=lambda cell: rows.add(cell.to_dict()),
            )
            report = demo_report(report, device)
            if folder is not None:
                write_reports(folder, report)
        show(report, as_json)


@app.command()
def report(
    files: Annotated[
        list[Path], typer.Argument(help="Folders of prune; JSON files of prune, eval, speed, python -m bench.run.")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder to write: report.md, report.html, plots with CSV.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """One page of pruning, accuracy and speed of a model, or of bench results. Other JSON files are named, left out."""
    with errors(as_json, debug, report):
        from obs_kernels.run_report import gather, write

        found = gather(files)
        if out is not None:
            found["written"] = [str(path) for path in write(out, found)]
        show(found, as_json)


@contextmanager
def _folder(out: Path | None, *, overwrite: bool) -> Iterator[Path | None]:
    """A folder that becomes ``out`` when the block ends well; None for None."""
    if out is None:
        yield None
        return
    from obs_kernels.files import whole_folder
    from obs_kernels.training.model_folder import check_out

    with whole_folder(check_out(out, overwrite=overwrite)) as folder:
        yield folder


def _examine() -> dict[str, Any]:
    import torch

    from obs_kernels import _ext
    from obs_kernels.ops import self_check
    from obs_kernels.training.environment import environment

    available = torch.cuda.is_available()
    kind = "cuda" if available else "cpu"
    checks = [
        result.to_dict() for device in ("cpu", "cuda")[: 1 + available] for result in self_check.check_ops(device)
    ]
    return {
        "job": "doctor",
        "ok": all(check["ok"] for check in checks),
        "environment": environment(kind),
        "gpus": _gpus() if available else [],
        "cuda_of_torch": torch.version.cuda,
        "compiled": _ext.build_info(),
        "device_type": kind,
        "backends": self_check.backend_table(kind),
        "default_backends": self_check.default_backends(kind),
        "checks": checks,
    }


def _gpus() -> list[dict[str, Any]]:
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found.append({"name": gpu.name, "sm": f"{gpu.major}.{gpu.minor}", "bytes": gpu.total_memory})
    return found


if __name__ == "__main__":
    main()
