# SPDX-License-Identifier: Apache-2.0
"""Products that were decided and checked once, kept for equal calls: what is left of those is memory and a launch.

A plan belongs to a weight, known as in ``prepacked``, until one of its tensors is written to or dies, and among its
plans to everything that was asked of x, bias and the options.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from obs_kernels.cuda_calls.device import raw_stream
from obs_kernels.cuda_calls.prepacked import Prepacked, versions
from obs_kernels.cuda_calls.weight_tables import forget_with, key_of, sources_of

MAX_PLANS = 512
"""Plans of a weight; beyond them the oldest goes. Numbers of tokens may come without end."""


class ProductPlan:
    """One product for x and bias of one layout, on one weight."""

    __slots__ = ("device", "gathers", "launch", "like", "prepare", "turned_shape", "weight")

    def __init__(
        self,
        weight: Prepacked,
        launch: Callable[..., Any],
        like: Tensor,
        device: int,
        *,
        prepare: Callable[[Tensor], Tensor] | None = None,
        gathers: bool = False,
        turned_shape: tuple[int, int] | None = None,
    ) -> None:
        """Of ``run`` of a product of the compiled module.

        Args:
            weight: what it multiplies by.
            like: a tensor like y; its contents are not read, and may be gone.
            device: index of the GPU.
            prepare: a copy of x as the product takes it; None if x itself is.
            gathers: whether ``launch`` takes an address of turned x after that of x, 0 where x is feature-major.
            turned_shape: memory for x turned to feature-major, where the product gathers of a token-major one.
        """
        self.weight = weight
        self.launch = launch
        self.like = like
        self.device = device
        self.prepare = prepare
        self.gathers = gathers
        self.turned_shape = turned_shape

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """y."""
        return self.run(x if self.prepare is None else self.prepare(x), bias, torch.empty_like(self.like))

    def run(self, x: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
        """``y``, filled from an ``x`` that is prepared."""
        stream = raw_stream(self.device)
        if stream not in self.weight.joined:
            self.weight.join()
        bias = None if bias is None else bias.contiguous()
        bias_address = 0 if bias is None else bias.data_ptr()
        if not self.gathers:
            self.launch(x.data_ptr(), bias_address, y.data_ptr(), stream)
            return y
        turned = None if self.turned_shape is None else x.new_empty(self.turned_shape)
        self.launch(x.data_ptr(), 0 if turned is None else turned.data_ptr(), bias_address, y.data_ptr(), stream)
        return y

    def giving(self, y_shape: tuple[int, ...]) -> ProductPlan:
        """The same with y of another shape and as many elements."""
        return ProductPlan(
            self.weight,
            self.launch,
            self.like.view(y_shape),
            self.device,
            prepare=self.prepare,
            gathers=self.gathers,
            turned_shape=self.turned_shape,
        )


def without_memory(tensor: Tensor) -> Tensor:
    """Shape, dtype and device of ``tensor`` alone, for ``torch.empty_like``: to name them costs the host a microsecond
    more in each call.
    """
    like = torch.empty_like(tensor)
    like.untyped_storage().resize_(0)
    return like


class _Weight:
    """Plans of a weight as it was at ``version``."""

    __slots__ = ("is_counted", "plans", "sources", "version")

    def __init__(self, values: Tensor, codes: Tensor, columns: Tensor | None, version: tuple[int, ...]) -> None:
        self.sources = sources_of(values, codes, columns)
        self.version = version
        self.is_counted = not any(part is not None and part.is_inference() for part in (values, codes, columns))
        self.plans: dict[Hashable, ProductPlan] = {}

    def is_of(self, values: Tensor, codes: Tensor, columns: Tensor | None) -> bool:
        """Whether the weight that has this key was not written to since."""
        if self.is_counted:
            try:
                return self.version == (values._version, codes._version, 0 if columns is None else columns._version)
            except RuntimeError:  # an inference tensor on the same memory
                return False
        return self.version == versions((values, codes, columns))


_WEIGHTS: dict[Hashable, _Weight] = {}
_LOCK = threading.Lock()


def find(
    x: Tensor,
    values: Tensor,
    codes: Tensor,
    columns: Tensor | None,
    bias: Tensor | None,
    pattern: str,
    options: Hashable,
) -> ProductPlan | None:
    """What ``keep`` was given for an equal product of the same weight; None if that was written to since.

    Args:
        columns: None without panels.
        options: whatever else the plan depends on.
    """
    weight = _WEIGHTS.get(key_of(values, codes, columns, pattern))
    if weight is None or not weight.is_of(values, codes, columns):
        return None
    try:
        return weight.plans.get(_question(x, bias, options))
    except TypeError:  # options that cannot be hashed are bad ones, and the caller says so
        return None


def keep(
    x: Tensor,
    values: Tensor,
    codes: Tensor,
    columns: Tensor | None,
    bias: Tensor | None,
    pattern: str,
    options: Hashable,
    plan: ProductPlan,
) -> None:
    """Let ``find`` return ``plan``, until a storage of the weight dies."""
    if plan.weight.done is None:  # memory of a graph
        return
    key, question = key_of(values, codes, columns, pattern), _question(x, bias, options)
    try:
        hash(question)
    except TypeError:  # such as a shape that is a list
        return
    with _LOCK:
        weight = _WEIGHTS.get(key)
        if weight is None:
            forget_with(_WEIGHTS, key, values, codes, columns)
        if weight is None or weight.version != plan.weight.version or not weight.is_of(values, codes, columns):
            weight = _WEIGHTS[key] = _Weight(values, codes, columns, plan.weight.version)
        while len(weight.plans) >= MAX_PLANS:
            del weight.plans[next(iter(weight.plans))]
        weight.plans[question] = plan


def _question(x: Tensor, bias: Tensor | None, options: Hashable) -> Hashable:
    """What decides about a product, but for the weight."""
    own = (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16, options)
    return own if bias is None else (own, bias.shape, bias.dtype, bias.device)
