# SPDX-License-Identifier: Apache-2.0
"""Pack a pruned weight into values, codes and columns, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from obs_kernels import checks
from obs_kernels.ops.dispatch import kernel, resolve
from obs_kernels.ops.sparse_weight import SparseWeight
from obs_kernels.packed_format import packed_shapes
from obs_kernels.patterns import Pattern


@torch.no_grad()
def pack(weight: Tensor, mask: Tensor, pattern: str | Pattern, *, backend: str | None = None) -> SparseWeight:
    """Pack the kept entries of a weight; ``unpack`` gives them back bit for bit.

    Args:
        weight: [R, C] float16, bfloat16, float32 or float64; kept entries finite.
        mask: [R, C] bool, True = kept; must satisfy ``pattern``. A group with fewer than n kept entries gets +0.0 at
            the lowest unused positions.
        pattern: "n:m", or "v:2:m" with m >= 4.
        backend: None, or a name of ``dispatch.BACKENDS``.

    Returns:
        ``SparseWeight`` in the stored format, version 1 (see ``sparse_weight``).

    Raises:
        SparsityPatternError: the mask breaks the pattern; names the first group or panel.
        NonFiniteError: NaN or Inf in a kept entry. ShapeNotSupportedError, ConfigError, DTypeNotSupportedError: as
        named.

    The mask and the values are checked (one sync on a GPU) except while a CUDA graph is captured.
    """
    parsed = checks.check_pack(weight, mask, pattern)
    if not torch.compiler.is_compiling() and not _capturing(weight):
        parsed.validate_mask(mask)
        checks.check_finite("weight", weight.masked_fill(~mask, 0.0))
    values, codes, columns = torch.ops.obs_kernels.pack(
        weight, mask, str(parsed), backend=resolve("pack", backend, weight)
    )
    panels = columns if columns.dim() == 3 else None
    return SparseWeight(values, codes, panels, parsed, (weight.shape[0], weight.shape[1]))


@torch.no_grad()
def unpack(sparse: SparseWeight, *, backend: str | None = None) -> Tensor:
    """The dense weight [R, C] of a ``SparseWeight``; pruned entries are +0.0."""
    dense: Tensor = torch.ops.obs_kernels.unpack(
        sparse.values,
        sparse.codes,
        sparse.columns_or_empty(),
        str(sparse.pattern),
        backend=resolve("unpack", backend, sparse.values),
    )
    return dense


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


@torch.library.custom_op("obs_kernels::pack", mutates_args=())
def _pack(weight: Tensor, mask: Tensor, pattern: str, *, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return kernel("pack", backend)(weight.contiguous(), mask.contiguous(), pattern)  # kernels demand it


@_pack.register_fake
def _(weight: Tensor, mask: Tensor, pattern: str, *, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    parsed = checks.check_pack(weight, mask, pattern)
    values, codes, columns = packed_shapes(parsed, *weight.shape)
    return (
        weight.new_empty(values),
        weight.new_empty(codes, dtype=torch.uint8),
        weight.new_empty(columns or (0,), dtype=torch.uint8),
    )


@torch.library.custom_op("obs_kernels::unpack", mutates_args=())
def _unpack(values: Tensor, codes: Tensor, columns: Tensor, pattern: str, *, backend: str) -> Tensor:
    return kernel("unpack", backend)(values, codes, columns, pattern)


@_unpack.register_fake
def _(values: Tensor, codes: Tensor, columns: Tensor, pattern: str, *, backend: str) -> Tensor:
    parsed = checks.parse_pattern(pattern)
    return values.new_empty(values.shape[0], values.shape[1] // parsed.n * parsed.m)
