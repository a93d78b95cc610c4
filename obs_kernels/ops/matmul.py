# SPDX-License-Identifier: Apache-2.0
"""The sparse product Y = activation(X W^T + bias)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

from obs_kernels import checks
from obs_kernels.errors import ConfigError, DTypeNotSupportedError, ShapeNotSupportedError
from obs_kernels.ops.dispatch import MODULES, asked_of_process, kernel, no_autocast, resolve, run_as_it_is
from obs_kernels.ops.sparse_weight import SparseWeight
from obs_kernels.patterns import NMPattern
from obs_kernels.reference.matmul import activate, activation_gradient


def sparse_linear(
    x: Tensor,
    sparse: SparseWeight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    x_layout: str = "token",
    y_layout: str = "token",
    backend: str | None = None,
) -> Tensor:
    """``activation(x W^T + bias)`` with a packed W.

    Args:
        x: [..., C] of the dtype of ``sparse.values``; with ``x_layout="feature"`` [C, T].
        sparse: the packed weight [R, C].
        bias: [R] of the same dtype, or None.
        activation: None, "relu", "gelu" (exact), "gelu_tanh" or "silu".
        y_layout: "token" gives [..., R], "feature" gives [R, T].
        backend: None, or a name of ``dispatch.BACKENDS``.

    Returns:
        y in the dtype of x; arithmetic in f32 (f64 for f64). Gradients flow to x and bias, tangents of forward mode
        from them, twice and under ``torch.func`` too (but for ``jvp`` of ``vmap``); packed values take none.

    NaN or Inf in a token: the reference gives NaN in all of its outputs (zeros take part in a dense product); ``cuda``
    reaches the rows that keep the column, and those with a free place among the four columns around it.

    ``cuda`` runs on compute capability 9.0, for float16 and bfloat16, and for patterns of at most two nonzeros in each
    aligned four columns. Panels v:2:m, v a multiple of 64, run on the four of m columns that they keep alone where
    measured tiles say that this is faster: best with x feature-major, as a token-major x is transposed first.
    Everything else runs as 2:4 on all columns. The first call that goes one of these ways makes its own copy of the
    weight, 0.56 of the dense bytes for all columns and 4/m of that for the kept ones, which lives as long as all
    tensors of ``sparse``. Equal calls give equal bits; with another number of tokens the last bits of a token may
    differ, as tiles go by it and, for few, sums over columns are made in shares.
    """
    return sparse_linear_by_parts(
        x, sparse.values, sparse.codes, sparse.columns, bias, sparse.pattern, sparse.shape, activation, x_layout,
        y_layout, backend,
    )  # fmt: skip


@run_as_it_is
def sparse_linear_by_parts(
    x: Tensor,
    values: Tensor,
    codes: Tensor,
    columns: Tensor | None,
    bias: Tensor | None,
    pattern: NMPattern,
    shape: tuple[int, int],
    activation: str | None = None,
    x_layout: str = "token",
    y_layout: str = "token",
    backend: str | None = None,
) -> Tensor:
    """``sparse_linear`` of the parts of a weight, which a layer need not put together for each call."""
    heard = is_heard(x, values, codes, columns, bias)
    plans = None if heard or not x.is_cuda else _product_plan()
    if plans is not None:
        asked = (activation, x_layout, y_layout, backend, asked_of_process(), shape)
        plan = plans.find(x, values, codes, columns, bias, pattern.text, asked)
        if plan is not None and not values.requires_grad:
            return plan(x, bias)
    checks.check_choice("x_layout", x_layout, checks.LAYOUTS)
    checks.check_choice("y_layout", y_layout, checks.LAYOUTS)
    if activation is not None:
        checks.check_choice("activation", activation, checks.ACTIVATIONS)
    checks.check_dtype("x", x, checks.FLOAT_DTYPES)
    if x.dtype != values.dtype or (bias is not None and bias.dtype != x.dtype):
        raise DTypeNotSupportedError(
            f"x, weight and bias must share a dtype, got {x.dtype}, {values.dtype}"
            f"{'' if bias is None else f', {bias.dtype}'}; convert with .to()"
        )
    rows, cols = shape
    wanted = "[..., C]" if x_layout == "token" else "[C, T]"
    if x.dim() == 0 or (x_layout == "feature" and x.dim() != 2) or x.shape[-1 if x_layout == "token" else 0] != cols:
        raise ShapeNotSupportedError(
            f"x must be {wanted} with C = {cols} for x_layout={x_layout!r}, got {list(x.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (rows,):
        raise ShapeNotSupportedError(f"bias must be [{rows}], got {list(bias.shape)}")
    checks.check_same_device(x=x, values=values, bias=bias)
    if values.requires_grad:
        raise ConfigError(
            "packed values take no gradient; train the dense weight with its mask (decompress_) and pack again"
        )
    sparse = SparseWeight(values, codes, columns, pattern, shape)
    if forward_ad._current_level >= 0:
        (x, x_change), (bias, bias_change) = forward_ad.unpack_dual(x), _unpacked(bias)
        if x_change is not None or bias_change is not None:
            run = partial(sparse_linear, sparse=sparse, x_layout=x_layout, y_layout=y_layout, backend=backend)
            return _dual(run, x, x_change, bias, bias_change, activation, y_layout)
    flat = x if x_layout == "feature" or x.dim() == 2 else x.reshape(prod(x.shape[:-1]), cols)
    chosen = resolve("sparse_linear", backend, x, pattern)
    operands = flat, values, codes, sparse.columns_or_empty(), bias, str(pattern)
    options = {"activation": activation or "", "x_layout": x_layout, "y_layout": y_layout}
    y: Tensor
    if not heard:
        y = kernel("sparse_linear", chosen)(*operands, **options)
    elif torch.is_grad_enabled() or _transform() is not None:  # a transform looks even where gradients are off
        y = _with_gradient(*operands, options | {"backend": chosen})
    else:
        y = torch.ops.obs_kernels.sparse_linear_inference(*operands, *options.values(), chosen)
    y = y.reshape(*x.shape[:-1], rows) if flat is not x and y_layout == "token" else y
    if plans is not None and chosen == "cuda" and (flat is x or x.is_contiguous()):
        weight = values, codes, columns, bias, pattern.text
        plan = plans.find(flat, *weight, tuple(options.values()))
        if plan is not None and (flat is x or plan.prepare is None):
            plans.keep(x, *weight, asked, plan.giving(tuple(y.shape)))
    return y


@cache
def _product_plan() -> Any:
    """``find`` and ``keep``, what earlier calls of the cuda backend left: such a call is decided by one look."""
    return import_module(f"{MODULES['cuda']}.product_plan")


def _unpacked(bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(value, tangent or None)."""
    if bias is None:
        return None, None
    value, change = forward_ad.unpack_dual(bias)
    return value, change


def _dual(
    run: Callable[..., Tensor],
    x: Tensor,
    x_change: Tensor | None,
    bias: Tensor | None,
    bias_change: Tensor | None,
    activation: str | None,
    y_layout: str,
) -> Tensor:
    """``run(x, bias=, activation=)`` with its tangent: torch.library knows no forward mode, and would lose it."""
    before = run(x, bias=bias)
    change = torch.zeros_like(before) if x_change is None else run(x_change)
    y = forward_ad.make_dual(before, _plus_bias(change, bias_change, y_layout))
    # by torch, which knows second derivatives: the formula below would miss the tangent of what it has kept
    if activation == "silu":  # aten's has no forward mode in its backward
        return y * torch.sigmoid(y)
    return y if activation is None else activate(y, activation)


def _plus_bias(change: Tensor, bias_change: Tensor | None, y_layout: str) -> Tensor:
    """Tangent of ``x W^T + bias`` from that of ``x W^T``."""
    if bias_change is None:
        return change
    return change + (bias_change if y_layout == "token" else bias_change[:, None])


def is_heard(*tensors: Tensor | None) -> bool:
    """Whether anything listens to ops: gradients, a compiler, a mode, a kind of tensor of its own, a profiler. If not,
    the kernel is called without the dispatcher, whose way through Python takes the host 40 us a call.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd._profiler_enabled()
    ):
        return True
    for tensor in tensors:
        if type(tensor) not in _PLAIN:
            return True
    if not torch.is_grad_enabled():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


_PLAIN = (Tensor, torch.nn.Parameter, type(None))


# Not by torch.library.custom_op, whose three layers of Python take twice the time: each layer of a model calls this op.
_LIBRARY = torch.library.Library("obs_kernels", "FRAGMENT")
_LIBRARY.define(
    "sparse_linear(Tensor x, Tensor values, Tensor codes, Tensor columns, Tensor? bias, str pattern, *, "
    "str activation, str x_layout, str y_layout, str backend) -> Tensor"
)


@run_as_it_is
def _sparse_linear(
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
    backend: str,
) -> Tensor:
    return kernel("sparse_linear", backend)(
        x, values, codes, columns, bias, pattern, activation=activation, x_layout=x_layout, y_layout=y_layout
    )


_LIBRARY.impl("sparse_linear", _sparse_linear, "CompositeExplicitAutograd")


@torch.library.register_fake("obs_kernels::sparse_linear", lib=_LIBRARY)
def _fake_sparse_linear(
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
    backend: str,
) -> Tensor:
    tokens = x.shape[0] if x_layout == "token" else x.shape[1]
    return x.new_empty((tokens, values.shape[0]) if y_layout == "token" else (values.shape[0], tokens))


# The same without gradients, for compiled models: the Python of an autograd formula takes the host 15 us a call, even
# where it has nothing to do, and options by keyword and a composite key take 10.
_LIBRARY.define(
    "sparse_linear_inference(Tensor x, Tensor values, Tensor codes, Tensor columns, Tensor? bias, str pattern, "
    "str activation, str x_layout, str y_layout, str backend) -> Tensor"
)


@run_as_it_is
def _inference(*arguments: Any) -> Tensor:
    *operands, activation, x_layout, y_layout, backend = arguments
    return kernel("sparse_linear", backend)(*operands, activation=activation, x_layout=x_layout, y_layout=y_layout)


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("sparse_linear_inference", _inference, _key)


@torch.library.register_fake("obs_kernels::sparse_linear_inference", lib=_LIBRARY)
def _(*arguments: Any) -> Tensor:
    *operands, activation, x_layout, y_layout, backend = arguments
    return _fake_sparse_linear(*operands, activation=activation, x_layout=x_layout, y_layout=y_layout, backend=backend)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> tuple[Tensor | None, ...]:
    """Keeps, and returns, what the formulas need."""
    x, values, codes, columns, bias, pattern = inputs
    ctx.options = (pattern, keyword_only_inputs)
    kept = x if keyword_only_inputs["activation"] else None, values, codes, columns, bias
    ctx.save_for_backward(*kept)
    return kept


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    pattern, options = ctx.options
    x, values, codes, columns, bias = ctx.saved_tensors
    x_layout, y_layout = options["x_layout"], options["y_layout"]
    with no_autocast():
        grad = grad if y_layout == "token" else grad.T  # [T, R]
        if options["activation"]:
            bare = options | {"activation": "", "y_layout": "token"}
            before = _with_gradient(x, values, codes, columns, bias, pattern, bare)
            grad = activation_gradient(before, grad.contiguous(), options["activation"])
        dense = torch.ops.obs_kernels.unpack(values, codes, columns, pattern, backend="reference")
        grad_x = grad @ dense if ctx.needs_input_grad[0] else None
        if grad_x is not None and x_layout == "feature":
            grad_x = grad_x.T
        grad_bias = grad.sum(0) if bias is not None and ctx.needs_input_grad[4] else None
    return grad_x, None, None, None, grad_bias, None


torch.library.register_autograd("obs_kernels::sparse_linear", _backward, setup_context=_setup_context, lib=_LIBRARY)


class _Transformed(torch.autograd.Function):
    """The op under ``torch.func.grad`` and the like, which do not take formulas of torch.library."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        *operands, options = arguments
        y: Tensor = torch.ops.obs_kernels.sparse_linear(*operands, **options)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *operands, options = inputs
        ctx.save_for_forward(*_setup_context(ctx, tuple(operands), options, output))
        ctx.shape = output.shape

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*_backward(ctx, *grads), None)

    @staticmethod
    def jvp(ctx: Any, x_change: Tensor | None, *changes: Any) -> Tensor:
        pattern, options = ctx.options
        x, values, codes, columns, bias = ctx.saved_tensors
        bare = options | {"activation": ""}
        change = values.new_zeros(ctx.shape)
        if x_change is not None:
            change = _with_gradient(x_change, values, codes, columns, None, pattern, bare)
        change = _plus_bias(change, changes[3], options["y_layout"])
        if not options["activation"]:
            return change
        before = _with_gradient(x, values, codes, columns, bias, pattern, bare)
        return activation_gradient(before, change.contiguous(), options["activation"])


def _transform() -> TransformType | None:
    """The innermost transform of ``torch.func`` that is at work; a compiler is not to look into it."""
    if torch.compiler.is_compiling():
        return None
    top = torch._C._functorch.peek_interpreter_stack()
    return None if top is None else top.key()


def _with_gradient(*arguments: Any) -> Tensor:
    """The op on its operands and, last, its options."""
    *operands, options = arguments
    if _transform() not in (None, TransformType.Functionalize):
        whole = MappingProxyType(options)  # to torch.func one argument, and no tree of them
        transformed: Tensor = _Transformed.apply(*operands, whole)
        return transformed
    y: Tensor = torch.ops.obs_kernels.sparse_linear(*operands, **options)
    return y
