# SPDX-License-Identifier: Apache-2.0
"""Save and load: safetensors and JSON, checked before anything is used. No pickle anywhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from obs_kernels.checks import PACK_DTYPES
from obs_kernels.errors import CheckpointFormatError, ConfigError, MissingDependencyError
from obs_kernels.files import whole_folder
from obs_kernels.patterns import NMPattern, parse_pattern
from obs_kernels.sparse.linear import SparseLinear, empty_sparse_linear, replace_module

FORMAT_VERSION = 1
QUANT_METHOD = "obs_kernels"
WEIGHTS = "model.safetensors"
PARTS = ("values", "codes", "columns")

FOLDER_README = """# Packed checkpoint of obs_kernels

The pruned layers are stored packed (`<layer>.values`, `.codes`, `.columns`). Load the folder with

    import obs_kernels
    model = obs_kernels.load("this folder")

Loading it with a library that does not know the format leaves those layers with fresh random weights. For plain masked
weights that any tool reads, save with `save_pretrained(model, path, save_dense=True)`.
"""


def save_pretrained(model: nn.Module, path: str | os.PathLike[str], save_dense: bool = False) -> Path:
    """Write ``model`` to folder ``path``: packed layers in the stored format, all else as it is; whole or not at all.

    Args:
        model: a module with ``SparseLinear`` layers (see ``compress_``), or any module with ``save_dense=True``.
        path: folder to create or to replace.
        save_dense: write plain masked weights instead, readable by any tool.

    Raises:
        ConfigError: nothing is packed and ``save_dense`` is False.
    """
    from safetensors.torch import save_file

    sparse = {name: m for name, m in model.named_modules() if isinstance(m, SparseLinear)}
    if not sparse and not save_dense:
        raise ConfigError("the model has no packed layer; call compress_(model) first, or pass save_dense=True")
    state: dict[str, Tensor] = {k: v.detach() for k, v in model.state_dict().items()}
    if save_dense:
        for name, module in sparse.items():
            for part in PARTS:
                state.pop(f"{name}.{part}", None)
            state[f"{name}.weight"] = module.sparse.to_dense()
    tensors = _unshared(model, state)
    config = _model_config(model)
    config.pop("quantization_config", None)
    if not save_dense:
        patterns = sorted({str(m.pattern) for m in sparse.values()})
        config["quantization_config"] = {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "pattern": patterns[0] if len(patterns) == 1 else patterns,
            "targets": {name: str(m.pattern) for name, m in sparse.items()} if len(patterns) > 1 else list(sparse),
        }
    with whole_folder(path) as folder:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        if not save_dense:
            (folder / "README.md").write_text(FOLDER_README)
    return Path(path)


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Read a folder of ``save_pretrained``; missing, extra or damaged tensors are refused.

    Args:
        path: the folder.
        model: a module of the right architecture to fill, changed only if all is well; None builds the transformers
            model that ``config.json`` names.

    Raises:
        CheckpointFormatError: not such a folder, another version, or damaged.
    """
    folder = Path(path)
    config = _read_config(folder)
    state = _read_tensors(folder / WEIGHTS)
    patterns = _target_patterns(config)
    target = _build_model(config) if model is None else model
    modules = dict(target.named_modules())
    replaced: dict[str, SparseLinear] = {}
    for name, pattern in patterns.items():
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise CheckpointFormatError(
                f"{folder}: target {name!r} is no nn.Linear of the model; the config does not fit it"
            )
        parts = {part: state[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in state}
        if not {"values", "codes"} <= set(parts):
            raise CheckpointFormatError(f"{folder}: {name}.values or .codes is missing; the file is incomplete")
        try:
            replaced[name] = empty_sparse_linear(linear, pattern, parts)
        except CheckpointFormatError as error:
            raise CheckpointFormatError(f"{folder}: {name}: {error}") from None
    _check_keys(folder, target, replaced, state)
    for name, module in replaced.items():
        replace_module(target, target.get_submodule(name), module)
    target.load_state_dict(_tied_again(target, state), strict=False, assign=True)
    tie = getattr(target, "tie_weights", None)
    if callable(tie):
        tie()
    return target.eval()


def _check_keys(folder: Path, model: nn.Module, replaced: dict[str, SparseLinear], state: dict[str, Tensor]) -> None:
    wanted = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    for name, module in replaced.items():
        wanted.pop(f"{name}.weight")
        wanted |= {f"{name}.{k}": tuple(v.shape) for k, v in module.state_dict().items() if k != "bias"}
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    missing = [k for k in wanted if k not in state and k not in tied]
    extra = [k for k in state if k not in wanted]
    wrong = [k for k in wanted if k in state and tuple(state[k].shape) != wanted[k]]
    floats = {state[k].dtype for k in wanted if k in state and (k.endswith((".values", ".bias", ".weight")))}
    if len(floats) > 1 or not floats <= set(PACK_DTYPES):
        raise CheckpointFormatError(
            f"{folder}: weights must share one float dtype, got {sorted(map(str, floats))}; save it again"
        )
    for what, keys in (("missing", missing), ("not part of the model", extra), ("of another shape", wrong)):
        if keys:
            raise CheckpointFormatError(
                f"{folder}: {len(keys)} tensors are {what}, the first is {keys[0]}; the file does not fit"
            )


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise CheckpointFormatError(f"{folder} has no config.json; give a folder written by save_pretrained")
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointFormatError(f"{folder}/config.json is not readable: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointFormatError(f"{folder}/config.json must hold an object, got {type(config).__name__}")
    return config


def _target_patterns(config: dict[str, Any]) -> dict[str, NMPattern]:
    section = config.get("quantization_config")
    if section is None:
        return {}
    if not isinstance(section, dict) or section.get("quant_method") != QUANT_METHOD:
        raise CheckpointFormatError(
            f"quantization_config must be of quant_method {QUANT_METHOD!r}, got {section!r:.100}"
        )
    if type(section.get("format_version")) is not int or section["format_version"] != FORMAT_VERSION:
        raise CheckpointFormatError(
            f"format_version must be {FORMAT_VERSION}, got {section.get('format_version')!r}; update "
            f"obs_kernels or pack the model again"
        )
    targets = section.get("targets")
    if isinstance(targets, list):
        targets = {str(name): section.get("pattern") for name in targets}
    if not isinstance(targets, dict):
        raise CheckpointFormatError("quantization_config.targets must be a list of layer names, or {name: pattern}")
    try:
        patterns = {str(name): parse_pattern(text) for name, text in targets.items()}
    except ConfigError as error:
        raise CheckpointFormatError(f"quantization_config: {error}") from None
    for name, pattern in patterns.items():
        if not isinstance(pattern, NMPattern):
            raise CheckpointFormatError(f"quantization_config: {name} has pattern {pattern}, which is never packed")
    return patterns


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise CheckpointFormatError(f"{path} is missing; the folder is incomplete")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointFormatError(f"{path} is damaged: {error}") from None


def _model_config(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return {"architectures": [type(model).__name__]}
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    values["architectures"] = [type(model).__name__]
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return values | {"dtype": str(dtype).removeprefix("torch.")}


def _build_model(config: dict[str, Any]) -> nn.Module:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    try:
        import transformers
    except ImportError:
        raise MissingDependencyError(
            "transformers is needed to build the model; pip install transformers, or pass model="
        ) from None
    architecture = getattr(transformers, name, None) if isinstance(name, str) else None
    # nothing but a model class of transformers is ever called, whatever the file says
    if not (isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)):
        raise CheckpointFormatError(
            f"architecture {name!r} is not a transformers model; pass model= with the module to fill"
        )
    dtype = getattr(torch, str(config.get("dtype", "float32")), None)
    if dtype not in PACK_DTYPES:
        raise CheckpointFormatError(
            f"config.json: dtype must be float16, bfloat16, float32 or float64, got {config.get('dtype')!r}"
        )
    plain = {k: v for k, v in config.items() if k != "quantization_config"}
    try:
        settings = transformers.AutoConfig.for_model(**plain)
        if architecture.config_class is not type(settings):
            raise ValueError(f"{name} takes another config than model_type {config.get('model_type')!r}")
        model: nn.Module = nn.Module.to(architecture(settings), dtype)
    except Exception as error:  # whatever a damaged config makes the library raise
        raise CheckpointFormatError(f"config.json does not describe a model: {type(error).__name__}: {error}") from None
    return model


def _tied_again(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with the parameters that ``model`` ties as one tensor: assigning two would part them."""
    first: dict[int, str] = {}
    tied = dict(state)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        if owner != name and owner in state:
            tied[name] = tied[owner] = nn.Parameter(state[owner], requires_grad=parameter.requires_grad)
    return tied


def _unshared(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, each storage once: tied weights are tied again on loading."""
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    seen: dict[tuple[int, int], str] = {}
    out = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.numel())
        if tensor.numel() and key in seen and name in tied:
            continue
        seen[key] = name
        out[name] = tensor.cpu().clone(memory_format=torch.contiguous_format)
    return out


__all__ = ["FORMAT_VERSION", "load", "save_pretrained"]
