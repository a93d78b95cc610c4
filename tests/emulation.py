# SPDX-License-Identifier: Apache-2.0
"""Builds a program that runs the kernels of some .cu files on the CPU, under the host compiler's sanitizers."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
SANITIZERS = ("address,undefined", "thread")


def as_host_code(source: Path) -> str:
    """Kernel launches become calls of the emulation, as does memory that a launch sizes; the rest stays as it is."""
    text = source.read_text(encoding="utf-8")
    launch = re.compile(r"((?:\w+::)*\w+(?:<[\w:, ]+>)?)\s*<<<(.+?), ([\w:]+), (\w+), stream>>>\((.+?)\);", re.S)
    host, count = launch.subn(r"emulation::launch(\2, \3, \4, [&] { \1(\5); });", text)
    assert count == text.count("<<<")
    memory = re.compile(r"extern __shared__ (\w+) (\w+)\[\];")
    host, count = memory.subn(r"\1* const \2 = emulation::launch_memory<\1>();", host)
    assert count == text.count("extern __shared__")
    return host


def build(
    source: str | Sequence[str],
    main: str,
    folder: Path,
    *,
    sanitizer: str | None,
    empty: Sequence[str] = (),
    replaced: Mapping[str, Sequence[tuple[str, str, int]]] | None = None,
) -> Path:
    """Program of ``csrc/source`` (a file or several) and ``tests/main`` in ``folder``; skips where a tool is missing.

    Without a sanitizer a shared library. ``empty`` are arguments that ask for no work; ``replaced`` maps a file of
    csrc/ to changes, each (regular expression, new text, times that it must be found).
    """
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ was not found")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(CSRC, folder / "csrc")
    for name in ("cuda_runtime.h", "cuda_runtime_api.h", "cuda_fp16.h", "cuda_bf16.h"):
        (folder / name).write_text(f'#pragma once\n#include "{ROOT}/tests/cuda_on_cpu.h"\n')
    for name, changes in (replaced or {}).items():
        for old, new, times in changes:
            text, count = re.subn(old, new, (folder / "csrc" / name).read_text())
            assert count == times
            (folder / "csrc" / name).write_text(text)
    hosts = []
    for name in [source] if isinstance(source, str) else source:
        hosts.append((folder / "csrc" / name).with_suffix(".host.cpp"))
        hosts[-1].write_text(as_host_code(CSRC / name))
    program = folder / "program"
    flags = ["-std=c++20", "-O1", "-g", "-pthread"]
    if sanitizer is None:
        flags += ["-shared", "-fPIC"]
    else:
        flags += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    includes = [f"-I{folder}", f"-I{folder}/csrc/include", f"-I{folder}/csrc", f"-I{ROOT}/tests"]
    sources = [*hosts, folder / "csrc" / "common" / "launch.cpp", ROOT / "tests" / main]
    subprocess.run([compiler, *flags, *includes, *map(str, sources), "-o", str(program)], check=True)
    if sanitizer is None:
        return program
    started = subprocess.run([program, *empty], capture_output=True, check=False)
    if started.returncode:
        pytest.skip(f"the {sanitizer} sanitizer does not start here: {started.stderr[:200]!r}")
    return program
