# SPDX-License-Identifier: Apache-2.0
"""A model's blocks one by one, on activations that are kept: what saves running all of a model for each layer.

Transformers keep their blocks in a ``nn.ModuleList`` and give each what the one before gave. Where a first pass shows
that, the inputs of the block in hand are kept for every batch, in the dense and in the pruned model, and only that
block runs. Where it does not, or where they do not fit the memory, the whole model runs, with the same result.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from obs_kernels.pruning.layer import PrunedLayer
from obs_kernels.pruning.memory import free_bytes, readable
from obs_kernels.pruning.output_watch import Enough, is_same_memory, tensors_in, until_enough

log = logging.getLogger("obs_kernels")
FREE_SHARE = 0.5
"""Share of the free memory that kept activations may take."""
TOLERANCE = 1e-3
"""Relative difference by which what is kept may miss what the whole model gives a block, on the first batch."""


@dataclass(eq=False)
class Chain:
    """Blocks that run one after the other, each on the hidden state that the one before gave."""

    blocks: list[nn.Module]
    bytes_per_batch: int
    """Of all that the blocks are called with, in the first batch."""

    def place_of(self, layers: Sequence[PrunedLayer]) -> int | None:
        """The block that holds all of ``layers``, if one does."""
        modules = {layer.module for layer in layers}
        holders = [i for i, block in enumerate(self.blocks) if not modules.isdisjoint(block.modules())]
        # one that is also another's, as shared feed-forward parts are, runs more often than this block
        return holders[0] if len(holders) == 1 and modules <= set(self.blocks[holders[0]].modules()) else None


class Run(Protocol):
    """Runs the model, or the part of it that matters, with the weights that are in place."""

    @property
    def part(self) -> nn.Module:
        """What runs."""

    def __call__(self, *, dense: bool) -> Any:
        """``dense``: on inputs of the dense model, else on those of the model pruned so far."""


Batches = Iterator[tuple[int, Tensor | None, Run]]
"""Number of each batch, its padding [N, T] bool or None, and how to run it."""


@dataclass(eq=False)
class _Call:
    """What a block was called with beside the hidden state, and under which autocast."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: tuple[str, bool, torch.dtype]

    @property
    def tensors(self) -> list[Tensor]:
        return list(tensors_in((self.args, self.kwargs)))

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        device, enabled, dtype = self.autocast
        hidden = hidden.clone()  # a block may work in place
        given: Mapping[str, Any] = {k: hidden if v is _HIDDEN else v for k, v in self.kwargs.items()}
        with torch.autocast(device, dtype, enabled=enabled, cache_enabled=False), torch.no_grad():
            return _hidden_of_output(block(*(hidden if a is _HIDDEN else a for a in self.args), **given))


class _Hidden:
    pass


_HIDDEN = _Hidden()
"""Stands for the hidden state in a ``_Call``."""


@dataclass(eq=False)
class _Kept:
    """One batch at the block in hand; both models, the dense one under True."""

    index: int
    padding: Tensor | None
    hidden: dict[bool, Tensor] = field(default_factory=dict)
    calls: dict[bool, dict[int, _Call]] = field(default_factory=dict)

    def run(self, block: nn.Module, place: int, *, dense: bool) -> Tensor:
        return self.calls[dense][place].run(block, self.hidden[dense])


class KeptActivations:
    """Batches for layers: of the block that holds them where activations can be kept, else of the whole model.

    Args:
        chains: see ``find_chains``.
        whole: all batches that count, each with a ``Run`` of the whole model.
        num_batches: how many there are.
        dense: puts the dense weights of a part of the model in place for a while.
    """

    def __init__(
        self,
        chains: Sequence[Chain],
        whole: Callable[[], Batches],
        num_batches: int,
        dense: Callable[[nn.Module], AbstractContextManager[None]],
        device: torch.device,
    ) -> None:
        self._chains, self._whole, self._num_batches = list(chains), whole, num_batches
        self._dense, self._device = dense, device
        self._chain: Chain | None = None
        self._place = 0
        self._kept: list[_Kept] = []

    def batches(self, layers: Sequence[PrunedLayer]) -> Batches:
        """Every batch, for a run that reaches ``layers``; layers are asked for in the order they run."""
        found = next(((c, p) for c in self._chains if (p := c.place_of(layers)) is not None), None)
        if found is None or not self._go_to(*found):
            yield from self._whole()
            return
        chain, place = found
        for kept in self._kept:
            yield kept.index, kept.padding, _BlockRun(kept, chain.blocks[place], place)

    def _go_to(self, chain: Chain, place: int) -> bool:
        """Have the inputs of a block; False if they cannot be kept."""
        if self._chain is not chain or place < self._place:
            self.drop()
            needed = 2 * chain.bytes_per_batch * self._num_batches
            free = free_bytes(self._device)
            if needed > FREE_SHARE * free:
                log.info("activations take %s of %s free; computed anew each time", readable(needed), readable(free))
                self._chains.remove(chain)
                return False
            self._fill(chain, place)
            return True
        if place == self._place:
            return True
        while self._place < place:
            self._advance(chain)
        if self._is_true(chain):
            return True
        log.warning(
            "%s %d is given more than follows from the one before; the whole model runs for each layer",
            type(chain.blocks[0]).__name__,
            place,
        )
        self.drop()
        self._chains.remove(chain)
        return False

    def drop(self) -> None:
        """Forget what is kept: the model has changed elsewhere than from block to block."""
        self._chain, self._kept = None, []

    def refuse(self, layers: Sequence[PrunedLayer]) -> None:
        """Run the whole model for the chain that holds ``layers`` from now on."""
        self.drop()
        self._chains = [chain for chain in self._chains if chain.place_of(layers) is None]

    def _fill(self, chain: Chain, place: int) -> None:
        for index, padding, run in self._whole():
            kept = _Kept(index, padding)
            for dense in (True, False):
                with self._dense(run.part) if dense else nullcontext():
                    kept.hidden[dense], kept.calls[dense] = _calls_of(chain, place, run)
            self._kept.append(kept)
        self._chain, self._place = chain, place

    def _advance(self, chain: Chain) -> None:
        block = chain.blocks[self._place]
        for dense in (True, False):
            with self._dense(block) if dense else nullcontext():
                for kept in self._kept:
                    kept.hidden[dense] = kept.run(block, self._place, dense=dense)
                    del kept.calls[dense][self._place]
        self._place += 1

    def _is_true(self, chain: Chain) -> bool:
        """Whether the block in hand is given what the whole model gives it, on the first batch."""
        _, _, run = next(iter(self._whole()))
        hidden, calls = _calls_of(chain, self._place, run, last=self._place)
        kept = self._kept[0]
        fresh = [hidden, *calls[self._place].tensors]
        held = [kept.hidden[False], *kept.calls[False][self._place].tensors]
        return len(fresh) == len(held) and all(map(_is_near, fresh, held))


@dataclass(frozen=True, eq=False)
class _BlockRun:
    kept: _Kept
    block: nn.Module
    place: int

    @property
    def part(self) -> nn.Module:
        return self.block

    def __call__(self, *, dense: bool) -> Tensor:
        return self.kept.run(self.block, self.place, dense=dense)


@torch.no_grad()
def find_chains(model: nn.Module, layers: Sequence[PrunedLayer], run: Callable[[], Any]) -> list[Chain]:
    """Chains of blocks with any of ``layers`` inside, as one whole ``run()`` shows them."""
    targets = {layer.module for layer in layers}
    lists: list[nn.ModuleList] = []
    for module in model.modules():
        inside = any(module in set(outer.modules()) for outer in lists)
        if isinstance(module, nn.ModuleList) and not inside and not targets.isdisjoint(module.modules()):
            lists.append(module)
    seen: dict[nn.Module, list[tuple[Tensor | None, Tensor | None, list[Tensor]]]] = {}
    handles = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        tensors = list(tensors_in((args, kwargs)))
        seen.setdefault(module, []).append((_hidden_of(args, kwargs), _hidden_of_output(output), tensors))

    for block in (block for blocks in lists for block in blocks):
        handles.append(block.register_forward_hook(hook, with_kwargs=True))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    chains = []
    for blocks in lists:
        calls = [seen.get(block, []) for block in blocks]
        if any(len(call) != 1 for call in calls):
            continue
        given, gave = [call[0][0] for call in calls], [call[0][1] for call in calls]
        follows = [_follows(a, b) for a, b in zip(gave[:-1], given[1:], strict=True)]
        if follows and all(follows) and given[0] is not None:
            held = {id(t): t.nbytes for t in calls[0][0][2]}
            chains.append(Chain(list(blocks), sum(held.values())))
    return chains


def _calls_of(chain: Chain, place: int, run: Run, last: int | None = None) -> tuple[Tensor, dict[int, _Call]]:
    """Hidden state at block ``place``, and the calls of it and of those after it (to ``last``), of a run."""
    last = len(chain.blocks) - 1 if last is None else last
    calls: dict[int, _Call] = {}
    hidden: list[Tensor] = []
    copies: dict[int, tuple[Tensor, Tensor]] = {}

    def hook_of(i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            state = _hidden_of(args, kwargs)
            assert state is not None
            if i == place:
                hidden.append(state.detach().clone())
            calls[i] = _Call(
                tuple(_kept_argument(a, state, copies) for a in args),
                {k: _kept_argument(v, state, copies) for k, v in kwargs.items()},
                (state.device.type, *_autocast_of(state.device.type)),
            )
            if i == last:
                raise Enough

        return hook

    with _hooks(chain.blocks[place : last + 1], place, hook_of), torch.no_grad():
        until_enough(lambda: run(dense=False))
    return hidden[0], calls


@contextmanager
def _hooks(blocks: Sequence[nn.Module], first: int, hook_of: Callable[[int], Callable[..., None]]) -> Iterator[None]:
    handles = [b.register_forward_pre_hook(hook_of(i), with_kwargs=True) for i, b in enumerate(blocks, first)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _autocast_of(device: str) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _kept_argument(value: Any, hidden: Tensor, copies: dict[int, tuple[Tensor, Tensor]]) -> Any:
    """The hidden state by its stand-in; other tensors as copies that all blocks share, as a loader may reuse memory.

    None for a cache of keys and values, which each run would add to.
    """
    if value is hidden:
        return _HIDDEN
    if isinstance(value, Tensor):
        return copies.setdefault(id(value), (value, value.detach().clone()))[1]
    if type(value) in (tuple, list):
        return type(value)(_kept_argument(part, hidden, copies) for part in value)
    if type(value) is dict:
        return {name: _kept_argument(part, hidden, copies) for name, part in value.items()}
    return None if hasattr(value, "get_seq_length") else value


def _follows(gave: Tensor | None, given: Tensor | None) -> bool:
    return gave is not None and given is not None and is_same_memory(given, gave) and given.shape == gave.shape


def _hidden_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    first = args[0] if args else kwargs.get("hidden_states")
    return first if isinstance(first, Tensor) else None


def _hidden_of_output(output: Any) -> Any:
    """A block gives its hidden state alone or first; None for anything else."""
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    return first if isinstance(first, Tensor) else None


def _is_near(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    if not torch.equal(a.isinf(), b.isinf()):
        return False
    a, b = (t.double().nan_to_num(0.0, 0.0, 0.0) for t in (a, b))  # masks hold -inf
    return float((a - b).norm()) <= TOLERANCE * float(a.norm())
