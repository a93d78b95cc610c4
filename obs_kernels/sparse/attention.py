# SPDX-License-Identifier: Apache-2.0
"""Attention whose query, key and value layers share one feature-major input.

Products that gather the columns of panels read x feature-major, and transpose a token-major x for themselves. Three
that take the same x need one transposition: a forward pre-hook of the attention block hands it the same tensor, same
shape and values, lying feature-major. Nothing of a library is patched, and nothing is kept between calls.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from obs_kernels.ops import feature_major
from obs_kernels.ops.layout import shared_from, shares_layout
from obs_kernels.sparse.linear import SparseLinear

TRIPLES = (("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("q_proj", "k_proj", "v_proj"))
"""The three layers inside a block: BERT and its kin, DistilBERT, BART, OPT, Llama and their kin."""
INPUT = "hidden_states"
OTHER_INPUTS = ("key_value_states", "encoder_hidden_states")
"""By which a block is told to attend to another sequence: keys and values are then made from that one."""


class SharedInput:
    """The hook: ``hidden_states`` feature-major, where the three layers gain by it at that number of tokens."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.handle: Any = None

    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """(args, kwargs) with the input exchanged; None leaves them."""
        x = args[0] if args else kwargs.get(INPUT)
        layers = [block.get_submodule(name) for name in self.names]
        if (
            not isinstance(x, Tensor)
            or any(kwargs.get(name) is not None for name in OTHER_INPUTS)
            or not self._gains(x, layers)
        ):
            return None
        shared = feature_major(x)
        return ((shared, *args[1:]), kwargs) if args else (args, {**kwargs, INPUT: shared})

    @staticmethod
    def _gains(x: Tensor, layers: list[nn.Module]) -> bool:
        packed = [layer for layer in layers if isinstance(layer, SparseLinear)]
        if len(packed) < len(layers) or x.dim() < 2 or any(layer.values.dtype != x.dtype for layer in packed):
            return False  # a layer was exchanged, or will copy or refuse x
        cols = packed[0].in_features
        tokens = x.numel() // cols
        if x.shape[-1] != cols or not shares_layout(x) or any(layer.takes_dense(x) for layer in packed):
            return False
        rows, patterns = tuple(layer.out_features for layer in packed), tuple(str(layer.pattern) for layer in packed)
        return tokens >= shared_from(rows, patterns, cols, x.device.type, x.device.index or 0)


def share_inputs_(model: nn.Module) -> list[str]:
    """Put ``SharedInput`` before every known attention block of packed layers; returns the names of the blocks."""
    shared = []
    for name, block in model.named_modules():
        if not type(block).__module__.startswith("transformers.") or _hooks_of(block):
            continue
        for names in TRIPLES:
            children = dict(block.named_children())
            if all(isinstance(children.get(child), SparseLinear) for child in names) and _takes_one_input(block):
                hook = SharedInput(names)
                hook.handle = block.register_forward_pre_hook(hook, with_kwargs=True)
                shared.append(name)
    return shared


def unshare_(model: nn.Module) -> None:
    """Take every ``SharedInput`` away."""
    for block in model.modules():
        for hook in _hooks_of(block):
            hook.handle.remove()


def _hooks_of(block: nn.Module) -> list[SharedInput]:
    return [hook for hook in block._forward_pre_hooks.values() if isinstance(hook, SharedInput)]


def _takes_one_input(block: nn.Module) -> bool:
    """Whether the three layers get the block's first argument."""
    return next(iter(inspect.signature(block.forward).parameters), None) == INPUT


__all__ = ["SharedInput", "share_inputs_", "unshare_"]
