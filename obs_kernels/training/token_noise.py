# SPDX-License-Identifier: Apache-2.0
"""Texts that a teacher has not seen, made of those at hand: some of their tokens are exchanged.

A student that has only its training texts to learn from ends up with the teacher's answers on these, and on these
alone. A teacher answers any text, so the same text with a few other tokens is a new question to both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def exchange_tokens(ids: Tensor, share: float, special_ids: Sequence[int] = ()) -> Tensor:
    """Each token, with probability ``share``, in exchange for one drawn from the whole batch.

    Special tokens and padding keep their places and come to no other one: where one of them is drawn, the token stays.
    Reads nothing on the host, so that a CUDA graph can hold it; random numbers are torch's own of the device.

    Args:
        ids: [B, T] integers.
        share: 0 to 1.
        special_ids: tokens that mark a text (``tokenizer.all_special_ids``), padding among them.

    Returns:
        [B, T] like ``ids``, which is left as it is.
    """
    drawn = ids.flatten()[torch.randint(ids.numel(), ids.shape, device=ids.device)]
    fixed = torch.zeros_like(ids, dtype=torch.bool)
    for special in special_ids:
        fixed |= (ids == special) | (drawn == special)
    chosen = torch.rand(ids.shape, device=ids.device) < share
    return torch.where(chosen & ~fixed, drawn, ids)
