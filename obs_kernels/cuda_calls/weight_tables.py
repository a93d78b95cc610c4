# SPDX-License-Identifier: Apache-2.0
"""Which weight an entry of a table is about, and how it goes when that weight does."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


def key_of(values: Tensor, codes: Tensor, columns: Tensor | None, pattern: str) -> Hashable:
    """A packed weight as it lies in memory; ``columns`` None without panels.

    By storages and not by addresses alone: a storage that was emptied (``resize_(0)``) lives on, while its address may
    be that of another weight.
    """
    return (
        pattern,
        values.dtype,
        values.shape,
        values.stride(),
        values.data_ptr(),
        values.untyped_storage()._cdata,
        codes.data_ptr(),
        codes.untyped_storage()._cdata,
        None if columns is None else (columns.data_ptr(), columns.untyped_storage()._cdata),
    )


def sources_of(values: Tensor, codes: Tensor, columns: Tensor | None) -> tuple[StorageWeakRef, ...]:
    """What an entry holds, never to look at: while a weak reference to a storage that died is there, no new one gets
    its ``_cdata``, so that the key of an entry cannot come to mean another weight.
    """
    return tuple(StorageWeakRef(part.untyped_storage()) for part in (values, codes, columns) if part is not None)


def forget_with(
    table: dict[Hashable, Any], key: Hashable, values: Tensor, codes: Tensor, columns: Tensor | None
) -> None:
    """Take ``key``, which is new in ``table``, out of it when the first of the storages dies. Without a lock: that may
    happen anywhere.
    """
    watchers: list[weakref.finalize[..., Any]] = []

    def forget() -> None:
        table.pop(key, None)
        for watcher in watchers:  # those of storages that live on, and may see many others come and go
            watcher.detach()

    for part in (values, codes, columns):
        if part is not None:
            watcher = weakref.finalize(part.untyped_storage(), forget)
            watcher.atexit = False
            watchers.append(watcher)
