# SPDX-License-Identifier: Apache-2.0
"""Where the packed product beats the dense one: measured rows of the kernel bench, and estimates between them.

The rows are those of ``bench.run --op matmul`` (medians of the bare kernel on token-major x, of a gathered product with
the transposition before, and of cuBLAS in the same run, bf16; for panels on feature-major x too), without those whose
samples were unsteady. They ship as ``kernel_rows.json``, made by ``python -m bench.kernel_rows``. Which layers win is
told by token-major x. Between rows the rate (dense operations a microsecond) is taken as linear in log tokens for one
shape, and averaged over shapes by inverse square distance in (log2 R, log2 C). Above the most tokens measured the rate
of the last row stays. Below the fewest, or with no measured shape within a factor of two in both R and C, there is no
estimate: nothing is known there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

from obs_kernels.errors import DataFormatError
from obs_kernels.packed_format import runs_as_two_of_four
from obs_kernels.patterns import NMPattern
from obs_kernels.timing import is_steady

ROWS_FILE = "kernel_rows.json"
FALLBACK = "2:4"
"""Its rows stand for a pattern without rows that can run by the same kernel, in the same time. Panels are gathered only
where measured tiles say that this is faster: for them it is a bound on the safe side, a win may go unseen.
"""
_MOST_TOKENS = 1 << 17
_FARTHEST = 1.0
"""Of the nearest measured shape, in log2, by the farther of rows and columns."""
_LEAST_SHARE = 0.5
"""Of the products of the smallest measured neighbour, by which an estimate may fall short of them."""


@dataclass(frozen=True)
class KernelRow:
    """One measured product: times in microseconds."""

    rows: int
    cols: int
    tokens: int
    pattern: str
    sparse_us: float
    dense_us: float
    feature_us: float | None = None
    """Of the sparse product on feature-major x; None where it was not measured."""

    def us(self, kind: str) -> float:
        """ "sparse", "dense" or "feature", which is "sparse" where it was not measured."""
        if kind == "dense":
            return self.dense_us
        return self.sparse_us if kind == "sparse" or self.feature_us is None else self.feature_us


@dataclass(frozen=True)
class Estimate:
    """Times of one product in microseconds."""

    sparse_us: float
    dense_us: float
    measured: bool
    """A row of the very shape, tokens and pattern; False: estimated from other rows."""

    @property
    def sparse_wins(self) -> bool:
        """Whether the packed product takes less time."""
        return self.sparse_us < self.dense_us


@dataclass(frozen=True)
class KernelTable:
    """Rows of one device."""

    device: str
    commit: str
    rows: tuple[KernelRow, ...]

    def estimate(
        self, rows: int, cols: int, tokens: int, pattern: NMPattern, *, feature_x: bool = False
    ) -> Estimate | None:
        """Times of x [tokens, cols] by a weight [rows, cols] of ``pattern``; None where nothing is known.

        ``feature_x``: x lies feature-major, for the sparse product alone.
        """
        sparse_kind = "feature" if feature_x else "sparse"
        name, known = self._rows_of(pattern)
        for row in known:
            if (row.rows, row.cols, row.tokens) == (rows, cols, tokens):
                return Estimate(row.us(sparse_kind), row.dense_us, name == str(pattern))
        shapes: dict[tuple[int, int], list[KernelRow]] = {}
        for row in known:
            shapes.setdefault((row.rows, row.cols), []).append(row)
        if min(rows, cols, tokens) < 1 or not shapes:
            return None
        apart = {shape: _apart(shape, (rows, cols)) for shape in shapes}
        near = [shape for shape, (far, _) in apart.items() if far <= _FARTHEST]
        near = [shape for shape in near if apart[shape][1] == 0] or near  # rows of the very shape stand alone
        # a large shape that was measured at few tokens says nothing about a small one, which has less to do then
        fewest = [min(row.tokens for row in shapes[shape]) for shape in near]
        least = min((r * c * count for (r, c), count in zip(near, fewest, strict=True)), default=0)
        if not near or tokens < max(fewest) or rows * cols * tokens < _LEAST_SHARE * least:
            return None
        weights = {shape: 1.0 / max(apart[shape][1], 1e-6) for shape in near}
        total = sum(weights.values())
        flops = 2.0 * rows * cols * tokens
        sparse, dense = (
            flops / (sum(w * _rate(shapes[shape], tokens, kind) for shape, w in weights.items()) / total)
            for kind in (sparse_kind, "dense")
        )
        return Estimate(sparse, dense, False)

    def sparse_from(self, rows: int, cols: int, pattern: NMPattern) -> int | None:
        """The fewest tokens from which on the packed product is estimated to win; None if it never is."""
        found = None
        for tokens in _token_grid():
            guess = self.estimate(rows, cols, tokens, pattern)
            if guess is None or not guess.sparse_wins:
                found = None
            elif found is None:
                found = tokens
        return found

    def why_dense(self, rows: int, cols: int, tokens: int, pattern: NMPattern) -> str | None:
        """Why the layer should stay dense at that many tokens; None if the packed product wins."""
        if not runs_as_two_of_four(pattern):
            return f"no kernel for sparse tensor cores takes pattern {pattern}"
        guess = self.estimate(rows, cols, tokens, pattern)
        if guess is None:
            fewest = min((r.tokens for r in self._rows_of(pattern)[1] if (r.rows, r.cols) == (rows, cols)), default=0)
            if tokens < fewest:
                return (
                    f"kernel rows of [{rows}, {cols}] begin at {fewest:,} tokens, got {tokens:,} ({self.device}); "
                    f"measure=True measures here"
                )
            return (
                f"no kernel row near [{rows}, {cols}] at {tokens:,} tokens says that sparse wins ({self.device}); "
                f"measure=True measures here"
            )
        if guess.sparse_wins:
            return None
        how = "measured" if guess.measured else "estimated"
        return (
            f"dense is faster at {tokens:,} tokens: {guess.dense_us:,.1f} us, sparse {guess.sparse_us:,.1f} us "
            f"({how} on {self.device})"
        )

    def _rows_of(self, pattern: NMPattern) -> tuple[str, list[KernelRow]]:
        if not runs_as_two_of_four(pattern):
            return str(pattern), []
        names = (str(pattern), FALLBACK)
        name = next((name for name in names if any(row.pattern == name for row in self.rows)), FALLBACK)
        return name, [row for row in self.rows if row.pattern == name]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"device": self.device, "commit": self.commit, "rows": [list(vars(row).values()) for row in self.rows]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> KernelTable:
        """What ``to_dict`` gave."""
        return cls(values["device"], values["commit"], tuple(KernelRow(*row) for row in values["rows"]))

    @classmethod
    def from_bench(cls, doc: Any) -> KernelTable:
        """The rows of a result of ``bench.run --op matmul``: the cuda kernel as called, and the dense product.

        Raises:
            DataFormatError: not such a result, or without such rows.
        """
        try:
            found = list(_pairs(doc["rows"]))
            table = cls(str(doc["env"]["device"]), str(doc["env"]["commit"]), tuple(found))
        except (KeyError, TypeError, AttributeError) as error:
            raise DataFormatError(
                f"kernel rows must be a result of bench.run --op matmul, got one without {error}; measure it again"
            ) from None
        if not found:
            raise DataFormatError(
                "kernel rows must hold steady times of sparse_linear by the cuda backend beside F.linear, got none; "
                "measure them by bench.run --op matmul on a GPU"
            )
        return table


@lru_cache(maxsize=1)
def packaged_table() -> KernelTable:
    """The rows that ship with the package."""
    text = files("obs_kernels.sparse").joinpath(ROWS_FILE).read_text(encoding="utf-8")
    return KernelTable.from_dict(json.loads(text))


def _pairs(rows: Iterable[Mapping[str, Any]]) -> Iterable[KernelRow]:
    """Ours beside dense, row by row, where both are steady: others decide nothing."""
    ours: dict[tuple[int, int, int, str], float] = {}
    feature: dict[tuple[int, int, int, str], float] = {}
    dense: dict[tuple[int, int, int, str], float] = {}
    for row in rows:
        if row["op"] != "sparse_linear" or row["dtype"] != "bf16" or row["path"] != "kernel":
            continue
        if not is_steady(row["p20"], row["p80"]):
            continue
        config, shape = row["config"], row["shape"]
        own = config.get("backend") == "cuda" and not config.get("forced") and "y" not in config
        key = (int(shape["R"]), int(shape["C"]), int(shape["T"]), str(row["pattern"]))
        if own:
            times = feature if config.get("x") == "feature-major" else ours
            times[key] = min(float(row["us"]), times.get(key, math.inf))
        elif config.get("peer") == "F.linear":
            dense[key] = float(row["us"])
    for key in sorted(ours.keys() & dense.keys()):
        other = round(feature[key], 3) if key in feature else None
        yield KernelRow(*key, round(ours[key], 3), round(dense[key], 3), other)


def _apart(one: tuple[int, int], two: tuple[int, int]) -> tuple[float, float]:
    """(farther of rows and columns, squared distance), in log2."""
    steps = [math.log2(a / b) for a, b in zip(one, two, strict=True)]
    return max(map(abs, steps)), sum(step * step for step in steps)


def _rate(rows: list[KernelRow], tokens: int, kind: str) -> float:
    """Dense operations a microsecond of one shape: linear in log tokens between its rows."""
    points = sorted((row.tokens, 2.0 * row.rows * row.cols * row.tokens / row.us(kind)) for row in rows)
    if tokens >= points[-1][0]:
        return points[-1][1]
    above = next(index for index, (t, _) in enumerate(points) if t >= tokens)
    if points[above][0] == tokens or above == 0:
        return points[above][1]
    (low, low_rate), (high, high_rate) = points[above - 1], points[above]
    share = math.log(tokens / low) / math.log(high / low)
    return low_rate + share * (high_rate - low_rate)


def _token_grid() -> list[int]:
    """64, 96, 128, 192, ...: where a crossing is looked for."""
    grid, step = [], 64
    while step <= _MOST_TOKENS:
        grid += [step, step * 3 // 2]
        step *= 2
    return grid


__all__ = ["Estimate", "KernelRow", "KernelTable", "packaged_table"]
