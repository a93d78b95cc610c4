# SPDX-License-Identifier: Apache-2.0
"""The README is true: its generated parts are fresh, its example runs, its commands and files exist."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

import obs_kernels as obs
from bench import readme
from obs_kernels import cli

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_generated_parts_are_fresh() -> None:
    assert readme.main(["--check"]) == 0


def test_length_and_links() -> None:
    assert len(TEXT.splitlines()) <= 220
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target


def test_first_use_runs(tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    loader = [(torch.randn(8, 64), torch.randn(8, 64)) for _ in range(4)]
    skeleton = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    # a plain module is not rebuilt from its config, so load() gets the module to fill
    block = block.replace('"out"', repr(str(tmp_path / "out"))).replace(
        f"obs.load({str(tmp_path / 'out')!r})", f"obs.load({str(tmp_path / 'out')!r}, skeleton)"
    )
    names = {
        "model": model,
        "loader": loader,
        "skeleton": skeleton,
        "loss_fn": lambda m, batch: (m(batch[0]) - batch[1]).square().mean(1),
        "print": lambda *_: None,
    }
    exec(block, names)
    loaded = names["model"]
    assert isinstance(loaded, nn.Module) and isinstance(loaded[0], obs.SparseLinear)  # type: ignore[index]


def test_commands_exist() -> None:
    known = {command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback}
    known |= {group.name for group in cli.app.registered_groups}
    for name in re.findall(r"obs-kernels (\w+)", TEXT):
        assert name in known, name
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^    )make ([a-z-]+)", TEXT, flags=re.MULTILINE):
        assert re.search(rf"^{target}\b.*:", makefile, flags=re.MULTILINE), target


def test_public_names_are_documented() -> None:
    for name in obs.__all__:
        thing = getattr(obs, name)
        assert thing.__doc__, name
