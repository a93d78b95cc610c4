# SPDX-License-Identifier: Apache-2.0
"""Modes of a model for the length of a call: eval mode, weights that ask for gradients. Both come back as they were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module of ``model`` in eval mode, each back in its own mode afterwards.

    Compiled ones run uncompiled meanwhile: what was compiled before does not call hooks that come later.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    compiled = any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m, _ in modes)
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def require_grad(weights: Iterable[Tensor]) -> Iterator[None]:
    """Gradients on, and asked for by ``weights``, whatever they and the surrounding code say."""
    flags = [(weight, weight.requires_grad) for weight in weights]
    try:
        for weight, _ in flags:
            weight.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for weight, flag in flags:
            weight.requires_grad_(flag)
