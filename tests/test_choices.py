# SPDX-License-Identifier: Apache-2.0
"""The bench of the method's choices: what it would run, before a GPU runs it."""

from __future__ import annotations

from bench import choices_squad

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
