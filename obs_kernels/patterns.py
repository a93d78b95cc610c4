# SPDX-License-Identifier: Apache-2.0
"""Sparsity patterns: what may be kept, which shapes fit, and whether a mask obeys.

``n:m`` always means keep n of m neighbours in a row. ``v:n:m`` adds that v consecutive rows share their kept columns.
The classes are frozen and hashable; a stage of a schedule is ``dataclasses.replace(pattern, n=...)``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from obs_kernels.errors import ConfigError, ShapeNotSupportedError, SparsityPatternError

__all__ = ["BlockPattern", "NMPattern", "Pattern", "UnstructuredPattern", "VNMPattern", "parse_pattern"]

PATTERN_HELP = "'2:4', '64:2:8', 'unstructured:0.9' or 'block4:0.8'"


@dataclass(frozen=True)
class Pattern:
    """Base of the four kinds of pattern."""

    @property
    def sparsity(self) -> float:
        """Share of weights that are pruned, 0 to 1."""
        raise NotImplementedError

    @property
    def fixed_count(self) -> bool:
        """True if every group keeps a fixed count (n:m, v:n:m); False if a threshold decides."""
        raise NotImplementedError

    def multiples(self) -> tuple[int, int]:
        """(rows multiple, cols multiple) that a weight of this pattern needs."""
        raise NotImplementedError

    def check_shape(self, shape: tuple[int, ...] | torch.Size, *, name: str = "weight") -> None:
        """Raise ``ShapeNotSupportedError`` unless a weight of ``shape`` [R, C] fits, naming what must divide what."""
        if len(shape) != 2:
            raise ShapeNotSupportedError(
                f"{name} must be a matrix [R, C] for pattern {self}, got shape {list(shape)}; flatten it to two "
                f"dimensions"
            )
        rows, cols = int(shape[0]), int(shape[1])
        need_rows, need_cols = self.multiples()
        if cols % need_cols:
            raise ShapeNotSupportedError(
                f"{name} is [{rows}, {cols}]; pattern {self} needs cols % {need_cols} == 0 "
                f"({cols}: pad to {_round_up(cols, need_cols)} or leave it out). "
                f"Fix: ignore this layer, or on_unsupported='pad' or 'skip'"
            )
        if rows % need_rows:
            fits = [v for v in (256, 128, 64, 32, 16, 8, 4, 2, 1) if v < need_rows and rows % v == 0]
            raise ShapeNotSupportedError(
                f"{name} is [{rows}, {cols}]; pattern {self} needs rows % {need_rows} == 0 "
                f"({rows}: pad to {_round_up(rows, need_rows)}, or v = {fits[0]} fits). "
                f"Fix: use v = {fits[0]}, ignore this layer, or on_unsupported='pad' or 'skip'"
            )

    def padded_shape(self, shape: tuple[int, ...] | torch.Size) -> tuple[int, int]:
        """The smallest [R', C'] >= ``shape`` that fits."""
        need_rows, need_cols = self.multiples()
        return _round_up(int(shape[0]), need_rows), _round_up(int(shape[1]), need_cols)

    def validate_mask(self, mask: Tensor, *, name: str = "mask") -> None:
        """Raise ``SparsityPatternError`` naming the first group or panel of ``mask`` [R, C] (True = kept) with too many
        kept.
        """
        if mask.dtype != torch.bool:
            raise SparsityPatternError(f"{name} must be torch.bool with True = kept, got {mask.dtype}; use weight != 0")
        self.check_shape(mask.shape, name=name)
        self._validate(mask, name)

    def count_violations(self, mask: Tensor, *, dead: Tensor | None = None) -> int:
        """Number of groups, panels or blocks of ``mask`` that break the pattern.

        ``dead``: entries that were zero before any pruning; a block that keeps all others is whole.
        """
        return sum(int(bad.sum()) for bad in self._violations(mask, dead))

    def _violations(self, mask: Tensor, dead: Tensor | None = None) -> list[Tensor]:
        raise NotImplementedError

    def _validate(self, mask: Tensor, name: str) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class NMPattern(Pattern):
    """Keep at most ``n`` of each ``m`` consecutive columns of a row."""

    n: int
    m: int

    def __post_init__(self) -> None:
        _check_nm(self.n, self.m, str(self))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @cached_property
    def text(self) -> str:
        """``str(self)``, made once: every call of a product asks for it."""
        return str(self)

    @property
    def sparsity(self) -> float:
        """1 - n/m."""
        return 1.0 - self.n / self.m

    @property
    def fixed_count(self) -> bool:
        """Always True."""
        return True

    def multiples(self) -> tuple[int, int]:
        """(1, m)."""
        return 1, self.m

    def _violations(self, mask: Tensor, dead: Tensor | None = None) -> list[Tensor]:
        return [mask.unflatten(1, (-1, self.m)).sum(2) > self.n]

    def _validate(self, mask: Tensor, name: str) -> None:
        bad = self._violations(mask)[0]
        if bad.any():
            row, group = _first(bad)
            kept = int(mask[row, group * self.m : (group + 1) * self.m].sum())
            raise SparsityPatternError(
                f"{name} keeps {kept} of {self.m} in row {row}, group {group} (columns {group * self.m} to "
                f"{(group + 1) * self.m - 1}); pattern {self} allows at most {self.n}. Fix: search a mask with "
                f"this pattern"
            )


@dataclass(frozen=True)
class VNMPattern(NMPattern):
    """``v`` consecutive rows share ``num_columns`` kept columns of each ``m``.

    Each row keeps at most ``n`` of those. ``columns`` says how many if it is not the usual number, n to m; written
    after a slash, as in ``"64:3:8/5"``.
    """

    v: int = 64
    columns: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.v, int) or self.v < 1:
            raise ConfigError(f"pattern {self}: v must be a positive integer, got {self.v}; use for example 64:2:8")
        if self.columns is None:
            return
        if isinstance(self.columns, bool) or not isinstance(self.columns, int) or not self.n <= self.columns <= self.m:
            raise ConfigError(
                f"pattern {self}: columns must be n to m = {self.n} to {self.m}, got {self.columns!r}; leave them out "
                f"for {self._usual_columns}"
            )
        if self.columns == self._usual_columns:
            object.__setattr__(self, "columns", None)  # one pattern, one text

    def __str__(self) -> str:
        return f"{self.v}:{self.n}:{self.m}" + ("" if self.columns is None else f"/{self.columns}")

    @property
    def num_columns(self) -> int:
        """Columns that a panel keeps.

        4 up to n = 3, else n + 2 (math: structure decay of the middle stages), at most m; or ``columns``.
        """
        return self._usual_columns if self.columns is None else self.columns

    @property
    def _usual_columns(self) -> int:
        return min(self.m, 4 if self.n <= 3 else self.n + 2)

    def multiples(self) -> tuple[int, int]:
        """(v, m)."""
        return self.v, self.m

    def panel_columns(self, mask: Tensor) -> Tensor:
        """[R/v, C/m, m] bool: columns that any row of the panel keeps."""
        return mask.unflatten(0, (-1, self.v)).unflatten(2, (-1, self.m)).any(1)

    def _violations(self, mask: Tensor, dead: Tensor | None = None) -> list[Tensor]:
        return [*super()._violations(mask), self.panel_columns(mask).sum(2) > self.num_columns]

    def _validate(self, mask: Tensor, name: str) -> None:
        super()._validate(mask, name)
        used = self.panel_columns(mask)
        bad = used.sum(2) > self.num_columns
        if bad.any():
            panel, group = _first(bad)
            raise SparsityPatternError(
                f"{name} keeps columns {used[panel, group].nonzero().flatten().tolist()} in panel {panel} (rows "
                f"{panel * self.v} to {(panel + 1) * self.v - 1}), group {group}; pattern {self} allows "
                f"{self.num_columns} "
                f"columns a panel. Fix: search a mask with this pattern"
            )


@dataclass(frozen=True)
class UnstructuredPattern(Pattern):
    """Prune ``target`` of all weights, wherever they stand."""

    target: float

    def __post_init__(self) -> None:
        _check_sparsity(self.target, "unstructured")

    def __str__(self) -> str:
        return f"unstructured:{float(self.target)!r}"

    @property
    def sparsity(self) -> float:
        """The share that is pruned."""
        return self.target

    @property
    def fixed_count(self) -> bool:
        """Always False."""
        return False

    @property
    def block(self) -> int:
        """Weights that fall together: 1."""
        return 1

    def multiples(self) -> tuple[int, int]:
        """(1, 1): any shape."""
        return 1, 1

    def _violations(self, mask: Tensor, dead: Tensor | None = None) -> list[Tensor]:
        return []

    def _validate(self, mask: Tensor, name: str) -> None:
        return


@dataclass(frozen=True)
class BlockPattern(UnstructuredPattern):
    """Prune ``target`` of all 1 x ``size`` blocks, each whole."""

    size: int = 4

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or self.size < 2:
            raise ConfigError(
                f"pattern block{self.size}: the block size must be at least 2; use for example block4:0.8"
            )
        _check_sparsity(self.target, f"block{self.size}")

    def __str__(self) -> str:
        return f"block{self.size}:{float(self.target)!r}"

    @property
    def block(self) -> int:
        """Weights that fall together."""
        return self.size

    def multiples(self) -> tuple[int, int]:
        """(1, size)."""
        return 1, self.size

    def _violations(self, mask: Tensor, dead: Tensor | None = None) -> list[Tensor]:
        whole = mask if dead is None else mask | dead
        return [mask.unflatten(1, (-1, self.size)).any(2) & ~whole.unflatten(1, (-1, self.size)).all(2)]

    def _validate(self, mask: Tensor, name: str) -> None:
        (bad,) = self._violations(mask)
        if bad.any():
            row, block = _first(bad)
            raise SparsityPatternError(
                f"{name} keeps a part of row {row}, block {block} (columns {block * self.size} to "
                f"{(block + 1) * self.size - 1}); pattern {self} keeps or prunes whole blocks of {self.size}. "
                f"Fix: search a mask with this pattern"
            )


def parse_pattern(text: str | Pattern) -> Any:
    """Read a pattern from its text, for example ``"2:4"``, ``"64:2:8"``, ``"unstructured:0.9"``, ``"block4:0.8"``.

    ``"64:3:8/5"`` is a panel of five kept columns instead of the usual four. A ``Pattern`` is returned as it is.

    Raises:
        ConfigError: the text is none of these, or its numbers make no pattern.
    """
    if isinstance(text, Pattern):
        return text
    if not isinstance(text, str):
        raise ConfigError(f"pattern must be a text such as {PATTERN_HELP}, got {type(text).__name__} {text!r}")
    return _parse_text(text)


@lru_cache(maxsize=1024)  # each call of a sparse layer reads its pattern
def _parse_text(text: str) -> Pattern:
    parts = text.strip().lower().split(":")
    if re.fullmatch(r"\d+:\d+", ":".join(parts)):
        return NMPattern(int(parts[0]), int(parts[1]))
    if panels := re.fullmatch(r"(\d+):(\d+):(\d+)(?:/(\d+))?", ":".join(parts)):
        v, n, m, columns = (None if group is None else int(group) for group in panels.groups())
        return VNMPattern(v=v or 0, n=n or 0, m=m or 0, columns=columns)
    kind = re.fullmatch(r"unstructured|block(\d+)", parts[0])
    if kind and len(parts) == 2:
        try:
            target = float(parts[1])
        except ValueError:
            raise ConfigError(
                f"pattern {text!r}: {parts[1]!r} is no number; the sparsity stands after the colon, 0 to 1"
            ) from None
        return BlockPattern(target, size=int(kind[1])) if kind[1] else UnstructuredPattern(target)
    if kind:
        raise ConfigError(f"pattern {text!r} needs a sparsity; write {parts[0]}:0.75 to prune 75 %")
    raise ConfigError(f"pattern must be one of {PATTERN_HELP}, got {text!r}; n:m means keep n of m")


def _check_nm(n: int, m: int, text: str) -> None:
    if not (isinstance(n, int) and isinstance(m, int) and 0 < n < m):
        raise ConfigError(
            f"pattern {text}: n:m keeps n of m and needs 0 < n < m, got n = {n}, m = {m}; use for example 2:8"
        )
    if m > 64:
        raise ConfigError(f"pattern {text}: m must be at most 64, got {m}; use a smaller group")


def _check_sparsity(value: float, kind: str) -> None:
    if not 0.0 <= value < 1.0:
        raise ConfigError(f"pattern {kind}: sparsity must be at least 0 and below 1, got {value}; 0.9 prunes 90 %")


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _first(bad: Tensor) -> tuple[int, int]:
    row, col = bad.nonzero()[0].tolist()
    return row, col
