# SPDX-License-Identifier: Apache-2.0
"""The ops of the bench, one file each. A new op is a new file with a ``CASE``, and its name here."""

from __future__ import annotations

from importlib import import_module

from bench.harness.case import Case

TOPICS = ("fisher", "inverse", "search", "update", "hessian", "sweep", "calibration", "pruning", "matmul", "inference")
"""In the order in which they are measured."""


def load(topic: str) -> Case:
    """The case of a topic."""
    case: Case = import_module(f"bench.cases.{topic}").CASE
    return case
