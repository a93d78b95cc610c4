# SPDX-License-Identifier: Apache-2.0
"""What two processes do in the tests of several processes, gloo or NCCL; imported by the processes themselves."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from obs_kernels import OBSConfig, OBSPruner
from obs_kernels.errors import ObsKernelsError
from obs_kernels.pruning import gradual_step
from obs_kernels.pruning.calibration import LossFn
from obs_kernels.pruning.distributed import _Exchange, distributed_step
from tests.tiny_training import samples, span_loss, stacked, tiny_model

BATCHES = [*stacked(samples(5, 20), 4), *stacked(samples(6, 3), 3)]
"""Six batches, the last one smaller: 23 samples."""
CASES: dict[str, dict[str, Any]] = {
    "block": {"pattern": "2:8", "num_grads": 22, "curvature": "block"},
    "batch gradients": {"pattern": "2:4", "num_grads": 5, "gradients": "batch", "fisher_block_size": 16},
    "panels": {"pattern": "16:2:8", "num_grads": 23, "curvature": "block"},
    "global": {"pattern": "unstructured:0.7", "num_grads": 23, "global_sparsity": True, "fisher_block_size": 16},
    "blocks of 4": {"pattern": "block4:0.5", "num_grads": 23, "fisher_block_size": 16},
    "magnitude": {"pattern": "2:8", "method": "magnitude", "update": "none"},
    "row": {"pattern": "2:8", "num_grads": 23, "curvature": "row"},
    "row, one after the other": {"pattern": "2:8", "num_grads": 21, "curvature": "row", "sequential": True},
    "layer": {"pattern": "unstructured:0.5", "num_grads": 23, "curvature": "layer"},
    "a loader that shuffles": {"pattern": "2:8", "num_grads": 23, "curvature": "block"},
}


def pruned(case: str, *, shared: bool, device: str = "cpu") -> tuple[nn.Module, OBSPruner]:
    """A model pruned in two steps where the pattern has one on the way; trained a little in between."""
    model = tiny_model(layers=1, dropout=0.0).to(device)
    pruner = OBSPruner(model, OBSConfig(**CASES[case]))
    step = distributed_step if shared else gradual_step
    loader: Any = BATCHES
    if case == "a loader that shuffles":
        loader = torch.utils.data.DataLoader(BATCHES, batch_size=None, shuffle=True)  # type: ignore[arg-type]
    stages = [p for p in ("4:8", "16:4:8") if type(pruner.config.parsed_pattern) is type(_parsed(p))]
    for pattern in [*(stages if pruner.config.pattern.endswith("2:8") else []), pruner.config.pattern]:
        step(pruner, pattern, loader, span_loss)
    return model, pruner


def _parsed(text: str) -> Any:
    from obs_kernels import parse_pattern

    return parse_pattern(text)


def start(rank: int, folder: str, backend: str) -> str:
    """The device of this process."""
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    store = dist.FileStore(os.path.join(folder, "store"), 2)
    dist.init_process_group(backend, rank=rank, world_size=2, store=store)
    return f"cuda:{rank}" if backend == "nccl" else "cpu"


def equality(rank: int, folder: str, backend: str = "gloo") -> None:
    """Every case, then what is refused and a Trainer; each process writes what it has."""
    device = start(rank, folder, backend)
    for case in CASES:
        _, pruner = pruned(case, shared=True, device=device)
        report = pruner.report()
        found = {
            "weights": {layer.name: layer.matrix.cpu().clone() for layer in pruner.layers},
            "biases": {n.name: n.bias.detach().cpu().clone() for n in pruner.layers if n.bias is not None},
            "masks": {layer.name: layer.mask.cpu() for layer in pruner.layers},
            "saliency": report.saliency,
            "num_grads": report.num_grads,
            "config": pruner.config.to_dict(),
            "owned": [layer.name for layer in pruner.layers if layer.has_fisher],
            "violations": pruner.verify(),
        }
        torch.save(found, Path(folder) / f"{case}.{rank}.pt")
    if backend == "gloo":
        refusals(rank, folder)
        marks(rank, folder)
        training(rank, folder)
    dist.destroy_process_group()


def refusals(rank: int, folder: str) -> None:
    """What goes wrong in one process ends the step in both; a line for each."""
    lines = []

    def attempt(name: str, model: nn.Module, loader: Any, loss: LossFn = span_loss, **changes: Any) -> None:
        pruner = OBSPruner(model, OBSConfig(**{"pattern": "2:8", "num_grads": 23, "curvature": "block"} | changes))
        before = [layer.matrix.clone() for layer in pruner.layers]
        try:
            distributed_step(pruner, "2:8", loader, loss)
            lines.append(f"{name}: fine")
        except ObsKernelsError as error:
            same = all(torch.equal(a, layer.matrix) for a, layer in zip(before, pruner.layers, strict=True))
            whole = pruner.stage == 0 and pruner.config.num_grads == 23
            lines.append(f"{name}: {type(error).__name__}: {error} unchanged {same and whole}")

    attempt("disagree", tiny_model(seed=rank, layers=1), BATCHES)
    attempt("too few", tiny_model(layers=1), BATCHES[:1])
    broken = [dict(batch) for batch in BATCHES]
    model = tiny_model(layers=1)

    def poisoned(found: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return span_loss(found, batch) * (float("nan") if rank == 1 else 1.0)

    pruner = OBSPruner(model, OBSConfig(pattern="2:8", num_grads=23, curvature="block"))
    try:
        distributed_step(pruner, "2:8", broken, poisoned)
    except ObsKernelsError as error:
        lines.append(f"one fails: {type(error).__name__}: {error}")
    attempt("after that", tiny_model(layers=1), BATCHES)
    lists = [{key: value.tolist() for key, value in batch.items()} for batch in BATCHES]

    def from_lists(found: nn.Module, batch: dict[str, list[Any]]) -> Tensor:
        return span_loss(found, {key: torch.tensor(value) for key, value in batch.items()})

    attempt("no tensor", tiny_model(layers=1), lists, from_lists)
    attempt("no tensor, batch gradients", tiny_model(layers=1), lists, from_lists, gradients="batch", num_grads=6)
    broadcast = _Exchange._broadcast

    def damaged(self: _Exchange, value: Tensor, owner: int) -> Tensor:
        sent = broadcast(self, value, owner)
        return sent.logical_not() if rank == 1 and sent.dtype == torch.bool else sent

    _Exchange._broadcast = damaged  # type: ignore[method-assign]
    for sequential in (False, True):
        row = {"curvature": "row", "sequential": True} if sequential else {}
        attempt("damaged on the way", tiny_model(layers=1), BATCHES, **row)
    _Exchange._broadcast = broadcast  # type: ignore[method-assign]
    (Path(folder) / f"lines.{rank}").write_text("\n".join(lines))


def marks(rank: int, folder: str) -> None:
    """A checkpoint that the second process is late with; the first one notes what was there when it was whole."""
    from obs_kernels.training.trainer import WholeCheckpoints

    checkpoint = Path(folder) / "checkpoint-1"
    checkpoint.mkdir(exist_ok=True)
    if rank == 1:
        time.sleep(1.0)
        (checkpoint / "rng_state_1.pth").touch()
    args, state = SimpleNamespace(output_dir=folder), SimpleNamespace(is_world_process_zero=rank == 0, global_step=1)
    WholeCheckpoints().on_save(args, state, None)  # type: ignore[arg-type]
    if rank == 0:
        (Path(folder) / "whole with").write_text(" ".join(sorted(path.name for path in checkpoint.iterdir())))


def training(rank: int, folder: str) -> None:
    """A Trainer under DDP with the callback, in both processes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = "29500"  # asked for, and not used: the processes have found each other
    from obs_kernels.training import OBSPruningCallback
    from tests.tiny_training import SCHEDULE, config, trainer_of

    model = tiny_model(layers=1)
    callback = OBSPruningCallback(config(), SCHEDULE, BATCHES, span_loss)
    changes = {"per_device_train_batch_size": 2, "ddp_backend": "gloo", "save_strategy": "no"}
    trainer = trainer_of(model, Path(folder), [callback], **changes)
    callback.attach(trainer)
    trainer.train()
    assert dist.get_world_size() == 2 and callback.gradual is not None
    pruner = callback.gradual.pruner
    found = {"weights": {k: v.clone() for k, v in model.state_dict().items()}, "violations": pruner.verify()}
    found |= {"position": callback.gradual.position, "sparsity": callback.gradual.sparsity}
    torch.save(found, Path(folder) / f"trained.{rank}.pt")
