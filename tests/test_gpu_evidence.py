# SPDX-License-Identifier: Apache-2.0
"""The report of the GPU tests: what it says of itself, and a second run of what failed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_report
from bench.gpu_report import make_report, refusal, schema_problems, source_files, source_hash, verdict
from bench.sanitizers import TOOLS

FILES = {"csrc/a.cu": "1", "CMakeLists.txt": "2"}
SKIP = {"test": "tests/gpu/test_a.py::four", "reason": "needs 2 CUDA devices, found 1"}


def report(**changed: Any) -> dict[str, Any]:
    """One of FILES whose tests passed; two of them when run again."""
    return {
        "schema": 1, "date": "2026-01-01T00:00:00+00:00", "commit": "abc", "dirty": False, "device": "GPU",
        "device_count": 1, "compute_capability": "9.0", "driver": "1", "versions": {}, "sources": FILES,
        "source_hash": source_hash(FILES), "passed": ["tests/gpu/test_a.py::one"], "failed": [], "skipped": [SKIP],
        "sanitizer": dict.fromkeys(TOOLS, "passed"), **changed,
    }  # fmt: skip


def test_a_verdict_names_what_is_wrong() -> None:
    assert verdict(report(), FILES).startswith("GPU-verified at abc on GPU: 1 passed, 1 skipped")
    assert "1 passed (1 when run again)" in verdict(report(again=["tests/gpu/test_a.py::one"]), FILES)
    assert "STALE: changed since abc: csrc/a.cu" in verdict(report(), {**FILES, "csrc/a.cu": "3"})
    assert "failed at abc on GPU: tests/gpu/test_a.py::two" in verdict(
        report(failed=["tests/gpu/test_a.py::two"]), FILES
    )
    broken = {**dict.fromkeys(TOOLS, "passed"), "racecheck": "failed: 1 errors"}
    assert "racecheck failed: 1 errors" in verdict(report(sanitizer=broken), FILES)
    assert "dirty" in verdict(report(dirty=True), FILES)
    assert "no test passed" in verdict(report(passed=[]), FILES)
    assert "unusable" in verdict({}, FILES) and "unusable" in verdict(report(source_hash="sha256:0"), FILES)


def test_results_of_other_sources_or_devices_do_not_stand() -> None:
    assert refusal(report(), FILES, "GPU") is None
    assert "other sources, at abc" in str(refusal(report(), {**FILES, "csrc/a.cu": "3"}, "GPU"))
    assert "another device, GPU, this is Other" in str(refusal(report(), FILES, "Other"))
    assert "unusable" in str(refusal(report(sanitizer={}), FILES, "GPU"))


@pytest.mark.parametrize("failure", ["pytest ended with exit status 3", "build of obs_kernels._C (exit status 1)"])
def test_a_run_that_broke_off_is_not_gone_on_with(
    tmp_path: Path, machine: dict[str, list[Any]], capsys: pytest.CaptureFixture[str], failure: str
) -> None:
    """Tests that it never reached are in no list: to run the failed ones alone would pass them over."""
    path = tmp_path / "report.json"
    written(path, failed=["tests/gpu/test_a.py::two", failure])
    before = path.read_text()
    assert make_report(path, commit="def", with_build=False, jobs=2, again=True) == 1
    assert f"no tests: {failure}; run all tests" in capsys.readouterr().out
    assert machine == {"tests": [], "tools": []} and path.read_text() == before


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """A GPU machine on which test two passes and three fails; what was run on it."""
    ran: dict[str, list[Any]] = {"tests": [], "tools": []}

    def run_tests(jobs: int, *tests: str) -> dict[str, Any]:
        ran["tests"].append(tests)
        bad = [test for test in tests if test.endswith("three")]
        return {"passed": [test for test in tests if test not in bad], "failed": bad, "skipped": []}

    def run_sanitizers(jobs: int, tools: list[str]) -> dict[str, str]:
        ran["tools"].append(tools)
        return dict.fromkeys(tools, "passed")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    described = {key: report()[key] for key in ("device", "device_count", "compute_capability", "driver", "versions")}
    monkeypatch.setattr(gpu_report, "describe_machine", lambda: described)
    monkeypatch.setattr(gpu_report, "run_tests", run_tests)
    monkeypatch.setattr(gpu_report, "run_sanitizers", run_sanitizers)
    return ran


def written(path: Path, **changed: Any) -> None:
    files = source_files()
    path.write_text(json.dumps(report(sources=files, source_hash=source_hash(files), **changed)))


def test_what_failed_runs_again_and_the_rest_stands(tmp_path: Path, machine: dict[str, list[Any]]) -> None:
    path = tmp_path / "report.json"
    two, three = "tests/gpu/test_a.py::two", "tests/gpu/test_a.py::three"
    tools = {**dict.fromkeys(TOOLS, "passed"), "memcheck": "failed: 2 errors"}
    written(path, failed=[two, three], sanitizer=tools)
    assert make_report(path, commit="def", with_build=False, jobs=2, again=True) == 1
    found = json.loads(path.read_text())
    assert not schema_problems(found) and machine == {"tests": [(two, three)], "tools": [["memcheck"]]}
    assert found["passed"] == ["tests/gpu/test_a.py::one", two] and found["failed"] == [three]
    assert found["skipped"] == [SKIP] and found["again"] == [three, two] and found["commit"] == "def"
    assert found["sanitizer"] == dict.fromkeys(TOOLS, "passed")
    assert "failed at def on GPU: tests/gpu/test_a.py::three" in verdict(found, source_files())


def test_nothing_runs_where_all_passed(tmp_path: Path, machine: dict[str, list[Any]]) -> None:
    """Pytest without the name of a test would run them all."""
    path = tmp_path / "report.json"
    written(path)
    assert make_report(path, commit="def", with_build=False, jobs=2, again=True) == 0
    assert machine == {"tests": [], "tools": [[]]} and json.loads(path.read_text())["again"] == []


@pytest.mark.parametrize("text", [None, "{", "{}"])
def test_again_without_a_report_changes_nothing(
    tmp_path: Path, machine: dict[str, list[Any]], capsys: pytest.CaptureFixture[str], text: str | None
) -> None:
    path = tmp_path / "report.json"
    if text is not None:
        path.write_text(text)
    assert make_report(path, commit="def", with_build=False, jobs=2, again=True) == 1
    assert "--again" in capsys.readouterr().out and machine == {"tests": [], "tools": []}
    assert (path.read_text() if path.exists() else None) == text
