# SPDX-License-Identifier: Apache-2.0
"""The epilogue's activations against torch in float64: everywhere a 16-bit value can be, infinities among them."""

from __future__ import annotations

import pytest
import torch
from product_checks import DTYPES, hopper
from torch import nn

from obs_kernels import ops
from obs_kernels.reference.matmul import activate
from obs_kernels.sparse.linear import SparseLinear

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]
__all__ = ["hopper"]  # fixture

ROWS, COLS, TOKENS = 1024, 64, 16


def values(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """ROWS values: a fine grid where the activations bend, a coarse one beyond, and the extremes."""
    most = torch.finfo(dtype).max
    extremes = torch.tensor([0.0, -0.0, most, -most, most / 2, 1e-30, -1e-30, torch.inf, -torch.inf, torch.nan])
    fine, coarse = torch.linspace(-7, 7, 768), torch.linspace(-60, 60, ROWS - 768 - len(extremes))
    return torch.cat([fine, coarse, extremes]).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_activations_are_those_of_torch_at_every_size(activation, dtype):
    device = torch.device("cuda")
    linear = nn.Linear(COLS, ROWS, bias=False, device=device, dtype=dtype)
    with torch.no_grad():
        linear.weight.view(ROWS, -1, 4)[..., 2:] = 0
        sparse = SparseLinear.from_linear(linear, "2:4").sparse
        bias, x = values(dtype, device), torch.zeros(TOKENS, COLS, device=device, dtype=dtype)
        y = ops.sparse_linear(x, sparse, bias, activation=activation, backend="cuda")
    assert (y.isnan() == y[0].isnan()).all() and torch.equal(y.nan_to_num(), y[0].nan_to_num().expand_as(y))
    wanted = activate(bias.double(), activation)
    assert torch.equal(y[0].isnan(), wanted.isnan()) and torch.equal(y[0].isinf(), wanted.to(dtype).isinf())
    finite = wanted.to(dtype).isfinite()
    error = (y[0][finite].double() - wanted[finite]).abs()
    assert (error <= torch.finfo(dtype).eps * wanted[finite].abs() + 1e-6).all(), error.max()
