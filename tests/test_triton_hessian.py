# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the Hessian without a GPU: interpreted, and compiled for three targets.

Products are torch's on every device. In the interpreter they are those of f32 copies.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cubins import assert_no_spills
from interpreted import Case, interpret
from tolerances import FISHER_RMS_PER_SQRT_SAMPLE, HESSIAN_HALVES_CUT, TOKEN_SUMS
from torch import Tensor

from obs_kernels.errors import ConfigError
from obs_kernels.ops import dispatch

triton = pytest.importorskip("triton")

from obs_kernels.triton_kernels import hessian as kernels  # noqa: E402  needs triton
from obs_kernels.triton_kernels.tuning import HESSIAN_CONFIG, hessian_config  # noqa: E402

F64 = torch.float64
SMALL = replace(HESSIAN_CONFIG, tokens=16, cols=32, sum_blocks=4, side=16, strip=32, part=32, parts=2)
"""Several of everything at small sizes: tiles, strips, parts, batched calls."""
SHAPES = [(1, 1), (5, 3), (40, 33), (100, 100), (200, 70)]
KINDS = ["plain", "weighted", "moved", "both"]


def problem(gen: torch.Generator, tokens: int, cols: int, kind: str) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """H with NaN below its diagonal, x and the other arguments; with an origin x has a large mean in common."""
    moved, weighted = kind in ("moved", "both"), kind in ("weighted", "both")
    x = (torch.randn(tokens, cols, generator=gen) + (100 if moved else 0)).bfloat16()
    hessian = torch.randn(cols, cols, generator=gen)
    hessian = (hessian + hessian.T).masked_fill(torch.ones(cols, cols).tril(-1).bool(), float("nan"))
    q = torch.rand(tokens, generator=gen) if weighted else None
    c = 100 + torch.rand(cols, generator=gen) if moved else None
    return hessian, x, {"token_weight": q, "origin": c, "scale": 0.3}


def parts_of(x: Tensor, token_weight: Tensor | None, origin: Tensor | None) -> tuple[Tensor, Tensor]:
    """x - c and q in f64."""
    u = x.double() - (0 if origin is None else origin.double())
    return u, torch.ones(x.shape[0], dtype=F64) if token_weight is None else token_weight.double()


def check(result: Tensor, hessian: Tensor, x: Tensor, options: dict[str, Any]) -> None:
    """Against the definition, one token at a time."""
    u, q = parts_of(x, options["token_weight"], options["origin"])
    expected = hessian.double().triu() + hessian.double().triu(1).T
    for token, weight in zip(u, q, strict=True):
        expected += options["scale"] * weight * torch.outer(token, token)
    assert torch.equal(result, result.T)
    exact = options["token_weight"] is None and options["origin"] is None
    tolerance = FISHER_RMS_PER_SQRT_SAMPLE * x.shape[0] ** 0.5 if exact else HESSIAN_HALVES_CUT
    error = (result.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error <= tolerance, (x.shape, error)


def check_input_sum(result: Tensor, x: Tensor, options: dict[str, Any]) -> None:
    """[C + 1], which was ones."""
    u, q = parts_of(x, options["token_weight"], options["origin"])
    most = torch.cat([(q[:, None] * u).abs().sum(0), q.sum()[None]]) + 1
    expected = torch.cat([q @ u, q.sum()[None]]) + 1
    assert ((result - expected).abs() <= TOKEN_SUMS * most).all()


# Interpreted


@pytest.mark.parametrize("config", [None, SMALL])
def test_against_outer_products(gen: torch.Generator, tmp_path: Path, config: Any) -> None:
    """Sizes that fill no tile, no strip and no part; the lower triangle is written, not read."""
    given = [problem(gen, *shape, kind) for shape in SHAPES for kind in KINDS]
    more = {} if config is None else {"config": asdict(config)}
    cases: list[Case] = [("accumulate_hessian_", (hessian, x), options | more) for hessian, x, options in given]
    for result, (hessian, x, options) in zip(interpret(cases, tmp_path), given, strict=True):
        check(result, hessian, x, options)


def test_sums_of_the_same_pass(gen: torch.Generator, tmp_path: Path) -> None:
    """H as without them; the last sum behind columns that a pattern pads, which stay as they are."""
    given = [problem(gen, *shape, kind) for shape in SHAPES for kind in KINDS[1:]]
    cases: list[Case] = []
    for hessian, x, options in given:
        total = torch.ones(x.shape[1] + 4, dtype=F64)
        kept = {name: options[name] for name in ("token_weight", "origin")}
        cases.append(("accumulate_inputs_", (hessian, total, x), kept))
    for (_, result, total, _), (hessian, x, options) in zip(interpret(cases, tmp_path), given, strict=True):
        check(result, hessian, x, options | {"scale": 1.0})
        assert torch.equal(total[x.shape[1] : -1], torch.ones(3, dtype=F64))
        check_input_sum(torch.cat([total[: x.shape[1]], total[-1:]]), x, options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_of_tokens(gen: torch.Generator, tmp_path: Path, dtype: torch.dtype) -> None:
    shapes = [(1, 1), (33, 5), (70, 300), (5000, 3)]
    grads = [torch.randn(*shape, generator=gen).to(dtype) for shape in shapes]
    cases: list[Case] = [("weigh_tokens_", (torch.ones(dy.shape[1], dtype=F64), dy), {"scale": 32.0}) for dy in grads]
    for (found, row_sum, _), dy in zip(interpret(cases, tmp_path), grads, strict=True):
        squares = (32.0 * dy.double()).square()
        torch.testing.assert_close(found.double(), squares.sum(1), rtol=TOKEN_SUMS, atol=0.0)
        torch.testing.assert_close(row_sum, 1 + squares.sum(0), rtol=TOKEN_SUMS, atol=0.0)


def test_nothing_to_do_changes_nothing(tmp_path: Path) -> None:
    shapes = [(0, 5), (3, 0), (0, 0)]
    cases: list[Case] = []
    for tokens, size in shapes:
        x, q = torch.zeros(tokens, size).bfloat16(), torch.ones(tokens)
        cases.append(("accumulate_hessian_", (torch.full((size, size), 3.0), x), {"token_weight": q, "scale": 1.0}))
        cases.append(("weigh_tokens_", (torch.full((size,), 3.0, dtype=F64), x), {"scale": 1.0}))
    results = interpret(cases, tmp_path)
    for (tokens, size), hessian, (q, row_sum, _) in zip(shapes, results[::2], results[1::2], strict=True):
        assert torch.equal(hessian, torch.full((size, size), 3.0))
        assert torch.equal(q, torch.zeros(tokens)) and torch.equal(row_sum, torch.full((size,), 3.0, dtype=F64))


def test_integers_are_exact(gen: torch.Generator, tmp_path: Path) -> None:
    """Factors of at most 16 bits, some with a lower half: S and A count once and twice, tile by tile."""
    x = torch.randint(-20, 21, (50, 70), generator=gen).bfloat16()
    q = torch.tensor([1.0, 4.0, 25.0, 729.0])[torch.randint(0, 4, (50,), generator=gen)]
    options = {"token_weight": q, "origin": torch.full((70,), 2.0), "scale": 2.0}
    more: list[dict[str, Any]] = [{}, {"config": asdict(SMALL)}]
    cases: list[Case] = [("accumulate_hessian_", (torch.eye(70), x), options | part) for part in more]
    # what two halves hold: lo lo^T is left out
    u = q.sqrt().double()[:, None] * (x.double() - 2)
    high = (u.float().view(torch.int32) & -65536).view(torch.float32).double()
    wanted = torch.eye(70, dtype=F64) + 2 * (u.T @ u - (u - high).T @ (u - high))
    assert (u != high).any() and wanted.abs().max() < 2**24
    for result in interpret(cases, tmp_path):
        assert torch.equal(result.double(), wanted)


def test_non_finite_values_stay_in_their_columns(gen: torch.Generator, tmp_path: Path) -> None:
    """An Inf or NaN of x spoils row and column of H and one sum, not more; the same of dy one token and one row."""
    hessian, x, options = problem(gen, 70, 40, "both")
    kept = {name: options[name] for name in ("token_weight", "origin")}
    bad = x.clone()
    bad[3, 5], bad[69, 38] = float("inf"), float("nan")
    dy = torch.randn(70, 40, generator=gen)
    dy[69, 7], dy[0, 33] = float("inf"), float("nan")
    cases: list[Case] = [
        ("accumulate_inputs_", (hessian.clone(), torch.zeros(41, dtype=F64), each), kept) for each in (x, bad)
    ]
    (_, good, good_sum, _), (_, found, found_sum, _), (q, rows, _) = interpret(
        [*cases, ("weigh_tokens_", (torch.zeros(40, dtype=F64), dy), {"scale": 1.0})], tmp_path
    )
    clean = torch.ones(41, dtype=torch.bool)
    clean[[5, 38]] = False
    assert torch.equal(found[clean[:40]][:, clean[:40]], good[clean[:40]][:, clean[:40]])
    assert torch.equal(found_sum[clean], good_sum[clean]) and not torch.isfinite(found_sum[~clean]).any()
    assert not torch.isfinite(found[~clean[:40]]).any() and not torch.isfinite(found[:, ~clean[:40]]).any()
    assert (~torch.isfinite(q)).nonzero().flatten().tolist() == [0, 69]
    assert (~torch.isfinite(rows)).nonzero().flatten().tolist() == [7, 33]


def test_strides(gen: torch.Generator, tmp_path: Path) -> None:
    """Rows of a wider buffer, transposed inputs, every other weight, a Hessian that is a slice of something larger."""
    _, wide, options = problem(gen, 50, 60, "both")
    large, q, c = torch.zeros(3, 80, 120), options["token_weight"], options["origin"]
    given = [
        (torch.zeros(40, 40), wide[:, 5:45], {"token_weight": q, "origin": c[:40], "scale": 1.0}),
        (torch.zeros(60, 60), wide.T.contiguous().T, options),
        (large[0, 10:70, 30:90], wide, options | {"token_weight": torch.stack([q, q], 1)[:, 0], "origin": c.double()}),
        (large[1, 10:70, ::2], wide, options | {"token_weight": q.double()}),
        (large[2, 10:70, ::2], wide, options | {"token_weight": None, "origin": None}),
    ]
    cases: list[Case] = [("accumulate_hessian_", (hessian, x), more) for hessian, x, more in given]
    for result, (hessian, x, more) in zip(interpret(cases, tmp_path), given, strict=True):
        check(result, torch.zeros_like(hessian), x, more)


def test_offsets_of_64_bits(gen: torch.Generator, tmp_path: Path) -> None:
    """Two tokens more than 2^31 elements apart: an offset of 32 bits would read the first one twice."""
    rows = torch.randn(2, 32, generator=gen).bfloat16()
    script = (
        "import sys, torch; from obs_kernels import triton_kernels as t\n"
        "rows = torch.load('rows.pt'); distance = 2**31 + 48\n"
        "memory = torch.empty(distance + 32, dtype=torch.bfloat16)\n"  # virtual: two pages of it are touched
        "x = memory.as_strided((2, 32), (distance, 1)); x.copy_(rows)\n"
        "q = t.weigh_tokens_(torch.zeros(32, dtype=torch.float64), x, scale=1.0)\n"
        "h = t.accumulate_hessian_(torch.zeros(32, 32), x, token_weight=torch.ones(2), scale=1.0)\n"
        "torch.save((q, h), 'out.pt')\n"
    )
    torch.save(rows, tmp_path / "rows.pt")
    run_interpreted(script, tmp_path)
    q, hessian = torch.load(tmp_path / "out.pt")
    torch.testing.assert_close(q, rows.float().square().sum(1))
    check(hessian, torch.zeros(32, 32), rows, {"token_weight": torch.ones(2), "origin": None, "scale": 1.0})


def run_interpreted(script: str, folder: Path, **environment: str) -> None:
    path = os.pathsep.join([str(Path(kernels.__file__).parents[2]), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_layer_collects_what_the_reference_collects(tmp_path: Path) -> None:
    """A pruner on bf16 inputs, columns padded by the pattern and clusters of rows included."""
    script = (
        "import torch, obs_kernels as obs; from torch import nn\n"
        "torch.manual_seed(0)\n"
        "net = nn.Sequential(nn.Linear(20, 24), nn.GELU(), nn.Linear(24, 16)).bfloat16()\n"
        "batches = [torch.randn(4, 5, 20).bfloat16() + 3 for _ in range(3)]\n"
        "found = []\n"
        "for more in ({}, {'row_clusters': 2}, {'curvature': 'layer'}):\n"
        "    options = {'pattern': '2:8', 'curvature': 'row', 'num_grads': 12, 'on_unsupported': 'pad', **more}\n"
        "    cfg = obs.OBSConfig(**options)\n"
        "    pruner = obs.OBSPruner(net, cfg)\n"
        "    pruner.collect(batches, lambda m, x: m(x).float().square().sum((1, 2)))\n"
        "    for layer in pruner.layers:\n"
        "        found.append((layer.mean_fisher(), layer.row_sum, layer.input_sum, layer.origin))\n"
        "torch.save(found, 'found.pt')\n"
    )
    found = []
    for backend in ("triton", "reference"):
        run_interpreted(script, tmp_path, OBS_KERNELS_BACKEND=backend)
        found.append(torch.load(tmp_path / "found.pt"))
    assert len(found[0]) == 6
    for mine, wanted in zip(*found, strict=True):
        for a, b, rtol in zip(mine, wanted, (HESSIAN_HALVES_CUT, TOKEN_SUMS, 1e-5, 1e-5), strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=0.0, atol=rtol * float(b.abs().max()))


def test_the_path_is_named(tmp_path: Path) -> None:
    script = (
        "import torch; from obs_kernels.triton_kernels.hessian import launch_accumulate_hessian as launch\n"
        "x, q = torch.zeros(9, 4).bfloat16(), torch.ones(9)\n"
        "paths = [launch(torch.zeros(4, 4), x[:n], token_weight=w, origin=None, scale=1.0).path\n"
        "         for n, w in ((9, None), (9, q), (0, None))]\n"
        "assert paths == ['inputs', 'halves', 'empty'], paths\n"
    )
    run_interpreted(script, tmp_path)


# Tuning


@pytest.mark.parametrize("config", [HESSIAN_CONFIG, SMALL])
def test_parts_hold_all_tokens(config: Any) -> None:
    for tokens in [*range(1, 300), config.part, config.part + 1, 3 * config.part - 1, 12_288, 40_000]:
        parts, length = config.split(tokens)
        assert parts * length >= tokens > (parts - 1) * length - parts * config.tokens
        assert length <= config.part and length % config.tokens == 0
    assert HESSIAN_CONFIG.split(12_288) == (3, 4096)


@pytest.mark.parametrize("change", [{"side": 48}, {"tokens": 0}, {"strip": 16}, {"part": 16}, {"parts": 0}])
def test_impossible_records_are_refused(change: dict[str, int]) -> None:
    assert hessian_config(config=SMALL) is SMALL and hessian_config() is HESSIAN_CONFIG
    with pytest.raises(ConfigError, match="config needs powers of two"):
        hessian_config(config=replace(HESSIAN_CONFIG, **change))


# Compiled


TARGETS = [80, 90, 100]
TILE = {"TOKENS": HESSIAN_CONFIG.tokens, "COLS": HESSIAN_CONFIG.cols}
POINTERS = {
    "halves": "*bf16",
    "x": "*bf16",
    "dy": "*bf16",
    "total": "*fp64",
    **dict.fromkeys(("token_weight", "partial", "origin", "hessian", "products"), "*fp32"),
}
KERNELS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "squares": (kernels._square_tokens_kernel, TILE, HESSIAN_CONFIG.warps),
    "weigh": (
        kernels._weigh_inputs_kernel,
        TILE | {"WEIGHTED": True, "MOVED": True, "SUMS": True},
        HESSIAN_CONFIG.warps,
    ),
    "layer": (
        kernels._weigh_inputs_kernel,
        TILE | {"WEIGHTED": False, "MOVED": True, "SUMS": True},
        HESSIAN_CONFIG.warps,
    ),
    "sums": (
        kernels._add_sums_kernel,
        {"BLOCKS": HESSIAN_CONFIG.sum_blocks, "COLS": HESSIAN_CONFIG.sum_cols},
        4,
    ),
    "products": (kernels._add_products_kernel, {"LOW": True, "SIDE": HESSIAN_CONFIG.side}, 4),
    "inputs": (kernels._add_products_kernel, {"LOW": False, "SIDE": HESSIAN_CONFIG.side}, 4),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_without_spills(name: str, target: int, tmp_path: Path) -> None:
    """With 16-byte loads of x, dy and the products, at widths that allow it and any number of tokens."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, constants, warps = KERNELS[name]
    signature = {
        argument: "constexpr"
        if argument in constants
        else POINTERS.get(argument, "fp32" if argument == "scale" else "i32")
        for argument in function.arg_names
    }
    aligned: dict[Any, Any] = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(function.arg_names)
        if argument in POINTERS or argument in ("row_stride", "rows", "cols", "first", "strip")
    }
    source = ASTSource(function, signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    kernel = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    assert name == "sums" or re.search(r"ld\.global\S*\.v[48]", kernel.asm["ptx"]), "no load of 16 bytes"
    assert_no_spills(kernel, tmp_path)


# Dispatch


def test_dispatch_says_why_triton_cannot_run() -> None:
    hessian, x = torch.zeros(4, 4), torch.zeros(3, 4)
    assert dispatch.resolve("accumulate_hessian_", None, x.bfloat16(), hessian) == "reference"
    assert dispatch.unavailable("accumulate_hessian_", "triton", "cpu") == "it needs a CUDA tensor, got cpu"
    assert dispatch.unavailable("accumulate_hessian_", "triton", "cuda", x.bfloat16(), hessian) is None
    assert dispatch.unavailable("accumulate_hessian_", "triton", "cuda", x.bfloat16()) is None
    reason = dispatch.unavailable("accumulate_hessian_", "triton", "cuda", x, hessian)
    assert reason is not None and "bfloat16 inputs and a float32 hessian, got torch.float32" in reason
    reason = dispatch.unavailable("accumulate_hessian_", "triton", "cuda", x.bfloat16(), hessian.double())
    assert reason is not None and "a torch.float64 hessian" in reason
