# SPDX-License-Identifier: Apache-2.0
"""The cases of the bench under pytest-benchmark: ``pytest bench --benchmark-only``, with its compare and its storage.

Times here are the host's, with a synchronisation in each call, one way to do the work after the other. They are for
comparing two states of a kernel at the desk; what is published comes from ``bench.run``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import cases
from bench.harness.case import Problem, Selection, Variant


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each way to do the work of each problem, at the first shape and sample count of its case."""
    option = metafunc.config.getoption
    asked = option("--bench-device")
    device = torch.device(asked if asked != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    topics = cases.TOPICS if option("--bench-op") == "all" else tuple(option("--bench-op").split(","))
    found: list[Any] = []
    for topic in topics:
        case = cases.load(topic)
        selection = Selection(
            device=device,
            shapes=case.shapes[:1],
            dtypes=tuple(option("--bench-dtype").split(",")),
            block_sizes=tuple(int(size) for size in option("--bench-block-size").split(",")),
            samples=(32,),
        )
        for problem in case.problems(selection) if case.problems is not None else ():
            for variant in problem.variants:
                name = f"{topic}-{'-'.join(map(str, problem.shape.values()))}-{problem.dtype}-{variant.name}"
                found.append(pytest.param(problem, variant, device, id=name.replace(" ", "_")))
    metafunc.parametrize(("problem", "variant", "device"), found)


def test_variant(benchmark: Any, problem: Problem, variant: Variant, device: torch.device) -> None:
    """Check first; a red check has no time."""
    inputs = problem.make(0)
    check = variant.check(inputs)
    assert check.ok, f"error {check.error:.3g} against float64 is above {check.limit:.3g}"

    def call() -> None:
        variant.run(inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    benchmark.group = problem.label
    benchmark.extra_info.update(device=str(device), bytes=problem.num_bytes, flops=problem.num_flops)
    benchmark(call)
