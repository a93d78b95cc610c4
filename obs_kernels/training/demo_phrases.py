# SPDX-License-Identifier: Apache-2.0
"""What the synthetic corpus of ``demo_corpus`` is made of: syllables, words, and the wordings of each kind of fact."""

from __future__ import annotations

from dataclasses import dataclass


def _split(words: str) -> tuple[str, ...]:
    return tuple(words.split())


HEADS = _split(
    "Bal Ber Bor Bran Cal Car Cor Dal Dor Dra El Fal Far Fen Fir Gal Gar Gor Hal Har Hel Il Jal Jor Kal Kar Kel Kor "
    "Lan Lor Lu Mal Mar Mel Mor Nal Ner Nor Ol Or Pal Per Pol Quil Ral Ren Ros Sal Sar Sel Sor Tal Tar Tel Tol Tor Ul "
    "Val Var Ver Vol Wal Wer Wil Yar Yor Zal Zar Zel Zor"
)
TAILS = _split(
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
RELATIONS = {"person": _PERSON, "company": _COMPANY, "town": _TOWN, "ship": _SHIP}
PRONOUNS = {"person": ("He", "She"), "company": ("The firm",), "town": ("The place",), "ship": ("The vessel",)}
FIRMS = ("Works", "Mills", "Brothers", "Trading", "Industries")
LEADS = ("", "", "", "", "", "", "It is said that ", "As we know, ", "At present ")
WORDS = {
    "profession": _PROFESSIONS,
    "instrument": _INSTRUMENTS,
    "product": _PRODUCTS,
    "cargo": _CARGOES,
    "sight": _SIGHTS,
}
