# SPDX-License-Identifier: Apache-2.0
"""``from_pretrained`` of transformers for packed folders: the classes of its quantizer registry.

Imported only once transformers itself has imported its registry (see ``hub``), so that the package needs neither.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from obs_kernels.errors import CheckpointFormatError
from obs_kernels.ops import SparseWeight
from obs_kernels.packed_format import packed_shapes
from obs_kernels.patterns import NMPattern
from obs_kernels.sparse.attention import share_inputs_
from obs_kernels.sparse.checkpoint import packed_state
from obs_kernels.sparse.linear import (
    SparseLinear,
    bias_of,
    is_conv1d,
    is_packable,
    replace_module,
    weight_of,
)
from obs_kernels.sparse.stored import FORMAT_VERSION, PARTS, QUANT_METHOD, config_section, target_patterns


@register_quantization_config(QUANT_METHOD)
class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The section ``quantization_config`` of a packed folder; checked when the model is built."""

    def __init__(self, format_version: Any = FORMAT_VERSION, pattern: Any = None, targets: Any = (), **_: Any) -> None:
        self.quant_method: Any = QUANT_METHOD
        self.format_version = format_version
        self.pattern = pattern
        self.targets = targets


@register_quantizer(QUANT_METHOD)
class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts ``SparseLinear`` layers where the folder has packed ones, before transformers reads the tensors."""

    requires_calibration = True
    """Masks come from pruning: ``quantization_config=`` cannot pack a dense model on the way."""

    wanted_dtype: torch.dtype | None = None

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype that was asked for, which every dtype of the product allows; noted for later."""
        self.wanted_dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        patterns = target_patterns(self.quantization_config.to_dict())
        names = {name: _name_in(model, name) for name in patterns}
        if checkpoint_files:
            _check_headers(checkpoint_files, patterns)
        modules = dict(model.named_modules())
        for name, found in names.items():
            linear = modules.get(found) if found is not None else None
            if linear is None or not is_packable(linear):
                if found is None and _is_head(model, name):
                    continue
                raise CheckpointFormatError(
                    f"target {name!r} is no nn.Linear of {type(model).__name__}; load the folder by the class that "
                    f"its config names"
                )
            replace_module(model, linear, _skeleton(name, linear, patterns[name]))
        ignored: Any = getattr(model, "_keys_to_ignore_on_load_unexpected", None)
        markers = {rf"{re.escape(name)}\.weight$" for name in {*names, *filter(None, names.values())}}  # packed_state
        kind = list if isinstance(ignored, list) else set  # transformers adds its own of the same type
        model._keys_to_ignore_on_load_unexpected = kind((*(ignored or ()), *markers))  # type: ignore[assignment]

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        sparse = {name: m for name, m in model.named_modules() if isinstance(m, SparseLinear)}
        for name, module in sparse.items():
            vars(module).pop("weight", None)  # see _skeleton
            if not module.values.is_meta:  # else offloaded to disk
                module.sparse.validate(name)
        if self.wanted_dtype is not None and any(m.values.dtype != self.wanted_dtype for m in sparse.values()):
            _cast(model, self.wanted_dtype)
        share_inputs_(model)
        return model

    def get_state_dict_and_metadata(
        self, model: nn.Module, *_: Any, **__: Any
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """For ``model.save_pretrained`` of transformers: as ``obs_kernels.save_pretrained`` writes it."""
        sparse = {name: m for name, m in model.named_modules() if isinstance(m, SparseLinear)}
        vars(self.quantization_config).update(config_section({name: str(m.pattern) for name, m in sparse.items()}))
        return packed_state(model, sparse), {}

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """``model.save_pretrained`` writes the packed tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights take no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """``torch.compile`` takes the layers whole."""
        return True


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters and packed values, where a tensor that was found under another name kept the file's dtype (5.17)."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, SparseLinear):
            module.values = module.values.to(dtype)


def _skeleton(name: str, linear: nn.Module, pattern: NMPattern) -> SparseLinear:
    """A layer without data, on the device of ``linear``: transformers fills its buffers."""
    weight = weight_of(linear)
    rows, cols = weight.shape
    pattern.check_shape((rows, cols), name=f"{name}.weight")
    values, codes, columns = packed_shapes(pattern, rows, cols)
    byte: dict[str, Any] = {"dtype": torch.uint8, "device": weight.device}
    sparse = SparseWeight(
        weight.new_empty(values),
        torch.empty(codes, **byte),
        None if columns is None else torch.empty(columns, **byte),
        pattern,
        (rows, cols),
    )
    layer = SparseLinear(sparse, bias_of(linear), is_conv1d=is_conv1d(linear))
    # a model may initialise this weight by its name, as GPT-2 does; transformers leaves alone what has the flag
    placeholder: Any = torch.empty(0)
    placeholder._is_hf_initialized = True
    vars(layer)["weight"] = placeholder
    return layer


def _name_in(model: nn.Module, name: str) -> str | None:
    """The layer's name in a model with or without the head that the folder was saved with; None if it has none."""
    modules = dict(model.named_modules())
    prefix: str = getattr(model, "base_model_prefix", "")
    names = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
    return next((found for found in names if found in modules), None)


def _is_head(model: nn.Module, name: str) -> bool:
    """Whether the layer belongs to the head of another class, which a bare model leaves out."""
    prefix: str = getattr(model, "base_model_prefix", "")
    return bool(prefix) and not hasattr(model, prefix) and not name.startswith(f"{prefix}.")


def _check_headers(checkpoint_files: Sequence[str], patterns: dict[str, NMPattern]) -> None:
    """Every packed layer has its tensors: transformers only warns of missing ones, and fills them with noise."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, str] = {}
    for path in checkpoint_files:
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                    found[key] = file.get_slice(key).get_dtype()
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointFormatError(f"{path} is damaged: {error}") from None
    for name, pattern in patterns.items():
        shapes = packed_shapes(pattern, max(pattern.multiples()), pattern.multiples()[1])
        for part, shape in zip(PARTS, shapes, strict=True):
            key = f"{name}.{part}"
            if (key in found) != (shape is not None):
                raise CheckpointFormatError(
                    f"{key} {'is missing' if shape is not None else f'does not belong to pattern {pattern}'}; "
                    f"the folder is incomplete"
                )
            if part != "values" and shape is not None and found[key] != "U8":
                raise CheckpointFormatError(f"{key} must be uint8, got {found[key]}; the folder is damaged")


__all__ = ["PackedConfig", "PackedQuantizer"]
