# SPDX-License-Identifier: Apache-2.0
"""The demo: prune one model to several patterns by each method, compare, pack, reload, and on demand recover.

By default on the small model and the generated corpus that ship with the package, both synthetic; with ``model`` and
``data`` the same on real ones. Nothing is trained unless ``recover`` asks for it.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from obs_kernels.errors import ConfigError
from obs_kernels.pruning import OBSConfig
from obs_kernels.sparse import SparseLinear, compress_, load, save_pretrained
from obs_kernels.training.demo_corpus import make_corpus
from obs_kernels.training.demo_model import demo_model_dir
from obs_kernels.training.evaluate import SquadResult, evaluate_squad
from obs_kernels.training.job_questions import job_windows, load_questions
from obs_kernels.training.models import load_qa_model, pick_device
from obs_kernels.training.oneshot import Cell, CellResult, OneShotTable
from obs_kernels.training.recover import recover_
from obs_kernels.training.squad import SquadExample, SquadWindows, load_squad
from obs_kernels.training.squad_batches import SquadLoader, calibration_loader

PATTERNS = ("2:4", "2:8", "64:2:8", "unstructured:0.75")
METHODS = (("magnitude", "none"), ("diagonal", "none"), ("pairwise", "joint"), ("combinatorial", "joint"))
PACKED = Cell("64:2:8", "combinatorial", "joint")
NUM_GRADS = 1024
BLOCK_SIZE = 64
EVAL_PARAGRAPHS, TRAIN_PARAGRAPHS = 60, 400
RECOVER_SECONDS = 60.0


def run_demo(
    *,
    model: str | None = None,
    data: str | None = None,
    train: str | None = None,
    recover: bool = False,
    out: str | Path | None = None,
    device: str = "auto",
    max_eval: int | None = None,
    on_row: Callable[[CellResult], None] | None = None,
) -> dict[str, Any]:
    """Run the comparison and return it as plain values.

    Args:
        model: folder or hub name of a dense question answering model; None takes the one that ships.
        data: questions to evaluate on; None takes the generated corpus. With ``model``, both are needed.
        train: questions to take gradients from; None takes the generated corpus's training part, or ``data``.
        recover: fine-tune the packed cell's pruned model for a minute with its masks held.
        out: folder for the packed model; None uses a temporary one.
        device: "auto", "cpu" or "cuda[:n]".
        max_eval: evaluate on the first so many questions; None takes all.
        on_row: called with each result as it comes.

    Returns:
        ``dense``, ``comparison``, ``packed``, ``recovered`` (or None), ``notes`` and ``seconds``.
    """
    start = time.perf_counter()
    if (model is None) != (data is None):
        raise ConfigError("model and data go together: give both, or neither for the synthetic demo")
    network, tokenizer = load_qa_model(demo_model_dir() if model is None else model, device=pick_device(device))
    base = OBSConfig(pattern="2:4", num_grads=NUM_GRADS, fisher_block_size=BLOCK_SIZE, curvature="block")
    notes: list[str] = []
    if data is None:
        notes.append(
            "Corpus and model are synthetic: made by the package from a seed. Figures say nothing about SQuAD."
        )
        examples = corpus_examples(num_paragraphs=EVAL_PARAGRAPHS, split="heldout", seed=0)
        source = corpus_examples(num_paragraphs=TRAIN_PARAGRAPHS, split="train", seed=1)
    else:
        examples, source = load_questions(data, train, base, notes)
    dev = job_windows(examples[:max_eval], network, tokenizer, with_labels=False)
    calibration = job_windows(source, network, tokenizer, with_labels=True)
    num_grads = min(NUM_GRADS, len(calibration))
    base = replace(base, num_grads=num_grads)
    notes.append(f"One shot, nothing trained; {num_grads} per-sample gradients, Fisher block {BLOCK_SIZE}.")
    loader = calibration_loader(calibration, num_samples=num_grads, batch_size=32, seed=0)
    table = OneShotTable(network, loader, lambda m: evaluate_squad(m, tokenizer, dev), base)
    dense = table.dense_result()
    rows = []
    for pattern in PATTERNS:
        for method, update in METHODS:
            if method == "pairwise" and pattern.startswith("unstructured"):
                continue
            rows.append(table.run_cell(Cell(pattern, method, update)))
            if on_row is not None:
                on_row(rows[-1])
    pruner = table.prune(PACKED)
    with tempfile.TemporaryDirectory() as scratch:
        packed = _pack_and_reload(network, tokenizer, dev, Path(out) / "packed" if out else Path(scratch) / "packed")
    recovered = None
    if recover:
        batches = SquadLoader(calibration, batch_size=32, order="shuffle")
        teacher = copy.deepcopy(network)
        _fill(teacher, table)
        before = evaluate_squad(network, tokenizer, dev)
        done = recover_(network, pruner, batches, teacher=teacher.eval(), seconds=RECOVER_SECONDS)
        after = evaluate_squad(network, tokenizer, dev)
        recovered = {
            "pattern": PACKED.pattern,
            "f1_before": before.f1,
            "f1_after": after.f1,
            "exact_match_after": after.exact_match,
            **done.__dict__,
        }
    table.restore()
    return {
        "dense": _scores(dense),
        "comparison": [row.to_dict() for row in rows],
        "packed": packed,
        "recovered": recovered,
        "notes": notes,
        "seconds": time.perf_counter() - start,
    }


def corpus_examples(*, num_paragraphs: int, split: str, seed: int) -> list[SquadExample]:
    """Questions of the generated corpus, read as a SQuAD file is."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(make_corpus(num_paragraphs=num_paragraphs, split=split, seed=seed), file)  # type: ignore[arg-type]
        file.flush()
        return load_squad(file.name)


def _pack_and_reload(network: nn.Module, tokenizer: Any, dev: SquadWindows, folder: Path) -> dict[str, Any]:
    """Pack a copy, write it, read it back, and compare what it answers."""
    before = evaluate_squad(network, tokenizer, dev)
    packed = copy.deepcopy(network)
    compress_(packed)
    save_pretrained(packed, folder)
    tokenizer.save_pretrained(folder)
    again = load(folder).to(next(network.parameters()).device)
    after = evaluate_squad(again, tokenizer, dev)
    layers = [m.sparse for m in again.modules() if isinstance(m, SparseLinear)]
    probe = {"input_ids": dev.input_ids[:2, : int(dev.lengths[:2].min())].long().to(next(network.parameters()).device)}
    with torch.inference_mode():
        gap = (network(**probe)[0] - again(**probe)[0]).abs().max()
    return {
        "pattern": str(layers[0].pattern),
        "bytes": sum(sparse.nbytes for sparse in layers),
        "dense_bytes": sum(sparse.shape[0] * sparse.shape[1] * sparse.values.element_size() for sparse in layers),
        "max_difference": float(gap),
        "f1_before": before.f1,
        "f1": after.f1,
    }


@torch.no_grad()
def _fill(model: nn.Module, table: OneShotTable) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(table.dense_weights[name])


def _scores(result: SquadResult) -> dict[str, float]:
    return {"exact_match": result.exact_match, "f1": result.f1, "total": result.total, "seconds": result.seconds}
