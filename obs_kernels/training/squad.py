# SPDX-License-Identifier: Apache-2.0
"""SQuAD v1.1: load the questions, cut them into windows of tokens, batch them, and the loss of a batch.

A window is ``[CLS] question [SEP] part of the context [SEP]`` of at most ``max_length`` tokens; a context that does not
fit is cut into several that overlap by ``doc_stride`` tokens. One sample, for a Fisher or a loss, is one window.
``python -m obs_kernels.training.squad`` trains, as ``obs-kernels train --task squad`` does.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from obs_kernels.errors import ConfigError, DataFormatError, MissingDependencyError

Batch = dict[str, Tensor]
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_FILE_SUFFIXES = (".json", ".gz", ".jsonl", ".txt", ".zip", ".csv", ".parquet")
_TOKENIZE_AT_ONCE = 1000


class Answer(NamedTuple):
    """A human answer: its text, and where it starts in the context, in characters."""

    text: str
    start: int


@dataclass(frozen=True)
class SquadExample:
    """One question about one context, with its human answers."""

    id: str
    question: str
    context: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True, eq=False)
class SquadWindows:
    """Tokenised windows of many questions, made once by ``prepare_windows`` and used by any number of passes.

    W windows, L tokens in the longest, N tokens in all contexts; every tensor is on the CPU.
    """

    examples: tuple[SquadExample, ...]
    input_ids: Tensor
    """[W, L] int32, padded."""
    token_type_ids: Tensor | None
    """[W, L] uint8; None where the tokenizer gives every token type 0."""
    lengths: Tensor
    """[W] int64, tokens of each window."""
    example_index: Tensor
    """[W] int64, the question of each window, ascending."""
    context_start: Tensor
    """[W] int64, column of the first context token."""
    context_length: Tensor
    """[W] int64, number of context tokens, which stand side by side."""
    offset_row: Tensor
    """[W] int64, row in ``token_offsets`` of the first context token."""
    token_offsets: Tensor
    """[N, 2] int32, first and one-past-last character of each context token."""
    start_positions: Tensor | None
    """[W] int64, label: column of the first answer token; 0 where the window does not hold the whole answer."""
    end_positions: Tensor | None
    """[W] int64, label: column of the last answer token; 0 as above."""

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self.lengths)

    def text(self, window: int, start: int, end: int) -> str:
        """Return the characters of the context from token column ``start`` to ``end``, both included."""
        shift = int(self.offset_row[window]) - int(self.context_start[window])
        first, last = self.token_offsets[start + shift, 0], self.token_offsets[end + shift, 1]
        return self.examples[int(self.example_index[window])].context[int(first) : int(last)]

    def batch(self, rows: Tensor, *, pad_to_multiple_of: int = 8) -> Batch:
        """Return the windows ``rows`` [B] as tensors, all int64, padded to the longest of them.

        Keys: ``input_ids``, ``attention_mask`` [B, T], ``token_type_ids`` [B, T] if the tokenizer has types, and
        ``start_positions``, ``end_positions`` [B] if the windows carry labels.
        """
        lengths = self.lengths[rows]
        longest = int(lengths.max())
        width = min(-(-longest // pad_to_multiple_of) * pad_to_multiple_of, self.input_ids.shape[1])
        batch = {
            "input_ids": self.input_ids[rows, :width].long(),
            "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
        }
        if self.token_type_ids is not None:
            batch["token_type_ids"] = self.token_type_ids[rows, :width].long()
        if self.start_positions is not None and self.end_positions is not None:
            batch["start_positions"] = self.start_positions[rows]
            batch["end_positions"] = self.end_positions[rows]
        return batch


def load_squad(source: str | os.PathLike[str], *, split: str | None = None) -> list[SquadExample]:
    """Load questions from a SQuAD v1.1 file, plain or gzip, or from the hub.

    Args:
        source: a file, or the name of a hub data set with the columns id, question, context and answers
            (``{"text": [...], "answer_start": [...]}``), which is fetched through the datasets library.
        split: the part of a hub data set, such as ``"validation"``; a file has one part, and ignores it.

    Raises:
        DataFormatError: the file is missing, empty, damaged or nested in another way; a question has no answer; an id
            comes twice.
        MissingDependencyError: a hub name is given and datasets is not installed.
        ConfigError: a hub name is given without ``split``.
    """
    name = os.fspath(source)
    is_hub = bool(_HUB_NAME.fullmatch(name)) and not name.lower().endswith(_FILE_SUFFIXES)
    examples = list(_from_hub(name, split) if is_hub and not Path(name).is_file() else _from_file(name))
    if not examples:
        raise DataFormatError(f"source must hold at least one question, got none in {name!r}; give another")
    seen: set[str] = set()
    for example in examples:
        if example.id in seen:
            raise DataFormatError(f"source must not repeat a question id, got {example.id!r} twice in {name!r}")
        seen.add(example.id)
    return examples


def prepare_windows(
    examples: Iterable[SquadExample], tokenizer: Any, *, max_length: int = 384, doc_stride: int = 128, with_labels: bool
) -> SquadWindows:
    """Tokenise ``examples`` and cut them into windows; the same windows as the tokenizer's own overflow gives.

    Args:
        examples: questions; each distinct context is tokenised once.
        tokenizer: a fast Hugging Face tokenizer.
        max_length: tokens of a window, special ones included.
        doc_stride: context tokens that a window shares with the next one.
        with_labels: also label each window with the first answer, for training. A window that does not hold all of that
            answer is labelled 0, the column of [CLS].

    Raises:
        ConfigError: the tokenizer is a slow one, or a question leaves too little room for the context.
        DataFormatError: no question, or (``with_labels``) the context has not the answer where ``start`` says.
    """
    examples = tuple(examples)
    if not examples:
        raise DataFormatError("examples must hold at least one question, got none; load some with load_squad")
    if not getattr(tokenizer, "is_fast", False):
        kind = type(tokenizer).__name__
        raise ConfigError(f"tokenizer must be a fast one, which knows offsets, got {kind}; use AutoTokenizer")
    contexts: dict[str, int] = {}
    rows = [contexts.setdefault(example.context, len(contexts)) for example in examples]
    questions, _ = _tokenize(tokenizer, [example.question.lstrip() for example in examples])
    context_ids, offsets = _tokenize(tokenizer, list(contexts))
    bases = [0, *accumulate(map(len, context_ids))]
    (before, between, after), types = _pair_template(tokenizer)
    special = len(before) + len(between) + len(after)

    ids, type_ids = array("i"), bytearray()
    table = array("q")  # seven numbers a window, as unpacked below
    for i, (example, question, row) in enumerate(zip(examples, questions, rows, strict=True)):
        room = max_length - special - len(question)
        if not 0 <= doc_stride < room:
            raise ConfigError(
                f"doc_stride must be at least 0 and below the {max(room, 0)} context tokens that "
                f"max_length={max_length} leaves beside {example.id!r} ({len(question)} tokens), got {doc_stride}"
            )
        answer_first, answer_last = _answer_tokens(example, offsets[row]) if with_labels else (1, 0)
        column = len(before) + len(question) + len(between)
        for first in range(0, max(len(context_ids[row]) - doc_stride, 1), room - doc_stride):
            part = context_ids[row][first : first + room]
            whole = first <= answer_first <= answer_last < first + len(part)
            labels = (column + answer_first - first, column + answer_last - first) if whole else (0, 0)
            table.extend((special + len(question) + len(part), i, column, len(part), bases[row] + first, *labels))
            for type_id, tokens in zip(types, (before, question, between, part, after), strict=True):
                ids.extend(tokens)
                type_ids += bytes([type_id]) * len(tokens)
    columns = (numbers.contiguous() for numbers in torch.frombuffer(table, dtype=torch.int64).view(-1, 7).unbind(1))
    lengths, example_index, context_start, context_length, offset_row, starts, ends = columns
    pad_id = getattr(tokenizer, "pad_token_id", None) or 0
    return SquadWindows(
        examples=examples,
        input_ids=_padded(torch.frombuffer(ids, dtype=torch.int32), lengths, pad_id),
        token_type_ids=_padded(torch.frombuffer(type_ids, dtype=torch.uint8), lengths, 0) if any(types) else None,
        lengths=lengths,
        example_index=example_index,
        context_start=context_start,
        context_length=context_length,
        offset_row=offset_row,
        token_offsets=torch.tensor(
            array("i", chain.from_iterable(chain.from_iterable(offsets))), dtype=torch.int32
        ).view(-1, 2),
        start_positions=starts if with_labels else None,
        end_positions=ends if with_labels else None,
    )


def _from_file(name: str) -> Iterator[SquadExample]:
    for i, article in enumerate(_field(_read_json(name), "data", list, repr(name))):
        for j, paragraph in enumerate(_field(article, "paragraphs", list, f"data[{i}] of {name!r}")):
            at = f"data[{i}].paragraphs[{j}] of {name!r}"
            context = _field(paragraph, "context", str, at)
            for k, item in enumerate(_field(paragraph, "qas", list, at)):
                yield _example(item, context, f"data[{i}].paragraphs[{j}].qas[{k}] of {name!r}")


def _read_json(name: str) -> Any:
    wanted = "source must be a SQuAD v1.1 JSON file, plain or gzip"
    try:
        raw = Path(name).expanduser().read_bytes()
    except FileNotFoundError:
        raise DataFormatError(f"{wanted}, got {name!r}, which does not exist; check the path") from None
    except OSError as error:
        raise DataFormatError(f"{wanted}, got {name!r} ({error.strerror}); name a file that can be read") from None
    if not raw:
        raise DataFormatError(f"{wanted}, got {name!r}, which is empty; fetch it again")
    try:
        return json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
    except (EOFError, OSError, zlib.error, ValueError, RecursionError) as error:
        raise DataFormatError(f"{wanted}, got {name!r}, damaged or cut off ({error}); fetch it again") from error


def _field(parent: Any, key: str, kind: type, where: str) -> Any:
    value = parent.get(key) if isinstance(parent, dict) else None
    if isinstance(value, kind) and not isinstance(value, bool):
        return value
    if not isinstance(parent, dict):
        came = f"a {type(parent).__name__} in place of the object"
    elif key in parent:
        came = f"a {type(value).__name__}"
    else:
        came = f"only {', '.join(sorted(map(str, parent))) or 'an empty object'}"
    wanted = {list: "a list", str: "a text", int: "an integer"}[kind]
    raise DataFormatError(f"{key!r} must be {wanted} in {where}, got {came}; nest the file as SQuAD v1.1 does")


def _from_hub(name: str, split: str | None) -> Iterator[SquadExample]:
    if split is None:
        raise ConfigError(f"split must be given for the hub name {name!r}, got None; try split='validation'")
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            f"source={name!r} is a hub name and needs the datasets library, which is not installed; "
            "pip install datasets, or give a SQuAD v1.1 file"
        ) from error
    try:
        table = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises a dozen kinds for a bad name, a bad split, no network
        raise DataFormatError(
            f"source must be a file or a hub data set, got {name!r} with split={split!r} ({error}); check the name"
        ) from error
    for i, row in enumerate(table):
        at = f"row {i} of {name!r}"
        answers = row.get("answers")
        if isinstance(answers, dict):  # columns of a record, as most SQuAD-like sets have them
            texts = _field(answers, "text", list, f"answers of {at}")
            starts = _field(answers, "answer_start", list, f"answers of {at}")
            answers = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=False)]
        yield _example({**row, "answers": answers}, _field(row, "context", str, at), at)


def _example(item: Any, context: str, where: str) -> SquadExample:
    name, question = _field(item, "id", str, where), _field(item, "question", str, where)
    answers = []
    for i, answer in enumerate(_field(item, "answers", list, where)):
        at = f"answers[{i}] of {where}"
        answers.append(Answer(_field(answer, "text", str, at), _field(answer, "answer_start", int, at)))
    if not answers:
        raise DataFormatError(
            f"'answers' must hold at least one answer in {where}, got none; leave out unanswerable questions (SQuAD v2)"
        )
    try:
        "".join((name, question, context, *(answer.text for answer in answers))).encode()
    except UnicodeEncodeError as error:
        raise DataFormatError(f"texts must be valid Unicode in {where}, got {error}; fetch the file again") from None
    return SquadExample(name, question, context, tuple(answers))


def _tokenize(tokenizer: Any, texts: list[str]) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    ids: list[list[int]] = []
    offsets: list[list[tuple[int, int]]] = []
    for first in range(0, len(texts), _TOKENIZE_AT_ONCE):
        part = texts[first : first + _TOKENIZE_AT_ONCE]
        encoded = tokenizer(part, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids += encoded["input_ids"]
        offsets += encoded["offset_mapping"]
    return ids, offsets


def _pair_template(tokenizer: Any) -> tuple[tuple[list[int], list[int], list[int]], list[int]]:
    """Return the special tokens before, between and after a pair, and the token type of each of the five parts."""
    encoded = tokenizer("a", "a", return_token_type_ids=True)
    ids, kinds, sides = encoded["input_ids"], encoded["token_type_ids"], encoded.sequence_ids(0)
    if [side for side in sides if side is not None] != [0, 1]:
        raise ConfigError(
            "tokenizer must give one token to 'a' and put the first text of a pair before the second, "
            f"got {sides} for the pair 'a', 'a'; use that of a BERT-like model"
        )
    q, c = sides.index(0), sides.index(1)
    parts = (kinds[:q], kinds[q : q + 1], kinds[q + 1 : c], kinds[c : c + 1], kinds[c + 1 :])
    return (ids[:q], ids[q + 1 : c], ids[c + 1 :]), [part[0] if part else 0 for part in parts]


def _padded(flat: Tensor, lengths: Tensor, value: int) -> Tensor:
    filled = torch.arange(int(lengths.max())) < lengths[:, None]
    return torch.full(filled.shape, value, dtype=flat.dtype).masked_scatter_(filled, flat)


def _answer_tokens(example: SquadExample, offsets: list[tuple[int, int]]) -> tuple[int, int]:
    """Return the first and last context token that touch the first answer; first > last if none does."""
    if not example.answers:
        return 1, 0
    text, start = example.answers[0]
    found = example.context[max(start, 0) : max(start, 0) + len(text)]
    if found != text or start < 0:
        raise DataFormatError(
            f"answers[0] of question {example.id!r} must stand at character {start} of its context, got {found!r} "
            f"there instead of {text!r}; correct answer_start or leave the question out"
        )
    first = bisect_right(offsets, start, key=lambda token: token[1])
    return first, bisect_left(offsets, start + len(text), key=lambda token: token[0]) - 1


if __name__ == "__main__":  # ``python -m obs_kernels.training.squad`` is ``obs-kernels train``, which lies above
    import runpy
    import sys

    sys.argv[1:1] = ["train", "--task", "squad"]
    runpy.run_module("obs_kernels.cli", run_name="__main__")
