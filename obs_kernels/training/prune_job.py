# SPDX-License-Identifier: Apache-2.0
"""The main jobs without a terminal: prune a question answering model and write its folder, evaluate one, plan one.

Each takes names and settings and returns one plain dict; the command line only prints it. What ``run_prune_job`` writes
appears whole or not at all, and everything that can be refused is refused before the first gradient.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from obs_kernels import checks
from obs_kernels.errors import ConfigError, MemoryBudgetError, ResumeMismatchError
from obs_kernels.files import whole_folder, write_text
from obs_kernels.pruning import OBSConfig, OBSPruner, PruningPlan
from obs_kernels.pruning.execution import execution_groups
from obs_kernels.pruning.sparsify import require_groups, run_stages
from obs_kernels.sparse import SparseLinear, decompress_
from obs_kernels.sparse.linear import PRUNED_ATTRIBUTE
from obs_kernels.training.environment import environment
from obs_kernels.training.evaluate import SquadResult, evaluate_squad
from obs_kernels.training.job_questions import calibration_of, choose_questions, job_windows, load_questions
from obs_kernels.training.model_folder import (
    ModelFiles,
    check_out,
    make_trainable,
    violations_in_file,
    why_not_packed,
    write_models,
    write_reports,
)
from obs_kernels.training.models import load_qa_model, pick_device
from obs_kernels.training.squad import SquadExample, SquadWindows, load_squad
from obs_kernels.training.squad_batches import LOSSES, SquadLoader, model_inputs, span_logits

_COMPARED_WINDOWS = 16
_PLANNED_TOKENS = 8


def run_prune_job(
    *,
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    config: OBSConfig,
    out: str | os.PathLike[str],
    train: str | os.PathLike[str] | None = None,
    loss: str | None = None,
    device: str = "auto",
    max_eval: int | None = None,
    batch_size: int = 32,
    overwrite: bool = False,
    resume: bool = False,
    on_plan: Callable[[PruningPlan], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Prune ``model`` in one shot and write ``out``: dense/, packed/, report.json, report.md and report.html.

    Args:
        model: a folder or hub name of a question answering model; a packed folder is pruned further.
        data: questions to evaluate on: a SQuAD v1.1 file, or a hub name (its split "validation").
        config: pattern, method and all else of the pruning.
        out: folder to write; it appears whole, at the end.
        train: questions for the gradients: a file, or a hub name (its split "train"). None takes the "train" split of
            a hub ``data``, or leaves some passages of the file ``data`` out of the evaluation and uses their questions.
        loss: whose curvature is taken, "outputs" (the model's own answers) or "labels"; None takes outputs for row
            curvature, labels otherwise.
        device: "auto", "cpu" or "cuda[:n]".
        max_eval: evaluate on that many questions, chosen by ``config.seed``; None takes all.
        batch_size: windows a batch, for gradients and for evaluation.
        overwrite: replace ``out`` if an earlier run wrote it.
        resume: keep finished parts in ``<out>.work`` and go on from what is there; removed at the end.
        on_plan: called with the plan before the first batch.
        say: called with a line for each finished step.

    Returns:
        The content of report.json.

    Raises:
        ConfigError: a bad value, no such model, or ``out`` cannot be written. DataFormatError: a bad data file.
        ResumeMismatchError: ``<out>.work`` belongs to another run. CheckpointFormatError: what was written does not
        read back.
    """
    start, say = time.perf_counter(), say or (lambda text: None)
    target = check_out(out, overwrite=overwrite)
    _check_counts(max_eval=max_eval, batch_size=batch_size)
    loss = _loss_name(loss, config)
    net, tokenizer = load_qa_model(model, device=pick_device(device))
    make_trainable(net)
    pruner = OBSPruner(net, config)
    notes: list[str] = []
    evaluation, calibration = load_questions(data, train, config, notes)
    evaluation = choose_questions(evaluation, max_eval, config.seed, notes)
    windows = job_windows(evaluation, net, tokenizer, with_labels=False)
    loader = calibration_of(calibration, net, tokenizer, config, batch_size, notes) if config.needs_fisher else None
    work_dir = _open_work_dir(target, loader, loss) if resume else None
    order = None
    if config.sequential and loader is not None:
        order = execution_groups(net, pruner.layers, loader, LOSSES[loss])
    plan = pruner.plan(order)
    if on_plan is not None:
        on_plan(plan)

    dense = evaluate_squad(net, tokenizer, windows, batch_size=batch_size)
    say(f"dense: EM {dense.exact_match:.2f}, F1 {dense.f1:.2f} on {dense.total} questions, {dense.seconds:.1f} s")
    pruning = run_stages(pruner, loader, LOSSES[loss], work_dir=work_dir, resume=resume)
    say(f"pruned to {config.pattern}: sparsity {pruning.sparsity:.4f}, {pruning.seconds:.1f} s")
    pruned = evaluate_squad(net, tokenizer, windows, batch_size=batch_size)
    say(f"pruned: EM {pruned.exact_match:.2f}, F1 {pruned.f1:.2f}, {_share(pruned, dense):.1f} % of the dense F1")

    report: dict[str, Any] = {
        "job": "prune",
        "model": os.fspath(model),
        "data": os.fspath(data),
        "train": None if train is None else os.fspath(train),
        "config": config.to_dict(),
        "loss": loss,
        "accuracy": {"dense": _scores(dense), "pruned": _scores(pruned) | {"f1_share": _share(pruned, dense)}},
        "pruning": pruning.to_dict(),
        "plan": {key: value for key, value in plan.to_dict().items() if key != "layers"},
    }
    violations = pruner.verify()
    masks = {name: mask.cpu() for name, mask in getattr(net, PRUNED_ATTRIBUTE)["masks"].items()}
    with whole_folder(target) as folder:
        files = ModelFiles(tokenizer, lambda path: load_qa_model(path)[0], lambda model: _logits(model, windows))
        write_models(folder, net, files, report, notes, why_not=why_not_packed(config.parsed_pattern, plan))
        in_file = violations_in_file(folder / "dense", config.parsed_pattern, masks)
        report["checks"] = {"violations": violations, "violations_in_file": in_file}
        report |= {"environment": environment(next(net.parameters()).device), "notes": notes}
        report["seconds"] = time.perf_counter() - start
        write_reports(folder, report)
    if work_dir is not None:
        shutil.rmtree(work_dir, ignore_errors=True)
    say(f"wrote {target}")
    return report


def run_eval_job(
    *,
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    baseline: str | os.PathLike[str] | None = None,
    device: str = "auto",
    max_eval: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Exact match and F1 of a dense or packed ``model``; with ``baseline`` also its share of that model's F1.

    Args:
        model, data, device, max_eval, batch_size: as in ``run_prune_job``.
        baseline: the model before pruning, evaluated on the same questions.
        seed: chooses the questions for ``max_eval``, as ``config.seed`` does there.
        say: called with a line for each finished model.
    """
    start, say = time.perf_counter(), say or (lambda text: None)
    _check_counts(max_eval=max_eval, batch_size=batch_size)
    picked, notes = pick_device(device), list[str]()
    examples: list[SquadExample] | None = None
    accuracy: dict[str, dict[str, Any]] = {}
    packed_layers = 0
    for role, source in (("baseline", baseline), ("model", model)):
        if source is None:
            continue
        net, tokenizer = load_qa_model(source, device=picked)
        if examples is None:
            examples = choose_questions(load_squad(data, split="validation"), max_eval, seed, notes)
        windows = job_windows(examples, net, tokenizer, with_labels=False)
        result = evaluate_squad(net, tokenizer, windows, batch_size=batch_size)
        say(f"{role}: EM {result.exact_match:.2f}, F1 {result.f1:.2f} on {result.total} questions")
        accuracy[role] = _scores(result)
        packed_layers = sum(isinstance(module, SparseLinear) for module in net.modules())
    if baseline is not None:
        base = accuracy["baseline"]["f1"]
        accuracy["model"]["f1_share"] = 100.0 * accuracy["model"]["f1"] / base if base else 0.0
    return {
        "job": "eval",
        "model": os.fspath(model),
        "baseline": None if baseline is None else os.fspath(baseline),
        "data": os.fspath(data),
        "accuracy": accuracy,
        "packed_layers": packed_layers,
        "environment": environment(picked),
        "notes": notes,
        "seconds": time.perf_counter() - start,
    }


def run_plan_job(
    *, model: str | os.PathLike[str], config: OBSConfig, loss: str | None = None, device: str = "auto"
) -> dict[str, Any]:
    """What ``run_prune_job`` would do to ``model``: layers, memory, passes, what is left out and why. Needs no data.

    Under ``sequential`` a few made-up tokens go through the model once, which tells in what order its layers run.
    """
    loss = _loss_name(loss, config)
    net, _ = load_qa_model(model, device=pick_device(device))
    decompress_(net)
    pruner, notes = OBSPruner(net, config), list[str]()
    ids = torch.ones(1, _PLANNED_TOKENS, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": ids}

    def answer(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return span_logits(model(**model_inputs(model, batch)))[0].sum()

    order = execution_groups(net, pruner.layers, [batch], answer) if config.sequential else None
    try:
        require_groups(pruner)
    except MemoryBudgetError as error:
        notes.append(f"prune would stop at this: {error}")
    return {
        "job": "plan",
        "model": os.fspath(model),
        "config": config.to_dict(),
        "loss": loss if config.needs_fisher else None,
        "stages": [str(stage) for stage in pruner.stages],
        "plan": pruner.plan(order).to_dict(),
        "notes": notes,
    }


def demo_report(result: dict[str, Any], device: str = "auto") -> dict[str, Any]:
    """What ``run_demo`` returns, with the sections that reports have: accuracy, sizes, environment."""
    packed, recovered, dense = result.get("packed") or {}, result.get("recovered") or {}, result["dense"]
    accuracy: dict[str, dict[str, Any]] = {"dense": {"questions": dense.get("total"), **dense}}
    if packed.get("f1") is not None:
        accuracy[f"{packed.get('pattern', '')} packed, read back".strip()] = {"f1": packed["f1"]}
    if recovered.get("f1_after") is not None:
        name = f"{recovered.get('pattern', '')} recovered".strip()
        accuracy[name] = {"f1": recovered["f1_after"], "exact_match": recovered.get("exact_match_after")}
    for scores in accuracy.values():
        scores["f1_share"] = 100.0 * scores["f1"] / dense["f1"] if dense["f1"] else 0.0
    sizes = {name: packed[key] for name, key in (("dense", "dense_bytes"), ("packed", "bytes")) if key in packed}
    found = environment(pick_device(device))
    return {"job": "demo", **result, "accuracy": accuracy, "sizes": sizes, "environment": found}


def _logits(model: nn.Module, windows: SquadWindows) -> tuple[Tensor, ...]:
    """Start and end logits on some windows."""
    step = max(1, len(windows) // _COMPARED_WINDOWS)
    batch = windows.batch(torch.arange(len(windows))[::step][:_COMPARED_WINDOWS])
    return span_logits(model(**model_inputs(model, batch)))


def _loss_name(loss: str | None, config: OBSConfig) -> str:
    """Whose curvature is taken; the model's own answers for row curvature, if nothing is said."""
    loss = loss or ("outputs" if config.curvature == "row" else "labels")
    checks.check_choice("loss", loss, tuple(LOSSES))
    return loss


def _check_counts(*, max_eval: int | None, batch_size: int) -> None:
    if max_eval is not None and max_eval < 1:
        raise ConfigError(f"max_eval must be at least 1, got {max_eval}; leave it out for all questions")
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}; try 32")


def _open_work_dir(target: Path, loader: SquadLoader | None, loss: str) -> Path:
    """``<out>.work``, bound to the gradients' data; the pruning binds it to configuration and weights itself."""
    folder = target.with_name(f"{target.name}.work")
    digest = hashlib.sha256()
    if loader is not None:
        digest.update(loader.rows.numpy().tobytes() + loader.windows.input_ids.numpy().tobytes())
    identity = {"calibration": digest.hexdigest(), "batch_size": 0 if loader is None else loader.batch_size}
    identity["loss"] = loss
    path = folder / "job.json"
    if path.exists():
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ResumeMismatchError(f"{path} is not readable ({error}); remove the folder to start anew") from None
        if found != identity:
            raise ResumeMismatchError(
                f"{folder} belongs to a run with other questions, batch size or loss; remove it to start anew"
            )
    else:
        write_text(path, json.dumps(identity))
    return folder


def _scores(result: SquadResult) -> dict[str, Any]:
    return {
        "exact_match": result.exact_match,
        "f1": result.f1,
        "questions": result.total,
        "seconds": result.seconds,
    }


def _share(pruned: SquadResult, dense: SquadResult) -> float:
    return 100.0 * pruned.f1 / dense.f1 if dense.f1 else 0.0
