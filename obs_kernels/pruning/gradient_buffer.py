# SPDX-License-Identifier: Apache-2.0
"""Gradients of S steps, kept until one pass over the Fisher adds them all.

A Fisher of D = 16 has 64 bytes a weight and a bf16 gradient 2. Added one at a time, each gradient costs a read and a
write of the whole Fisher; added S at a time, 1/S of that. So gradients are written into rows [S, B * D] of every layer,
and ``accumulate_fisher_`` runs once when the rows are full, when somebody reads the Fisher, and at the end.

Rows of all layers are filled to the same height and count from the moment that ``filled`` moves over them: a batch is
in the buffer of every layer or of none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from obs_kernels.errors import MemoryBudgetError, ObsKernelsError
from obs_kernels.pruning.layer import PrunedLayer
from obs_kernels.pruning.memory import free_bytes, readable
from obs_kernels.pruning.phase_times import PhaseTimes, phase

if TYPE_CHECKING:
    from obs_kernels.pruning.samples import Samples

MAX_ROWS = 128
"""Beyond it the traffic of the Fisher is small beside that of the gradients themselves (128 * 2 B against 2 * 64 B)."""
CPU_ROWS = 32
"""On a CPU less: there the first write to new memory, a page fault every 4 kB, costs more than it saves. Measured on
one core: 96 gradients of 3 million weights, D = 16, take 4.2 s with 96 rows and 3.1 s with 32."""
BUFFER_SHARE = 1 / 3
"""Share of the memory that the Fisher leaves free; activations and what autograd keeps of a batch need the rest."""
CPU_BYTES = 2 << 30
"""On a CPU the same on every machine, so that sums, and their last bits, do not depend on what else runs there."""

WriteRows = Callable[[PrunedLayer, Tensor, slice], None]
"""``write(layer, out, part)`` fills out [n, R, C] with the gradients ``part`` of a batch."""


def row_dtype(gradient: torch.dtype, device: torch.device) -> torch.dtype:
    """Dtype of a buffered gradient, and of the product that makes it.

    bf16 stays bf16 on a GPU, whose matrix units sum in f32. float16 does not: products of it over- and underflow. On a
    CPU both become f32: its half-precision products are slower there, and some sum in half precision.
    """
    return torch.bfloat16 if gradient == torch.bfloat16 and device.type == "cuda" else torch.float32


def row_bytes(layers: Sequence[PrunedLayer], dtypes: Mapping[PrunedLayer, torch.dtype] | None = None) -> int:
    """Bytes of one gradient of all ``layers``; without ``dtypes`` as for gradients in the dtype of the weight."""
    found = dtypes or {}
    return sum(
        layer.row_size * (found.get(layer) or row_dtype(layer.weight.dtype, layer.weight.device)).itemsize
        for layer in layers
    )


def most_rows(num_grads: int, device: torch.device) -> int:
    """The largest S of use for ``num_grads`` gradients."""
    return max(1, min(num_grads, MAX_ROWS, CPU_ROWS if device.type == "cpu" else MAX_ROWS))


def choose_rows(bytes_a_row: int, room: int, limit: int) -> int:
    """S: all ``limit`` rows if ``room`` bytes hold them, otherwise a power of two, at least 1.

    A power, since S decides in which order gradients are summed: some MB more or less of free memory shall not change
    the last bits of a run that is resumed.
    """
    fitting = room // max(1, bytes_a_row)
    return limit if fitting >= limit else 1 << (max(1, fitting).bit_length() - 1)


def buffer_room(device: torch.device, fisher_bytes: int, free: int | None = None) -> int:
    """Bytes for the rows of a pass whose Fisher still has to take ``fisher_bytes``."""
    if device.type == "cpu":
        return CPU_BYTES
    return max(0, int(((free_bytes(device) if free is None else free) - fisher_bytes) * BUFFER_SHARE))


@dataclass
class _Marks:
    """How far rows are filled, and from where on each layer's are not in its Fisher sum yet."""

    filled: int = 0
    added: dict[PrunedLayer, int] = field(default_factory=dict)


class GradientBuffer:
    """Rows of the layers of one pass. While it is open, ``fisher_sum`` and ``num_grads`` of the layers include them.

    Args:
        layers: what gradients come for; the rows that another buffer holds for them are added first.
        limit: the gradients that will come; S is no more.
        sized_for: on a CPU, the layers that S is chosen for; a pass over a part of a model then sums in the same order
            as a pass over all of it. None takes ``layers``.
        timings: seconds of "product" and "accumulate" are added to it.
    """

    def __init__(
        self,
        layers: Sequence[PrunedLayer],
        *,
        limit: int,
        sized_for: Sequence[PrunedLayer] | None = None,
        timings: PhaseTimes | None = None,
    ) -> None:
        self.layers = tuple(layers)
        device = self.layers[0].weight.device
        self.limit = most_rows(limit, device)
        self.rows_at_most = 0
        """S; 0 until the first gradients tell their dtype."""
        self._sized_for = self.layers if sized_for is None else tuple(sized_for)
        self._timings = timings
        self._rows: dict[PrunedLayer, Tensor] = {}
        self._marks = _Marks()
        for layer in self.layers:
            if layer._buffer is not None:
                layer._buffer.release(layer)
            layer._buffer = self
        self._room = buffer_room(device, sum(layer.fisher_bytes for layer in self.layers if not layer.has_fisher))

    def waiting(self, layer: PrunedLayer) -> int:
        """Gradients of ``layer`` that its Fisher sum does not hold yet."""
        return self._marks.filled - self._marks.added.get(layer, 0)

    def push(self, count: int, dtypes: Mapping[PrunedLayer, torch.dtype], write: WriteRows) -> None:
        """Take ``count`` gradients of every layer.

        All of them count at once where S >= ``count``, otherwise S at a time, each part whole for all layers. If memory
        for a part does not suffice, S is halved and the part is done again: none is lost or counted twice.

        Args:
            dtypes: of the rows, as ``row_dtype`` has them; a layer that is missing gets no gradient from this batch.

        Raises:
            MemoryBudgetError: not even one gradient at a time fits.
        """
        # before the rows take their memory
        advice = (
            " beside a batch; use a smaller batch, lower fisher_block_size, or collect fewer layers at a time (layers=)"
        )
        allocate_sums(self.layers, "Fisher", advice)
        if not self.rows_at_most:
            device = self.layers[0].weight.device
            sized_for = self._sized_for if device.type == "cpu" else self.layers
            self.rows_at_most = choose_rows(row_bytes(sized_for, dtypes), self._room, self.limit)
        done = 0
        while done < count:
            try:
                done += self._push_part(slice(done, min(count, done + self.rows_at_most)), dtypes, write)
                continue
            except torch.OutOfMemoryError as error:
                reason = str(error)
            # here, not in the handler: a caught error keeps the tensors of its frames alive
            if self.rows_at_most == 1:
                raise MemoryBudgetError(
                    f"one gradient of {len(self.layers)} layers needs {readable(row_bytes(self.layers, dtypes))} and "
                    f"did not fit; {count - done} gradients of this batch are not added. Fix: a smaller batch, a lower "
                    f"fisher_block_size, or fewer layers at a time ({reason})"
                )
            self.shrink()

    def push_samples(self, count: int, samples: Samples, batch: int) -> None:
        """Take the first ``count`` samples of batch number ``batch``, a gradient each."""
        self.push(count, samples.dtypes, samples.write)

    def shrink(self) -> bool:
        """Add what waits, give back all rows and halve S; whether there were any rows to give back."""
        had_rows = bool(self._rows)
        self.flush()
        self._rows.clear()
        self.rows_at_most = max(1, self.rows_at_most // 2)
        return had_rows

    def flush(self) -> None:
        """Add what waits to the Fisher sums; the rows stay for the next gradients."""
        with phase(self._timings, "accumulate"):
            for layer in self.layers:
                self._flush(layer)
            self._marks = _Marks()

    def release(self, layer: PrunedLayer) -> None:
        """Add what waits of one layer, and give back its rows."""
        self._flush(layer)
        self._rows.pop(layer, None)

    def discard(self, layer: PrunedLayer) -> None:
        """Forget what waits of one layer, and give back its rows."""
        self._marks.added[layer] = self._marks.filled
        self._rows.pop(layer, None)

    def close(self) -> None:
        """Add what waits, give back all memory and let go of the layers."""
        self.flush()
        self._rows.clear()
        for layer in self.layers:
            if layer._buffer is self:
                layer._buffer = None

    @property
    def is_open(self) -> bool:
        """Whether all layers still write here."""
        return all(layer._buffer is self for layer in self.layers)

    def _push_part(self, part: slice, dtypes: Mapping[PrunedLayer, torch.dtype], write: WriteRows) -> int:
        size = part.stop - part.start
        if self._marks.filled + size > self.rows_at_most:
            self.flush()
        start = self._marks.filled
        with phase(self._timings, "product"):
            for layer in self.layers:
                rows = self._rows_of(layer, dtypes.get(layer))[start : start + size]
                if layer in dtypes:
                    padded = rows[:, : layer.padded[0] * layer.padded[1]].view(size, *layer.padded)
                    write(layer, padded[:, : layer.mask.shape[0], : layer.mask.shape[1]], part)
                else:  # the loss does not reach this layer: a true zero gradient
                    rows.zero_()
        self._marks.filled = start + size  # from here on they count, for all layers at once
        return size

    def _rows_of(self, layer: PrunedLayer, dtype: torch.dtype | None) -> Tensor:
        """[S, B * D] of ``layer``; columns that no weight has are zero and stay so."""
        rows = self._rows.get(layer)
        if rows is not None and dtype in (None, rows.dtype):
            return rows
        self.release(layer)
        del rows
        device = layer.weight.device
        dtype = row_dtype(layer.weight.dtype, device) if dtype is None else dtype
        self._rows[layer] = _new_rows(
            (self.rows_at_most, layer.row_size), dtype, device, zeros=layer.row_size != layer.mask.numel()
        )
        return self._rows[layer]

    def _flush(self, layer: PrunedLayer) -> None:
        start, stop = self._marks.added.get(layer, 0), self._marks.filled
        if start == stop or layer._buffer is not self:
            return
        try:
            layer.add_rows(self._rows[layer][start:stop])
            self._marks.added[layer] = stop
        except ObsKernelsError:
            raise  # refused before anything was written: the rows wait on
        except BaseException as error:
            # the sum may hold a part of the rows, and nobody can tell which: better no Fisher than a wrong one
            layer.clear()
            if not isinstance(error, torch.OutOfMemoryError):
                raise
            raise MemoryBudgetError(
                f"{layer.name}: out of memory while {stop - start} gradients were added to its Fisher, which is lost; "
                f"collect again with a lower fisher_block_size or fewer layers at a time ({error})"
            ) from None


def allocate_sums(layers: Sequence[PrunedLayer], what: str, advice: str) -> None:
    """Memory of the sums of all layers, or of none if not all of it is there: ``MemoryBudgetError`` with ``advice``."""
    try:
        for layer in layers:
            layer.allocate()
        return
    except torch.OutOfMemoryError as error:
        reason = str(error)
    for layer in layers:
        layer.drop_empty()
    size = readable(sum(layer.fisher_bytes for layer in layers))
    raise MemoryBudgetError(f"the {what} of {len(layers)} layers needs {size} and did not fit{advice} ({reason})")


def _new_rows(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, *, zeros: bool) -> Tensor:
    """Memory for rows; in a function of its own so that tests can let it run out."""
    return (torch.zeros if zeros else torch.empty)(shape, dtype=dtype, device=device)
