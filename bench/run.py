# SPDX-License-Identifier: Apache-2.0
"""The kernel bench: ceilings first, then one row for each size and way to do the work, our peers among them.

    python -m bench.run --op fisher --shape bert-base --json out.json

Times are medians with p20 and p80, all ways of one size measured in turn; on a GPU by CUDA events, with buffers rotated
beyond twice the L2. The op's check against float64 comes first, at full size: a red check makes no row, and exit code
1. On a CPU the same command runs the reference path on smaller sizes, and says so. ``obs-kernels report`` turns the
JSON into tables and plots.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import cases
from bench.harness.case import Case, Selection
from bench.harness.environment import environment, missing_backends
from bench.harness.session import Context, check_selection, document
from obs_kernels.dtype_names import dtype_name
from obs_kernels.errors import ConfigError, ObsKernelsError
from obs_kernels.files import write_text
from obs_kernels.ops.dispatch import BACKENDS, TABLE
from obs_kernels.report.bench import schema_problems
from obs_kernels.report.values import json_text
from obs_kernels.timing import Ceilings, make_clock, measure_ceilings


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: 0 fine, 1 a red check or a failure, 2 wrong usage."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    args = parser.parse_args(arguments)
    topics = list(cases.TOPICS) if args.op == "all" else [args.op]
    selected = [cases.load(topic) for topic in topics]
    try:
        selection = _selection(args)
        check_selection(selected, selection)
        targets = _targets(args.json, topics)
    except ConfigError as error:
        parser.error(str(error))
    if args.list:
        _print_list(selected, selection)
        return 0
    try:
        docs = run(
            selected,
            selection,
            seconds=args.seconds,
            minutes=args.minutes,
            commit=args.commit,
            command=_command(arguments),
            targets=targets,
        )
    except ObsKernelsError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    _print_docs(docs)
    for path in dict.fromkeys(targets.values()):
        print(f"written: {path}", file=sys.stderr)
    return 1 if any(doc["refused"] for doc in docs) else 0


def run(
    selected: Sequence[Case],
    selection: Selection,
    *,
    seconds: float | None = None,
    minutes: float | None = None,
    commit: str | None = None,
    command: str = "",
    targets: dict[str, Path] | None = None,
) -> list[dict[str, Any]]:
    """Measure the cases and return a document for each; ``targets`` gives files by topic, the same one for several."""
    torch.backends.cuda.matmul.allow_tf32 = False  # peers in f32 are f32
    device = selection.device
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    clock = make_clock(device)
    _say("ceilings")
    first = best = measure_ceilings(device, clock)
    _say(f"  copy {first.copy_gbps:,.1f} GB/s, dense product {first.matmul_tflops:,.2f} TFLOP/s")
    env = environment(device, commit=commit) | {"ceilings_at_start": vars(first)}
    missing = missing_backends(device, [case.op for case in selected])
    budget = seconds if seconds is not None else 0.5 if device.type == "cuda" else 0.05
    contexts: list[tuple[Case, Context]] = []

    def docs(ceilings: Ceilings, *, complete: bool) -> list[dict[str, Any]]:
        """What there is so far, by file: cases that share one are one document."""
        groups: dict[Any, list[Context]] = {}
        for case, context in contexts:
            groups.setdefault((targets or {}).get(case.topic, "all" if not targets else case.topic), []).append(context)
        made = []
        for target, members in groups.items():
            ops = [case.op for case, context in contexts if context in members]
            doc = document(
                [row for context in members for row in context.rows],
                env=env | {"complete": complete, "unavailable": {op: missing[op] for op in ops if op in missing}},
                ceilings=ceilings,
                command=command,
                refused=[entry for context in members for entry in context.refused],
                skipped=[entry for context in members for entry in context.skipped],
            )
            if not (doc["rows"] or doc["refused"] or doc["skipped"]):
                continue  # an op that has none of the shapes asked for
            if isinstance(target, Path):
                write_text(target, json_text(doc) + "\n")
            made.append(doc)
        return made

    def save() -> None:
        docs(best, complete=False)

    for case in selected:
        context = Context(selection, clock, first, budget, _say, save, deadline)
        contexts.append((case, context))
        context.run_case(case)
    last = measure_ceilings(device, clock)
    best = first.better(last)
    env["ceilings_at_end"] = vars(last)
    made = docs(best, complete=True)
    problems = [problem for doc in made for problem in schema_problems(doc)]
    if problems:
        raise ConfigError(f"the result breaks its schema: {'; '.join(problems[:5])}; mend the case that made it")
    return made


def _parser() -> argparse.ArgumentParser:
    text = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=text[0], epilog=text[2])
    parser.add_argument("--op", default="all", choices=[*cases.TOPICS, "all"], help="default: all")
    parser.add_argument("--shape", default="all", help="one shape or several with commas; see --list")
    parser.add_argument("--dtype", default="all", help="f32, bf16, ... with commas")
    parser.add_argument(
        "--block-size", help="D (matmul, sweep: m of the pattern), with commas; default: those of the op"
    )
    parser.add_argument("--samples", help="S (matmul: tokens), with commas; default: those of the op")
    parser.add_argument("--lengths", help="tokens of a sequence (inference), with commas; default: those of the op")
    parser.add_argument("--backend", default="all", help="reference, triton, cuda, with commas; default: all that run")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda[:n]")
    parser.add_argument("--json", type=Path, help="a .json file for all ops, or a folder for one <op>.json each")
    parser.add_argument("--seconds", type=float, help="budget of a row; default 0.5 on a GPU, 0.05 on a CPU")
    parser.add_argument("--minutes", type=float, help="after so many no further problem begins; the result names them")
    parser.add_argument("--sweep", action="store_true", help="also the tuning records near the chosen one")
    parser.add_argument("--no-peers", action="store_true", help="only our own rows")
    parser.add_argument("--commit", help="commit of this tree, where there is no git; says that it is clean")
    parser.add_argument("--list", action="store_true", help="print ops, shapes and backends, and measure nothing")
    return parser


def _selection(args: argparse.Namespace) -> Selection:
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")  # no device that can be measured, as the next lines say
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"device must be auto, cpu or, where torch sees a GPU, cuda[:n], got {args.device!r}")
    if args.seconds is not None and args.seconds < 0:
        raise ConfigError(f"seconds must not be negative, got {args.seconds}")
    if args.minutes is not None and args.minutes <= 0:
        raise ConfigError(f"minutes must be positive, got {args.minutes}")
    backends = _names(args.backend)
    for name in backends or ():
        if name not in BACKENDS:
            raise ConfigError(f"backend must be one of {', '.join(BACKENDS)} or all, got {name!r}")
    dtypes = _names(args.dtype)
    return Selection(
        device=device,
        shapes=_names(args.shape),
        dtypes=None if dtypes is None else tuple(dtype_name("dtype", name) for name in dtypes),
        block_sizes=_sizes("block-size", args.block_size),
        samples=_sizes("samples", args.samples),
        lengths=_sizes("lengths", args.lengths),
        backends=backends,
        peers=not args.no_peers,
        sweep=args.sweep,
    )


def _names(text: str) -> tuple[str, ...] | None:
    return None if text == "all" else tuple(part.strip() for part in text.split(","))


def _sizes(option: str, text: str | None) -> tuple[int, ...] | None:
    if text is None or text == "all":
        return None
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise ConfigError(f"{option} must be positive whole numbers with commas between, got {text!r}")
    return found


def _targets(path: Path | None, topics: Sequence[str]) -> dict[str, Path]:
    if path is None:
        return {}
    if path.suffix == ".json" and not path.is_dir():
        return dict.fromkeys(topics, path)
    return {topic: path / f"{topic}.json" for topic in topics}


def _command(arguments: Sequence[str]) -> str:
    """The command without the places of this machine: of a path only its name."""
    shown = [re.sub(r"(^|=)\S*/", r"\1", part) for part in arguments]
    return " ".join(["python -m bench.run", *shown])


def _print_list(selected: Sequence[Case], selection: Selection) -> None:
    for case in selected:
        print(f"{case.topic}: {case.op}, {case.summary}")
        print(f"  shapes: {', '.join(case.shapes)}   dtypes: {', '.join(case.dtypes) or '-'}")
        missing = missing_backends(selection.device, [case.op]).get(case.op, {})
        for backend in TABLE.get(case.op, ()):
            print(f"  backend {backend}: {missing.get(backend, 'runs here')}")
        for problem in case.problems(selection) if case.problems is not None else ():
            print(f"  {problem.label}: {', '.join(variant.name for variant in problem.variants)}")


def _print_docs(docs: Sequence[dict[str, Any]]) -> None:
    from obs_kernels.errors import MissingDependencyError
    from obs_kernels.report.bench import bench_title
    from obs_kernels.report.markdown import bench_lines
    from obs_kernels.report.tables import BENCH_WIDTH, console, print_bench

    for doc in docs:
        try:
            print_bench(console(width=BENCH_WIDTH), doc)
        except MissingDependencyError:  # a GPU machine may lack rich
            print("\n".join([bench_title(doc), "", *bench_lines(doc)]))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
