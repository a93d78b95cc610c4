# SPDX-License-Identifier: Apache-2.0
"""The sparse product of panels v:2:m on the columns that they keep alone, gathered from feature-major x."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from fisher_checks import Guarded, needs
from product_checks import (
    DEVICE,
    DTYPES,
    INF,
    NAN,
    assert_exact,
    every_place,
    gen,
    hopper,
    integer_weight,
    integers,
    matmul,
    normal,
    normal_weight,
    prepacked_kept,
    rows_between_nans,
    same_bits,
)
from test_matmul import ACTIVATIONS, check, expected
from torch import Tensor

from obs_kernels import _ext, parse_pattern
from obs_kernels.errors import ConfigError, DeviceMismatchError, DTypeNotSupportedError, ShapeNotSupportedError
from obs_kernels.ops import SparseWeight, pack, unpack

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]
__all__ = ["gen", "hopper", "matmul"]  # fixtures

PANELS = (1, 3)
M = (4, 8, 12, 16, 32, 64)
GROUPS = (1, 2, 5, 16, 17, 33, 129, 272)
"""A step takes 16, and the columns of eight steps are loaded at a time."""
TOKENS = (1, 8, 77, 129, 256, 264, 1000)
KINDS = ("token", "token apart", "feature", "feature apart", "turned")
RAGGED = [
    pytest.param(77, 128, 12 * 17, "64:2:12", marks=pytest.mark.sanitizer),
    (130, 192, 40, "192:2:8"),
    (264, 384, 32 * 33, "128:2:32"),
    (1000, 768, 3072, "256:2:8"),
]
"""(tokens, rows, cols, pattern)."""


def configs(matmul: ModuleType, v: int) -> list[str]:
    """Those whose rows divide ``v``."""
    found = [name for name in matmul.GATHER_CONFIGS if v % int(name.split()[1].split("x")[0]) == 0]
    assert found, v
    return found


def gathered(matmul: ModuleType, x: Tensor, kind: str) -> Tensor:
    """What the kernel takes for ``x`` [T, C] that comes to it in one of KINDS."""
    match kind:
        case "token":
            return matmul.as_gathered(x, "token")
        case "token apart":
            return matmul.as_gathered(rows_between_nans(x), "token")
        case "feature":
            return matmul.as_gathered(x.T.contiguous(), "feature")
        case "feature apart":
            apart = rows_between_nans(x.T)
            found = matmul.as_gathered(apart, "feature")
            assert found.data_ptr() == apart.data_ptr(), "a copy that was not needed"
            return found
    return matmul.as_gathered(x.T, "feature")


def launch(
    matmul: ModuleType,
    config: str,
    given: Tensor,
    sparse: SparseWeight,
    bias: Tensor | None = None,
    y_layout: str = "token",
    *,
    activation: str = "",
    shift: int = 0,
) -> Tensor:
    """y [T, R] by a forced configuration, written into NaN between guards; ``shift`` is that of ``Guarded``."""
    (rows, cols), tokens = sparse.shape, given.shape[1]
    shape = (tokens, rows) if y_layout == "token" else (rows, tokens)
    y = Guarded(torch.full(shape, NAN, dtype=given.dtype, device=DEVICE), shift)
    plan = matmul.launch_gather_linear(
        given, sparse.columns, prepacked_kept(matmul, sparse), bias, y.tensor, rows=rows, cols=cols, v=sparse.pattern.v,
        activation=activation, y_layout=y_layout, config=config,
    )  # fmt: skip
    assert plan.config == config
    y.assert_unharmed()
    return y.tensor if y_layout == "token" else y.tensor.T


def slots(sparse: SparseWeight) -> Tensor:
    """[R, C] bool: what the tensor core multiplies, two of every m: the kept entries and the free places."""
    ones = replace(sparse, values=torch.ones_like(sparse.values))
    return unpack(ones, backend="reference") != 0


# Sums, at every shape and by every configuration


def shapes() -> Iterator[tuple[int, int, int]]:
    """(m, groups, tokens): each two of the three lists in every combination."""
    yield from itertools.product(M, GROUPS, (129,))
    yield from itertools.product(M, (17,), TOKENS)
    yield from itertools.product((16,), GROUPS, TOKENS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [64, 128, 192, 256])
def test_integers_are_exact_at_every_shape(gen, matmul, v, dtype):
    """The other lists go round beside the shapes, by a step that mixes them."""
    around = list(itertools.product(KINDS, ("token", "feature"), (True, False), PANELS, (0, 1)))
    for i, (m, groups, tokens) in enumerate(shapes()):
        kind, y_layout, with_bias, panels, shift = around[37 * i % len(around)]
        rows, cols = panels * v, m * groups
        sparse, dense = integer_weight(rows, cols, f"{v}:2:{m}", dtype)
        x = integers(gen, 7, (tokens, cols), dtype)
        bias = integers(gen, 7, (rows,), dtype) if with_bias else None
        given = gathered(matmul, x, kind)
        for config in configs(matmul, v):
            case = (config, m, groups, tokens, kind, y_layout, with_bias, panels, shift)
            assert_exact(launch(matmul, config, given, sparse, bias, y_layout, shift=shift), x, dense, bias, case)


@pytest.mark.parametrize("y_layout", ["token", "feature"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_by_every_configuration(gen, matmul, kind, y_layout):
    """By the copy engine and element by element: y of rows that are no multiple of 16 bytes, or off its alignment."""
    for tokens, shift in ((264, 0), (264, 1), (77, 0)):
        sparse, dense = integer_weight(512, 17 * 16, "256:2:16", torch.float16)
        x, bias = integers(gen, 7, (tokens, 17 * 16), torch.float16), integers(gen, 7, (512,), torch.float16)
        given = gathered(matmul, x, kind)
        for config in matmul.GATHER_CONFIGS:
            y = launch(matmul, config, given, sparse, bias, y_layout, shift=shift)
            assert_exact(y, x, dense, bias, (config, tokens, shift))


@pytest.mark.parametrize("y_layout", ["token", "feature"])
@pytest.mark.parametrize(("v", "rows"), [(64, 64 * 42), (128, 128 * 21), (192, 192 * 14), (256, 256 * 11)])
def test_several_tiles_of_a_block(gen, matmul, v, rows, y_layout):
    """More tiles than multiprocessors, ragged: stages and phases go on from tile to tile, with fewer and more steps
    than there are stages and than those whose columns are loaded at a time; panels change between the tiles of a
    block. Of 2,425 tokens the last cluster of 2 x 128 is half empty.
    """
    for groups, tokens in itertools.product((5, 17, 83, 267), (2504, 2425)):
        cols = 8 * groups
        sparse, dense = integer_weight(rows, cols, f"{v}:2:8", torch.bfloat16)
        x, bias = integers(gen, 7, (tokens, cols), torch.bfloat16), integers(gen, 7, (rows,), torch.bfloat16)
        given = matmul.as_gathered(x, "token")
        for config in configs(matmul, v):
            tile_rows, tile_tokens = map(int, config.split()[1].split("x"))
            assert rows // tile_rows * -(-tokens // tile_tokens) > 132
            assert_exact(launch(matmul, config, given, sparse, bias, y_layout), x, dense, bias, (config, cols, tokens))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("tokens", "rows", "cols", "text"), RAGGED)
def test_random_inputs(gen, matmul, tokens, rows, cols, text, activation, dtype):
    """A bias of both signs, on either side of every activation; y turned has the same bits."""
    sparse, dense = normal_weight(gen, rows, cols, text, dtype)
    x = normal(gen, (tokens, cols), dtype)
    given = matmul.as_gathered(x, "token")
    for config in configs(matmul, sparse.pattern.v):
        for bias in (None, torch.linspace(-6, 6, rows, device=DEVICE).to(dtype)):
            y = launch(matmul, config, given, sparse, bias, activation=activation or "")
            check(y, x, dense, bias, activation)
            for layout in ("token", "feature"):
                again = launch(matmul, config, given, sparse, bias, layout, activation=activation or "")
                assert same_bits(again, y), (config, layout)


@pytest.mark.sanitizer
@pytest.mark.parametrize("y_layout", ["token", "feature"])
@pytest.mark.parametrize("v", [128, 256])
def test_every_configuration_under_sanitizers(gen, matmul, v, y_layout):
    """Three steps, the last one ragged, and a ragged tile of tokens."""
    sparse, dense = integer_weight(256, 8 * 34, f"{v}:2:8", torch.float16)
    x = integers(gen, 7, (200, 8 * 34), torch.float16)
    given = matmul.as_gathered(x, "token")
    for config in configs(matmul, v):
        assert_exact(launch(matmul, config, given, sparse, None, y_layout), x, dense, None, config)


def test_runs_give_the_same_bits(gen, matmul):
    """Many tiles a block, where stages race if they do."""
    sparse, dense = normal_weight(gen, 256 * 11, 3072, "256:2:16", torch.bfloat16)
    x, bias = normal(gen, (2501, 3072), torch.bfloat16), normal(gen, (256 * 11,), torch.bfloat16)
    given = matmul.as_gathered(x, "token")
    for config in matmul.GATHER_CONFIGS:
        first, *others = (launch(matmul, config, given, sparse, bias) for _ in range(4))
        check(first, x, dense, bias, None)
        assert all(same_bits(first, other) for other in others), config


def test_overflow_becomes_infinity(gen, matmul):
    sparse, dense = integer_weight(64, 64, "64:2:16", torch.float16)
    x = 30000 * integers(gen, 1, (9, 64), torch.float16)
    wanted = expected(x, dense, None, None).to(torch.float16)
    assert wanted.isinf().any() and wanted.isfinite().any()
    assert torch.equal(launch(matmul, "gather 64x256", matmul.as_gathered(x, "token"), sparse), wanted)


@pytest.mark.big
def test_beyond_31_bits(gen, matmul):
    """x has more than 2^31 elements: its last columns lie beyond, of the first tokens as of the last."""
    needs(24)
    tokens, cols = 2**18 + 9, 16 * 513
    assert tokens * (cols - 16) > 2**31
    sparse, dense = normal_weight(gen, 64, cols, "64:2:16", torch.bfloat16)
    x = torch.randn(tokens, cols, generator=gen, device=DEVICE, dtype=torch.bfloat16)
    y = launch(matmul, "gather 64x256", matmul.as_gathered(x, "token"), sparse)
    assert not y.isnan().any()
    for start in (0, 2**31 // cols - 50, tokens - 100):
        part = slice(start, start + 100)
        check(y[part].contiguous(), x[part], dense, None, None)


# Places: codes, columns, and what a row does not keep


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [64, 128, 192, 256])
@pytest.mark.parametrize("m", [4, 8, 16, 64])
def test_every_code_and_column_in_every_position(gen, matmul, m, v, dtype):
    """The product with the identity is the weight, bit for bit; more groups than a step has."""
    cols = 17 * m
    mask = every_place(768, cols, parse_pattern(f"{v}:2:{m}"))
    weight = normal(gen, (768, cols), dtype).masked_fill(~mask, 0.0)
    sparse = pack(weight, mask, f"{v}:2:{m}")
    assert {0, m - 1} <= set(sparse.columns.unique().tolist())
    given = matmul.as_gathered(torch.eye(cols, dtype=dtype, device=DEVICE), "feature")
    for config in configs(matmul, v):
        assert torch.equal(launch(matmul, config, given, sparse, None, "feature").T, weight), config


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("text", ["64:2:4", "64:2:16", "128:2:12", "256:2:64"])
def test_what_lies_around_x_reaches_nothing(gen, matmul, text, bad):
    """Tokens beyond T in the stride, columns beyond C, columns that no row multiplies: all of them bad."""
    pattern, dtype = parse_pattern(text), torch.bfloat16
    sparse, dense = integer_weight(2 * pattern.v, 17 * pattern.m, text, dtype)
    idle = ~slots(sparse).any(0)
    assert idle.any() or pattern.m == 4
    for tokens in (77, 256, 265):
        clean = integers(gen, 7, (tokens, 17 * pattern.m), dtype)
        x = rows_between_nans(clean.masked_fill(idle, bad).T)
        if bad == INF:
            x._base.masked_fill_(x._base.isnan(), INF)
        for config in configs(matmul, pattern.v):
            assert_exact(launch(matmul, config, x, sparse), clean, dense, None, (config, tokens))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("text", ["64:2:4", "64:2:8", "128:2:16", "256:2:12"])
def test_nan_and_inf_reach_the_rows_that_keep_the_column(gen, matmul, text, bad):
    """Those of n = 2 alone: where a group keeps fewer, the places that packing filled with +0 count as kept."""
    pattern = parse_pattern(text)
    rows, cols = 3 * pattern.v, 17 * pattern.m
    sparse, _ = normal_weight(gen, rows, cols, text, torch.bfloat16)
    reached = slots(sparse)
    x = normal(gen, (200, cols), torch.bfloat16)
    columns = [0, 1, pattern.m - 1, pattern.m, 7 * pattern.m + 2, cols - 1]
    columns += [group * pattern.m + int(sparse.columns[1, group, 3]) for group in (0, 6, 16)]
    for config in configs(matmul, pattern.v):
        clean = launch(matmul, config, matmul.as_gathered(x, "token"), sparse)
        assert clean.isfinite().all()
        hits = 0
        for token, column in itertools.product((0, 130, 199), columns):
            dirty = x.clone()
            dirty[token, column] = bad
            y = launch(matmul, config, matmul.as_gathered(dirty, "token"), sparse)
            hit = reached[:, column]
            assert torch.equal(~y[token].isfinite(), hit), (config, token, column)
            assert same_bits(y[token, ~hit], clean[token, ~hit]), (config, token, column)
            y[token], hits = clean[token], hits + int(hit.sum())
            assert same_bits(y, clean), "another token changed"
        assert hits > 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_keeps_nan(gen, matmul, activation):
    sparse, _ = normal_weight(gen, 128, 128, "128:2:16", torch.float16)
    x = normal(gen, (9, 128), torch.float16)
    column = 16 + int(sparse.columns[0, 1, 2])
    x[4, column] = NAN
    for config in configs(matmul, 128):
        y = launch(matmul, config, matmul.as_gathered(x, "token"), sparse, activation=activation or "")
        assert torch.equal(y[4].isnan(), slots(sparse)[:, column]) and not y[[0, 3, 5, 8]].isnan().any()


# What is refused, before anything is launched


def arguments(gen: torch.Generator, matmul: ModuleType, text: str = "64:2:16") -> dict[str, object]:
    sparse, _ = integer_weight(128, 128, text, torch.float16)
    x = matmul.as_gathered(integers(gen, 7, (16, 128), torch.float16), "token")
    return {
        "x": x, "columns": sparse.columns, "packed": prepacked_kept(matmul, sparse), "bias": None,
        "y": x.new_zeros(16, 128), "rows": 128, "cols": 128, "v": sparse.pattern.v, "activation": "",
        "y_layout": "token",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda a: {"columns": a["columns"].flatten()}, ShapeNotSupportedError, "columns must be"),
        (lambda a: {"columns": a["columns"][:1]}, ShapeNotSupportedError, "columns must be"),
        (lambda a: {"columns": a["columns"][..., :3].contiguous()}, ShapeNotSupportedError, "columns must be"),
        (lambda a: {"columns": a["columns"][:, :7].contiguous()}, ShapeNotSupportedError, "columns must be"),
        (lambda a: {"columns": a["columns"][:, :0]}, ShapeNotSupportedError, "columns must be"),
        (lambda a: {"columns": a["columns"].transpose(0, 1)}, ShapeNotSupportedError, "contiguous"),
        (lambda a: {"v": 128}, ShapeNotSupportedError, "columns must be"),
        (lambda a: {"v": 0}, ShapeNotSupportedError, "columns must be"),
        (lambda a: {"packed": a["packed"][:-16]}, ShapeNotSupportedError, "packed must hold"),
        (lambda a: {"cols": 16}, ValueError, "four of m = 4 .. 256 columns are kept, got m = 2"),
        (lambda a: {"x": a["x"][:120]}, ShapeNotSupportedError, "x, y and bias must be"),
        (lambda a: {"y": a["y"].T}, ShapeNotSupportedError, "contiguous"),
        (lambda a: {"y": a["y"][:, :64].contiguous()}, ShapeNotSupportedError, "x, y and bias must be"),
        (lambda a: {"bias": a["y"].new_zeros(64)}, ShapeNotSupportedError, "x, y and bias must be"),
        (lambda a: {"y": a["y"].bfloat16()}, DTypeNotSupportedError, "must share"),
        (lambda a: {"config": "gather 1x1"}, ConfigError, "config must be one of"),
        (lambda a: {"config": "gather 128x256"}, ValueError, "the rows of a tile must divide v = 64"),
        (lambda a: {"config": "gather 256x128"}, ValueError, "the rows of a tile must divide v = 64"),
        (lambda a: {"x": a["x"].cpu()}, DeviceMismatchError, "x must be on a CUDA device"),
        (lambda a: {"columns": a["columns"].cpu()}, DeviceMismatchError, "columns must be on a CUDA device"),
        (lambda a: {"packed": a["packed"].cpu()}, DeviceMismatchError, "packed must be on a CUDA device"),
        (
            lambda a: {"x": a["x"][:, :9].contiguous(), "y": a["y"][:9]},
            ValueError,
            "16 bytes",
        ),
        (
            lambda a: {"x": a["x"].new_zeros(128 * 16 + 1)[1:].view(128, 16)},
            ValueError,
            "x and packed must be aligned to 16 bytes",
        ),
        (
            lambda a: {"columns": torch.cat([a["columns"].new_zeros(1), a["columns"].flatten()])[1:].view(2, 8, 4)},
            ValueError,
            "columns must be aligned to 4 bytes",
        ),
    ],
)
def test_refused(gen, matmul, change, error, words):
    usual = arguments(gen, matmul)
    changed = usual | change(usual)
    changed["y"].fill_(5)
    before = _ext.load().launch_count()
    with pytest.raises(error, match=words):
        matmul.launch_gather_linear(**changed)
    assert _ext.load().launch_count() == before and bool((changed["y"] == 5).all())
    assert matmul.launch_gather_linear(**usual).config == "gather 64x256", "what was not changed is taken"


def test_columns_of_another_dtype_are_refused(gen, matmul):
    """Their bytes would be read as other columns; here all of them stay inside x."""
    usual = arguments(gen, matmul)
    with pytest.raises((ShapeNotSupportedError, DTypeNotSupportedError), match="uint8"):
        matmul.launch_gather_linear(**usual | {"columns": usual["columns"].long()})


def test_narrow_panels_are_refused(gen, matmul):
    """The rows of a tile would be of several panels."""
    for config in (None, *matmul.GATHER_CONFIGS):
        usual = arguments(gen, matmul, "32:2:16") | {"config": config}
        with pytest.raises(ValueError, match="v must be a multiple of 64 that divides the rows, got v = 32"):
            matmul.launch_gather_linear(**usual)


def test_nothing_to_do(gen, matmul):
    """Neither tokens nor rows: no launch."""
    usual = arguments(gen, matmul)
    before = _ext.load().launch_count()
    plan = matmul.launch_gather_linear(**usual | {"x": usual["x"][:, :0].contiguous(), "y": usual["y"][:0]})
    assert (plan.path, plan.blocks) == ("empty", 0) and _ext.load().launch_count() == before


@pytest.mark.multigpu
def test_operands_of_several_devices_are_refused(gen, matmul):
    usual = arguments(gen, matmul)
    for name in ("x", "packed", "y", "columns"):
        with pytest.raises(DeviceMismatchError, match="share a device"):
            matmul.launch_gather_linear(**usual | {name: usual[name].to("cuda:1")})
