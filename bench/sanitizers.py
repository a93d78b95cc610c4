# SPDX-License-Identifier: Apache-2.0
"""Runs of the GPU tests in processes of their own, plain and under compute-sanitizer, for ``bench.gpu_report``."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
TOOL_LIMIT_S = 480
TOOL_ERROR_STATUS = 99
LAUNCHES = "obs_kernels launches:"
MARK = "mark.sanitizer"


def run_sanitizers(jobs: int, tools: Sequence[str] = TOOLS) -> dict[str, str]:
    """Outcome of each of ``tools`` over the tests marked ``sanitizer``.

    A process for each file of tests and tool, several side by side: a tool keeps one core busy, and little of the GPU.
    """
    files = [path for path in sorted((ROOT / "tests" / "gpu").glob("test_*.py")) if MARK in path.read_text()]
    names = [path.relative_to(ROOT).as_posix() for path in files]
    pairs = [(tool, name) for tool in tools for name in names]
    with ThreadPoolExecutor(max(jobs, len(TOOLS))) as pool:
        states = list(pool.map(lambda pair: run_sanitizer(*pair), pairs))
    found = {tool: dict[str, str]() for tool in tools}
    for (tool, name), state in zip(pairs, states, strict=True):
        found[tool][name] = state
    return {tool: worst(by_file) for tool, by_file in found.items()}


def worst(states: Mapping[str, str]) -> str:
    """The outcome of a tool from those of the files: passed if all are, else the first failure, with its file."""
    bad = {name: state for name, state in states.items() if state != "passed"}
    for name, state in sorted(bad.items(), key=lambda item: not item[1].startswith("failed")):
        return f"{state} in {name}"
    return "passed" if states else "not run: no test is marked for it"


def run_sanitizer(tool: str, tests: str) -> str:
    """Run those of ``tests`` that are marked ``sanitizer`` under one tool."""
    binary = find_sanitizer(os.environ)
    if binary is None:
        return "not run: compute-sanitizer was not found on PATH or in CUDA_HOME"
    options = ["--tool", tool, "--error-exitcode", str(TOOL_ERROR_STATUS), "--target-processes", "all"]
    # Each tensor an allocation of its own: inside torch's cached blocks the tool cannot see an overrun.
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    status, output = run_command(
        [binary, *options, *command_of_tests("gpu and sanitizer", tests)], env, TOOL_LIMIT_S, echo=False
    )
    state = judge_sanitizer(status, output)
    if state != "passed":
        print("\n".join(output.splitlines()[-40:]), flush=True)
    return state


def find_sanitizer(env: Mapping[str, str]) -> str | None:
    """compute-sanitizer on PATH, or in the toolkit."""
    found = shutil.which("compute-sanitizer", path=env.get("PATH"))
    for home in (env.get("CUDA_HOME"), "/usr/local/cuda"):
        for place in ("bin", "compute-sanitizer"):
            candidate = Path(home or "/nonexistent") / place / "compute-sanitizer"
            found = found or (str(candidate) if candidate.is_file() else None)
    return found


def judge_sanitizer(status: int, output: str) -> str:
    """Outcome of one tool's run: ``passed``, ``failed: ...`` or ``not run: ...``.

    Passed needs exit status 0, the tool's own summary with zero errors, and at least one kernel of ours launched.
    """
    summary = [int(count) for count in re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", output)]
    launches = [int(count) for count in re.findall(rf"{LAUNCHES} (\d+)", output)]
    lines = [line.strip("= ") for line in output.splitlines() if line.startswith("=========")]
    said = next((f": {line}" for line in lines if re.search(r"error:|not supported|unable|fail", line, re.I)), "")
    if not summary:
        return f"not run: no summary from the tool (exit status {status}){said}"
    if not any(launches):
        return f"not run: no kernel of ours was launched (exit status {status}){said}"
    if any(summary) or status == TOOL_ERROR_STATUS:
        return f"failed: {max(summary)} errors (exit status {status})"
    if status:
        return f"failed: the tests under the tool ended with exit status {status}"
    return "passed"


def command_of_tests(marker: str, *tests: str) -> list[str]:
    """Pytest over ``tests`` (all of tests/gpu) of a marker, with the plugin that notes outcomes."""
    # No option of pyproject.toml and no cache: this machine may lack the plugins that they name.
    plain = ["-o", "addopts=", "-p", "no:cacheprovider", "-q", "-rs"]
    return [sys.executable, "-m", "pytest", "-p", "bench.gpu_report", *plain, "-m", marker, *(tests or ("tests/gpu",))]


def run_command(command: list[str], env: Mapping[str, str], limit_s: int, *, echo: bool) -> tuple[int, str]:
    """Exit status and output of a command with ``env`` on top of this process's; 124 if it takes too long."""
    print("+", " ".join(command), flush=True)
    stdout = None if echo else subprocess.PIPE
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **env},
            stdout=stdout,
            stderr=None if echo else subprocess.STDOUT,
            timeout=limit_s,
            text=True,
            errors="replace",
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 124, f"========= failed to end within {limit_s} s"
    except OSError as error:
        return 126, f"========= failed to start: {error}"
    return done.returncode, done.stdout or ""
