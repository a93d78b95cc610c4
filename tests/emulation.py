# SPDX-License-Identifier: Apache-2.0
"""Builds a program that runs the kernels of some .cu files on the CPU, under the host compiler's sanitizers."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
    """Program of ``csrc/source`` (a file or several) and ``tests/main``; skips where a tool is missing.

    Without a sanitizer a shared library. ``empty`` are arguments that ask for no work; ``replaced`` maps a file of
    csrc/ to changes, each (regular expression, new text, times that it must be found). ``folder`` is one of
    ``tmp_path_factory``, and its name that of the program: other processes of the run take what the first one built.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ was not found")
    files = [source] if isinstance(source, str) else list(source)
    flags = ["-std=c++20", "-O1", "-g1", "-pthread"]
    if sanitizer is None:
        flags += ["-shared", "-fPIC"]
    else:
        flags += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    shared = shared_folder(folder) / f"{folder.name}-{sanitizer or 'library'}"
    with locked(shared.with_suffix(".lock")):  # processes of pytest-xdist build a program once
        program = shared / "program"
        if not program.exists():
            shutil.rmtree(shared, ignore_errors=True)
            _compile([compiler, *flags], files, main, shared, replaced or {})
    if sanitizer is None:
        return program
    started = subprocess.run([program, *empty], capture_output=True, check=False)
    if started.returncode:
        pytest.skip(f"the {sanitizer} sanitizer does not start here: {started.stderr[:200]!r}")
    return program


def shared_folder(folder: Path) -> Path:
    """What all processes of one run of pytest-xdist have in common, of a folder that pytest gave to one of them."""
    own = next((parent for parent in folder.parents if parent.name.startswith("popen-")), None)
    return folder.parent if own is None else own.parent


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Alone among processes that name the same file."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(
    command: list[str],
    files: list[str],
    main: str,
    folder: Path,
    replaced: Mapping[str, Sequence[tuple[str, str, int]]],
) -> None:
    """``folder/program``, each source by a process of its own; it is there when it is whole."""
    folder.mkdir(parents=True)
    shutil.copytree(CSRC, folder / "csrc")
    for name in ("cuda_runtime.h", "cuda_runtime_api.h", "cuda_fp16.h", "cuda_bf16.h"):
        (folder / name).write_text(f'#pragma once\n#include "{ROOT}/tests/cuda_on_cpu.h"\n')
    for name, changes in replaced.items():
        for old, new, times in changes:
            text, count = re.subn(old, new, (folder / "csrc" / name).read_text())
            assert count == times
            (folder / "csrc" / name).write_text(text)
    sources = [folder / "csrc" / "common" / "launch.cpp", ROOT / "tests" / main]
    for name in files:
        sources.append((folder / "csrc" / name).with_suffix(".host.cpp"))
        sources[-1].write_text(as_host_code(CSRC / name))
    includes = [f"-I{folder}", f"-I{folder}/csrc/include", f"-I{folder}/csrc", f"-I{ROOT}/tests"]
    objects = [folder / f"{number}.o" for number in range(len(sources))]

    def compile_one(number: int) -> None:
        to = ["-c", str(sources[number]), "-o", str(objects[number])]
        subprocess.run([*command, *includes, *to], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, range(len(sources))))
    made = folder / "linking"
    subprocess.run([*command, *map(str, objects), "-o", str(made)], check=True)
    made.rename(folder / "program")
