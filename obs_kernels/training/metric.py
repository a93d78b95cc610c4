# SPDX-License-Identifier: Apache-2.0
"""Exact match and F1 as the official SQuAD v1.1 script computes them.

An answer is normalised (lower case, ASCII punctuation removed, the words a, an and the removed, spaces collapsed)
before it is compared. Of the human answers of a question the best one counts.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypedDict

from obs_kernels.errors import DataFormatError

if TYPE_CHECKING:
    from obs_kernels.training.squad import SquadExample

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class SquadMetrics(TypedDict):
    """Percentages over ``total`` questions."""

    exact_match: float
    f1: float
    total: int


def normalize_answer(text: str) -> str:
    """Return ``text`` in lower case, without punctuation and articles, words parted by one space.

    The order is the official one: punctuation goes first, so ``the-end`` becomes ``theend`` and keeps its article.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match_score(prediction: str, answer: str) -> bool:
    """Return whether both texts are equal after normalisation."""
    return normalize_answer(prediction) == normalize_answer(answer)


def f1_score(prediction: str, answer: str) -> float:
    """Return the F1 of the two bags of words, 0 to 1.

    Two texts that both normalise to nothing share no word: their F1 is 0 although they match exactly, as in the
    official v1.1 script.
    """
    return _f1(normalize_answer(prediction).split(), normalize_answer(answer).split())


def squad_metrics(predictions: Mapping[str, str], examples: Iterable[SquadExample]) -> SquadMetrics:
    """Average exact match and F1 over ``examples``, in percent.

    Args:
        predictions: predicted text by question id; a question without one counts 0, ids without a question are ignored.
        examples: the questions with their answers; each question scores by the best of its answers.

    Raises:
        DataFormatError: ``examples`` is empty, or one of them has no answer to compare with.
    """
    exact, f1, total = 0, 0.0, 0
    for example in examples:
        total += 1
        if not example.answers:
            raise DataFormatError(f"examples must have answers, got none for question {example.id!r}; leave it out")
        if example.id not in predictions:
            continue
        prediction = normalize_answer(predictions[example.id])
        words = prediction.split()
        answers = {normalize_answer(answer.text) for answer in example.answers}
        exact += prediction in answers
        f1 += max(_f1(words, answer.split()) for answer in answers)
    if total == 0:
        raise DataFormatError("examples must hold at least one question, got none; load some with load_squad")
    return {"exact_match": 100.0 * exact / total, "f1": 100.0 * f1 / total, "total": total}


def _f1(prediction: list[str], answer: list[str]) -> float:
    same = sum((Counter(prediction) & Counter(answer)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(prediction), same / len(answer)
    return 2 * precision * recall / (precision + recall)
