# SPDX-License-Identifier: Apache-2.0
"""Names of dtypes on command lines, in recipes and in results: every usual spelling is read, one is written."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from obs_kernels.errors import ConfigError

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "f64": torch.float64}
"""By the name that is written."""
SPELLINGS = {"bf16": ("bfloat16",), "f16": ("float16", "fp16"), "f32": ("float32", "fp32"), "f64": ("float64", "fp64")}
"""What is read too."""


def dtype_name(name: str, value: str, choices: Sequence[str] = tuple(DTYPES)) -> str:
    """The key of ``DTYPES`` that ``value`` spells, in small or capital letters, with or without ``torch.``.

    Args:
        name: of the argument, for the error.
        value: such as "bf16", "bfloat16", "fp16" or "torch.float32".
        choices: keys that are allowed.

    Raises:
        ConfigError: another text, or a dtype that is not among ``choices``.
    """
    text = value.strip().lower().removeprefix("torch.") if isinstance(value, str) else value
    for choice in choices:
        if text == choice or text in SPELLINGS[choice]:
            return choice
    shown = ", ".join(f"{choice} ({', '.join(SPELLINGS[choice])})" for choice in choices)
    raise ConfigError(f"{name} must be one of {shown}, got {value!r}")
