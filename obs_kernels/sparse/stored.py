# SPDX-License-Identifier: Apache-2.0
"""A checkpoint folder as it lies on the disk: the config's section, and tensors in one file or in shards.

Shards and their index have the names and the form that transformers and the hub use.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from obs_kernels.errors import CheckpointFormatError, ConfigError
from obs_kernels.patterns import NMPattern, parse_pattern

FORMAT_VERSION = 1
QUANT_METHOD = "obs_kernels"
SECTION = "quantization_config"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PARTS = ("values", "codes", "columns")
MAX_SHARD_SIZE = "5GB"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def config_section(patterns: Mapping[str, str]) -> dict[str, Any]:
    """The section of config.json that names the packed layers: {layer name: pattern}."""
    kinds = sorted(set(patterns.values()))
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "pattern": kinds[0] if len(kinds) == 1 else kinds,
        "targets": dict(patterns) if len(kinds) > 1 else list(patterns),
    }


def target_patterns(section: Any) -> dict[str, NMPattern]:
    """{layer name: pattern} of a section; none for None.

    Raises:
        CheckpointFormatError: another method or version, or damaged.
    """
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


def read_config(folder: Path) -> dict[str, Any]:
    """config.json.

    Raises:
        CheckpointFormatError: missing, or no JSON object.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointFormatError(f"{folder} has no config.json; give a folder written by save_pretrained")
    return _read_json(folder / "config.json")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, of one file or of the shards that its index names.

    Raises:
        CheckpointFormatError: a file is missing or damaged, or index and shards do not agree.
    """
    index = folder / INDEX
    if not index.is_file():
        return _read_file(folder / WEIGHTS)
    if (folder / WEIGHTS).exists():
        raise CheckpointFormatError(f"{folder} holds both {WEIGHTS} and {INDEX}; remove the one that is stale")
    files = shard_files(index)
    tensors: dict[str, Tensor] = {}
    for name, keys in files.items():
        found = _read_file(folder / name)
        if set(found) != keys:
            odd = sorted(set(found) ^ keys)[0]
            raise CheckpointFormatError(f"{folder / name} and {INDEX} do not agree on {odd}; the folder is incomplete")
        tensors |= found
    return tensors


def shard_files(index: Path) -> dict[str, set[str]]:
    """{file name: names of its tensors} of an index.

    Raises:
        CheckpointFormatError: damaged, or a name that is no plain file name.
    """
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointFormatError(f"{index} must hold a weight_map of tensor names to files, got {weight_map!r:.100}")
    files: dict[str, set[str]] = {}
    for key, name in weight_map.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w][\w.-]*\.safetensors", name):
            raise CheckpointFormatError(f"{index}: {key} must be in a .safetensors file of the folder, got {name!r}")
        files.setdefault(name, set()).add(key)
    return files


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], max_shard_size: int | str) -> list[Path]:
    """Write one file, or shards of at most ``max_shard_size`` (a tensor is never split) and their index."""
    from safetensors.torch import save_file

    shards = _split(tensors, shard_bytes(max_shard_size))
    if len(shards) == 1:
        save_file(dict(tensors), folder / WEIGHTS, metadata={"format": "pt"})
        return [folder / WEIGHTS]
    names = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return [folder / name for name in names]


def shard_bytes(size: int | str) -> int:
    """1000, "500MB" or "5GB" as bytes.

    Raises:
        ConfigError: neither.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B?)\s*", str(size).upper())
    unit = "" if found is None or found[2] in ("", "B") else found[2].removesuffix("B") + "B"
    value = 0 if found is None or isinstance(size, bool) else int(float(found[1]) * _UNITS[unit])
    if value < 1:
        raise ConfigError(f"max_shard_size must be bytes or a text such as '5GB', got {size!r}")
    return value


def weight_bytes(folder: Path) -> int:
    """Bytes of the folder's safetensors files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _split(tensors: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    room = limit
    for key, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = limit
        shards[-1][key] = tensor
        room -= tensor.nbytes
    return shards


def _read_file(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise CheckpointFormatError(f"{path} is missing; the folder is incomplete")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointFormatError(f"{path} is damaged: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointFormatError(f"{path} is not readable: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointFormatError(f"{path} must hold an object, got {type(value).__name__}")
    return value
