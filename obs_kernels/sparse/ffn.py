# SPDX-License-Identifier: Apache-2.0
"""Feed-forward pairs: the activation between two layers taken into the product of the first.

Nothing of a library is patched: the block's activation is a module, and a module that returns its input takes its
place. Only blocks of transformers are known, since a name alone does not say what a forward does in between.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from obs_kernels.sparse.linear import SparseLinear

PAIRS = (
    ("intermediate.dense", "intermediate.intermediate_act_fn", "output.dense"),
    ("lin1", "activation", "lin2"),
    ("c_fc", "act", "c_proj"),
)
"""(first layer, activation, second layer) inside a block: BERT and its kin, DistilBERT, GPT-2."""
ACTIVATIONS = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "GELU": "gelu",
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
}
"""Name of ``ops.sparse_linear``'s activation by the class of a module."""


class FusedActivation(nn.Module):
    """Stands where an activation stood that a product now applies; keeps it for ``decompress_``."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original

    def forward(self, x: Tensor) -> Tensor:
        """``x``: the product has applied the activation."""
        return x


def fuse_pairs_(model: nn.Module, *, feature_major: bool) -> list[str]:
    """Fuse where both layers of a known block are packed; returns the names of the first layers.

    Args:
        model: changed in place.
        feature_major: let the tensor between the two lie as [features, tokens].
    """
    fused = []
    for name, block in model.named_modules():
        if not type(block).__module__.startswith("transformers."):
            continue
        for first_name, act_name, _second, first in _packed_pairs(block):
            act = block.get_submodule(act_name)
            kind = activation_of(act)
            if kind is None or first.activation is not None:
                continue
            first.activation = kind
            first.y_layout = "feature" if feature_major else "token"
            parent, _, child = act_name.rpartition(".")
            setattr(block.get_submodule(parent), child, FusedActivation(act).train(act.training))
            fused.append(f"{name}.{first_name}" if name else first_name)
    return fused


def unfuse_(model: nn.Module) -> None:
    """Put back every activation that ``fuse_pairs_`` took away."""
    for parent in list(model.modules()):
        for child, module in list(parent.named_children()):
            if isinstance(module, FusedActivation):
                setattr(parent, child, module.original)


def activation_of(module: nn.Module) -> str | None:
    """The name of the activation that the module computes, where a product can apply it."""
    kind = ACTIVATIONS.get(type(module).__name__)
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return kind


def _packed_pairs(block: nn.Module) -> Iterator[tuple[str, str, str, SparseLinear]]:
    for first_name, act_name, second_name in PAIRS:
        try:
            first, second = block.get_submodule(first_name), block.get_submodule(second_name)
            block.get_submodule(act_name)
        except AttributeError:
            continue
        if isinstance(first, SparseLinear) and isinstance(second, SparseLinear):
            yield first_name, act_name, second_name, first


__all__ = ["FusedActivation", "activation_of", "fuse_pairs_", "unfuse_"]
