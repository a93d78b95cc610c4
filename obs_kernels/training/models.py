# SPDX-License-Identifier: Apache-2.0
"""Load a model with a head and its tokenizer from a folder or a hub name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from obs_kernels.errors import CheckpointFormatError, ConfigError, MissingDependencyError

PACKED_KEY = "quantization_config"
HEADS = {
    "question-answering": "QuestionAnswering",
    "sequence-classification": "SequenceClassification",
    "masked-lm": "MaskedLM",
}
"""Heads by name, and what transformers calls their classes."""


def load_qa_model(source: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> tuple[nn.Module, Any]:
    """``load_model`` with a head for question answering."""
    return load_model(source, "question-answering", device=device)


def load_model(
    source: str | os.PathLike[str],
    head: str,
    *,
    device: torch.device | str = "cpu",
    num_labels: int | None = None,
    trained_head: bool = False,
) -> tuple[nn.Module, Any]:
    """(model in float32 and eval mode, fast tokenizer) of a folder or a hub name.

    A folder packed by ``save_pretrained`` is loaded packed. Weights that it has not, as the head of a pretrained
    encoder, are drawn anew from torch's global generator.

    Args:
        source: the folder, or the hub name.
        head: one of ``HEADS``.
        num_labels: classes of a new head; None takes what the model's config says.
        trained_head: refuse a model that lacks weights of its head.

    Raises:
        ConfigError: no such folder, no model with that head in it, or (``trained_head``) another head.
        CheckpointFormatError: damaged files. MissingDependencyError: transformers is not installed.
    """
    if head not in HEADS:
        raise ConfigError(f"head must be one of {', '.join(HEADS)}, got {head!r}")
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
            model = _load_packed(folder)
            missing: set[str] = set()
            if model is None:
                loader = getattr(transformers, f"AutoModelFor{HEADS[head]}")
                labels = {} if num_labels is None else {"num_labels": num_labels}
                model, info = loader.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **labels)
                missing = set(info["missing_keys"])
    except CheckpointFormatError:
        raise
    except (
        Exception
    ) as error:  # transformers, tokenizers and safetensors raise a dozen kinds for damaged or missing files
        kind = CheckpointFormatError if folder.is_dir() else ConfigError
        raise kind(
            f"model {name!r} could not be loaded: {type(error).__name__}: {error}; check the folder or the hub name"
        ) from error
    if HEADS[head] not in type(model).__name__:
        raise ConfigError(
            f"model {name!r} must have a head for {head}, got {type(model).__name__}; give its dense folder"
        )
    if trained_head and missing:
        raise ConfigError(
            f"model {name!r} has no trained head for {head}: it lacks {sorted(missing)[0]} and {len(missing) - 1} more "
            f"tensors; give one that was trained for the task"
        )
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
