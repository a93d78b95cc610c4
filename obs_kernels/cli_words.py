# SPDX-License-Identifier: Apache-2.0
"""Texts of the package in the words of its commands: ``measure=True`` is ``--measure`` for who typed that."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import cache
from typing import Any, get_args

from typer.models import OptionInfo

_VALUE = r"'[^']*'(?: or '[^']*')*|[\w.:+-]*\w"


def in_option_words(text: str, command: Callable[..., Any]) -> str:
    """``text`` with the arguments that are options of ``command`` named and set as on its command line.

    ``name=value`` becomes ``--name value``, or a flag; ``None`` is no value of an option and stays, as does a name in a
    longer one or without ``_``, which may be a plain word.
    """
    names = "|".join(sorted(map(re.escape, _options(command)), key=len, reverse=True))
    if not names:
        return text
    text = re.sub(
        rf"(?<![\w.\-'/])({names}) ?= ?({_VALUE})", lambda m: _set(_options(command)[m[1]], m[1], m[2], m[0]), text
    )
    return re.sub(
        rf"(?<![\w.\-'\"/])({names})(?![\w'\"\[/]|\.\w| ?=)",
        lambda m: _options(command)[m[1]][0] if "_" in m[1] else m[1],
        text,
    )


def _set(words: tuple[str, str | None, bool], name: str, value: str, before: str) -> str:
    on, off, is_flag = words
    if value == "None":
        return before
    if is_flag:
        return on if value == "True" else off or f"no {on}" if value == "False" else before
    return f"{on} {value.replace(chr(39), '')}"


@cache
def _options(command: Callable[..., Any]) -> dict[str, tuple[str, str | None, bool]]:
    """By the argument: the option, the one that says no, and whether it is a flag."""
    found: dict[str, tuple[str, str | None, bool]] = {}
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        kind, *notes = get_args(parameter.annotation) or (None,)
        for note in notes:
            if isinstance(note, OptionInfo):
                declared = note.default if isinstance(note.default, str) else f"--{name.replace('_', '-')}"
                on, _, off = declared.partition("/")
                found[name] = (on, off or None, kind is bool or bool in get_args(kind))
    return found
