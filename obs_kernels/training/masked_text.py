# SPDX-License-Identifier: Apache-2.0
"""Masked language modelling on plain text: blocks of tokens, some of them hidden, the model says which they were."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from obs_kernels.errors import ConfigError, DataFormatError, MissingDependencyError
from obs_kernels.pruning.output_probe import output_probe
from obs_kernels.training.language import read_text
from obs_kernels.training.tasks import Batch, Source, TaskData, TaskSources, limited
from obs_kernels.training.token_table import TokenTable, eval_outputs, make_table, require_fast

if TYPE_CHECKING:
    from obs_kernels.recipes import TrainingSettings

MASKED_SHARE, AS_MASK, AS_RANDOM = 0.15, 0.8, 0.1
"""Share of tokens that are to be told; of them, shown as the mask token, and as a random one; the rest as they are."""
IGNORED = -100
_EVALUATION = 2**20
"""Stands for an epoch: the evaluation hides the same tokens every time."""
_PROBED = 4
_LINES_AT_ONCE = 10_000


class MaskedTextData(TaskData):
    """Blocks of ``max_length`` tokens of a text; which tokens are hidden is a function of seed, epoch and samples."""

    score = "perplexity"
    smaller_is_better = True

    def __init__(self, settings: TrainingSettings, tokenizer: Any, sources: TaskSources) -> None:
        require_fast(tokenizer)
        if tokenizer.mask_token_id is None:
            raise ConfigError(
                "tokenizer must have a mask token for task 'mlm', got none; use that of a BERT-like model"
            )
        self.mask_id, self.vocab_size = int(tokenizer.mask_token_id), len(tokenizer)
        self.special = torch.tensor(sorted(set(tokenizer.all_special_ids)))
        self.eval_batch_size, self.seed = settings.eval_batch_size, settings.seed

        def part(source: Source, split: str, most: int | None) -> TokenTable:
            table = _blocks(read_lines(source, split=split), tokenizer, sources.max_length, os.fspath(source))
            rows = limited(len(table), most, settings.seed)
            return TokenTable(table.input_ids[rows], None, table.lengths[rows])

        self.dev = part(sources.data, "validation", sources.max_eval)
        self.table = part(sources.train, "train", sources.max_train)
        self.lengths = self.table.lengths

    def batch(self, rows: Tensor, epoch: int = 0) -> Batch:
        """Blocks with hidden tokens; "labels" holds these, and -100 elsewhere."""
        return self._hidden(self.table.inputs(rows), rows, epoch)

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        """Mean cross-entropy of each block's hidden tokens."""
        losses, asked = self._token_losses(outputs, batch)
        return losses.sum(1) / asked.sum(1).clamp_min(1)

    def output_losses(self, outputs: Any, batch: Batch) -> Tensor:
        """Of the distributions at the hidden tokens."""
        (logits,) = self.logits(outputs)
        return output_probe(logits, padding=(batch["labels"].to(logits.device) == IGNORED)[..., None])

    def evaluate(self, model: nn.Module) -> dict[str, Any]:
        """Perplexity of hidden tokens, the same ones at every call."""
        began, total, count = time.perf_counter(), 0.0, 0

        def hidden(rows: Tensor) -> Batch:
            return self._hidden(self.dev.inputs(rows), rows, _EVALUATION)

        for _, batch, outputs in eval_outputs(model, self.dev.lengths, hidden, self.eval_batch_size):
            losses, asked = self._token_losses(outputs, batch)
            total, count = total + float(losses.double().sum()), count + int(asked.sum())
        loss = total / max(count, 1)
        scores = {"perplexity": math.exp(min(loss, 700.0)), "loss": loss}
        return scores | {"samples": len(self.dev), "seconds": time.perf_counter() - began}

    def probe_batch(self) -> Batch:
        """The first blocks of the evaluation."""
        return self.dev.inputs(torch.arange(min(_PROBED, len(self.dev))))

    def logits(self, outputs: Any) -> tuple[Tensor, ...]:
        """[B, T, V]."""
        logits = outputs["logits"] if hasattr(outputs, "keys") else outputs[0]
        return (logits.to(torch.promote_types(logits.dtype, torch.float32)),)

    def _token_losses(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """[B, T] losses, 0 where nothing is hidden, and [B, T] bool where something is."""
        (logits,) = self.logits(outputs)
        labels = batch["labels"].to(logits.device)
        losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        return losses, labels != IGNORED

    def _hidden(self, inputs: Batch, rows: Tensor, epoch: int) -> Batch:
        seed = (self.seed * 1_000_003 + epoch) * 1_000_003 + int(rows[0])
        draw = torch.Generator().manual_seed(seed % 2**63)
        ids = inputs["input_ids"]
        chance, how = (torch.rand(ids.shape, generator=draw) for _ in "ab")
        other = torch.randint(self.vocab_size, ids.shape, generator=draw)
        asked = (chance < MASKED_SHARE) & ~torch.isin(ids, self.special) & (inputs["attention_mask"] == 1)
        shown = torch.where(how < AS_MASK, self.mask_id, torch.where(how < AS_MASK + AS_RANDOM, other, ids))
        return inputs | {"input_ids": torch.where(asked, shown, ids), "labels": ids.masked_fill(~asked, IGNORED)}


def read_lines(source: Source, *, split: str) -> list[str]:
    """Lines of a text file (plain or .gz), or of the column "text" of a hub data set ``owner/name[:configuration]``.

    Raises:
        DataFormatError: no such file or data set, no text in it. MissingDependencyError: datasets is not installed.
    """
    name = os.fspath(source)
    path = Path(name).expanduser()
    if path.is_file() or name.lower().endswith((".txt", ".gz")):
        try:
            lines = read_text(path).splitlines()
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise DataFormatError(f"source must be a text file, plain or .gz, got {name!r} ({error})") from None
    else:
        lines = _hub_lines(name, split)
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise DataFormatError(f"source must hold text, got none in {name!r}; give another")
    return lines


def _hub_lines(name: str, split: str) -> list[str]:
    try:
        import datasets
    except ImportError:
        raise MissingDependencyError(
            f"source={name!r} is a hub name and needs the datasets library; pip install datasets, or give a file"
        ) from None
    owner, _, configuration = name.partition(":")
    try:
        return list(datasets.load_dataset(owner, *([configuration] if configuration else []), split=split)["text"])
    except Exception as error:  # the library raises a dozen kinds for a bad name, a bad split, no network
        raise DataFormatError(
            f"source must be a text file or a hub data set with a column text, got {name!r} with split={split!r} "
            f"({error}); check the name"
        ) from None


def _blocks(lines: list[str], tokenizer: Any, max_length: int, name: str) -> TokenTable:
    """Blocks that begin and end as the tokenizer frames a text; what fills no block is left out."""
    frame = tokenizer("")["input_ids"]
    before, after = frame[: len(frame) // 2 + len(frame) % 2], frame[len(frame) // 2 + len(frame) % 2 :]
    room = max_length - len(frame)
    ids: list[int] = []
    for begin in range(0, len(lines), _LINES_AT_ONCE):
        for row in tokenizer(lines[begin : begin + _LINES_AT_ONCE], add_special_tokens=False)["input_ids"]:
            ids += row
    if room < 1 or len(ids) < room:
        raise DataFormatError(
            f"source must hold at least one block of {max_length} tokens, got {len(ids)} tokens in {name!r}; lower "
            f"max_length or give more text"
        )
    whole = [[*before, *ids[i : i + room], *after] for i in range(0, len(ids) - room + 1, room)]
    return make_table(whole, None, getattr(tokenizer, "pad_token_id", None) or 0)
