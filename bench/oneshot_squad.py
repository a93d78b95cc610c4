# SPDX-License-Identifier: Apache-2.0
"""One-shot pruning of a real SQuAD model: EM and F1 by pattern, method and update.

    python -m bench.oneshot_squad --model DIR --data dev.json.gz --train train.json.gz

fills ``bench/results/oneshot_squad.json`` cell by cell and writes the Markdown table beside it. A run that was cut off
goes on where it stopped; a cell is measured again only with ``--force``, or when the settings, the data or the model
changed. On a CPU only the dense model and 64:2:8 are measured (a cell takes some ten minutes there), unless ``--rows
all``.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.oneshot_table import to_markdown
from bench.stored import digest, run_command, save
from obs_kernels import OBSConfig, __version__
from obs_kernels.errors import ConfigError
from obs_kernels.training.evaluate import evaluate_squad
from obs_kernels.training.models import load_qa_model, pick_device
from obs_kernels.training.oneshot import Cell, OneShotTable, standard_cells
from obs_kernels.training.squad import load_squad, prepare_windows
from obs_kernels.training.squad_batches import calibration_loader

RESULTS = Path(__file__).parent / "results" / "oneshot_squad.json"
METHODS = ("magnitude", "diagonal", "pairwise", "combinatorial")
UPDATES = ("none", "single", "joint")
ROWS = (
    "2:4",
    "4:8",
    "2:8",
    "64:2:8",
    "128:2:8",
    "2:16",
    "64:2:16",
    "block8:0.75",
    "unstructured:0.75",
    "unstructured:0.9",
)
RECOMPUTED = ("2:8", "64:2:8", "128:2:8", "2:16", "64:2:16", "block8:0.75", "unstructured:0.75", "unstructured:0.9")
RECOMPUTATIONS = (4, 16)
CORE = (
    ("magnitude", "none"),
    ("diagonal", "joint"),
    ("pairwise", "joint"),
    ("combinatorial", "none"),
    ("combinatorial", "joint"),
)
"""Method and update of the README's columns."""
CURVATURES = (
    ("row", True, "outputs"),
    ("row", True, "labels"),
    ("layer", False, "labels"),
    ("row", False, "outputs"),
    ("layer", True, "labels"),
    ("block", False, "outputs"),
    ("row", False, "labels"),
)
"""Beside the block Fisher of the labels; True: sequential over the layers."""


def all_cells(rows: Sequence[str], methods: Sequence[str] = METHODS, updates: Sequence[str] = UPDATES) -> list[Cell]:
    """Cells of the table, those of the README first.

    Other curvatures and recomputations only if nothing is left out.
    """
    block = [cell for row in rows for cell in standard_cells(row, methods=methods, updates=updates)]
    if (tuple(methods), tuple(updates)) != (METHODS, UPDATES):
        return block
    first = [cell for cell in block if (cell.method, cell.update) in CORE]
    curved = [
        Cell(row, "combinatorial", "joint", 1, curvature, sequential, loss)
        for curvature, sequential, loss in CURVATURES
        for row in rows
        if takes(row, curvature)
    ]
    parts = [Cell(row, "combinatorial", "joint", p) for p in RECOMPUTATIONS for row in rows if row in RECOMPUTED]
    return first + curved + parts + [cell for cell in block if cell not in first]


def takes(pattern: str, curvature: str) -> bool:
    """Whether a pattern goes with a curvature."""
    try:
        OBSConfig(pattern=pattern, curvature=curvature)
    except ConfigError:
        return False
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    args = _parse(argv)
    torch.backends.cuda.matmul.allow_tf32 = False
    device = pick_device(args.device)
    rows = list(ROWS) if args.rows == "all" or (args.rows == "auto" and device.type == "cuda") else args.rows.split(",")
    if rows == ["auto"]:
        rows = ["64:2:8"]
    header = _header(args, device)
    stored = _resume(args.json, header, force=args.force, keep_stale=args.keep_stale)
    wanted = all_cells(rows, args.methods.split(","), args.updates.split(","))
    cells = [c for c in wanted if c.key not in stored["cells"]]
    if args.rows == "auto" and device.type == "cpu":
        cells = [c for c in cells if c == Cell(c.pattern, "combinatorial", "joint")]
    model, tokenizer = load_qa_model(args.model, device=device)
    dev = prepare_windows(load_squad(args.data, split="validation"), tokenizer, with_labels=False)
    train = prepare_windows(load_squad(args.train, split="train"), tokenizer, with_labels=True)
    base = OBSConfig(
        pattern="2:4",
        num_grads=args.num_grads,
        fisher_block_size=args.fisher_block_size,
        dampening_frac=args.dampening_frac,
        passes=args.passes,
        seed=args.seed,
        curvature="block",
    )
    loader = calibration_loader(train, num_samples=args.num_grads, batch_size=args.batch_size, seed=args.seed)
    table = OneShotTable(
        model, loader, lambda m: evaluate_squad(m, tokenizer, dev, batch_size=args.eval_batch_size), base
    )
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
    _dense(table, stored)
    for number, cell in enumerate(cells, 1):
        if time.monotonic() > deadline:
            print(f"time is up with {len(cells) - number + 1} cells to go; run the same command again", file=sys.stderr)
            break
        result = table.run_cell(cell)
        stored["cells"][cell.key] = result.to_dict() | {"commit": header["commit"], "device": header["device"]}
        stored["seconds_gradients"] = table.seconds_gradients or stored["seconds_gradients"]
        save(args.json, stored, to_markdown)
        print(
            f"[{number}/{len(cells)}] {cell.key}: EM {result.exact_match:.2f} F1 {result.f1:.2f} predicted "
            f"{result.predicted_loss:.4g} "
            f"prune {result.seconds_prune:.1f} s eval {result.seconds_eval:.1f} s violations {result.violations}",
            flush=True,
        )
    save(args.json, stored, to_markdown)
    print(to_markdown(stored))
    return 0


def _dense(table: OneShotTable, stored: dict[str, Any]) -> None:
    dense = table.dense_result()
    stored["dense"] = {
        "exact_match": dense.exact_match,
        "f1": dense.f1,
        "total": dense.total,
        "seconds_eval": dense.seconds,
    }
    print(
        f"dense: EM {dense.exact_match:.2f} F1 {dense.f1:.2f} on {dense.total} questions in {dense.seconds:.1f} s",
        flush=True,
    )


def _header(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    return {
        "command": _command(args),
        "model": digest(Path(args.model) / "model.safetensors"),
        "data": digest(Path(args.data)),
        "train": digest(Path(args.train)),
        "num_grads": args.num_grads,
        "fisher_block_size": args.fisher_block_size,
        "dampening_frac": args.dampening_frac,
        "passes": args.passes,
        "seed": args.seed,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
        "obs_kernels": __version__,
        "commit": args.commit or _commit(),
        "method_hash": method_hash(),
    }


def _command(args: argparse.Namespace) -> str:
    options = {"num-grads": args.num_grads, "fisher-block-size": args.fisher_block_size, "seed": args.seed}
    options["passes"] = args.passes or None
    shown = " ".join(f"--{name} {value}" for name, value in options.items() if value is not None)
    return f"python -m bench.oneshot_squad --model DIR --data dev.json.gz --train train.json.gz {shown}"


def method_hash() -> str:
    """Hash of the code that decides the figures, without docstrings; a change makes stored cells stale."""
    root = Path(__file__).parents[1] / "obs_kernels"
    found = hashlib.sha256()
    for path in sorted((root.parent / "csrc").rglob("*.*")):
        found.update(path.read_bytes())
    for folder in ("ops", "reference", "cuda_calls", "triton_kernels", "pruning"):
        for path in sorted((root / folder).rglob("*.py")):
            tree = ast.parse(path.read_text())
            for node in ast.walk(tree):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                    texts = [n for n in node.body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
                    node.body = [n for n in node.body if n not in texts]
            found.update(f"{path.relative_to(root).as_posix()}\n{ast.dump(tree)}".encode())
    return found.hexdigest()[:16]


def _resume(path: Path, header: dict[str, Any], *, force: bool, keep_stale: bool) -> dict[str, Any]:
    """Stored results of the same settings (and the same code and device, unless ``keep_stale``), or an empty table."""
    fresh: dict[str, Any] = {"schema": 1, "header": header, "dense": None, "seconds_gradients": 0.0, "cells": {}}
    if force or not path.exists():
        return fresh
    stored: dict[str, Any] = json.loads(path.read_text())
    identity = (
        "model",
        "data",
        "train",
        "num_grads",
        "fisher_block_size",
        "dampening_frac",
        "passes",
        "seed",
        *(() if keep_stale else ("method_hash", "device")),
    )
    stored["header"].setdefault("passes", 0)  # of a file that is older than them
    differing = [k for k in identity if stored["header"].get(k) != header[k]]
    if differing:
        print(f"stored results differ in {', '.join(differing)}; starting anew", file=sys.stderr)
        return fresh
    for cell in stored["cells"].values():
        cell.setdefault("commit", stored["header"]["commit"])
        cell.setdefault("device", stored["header"]["device"])
    return stored | {"header": header}


def _commit() -> str:
    try:
        run = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
            check=True,
        )
        return run.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.oneshot_squad", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or hub name of a dense question answering model")
    parser.add_argument("--data", required=True, help="questions to evaluate on, SQuAD v1.1")
    parser.add_argument("--train", required=True, help="questions to take gradients from, SQuAD v1.1")
    parser.add_argument("--rows", default="auto", help="auto, all, or patterns with commas")
    parser.add_argument("--methods", default=",".join(METHODS), help="some of the methods, with commas")
    parser.add_argument("--updates", default=",".join(UPDATES), help="some of the updates, with commas")
    parser.add_argument("--passes", type=int, default=0, help="coordinate passes over the groups of a block, for D > m")
    parser.add_argument("--num-grads", type=int, default=1024)
    parser.add_argument("--fisher-block-size", type=int, default=None, help="D for all rows; default by pattern")
    parser.add_argument("--dampening-frac", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=16, help="windows a backward pass")
    parser.add_argument("--eval-batch-size", type=int, default=128)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="stop after that long; the same command goes on later"
    )
    parser.add_argument("--json", type=Path, default=RESULTS, help="where results are kept")
    parser.add_argument("--commit", default="", help="commit to record where there is no git")
    parser.add_argument(
        "--keep-stale", action="store_true", help="keep cells of older code or another device; each names both"
    )
    parser.add_argument("--force", action="store_true", help="measure all cells again")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
