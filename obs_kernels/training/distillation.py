# SPDX-License-Identifier: Apache-2.0
"""Distillation: a student learns what a teacher answers, softened by a temperature, beside or in place of the labels.

``loss = (1 - hardness) * task + hardness * term`` with ``term = T^2 * KL(teacher || student) / items`` at temperature
T, averaged over the named outputs. An item is what one distribution belongs to: a window for the positions of an
answer, a sample for a class, a token for a vocabulary. ``hidden`` adds the error of what the layers give: a pruned
model has the teacher's width, so that every token of every layer has an aim.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from obs_kernels.errors import ConfigError

SPAN_OUTPUTS = ("start_logits", "end_logits")
"""Distributions over the tokens of a window: padding has no share in them."""
HIDDEN = "hidden_states"
"""Output of transformers' models: [B, T, C] of the embeddings, then of every layer."""
_NOWHERE = -1e9
"""In place of -inf, whose difference to itself is NaN; its exponential is 0."""


class Distiller:
    """A teacher, and the loss of a student that learns from it.

    Args:
        teacher: put into eval mode here, parameters closed to gradients; runs without them.
        hardness: share of the teacher's term, 0 to 1; 1 leaves the labels out.
        temperature: T > 0 by which the logits of both are divided.
        outputs: names of the logits that are compared.
        hidden: factor >= 0 of ``hidden_term``, added to the loss; 0 leaves it out.

    Raises:
        ConfigError: a value out of its range.
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        hardness: float = 1.0,
        temperature: float = 2.0,
        outputs: Sequence[str] = SPAN_OUTPUTS,
        hidden: float = 0.0,
    ) -> None:
        if not 0.0 <= hardness <= 1.0:
            raise ConfigError(f"hardness must be 0 to 1, got {hardness}; 1.0 takes the teacher alone")
        if not (math.isfinite(temperature) and temperature > 0):
            raise ConfigError(f"temperature must be greater than 0, got {temperature}; try 2.0")
        if not (math.isfinite(hidden) and hidden >= 0):
            raise ConfigError(f"hidden must be at least 0, got {hidden}; 0 compares no hidden states")
        if not outputs:
            raise ConfigError(f"outputs must name at least one of the model's outputs, got none; try {SPAN_OUTPUTS}")
        self.teacher = teacher.eval().requires_grad_(False)
        self.hardness, self.temperature, self.outputs = float(hardness), float(temperature), tuple(outputs)
        self.hidden = float(hidden)

    @classmethod
    def of_copy(cls, model: nn.Module, **settings: Any) -> Distiller:
        """The model as it is now teaches itself: a copy that no later change of ``model`` reaches."""
        return cls(copy.deepcopy(model), **settings)

    @property
    def options(self) -> dict[str, bool]:
        """What the student has to be called with beside its inputs: ``model(**inputs, **distiller.options)``."""
        return {f"output_{HIDDEN}": True} if self.hidden else {}

    def check(self, student: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        """Refuse a teacher that does not answer as ``student`` does, by one run of both on ``inputs``.

        Raises:
            ConfigError: an output is missing, or of another size: another head, number of labels or vocabulary, or,
                where hidden states are compared, other layers.
        """
        training = [(module, module.training) for module in student.modules()]
        student.eval()
        try:
            with torch.no_grad():
                given, wanted = student(**inputs, **self.options), self._answers(inputs)
                _pairs(given, wanted, self.outputs)
                if self.hidden:
                    _hidden_pairs(given, wanted)
        finally:
            for module, mode in training:
                module.training = mode

    def loss(
        self,
        task: Tensor | None,
        student: Any,
        inputs: Mapping[str, Tensor],
        *,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """The whole loss, a scalar.

        Args:
            task: mean loss on the labels, a scalar; None only for ``hardness=1``.
            student: the student's outputs on ``inputs`` and ``options``, with gradient.
            inputs: what both models take; ``attention_mask`` says which tokens count.
            attention_mask: [B, T], where that of ``inputs`` has another shape; nonzero (True) at tokens that count.

        Raises:
            ConfigError: outputs do not fit, or ``task`` is None where it counts.
        """
        if task is None and self.hardness < 1:
            raise ConfigError(f"task must be the loss on the labels for hardness={self.hardness}, got None")
        wanted = self._answers(inputs)
        mask = inputs.get("attention_mask") if attention_mask is None else attention_mask
        term = distillation_term(
            student, wanted, outputs=self.outputs, temperature=self.temperature, attention_mask=mask
        )
        loss = term if task is None else (1.0 - self.hardness) * task + self.hardness * term
        return loss + self.hidden * hidden_term(student, wanted, attention_mask=mask) if self.hidden else loss

    def _answers(self, inputs: Mapping[str, Tensor]) -> Any:
        with torch.no_grad():
            return self.teacher(**inputs, **self.options)


def distillation_term(
    student: Any,
    teacher: Any,
    *,
    outputs: Sequence[str] = SPAN_OUTPUTS,
    temperature: float = 2.0,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """``T^2 * KL(teacher || student) / items`` at temperature T, averaged over ``outputs``; a scalar, at least f32.

    Args:
        student, teacher: outputs of the two models: mappings, or tuples in the order of ``outputs``. Logits are [B, T]
            over the tokens of a window, [B, K] over classes or [B, T, V] over a vocabulary at each token.
        attention_mask: [B, T]; where it is 0 a token is no place for an answer and no item.

    Raises:
        ConfigError: an output is missing or of another size.
    """
    total = None
    for name, mine, theirs in _pairs(student, teacher, outputs):
        mask = None if attention_mask is None or mine.shape[:2] != attention_mask.shape else attention_mask == 0
        on_tokens = mask if mine.dim() == 3 else None
        on_places = mask if mine.dim() == 2 and name in SPAN_OUTPUTS else None
        scaled = (_scaled(theirs, temperature, on_places), _scaled(mine, temperature, on_places))
        wanted, given = (F.log_softmax(x, dim=-1) for x in scaled)
        each = F.kl_div(given, wanted, log_target=True, reduction="none").sum(-1)
        if on_tokens is not None:
            value = each.masked_fill(on_tokens, 0.0).sum() / (~on_tokens).sum().clamp_min(1)
        else:
            value = each.mean()
        total = value if total is None else total + value
    assert total is not None
    return total * (temperature**2 / len(outputs))


def hidden_term(student: Any, teacher: Any, *, attention_mask: Tensor | None = None) -> Tensor:
    """Mean over layers of ``sum |h_student - h_teacher|^2 / sum |h_teacher|^2``, a scalar, at least f32: the term of
    TinyBERT (arXiv:1909.10351, eq. 8) relative to the teacher's size, and without a map between widths,
    which are equal here.

    Args:
        student, teacher: outputs with ``hidden_states``: [B, T, C] of the embeddings and then of each layer. Of a
            teacher with k times the layers every k-th is compared.
        attention_mask: [B, T]; tokens where it is 0 do not count.

    Raises:
        ConfigError: no hidden states, or layers of another number or width.
    """
    errors = []
    padding = None if attention_mask is None else (attention_mask == 0)[..., None]
    for mine, theirs in _hidden_pairs(student, teacher):
        wanted = theirs.to(torch.promote_types(theirs.dtype, torch.float32))
        difference = mine - wanted
        if padding is not None:  # filled, as an attention without a key may leave NaN there
            difference, wanted = (x.masked_fill(padding, 0.0) for x in (difference, wanted))
        errors.append(difference.square().sum() / wanted.square().sum().clamp_min(1e-12))
    return torch.stack(errors).mean()


def _hidden_pairs(student: Any, teacher: Any) -> list[tuple[Tensor, Tensor]]:
    """(student's, teacher's) [B, T, C] of each layer of the student."""
    both = []
    for values, who in ((student, "student"), (teacher, "teacher")):
        states = values.get(HIDDEN) if isinstance(values, Mapping) else None
        if not states or len(states) < 2:
            raise ConfigError(f"hidden compares {HIDDEN}, which the {who} does not give; set hidden to 0")
        both.append(states[1:])
    mine, theirs = both
    apart, rest = divmod(len(theirs), len(mine))
    if rest or mine[0].shape != theirs[0].shape:
        raise ConfigError(
            f"hidden wants a teacher with the student's {len(mine)} layers, or a multiple, of {list(mine[0].shape)}, "
            f"got {len(theirs)} of {list(theirs[0].shape)}; set hidden to 0 for such a teacher"
        )
    return list(zip(mine, theirs[apart - 1 :: apart], strict=True))


def _scaled(logits: Tensor, temperature: float, padding: Tensor | None) -> Tensor:
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return scaled if padding is None else scaled.masked_fill(padding, _NOWHERE)


def _pairs(student: Any, teacher: Any, outputs: Sequence[str]) -> list[tuple[str, Tensor, Tensor]]:
    """(name, student's logits, teacher's) of each output, alike in shape."""
    found = []
    for place, name in enumerate(outputs):
        mine, theirs = (
            _named(values, name, place, who) for values, who in ((student, "student"), (teacher, "teacher"))
        )
        if mine.shape != theirs.shape:
            raise ConfigError(
                f"{name} of the teacher must be {list(mine.shape)} as the student's, got {list(theirs.shape)}; the "
                f"teacher has another head, number of labels or vocabulary: give one trained for the same task"
            )
        found.append((name, mine, theirs))
    return found


def _named(values: Any, name: str, place: int, who: str) -> Tensor:
    if isinstance(values, Mapping):
        value = values.get(name)
    else:
        value = values[place] if isinstance(values, (tuple, list)) and place < len(values) else None
    if not isinstance(value, Tensor):
        known = ", ".join(k for k, v in values.items() if isinstance(v, Tensor)) if isinstance(values, Mapping) else ""
        raise ConfigError(
            f"outputs names {name!r}, which the {who} does not give (it gives {known or 'a tuple without names'}); "
            f"give a {who} with the same head, or name other outputs"
        )
    return value
