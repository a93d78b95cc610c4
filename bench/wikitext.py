# SPDX-License-Identifier: Apache-2.0
"""One-shot pruning of a small language model on real text: perplexity by pattern and method.

    python -m bench.wikitext --train wikitext2_valid.txt.gz --test wikitext2_test.txt.gz --work DIR

A GPT-2 of some layers is trained on the first text (once; it is kept in the work folder) for as long as a part held
out of it gains, pruned in one shot from blocks of that text, and measured on the second. Small, but real text and a
decoder: no figure here compares with those of models trained on the whole of WikiText-2. Writes
``bench/results/wikitext.json`` cell by cell and the Markdown beside it; a run that was cut off goes on where it
stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.gpu_report import describe_tree
from bench.stored import digest, run_command, save, table_row
from obs_kernels import OBSConfig, sparsify_
from obs_kernels.patterns import VNMPattern, parse_pattern
from obs_kernels.training.language import (
    TextBlocks,
    causal_lm_loss,
    causal_lm_output_loss,
    perplexity,
    read_text,
    train_tokenizer,
)
from obs_kernels.training.models import pick_device

RESULTS = Path(__file__).parent / "results" / "wikitext.json"
PATTERNS = ("2:4", "4:8", "2:8", "64:2:8")
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude", "update": "none"},
    "block": {},
    "SparseGPT": {"curvature": "layer", "sequential": True},
    "row": {"curvature": "row"},
    "row, outputs": {"curvature": "row"},
    "row, sequential": {"curvature": "row", "sequential": True},
    "row, sequential, outputs": {"curvature": "row", "sequential": True},
}
"""Settings of each column; block is the exact choice and joint update with D = 64, outputs the curvature of the model's
own next tokens instead of that of its loss."""
BLOCK_SIZE = 64
HELD_OUT = 16
"""One token of so many, at the end of the training text, decides which step of the training is kept."""
CHECK_EVERY = 25
"""Steps."""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    args = _parse(argv)
    torch.backends.cuda.matmul.allow_tf32 = False
    device = pick_device(args.device)
    text = read_text(args.train)
    tokenizer = train_tokenizer(text, args.vocab)
    train_ids, test_ids = (
        torch.tensor(tokenizer.encode(part).ids, dtype=torch.int64) for part in (text, read_text(args.test))
    )
    test = TextBlocks(test_ids, args.length, args.batch_size)
    model = _trained(args, train_ids, device)
    header = {
        "train": digest(args.train),
        "test": digest(args.test),
        "layers": args.layers,
        "width": args.width,
        "vocab": args.vocab,
        "length": args.length,
        "steps": args.steps,
        "num_grads": args.num_grads,
        "seed": args.seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
    stored: dict[str, Any] = json.loads(args.json.read_text()) if args.json.is_file() else {}
    if stored.get("header") != header:
        stored = {"header": header, "dense": None, "cells": {}}
    stored["dense"] = perplexity(model, test)
    calibration = TextBlocks(train_ids, args.length, args.batch_size, count=args.num_grads, seed=args.seed)
    for pattern in args.patterns.split(","):
        for name in METHODS:
            key = f"{pattern}/{name}"
            cfg = config(pattern, name, num_grads=args.num_grads, seed=args.seed)
            if key in stored["cells"] or cfg is None:
                continue
            pruned = copy.deepcopy(model)
            start = time.perf_counter()
            loss = causal_lm_output_loss if name.endswith("outputs") else causal_lm_loss
            report = sparsify_(pruned, cfg, calibration, loss)
            seconds = time.perf_counter() - start
            stored["cells"][key] = {
                "pattern": pattern,
                "method": name,
                "perplexity": perplexity(pruned, test),
                "sparsity": report.sparsity,
                "seconds_prune": round(seconds, 2),
            } | describe_tree(args.commit)
            save(args.json, stored, to_markdown)
            print(f"{key}: {stored['cells'][key]['perplexity']:.2f}", file=sys.stderr, flush=True)
    save(args.json, stored, to_markdown)
    print(to_markdown(stored))
    return 0


def config(pattern: str, name: str, *, num_grads: int, seed: int) -> OBSConfig | None:
    """Settings of a cell; None where the method does not take the pattern."""
    settings = METHODS[name]
    if settings.get("curvature") == "layer" and isinstance(parse_pattern(pattern), VNMPattern):
        return None
    size = None if "curvature" in settings else BLOCK_SIZE
    return OBSConfig(
        pattern=pattern, num_grads=num_grads, targets=("Conv1D",), seed=seed, fisher_block_size=size, **settings
    )


def _trained(args: argparse.Namespace, ids: torch.Tensor, device: torch.device) -> nn.Module:
    """The dense model, from the work folder if it is there."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = args.work / f"gpt2-{args.layers}x{args.width}-{args.vocab}-{args.length}-{args.steps}-{args.seed}"
    if (folder / "model.safetensors").is_file():
        return nn.Module.to(GPT2LMHeadModel.from_pretrained(folder), device).eval()
    torch.manual_seed(args.seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=args.vocab,
            n_positions=args.length,
            n_embd=args.width,
            n_layer=args.layers,
            n_head=max(1, args.width // 64),
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    nn.Module.to(model, device)
    train_(model, ids, length=args.length, batch_size=args.batch_size, steps=args.steps, seed=args.seed)
    model.save_pretrained(folder)
    return nn.Module.eval(model)


def train_(
    model: nn.Module, ids: torch.Tensor, *, length: int, batch_size: int, steps: int, seed: int, lr: float = 1e-3
) -> None:
    """AdamW with a linear warm-up and a cosine decay, random places of the text, dropout on; keeps the best step."""
    count = max(ids.numel() // HELD_OUT, length)
    ids, held_out = ids[:-count], TextBlocks(ids[-count:], length, batch_size)
    best, kept = float("inf"), dict[str, torch.Tensor]()
    device = next(model.parameters()).device
    gen = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    model.train()
    for step in range(1, steps + 1):
        starts = torch.randint(0, ids.numel() - length, (batch_size,), generator=gen)
        batch = torch.stack([ids[start : start + length] for start in starts.tolist()]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = causal_lm_loss(model, {"input_ids": batch}).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % CHECK_EVERY == 0 or step == steps:
            found = perplexity(model, held_out)
            if found < best:
                best, kept = found, {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(kept)


def to_markdown(stored: dict[str, Any]) -> str:
    """The table from the JSON alone."""
    header, cells = stored["header"], stored["cells"]
    commits = ", ".join(dict.fromkeys(cell["commit"] for cell in cells.values()))
    lines = [
        "# One-shot pruning of a small GPT-2 on WikiText-2",
        "",
        f"{header['layers']} layers of {header['width']}, {header['parameters'] / 1e6:.1f}M parameters, trained here "
        f"for at most {header['steps']} steps on the validation text, the best of them by a part held out (byte-level "
        f"BPE of {header['vocab']}), perplexity a token "
        f"on the test text, blocks of {header['length']}; {header['num_grads']} blocks for the curvature, seed "
        f"{header['seed']}; {header['device']}; commits {commits}. Dense: {stored['dense']:.2f}. No figure compares "
        "with models trained on the whole of WikiText-2.",
        "",
        "| pattern | " + " | ".join(METHODS) + " |",
        "|---|" + "---:|" * len(METHODS),
    ]
    for pattern in dict.fromkeys(cell["pattern"] for cell in cells.values()):
        row = {name: cells.get(f"{pattern}/{name}", {}).get("perplexity") for name in METHODS}
        best = min(value for value in row.values() if value is not None)
        lines.append(table_row(pattern, list(row.values()), best))
    return "\n".join(lines) + "\n"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.wikitext", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", type=Path, required=True, help="text to train on and to take gradients from")
    parser.add_argument("--test", type=Path, required=True, help="text to measure on")
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps the trained model")
    parser.add_argument("--patterns", default=",".join(PATTERNS))
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--num-grads", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--commit", default=None, help="commit to record where there is no git")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
