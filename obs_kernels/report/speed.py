# SPDX-License-Identifier: Apache-2.0
"""Results of ``obs-kernels speed`` as tables of plain text, and what is joined of them and of accuracy."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from obs_kernels.report.bench import ratio_text
from obs_kernels.report.values import MISSING, cell_name, number

SPEED_TEXT = ("model", "pattern", "way")
"""Columns of ``speed_table`` that hold no numbers."""
_CSV_HEAD = (
    "model", "device", "dtype", "batch", "length", "pattern", "way", "us", "p20", "p80", "samples_per_s", "speedup",
    "predicted", "products", "linear_share", "peak_bytes", "joules", "packed_layers",
)  # fmt: skip


def is_speed_result(value: Any) -> bool:
    """Whether a JSON value is a report of ``obs-kernels speed``."""
    return isinstance(value, dict) and value.get("job") == "speed" and isinstance(value.get("cells"), list)


def speed_rows(doc: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A flat row for the dense model and for each sparse one of each cell."""
    rows = []
    for cell in doc["cells"]:
        for pattern, found in (("dense", cell["dense"]), *cell["sparse"].items()):
            rows.append(
                {
                    "model": doc.get("model"),
                    "device": (doc.get("environment") or {}).get("device"),
                    "dtype": doc.get("dtype"),
                    "batch": cell["batch"],
                    "length": cell["length"],
                    "pattern": pattern,
                    **{key: found.get(key) for key in ("way", "us", "p20", "p80", "samples_per_s", "speedup")},
                    "predicted": (found.get("predicted") or {}).get("speedup"),
                    "products": (found.get("predicted_here") or {}).get("speedup"),
                    **{key: found.get(key) for key in ("linear_share", "peak_bytes", "joules", "packed_layers")},
                }
            )
    return rows


def speed_table(doc: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(head, rows) of text; a column with nothing in any row is left out. A losing row says "slower"."""
    rows = speed_rows(doc)
    columns: list[tuple[str, list[str]]] = [
        ("batch", [str(row["batch"]) for row in rows]),
        ("length", [str(row["length"]) for row in rows]),
        ("pattern", [str(row["pattern"]) for row in rows]),
        ("way", [row["way"] or "failed" for row in rows]),
        ("ms", [number(_thousandth(row["us"]), ",.3f") for row in rows]),
        ("p20", [number(_thousandth(row["p20"]), ",.3f") for row in rows]),
        ("p80", [number(_thousandth(row["p80"]), ",.3f") for row in rows]),
        ("samples/s", [number(row["samples_per_s"], ",.1f") for row in rows]),
        ("× best dense", [ratio_text(row["speedup"]) for row in rows]),
        ("× by kernel rows", [number(row["predicted"], ".2f") for row in rows]),
        ("× by products", [number(row["products"], ".2f") for row in rows]),
        ("% in linear", [number(_percent(row["linear_share"]), ".0f") for row in rows]),
        ("peak MB", [number(_mega(row["peak_bytes"]), ",.0f") for row in rows]),
        ("J a call", [number(row["joules"], ".3g") for row in rows]),
        ("sparse layers", [number(row["packed_layers"], "d") for row in rows]),
    ]
    kept = [(head, cells) for head, cells in columns if any(cell != MISSING for cell in cells)]
    return [head for head, _ in kept], [list(row) for row in zip(*(cells for _, cells in kept), strict=True)]


def speed_facts(doc: Mapping[str, Any]) -> list[str]:
    """What stands above the table: device, versions, how it was measured, and what has no row."""
    env, config = doc.get("environment") or {}, doc.get("config") or {}
    lines = [
        f"{doc.get('weights')}, {doc.get('dtype')}, on {env.get('device')}; torch {env.get('torch')}, "
        f"transformers {env.get('transformers')}.",
        f"Ways: {', '.join(config.get('ways') or ())}; layers: {config.get('layers')}; "
        f"activation in the product: {config.get('fuse_ffn') or 'no'}. Medians; a row shows the fastest way.",
    ]
    for entry in doc.get("skipped") or ():
        lines.append(f"No row for batch {entry['batch']}, length {entry['length']}: {entry['why']}.")
    for cell in doc["cells"]:
        for name, found in (("dense", cell["dense"]), *cell["sparse"].items()):
            for way, why in (found.get("failed") or {}).items():
                lines.append(f"Batch {cell['batch']}, length {cell['length']}, {name}, {way}: no time: {why}.")
    reasons = {
        f"{name}: {why}"
        for cell in doc["cells"]
        for found in cell["sparse"].values()
        for name, why in (found.get("dense_layers") or {}).items()
    }
    if reasons:
        lines.append(f"Layers that stayed dense in some cell: {len(reasons)}, the first: {min(reasons)}.")
    return lines


def speed_csv(docs: Iterable[Mapping[str, Any]]) -> str:
    """The rows of several results as CSV."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_CSV_HEAD)
    for doc in docs:
        for row in speed_rows(doc):
            writer.writerow(["" if row[key] is None else row[key] for key in _CSV_HEAD])
    return out.getvalue()


def largest_cell(doc: Mapping[str, Any]) -> dict[str, Any] | None:
    """The cell of most tokens of a speed result."""
    cells: list[dict[str, Any]] = list(doc["cells"])
    return max(cells, key=lambda cell: cell["tokens"]) if cells else None


def best_speedups(docs: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """{pattern: its cell of most tokens}: {"speedup", "batch", "length", "model", "device"}.

    The largest call is where sparsity is meant to pay; the table beside the plot has all others.
    """
    best: dict[str, dict[str, Any]] = {}
    for doc in docs:
        for row in speed_rows(doc):
            if row["pattern"] == "dense" or row["speedup"] is None:
                continue
            known = best.get(row["pattern"])
            if known is None or row["batch"] * row["length"] > known["batch"] * known["length"]:
                best[row["pattern"]] = row
    return best


def accuracy_points(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Accuracy of each pruned model of the runs: {"pattern", "label", "f1", "share", "model"}, in percent."""
    points = []
    for run in runs:
        accuracy = run.get("accuracy") or {}
        found = accuracy.get("pruned") or accuracy.get("model")
        pattern = run.get("pattern") or (run.get("pruning") or {}).get("pattern")
        if found and pattern and isinstance(found.get("f1"), (int, float)):
            points.append(
                {
                    "pattern": str(pattern),
                    "label": str(run.get("name") or pattern),
                    "f1": found["f1"],
                    "share": found.get("f1_share"),
                    "model": run.get("model"),
                }
            )
        dense_f1 = (accuracy.get("dense") or {}).get("f1")
        for cell in run.get("comparison") or ():
            if isinstance(cell.get("f1"), (int, float)):
                share = cell.get("f1_share") or (100.0 * cell["f1"] / dense_f1 if dense_f1 else None)
                kind = f"{cell['curvature']}, " if cell.get("curvature") else ""
                label = f"{cell['pattern']} {kind}{cell_name(cell)}"
                points.append(
                    {
                        "pattern": str(cell["pattern"]),
                        "label": label,
                        "f1": cell["f1"],
                        "share": share,
                        "model": run.get("model"),
                    }
                )
    return points


def joined(runs: Sequence[Mapping[str, Any]], speeds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Points of accuracy against speed-up, by pattern; "front" is True where no other point is better in both.

    Accuracy ("value") is the share of the dense model's F1 where every point has one: runs may have been evaluated on
    different questions. Else it is F1.
    """
    best = best_speedups(speeds)
    points = [
        {**point, "speedup": best[point["pattern"]]["speedup"], "timed": best[point["pattern"]]}
        for point in accuracy_points(runs)
        if point["pattern"] in best
    ]
    f1 = next((run["accuracy"]["dense"]["f1"] for run in runs if (run.get("accuracy") or {}).get("dense")), None)
    if points and f1 is not None:
        points.append({"pattern": "dense", "label": "dense", "f1": f1, "share": 100.0, "speedup": 1.0, "timed": None})
    metric = "share" if all(point["share"] is not None for point in points) else "f1"
    for point in points:
        point |= {"metric": metric, "value": point[metric]}
    for point in points:
        point["front"] = not any(_beats(other, point) for other in points)
    return points


def _beats(one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
    no_worse = one["value"] >= two["value"] and one["speedup"] >= two["speedup"]
    return no_worse and (one["value"] > two["value"] or one["speedup"] > two["speedup"])


def _thousandth(value: Any) -> float | None:
    return value / 1e3 if isinstance(value, (int, float)) else None


def _mega(value: Any) -> float | None:
    return value / 1e6 if isinstance(value, (int, float)) else None


def _percent(value: Any) -> float | None:
    return 100 * value if isinstance(value, (int, float)) else None
