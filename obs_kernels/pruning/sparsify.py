# SPDX-License-Identifier: Apache-2.0
"""``sparsify_``: the whole one-shot run in one call, in groups where memory is short, resumable in a work folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from obs_kernels.errors import ConfigError, MemoryBudgetError, ResumeMismatchError
from obs_kernels.files import hold_folder, write_bytes, write_text
from obs_kernels.pruning.calibration import LossFn, seeded
from obs_kernels.pruning.config import OBSConfig
from obs_kernels.pruning.execution import execution_groups
from obs_kernels.pruning.layer import PrunedLayer
from obs_kernels.pruning.layerwise import DenseModel, Snapshot
from obs_kernels.pruning.memory import readable
from obs_kernels.pruning.phase_times import PhaseTimes
from obs_kernels.pruning.pruner import OBSPruner
from obs_kernels.pruning.report import PruningReport
from obs_kernels.pruning.step import StagedLayer

MANIFEST = "manifest.json"


def sparsify_(
    model: nn.Module,
    cfg: OBSConfig,
    loader: Iterable[Any] | None,
    loss_fn: LossFn | None,
    *,
    work_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    memory_budget: int | None = None,
) -> PruningReport:
    """Prune ``model`` in place: collect, search, update, verify; once for each recomputation.

    Where the Fisher of all layers does not fit the memory at once, layers are collected in groups with a pass over
    ``loader`` for each. All groups of a stage see the model as it was before the stage, so the result does not depend
    on the grouping.

    Args:
        model: pruned in place; unchanged if an error comes before the first stage is whole.
        loader: batches, re-iterable where more than one pass is needed; None only where no gradient is
            (``cfg.needs_fisher``).
        loss_fn: ``loss_fn(model, batch)``, see ``OBSPruner.collect``.
        work_dir: folder for finished groups and stages. With ``resume=True`` a run that was cut off goes on there.
        memory_budget: bytes for Fisher sums; None takes a share of the free memory.

    Raises:
        MemoryBudgetError: one layer alone does not fit, or a global threshold would need groups.
        ResumeMismatchError: the folder belongs to another configuration or model.
        WorkFolderLockedError: another process works in the folder.
    """
    pruner = OBSPruner(model, cfg, memory_budget=memory_budget)
    return run_stages(pruner, loader, loss_fn, work_dir=work_dir, resume=resume)


def run_stages(
    pruner: OBSPruner,
    loader: Iterable[Any] | None,
    loss_fn: LossFn | None,
    *,
    work_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    timings: PhaseTimes | None = None,
) -> PruningReport:
    """All stages of ``pruner``; what ``sparsify_`` does after building it.

    Torch's global generators stay as they are.
    """
    with seeded(pruner.layers[0].weight.device, pruner.config.seed):
        run_until(len(pruner.stages), pruner, loader, loss_fn, work_dir=work_dir, resume=resume, timings=timings)
        return pruner.finalize()


def run_until(
    until: int,
    pruner: OBSPruner,
    loader: Iterable[Any] | None,
    loss_fn: LossFn | None,
    *,
    work_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    timings: PhaseTimes | None = None,
    stage: Callable[[Sequence[str]], list[StagedLayer]] | None = None,
) -> None:
    """Stages of ``pruner`` until so many of them are done; arguments as in ``sparsify_``.

    ``stage`` takes the place of ``pruner.stage_layers``, as where several processes share the work.
    """
    cfg = pruner.config
    if cfg.needs_fisher and (loader is None or loss_fn is None):
        raise ConfigError(
            f"loader and loss_fn are needed for method={cfg.method!r} with update={cfg.update!r}, got None"
        )
    groups = require_groups(pruner)
    if (cfg.sequential or len(groups) * (until - pruner.stage) > 1) and isinstance(loader, Iterator):
        raise ConfigError(
            "loader is an iterator, which can be used only once; pass a list, a DataLoader or another re-iterable"
        )
    if cfg.sequential and loader is not None and loss_fn is not None:
        groups = pruner.plan(execution_groups(pruner.model, pruner.layers, loader, loss_fn)).groups
    with nullcontext() if work_dir is None else hold_folder(work_dir) as held:
        folder = None if held is None else _WorkDir(held, pruner, resume=resume)
        whole_rows = cfg.sequential and cfg.curvature == "row"
        dense: DenseModel | None = None
        if whole_rows and loader is not None and loss_fn is not None:
            dense = DenseModel(pruner.model, pruner.layers, loader, loss_fn, cfg, Snapshot(pruner.layers), timings)
        while pruner.stage < until:
            staged: list[StagedLayer] = []
            if dense is not None:
                dense.begin_stage()
            with _restored_on_error(pruner) if cfg.sequential else nullcontext():
                for names in groups:
                    done = None if folder is None else folder.load(pruner, names)
                    if done is None:
                        if dense is not None:
                            dense.collect(pruner._named(names))
                        elif cfg.needs_fisher and loader is not None and loss_fn is not None:
                            pruner.collect(loader, loss_fn, layers=names, timings=timings)
                        done = (stage or pruner.stage_layers)(names)
                        if folder is not None:
                            folder.store(pruner, done)
                        for item in done:
                            item.layer.clear()
                    if cfg.sequential:  # for the layers that run later; masks and reports follow with the stage
                        for item in done:
                            item.write()
                    staged += done
            pruner.commit(staged)


@contextmanager
def _restored_on_error(pruner: OBSPruner) -> Iterator[None]:
    before = Snapshot(pruner.layers)
    try:
        yield
    except BaseException:
        before.restore()
        raise


def require_groups(pruner: OBSPruner) -> list[list[str]]:
    """Names of the layers that are collected together.

    Raises:
        MemoryBudgetError: one layer alone does not fit, or a global threshold would need groups.
    """
    plan = pruner.plan()
    for row in plan.layers:
        if row.fisher_bytes > plan.budget:
            block = pruner.config.curvature == "block"
            what, fix = ("Fisher", "lower fisher_block_size") if block else ("Hessian", "use curvature='block'")
            raise MemoryBudgetError(
                f"the {what} of {row.name} {list(row.shape)} alone needs {readable(row.fisher_bytes)} at D "
                f"= {row.block_size}, the budget is {readable(plan.budget)}; {fix} or ignore the layer"
            )
    if pruner.config.global_sparsity and plan.num_groups > 1:
        raise MemoryBudgetError(
            f"a global threshold needs the Fisher of all layers at once, {readable(plan.fisher_bytes)}; the "
            f"budget is "
            f"{readable(plan.budget)}; lower fisher_block_size or set global_sparsity=False"
        )
    return plan.groups


class _WorkDir:
    """Finished layers of each stage under ``layers/``, and a manifest that binds them to a config and a model."""

    def __init__(self, folder: Path, pruner: OBSPruner, *, resume: bool) -> None:
        self.folder = folder
        identity = hashlib.sha256(pruner.config.fingerprint().encode())
        for name, parameter in pruner.model.named_parameters():
            identity.update(name.encode())
            identity.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        self.manifest = {"format_version": 1, "identity": identity.hexdigest(), "config": pruner.config.to_dict()}
        path = folder / MANIFEST
        if path.exists():
            try:
                found = json.loads(path.read_text())
            except (OSError, ValueError) as error:
                raise ResumeMismatchError(
                    f"{path} is not readable ({error}); remove the folder to start anew"
                ) from None
            if not resume:
                raise ResumeMismatchError(f"work_dir {folder} already holds a run; pass resume=True, or another folder")
            if not isinstance(found, dict) or found.get("identity") != self.manifest["identity"]:
                raise ResumeMismatchError(
                    f"work_dir {folder} belongs to another configuration or model; use another folder"
                )
            return
        if (folder / "layers").exists():
            raise ResumeMismatchError(f"{folder}/layers holds layers, but there is no {MANIFEST}; use another folder")
        write_text(path, json.dumps(self.manifest, indent=2))

    def _path(self, pruner: OBSPruner, name: str) -> Path:
        safe = "".join(c if c.isalnum() or c in "._-" else "_" for c in name) or "weight"
        return self.folder / "layers" / f"stage{pruner.stage + 1}.{safe}.safetensors"

    def load(self, pruner: OBSPruner, names: list[str]) -> list[StagedLayer] | None:
        """The staged layers of a group, if all of them were stored whole."""
        staged = []
        for layer in pruner._named(names):
            path = self._path(pruner, layer.name)
            if not path.exists():
                return None
            staged.append(_read_layer(path, layer))
        return staged

    def store(self, pruner: OBSPruner, staged: list[StagedLayer]) -> None:
        """Write each layer of a finished group."""
        from safetensors.torch import save

        for item in staged:
            tensors = {"mask": item.mask.to(torch.uint8).cpu().contiguous(), "weight": item.weight.cpu().contiguous()}
            if item.bias is not None:
                tensors["bias"] = item.bias.cpu().contiguous()
            names = ("saliency", "damp", "blocks_raised", "outcome", "num_grads", "seconds")
            meta = json.dumps({name: getattr(item, name) for name in names})
            write_bytes(self._path(pruner, item.layer.name), save(tensors, metadata={"staged": meta}))


def _read_layer(path: Path, layer: PrunedLayer) -> StagedLayer:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {})["staged"])
            mask, weight = (file.get_tensor(k).to(layer.weight.device) for k in ("mask", "weight"))
            bias = file.get_tensor("bias").to(layer.weight.device) if "bias" in file.keys() else None  # noqa: SIM118
        item = StagedLayer(layer=layer, mask=mask.bool(), weight=weight, bias=bias, **meta)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ResumeMismatchError(
            f"{path} is damaged ({error}); remove the file to have the layer done again"
        ) from None
    wrong_bias = bias is not None and (layer.bias is None or bias.shape != layer.bias.shape)
    same = mask.shape == weight.shape == layer.mask.shape and weight.dtype == layer.weight.dtype
    if wrong_bias or not same:
        raise ResumeMismatchError(
            f"{path} holds a layer of another shape or dtype; remove the file to have it done again"
        )
    return item
