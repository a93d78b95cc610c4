# SPDX-License-Identifier: Apache-2.0
"""``obs-kernels report``: bench results from their files, and the files made from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from obs_kernels.errors import DataFormatError
from obs_kernels.files import write_bytes, write_text
from obs_kernels.report.bench import csv_text, is_bench_result, roofline_rows, schema_problems


def read_results(paths: Sequence[Path]) -> dict[str, Any]:
    """The report of job "bench": {"job", "bench": results, "files": where they came from, "notes"}.

    Raises:
        DataFormatError: a file that is missing or no JSON, a result that breaks its schema, or no result among them.
    """
    docs, files, notes = [], [], []
    for path in paths:
        doc = read_json(path)
        if not is_bench_result(doc):
            notes.append(f"{path.name} left out: it is no result of bench.run (no rows and ceilings)")
            continue
        problems = schema_problems(doc)
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise DataFormatError(
                f"file must hold a result of bench.run, got {str(path)!r}: {'; '.join(problems[:3])}{more}; "
                f"measure it again"
            )
        docs.append(doc)
        files.append(path.name)
    if not docs:
        raise DataFormatError(
            f"files must hold at least one result of bench.run, got {', '.join(map(str, paths))}; "
            f"make one by python -m bench.run --json FILE"
        )
    return {"job": "bench", "bench": docs, "files": files, "notes": notes}


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        DataFormatError: it is missing, or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataFormatError(f"file must be a JSON file, got {str(path)!r} ({error}); check the path") from None


def write_reports(folder: Path, report: dict[str, Any]) -> list[Path]:
    """report.md, report.html, and for each result its rows as CSV beside its plot as PNG and SVG.

    A result without rows that a roofline can show has the CSV alone.

    Raises:
        MissingDependencyError: jinja2 or matplotlib is not installed.
    """
    from obs_kernels.report.html import render_html
    from obs_kernels.report.markdown import render_markdown

    pages = {"report.md": render_markdown(report), "report.html": render_html(report)}
    return [write_text(folder / name, text) for name, text in pages.items()] + write_results(folder, report)


def write_results(folder: Path, report: dict[str, Any]) -> list[Path]:
    """For each bench result of the report its rows as CSV beside its plot as PNG and SVG, where it has one."""
    from obs_kernels.report.plots import roofline_plot

    written: list[Path] = []
    stems = [Path(name).stem for name in report["files"]]
    for index, (stem, doc) in enumerate(zip(stems, report["bench"], strict=True)):
        name = stem if stems.count(stem) == 1 else f"{stem}-{index + 1}"
        written.append(write_text(folder / f"{name}.csv", csv_text(doc)))
        if roofline_rows(doc):
            png, svg = (roofline_plot(doc, file_format=kind) for kind in ("png", "svg"))
            written.append(write_bytes(folder / f"{name}.png", png if isinstance(png, bytes) else png.encode()))
            # the page's text colour has no meaning in a file of its own
            plain = str(svg).replace("currentColor", "#000000")
            written.append(write_text(folder / f"{name}.svg", plain + "\n"))
    return written
