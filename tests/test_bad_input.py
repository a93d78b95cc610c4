# SPDX-License-Identifier: Apache-2.0
"""Arguments that every public op refuses: class and words of the error, and inputs left as they were."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor

from obs_kernels import errors, ops
from obs_kernels.errors import (
    ConfigError,
    DeviceMismatchError,
    DTypeNotSupportedError,
    NonFiniteError,
    ObsKernelsError,
    ShapeNotSupportedError,
    SingularBlockError,
    SparsityPatternError,
)

NAN, INF = float("nan"), float("inf")


def spd(count: int, size: int) -> Tensor:
    return oracle.random_spd(torch.Generator().manual_seed(7), count, size).float()


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(8))


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


def meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def with_value(tensor: Tensor, at: tuple[int, ...], value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[at] = value
    return tensor


def one_negative_block(count: int, size: int, block: int, pivot: int) -> Tensor:
    """SPD blocks but for one, whose Cholesky fails at ``pivot`` (1-based)."""
    bad = spd(count, size)
    bad[block] = torch.eye(size)
    bad[block, pivot - 1, pivot - 1] = -1.0
    return bad


HESSIAN = spd(1, 16)[0]
GOOD: dict[str, dict[str, Any]] = {
    "accumulate_fisher_": {"fisher": spd(2, 4), "grads": randn(3, 8), "scale": 1.0},
    "invert_spd": {"matrices": spd(3, 4)},
    "search_nm": {"weight": randn(4, 16), "fisher": spd(8, 8), "pattern": "2:8"},
    "search_vnm": {"weight": randn(4, 16), "fisher": spd(8, 8), "pattern": "2:2:8"},
    "accumulate_hessian_": {"hessian": HESSIAN, "x": randn(3, 16), "scale": 1.0},
    "sweep_rows": {"weight": randn(4, 16), "hessian": HESSIAN, "pattern": "2:8"},
    "obs_update": {"weight": randn(4, 16), "fisher": spd(8, 8), "mask": ones(4, 16).tril()},
    "loss_increase": {"change": randn(4, 16), "fisher": spd(8, 8)},
    "block_saliency": {"weight": randn(4, 16), "fisher": spd(8, 8), "block": 4},
    "pack": {"weight": randn(4, 16), "mask": torch.arange(16).remainder(8).lt(2).expand(4, 16), "pattern": "2:8"},
}


@dataclass
class Case:
    op: str
    error: type[Exception]
    words: list[str]
    given: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.op}-{'-'.join(self.given)}-{self.words[-1]}"


def both(ops_: tuple[str, ...], *rest: Any, **given: Any) -> list[Case]:
    return [Case(op, *rest, given) for op in ops_]


WITH_HESSIAN = ("accumulate_hessian_", "sweep_rows")


def sweep(error: type[Exception], *words: str, **given: Any) -> Case:
    return Case("sweep_rows", error, list(words), given)


SEARCHES = ("search_nm", "search_vnm")
WITH_DAMP = (*SEARCHES, "obs_update", "loss_increase", "block_saliency", "invert_spd")
WITH_VALUES = (*SEARCHES, "obs_update", "block_saliency")

CASES = [
    # fisher and gradients
    Case(
        "accumulate_fisher_",
        ShapeNotSupportedError,
        ["grads must be [S, B * D]", "[S, 8]", "got [3, 9]"],
        {"grads": randn(3, 9)},
    ),
    Case("accumulate_fisher_", ShapeNotSupportedError, ["grads must be", "got [8]"], {"grads": randn(8)}),
    Case("accumulate_fisher_", ShapeNotSupportedError, ["grads must be", "got [3, 2, 4]"], {"grads": randn(3, 2, 4)}),
    Case(
        "accumulate_fisher_",
        ShapeNotSupportedError,
        ["fisher must be [B, D, D]", "got [2, 4, 5]"],
        {"fisher": randn(2, 4, 5)},
    ),
    Case(
        "accumulate_fisher_",
        ShapeNotSupportedError,
        ["fisher must be [B, D, D]", "got [4, 4]"],
        {"fisher": randn(4, 4)},
    ),
    Case(
        "accumulate_fisher_",
        ShapeNotSupportedError,
        ["D > 0", "got [2, 0, 0]"],
        {"fisher": randn(2, 0, 0), "grads": randn(3, 0)},
    ),
    Case(
        "accumulate_fisher_",
        DTypeNotSupportedError,
        ["fisher must be float32, float64", "got float16"],
        {"fisher": spd(2, 4).half()},
    ),
    Case("accumulate_fisher_", DTypeNotSupportedError, ["fisher", "got bfloat16"], {"fisher": spd(2, 4).bfloat16()}),
    Case("accumulate_fisher_", DTypeNotSupportedError, ["grads must be", "got int64"], {"grads": randn(3, 8).long()}),
    Case(
        "accumulate_fisher_",
        DTypeNotSupportedError,
        ["grads must be", "got complex64"],
        {"grads": randn(3, 8).cfloat()},
    ),
    Case(
        "accumulate_fisher_",
        DTypeNotSupportedError,
        ["grads", "float8_e4m3fn"],
        {"grads": randn(3, 8).to(torch.float8_e4m3fn)},
    ),
    Case(
        "accumulate_fisher_", DTypeNotSupportedError, ["grads must be a torch.Tensor", "list"], {"grads": [[1.0] * 8]}
    ),
    Case("accumulate_fisher_", DeviceMismatchError, ["fisher on cpu", "grads on meta"], {"grads": meta(randn(3, 8))}),
    # inverse
    Case(
        "invert_spd",
        ShapeNotSupportedError,
        ["matrices must be [B, D, D]", "got [3, 4, 5]"],
        {"matrices": randn(3, 4, 5)},
    ),
    Case("invert_spd", ShapeNotSupportedError, ["matrices must be [B, D, D]", "got [4, 4]"], {"matrices": randn(4, 4)}),
    Case("invert_spd", ShapeNotSupportedError, ["D > 0", "got [3, 0, 0]"], {"matrices": randn(3, 0, 0)}),
    Case(
        "invert_spd",
        DTypeNotSupportedError,
        ["matrices must be float32, float64", "got bfloat16"],
        {"matrices": spd(3, 4).bfloat16()},
    ),
    Case("invert_spd", DTypeNotSupportedError, ["matrices", "got int32"], {"matrices": spd(3, 4).int()}),
    Case(
        "invert_spd",
        ShapeNotSupportedError,
        ["out must have the shape", "[3, 4, 4]", "got [2, 4, 4]"],
        {"out": spd(2, 4)},
    ),
    Case("invert_spd", DTypeNotSupportedError, ["out must be float32", "got float64"], {"out": spd(3, 4).double()}),
    Case("invert_spd", DeviceMismatchError, ["matrices on cpu", "out on meta"], {"out": meta(spd(3, 4))}),
    # hessian
    *both(WITH_HESSIAN, ShapeNotSupportedError, ["hessian must be one matrix [C, C]", "[2, 8, 8]"], hessian=spd(2, 8)),
    *both(WITH_HESSIAN, ShapeNotSupportedError, ["hessian must be one matrix", "[8, 4]"], hessian=randn(8, 4)),
    *both(WITH_HESSIAN, DTypeNotSupportedError, ["hessian must be float32", "float16"], hessian=HESSIAN.half()),
    *both(WITH_HESSIAN, DTypeNotSupportedError, ["hessian must be a torch.Tensor", "list"], hessian=[[1.0]]),
    *both(WITH_HESSIAN, DeviceMismatchError, ["hessian on meta", "on cpu"], hessian=meta(HESSIAN)),
    Case("accumulate_hessian_", ShapeNotSupportedError, ["x must be [..., C]", "got C = 8"], {"x": randn(3, 8)}),
    Case("accumulate_hessian_", DTypeNotSupportedError, ["x must be", "got int64"], {"x": randn(3, 16).long()}),
    Case(
        "accumulate_hessian_",
        ShapeNotSupportedError,
        ["token_weight must be one value a token [3]", "got [4]"],
        {"token_weight": randn(4)},
    ),
    Case(
        "accumulate_hessian_",
        DTypeNotSupportedError,
        ["token_weight must be", "got bool"],
        {"token_weight": ones(3)},
    ),
    Case("accumulate_hessian_", DeviceMismatchError, ["token_weight on meta"], {"token_weight": meta(randn(3))}),
    Case(
        "accumulate_hessian_",
        ShapeNotSupportedError,
        ["hessian must own each", "strides (0, 0)", "hessian.clone()"],
        {"hessian": torch.zeros(1, 1).expand(16, 16)},
    ),
    # sweep
    sweep(ShapeNotSupportedError, "hessian must be [16, 16]", "got [8, 8]", hessian=spd(1, 8)[0]),
    sweep(ShapeNotSupportedError, "weight must be a matrix", "got shape [64]", weight=randn(64)),
    sweep(DTypeNotSupportedError, "weight must be", "got int32", weight=randn(4, 16).int()),
    sweep(ShapeNotSupportedError, "weight is [4, 16]", "cols % 12 == 0", pattern="2:12"),
    sweep(ShapeNotSupportedError, "weight is [4, 16]", "rows % 3 == 0", pattern="3:2:8"),
    sweep(ConfigError, "must be n:m or v:n:m", "needs method='sparsegpt'", pattern="unstructured:0.5"),
    sweep(ConfigError, "must be n:m or unstructured:s", "'2:2:8'", pattern="2:2:8", method="sparsegpt"),
    sweep(ConfigError, "must be n:m or unstructured:s", "'block4:0.5'", pattern="block4:0.5", method="sparsegpt"),
    sweep(ConfigError, "method must be one of 'combinatorial', 'sparsegpt'", "got 'greedy'", method="greedy"),
    sweep(ConfigError, "row_scale must be None", "'sparsegpt'", row_scale=randn(4), method="sparsegpt"),
    sweep(ShapeNotSupportedError, "row_scale must be one value a row [4]", "got [16]", row_scale=randn(16)),
    sweep(DTypeNotSupportedError, "row_scale must be", "got int64", row_scale=torch.arange(4)),
    sweep(DeviceMismatchError, "row_scale on meta", row_scale=meta(randn(4))),
    sweep(ConfigError, "row_scale must be at least 0", "got -1.0", row_scale=torch.tensor([1.0, 2, -1, 0])),
    sweep(NonFiniteError, "row_scale must be finite", "[1]", row_scale=torch.tensor([1.0, INF, 1, 1])),
    sweep(ConfigError, "damp must be finite and at least 0", "-0.1", damp=-0.1),
    sweep(ConfigError, "damp must be finite", "got -1.0", damp=torch.tensor([-1.0])),
    sweep(ShapeNotSupportedError, "damp must be a number", "got [4]", damp=torch.ones(4)),
    sweep(DeviceMismatchError, "damp on meta", "hessian on cpu", damp=meta(torch.ones(1))),
    sweep(ShapeNotSupportedError, "mask must have the shape of weight [4, 16]", mask=ones(4, 8)),
    sweep(DTypeNotSupportedError, "mask must be bool", "got float32", mask=ones(4, 16).float()),
    sweep(NonFiniteError, "weight must be finite", "[2, 5]", weight=with_value(randn(4, 16), (2, 5), NAN)),
    sweep(NonFiniteError, "hessian must be finite", "[1, 0]", hessian=with_value(HESSIAN, (1, 0), INF)),
    sweep(SingularBlockError, "hessian must be positive definite", "column 15", "raise damp", hessian=-HESSIAN),
    sweep(ConfigError, "num_columns must be n to m = 2 to 8", "got 1", pattern="2:2:8", num_columns=1),
    sweep(
        ConfigError,
        *("pattern 16:32", str(math.comb(32, 16)), "exact bound", "; use a smaller m"),
        **{"weight": randn(1, 32), "hessian": spd(1, 32)[0], "pattern": "16:32"},
    ),
    sweep(
        ConfigError,
        *("pattern 2:8:16", str(math.comb(16, 12) * math.comb(12, 8)), "exact bound", "; use a smaller m"),
        **{"pattern": "2:8:16", "num_columns": 12},
    ),
    # damp, everywhere
    *both(WITH_DAMP, ConfigError, ["damp must be finite and at least 0", "got -0.1"], damp=-0.1),
    *both(WITH_DAMP, ConfigError, ["damp must be finite and at least 0", "got nan"], damp=NAN),
    *both(WITH_DAMP, ConfigError, ["damp must be finite and at least 0", "got inf"], damp=INF),
    *both(WITH_DAMP, ConfigError, ["damp must be a number or a tensor", "got str 'much'"], damp="much"),
    *both(WITH_DAMP, ConfigError, ["damp must be a number or a tensor", "got bool True"], damp=True),
    *both(WITH_DAMP, ConfigError, ["damp must be a number or a tensor", "got NoneType None"], damp=None),
    *both(
        WITH_DAMP, ShapeNotSupportedError, ["damp must be a number or one value a block", "got [5]"], damp=torch.ones(5)
    ),
    *both(WITH_DAMP, ShapeNotSupportedError, ["damp must be", "got [8, 1]"], damp=torch.ones(8, 1)),
    *both(WITH_DAMP, DTypeNotSupportedError, ["damp must be", "got int64"], damp=torch.ones(8, dtype=torch.int64)),
    *both(
        (*WITH_VALUES, "invert_spd"),
        ConfigError,
        ["damp must be finite and at least 0", "got -1.0"],
        damp=torch.tensor([-1.0]),
    ),
    *both(WITH_VALUES, ConfigError, ["damp must be", "finite"], damp=torch.tensor([0.1] * 7 + [NAN])),
    Case(
        "loss_increase",
        ConfigError,
        ["damp must be finite and at least 0", "got -1.0"],
        {"damp": torch.tensor([-1.0])},
    ),
    Case(
        "invert_spd",
        DeviceMismatchError,
        ["damp on meta"],
        {"damp": meta(torch.ones(3))},
    ),
    # weight
    *both(SEARCHES, ShapeNotSupportedError, ["weight must be a matrix [R, C]", "got shape [64]"], weight=randn(64)),
    *both(
        SEARCHES,
        ShapeNotSupportedError,
        ["weight must be a matrix [R, C]", "got shape [4, 4, 4]"],
        weight=randn(4, 4, 4),
    ),
    *both(SEARCHES, ShapeNotSupportedError, ["weight is [4, 12]", "cols % 8 == 0"], weight=randn(4, 12)),
    Case(
        "search_vnm",
        ShapeNotSupportedError,
        ["weight is [3, 16]", "rows % 2 == 0", "v = 1 fits"],
        {"weight": randn(3, 16)},
    ),
    *both(WITH_VALUES, DTypeNotSupportedError, ["weight must be", "got int32"], weight=randn(4, 16).int()),
    *both(WITH_VALUES, DTypeNotSupportedError, ["weight must be", "got bool"], weight=ones(4, 16)),
    *both(WITH_VALUES, DTypeNotSupportedError, ["weight must be", "got complex64"], weight=randn(4, 16).cfloat()),
    *both(
        WITH_VALUES, DTypeNotSupportedError, ["weight", "got float8_e5m2"], weight=randn(4, 16).to(torch.float8_e5m2)
    ),
    *both(
        WITH_VALUES,
        DTypeNotSupportedError,
        ["weight must be a torch.Tensor", "got ndarray"],
        weight=randn(4, 16).numpy(),
    ),
    *both(
        WITH_VALUES,
        NonFiniteError,
        ["weight must be finite", "got 1 NaN or Inf", "[2, 5]"],
        weight=with_value(randn(4, 16), (2, 5), NAN),
    ),
    *both(
        WITH_VALUES,
        NonFiniteError,
        ["weight must be finite", "[3, 15]"],
        weight=with_value(randn(4, 16), (3, 15), -INF),
    ),
    *both(
        WITH_VALUES,
        NonFiniteError,
        ["weight must be finite", "[0, 0]"],
        weight=with_value(randn(4, 16).half(), (0, 0), INF),
    ),
    Case("loss_increase", DTypeNotSupportedError, ["change must be", "got int32"], {"change": randn(4, 16).int()}),
    # fisher
    *both(
        WITH_VALUES, DTypeNotSupportedError, ["fisher must be float32, float64", "got float16"], fisher=spd(8, 8).half()
    ),
    Case(
        "loss_increase",
        DTypeNotSupportedError,
        ["fisher must be float32, float64", "got float16"],
        {"fisher": spd(8, 8).half()},
    ),
    *both(
        (*WITH_VALUES, "loss_increase"),
        ShapeNotSupportedError,
        ["fisher must be [8, 8, 8]", "[4, 16]", "got [7, 8, 8]"],
        fisher=spd(7, 8),
    ),
    *both(
        (*WITH_VALUES, "loss_increase"),
        ShapeNotSupportedError,
        ["fisher must be [B, D, D]", "got [8, 8, 4]"],
        fisher=randn(8, 8, 4),
    ),
    *both(
        (*WITH_VALUES, "loss_increase"),
        ShapeNotSupportedError,
        ["fisher must be [B, D, D]", "got [64, 8]"],
        fisher=randn(64, 8),
    ),
    *both(
        WITH_VALUES,
        NonFiniteError,
        ["fisher must be finite", "[5, 1, 2]"],
        fisher=with_value(spd(8, 8), (5, 1, 2), NAN),
    ),
    *both(
        WITH_VALUES,
        NonFiniteError,
        ["fisher must be finite", "[7, 7, 7]"],
        fisher=with_value(spd(8, 8), (7, 7, 7), INF),
    ),
    *both(
        SEARCHES,
        ShapeNotSupportedError,
        ["D = 4", "cols = 16", "D % m and cols % D must be 0", "D = 8"],
        fisher=spd(16, 4),
    ),
    *both(SEARCHES, ShapeNotSupportedError, ["D = 32", "cols = 16", "D % m and cols % D must be 0"], fisher=spd(2, 32)),
    *both(SEARCHES, ConfigError, ["fisher may be None only for method='magnitude'", "'combinatorial'"], fisher=None),
    Case(
        "block_saliency",
        ConfigError,
        ["fisher may be None only for method='magnitude'", "'combinatorial'"],
        {"fisher": None},
    ),
    Case("obs_update", ConfigError, ["fisher may be None only for update='none'", "'joint'"], {"fisher": None}),
    *both(
        (*SEARCHES, "block_saliency"),
        SingularBlockError,
        ["fisher", "1 of 8", "not positive definite", "block 5 at pivot 3"],
        fisher=one_negative_block(8, 8, 5, 3),
    ),
    Case(
        "obs_update",
        SingularBlockError,
        ["fisher", "1 of 8", "block 7 at pivot 4"],
        {"fisher": one_negative_block(8, 8, 7, 4), "mask": ones(4, 16)},
    ),
    Case(
        "obs_update",
        SingularBlockError,
        ["fisher", "1 of 8", "block 2 at pivot 1"],
        {"fisher": one_negative_block(8, 8, 2, 1), "update": "single"},
    ),
    *both(
        (*SEARCHES, "block_saliency"),
        SingularBlockError,
        ["8 of 8", "block 0", "raise damp"],
        fisher=torch.zeros(8, 8, 8),
    ),
    *both(
        SEARCHES, SingularBlockError, ["block 5 at pivot 3"], fisher=one_negative_block(8, 8, 5, 3), method="pairwise"
    ),
    # mask
    *both(
        (*WITH_VALUES, "pack"),
        ShapeNotSupportedError,
        ["mask must have the shape of weight [4, 16]", "got [4, 8]"],
        mask=ones(4, 8),
    ),
    *both((*WITH_VALUES, "pack"), ShapeNotSupportedError, ["mask must have the shape", "got [64]"], mask=ones(64)),
    *both((*WITH_VALUES, "pack"), DTypeNotSupportedError, ["mask must be bool", "got uint8"], mask=ones(4, 16).byte()),
    *both(
        (*WITH_VALUES, "pack"), DTypeNotSupportedError, ["mask must be bool", "got float32"], mask=ones(4, 16).float()
    ),
    *both(("obs_update", "pack"), ConfigError, ["mask must be a bool tensor", "got None"], mask=None),
    # devices
    *both(WITH_VALUES, DeviceMismatchError, ["weight on cpu", "fisher on meta"], fisher=meta(spd(8, 8))),
    *both(WITH_VALUES, DeviceMismatchError, ["weight on meta", "fisher on cpu"], weight=meta(randn(4, 16))),
    *both(WITH_VALUES, DeviceMismatchError, ["weight on cpu", "mask on meta"], mask=meta(ones(4, 16))),
    Case("loss_increase", DeviceMismatchError, ["change on cpu", "fisher on meta"], {"fisher": meta(spd(8, 8))}),
    Case("pack", DeviceMismatchError, ["weight on cpu", "mask on meta"], {"mask": meta(ones(4, 16))}),
    # pattern, method, counts
    *both(("search_nm",), ConfigError, ["pattern of search_nm must be n:m", "got '2:2:8'"], pattern="2:2:8"),
    *both(
        ("search_nm",),
        ConfigError,
        ["pattern of search_nm must be n:m", "got 'unstructured:0.5'"],
        pattern="unstructured:0.5",
    ),
    *both(("search_vnm",), ConfigError, ["pattern of search_vnm must be v:n:m", "got '2:8'"], pattern="2:8"),
    *both(
        ("search_vnm",), ConfigError, ["pattern of search_vnm must be v:n:m", "got 'block4:0.5'"], pattern="block4:0.5"
    ),
    *both((*SEARCHES, "pack"), ConfigError, ["n:m", "n = 8, m = 2"], pattern="8:2"),
    *both((*SEARCHES, "pack"), ConfigError, ["pattern", "'dense'"], pattern="dense"),
    *both(
        SEARCHES,
        ConfigError,
        ["method must be one of", "'combinatorial'", "'magnitude'", "got 'wanda'"],
        method="wanda",
    ),
    Case(
        "block_saliency", ConfigError, ["method must be one of", "'diagonal'", "got 'pairwise'"], {"method": "pairwise"}
    ),
    Case(
        "obs_update", ConfigError, ["update must be one of 'joint', 'single', 'none'", "got 'both'"], {"update": "both"}
    ),
    Case(
        "search_nm",
        ConfigError,
        ["pattern 16:32", str(math.comb(32, 16)), "exact bound", "method='pairwise'"],
        {"weight": randn(1, 32), "fisher": spd(1, 32), "pattern": "16:32"},
    ),
    Case(
        "search_vnm",
        ConfigError,
        ["pattern 2:8:16", "12 columns", str(math.comb(16, 12) * math.comb(12, 8)), "exact bound"],
        {"weight": randn(2, 16), "fisher": spd(2, 16), "pattern": "2:8:16", "num_columns": 12},
    ),
    Case("search_vnm", ConfigError, ["num_columns must be n to m = 2 to 8", "got 1"], {"num_columns": 1}),
    Case("search_vnm", ConfigError, ["num_columns must be n to m = 2 to 8", "got 9"], {"num_columns": 9}),
    Case("search_vnm", ConfigError, ["num_columns must be n to m = 5 to 8", "got 4"], {"pattern": "2:5:8"}),
    Case(
        "search_nm",
        ConfigError,
        ["pairwise", "even m", "2:3"],
        {"weight": randn(2, 6), "fisher": spd(4, 3), "pattern": "2:3", "method": "pairwise"},
    ),
    Case("block_saliency", ShapeNotSupportedError, ["block must divide", "64 entries", "D = 8", "got 3"], {"block": 3}),
    Case("block_saliency", ShapeNotSupportedError, ["block must divide", "got 0"], {"block": 0}),
    Case("block_saliency", ShapeNotSupportedError, ["block must divide", "D = 8", "got 16"], {"block": 16}),
    # pack
    Case(
        "pack",
        ShapeNotSupportedError,
        ["weight must be a matrix [R, C]", "got shape [8]"],
        {"weight": randn(8), "mask": ones(8)},
    ),
    Case("pack", DTypeNotSupportedError, ["weight must be", "got int8"], {"weight": randn(4, 16).char()}),
    Case(
        "pack",
        SparsityPatternError,
        ["mask keeps 3 of 8 in row 1, group 1"],
        {"mask": with_value(GOOD["pack"]["mask"], (1, 10), True)},
    ),
    Case(
        "pack", NonFiniteError, ["weight must be finite", "[3, 9]"], {"weight": with_value(randn(4, 16), (3, 9), NAN)}
    ),
    Case("pack", ConfigError, ["unstructured:0.5", "no packed format"], {"pattern": "unstructured:0.5"}),
    Case("pack", ConfigError, ["2:3:8", "n = 2", "got n = 3"], {"pattern": "2:3:8"}),
]


def call(op: str, given: dict[str, Any]) -> Any:
    return getattr(ops, op)(**given)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and not a.is_meta:
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        )
    return isinstance(a, Tensor) or type(a) is type(b)


@pytest.mark.parametrize("op", GOOD)
def test_the_good_call_works(op):
    """Else the cases below could fail for another reason than the one they change."""
    call(op, copy.deepcopy(GOOD[op]))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_refused(case):
    given = copy.deepcopy(GOOD[case.op] | case.given)
    before = copy.deepcopy(given)
    with pytest.raises(case.error) as caught:
        call(case.op, given)
    assert isinstance(caught.value, ObsKernelsError)
    for word in case.words:
        assert word in str(caught.value), f"{word!r} not in: {caught.value}"
    assert all(same(before[name], given[name]) for name in given), "inputs must be as before the error"


def test_a_fisher_that_overlaps_itself_is_refused():
    with pytest.raises((ObsKernelsError, RuntimeError)):
        ops.accumulate_fisher_(torch.zeros(1, 4, 4).expand(2, 4, 4), torch.ones(1, 8), scale=1.0)


def test_every_error_is_a_builtin_too():
    """promises.md 3: what a caller would catch."""
    builtins = {
        "ConfigError": ValueError,
        "ShapeNotSupportedError": ValueError,
        "SparsityPatternError": ValueError,
        "CheckpointFormatError": ValueError,
        "DTypeNotSupportedError": TypeError,
        "DeviceMismatchError": RuntimeError,
        "UnsupportedGPUError": RuntimeError,
        "ResumeMismatchError": RuntimeError,
        "WorkFolderLockedError": RuntimeError,
        "MemoryBudgetError": RuntimeError,
        "BackendUnavailableError": ImportError,
        "NonFiniteGradientError": FloatingPointError,
        "SingularBlockError": torch.linalg.LinAlgError,
    }
    for name, builtin in builtins.items():
        assert issubclass(getattr(errors, name), ObsKernelsError) and issubclass(getattr(errors, name), builtin), name


@pytest.mark.parametrize("size", [8, 16])
def test_the_block_number_counts_over_chunks(monkeypatch, size):
    """One block a chunk: the number in the text is that of the whole tensor."""
    monkeypatch.setattr("obs_kernels.reference.fisher.CHUNK_BYTES", 1)
    fisher = one_negative_block(64 // size, size, 3, 2)
    mask = ones(4, 16)
    calls: list[Callable[[], Any]] = [
        lambda: ops.search_nm(randn(4, 16), fisher, "2:8"),
        lambda: ops.search_vnm(randn(4, 16), fisher, "2:2:8"),
        lambda: ops.obs_update(randn(4, 16), fisher, mask),
        lambda: ops.block_saliency(randn(4, 16), fisher, 4),
    ]
    for run in calls:
        with pytest.raises(SingularBlockError, match="block 3 at pivot 2"):
            run()


def test_duplicate_columns_and_rank_one_are_named():
    """Semidefinite, not indefinite: rank one of a single gradient, and two equal columns."""
    weight = randn(1, 8)
    rank_one = ops.accumulate_fisher_(torch.zeros(1, 8, 8), torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8]]), scale=1.0)
    twin = torch.eye(8)
    twin[0, 1] = twin[1, 0] = 1.0
    for fisher in (rank_one, twin[None]):
        with pytest.raises(SingularBlockError, match=r"block 0 at pivot 2.*raise damp"):
            ops.search_nm(weight, fisher, "2:8")
        ops.search_nm(weight, fisher, "2:8", damp=0.1)


def test_dead_entries_may_be_singular():
    """Their rows and columns leave the matrix before it is factorised."""
    fisher = torch.eye(8)
    fisher[3, 3] = -5.0
    mask = torch.arange(8).ne(3)[None]
    sel = ops.search_nm(randn(1, 8), fisher[None], "2:8", mask=mask)
    assert int(sel.mask.sum()) == 2 and not sel.mask[0, 3]


@pytest.mark.parametrize("name", ["search_nm", "search_vnm", "obs_update", "block_saliency"])
def test_nothing_is_written_into_good_inputs(name):
    given = copy.deepcopy(GOOD[name]) | {"damp": torch.full((8,), 0.1)}
    before = copy.deepcopy(given)
    call(name, given)
    assert all(same(before[key], given[key]) for key in given)
