# SPDX-License-Identifier: Apache-2.0
"""f32 products in f32, whatever the process allows its model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_products() -> Iterator[None]:
    """No TF32 (GPU) and no bf16 (CPU) inside f32 matrix products; also a decorator.

    A Hessian of such products is not symmetric positive definite to f32, and its factor loses half the digits.
    """
    switches = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value
