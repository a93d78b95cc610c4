# SPDX-License-Identifier: Apache-2.0
"""``obs-kernels doctor``: it tells the truth, and it finds an op that computes wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import obs_kernels
import obs_kernels.reference
from obs_kernels.cli import app
from obs_kernels.ops import self_check
from obs_kernels.ops.dispatch import TABLE

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_doctor_checks_every_op():
    found = json.loads(run("doctor", "--json").stdout)
    assert found["ok"] and {check["op"] for check in found["checks"]} == set(TABLE)
    assert set(found["backends"]["pack"]) == {"reference", "triton", "cuda"}
    text = run("doctor").stdout
    assert "paste this into an issue" in text and "compiled module _C" in text and "\x1b" not in text


def spoiled(result: Any) -> Any:
    """Not what the op should return, of the same shapes."""
    if isinstance(result, tuple):
        return tuple(map(spoiled, result))
    return ~result if result.dtype == torch.bool else result * 2 + 1


@pytest.mark.parametrize("op", TABLE)
def test_doctor_finds_a_wrong_op(op: str, monkeypatch: pytest.MonkeyPatch):
    right = getattr(obs_kernels.reference, op)

    def wrong(*arguments: Any, **settings: Any) -> Any:
        if op.endswith("_"):
            return right(*arguments, **{**settings, "scale": 3.0})
        return spoiled(right(*arguments, **settings))

    monkeypatch.setattr(obs_kernels.reference, op, wrong)
    failed = {result.op for result in self_check.check_ops("cpu") if not result.ok}
    assert op in failed
    done = run("doctor", "--json")
    assert done.exit_code == 1 and not json.loads(done.stdout)["ok"]


# as a process


def process(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    start = ["-c", code] if code else ["-m", "obs_kernels"]
    command = [sys.executable, *start, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_the_package_as_a_module_is_doctor():
    done = process("--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["job"] == "doctor"


def test_version_and_missing_typer():
    version = process("--version", code="from obs_kernels.cli import main; main()")
    assert version.returncode == 0 and version.stdout == f"obs-kernels {obs_kernels.__version__}\n"
    blocked = "import sys; sys.modules['typer'] = None; from obs_kernels.cli import main; main()"
    done = process(code=blocked)
    assert done.returncode == 1 and done.stdout == ""
    assert "obs_kernels[cli]" in done.stderr and "Traceback" not in done.stderr
