# SPDX-License-Identifier: Apache-2.0
"""The Triton backend of the Hessian on a GPU, against float64: what the interpreter cannot show is bf16 products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import HESSIAN_HALVES, TOKEN_SUMS
from torch import Tensor, nn

from obs_kernels import ops, reference
from obs_kernels.ops import dispatch
from obs_kernels.ops.hessian import accumulate_inputs_, weigh_tokens_

pytestmark = pytest.mark.gpu
F64 = torch.float64


@pytest.fixture
def on_gpu() -> torch.Generator:
    return torch.Generator("cuda").manual_seed(7)


def problem(gen: torch.Generator, tokens: int, cols: int, kind: str) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """A symmetric H, x and the other arguments; with an origin x has a large mean in common."""
    moved, weighted = kind in ("moved", "both"), kind in ("weighted", "both")
    x = (torch.randn(tokens, cols, generator=gen, device="cuda") + (8 if moved else 0)).bfloat16()
    hessian = torch.randn(cols, cols, generator=gen, device="cuda")
    q = 1e-9 * torch.rand(tokens, generator=gen, device="cuda").pow(8) if weighted else None
    c = 8 + 0.1 * torch.randn(cols, generator=gen, device="cuda") if moved else None
    return (hessian + hessian.T) * (1e-9 if weighted else 1.0), x, {"token_weight": q, "origin": c, "scale": 0.01}


def wanted(hessian: Tensor, x: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """H, the sums of q (x - c, 1) and those of their magnitudes; f64."""
    total = hessian.double()
    sums, sizes = (torch.zeros(x.shape[1] + 1, dtype=F64, device="cuda") for _ in range(2))
    for part in torch.arange(x.shape[0], device="cuda").split(1 << 14):
        u = x[part].double() - (0 if options["origin"] is None else options["origin"].double())
        q = torch.ones(len(part), dtype=F64, device="cuda")
        q = q if options["token_weight"] is None else options["token_weight"][part].double()
        total += options["scale"] * (u.T @ (q[:, None] * u))
        sums += torch.cat([q @ u, q.sum()[None]])
        sizes += torch.cat([q @ u.abs(), q.sum()[None]])
    return total, sums, sizes


def within(tokens: int) -> float:
    """Half a unit of each low half, 2^-16, on both factors, and the square of two low halves; many tokens level it."""
    return HESSIAN_HALVES if tokens > 100 else 3 * 2.0**-16


def rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


# a few values; no multiple of a tile; the layers of BERT-base at a batch of 32 x 384; two batched calls; three strips
SHAPES = [(1, 1), (5, 3), (500, 70), (12_288, 768), (4_001, 1100), (40_000, 768), (12_288, 3072), (9_000, 2056)]


@pytest.mark.parametrize("kind", ["plain", "weighted", "moved", "both"])
@pytest.mark.parametrize(("tokens", "cols"), SHAPES)
def test_against_float64(on_gpu, tokens, cols, kind):
    hessian, x, options = problem(on_gpu, tokens, cols, kind)
    assert dispatch.resolve("accumulate_hessian_", None, x, hessian) == "triton"
    expected, _, _ = wanted(hessian, x, options)
    result = ops.accumulate_hessian_(hessian.clone(), x, **options)
    assert torch.equal(result, result.T)
    assert rms(result - expected) <= within(tokens) * rms(expected)
    # added to zeros, where nothing hides what single entries miss
    alone = ops.accumulate_hessian_(torch.zeros_like(hessian), x, **options)
    given, _, _ = wanted(torch.zeros_like(hessian), x, options)
    size = given.diagonal().sqrt()
    assert ((alone - given).abs() <= 20 * HESSIAN_HALVES * torch.outer(size, size)).all()


@pytest.mark.parametrize(("tokens", "cols"), SHAPES)
def test_sums_of_the_same_pass(on_gpu, tokens, cols):
    hessian, x, options = problem(on_gpu, tokens, cols, "both")
    kept = {name: options[name] for name in ("token_weight", "origin")}
    expected, sums, sizes = wanted(hessian, x, options | {"scale": 1.0})
    total = torch.zeros(cols + 4, dtype=F64, device="cuda")
    accumulate_inputs_(hessian, total, x, **kept)
    assert rms(hessian - expected) <= within(tokens) * rms(expected)
    assert (total[cols:-1] == 0).all()
    assert ((torch.cat([total[:cols], total[-1:]]) - sums).abs() <= TOKEN_SUMS * sizes).all()


@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (70, 5), (12_288, 768), (12_288, 3072), (4_001, 1000)])
def test_weights_of_tokens(on_gpu, tokens, rows):
    dy = (1e-4 * torch.randn(tokens, rows, generator=on_gpu, device="cuda")).bfloat16()
    assert dispatch.resolve("accumulate_hessian_", None, dy) == "triton"
    row_sum = torch.zeros(rows, dtype=F64, device="cuda")
    found = weigh_tokens_(row_sum, dy, scale=32.0)
    squares = (32.0 * dy.double()).square()
    torch.testing.assert_close(found.double(), squares.sum(1), rtol=TOKEN_SUMS, atol=0.0)
    torch.testing.assert_close(row_sum, squares.sum(0), rtol=TOKEN_SUMS, atol=0.0)


def test_integers_are_those_of_the_reference(on_gpu):
    """Exact in f32 on both sides: each tile of each strip counts what it should, once."""
    x = torch.randint(-8, 9, (3000, 2100), generator=on_gpu, device="cuda").bfloat16()
    q = torch.tensor([0.0, 1.0, 4.0, 9.0], device="cuda")[torch.randint(0, 4, (3000,), generator=on_gpu, device="cuda")]
    found = ops.accumulate_hessian_(torch.zeros(2100, 2100, device="cuda"), x, token_weight=q, scale=1.0)
    other = torch.zeros(2100, 2100, device="cuda", dtype=F64)
    reference.accumulate_hessian_(other, x, token_weight=q, scale=1.0)
    assert torch.equal(found.double(), other)


def test_the_host_does_not_wait(on_gpu):
    hessian, x, options = problem(on_gpu, 9000, 1100, "both")
    total, row_sum = torch.zeros(1101, dtype=F64, device="cuda"), torch.zeros(1100, dtype=F64, device="cuda")

    def work() -> None:
        q = weigh_tokens_(row_sum, x, scale=1.0)
        accumulate_inputs_(hessian, total, x, token_weight=q, origin=options["origin"])

    work()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_non_finite_values_stay_in_their_columns(on_gpu):
    hessian, x, options = problem(on_gpu, 5000, 300, "both")
    bad = x.clone()
    bad[4999, 7] = float("inf")
    good, found = (ops.accumulate_hessian_(hessian.clone(), each, **options) for each in (x, bad))
    clean = torch.arange(300, device="cuda") != 7
    assert torch.equal(found[clean][:, clean], good[clean][:, clean]) and not torch.isfinite(found[7]).any()


def test_compiles_without_graph_breaks(on_gpu):
    hessian, x, options = problem(on_gpu, 300, 64, "both")
    call = torch.compile(lambda h, x, q: ops.accumulate_hessian_(h, x, token_weight=q, scale=0.5), fullgraph=True)
    eager = ops.accumulate_hessian_(hessian.clone(), x, token_weight=options["token_weight"], scale=0.5)
    assert torch.equal(call(hessian.clone(), x, options["token_weight"]), eager)


class Net(nn.Module):
    """Two layers, the first with columns that a pattern of 8 pads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(100, 96), nn.Linear(96, 40)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.nn.functional.gelu(self.first(x)))
        return y


@pytest.mark.parametrize("more", [{}, {"row_clusters": 2}, {"curvature": "layer"}])
def test_a_pruner_collects_what_the_reference_collects(monkeypatch, more):
    import obs_kernels as obs

    torch.manual_seed(0)
    net = Net().bfloat16().cuda()
    batches = [torch.randn(8, 50, 100).bfloat16() + 3 for _ in range(3)]
    cfg = obs.OBSConfig(**{"pattern": "2:8", "curvature": "row", "num_grads": 24, "on_unsupported": "pad", **more})
    found = []
    for backend in ("triton", "reference"):
        monkeypatch.setenv("OBS_KERNELS_BACKEND", backend)
        pruner = obs.OBSPruner(net, cfg)
        pruner.collect(batches, lambda m, x: m(x).float().square().sum((1, 2)))
        found.append([(x.mean_fisher(), x.row_sum, x.input_sum, x.origin) for x in pruner.layers])
    for mine, others in zip(*found, strict=True):
        for a, b, rtol in zip(mine, others, (HESSIAN_HALVES, TOKEN_SUMS, 1e-5, 1e-5), strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=0.0, atol=rtol * float(b.abs().max()))
