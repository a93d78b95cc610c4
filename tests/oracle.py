# SPDX-License-Identifier: Apache-2.0
"""Brute force in float64, written from the definitions alone: slow, obvious, and on the inverse side of every identity.

Kernels use the complement identity (n x n systems on F); everything here uses the definition
``rho(Q) = 1/2 w_Q' [(F^-1)_QQ]^-1 w_Q`` over explicit pruned sets Q, visited by ``itertools.combinations``.
Nothing in this file imports the package.
"""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from tolerances import EXAMPLE_F32, EXAMPLE_F64
from torch import Tensor

Kept = tuple[int, ...]

EXAMPLE_C_FISHER = [
    [13, 4, -9, -1, -1, -7, 2, -3],
    [4, 23, -4, -1, 2, -4, 9, -10],
    [-9, -4, 17, 0, -4, 11, -8, 5],
    [-1, -1, 0, 16, -7, 0, -1, 8],
    [-1, 2, -4, -7, 12, -5, 0, -3],
    [-7, -4, 11, 0, -5, 24, -4, -3],
    [2, 9, -8, -1, 0, -4, 16, -11],
    [-3, -10, 5, 8, -3, -3, -11, 22],
]
EXAMPLE_C_WEIGHT = [1, 2, 5, 4, 1, -3, -3, 1]


def example_c(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """(weight [1, 8], fisher [1, 8, 8]) of examples C, D and F; already damped."""
    return torch.tensor([EXAMPLE_C_WEIGHT], dtype=dtype), torch.tensor([EXAMPLE_C_FISHER], dtype=dtype)


def example_e(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """(weight [4, 8], undamped fisher [4, 8, 8]) of example E; its damping is 1."""
    r, s, c = np.ogrid[:4, :16, :8]
    g = ((3 * r + 5 * s + 2 * c + s * c + r * c + r * s * c) % 11 - 5).astype(float)
    weight = (5 * r[:, 0] + 3 * c[0] + r[:, 0] * c[0]) % 13 - 6
    fisher = np.stack([sum(np.outer(g[row, i], g[row, i]) for i in range(16)) / 16 for row in range(4)])
    return torch.tensor(weight, dtype=dtype), torch.tensor(fisher, dtype=dtype)


def example_g(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """(weight [1, 16], undamped fisher [1, 16, 16]) of example G; its damping is 0.5."""
    s, c = np.ogrid[:24, :16]
    g = ((7 * s + 3 * c + s * c + s**2 * c + c**2 * s) % 17 - 8).astype(float)
    w = (7 * c[0] + c[0] ** 3) % 11 - 5
    return torch.tensor(w[None], dtype=dtype), torch.tensor(sum(np.outer(x, x) for x in g)[None] / 24, dtype=dtype)


def numpy(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().to(torch.float64).cpu().numpy()


def random_spd(gen: torch.Generator, count: int, size: int, *, floor: float = 0.05) -> Tensor:
    """[count, size, size] f64: low-rank and strongly correlated, ``floor`` on the diagonal, as a real Fisher is."""
    samples = max(2, size // 2 + 1)
    g = torch.randn(count, samples, size, generator=gen, dtype=torch.float64)
    g = g + 0.7 * torch.randn(count, samples, 1, generator=gen, dtype=torch.float64)
    return g.mT @ g / samples + floor * torch.eye(size, dtype=torch.float64)


# fisher


def accumulate(fisher: Tensor, grads: Tensor, scale: float) -> np.ndarray:
    """fisher + scale * sum_s g_s g_s', one outer product at a time."""
    total, g = numpy(fisher).copy(), numpy(grads)
    size = total.shape[1]
    for block in range(total.shape[0]):
        for sample in range(g.shape[0]):
            part = g[sample, block * size : (block + 1) * size]
            total[block] += scale * np.outer(part, part)
    return total


# saliency of a set


def set_saliency(finv: np.ndarray, w: np.ndarray, pruned: Kept) -> float:
    """rho(Q) = 1/2 w_Q' [(F^-1)_QQ]^-1 w_Q."""
    q = list(pruned)
    return float(0.5 * w[q] @ np.linalg.solve(finv[np.ix_(q, q)], w[q])) if q else 0.0


def set_change(finv: np.ndarray, w: np.ndarray, pruned: Kept) -> np.ndarray:
    """delta = -F^-1[:, Q] [(F^-1)_QQ]^-1 w_Q."""
    q = list(pruned)
    return -finv[:, q] @ np.linalg.solve(finv[np.ix_(q, q)], w[q]) if q else np.zeros_like(w)


@dataclass
class Group:
    """One group of m: its live positions, their part of F^-1 (dead rows and columns out of F first), their weights."""

    m: int
    live: Kept
    finv: np.ndarray
    w: np.ndarray
    table: dict[int, dict[Kept, float]] = field(default_factory=dict, repr=False)

    def count(self, n: int) -> int:
        return min(n, len(self.live))

    def losses(self, n: int) -> dict[Kept, float]:
        """rho of every way to keep ``count(n)`` live positions, in lexicographic order."""
        k = self.count(n)
        if k not in self.table:
            size = len(self.live)
            kept = list(itertools.combinations(range(size), k))
            pruned = np.array([[i for i in range(size) if i not in set(kept_set)] for kept_set in kept], dtype=int)
            if size == k:
                values = np.zeros(1)
            else:
                w = self.w[pruned]
                inner = self.finv[pruned[:, :, None], pruned[:, None, :]]
                values = 0.5 * (w * np.linalg.solve(inner, w[:, :, None])[:, :, 0]).sum(1)
            self.table[k] = {tuple(self.live[i] for i in s): float(x) for s, x in zip(kept, values, strict=True)}
        return self.table[k]

    def best(self, n: int) -> tuple[Kept, float]:
        return least(self.losses(n))

    def best_inside(self, n: int, columns: Kept) -> tuple[Kept, float]:
        """The best set inside ``columns``; a row with fewer live entries there keeps those."""
        inside = [i for i in self.live if i in columns]
        losses = self.losses(min(n, len(inside)))
        return least({kept: losses[kept] for kept in itertools.combinations(inside, min(n, len(inside)))})

    def pair_model(self) -> Group:
        """The same group with only the 2 x 2 blocks of adjacent positions (2j, 2j + 1) left of F^-1."""
        pair = np.array(self.live, dtype=int) // 2
        return replace(self, finv=np.where(pair[:, None] == pair[None, :], self.finv, 0.0), table={})


def least(losses: dict[Kept, float]) -> tuple[Kept, float]:
    """The first of the least: sets come in lexicographic order."""
    kept = min(losses, key=losses.__getitem__)
    return kept, losses[kept]


def runner_up_gap(losses: dict[Kept, float]) -> float:
    """Relative distance of the second best loss from the best."""
    if len(losses) < 2:
        return float("inf")
    first, second = sorted(losses.values())[:2]
    return (second - first) / max(abs(second), 1e-30)


def groups_of(
    weight: Tensor, fisher: Tensor, m: int, *, damp: float | Tensor = 0.0, mask: Tensor | None = None
) -> dict[tuple[int, int], Group]:
    """{(row, group): Group} of a weight [R, C]; dead entries of ``mask`` leave F before damping and inversion."""
    w, f = numpy(weight), numpy(fisher)
    cols = w.shape[1]
    size = f.shape[1]
    alive = np.ones(w.size, bool) if mask is None else mask.numpy().reshape(-1)
    flat = w.reshape(-1)
    damps = np.broadcast_to(numpy(damp).reshape(-1) if isinstance(damp, Tensor) else float(damp), f.shape[:1])
    found = {}
    for block in range(f.shape[0]):
        live = [i for i in range(size) if alive[block * size + i]]
        finv = np.linalg.inv(f[block][np.ix_(live, live)] + damps[block] * np.eye(len(live)))
        for start in range(0, size, m):
            inside = [k for k, i in enumerate(live) if start <= i < start + m]
            first = block * size + start
            found[first // cols, first % cols // m] = Group(
                m,
                tuple(live[k] - start for k in inside),
                finv[np.ix_(inside, inside)],
                np.array([flat[block * size + live[k]] for k in inside]),
            )
    return found


def kept_of(mask: Tensor, row: int, group: int, m: int) -> Kept:
    """Kept positions of one group of a mask."""
    return tuple(mask[row, group * m : (group + 1) * m].nonzero().flatten().tolist())


def best_panel(rows: list[Group], n: int, num_columns: int) -> tuple[Kept, list[Kept], dict[Kept, float]]:
    """(columns, kept set of each row, {columns: least total loss}) over all column sets."""
    totals = {
        columns: sum(row.best_inside(n, columns)[1] for row in rows)
        for columns in itertools.combinations(range(rows[0].m), num_columns)
    }
    columns, _ = least(totals)
    return columns, [row.best_inside(n, columns)[0] for row in rows], totals


def best_by_score(score: np.ndarray, live: Kept, n: int) -> Kept:
    """The n live positions of largest score; ties go to the lower index."""
    return tuple(sorted(sorted(live, key=lambda i: (-score[i], i))[:n]))


# update


def quadratic(change: np.ndarray, f: np.ndarray) -> float:
    return float(0.5 * change @ f @ change)


def constrained_minimiser(f: np.ndarray, w: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """argmin of 1/2 dw' F dw with dw_P = -w_P, by its Lagrange system; returns w + dw."""
    pruned = np.flatnonzero(~keep)
    size, count = len(w), len(pruned)
    system = np.zeros((size + count, size + count))
    system[:size, :size] = f
    system[size + np.arange(count), pruned] = 1.0
    system[pruned, size + np.arange(count)] = 1.0
    new = w + np.linalg.solve(system, np.concatenate([np.zeros(size), -w[pruned]]))[:size]
    new[pruned] = 0.0
    return new


def summed_single_updates(f: np.ndarray, w: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """w minus, for each pruned p on its own, F^-1[:, p] w_p / (F^-1)_pp; the pruned ones then set to 0."""
    finv = np.linalg.inv(f)
    new = w.copy()
    for p in np.flatnonzero(~keep):
        new = new - finv[:, p] * w[p] / finv[p, p]
    new[~keep] = 0.0
    return new


def blocks_of(weight: Tensor, fisher: Tensor, damp: float | Tensor) -> list[tuple[slice, np.ndarray]]:
    """(slice of the flattened weight, damped block cut to that slice) of every Fisher block; the last may be short."""
    f = numpy(fisher)
    size = f.shape[1]
    damps = np.broadcast_to(numpy(damp).reshape(-1) if isinstance(damp, Tensor) else float(damp), f.shape[:1])
    parts = []
    for block in range(f.shape[0]):
        span = slice(block * size, min((block + 1) * size, weight.numel()))
        length = span.stop - span.start
        parts.append((span, f[block, :length, :length] + damps[block] * np.eye(length)))
    return parts


# sweeps over rows


EXAMPLE_H_HESSIAN = [[10, 4, -2, 1], [4, 8, 3, -1], [-2, 3, 9, 2], [1, -1, 2, 7]]
EXAMPLE_H_WEIGHT = [3, -2, 2.5, 1]
EXAMPLE_H_DAMP = 0.085


def example_i(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """(weight [2, 8], hessian [8, 8], row_scale [2]) of example I; undamped."""
    weight = [EXAMPLE_C_WEIGHT, [2, -1, 3, -2, 4, 1, -5, 2]]
    return tuple(torch.tensor(x, dtype=dtype) for x in (weight, EXAMPLE_C_FISHER, [1, 3]))


@dataclass
class Sweep:
    """Weights [R, C] and kept entries of a sweep, its losses [R/v, C/m] and the columns of each panel and group."""

    weight: np.ndarray
    kept: np.ndarray
    loss: np.ndarray
    columns: dict[tuple[int, int], Kept] = field(default_factory=dict)


def sweep_groups(
    weight: Tensor,
    hessian: Tensor,
    n: int,
    m: int,
    *,
    v: int = 1,
    num_columns: int | None = None,
    damp: float = 0.0,
    mask: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Sweep:
    """Each group by all its sets, with the inverse of H over the columns from the group on: earlier ones are fixed."""
    w, h = numpy(weight).copy(), numpy(hessian) + damp * np.eye(weight.shape[1])
    rows, cols = w.shape
    alive = np.ones(w.shape, bool) if mask is None else mask.numpy()
    scale = np.ones(rows) if row_scale is None else numpy(row_scale)
    w[~alive] = 0.0
    done = Sweep(w, np.zeros(w.shape, bool), np.zeros((rows // v, cols // m)))
    for start in range(0, cols, m):
        finv = np.linalg.inv(h[start:, start:])
        live = [[i for i in range(m) if alive[r, start + i]] for r in range(rows)]

        def best(r: int, places: list[int], start: int = start, finv: np.ndarray = finv) -> tuple[Kept, float]:
            sets = itertools.combinations(places, min(n, len(places)))
            return least(
                {kept: set_saliency(finv, w[r, start:], tuple(i for i in range(m) if i not in kept)) for kept in sets}
            )

        for panel in range(rows // v):
            members = range(panel * v, panel * v + v)
            if num_columns is None:
                chosen = {r: best(r, live[r]) for r in members}
            else:
                found = {
                    columns: {r: best(r, [i for i in live[r] if i in columns]) for r in members}
                    for columns in itertools.combinations(range(m), num_columns)
                }
                columns, _ = least({c: sum(scale[r] * rows_[r][1] for r in members) for c, rows_ in found.items()})
                chosen = found[columns]
                done.columns[panel, start // m] = columns
            for r, (kept, loss) in chosen.items():
                pruned = tuple(i for i in range(m) if i not in kept)
                w[r, start:] += set_change(finv, w[r, start:], pruned)
                w[r, [start + i for i in pruned]] = 0.0
                done.kept[r, [start + i for i in kept]] = True
                done.loss[panel, start // m] += scale[r] * loss
    return done


def sweep_columns(
    weight: Tensor, hessian: Tensor, choose: Any, *, damp: float = 0.0, mask: Tensor | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(weights, kept) of SparseGPT; ``choose(column, score)`` returns what to keep from that column on, or None.

    ``score`` [R, C - column] is w_i^2 over the first entry of the inverse of H from i on, -1 for dead entries.
    """
    w, h = numpy(weight).copy(), numpy(hessian) + damp * np.eye(weight.shape[1])
    alive = np.ones(w.shape, bool) if mask is None else mask.numpy()
    w[~alive] = 0.0
    kept = np.zeros(w.shape, bool)
    first = np.array([np.linalg.inv(h[j:, j:])[0, 0] for j in range(w.shape[1])])
    for j in range(w.shape[1]):
        found = choose(j, np.where(alive[:, j:], w[:, j:] ** 2 / first[j:], -1.0))
        if found is not None:
            kept[:, j : j + found.shape[1]] = found & alive[:, j : j + found.shape[1]]
        finv = np.linalg.inv(h[j:, j:])
        for r in np.flatnonzero(~kept[:, j]):
            w[r, j:] += set_change(finv, w[r, j:], (0,))
            w[r, j] = 0.0
    return w, kept


# packing, from "Stored format" of the design page


def bits(value: float, dtype: torch.dtype) -> int:
    """The bit pattern of a value that ``dtype`` holds exactly."""
    if dtype == torch.bfloat16:
        return struct.unpack("<I", struct.pack("<f", value))[0] >> 16
    code, unsigned = {torch.float16: ("<e", "<H"), torch.float32: ("<f", "<I"), torch.float64: ("<d", "<Q")}[dtype]
    return int(struct.unpack(unsigned, struct.pack(code, value))[0])


def fill_up(used: list[int], count: int, limit: int) -> list[int]:
    """``used`` and the lowest unused positions below ``limit``, ``count`` in all, ascending."""
    free = [i for i in range(limit) if i not in used]
    return sorted(used + free[: count - len(used)])


def pack(weight: list[list[float]], mask: list[list[bool]], v: int, n: int, m: int) -> tuple[list, list, list | None]:
    """(values, codes, columns) as nested lists; v = 0 for n:m without panels."""
    rows, wide = len(weight), len(weight[0]) // m
    columns = None
    if v:
        columns = [
            [
                fill_up([c for c in range(m) if any(mask[r][g * m + c] for r in range(p * v, p * v + v))], 4, m)
                for g in range(wide)
            ]
            for p in range(rows // v)
        ]
    values, codes = [], []
    for r in range(rows):
        row_values: list[float] = []
        places: list[int] = []
        for g in range(wide):
            order = columns[r // v][g] if columns is not None else list(range(m))
            kept = [k for k, c in enumerate(order) if mask[r][g * m + c]]
            for k in fill_up(kept, n, len(order)):
                row_values.append(weight[r][g * m + order[k]] if k in kept else 0.0)
                places.append(k)
        values.append(row_values)
        if v or (n, m) == (2, 4):
            codes.append(
                [sum(code << 2 * i for i, code in enumerate(places[at : at + 4])) for at in range(0, len(places), 4)]
            )
        else:
            codes.append(places)
    return values, codes, columns


def assert_worked_numbers(actual: Tensor, expected: list[float], dtype: torch.dtype) -> None:
    """A worked number of math.md."""
    tolerance = {"rtol": EXAMPLE_F32, "atol": 0.0} if dtype == torch.float32 else {"rtol": 0.0, "atol": EXAMPLE_F64}
    torch.testing.assert_close(actual.reshape(-1), torch.tensor(expected, dtype=dtype), **tolerance)


def row_problem(rows: int, cols: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weight [rows, cols] and a correlated Hessian, both exact in ``dtype``."""
    gen = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=gen, dtype=torch.float64).to(dtype)
    return weight, random_spd(gen, 1, cols, floor=0.2)[0].to(dtype)
