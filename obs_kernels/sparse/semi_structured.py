# SPDX-License-Identifier: Apache-2.0
"""Packed layers in the layout of torch's semi-structured tensors (its CUTLASS backend), as a folder and as a model.

A layer is ``<layer>.sparse`` [R, C/2], its kept weights, and ``<layer>.meta`` [R, C/16] int16 in the order that torch's
``SparseSemiStructuredTensorCUTLASS`` reads. Any pattern with at most two nonzeros in each aligned four columns fits.
torch has the conversion on the CPU too, the product on a GPU only.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from obs_kernels.errors import (
    CheckpointFormatError,
    ConfigError,
    DTypeNotSupportedError,
    ShapeNotSupportedError,
    UnsupportedGPUError,
)
from obs_kernels.packed_format import runs_as_two_of_four
from obs_kernels.patterns import NMPattern
from obs_kernels.sparse import stored
from obs_kernels.sparse.checkpoint import build_model, dense_state, fill_model
from obs_kernels.sparse.linear import SparseLinear

METHOD = "obs_kernels_semi_structured"
ROWS, COLS = 32, 64
"""Multiples that torch's kernel needs of a 16-bit weight."""
DTYPES = (torch.float16, torch.bfloat16)


def semi_structured_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model with packed layers in torch's layout, and empty weights where other readers stop.

    Raises:
        ConfigError: a layer that is never 2:4. DTypeNotSupportedError, ShapeNotSupportedError: as named.
    """
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    layers = {name: m for name, m in model.named_modules() if isinstance(m, SparseLinear)}
    for name, layer in layers.items():
        _check(name, layer)
    state = dense_state(model, layers)
    for name in layers:
        weight = state[f"{name}.weight"].contiguous()
        state[f"{name}.sparse"], state[f"{name}.meta"] = sparse_semi_structured_from_dense_cutlass(weight)
        state[f"{name}.weight"] = weight.new_empty(0)
    return state


def section(model: nn.Module) -> dict[str, Any]:
    """The section of config.json, with the patterns that the layers had."""
    patterns = {name: str(m.pattern) for name, m in model.named_modules() if isinstance(m, SparseLinear)}
    return {**stored.config_section(patterns), "quant_method": METHOD}


def read_semi_structured(folder: Path, config: dict[str, Any]) -> tuple[dict[str, NMPattern], dict[str, Tensor]]:
    """(patterns by layer, dense state) of a folder in this layout.

    Raises:
        CheckpointFormatError: damaged.
    """
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

    patterns = stored.target_patterns({**config[stored.SECTION], "quant_method": stored.QUANT_METHOD})
    state = stored.read_tensors(folder)
    for name in patterns:
        values, meta = _parts(folder, state, name)
        try:
            weight = sparse_semi_structured_to_dense_cutlass(values, meta)
        except RuntimeError as error:
            raise CheckpointFormatError(f"{folder}: {name}: {error}") from None
        if int((weight != 0).sum()) != int((values != 0).sum()):
            raise CheckpointFormatError(f"{folder}: {name}.meta: two weights share a place; the file is damaged")
        state[f"{name}.weight"] = weight
        del state[f"{name}.sparse"], state[f"{name}.meta"]
    return patterns, state


def load_semi_structured(
    path: str | os.PathLike[str], model: nn.Module | None = None, *, device: torch.device | str = "cuda"
) -> nn.Module:
    """Read such a folder into a model whose packed layers are ``nn.Linear`` with torch's semi-structured weights.

    Args:
        path: written by ``obs-kernels convert --to semi-structured``.
        model: as in ``load``.
        device: a GPU of compute capability 8.x: torch's kernels for this layout run on no other, and on no CPU.

    Raises:
        ConfigError: no GPU. UnsupportedGPUError: another GPU. CheckpointFormatError: not such a folder, or damaged.
    """
    picked = torch.device(device)
    if picked.type != "cuda" or not torch.cuda.is_available():
        raise ConfigError(
            f"device must be a GPU that torch sees, got {str(device)!r}: torch multiplies by semi-structured weights "
            f"on a GPU only; convert the folder to packed or dense for the CPU"
        )
    capability = torch.cuda.get_device_capability(picked)
    if capability[0] != 8:
        raise UnsupportedGPUError(
            f"device must have compute capability 8.x for torch's kernels of this layout, got {capability[0]}."
            f"{capability[1]}; convert the folder to packed and use obs_kernels.load"
        )
    folder = Path(path)
    config = stored.read_config(folder)
    if (config.get(stored.SECTION) or {}).get("quant_method") != METHOD:
        raise CheckpointFormatError(f"{folder} is not in torch's semi-structured layout; use obs_kernels.load")
    patterns, state = read_semi_structured(folder, config)
    filled = fill_model(folder, build_model(config) if model is None else model, {}, state).to(picked)
    for name in patterns:
        linear: Any = filled.get_submodule(name)
        linear.weight = nn.Parameter(as_semi_structured(linear.weight.detach()), requires_grad=False)
    return filled


def as_semi_structured(weight: Tensor) -> Tensor:
    """torch's tensor of a 2:4 weight [R, C], by its CUTLASS backend: the one whose layout is public."""
    from torch.sparse import SparseSemiStructuredTensorCUTLASS
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    values, meta = sparse_semi_structured_from_dense_cutlass(weight.contiguous())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*prototype stage.*")
        made: Tensor = SparseSemiStructuredTensorCUTLASS(weight.shape, values, meta, None, None, None)
    return made


def _check(name: str, layer: SparseLinear) -> None:
    if not runs_as_two_of_four(layer.pattern) or layer.is_conv1d:
        what = "a Conv1D" if layer.is_conv1d else f"of pattern {layer.pattern}"
        raise ConfigError(
            f"{name} is {what}; torch's semi-structured weights are nn.Linear with at most two nonzeros in each four "
            f"columns. Fix: convert to dense"
        )
    if layer.values.dtype not in DTYPES:
        raise DTypeNotSupportedError(
            f"{name} must be float16 or bfloat16 for torch's semi-structured layout, got {layer.values.dtype}; "
            f"convert with dtype='bf16'"
        )
    if layer.out_features % ROWS or layer.in_features % COLS:
        raise ShapeNotSupportedError(
            f"{name} is [{layer.out_features}, {layer.in_features}]; torch's semi-structured layout needs rows % "
            f"{ROWS} == 0 and cols % {COLS} == 0. Fix: convert to dense"
        )


def _parts(folder: Path, state: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    values, meta = state.get(f"{name}.sparse"), state.get(f"{name}.meta")
    if values is None or meta is None:
        raise CheckpointFormatError(f"{folder}: {name}.sparse or .meta is missing; the file is incomplete")
    shape = tuple(values.shape)
    fits = values.dim() == 2 and shape[0] % ROWS == 0 and shape[1] % (COLS // 2) == 0
    if not fits or values.dtype not in DTYPES:
        raise CheckpointFormatError(
            f"{folder}: {name}.sparse must be [R, C/2] float16 or bfloat16, got {list(shape)} {values.dtype}"
        )
    if tuple(meta.shape) != (shape[0], shape[1] // 8) or meta.dtype != torch.int16:
        raise CheckpointFormatError(
            f"{folder}: {name}.meta must be [{shape[0]}, {shape[1] // 8}] int16, got {list(meta.shape)} {meta.dtype}"
        )
    return values, meta


__all__ = ["METHOD", "as_semi_structured", "load_semi_structured", "read_semi_structured", "semi_structured_state"]
