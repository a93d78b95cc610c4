# SPDX-License-Identifier: Apache-2.0
"""Evidence that the kernels ran on a GPU: ``python -m bench.gpu_report`` makes it, ``--check`` says if it still holds.

A run builds ``_C``, runs ``pytest -m gpu tests/gpu`` and the four tools of compute-sanitizer, and writes
``bench/gpu_report.json``. What did not run is written down as such; nothing here turns "not run" into "passed".
``--again`` runs what failed in a report of the same sources once more, and the report names those tests.
The file is a pytest plugin too (``-p bench.gpu_report``), which notes each result as it comes, so that a crash of the
interpreter loses nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.sanitizers import LAUNCHES, ROOT, TOOLS, command_of_tests, run_command, run_sanitizers

REPORT = ROOT / "bench" / "gpu_report.json"
SCHEMA = 1
SOURCES = ("csrc", "python_bindings", "CMakeLists.txt", "obs_kernels/triton_kernels", "obs_kernels/cuda_calls")
TESTS = "tests/gpu/"
TESTS_LIMIT_S = 1800
LOG_VARIABLE = "OBS_KERNELS_GPU_REPORT_LOG"


def source_files(root: Path = ROOT) -> dict[str, str]:
    """sha256 of each file that the report speaks for, by its path in the repository, sorted."""
    found: dict[str, str] = {}
    for source in SOURCES:
        top = root / source
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            hidden = any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(root).parts)
            if path.is_file() and not hidden and path.suffix not in (".pyc", ".so"):
                found[path.relative_to(root).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return dict(sorted(found.items()))


def source_hash(files: Mapping[str, str]) -> str:
    """One hash over the sorted paths and contents of ``source_files``."""
    text = "".join(f"{path}\0{digest}\n" for path, digest in sorted(files.items()))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def schema_problems(report: Any) -> list[str]:
    """What is missing or of a wrong type in a report; empty if it can be trusted to be one."""
    if not isinstance(report, dict):
        return ["it is no JSON object"]
    wanted: dict[str, type | tuple[type, ...]] = {
        "schema": int,
        "date": str,
        "commit": str,
        "dirty": bool,
        "device": str,
        "compute_capability": str,
        "driver": str,
        "versions": dict,
        "source_hash": str,
        "sources": dict,
        "passed": list,
        "failed": list,
        "skipped": list,
        "sanitizer": dict,
    }
    wrong = [key for key, kind in wanted.items() if not isinstance(report.get(key), kind)]
    problems = [f"{key} is missing or of another type" for key in wrong]
    if problems:
        return problems
    if report["schema"] != SCHEMA:
        problems.append(f"schema is {report['schema']}, this checker reads {SCHEMA}")
    if report["source_hash"] != source_hash(report["sources"]):
        problems.append("source_hash is not the hash of sources")
    if any(not isinstance(skip, dict) or not skip.get("test") or not skip.get("reason") for skip in report["skipped"]):
        problems.append("a skip has no test or no reason")
    problems += [f"sanitizer says nothing of {tool}" for tool in TOOLS if not report["sanitizer"].get(tool)]
    return problems


def verdict(report: Any, files: Mapping[str, str]) -> str:
    """One line: GPU-verified, NOT VERIFIED with the reason, or STALE with the changed files."""
    problems = schema_problems(report)
    if problems:
        return f"NOT VERIFIED: the report is unusable: {'; '.join(problems)}"
    then = report["sources"]
    changed = sorted(path for path in files.keys() | then.keys() if files.get(path) != then.get(path))
    if changed:
        return f"STALE: changed since {report['commit']}: {', '.join(changed)}"
    where = f"{report['commit']} on {report['device']}"
    broken = [f"{tool} {state}" for tool, state in report["sanitizer"].items() if state.startswith("failed")]
    if report["dirty"]:
        return f"NOT VERIFIED: the tests at {where} ran on a dirty tree"
    if report["failed"] or broken:
        return f"NOT VERIFIED: failed at {where}: {', '.join([*report['failed'], *broken])}"
    if not report["passed"]:
        return f"NOT VERIFIED: no test passed at {where}"
    clean = [tool for tool in TOOLS if report["sanitizer"][tool] == "passed"]
    again = f" ({len(report['again'])} when run again)" if report.get("again") else ""
    return (
        f"GPU-verified at {where}: {len(report['passed'])} passed{again}, {len(report['skipped'])} skipped; "
        f"sanitizers passed: {', '.join(clean) or 'none'}"
    )


def read_results(lines: list[str]) -> dict[str, Any]:
    """``passed``, ``failed`` and ``skipped`` from the notes of the plugin; a test that never ended counts as failed."""
    state: dict[str, tuple[str, str]] = {}
    rank = {"started": 0, "skipped": 1, "passed": 2, "failed": 3}  # a test may be skipped at first and run later
    for line in lines:
        note = json.loads(line)
        if rank[note["outcome"]] >= rank[state.get(note["test"], ("started", ""))[0]]:
            state[note["test"]] = note["outcome"], note.get("reason", "")
    return {
        "passed": sorted(test for test, (outcome, _) in state.items() if outcome == "passed"),
        "failed": sorted(test for test, (outcome, _) in state.items() if outcome in ("failed", "started")),
        "skipped": [{"test": t, "reason": why} for t, (outcome, why) in sorted(state.items()) if outcome == "skipped"],
    }


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """With one device, tests that need two are skips with a reason, not failures of OBS_KERNELS_REQUIRE_GPU."""
    import pytest
    import torch

    found = torch.cuda.device_count()
    for item in items:
        if found == 1 and item.get_closest_marker("multigpu"):
            item.add_marker(pytest.mark.skip(reason="needs 2 CUDA devices, found 1"))


def pytest_runtest_logstart(nodeid: str) -> None:
    """Note that a test has begun."""
    _note(nodeid, "started")


def pytest_runtest_logreport(report: Any) -> None:
    """Note the outcome of a test; its setup and teardown count when they fail or skip."""
    if report.failed:
        _note(report.nodeid, "failed")
    elif report.skipped:
        _note(report.nodeid, "skipped", _skip_reason(report))
    elif report.when == "call":
        _note(report.nodeid, "passed")


def pytest_collectreport(report: Any) -> None:
    """A file that cannot be collected is a failure; one that skips itself is a skip."""
    if report.failed:
        _note(report.nodeid, "failed")
    elif report.skipped:
        _note(report.nodeid, "skipped", _skip_reason(report))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how many kernels ran, for ``judge_sanitizer``."""
    from obs_kernels import _ext

    count = _ext.load().launch_count() if _ext.reason() is None else 0
    terminalreporter.write_line(f"{LAUNCHES} {count}")


def _skip_reason(report: Any) -> str:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "")
    return str(reason).removeprefix("Skipped: ") or "no reason given"


def _note(test: str, outcome: str, reason: str = "") -> None:
    if LOG_VARIABLE in os.environ:
        with Path(os.environ[LOG_VARIABLE]).open("a", encoding="utf-8") as log:
            log.write(json.dumps({"test": test, "outcome": outcome, "reason": reason}) + "\n")


def build() -> str | None:
    """Build ``_C`` in place; the reason of a failure, or None."""
    env = {**os.environ, "OBS_KERNELS_BUILD": "on"}
    done = subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, env=env, check=False)
    return f"build of obs_kernels._C (exit status {done.returncode})" if done.returncode else None


def run_tests(jobs: int, *tests: str) -> dict[str, Any]:
    """Run ``pytest -m gpu`` over ``tests`` (all of tests/gpu) in processes of its own and collect what came out.

    With several jobs (by pytest-xdist) the tests that take much of the GPU's memory come last and alone, and with them
    those that found too little of it left by the others.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "results.jsonl"
        log.touch()
        env = {LOG_VARIABLE: str(log), "OBS_KERNELS_REQUIRE_GPU": "1"}

        def run(marker: str, *options: str, of: Sequence[str] = tests) -> int:
            return run_command([*command_of_tests(marker, *of), *options], env, TESTS_LIMIT_S, echo=True)[0]

        def results() -> dict[str, Any]:
            return read_results(log.read_text(encoding="utf-8").splitlines())

        if jobs == 1:
            states = [run("gpu")]
        else:
            states = [run("gpu and not big", "-n", str(jobs)), run("gpu and big")]
            short = [skip["test"] for skip in results()["skipped"] if "free GPU memory" in skip["reason"]]
            if short:
                states.append(run("gpu", of=short))
        found = results()
    # 1 = tests failed, and they are in the list; 5 = none of the tests that were named has the marker
    fine = (0, 1, 5) if tests else (0, 1)
    found["failed"] += [f"pytest ended with exit status {status}" for status in states if status not in fine]
    return found


def run_again(earlier: Mapping[str, Any], jobs: int) -> dict[str, Any]:
    """The results of a report with those of its failed tests replaced, which ``again`` names beside earlier ones."""
    tests = earlier["failed"]
    now = run_tests(jobs, *tests) if tests else {"passed": [], "failed": [], "skipped": []}
    return {
        "passed": sorted([*earlier["passed"], *now["passed"]]),
        "failed": now["failed"],
        "skipped": sorted([*earlier["skipped"], *now["skipped"]], key=lambda skip: str(skip["test"])),
        "again": sorted({*earlier.get("again", ()), *tests}),
    }


def refusal(earlier: Any, files: Mapping[str, str], device: str) -> str | None:
    """Why the results of a report cannot stand beside those of a run of ``files`` on ``device``; None if they can."""
    problems = schema_problems(earlier)
    if problems:
        return f"the report is unusable: {'; '.join(problems)}"
    if earlier["sources"] != dict(files):
        return f"the report is of other sources, at {earlier['commit']}"
    if earlier["device"] != device:
        return f"the report is of another device, {earlier['device']}, this is {device}"
    others = [failure for failure in earlier["failed"] if not failure.startswith(TESTS)]
    if others:  # of the build, or of pytest, which may have left out tests that nothing names
        return f"the report has failures that are no tests: {'; '.join(others)}"
    return None


def describe_tree(commit: str | None) -> dict[str, Any]:
    """``commit`` and ``dirty``; a caller who names the commit (where there is no git) answers for it."""
    if commit is not None:
        return {"commit": commit, "dirty": False}
    head = _output(["git", "rev-parse", "HEAD"])
    changes = _output(["git", "status", "--porcelain", "--", ".", f":!{REPORT.relative_to(ROOT).as_posix()}"])
    return {"commit": head or "unknown", "dirty": not head or changes is None or changes != ""}


def describe_machine() -> dict[str, Any]:
    """Device, driver and versions."""
    import torch

    from obs_kernels import _ext

    driver = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    major, minor = torch.cuda.get_device_capability(0)
    return {
        "device": torch.cuda.get_device_name(0),
        "device_count": torch.cuda.device_count(),
        "compute_capability": f"{major}.{minor}",
        "driver": driver.splitlines()[0] if driver else "unknown",
        "versions": {
            "cuda_toolkit": _ext.build_info()["cuda"] or "none",
            "torch": torch.__version__,
            "triton": _version("triton"),
            "python": platform.python_version(),
        },
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def check(path: Path) -> str:
    """The verdict on the report at ``path``."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "NOT VERIFIED: there is no GPU report; `make gpu-test` on a GPU machine makes one"
    except ValueError as error:
        return f"NOT VERIFIED: the report is unusable: {error}"
    return verdict(report, source_files())


def make_report(path: Path, *, commit: str | None, with_build: bool, jobs: int, again: bool = False) -> int:
    """Build, test, sanitize and write; 0 if nothing failed. ``again``: only what did not pass in the report there."""
    import torch

    from obs_kernels.files import write_text

    if not torch.cuda.is_available():
        print("no CUDA device here: no report is written")
        return 1
    files = source_files()  # before the tests, so that an edit meanwhile shows as stale
    tree = describe_tree(commit)
    machine = describe_machine()
    earlier: Any = None
    if again:
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            print(f"--again wants a report at {path}: {error}")
            return 1
        why = refusal(earlier, files, machine["device"])
        if why:
            print(f"--again: {why}; run all tests instead")
            return 1
    problem = build() if with_build else None
    results = run_again(earlier, jobs) if earlier else run_tests(jobs)
    if problem:
        results["failed"].insert(0, problem)
    passed = [tool for tool, state in earlier["sanitizer"].items() if state == "passed"] if earlier else []
    sanitizer = run_sanitizers(jobs, [tool for tool in TOOLS if tool not in passed]) | dict.fromkeys(passed, "passed")
    report = {
        "schema": SCHEMA,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **tree,
        **machine,
        "source_hash": source_hash(files),
        "sources": files,
        **results,
        "sanitizer": sanitizer,
    }
    write_text(path, json.dumps(report, indent=1) + "\n")
    for tool, state in sanitizer.items():
        print(f"{tool}: {state}")
    print(verdict(report, source_files()))
    print(f"{len(results['passed'])} passed, {len(results['failed'])} failed, {len(results['skipped'])} skipped")
    return 1 if results["failed"] or any(state.startswith("failed") for state in sanitizer.values()) else 0


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether the report holds; exits 0 either way")
    parser.add_argument("--out", type=Path, default=REPORT, help="the report (default bench/gpu_report.json)")
    parser.add_argument("--commit", help="commit of this tree, where there is no git; says that the tree is clean")
    parser.add_argument("--no-build", action="store_true", help="take the module that is there")
    parser.add_argument("--jobs", type=int, default=1, help="test processes; more than one needs pytest-xdist")
    parser.add_argument(
        "--again", action="store_true", help="only what did not pass in the report, of the same sources"
    )
    options = parser.parse_args()
    if options.check:
        print(check(options.out))
        return 0
    return make_report(
        options.out,
        commit=options.commit,
        with_build=not options.no_build,
        jobs=options.jobs,
        again=options.again,
    )


if __name__ == "__main__":
    sys.exit(main())
