# SPDX-License-Identifier: Apache-2.0
"""Runs Triton kernels under the interpreter, in a process of its own: ``python interpreted.py CASES RESULTS``.

TRITON_INTERPRET changes what ``triton.jit`` makes at import, and which backend the dispatch chooses, so it must not
leak into the tests. CASES is a list of (function of triton_kernels or around it, tensors, options), RESULTS a list of
what they return or have changed; of steps that change several both.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Case = tuple[str, tuple[Tensor, ...], dict[str, Any]]


STEPS = ("accumulate_inputs_", "weigh_tokens_")


def interpret(cases: list[Case], folder: Path) -> list[Any]:
    """The result of each case, computed by the interpreter on the CPU."""
    torch.save(cases, folder / "cases.pt")
    command = [sys.executable, __file__, str(folder / "cases.pt"), str(folder / "results.pt")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results: list[Any] = torch.load(folder / "results.pt")
    return results


def _run(given: str, wanted: str) -> None:
    from obs_kernels import triton_kernels
    from obs_kernels.reference import resolve
    from obs_kernels.triton_kernels import fisher, hessian
    from obs_kernels.triton_kernels.resolve import GradientRows, launch_gradients
    from obs_kernels.triton_kernels.tuning import FisherConfig, GradientsConfig, HessianConfig

    launches: dict[str, tuple[Any, Any]] = {
        "accumulate_fisher_": (fisher.launch_accumulate_fisher, FisherConfig),
        "accumulate_hessian_": (hessian.launch_accumulate_hessian, HessianConfig),
    }
    results: list[Any] = []
    for name, tensors, options in torch.load(given):
        if name == "launch_gradients":  # weights, product, then the fields of the rows
            weights, product, *state = tensors
            config = None if options["block"] is None else GradientsConfig(options["block"], warps=1)
            launch_gradients(GradientRows(*state), weights, None if options["first"] else product, config)
            results.append(tuple(state))
        elif name == "resolve_rows":
            resolve.MAX_CHOLESKY_WIDTH = -1
            results.append(resolve.resolve_rows(*tensors, triton_kernels.conjugate_gradients))
        elif "config" in options:
            launch, record = launches[name]
            options["config"] = record(**options["config"])
            launch(*tensors, **options)
            results.append(tensors[0])
        elif name in STEPS:
            results.append((getattr(triton_kernels, name)(*tensors, **options), *tensors))
        else:
            results.append(getattr(triton_kernels, name)(*tensors, **options))
    torch.save(results, wanted)


if __name__ == "__main__":
    _run(*sys.argv[1:])
