# SPDX-License-Identifier: Apache-2.0
"""A checkpoint folder into another form: packed, dense with zeros, or torch's semi-structured layout."""

from __future__ import annotations

import os
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import nn

from obs_kernels import checks
from obs_kernels.dtype_names import DTYPES, dtype_name
from obs_kernels.errors import CheckpointFormatError, ConfigError
from obs_kernels.files import whole_folder
from obs_kernels.sparse import semi_structured, stored
from obs_kernels.sparse.checkpoint import (
    FOLDER_README,
    architecture_of,
    build_model,
    dense_state,
    fill_model,
    load,
    packed_state,
    write_folder,
)
from obs_kernels.sparse.compress import CompressionReport, compress_, decompress_
from obs_kernels.sparse.linear import SparseLinear

FORMS = ("packed", "dense", "semi-structured")
COMPANIONS = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "generation_config.json",
    "preprocessor_config.json",
    "chat_template*",
)
"""Files beside the weights that go along, those of the tokenizer above all; nothing pickled."""

SEMI_README = """# Weights in torch's semi-structured layout

Converted by obs_kernels: `<layer>.sparse` and `.meta` as `torch.sparse.SparseSemiStructuredTensorCUTLASS` reads them.

    from obs_kernels.sparse.semi_structured import load_semi_structured
    model = load_semi_structured("this folder")  # on a GPU of compute capability 8.x

Readers without the package are refused: each such layer also has an empty `<layer>.weight`, whose shape fits no model.
"""


def form_of(folder: Path) -> str:
    """ "packed", "dense" or "semi-structured", by config.json.

    Raises:
        CheckpointFormatError: no such folder, or quantized by something else.
    """
    found = stored.read_config(folder).get(stored.SECTION)
    method = found.get("quant_method") if isinstance(found, dict) else found
    forms = {None: "dense", stored.QUANT_METHOD: "packed", semi_structured.METHOD: "semi-structured"}
    if found is not None and method not in (stored.QUANT_METHOD, semi_structured.METHOD):
        raise CheckpointFormatError(f"{folder} is quantized by {method!r:.50}; give a folder that is not")
    return forms[method]


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str,
    *,
    pattern: str | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = stored.MAX_SHARD_SIZE,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the model of folder ``source`` to folder ``out`` in another form; whole or not at all.

    Args:
        source: a folder of a transformers model: packed, dense with zeros, or semi-structured.
        out: folder to write; the tokenizer goes along.
        to: "packed", "dense" or "semi-structured".
        pattern: of a dense source; None finds it in the zeros.
        dtype: "bf16", "f16", "f32" or "f64", or another spelling of these; None keeps the source's.
        max_shard_size: as in ``save_pretrained``.
        overwrite: replace ``out`` if it is a model folder.

    Returns:
        {"job": "convert", "from", "to", "layers": {name: pattern}, "sizes": {form: bytes of weights}, ...}.

    Raises:
        ConfigError: a bad argument, or nothing pruned. CheckpointFormatError: a bad source. SparsityPatternError: the
        zeros break ``pattern``.
    """
    checks.check_choice("to", to, FORMS)
    folder, target = Path(source), check_target(out, overwrite=overwrite)
    form = form_of(folder)
    if form == to:
        raise ConfigError(f"source {os.fspath(source)!r} is {to} already; name another form: {', '.join(FORMS)}")
    if pattern is not None and form != "dense":
        raise ConfigError(f"pattern belongs to a dense source, got a {form} one, which knows its own; leave it out")
    model = _read(folder, form, dtype)
    report = compress_(model, pattern=pattern) if to != "dense" and form == "dense" else None
    layers = {name: str(m.pattern) for name, m in model.named_modules() if isinstance(m, SparseLinear)}
    _write(model, folder, target, to, max_shard_size)
    return {
        "job": "convert",
        "source": os.fspath(source),
        "out": os.fspath(out),
        "from": form,
        "to": to,
        "layers": layers,
        "dense_layers": {} if report is None else report.dense,
        "sizes": {form: stored.weight_bytes(folder), to: stored.weight_bytes(target)},
    }


def compress_folder(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    pattern: str | None = None,
    tokens: int | None = None,
    measure: bool = False,
    device: torch.device | str = "cpu",
    dtype: str | None = None,
    verify: bool = False,
    max_shard_size: int | str = stored.MAX_SHARD_SIZE,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Pack a dense pruned folder: ``convert(..., "packed")`` with the choices of ``compress_``.

    Args:
        source, out, pattern, dtype, max_shard_size, overwrite: as in ``convert``.
        tokens, measure: as in ``compress_``: layers that lose there stay dense.
        device: where ``measure`` times.
        verify: read ``out`` back and compare every weight with the source, bit for bit.

    Returns:
        As ``convert``, with "job": "compress", the notes of ``compress_``, and "verified": the number of weights
        compared, or None.

    Raises:
        As ``convert``; ConfigError too if every layer stays dense.
    """
    folder, target = Path(source), check_target(out, overwrite=overwrite)
    form = form_of(folder)
    if form != "dense":
        raise ConfigError(f"source {os.fspath(source)!r} is {form}; compress takes a dense pruned folder")
    model = _read(folder, form, dtype).to(device)
    wanted = {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()} if verify else {}
    report: CompressionReport = compress_(model, tokens, pattern=pattern, measure=measure)
    if not report:
        name, reason = next(iter(report.dense.items()))
        raise ConfigError(f"no layer is left to pack: all {len(report.dense)} stay dense ({name}: {reason})")
    _write(model.cpu(), folder, target, "packed", max_shard_size)
    return {
        "job": "compress",
        "source": os.fspath(source),
        "out": os.fspath(out),
        "from": "dense",
        "to": "packed",
        "layers": dict(report),
        "dense_layers": report.dense,
        "notes": report.notes,
        "verified": _verify(target, wanted) if verify else None,
        "sizes": {"dense": stored.weight_bytes(folder), "packed": stored.weight_bytes(target)},
    }


def check_target(out: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """``out`` as a path that may be written.

    Raises:
        ConfigError: it is a file, or holds something that may not be replaced.
    """
    target = Path(out)
    if target.exists() and not target.is_dir():
        raise ConfigError(f"out must be a folder, got the file {os.fspath(out)!r}; name another")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise ConfigError(f"out {os.fspath(out)!r} exists and is not empty; name another or pass --overwrite")
        if not (target / "config.json").is_file():
            raise ConfigError(f"out {os.fspath(out)!r} holds no model and is not replaced; name another")
    return target


def read_model(folder: Path) -> nn.Module:
    """The model of a folder in any form, with packed layers unless it is dense.

    Raises:
        CheckpointFormatError: no such folder, or damaged.
    """
    return _read(folder, form_of(folder), None)


def _read(folder: Path, form: str, dtype: str | None) -> nn.Module:
    kind = None if dtype is None else DTYPES[dtype_name("dtype", dtype)]
    match form:
        case "packed":
            model = load(folder)
        case "semi-structured":
            config = stored.read_config(folder)
            patterns, state = semi_structured.read_semi_structured(folder, config)
            model = fill_model(folder, build_model(config), {}, state)
            for name, pattern in patterns.items():
                model.set_submodule(name, SparseLinear.from_linear(model.get_submodule(name), pattern))
        case _:
            model = _read_dense(folder)
    return model if kind is None else nn.Module.to(model, kind)


def _read_dense(folder: Path) -> nn.Module:
    """By transformers, which knows older names of parameters too; nothing may be missing."""
    architecture = architecture_of(stored.read_config(folder))
    if not any(folder.glob("*.safetensors")):
        raise CheckpointFormatError(f"{folder} has no safetensors; save the model by save_pretrained first")
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        model, info = architecture.from_pretrained(
            os.fspath(folder), dtype="auto", local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # transformers raises a dozen kinds for damaged files
        raise CheckpointFormatError(f"{folder} could not be read: {type(error).__name__}: {error}") from None
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointFormatError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}")
    found: nn.Module = model
    return found


def _write(model: nn.Module, source: Path, target: Path, to: str, max_shard_size: int | str) -> None:
    """The form ``to`` with the companions of ``source``, whole or not at all."""
    stored.shard_bytes(max_shard_size)
    companions = [path for path in sorted(source.iterdir()) if path.is_file() and _goes_along(path.name)]
    sparse = {name: m for name, m in model.named_modules() if isinstance(m, SparseLinear)}
    section, readme = None, ""
    match to:
        case "semi-structured":
            state, readme = semi_structured.semi_structured_state(model), SEMI_README
            section = semi_structured.section(model)
        case "packed":
            state, readme = packed_state(model, sparse), FOLDER_README
            section = stored.config_section({name: str(m.pattern) for name, m in sparse.items()})
        case _:
            state = dense_state(model, sparse)
    with whole_folder(target) as folder:
        write_folder(folder, model, state, section, max_shard_size, readme=readme)
        for path in companions:
            shutil.copyfile(path, folder / path.name)


def _goes_along(name: str) -> bool:
    return any(fnmatch(name, rule) for rule in COMPANIONS)


def _verify(target: Path, wanted: dict[str, torch.Tensor]) -> int:
    """Weights of the folder as written, compared bit for bit with ``wanted``; their number."""
    model = load(target)
    decompress_(model)
    found = model.state_dict()
    for name, tensor in wanted.items():
        if name not in found or not torch.equal(found[name], tensor):
            raise CheckpointFormatError(f"{target}: {name} does not read back as it was written; report this")
    return len(wanted)


__all__ = ["FORMS", "check_target", "compress_folder", "convert", "form_of", "read_model"]
