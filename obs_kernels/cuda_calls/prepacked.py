# SPDX-License-Identifier: Apache-2.0
"""A packed weight in the order in which the sparse product reads it, made once and kept as long as it lives."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from obs_kernels import _ext
from obs_kernels.cuda_calls.device import check_on_cuda
from obs_kernels.cuda_calls.weight_tables import forget_with, key_of, sources_of
from obs_kernels.cuda_calls.wgmma import TYPES, check_sparse_gpu
from obs_kernels.errors import ConfigError, DTypeNotSupportedError, ShapeNotSupportedError
from obs_kernels.packed_format import packed_shapes, runs_as_two_of_four
from obs_kernels.patterns import NMPattern, VNMPattern, parse_pattern


@dataclass
class Prepacked:
    """A weight in the order of the product, and what it was made of."""

    sources: tuple[StorageWeakRef, ...]
    version: tuple[int, ...]
    packed: Tensor
    done: torch.cuda.Event | None
    """After the packing; None in a graph, whose pool has the memory, filled by each replay."""
    joined: set[int]
    """Streams that come after it: the one that packed, and those that waited."""

    def joined_by(self, stream: torch.cuda.Stream) -> Prepacked:
        """Itself, behind which torch's current stream comes."""
        if stream.cuda_stream not in self.joined:
            self.join()
        return self

    def join(self) -> None:
        """Let torch's current stream wait for the packing."""
        if self.done is None or _is_capturing(self.packed.device):  # torch.cuda.graph begins with a sync
            return
        stream = torch.cuda.current_stream(self.packed.device)
        stream.wait_event(self.done)
        self.packed.record_stream(stream)
        self.joined.add(stream.cuda_stream)


_PREPACKED: dict[Hashable, Prepacked] = {}
"""By ``key_of``. Global, as ops of torch.library take tensors and no objects."""
_LOCK = threading.Lock()


def versions(parts: tuple[Tensor | None, ...]) -> tuple[int, ...]:
    """How often each was written to, as far as torch counts: 0 for inference tensors, and for none."""
    return tuple(0 if part is None or part.is_inference() else part._version for part in parts)


def prepacked(values: Tensor, codes: Tensor, columns: Tensor, pattern: str) -> Prepacked:
    """``prepack``, or what an earlier call made of the same tensors, unless they were written to since.

    Kept until a storage of the weight dies. A weight that changed is packed into the same memory, so that graphs that
    were captured before follow. Writes that torch does not count are not seen: by ``.data``, by numpy, or to inference
    tensors.
    """
    parts = (values, codes, columns)
    # the empty tensor that stands for no columns is another one in each call, and dies with it
    weight = (values, codes, columns if columns.untyped_storage().nbytes() else None)
    stream = torch.cuda.current_stream(values.device)
    key = key_of(*weight, pattern)
    version = versions(weight)
    found = _PREPACKED.get(key)
    if found is not None and found.version == version:
        return found.joined_by(stream)
    sources = sources_of(*weight)
    if _is_capturing(values.device):
        return Prepacked(sources, version, prepack(*parts, pattern), None, {stream.cuda_stream})
    with _LOCK:
        found = _PREPACKED.get(key)
        if found is not None and found.version == version:  # another thread has packed it meanwhile
            return found.joined_by(stream)
        if found is not None and found.done is not None:
            stream.wait_event(found.done)
        packed = prepack(*parts, pattern, out=_lasting_memory(parts, pattern) if found is None else found.packed)
        done = torch.cuda.Event()
        done.record(stream)
        made = _PREPACKED[key] = Prepacked(sources, version, packed, done, {stream.cuda_stream})
        if found is None:
            forget_with(_PREPACKED, key, *weight)
    return made


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
    check_sparse_gpu(values.device.index)
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
