# SPDX-License-Identifier: Apache-2.0
"""Folders of tiny random models with the demo's tokenizer, and files of generated questions, for tests of jobs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from obs_kernels.training.demo_corpus import make_corpus
from obs_kernels.training.demo_model import demo_model_dir


def save_tiny_bert(folder: Path, kind: Any, *, layers: int = 1, **settings: Any) -> None:
    """A BERT of width 32 with a head of class ``kind``, of the demo's vocabulary, and its tokenizer."""
    from transformers import BertConfig

    demo = json.loads((demo_model_dir() / "config.json").read_text())
    wanted = {key: demo[key] for key in ("vocab_size", "max_position_embeddings")}
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers, "num_attention_heads": 2}
    kind(BertConfig(**wanted, **small, **settings)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model_dir() / name, folder)


def write_questions(folder: Path, *, dev: str, paragraphs: int, questions: int) -> None:
    """``dev`` and train.json: so many paragraphs with so many questions at most."""
    for name, split in ((dev, "heldout"), ("train.json", "train")):
        corpus = make_corpus(num_paragraphs=paragraphs, split=split, seed=0, max_questions=questions)  # type: ignore[arg-type]
        (folder / name).write_text(json.dumps(corpus))
