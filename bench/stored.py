# SPDX-License-Identifier: Apache-2.0
"""What benches that go on where they stopped share: the files they keep, and cells of their tables."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from obs_kernels.errors import ObsKernelsError
from obs_kernels.files import write_text


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
