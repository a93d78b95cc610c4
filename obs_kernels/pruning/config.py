# SPDX-License-Identifier: Apache-2.0
"""What to prune and how: one frozen record, the same fields as a recipe."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from obs_kernels import checks
from obs_kernels.errors import ConfigError
from obs_kernels.patterns import BlockPattern, NMPattern, Pattern, UnstructuredPattern, VNMPattern, parse_pattern

GRADIENTS = ("sample", "batch")
CURVATURES = ("auto", "block", "row", "layer")
SWEEP_ORDERS = ("given", "diagonal")
ROW_SETTINGS: dict[str, Any] = {
    "gradients": "sample",
    "method": "combinatorial",
    "update": "joint",
    "fisher_block_size": None,
    "passes": 0,
    "global_sparsity": False,
}
"""What row and layer curvature take of settings that have other values for the block Fisher; the defaults."""
ON_SINGULAR = ("raise", "increase_damp", "skip")
ON_UNSUPPORTED = ("raise", "skip", "pad")
ON_NONFINITE = ("raise", "skip_batch")

# names of other tools and of older versions, explained instead of accepted in silence
FOREIGN_KEYS = {
    "mask_structure": "pattern (note: mask_structure 'n:m' prunes n of m, pattern keeps n of m)",
    "mask_type": "pattern",
    "sparsity": "pattern, for example 'unstructured:0.9' or 'block4:0.8'",
    "final_sparsity": "pattern, for example 'unstructured:0.9' or 'block4:0.8'; of single layers layer_sparsity",
    "num_recomputations": "recomputations",
    "block_size": "fisher_block_size",
    "params": "targets",
    "refit_norms": "nothing any more: norms fitted to the dense model's outputs lowered the accuracy",
}
REMOVED: dict[str, Any] = {"refit_norms": False}
"""Settings of older versions, each with the value that changed nothing: so it still stands in their files."""


@dataclass(frozen=True)
class OBSConfig:
    """Settings of a pruning run; frozen, hashable, and a JSON round trip by ``to_dict`` and ``from_dict``.

    Attributes:
        pattern: "2:4", "64:2:8", "unstructured:0.9", "block4:0.8"; n:m keeps n of m.
        num_grads: gradients for the Fisher, S. F is divided by the number really received.
        gradients: "sample" (gradient of each sample's own loss) or "batch" (gradient of the batch mean, as in
            sparseml).
        curvature: "block", the block Fisher; "row", one loss-weighted Hessian for all rows of a weight and a scale a
            row, exact choice in a sweep over the columns and a joint solve of each row; "layer", SparseGPT: the Hessian
            with unit weights and the published choice. "auto" becomes "row" for n:m and v:n:m unless a setting asks for
            what only the block Fisher has, else "block": in one shot row curvature keeps more at each of them
            (``bench/results/oneshot_squad.md``).
        fisher_block_size: D; None takes m for n:m and v:n:m, 32 for blocks, 50 for unstructured.
        damp: absolute value added to the diagonal of F; None uses ``dampening_frac``.
        dampening_frac: damping as a share of the mean diagonal of F over a tensor's live weights.
        method: "combinatorial" (exact), "pairwise", "greedy", "diagonal" or "magnitude".
        update: "joint", "single" or "none".
        recomputations: parts of the step, with new gradients for each (row curvature, sequential: new inputs and
            errors, weights of tokens from the dense model); for n:m at most m - n.
        passes: at most so many passes over the groups of a Fisher block after the first choice, each group choosing
            anew with the others fixed; for ``method="combinatorial"``, and an effect only where D > m.
        global_sparsity: one threshold over all layers; for unstructured and blocks only.
        layer_sparsity: {class name, module name or "re:...": sparsity} of layers that get another one than the pattern
            says, with a threshold of their own; for unstructured and blocks, not together with ``global_sparsity``. On
            the way there it is the same share of theirs as of the pattern's. Kept as pairs.
        targets: class names, module names or "re:..." patterns of what is pruned.
        ignore: the same, for what is left out.
        seed: seed of everything random in a run.
        on_singular: "raise", "increase_damp" (ten times for the block, repeated) or "skip" the layer.
        on_unsupported: "raise", "skip" or "pad" layers whose shape does not fit the pattern.
        on_nonfinite: "raise" or "skip_batch" for NaN or Inf in gradients.
        sequential: prune layers in the order they run, each with the inputs of the model pruned so far (more passes
            over the data); False takes all from the model as it was. For "row" and "layer". Under "row" tokens weigh as
            in the dense model, and weights and bias also make up for the error that the layers before left, in the
            residual stream too where an output goes into one.
        refit_bias: move the biases of pruned layers to make up for the mean of what is lost. For "row"; the others
            leave them alone.
        row_clusters: Hessians a layer, each for a cluster of rows (whole panels for v:n:m) whose weights of tokens are
            alike, found by one more pass with gradients; a layer with fewer rows or panels has one for each. For "row".
        sweep_order: "given", the groups of columns from left to right; "diagonal", those with the largest curvature
            first. For "row" and "layer".
    """

    pattern: str
    num_grads: int = 1024
    gradients: str = "sample"
    curvature: str = "auto"
    fisher_block_size: int | None = None
    damp: float | None = None
    dampening_frac: float = 0.01
    method: str = "combinatorial"
    update: str = "joint"
    recomputations: int = 1
    passes: int = 0
    global_sparsity: bool = False
    layer_sparsity: Mapping[str, float] | tuple[tuple[str, float], ...] = ()
    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ("re:.*qa_outputs",)
    seed: int = 0
    on_singular: str = "raise"
    on_unsupported: str = "raise"
    on_nonfinite: str = "raise"
    sequential: bool = False
    refit_bias: bool = True
    row_clusters: int = 1
    sweep_order: str = "given"

    def __post_init__(self) -> None:
        """Validate and normalise; strings such as "1e-7" are read as numbers."""
        parsed = parse_pattern(self.pattern)
        self._set("pattern", str(parsed))
        self._set("targets", _names("targets", self.targets))
        self._set("ignore", _names("ignore", self.ignore))
        self._set("layer_sparsity", _shares(self.layer_sparsity))
        for name in ("num_grads", "recomputations", "passes", "row_clusters", "seed"):
            self._set(name, _integer(name, getattr(self, name), least=0 if name in ("passes", "seed") else 1))
        if self.fisher_block_size is not None:
            self._set("fisher_block_size", _integer("fisher_block_size", self.fisher_block_size, least=1))
        if self.damp is not None:
            self._set("damp", checks.check_number("damp", self.damp))
        self._set("dampening_frac", checks.check_number("dampening_frac", self.dampening_frac))
        if self.damp == 0 or (self.damp is None and self.dampening_frac == 0):
            raise ConfigError(
                "damp must be greater than 0, got 0; an empirical Fisher of few samples is singular without it"
            )
        for name in ("global_sparsity", "sequential", "refit_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")
        for name, choices in (
            ("curvature", CURVATURES),
            ("gradients", GRADIENTS),
            ("sweep_order", SWEEP_ORDERS),
            ("method", checks.METHODS),
            ("update", checks.UPDATES),
            ("on_singular", ON_SINGULAR),
            ("on_unsupported", ON_UNSUPPORTED),
            ("on_nonfinite", ON_NONFINITE),
        ):
            checks.check_choice(name, getattr(self, name), choices)
        if self.curvature == "auto":
            self._set("curvature", self._measured_curvature(parsed))
        if self.row_clusters > 1 and self.curvature != "row":
            raise ConfigError(
                f"row_clusters needs curvature='row', got {self.row_clusters} with {self.curvature!r}; use "
                f"row_clusters=1"
            )
        self._check_together(parsed)

    def _measured_curvature(self, pattern: Pattern) -> str:
        free = all(getattr(self, name) == value for name, value in ROW_SETTINGS.items())
        return "row" if free and takes_row_curvature(pattern) else "block"

    def _check_together(self, pattern: Pattern) -> None:
        if self.layer_sparsity and (pattern.fixed_count or self.global_sparsity or self.curvature != "block"):
            raise ConfigError(
                f"layer_sparsity needs an unstructured or block pattern, curvature='block' and global_sparsity=False, "
                f"got {pattern}, {self.curvature!r} and {self.global_sparsity}; leave it out, or change these"
            )
        if self.layer_sparsity and not pattern.sparsity:
            raise ConfigError(
                f"layer_sparsity needs a pattern of more than 0, got {pattern}; name the layers to prune by targets"
            )
        if self.curvature == "block":
            self._check_block(pattern)
        else:
            self._check_rows(pattern)

    def _check_rows(self, pattern: Pattern) -> None:
        for name, value in ROW_SETTINGS.items():
            if getattr(self, name) != value:
                raise ConfigError(
                    f"{name} must be {value!r} with curvature={self.curvature!r}, got {getattr(self, name)!r}; "
                    f"leave it out, or use curvature='block'"
                )
        row = self.curvature == "row"
        if type(pattern) not in ((NMPattern, VNMPattern) if row else (NMPattern, UnstructuredPattern)):
            takes = "n:m and v:n:m" if row else "n:m and unstructured"
            raise ConfigError(
                f"curvature={self.curvature!r} takes {takes} patterns, got {pattern}; use curvature='block'"
            )
        if row and not takes_row_curvature(pattern):
            assert isinstance(pattern, NMPattern)
            raise ConfigError(
                f"curvature='row' takes patterns of at most {checks.MAX_KEPT_SETS} kept sets a group, got {pattern} "
                f"with {math.comb(pattern.m, pattern.n)}; use curvature='block' with method='greedy', or a smaller m"
            )

    def _check_block(self, pattern: Pattern) -> None:
        size = self.block_size
        for name, value in (("sequential", False), ("sweep_order", "given")):
            if getattr(self, name) != value:
                raise ConfigError(
                    f"{name} needs curvature='row' or 'layer', got {getattr(self, name)!r} with 'block'; use "
                    f"{name}={value!r}"
                )
        if self.passes and not (pattern.fixed_count and self.method == "combinatorial"):
            raise ConfigError(
                f"passes needs an n:m or v:n:m pattern and method='combinatorial', got passes = {self.passes} with "
                f"{pattern} and {self.method!r}; use passes=0"
            )
        if self.global_sparsity and pattern.fixed_count:
            raise ConfigError(
                f"global_sparsity needs an unstructured or block pattern, got {pattern}: its count is fixed per group"
            )
        if self.method in ("pairwise", "greedy") and not pattern.fixed_count:
            raise ConfigError(
                f"method={self.method!r} needs an n:m or v:n:m pattern, got {pattern}; use 'combinatorial'"
            )
        unit = pattern.m if isinstance(pattern, NMPattern) else pattern.size if isinstance(pattern, BlockPattern) else 1
        if size % unit:
            raise ConfigError(f"fisher_block_size must be a multiple of {unit} for pattern {pattern}, got {size}")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def parsed_pattern(self) -> Pattern:
        """The pattern as an object."""
        pattern: Pattern = parse_pattern(self.pattern)
        return pattern

    @property
    def block_size(self) -> int:
        """D: ``fisher_block_size``, or the default of the pattern."""
        if self.fisher_block_size is not None:
            return self.fisher_block_size
        pattern = self.parsed_pattern
        if isinstance(pattern, NMPattern):
            return pattern.m
        if isinstance(pattern, BlockPattern):
            return 32 if 32 % pattern.size == 0 else pattern.size
        return 50

    @property
    def needs_fisher(self) -> bool:
        """False for magnitude masks without an update: no gradient is needed."""
        return not (self.method == "magnitude" and self.update == "none")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; without ``layer_sparsity`` where there is none, as in what older versions wrote."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        shares = dict(values.pop("layer_sparsity"))
        return values | ({"layer_sparsity": shares} if shares else {})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> OBSConfig:
        """The inverse of ``to_dict``; an unknown key is an error that names the nearest known one."""
        values, known = without_removed(values), [f.name for f in fields(cls)]
        for key in values:
            if key in known:
                continue
            if key in FOREIGN_KEYS:
                raise ConfigError(f"unknown key {key!r}; here it is {FOREIGN_KEYS[key]}")
            near = difflib.get_close_matches(key, known, 1)
            raise ConfigError(
                f"unknown key {key!r}; {f'did you mean {near[0]!r}?' if near else 'known: ' + ', '.join(known)}"
            )
        if "pattern" not in values:
            raise ConfigError("pattern is missing; give for example pattern='64:2:8'")
        return cls(**values)

    def fingerprint(self) -> str:
        """A text that is equal for equal settings."""
        return json.dumps(self.to_dict(), sort_keys=True)


def without_removed(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values``, perhaps of an older version, less settings that are no more and changed nothing there."""
    return {k: v for k, v in values.items() if k not in REMOVED or v != REMOVED[k]}


def takes_row_curvature(pattern: Pattern) -> bool:
    """Whether the sweep of row curvature can weigh all kept sets of a group."""
    return isinstance(pattern, NMPattern) and math.comb(pattern.m, pattern.n) <= checks.MAX_KEPT_SETS


def _names(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
        raise ConfigError(f"{name} must be a list of names or 're:...' patterns, got {value!r}")
    return tuple(value)


def _shares(value: Any) -> tuple[tuple[str, float], ...]:
    try:
        pairs = tuple(dict(value).items())
    except (TypeError, ValueError):
        raise ConfigError(f"layer_sparsity must map names or 're:...' patterns to sparsities, got {value!r}") from None
    found = []
    for rule, share in pairs:
        number = checks.check_number(f"layer_sparsity[{rule!r}]", share)
        if not isinstance(rule, str) or not 0 < number < 1:
            raise ConfigError(
                f"layer_sparsity must map names to sparsities above 0 and below 1, got {rule!r}: {share!r}; 0.8 prunes "
                f"80 %, ignore leaves a layer out"
            )
        found.append((rule, number))
    return tuple(found)


def _integer(name: str, value: Any, *, least: int) -> int:
    if isinstance(value, str) and value.strip().lstrip("-").isdigit():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")
    return value
