# SPDX-License-Identifier: Apache-2.0
"""What the assembler made of a Triton kernel."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest


def assert_no_spills(kernel: Any, folder: Path) -> None:
    """``kernel`` as ``triton.compile`` returns it uses no stack and no local memory; ``folder`` is written to."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        pytest.skip("this triton ships no cuobjdump")
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found is not None and found.groups() == ("0", "0"), f"spills: {usage}"
