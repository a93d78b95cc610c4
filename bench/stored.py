# SPDX-License-Identifier: Apache-2.0
"""Files that benches keep, those of one topic as one, and cells of their tables."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from obs_kernels.errors import ConfigError, ObsKernelsError
from obs_kernels.files import write_text

RESULTS = Path(__file__).parent / "results"


def results_of(topic: str) -> list[Path]:
    """Committed results of ``bench.run --op topic``: of one run, or of several that measured different cells."""
    return sorted(RESULTS.glob(f"{topic}*.json"))


def merged(paths: Sequence[Path]) -> dict[str, Any]:
    """Rows of several results of one device, the latest run first, each with the commit that measured it.

    Returns:
        ``rows``, and an ``env`` of the device and all commits.

    Raises:
        ConfigError: several devices, or a shape that two of them have at the same tokens.
    """
    docs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    docs.sort(key=lambda doc: doc["env"].get("date", ""), reverse=True)
    devices = {doc["env"]["device"] for doc in docs}
    if len(devices) != 1:
        raise ConfigError(f"results must be of one device, got {sorted(devices)}; leave the others out")
    found: set[str] = set()
    for doc in docs:
        cells = {json.dumps([row.get("name"), row["shape"]]) for row in doc["rows"]}
        if found & cells:
            raise ConfigError(f"results must hold a cell once, got {min(found & cells)} twice; leave one file out")
        found |= cells
    commits = ", ".join(dict.fromkeys(doc["env"]["commit"] for doc in docs))
    rows = [row | {"commit": doc["env"]["commit"]} for doc in docs for row in doc["rows"]]
    return {"env": {"device": devices.pop(), "commit": commits}, "rows": rows}


def save(path: Path, document: dict[str, Any], to_markdown: Callable[[dict[str, Any]], str]) -> None:
    """Write the JSON, and its Markdown beside it."""
    write_text(path, json.dumps(document, indent=1) + "\n")
    write_text(path.with_suffix(".md"), to_markdown(document))


def digest(path: Path) -> str:
    """Hash of a file; the name itself where there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else str(path)


def run_command(main: Callable[[], int]) -> NoReturn:
    """End the process as ``main`` says; an error of the package is a line on stderr and 1."""
    try:
        sys.exit(main())
    except ObsKernelsError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)


def table_row(name: str, values: Sequence[float | None], best: float | None) -> str:
    """A row of a Markdown table: two decimals, ``best`` bold, a dash for None."""
    shown = ["-" if v is None else f"**{v:.2f}**" if v == best else f"{v:.2f}" for v in values]
    return f"| {name} | {' | '.join(shown)} |"
