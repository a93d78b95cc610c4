# SPDX-License-Identifier: Apache-2.0
"""The models that are timed: BERT-shaped encoders with random weights, or a folder; dense, sparse, and hollow."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from obs_kernels import ops
from obs_kernels.errors import ConfigError, MissingDependencyError, ShapeNotSupportedError
from obs_kernels.patterns import NMPattern, VNMPattern, parse_pattern
from obs_kernels.sparse.compress import CompressionReport, compress_, decompress_, detect_pattern
from obs_kernels.sparse.convert import read_model
from obs_kernels.sparse.linear import SparseLinear, is_packable, weight_of


@dataclass(frozen=True)
class Encoder:
    """Sizes of a BERT encoder."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    vocab: int = 30522
    positions: int = 512


SHAPES = {
    "bert-base": Encoder(layers=12, hidden=768, ffn=3072, heads=12),
    "bert-large": Encoder(layers=24, hidden=1024, ffn=4096, heads=16),
    "minilm": Encoder(layers=12, hidden=384, ffn=1536, heads=12),
    "tiny": Encoder(layers=2, hidden=64, ffn=128, heads=2, vocab=100, positions=64),
}
"""Encoders by name; "tiny" is for a CPU and says nothing about any other."""
UNMASKED = "obs_kernels_sdpa_unmasked"
"""Name of an attention of transformers: SDPA, never a mask."""
IN_BLOCK = re.compile(r"(^|\.)\d+\.")
"""Layers of the repeated blocks: heads and poolers stay dense."""


class Hollow(nn.Module):
    """In place of a linear layer: an output of its shape, unwritten, by no kernel. What is left is the rest's time."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., features], whatever the memory holds."""
        return x.new_empty(*x.shape[:-1], self.features)


def build(name: str, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, str]:
    """(dense model in eval mode with SDPA, where its weights come from) of a name of ``SHAPES`` or a folder.

    Raises:
        ConfigError: neither. CheckpointFormatError: a damaged folder. MissingDependencyError: no transformers.
    """
    if name in SHAPES:
        model, source = _random(SHAPES[name]), f"random weights of the shape {name}"
    else:
        folder = Path(name)
        if not (folder / "config.json").is_file():
            known = ", ".join(SHAPES)
            raise ConfigError(f"model must be one of {known}, or a folder with config.json, got {name!r}")
        model, source = read_model(folder), "the folder's weights"
        decompress_(model)
    _attend_unmasked(model)
    return nn.Module.to(model, device, dtype).eval().requires_grad_(False), source


def _attend_unmasked(model: nn.Module) -> None:
    """Let ``model`` attend by SDPA without a mask: ``make_inputs`` masks nothing.

    While a graph is captured or compiled transformers makes a mask all the same, as it must not look at the values, and
    a mask keeps SDPA from its fast kernels: 85 of the 102 ms of BERT-large at 32 x 512 on an H200.
    """
    attention: Any = getattr(model, "set_attn_implementation", None)
    if attention is None:
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(UNMASKED, sdpa_attention_forward)
    AttentionMaskInterface.register(UNMASKED, _no_mask)
    attention(UNMASKED)


def _no_mask(*_args: Any, **_options: Any) -> None:
    """What transformers takes for "nothing is masked"; a causal model then passes ``is_causal``."""


def sparse_twin(
    dense: nn.Module,
    pattern: str,
    *,
    tokens: int | None = None,
    measure: bool = False,
    fuse_ffn: str | None = None,
) -> tuple[nn.Module, CompressionReport, int]:
    """(copy of ``dense`` with packed block layers, report, number of layers whose mask was imposed by magnitude).

    A layer whose zeros obey ``pattern`` keeps them; any other is cut to it by magnitude: right for the time it takes,
    not for what it answers.

    Args:
        dense: from ``build``; not changed.
        pattern: "64:2:8" and the like.
        tokens, measure, fuse_ffn: as in ``compress_``.

    Raises:
        ConfigError: no layer fits the pattern.
    """
    parsed = check_pattern(dense, pattern)
    twin = copy.deepcopy(dense)
    imposed = 0
    for _, layer in block_layers(twin):
        weight = weight_of(layer)
        if not _fits(weight, parsed):
            continue
        if parsed.count_violations(weight != 0) or bool((weight != 0).all()):
            impose_(weight, parsed)
            imposed += 1
    report = compress_(twin, tokens, pattern=pattern, measure=measure, fuse_ffn=fuse_ffn)
    return twin, report, imposed


def check_pattern(dense: nn.Module, pattern: str) -> NMPattern:
    """The pattern, if it has a packed format and fits a layer of the model's blocks.

    Raises:
        ConfigError: it does not.
    """
    parsed = parse_pattern(pattern)
    if not isinstance(parsed, NMPattern) or (isinstance(parsed, VNMPattern) and parsed.n != 2):
        raise ConfigError(f"pattern must be n:m or v:2:m, got {pattern!r}; others have no packed format")
    if not any(_fits(weight_of(layer), parsed) for _, layer in block_layers(dense)):
        raise ConfigError(f"pattern {pattern} fits no layer of the model's blocks; choose another")
    return parsed


def found_pattern(dense: nn.Module) -> str:
    """The pattern that the zeros of the block layers obey.

    Raises:
        ConfigError: they are dense, or disagree.
    """
    found = {str(detect_pattern(weight_of(layer))) for _, layer in block_layers(dense)}
    if len(found) != 1 or "None" in found:
        raise ConfigError(f"pattern must be given: the model's zeros say {', '.join(sorted(found)) or 'nothing'}")
    return found.pop()


def hollow_twin(dense: nn.Module) -> nn.Module:
    """Copy of ``dense`` without its block layers: the time of everything else."""
    twin = copy.deepcopy(dense)
    for name, layer in list(block_layers(twin)):
        twin.set_submodule(name, Hollow(weight_of(layer).shape[0]))
    return twin


def block_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Dense linear layers of the model's blocks, by name."""
    for name, module in model.named_modules():
        if is_packable(module) and IN_BLOCK.search(name):
            yield name, module


def layer_groups(dense: nn.Module) -> dict[str, tuple[int, int, int]]:
    """{name with * for the block: (rows, cols, count)} of the block layers."""
    groups: dict[str, tuple[int, int, int]] = {}
    for name, layer in block_layers(dense):
        key = IN_BLOCK.sub(r"\1*.", name)
        rows, cols = weight_of(layer).shape
        count = groups[key][2] if key in groups else 0
        groups[key] = (rows, cols, count + 1)
    return groups


def make_inputs(model: nn.Module, batch: int, length: int) -> dict[str, Tensor]:
    """Token ids of full length, without an attention mask: transformers would ask the device whether it masks any.

    Raises:
        ConfigError: the model takes no such length.
    """
    config: Any = model.config
    most = int(getattr(config, "max_position_embeddings", length))
    if length > most:
        raise ConfigError(f"length must be at most {most} for this model, got {length}")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(int(config.vocab_size), (batch, length), generator=generator)
    return {"input_ids": ids.to(device)}


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    """Packed layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, SparseLinear)}


def _random(shape: Encoder) -> nn.Module:
    try:
        from transformers import BertConfig, BertModel
    except ImportError:
        raise MissingDependencyError("transformers is needed to build an encoder; pip install transformers") from None
    config = BertConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.ffn,
        max_position_embeddings=shape.positions,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = BertModel(config, add_pooling_layer=False)
    return model


def _fits(weight: Tensor, pattern: NMPattern) -> bool:
    try:
        pattern.check_shape(weight.shape)
    except ShapeNotSupportedError:
        return False
    return True


def impose_(weight: Tensor, pattern: NMPattern) -> None:
    """Zero all but the largest weights that ``pattern`` allows, in place."""
    search = ops.search_vnm if isinstance(pattern, VNMPattern) else ops.search_nm
    mask = search(weight.float(), None, pattern, method="magnitude").mask
    weight.masked_fill_(~mask, 0.0)
