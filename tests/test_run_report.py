# SPDX-License-Identifier: Apache-2.0
"""The report of a model: what is read of runs, how accuracy and speed are joined, and the files that are written."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import save_file
from test_report import EVIL, Page, layer

from obs_kernels.errors import DataFormatError
from obs_kernels.report import speed, speed_plots
from obs_kernels.report.html import render_html
from obs_kernels.report.markdown import render_markdown
from obs_kernels.run_report import gather, write

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")


def prune_doc(pattern: str, f1: float, **changes: Any) -> dict[str, Any]:
    first = layer("encoder.0.query") | {"pattern": pattern}
    return {
        "job": "prune",
        "model": "a model",
        "pruning": {"pattern": pattern, "layers": [first], "sparsity": 0.5, "seconds": 2.0, "stages": [pattern]},
        "accuracy": {
            "dense": {"f1": 80.0, "exact_match": 70.0, "questions": 10},
            "pruned": {"f1": f1, "f1_share": f1 / 0.8, "exact_match": 50.0, "questions": 10},
        },
        "sizes": {"dense": 100, "packed": 60},
        "notes": ["of the run"],
    } | changes


def measured(us: float, **more: Any) -> dict[str, Any]:
    keys = ("peak_bytes", "joules", "linear_share")
    return {"way": "graph", "us": us, "p20": us, "p80": us, "samples_per_s": 1e6 / us, "ways": {"graph": us}} | (
        {"failed": {}} | dict.fromkeys(keys) | more
    )


def speed_doc(times: dict[str, float], *, dense: float = 100.0, tokens: int = 64, **changes: Any) -> dict[str, Any]:
    sparse = {
        pattern: measured(us, speedup=dense / us, packed_layers=2, max_difference=0.0, dense_layers={},
                          predicted={"us": 1.0, "speedup": 1.5}, predicted_here=None, linear_share=0.25)
        for pattern, us in times.items()
    }  # fmt: skip
    kinds = [
        {"name": "encoder.*.query", "rows": 8, "cols": 8, "count": 3, "dense_us": 10.0, "sparse_us": 4.0},
        {"name": "encoder.*." + EVIL, "rows": 8, "cols": 16, "count": 3, "dense_us": None, "sparse_us": None},
    ]
    cell = {
        "batch": 2,
        "length": tokens // 2,
        "tokens": tokens,
        "dense": measured(dense, linear_share=0.5),
        "sparse": sparse,
        "layers": dict.fromkeys(times, kinds),
    }
    return {
        "job": "speed",
        "model": "a model",
        "dtype": "bf16",
        "weights": "random",
        "config": {"ways": ["graph"], "layers": "all", "fuse_ffn": None},
        "cells": [cell],
        "skipped": [{"batch": 9, "length": 9, "why": EVIL}],
        "environment": {"device": "a GPU", "torch": "2", "transformers": "5"},
        "notes": ["how it was timed"],
    } | changes


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two folders of prune, one with weights; a file of speed; one that is nothing."""
    gen = torch.Generator().manual_seed(0)
    for name, pattern, f1 in (("half", "2:4", 72.0), ("quarter", "4:2:8", 60.0)):
        (tmp_path / name / "dense").mkdir(parents=True)
        (tmp_path / name / "report.json").write_text(json.dumps(prune_doc(pattern, f1)))
        weight = torch.rand(32, 64, generator=gen)
        mask = torch.zeros(32, 64, dtype=torch.bool)
        mask.view(32, -1, 4)[:, :, 1:3] = True
        save_file({"encoder.0.query.weight": weight * mask}, tmp_path / name / "dense" / "model.safetensors")
    (tmp_path / "quarter" / "speed.json").write_text(json.dumps(speed_doc({"4:2:8": 50.0})))
    (tmp_path / "other.json").write_text('{"cells": {}}')
    (tmp_path / "speed.json").write_text(json.dumps(speed_doc({"2:4": 80.0, "2:8": 70.0})))
    return [tmp_path / name for name in ("half", "quarter", "other.json", "speed.json")]


def test_what_is_gathered(runs: list[Path]) -> None:
    report = gather(runs)
    assert report["job"] == "report" and [run["name"] for run in report["runs"]] == ["half", "quarter"]
    assert report["runs"][0] | {"seconds": 0} == {
        "name": "half", "model": "a model", "pattern": "2:4", "curvature": None, "dense_f1": 80.0, "f1": 72.0,
        "f1_share": 90.0, "sparsity": 0.5, "size": 0.6, "seconds": 0,
    }  # fmt: skip
    assert len(report["speed"]) == 2 and report["bench"] == []
    assert [panel["pattern"] for panel in report["panels"]] == ["2:4", "4:2:8"]
    assert report["panels"][0]["rows"][0][:8] == [0, 1, 1, 0] * 2 and len(report["panels"][0]["rows"]) == 16
    assert report["panels"][1]["v"] == 4 and len(report["panels"][1]["rows"]) == 32
    assert "other.json left out" in report["notes"][0] and "how it was timed" in report["notes"]
    assert "pruning" not in report  # several runs: none is shown in full
    alone = gather(runs[:1])
    assert alone["pruning"]["pattern"] == "2:4" and alone["notes"] == ["of the run"] and alone["points"] == []


def test_accuracy_and_speed_are_joined_by_pattern(runs: list[Path]) -> None:
    points = {point["label"]: point for point in gather(runs)["points"]}
    assert set(points) == {"half", "quarter", "dense"}
    assert points["half"]["speedup"] == 1.25 and points["quarter"]["speedup"] == 2.0
    assert all(point["front"] for point in points.values())
    assert {point["metric"] for point in points.values()} == {"share"} and points["half"]["value"] == 90.0


def test_the_front() -> None:
    """Nothing beats its members in both; equal ones both stand; the largest cell counts."""
    docs = [prune_doc("2:4", 72.0, name="a"), prune_doc("2:4", 72.0, name="b"), prune_doc("2:4", 60.0, name="c"),
            prune_doc("2:8", 70.0, name="d"), prune_doc("2:16", 90.0, name="e")]  # fmt: skip
    speeds = [speed_doc({"2:4": 80.0, "2:8": 90.0}), speed_doc({"2:4": 50.0}, tokens=32)]
    points = {point["label"]: point for point in speed.joined(docs, speeds)}
    assert {name for name, point in points.items() if point["front"]} == {"a", "b", "dense"}
    assert points["a"]["speedup"] == 1.25 and "e" not in points
    without = speed.joined([prune_doc("2:4", 70.0, accuracy={"pruned": {"f1": 70.0}})], speeds)
    assert without[0]["metric"] == "f1" and without[0]["value"] == 70.0


def test_doubts_are_told(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "half" / "report.json").write_text(json.dumps(prune_doc("2:16", 72.0, model="another")))
    notes = " ".join(gather(runs)["notes"])
    assert "accuracy is of a model, another, speed of a model: they are joined by pattern" in notes
    assert "no speed was measured for 2:16" in notes


def test_cells_of_a_comparison(tmp_path: Path) -> None:
    cells = {"x": {"pattern": "2:4", "method": "magnitude", "update": "none", "f1": 40.0}}
    (tmp_path / "c.json").write_text(json.dumps({"dense": {"f1": 80.0}, "cells": cells}))
    (tmp_path / "s.json").write_text(json.dumps(speed_doc({"2:4": 80.0})))
    points = gather([tmp_path / "c.json", tmp_path / "s.json"])["points"]
    assert points[0]["label"] == "2:4 magnitude, none" and points[0]["share"] == 50.0


def test_an_evaluation_knows_its_pattern_by_the_folder(tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    config = {"quantization_config": {"quant_method": "obs_kernels", "format_version": 1, "pattern": "2:4",
                                      "targets": ["a", "b"]}}  # fmt: skip
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    doc = {"job": "eval", "model": str(tmp_path / "packed"), "accuracy": {"model": {"f1": 60.0, "f1_share": 75.0}}}
    (tmp_path / "eval.json").write_text(json.dumps(doc))
    (tmp_path / "speed.json").write_text(json.dumps(speed_doc({"2:4": 80.0})))
    report = gather([tmp_path / "eval.json", tmp_path / "speed.json"])
    assert report["runs"][0]["pattern"] == "2:4" and [p["value"] for p in report["points"]] == [75.0]
    config["quantization_config"]["format_version"] = 7
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    assert gather([tmp_path / "eval.json"])["runs"][0]["pattern"] is None


@pytest.mark.parametrize("name", ["report.md", "report.html"])
def test_the_page(runs: list[Path], name: str) -> None:
    report = gather(runs)
    text = render_html(report) if name.endswith("html") else render_markdown(report)
    for word in ("Report: a model", "Accuracy against speed-up", "half", "1.25", "Speed of a model", "graph", "1.50",
                 "how it was timed"):  # fmt: skip
        assert word in text
    if name.endswith("html"):
        page = Page(text)
        assert not page.open and page.tags.count("svg") == 1 + 2 + 2 and "<script" not in text
        ids = [value for key, value in page.attributes if key == "id"]
        assert len(ids) == len(set(ids))
        assert not {"script", "link", "img", "iframe"} & set(page.tags)
        for key, value in page.attributes:
            assert key not in ("src", "href", "xlink:href") or value.startswith("#")


def test_a_losing_cell_says_so() -> None:
    head, rows = speed.speed_table(speed_doc({"2:4": 125.0}))
    assert rows[1][head.index("× best dense")] == "0.80 slower" and rows[0][head.index("% in linear")] == "50"
    assert "peak MB" not in head and "J a call" not in head  # nothing measured, no column
    full = speed_doc({"2:4": 80.0})
    full["cells"][0]["sparse"]["2:4"] |= {"peak_bytes": 3e6, "joules": 1.5}
    head, rows = speed.speed_table(full)
    assert rows[1][head.index("peak MB")] == "3" and rows[1][head.index("J a call")] == "1.5"


def test_facts_name_what_has_no_row() -> None:
    doc = speed_doc({"2:4": 80.0})
    doc["cells"][0]["dense"]["failed"] = {"compiled": "no compiler"}
    doc["cells"][0]["sparse"]["2:4"]["dense_layers"] = {"a.b": "dense is faster"}
    text = " ".join(speed.speed_facts(doc))
    for word in ("batch 9, length 9", "dense, compiled: no time: no compiler", "a.b: dense is faster"):
        assert word in text


def test_times_of_layers_add_up() -> None:
    cell = speed_doc({"2:4": 80.0, "2:8": 70.0})["cells"][0]
    table = speed_plots.layer_times(cell)
    assert table[0]["us"] == {"dense": 30.0, "2:4": 12.0, "2:8": 12.0} and table[1]["us"] == {}
    lines = list(csv.reader(speed_plots.layer_times_csv(cell).splitlines()))
    assert lines[0] == ["layer", "rows", "cols", "dense", "2:4", "2:8"] and lines[1][3:] == ["30.0", "12.0", "12.0"]


@pytest.mark.parametrize(("v", "marks"), [(0, 1), (4, 1)])
def test_a_mask_has_a_square_for_each_kept_weight(v: int, marks: int) -> None:
    rows = [[1, 0, 0, 1, 0, 0, 0, 1], [0, 0, 1, 1, 0, 1, 0, 0]] * 4
    panel = {"layer": EVIL, "pattern": "2:4", "m": 4, "v": v, "rows": rows, "shape": [8, 8]}
    drawn = str(speed_plots.mask_plot(panel))
    root = ElementTree.fromstring(drawn)
    squares = [e.get("d", "") for e in root.iter() if e.tag.endswith("path") and e.get("d", "").count("M") > 8]
    assert len(squares) == marks and squares[0].count("M") == sum(map(sum, rows))
    assert drawn == str(speed_plots.mask_plot(panel))
    empty = speed_plots.mask_plot(panel | {"rows": [[0] * 8] * 4})
    assert "<svg" in str(empty)


def test_the_files(runs: list[Path], tmp_path: Path) -> None:
    report = gather(runs)
    written = write(tmp_path / "out", report)
    plots = [f"{stem}.{kind}" for stem in ("tradeoff", "layer_times-1", "layer_times-2", "mask-1", "mask-2")
             for kind in ("csv", "png", "svg")]  # fmt: skip
    names = sorted(["report.md", "report.html", "speed.csv", *plots])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert sorted(path.name for path in written) == names
    for path in (tmp_path / "out").glob("*.svg"):
        ElementTree.parse(path)
        assert "currentColor" not in path.read_text()
    rows = list(csv.DictReader((tmp_path / "out" / "speed.csv").open()))
    assert [row["pattern"] for row in rows] == ["dense", "4:2:8", "dense", "2:4", "2:8"]
    assert [float(row["speedup"]) for row in rows if row["speedup"]] == [2.0, 1.25, pytest.approx(100 / 70)]
    points = list(csv.DictReader((tmp_path / "out" / "tradeoff.csv").open()))
    assert {point["label"] for point in points} == {"half", "quarter", "dense"}


def test_the_command(runs: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from obs_kernels.cli import app

    run: Callable[..., Any] = lambda *words: CliRunner().invoke(app, ["report", *map(str, words)])  # noqa: E731
    done = run(*runs, "--out", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout)["written"]) == 18
    shown = run(*runs)
    assert shown.exit_code == 0 and "half" in shown.stdout and "speed of a model" in shown.stdout


def test_folders_that_hold_no_run(tmp_path: Path) -> None:
    with pytest.raises(DataFormatError, match=r"has no report\.json"):
        gather([tmp_path])
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(DataFormatError, match="at least one result"):
        gather([tmp_path / "x.json"])
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(DataFormatError, match="must be a JSON file"):
        gather([tmp_path])


@pytest.mark.parametrize("damage", ["no weights", "another shape", "no file", "no mask"])
def test_a_run_without_a_panel(runs: list[Path], tmp_path: Path, damage: str) -> None:
    path = tmp_path / "half" / "dense" / "model.safetensors"
    match damage:
        case "no weights":
            save_file({"other": torch.zeros(1)}, path)
        case "another shape":
            save_file({"encoder.0.query.weight": torch.zeros(4, 4)}, path)
        case "no file":
            path.write_bytes(b"x")
        case _:
            doc = prune_doc("unstructured:0.5", 70.0)
            (tmp_path / "half" / "report.json").write_text(json.dumps(doc))
    assert gather(runs[:1])["panels"] == []
