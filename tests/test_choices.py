# SPDX-License-Identifier: Apache-2.0
"""The bench of the method's choices: what it would run, before a GPU runs it."""

from __future__ import annotations

import pytest

from bench import choices_squad
from obs_kernels.errors import ConfigError

STUDIES = ("row", "passes", "permutation")


def test_every_cell_has_settings() -> None:
    """Each with its own change; a run must not end at the first cell that is none."""
    cells = list(choices_squad._cells(STUDIES, 2))
    configs = [choices_squad.config(cell, num_grads=64, dampening_frac=0.01) for cell in cells]
    assert {cell["study"] for cell in cells} == set(STUDIES)
    for cell, cfg in zip(cells, configs, strict=True):
        assert str(cfg.pattern) == cell["pattern"] and cfg.seed == cell["seed"]
        assert cfg.curvature == ("row" if cell["D"] == "row" else "block") and cfg.sequential == (cell["D"] == "row")
        assert cfg.passes == (cell["value"] if cell["study"] == "passes" else 0)
    by_value = {cell["value"]: cfg for cell, cfg in zip(cells, configs, strict=True) if cell["study"] == "row"}
    plain = by_value.pop(choices_squad.AS_IT_IS)
    assert set(by_value) == set(choices_squad.ROW_CHANGES)
    for value, cfg in by_value.items():
        for name, wanted in choices_squad.ROW_CHANGES[value].items():
            assert getattr(cfg, name) == wanted != getattr(plain, name)


def test_only_what_is_asked_for_in_that_order() -> None:
    """A pattern is not taken for the end of another: 2:8 is not 64:2:8."""
    cells = choices_squad.chosen_cells(["row"], 1, ["2:8/four clusters", "64:2:8/8,192 questions", "four clusters"])
    assert [(cell["pattern"], cell["value"]) for cell in cells] == [
        ("2:8", "four clusters"),
        ("64:2:8", "8,192 questions"),
        ("2:4", "four clusters"),
        ("64:2:8", "four clusters"),
    ]
    assert {cell["value"] for cell in choices_squad.chosen_cells(STUDIES, 1, ["4:8"])} == {choices_squad.AS_IT_IS}
    assert choices_squad.chosen_cells(STUDIES, 2) == list(choices_squad._cells(STUDIES, 2))
    with pytest.raises(ConfigError, match=r"--only must be PATTERN.*got 'four cluster'; values: as it is; .*clusters"):
        choices_squad.chosen_cells(["row"], 1, ["four cluster"])


def test_changes_that_were_not_run_are_said() -> None:
    """Of the row study every change has a line, run or not; a pattern that is no part of a change is not run."""
    cell = {"study": "row", "pattern": "2:8", "D": "row", "value": "four clusters", "seed": 0, "f1": 61.0}
    cell |= {"predicted_loss": 0.25, "device": "cpu", "commit": "abc"}
    header = {"num_grads": 64, "dampening_frac": 0.01, "every": 1}
    text = choices_squad.to_markdown({"header": header, "dense_f1": 76.0, "cells": {"x": cell}})
    line = next(line for line in text.splitlines() if line.startswith("| four clusters |"))
    places = [i for i, part in enumerate(line.split("|")) if part.strip() not in ("", "four clusters", "not run")]
    assert len(places) == 2 and " 0.2500 " in line and " 61.00 " in line
    heads = next(line for line in text.splitlines() if line.startswith("| | predicted")).split("|")
    assert [heads[i].strip() for i in places] == ["predicted loss, 2:8", "F1, 2:8"]
    for value in (choices_squad.AS_IT_IS, *choices_squad.ROW_CHANGES):
        assert any(line.startswith(f"| {value} | ") for line in text.splitlines())
    assert text.count("Not run.") == 2
