# SPDX-License-Identifier: Apache-2.0
"""Gradual pruning in training on a real SQuAD model: F1 by pattern, curvature and way, all with one budget.

    python -m bench.squad_gradual --model DIR --data dev.json.gz --train train.json.gz --work DIR --minutes 9

Every row trains the same number of epochs with the dense model as teacher: the dense model itself, a model pruned at
once before the training (one-shot), and one pruned in steps during its first part (gradual). Rows that must be there
come first. The command may be stopped at any time, or stops itself after ``--minutes``; called again it goes on from
the checkpoint of the row that was in work. Results go into ``bench/results/squad_gradual.json`` row by row, the
Markdown beside it; rows that were not run are shown as not run.

Two processes, each with its GPU and result file, share the rows by ``--share 1/2`` and ``--share 2/2``; ``--merge
--take A.json --take B.json`` then brings their results into one file, without a model.
"""

from __future__ import annotations

import argparse
import copy
import gc
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.gpu_report import describe_tree
from bench.gradual_results import Stored, f1_share, merge, resume, take
from bench.gradual_rows import Row, all_rows, config_of, schedule_of
from bench.gradual_run import Trainee, TrainSettings
from bench.gradual_table import to_markdown
from bench.stored import digest, run_command, save
from obs_kernels.training.evaluate import evaluate_squad
from obs_kernels.training.models import load_qa_model, pick_device
from obs_kernels.training.squad import SquadWindows, load_squad, prepare_windows

RESULTS = Path(__file__).parent / "results" / "squad_gradual.json"


class Bench:
    """Model, data and settings that all rows share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, pick_device(args.device)
        on_gpu = self.device.type == "cuda"
        self.graphs = on_gpu and not args.eager
        self.autocast = torch.bfloat16 if on_gpu and not args.fp32 else None
        self.settings = TrainSettings(**{f.name: getattr(args, f.name) for f in fields(TrainSettings)})
        self.device_name = torch.cuda.get_device_name(self.device) if on_gpu else "cpu"
        self.dense, self.tokenizer = load_qa_model(args.model, device=self.device)
        lengths = {"max_length": args.max_length, "doc_stride": min(128, args.max_length // 3)}
        questions = load_squad(args.data, split="validation")[:: args.every]
        # one set of windows for each thinning: a row keeps that of its curve, also if it goes on under another
        self.dev = cache(lambda n: prepare_windows(questions[::n], self.tokenizer, with_labels=False, **lengths))
        train = load_squad(args.train, split="train")
        self.train: SquadWindows = prepare_windows(train, self.tokenizer, with_labels=True, **lengths)

    @cached_property
    def header(self) -> dict[str, Any]:
        """What decides the figures; the hashes of its files are taken once."""
        args = self.args
        return {
            "model": digest(Path(args.model) / "model.safetensors"),
            "data": digest(Path(args.data)),
            "train": digest(Path(args.train)),
            "every": args.every,
            "max_length": args.max_length,
            "num_grads": args.num_grads,
            "dampening_frac": args.dampening_frac,
            "fisher_block_size": args.fisher_block_size,
            "prune_every": args.prune_every,
            "precision": "bf16" if self.autocast else "fp32",
            **asdict(self.settings),
        }

    def folder(self, row: Row) -> Path:
        """Of the checkpoints of a row, by its settings too: a row goes on under those that it began with, or anew."""
        settings = hashlib.sha256(json.dumps(self.header, sort_keys=True).encode()).hexdigest()[:8]
        return Path(self.args.work) / f"{row.key.replace('/', '_').replace(':', '-')}-{settings}"

    def evaluate(self, model: nn.Module, every: int = 1) -> dict[str, float]:
        """EM and F1 on the evaluation questions, or on each ``every``-th of them."""
        dev = self.dev(every)
        found = evaluate_squad(model, self.tokenizer, dev, batch_size=self.args.eval_batch_size, progress=False)
        return {"exact_match": found.exact_match, "f1": found.f1}

    def trainee(self, row: Row) -> Trainee:
        """A fresh copy of the dense model, about to be trained as ``row`` says."""
        args = self.args
        torch.manual_seed(row.seed)
        settings = self.settings
        return Trainee(
            copy.deepcopy(self.dense),
            copy.deepcopy(self.dense),
            self.train,
            settings,
            config=config_of(
                row,
                num_grads=args.num_grads,
                dampening_frac=args.dampening_frac,
                block_size=args.fisher_block_size,
            ),
            schedule=schedule_of(row, prune_every=args.prune_every),
            seed=row.seed,
            graphs=self.graphs,
            autocast=self.autocast,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    args = _parse(argv)
    wanted = [asdict(row) | {"key": row.key} for row in all_rows()]
    if args.merge:
        stored = merge(args.json, args.take, wanted, force=args.force)
        save(args.json, stored, to_markdown)
        print(to_markdown(stored))
        return 0
    torch.backends.cuda.matmul.allow_tf32 = False
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
    bench = Bench(args)
    stored = resume(args.json, bench.header, wanted, force=args.force)
    for path in args.take:
        take(stored, path)
    tree = describe_tree(args.commit)
    if stored["dense"] is None:
        stored["dense"] = bench.evaluate(bench.dense)
    print(f"dense, as it came: F1 {stored['dense']['f1']:.2f}", file=sys.stderr, flush=True)
    rows = rows_of_share(args.seeds, args.share, args.only)
    for row in rows:
        if row.key in stored["rows"]:
            continue
        longest = max((r["seconds_train"] for r in stored["rows"].values()), default=0.0) if args.whole else 0.0
        if time.monotonic() + longest > deadline:
            break
        if args.force:
            shutil.rmtree(bench.folder(row), ignore_errors=True)
        _run(bench, row, stored, tree, float("inf") if args.whole else deadline)
        gc.collect()  # graphs of the row before hold memory
        save(args.json, stored, to_markdown)
        if row.key in stored["rows"]:  # the checkpoint goes when the result is there
            shutil.rmtree(bench.folder(row), ignore_errors=True)
    save(args.json, stored, to_markdown)
    left = sum(row.key not in stored["rows"] for row in rows)
    print(to_markdown(stored))
    if left:
        print(f"{left} of {len(rows)} rows to go; run the same command again", file=sys.stderr)
    return 0


def rows_of_share(seeds: int, share: tuple[int, int], only: str = "") -> list[Row]:
    """Rows of one process of several whose name holds ``only``: every N-th of all, from the I-th on for ``share`` I, N.

    They are counted before anything is left out, so that no row belongs to two processes, whatever each has stored.
    """
    first, number = share
    return [row for row in all_rows(seeds)[first - 1 :: number] if only in row.key]


def _run(bench: Bench, row: Row, stored: Stored, tree: dict[str, Any], deadline: float) -> None:
    """Train a row as far as the time goes; its result, or how far it is, into ``stored``."""
    folder = bench.folder(row)
    trainee = bench.trainee(row)
    scores: list[float] = []
    curve_every = bench.args.curve_every
    if trainee.load(folder):
        before = stored["running"].get(row.key, {})
        scores = list(before.get("f1_by_epoch", []))[: len(trainee.losses)]  # it may have got beyond its checkpoint
        curve_every = before.get("curve_every", curve_every)
        print(f"{row.key}: goes on at epoch {trainee.epoch:.2f}", file=sys.stderr, flush=True)
    saved = time.monotonic()

    def note_running() -> None:
        stored["running"][row.key] = {"epoch": trainee.epoch, "f1_by_epoch": scores, "curve_every": curve_every}

    def on_epoch() -> None:
        nonlocal saved
        scores.append(bench.evaluate(trainee.model, curve_every)["f1"])
        note_running()
        save(bench.args.json, stored, to_markdown)
        if time.monotonic() - saved >= bench.args.checkpoint_seconds:
            trainee.save(folder)
            saved = time.monotonic()
        print(
            f"{row.key}: epoch {trainee.epoch:.1f} loss {trainee.losses[-1]:.4f} F1 {scores[-1]:.2f} "
            f"{trainee.seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )

    trainee.train(deadline, on_epoch)
    if not trainee.is_done:
        trainee.save(folder)
        note_running()
        return
    report = None if trainee.gradual is None else trainee.gradual.finish()
    found = bench.evaluate(trainee.model)
    stored["running"].pop(row.key, None)
    stored["rows"][row.key] = (
        asdict(row)
        | found
        | {
            "f1_share": f1_share(found["f1"], stored["dense"]),
            "sparsity": 0.0 if report is None else report.sparsity,
            "violations": 0 if trainee.gradual is None else trainee.gradual.pruner.verify(),
            "stages": [] if report is None else list(report.stages),
            "epochs": trainee.epoch,
            "steps": trainee.total_steps,
            "f1_by_epoch": scores,
            "curve_every": curve_every,
            "loss_by_epoch": trainee.losses,
            "seconds_train": round(trainee.seconds, 1),
            "seconds_prune": round(trainee.seconds_prune, 1),
            "device": bench.device_name,
            "graphs": bench.graphs,
        }
        | tree
    )


def _share(text: str) -> tuple[int, int]:
    first, _, number = text.partition("/")
    if not (first.isdecimal() and number.isdecimal() and 1 <= int(first) <= int(number)):
        raise argparse.ArgumentTypeError(f"must be I/N with 1 <= I <= N, such as 1/2, got {text!r}")
    return int(first), int(number)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.squad_gradual", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder or hub name of a dense question answering model")
    parser.add_argument("--data", help="questions to evaluate on, SQuAD v1.1")
    parser.add_argument("--train", help="questions to train on, SQuAD v1.1")
    parser.add_argument("--work", type=Path, default=Path("build/squad_gradual"), help="folder for checkpoints")
    parser.add_argument("--minutes", type=float, default=0.0, help="stop after that long; the same command goes on")
    parser.add_argument(
        "--whole",
        action="store_true",
        help="end every row that is begun; begin none that takes longer than the minutes left, by the longest so far",
    )
    parser.add_argument("--only", default="", help="run rows whose name holds this, such as gradual/64:2:8")
    parser.add_argument(
        "--share",
        type=_share,
        default=(1, 1),
        metavar="I/N",
        help="run every N-th row from the I-th on, as one of N processes; give each its own --json",
    )
    parser.add_argument(
        "--take", type=Path, action="append", default=[], metavar="FILE", help="bring in the rows of this result too"
    )
    parser.add_argument(
        "--merge", action="store_true", help="only bring in results, train nothing; needs no model and no data"
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the rows that are run several times")
    parser.add_argument("--prune-every", type=float, default=0.5, help="epochs between the prunings of a gradual row")
    parser.add_argument("--num-grads", type=int, default=1024)
    parser.add_argument("--dampening-frac", type=float, default=0.01)
    parser.add_argument("--fisher-block-size", type=int, default=64, help="D of block curvature")
    parser.add_argument("--max-length", type=int, default=384)
    parser.add_argument("--every", type=_count, default=1, help="take every so many of the dev questions")
    parser.add_argument(
        "--curve-every", type=_count, default=5, help="of those, take every so many for the F1 after an epoch"
    )
    parser.add_argument(
        "--checkpoint-seconds", type=float, default=60.0, help="least time between the checkpoints of a row"
    )
    parser.add_argument("--eval-batch-size", type=int, default=128)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--fp32", action="store_true", help="no bf16 autocast on a GPU")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where results are kept")
    parser.add_argument("--commit", default=None, help="commit to record where there is no git")
    parser.add_argument("--force", action="store_true", help="forget what is stored")
    for field in fields(TrainSettings):
        kind = int if field.name.endswith("batch_size") else float
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    args = parser.parse_args(argv)
    missing = [] if args.merge else [f"--{name}" for name in ("model", "data", "train") if getattr(args, name) is None]
    if missing:
        parser.error(f"{', '.join(missing)} must be given, except with --merge")
    if args.share[1] > 1 and args.json == RESULTS:
        parser.error("--share needs a --json of its own for each process")
    return args


if __name__ == "__main__":
    run_command(main)
