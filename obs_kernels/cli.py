# SPDX-License-Identifier: Apache-2.0
"""``obs-kernels``: prune, eval, plan, doctor, demo, report, and the commands of the other ``cli_`` modules.

A thin layer over ``obs_kernels.training``: options in, tables out. With ``--json`` stdout holds one JSON object and
nothing else; progress goes to stderr. Exit codes: 0 fine, 1 failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from obs_kernels.errors import ConfigError

try:
    import typer
except ImportError:
    sys.exit("obs-kernels needs typer and rich, which are not installed. Fix: pip install 'obs_kernels[cli]'")

from obs_kernels import cli_recipes, cli_train
from obs_kernels.cli_common import Debug, Json, Overwrite, errors, say, show
from obs_kernels.cli_files import compress, convert
from obs_kernels.cli_speed import speed

if TYPE_CHECKING:
    from obs_kernels.pruning import OBSConfig, PruningPlan

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
for _command in (compress, convert, speed):
    app.command()(_command)

Model = Annotated[str, typer.Option(help="Folder or hub name of a question answering model.")]
Data = Annotated[str, typer.Option(help="Questions to evaluate on: SQuAD v1.1 .json[.gz], or a hub name.")]
Train = Annotated[str | None, typer.Option(help="Questions for the gradients: a file, or a hub name.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda[:n].")]
BatchSize = Annotated[int, typer.Option(help="Windows a batch.")]
MaxEval = Annotated[int | None, typer.Option(help="Evaluate on that many questions, chosen by the seed.")]

# the fields of OBSConfig; None leaves the default, or what --config says
Pattern = Annotated[str | None, typer.Option(help="2:4, 2:8, 64:2:8, unstructured:0.9, block4:0.8; n:m keeps n of m.")]
Method = Annotated[str | None, typer.Option(help="combinatorial, pairwise, greedy, diagonal or magnitude.")]
Update = Annotated[str | None, typer.Option(help="joint, single or none.")]
NumGrads = Annotated[int | None, typer.Option(help="Gradients for the Fisher.")]
Gradients = Annotated[str | None, typer.Option(help="sample or batch.")]
Curvature = Annotated[
    str | None,
    typer.Option(
        help="block (block Fisher), row (whole rows, tokens weighted) or layer (SparseGPT). Left out: row "
        "for n:m and v:n:m, unless an option of the block Fisher is given."
    ),
]
Sequential = Annotated[
    bool | None,
    typer.Option(
        "--sequential/--no-sequential", help="Layer by layer on the model pruned so far. Left out: yes for row."
    ),
]
Loss = Annotated[
    str | None,
    typer.Option(help="Whose curvature: outputs (the model's own answers) or labels. Left out: outputs for row."),
]
BlockSize = Annotated[int | None, typer.Option("--fisher-block-size", help="D; left out: the pattern's own.")]
Damp = Annotated[float | None, typer.Option(help="Absolute value added to the diagonal of the Fisher.")]
DampeningFrac = Annotated[float | None, typer.Option(help="Damping as a share of the mean diagonal.")]
Recomputations = Annotated[int | None, typer.Option(help="Parts of the step, with new gradients for each.")]
Passes = Annotated[int | None, typer.Option(help="Passes over the groups of a Fisher block after the first choice.")]
Global = Annotated[bool | None, typer.Option("--global/--no-global", help="One threshold over all layers.")]
Ignore = Annotated[list[str] | None, typer.Option(help="Class, name or 're:...' also left out; may be repeated.")]
Targets = Annotated[list[str] | None, typer.Option(help="Class, name or 're:...' that is pruned; may be repeated.")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random.")]
OnSingular = Annotated[str | None, typer.Option(help="raise, increase_damp or skip.")]
OnUnsupported = Annotated[str | None, typer.Option(help="raise, skip or pad.")]
OnNonfinite = Annotated[str | None, typer.Option(help="raise or skip_batch.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="JSON file of settings; options here go before it.")]


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


@app.command()
def prune(
    model: Model,
    data: Annotated[str | None, typer.Option(help="Questions to evaluate on: .json[.gz] or a hub name.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write: dense/, packed/, report.*")] = None,
    train: Train = None,
    pattern: Pattern = None,
    method: Method = None,
    update: Update = None,
    num_grads: NumGrads = None,
    gradients: Gradients = None,
    curvature: Curvature = None,
    sequential: Sequential = None,
    fisher_block_size: BlockSize = None,
    damp: Damp = None,
    dampening_frac: DampeningFrac = None,
    recomputations: Recomputations = None,
    passes: Passes = None,
    global_sparsity: Global = None,
    ignore: Ignore = None,
    targets: Targets = None,
    seed: Seed = None,
    on_singular: OnSingular = None,
    on_unsupported: OnUnsupported = None,
    on_nonfinite: OnNonfinite = None,
    config: ConfigFile = None,
    device: Device = "auto",
    batch_size: BatchSize = 32,
    max_eval: MaxEval = None,
    overwrite: Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="Keep finished parts in OUT.work, go on from them.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    loss: Loss = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Prune a question answering model in one shot; evaluate it before and after; write the folder OUT."""
    options = dict(locals())
    _need_pattern(pattern, config)
    for name, value in (("--data", data), ("--out", out)):
        if value is None and not dry_run:
            raise typer.BadParameter("is needed, unless with --dry-run", param_hint=name)
    with errors(as_json, debug, prune):
        from obs_kernels.training.prune_job import run_plan_job, run_prune_job

        settings = _config(config, options)
        if dry_run or data is None or out is None:
            show(run_plan_job(model=model, config=settings, device=device), as_json)
            return
        report = run_prune_job(
            model=model,
            data=data,
            train=train,
            config=settings,
            loss=loss,
            out=out,
            device=device,
            max_eval=max_eval,
            batch_size=batch_size,
            overwrite=overwrite,
            resume=resume,
            on_plan=None if as_json else _show_memory,
            say=say,
        )
        show(report, as_json)


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
def plan(
    model: Model,
    pattern: Pattern = None,
    method: Method = None,
    update: Update = None,
    curvature: Curvature = None,
    sequential: Sequential = None,
    fisher_block_size: BlockSize = None,
    recomputations: Recomputations = None,
    passes: Passes = None,
    global_sparsity: Global = None,
    ignore: Ignore = None,
    targets: Targets = None,
    on_unsupported: OnUnsupported = None,
    config: ConfigFile = None,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Layers, memory, and what prune would leave out and why. Needs no data and computes nothing."""
    options = dict(locals())
    _need_pattern(pattern, config)
    with errors(as_json, debug, plan):
        from obs_kernels.training.prune_job import run_plan_job

        show(run_plan_job(model=model, config=_config(config, options), device=device), as_json)


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


def _show_memory(found: PruningPlan) -> None:
    from obs_kernels.report.tables import memory_lines

    for line in memory_lines(found.to_dict()):
        say(line)


def _need_pattern(pattern: str | None, config: Path | None) -> None:
    if pattern is None and config is None:
        raise typer.BadParameter("is needed, or --config with a pattern in it", param_hint="--pattern")


def _config(path: Path | None, options: dict[str, Any]) -> OBSConfig:
    """The settings of the file, where there is one; options that were given take their place, --ignore adds to them.

    Row curvature goes layer by layer, unless something says otherwise.
    """
    from obs_kernels.pruning.config import OBSConfig

    values: Any = {}
    if path is not None:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"config must be a JSON file, got {str(path)!r} ({error}); check the path") from None
        if not isinstance(values, dict):
            raise ConfigError(f"config must hold one JSON object, got {type(values).__name__} in {str(path)!r}")
    known = {field.name: field.default for field in fields(OBSConfig)}
    given = {name: value for name, value in options.items() if name in known and value is not None}
    if "ignore" in given:
        before = values.get("ignore", known["ignore"])
        given["ignore"] = [*([before] if isinstance(before, str) else before), *given["ignore"]]
    chosen = values | given
    config = OBSConfig.from_dict(chosen)
    by_layer = config.curvature == "row" and "sequential" not in chosen
    return replace(config, sequential=True) if by_layer else config


if __name__ == "__main__":
    main()
