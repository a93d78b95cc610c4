# SPDX-License-Identifier: Apache-2.0
"""The list of faults: each can be seeded into the kernels as they are, and its tests exist. Running takes minutes."""

from __future__ import annotations

import mutations
import pytest


def test_every_fault_can_be_seeded(capsys: pytest.CaptureFixture[str]) -> None:
    assert mutations.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(mutations.FAULTS)


@pytest.mark.parametrize("fault", mutations.FAULTS, ids=lambda fault: f"{fault.file}-{fault.what}")
def test_a_fault_changes_something(fault: mutations.Fault) -> None:
    assert fault.old != fault.new and (mutations.ROOT / fault.tests).is_file()


def test_every_kernel_has_one() -> None:
    """Files of csrc with kernels, by their topic."""
    topics = {path.parent.name for path in (mutations.ROOT / "csrc").rglob("*.cu")}
    assert topics - {"packing"} == {fault.file.split("/")[0] for fault in mutations.FAULTS} - {"common"}
