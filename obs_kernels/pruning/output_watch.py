# SPDX-License-Identifier: Apache-2.0
"""What layers were given and gave in a forward pass that ends as soon as that is known.

Of an output that goes straight into an addition, as into a residual stream, the sum is what counts: an error that
arrives on the other way can be made up for by this one. Additions are found by watching torch's functions, so nothing
has to be known of the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    version: int
    """Of the output when it came: another one says that it was changed in place."""
    is_sum: bool = False
    made_of_it: dict[int, weakref.ref[Tensor]] = field(default_factory=dict, repr=False)
    """Tensors that the output went into, by id; an id may come back for another tensor, hence the reference."""


Expected = Mapping[PrunedLayer, tuple[bool, ...]]
"""Of each layer, one entry a call: whether its output goes into an addition."""


class Enough(BaseException):
    """Ends a forward pass; no ``except Exception`` of a model holds it up."""


class _Watch(TorchFunctionMode):
    def __init__(self, expected: Expected | None, *, with_inputs: bool) -> None:
        super().__init__()
        self.expected, self.seen, self.with_inputs = expected, list[Seen](), with_inputs
        self._open: list[Seen] = []
        """Calls whose output may still go into an addition."""
        self._left = 0 if expected is None else sum(len(calls) for calls in expected.values())
        self._copies: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        """Inputs and their copies; query, key and value share one. What comes next may change inputs in place."""

    @property
    def awaits_sums(self) -> bool:
        """Whether functions are to be watched, at some microseconds of the host for each."""
        return self.expected is None or any(any(calls) for calls in self.expected.values())

    def hook_of(self, layer: PrunedLayer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            call = sum(found.layer is layer for found in self.seen)
            found = Seen(layer, self._copy(input_of(args, kwargs)), output.detach(), output._version)
            self.seen.append(found)
            calls = (True,) * (call + 1) if self.expected is None else self.expected[layer]
            if call >= len(calls):  # more than expected: the caller compares the counts
                return
            if calls[call]:
                self._open.append(found)
            else:
                self._settle(found, found.output)

        return hook

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._open:
            return func(*args, **kwargs)
        adds = getattr(func, "__name__", "") in ADDITIONS
        given = list(tensors_in((args, kwargs)))
        taken = [found for found in self._open if adds and any(is_same_memory(part, found.output) for part in given)]
        sums = [found for found in taken if self._is_sum(found, given, kwargs)]
        result = func(*args, **kwargs)
        for found in taken:
            self._open.remove(found)
            if found in sums and isinstance(result, Tensor) and result.numel() == found.output.numel():
                found.is_sum = True
                self._settle(found, result.reshape(found.output.shape))
        if self.expected is None:
            self._follow(given, result)
        return result

    def _copy(self, x: Tensor) -> Tensor:
        if not self.with_inputs:
            return x.detach()
        key = (id(x), x._version)
        if key not in self._copies:
            self._copies[key] = (x, x.detach().clone())
        return self._copies[key][1]

    def _is_sum(self, found: Seen, given: Sequence[Tensor], kwargs: Mapping[str, Any]) -> bool:
        """Whether an addition is the output as it was, once, and what has nothing to do with it.

        A sum with something made of the output itself, as in an activation function, is no residual stream.
        """
        same = [part for part in given if is_same_memory(part, found.output)]
        others = [part for part in given if not is_same_memory(part, found.output)]
        unchanged = len(same) == 1 and same[0]._version == found.version
        return unchanged and kwargs.get("alpha", 1) == 1 and not any(self._follows(part, found) for part in others)

    def _follow(self, given: Sequence[Tensor], result: Any) -> None:
        """Note of which outputs ``result`` is made; in a first pass, which decides what is a sum."""
        for found in self._open:
            if any(is_same_memory(part, found.output) or self._follows(part, found) for part in given):
                for made in tensors_in(result):
                    if not is_same_memory(made, found.output):
                        found.made_of_it[id(made)] = weakref.ref(made)

    def _follows(self, part: Tensor, found: Seen) -> bool:
        known = found.made_of_it.get(id(part))
        return known is not None and known() is part

    def _settle(self, found: Seen, value: Tensor) -> None:
        if self.expected is None:
            return
        found.output = value.detach().clone()  # what comes next may change it in place
        self._left -= 1
        if self._left == 0:
            raise Enough


def is_same_memory(part: Any, output: Tensor) -> bool:
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
def watch(
    layers: Sequence[PrunedLayer],
    run: Callable[[], Any],
    expected: Expected | None = None,
    *,
    with_inputs: bool = True,
) -> list[Seen]:
    """Calls of ``layers`` while ``run()`` runs a model, in their order.

    With ``expected`` the pass ends when all that is expected was seen, and outputs are copies, as are inputs unless
    nobody wants them (``with_inputs=False``); without ``expected`` the pass runs to its end, only ``layer`` and
    ``is_sum`` mean anything, and a first pass finds out so what to expect of others.
    """
    watching = _Watch(expected, with_inputs=with_inputs and expected is not None)
    with ExitStack() as stack:
        for layer in layers:
            handle = layer.module.register_forward_hook(watching.hook_of(layer), with_kwargs=True)
            stack.callback(handle.remove)
        if watching.awaits_sums:
            stack.enter_context(watching)
        until_enough(run)
    return watching.seen


def expected_of(layers: Sequence[PrunedLayer], seen: Sequence[Seen]) -> dict[PrunedLayer, tuple[bool, ...]]:
    """What a later pass can expect, from a whole one."""
    return {layer: tuple(found.is_sum for found in seen if found.layer is layer) for layer in layers}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of a nest of mappings, tuples and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)
