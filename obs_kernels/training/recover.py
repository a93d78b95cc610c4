# SPDX-License-Identifier: Apache-2.0
"""A short fine-tuning of a pruned model with its masks held: what comes back in a minute."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn

from obs_kernels.pruning import OBSPruner
from obs_kernels.training.distillation import Distiller
from obs_kernels.training.squad_batches import SquadLoader, model_inputs, span_losses

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
    distiller = None if teacher is None else Distiller(teacher, temperature=TEMPERATURE)
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
                inputs = model_inputs(model, batch)
                outputs = model(**inputs)
                loss = span_losses(outputs, inputs["attention_mask"], batch).mean()
                if distiller is not None:
                    loss = loss + distiller.loss(None, outputs, inputs)
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
