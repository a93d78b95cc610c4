# SPDX-License-Identifier: Apache-2.0
"""``obs-kernels prune`` and ``plan``: the same options, so that a command can be planned as it is."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from obs_kernels.cli_common import BatchSize, Debug, Device, Json, MaxEval, Model, Overwrite, Train, errors, say, show
from obs_kernels.cli_words import in_option_words
from obs_kernels.errors import ConfigError

if TYPE_CHECKING:
    from obs_kernels.pruning import OBSConfig, PruningPlan

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
LayerSparsity = Annotated[
    list[str] | None,
    typer.Option(help="NAME=SHARE, another sparsity for a class, name or 're:...'; may be repeated."),
]
Ignore = Annotated[list[str] | None, typer.Option(help="Class, name or 're:...' also left out; may be repeated.")]
Targets = Annotated[list[str] | None, typer.Option(help="Class, name or 're:...' that is pruned; may be repeated.")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random.")]
OnSingular = Annotated[str | None, typer.Option(help="raise, increase_damp or skip.")]
OnUnsupported = Annotated[str | None, typer.Option(help="raise, skip or pad.")]
OnNonfinite = Annotated[str | None, typer.Option(help="raise or skip_batch.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="JSON file of settings; options here go before it.")]


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
    layer_sparsity: LayerSparsity = None,
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
            planned = run_plan_job(model=model, config=settings, loss=loss, device=device)
            planned["notes"] = [in_option_words(note, prune) for note in planned["notes"]]
            show(planned, as_json)
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


def plan(**options: Any) -> None:
    """Layers, memory, passes over the data, and what prune would leave out and why. Needs no data, computes nothing.

    Takes the options of prune; those of data and of OUT have no part in it.
    """
    prune(**options, dry_run=True)


plan.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [parameter for name, parameter in inspect.signature(prune, eval_str=True).parameters.items() if name != "dry_run"]
)


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
    if "layer_sparsity" in given:
        given["layer_sparsity"] = dict(_share(text) for text in given["layer_sparsity"])
    if "ignore" in given:
        before = values.get("ignore", known["ignore"])
        given["ignore"] = [*([before] if isinstance(before, str) else before), *given["ignore"]]
    chosen = values | given
    config = OBSConfig.from_dict(chosen)
    by_layer = config.curvature == "row" and "sequential" not in chosen
    return replace(config, sequential=True) if by_layer else config


def _share(text: str) -> tuple[str, str]:
    rule, equals, share = text.rpartition("=")
    if not equals or not rule:
        raise ConfigError(f"--layer-sparsity must be NAME=SHARE, got {text!r}; for example 're:.*query=0.8'")
    return rule, share
