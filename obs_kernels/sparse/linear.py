# SPDX-License-Identifier: Apache-2.0
"""``SparseLinear``: an ``nn.Linear`` whose weight is packed, and which product it runs."""

from __future__ import annotations

import logging
import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from obs_kernels import checks
from obs_kernels.errors import CheckpointFormatError, ConfigError
from obs_kernels.ops import SparseWeight, pack
from obs_kernels.ops.layout import is_feature_major
from obs_kernels.ops.matmul import sparse_linear_by_parts
from obs_kernels.patterns import NMPattern, Pattern

log = logging.getLogger("obs_kernels")

PRUNED_ATTRIBUTE = "obs_kernels_pruned"
"""Set by ``OBSPruner.finalize``, read by ``compress_``: {"pattern": text, "masks": {module name: mask}}."""
DISPATCHES = ("auto", "sparse", "dense")
_AUTOCAST_FROM = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes that autocast casts; it leaves float64 alone."""
DENSE_ACTIVATIONS: dict[str, Any] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}
"""What a product applies, by its name."""


class _Cast(NamedTuple):
    """A copy of the values in the dtype of autocast, and what it was made of."""

    source: Tensor
    version: int
    values: Tensor


class SparseLinear(nn.Module):
    """``nn.Linear`` with a packed weight.

    Buffers ``values``, ``codes``, ``columns`` (panels only) and the bias as before. With a dense copy of the weight
    (``compress_(model, keep_dense=True)``) the buffer ``dense`` stands beside them; it is in no state dict.

    ``dispatch`` says which product runs: "sparse" the packed one, "dense" ``F.linear`` on the copy, "auto" (the
    default) the packed one from ``sparse_from`` tokens on and without a copy always. The choice is logged once.

    ``y_layout="feature"`` lets y lie in memory as [R, tokens] under the same shape [..., R]; an x that lies so is read
    in place.

    Under autocast x, values and bias are cast as ``nn.Linear`` casts its own. The cast copy of the values is kept
    between calls, but not when compiled: ``model.to(dtype)`` saves making and ordering it in each call.
    """

    values: Tensor
    codes: Tensor
    columns: Tensor | None
    dense: Tensor | None

    def __init__(
        self,
        sparse: SparseWeight,
        bias: nn.Parameter | None = None,
        *,
        activation: str | None = None,
        keep_dense: bool = False,
        sparse_from: int | None = 0,
        is_conv1d: bool = False,
    ) -> None:
        """Around a packed weight.

        Args:
            sparse: [R, C]; its tensors become the buffers.
            bias: [R] or None.
            activation: as in ``ops.sparse_linear``, applied to y.
            keep_dense: keep the dense weight too, so that ``dispatch`` can choose.
            sparse_from: tokens from which "auto" takes the packed product; None is never.
            is_conv1d: ``to_linear`` gives transformers' Conv1D back.
        """
        super().__init__()
        if activation is not None:
            checks.check_choice("activation", activation, checks.ACTIVATIONS)
        self.pattern = sparse.pattern
        self.out_features, self.in_features = sparse.shape
        self.activation = activation
        self.y_layout = "token"
        self.sparse_from = sparse_from
        self.is_conv1d = is_conv1d
        self.register_buffer("values", sparse.values)
        self.register_buffer("codes", sparse.codes)
        self.register_buffer("columns", sparse.columns)
        # persistent where it is None, which is in no state dict anyway: others look up what a buffer that is not holds
        self.register_buffer("dense", sparse.to_dense() if keep_dense else None, persistent=not keep_dense)
        self.bias = bias
        self._dispatch = "auto"
        self._cast: _Cast | None = None

    @property
    def dispatch(self) -> str:
        """ "auto", "sparse" or "dense"."""
        return self._dispatch

    @dispatch.setter
    def dispatch(self, value: str) -> None:
        checks.check_choice("dispatch", value, DISPATCHES)
        if value == "dense" and self.dense is None:
            raise ConfigError(
                "dispatch='dense' needs the dense weight, which this layer has not kept; "
                "use compress_(model, keep_dense=True)"
            )
        self._dispatch = value

    @property
    def sparse(self) -> SparseWeight:
        """The packed weight, made of the buffers as they are now."""
        return SparseWeight(self.values, self.codes, self.columns, self.pattern, (self.out_features, self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """``activation(x W^T + bias)``, x [..., C] -> [..., R]."""
        dense = self._buffers["dense"]  # as an attribute it costs ten times as much
        if dense is not None and self.takes_dense(x):
            y = F.linear(x, dense, self.bias)
            return y if self.activation is None else DENSE_ACTIVATIONS[self.activation](y)
        x, values, bias = self._as_autocast(x)
        buffers: Any = self._buffers
        weight = values, buffers["codes"], buffers["columns"], bias, self.pattern, (self.out_features, self.in_features)
        if self.y_layout == "token" and (x.dim() < 2 or x.is_contiguous()):
            return sparse_linear_by_parts(x, *weight, activation=self.activation)
        lead = x.shape[:-1]
        feature = is_feature_major(x)
        # no reshape of what has two dimensions: each op takes the host some microseconds
        flat = x if x.dim() == 2 else x.reshape(math.prod(lead), x.shape[-1])
        y = sparse_linear_by_parts(
            flat.t() if feature else flat,
            *weight,
            activation=self.activation,
            x_layout="feature" if feature else "token",
            y_layout=self.y_layout,
        )
        y = y.t() if self.y_layout == "feature" else y
        return y if x.dim() == 2 else y.reshape(*lead, self.out_features)

    def takes_dense(self, x: Tensor) -> bool:
        """Whether ``x`` will be multiplied by the dense copy."""
        if self.dense is None:
            return False
        if self._dispatch == "auto":
            tokens = math.prod(x.shape[:-1])
            dense = self.sparse_from is None or tokens < self.sparse_from
            if not torch.compiler.is_compiling():
                name = f"[{self.out_features}, {self.in_features}] {self.pattern}"
                _log_choice(name, dense, self.sparse_from, x.device.type)
            return dense
        return self._dispatch == "dense"

    def _as_autocast(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(x, values, bias) in the dtype that autocast asks for here; as they are without it."""
        values: Any = self._buffers["values"]
        bias = self._parameters.get("bias")
        if bias is None:
            bias = self.bias
        if x.is_cuda:
            kind, casts = "cuda", torch.is_autocast_enabled()  # with the name of the device it takes twice the time
        else:
            kind = x.device.type
            casts = kind == "cpu" and torch.is_autocast_enabled(kind)
        if not casts:
            return x, values, bias
        dtype = torch.get_autocast_dtype(kind)
        if x.dtype in _AUTOCAST_FROM:
            x = x.to(dtype)
        if bias is not None and bias.dtype in _AUTOCAST_FROM:
            bias = bias.to(dtype)  # type: ignore[assignment]
        return x, self._values_as(dtype), bias

    def _values_as(self, dtype: torch.dtype) -> Tensor:
        values = self.values
        if values.dtype == dtype or values.dtype not in _AUTOCAST_FROM:
            return values
        if torch.compiler.is_compiling():
            return values.to(dtype)
        version = 0 if values.is_inference() else values._version
        kept = self._cast
        if kept is None or kept.source is not values or kept.version != version or kept.values.dtype != dtype:
            with torch.inference_mode(False), torch.no_grad():  # autograd takes no tensor of inference mode
                kept = self._cast = _Cast(values, version, values.to(dtype))
        return kept.values

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        text = f"{self.in_features}, {self.out_features}, pattern={self.pattern}, bias={self.bias is not None}"
        text += f", activation={self.activation}" if self.activation is not None else ""
        return text + (f", dispatch={self._dispatch}" if self.dense is not None else "")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """As any module, but no codes or columns come in that a kernel must not see."""
        own = {part: getattr(self, part) for part in ("values", "codes", "columns")}
        parts: Any = [None if tensor is None else state_dict.get(prefix + part, tensor) for part, tensor in own.items()]
        errors: list[str] = args[-1]
        if all(part is None or not part.is_meta for part in parts):
            values, codes, columns = parts
            try:
                sparse = SparseWeight(values, codes, columns, self.pattern, (self.out_features, self.in_features))
                sparse.validate(prefix.removesuffix(".") or "weight")
            except CheckpointFormatError as error:
                errors.append(str(error))
                return
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.dense is not None:
            self.dense = self.sparse.to_dense()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """As any module; what was made of the tensors before does not keep their memory."""
        self._cast = None
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        """Without what the next call makes anew."""
        return {**self.__dict__, "_cast": None}

    @classmethod
    def from_linear(
        cls, linear: nn.Module, pattern: str | Pattern, mask: Tensor | None = None, *, keep_dense: bool = False
    ) -> SparseLinear:
        """Pack a pruned ``nn.Linear`` or transformers' Conv1D.

        Args:
            linear: the module; its bias is shared.
            pattern: that the mask satisfies.
            mask: [R, C] bool, True = kept; None takes ``weight != 0``.
            keep_dense: as in ``__init__``.

        Raises:
            SparsityPatternError: the mask breaks the pattern. As ``ops.pack``.
        """
        weight = weight_of(linear)
        sparse = pack(weight, weight != 0 if mask is None else mask, pattern)
        return cls(sparse, bias_of(linear), keep_dense=keep_dense, is_conv1d=is_conv1d(linear))

    def to_linear(self) -> nn.Module:
        """The dense module with zeros: ``nn.Linear``, or Conv1D where it was one."""
        weight = self.sparse.to_dense()
        if self.is_conv1d:
            from transformers.pytorch_utils import Conv1D

            with torch.device("meta"):
                conv: nn.Module = Conv1D(self.out_features, self.in_features)
            conv.weight = nn.Parameter(weight.T.contiguous(), requires_grad=False)
            conv.bias = self.bias  # type: ignore[assignment]
            return conv
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta", dtype=self.values.dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = self.bias  # type: ignore[assignment]
        return linear


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a linear layer that stores its weight as [inputs, outputs]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_packable(module: nn.Module) -> bool:
    """Whether a ``SparseLinear`` can take the module's place; subclasses of ``nn.Linear`` may do something else."""
    return type(module) is nn.Linear or is_conv1d(module)


def weight_of(linear: nn.Module) -> Tensor:
    """The weight [R, C] of a module of ``is_packable``, detached."""
    weight: Any = linear.weight
    return weight.detach().T if is_conv1d(linear) else weight.detach()


def bias_of(linear: nn.Module) -> nn.Parameter | None:
    """Its bias."""
    bias: Any = linear.bias
    return bias


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` stands; a shared module stays shared."""
    new.train(old.training)
    for parent in model.modules():
        # named_children leaves out a module that came before under another name
        for child, module in list(parent._modules.items()):
            if module is old:
                setattr(parent, child, new)


def empty_sparse_linear(linear: nn.Module, pattern: NMPattern, tensors: dict[str, Tensor]) -> SparseLinear:
    """A ``SparseLinear`` in place of ``linear`` around loaded tensors ``values``, ``codes`` and ``columns``."""
    rows, cols = weight_of(linear).shape
    sparse = SparseWeight(tensors["values"], tensors["codes"], tensors.get("columns"), pattern, (rows, cols))
    sparse.validate()
    return SparseLinear(sparse, bias_of(linear), is_conv1d=is_conv1d(linear))


@lru_cache(maxsize=1024)
def _log_choice(name: str, dense: bool, sparse_from: int | None, device_type: str) -> None:
    below = "at any number of tokens" if sparse_from is None else f"below {sparse_from:,} tokens"
    above = f"from {sparse_from:,} tokens on" if sparse_from else "at any number of tokens"
    log.info("SparseLinear %s on %s: %s", name, device_type, f"dense {below}" if dense else f"sparse {above}")


__all__ = [
    "DISPATCHES",
    "PRUNED_ATTRIBUTE",
    "SparseLinear",
    "bias_of",
    "empty_sparse_linear",
    "is_conv1d",
    "is_packable",
    "replace_module",
    "weight_of",
]
