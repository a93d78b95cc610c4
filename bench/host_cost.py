# SPDX-License-Identifier: Apache-2.0
"""What the host takes to launch one product, and what is left of that in a CUDA graph.

    python -m bench.host_cost

For ``nn.Linear``, ``SparseLinear`` and the op below it, of small layers, where a caller notices it:

* host: time until a call returns, the device not waited for.
* graph: time a call of a graph of ``CALLS`` equal ones.
* kernels: what its kernels take by the profiler, of which ``graph - kernels`` is the gap: below 0 where a product
  comes to the GPU before the one in front has ended, as the profiler counts that time twice, and by what two runs
  differ in caches and clocks.

Writes ``bench/results/host_cost.json`` and the Markdown table beside it. Needs a GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu_report import describe_machine, describe_tree
from bench.stored import run_command, save
from obs_kernels import ops
from obs_kernels.errors import BackendUnavailableError
from obs_kernels.inference.encoders import impose_
from obs_kernels.patterns import parse_pattern
from obs_kernels.sparse.linear import SparseLinear
from obs_kernels.timing import Spread, make_clock, spread

RESULTS = Path(__file__).parent / "results" / "host_cost.json"
SHAPES = ((768, 768, 128), (1024, 1024, 512), (4096, 4096, 512))
"""Rows, columns, tokens."""
WEIGHTS = (("2:4", "token"), ("64:2:8", "token"), ("128:2:16", "token"), ("128:2:16", "feature"))
"""Patterns, and how x lies."""
CALLS, REPEATS = 100, 20

Call = Callable[[], object]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="bench.host_cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=RESULTS, help="where results are kept")
    parser.add_argument("--commit", default=None, help="commit to record where there is no git")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise BackendUnavailableError("bench.host_cost needs a GPU, and torch sees none; run it on a machine with one")
    document: dict[str, Any] = {**describe_tree(args.commit), "machine": describe_machine(), "rows": []}
    with torch.no_grad():
        for shape in SHAPES:
            found = calls(*shape, torch.device("cuda"))
            sizes = dict(zip(("rows", "cols", "tokens"), shape, strict=True))
            for (name, pattern, x_layout, call), host in zip(found, host_times([c for *_, c in found]), strict=True):
                row = sizes | {"call": name, "pattern": pattern, "x": x_layout, "host": asdict(host)}
                document["rows"].append(row | on_device(call))
    save(args.json, document, to_markdown)
    print(to_markdown(document))
    return 0


def calls(rows: int, cols: int, tokens: int, device: torch.device) -> list[tuple[str, str, str, Call]]:
    """(name, pattern, layout of x, call) of one size in bf16, without bias."""
    gen = torch.Generator(device).manual_seed(0)
    x = torch.randn(tokens, cols, generator=gen, device=device).bfloat16()
    turned = ops.feature_major(x)
    linear = nn.Linear(cols, rows, bias=False, device=device, dtype=torch.bfloat16)
    found: list[tuple[str, str, str, Call]] = [("nn.Linear", "dense", "token", lambda: linear(x))]
    for pattern, x_layout in WEIGHTS:
        pruned = nn.Linear(cols, rows, bias=False, device=device, dtype=torch.bfloat16)
        given = turned if x_layout == "feature" else x
        impose_(pruned.weight.detach(), parse_pattern(pattern))
        layer = SparseLinear.from_linear(pruned, pattern)
        found.append(("SparseLinear", pattern, x_layout, _bound(layer, given)))
        found.append(("ops.sparse_linear", pattern, x_layout, _product(layer, given, x_layout)))
    return found


def _bound(layer: SparseLinear, x: Tensor) -> Call:
    return lambda: layer(x)


def _product(layer: SparseLinear, x: Tensor, x_layout: str) -> Call:
    sparse, given = layer.sparse, x.T if x_layout == "feature" else x
    return lambda: ops.sparse_linear(given, sparse, x_layout=x_layout)


def host_times(run: Sequence[Call]) -> list[Spread]:
    """Microseconds of host a call; all in turn, round by round, as the speed of a host drifts by more than they differ.
    The first round warms up.
    """
    taken: list[list[float]] = [[] for _ in run]
    for _ in range(1 + REPEATS):
        for call, own in zip(run, taken, strict=True):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(CALLS):  # few enough for the queue of the device, which does not stop the host
                call()
            own.append((time.perf_counter() - start) / CALLS * 1e6)
    torch.cuda.synchronize()
    return [spread(own[1:]) for own in taken]


def on_device(call: Call) -> dict[str, Any]:
    """Microseconds in a graph and of kernels, a call; and kernels a call."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    graph.replay()
    clock = make_clock(torch.device("cuda"))
    replays = [clock.sample([graph.replay], spin_us=100.0) / CALLS for _ in range(REPEATS)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() or [] if e.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(e.device_time for e in kernels) / CALLS
    in_graph = spread(replays)
    return {
        "graph": asdict(in_graph),
        "kernels_us": busy,
        "kernels": len(kernels) / CALLS,
        "gap_us": in_graph.us - busy,
    }


def to_markdown(document: dict[str, Any]) -> str:
    """The table."""
    machine = document["machine"]
    lines = [
        "# What the host takes for one product",
        "",
        f"Microseconds a call, bf16, medians of {REPEATS} runs of {CALLS} calls, all calls of a size in turn (p20 to "
        f"p80 of the host's). host: until the call returns; graph: in a graph of {CALLS} calls; kernels: by the "
        "profiler, outside of a graph; gap: graph less kernels, below 0 where products overlap, as the profiler counts "
        "that time twice, and by what the two runs differ in caches and clocks. "
        f"{machine['device']}, torch {machine['versions']['torch']}; commit {document['commit'][:7]}.",
        "",
        "| R x C, T | call | weight | x | host | graph | kernels | kernels a call | gap |",
        "|---|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in document["rows"]:
        host = row["host"]
        lines.append(
            f"| {row['rows']} x {row['cols']}, {row['tokens']} | {row['call']} | {row['pattern']} | {row['x']}-major | "
            f"{host['us']:.1f} ({host['p20']:.1f}-{host['p80']:.1f}) | {row['graph']['us']:.1f} | "
            f"{row['kernels_us']:.1f} | {row['kernels']:g} | {row['gap_us']:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_command(main)
