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

Split = Literal["train", "heldout"]


def _split(words: str) -> tuple[str, ...]:
    return tuple(words.split())


_SLOT = re.compile(r"(\{[sv]\})")
_CHARACTERS_PER_ENTITY = 66  # with six entities or less a question and its passage stay below 136 wordpieces
_HELDOUT_OUT_OF = 5  # one name in five belongs to the held-out split

_HEADS = _split(
    "Bal Ber Bor Bran Cal Car Cor Dal Dor Dra El Fal Far Fen Fir Gal Gar Gor Hal Har Hel Il Jal Jor Kal Kar Kel Kor "
    "Lan Lor Lu Mal Mar Mel Mor Nal Ner Nor Ol Or Pal Per Pol Quil Ral Ren Ros Sal Sar Sel Sor Tal Tar Tel Tol Tor Ul "
    "Val Var Ver Vol Wal Wer Wil Yar Yor Zal Zar Zel Zor"
)
_TAILS = _split(
    "bin bor dan dek dil dou fen fik gan gis gor hart hem jin kam kesh kin lam len lis lon mak mes mir mov nak nel nis "
    "nov pel pik pos quin rak rem rik ros sak sen shaw sik sol tam ten tis tov tun vak ven vik von wen wick yan zek zin"
)

_PROFESSIONS = _split(
    "glassmaker painter surgeon lawyer baker sailor botanist printer weaver mason teacher miner poet carpenter "
    "chemist tailor judge farmer builder dancer clockmaker locksmith sculptor potter"
)
_INSTRUMENTS = _split(
    "zither violin cello flute oboe harp lute trumpet organ guitar drum clarinet banjo bassoon viola trombone "
    "accordion mandolin piano tuba"
)
_PRODUCTS = _split(
    "bricks candles ropes clocks bottles carpets engines boots lamps needles paper pianos saddles soap stoves "
    "tiles buttons wagons cheese chocolate"
)
_CARGOES = _split(
    "timber wool salt coal grain silk tea sugar copper wine cotton marble tobacco pepper iron tin fish rice"
)
_SIGHTS = _split(
    "castle lighthouse cathedral market library bridge theatre museum harbour observatory windmill fountain "
    "monastery garden fortress university aqueduct racecourse"
)


@dataclass(frozen=True)
class Relation:
    """One kind of fact: how its value is drawn and how it is told and asked.

    Attributes:
        value: kind of the value, a key of the tables in this module.
        clauses: what follows the subject in a sentence; ``{v}`` is the value.
        inverted: whole sentences that begin with the value; ``{s}`` is the subject.
        questions: ask for the value.
        reverse: ask for the subject.
    """

    value: str
    clauses: tuple[str, ...]
    inverted: tuple[str, ...]
    questions: tuple[str, ...]
    reverse: tuple[str, ...]


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


_PERSON = (
    Relation(
        "town",
        ("was born in {v}", "comes from {v}", "grew up in {v}", "is a native of {v}"),
        ("{v} is the birthplace of {s}.", "{v} is the home town of {s}."),
        ("Where was {s} born?", "Which town does {s} come from?", "What is the home town of {s}?"),
        ("Who was born in {v}?", "Who comes from {v}?", "Which person is a native of {v}?"),
    ),
    Relation(
        "year",
        ("was born in {v}", "came into the world in {v}", "has a birth certificate from {v}"),
        ("In {v} the birth of {s} was recorded.", "{v} is the birth year of {s}."),
        ("When was {s} born?", "In which year was {s} born?", "What is the birth year of {s}?"),
        ("Who was born in {v}?", "Whose birth year is {v}?"),
    ),
    Relation(
        "profession",
        ("works as a {v}", "is a {v} by trade", "earns a living as a {v}", "became a {v}"),
        ("The {v} of the group is {s}.", "The work of a {v} is done by {s}."),
        ("What is the profession of {s}?", "What does {s} work as?", "What is the trade of {s}?"),
        ("Who works as a {v}?", "Who is the {v}?", "Which person became a {v}?"),
    ),
    Relation(
        "instrument",
        ("plays the {v}", "performs on the {v}", "has mastered the {v}", "gives lessons on the {v}"),
        ("The {v} is played by {s}.", "The {v} belongs to {s}."),
        ("What instrument does {s} play?", "Which instrument has {s} mastered?", "What does {s} perform on?"),
        ("Who plays the {v}?", "Who performs on the {v}?", "Who has mastered the {v}?"),
    ),
)
_COMPANY = (
    Relation(
        "person",
        ("was founded by {v}", "was started by {v}", "owes its existence to {v}"),
        ("{v} founded {s}.", "{v} is the founder of {s}.", "{v} once set up {s}."),
        ("Who founded {s}?", "Who started {s}?", "Who is the founder of {s}?"),
        ("Which company was founded by {v}?", "What did {v} found?", "Which firm was started by {v}?"),
    ),
    Relation(
        "year",
        ("was founded in {v}", "opened its doors in {v}", "has existed since {v}"),
        ("In {v} the firm {s} was founded.", "{v} is the founding year of {s}."),
        ("When was {s} founded?", "In which year did {s} open?", "Since when has {s} existed?"),
        ("Which company was founded in {v}?", "Which firm opened in {v}?"),
    ),
    Relation(
        "town",
        ("is based in {v}", "has its headquarters in {v}", "runs its main office in {v}"),
        ("{v} is the seat of {s}.", "{v} hosts the main office of {s}."),
        ("Where is {s} based?", "Where are the headquarters of {s}?", "Which town is the seat of {s}?"),
        ("Which company is based in {v}?", "Which firm has its headquarters in {v}?"),
    ),
    Relation(
        "product",
        ("makes {v}", "produces {v}", "is known for its {v}", "sells {v}"),
        ("Buyers of {v} turn to {s}.", "A maker of {v} is {s}."),
        ("What does {s} make?", "What does {s} produce?", "What is {s} known for?", "What does {s} sell?"),
        ("Which company makes {v}?", "Which firm is known for its {v}?", "Who sells {v}?"),
    ),
)
_TOWN = (
    Relation(
        "river",
        ("lies on the river {v}", "was built beside the {v}", "stands on the banks of the {v}"),
        ("The river {v} flows through {s}.", "The {v} passes {s}."),
        ("Which river flows through {s}?", "On which river does {s} lie?", "What is the river of {s}?"),
        ("Which town lies on the {v}?", "Which place stands on the banks of the {v}?"),
    ),
    Relation(
        "sight",
        ("is famous for its {v}", "attracts visitors with its {v}", "is proud of its {v}"),
        ("The {v} is the main sight of {s}.", "The old {v} stands in {s}."),
        ("What is {s} famous for?", "What is the main sight of {s}?", "What attracts visitors to {s}?"),
        ("Which town is famous for its {v}?", "Where is the {v}?", "Which place is proud of its {v}?"),
    ),
    Relation(
        "person",
        ("is governed by {v}", "has {v} as its mayor", "elected {v}"),
        ("{v} is the mayor of {s}.", "{v} governs {s}.", "{v} leads the council of {s}."),
        ("Who is the mayor of {s}?", "Who governs {s}?", "Who leads the council of {s}?"),
        ("Which town is governed by {v}?", "Where is {v} the mayor?"),
    ),
    Relation(
        "year",
        ("received its charter in {v}", "became a town in {v}", "was first settled in {v}"),
        ("In {v} a charter was given to {s}.", "{v} is the year that began the history of {s}."),
        ("When did {s} receive its charter?", "In which year did {s} become a town?", "When was {s} settled?"),
        ("Which town received its charter in {v}?", "Which place was settled in {v}?"),
    ),
)
_SHIP = (
    Relation(
        "person",
        ("sails under {v}", "has {v} as its captain", "is commanded by {v}"),
        ("{v} is the captain of the {s}.", "{v} commands the {s}."),
        ("Who is the captain of the {s}?", "Who commands the {s}?", "Under whom does the {s} sail?"),
        ("Which ship is commanded by {v}?", "Which ship has {v} as its captain?"),
    ),
    Relation(
        "cargo",
        ("carries {v}", "is loaded with {v}", "brings {v} to market"),
        ("A cargo of {v} is on board the {s}.", "A load of {v} fills the {s}."),
        ("What does the {s} carry?", "What is the cargo of the {s}?", "What is the {s} loaded with?"),
        ("Which ship carries {v}?", "Which ship is loaded with {v}?"),
    ),
    Relation(
        "town",
        ("has its home port in {v}", "is registered in {v}", "always returns to {v}"),
        ("{v} is the home port of the {s}.", "{v} is where the {s} is registered."),
        ("What is the home port of the {s}?", "Where is the {s} registered?", "Where does the {s} return to?"),
        ("Which ship is registered in {v}?", "Which ship has its home port in {v}?"),
    ),
    Relation(
        "year",
        ("was launched in {v}", "first sailed in {v}", "left the yard in {v}"),
        ("In {v} the yard completed the {s}.", "{v} is the launch year of the {s}."),
        ("When was the {s} launched?", "In which year did the {s} first sail?", "When did the {s} leave the yard?"),
        ("Which ship was launched in {v}?", "Which ship first sailed in {v}?"),
    ),
)
_RELATIONS = {"person": _PERSON, "company": _COMPANY, "town": _TOWN, "ship": _SHIP}
_PRONOUNS = {"person": ("He", "She"), "company": ("The firm",), "town": ("The place",), "ship": ("The vessel",)}
_FIRMS = ("Works", "Mills", "Brothers", "Trading", "Industries")
_LEADS = ("", "", "", "", "", "", "It is said that ", "As we know, ", "At present ")
_WORDS = {
    "profession": _PROFESSIONS,
    "instrument": _INSTRUMENTS,
    "product": _PRODUCTS,
    "cargo": _CARGOES,
    "sight": _SIGHTS,
}


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
        kind = rng.choice(tuple(_RELATIONS))
        relations = rng.sample(_RELATIONS[kind], 2)
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
            word = self._rng.choice(_HEADS) + self._rng.choice(_TAILS)
            if word not in self._used and name_split(word) == self._split:
                self._used.add(word)
                return word


def _draw_name(rng: Random, kind: str, words: _NameWords) -> str:
    if kind == "person":
        return f"{words.draw()} {words.draw()}"
    if kind == "company":
        return f"{words.draw()} {rng.choice(_FIRMS)}"
    return words.draw()


def _draw_values(rng: Random, value: str, count: int, words: _NameWords) -> list[str]:
    """``count`` different values, so that a question for the owner of a value has one answer."""
    if value == "year":
        return [str(year) for year in rng.sample(range(1700, 1990), count)]
    if value in _WORDS:
        return rng.sample(_WORDS[value], count)
    return [_draw_name(rng, value, words) for _ in range(count)]


def _tell(rng: Random, kind: str, relations: list[Relation], cast: list[_Entity]) -> str:
    """Write the passage and record in ``cast`` where each name, value and sentence stands."""
    text = _Text()
    for entity in cast:
        order = [0, 1] if rng.random() < 0.5 else [1, 0]
        style = rng.random()
        lead = rng.choice(_LEADS)
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
            text.sentence(entity, f"{rng.choice(_PRONOUNS[kind])} {second}.", order[1:])
        else:
            text.sentence(entity, rng.choice(relations[order[0]].inverted), order[:1])
            text.sentence(entity, f"{rng.choice(_PRONOUNS[kind])} {second}.", order[1:])
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
