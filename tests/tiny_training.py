# SPDX-License-Identifier: Apache-2.0
"""A tiny question answering model and its Trainer, for tests of training with pruning; a step takes milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from obs_kernels import OBSConfig, OBSPruner
from obs_kernels.pruning.schedule import PruningSchedule
from obs_kernels.training.squad import SquadWindows

WIDTH, LENGTH, SAMPLES = 32, 12, 24
SCHEDULE = PruningSchedule(
    start_epoch=0.5, end_epoch=1.5, update_frequency=0.5, shape="structure_decay", ladder=(6, 4, 2)
)
"""Of 8; with six steps an epoch before steps 3, 6 and 9."""


def tiny_model(seed: int = 0, *, layers: int = 2, dropout: float = 0.1, positions: int = 32) -> nn.Module:
    from transformers import BertConfig, BertForQuestionAnswering

    config = BertConfig(
        vocab_size=40,
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=positions,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BertForQuestionAnswering(config)


def samples(seed: int = 1, count: int = SAMPLES) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 40, (count, LENGTH), generator=generator)
    places = torch.randint(0, LENGTH, (count, 2), generator=generator).sort(1).values
    ones = torch.ones(LENGTH, dtype=torch.long)
    return [
        {"input_ids": i, "attention_mask": ones, "start_positions": p[0], "end_positions": p[1]}
        for i, p in zip(ids, places, strict=True)
    ]


def tiny_windows(count: int, *, longest: int) -> SquadWindows:
    """Random windows of 20 to ``longest`` tokens with random answers; there is no text behind them."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(20, longest + 1, (count,), generator=generator)
    places = torch.randint(0, 20, (count, 2), generator=generator).sort(1).values
    zeros = torch.zeros(count, dtype=torch.long)
    return SquadWindows(
        examples=(),
        input_ids=torch.randint(5, 40, (count, longest), generator=generator, dtype=torch.int32),
        token_type_ids=None,
        lengths=lengths,
        example_index=zeros,
        context_start=zeros,
        context_length=lengths,
        offset_row=zeros,
        token_offsets=torch.zeros(longest, 2, dtype=torch.int32),
        start_positions=places[:, 0],
        end_positions=places[:, 1],
    )


def stacked(found: list[dict[str, Tensor]], size: int = 8) -> list[dict[str, Tensor]]:
    parts = [found[i : i + size] for i in range(0, len(found), size)]
    return [{key: torch.stack([sample[key] for sample in part]) for key in part[0]} for part in parts]


def span_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    start = F.cross_entropy(outputs.start_logits, batch["start_positions"], reduction="none")
    return start + F.cross_entropy(outputs.end_logits, batch["end_positions"], reduction="none")


def config(curvature: str = "block", **changes: Any) -> OBSConfig:
    if curvature == "row":
        changes = {"sequential": True} | changes
    return OBSConfig(**({"pattern": "2:8", "num_grads": 16, "curvature": curvature} | changes))


def pruner_of(model: nn.Module, **changes: Any) -> OBSPruner:
    return OBSPruner(model, config(**changes))


def trainer_of(model: nn.Module, folder: Path, callbacks: list[Any], **changes: Any) -> Any:
    """A Trainer over 24 samples in batches of 4: six steps an epoch, two epochs, a checkpoint at every step."""
    from transformers import Trainer, TrainingArguments

    settings = {
        "output_dir": str(folder),
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 7,
    }
    return Trainer(
        model=model, args=TrainingArguments(**settings | changes), train_dataset=samples(), callbacks=callbacks
    )
