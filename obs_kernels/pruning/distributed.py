# SPDX-License-Identifier: Apache-2.0
"""A pruning step over the processes of ``torch.distributed``: each takes its share of the samples and of the layers.

Every process sees its part of the batches, so every gradient counts once. The sums of a layer (Fisher, or Hessian and
what goes with it) are reduced to the one process that owns it, owners being balanced by bytes; it chooses and updates,
and sends mask and weights to all. Scores of a threshold over all layers are shared before the choice. Sums are linear,
so that the result is that of one process on the same samples, to rounding. The hashes of weights and masks are compared
before the step, and those of the new ones before they are written. What goes between processes is plain tensors and
text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from obs_kernels import errors
from obs_kernels.errors import ConfigError, DeviceMismatchError, ObsKernelsError
from obs_kernels.patterns import Pattern
from obs_kernels.pruning.calibration import LossFn, seeded
from obs_kernels.pruning.config import OBSConfig
from obs_kernels.pruning.gradual import gradual_step
from obs_kernels.pruning.layer import PrunedLayer
from obs_kernels.pruning.pruner import OBSPruner
from obs_kernels.pruning.report import PruningReport
from obs_kernels.pruning.row_layer import RowLayer
from obs_kernels.pruning.samples import batch_size
from obs_kernels.pruning.step import StagedLayer, stage_step, unit_saliency

STAGED = ("saliency", "damp", "blocks_raised", "outcome", "num_grads", "seconds")
"""Fields of ``StagedLayer`` that are plain values."""


def is_distributed() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def distributed_step(
    pruner: OBSPruner, pattern: str | Pattern, loader: Iterable[Any] | None, loss_fn: LossFn | None
) -> PruningReport:
    """``gradual_step`` shared by all processes of the default group; every one calls it, with an equal pruner.

    Args:
        pruner: of the unwrapped model, which is the same in every process.
        pattern: as in ``gradual_step``.
        loader: the same batches in every process, re-iterable; batch i is taken by process i mod world. None where no
            gradient is needed.
        loss_fn: as in ``gradual_step``. One that draws random numbers draws others in each process.

    Raises:
        DeviceMismatchError: weights or masks differ between processes, before the step or as it would write them.
            ConfigError: fewer batches than processes, one that does not say how many samples it has, or a setting that
            only one process can do. What ``gradual_step`` raises in one process, every one raises; the model is then
            as before the call.
    """
    if (clusters := pruner.config.row_clusters) != 1:  # each process would find others
        raise ConfigError(f"row_clusters is for one process, got {clusters} with several; use row_clusters=1")
    work = _Exchange(pruner)
    now = [(layer.weight.detach(), layer.bias, layer.mask) for layer in pruner.layers]
    work.require_same("before the step", now)
    budget = pruner._budget
    try:
        pruner._budget = min(work.agree(pruner.plan().budget))  # or each would make groups by its own free memory
        with _share(pruner, loader, work) as batches:
            gradual_step(pruner, pattern, batches, loss_fn, stage=work.stage)
    except Exception as error:  # also that of a loss_fn: the others wait
        work.tell(error)
        raise
    finally:
        pruner._budget = budget
    return pruner.report()


def owners_by_bytes(layers: Sequence[PrunedLayer], world: int) -> dict[PrunedLayer, int]:
    """The process of each layer: the largest first, each to the process with the fewest bytes so far."""
    loads, found = [0] * world, {}
    for layer in sorted(layers, key=lambda layer: (-_bytes(layer), layer.name)):
        owner = loads.index(min(loads))
        found[layer] = owner
        loads[owner] += _bytes(layer)
    return found


def _bytes(layer: PrunedLayer) -> int:
    return layer.fisher_bytes + layer.mask.numel()


class _Part:
    """Batches ``rank``, ``rank + world``, ... of a loader, up to number ``end``; ``begin`` starts a pass over it."""

    def __init__(self, begin: Callable[[], Iterator[Any]], rank: int, world: int, end: int) -> None:
        self.begin, self.rank, self.world, self.end = begin, rank, world, end

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self.begin()):
            if number >= self.end:
                return
            if number % self.world == self.rank:
                yield batch


@contextmanager
def _share(pruner: OBSPruner, loader: Iterable[Any] | None, work: _Exchange) -> Iterator[Iterable[Any] | None]:
    """The batches of this process; ``pruner`` asks for as many gradients as they hold of those of the whole."""
    config = pruner.config
    if loader is None or not config.needs_fisher:
        yield loader
        return
    if isinstance(loader, Iterator):
        raise ConfigError("loader is an iterator, which can be used only once; pass a list, a DataLoader or the like")

    def begin() -> Iterator[Any]:
        """A pass in the order that the config's seed decides, in every process: a loader that shuffles draws when its
        first batch is asked for."""
        with seeded(work.device, config.seed):
            batches = iter(loader)
            first = list(islice(batches, 1))
        return chain(first, batches)

    taken: list[int] = []
    for batch in begin():  # which batches the whole takes, and how many samples of each
        if sum(taken) >= config.num_grads:
            break
        count = batch_size(batch) if config.gradients == "sample" else 1
        if count is None:
            raise ConfigError(
                f"batch {len(taken)} of loader must hold a tensor whose first dimension counts its samples, so that "
                f"several processes can share them, got {type(batch).__name__} without one; tokenise in the loader, or "
                f"use gradients='batch'"
            )
        taken.append(min(count, config.num_grads - sum(taken)))
    if len(taken) < work.world:
        raise ConfigError(
            f"loader must give a batch to each of {work.world} processes, got {len(taken)}; use smaller batches, or "
            f"raise num_grads"
        )
    mine = sum(taken[work.rank :: work.world])
    pruner.config = replace(config, num_grads=mine, seed=config.seed + work.rank)
    try:
        yield _Part(begin, work.rank, work.world, len(taken))
    finally:
        pruner.config = config


class _Exchange:
    """What the processes of a step send each other, in the same order everywhere.

    Every exchange of tensors follows one of texts, in which a process that failed says so: the others raise too,
    instead of waiting for it.
    """

    def __init__(self, pruner: OBSPruner) -> None:
        self.pruner = pruner
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = pruner.layers[0].weight.device
        self._told = False
        self._owners: dict[PrunedLayer, int] = {}

    def texts(self, text: str) -> list[str]:
        """Every process's text."""
        data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([data.numel()], dtype=torch.int64, device=self.device))
        counts = [int(size) for size in sizes]
        padded = torch.zeros(max(*counts, 1), dtype=torch.uint8, device=self.device)
        padded[: data.numel()] = data
        found = [torch.zeros_like(padded) for _ in range(self.world)]
        dist.all_gather(found, padded)
        return [bytes(part[:count].tolist()).decode() for part, count in zip(found, counts, strict=True)]

    def agree(self, value: Any = None, error: Exception | None = None) -> list[Any]:
        """Plain values of all; the error of any process, in every one."""
        message = {"value": value, "error": None if error is None else [type(error).__name__, str(error)]}
        found = [json.loads(text) for text in self.texts(json.dumps(message))]
        failed = [(rank, part["error"]) for rank, part in enumerate(found) if part["error"] is not None]
        if failed:
            self._told = True
            if error is not None:
                raise error
            rank, (name, text) = failed[0]
            raise getattr(errors, name, ConfigError)(f"process {rank}: {text}")
        return [part["value"] for part in found]

    def tell(self, error: Exception) -> None:
        """Say that this process failed, unless the others know."""
        if not self._told:
            self.agree(error=error)

    def require_same(self, when: str, values: Iterable[Sequence[Tensor | None]]) -> None:
        """Compare hashes of weights, biases and masks, of one layer after the other."""
        digest = hashlib.sha256()
        for value in chain.from_iterable(values):
            if value is not None:
                digest.update(_as_bytes(value.detach()).cpu().numpy().tobytes())
        found = self.agree(digest.hexdigest()[:32])
        if len(set(found)) > 1:
            self._told = True
            groups = {value: [rank for rank, other in enumerate(found) if other == value] for value in found}
            raise DeviceMismatchError(
                f"weights and masks must be the same in all processes {when}, got {len(groups)} different ones "
                f"(processes {', '.join(map(str, groups.values()))}); load the same model and seed everywhere"
            )

    def stage(self, names: Sequence[str]) -> list[StagedLayer]:
        """In place of ``OBSPruner.stage_layers``: reduce, let owners work, and send what they found to all."""
        pruner = self.pruner
        layers = pruner._named(names)
        self._owners = owners_by_bytes(layers, self.world)
        if any(other != list(names) for other in self.agree(list(names))):  # all have collected
            self._told = True
            raise DeviceMismatchError(
                "layers in hand must be the same in all processes; report this, it is a fault here"
            )
        if pruner.config.needs_fisher:
            for layer in layers:
                self._reduce(layer)
        mine = [layer for layer in layers if self._owners[layer] == self.rank]
        found, error = dict[str, StagedLayer](), None
        try:
            staged = stage_step(
                layers, pruner.stages[pruner.stage], pruner.config, only=mine, scores_of=self._shared_scores
            )
            found = {item.layer.name: item for item in staged}
        except ObsKernelsError as caught:
            if self._told:
                raise
            error = caught
        plain = {name: {key: getattr(item, key) for key in STAGED} for name, item in found.items()}
        for name, item in found.items():
            plain[name]["bias"] = item.bias is not None
        merged: dict[str, dict[str, Any]] = {}
        for part in self.agree(plain, error):
            merged |= part
        sent = [self._sent(layer, found.get(layer.name), merged[layer.name]) for layer in layers]
        # here, where an error still leaves the model as it was, and not when all is written
        self.require_same("after the step", [(item.weight, item.bias, item.mask) for item in sent])
        return sent

    def _sent(self, layer: PrunedLayer, item: StagedLayer | None, plain: dict[str, Any]) -> StagedLayer:
        """A staged layer, from its owner."""
        owner, has_bias = self._owners[layer], plain.pop("bias")
        mask = torch.zeros_like(layer.mask) if item is None else item.mask
        weight = torch.zeros_like(layer.matrix) if item is None else item.weight
        mask, weight = self._broadcast(mask, owner), self._broadcast(weight, owner)
        bias = None
        if has_bias:
            assert layer.bias is not None
            bias = torch.zeros_like(layer.bias.detach()) if item is None or item.bias is None else item.bias
            bias = self._broadcast(bias, owner)
        return StagedLayer(layer=layer, mask=mask, weight=weight, bias=bias, **plain)

    def _broadcast(self, value: Tensor, owner: int) -> Tensor:
        """``value`` of the owner, byte by byte: any dtype."""
        sent = _as_bytes(value).clone()
        dist.broadcast(sent, owner)
        return sent.view(value.dtype).view(value.shape)

    def _reduce(self, layer: PrunedLayer) -> None:
        """The sums of all processes into those of the owner; the others give back their memory."""
        count = torch.tensor([layer.num_grads], dtype=torch.int64, device=self.device)
        dist.all_reduce(count)
        owner, total = self._owners[layer], int(count)
        others: dict[str, Tensor | None] = {}
        if isinstance(layer, RowLayer):
            layer.allocate()
            width = layer.mask.shape[1]
            origin = layer.origin if layer.origin is not None else torch.zeros(width, device=self.device)
            origin = origin.clone()
            dist.broadcast(origin, 0)
            layer.move_origin(origin)
            if layer.has_target and layer.target_sum is None:
                shape = (layer.padded[0], layer.padded[1] + 1)
                layer.target_sum = torch.zeros(shape, dtype=torch.float32, device=self.device)
            names = ("row_sum", "input_sum", "target_sum")
            others = {name: getattr(layer, name) for name in names} | {"origin": origin}
        found = layer.fisher_sum
        sums = layer.allocate() if found is None else found
        added = [sums, *(value for name, value in others.items() if name != "origin" and value is not None)]
        for part in added:
            dist.reduce(part, owner)
        layer.clear()
        if owner == self.rank:
            layer.set_fisher(sums, total)
            for name, value in others.items():
                setattr(layer, name, value)

    def _shared_scores(self, layer: PrunedLayer, block: int, config: OBSConfig) -> Tensor:
        """``unit_saliency`` of a layer, from its owner."""
        owner, scores, error = self._owners[layer], None, None
        if owner == self.rank:
            try:
                scores = unit_saliency(layer, block, config)
            except ObsKernelsError as caught:
                error = caught
        try:
            self.agree(error=error)
        except ObsKernelsError:
            self._told = config.on_singular != "skip"  # where it skips a layer, every process goes on
            raise
        if scores is None:
            dtype = torch.promote_types(layer.weight.dtype, torch.float32)
            units = layer.padded[0] * layer.padded[1] // block
            scores = torch.zeros(units, dtype=dtype, device=self.device)
        return self._broadcast(scores.reshape(-1), owner)


def _as_bytes(value: Tensor) -> Tensor:
    return value.contiguous().view(-1).view(torch.uint8)
