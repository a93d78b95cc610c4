# SPDX-License-Identifier: Apache-2.0
"""A pruning state as two files, safetensors for the tensors and JSON for the rest; no pickle.

The JSON is written last and holds the hash of the tensors, so that where it is, the state is whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from obs_kernels.errors import CheckpointFormatError
from obs_kernels.files import write_bytes, write_text

STATE_JSON, STATE_TENSORS = "obs_pruning.json", "obs_pruning.safetensors"
FORMAT_VERSION = 1
_TENSOR = "tensor"


def write_state(folder: str | Path, state: Mapping[str, Any]) -> Path:
    """Write ``state``, nested dicts and lists of plain values and tensors, into ``folder``; the path of its JSON."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    plain = _split(state, "", tensors)
    data = save(tensors)
    where = Path(folder)
    write_bytes(where / STATE_TENSORS, data)
    document = {"format_version": FORMAT_VERSION, "tensors": hashlib.sha256(data).hexdigest(), "state": plain}
    return write_text(where / STATE_JSON, json.dumps(document))


def read_state(folder: str | Path) -> dict[str, Any]:
    """The state of ``write_state``, tensors on the CPU.

    Raises:
        CheckpointFormatError: a file is missing, damaged, of another version, or of another state than the other file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    where = Path(folder)
    try:
        document = json.loads((where / STATE_JSON).read_text())
        data = (where / STATE_TENSORS).read_bytes()
    except (OSError, ValueError) as error:
        raise CheckpointFormatError(
            f"{where} holds no whole pruning state ({error}); resume from another checkpoint"
        ) from None
    if not isinstance(document, dict) or document.get("format_version") != FORMAT_VERSION:
        raise CheckpointFormatError(f"{where / STATE_JSON} must be of format version {FORMAT_VERSION}; save it again")
    if document.get("tensors") != hashlib.sha256(data).hexdigest():
        raise CheckpointFormatError(
            f"{where / STATE_TENSORS} is not the file that {STATE_JSON} was written with; resume from another"
        )
    try:
        state = _joined(document["state"], load(data))
    except (SafetensorError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointFormatError(f"{where} holds a damaged pruning state ({error!r}); resume from another") from None
    if not isinstance(state, dict):
        raise CheckpointFormatError(f"{where / STATE_JSON} must hold an object as state, got {type(state).__name__}")
    return state


def _split(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[place] = value.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
        return {_TENSOR: place}
    if isinstance(value, Mapping):
        return {key: _split(item, f"{place}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_split(item, f"{place}/{i}", tensors) for i, item in enumerate(value)]
    return value


def _joined(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _joined(item, tensors) for key, item in value.items()}
    return [_joined(item, tensors) for item in value] if isinstance(value, list) else value
