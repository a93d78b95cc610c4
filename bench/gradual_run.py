# SPDX-License-Identifier: Apache-2.0
"""A fast training loop of a SQuAD model with a teacher and a pruning schedule, in pieces that go on from each other.

On a GPU a small model is bound by the host, not by its arithmetic. So the windows lie on the device, and one optimizer
step (teacher, student, backward, clipping, AdamW, masks) is one CUDA graph for each padded width: a step costs the host
one launch. Masks are buffers that keep their memory, so a graph follows later prunings. On a CPU, or with
``graphs=False``, the same step runs eagerly.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from obs_kernels import OBSConfig, OBSPruner
from obs_kernels.pruning.schedule import PruningSchedule
from obs_kernels.pruning.state_files import STATE_JSON, read_state, write_state
from obs_kernels.training.distillation import Distiller
from obs_kernels.training.gradual import GradualPruning
from obs_kernels.training.learning_rates import learning_rate_factor
from obs_kernels.training.length_batches import shuffled_batches
from obs_kernels.training.squad import SquadWindows
from obs_kernels.training.squad_batches import LOSSES, calibration_loader, span_losses

WIDTH_STEP = 32
"""Widths that batches are padded to: a graph for each."""
EAGER_STEPS = 2
"""Steps of a width before its graph is captured: libraries choose their kernels and make their workspaces."""
CHECKPOINT = "step-"


@dataclass(frozen=True)
class TrainSettings:
    """What all rows share."""

    epochs: float = 8.0
    batch_size: int = 32
    learning_rate: float = 3e-4
    final_factor: float = 0.01
    warmup_ratio: float = 0.02
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    hardness: float = 1.0
    temperature: float = 2.0
    hidden: float = 10.0
    dropout: float | None = None
    """None leaves the model's own."""
    calibration_batch_size: int = 16


class DeviceWindows:
    """Labelled windows on the device, from which a batch is gathered by its rows without the host."""

    def __init__(self, windows: SquadWindows, device: torch.device) -> None:
        assert windows.start_positions is not None and windows.end_positions is not None
        self.ids, self.lengths = windows.input_ids.to(device), windows.lengths.to(device)
        self.types = None if windows.token_type_ids is None else windows.token_type_ids.to(device)
        self.starts, self.ends = windows.start_positions.to(device), windows.end_positions.to(device)
        self.columns = torch.arange(self.ids.shape[1], device=device)

    def batch(self, rows: Tensor, width: int) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
        """(inputs with a mask [B, 1, 1, T] that models take as it is, mask [B, T], labels) of ``rows`` [B]."""
        width = min(width, self.ids.shape[1])
        mask = self.columns[:width] < self.lengths.index_select(0, rows)[:, None]
        inputs = {
            "input_ids": self.ids.index_select(0, rows)[:, :width].long(),
            "attention_mask": mask[:, None, None, :],
        }
        if self.types is not None:
            inputs["token_type_ids"] = self.types.index_select(0, rows)[:, :width].long()
        labels = {
            "start_positions": self.starts.index_select(0, rows),
            "end_positions": self.ends.index_select(0, rows),
        }
        return inputs, mask, labels


class Trainee:
    """A model in training: its step, what it is pruned by, and its checkpoints.

    Args:
        model: dense, on its device; trained and pruned in place.
        teacher: its own copy, or another model; None learns from the labels alone.
        windows: labelled.
        settings: shared by all rows.
        config, schedule: what to prune, and when; None trains without pruning.
        seed: of the order of the batches, and of dropout.
        graphs: capture CUDA graphs; needs a GPU.
        autocast: of student and teacher; None runs in the model's dtype.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        windows: SquadWindows,
        settings: TrainSettings,
        *,
        config: OBSConfig | None,
        schedule: PruningSchedule | None,
        seed: int,
        graphs: bool,
        autocast: torch.dtype | None,
    ) -> None:
        self.model, self.windows, self.settings, self.seed = model, windows, settings, seed
        self.device = next(model.parameters()).device
        self.graphs, self.autocast = graphs, autocast
        if settings.dropout is not None:
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = settings.dropout
        self.distiller = None
        if teacher is not None:
            self.distiller = Distiller(
                teacher, hardness=settings.hardness, temperature=settings.temperature, hidden=settings.hidden
            )
        self.data = DeviceWindows(windows, self.device)
        self.steps_per_epoch = len(windows) // settings.batch_size  # the rest, less than a batch, waits an epoch
        self.total_steps = max(1, round(settings.epochs * self.steps_per_epoch))
        self.factor = learning_rate_factor(
            "linear",
            total_steps=self.total_steps,
            final_factor=settings.final_factor,
            warmup_steps=round(settings.warmup_ratio * self.total_steps),
        )
        self.optimizer = self._optimizer()
        self.gradual = self._gradual(config, schedule)
        self.step_number = 0
        self.seconds = self.seconds_prune = 0.0
        self.loss_sum = torch.zeros((), device=self.device)
        self.losses: list[float] = []
        """Mean loss of each epoch."""
        self._order: tuple[int, list[Tensor], Tensor] | None = None
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._seen: dict[int, int] = {}
        self._pool: Any = None
        self._side: torch.cuda.Stream | None = torch.cuda.Stream() if graphs else None

    @property
    def epoch(self) -> float:
        """Epochs done."""
        return self.step_number / self.steps_per_epoch

    @property
    def is_done(self) -> bool:
        """Whether all steps are done."""
        return self.step_number >= self.total_steps

    def train(self, deadline: float, on_epoch: Callable[[], None]) -> None:
        """Steps until all are done or ``time.monotonic()`` passes ``deadline``; ``on_epoch`` after each whole epoch."""
        self.model.train()
        began = time.perf_counter()
        while not self.is_done and time.monotonic() < deadline:
            self._prune()
            self._one_step()
            self.step_number += 1
            if self.step_number % self.steps_per_epoch == 0 or self.is_done:
                steps = (self.step_number - 1) % self.steps_per_epoch + 1
                self.losses.append(float(self.loss_sum) / steps)
                self.loss_sum.zero_()
                self.seconds += time.perf_counter() - began
                on_epoch()
                self.model.train()
                began = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds += time.perf_counter() - began

    def save(self, folder: Path) -> None:
        """Write a checkpoint, and remove the older ones when it is whole."""
        state = {
            "step": self.step_number,
            "seconds": self.seconds,
            "seconds_prune": self.seconds_prune,
            "losses": self.losses,
            "loss_sum": self.loss_sum,
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict()["state"],
            "gradual": None if self.gradual is None else self.gradual.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        target = folder / f"{CHECKPOINT}{self.step_number}"
        write_state(target, state)
        for path in folder.glob(f"{CHECKPOINT}*"):
            if path != target:
                shutil.rmtree(path, ignore_errors=True)

    def load(self, folder: Path) -> bool:
        """Go on from the latest whole checkpoint of ``folder``; False where there is none."""
        found = [path.parent for path in folder.glob(f"{CHECKPOINT}*/{STATE_JSON}")]
        if not found:
            return False
        state = read_state(max(found, key=lambda path: int(path.name.removeprefix(CHECKPOINT))))
        self.model.load_state_dict(state["model"])
        if self.gradual is not None:
            self.gradual.load_state_dict(state["gradual"])
        whole = self.optimizer.state_dict()
        whole["state"] = {int(key): value for key, value in state["optimizer"].items()}
        self.optimizer.load_state_dict(whole)
        self.step_number, self.losses = state["step"], state["losses"]
        self.seconds, self.seconds_prune = state["seconds"], state["seconds_prune"]
        self.loss_sum.copy_(state["loss_sum"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        return True

    def _optimizer(self) -> torch.optim.AdamW:
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": self.settings.weight_decay}]
        groups.append({"params": others, "weight_decay": 0.0})
        if self.device.type != "cuda":
            return torch.optim.AdamW(groups, lr=self.settings.learning_rate)
        rate = torch.tensor(self.settings.learning_rate, device=self.device)  # read by the graph, written before it
        return torch.optim.AdamW(groups, lr=rate, fused=True, capturable=True)

    def _gradual(self, config: OBSConfig | None, schedule: PruningSchedule | None) -> GradualPruning | None:
        if config is None or schedule is None:
            return None
        loader = calibration_loader(
            self.windows,
            num_samples=min(config.num_grads, len(self.windows)),
            batch_size=self.settings.calibration_batch_size,
            seed=config.seed,
        )
        loss = LOSSES["outputs" if config.curvature == "row" else "labels"]
        pruner = OBSPruner(self.model, config)
        return GradualPruning(pruner, schedule, loader, loss, steps_per_epoch=self.steps_per_epoch)

    def _prune(self) -> None:
        if self.gradual is None or self.gradual.is_due is None or self.gradual.is_due > self.step_number:
            return
        began = time.perf_counter()
        self.gradual.before_step(self.step_number, self.optimizer)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds_prune += time.perf_counter() - began

    def _one_step(self) -> None:
        rows, width = self._rows()
        for group in self.optimizer.param_groups:
            rate = self.settings.learning_rate * self.factor(self.step_number)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        if not self.graphs:
            self._work(rows, width)
            return
        assert self._side is not None
        if width in self._graphs:
            graph, static = self._graphs[width]
            static.copy_(rows)
            graph.replay()
            return
        self._seen[width] = self._seen.get(width, 0) + 1
        if self._seen[width] <= EAGER_STEPS:
            self._side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._side):
                self._work(rows, width)
            torch.cuda.current_stream().wait_stream(self._side)
            return
        self._capture(rows, width)

    def _capture(self, rows: Tensor, width: int) -> None:
        """Capture the step of a width, and do it."""
        static, graph = rows.clone(), torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)  # so that the backward makes them in the graph's own memory
        with torch.cuda.graph(graph, pool=self._pool):
            self._work(static, width)
        self._pool = self._pool or graph.pool()
        self._graphs[width] = (graph, static)
        graph.replay()

    def _work(self, rows: Tensor, width: int) -> None:
        """One optimizer step on windows ``rows``: no host read, no branch on values."""
        inputs, mask, labels = self.data.batch(rows, width)
        self.optimizer.zero_grad(set_to_none=True)
        kind = self.device.type
        # no cache of cast weights: a graph would keep using those of its first step
        with torch.autocast(kind, dtype=self.autocast, cache_enabled=False) if self.autocast else nullcontext():
            outputs = self.model(**inputs, **({} if self.distiller is None else self.distiller.options))
            task = None
            if self.distiller is None or self.distiller.hardness < 1:
                task = span_losses(outputs, mask, labels).mean()
            loss = task if self.distiller is None else self.distiller.loss(task, outputs, inputs, attention_mask=mask)
        assert loss is not None
        loss.backward()
        if self.gradual is not None:
            self.gradual.masks.mask_gradients()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        self.optimizer.step()
        if self.gradual is not None:
            self.gradual.after_step(self.optimizer)
        self.loss_sum.add_(loss.detach())

    def _rows(self) -> tuple[Tensor, int]:
        """Windows of this step on the device, and the width they are padded to."""
        epoch, place = divmod(self.step_number, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            size, lengths = self.settings.batch_size, self.windows.lengths
            batches = shuffled_batches(lengths, torch.arange(len(lengths)), size, seed=self.seed, epoch=epoch)
            whole = [batch for batch in batches if len(batch) == size]
            self._order = (epoch, whole, torch.stack(whole).to(self.device))
        _, whole, on_device = self._order
        longest = int(self.windows.lengths[whole[place]].max())
        return on_device[place], -(-longest // WIDTH_STEP) * WIDTH_STEP
