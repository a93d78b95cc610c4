# SPDX-License-Identifier: Apache-2.0
"""OBSConfig: each field, each refusal with its text, and the round trips."""

from __future__ import annotations

import dataclasses
import json
import pickle

import pytest

from obs_kernels import OBSConfig, parse_pattern
from obs_kernels.errors import ConfigError

FIELDS = {
    "pattern": "64:2:8",
    "num_grads": 1024,
    "gradients": "sample",
    "curvature": "row",
    "fisher_block_size": None,
    "damp": None,
    "dampening_frac": 0.01,
    "method": "combinatorial",
    "update": "joint",
    "recomputations": 1,
    "passes": 0,
    "global_sparsity": False,
    "layer_sparsity": (),
    "targets": ("Linear",),
    "ignore": ("re:.*qa_outputs",),
    "seed": 0,
    "on_singular": "raise",
    "on_unsupported": "raise",
    "on_nonfinite": "raise",
    "sequential": False,
    "refit_bias": True,
    "row_clusters": 1,
    "sweep_order": "given",
}


def test_fields_and_defaults_of_the_design():
    cfg = OBSConfig(pattern="64:2:8")
    assert {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)} == FIELDS
    assert list(FIELDS) == [f.name for f in dataclasses.fields(cfg)]


@pytest.mark.parametrize(
    ("curvature", "changes"),
    [
        ("row", {"pattern": "2:4"}),
        ("row", {"pattern": "64:2:16", "recomputations": 2, "sequential": True}),
        ("row", {"pattern": "2:8", "curvature": "auto", "damp": 1e-3}),
        ("block", {"pattern": "unstructured:0.9"}),
        ("block", {"pattern": "block4:0.8"}),
        ("block", {"pattern": "10:32", "method": "greedy"}),
        ("block", {"pattern": "4:32"}),
        ("block", {"pattern": "2:4", "method": "magnitude", "update": "none"}),
        ("block", {"pattern": "64:2:8", "method": "pairwise"}),
        ("block", {"pattern": "2:4", "update": "none"}),
        ("block", {"pattern": "2:4", "fisher_block_size": 64, "passes": 3}),
        ("block", {"pattern": "2:4", "gradients": "batch"}),
        ("layer", {"pattern": "2:4", "curvature": "layer"}),
    ],
)
def test_curvature_that_nobody_names_is_the_measured_one(curvature, changes):
    cfg = OBSConfig(**changes)
    assert cfg.curvature == curvature
    assert OBSConfig.from_dict(cfg.to_dict()) == cfg, "what it became is what is stored"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pattern": "4:2"}, ["4:2", "0 < n < m"]),
        ({"pattern": "half"}, ["pattern", "'half'"]),
        ({"pattern": None}, ["pattern", "NoneType"]),
        ({"num_grads": 0}, ["num_grads", "at least 1", "got 0"]),
        ({"num_grads": -3}, ["num_grads", "got -3"]),
        ({"num_grads": 2.5}, ["num_grads", "integer", "got 2.5"]),
        ({"num_grads": True}, ["num_grads", "integer", "got True"]),
        ({"num_grads": "many"}, ["num_grads", "integer", "got 'many'"]),
        ({"num_grads": None}, ["num_grads", "got None"]),
        ({"gradients": "token"}, ["gradients", "'sample', 'batch'", "got 'token'"]),
        ({"curvature": "kfac"}, ["curvature", "'block'", "got 'kfac'"]),
        ({"curvature": "row", "gradients": "batch"}, ["gradients must be 'sample'", "curvature='row'", "got 'batch'"]),
        ({"curvature": "row", "method": "pairwise"}, ["method must be 'combinatorial'", "got 'pairwise'"]),
        ({"curvature": "row", "fisher_block_size": 8}, ["fisher_block_size must be None", "got 8", "leave it out"]),
        ({"curvature": "row", "pattern": "unstructured:0.9"}, ["n:m and v:n:m", "unstructured:0.9", "'block'"]),
        ({"curvature": "layer", "pattern": "64:2:8"}, ["n:m and unstructured", "64:2:8"]),
        ({"curvature": "layer", "pattern": "block4:0.8"}, ["n:m and unstructured", "block4:0.8"]),
        ({"sequential": True, "curvature": "block"}, ["sequential", "curvature='row' or 'layer'", "'block'"]),
        ({"sweep_order": "diagonal", "curvature": "block"}, ["sweep_order", "curvature='row' or 'layer'", "'block'"]),
        ({"sweep_order": "random", "curvature": "row"}, ["sweep_order", "'given', 'diagonal'", "got 'random'"]),
        ({"sequential": "yes", "curvature": "row"}, ["sequential must be true or false", "'yes'"]),
        ({"fisher_block_size": 0}, ["fisher_block_size", "at least 1", "got 0"]),
        ({"fisher_block_size": 8.0}, ["fisher_block_size", "got 8.0"]),
        ({"fisher_block_size": False}, ["fisher_block_size", "got False"]),
        ({"damp": -1e-7}, ["damp", "at least 0", "got -1e-07"]),
        ({"damp": 0}, ["damp", "greater than 0", "got 0"]),
        ({"damp": 0.0}, ["damp", "greater than 0"]),
        ({"damp": float("nan")}, ["damp", "finite", "nan"]),
        ({"damp": float("inf")}, ["damp", "finite", "inf"]),
        ({"damp": "small"}, ["damp", "number", "got 'small'"]),
        ({"damp": True}, ["damp", "got True"]),
        ({"damp": [1e-7]}, ["damp", "number"]),
        ({"dampening_frac": 0.0}, ["damp", "greater than 0"]),
        ({"dampening_frac": -0.1}, ["dampening_frac", "at least 0", "got -0.1"]),
        ({"dampening_frac": None}, ["dampening_frac", "number", "got None"]),
        ({"dampening_frac": float("inf")}, ["dampening_frac", "finite"]),
        ({"method": "exact"}, ["method", "'combinatorial'", "'magnitude'", "got 'exact'"]),
        ({"method": None}, ["method", "got None"]),
        ({"update": "summed"}, ["update", "'joint', 'single', 'none'", "got 'summed'"]),
        ({"recomputations": 0}, ["recomputations", "at least 1", "got 0"]),
        ({"recomputations": 1.0}, ["recomputations", "got 1.0"]),
        ({"passes": 1, "pattern": "unstructured:0.5"}, ["passes needs an n:m", "got passes = 1", "passes=0"]),
        ({"passes": 1, "pattern": "2:8", "method": "pairwise"}, ["passes", "method='combinatorial'", "'pairwise'"]),
        ({"passes": -1}, ["passes", "got -1"]),
        ({"global_sparsity": 1}, ["global_sparsity", "true or false", "got 1"]),
        ({"global_sparsity": "yes"}, ["global_sparsity", "got 'yes'"]),
        ({"targets": 5}, ["targets", "list of names", "got 5"]),
        ({"targets": [1]}, ["targets", "got [1]"]),
        ({"targets": None}, ["targets", "got None"]),
        ({"ignore": ["a", 2]}, ["ignore", "list of names"]),
        ({"ignore": {"a": 1}}, ["ignore"]),
        ({"seed": -1}, ["seed", "at least 0", "got -1"]),
        ({"seed": 0.5}, ["seed", "got 0.5"]),
        ({"on_singular": "identity"}, ["on_singular", "'raise', 'increase_damp', 'skip'", "got 'identity'"]),
        ({"on_unsupported": "crop"}, ["on_unsupported", "'raise', 'skip', 'pad'", "got 'crop'"]),
        ({"on_nonfinite": "ignore"}, ["on_nonfinite", "'raise', 'skip_batch'", "got 'ignore'"]),
        # combinations
        ({"pattern": "2:4", "global_sparsity": True}, ["global_sparsity", "unstructured or block", "2:4"]),
        ({"pattern": "64:2:8", "global_sparsity": True}, ["global_sparsity", "64:2:8"]),
        (
            {"pattern": "unstructured:0.5", "method": "pairwise"},
            ["pairwise", "n:m", "unstructured:0.5", "'combinatorial'"],
        ),
        ({"pattern": "block4:0.5", "method": "pairwise"}, ["pairwise", "block4:0.5"]),
        ({"pattern": "2:8", "fisher_block_size": 12}, ["fisher_block_size", "multiple of 8", "got 12"]),
        ({"pattern": "block4:0.5", "fisher_block_size": 6}, ["fisher_block_size", "multiple of 4", "got 6"]),
        ({"damp": None, "dampening_frac": 0}, ["damp", "greater than 0"]),
    ],
)
def test_refuses(changes, words):
    with pytest.raises(ConfigError) as caught:
        OBSConfig(**({"pattern": "64:2:8"} | changes))
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(ConfigError):
        OBSConfig.from_dict({"pattern": "64:2:8"} | changes)


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"damp": "1e-7"}, "damp", 1e-7),  # YAML 1.1 reads 1e-7 as a text
        ({"damp": 1}, "damp", 1.0),
        ({"dampening_frac": "1e-2"}, "dampening_frac", 0.01),
        ({"num_grads": "256"}, "num_grads", 256),
        ({"recomputations": " 4 "}, "recomputations", 4),
        ({"fisher_block_size": "32"}, "fisher_block_size", 32),
        ({"targets": "Linear"}, "targets", ("Linear",)),
        ({"targets": ["a", "b"]}, "targets", ("a", "b")),
        ({"ignore": []}, "ignore", ()),
        ({"pattern": " 2:4 "}, "pattern", "2:4"),
        ({"pattern": parse_pattern("64:2:8")}, "pattern", "64:2:8"),
        ({"pattern": "block4:0.80"}, "pattern", "block4:0.8"),
        ({"damp": 1e-7, "dampening_frac": 0.0}, "dampening_frac", 0.0),
        ({"seed": 2**63}, "seed", 2**63),
    ],
)
def test_normalises(changes, field, value):
    found = getattr(OBSConfig(**({"pattern": "64:2:8"} | changes)), field)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("pattern", "size"),
    [
        ("2:4", 4),
        ("2:8", 8),
        ("2:16", 16),
        ("64:2:8", 8),
        ("128:2:16", 16),
        ("unstructured:0.9", 50),
        ("block4:0.8", 32),
        ("block8:0.8", 32),
        ("block32:0.8", 32),
        ("block5:0.5", 5),
        ("block64:0.5", 64),
    ],
)
def test_fisher_block_size_by_pattern(pattern, size):
    assert OBSConfig(pattern=pattern).block_size == size
    assert OBSConfig(pattern=pattern, fisher_block_size=2 * size).block_size == 2 * size


@pytest.mark.parametrize("method", ["combinatorial", "pairwise", "diagonal", "magnitude"])
@pytest.mark.parametrize("update", ["joint", "single", "none"])
def test_only_magnitude_without_update_needs_no_gradients(method, update):
    cfg = OBSConfig(pattern="2:4", method=method, update=update)
    assert cfg.needs_fisher is not (method == "magnitude" and update == "none")


def test_parsed_pattern():
    assert OBSConfig(pattern="64:2:8").parsed_pattern == parse_pattern("64:2:8")


def test_equality_and_hash():
    a = OBSConfig(pattern="2:8", damp="1e-7", targets="Linear", curvature="block")
    b = OBSConfig(pattern=" 2:8", damp=1e-7, targets=["Linear"], curvature="block")
    assert a == b and hash(a) == hash(b) and a.fingerprint() == b.fingerprint()
    others = [
        dataclasses.replace(a, **{k: v})
        for k, v in {"pattern": "2:4", "num_grads": 5, "update": "none", "seed": 1, "damp": 1e-6}.items()
    ]
    assert len({a, b, *others}) == 6
    assert len({cfg.fingerprint() for cfg in [a, b, *others]}) == 6


def test_frozen():
    cfg = OBSConfig(pattern="2:8")
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.num_grads = 5
    assert dataclasses.replace(cfg, num_grads=5).num_grads == 5
    with pytest.raises(ConfigError):
        dataclasses.replace(cfg, num_grads=0)


@pytest.mark.parametrize(
    "cfg",
    [
        OBSConfig(pattern="64:2:8"),
        OBSConfig(pattern="unstructured:0.9", global_sparsity=True, damp=1e-7, gradients="batch", num_grads=7, seed=3),
        OBSConfig(
            pattern="block4:0.75", targets=("re:.*fc1", "Linear"), ignore=(), fisher_block_size=16, recomputations=4
        ),
        OBSConfig(
            pattern="2:4",
            method="pairwise",
            update="single",
            on_singular="skip",
            on_unsupported="pad",
            on_nonfinite="skip_batch",
        ),
    ],
)
def test_json_and_pickle_round_trip(cfg):
    text = json.dumps(cfg.to_dict())
    assert OBSConfig.from_dict(json.loads(text)) == cfg
    assert pickle.loads(pickle.dumps(cfg)) == cfg
    assert set(cfg.to_dict()) == set(FIELDS) - {"layer_sparsity"}  # where there is none
    assert repr(cfg).startswith("OBSConfig(") and eval(repr(cfg)) == cfg


@pytest.mark.parametrize("target", [0.74213046, 0.1234567])
def test_pattern_keeps_every_digit_of_its_sparsity(target):
    """Six digits are too few: at 85 million weights the sixth is 42 weights."""
    assert OBSConfig(pattern=f"unstructured:{target}").parsed_pattern.sparsity == target


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("patern", ["'patern'", "'pattern'"]),
        ("num_grad", ["'num_grad'", "'num_grads'"]),
        ("dampening_fraction", ["'dampening_frac'"]),
        ("on_nonfinit", ["'on_nonfinite'"]),
        ("target", ["'targets'"]),
        ("zzz", ["'zzz'", "known", "pattern", "on_unsupported"]),
        ("mask_structure", ["mask_structure", "pattern", "keeps n of m", "prunes n of m"]),
        ("mask_type", ["mask_type", "pattern"]),
        ("sparsity", ["sparsity", "pattern", "unstructured:0.9"]),
        ("final_sparsity", ["final_sparsity", "pattern"]),
        ("num_recomputations", ["num_recomputations", "recomputations"]),
        ("block_size", ["block_size", "fisher_block_size"]),
        ("params", ["params", "targets"]),
        ("refit_norms", ["refit_norms", "nothing any more", "lowered the accuracy"]),
    ],
)
def test_unknown_keys(key, words):
    with pytest.raises(ConfigError) as caught:
        OBSConfig.from_dict({"pattern": "2:4", key: 1})
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_a_removed_setting_that_changed_nothing_is_left_out():
    cfg = OBSConfig(pattern="2:4", curvature="row", sequential=True)
    assert OBSConfig.from_dict(cfg.to_dict() | {"refit_norms": False}) == cfg


def test_missing_pattern():
    with pytest.raises(ConfigError, match="pattern is missing"):
        OBSConfig.from_dict({"num_grads": 4})


def test_row_curvature_refuses_too_many_sets_at_once():
    with pytest.raises(ConfigError, match=r"at most 20000 kept sets a group, got 4:32 with 35960.*greedy"):
        OBSConfig(pattern="4:32", curvature="row")
