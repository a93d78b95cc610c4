# SPDX-License-Identifier: Apache-2.0
"""How far each search is from the optimum, on the Fisher of a real model: predicted loss by method over that of the
exact choice.

    python -m bench.search_quality --model DIR --train train.json.gz

Each method chooses a mask; the weights that are left are updated jointly within their block of D = m, and the predicted
loss 1/2 dw^T (F + damp I) dw is summed over all layers. A share of the rows is taken (whole panels, evenly spread), so
that a CPU can do the large counts too. Writes ``bench/results/search_quality.json`` and the Markdown table beside it,
pattern by pattern: a run that was cut off goes on where it stopped, if the settings are the same.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu_report import describe_tree
from bench.stored import run_command, save
from obs_kernels import OBSConfig, OBSPruner, ops
from obs_kernels.errors import ConfigError
from obs_kernels.patterns import NMPattern, VNMPattern, parse_pattern
from obs_kernels.reference.passes import improve_choice
from obs_kernels.training.models import load_qa_model, pick_device
from obs_kernels.training.squad import load_squad, prepare_windows
from obs_kernels.training.squad_batches import calibration_loader, squad_loss

RESULTS = Path(__file__).parent / "results" / "search_quality.json"
PATTERNS = ("2:4", "4:8", "2:8", "2:16", "4:16", "64:2:8", "128:2:8", "64:2:16", "128:2:16")
METHODS = ("combinatorial", "greedy", "pairwise", "diagonal", "magnitude")
PASSES_PATTERNS = ("2:4", "2:8", "64:2:8")
PASSES_SIZES = (32, 64, 128)
PASSES = (1, 3)
PANEL_ROWS = 128
"""Rows are taken in runs of this many: whole panels of every pattern."""

Layer = tuple[str, Tensor, Tensor]
"""Name, weight [R, C] and undamped Fisher [R * C / D, D, D] of the rows that are looked at."""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    args = _parse(argv)
    device = pick_device(args.device)
    model, tokenizer = load_qa_model(args.model, device=device)
    windows = prepare_windows(load_squad(args.train, split="train"), tokenizer, with_labels=True)
    patterns = args.patterns.split(",")
    sizes = [int(size) for size in args.passes_sizes.split(",") if size]
    group = max(_group(pattern) for pattern in patterns)
    widest = max(group, *sizes)  # its diagonal holds the blocks of every smaller size
    config = OBSConfig(
        pattern=f"2:{group}", num_grads=args.num_grads, fisher_block_size=widest, seed=args.seed, curvature="block"
    )
    pruner = OBSPruner(model, config)
    start = time.perf_counter()
    pruner.collect(
        calibration_loader(windows, num_samples=args.num_grads, batch_size=args.batch_size, seed=args.seed), squad_loss
    )
    print(f"gradients: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    layers = [_some_rows(model, name, fisher, args.rows_share) for name, fisher in pruner.fishers().items()]
    settings = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "num_grads": args.num_grads,
        "seed": args.seed,
        "dampening_frac": args.dampening_frac,
        "rows_share": args.rows_share,
        "weights": sum(weight.numel() for _, weight, _ in layers),
    }
    document = _resume(args.json, settings)
    document["command"] = (
        f"python -m bench.search_quality --model DIR --train train.json.gz --num-grads {args.num_grads}"
    )
    tree = describe_tree(args.commit) | {"torch": torch.__version__}

    def add(kind: str, cells: list[dict[str, Any]], key: str) -> None:
        document[kind] += [cell | tree for cell in cells]
        save(args.json, document, to_markdown)
        shown = " ".join(f"{cell[key]} {cell.get('x_optimum', cell.get('x_first')):.3f}" for cell in cells)
        print(f"{kind}: {cells[0]['pattern']} D = {cells[0]['D']}: {shown}", file=sys.stderr, flush=True)

    for pattern in patterns:
        if pattern not in {c["pattern"] for c in document["cells"]}:
            add("cells", measure(layers, pattern, dampening_frac=args.dampening_frac), "method")
    for size in sizes:
        for pattern in args.passes_patterns.split(","):
            if (pattern, size) not in {(c["pattern"], c["D"]) for c in document["passes"]}:
                add("passes", measure_passes(layers, pattern, size, dampening_frac=args.dampening_frac), "passes")
    save(args.json, document, to_markdown)
    print(to_markdown(document))
    return 0


def _resume(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What was measured with the same settings, or an empty document."""
    stored = json.loads(path.read_text()) if path.is_file() else {}
    if {key: stored.get(key) for key in settings} == settings:
        return dict(stored)
    return settings | {"cells": [], "passes": []}


def measure(layers: Sequence[Layer], pattern: str, *, dampening_frac: float) -> list[dict[str, Any]]:
    """Predicted loss of every method summed over ``layers``, and its ratio to the exact choice."""
    parsed = parse_pattern(pattern)
    assert isinstance(parsed, NMPattern)
    losses, seconds = dict.fromkeys(METHODS, 0.0), dict.fromkeys(METHODS, 0.0)
    for _, weight, wide in layers:
        fisher = _sub_blocks(wide, parsed.m)
        damp = dampening_frac * float(fisher.diagonal(dim1=1, dim2=2).mean())
        for method in METHODS:
            start = time.perf_counter()
            mask = _choose(weight, fisher, parsed, damp, method)
            if weight.is_cuda:
                torch.cuda.synchronize()
            seconds[method] += time.perf_counter() - start
            parsed.validate_mask(mask)
            losses[method] += _predicted_loss(weight, fisher, mask, damp)
    return [
        {
            "pattern": pattern,
            "D": parsed.m,
            "method": method,
            "predicted_loss": losses[method],
            "x_optimum": losses[method] / losses["combinatorial"],
            "seconds": round(seconds[method], 2),
        }
        for method in METHODS
    ]


def measure_passes(layers: Sequence[Layer], pattern: str, size: int, *, dampening_frac: float) -> list[dict[str, Any]]:
    """Predicted loss after passes over the groups of blocks of ``size``, summed, over that of the first choice."""
    parsed = parse_pattern(pattern)
    assert isinstance(parsed, NMPattern)
    losses, seconds = dict.fromkeys((0, *PASSES), 0.0), dict.fromkeys((0, *PASSES), 0.0)
    for _, weight, wide in layers:
        fisher = _sub_blocks(wide, size)
        damp = dampening_frac * float(fisher.diagonal(dim1=1, dim2=2).mean())
        first = _choose(weight, fisher, parsed, damp, "combinatorial")
        for count in losses:
            start = time.perf_counter()
            mask = first
            if count:
                mask, _ = improve_choice(
                    weight,
                    fisher,
                    first,
                    str(parsed),
                    damp=torch.full((1,), damp, device=weight.device),
                    alive=torch.ones_like(first),
                    passes=count,
                )
            if weight.is_cuda:
                torch.cuda.synchronize()
            seconds[count] += time.perf_counter() - start
            parsed.validate_mask(mask)
            losses[count] += _predicted_loss(weight, fisher, mask, damp)
    return [
        {
            "pattern": pattern,
            "D": size,
            "passes": count,
            "predicted_loss": losses[count],
            "x_first": losses[count] / losses[0],
            "seconds": round(seconds[count], 2),
        }
        for count in losses
    ]


def _choose(weight: Tensor, fisher: Tensor, pattern: NMPattern, damp: float, method: str) -> Tensor:
    search = ops.search_vnm if isinstance(pattern, VNMPattern) else ops.search_nm
    return search(weight, fisher, pattern, damp=damp, method=method).mask


def _predicted_loss(weight: Tensor, fisher: Tensor, mask: Tensor, damp: float) -> float:
    """Of the mask with the joint update, summed over all blocks."""
    change = ops.obs_update(weight, fisher, mask, damp=damp) - weight
    return float(ops.loss_increase(change, fisher, damp=damp).double().sum())


def to_markdown(document: dict[str, Any]) -> str:
    """The whole page."""
    commits = sorted({str(cell["commit"])[:12] for kind in ("cells", "passes") for cell in document[kind]})
    lines = [
        "# Predicted loss over that of the exact choice",
        "",
        f"Every method's mask with the joint update, D = m; {document['num_grads']} per-sample gradients of a real "
        f"question answering model, {document['weights']:,} of its weights, damping {document['dampening_frac']} of "
        f"the mean diagonal, seed {document['seed']}; {document['device']}, commits {', '.join(commits)}. Seconds are "
        f"those of the reference search there.",
        "",
        *ratio_table(document),
        "",
        "Passes over the groups of a Fisher block after the exact first choice: predicted loss over that of the first "
        "choice, and seconds of the reference.",
        "",
        *passes_table(document),
    ]
    return "\n".join([*lines, "", f"    {document['command']}", ""])


def ratio_table(document: dict[str, Any]) -> list[str]:
    """Lines of the table, methods in columns."""
    by_key = {(c["pattern"], c["method"]): c for c in document["cells"]}
    lines = [
        "| pattern | " + " | ".join(METHODS[1:]) + " | seconds, exact | seconds, greedy |",
        "|---|" + "---:|" * (len(METHODS) + 1),
    ]
    for pattern in dict.fromkeys(c["pattern"] for c in document["cells"]):
        ratios = [f"{by_key[pattern, method]['x_optimum']:.3f}" for method in METHODS[1:]]
        times = [f"{by_key[pattern, method]['seconds']:.1f}" for method in METHODS[:2]]
        lines.append(f"| {pattern} | {' | '.join([*ratios, *times])} |")
    return lines


def passes_table(document: dict[str, Any]) -> list[str]:
    """Lines of the second table, passes in columns."""
    by_key = {(c["pattern"], c["D"], c["passes"]): c for c in document["passes"]}
    lines = [
        "| pattern | D | " + " | ".join(f"{count} pass{'es' * (count > 1)}" for count in PASSES) + " | seconds, 1 |",
        "|---|---:|" + "---:|" * (len(PASSES) + 1),
    ]
    for pattern, size in dict.fromkeys((c["pattern"], c["D"]) for c in document["passes"]):
        ratios = [f"{by_key[pattern, size, count]['x_first']:.3f}" for count in PASSES]
        lines.append(f"| {pattern} | {size} | {' | '.join(ratios)} | {by_key[pattern, size, 1]['seconds']:.1f} |")
    return lines


def _some_rows(model: torch.nn.Module, name: str, fisher: Tensor, share: float) -> Layer:
    """Runs of ``PANEL_ROWS`` rows, evenly spread, with their Fisher blocks."""
    weight = model.get_parameter(name).detach()
    rows, cols = weight.shape
    runs = rows // PANEL_ROWS
    if rows % PANEL_ROWS or not 0 < share <= 1:
        raise ConfigError(f"rows_share must be in (0, 1] and rows a multiple of {PANEL_ROWS}, got {share}, {rows} rows")
    every = torch.linspace(0, runs - 1, max(1, round(share * runs))).round().long()
    picked = (every[:, None] * PANEL_ROWS + torch.arange(PANEL_ROWS)).flatten().to(weight.device)
    blocks = fisher.view(rows, cols // fisher.shape[1], *fisher.shape[1:])[picked]
    return name, weight[picked].contiguous(), blocks.flatten(0, 1).clone()


def _sub_blocks(fisher: Tensor, size: int) -> Tensor:
    """The diagonal blocks [B * D / size, size, size] of ``fisher`` [B, D, D]."""
    count, wide, _ = fisher.shape
    parts = fisher.view(count, wide // size, size, wide // size, size).diagonal(dim1=1, dim2=3)
    return parts.permute(0, 3, 1, 2).reshape(-1, size, size).contiguous()


def _group(pattern: str) -> int:
    parsed = parse_pattern(pattern)
    if not isinstance(parsed, NMPattern):
        raise ConfigError(f"patterns must be n:m or v:n:m, got {pattern}")
    return parsed.m


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.search_quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or hub name of a dense question answering model")
    parser.add_argument("--train", required=True, help="questions to take gradients from, SQuAD v1.1")
    parser.add_argument("--patterns", default=",".join(PATTERNS), help="n:m and v:n:m, with commas")
    parser.add_argument("--passes-patterns", default=",".join(PASSES_PATTERNS), help="n:m and v:n:m, with commas")
    parser.add_argument("--passes-sizes", default=",".join(map(str, PASSES_SIZES)), help="D, with commas; '' for none")
    parser.add_argument("--num-grads", type=int, default=256)
    parser.add_argument("--rows-share", type=float, default=0.1, help="share of the rows of each layer")
    parser.add_argument("--dampening-frac", type=float, default=0.01)
    parser.add_argument("--batch-size", type=int, default=8, help="windows a backward pass")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--commit", default=None, help="commit to record where there is no git")
    parser.add_argument("--json", type=Path, default=RESULTS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
