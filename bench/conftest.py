# SPDX-License-Identifier: Apache-2.0
"""Options of ``pytest bench --benchmark-only``: the front end of the bench for developers."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

collect_ignore = [] if find_spec("pytest_benchmark") else ["test_kernels.py"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """What to measure; the defaults take well under a minute on a CPU."""
    group = parser.getgroup("obs_kernels bench")
    group.addoption("--bench-op", default="all", help="topic of bench.cases, or all")
    group.addoption("--bench-block-size", default="8,16,64", help="D, with commas")
    group.addoption("--bench-dtype", default="f32", help="with commas")
    group.addoption("--bench-device", default="auto", help="auto, cpu or cuda[:n]")
