# SPDX-License-Identifier: Apache-2.0
"""``report.html``: one page with tables and plots that needs no other file, no script and no network."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from obs_kernels.errors import MissingDependencyError
from obs_kernels.report import bench, markdown, speed, speed_plots, values
from obs_kernels.report.markdown import report_title
from obs_kernels.report.plots import comparison_plot, layers_plot, roofline_plot

TEMPLATE = Path(__file__).with_name("template.html")
LIBRARIES = ("jinja2", "matplotlib")


def missing_libraries() -> list[str]:
    """Libraries that ``render_html`` needs and that are not installed."""
    return [name for name in LIBRARIES if find_spec(name) is None]


def render_html(report: dict[str, Any]) -> str:
    """One self-contained page.

    Args:
        report: plain values; every section is optional: "pruning" (``PruningReport.to_dict()``), "accuracy"
            ({"dense": {...}, "pruned": {...}}), "comparison" (list of ``CellResult.to_dict()``), "packed", "sizes"
            ({name: bytes}), "bench" (list of results of ``bench.run``), "config", "environment", "notes", the
            names "model", "data", "train", and of several runs "runs", "points" (``speed.joined``), "speed" (list of
            reports of ``obs-kernels speed``), "panels" (corners of masks). All text is escaped.

    Raises:
        MissingDependencyError: jinja2 or matplotlib is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise MissingDependencyError("report.html needs jinja2; pip install 'obs_kernels[report]'") from None
    pruning = report.get("pruning") or {}
    accuracy = report.get("accuracy") or {}
    cells = report.get("comparison") or []
    plots = {
        "layers": layers_plot(pruning["layers"]) if pruning.get("layers") else "",
        "comparison": comparison_plot(cells, (accuracy.get("dense") or {}).get("f1")) if cells else "",
    }
    points, speeds, panels = (report.get(key) or [] for key in ("points", "speed", "panels"))
    plots["tradeoff"] = speed_plots.tradeoff_plot(points) if points else ""
    benches = [_bench_section(doc, index) for index, doc in enumerate(report.get("bench") or ())]
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    page.filters.update(
        number=values.number,
        megabytes=values.megabytes,
        shape=values.shape_text,
        setting=values.setting,
        cell_name=values.cell_name,
        ratio=bench.ratio_text,
    )
    return page.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=report_title(report),
        sources={key: report[key] for key in ("model", "data", "train") if report.get(key)},
        facts=_facts(report),
        benches=benches,
        runs=markdown.runs_table(report["runs"]) if report.get("runs") else None,
        points=points,
        speeds=[_speed_section(doc, index) for index, doc in enumerate(speeds)],
        panels=[speed_plots.mask_plot(panel, name=f"mask{index}") for index, panel in enumerate(panels)],
        pruning=pruning,
        accuracy=accuracy,
        score_columns=values.score_columns(accuracy),
        cells=cells,
        packed=report.get("packed") or {},
        sizes=report.get("sizes") or {},
        notes=report.get("notes") or [],
        config=report.get("config") or pruning.get("config") or {},
        environment=report.get("environment") or pruning.get("environment") or {},
        plots=plots,
    )


def _bench_section(doc: dict[str, Any], index: int) -> dict[str, Any]:
    """What the page shows of one result of ``bench.run``."""
    head, rows = bench.bench_table(doc)
    drawn = roofline_plot(doc, name=f"roofline{index}") if bench.roofline_rows(doc) else ""
    return {
        "title": bench.bench_title(doc),
        "facts": bench.bench_facts(doc),
        "plot": drawn,
        "columns": [(name, name not in bench.TEXT_COLUMNS) for name in head],
        "rows": rows,
    }


def _speed_section(doc: dict[str, Any], index: int) -> dict[str, Any]:
    """What the page shows of one result of ``obs-kernels speed``."""
    head, rows = speed.speed_table(doc)
    cell = speed.largest_cell(doc)
    return {
        "title": f"Speed of {doc.get('model')}",
        "facts": speed.speed_facts(doc),
        "plot": speed_plots.layer_times_plot(cell, name=f"times{index}") if cell is not None else "",
        "columns": [(name, name not in speed.SPEED_TEXT) for name in head],
        "rows": rows,
    }


def _facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The few numbers that the page begins with."""
    accuracy, pruning = report.get("accuracy") or {}, report.get("pruning") or {}
    dense, pruned = accuracy.get("dense") or {}, accuracy.get("pruned") or {}
    sizes = report.get("sizes") or {}
    ratio = sizes["packed"] / sizes["dense"] if sizes.get("packed") and sizes.get("dense") else None
    found = [
        ("dense F1", values.number(dense.get("f1"), ".2f")),
        ("pruned F1", values.number(pruned.get("f1"), ".2f")),
        ("share of dense F1", f"{values.number(pruned.get('f1_share'), '.1f')} %"),
        ("sparsity", values.number(pruning.get("sparsity"), ".4f")),
        ("predicted loss increase", values.number(pruning.get("saliency"), ".4g")),
        ("packed / dense size", values.number(ratio, ".3f")),
    ]
    return [(name, text) for name, text in found if not text.startswith(values.MISSING)]
