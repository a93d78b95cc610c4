# SPDX-License-Identifier: Apache-2.0
"""A synthetic question answering corpus in SQuAD v1.1 nesting, made from a seed.

A passage tells two or three kinds of facts about four to six invented entities of one kind (people, companies, towns
or ships), so every question has several candidates of the right type and only the name tells which one is meant.
Facts and questions come in several wordings. Names are made of two syllables; which combinations of syllables a
split may use is fixed by a hash, so no name of the held-out split ever occurs in training, while its syllables do.
Nothing here is taken from a real text.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal

from obs_kernels.errors import ConfigError
from obs_kernels.training.demo_phrases import FIRMS, HEADS, LEADS, PRONOUNS, RELATIONS, TAILS, WORDS, Relation

Split = Literal["train", "heldout"]

_SLOT = re.compile(r"(\{[sv]\})")
_CHARACTERS_PER_ENTITY = 66  # with six entities or less a question and its passage stay below 136 wordpieces
_HELDOUT_OUT_OF = 5  # one name in five belongs to the held-out split


@dataclass(frozen=True)
class Question:
    """One question on a passage.

    Attributes:
        text: the question.
        answer: the answer, verbatim in the passage.
        answer_start: its character offset.
        key_spans: character spans of the passage that name what the question names.
        fact_spans: character spans of the sentences about the entity in question.
    """

    text: str
    answer: str
    answer_start: int
    key_spans: tuple[tuple[int, int], ...]
    fact_spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Passage:
    """A passage, the entities that compete in it, and its questions."""

    kind: str
    context: str
    entities: tuple[str, ...]
    questions: tuple[Question, ...]


@dataclass
class _Entity:
    name: str
    values: list[str]
    name_spans: list[tuple[int, int]] = field(default_factory=list)
    value_spans: dict[int, tuple[int, int]] = field(default_factory=dict)
    sentences: list[tuple[int, int]] = field(default_factory=list)


def name_split(word: str) -> Split:
    """Which split owns an invented name word; a hash of its letters, the same on every machine."""
    return "heldout" if zlib.crc32(word.lower().encode()) % _HELDOUT_OUT_OF == 0 else "train"


def make_passage(
    rng: Random, *, split: Split, entities: tuple[int, int] = (4, 6), max_questions: int | None = None
) -> Passage:
    """Draw one passage with all its questions, or ``max_questions`` of them.

    Args:
        rng: the only source of chance.
        split: whose names to use.
        entities: fewest and most entities that compete in the passage.
        max_questions: keep at most so many questions, chosen at random; None keeps all.
    """
    while True:
        kind = rng.choice(tuple(RELATIONS))
        relations = rng.sample(RELATIONS[kind], 2)
        count = rng.randint(*entities)
        words = _NameWords(rng, split)
        columns = [_draw_values(rng, relation.value, count, words) for relation in relations]
        cast = [_Entity(_draw_name(rng, kind, words), [column[i] for column in columns]) for i in range(count)]
        context = _tell(rng, kind, relations, cast)
        if len(context) <= _CHARACTERS_PER_ENTITY * max(entities[1], 6):
            break
    questions = [_ask(rng, relations[r], r, entity) for entity in cast for r in entity.value_spans]
    if max_questions is not None and len(questions) > max_questions:
        questions = rng.sample(questions, max_questions)
    return Passage(kind, context, tuple(entity.name for entity in cast), tuple(questions))


def make_corpus(
    *,
    num_paragraphs: int,
    split: Split,
    seed: int,
    entities: tuple[int, int] = (4, 6),
    max_questions: int | None = None,
    paragraphs_per_article: int = 10,
) -> dict[str, Any]:
    """Make a corpus in the exact nesting of SQuAD v1.1; the same arguments give the same bytes on every machine.

    Args:
        num_paragraphs: passages in all.
        split: ``"train"`` or ``"heldout"``; no invented name occurs in both.
        seed: of the corpus; the two splits differ for the same seed.
        entities: fewest and most entities that compete in a passage.
        max_questions: most questions a passage; None keeps one for every fact told.
        paragraphs_per_article: passages under one title.
    """
    if split not in ("train", "heldout"):
        raise ConfigError(f"split must be 'train' or 'heldout', got {split!r}")
    if num_paragraphs < 0 or paragraphs_per_article < 1:
        raise ConfigError(
            "num_paragraphs must be >= 0 and paragraphs_per_article >= 1, "
            f"got {num_paragraphs} and {paragraphs_per_article}"
        )
    if not 1 <= entities[0] <= entities[1] <= 12:
        raise ConfigError(f"entities must be (fewest, most) within 1..12, got {entities}")
    rng = Random(f"{split}-{seed}")
    articles: list[dict[str, Any]] = []
    for number in range(num_paragraphs):
        if number % paragraphs_per_article == 0:
            articles.append({"title": f"Made-up facts, {split} {len(articles) + 1}", "paragraphs": []})
        passage = make_passage(rng, split=split, entities=entities, max_questions=max_questions)
        qas = [
            {
                "id": f"{split}-{seed}-{number}-{i}",
                "question": question.text,
                "answers": [{"text": question.answer, "answer_start": question.answer_start}],
            }
            for i, question in enumerate(passage.questions)
        ]
        articles[-1]["paragraphs"].append({"context": passage.context, "qas": qas})
    return {"version": "1.1", "data": articles}


class _NameWords:
    """Invented words of one split, none twice in a passage."""

    def __init__(self, rng: Random, split: Split) -> None:
        self._rng, self._split, self._used = rng, split, set[str]()

    def draw(self) -> str:
        while True:
            word = self._rng.choice(HEADS) + self._rng.choice(TAILS)
            if word not in self._used and name_split(word) == self._split:
                self._used.add(word)
                return word


def _draw_name(rng: Random, kind: str, words: _NameWords) -> str:
    if kind == "person":
        return f"{words.draw()} {words.draw()}"
    if kind == "company":
        return f"{words.draw()} {rng.choice(FIRMS)}"
    return words.draw()


def _draw_values(rng: Random, value: str, count: int, words: _NameWords) -> list[str]:
    """``count`` different values, so that a question for the owner of a value has one answer."""
    if value == "year":
        return [str(year) for year in rng.sample(range(1700, 1990), count)]
    if value in WORDS:
        return rng.sample(WORDS[value], count)
    return [_draw_name(rng, value, words) for _ in range(count)]


def _tell(rng: Random, kind: str, relations: list[Relation], cast: list[_Entity]) -> str:
    """Write the passage and record in ``cast`` where each name, value and sentence stands."""
    text = _Text()
    for entity in cast:
        order = [0, 1] if rng.random() < 0.5 else [1, 0]
        style = rng.random()
        lead = rng.choice(LEADS)
        if style < 0.3:  # a single fact
            order = order[:1]
            relation = relations[order[0]]
            if rng.random() < 0.5:
                text.sentence(entity, rng.choice(relation.inverted), order)
            else:
                text.sentence(entity, f"{lead}{_subject(kind, lead)} {_clause(rng, relation)}.", order)
            continue
        first, second = (_clause(rng, relations[r]) for r in order)
        subject = _subject(kind, lead)
        if style < 0.55:
            text.sentence(entity, f"{lead}{subject} {first} and {second}.", order)
        elif style < 0.75:
            which = "who" if kind == "person" else "which"
            text.sentence(entity, f"{lead}{subject}, {which} {first}, {second}.", order)
        elif style < 0.9:
            text.sentence(entity, f"{lead}{subject} {first}.", order[:1])
            text.sentence(entity, f"{rng.choice(PRONOUNS[kind])} {second}.", order[1:])
        else:
            text.sentence(entity, rng.choice(relations[order[0]].inverted), order[:1])
            text.sentence(entity, f"{rng.choice(PRONOUNS[kind])} {second}.", order[1:])
    return text.value


class _Text:
    """A passage under construction; every sentence notes its spans in the entity it is about."""

    def __init__(self) -> None:
        self.value = ""

    def sentence(self, entity: _Entity, template: str, order: list[int]) -> None:
        """Append ``template``; its ``{v}`` stand for the values of the relations in ``order``, one after the other."""
        parts = _SLOT.split(template)
        text = self.value + " " if self.value else ""
        start = len(text)
        values = iter(order)
        for part in parts:
            if part == "{s}":
                entity.name_spans.append((len(text), len(text) + len(entity.name)))
                text += entity.name
            elif part == "{v}":
                relation = next(values)
                value = entity.values[relation]
                entity.value_spans[relation] = (len(text), len(text) + len(value))
                text += value
            else:
                text += part
        entity.sentences.append((start, len(text)))
        self.value = text


def _subject(kind: str, lead: str) -> str:
    if kind != "ship":
        return "{s}"
    return "the {s}" if lead else "The {s}"


def _clause(rng: Random, relation: Relation) -> str:
    return rng.choice(relation.clauses)


def _ask(rng: Random, relation: Relation, index: int, entity: _Entity) -> Question:
    start, end = entity.value_spans[index]
    value = entity.values[index]
    facts = tuple(entity.sentences)
    if rng.random() < 0.7:
        text = rng.choice(relation.questions).replace("{s}", entity.name)
        return Question(text, value, start, tuple(entity.name_spans), facts)
    text = rng.choice(relation.reverse).replace("{v}", value)
    return Question(text, entity.name, entity.name_spans[0][0], ((start, end),), facts)
