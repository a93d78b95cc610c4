# SPDX-License-Identifier: Apache-2.0
"""Save and load: safetensors and JSON, checked before anything is used. No pickle anywhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from obs_kernels import checks
from obs_kernels.checks import PACK_DTYPES
from obs_kernels.errors import CheckpointFormatError, ConfigError, MissingDependencyError
from obs_kernels.files import whole_folder
from obs_kernels.patterns import NMPattern
from obs_kernels.sparse import stored
from obs_kernels.sparse.compress import chain_
from obs_kernels.sparse.linear import SparseLinear, empty_sparse_linear, is_packable, replace_module
from obs_kernels.sparse.stored import FORMAT_VERSION, MAX_SHARD_SIZE, PARTS, SECTION

FOLDER_README = """# Packed checkpoint of obs_kernels

The pruned layers are stored packed (`<layer>.values`, `.codes`, `.columns`). Load the folder with

    import obs_kernels
    model = obs_kernels.load("this folder")

or, after `import obs_kernels`, with transformers: `AutoModel.from_pretrained("this folder")`, or the class of the task.

Without the package the folder is refused: each packed layer also has an empty `<layer>.weight`, whose shape fits no
model, so that transformers and `load_state_dict` raise instead of leaving fresh random weights in its place (unless
`ignore_mismatched_sizes=True` asks for just that). For plain masked weights that any tool reads, save with
`save_pretrained(model, path, save_dense=True)`, or run `obs-kernels convert "this folder" --to dense --out DIR`.
"""


def save_pretrained(
    model: nn.Module,
    path: str | os.PathLike[str],
    save_dense: bool = False,
    *,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> Path:
    """Write ``model`` to folder ``path``: packed layers in the stored format, all else as it is; whole or not at all.

    Args:
        model: a module with ``SparseLinear`` layers (see ``compress_``), or any module with ``save_dense=True``.
        path: folder to create or to replace.
        save_dense: write plain masked weights instead, readable by any tool.
        max_shard_size: bytes, or a text such as "5GB"; a model above it is written in shards with an index.

    Raises:
        ConfigError: nothing is packed and ``save_dense`` is False, or a bad size.
    """
    stored.shard_bytes(max_shard_size)
    sparse = {name: m for name, m in model.named_modules() if isinstance(m, SparseLinear)}
    if not sparse and not save_dense:
        raise ConfigError("the model has no packed layer; call compress_(model) first, or pass save_dense=True")
    state = dense_state(model, sparse) if save_dense else packed_state(model, sparse)
    section = None if save_dense else stored.config_section({name: str(m.pattern) for name, m in sparse.items()})
    with whole_folder(path) as folder:
        write_folder(folder, model, state, section, max_shard_size, readme="" if save_dense else FOLDER_README)
    return Path(path)


def write_folder(
    folder: Path,
    model: nn.Module,
    state: dict[str, Tensor],
    section: dict[str, Any] | None,
    max_shard_size: int | str,
    *,
    readme: str = "",
) -> None:
    """config.json with ``section`` in it, ``state`` as safetensors, and the README, into a folder that is there."""
    config = _model_config(model)
    config.pop(SECTION, None)
    if section is not None:
        config[SECTION] = section
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    stored.write_tensors(folder, _unshared(model, state), max_shard_size)
    if readme:
        (folder / "README.md").write_text(readme)


def packed_state(model: nn.Module, sparse: dict[str, SparseLinear]) -> dict[str, Tensor]:
    """The state of the model, and beside each packed layer the empty weight at which other readers stop."""
    state: dict[str, Tensor] = {k: v.detach() for k, v in model.state_dict().items()}
    return state | {f"{name}.weight": module.values.new_empty(0) for name, module in sparse.items()}


def dense_state(model: nn.Module, sparse: dict[str, SparseLinear]) -> dict[str, Tensor]:
    """The state of the model as if no layer were packed."""
    state: dict[str, Tensor] = {k: v.detach() for k, v in model.state_dict().items()}
    for name, module in sparse.items():
        for part in PARTS:
            state.pop(f"{name}.{part}", None)
        weight = module.sparse.to_dense()
        state[f"{name}.weight"] = weight.T if module.is_conv1d else weight
    return state


def load(path: str | os.PathLike[str], model: nn.Module | None = None, *, fuse_ffn: str | None = None) -> nn.Module:
    """Read a folder of ``save_pretrained``; missing, extra or damaged tensors are refused.

    Args:
        path: the folder; one file or shards.
        model: a module of the right architecture to fill, changed only if all is well; None builds the transformers
            model that ``config.json`` names.
        fuse_ffn: as in ``compress_``.

    Raises:
        CheckpointFormatError: not such a folder, another version, or damaged. ConfigError: a bad ``fuse_ffn``.
    """
    if fuse_ffn is not None:
        checks.check_choice("fuse_ffn", fuse_ffn, checks.LAYOUTS)
    folder = Path(path)
    config = stored.read_config(folder)
    patterns = stored.target_patterns(config.get(SECTION))
    state = stored.read_tensors(folder)
    filled = fill_model(folder, build_model(config) if model is None else model, patterns, state)
    chain_(filled, fuse_ffn)
    return filled


def fill_model(folder: Path, target: nn.Module, patterns: dict[str, NMPattern], state: dict[str, Tensor]) -> nn.Module:
    """Put ``state`` into ``target``, with packed layers where ``patterns`` names them; changed if all is well only."""
    modules = dict(target.named_modules())
    replaced: dict[str, SparseLinear] = {}
    for name, pattern in patterns.items():
        linear = modules.get(name)
        if linear is None or not is_packable(linear):
            raise CheckpointFormatError(
                f"{folder}: target {name!r} is no nn.Linear of the model; the config does not fit it"
            )
        parts = {part: state[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in state}
        if not {"values", "codes"} <= set(parts):
            raise CheckpointFormatError(f"{folder}: {name}.values or .codes is missing; the file is incomplete")
        if f"{name}.weight" in state and tuple(state[f"{name}.weight"].shape) == (0,):
            state.pop(f"{name}.weight")  # see packed_state
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


def _model_config(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return {"architectures": [type(model).__name__]}
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    values["architectures"] = [type(model).__name__]
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return values | {"dtype": str(dtype).removeprefix("torch.")}


def architecture_of(config: dict[str, Any]) -> Any:
    """The class of transformers that a config names; nothing else is ever called, whatever the file says.

    Raises:
        CheckpointFormatError: it names none. MissingDependencyError: transformers is not installed.
    """
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    try:
        import transformers
    except ImportError:
        raise MissingDependencyError(
            "transformers is needed to build the model; pip install transformers, or pass model="
        ) from None
    architecture = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)):
        raise CheckpointFormatError(
            f"architecture {name!r} is not a transformers model; pass model= with the module to fill"
        )
    return architecture


def build_model(config: dict[str, Any]) -> nn.Module:
    """The transformers model of a config, in its dtype, with random weights.

    Raises:
        CheckpointFormatError: the config describes none. MissingDependencyError: transformers is not installed.
    """
    architecture = architecture_of(config)
    dtype = getattr(torch, str(config.get("dtype", "float32")), None)
    if dtype not in PACK_DTYPES:
        raise CheckpointFormatError(
            f"config.json: dtype must be float16, bfloat16, float32 or float64, got {config.get('dtype')!r}"
        )
    plain = {k: v for k, v in config.items() if k != SECTION}
    try:
        from transformers import AutoConfig

        settings = AutoConfig.for_model(**plain)
        if architecture.config_class is not type(settings):
            raise ValueError(
                f"{architecture.__name__} takes another config than model_type {config.get('model_type')!r}"
            )
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
