# SPDX-License-Identifier: Apache-2.0
"""``sparse_linear`` of the compiled module: the product by ``wgmma.sp``, for GPUs of compute capability 9.0.

A weight is read in an order of its own (``prepack``), made when it is first used and kept as long as its values live.
"""

from __future__ import annotations

import functools
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from obs_kernels import _ext
from obs_kernels.cuda_calls.device import check_gpu, check_on_cuda
from obs_kernels.errors import ConfigError, DTypeNotSupportedError, ShapeNotSupportedError, UnsupportedGPUError
from obs_kernels.launch_plan import LaunchPlan
from obs_kernels.packed_format import packed_shapes, runs_as_two_of_four
from obs_kernels.patterns import NMPattern, VNMPattern, parse_pattern

CAPABILITY = (9, 0)
ARCHITECTURE = "90a"
"""What the module must be built for: ``wgmma`` is in no other code, nor in PTX for later GPUs."""
TYPES = {torch.float16: 0, torch.bfloat16: 1}
ACTIVATIONS = {"": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
WIDTH = 8
"""Elements of 16 bytes: rows of x must be multiples of them."""


def __getattr__(name: str) -> Any:
    """``CONFIGS``: names of the tile configurations, from the compiled module."""
    if name == "CONFIGS":
        return tuple(_ext.load().SPARSE_TILES)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def sparse_linear(
    x: Tensor,
    values: Tensor,
    codes: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    pattern: str,
    *,
    activation: str,
    x_layout: str,
    y_layout: str,
) -> Tensor:
    """``activation(x W^T + bias)`` for ``x`` [T, C] ("token") or [C, T] ("feature"); returns [T, R] or [R, T]."""
    tokens = x.shape[0] if x_layout == "token" else x.shape[1]
    rows, kept = values.shape
    y = x.new_empty((tokens, rows) if y_layout == "token" else (rows, tokens))
    if y.numel() == 0:
        return y
    if kept == 0:  # no columns: what is left is activation(bias), here of a weight of zeros
        x, x_layout, pattern = x.new_zeros(tokens, WIDTH), "token", "2:4"
        packed = prepack(
            values.new_zeros(rows, WIDTH // 2), codes.new_full((rows, 1), 0x44), codes.new_empty(0), pattern
        )
    else:
        packed = prepacked(values, codes, columns, pattern)
    x, x_layout, cols = as_copied(x, x_layout)
    launch_sparse_linear(
        x,
        packed,
        None if bias is None else bias.contiguous(),
        y,
        rows=rows,
        cols=cols,
        activation=activation,
        x_layout=x_layout,
        y_layout=y_layout,
    )
    return y


def as_copied(x: Tensor, x_layout: str) -> tuple[Tensor, str, int]:
    """(x, layout, columns) that the copy engine takes: rows and start of whole 16 bytes; x itself where it can be."""
    if x_layout == "feature" and x.shape[1] % WIDTH:
        x, x_layout = x.T, "token"
    if x_layout == "token" and x.shape[1] % WIDTH:
        x = F.pad(x, (0, -x.shape[1] % WIDTH))  # the weight has zeros there
    x = x.contiguous()
    if x.data_ptr() % 16:
        x = x.clone()
    return x, x_layout, x.shape[1] if x_layout == "token" else x.shape[0]


@dataclass
class _Prepacked:
    """A weight in the order of the product, and what it was made of."""

    sources: tuple[StorageWeakRef, ...]
    version: tuple[int, ...]
    packed: Tensor
    stream: int
    done: torch.cuda.Event


_PREPACKED: dict[tuple[Any, ...], _Prepacked] = {}
"""By addresses and layout of values, codes and columns. Global, as ops of torch.library take tensors and no objects."""
_LOCK = threading.Lock()


def prepacked(values: Tensor, codes: Tensor, columns: Tensor, pattern: str) -> Tensor:
    """``prepack``, or what an earlier call made of the same tensors, unless they were written to since.

    Kept until the storage of the values dies. A weight that changed is packed into the same memory, so that graphs that
    were captured before follow. Writes that torch does not count are not seen: by ``.data``, by numpy, or to inference
    tensors.
    """
    parts = (values, codes, columns)
    stream = torch.cuda.current_stream(values.device)
    capturing = _is_capturing(values.device)
    key = (pattern, values.dtype, values.shape, values.stride(), *(part.data_ptr() for part in parts))
    version = tuple(0 if part.is_inference() else part._version for part in parts)
    found = _PREPACKED.get(key)
    if found is not None and any(source.expired() for source in found.sources):
        found = None
    if found is not None and found.version == version:
        if found.stream != stream.cuda_stream and not capturing:  # torch.cuda.graph begins with a sync
            stream.wait_event(found.done)
            found.packed.record_stream(stream)
        return found.packed
    if capturing:
        return prepack(*parts, pattern)  # memory of the graph's pool, filled by each replay
    with _LOCK:
        if found is not None:
            stream.wait_event(found.done)
        packed = prepack(*parts, pattern, out=_lasting_memory(parts, pattern) if found is None else found.packed)
        done = torch.cuda.Event()
        done.record(stream)
        sources = tuple(StorageWeakRef(part.untyped_storage()) for part in parts)
        _PREPACKED[key] = _Prepacked(sources, version, packed, stream.cuda_stream, done)
        if found is None:
            weakref.finalize(values.untyped_storage(), _PREPACKED.pop, key, None).atexit = False
    return packed


def _lasting_memory(parts: tuple[Tensor, Tensor, Tensor], pattern: str) -> Tensor:
    """Memory for ``prepack``, of no graph's pool: those take what a thread allocates while it warms up for a capture,
    and want it back. So another thread allocates it, on this thread's stream.
    """
    stream = torch.cuda.current_stream(parts[0].device)

    def allocate() -> Tensor:
        with torch.cuda.stream(stream):
            return _memory(parts, pattern)

    with ThreadPoolExecutor(max_workers=1) as outside:
        return outside.submit(allocate).result()


def _memory(parts: tuple[Tensor, Tensor, Tensor], pattern: str) -> Tensor:
    values, parsed = parts[0], parse_pattern(pattern)
    rows, cols = values.shape[0], values.shape[1] // parsed.n * parsed.m
    return torch.empty(_ext.load().prepacked_bytes(rows=rows, cols=cols), dtype=torch.uint8, device=values.device)


def _is_capturing(device: torch.device) -> bool:
    if torch.cuda.current_device() == device.index:
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def prepack(values: Tensor, codes: Tensor, columns: Tensor, pattern: str, *, out: Tensor | None = None) -> Tensor:
    """[bytes] uint8, ``out`` if given: a packed weight of 16-bit values in the order in which the product reads it.

    Raises:
        BackendUnavailableError: the compiled module is absent. ConfigError: the pattern is not 2:4 at heart.
        DTypeNotSupportedError, DeviceMismatchError, ShapeNotSupportedError, UnsupportedGPUError: as named.
    """
    native = _ext.load()
    parsed: NMPattern = parse_pattern(pattern)
    if not runs_as_two_of_four(parsed):
        raise ConfigError(f"pattern must keep at most 2 of 4, 8, 12, ... columns, got {pattern}; use the reference")
    if values.dtype not in TYPES:
        raise DTypeNotSupportedError(f"values must be float16 or bfloat16, got {values.dtype}; convert with .to()")
    check_on_cuda(values=values, codes=codes, columns=columns)
    _check_sparse_gpu(values.device.index)
    rows, cols = values.shape[0], values.shape[1] // parsed.n * parsed.m
    wanted = [shape or (0,) for shape in packed_shapes(parsed, rows, cols)]
    shapes = [tuple(part.shape) for part in (values, codes, columns)]
    if shapes != wanted or codes.dtype != torch.uint8 or columns.dtype != torch.uint8:
        raise ShapeNotSupportedError(
            f"values, codes and columns must be {wanted} for pattern {pattern}, the last two uint8, got {shapes}, "
            f"{codes.dtype} and {columns.dtype}"
        )
    packed = _memory((values, codes, columns), pattern) if out is None else out
    native.prepack(
        values=values.data_ptr(),
        codes=codes.data_ptr(),
        columns=columns.data_ptr(),
        packed=packed.data_ptr(),
        rows=rows,
        cols=cols,
        v=parsed.v if isinstance(parsed, VNMPattern) else 0,
        n=parsed.n,
        m=parsed.m,
        device=values.device.index,
        stream=torch.cuda.current_stream(values.device).cuda_stream,
    )
    return packed


def launch_sparse_linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    y: Tensor,
    *,
    rows: int,
    cols: int,
    activation: str,
    x_layout: str = "token",
    y_layout: str,
    config: str | None = None,
) -> LaunchPlan:
    """Fill ``y`` [T, R] or [R, T]; ``config`` forces a tile of ``CONFIGS``. Returns what was launched.

    ``x`` [T, C] or [C, T] with rows of whole 16 bytes, ``packed`` of ``prepack``, ``bias`` [R] or None.
    """
    native = _ext.load()
    if x.dtype not in TYPES or y.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        raise DTypeNotSupportedError(
            f"x, y and bias must share float16 or bfloat16, got {x.dtype}, {y.dtype}"
            f"{'' if bias is None else f', {bias.dtype}'}"
        )
    check_on_cuda(x=x, packed=packed, y=y, **({} if bias is None else {"bias": bias}))
    tokens = x.shape[0] if x_layout == "token" else x.shape[1]
    shapes = [tuple(x.shape), tuple(y.shape), packed.numel(), None if bias is None else tuple(bias.shape)]
    wanted = [
        (tokens, cols) if x_layout == "token" else (cols, tokens),
        (tokens, rows) if y_layout == "token" else (rows, tokens),
        native.prepacked_bytes(rows=rows, cols=cols),
        None if bias is None else (rows,),
    ]
    if shapes != wanted:
        raise ShapeNotSupportedError(f"x, y, packed bytes and bias must be {wanted}, got {shapes}")
    tiles = native.SPARSE_TILES
    if config is not None and config not in tiles:
        raise ConfigError(f"config must be one of {', '.join(map(repr, tiles))}, got {config!r}")
    device = x.device.index
    _check_sparse_gpu(device)
    plan = native.sparse_linear(
        x=x.data_ptr(),
        packed=packed.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        y=y.data_ptr(),
        rows=rows,
        cols=cols,
        tokens=tokens,
        type=TYPES[x.dtype],
        activation=ACTIVATIONS[activation],
        feature_x=x_layout == "feature",
        feature_y=y_layout == "feature",
        config=-1 if config is None else tiles.index(config),
        device=device,
        stream=torch.cuda.current_stream(x.device).cuda_stream,
    )
    op, path, blocks, threads = plan
    return LaunchPlan(op, path, blocks, threads, config=path if path in tiles else "")


def _check_sparse_gpu(device: int) -> None:
    check_gpu(device)
    reason = lacks_sparse_product(device)
    if reason is not None:
        raise UnsupportedGPUError(f"sparse_linear cannot run on cuda:{device}: {reason}. Fix: use backend='reference'")


@functools.cache
def lacks_sparse_product(device: int) -> str | None:
    """Why ``wgmma.sp`` does not run on GPU ``device`` by this module; None if it does."""
    found = torch.cuda.get_device_capability(device)
    if found != CAPABILITY:
        return f"it needs compute capability 9.0 (Hopper), found {found[0]}.{found[1]}"
    built = _ext.build_info()["architectures"]
    if not any(architecture.startswith(ARCHITECTURE) for architecture in built):
        return f"the compiled module holds code for {', '.join(built)}, and it needs {ARCHITECTURE}"
    return None
