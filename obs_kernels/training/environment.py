# SPDX-License-Identifier: Apache-2.0
"""Versions and device: what stands beside the numbers of a report."""

from __future__ import annotations

import platform
import sys

import torch


def environment(device: torch.device | str = "cpu") -> dict[str, str]:
    """Versions and device, for reports: what a number needs beside it."""
    from importlib.metadata import PackageNotFoundError, version

    picked = torch.device(device)
    name = torch.cuda.get_device_name(picked) if picked.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    found = {
        "obs_kernels": str(getattr(sys.modules["obs_kernels"], "__version__", "unknown")),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for library in ("transformers", "tokenizers", "datasets", "safetensors", "triton"):
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "not installed"
    return found | {"platform": f"{platform.system()} {platform.machine()}", "device": name}
