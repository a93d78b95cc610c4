# SPDX-License-Identifier: Apache-2.0
"""The packed weight: stored format version 1, independent of any device.

* ``values`` [R, K], K = C/m * n: the kept weights of a row in column order.
* ``codes`` uint8: for 2:4 and v:2:m [R, ceil(K/4)], four 2-bit positions a byte, lowest bits first, each the index of
  the kept column among the panel's four (2:4: within the group), strictly ascending inside a pair, as
  ``mma.sp::ordered_metadata`` needs it; for other n:m [R, K], the column inside the group.
* ``columns`` [R/v, C/m, 4] uint8: the panel's columns inside the group, ascending; None without panels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from obs_kernels.checks import PACK_DTYPES
from obs_kernels.errors import CheckpointFormatError, ShapeNotSupportedError
from obs_kernels.packed_format import has_two_bit_codes, packed_shapes
from obs_kernels.patterns import NMPattern


@dataclass(frozen=True)
class SparseWeight:
    """A pruned weight as values, codes and columns; see the module for the layout."""

    values: Tensor
    codes: Tensor
    columns: Tensor | None
    pattern: NMPattern
    shape: tuple[int, int]

    def to_dense(self) -> Tensor:
        """The dense weight [R, C]; pruned entries are +0.0."""
        from obs_kernels.ops.packing import unpack

        return unpack(self)

    def to(self, *args: object, **kwargs: object) -> SparseWeight:
        """Move or cast; only ``values`` changes its dtype."""
        values: Tensor = self.values.to(*args, **kwargs)  # type: ignore[call-overload]
        columns = None if self.columns is None else self.columns.to(values.device)
        return replace(self, values=values, codes=self.codes.to(values.device), columns=columns)

    @property
    def nbytes(self) -> int:
        """Bytes of values, codes and columns."""
        return self.values.nbytes + self.codes.nbytes + (0 if self.columns is None else self.columns.nbytes)

    def columns_or_empty(self) -> Tensor:
        """``columns``, or an empty uint8 tensor without panels (torch.library ops take tensors)."""
        return self.codes.new_empty(0) if self.columns is None else self.columns

    def validate(self, name: str = "weight") -> None:
        """Raise ``CheckpointFormatError`` unless shapes, dtypes, index ranges and order are those of the format."""
        try:
            self.pattern.check_shape(self.shape, name=name)
        except ShapeNotSupportedError as error:
            raise CheckpointFormatError(f"{name}: {error}") from None
        wanted = dict(zip(("values", "codes", "columns"), packed_shapes(self.pattern, *self.shape), strict=True))
        for part, shape in wanted.items():
            tensor = getattr(self, part)
            if (tensor is None) != (shape is None) or (tensor is not None and tuple(tensor.shape) != shape):
                came = "nothing" if tensor is None else f"{list(tensor.shape)}"
                raise CheckpointFormatError(
                    f"{name}.{part} must be {shape and list(shape)} for pattern {self.pattern}, got {came}"
                )
            if tensor is not None and part != "values" and tensor.dtype != torch.uint8:
                raise CheckpointFormatError(f"{name}.{part} must be uint8, got {tensor.dtype}")
        if self.values.dtype not in PACK_DTYPES:
            raise CheckpointFormatError(
                f"{name}.values must be float16, bfloat16, float32 or float64, got {self.values.dtype}"
            )
        if self.values.numel():
            self._validate_indices(name)

    def _validate_indices(self, name: str) -> None:
        n, m = self.pattern.n, self.pattern.m
        rows, kept = self.values.shape
        two_bit = has_two_bit_codes(self.pattern)
        places = torch.stack([self.codes >> s & 3 for s in (0, 2, 4, 6)], -1).flatten(1) if two_bit else self.codes
        if bool(places[:, kept:].any()):
            raise CheckpointFormatError(f"{name}.codes: unused high bits must be 0")
        _check_ascending(f"{name}.codes", places[:, :kept].reshape(rows, -1, n), 4 if two_bit else m)
        if self.columns is not None:
            _check_ascending(f"{name}.columns", self.columns, m)


def _check_ascending(name: str, index: Tensor, limit: int) -> None:
    index = index.to(torch.int16)
    if bool((index >= limit).any()):
        raise CheckpointFormatError(
            f"{name}: indices must be below {limit}, got {int(index.max())}; the file is damaged"
        )
    if bool((index.diff(dim=-1) <= 0).any()):
        raise CheckpointFormatError(f"{name}: indices must be strictly ascending; the file is damaged")
