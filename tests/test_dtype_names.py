# SPDX-License-Identifier: Apache-2.0
"""Every usual spelling of a dtype is read everywhere, and one is written."""

from __future__ import annotations

import pytest
import torch

from obs_kernels.dtype_names import DTYPES, SPELLINGS, dtype_name
from obs_kernels.errors import ConfigError
from obs_kernels.recipes.model import TrainingSettings


@pytest.mark.parametrize("name", DTYPES)
def test_every_spelling_is_the_one_name(name: str) -> None:
    assert SPELLINGS.keys() == DTYPES.keys()
    for text in (name, *SPELLINGS[name], name.upper(), str(DTYPES[name]), f" {SPELLINGS[name][0]} "):
        assert dtype_name("dtype", text) == name
    assert getattr(torch, SPELLINGS[name][0]) is DTYPES[name]


@pytest.mark.parametrize("value", ["int8", "", "float", 16, None])
def test_others_are_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"dtype must be one of bf16 \(bfloat16\), f16 .*, got "):
        dtype_name("dtype", value)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"one of f32 \(float32, fp32\), got 'bf16'"):
        dtype_name("dtype", "bf16", ("f32",))


def test_a_recipe_takes_them_too_and_keeps_its_own() -> None:
    spelled = {"fp32": "float32", "bf16": "bfloat16", "fp16": "f16"}
    assert {TrainingSettings(precision=text).precision: text for text in spelled.values()} == spelled
    with pytest.raises(ConfigError, match="precision must be one of f32"):
        TrainingSettings(precision="f64")
