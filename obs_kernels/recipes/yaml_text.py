# SPDX-License-Identifier: Apache-2.0
"""YAML in and out: safe values only, patterns and numbers as people write them, no key twice.

YAML 1.1 takes an unquoted 2:8 for 128 (minutes and seconds) and 1e-7 for a text; here they are a text and a number.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from obs_kernels.errors import ConfigError, MissingDependencyError

FLOAT = re.compile(r"[-+]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
INTEGER = re.compile(r"[-+]?\d[\d_]*")
MAX_CHARACTERS = 1 << 20


def read_yaml(text: str, source: str) -> Any:
    """The plain value that ``text`` holds; ``source`` names it in errors.

    Raises:
        ConfigError: no YAML, more than one document, tags, a key twice, or too long.
        MissingDependencyError: PyYAML is not installed.
    """
    yaml = _library()
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"{source} must be at most {MAX_CHARACTERS} characters, got {len(text)}; is it a recipe?")
    try:
        return yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        place = "" if where is None else f" in line {where.line + 1}"
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{source} is no YAML of one document{place}: {problem}; see `obs-kernels recipes`") from None
    except RecursionError:
        raise ConfigError(f"{source} is nested too deeply; a recipe has two levels") from None


def read_value(text: str) -> Any:
    """One value of a command line: a number, true, null, a list; anything else is the text itself."""
    try:
        return read_yaml(text, "value")
    except ConfigError:
        return text


def dump_yaml(values: dict[str, Any]) -> str:
    """``values`` in their order, lists on one line; ``read_yaml`` and readers of YAML 1.1 read the same back."""
    yaml = _library()

    class Dumper(yaml.SafeDumper):  # type: ignore[name-defined, misc]
        """Texts that are numbers here or in YAML 1.1 are quoted."""

    def write_text(dumper: Any, value: str) -> Any:
        is_number = INTEGER.fullmatch(value) or FLOAT.fullmatch(value)
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style='"' if is_number else None)

    def write_list(dumper: Any, value: list[Any]) -> Any:
        return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)

    Dumper.add_representer(str, write_text)
    Dumper.add_representer(list, write_list)
    text: str = yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110)
    return text


def _library() -> Any:
    try:
        import yaml
    except ImportError:
        raise MissingDependencyError(
            "recipes need PyYAML and pydantic, which are not installed. Fix: pip install 'obs_kernels[recipes]'"
        ) from None
    return yaml


@lru_cache(maxsize=1)
def _loader() -> Any:
    import yaml

    class RecipeLoader(yaml.SafeLoader):
        """Safe, with the numbers of YAML 1.2, without keys that stand twice and without aliases."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):  # a few lines of them make a value of any size
                mark = self.peek_event().start_mark
                raise yaml.composer.ComposerError(None, None, "aliases are not part of a recipe", mark)
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set[Any]()
            for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                name = self.construct_object(key, deep=True)
                if isinstance(name, (dict, list)) or name in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"key {name!r} stands twice", key.start_mark)
                seen.add(name)
            return super().construct_mapping(node, deep)

    def refuse(loader: Any, suffix: str, node: Any) -> Any:
        raise yaml.constructor.ConstructorError(
            None,
            None,
            f"tag !{suffix} is not part of a recipe here; sections pruning, schedule, training and "
            "distillation say what modifiers of other tools do",
            node.start_mark,
        )

    own = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"}
    rules = yaml.SafeLoader.yaml_implicit_resolvers
    RecipeLoader.yaml_implicit_resolvers = {
        first: [(tag, rule) for tag, rule in found if tag not in own] for first, found in rules.items()
    }
    RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(f"(?:{INTEGER.pattern})$"), "-+0123456789")
    RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"(?:{FLOAT.pattern})$"), "-+.0123456789")
    RecipeLoader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value.replace("_", "")))
    RecipeLoader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: _float(node.value))
    RecipeLoader.add_multi_constructor("!", refuse)
    return RecipeLoader


def _float(text: str) -> float:
    lowered = text.lower().replace("_", "")
    return float(lowered.replace(".inf", "inf").replace(".nan", "nan"))
