# SPDX-License-Identifier: Apache-2.0
"""The files of ``obs-kernels report`` for a model: one page of pruning, accuracy and speed, and every plot as CSV."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from obs_kernels.files import write_bytes, write_text
from obs_kernels.report.bench_files import write_results
from obs_kernels.report.html import render_html
from obs_kernels.report.markdown import render_markdown
from obs_kernels.report.speed import largest_cell, speed_csv
from obs_kernels.report.speed_plots import (
    csv_of,
    layer_times_csv,
    layer_times_plot,
    mask_plot,
    tradeoff_csv,
    tradeoff_plot,
)


def write_merged(folder: Path, report: dict[str, Any]) -> list[Path]:
    """report.md, report.html, and the plots as PNG and SVG with their numbers as CSV, of what the report has.

    Raises:
        MissingDependencyError: jinja2 or matplotlib is not installed.
    """
    pages = {"report.md": render_markdown(report), "report.html": render_html(report)}
    written = [write_text(folder / name, text) for name, text in pages.items()]
    speeds, points = report.get("speed") or [], report.get("points") or []
    if speeds:
        written.append(write_text(folder / "speed.csv", speed_csv(speeds)))
    if points:
        written += _plot(folder, "tradeoff", tradeoff_csv(points), partial(tradeoff_plot, points))
    for index, doc in enumerate(speeds):
        cell = largest_cell(doc)
        if cell is not None:
            name = _numbered("layer_times", index, len(speeds))
            written += _plot(folder, name, layer_times_csv(cell), partial(layer_times_plot, cell))
    panels = report.get("panels") or []
    for index, panel in enumerate(panels):
        name = _numbered("mask", index, len(panels))
        written += _plot(folder, name, csv_of(range(len(panel["rows"][0])), panel["rows"]), partial(mask_plot, panel))
    return written + write_results(folder, report)


def _plot(folder: Path, name: str, numbers: str, draw: Callable[..., str | bytes]) -> list[Path]:
    png, svg = draw(file_format="png"), str(draw(file_format="svg"))
    return [
        write_text(folder / f"{name}.csv", numbers),
        write_bytes(folder / f"{name}.png", png if isinstance(png, bytes) else png.encode()),
        # the page's text colour has no meaning in a file of its own
        write_text(folder / f"{name}.svg", svg.replace("currentColor", "#000000") + "\n"),
    ]


def _numbered(name: str, index: int, count: int) -> str:
    return name if count == 1 else f"{name}-{index + 1}"
