# SPDX-License-Identifier: Apache-2.0
"""Rows from measured times: plain arithmetic on plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.harness.case import DENSE, Check, Problem
from obs_kernels.timing import Ceilings, Spread

Row = dict[str, Any]
"""One line of a result, by the schema of ``obs_kernels.report.bench``."""


def make_row(
    op: str,
    shape: Mapping[str, int],
    *,
    us: float,
    path: str,
    config: Mapping[str, Any],
    p20: float | None = None,
    p80: float | None = None,
    dtype: str | None = None,
    pattern: str | None = None,
    name: str | None = None,
    num_bytes: int | None = None,
    num_flops: int | None = None,
    x_dense: float | None = None,
    x_peer: Mapping[str, float] | None = None,
    parts: Mapping[str, float] | None = None,
    detail: Mapping[str, Any] | None = None,
) -> Row:
    """A row with every key of the schema. ``limit_share`` is filled in by ``with_limit``, once ceilings are known.

    Args:
        op: the public op.
        shape: sizes by letter.
        us: median of one call.
        path: "kernel", "call" or "model" (a whole run).
        config: what was chosen: {"backend": ...}, or {"peer": ...}, and the tuning record.
        p20: 20th percentile in microseconds; None where there was one run.
        p80: 80th percentile.
        dtype: f32, bf16, ...
        pattern: of the mask, where there is one.
        name: of the shape.
        num_bytes: least bytes to read and write.
        num_flops: operations, a multiply-add as two.
        x_dense: dense time over this time.
        x_peer: time of each peer over this time.
        parts: microseconds by the name of a part.
        detail: whatever else belongs to the row.
    """
    row: Row = {
        "op": op,
        "shape": dict(shape),
        "pattern": pattern,
        "dtype": dtype,
        "path": path,
        "config": dict(config),
        "us": us,
        "p20": p20,
        "p80": p80,
        "gbps": num_bytes / us / 1e3 if num_bytes is not None else None,
        "tflops": num_flops / us / 1e6 if num_flops is not None else None,
        "limit_share": None,
        "x_dense": x_dense,
        "x_peer": dict(x_peer or {}),
        "ok": True,  # a red check makes no row
    }
    if name is not None:
        row["name"] = name
    if parts:
        row["parts"] = dict(parts)
    sizes = {"bytes": num_bytes, "flops": num_flops}
    row["detail"] = {key: value for key, value in sizes.items() if value is not None} | dict(detail or {})
    return row


def with_limit(row: Row, ceilings: Ceilings) -> Row:
    """The row with ``limit_share``: floor time over measured time, where bytes or flops are known."""
    num_bytes, num_flops = row["detail"].get("bytes"), row["detail"].get("flops")
    if num_bytes is None and num_flops is None:
        return row
    return row | {"limit_share": ceilings.floor_us(num_bytes or 0, num_flops or 0) / row["us"]}


def problem_rows(
    problem: Problem,
    spreads: Mapping[str, Spread],
    checks: Mapping[str, Check],
    plans: Mapping[str, Mapping[str, Any]],
    num_sets: int,
) -> list[Row]:
    """One row for each variant that was measured.

    The ratio to a peer is its time for the whole problem over ours: above 1 we are faster. A peer that does a share of
    the work (one gradient of S) is compared by that share.
    """
    measured = [variant for variant in problem.variants if variant.name in spreads]
    peers = {variant.name: spreads[variant.name].us / variant.share for variant in measured if variant.peer}
    dense = peers.pop(DENSE, None)
    rows = []
    for variant in measured:
        found, check = spreads[variant.name], checks[variant.name]
        detail: dict[str, Any] = {"repeats": found.repeats, "buffer_sets": num_sets}
        detail |= {"error": check.error, "error_limit": check.limit, **check.detail}
        shape = problem.shape if variant.shape is None else variant.shape
        if problem.real_shape is not None:
            cut = {letter for letter, size in problem.real_shape.items() if size != problem.shape[letter]}
            detail["real_shape"] = {k: problem.real_shape[k] if k in cut else size for k, size in shape.items()}
        rows.append(
            make_row(
                problem.op,
                shape,
                us=found.us,
                p20=found.p20,
                p80=found.p80,
                path=variant.path,
                config={**variant.config, **plans.get(variant.name, {})},
                dtype=problem.dtype,
                pattern=problem.pattern,
                name=problem.name,
                num_bytes=problem.num_bytes if variant.num_bytes is None else variant.num_bytes,
                num_flops=problem.num_flops if variant.num_flops is None else variant.num_flops,
                x_dense=None if dense is None or variant.name == DENSE else dense * variant.share / found.us,
                x_peer={} if variant.peer else {name: us / found.us for name, us in peers.items()},
                detail=detail,
            )
        )
    return rows
