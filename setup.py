# SPDX-License-Identifier: Apache-2.0
"""Builds ``obs_kernels/_C`` with CMake where nvcc is found; otherwise installs the pure-Python package and says so.

Environment: ``OBS_KERNELS_BUILD`` = auto (default: build if nvcc is there; a failing build is a warning), on (a failing
build fails the install) or off; ``CUDA_HOME``, ``CMAKE_CUDA_ARCHITECTURES``, ``MAX_JOBS``; ``CMAKE_ARGS`` for the rest,
such as ``-DOBS_WERROR=OFF`` for a compiler that warns of more than ours. torch is never imported.
``python setup.py build_ext --inplace`` needs no package at all besides CMake and the pybind11 headers, which it also
finds inside an installed torch.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve().parent
PACKAGE = SOURCE / "obs_kernels"
MODULE_FILE = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
INFO_FILE = "_build_info.json"
GB_PER_JOB = 4


class BuildError(Exception):
    """The compiled module could not be built; the text becomes the kept reason."""


def build_mode(env: Mapping[str, str]) -> str:
    mode = env.get("OBS_KERNELS_BUILD", "auto").strip().lower() or "auto"
    if mode not in ("auto", "on", "off"):
        raise SystemExit(f"OBS_KERNELS_BUILD must be auto, on or off, got {mode!r}")
    return mode


def find_nvcc(env: Mapping[str, str]) -> Path | None:
    """The nvcc of CUDA_HOME if that is set (and no other), else of PATH, else of /usr/local/cuda."""
    home = env.get("CUDA_HOME") or env.get("CUDA_PATH")
    if home:
        nvcc = Path(home) / "bin" / "nvcc"
        return nvcc if nvcc.is_file() else None
    found = shutil.which("nvcc", path=env.get("PATH"))
    if found:
        return Path(found)
    nvcc = Path("/usr/local/cuda/bin/nvcc")
    return nvcc if nvcc.is_file() else None


def why_not(env: Mapping[str, str]) -> str | None:
    """The reason why nothing is to be built; None if something is."""
    mode = build_mode(env)
    if mode == "off":
        return "the install was made with OBS_KERNELS_BUILD=off"
    if find_nvcc(env) is None:
        home = env.get("CUDA_HOME") or env.get("CUDA_PATH")
        looked = f"bin/nvcc of CUDA_HOME={home}" if home else "nvcc on PATH or in /usr/local/cuda"
        reason = f"the install found no {looked}"
        if mode == "on":
            raise SystemExit(f"OBS_KERNELS_BUILD=on, but {reason}")
        return reason
    return None


def count_jobs(env: Mapping[str, str]) -> int:
    """``min(cpus, free GB / 4)``, at least 1; MAX_JOBS overrides."""
    if env.get("MAX_JOBS"):
        return max(1, int(env["MAX_JOBS"]))
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cpus, int(free_gb() / GB_PER_JOB)))


def free_gb() -> float:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) / 2**20
    except (OSError, StopIteration, ValueError):
        return float(GB_PER_JOB)


def pybind11_include() -> str:
    """Headers of an installed pybind11, else those that ship inside torch (found without importing it)."""
    if importlib.util.find_spec("pybind11") is not None:
        import pybind11

        return str(pybind11.get_include())
    torch = importlib.util.find_spec("torch")
    for folder in (torch.submodule_search_locations or []) if torch is not None else []:
        if (Path(folder) / "include" / "pybind11" / "pybind11.h").is_file():
            return str(Path(folder) / "include")
    raise BuildError("the pybind11 headers are not installed (pip install pybind11)")


def run_step(name: str, command: list[str]) -> None:
    """Run ``command``, showing its output; the first line that tells of an error becomes the reason of a failure."""
    print("obs_kernels:", " ".join(command), flush=True)
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        raise BuildError(f"{name} failed: {error}") from error
    lines = ["it said nothing"]
    with process:
        for line in process.stdout or []:
            print(line, end="", flush=True)
            lines.append(line.strip())
    if process.returncode:
        telling = next((line for line in lines if re.search(r"\berror\b", line, re.I)), lines[-1])
        raise BuildError(f"{name} failed with exit status {process.returncode}: {telling[:300]}")


def build_native(folder: Path, build_dir: Path, env: Mapping[str, str]) -> dict[str, Any]:
    """Configure, build, and put the module into ``folder``; returns its architectures and CUDA version."""
    cmake = shutil.which("cmake", path=env.get("PATH"))
    if cmake is None:
        raise BuildError("cmake is not installed (pip install cmake)")
    jobs = count_jobs(env)
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CUDA_COMPILER": str(find_nvcc(env)),
        "Python_EXECUTABLE": sys.executable,
        "OBS_PYBIND11_INCLUDE": pybind11_include(),
    }
    if env.get("CMAKE_CUDA_ARCHITECTURES"):
        settings["CMAKE_CUDA_ARCHITECTURES"] = env["CMAKE_CUDA_ARCHITECTURES"]
    ninja = shutil.which("ninja", path=env.get("PATH"))
    generator = "Ninja" if ninja else "Unix Makefiles"
    if ninja:
        settings["CMAKE_MAKE_PROGRAM"] = ninja
    build_dir = build_dir / generator.split()[-1].lower()  # CMake refuses a folder of another generator
    # What CMake remembers may lie in a build environment that pip has deleted since; objects may stay.
    (build_dir / "CMakeCache.txt").unlink(missing_ok=True)
    for found_tools in build_dir.glob("CMakeFiles/[0-9]*"):
        shutil.rmtree(found_tools)
    defines = [*(f"-D{name}={value}" for name, value in settings.items()), *shlex.split(env.get("CMAKE_ARGS", ""))]
    run_step("CMake's configuration", [cmake, "-S", str(SOURCE), "-B", str(build_dir), "-G", generator, *defines])
    info = json.loads((build_dir / "obs_build.json").read_text(encoding="utf-8"))
    info["architectures"] = info["architectures"].split(",")
    print(f"obs_kernels: architectures {', '.join(info['architectures'])}; {jobs} jobs", flush=True)
    run_step("the CUDA build", [cmake, "--build", str(build_dir), "--parallel", str(jobs)])
    built = build_dir / MODULE_FILE
    if not built.is_file():
        raise BuildError(f"the CUDA build made no {MODULE_FILE}")
    folder.mkdir(parents=True, exist_ok=True)
    # A new file, not new contents: a process that has the old module mapped must not see it change.
    fresh = folder / f".{MODULE_FILE}.new"
    shutil.copyfile(built, fresh)
    fresh.chmod(0o755)
    os.replace(fresh, folder / MODULE_FILE)
    return dict(info)


def build_into(folder: Path, build_dir: Path, env: Mapping[str, str]) -> None:
    """Build, or keep the reason why not, and write the info file either way."""
    reason = why_not(env)
    info: dict[str, Any] = {"architectures": [], "cuda": None}
    if reason is None:
        try:
            info = build_native(folder, build_dir, env)
        except BuildError as error:
            if build_mode(env) == "on":
                raise SystemExit(f"obs_kernels: {error}") from error
            reason = str(error)
    if reason is not None:
        # A module of older sources must not stand in for one that was not built.
        (folder / MODULE_FILE).unlink(missing_ok=True)
        print(
            f"obs_kernels: WARNING: installed WITHOUT compiled kernels: {reason}.\n"
            f"obs_kernels: the reference and Triton backends work; `obs-kernels doctor` repeats this reason.",
            file=sys.stderr,
            flush=True,
        )
    write_info(folder, {"built": reason is None, "reason": reason, **info})


def write_info(folder: Path, info: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INFO_FILE).write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    if sys.argv[1:] == ["build_ext", "--inplace"]:
        # Without setuptools, which a bare GPU machine may lack or have too old for pyproject.toml.
        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        build_into(PACKAGE, SOURCE / "build" / f"inplace.{tag}", os.environ)
        return

    from setuptools import Extension, setup
    from setuptools.command.build_ext import build_ext
    from setuptools.command.build_py import build_py

    building = why_not(os.environ) is None

    class BuildPy(build_py):
        def find_data_files(self, package: str, src_dir: str) -> list[str]:
            # What an in-place build left in the checkout belongs to that build, not to this one.
            files = super().find_data_files(package, src_dir)
            return [file for file in files if not Path(file).name.startswith(("_C.", INFO_FILE))]

        def run(self) -> None:
            super().run()
            if not building:  # else build_ext runs, and writes the file
                folder = PACKAGE if self.editable_mode else Path(self.build_lib) / PACKAGE.name
                build_into(folder, SOURCE, os.environ)

    class BuildExt(build_ext):
        def run(self) -> None:
            folder = PACKAGE if self.inplace or self.editable_mode else Path(self.build_lib) / PACKAGE.name
            build_into(folder, Path(self.build_temp).resolve() / "cmake", os.environ)

    setup(
        cmdclass={"build_py": BuildPy, "build_ext": BuildExt},
        # The sources are CMake's; the entry makes the wheel one of this Python and platform.
        ext_modules=[Extension("obs_kernels._C", sources=[], optional=True)] if building else [],
    )


if __name__ == "__main__":
    main()
