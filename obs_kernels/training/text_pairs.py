# SPDX-License-Identifier: Apache-2.0
"""Pairs of texts with a class, MNLI and QQP: from TSV, JSON or JSON lines as GLUE has them, or from the hub."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import time
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from obs_kernels.errors import ConfigError, DataFormatError, MissingDependencyError
from obs_kernels.pruning.output_probe import output_probe
from obs_kernels.training.tasks import Batch, Source, TaskData, TaskSources, limited
from obs_kernels.training.token_table import TokenTable, eval_outputs, make_table, require_fast

if TYPE_CHECKING:
    from obs_kernels.recipes import TrainingSettings

_PROBED = 16
_TOKENIZE_AT_ONCE = 1000


@dataclass(frozen=True)
class PairFormat:
    """How a task names its columns and classes."""

    texts: tuple[tuple[str, str], ...]
    label: tuple[str, ...]
    classes: tuple[str, ...]
    validation: str
    """Name of the hub split to evaluate on."""


FORMATS = {
    "mnli": PairFormat(
        texts=(("premise", "hypothesis"), ("sentence1", "sentence2")),
        label=("label", "gold_label"),
        classes=("entailment", "neutral", "contradiction"),
        validation="validation_matched",
    ),
    "qqp": PairFormat(
        texts=(("question1", "question2"),),
        label=("label", "is_duplicate"),
        classes=("not_duplicate", "duplicate"),
        validation="validation",
    ),
}


@dataclass(frozen=True)
class TextPair:
    """Two texts and the number of their class."""

    first: str
    second: str
    label: int


def load_pairs(source: Source, task: str, *, split: str | None = None) -> list[TextPair]:
    """Read labelled pairs of ``task`` ("mnli" or "qqp").

    Args:
        source: a .tsv (with a head line), .json (a list, or an object with "data") or .jsonl file, each also gzipped;
            or a hub name, ``owner/name`` or ``owner/name:configuration``, fetched through the datasets library.
        split: of a hub name; a file has one part, and ignores it.

    Raises:
        DataFormatError: no such file, damaged, columns missing, no pair, or pairs without a known class (a test set).
        Pairs whose annotators did not agree ("-") are left out. MissingDependencyError: datasets is not installed.
    """
    if task not in FORMATS:
        raise ConfigError(f"task must be one of {', '.join(FORMATS)}, got {task!r}")
    name, form = os.fspath(source), FORMATS[task]
    rows = _read_file(Path(name).expanduser()) if _is_file(name) else _read_hub(name, split or form.validation)
    pairs = [pair for number, row in enumerate(rows) if (pair := _pair(row, form, f"row {number} of {name!r}"))]
    if not pairs:
        raise DataFormatError(f"source must hold at least one labelled pair, got none in {name!r}; give another")
    return pairs


class TextPairData(TaskData):
    """MNLI or QQP; a sample is a pair."""

    score = "accuracy"

    def __init__(self, settings: TrainingSettings, tokenizer: Any, sources: TaskSources) -> None:
        require_fast(tokenizer)
        self.eval_batch_size, self.classes = settings.eval_batch_size, FORMATS[settings.task].classes

        def part(source: Source, split: str | None, most: int | None) -> tuple[TokenTable, Tensor]:
            pairs = load_pairs(source, settings.task, split=split)
            pairs = [pairs[i] for i in limited(len(pairs), most, settings.seed).tolist()]
            return _tokenize(pairs, tokenizer, sources.max_length), torch.tensor([pair.label for pair in pairs])

        self.dev, self.dev_labels = part(sources.data, None, sources.max_eval)
        self.table, self.labels = part(sources.train, "train", sources.max_train)
        self.lengths = self.table.lengths

    def batch(self, rows: Tensor, epoch: int = 0) -> Batch:
        """Pairs with their classes under "labels"."""
        return self.table.inputs(rows) | {"labels": self.labels[rows]}

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        """Cross-entropy of the class."""
        (logits,) = self.logits(outputs)
        return F.cross_entropy(logits, batch["labels"].to(logits.device), reduction="none")

    def output_losses(self, outputs: Any, batch: Batch) -> Tensor:
        """Of the distribution over the classes."""
        return output_probe(self.logits(outputs)[0])

    def evaluate(self, model: nn.Module) -> dict[str, Any]:
        """Accuracy in percent, and for two classes F1 of the second."""
        began = time.perf_counter()
        picked = torch.empty_like(self.dev_labels)
        for rows, _, outputs in eval_outputs(model, self.dev.lengths, self.dev.inputs, self.eval_batch_size):
            picked[rows] = self.logits(outputs)[0].argmax(1).cpu()
        scores: dict[str, Any] = {"accuracy": 100.0 * float((picked == self.dev_labels).double().mean())}
        if len(self.classes) == 2:
            both = int(((picked == 1) & (self.dev_labels == 1)).sum())
            scores["f1"] = 200.0 * both / max(int((picked == 1).sum() + (self.dev_labels == 1).sum()), 1)
        return scores | {"samples": len(picked), "seconds": time.perf_counter() - began}

    def probe_batch(self) -> Batch:
        """The first pairs of the evaluation."""
        return self.dev.inputs(torch.arange(min(_PROBED, len(self.dev))))

    def logits(self, outputs: Any) -> tuple[Tensor, ...]:
        """[B, classes]."""
        logits = outputs["logits"] if hasattr(outputs, "keys") else outputs[0]
        if logits.shape[-1] != len(self.classes):
            raise ConfigError(
                f"the model must have {len(self.classes)} classes ({', '.join(self.classes)}), got {logits.shape[-1]}; "
                f"give a model of this task, or one without a head"
            )
        return (logits.to(torch.promote_types(logits.dtype, torch.float32)),)


def _is_file(name: str) -> bool:
    return Path(name).expanduser().is_file() or name.lower().endswith((".tsv", ".json", ".jsonl", ".gz"))


def _read_file(path: Path) -> Iterable[Mapping[str, Any]]:
    wanted = "source must be a .tsv, .json or .jsonl file, plain or gzip, or a hub name"
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
    except FileNotFoundError:
        raise DataFormatError(f"{wanted}, got {str(path)!r}, which does not exist; check the path") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataFormatError(f"{wanted}, got {str(path)!r}, which is not readable ({error})") from None
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    try:
        if suffixes and suffixes[-1] == ".tsv":
            return list(csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE))
        if suffixes and suffixes[-1] == ".jsonl":
            rows: Any = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            found = json.loads(text)
            rows = found.get("data") if isinstance(found, dict) else found
    except (ValueError, RecursionError) as error:
        raise DataFormatError(f"{wanted}, got {str(path)!r}, damaged ({error}); fetch it again") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataFormatError(f"{wanted}, got {str(path)!r}, which holds no list of objects; give one object a pair")
    return rows


def _read_hub(name: str, split: str) -> Iterable[Mapping[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise MissingDependencyError(
            f"source={name!r} is a hub name and needs the datasets library; pip install datasets, or give a file"
        ) from None
    owner, _, configuration = name.partition(":")
    try:
        table = datasets.load_dataset(owner, *([configuration] if configuration else []), split=split)
    except Exception as error:  # the library raises a dozen kinds for a bad name, a bad split, no network
        raise DataFormatError(
            f"source must be a file or a hub data set, got {name!r} with split={split!r} ({error}); check the name"
        ) from None
    rows: Iterable[Mapping[str, Any]] = table
    return rows


def _pair(row: Mapping[str, Any], form: PairFormat, where: str) -> TextPair | None:
    """The pair of a row; None where the annotators did not agree."""
    for first, second in form.texts:
        if isinstance(row.get(first), str) and isinstance(row.get(second), str):
            texts = row[first], row[second]
            break
    else:
        columns = " or ".join(" and ".join(pair) for pair in form.texts)
        raise DataFormatError(f"columns {columns} must hold texts in {where}, got {', '.join(map(str, row))}")
    value = next((row[key] for key in form.label if row.get(key) is not None), None)
    if value == "-":
        return None
    numbers = {str(i): i for i in range(len(form.classes))} | {name: i for i, name in enumerate(form.classes)}
    label = numbers.get(str(value).strip())
    if label is None:
        came = "none" if value is None else repr(value)
        raise DataFormatError(
            f"{' or '.join(form.label)} must be one of {', '.join(form.classes)} or its number in {where}, got {came}; "
            f"give a labelled part, a test set has no answers"
        )
    return TextPair(*texts, label)


def _tokenize(pairs: list[TextPair], tokenizer: Any, max_length: int) -> TokenTable:
    ids: list[list[int]] = []
    types: list[list[int]] = []
    for begin in range(0, len(pairs), _TOKENIZE_AT_ONCE):
        part = pairs[begin : begin + _TOKENIZE_AT_ONCE]
        texts = [pair.first for pair in part], [pair.second for pair in part]
        encoded = tokenizer(*texts, truncation=True, max_length=max_length, return_token_type_ids=True)
        ids += encoded["input_ids"]
        types += encoded["token_type_ids"]
    return make_table(ids, types, getattr(tokenizer, "pad_token_id", None) or 0)
