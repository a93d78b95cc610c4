# SPDX-License-Identifier: Apache-2.0
"""What layers were given and gave in a forward pass that ends as soon as that is known.

Of an output that goes straight into an addition, as into a residual stream, the sum is what counts: an error that
arrives on the other way can be made up for by this one. Additions are found by watching torch's functions, so nothing
has to be known of the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from obs_kernels.pruning.capture import input_of
from obs_kernels.pruning.layer import PrunedLayer

ADDITIONS = ("add", "add_", "__add__", "__radd__", "__iadd__")


@dataclass(eq=False)
class Seen:
    """One call of a layer's module."""

    layer: PrunedLayer
    input: Tensor
    output: Tensor
    """What the module gave, or the sum that it went into; a copy once no more of it is awaited."""
    is_sum: bool = False
    made_of_it: dict[int, weakref.ref[Tensor]] = field(default_factory=dict, repr=False)
    """Tensors that the output went into, by id; an id may come back for another tensor, hence the reference."""


Expected = Mapping[PrunedLayer, tuple[bool, ...]]
"""Of each layer, one entry a call: whether its output goes into an addition."""


class Enough(BaseException):
    """Ends a forward pass; no ``except Exception`` of a model holds it up."""


class _Watch(TorchFunctionMode):
    """On only while a sum is awaited: every function that it sees costs some microseconds of the host."""

    def __init__(self, expected: Expected | None, stack: ExitStack) -> None:
        super().__init__()
        self.expected, self.seen = expected, list[Seen]()
        self._stack, self._is_on = stack, False
        self._open: list[Seen] = []
        """Calls whose output may still go into an addition."""
        self._left = 0 if expected is None else sum(len(calls) for calls in expected.values())

    def hook_of(self, layer: PrunedLayer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            call = sum(found.layer is layer for found in self.seen)
            found = Seen(layer, input_of(args, kwargs).detach(), output.detach())
            self.seen.append(found)
            calls = (True,) * (call + 1) if self.expected is None else self.expected[layer]
            if call >= len(calls):  # more than expected: the caller compares the counts
                return
            if calls[call]:
                self._open.append(found)
                self._turn_on()
            else:
                self._settle(found, found.output)

        return hook

    def _turn_on(self) -> None:
        if not self._is_on:
            self._stack.enter_context(self)
            self._is_on = True

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        taken = list[Seen]()
        if self._open and getattr(func, "__name__", "") in ADDITIONS:
            taken = [found for found in self._open if any(_is_same(part, found.output) for part in args[:2])]
        # a sum with something made of the output itself, as in an activation function, is no residual stream
        own = [found for found in taken if any(self._follows(part, found) for part in args[:2])]
        result = func(*args, **(kwargs or {}))
        for found in taken:
            self._open.remove(found)
            if found not in own and isinstance(result, Tensor) and result.numel() == found.output.numel():
                found.is_sum = True
                self._settle(found, result.reshape(found.output.shape))
        if self.expected is None and isinstance(result, Tensor):
            self._follow(args, result)
        return result

    def _follow(self, args: tuple[Any, ...], result: Tensor) -> None:
        """Note of which outputs ``result`` is made; in a first pass, which decides what is a sum."""
        for found in self._open:
            made = any(_is_same(part, found.output) or self._follows(part, found) for part in args)
            if made and not _is_same(result, found.output):
                found.made_of_it[id(result)] = weakref.ref(result)

    def _follows(self, part: Any, found: Seen) -> bool:
        known = found.made_of_it.get(id(part))
        return known is not None and known() is part

    def _settle(self, found: Seen, value: Tensor) -> None:
        if self.expected is None:
            return
        found.output = value.detach().clone()  # what comes next may change it in place
        self._left -= 1
        if self._left == 0:
            raise Enough


def _is_same(part: Any, output: Tensor) -> bool:
    """Whether ``part`` is ``output``, or another shape of the same memory."""
    return (
        isinstance(part, Tensor)
        and part.data_ptr() == output.data_ptr()
        and part.numel() == output.numel()
        and part.dtype == output.dtype
        and part.is_contiguous()
    )


def until_enough(run: Callable[[], Any]) -> None:
    """``run()``, or what of it comes before ``Enough`` is raised."""
    with suppress(Enough):
        run()


@torch.no_grad()
def watch(layers: Sequence[PrunedLayer], run: Callable[[], Any], expected: Expected | None = None) -> list[Seen]:
    """Calls of ``layers`` while ``run()`` runs a model, in their order.

    With ``expected`` the pass ends when all that is expected was seen, and outputs are copies; without it the pass runs
    to its end, only ``layer`` and ``is_sum`` mean anything, and a first pass finds out so what to expect of others.
    """
    with ExitStack() as stack:
        watching = _Watch(expected, stack)
        for layer in layers:
            handle = layer.module.register_forward_hook(watching.hook_of(layer), with_kwargs=True)
            stack.callback(handle.remove)
        until_enough(run)
    return watching.seen


def expected_of(layers: Sequence[PrunedLayer], seen: Sequence[Seen]) -> dict[PrunedLayer, tuple[bool, ...]]:
    """What a later pass can expect, from a whole one."""
    return {layer: tuple(found.is_sum for found in seen if found.layer is layer) for layer in layers}
