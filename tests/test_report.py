# SPDX-License-Identifier: Apache-2.0
"""The HTML page, the plots and the Markdown: self-contained, escaped, and whole with any part of the sections."""

from __future__ import annotations

import csv
import json
import re
import sys
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from obs_kernels.errors import MissingDependencyError
from obs_kernels.report import bench, plots, tables, values
from obs_kernels.report.html import missing_libraries, render_html
from obs_kernels.report.markdown import render_markdown

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

EVIL = '<script>alert("$x^2$ & co | more")</script>'


def layer(name: str, saliency: float = 0.5) -> dict[str, Any]:
    return {
        "name": name,
        "shape": (32, 64),
        "pattern": "2:4",
        "sparsity": 0.5,
        "saliency": saliency,
        "damp": 1e-4,
        "blocks_raised": 0,
        "outcome": "pruned",
        "seconds": 0.25,
    }


def cell(pattern: str, method: str, update: str = "joint", f1: float = 50.0, parts: int = 1) -> dict[str, Any]:
    return {
        "pattern": pattern,
        "method": method,
        "update": update,
        "recomputations": parts,
        "exact_match": 40.0,
        "f1": f1,
        "f1_share": 60.0,
        "predicted_loss": float("nan"),
        "sparsity": 0.5,
        "violations": 0,
        "num_grads": 8,
        "block_size": 8,
        "seconds_prune": 1.0,
        "seconds_eval": 2.0,
    }


@pytest.fixture
def report() -> dict[str, Any]:
    return {
        "job": "prune",
        "model": EVIL,
        "data": "dev.json",
        "pruning": {
            "pattern": "2:4",
            "config": {"pattern": "2:4", "targets": ["Linear"], "damp": None, "global_sparsity": False},
            "layers": [
                layer("encoder.0.query"),
                layer("encoder.0." + EVIL, 1e-4),
                layer("encoder.1.key", float("nan")),
            ],
            "num_grads": 64,
            "stages": ["2:4"],
            "saliency": float("nan"),
            "sparsity": 0.5,
            "seconds": 3.0,
            "skipped": [("qa_outputs", "ignored")],
            "environment": {"torch": "2", "device": "cpu"},
        },
        "accuracy": {
            "dense": {"exact_match": 80.0, "f1": 88.0, "questions": 1234, "seconds": 1.0},
            "pruned": {"exact_match": 70.0, "f1": 77.5, "f1_share": 88.07, "questions": 1234, "seconds": 1.0},
        },
        "comparison": [cell("2:4", "magnitude", "none", 30.0), cell("2:4", EVIL), cell("64:2:8", "combinatorial")],
        "sizes": {"dense": 2_000_000, "packed": 1_250_000},
        "packed": {"max_difference": 1e-6},
        "notes": [EVIL, "a second note"],
        "environment": {"torch": "2", "device": EVIL},
    }


def bench_row(peer: str | None = None, *, us: float, op: str = "op_", **other: Any) -> dict[str, Any]:
    return {
        "op": op,
        "shape": {"B": 100, "D": 8},
        "pattern": None,
        "dtype": "f32",
        "path": "kernel",
        "config": {"peer": peer} if peer else {"backend": "triton", "path": EVIL, "blocks": 7},
        "us": us,
        "p20": us,
        "p80": us,
        "gbps": 8000 / us,
        "tflops": 40 / us,
        "limit_share": 2 / us,
        "x_dense": None,
        "x_peer": {} if peer else {"torch | it": 5 / us},
        "ok": True,
        **other,
    }


@pytest.fixture
def bench_doc() -> dict[str, Any]:
    """A result as ``bench.run`` writes it."""
    keys = ("compute_capability", "driver", "cuda", "triton", "commit", "dirty", "clocks")
    return {
        "env": dict.fromkeys(keys)
        | {"label": "CPU", "device": EVIL, "torch": "2", "python": "3", "date": "today"}
        | {"unavailable": {"op_": {"cuda": "no GPU"}}},
        "ceilings": {"copy_gbps": 4000.0, "matmul_tflops": 800.0},
        "command": "python -m bench.run",
        "rows": [
            bench_row(us=10.0),
            bench_row(us=4.0, path="call"),
            bench_row("torch | it", us=5.0),
            bench_row(us=1e6, op="job", path="model", p20=None, p80=None, gbps=None, parts={"first": 7e5, "then": 3e5}),
        ],
        "refused": [{"op": "op_", "shape": {"B": 1}, "variant": "cuda", "why": "error 2 is above 1"}],
        "skipped": [],
    }


class Page(HTMLParser):
    """Elements, attributes and visible text of a page; open elements must be closed."""

    VOID = ("meta", "br", "link", "img", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_needs_nothing_else(report: dict[str, Any]):
    text = render_html(report)
    page = Page(text)
    assert not page.open and text.startswith("<!DOCTYPE html>")
    assert not {"script", "link", "iframe", "object", "img", "base", "form"} & set(page.tags)
    for key, value in page.attributes:
        if key in ("src", "href", "xlink:href", "action", "srcset"):
            assert value.startswith("#"), (key, value)
        assert not key.startswith("on")
    assert "@import" not in text and not re.search(r"url\((?!#)", text)


def test_names_are_escaped_and_still_read(report: dict[str, Any]):
    text = render_html(report)
    page = Page(text)
    assert "<script" not in text
    shown = "".join(page.text)
    assert shown.count(EVIL) >= 6, "model, layer, method in table and plot, note, environment"
    assert "encoder.0." + EVIL in shown and "qa_outputs" in shown


def test_ids_are_unique_and_links_resolve(report: dict[str, Any]):
    page = Page(render_html(report))
    ids = [value for key, value in page.attributes if key == "id"]
    assert len(ids) == len(set(ids)) > 10
    linked = {v[1:] for k, v in page.attributes if k in ("href", "xlink:href")}
    linked |= {found for _, value in page.attributes for found in re.findall(r"url\(#([^)]+)\)", value)}
    assert linked and linked <= set(ids)


def test_figures_of_the_page(report: dict[str, Any]):
    shown = " ".join("".join(Page(render_html(report)).text).split())
    for text in ("77.50", "88.1 %", "1,234", "0.625", "1.2 MB", "left out: ignored", "64 gradients", "1e-06"):
        assert text in shown, text
    assert "nan" not in shown.lower() and values.MISSING in shown


@pytest.mark.parametrize("chosen", list(product((False, True), repeat=4)))
def test_any_part_of_the_sections(report: dict[str, Any], chosen: tuple[bool, ...]):
    keys = ("pruning", "accuracy", "comparison", "sizes")
    part = {key: report[key] for key, wanted in zip(keys, chosen, strict=True) if wanted}
    page = Page(render_html(part))
    assert not page.open and page.tags.count("svg") == chosen[0] + chosen[2]
    assert render_markdown(part).startswith("# ")


def test_the_report_of_a_pruning_alone(tmp_path: Path):
    """What ``PruningReport.save`` writes."""
    import torch
    from torch import nn

    from obs_kernels import OBSConfig, sparsify_

    config = OBSConfig(pattern="2:4", method="magnitude", update="none", curvature="block")
    done = sparsify_(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), config, None, None)
    text = done.save(tmp_path / "report.html").read_text()
    assert "Pruning report: 2:4" in text and "<svg" in text and torch.__version__ in text


def test_plots_take_the_colour_of_the_page(report: dict[str, Any]):
    drawn = plots.layers_plot(report["pruning"]["layers"])
    assert isinstance(drawn, str) and drawn.startswith("<svg") and "currentColor" in drawn and plots._INK not in drawn
    assert "#000000" not in drawn and "<metadata" not in drawn
    ElementTree.fromstring(drawn)
    assert drawn == plots.layers_plot(report["pruning"]["layers"]), "the same report gives the same page"
    as_png = plots.layers_plot(report["pruning"]["layers"], file_format="png")
    assert isinstance(as_png, bytes) and as_png.startswith(b"\x89PNG")


def test_the_comparison_shows_dense_and_at_most_eight_kinds(report: dict[str, Any]):
    few = str(plots.comparison_plot(report["comparison"], 88.0))
    assert "dense, 88.0" in few and "magnitude, none" in few and "best update" not in few
    methods, updates = ("magnitude", "diagonal", "combinatorial"), ("none", "single", "joint")
    many = [cell("2:4", m, u, parts=p) for m, u, p in product(methods, updates, (1, 4))]
    drawn = str(plots.comparison_plot(many, None))
    assert "best update" in drawn and "dense" not in drawn
    assert all(f">{name}<" in drawn for name in methods) and "recomputations<" not in drawn.replace("and recomp", "")


def test_markdown_tables_are_whole(report: dict[str, Any]):
    text = render_markdown(report)
    assert text.startswith("# Pruning report: 2:4\n") and text.endswith("\n") and "nan" not in text
    width = 0
    for line in text.splitlines():
        cells = re.split(r"(?<!\\)\|", line) if line.startswith("|") else []
        assert not cells or not width or len(cells) == width, line
        width = len(cells)
    for heading in ("Accuracy", "Comparison", "Sizes", "Layers", "Notes", "Settings", "Environment"):
        assert f"\n## {heading}\n" in text
    assert "- left out: qa_outputs: ignored" in text and "| pruned | 70.00 | 77.50 | 88.1 | 1,234 | 1.0 |" in text


def test_json_that_every_parser_reads():
    text = values.json_text({"a": float("nan"), "b": [float("inf"), 1.5, (2, None)], 3: True})
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == {
        "a": None,
        "b": [None, 1.5, [2, None]],
        "3": True,
    }


@pytest.mark.parametrize(
    ("value", "spec", "text"),
    [(1.234, ".2f", "1.23"), (None, ".2f", "–"), (float("nan"), ".2f", "–"), (12345, ",d", "12,345"), (True, "d", "–")],
)
def test_numbers(value: Any, spec: str, text: str):
    assert values.number(value, spec) == text


@pytest.mark.parametrize(
    ("names", "prefix"),
    [(["a.b.c", "a.b.d"], "a.b."), (["a.b", "a.b.c"], "a."), (["a"], ""), (["x.y", "z.y"], ""), ([], "")],
)
def test_common_prefix(names: list[str], prefix: str):
    assert values.common_prefix(names) == prefix


def test_memory_of_each_pass():
    rows = [{"group": g, "fisher_bytes": b} for g, b in ((0, 1_000_000), (0, 2_000_000), (1, 5_000_000), (-1, 0))]
    plan = {"layers": rows, "budget": 6_000_000, "num_weights": 1234, "layer_by_layer": False, "way": "in words"}
    lines = tables.memory_lines(plan)
    assert lines[:2] == ["pass 1 of 2: 2 layers, Fisher 3.0 MB", "pass 2 of 2: 1 layers, Fisher 5.0 MB"]
    assert lines[2] == "1,234 weights; peak of the Fisher 5.0 MB, budget 6.0 MB"
    assert tables.memory_lines(plan | {"layer_by_layer": True}) == ["in words", lines[2]]
    free = [row | {"fisher_bytes": 0} for row in rows]
    assert tables.memory_lines(plan | {"layers": free})[0] == "in words"


@pytest.mark.parametrize("name", ["jinja2", "matplotlib"])
def test_a_missing_library_is_named_with_its_fix(name: str, report: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, name, None)
    if name == "matplotlib":
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=rf"{name}.*obs_kernels\[report\]"):
        render_html(report)
    assert name in missing_libraries()


def test_a_logarithmic_axis_has_plain_labels() -> None:
    """The default formatter writes mathtext, which is off so that a $ in a name stays one."""
    rows = [{"name": f"layer{i}", "sparsity": 0.5, "saliency": 10.0**-i} for i in range(6)]
    svg = plots.layers_plot(rows)
    assert isinstance(svg, str) and "mathdefault" not in svg and "1e-04" in svg


# results of the bench


def test_a_bench_result_in_markdown(bench_doc: dict[str, Any]):
    text = render_markdown({"job": "bench", "bench": [bench_doc], "notes": ["x.json left out"]})
    assert text.startswith("# Kernel bench\n") and "on the CPU" in text and "- x.json left out" in text
    assert "copy 4,000.0 GB/s" in text and "op_: no cuda rows: no GPU." in text
    assert "RED, no row: op_ B=1, cuda: error 2 is above 1." in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.split(r"(?<!\\)\|", line)) for line in lines}) == 1, "whole tables"
    assert "0.50 slower" in lines[2] and "1.25" in lines[3] and "first 700.0 ms, then 300.0 ms" in lines[5]
    assert "---: |" in lines[1] and lines[1].startswith("| --- | --- |")


def test_a_bench_result_on_a_page(bench_doc: dict[str, Any]):
    text = render_html({"job": "bench", "bench": [bench_doc, bench_doc]})
    page = Page(text)
    assert not page.open and page.tags.count("svg") == 2 and "<script" not in text
    ids = [value for key, value in page.attributes if key == "id"]
    assert len(ids) == len(set(ids)) > 10, "two plots of one page share no id"
    shown = "".join(page.text)
    assert "Kernel bench" in shown and "0.50 slower" in shown and shown.count("× torch | it") == 2 and EVIL in shown


def test_a_bench_result_on_a_terminal(bench_doc: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    tables.print_report({"job": "bench", "bench": [bench_doc], "notes": ["a note"], "written": ["report.md"]})
    shown = capsys.readouterr().out
    assert (
        "on the CPU" in shown and "0.50 slower" in shown and "note: a note" in shown and "written: report.md" in shown
    )


def test_the_roofline_has_a_mark_for_every_row_and_says_cpu(bench_doc: dict[str, Any]):
    drawn = str(plots.roofline_plot(bench_doc))
    assert "CPU; roof" in drawn and "triton, call" in drawn and "peer: torch | it" in drawn and "job" not in drawn
    bench_doc["env"] |= {"label": "GPU", "device": "NVIDIA H100"}
    drawn = str(plots.roofline_plot(bench_doc))
    assert "NVIDIA H100" in drawn and "CPU" not in drawn and "mathdefault" not in drawn
    assert isinstance(plots.roofline_plot(bench_doc, file_format="png"), bytes)


def test_csv_of_a_bench_result(bench_doc: dict[str, Any]):
    rows = list(csv.DictReader(bench.csv_text(bench_doc).splitlines()))
    assert (
        len(rows) == 4 and rows[0]["B"] == "100" and float(rows[0]["us"]) == 10.0 and rows[0]["x torch | it"] == "0.5"
    )
    assert float(rows[0]["flops_per_byte"]) == pytest.approx(5.0) and rows[3]["flops_per_byte"] == rows[3]["p20"] == ""


def report_command(*arguments: object) -> Any:
    from typer.testing import CliRunner

    from obs_kernels.cli import app

    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_the_command_writes_all_it_names(bench_doc: dict[str, Any], tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "op.json").write_text(json.dumps(bench_doc))
    (tmp_path / "other.json").write_text('{"cells": {}}')
    (tmp_path / "plain.json").write_text(json.dumps(bench_doc | {"rows": bench_doc["rows"][3:]}))
    files = [tmp_path / name for name in ("a/op.json", "b/op.json", "other.json", "plain.json")]
    done = report_command(*files, "--out", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    plots_of = [f"op-{i}.{kind}" for i in (1, 2) for kind in ("csv", "png", "svg")]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        ["report.md", "report.html", "plain.csv", *plots_of]
    )
    assert {Path(path).name for path in found["written"]} == {path.name for path in (tmp_path / "out").iterdir()}
    assert found["files"] == ["op.json", "op.json", "plain.json"] and "other.json left out" in found["notes"][0]
    assert "currentColor" not in (tmp_path / "out" / "op-1.svg").read_text()
    ElementTree.parse(tmp_path / "out" / "op-1.svg")
    shown = report_command(files[0])
    assert shown.exit_code == 0 and "0.50 slower" in shown.stdout and not list(tmp_path.glob("*.md"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("not json", "must be a JSON file"),
        (None, "check the path"),
        ('{"cells": {}}', "at least one result"),
        ('{"rows": [], "ceilings": {}}', "env is missing"),
    ],
)
def test_files_that_are_no_result(text: str | None, said: str, tmp_path: Path):
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    done = report_command(path, "--out", tmp_path / "out")
    assert done.exit_code == 1 and "DataFormatError" in done.stderr and said in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()
