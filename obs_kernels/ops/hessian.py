# SPDX-License-Identifier: Apache-2.0
"""Accumulation of the Hessian that all rows of a layer share, and of what else its tokens are summed into."""

from __future__ import annotations

import torch
from torch import Tensor

from obs_kernels import checks, row_checks
from obs_kernels.ops.dispatch import kernel, resolve


@torch.no_grad()
def accumulate_hessian_(
    hessian: Tensor,
    x: Tensor,
    *,
    token_weight: Tensor | None = None,
    origin: Tensor | None = None,
    scale: float,
    backend: str | None = None,
) -> Tensor:
    """Add ``scale * sum_t q_t x_t x_t^T`` to the Hessian of a layer's inputs, in place.

    Equivalent to::

        x = x.float().flatten(0, -2) - origin
        hessian += scale * x.T @ (token_weight[:, None] * x)

    With ``token_weight`` the squared norm of each token's output gradient, it is the row curvature of the layer;
    without, the layer Hessian of SparseGPT.

    Args:
        hessian: [C, C] float32 (or float64), symmetric; a backend may read one triangle only and write both.
        x: [..., C] float16, bfloat16, float32 or float64: inputs of the layer, flattened to T tokens.
        token_weight: q, one value a token, [T] or of the leading shape of ``x``, float, not negative; None for ones.
        origin: [C] float, what ``x`` is measured from; None for 0. A large mean in common takes digits of
            what differs unless it is taken out before the product.
        scale: usually 1, or 1 / number of samples; the caller owns the damping.
        backend: None, or a name of ``dispatch.BACKENDS``.

    Returns:
        ``hessian``, exactly symmetric. Sums are f32 (f64 for a float64 hessian), TF32 is not used for float32 inputs.
        bfloat16 inputs of a GPU go through its tensor cores with factors of 16 bits: the error is some 1e-5 of H.

    Raises:
        ShapeNotSupportedError, DTypeNotSupportedError, DeviceMismatchError: arguments that do not fit each other.

    Source: Frantar and Alistarh 2023 (SparseGPT), section 3, with a weight a token.
    """
    row_checks.check_hessian(hessian)
    checks.check_dtype("x", x, checks.FLOAT_DTYPES)
    if token_weight is not None:
        checks.check_dtype("token_weight", token_weight, checks.FLOAT_DTYPES)
        if x.dim() > 1 and token_weight.shape == x.shape[:-1]:
            token_weight = token_weight.reshape(-1)
    if x.dim() != 2 and x.dim() > 0:
        x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if origin is not None:
        checks.check_dtype("origin", origin, checks.FLOAT_DTYPES)
    row_checks.check_accumulate_hessian(hessian, x, token_weight, origin)
    torch.ops.obs_kernels.accumulate_hessian_(
        hessian,
        x,
        token_weight,
        origin,
        scale=float(scale),
        backend=resolve("accumulate_hessian_", backend, x, hessian),
    )
    return hessian


@torch.library.custom_op("obs_kernels::accumulate_hessian_", mutates_args=("hessian",))
def _accumulate_hessian(
    hessian: Tensor, x: Tensor, token_weight: Tensor | None, origin: Tensor | None, *, scale: float, backend: str
) -> None:
    kernel("accumulate_hessian_", backend)(hessian, x, token_weight=token_weight, origin=origin, scale=scale)


@_accumulate_hessian.register_fake
def _(
    hessian: Tensor, x: Tensor, token_weight: Tensor | None, origin: Tensor | None, *, scale: float, backend: str
) -> None:
    row_checks.check_accumulate_hessian(hessian, x, token_weight, origin)


@torch.no_grad()
def accumulate_inputs_(
    hessian: Tensor, input_sum: Tensor, x: Tensor, *, token_weight: Tensor | None, origin: Tensor | None
) -> None:
    """``accumulate_hessian_`` by scale 1 and the sums of the inputs, from one pass over them: for ``RowLayer``.

    Not registered, and arguments are not checked: ``hessian`` [C, C] f32, ``input_sum`` [C + 1] f64 or longer, to which
    ``sum_t q_t (x_t - c)`` and, as the last value, ``sum_t q_t`` are added, ``x`` [T, C], ``token_weight`` [T] f32 or
    None, ``origin`` [C] f32 or None.
    """
    backend = resolve("accumulate_hessian_", None, x, hessian)
    kernel("accumulate_inputs_", backend)(hessian, input_sum, x, token_weight=token_weight, origin=origin)


@torch.no_grad()
def weigh_tokens_(row_sum: Tensor, dy: Tensor, *, scale: float) -> Tensor:
    """What each token weighs, [T] f32: ``sum_r (scale dy_tr)^2`` of ``dy`` [T, R]; for ``RowLayer``.

    Not registered, and arguments are not checked. The same squares, summed over the tokens, are added to ``row_sum``
    [R] f64, from the same pass.
    """
    weights: Tensor = kernel("weigh_tokens_", resolve("accumulate_hessian_", None, dy))(row_sum, dy, scale=scale)
    return weights
