# SPDX-License-Identifier: Apache-2.0
import json
import re
from random import Random
from typing import Any

import pytest

from obs_kernels.errors import ConfigError
from obs_kernels.training.demo_corpus import make_corpus, make_passage, name_split

GENERIC = {"Works", "Mills", "Brothers", "Trading", "Industries"}
FIRST_CONTEXT = (
    "The Sorrik carries wine. The vessel always returns to Balhart. As we know, the Orjin brings rice to "
    "market. The vessel is registered in Renwick. The Palkam brings pepper to market. The Caljin always "
    "returns to Firzin and carries fish. The Fentov has its home port in Callis. The Polsen always returns to "
    "Kalshaw and brings wool to market."
)


@pytest.fixture(scope="module", params=["train", "heldout"])
def corpus(request: pytest.FixtureRequest) -> dict[str, Any]:
    return make_corpus(num_paragraphs=200, split=request.param, seed=3)


def _paragraphs(corpus: dict[str, Any]) -> list[dict[str, Any]]:
    return [paragraph for article in corpus["data"] for paragraph in article["paragraphs"]]


def _names(split: str, passages: int) -> set[str]:
    rng = Random(7)
    return {name for _ in range(passages) for name in make_passage(rng, split=split).entities}


def test_nesting_is_that_of_squad(corpus: dict[str, Any]) -> None:
    assert set(corpus) == {"version", "data"} and corpus["version"] == "1.1"
    assert len(_paragraphs(corpus)) == 200
    ids = set()
    for article in corpus["data"]:
        assert set(article) == {"title", "paragraphs"}
        for paragraph in article["paragraphs"]:
            assert set(paragraph) == {"context", "qas"} and paragraph["qas"]
            for qa in paragraph["qas"]:
                assert set(qa) == {"id", "question", "answers"} and qa["question"].endswith("?")
                assert len(qa["answers"]) == 1 and set(qa["answers"][0]) == {"text", "answer_start"}
                ids.add(qa["id"])
    assert len(ids) == sum(len(p["qas"]) for p in _paragraphs(corpus))


def test_answers_stand_where_they_say_and_only_there(corpus: dict[str, Any]) -> None:
    repeated = questions = 0
    for paragraph in _paragraphs(corpus):
        for qa in paragraph["qas"]:
            answer = qa["answers"][0]
            start, end = answer["answer_start"], answer["answer_start"] + len(answer["text"])
            assert paragraph["context"][start:end] == answer["text"]
            assert "{" not in paragraph["context"] + qa["question"]
            repeated += len(re.findall(rf"\b{answer['text']}\b", paragraph["context"])) > 1
            questions += 1
    assert repeated / questions < 0.01, "an answer that stands twice makes exact spans ambiguous"


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_same_seed_same_bytes(split: str) -> None:
    first, again, other = (json.dumps(make_corpus(num_paragraphs=20, split=split, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_bytes_do_not_change_between_machines_or_versions() -> None:
    context = make_corpus(num_paragraphs=1, split="train", seed=0)["data"][0]["paragraphs"][0]["context"]
    assert context == FIRST_CONTEXT, "a changed corpus needs a newly trained demo model"


def test_the_generator_leaves_the_global_one_alone() -> None:
    import random

    before = random.getstate()
    make_corpus(num_paragraphs=5, split="train", seed=0)
    assert random.getstate() == before


def test_heldout_names_are_new() -> None:
    train, heldout = _names("train", 1500), _names("heldout", 500)
    assert not train & heldout
    words = {split: {w for n in names for w in n.split()} - GENERIC for split, names in (("t", train), ("h", heldout))}
    assert not words["t"] & words["h"], "not even one word of a name is shared"
    assert all(name_split(word) == "heldout" for word in words["h"])


def test_no_heldout_name_occurs_in_a_training_text() -> None:
    seen = set(re.findall(r"\w+", json.dumps(make_corpus(num_paragraphs=1000, split="train", seed=0))))
    names = {word for name in _names("heldout", 200) for word in name.split()} - GENERIC
    assert len(names) > 300 and not names & seen


def test_several_entities_compete_for_every_question() -> None:
    rng = Random(5)
    for _ in range(300):
        passage = make_passage(rng, split="train")
        assert 4 <= len(passage.entities) == len(set(passage.entities)) <= 6
        assert all(name in passage.context for name in passage.entities)
        asked = [sum(name in question.text for name in passage.entities) for question in passage.questions]
        assert max(asked) <= 1
        assert len({question.answer for question in passage.questions}) >= 4


def test_question_marks_point_at_its_name_and_sentences() -> None:
    rng = Random(6)
    for _ in range(100):
        passage = make_passage(rng, split="train")
        for question in passage.questions:
            for start, end in question.key_spans:
                assert passage.context[start:end] in question.text
            assert any(a <= question.answer_start < b for a, b in question.fact_spans)
            assert all(passage.context[b - 1] == "." for _, b in question.fact_spans)


def test_max_questions_and_entities_are_obeyed() -> None:
    corpus = make_corpus(num_paragraphs=30, split="train", seed=0, entities=(2, 2), max_questions=3)
    assert all(1 <= len(p["qas"]) <= 3 for p in _paragraphs(corpus))
    assert make_corpus(num_paragraphs=0, split="train", seed=0)["data"] == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"split": "dev"},
        {"num_paragraphs": -1},
        {"entities": (5, 4)},
        {"entities": (0, 2)},
        {"paragraphs_per_article": 0},
    ],
)
def test_wrong_arguments_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        make_corpus(**{"num_paragraphs": 1, "split": "train", "seed": 0, **wrong})
