# SPDX-License-Identifier: Apache-2.0
"""The bench apart from the ops: timing in turn, checks before times, rows, one JSON for all.

An op is described in ``bench/cases`` (see ``Case``); ``bench.run`` is the command.
"""

from bench.harness.case import Case, Check, Inputs, Problem, Selection, Variant
from bench.harness.rows import Row, make_row
from bench.harness.session import Context
from obs_kernels.report.bench import schema_problems

__all__ = [
    "Case",
    "Check",
    "Context",
    "Inputs",
    "Problem",
    "Row",
    "Selection",
    "Variant",
    "make_row",
    "schema_problems",
]
