# SPDX-License-Identifier: Apache-2.0
"""The result file of the gradual bench: going on with one, and bringing the rows of several processes together."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from obs_kernels.errors import ConfigError

Stored = dict[str, Any]


def resume(path: Path, header: dict[str, Any], wanted: list[dict[str, Any]], *, force: bool) -> Stored:
    """What ``path`` holds, if it was made with the settings ``header``; an empty result where there is none.

    Raises:
        ConfigError: other settings; rows of two budgets do not stand in one table.
    """
    fresh: Stored = {"schema": 1, "header": header, "dense": None, "rows": {}, "running": {}, "wanted": wanted}
    if force or not path.is_file():
        return fresh
    stored = _read(path)
    _check_same(path, stored, header, "name another file with --json, or --force to start anew")
    return stored | {"wanted": wanted}


def take(stored: Stored, path: Path) -> None:
    """Bring rows, rows in work and the dense score of another result file into ``stored``; what is there stays.

    Shares refer to the one dense score of the file, so those of taken rows are taken again.

    Raises:
        ConfigError: no result file, or one of other settings.
    """
    other = _read(path)
    _check_same(path, other, stored["header"], "leave it out, or run its rows again with these settings")
    stored["dense"] = stored["dense"] or other["dense"]
    for key, row in other["rows"].items():
        if key in stored["rows"]:
            if row != stored["rows"][key]:
                print(f"{path}: {key} was there already, with another result, which stays", file=sys.stderr)
            continue
        stored["rows"][key] = row | {"f1_share": f1_share(row["f1"], stored["dense"])}
    running = other["running"] | stored["running"]
    stored["running"] = {key: value for key, value in running.items() if key not in stored["rows"]}


def merge(path: Path, sources: Sequence[Path], wanted: list[dict[str, Any]], *, force: bool) -> Stored:
    """``path``, if it is there, and ``sources`` as one result.

    The settings are those of the first file, so neither a model nor a GPU is needed.

    Raises:
        ConfigError: no source, or files of different settings.
    """
    if not sources:
        raise ConfigError("--merge must have at least one result file to bring in, got none; name them with --take")
    stored = resume(path, _read(path if path.is_file() and not force else sources[0])["header"], wanted, force=force)
    for source in sources:
        take(stored, source)
    return stored


def f1_share(f1: float, dense: dict[str, float] | None) -> float:
    """Percent of the dense F1."""
    return 100.0 * f1 / ((dense or {}).get("f1") or float("nan"))


def _read(path: Path) -> Stored:
    try:
        stored: Stored = json.loads(path.read_text())
        missing = {"header", "dense", "rows", "running"} - stored.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} must be a result file of this bench, got {error}; check the name") from None
    if missing:
        raise ConfigError(f"{path} must be a result file of this bench, got one without {', '.join(sorted(missing))}")
    return stored


def _check_same(path: Path, stored: Stored, header: dict[str, Any], fix: str) -> None:
    differing = sorted(key for key in {*header, *stored["header"]} if header.get(key) != stored["header"].get(key))
    if differing:
        raise ConfigError(f"{path} was made with other settings ({', '.join(differing)}); {fix}")
