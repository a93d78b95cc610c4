# SPDX-License-Identifier: Apache-2.0
"""A short fine-tuning of a pruned model with its masks held: what comes back in a minute."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from obs_kernels.pruning import OBSPruner
from obs_kernels.training.squad import Batch
from obs_kernels.training.squad_batches import SquadLoader, model_inputs, span_logits, squad_loss

TEMPERATURE = 2.0


@dataclass(frozen=True)
class Recovery:
    """What the fine-tuning did."""

    steps: int
    seconds: float
    last_loss: float
    violations: int


def recover_(
    model: nn.Module,
    pruner: OBSPruner,
    loader: SquadLoader,
    *,
    teacher: nn.Module | None,
    seconds: float,
    lr: float = 1e-3,
) -> Recovery:
    """Fine-tune ``model`` in place for ``seconds``, masks applied after every step.

    Args:
        model: pruned by ``pruner``.
        loader: labelled windows, ``order="shuffle"``; walked again and again.
        teacher: dense model to distil from (softened logits, temperature 2), or None for the labels alone.
        seconds: wall time; the learning rate falls linearly to 0 over it.
        lr: AdamW's learning rate at the start, after 5 % of warm-up.
    """
    from tqdm import tqdm

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    start, steps, loss, epoch = time.perf_counter(), 0, torch.zeros(()), 0
    training = model.training
    model.train()
    with tqdm(total=round(seconds), desc="recover", unit="s", leave=False, disable=None, delay=2) as bar:
        while (share := (time.perf_counter() - start) / seconds) < 1:
            loader.set_epoch(epoch)
            epoch += 1
            for batch in loader:
                share = (time.perf_counter() - start) / seconds
                if share >= 1:
                    break
                for group in optimizer.param_groups:
                    group["lr"] = lr * min(1.0, share / 0.05 + 0.02) * (1.0 - share)
                loss = squad_loss(model, batch).mean()
                if teacher is not None:
                    loss = loss + _distillation(model, teacher, batch)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                pruner.apply_masks()
                steps += 1
                bar.update(round(share * seconds) - bar.n)
    optimizer.zero_grad(set_to_none=True)
    model.train(training)
    return Recovery(steps, time.perf_counter() - start, float(loss.detach()), pruner.verify())


def _distillation(model: nn.Module, teacher: nn.Module, batch: Batch) -> Tensor:
    """T^2 KL(teacher || student) of start and end positions inside the attention mask, averaged over the samples."""
    inputs = model_inputs(model, batch)
    padding = inputs["attention_mask"] == 0
    with torch.no_grad():
        wanted = span_logits(teacher(**inputs))
    total = torch.zeros((), device=padding.device)
    for student, target in zip(span_logits(model(**inputs)), wanted, strict=True):
        log_p = F.log_softmax((target / TEMPERATURE).masked_fill(padding, -1e9), dim=1)
        log_q = F.log_softmax((student / TEMPERATURE).masked_fill(padding, -1e9), dim=1)
        total = total + F.kl_div(log_q, log_p, log_target=True, reduction="batchmean") * TEMPERATURE**2
    return total / 2
