# SPDX-License-Identifier: Apache-2.0
"""The sparse product in plain torch: unpack, then a dense product with f32 arithmetic."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from obs_kernels.reference.blocks import compute_dtype
from obs_kernels.reference.packing import unpack


def sparse_linear(
    x: Tensor,
    values: Tensor,
    codes: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    pattern: str,
    *,
    activation: str,
    x_layout: str,
    y_layout: str,
) -> Tensor:
    """``activation(x W^T + bias)`` for ``x`` [T, C] ("token") or [C, T] ("feature"); returns [T, R] or [R, T]."""
    dtype = compute_dtype(x)
    y = F.linear(
        (x if x_layout == "token" else x.T).to(dtype),
        unpack(values, codes, columns, pattern).to(dtype),
        None if bias is None else bias.to(dtype),
    )
    y = activate(y, activation).to(x.dtype)
    return y.contiguous() if y_layout == "token" else y.T.contiguous()


def feature_major(x: Tensor) -> Tensor:
    """``x`` [..., C], lying in memory as [C, ...]; ``x`` itself if it does."""
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def activate(y: Tensor, activation: str) -> Tensor:
    """Apply "relu", "gelu" (exact), "gelu_tanh", "silu", or nothing for ""."""
    match activation:
        case "relu":
            return torch.relu(y)
        case "gelu":
            return F.gelu(y)
        case "gelu_tanh":
            return F.gelu(y, approximate="tanh")
        case "silu":
            return F.silu(y)
    return y


def activation_gradient(y: Tensor, grad: Tensor, activation: str) -> Tensor:
    """Gradient with respect to the value ``y`` before the activation."""
    match activation:
        case "relu":
            return grad * (y > 0)
        case "gelu":
            return torch.ops.aten.gelu_backward(grad, y)
        case "gelu_tanh":
            return torch.ops.aten.gelu_backward(grad, y, approximate="tanh")
        case "silu":
            if torch.is_grad_enabled() and (y.requires_grad or grad.requires_grad):  # aten's has no derivative
                share = torch.sigmoid(y)
                return grad * share * (1 + y * (1 - share))
            return torch.ops.aten.silu_backward(grad, y)
    return grad
