# SPDX-License-Identifier: Apache-2.0
"""Row curvature on a GPU: what the CPU chooses, also where the process lets its model multiply in TF32."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import obs_kernels as obs
from obs_kernels.ops import accumulate_hessian_, sweep_rows
from obs_kernels.reference.hessian import row_loss

pytestmark = pytest.mark.gpu


def problem(rows: int, cols: int) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(2 * cols, cols, generator=gen, dtype=torch.float64) + 0.5
    return torch.randn(rows, cols, generator=gen, dtype=torch.float64), x.T @ x / (2 * cols)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("pattern", "method"),
    [(p, "combinatorial") for p in ("2:4", "4:8", "16:2:8")]
    + [("2:4", "sparsegpt"), ("unstructured:0.5", "sparsegpt")],
)
def test_the_choice_of_the_cpu(pattern, method, masked):
    weight, hessian = problem(64, 384)
    mask = torch.rand(64, 384, generator=torch.Generator().manual_seed(1)).lt(0.7) if masked else None
    wanted = sweep_rows(weight, hessian, pattern, damp=0.01, method=method, mask=mask)
    found = sweep_rows(
        weight.cuda(), hessian.cuda(), pattern, damp=0.01, method=method, mask=None if mask is None else mask.cuda()
    )
    assert torch.equal(found.mask.cpu(), wanted.mask)
    torch.testing.assert_close(found.weight.cpu(), wanted.weight, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found.saliency.cpu(), wanted.saliency, rtol=1e-7, atol=1e-9)


@pytest.fixture
def tf32() -> Iterator[None]:
    """A process that lets its model multiply in TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("pattern", ["2:4", "16:2:8"])
def test_f32_is_f32(pattern):
    """The saliency adds up to the loss of the weights, to the rounding of f32 and not of TF32."""
    weight, hessian = problem(64, 2304)  # kept width 1152 at 2:4: conjugate gradients
    sel = sweep_rows(weight.float().cuda(), hessian.float().cuda(), pattern, damp=0.01, resolve=False)
    loss = row_loss(sel.weight.double().cpu() - weight.float().double(), hessian.float().double(), damp=0.01)
    torch.testing.assert_close(sel.saliency.double().cpu().sum(), loss.sum(), rtol=2e-5, atol=0.0)
    solved = sweep_rows(weight.float().cuda(), hessian.float().cuda(), pattern, damp=0.01)
    after = row_loss(solved.weight.double().cpu() - weight.float().double(), hessian.float().double(), damp=0.01)
    assert (after <= loss * (1 + 1e-5)).all() and after.sum() < 0.999 * loss.sum()


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("tokens", [500, 40_000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_accumulation_is_f32(dtype, tokens):
    x = torch.randn(3, tokens, 1100, generator=torch.Generator().manual_seed(0)).to(dtype)
    q = torch.rand(3, tokens, generator=torch.Generator().manual_seed(1))
    hessian = accumulate_hessian_(torch.zeros(1100, 1100).cuda(), x.cuda(), token_weight=q.cuda(), scale=0.01)
    assert torch.equal(hessian, hessian.T)
    flat = x.cuda().double().flatten(0, 1)
    wanted = (0.01 * flat.T @ (q.cuda().double().flatten()[:, None] * flat)).cpu()
    error = (hessian.double().cpu() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
    assert error < (2e-5 if dtype == torch.bfloat16 else 2e-6), error  # bf16: 16 bits of the weighted factor


class Residual(nn.Module):
    """Two blocks, each added to what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sequential", [False, True])
def test_a_model_layer_by_layer(dtype, sequential):
    """Masks and weights of the CPU; no random numbers in the loss."""
    torch.manual_seed(0)
    model = Residual().to(dtype)
    batches = [torch.randn(8, 10, 32).to(dtype) for _ in range(4)]
    cfg = obs.OBSConfig(pattern="2:4", curvature="row", sequential=sequential, num_grads=32)
    found = []
    for device in ("cpu", "cuda"):
        copied = copy.deepcopy(model).to(device)
        report = obs.sparsify_(copied, cfg, batches, lambda m, x: m(x).float().square().sum((1, 2)))
        found.append((report.saliency, [p.detach().float().cpu() for p in copied.parameters()]))
    (loss, wanted), (other, given) = found
    assert other == pytest.approx(loss, rel=1e-3 if dtype == torch.float32 else 0.05)
    for a, b in zip(wanted, given, strict=True):
        close = torch.isclose(a, b, rtol=1e-3, atol=1e-4) if dtype == torch.float32 else (a - b).abs() < 0.05
        assert close.float().mean() > 0.95  # a tie that rounding breaks the other way moves a group
