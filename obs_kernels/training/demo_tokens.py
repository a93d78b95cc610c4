# SPDX-License-Identifier: Apache-2.0
"""Tokens of the synthetic corpus: the WordPiece vocabulary of the demo model, and its passages as rows of ids."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING

from obs_kernels.training.demo_corpus import Passage, make_corpus

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, _CLS, _SEP = 0, 2, 3
_WORD = re.compile(r"\w+|[^\w\s]")
KEY_BIT, FACT_BIT, CONTEXT_BIT = 1, 2, 4
"""Of a token: repeats the name of the question, belongs to a sentence about its entity, is of the passage."""


def train_tokenizer(*, seed: int) -> Tokenizer:
    """Train the WordPiece vocabulary on a training corpus; its pieces stop at syllables, before whole names.

    A name that became a single token would be one that the held-out split cannot have, so the least frequency of a
    merge lies between that of a syllable and that of a name. The pieces are those of a byte pair encoding: the
    WordPiece trainer of ``tokenizers`` breaks ties in an order that changes from run to run.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    corpus = make_corpus(num_paragraphs=6000, split="train", seed=seed, max_questions=2)
    paragraphs = [p for article in corpus["data"] for p in article["paragraphs"]]
    texts = [text for p in paragraphs for text in (p["context"], *(qa["question"] for qa in p["qas"]))]
    pairs = Tokenizer(models.BPE())
    pairs.normalizer = normalizers.BertNormalizer(lowercase=True)
    pairs.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pairs.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=2048, min_frequency=80, show_progress=False))
    words = sorted({word for text in texts for word in _WORD.findall(text.lower())})
    pieces = {piece for char in sorted({c for word in words for c in word}) for piece in (char, f"##{char}")}
    for encoded in pairs.encode_batch(words):
        pieces.update(f"##{token}" if i else token for i, token in enumerate(encoded.tokens))

    vocab = {piece: i for i, piece in enumerate((*_SPECIAL, *sorted(pieces)))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = pairs.normalizer
    tokenizer.pre_tokenizer = pairs.pre_tokenizer
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(_SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", _CLS), ("[SEP]", _SEP)],
    )
    return tokenizer


def encode_passages(passages: Sequence[Passage], vocab: dict[str, int], *, length: int) -> np.ndarray:
    """Encode all questions of ``passages`` to ``[questions, 2, length + 2]`` int16.

    Row 0 is start token, end token, then the ids of ``[CLS] question [SEP] passage [SEP]``; row 1 has two unused
    entries, then a bit field a token: repeats the name of the question, sentence about its entity, is passage.
    Same ids as the trained tokenizer, several times faster because the words of a passage are split once.
    """
    import numpy as np

    pieces: dict[str, list[int]] = {}

    def words(text: str) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        starts: list[int] = []
        for match in _WORD.finditer(text.lower()):
            word = match.group()
            if word not in pieces:
                pieces[word] = _wordpiece(word, vocab)
            ids += pieces[word]
            starts += [match.start()] * len(pieces[word])
        return ids, starts

    rows: list[list[int]] = []
    for passage in passages:
        context, starts = words(passage.context)
        for question in passage.questions:
            asked, _ = words(question.text)
            offset = len(asked) + 2
            total = offset + len(context) + 1
            if total > length:
                continue
            first = bisect_left(starts, question.answer_start)
            last = bisect_left(starts, question.answer_start + len(question.answer)) - 1
            bits = [CONTEXT_BIT] * len(context)
            for bit, spans in ((KEY_BIT, question.key_spans), (FACT_BIT, question.fact_spans)):
                for left, right in spans:
                    for i in range(bisect_left(starts, left), bisect_left(starts, right)):
                        bits[i] |= bit
            pad = [PAD] * (length - total)
            rows.append([offset + first, offset + last, _CLS, *asked, _SEP, *context, _SEP, *pad])
            rows.append([0, 0, *([0] * offset), *bits, 0, *pad])
    return np.asarray(rows, dtype=np.int16).reshape(-1, 2, length + 2)


def _wordpiece(word: str, vocab: dict[str, int]) -> list[int]:
    ids: list[int] = []
    at = 0
    while at < len(word):
        for end in range(len(word), at, -1):
            piece = word[at:end] if at == 0 else f"##{word[at:end]}"
            if piece in vocab:
                ids.append(vocab[piece])
                at = end
                break
        else:
            return [vocab["[UNK]"]]
    return ids
