# SPDX-License-Identifier: Apache-2.0
"""Train the small question answering model that ships with the package, from nothing but a seed.

``python -m obs_kernels.training.demo_model`` makes the corpus, its WordPiece vocabulary and a BertForQuestionAnswering
of 4 layers, and writes a Hugging Face folder with float16 weights. A new GPU needs a few minutes.

Matching a never seen name in a passage is learned late and suddenly when only the answer span is supervised. Two
linear heads on inner layers shorten that plateau: one marks the tokens that repeat the name of the question, the other
the sentences about its entity. Both are thrown away; what is written is the plain model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obs_kernels.errors import ConfigError
from obs_kernels.training.demo_batches import DemoModelConfig, Window, chunk_source, make_chunk
from obs_kernels.training.demo_corpus import make_corpus
from obs_kernels.training.demo_tokens import CONTEXT_BIT, FACT_BIT, KEY_BIT, PAD, train_tokenizer

if TYPE_CHECKING:
    import numpy as np
    import torch
    from tokenizers import Tokenizer
    from torch import Tensor, nn
    from transformers import BertForQuestionAnswering

_MAX_ANSWER_TOKENS = 8
_PROGRESS_QUESTIONS, _PROGRESS_BATCH = 1024, 256
_SCORED_PARAGRAPHS = 300


def demo_model_dir() -> Path:
    """The folder of the demo model inside the package; it exists once the model was trained or installed."""
    return Path(__file__).parent / "demo_data"


def train_demo_model(out: Path, config: DemoModelConfig, *, report: Callable[[str], None]) -> dict[str, Any]:
    """Train the demo model and write its folder; returns the card, held-out scores included.

    Args:
        out: folder to write; one that exists is replaced once the new one is complete.
        config: what to train.
        report: receives a line of progress every 250 steps.
    """
    import obs_kernels.training.metric  # noqa: F401  a missing part should show before the training, not after

    began = time.perf_counter()
    tokenizer = train_tokenizer(seed=config.seed)
    report(f"vocabulary of {tokenizer.get_vocab_size()} after {time.perf_counter() - began:.1f} s")
    vocab = tokenizer.get_vocab()
    with chunk_source(config, vocab) as chunks:
        model, steps = _fit(config, chunks, vocab, report, began)
    card = {
        "about": "Synthetic demo: corpus and model are both made by obs_kernels.training from a seed.",
        "config": asdict(config),
        "steps": steps,
        "seconds": round(time.perf_counter() - began, 1),
    }
    return _write(out, model, tokenizer, card, config)


def score_folder(
    folder: Path, corpus: dict[str, Any], *, device: str = "cpu", batch_size: int = 256
) -> dict[str, float]:
    """Exact match and F1, by text and the official normalisation, of a written model on a corpus."""
    import torch
    from tokenizers import Tokenizer
    from transformers import BertForQuestionAnswering

    from obs_kernels.training.metric import exact_match_score, f1_score

    model = BertForQuestionAnswering.from_pretrained(folder, dtype=torch.float32).eval()
    torch.nn.Module.to(model, device)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(model.config.max_position_embeddings, strategy="only_second")
    tokenizer.enable_padding(pad_id=PAD, pad_token="[PAD]")
    items = [(qa, p["context"]) for article in corpus["data"] for p in article["paragraphs"] for qa in p["qas"]]
    exact = f1 = 0.0
    for at in range(0, len(items), batch_size):
        batch = items[at : at + batch_size]
        encoded = tokenizer.encode_batch([(qa["question"], context) for qa, context in batch])
        ids = torch.tensor([e.ids for e in encoded], device=device)
        types = torch.tensor([e.type_ids for e in encoded], device=device)
        attention = torch.tensor([e.attention_mask for e in encoded], device=device)
        allowed = torch.tensor([[s == 1 for s in e.sequence_ids] for e in encoded], device=device)
        with torch.no_grad():
            output = model(input_ids=ids, token_type_ids=types, attention_mask=attention)
        start, end = _best_spans(output.start_logits, output.end_logits, allowed)
        for i, (qa, context) in enumerate(batch):
            text = context[encoded[i].offsets[start[i]][0] : encoded[i].offsets[end[i]][1]]
            exact += exact_match_score(text, qa["answers"][0]["text"])
            f1 += f1_score(text, qa["answers"][0]["text"])
    return {"exact_match": 100 * exact / len(items), "f1": 100 * f1 / len(items), "questions": len(items)}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``python -m obs_kernels.training.demo_model``."""
    parser = argparse.ArgumentParser(prog="obs_kernels.training.demo_model", description="Train the demo model.")
    parser.add_argument("--out", type=Path, default=demo_model_dir(), help="folder to write (default: package data)")
    helps = {
        "steps": "most training steps",
        "target_f1": "cool down and stop once held-out F1 (in %%) reaches this",
        "aux_weight": "weight of the two auxiliary losses, 0 turns them off",
        "easy_steps": "steps that begin with passages of two or three entities",
        "minutes_limit": "finish within this many minutes, 0 for no limit",
        "device": "auto, cpu or cuda",
        "workers": "processes that make training data",
    }
    for name, default in asdict(DemoModelConfig()).items():
        text = helps.get(name, name.replace("_", " "))
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"{text} (%(default)s)"
        )
    args = vars(parser.parse_args(argv))
    out = args.pop("out")
    card = train_demo_model(out, DemoModelConfig(**args), report=partial(print, flush=True))
    print(
        f"final f1={card['heldout']['f1']:.2f} em={card['heldout']['exact_match']:.2f} steps={card['steps']} "
        f"seconds={card['seconds']:.0f} megabytes={card['megabytes']:.2f} out={out}",
        flush=True,
    )
    return 0


def _fit(
    config: DemoModelConfig,
    chunks: Iterator[np.ndarray],
    vocab: dict[str, int],
    report: Callable[[str], None],
    began: float,
) -> tuple[BertForQuestionAnswering, int]:
    """Train at a constant rate, then cool down: at the target, or in the last quarter of the steps or of the time."""
    import torch
    from tqdm import tqdm

    device = _device(config.device)
    window = Window(chunks, config, device)
    heldout = torch.from_numpy(make_chunk(0, config=config, vocab=vocab, split="heldout")[:_PROGRESS_QUESTIONS])
    heldout = heldout.to(device)
    model, marks = _new_model(config, len(vocab), device)
    parameters = [*model.parameters(), *marks.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=device.type == "cuda"
    )
    cooling_since: int | None = None
    step = 0
    for step in tqdm(range(1, config.steps + 1), disable=None, desc="demo model"):
        if step % config.refresh_steps == 0:
            window.refresh()
        spent = step / config.steps
        if config.minutes_limit > 0:  # a tenth of the time is left for scoring
            spent = max(spent, (time.perf_counter() - began) / (54 * config.minutes_limit))
        keep = min(1.0, (1 - spent) / config.cooldown_fraction)
        if cooling_since is not None:
            keep = min(keep, 1 - (step - cooling_since) / config.cooldown_steps)
        if keep <= 0:
            break
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(keep, step / config.warmup_steps)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            span_loss, key_loss, fact_loss = _losses(model, marks, window.batch(config.batch_size))
        (span_loss + config.aux_weight * keep * (key_loss + fact_loss)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % config.report_steps == 0:
            exact, f1 = _score_tensors(model, heldout)
            report(
                f"step {step:6d}  span {span_loss.item():.3f}  key {key_loss.item():.4f}  fact {fact_loss.item():.4f}  "
                f"held-out em {exact:5.1f} f1 {f1:5.1f}  rate {optimizer.param_groups[0]['lr']:.1e}  "
                f"{time.perf_counter() - began:.0f} s"
            )
            if f1 >= config.target_f1 and cooling_since is None:
                cooling_since = step
    return model, step


def _new_model(
    config: DemoModelConfig, vocab_size: int, device: torch.device
) -> tuple[BertForQuestionAnswering, nn.Linear]:
    import torch
    from transformers import BertConfig, BertForQuestionAnswering

    torch.manual_seed(config.seed)
    bert = BertConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.ffn,
        max_position_embeddings=config.max_positions,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=PAD,
    )
    model = BertForQuestionAnswering(bert).train()
    torch.nn.Module.to(model, device)
    return model, torch.nn.Linear(config.hidden, 2).to(device)


def _forward(model: BertForQuestionAnswering, rows: Tensor) -> tuple[Any, Tensor]:
    """Run the model on rows of `encode_passages`; returns its output and the bit fields of the tokens."""
    ids, bits = rows[:, 0, 2:].long(), rows[:, 1, 2:]
    passage = (bits & CONTEXT_BIT) > 0
    # the last [SEP] has type 1 too: it is the token after the last one of the passage
    types = passage.roll(1, dims=1) | passage
    output = model(
        input_ids=ids, attention_mask=(ids != PAD).long(), token_type_ids=types.long(), output_hidden_states=True
    )
    return output, bits


def _losses(model: BertForQuestionAnswering, marks: nn.Linear, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Span loss, then the auxiliary losses: the asked name is marked half way up, its sentences one layer above."""
    from torch.nn import functional

    output, bits = _forward(model, rows)
    start, end = rows[:, 0, 0].long(), rows[:, 0, 1].long()
    span = functional.cross_entropy(output.start_logits.float(), start)
    span = (span + functional.cross_entropy(output.end_logits.float(), end)) / 2
    half = model.config.num_hidden_layers // 2
    passage = ((bits & CONTEXT_BIT) > 0).float()
    auxiliary = []
    for head, (layer, bit, emphasis) in enumerate(((half, KEY_BIT, 8.0), (half + 1, FACT_BIT, 3.0))):
        logits = functional.linear(output.hidden_states[layer], marks.weight[head], marks.bias[head])
        wanted = ((bits & bit) > 0).float()
        weight = passage * (1 + (emphasis - 1) * wanted)
        loss = functional.binary_cross_entropy_with_logits(logits.float(), wanted, weight=weight, reduction="sum")
        auxiliary.append(loss / passage.sum())
    return span, auxiliary[0], auxiliary[1]


def _score_tensors(model: BertForQuestionAnswering, rows: Tensor) -> tuple[float, float]:
    """Exact match and token F1 in percent on encoded questions, for progress."""
    import torch

    exact = f1 = 0.0
    model.eval()
    for part in rows.split(_PROGRESS_BATCH):
        device = part.device.type
        with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            output, bits = _forward(model, part)
        start, end = _best_spans(output.start_logits.float(), output.end_logits.float(), (bits & CONTEXT_BIT) > 0)
        wanted_start, wanted_end = part[:, 0, 0].long(), part[:, 0, 1].long()
        exact += ((start == wanted_start) & (end == wanted_end)).sum().item()
        shared = (torch.minimum(end, wanted_end) - torch.maximum(start, wanted_start) + 1).clamp(min=0)
        f1 += (2 * shared / (end - start + wanted_end - wanted_start + 2)).sum().item()
    model.train()
    return 100 * exact / len(rows), 100 * f1 / len(rows)


def _best_spans(start_logits: Tensor, end_logits: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """The best span of each row with ``start <= end < start + 8`` inside ``allowed``."""
    import torch

    length = start_logits.shape[1]
    scores = start_logits[:, :, None] + end_logits[:, None, :]  # [T, length, length]
    order = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu().tril(_MAX_ANSWER_TOKENS - 1)
    scores = scores.masked_fill(~(order & allowed[:, :, None] & allowed[:, None, :]), -torch.inf)
    best = scores.flatten(1).argmax(1)
    return best // length, best % length


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device is {name!r} but torch {torch.__version__} sees no CUDA device; use device='cpu'")
    return torch.device(name)


def _write(
    out: Path, model: BertForQuestionAnswering, tokenizer: Tokenizer, card: dict[str, Any], config: DemoModelConfig
) -> dict[str, Any]:
    """Write the folder beside its place, score it as it was read back, then rename it into place."""

    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        folder.chmod(0o755)
        model.half().save_pretrained(folder)
        tokenizer.save(str(folder / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
            "model_max_length": model.config.max_position_embeddings,
            "do_lower_case": True,
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "mask_token": "[MASK]",
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        corpus = make_corpus(num_paragraphs=_SCORED_PARAGRAPHS, split="heldout", seed=config.seed)
        card["heldout"] = score_folder(folder, corpus, device=str(_device(config.device)))
        card["megabytes"] = (folder / "model.safetensors").stat().st_size / 1e6
        (folder / "demo_card.json").write_text(json.dumps(card, indent=2) + "\n")
        for file in folder.iterdir():
            file.chmod(0o644)
        if out.exists():
            shutil.rmtree(out)
        os.replace(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return card


if __name__ == "__main__":
    sys.exit(main())
