# SPDX-License-Identifier: Apache-2.0
"""When to prune and to what: the published tables, whole counts, fractional epochs, schedules that make no sense."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obs_kernels.errors import ConfigError
from obs_kernels.patterns import NMPattern, VNMPattern, parse_pattern
from obs_kernels.pruning import PruningSchedule, ScheduledPruning
from obs_kernels.pruning.schedule import (
    SHAPES,
    check_reachable,
    recomputation_stages,
    step_of,
    structure_ladder,
)

STEPS = (2, 6, 10, 14, 18, 22, 26)


def schedule(**changes) -> PruningSchedule:
    return PruningSchedule(**({"start_epoch": 2, "end_epoch": 26, "update_frequency": 4} | changes))


def texts(found: PruningSchedule, pattern: str, steps_per_epoch: int = 1) -> list[tuple[int, str]]:
    return [(p.step, str(p.pattern)) for p in found.prunings(parse_pattern(pattern), steps_per_epoch)]


# the published sparsities


@pytest.mark.parametrize(
    ("first", "last", "wanted"),
    [
        (0.7, 0.8, (0.7, 0.742130, 0.770370, 0.7875, 0.796296, 0.799537, 0.8)),
        (0.7, 0.9, (0.7, 0.784259, 0.840741, 0.875, 0.892593, 0.899074, 0.9)),
        (0.7, 0.97, (0.7, 0.81375, 0.89, 0.93625, 0.96, 0.96875, 0.97)),
        (0.3, 0.8, (0.3, 0.510648, 0.651852, 0.7375, 0.781481, 0.797685, 0.8)),
        (0.3, 0.9, (0.3, 0.552778, 0.722222, 0.825, 0.877778, 0.897222, 0.9)),
        (0.5, 0.75, (0.5, 0.605324, 0.675926, 0.71875, 0.740741, 0.748843, 0.75)),
        (0.7, 0.875, (0.7, 0.773727, 0.823148, 0.853125, 0.868519, 0.874190, 0.875)),
    ],
)
@pytest.mark.parametrize("kind", ["unstructured", "block4", "block8"])
def test_cubic(first, last, wanted, kind):
    found = schedule(initial_sparsity=first).prunings(parse_pattern(f"{kind}:{last}"), 1)
    assert tuple(p.step for p in found) == STEPS
    assert [p.pattern.sparsity for p in found] == pytest.approx(wanted, abs=5.1e-7)
    assert found[-1].pattern == parse_pattern(f"{kind}:{last}"), "the last one is the pattern itself"


def test_inverse_cubic():
    found = schedule(shape="inverse_cubic", initial_sparsity=0.7).prunings(parse_pattern("unstructured:0.9"), 1)
    wanted = [0.7, 0.711793, 0.725284, 0.741260, 0.761328, 0.789936, 0.9]
    assert [p.pattern.sparsity for p in found] == pytest.approx(wanted, abs=5.1e-7)


def test_linear():
    found = schedule(shape="linear", initial_sparsity=0.3).prunings(parse_pattern("block4:0.9"), 1)
    assert [p.pattern.sparsity for p in found] == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], abs=1e-12)


def test_quarters_of_an_epoch():
    found = PruningSchedule(0, 2.75, 0.25, initial_sparsity=0.7).prunings(parse_pattern("unstructured:0.9"), 100)
    assert [p.step for p in found] == list(range(0, 300, 25))
    wanted = [0.7, 0.749737, 0.790458, 0.823065, 0.848460, 0.867543, 0.881217, 0.890383, 0.895943, 0.898798, 0.899850]
    assert [p.pattern.sparsity for p in found] == pytest.approx([*wanted, 0.9], abs=5.1e-7)


def test_sparsity_outside_of_the_schedule_and_at_one_point():
    found = schedule(initial_sparsity=0.3)
    assert found.sparsity(0, 0.9) == 0.3 and found.sparsity(30, 0.9) == pytest.approx(0.9)
    one = PruningSchedule(3, 3, 1, "linear", 0.2)
    assert one.sparsity(2.9, 0.9) == 0.2 and one.sparsity(3, 0.9) == pytest.approx(0.9)
    with pytest.raises(ConfigError, match="structure_decay"):
        PruningSchedule(0, 1, 1, "structure_decay").sparsity(0, 0.75)


# counts


@pytest.mark.parametrize(
    ("pattern", "first", "steps", "counts"),
    [
        ("2:8", 0.375, (2, 14), (5, 4, 3, 2)),
        ("64:2:8", 0.375, (2, 14), (5, 4, 3, 2)),
        ("128:2:8", 0.25, (2, 18), (6, 5, 4, 3, 2)),
        ("64:2:16", 0.6875, (2, 14), (5, 4, 3, 2)),
        ("2:16", 0.4375, (2, 30), (9, 8, 7, 6, 5, 4, 3, 2)),
        ("64:2:16", 0.4375, (2, 30), (9, 8, 7, 6, 5, 4, 3, 2)),
    ],
)
def test_a_linear_schedule_of_counts_falls_one_by_one(pattern, first, steps, counts):
    found = PruningSchedule(*steps, 4, "linear", first).prunings(parse_pattern(pattern), 7)
    assert [p.pattern.n for p in found] == list(counts)
    assert [p.step for p in found] == [7 * e for e in range(steps[0], steps[1] + 1, 4)]
    assert all(type(p.pattern) is type(parse_pattern(pattern)) for p in found)


@pytest.mark.parametrize(
    ("pattern", "counts", "sparsities"),
    [
        ("2:8", (5, 4, 3, 2), (0.375, 0.5, 0.625, 0.75)),
        ("64:2:8", (5, 4, 3, 2), (0.375, 0.5, 0.625, 0.75)),
        ("2:16", (9, 7, 5, 4, 3, 2), (0.4375, 0.5625, 0.6875, 0.75, 0.8125, 0.875)),
        ("128:2:16", (9, 7, 5, 4, 3, 2), (0.4375, 0.5625, 0.6875, 0.75, 0.8125, 0.875)),
        ("2:4", (3, 2), (0.25, 0.5)),
        ("4:8", (6, 5, 4), (0.25, 0.375, 0.5)),
        ("1:4", (2, 1), (0.5, 0.75)),
        ("3:4", (3,), (0.25,)),
    ],
)
def test_structure_decay(pattern, counts, sparsities):
    parsed = parse_pattern(pattern)
    assert structure_ladder(parsed) == counts
    for ladder in (None, counts):
        found = PruningSchedule(2, 2 + 4 * (len(counts) - 1), 4, "structure_decay", ladder=ladder).prunings(parsed, 3)
        assert [p.pattern.n for p in found] == list(counts) and found[-1].pattern == parsed
        assert [p.pattern.sparsity for p in found] == list(sparsities)
        assert [p.step for p in found] == [3 * (2 + 4 * k) for k in range(len(counts))]


@pytest.mark.parametrize(
    ("pattern", "columns"),
    [
        ("64:2:8", [(5, 7), (4, 6), (3, 4), (2, 4)]),
        ("64:2:16", [(9, 11), (8, 10), (7, 9), (6, 8), (5, 7), (4, 6), (3, 4), (2, 4)]),
        ("128:2:8", [(6, 8), (5, 7), (4, 6), (3, 4), (2, 4)]),
    ],
)
def test_columns_of_panels_follow_the_counts(pattern, columns):
    counts = tuple(n for n, _ in columns)
    found = PruningSchedule(0, len(counts) - 1, 1, "structure_decay", ladder=counts).patterns(parse_pattern(pattern))
    assert [(p.n, p.num_columns) for p in found if isinstance(p, VNMPattern)] == columns


def test_a_ladder_with_columns_of_its_own():
    found = PruningSchedule(0, 3, 1, "structure_decay", ladder=(5, 4, "3/5", 2)).patterns(parse_pattern("64:2:8"))
    assert [str(p) for p in found] == ["64:5:8", "64:4:8", "64:3:8/5", "64:2:8"]
    assert [p.num_columns for p in found if isinstance(p, VNMPattern)] == [7, 6, 5, 4]
    usual = PruningSchedule(0, 1, 1, "structure_decay", ladder=("5/7", 2)).patterns(parse_pattern("64:2:8"))
    assert [str(p) for p in usual] == ["64:5:8", "64:2:8"], "the usual number goes without saying"
    own = PruningSchedule(0, 2, 1, "linear").prunings(parse_pattern("64:2:8/6"), 1)
    assert [str(p.pattern) for p in own] == ["64:5:8", "64:2:8/6"]


def test_a_ladder_of_sparsities():
    found = PruningSchedule(0, 2, 1, "structure_decay", ladder=(0.3, 0.6, 0.9))
    assert texts(found, "block4:0.9", 10) == [(0, "block4:0.3"), (10, "block4:0.6"), (20, "block4:0.9")]


@given(
    m=st.integers(2, 64),
    n=st.integers(1, 63),
    v=st.sampled_from([None, 2, 64]),
    first=st.floats(0, 1),
    way=st.floats(0, 40),
    frequency=st.floats(0.05, 9),
    steps=st.integers(1, 1000),
    shape=st.sampled_from(["linear", "cubic", "inverse_cubic", "structure_decay"]),
)
def test_prunings_of_counts_ascend_and_nest(m, n, v, first, way, frequency, steps, shape):
    pattern = NMPattern(min(n, m - 1), m) if v is None else VNMPattern(v=v, n=min(n, m - 1), m=m)
    if shape == "structure_decay":
        first, way = 0.0, (len(structure_ladder(pattern)) - 1) * frequency
    found = PruningSchedule(1.5, 1.5 + way, frequency, shape, first * pattern.sparsity).prunings(pattern, steps)
    assert found[-1].pattern == pattern
    reached = None
    for one, two in itertools.pairwise(found):
        assert one.step < two.step
    for item in found:
        check_reachable(item.pattern, reached=reached, final=pattern)  # raises where it would open weights
        reached = item.pattern


@given(
    last=st.floats(0.01, 0.99),
    first=st.floats(0, 1),
    way=st.floats(0, 40),
    frequency=st.floats(0.05, 9),
    shape=st.sampled_from(["linear", "cubic", "inverse_cubic"]),
)
def test_prunings_of_sparsities_ascend(last, first, way, frequency, shape):
    pattern = parse_pattern(f"block4:{last!r}")
    found = PruningSchedule(0, way, frequency, shape, first * last).prunings(pattern, 50)
    sparsities = [p.pattern.sparsity for p in found]
    assert sparsities == sorted(set(sparsities)) and found[-1].pattern == pattern


# when


def test_epochs_do_not_drift():
    found = PruningSchedule(0, 10, 0.1).epochs()
    assert len(found) == 101 and found[-1] == 10
    assert [step_of(epoch, 1000) for epoch in found] == list(range(0, 10001, 100))


def test_the_last_pruning_is_at_the_end_whatever_the_frequency():
    assert schedule(end_epoch=25).epochs() == (2, 6, 10, 14, 18, 22, 25)
    assert schedule(end_epoch=2.5).epochs() == (2, 2.5)
    assert schedule(end_epoch=2).epochs() == (2,)
    assert texts(schedule(end_epoch=2, initial_sparsity=0.5), "unstructured:0.9", 5) == [(10, "unstructured:0.9")]


def test_steps_are_rounded_halves_up():
    assert [step_of(epoch, 3) for epoch in (0, 0.1, 1 / 6, 0.5, 0.83, 1)] == [0, 0, 1, 2, 2, 3]
    assert 1.005 * 100 < 100.5 and step_of(1.005, 100) == 101, "a half that rounding made less is a half"
    assert 0.29 * 50 < 14.5 and texts(schedule(shape="linear", initial_sparsity=0.29), "2:50")[0] == (2, "35:50")
    found = PruningSchedule(0.25, 0.75, 0.25, "linear", 0.5).prunings(parse_pattern("unstructured:0.9"), 10)
    assert [p.step for p in found] == [3, 5, 8]


def test_of_prunings_on_one_step_the_last_is_done():
    found = PruningSchedule(0, 1, 0.1, "linear", 0.5).prunings(parse_pattern("unstructured:0.9"), 2)
    assert [p.step for p in found] == [0, 1, 2]
    assert [p.pattern.sparsity for p in found] == pytest.approx([0.58, 0.78, 0.9])


def test_prunings_that_prune_nothing_are_left_out():
    assert texts(PruningSchedule(0, 2, 1, "linear"), "unstructured:0.5") == [
        (1, "unstructured:0.25"),
        (2, "unstructured:0.5"),
    ]
    assert texts(PruningSchedule(0, 4, 1, "linear"), "2:4") == [(1, "3:4"), (3, "2:4")]
    assert texts(PruningSchedule(0, 4, 1, "linear", 0.9), "unstructured:0.9") == [(0, "unstructured:0.9")]


def test_a_constant_schedule_prunes_nothing():
    found = PruningSchedule(0, 8, shape="constant")
    assert found.epochs() == () and found.patterns(parse_pattern("2:8")) == ()
    assert found.prunings(parse_pattern("unstructured:0.9"), 100) == ()


# parts of one pruning


def test_parts_of_a_pruning_start_at_what_is_reached():
    def parts(text: str, count: int, reached: str | None) -> list[str]:
        before = None if reached is None else parse_pattern(reached)
        return [str(p) for p in recomputation_stages(parse_pattern(text), count, reached=before)]

    assert parts("2:8", 3, "5:8") == ["4:8", "3:8", "2:8"] and parts("2:8", 9, "4:8") == ["3:8", "2:8"]
    assert parts("64:2:16", 2, "64:9:16") == ["64:5:16", "64:2:16"]
    assert parts("unstructured:0.9", 2, "unstructured:0.5") == ["unstructured:0.7", "unstructured:0.9"]
    assert parts("2:8", 2, None) == ["5:8", "2:8"]


@pytest.mark.parametrize(
    ("pattern", "reached", "words"),
    [
        ("2:4", None, "kind, v, m"),
        ("2:16", None, "kind, v, m"),
        ("5:8", None, "kind, v, m"),
        ("32:5:8", None, "kind, v, m"),
        ("unstructured:0.5", None, "kind, v, m"),
        ("64:1:8", None, "prunes more than"),
        ("64:5:8", "64:5:8", "would open weights"),
        ("64:5:8", "64:4:8", "would open weights"),
    ],
)
def test_what_is_no_stage(pattern, reached, words):
    before = None if reached is None else parse_pattern(reached)
    with pytest.raises(ConfigError, match=words):
        check_reachable(parse_pattern(pattern), reached=before, final=parse_pattern("64:2:8"))


# what is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"end_epoch": 1.5}, "end_epoch.*start_epoch = 2.*1.5"),
        ({"update_frequency": 0}, "update_frequency"),
        ({"update_frequency": -1}, "update_frequency"),
        ({"update_frequency": math.nan}, "update_frequency"),
        ({"update_frequency": math.inf}, "update_frequency"),
        ({"start_epoch": -1}, "start_epoch"),
        ({"start_epoch": "soon"}, "start_epoch"),
        ({"end_epoch": True}, "end_epoch"),
        ({"end_epoch": None}, "end_epoch"),
        ({"initial_sparsity": 1.0}, "initial_sparsity"),
        ({"initial_sparsity": -0.1}, "initial_sparsity"),
        ({"shape": "exponential"}, "shape.*exponential"),
        ({"shape": "structure_decay", "initial_sparsity": 0.5}, "ladder"),
        ({"shape": "constant", "initial_sparsity": 0.5}, "no meaning"),
        ({"ladder": (5, 4, 3, 2)}, "structure_decay"),
        ({"shape": "structure_decay", "ladder": ()}, "ladder"),
        ({"shape": "structure_decay", "ladder": "5432"}, "ladder"),
        ({"shape": "structure_decay", "ladder": ("5",)}, "ladder"),
        ({"shape": "structure_decay", "ladder": (True, False)}, "ladder"),
        ({"shape": "structure_decay", "ladder": ("3/", 2)}, "ladder"),
        ({"shape": "structure_decay", "ladder": ("a/5", 2)}, "ladder"),
    ],
)
def test_refuses(changes, words):
    with pytest.raises(ConfigError, match=words):
        schedule(**changes)


@pytest.mark.parametrize(
    ("changes", "pattern", "words"),
    [
        ({"end_epoch": 14, "ladder": (5, 4, 3)}, "2:8", "end at pattern 2:8.*add 2"),
        ({"end_epoch": 14, "ladder": (5, 3, 4, 2)}, "2:8", "order"),
        ({"end_epoch": 14, "ladder": (5, 4, 4, 2)}, "2:8", "order"),
        ({"end_epoch": 14, "ladder": (5, 4, 2, 1)}, "2:8", "end at pattern"),
        ({"end_epoch": 14, "ladder": (9, 4, 3, 2)}, "2:8", "1 to 7"),
        ({"end_epoch": 14, "ladder": (0.375, 0.5, 0.625, 0.75)}, "2:8", "counts n"),
        ({"end_epoch": 14, "ladder": (5, 4, 3, 2)}, "block4:0.9", "sparsities"),
        ({"end_epoch": 10, "ladder": (5, 4, 3, 2)}, "2:8", "4 prunings.*are 3.*end_epoch = 14"),
        ({"end_epoch": 18}, "64:2:8", "4 prunings.*are 5.*end_epoch = 14"),
        ({"end_epoch": 14, "ladder": (5, 4, "3/5", 2)}, "2:8", "no panels"),
        ({"end_epoch": 14, "ladder": (5, 4, "3/9", 2)}, "64:2:8", "columns must be n to m = 3 to 8"),
        ({"end_epoch": 14, "ladder": (5, 4, 3, "2/5")}, "64:2:8", "end at pattern 64:2:8"),
        ({"end_epoch": 14}, "unstructured:0.9", "no count n"),
        ({"shape": "cubic", "initial_sparsity": 0.8}, "2:8", "at most 0.75"),
        ({"shape": "linear", "initial_sparsity": 0.95}, "unstructured:0.9", "at most 0.9"),
    ],
)
def test_refuses_for_a_pattern(changes, pattern, words):
    with pytest.raises(ConfigError, match=words):
        schedule(**({"shape": "structure_decay"} | changes)).prunings(parse_pattern(pattern), 10)


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, "10"])
def test_refuses_steps_per_epoch(steps):
    with pytest.raises(ConfigError, match="steps_per_epoch"):
        schedule().prunings(parse_pattern("unstructured:0.9"), steps)


def test_texts_are_read_and_the_record_is_plain():
    found = PruningSchedule("2", "26", "4", "cubic", "0.7")  # type: ignore[arg-type]
    assert found == schedule(initial_sparsity=0.7) and hash(found) == hash(schedule(initial_sparsity=0.7))
    ladder = PruningSchedule(0, 3, 1, "structure_decay", ladder=[5, 4, 3, 2])  # type: ignore[arg-type]
    assert ladder.ladder == (5, 4, 3, 2) and PruningSchedule(**ladder.to_dict()) == ladder
    assert set(SHAPES) == {"cubic", "linear", "inverse_cubic", "structure_decay", "constant"}
    assert ScheduledPruning(3, parse_pattern("2:4")) == ScheduledPruning(3, parse_pattern("2:4"))


# faults of the reference systems


def test_a_stage_is_never_looked_up_by_a_float():
    """2:8 from 0.375 in steps that are no binary fractions still hits every count."""
    found = PruningSchedule(0.1, 0.4, 0.1, "linear", 0.375).prunings(parse_pattern("2:8"), 10)
    assert [p.pattern.n for p in found] == [5, 4, 3, 2] and [p.step for p in found] == [1, 2, 3, 4]


def test_the_decay_of_2_16_has_six_stages_below_one():
    """The reference's table gave sparsities above 1 and then an index error."""
    found = PruningSchedule(2, 22, 4, "structure_decay").prunings(parse_pattern("2:16"), 1)
    assert [p.step for p in found] == [2, 6, 10, 14, 18, 22]
    assert all(0 < p.pattern.sparsity < 1 for p in found)
