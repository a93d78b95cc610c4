# SPDX-License-Identifier: Apache-2.0
"""Choices of the method, measured on a real SQuAD model: predicted loss and F1 with and without them.

    python -m bench.choices_squad --model DIR --data dev.json.gz --train train.json.gz

``passes``: how many coordinate passes over the groups of a Fisher block, by its size D. ``permutation``: panels whose
input channels are reordered first, so that kept columns coincide, where the order folds into the layer before (FFN, and
attention value to output). ``row``: row curvature of the model's own answers, layer by layer, as it is over all seeds,
and what changes with one setting. One shot, exact choice, joint update, nothing trained; means over seeds of the
gradients' questions. Writes ``bench/results/choices_squad.json`` cell by cell, each with its commit, and the Markdown
beside it; a run that was cut off goes on where it stopped, if model, data and settings are the same.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.gpu_report import describe_tree
from bench.permutation import reorder_channels_
from bench.stored import digest, run_command, save
from obs_kernels import OBSConfig
from obs_kernels.errors import ConfigError
from obs_kernels.training.evaluate import evaluate_squad
from obs_kernels.training.models import load_qa_model, pick_device
from obs_kernels.training.oneshot import Cell, OneShotTable
from obs_kernels.training.squad import load_squad, prepare_windows
from obs_kernels.training.squad_batches import calibration_loader

RESULTS = Path(__file__).parent / "results" / "choices_squad.json"
PASSES_PATTERNS = ("2:4", "2:8", "64:2:8")
PASSES_SIZES = (32, 64, 128)
PASSES = (0, 1, 3)
PERMUTED_PATTERNS = ("64:2:8", "128:2:8")
ROW_PATTERNS = ("2:4", "4:8", "2:8", "64:2:8", "128:2:8")
ROW_CHANGED_PATTERNS = ("2:4", "2:8", "64:2:8")
AS_IT_IS = "as it is"
ROW_CHANGES: dict[str, dict[str, Any]] = {
    "biases stay": {"refit_bias": False},
    "groups by curvature": {"sweep_order": "diagonal"},
    "damping 0.1": {"dampening_frac": 0.1},
    "two parts": {"recomputations": 2},
    "512 questions": {"num_grads": 512},
    "2,048 questions": {"num_grads": 2048},
    "4,096 questions": {"num_grads": 4096},
    "8,192 questions": {"num_grads": 8192},
    "two clusters": {"row_clusters": 2},
    "four clusters": {"row_clusters": 4},
}
FIGURES = {"predicted_loss": "{:.4f}", "f1": "{:.2f}"}
DIAGONAL_SIZE = 64
"""D of the Fisher whose diagonal decides the order."""
ROUNDS = 100
"""Of exchanges between pairs of groups, all groups at once."""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    args = _parse(argv)
    torch.backends.cuda.matmul.allow_tf32 = False
    device = pick_device(args.device)
    header = {
        "model": digest(Path(args.model) / "model.safetensors"),
        "data": digest(Path(args.data)),
        "train": digest(Path(args.train)),
        "num_grads": args.num_grads,
        "dampening_frac": args.dampening_frac,
        "every": args.every,
    }
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    stored = _resume(args.json, header)
    model, tokenizer = load_qa_model(args.model, device=device)
    questions = load_squad(args.data, split="validation")
    dev = prepare_windows(questions[:: args.every], tokenizer, with_labels=False)
    train = prepare_windows(load_squad(args.train, split="train"), tokenizer, with_labels=True)
    tree = describe_tree(args.commit)
    started = time.monotonic()
    tables: dict[tuple[int, int, str | None], OneShotTable] = {}
    for cell in chosen_cells(args.studies.split(","), args.seeds, args.only):
        seed = cell["seed"]
        key = f"{cell['study']}/{cell['pattern']}/{cell['D']}/{cell['value']}/{seed}"
        if key in stored["cells"] or (args.minutes and time.monotonic() - started > 60 * args.minutes):
            continue
        cfg = config(cell, num_grads=args.num_grads, dampening_frac=args.dampening_frac)
        count = cfg.num_grads
        order = cell["pattern"] if cell["value"] == "reordered" else None
        if (seed, count, order) not in tables:
            tables.clear()
            loader = calibration_loader(train, num_samples=count, batch_size=args.batch_size, seed=seed)
            tables[seed, count, order] = _table(model, order, loader, tokenizer, dev, args)
        table = tables[seed, count, order]
        table.base = cfg
        result = table.run_cell(
            Cell(
                cell["pattern"],
                "combinatorial",
                "joint",
                cfg.recomputations,
                curvature=cfg.curvature,
                sequential=cfg.sequential,
                loss="outputs" if cfg.curvature == "row" else "labels",
            )
        )
        stored["cells"][key] = (
            cell
            | {"f1": result.f1, "exact_match": result.exact_match}
            | {"predicted_loss": result.predicted_loss, "seconds_prune": round(result.seconds_prune, 3)}
            | {"device": device_name}
            | tree
        )
        stored["dense_f1"] = table.dense_result().f1
        save(args.json, stored, to_markdown)
        print(f"{key}: F1 {result.f1:.2f} predicted {result.predicted_loss:.4g}", file=sys.stderr, flush=True)
    save(args.json, stored, to_markdown)
    print(to_markdown(stored))
    return 0


def config(cell: dict[str, Any], *, num_grads: int, dampening_frac: float) -> OBSConfig:
    """Settings of a cell, but for what ``OneShotTable`` takes from the cell itself."""
    whole_rows = cell["D"] == "row"
    base = OBSConfig(
        pattern=cell["pattern"],
        num_grads=num_grads,
        curvature="row" if whole_rows else "block",
        sequential=whole_rows,
        fisher_block_size=None if whole_rows else cell["D"],
        dampening_frac=dampening_frac,
        passes=cell["value"] if cell["study"] == "passes" else 0,
        seed=cell["seed"],
    )
    return replace(base, **ROW_CHANGES.get(cell["value"], {})) if cell["study"] == "row" else base


def _cells(studies: Sequence[str], seeds: int) -> Iterator[dict[str, Any]]:
    if "row" in studies:
        for seed in range(seeds):
            for pattern in ROW_PATTERNS:
                yield {"study": "row", "pattern": pattern, "D": "row", "value": AS_IT_IS, "seed": seed}
        for value in ROW_CHANGES:
            for pattern in ROW_CHANGED_PATTERNS:
                yield {"study": "row", "pattern": pattern, "D": "row", "value": value, "seed": 0}
    for seed in range(seeds):
        if "passes" in studies:
            for size in PASSES_SIZES:
                for pattern in PASSES_PATTERNS:
                    for passes in PASSES:
                        yield {"study": "passes", "pattern": pattern, "D": size, "value": passes, "seed": seed}
        if "permutation" in studies:
            for pattern in PERMUTED_PATTERNS:
                for order in (AS_IT_IS, "reordered"):
                    for of in (DIAGONAL_SIZE, "row"):  # a block Fisher, or row curvature
                        yield {"study": "permutation", "pattern": pattern, "D": of, "value": order, "seed": seed}


def chosen_cells(studies: Sequence[str], seeds: int, only: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Cells of ``studies``; with ``only`` those that it names, in its order: PATTERN, VALUE or PATTERN/VALUE.

    Raises:
        ConfigError: one of ``only`` names no cell.
    """
    cells = list(_cells(studies, seeds))
    if not only:
        return cells
    found: list[dict[str, Any]] = []
    for text in only:
        named = [c for c in cells if text in (c["pattern"], str(c["value"]), f"{c['pattern']}/{c['value']}")]
        if not named:
            known = dict.fromkeys(str(cell["value"]) for cell in cells)
            raise ConfigError(
                f"--only must be PATTERN, VALUE or PATTERN/VALUE, got {text!r}; values: {'; '.join(known)}"
            )
        found += [cell for cell in named if cell not in found]
    return found


def _table(
    model: nn.Module, pattern: str | None, loader: Any, tokenizer: Any, dev: Any, args: argparse.Namespace
) -> OneShotTable:
    """Table of ``model``, or of a copy whose channels are reordered for ``pattern``: the same function."""
    base = OBSConfig(
        pattern="2:4", num_grads=args.num_grads, fisher_block_size=DIAGONAL_SIZE, seed=loader.seed, curvature="block"
    )
    if pattern is not None:
        model = copy.deepcopy(model)
        gained = reorder_channels_(model, pattern, loader, base, rounds=ROUNDS)
        print(f"reordered for {pattern}: model of the order {gained}", file=sys.stderr, flush=True)
    return OneShotTable(
        model, loader, lambda m: evaluate_squad(m, tokenizer, dev, batch_size=args.eval_batch_size), base
    )


def to_markdown(stored: dict[str, Any]) -> str:
    """Tables of both studies from the JSON alone; means over the seeds."""
    header, cells = stored["header"], list(stored["cells"].values())
    share = "all questions" if header["every"] == 1 else f"every {header['every']}th question"
    seeds = sorted({cell["seed"] for cell in cells})
    lines = [
        "# Choices of the method on SQuAD",
        "",
        f"One shot, exact choice, joint update, nothing trained. {header['num_grads']} per-sample gradients, damping "
        f"{header['dampening_frac']} of the mean diagonal; F1 on {share} of the dev set, dense "
        f"{stored.get('dense_f1') or float('nan'):.2f}; "
        f"{'one seed' if len(seeds) == 1 else f'means over {len(seeds)} seeds, largest less least in brackets'}; "
        f"{' and '.join(sorted({cell['device'] for cell in cells}))}; "
        f"commits {', '.join(sorted({cell['commit'] for cell in cells}))}.",
    ]
    for study, title in (
        ("passes", "Coordinate passes over the groups of a Fisher block"),
        ("permutation", "Input channels of FFN down and attention output reordered"),
    ):
        lines += ["", f"## {title}", "", *_table_by_pattern(study, [c for c in cells if c["study"] == study])]
    lines += ["", "## Row curvature, layer by layer, of the model's own answers", ""]
    lines += _table_by_change([cell for cell in cells if cell["study"] == "row"])
    return "\n".join(lines) + "\n"


def _table_by_pattern(study: str, cells: Sequence[dict[str, Any]]) -> list[str]:
    """A line a pattern and block size, a column a value."""
    if not cells:
        return ["Not run."]
    values = list(dict.fromkeys(cell["value"] for cell in cells))
    names = [f"{v} pass{'' if v == 1 else 'es'}" if study == "passes" else str(v) for v in values]
    columns = [f"predicted loss, {n}" for n in names] + [f"F1, {n}" for n in names]
    lines = ["| pattern | D | " + " | ".join(columns) + " |", "|---|---:|" + "---:|" * len(columns)]
    for pattern, size in sorted({(c["pattern"], c["D"]) for c in cells}, key=lambda x: (str(x[1]).zfill(4), x[0])):
        own = [[c for c in cells if (c["pattern"], c["D"], c["value"]) == (pattern, size, v)] for v in values]
        figures = [_figure(part, figure) for figure in FIGURES for part in own]
        lines.append("| " + " | ".join([pattern, str(size), *figures]) + " |")
    return lines


def _table_by_change(cells: Sequence[dict[str, Any]]) -> list[str]:
    """A line a change of the settings, a column a pattern; changes that were not run have their line too."""
    columns = [f"{name}, {pattern}" for name in ("predicted loss", "F1") for pattern in ROW_PATTERNS]
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for value in (AS_IT_IS, *ROW_CHANGES):
        own = [[c for c in cells if (c["pattern"], c["value"]) == (pattern, value)] for pattern in ROW_PATTERNS]
        figures = [_figure(part, figure) for figure in FIGURES for part in own]
        lines.append("| " + " | ".join([value, *figures]) + " |")
    return lines


def _figure(cells: Sequence[dict[str, Any]], figure: str) -> str:
    """Mean over the seeds; of F1 also largest less least."""
    if not cells:
        return "not run"
    values = [cell[figure] for cell in cells]
    spread = f" ({max(values) - min(values):.2f})" if figure == "f1" and len(values) > 1 else ""
    return FIGURES[figure].format(sum(values) / len(values)) + spread


def _resume(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    stored: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    older = stored.get("header", {}).pop("device", None)  # of a file whose cells do not name theirs
    for cell in stored.get("cells", {}).values():
        cell.setdefault("device", older)
    if stored.get("header") == header:
        return stored
    return {"header": header, "dense_f1": None, "cells": {}}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.choices_squad", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or hub name of a dense BERT for question answering")
    parser.add_argument("--data", required=True, help="questions to evaluate on, SQuAD v1.1")
    parser.add_argument("--train", required=True, help="questions to take gradients from, SQuAD v1.1")
    parser.add_argument("--studies", default="row,passes,permutation")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="PATTERN, VALUE or PATTERN/VALUE of cells to run, in order",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--every", type=int, default=1, help="take every so many of the dev questions")
    parser.add_argument("--num-grads", type=int, default=1024)
    parser.add_argument("--dampening-frac", type=float, default=0.01)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--eval-batch-size", type=int, default=128)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--minutes", type=float, default=0.0, help="start no cell after that long")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--commit", default=None, help="commit to record where there is no git")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
