# SPDX-License-Identifier: Apache-2.0
"""The folder that a job writes: dense/ with zeros, packed/ where the pattern has a packed format, and the reports."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from obs_kernels.errors import ConfigError
from obs_kernels.files import write_text
from obs_kernels.patterns import NMPattern, Pattern, VNMPattern
from obs_kernels.pruning import PruningPlan
from obs_kernels.report.html import missing_libraries, render_html
from obs_kernels.report.markdown import render_markdown
from obs_kernels.report.values import json_text
from obs_kernels.sparse import compress_, decompress_, load, save_pretrained

REPORT = "report.json"


@dataclass(frozen=True)
class ModelFiles:
    """What writing and reading back a model needs beside it."""

    tokenizer: Any
    load: Callable[[Path], nn.Module]
    """The model of a dense folder."""
    logits: Callable[[nn.Module], tuple[Tensor, ...]]
    """A model's answers to some samples, always the same ones."""


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


def make_trainable(net: nn.Module) -> None:
    """Packed layers back to dense, and every float parameter open to gradients; zeros stay pruned."""
    decompress_(net)
    for parameter in net.parameters():
        parameter.requires_grad_(parameter.is_floating_point())


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


def write_models(
    folder: Path, net: nn.Module, files: ModelFiles, report: dict[str, Any], notes: list[str], *, why_not: str | None
) -> None:
    """dense/, and packed/ unless ``why_not`` says why there is none; reads both back and compares them.

    "sizes" and "packed" of ``report`` and ``notes`` are filled. ``net`` is packed afterwards where packed/ is written.
    """
    save_pretrained(net, folder / "dense", save_dense=True)
    files.tokenizer.save_pretrained(folder / "dense")
    sizes = {"dense": _weight_bytes(folder / "dense")}
    report["packed"] = None
    if why_not is None:
        device = next(net.parameters()).device
        try:
            layers = compress_(net)
        except ConfigError as error:  # every layer was skipped, or none is an nn.Linear
            why_not = str(error)
        else:
            save_pretrained(net, folder / "packed")
            files.tokenizer.save_pretrained(folder / "packed")
            sizes["packed"] = _weight_bytes(folder / "packed")
            dense_net = files.load(folder / "dense").to(device)
            packed_net = load(folder / "packed").to(device)
            difference, scale = _compare(files.logits, dense_net, packed_net)
            report["packed"] = {"layers": layers, "max_difference": difference, "largest_logit": scale}
    if why_not is not None:
        notes.append(f"packed/ was not written: {why_not}")
    report["sizes"] = sizes


def why_not_packed(pattern: Pattern, plan: PruningPlan) -> str | None:
    """Why a model pruned to ``pattern`` has no packed folder; None where it has."""
    if not isinstance(pattern, NMPattern) or (isinstance(pattern, VNMPattern) and pattern.n != 2):
        return f"pattern {pattern} has no packed format (n:m and v:2:m have)"
    padded = [layer.name for layer in plan.layers if layer.group >= 0 and layer.reason]
    return f"{padded[0]} was padded to fit {pattern}, and padded layers stay dense" if padded else None


def violations_in_file(folder: Path, pattern: Pattern, masks: Mapping[str, Tensor]) -> int:
    """In the weights as saved: nonzeros outside the mask, and groups, panel rows or blocks that break the pattern."""
    from safetensors import safe_open

    found = total = 0
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


def _compare(
    logits: Callable[[nn.Module], tuple[Tensor, ...]], dense: nn.Module, packed: nn.Module
) -> tuple[float, float]:
    """Largest difference of the two models' logits, and the largest logit."""
    with torch.inference_mode():
        pairs = zip(logits(dense.eval()), logits(packed.eval()), strict=True)
        differences = [(float((a - b).abs().max()), float(a.abs().max())) for a, b in pairs]
    return max(d for d, _ in differences), max(s for _, s in differences)


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
