# SPDX-License-Identifier: Apache-2.0
"""``obs-kernels report``: what the folders and files of runs hold, as one report of plain values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from obs_kernels.errors import CheckpointFormatError, DataFormatError
from obs_kernels.patterns import NMPattern, VNMPattern, parse_pattern
from obs_kernels.report.bench import is_bench_result
from obs_kernels.report.bench_files import read_json, read_results
from obs_kernels.report.speed import accuracy_points, is_speed_result, joined
from obs_kernels.sparse.stored import SECTION, read_config, read_tensors, target_patterns

SECTIONS = ("model", "data", "train", "pruning", "accuracy", "comparison", "sizes", "packed", "config", "environment")
"""Of a run, shown in full where it is the only one."""
PANEL_ROWS, PANEL_COLS = 64, 64
"""Of the corner of a mask that is drawn."""
MOST_PANELS = 2


def gather(paths: Sequence[Path]) -> dict[str, Any]:
    """The report of job "report" over folders of ``prune`` and JSON files of prune, eval, demo, speed and the bench.

    With bench results alone it is that of job "bench", as before.

    Raises:
        DataFormatError: a path that holds nothing of these, or is broken.
    """
    runs, speeds, benches, notes, panels = list[dict[str, Any]](), list[Any](), list[Path](), list[str](), list[Any]()
    for path, folder in _files(paths):
        doc = read_json(path)
        name = folder.name if folder is not None else path.name
        if is_bench_result(doc):
            benches.append(path)
        elif is_speed_result(doc):
            speeds.append(doc)
        elif isinstance(doc, dict) and isinstance(doc.get("job"), str) and isinstance(doc.get("accuracy"), dict):
            runs.append({**doc, "name": name, "pattern": _pattern_of(doc)})
            if folder is not None and len(panels) < MOST_PANELS:
                panels += _panel(folder, doc)
        elif _is_comparison(doc):
            cells = list(doc["cells"].values())
            runs.append({"name": name, "model": name, "comparison": cells, "accuracy": {"dense": doc["dense"]}})
        else:
            notes.append(f"{path.name} left out: it is no result of prune, eval, demo, speed or bench.run")
    if not runs and not speeds:
        if not benches and notes:
            shown = ", ".join(map(str, paths))
            raise DataFormatError(
                f"files must hold at least one result of prune, eval, demo, speed or bench.run, got {shown}; "
                f"make one by obs-kernels speed --out FILE"
            )
        found = read_results(benches)
        return found | {"notes": [*notes, *found["notes"]]}
    bench = read_results(benches) if benches else {"bench": [], "files": []}
    points = joined(runs, speeds)
    notes += _doubts(runs, speeds, points)
    report = {
        "job": "report",
        "runs": [_row(run) for run in runs],
        "points": points,
        "speed": speeds,
        "panels": panels,
        "bench": bench["bench"],
        "files": bench["files"],
    }
    if len(runs) == 1:
        report |= {key: runs[0][key] for key in SECTIONS if runs[0].get(key)}
        notes = [*runs[0].get("notes", ()), *notes]
    for doc in speeds:
        notes += [note for note in doc.get("notes") or () if note not in notes]
    return report | {"notes": notes}


def _files(paths: Sequence[Path]) -> list[tuple[Path, Path | None]]:
    """(JSON file, folder of the run that it belongs to) of every path."""
    found: list[tuple[Path, Path | None]] = []
    for path in paths:
        if not path.is_dir():
            found.append((path, None))
            continue
        if not (path / "report.json").is_file():
            raise DataFormatError(f"folder {str(path)!r} has no report.json; give what obs-kernels prune wrote")
        found.append((path / "report.json", path))
        found += [(other, None) for other in sorted(path.glob("speed*.json"))]
    return found


def _pattern_of(doc: dict[str, Any]) -> str | None:
    """The pattern of a run: of its pruning, or of the packed folder that it evaluated."""
    known = (doc.get("pruning") or {}).get("pattern")
    if known is not None or not (Path(str(doc.get("model"))) / "config.json").is_file():
        return known
    try:
        patterns = target_patterns(read_config(Path(str(doc["model"]))).get(SECTION))
    except CheckpointFormatError:
        return None
    found = set(map(str, patterns.values()))
    return found.pop() if len(found) == 1 else None


def _is_comparison(doc: Any) -> bool:
    """Whether it compares cells of patterns and methods beside a dense model, as ``bench.oneshot_squad`` does."""
    cells = doc.get("cells") if isinstance(doc, dict) else None
    return (
        isinstance(cells, dict)
        and bool(cells)
        and isinstance(doc.get("dense"), dict)
        and all(isinstance(cell, dict) and "pattern" in cell for cell in cells.values())
    )


def _row(run: dict[str, Any]) -> dict[str, Any]:
    """A line of the table of runs."""
    accuracy, pruning = run.get("accuracy") or {}, run.get("pruning") or {}
    sizes, config = run.get("sizes") or {}, run.get("config") or pruning.get("config") or {}
    found = accuracy.get("pruned") or accuracy.get("model") or {}
    ratio = sizes["packed"] / sizes["dense"] if sizes.get("packed") and sizes.get("dense") else None
    return {
        "name": run["name"],
        "model": run.get("model"),
        "pattern": run.get("pattern"),
        "curvature": config.get("curvature"),
        "dense_f1": (accuracy.get("dense") or accuracy.get("baseline") or {}).get("f1"),
        "f1": found.get("f1"),
        "f1_share": found.get("f1_share"),
        "sparsity": pruning.get("sparsity"),
        "size": ratio,
        "seconds": pruning.get("seconds"),
    }


def _doubts(runs: Sequence[dict[str, Any]], speeds: Sequence[dict[str, Any]], points: Sequence[Any]) -> list[str]:
    """What a reader of the joined plot must know."""
    notes = []
    accuracy, timed = ({str(doc.get("model")) for doc in docs} for docs in (runs, speeds))
    if points and accuracy != timed:
        notes.append(
            f"accuracy is of {', '.join(sorted(accuracy))}, speed of {', '.join(sorted(timed))}: they are joined by "
            f"pattern, at the largest cell timed"
        )
    if runs and speeds:
        known = {point["pattern"] for point in points}
        alone = sorted({point["pattern"] for point in accuracy_points(runs)} - known)
        if alone:
            notes.append(f"no speed was measured for {', '.join(alone)}: not in the plot")
    return notes


def _panel(folder: Path, doc: dict[str, Any]) -> list[dict[str, Any]]:
    """The corner of the first pruned layer's mask, from the weights of the run's folder; none where it has none."""
    layers = (doc.get("pruning") or {}).get("layers") or []
    weights = folder / "dense"
    if not layers or not weights.is_dir():
        return []
    pattern = parse_pattern(layers[0]["pattern"])
    if not isinstance(pattern, NMPattern):
        return []
    try:
        weight = read_tensors(weights).get(f"{layers[0]['name']}.weight")
    except CheckpointFormatError:
        return []
    if weight is None or tuple(weight.shape) != tuple(layers[0]["shape"]):
        return []
    v = pattern.v if isinstance(pattern, VNMPattern) else 0
    rows, cols = max(PANEL_ROWS, v) if v else PANEL_ROWS // 4, max(PANEL_COLS // pattern.m, 1) * pattern.m
    corner = (weight[:rows, :cols] != 0).int().tolist()
    shape = list(weight.shape)
    return [
        {
            "layer": layers[0]["name"],
            "pattern": str(pattern),
            "m": pattern.m,
            "v": v,
            "rows": corner,
            "shape": shape,
        }
    ]


def write(folder: Path, report: dict[str, Any]) -> list[Path]:
    """The files of a report of ``gather``."""
    from obs_kernels.report.bench_files import write_reports
    from obs_kernels.report.merged import write_merged

    return write_reports(folder, report) if report["job"] == "bench" else write_merged(folder, report)
