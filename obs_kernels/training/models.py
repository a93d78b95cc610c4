# SPDX-License-Identifier: Apache-2.0
"""Load a question answering model and its tokenizer from a folder or a hub name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from obs_kernels.errors import CheckpointFormatError, ConfigError, MissingDependencyError

PACKED_KEY = "quantization_config"


def load_qa_model(source: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> tuple[nn.Module, Any]:
    """(model in float32 and eval mode, fast tokenizer) of a folder or a hub name.

    A folder packed by ``save_pretrained`` is loaded packed.

    Raises:
        ConfigError: no such folder, or no question answering model in it. CheckpointFormatError: damaged files.
        MissingDependencyError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise MissingDependencyError(
            "transformers is needed to load a model; pip install 'obs_kernels[train]'"
        ) from None
    name = os.fspath(source)
    folder = Path(name)
    if not folder.is_dir() and (folder.exists() or _looks_like_path(name)):
        raise ConfigError(
            f"model must be a folder with config.json, or a hub name, got {name!r}, which does not exist; check "
            f"the path"
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"model must be a folder with config.json, got {name!r} without one; give a transformers model folder"
        )
    try:
        with _quiet(transformers):
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            model: nn.Module = _load_packed(folder) or transformers.AutoModelForQuestionAnswering.from_pretrained(
                name, dtype=torch.float32
            )
    except CheckpointFormatError:
        raise
    except (
        Exception
    ) as error:  # transformers, tokenizers and safetensors raise a dozen kinds for damaged or missing files
        kind = CheckpointFormatError if folder.is_dir() else ConfigError
        raise kind(
            f"model {name!r} could not be loaded: {type(error).__name__}: {error}; check the folder or the hub name"
        ) from error
    return model.to(device).eval(), tokenizer


def pick_device(device: str) -> torch.device:
    """``"auto"`` is CUDA if there is any; a CUDA device that is not there is a ``ConfigError``."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device must be auto, cpu or cuda[:n], got {device!r} ({error})") from None
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r} needs a GPU that torch can use, and there is none; use --device cpu")
    return picked


def _load_packed(folder: Path) -> nn.Module | None:
    config = folder / "config.json"
    if not config.is_file() or f'"{PACKED_KEY}"' not in config.read_text():
        return None
    from obs_kernels.sparse import load

    return load(folder)


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/")


class _quiet:
    """No progress bars and no advice from transformers while it loads."""

    def __init__(self, transformers: Any) -> None:
        self.logging = transformers.utils.logging

    def __enter__(self) -> None:
        self.level, self.bars = self.logging.get_verbosity(), self.logging.is_progress_bar_enabled()
        self.logging.set_verbosity_error()
        self.logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        self.logging.set_verbosity(self.level)
        if self.bars:
            self.logging.enable_progress_bar()
