# SPDX-License-Identifier: Apache-2.0
"""How values of a report are written: as JSON, and as text for people."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

MISSING = "–"
"""Stands for "not measured" in tables."""


def json_text(value: Any, *, indent: int | None = 2) -> str:
    """JSON that every parser reads: NaN and infinite numbers, which JSON has not, become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def number(value: Any, spec: str) -> str:
    """``value`` by the format ``spec``; a dash where there is none, or none that is finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return MISSING
    return format(value, spec)


SCORES = (
    ("EM", "exact_match", ".2f"),
    ("F1", "f1", ".2f"),
    ("accuracy", "accuracy", ".2f"),
    ("perplexity", "perplexity", ".3f"),
    ("% of dense F1", "f1_share", ".1f"),
    ("% of dense", "share", ".1f"),
    ("questions", "questions", ",d"),
    ("samples", "samples", ",d"),
    ("s", "seconds", ".1f"),
)
"""Title, key and format of each column that a table of accuracy may have."""


def score_columns(accuracy: dict[str, dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Those of ``SCORES`` that a report's "accuracy" has values for."""
    return [column for column in SCORES if any(scores.get(column[1]) is not None for scores in accuracy.values())]


def megabytes(value: Any) -> str:
    """Bytes as MB with one digit."""
    return f"{number(value / 1e6, ',.1f')} MB" if isinstance(value, (int, float)) else MISSING


def shape_text(shape: Sequence[int]) -> str:
    """[768, 3072] -> "768 x 3072"."""
    return " x ".join(map(str, shape))


def setting(value: Any) -> str:
    """A setting of a configuration as text."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "default" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def cell_name(cell: dict[str, Any]) -> str:
    """Method, update and recomputations of a cell of a comparison, without its pattern."""
    parts = int(cell.get("recomputations") or 1)
    again = f", {parts} recomputations" if parts > 1 else ""
    return f"{cell.get('method')}, {cell.get('update')}{again}"


def common_prefix(names: Sequence[str]) -> str:
    """The leading parts, with their dots, that all of several dotted names share."""
    if len(names) < 2:
        return ""
    parts = [name.split(".") for name in names]
    shared = 0
    while all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return "".join(f"{part}." for part in parts[0][:shared])


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
