# SPDX-License-Identifier: Apache-2.0
"""Which questions a job evaluates on and which give it gradients, never the same ones; what was decided is noted."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from obs_kernels.errors import ConfigError
from obs_kernels.pruning import OBSConfig
from obs_kernels.training.squad import SquadExample, SquadWindows, load_squad, prepare_windows
from obs_kernels.training.squad_batches import SquadLoader, calibration_loader

MAX_LENGTH, DOC_STRIDE = 384, 128
"""The usual ones for SQuAD; less where the model or its tokenizer takes less."""


def load_questions(
    data: str | os.PathLike[str], train: str | os.PathLike[str] | None, config: OBSConfig, notes: list[str]
) -> tuple[list[SquadExample], list[SquadExample]]:
    """(questions to evaluate on, questions for the gradients), never the same ones."""
    evaluation = load_squad(data, split="validation")
    if not config.needs_fisher:
        notes.append(f"method {config.method!r} with update {config.update!r} needs no gradients: none were collected")
        return evaluation, []
    if train is not None or not Path(data).expanduser().is_file():
        calibration = load_squad(data if train is None else train, split="train")
        known = {(example.context, example.question) for example in evaluation}
        fresh = [example for example in calibration if (example.context, example.question) not in known]
        if not fresh:
            raise ConfigError(
                f"train holds only questions of data ({os.fspath(data)!r}), so that calibration would see the "
                f"evaluation; give other questions, or leave --train out to split the file"
            )
        source = f"the train split of {os.fspath(data)!r}" if train is None else repr(os.fspath(train))
        left = len(calibration) - len(fresh)
        notes.append(
            f"calibration and evaluation are disjoint: gradients come from {source}"
            + (f", less {left} questions that the evaluation also has" if left else "")
        )
        return evaluation, fresh
    contexts = list(dict.fromkeys(example.context for example in evaluation))
    questions = Counter(example.context for example in evaluation)
    order = torch.randperm(len(contexts), generator=torch.Generator().manual_seed(config.seed)).tolist()
    wanted, taken, count = config.num_grads, set[str](), 0
    for index in order[: len(contexts) // 2]:
        if count >= wanted:
            break
        taken.add(contexts[index])
        count += questions[contexts[index]]
    calibration = [example for example in evaluation if example.context in taken]
    if not calibration:
        raise ConfigError(
            f"data {os.fspath(data)!r} has one passage, which cannot be split into calibration and evaluation; give "
            f"questions for the gradients with --train"
        )
    rest = [example for example in evaluation if example.context not in taken]
    notes.append(
        f"no --train was given: the {len(calibration)} questions of {len(taken)} passages of {os.fspath(data)!r}, "
        f"drawn with seed {config.seed}, gave the gradients and are left out of the evaluation; it is on the other "
        f"{len(rest)} questions, before and after pruning"
    )
    return rest, calibration


def choose_questions(
    examples: list[SquadExample], count: int | None, seed: int, notes: list[str]
) -> list[SquadExample]:
    """``count`` of ``examples`` that ``seed`` chooses, in their order; None takes all."""
    if count is None or count >= len(examples):
        return examples
    chosen = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))[:count]
    notes.append(f"evaluated on {count} of {len(examples)} questions, chosen with seed {seed} (--max-eval)")
    return [examples[i] for i in chosen.sort().values.tolist()]


def job_windows(examples: list[SquadExample], net: nn.Module, tokenizer: Any, *, with_labels: bool) -> SquadWindows:
    """Windows as long as the model takes them, at most the 384 tokens that are usual for SQuAD."""
    positions = int(getattr(getattr(net, "config", None), "max_position_embeddings", None) or MAX_LENGTH)
    limit = int(getattr(tokenizer, "model_max_length", None) or MAX_LENGTH)
    length = min(MAX_LENGTH, positions, limit)
    stride = min(DOC_STRIDE, length // 3)
    return prepare_windows(examples, tokenizer, max_length=length, doc_stride=stride, with_labels=with_labels)


def calibration_of(
    examples: list[SquadExample], net: nn.Module, tokenizer: Any, config: OBSConfig, batch_size: int, notes: list[str]
) -> SquadLoader:
    """Batches for ``config.num_grads`` gradients, or for as many as the questions give."""
    windows = job_windows(examples, net, tokenizer, with_labels=True)
    by_sample = config.gradients == "sample"
    wanted = config.num_grads if by_sample else config.num_grads * batch_size
    if wanted > len(windows):
        unit = "gradients" if by_sample else f"gradients of batches of {batch_size}"
        notes.append(f"{config.num_grads} {unit} were asked for; the data has {len(windows)} windows, all are used")
    return calibration_loader(
        windows,
        num_samples=min(wanted, len(windows)),
        batch_size=batch_size,
        seed=config.seed,
        sort_by_length=by_sample,
    )
