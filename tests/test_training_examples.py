# SPDX-License-Identifier: Apache-2.0
"""The examples run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize("name", ["plain_loop", "accelerate_loop"])
def test_an_example_prunes_to_its_pattern(name: str) -> None:
    if name == "accelerate_loop":
        pytest.importorskip("accelerate")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert "sparsity 0.75" in done.stdout and "0 violations" in done.stdout
    accuracy = re.search(r"accuracy ([\d.]+) %", done.stdout)
    assert accuracy is not None and float(accuracy[1]) > 60  # 12.5 by chance


def test_the_slurm_script_is_a_valid_command() -> None:
    from typer.testing import CliRunner

    from obs_kernels.cli import app
    from obs_kernels.recipes import recipe_names

    script = (EXAMPLES / "train.slurm").read_text()
    subprocess.run(["bash", "-n", str(EXAMPLES / "train.slurm")], check=True)
    known = CliRunner().invoke(app, ["train", "--help"]).stdout
    options = set(re.findall(r"--[a-z-]+", script.split("-m obs_kernels.cli train", 1)[1]))
    assert len(options) >= 8 and all(option in known for option in options)
    default = re.search(r"recipe=\$\{6:-(\w+)\}", script)
    assert default is not None and default[1] in recipe_names()
