# SPDX-License-Identifier: Apache-2.0
"""What the kernels alone let expect of a whole model: the dense time, less what its packed layers save."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from obs_kernels.sparse.crossover import KernelTable
from obs_kernels.sparse.linear import SparseLinear


def predict(
    layers: Mapping[str, SparseLinear],
    tokens: int,
    dense_us: float,
    table: KernelTable | None,
    *,
    feature_major: Collection[str] = (),
) -> dict[str, Any] | None:
    """The expected time of the sparse model in microseconds, by kernel rows.

    Args:
        layers: the packed layers of the sparse model.
        tokens: batch x length.
        dense_us: measured time of the dense model.
        table: rows of a kernel bench; None gives None.
        feature_major: names of the layers that get x feature-major.

    Returns:
        {"us", "speedup", "source", "estimated": layers without a row of their own, "unknown": layers left out}.
        ``us`` is None where nothing is known of any layer.
    """
    if table is None or not layers:
        return None
    saved, estimated, unknown = 0.0, 0, 0
    for name, layer in layers.items():
        guess = table.estimate(
            layer.out_features, layer.in_features, tokens, layer.pattern, feature_x=name in feature_major
        )
        if guess is None:
            unknown += 1
            continue
        estimated += not guess.measured
        saved += guess.dense_us - guess.sparse_us
    known = unknown < len(layers)
    us = dense_us - saved if known and dense_us > saved else None
    return {
        "us": us,
        "speedup": None if us is None else dense_us / us,
        "source": f"{table.device}, commit {table.commit}",
        "estimated": estimated,
        "unknown": unknown,
    }


def predict_from_products(layers: Sequence[Mapping[str, Any]], dense_us: float) -> dict[str, Any] | None:
    """The same by the products that were timed in this run.

    Args:
        layers: {"count", "dense_us", "sparse_us"} of each kind of layer; None where it is not packed.
        dense_us: measured time of the dense model.

    Returns:
        {"us", "speedup"}; None where no layer is packed, or the products alone take longer than the model.
    """
    packed = [layer for layer in layers if layer["sparse_us"] is not None]
    us = dense_us - sum(layer["count"] * (layer["dense_us"] - layer["sparse_us"]) for layer in packed)
    return {"us": us, "speedup": dense_us / us} if packed and us > 0 else None
