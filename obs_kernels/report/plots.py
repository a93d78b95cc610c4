# SPDX-License-Identifier: Apache-2.0
"""Plots of a report as inline SVG: text and axes take the colour of the page, so they read on light and dark.

matplotlib is imported inside the functions; figures are made without pyplot, so no global state is touched.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from obs_kernels.errors import MissingDependencyError
from obs_kernels.report.bench import intensity, roofline_rows
from obs_kernels.report.values import cell_name, common_prefix

_INK = "#010203"
"""Drawn in place of the text colour of the page."""
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#9a8f00", "#888888")
"""Okabe and Ito's, which colour-blind readers can tell apart."""
_PEER_COLOURS = ("#d55e00", "#888888", "#cc3311")
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "obs_kernels",
    "text.parse_math": False,  # a $ in a layer name is a $
    "font.family": "sans-serif",
    "font.size": 9.0,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_MOST_SERIES = len(_COLOURS)
_FORCED = "forced record"


def layers_plot(layers: Sequence[dict[str, Any]], *, file_format: str = "svg") -> str | bytes:
    """Sparsity and predicted loss increase of every layer, as bars side by side.

    Args:
        layers: of ``PruningReport.to_dict()``.
        file_format: "svg" gives a string for a page; "png" gives the bytes of a file.
    """

    def draw(figure: Any) -> None:
        names = [str(layer["name"]) for layer in layers]
        prefix = common_prefix(names)
        places = list(range(len(layers)))
        saliency = [_finite_or_zero(layer["saliency"]) for layer in layers]
        left, right = figure.subplots(1, 2, sharey=True)
        left.barh(places, [layer["sparsity"] for layer in layers], color=_COLOURS[0], height=0.7)
        left.set(xlim=(0, 1), xlabel="sparsity", yticks=places, ylim=(len(layers) - 0.4, -0.6))
        left.set_yticklabels([name.removeprefix(prefix) for name in names])
        right.barh(places, saliency, color=_COLOURS[1], height=0.7)
        right.set_xlabel("predicted loss increase")
        positive = [value for value in saliency if value > 0]
        if positive and max(positive) > 100 * min(positive):
            right.set_xscale("log")
            right.xaxis.set_major_formatter(lambda value, _: f"{value:.0e}")  # the default writes mathtext, off here
        for axes in (left, right):
            axes.grid(axis="x", color=_INK, alpha=0.15)
            axes.set_axisbelow(True)
        if prefix:
            left.set_title(f"layers of {prefix.removesuffix('.')}", loc="left", fontsize=9)

    return _render(draw, (9.5, 1.0 + 0.2 * max(3, len(layers))), "layers", file_format)


def comparison_plot(
    cells: Sequence[dict[str, Any]], dense_f1: float | None = None, *, file_format: str = "svg"
) -> str | bytes:
    """F1 by pattern (groups) and method with update (bars), and a line at the dense model's F1.

    With more than eight kinds of bars, each method shows its best one.

    Args:
        cells: of ``CellResult.to_dict()``; any subset of patterns and methods.
        dense_f1: F1 of the dense model, in percent.
        file_format: as in ``layers_plot``.
    """
    patterns = list(dict.fromkeys(str(cell["pattern"]) for cell in cells))
    best_only = len({cell_name(cell) for cell in cells}) > _MOST_SERIES
    series: dict[str, dict[str, float]] = {}
    for cell in cells:
        row = series.setdefault(str(cell["method"]) if best_only else cell_name(cell), {})
        row[str(cell["pattern"])] = max(row.get(str(cell["pattern"]), 0.0), _finite_or_zero(cell["f1"]))

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        width = 0.8 / max(1, len(series))
        for index, (name, row) in enumerate(series.items()):
            places = [p - 0.4 + width * (index + 0.5) for p, pattern in enumerate(patterns) if pattern in row]
            colour = _COLOURS[index % len(_COLOURS)]
            axes.bar(places, [row[p] for p in patterns if p in row], width * 0.92, label=name, color=colour)
        if dense_f1 is not None and math.isfinite(dense_f1):
            axes.axhline(dense_f1, color=_INK, linestyle="--", linewidth=1, label=f"dense, {dense_f1:.1f}")
        axes.set(ylim=(0, 105), ylabel="F1, %", xticks=range(len(patterns)))
        axes.set_xticklabels(patterns)
        axes.grid(axis="y", color=_INK, alpha=0.15)
        axes.set_axisbelow(True)
        if best_only:
            axes.set_title("best update and recomputations of each method", loc="left", fontsize=9)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)

    return _render(draw, (min(16.0, 5.5 + 1.1 * len(patterns)), 4.0), "comparison", file_format)


def roofline_plot(doc: dict[str, Any], *, file_format: str = "svg", name: str = "roofline") -> str | bytes:
    """Achieved TFLOP/s over operations a byte, both logarithmic, under the two ceilings: one mark a row.

    Args:
        doc: a result of ``bench.run``; on a CPU the plot says so.
        file_format: as in ``layers_plot``.
        name: begins the ids of the SVG; plots of one page need different ones.
    """
    rows = roofline_rows(doc)
    copy, rate = doc["ceilings"]["copy_gbps"] / 1e3, doc["ceilings"]["matmul_tflops"]  # TB/s, TFLOP/s
    series: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        xs, ys = series.setdefault(_series_name(row), ([], []))
        xs.append(float(intensity(row) or 0))
        ys.append(float(row["tflops"]))
    ordered = sorted(series, key=lambda key: key.startswith("peer: "))

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        xs = [x for points in series.values() for x in points[0]]
        low, high = min(xs) / 2, max(*xs, rate / copy) * 3
        axes.plot([low, rate / copy, high], [low * copy, rate, rate], color=_INK, linewidth=1.2)
        colours: dict[str, str] = {}  # a backend has one colour, whatever the kind of its mark
        for key in ordered:
            peer = key.startswith("peer: ")
            who = key if peer else key.split(",")[0]
            palette = _PEER_COLOURS if peer else _COLOURS[:5]
            drawn_before = sum(known.startswith("peer: ") == peer for known in colours)
            colour = colours.setdefault(who, palette[drawn_before % len(palette)])
            hollow = key.endswith(", call")
            axes.scatter(
                *series[key],
                s=12 if _FORCED in key else 24,
                label=key,
                marker="x" if peer else "^" if _FORCED in key else "o",
                facecolors="none" if hollow else colour,
                edgecolors=None if peer else colour,
                linewidths=1.0,
                alpha=0.85,
                zorder=4 if peer else 3,  # a thin cross on a disc leaves both to be seen
            )
        axes.set(xscale="log", yscale="log", xlim=(low, high), xlabel="operations a byte", ylabel="TFLOP/s")
        axes.xaxis.set_major_formatter(_plain_power)
        axes.yaxis.set_major_formatter(_plain_power)
        axes.grid(color=_INK, alpha=0.12)
        axes.set_axisbelow(True)
        roofs = f"copy {copy * 1e3:,.0f} GB/s, product {rate:,.3g} TFLOP/s"
        where = "CPU" if doc["env"]["label"] == "CPU" else doc["env"]["device"]
        axes.set_title(
            f"{', '.join(dict.fromkeys(row['op'] for row in rows))}, {where}; roof: {roofs}", loc="left", fontsize=9
        )
        figure.legend(loc="outside lower left", ncols=3, frameon=False)

    return _render(draw, (8.5, 4.8), name, file_format)


def _series_name(row: dict[str, Any]) -> str:
    config = row["config"]
    if "peer" in config:
        return f"peer: {config['peer']}"
    name = str(config.get("backend", row["path"])) + (f", {_FORCED}" if config.get("forced") else "")
    return name if row["path"] == "kernel" else f"{name}, {row['path']}"


def _plain_power(value: float, _: Any) -> str:
    """1e-06 as text: the default of a logarithmic axis is mathtext, which is off here."""
    return f"{value:g}" if 1e-3 <= value < 1e5 else f"{value:.0e}"


def _render(draw: Callable[[Any], None], size: tuple[float, float], name: str, file_format: str) -> str | bytes:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError("plots need matplotlib; pip install 'obs_kernels[report]'") from None
    buffer = io.BytesIO()
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        if file_format == "png":
            figure.savefig(buffer, format="png", dpi=110, facecolor="white")
            return buffer.getvalue()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _inline(buffer.getvalue().decode(), name)


def _inline(svg: str, name: str) -> str:
    """The svg element alone, with ids that no other plot of the page has, scaled by the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    svg = re.sub(r'(<svg[^>]*?) width="([\d.]+)pt" height="[\d.]+pt"', r'\1 style="max-width: \2pt"', svg, count=1)
    return svg.replace(_INK, "currentColor")


def _finite_or_zero(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0.0
