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
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from obs_kernels import checks
from obs_kernels.errors import ConfigError, ResumeMismatchError
from obs_kernels.files import whole_folder, write_text
from obs_kernels.patterns import NMPattern, VNMPattern
from obs_kernels.pruning import OBSConfig, OBSPruner, PruningPlan
from obs_kernels.pruning.sparsify import run_stages
from obs_kernels.report.html import missing_libraries, render_html
from obs_kernels.report.markdown import render_markdown
from obs_kernels.report.values import json_text
from obs_kernels.sparse import SparseLinear, compress_, decompress_, load, save_pretrained
from obs_kernels.sparse.linear import PRUNED_ATTRIBUTE
from obs_kernels.training.environment import environment
from obs_kernels.training.evaluate import SquadResult, evaluate_squad
from obs_kernels.training.job_questions import calibration_of, choose_questions, job_windows, load_questions
from obs_kernels.training.models import load_qa_model, pick_device
from obs_kernels.training.squad import Batch, SquadExample, SquadWindows, load_squad
from obs_kernels.training.squad_batches import LOSSES, SquadLoader, model_inputs, span_logits

REPORT = "report.json"
_COMPARED_WINDOWS = 16


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
    loss = loss or ("outputs" if config.curvature == "row" else "labels")
    checks.check_choice("loss", loss, tuple(LOSSES))
    net, tokenizer = load_qa_model(model, device=pick_device(device))
    _make_trainable(net)
    pruner = OBSPruner(net, config)
    plan = pruner.plan()
    notes: list[str] = []
    evaluation, calibration = load_questions(data, train, config, notes)
    evaluation = choose_questions(evaluation, max_eval, config.seed, notes)
    windows = job_windows(evaluation, net, tokenizer, with_labels=False)
    loader = calibration_of(calibration, net, tokenizer, config, batch_size, notes) if config.needs_fisher else None
    work_dir = _open_work_dir(target, loader, loss) if resume else None
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
        _write_models(folder, net, tokenizer, config, plan, windows, report, notes)
        in_file = _violations_in_file(folder / "dense", config, masks)
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


def run_plan_job(*, model: str | os.PathLike[str], config: OBSConfig, device: str = "auto") -> dict[str, Any]:
    """What ``run_prune_job`` would do to ``model``: layers, memory, what is left out and why. Needs no data."""
    net, _ = load_qa_model(model, device=pick_device(device))
    decompress_(net)
    return {
        "job": "plan",
        "model": os.fspath(model),
        "config": config.to_dict(),
        "plan": OBSPruner(net, config).plan().to_dict(),
    }


def check_out(out: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """The absolute path of ``out``, if a folder can be written there; nothing is left behind.

    Raises:
        ConfigError: it is a file, holds something that may not be replaced, or no folder can be made there.
    """
    target = Path(out).expanduser().resolve()
    try:
        if target.exists() and not target.is_dir():
            raise ConfigError(f"out must be a folder, got the file {os.fspath(out)!r}; name another")
        if target.is_dir() and any(target.iterdir()):
            if not overwrite:
                raise ConfigError(f"out {os.fspath(out)!r} exists and is not empty; name another or pass --overwrite")
            if not (target / REPORT).is_file():
                raise ConfigError(
                    f"out {os.fspath(out)!r} holds files that no run wrote (there is no {REPORT}), and is not "
                    f"replaced; name another, or remove it yourself"
                )
        parent = next(folder for folder in target.parents if folder.exists())
        with tempfile.TemporaryDirectory(dir=parent, prefix=f".{target.name}."):
            pass
    except OSError as error:
        raise ConfigError(
            f"out {os.fspath(out)!r} cannot be written ({error.strerror}); name a folder that can"
        ) from None
    return target


def write_reports(folder: Path, report: dict[str, Any]) -> None:
    """report.json, report.md and, where its libraries are installed, report.html; a note says so where not."""
    missing = missing_libraries()
    if missing:
        text = f"report.html was not written: {' and '.join(missing)} missing; pip install 'obs_kernels[report]'"
        report["notes"] = [*report.get("notes", ()), text]
    write_text(folder / REPORT, json_text(report) + "\n")
    write_text(folder / "report.md", render_markdown(report))
    if not missing:
        write_text(folder / "report.html", render_html(report))


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


def _check_counts(*, max_eval: int | None, batch_size: int) -> None:
    if max_eval is not None and max_eval < 1:
        raise ConfigError(f"max_eval must be at least 1, got {max_eval}; leave it out for all questions")
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}; try 32")


def _make_trainable(net: nn.Module) -> None:
    """Packed layers back to dense, and every float parameter open to gradients; zeros stay pruned."""
    decompress_(net)
    for parameter in net.parameters():
        parameter.requires_grad_(parameter.is_floating_point())


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


def _write_models(
    folder: Path,
    net: nn.Module,
    tokenizer: Any,
    config: OBSConfig,
    plan: PruningPlan,
    windows: SquadWindows,
    report: dict[str, Any],
    notes: list[str],
) -> None:
    """dense/, and packed/ where the pattern has a packed format; reads both back and compares them."""
    save_pretrained(net, folder / "dense", save_dense=True)
    tokenizer.save_pretrained(folder / "dense")
    sizes = {"dense": _weight_bytes(folder / "dense")}
    reason = _why_not_packed(config, plan)
    report["packed"] = None
    if reason is None:
        device = next(net.parameters()).device
        try:
            layers = compress_(net)
        except ConfigError as error:  # every layer was skipped, or none is an nn.Linear
            reason = str(error)
        else:
            save_pretrained(net, folder / "packed")
            tokenizer.save_pretrained(folder / "packed")
            sizes["packed"] = _weight_bytes(folder / "packed")
            dense_net, _ = load_qa_model(folder / "dense", device=device)
            packed_net = load(folder / "packed").to(device)
            difference, scale = _compare(dense_net, packed_net, windows)
            report["packed"] = {"layers": layers, "max_difference": difference, "largest_logit": scale}
    if reason is not None:
        notes.append(f"packed/ was not written: {reason}")
    report["sizes"] = sizes


def _why_not_packed(config: OBSConfig, plan: PruningPlan) -> str | None:
    pattern = config.parsed_pattern
    if not isinstance(pattern, NMPattern) or (isinstance(pattern, VNMPattern) and pattern.n != 2):
        return f"pattern {pattern} has no packed format (n:m and v:2:m have)"
    padded = [layer.name for layer in plan.layers if layer.group >= 0 and layer.reason]
    return f"{padded[0]} was padded to fit {pattern}, and padded layers stay dense" if padded else None


def _compare(dense: nn.Module, packed: nn.Module, windows: SquadWindows) -> tuple[float, float]:
    """Largest difference of the two models' logits on some windows, and the largest logit."""
    step = max(1, len(windows) // _COMPARED_WINDOWS)
    batch: Batch = windows.batch(torch.arange(len(windows))[::step][:_COMPARED_WINDOWS])
    with torch.inference_mode():
        pairs = zip(*(span_logits(net(**model_inputs(net, batch))) for net in (dense, packed)), strict=True)
        differences = [(float((a - b).abs().max()), float(a.abs().max())) for a, b in pairs]
    return max(d for d, _ in differences), max(s for _, s in differences)


def _violations_in_file(folder: Path, config: OBSConfig, masks: dict[str, Tensor]) -> int:
    """In the weights as saved: nonzeros outside the mask, and groups, panel rows or blocks that break the pattern."""
    from safetensors import safe_open

    pattern, found, total = config.parsed_pattern, 0, 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                mask = masks.get(key.removesuffix(".weight"))
                if mask is None or not key.endswith(".weight"):
                    continue
                kept = file.get_tensor(key) != 0
                total, found = total + int((kept & ~mask).sum()), found + 1
                if pattern.fixed_count and pattern.padded_shape(kept.shape) == tuple(kept.shape):
                    total += pattern.count_violations(kept)
    if found != len(masks):
        raise ConfigError(f"{folder} holds {found} of {len(masks)} pruned layers under their names; report this")
    return total


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _scores(result: SquadResult) -> dict[str, Any]:
    return {
        "exact_match": result.exact_match,
        "f1": result.f1,
        "questions": result.total,
        "seconds": result.seconds,
    }


def _share(pruned: SquadResult, dense: SquadResult) -> float:
    return 100.0 * pruned.f1 / dense.f1 if dense.f1 else 0.0
