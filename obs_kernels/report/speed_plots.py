# SPDX-License-Identifier: Apache-2.0
"""Plots of a model's report: accuracy against speed-up, time by layer, and the mask of a panel. See ``plots``."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from obs_kernels.report.plots import _COLOURS, _INK, _render
from obs_kernels.report.values import common_prefix

_MARGIN = 0.12
"""Share of a mask's cell that stays empty on each side."""


def tradeoff_plot(points: Sequence[Mapping[str, Any]], *, file_format: str = "svg") -> str | bytes:
    """Accuracy against speed-up: one colour a pattern, and the line of those marks that none beats in both.

    Args:
        points: of ``speed.joined``.
        file_format: as in ``plots.layers_plot``.
    """
    patterns = list(dict.fromkeys(point["pattern"] for point in points))
    label = "F1, % of dense" if points and points[0]["metric"] == "share" else "F1, %"

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        front = sorted((p for p in points if p["front"]), key=lambda p: p["speedup"])
        axes.step(
            [p["speedup"] for p in front],
            [p["value"] for p in front],
            where="post",
            color=_INK,
            linewidth=1.0,
            alpha=0.6,
        )
        for index, pattern in enumerate(patterns):
            mine = [p for p in points if p["pattern"] == pattern]
            axes.scatter(
                [p["speedup"] for p in mine],
                [p["value"] for p in mine],
                s=[46 if p["front"] else 16 for p in mine],
                color=_INK if pattern == "dense" else _COLOURS[index % len(_COLOURS)],
                marker="s" if pattern == "dense" else "o",
                label=pattern,
                zorder=3,
            )
        for point in front:
            axes.annotate(
                str(point["label"]),
                (point["speedup"], point["value"]),
                xytext=(6, 4),
                textcoords="offset points",
                fontsize=8,
            )
        axes.axvline(1.0, color=_INK, linestyle=":", linewidth=1)
        axes.set(xlabel="speed-up over the best dense model (1: dense)", ylabel=label)
        axes.margins(x=0.18, y=0.12)
        axes.grid(color=_INK, alpha=0.12)
        axes.set_axisbelow(True)
        axes.set_title("the line joins what nothing beats in both", loc="left", fontsize=9)
        legend = axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
        for handle in legend.legend_handles:
            handle.set_sizes([32])

    return _render(draw, (8.0, 4.4), "tradeoff", file_format)


def layer_times_plot(cell: Mapping[str, Any], *, name: str = "times", file_format: str = "svg") -> str | bytes:
    """Time of all layers of a kind in one call: dense beside each pattern, as bars.

    Args:
        cell: of ``measure_cell``.
        name: begins the ids of the SVG.
        file_format: as in ``plots.layers_plot``.
    """
    table = layer_times(cell)
    series = list(dict.fromkeys(key for row in table for key in row["us"]))
    prefix = common_prefix([row["name"] for row in table])

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        height = 0.8 / max(1, len(series))
        for index, key in enumerate(series):
            places = [p - 0.4 + height * (index + 0.5) for p in range(len(table))]
            values = [(row["us"].get(key) or 0.0) / 1e3 for row in table]
            colour = "#888888" if key == "dense" else _COLOURS[(index - 1) % len(_COLOURS)]
            axes.barh(places, values, height * 0.92, label=key, color=colour)
        axes.set(
            yticks=range(len(table)),
            ylim=(len(table) - 0.4, -0.6),
            xlabel="ms a call, products as the model runs them, all blocks",
        )
        axes.set_yticklabels([f"{row['name'].removeprefix(prefix)}  {row['rows']} x {row['cols']}" for row in table])
        axes.grid(axis="x", color=_INK, alpha=0.15)
        axes.set_axisbelow(True)
        where = f" of {prefix.removesuffix('.')}" if prefix else ""
        axes.set_title(f"layers{where}, batch {cell['batch']}, length {cell['length']}", loc="left", fontsize=9)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)

    size = (9.5, 1.2 + max(3, len(table)) * (0.18 + 0.12 * len(series)))
    return _render(draw, size, name, file_format)


def mask_plot(panel: Mapping[str, Any], *, name: str = "mask", file_format: str = "svg") -> str | bytes:
    """The kept weights of a corner of a layer: a square each, with lines between groups, and the pattern's columns.

    Args:
        panel: {"layer", "pattern", "m", "v", "rows": [[0, 1, ...], ...], "shape"}; v is 0 without panels.
        name: begins the ids of the SVG.
        file_format: as in ``plots.layers_plot``.
    """
    rows, m, v = panel["rows"], panel["m"], panel["v"]
    height, width = len(rows), len(rows[0])

    def draw(figure: Any) -> None:
        from matplotlib.patches import PathPatch, Rectangle
        from matplotlib.path import Path

        axes = figure.subplots()
        corners = []
        for r, row in enumerate(rows):
            for c, kept in enumerate(row):
                if kept:
                    left, right, top, bottom = c + _MARGIN, c + 1 - _MARGIN, r + _MARGIN, r + 1 - _MARGIN
                    corners += [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
        codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * (len(corners) // 5)
        step = v or height
        for first in range(0, height, step if v else height):
            for c in range(width):
                if v and any(row[c] for row in rows[first : first + step]):
                    box = Rectangle(
                        (c, first), 1, min(step, height - first), color=_COLOURS[1], alpha=0.25, linewidth=0
                    )
                    axes.add_patch(box)
        if corners:
            axes.add_patch(PathPatch(Path(corners, codes), facecolor=_COLOURS[0], linewidth=0))
        for c in range(0, width + 1, m):
            axes.axvline(c, color=_INK, linewidth=0.6, alpha=0.5)
        for r in range(0, height + 1, step):
            axes.axhline(r, color=_INK, linewidth=0.6, alpha=0.5)
        axes.set(xlim=(0, width), ylim=(height, 0), aspect="equal", xlabel="input", ylabel="output")
        axes.set_xticks(range(0, width + 1, m))
        axes.tick_params(axis="x", labelsize=7)
        text = "; shaded: the panel's columns" if v else ""
        axes.set_title(f"{panel['layer']}, {panel['pattern']}, first corner{text}", loc="left", fontsize=9)

    return _render(draw, (9.0, 1.2 + 8.2 * height / width), name, file_format)


def layer_times(cell: Mapping[str, Any]) -> list[dict[str, Any]]:
    """{"name", "rows", "cols", "us": {"dense" or pattern: microseconds of all layers of that kind}}."""
    table: dict[str, dict[str, Any]] = {}
    for pattern, layers in cell["layers"].items():
        for layer in layers:
            row = table.setdefault(
                layer["name"], {"name": layer["name"], "rows": layer["rows"], "cols": layer["cols"], "us": {}}
            )
            for key, us in (("dense", layer["dense_us"]), (pattern, layer["sparse_us"])):
                if us is not None and key not in row["us"]:
                    row["us"][key] = us * layer["count"]
    return list(table.values())


def layer_times_csv(cell: Mapping[str, Any]) -> str:
    """The bars as CSV, in microseconds."""
    table = layer_times(cell)
    series = list(dict.fromkeys(key for row in table for key in row["us"]))
    rows = [[row["name"], row["rows"], row["cols"], *(row["us"].get(key, "") for key in series)] for row in table]
    return csv_of(["layer", "rows", "cols", *series], rows)


def tradeoff_csv(points: Sequence[Mapping[str, Any]]) -> str:
    """The marks as CSV."""
    keys = ("pattern", "label", "f1", "share", "speedup", "front")
    head = [*keys, "batch", "length", "timed_model"]
    rows = []
    for point in points:
        timed = point["timed"] or {}
        cells = [*(point[key] for key in keys), *(timed.get(key) for key in ("batch", "length", "model"))]
        rows.append(["" if cell is None else cell for cell in cells])
    return csv_of(head, rows)


def csv_of(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """Lines of CSV."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([head, *rows])
    return out.getvalue()
