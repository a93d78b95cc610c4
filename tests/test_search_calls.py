# SPDX-License-Identifier: Apache-2.0
"""``cuda_calls.search`` with the kernels as a library of the CPU: allocation, D > m, errors, and the fused step."""

from __future__ import annotations

import ctypes
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import oracle
import pytest
import torch
from emulation import build
from oracle import example_e, example_g, groups_of, kept_of
from tolerances import EXAMPLE_F32, SALIENCY_CONDITIONAL, SEARCH_LOSS_CONDITIONAL
from torch import Tensor

from obs_kernels import _ext, reference
from obs_kernels.cuda_calls import conditional, group_launches, pairwise, search
from obs_kernels.cuda_calls.column_tables import column_tables
from obs_kernels.errors import (
    ConfigError,
    DTypeNotSupportedError,
    NonFiniteError,
    ShapeNotSupportedError,
    SingularBlockError,
)
from obs_kernels.ops import dispatch
from obs_kernels.patterns import VNMPattern, parse_pattern

SEARCH = ("pairs.cu", "wide.cu", "sets.cu", "wide_sets.cu", "panels.cu", "search.cpp")
CHOICE = ("given.cu", "greedy.cu", "pairwise.cu", "choice.cpp")
SOURCES = [f"search/{name}" for name in (*SEARCH, *CHOICE)]
ADDRESS, SIZE = ctypes.c_void_p, ctypes.c_int64


class SearchParams(ctypes.Structure):
    _fields_ = [
        ("weight", ADDRESS), ("fisher", ADDRESS), ("damp", ADDRESS), ("damp_each", ctypes.c_bool), ("alive", ADDRESS),
        ("mask", ADDRESS), ("saliency", ADDRESS), ("new_weight", ADDRESS), ("info", ADDRESS), ("num_groups", SIZE),
        ("n", SIZE), ("m", SIZE),
    ]  # fmt: skip


class PanelParams(ctypes.Structure):
    _fields_ = [
        ("groups", SearchParams), ("derived", ADDRESS), ("lists", ADDRESS), ("column_sets", ADDRESS),
        ("num_derived", SIZE), ("length", SIZE), ("num_sets", SIZE), ("columns", ADDRESS), ("panel_saliency", ADDRESS),
        ("column_bits", ADDRESS), ("gains", ADDRESS), ("gains_bytes", SIZE), ("v", SIZE), ("wide", SIZE),
        ("num_columns", SIZE),
    ]  # fmt: skip


class PairwiseParams(ctypes.Structure):
    _fields_ = [
        ("weight", ADDRESS), ("inverse", ADDRESS), ("alive", ADDRESS), ("mask", ADDRESS), ("num_groups", SIZE),
        ("n", SIZE), ("m", SIZE),
    ]  # fmt: skip


class PairModelParams(ctypes.Structure):
    _fields_ = [("inverse", ADDRESS), ("unit", ADDRESS), ("model", ADDRESS), ("num_groups", SIZE), ("m", SIZE)]


GROUP_FUNCTIONS = ("search_nm", "finish_nm", "search_greedy")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("emulation") / "library"
    found = ctypes.CDLL(str(build(SOURCES, "search_library_on_cpu.cpp", folder, sanitizer=None)))
    for name in (*GROUP_FUNCTIONS, "search_vnm", "search_pairwise", "pair_models", "sum_panels"):
        getattr(found, f"{name}_on_cpu").restype = ctypes.c_char_p
    return found


@pytest.fixture(autouse=True)
def on_cpu(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled module is the library, and its device the CPU."""

    def filled(kind: type[ctypes.Structure], arguments: dict[str, Any]) -> Any:
        assert arguments["device"] is None and arguments["stream"] == 17
        return kind(**{name: arguments[name] for name, _ in kind._fields_ if name in arguments})

    def call(name: str, params: ctypes.Structure) -> tuple[str, str, int, int]:
        return name, getattr(library, f"{name}_on_cpu")(ctypes.byref(params)).decode(), 0, 0

    def search_vnm(**arguments: Any) -> tuple[str, str, int, int]:
        params = filled(PanelParams, arguments)
        params.groups = filled(SearchParams, arguments)
        return call("search_vnm", params)

    def sum_panels(each: int, sums: int, num_groups: int, **arguments: Any) -> tuple[str, str, int, int]:
        params = filled(PanelParams, arguments | {"panel_saliency": sums})
        params.groups.saliency, params.groups.num_groups = each, num_groups
        return call("sum_panels", params)

    kinds = {name: SearchParams for name in GROUP_FUNCTIONS}
    kinds |= {"search_pairwise": PairwiseParams, "pair_models": PairModelParams}
    functions = {
        name: lambda name=name, kind=kind, **arguments: call(name, filled(kind, arguments))
        for name, kind in kinds.items()
    }
    native = SimpleNamespace(**functions, search_vnm=search_vnm, sum_panels=sum_panels)
    monkeypatch.setattr(_ext, "load", lambda: native)
    for module in (search, group_launches, pairwise):
        monkeypatch.setattr(module, "check_on_cuda", lambda **tensors: None)
    for module in (group_launches, pairwise):
        monkeypatch.setattr(module, "check_gpu", lambda index: None)
    monkeypatch.setattr(conditional, "invert_spd", reference.invert_spd)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=17))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def problem(gen: torch.Generator, rows: int, cols: int, size: int) -> tuple[Tensor, Tensor]:
    weight = torch.randn(rows, cols, generator=gen)
    return weight, oracle.random_spd(gen, rows * cols // size, size).float()


OPTIONS = {"damp": torch.tensor([0.01]), "method": "combinatorial"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:8", "2:16", "4:8", "3:20", "30:32"])
def test_search_nm_of_any_dtype_and_strides(gen: torch.Generator, pattern: str, dtype: torch.dtype) -> None:
    m = int(pattern.split(":")[1])
    weight, fisher = problem(gen, 6, 2 * m, m)
    weight, mask = weight.to(dtype), torch.rand(6, 2 * m, generator=gen) < 0.7
    for alive in (None, mask):
        wanted, saliency = reference.search_nm(weight, fisher, pattern, mask=alive, **OPTIONS)
        found = search.search_nm(weight.t().clone().t(), fisher.mT, pattern, mask=alive, **OPTIONS)
        assert torch.equal(found[0], wanted) and found[0].dtype == torch.bool
        torch.testing.assert_close(found[1], saliency, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("pattern", "num_columns"), [("2:2:8", 4), ("2:5:8", 7), ("2:4:8", 6), ("2:3:8", 4)])
def test_search_vnm_in_several_launches(
    gen: torch.Generator, monkeypatch: pytest.MonkeyPatch, pattern: str, num_columns: int
) -> None:
    weight, fisher = problem(gen, 12, 16, 8)
    wanted = reference.search_vnm(weight, fisher, pattern, mask=None, num_columns=num_columns, **OPTIONS)
    for limit in (1, 4 * 2 * 2 * 28 * 4, 1 << 20):
        monkeypatch.setattr(search, "GAINS_BYTES", limit)
        monkeypatch.setattr(search, "MOST_GAINS_BYTES", limit)
        found = search.search_vnm(weight, fisher, pattern, mask=None, num_columns=num_columns, **OPTIONS)
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[2], wanted[2])
        torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-6)


def test_nothing(gen: torch.Generator) -> None:
    mask, saliency = search.search_nm(torch.zeros(0, 8), torch.zeros(0, 8, 8), "2:8", mask=None, **OPTIONS)
    assert mask.shape == (0, 8) and saliency.shape == (0, 1)


@pytest.mark.parametrize(
    ("pattern", "size"), [("2:4", 8), ("2:8", 32), ("1:4", 12), ("2:8", 16), ("3:8", 16), ("15:17", 34)]
)
def test_wider_blocks(gen: torch.Generator, pattern: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """D > m, some blocks at a time; dead entries leave the block first."""
    n, m = (int(part) for part in pattern.split(":"))
    monkeypatch.setattr(conditional, "BYTES_AT_ONCE", 3 * 4 * size * size)
    weight, fisher = problem(gen, 5, 2 * size, size)
    damp = torch.rand(10, generator=gen)
    mask = torch.rand(5, 2 * size, generator=gen) < 0.8
    for alive in (None, mask):
        found, saliency = search.search_nm(weight, fisher, pattern, damp=damp, method="combinatorial", mask=alive)
        for (row, group), member in groups_of(weight, fisher, m, damp=damp, mask=alive).items():
            losses = member.losses(n)
            loss = losses[kept_of(found, row, group, m)]
            assert loss <= member.best(n)[1] * (1 + SEARCH_LOSS_CONDITIONAL) + 1e-6
            assert float(saliency[row, group]) == pytest.approx(loss, rel=SALIENCY_CONDITIONAL, abs=1e-6)


@pytest.mark.parametrize(("pattern", "num_columns"), [("4:2:8", 4), ("4:4:8", 6)])
def test_panels_of_wider_blocks(gen: torch.Generator, pattern: str, num_columns: int) -> None:
    weight, fisher = problem(gen, 8, 32, 16)
    mask = torch.rand(8, 32, generator=gen) < 0.8
    for alive in (None, mask):
        wanted = reference.search_vnm(weight, fisher, pattern, mask=alive, num_columns=num_columns, **OPTIONS)
        found = search.search_vnm(weight, fisher, pattern, mask=alive, num_columns=num_columns, **OPTIONS)
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[2], wanted[2])
        torch.testing.assert_close(found[1], wanted[1], rtol=SALIENCY_CONDITIONAL, atol=1e-5)


@pytest.mark.parametrize(
    ("n", "m", "num_columns"), [(3, 4, 3), (5, 8, 7), (4, 7, 5), (3, 12, 4), (9, 16, 11), (8, 11, 10)]
)
def test_tables_list_the_sets_inside_columns(n: int, m: int, num_columns: int) -> None:
    """The order of kept sets is that of ``obs_kernels/search.h``, here by sorting tuples."""
    half = 4 if m <= 8 else 8

    def place(kept: tuple[int, ...]) -> tuple[int, tuple[int, ...], int]:
        first = [i for i in kept if i < half]
        return len(first), kept[len(first) :], sum(1 << i for i in first)

    number = {kept: i for i, kept in enumerate(sorted(combinations(range(m), n), key=place))}
    tables = column_tables(n, m, num_columns, torch.device("cpu"))
    columns = list(combinations(range(m), num_columns))
    assert tables.columns.tolist() == [list(some) for some in columns] and tables.derived.numel() == 0
    for at in range(0, len(columns), max(1, len(columns) // 64)):
        wanted = sorted(number[kept] for kept in combinations(columns[at], n))
        assert sorted(tables.lists[:, at].tolist()) == wanted


def test_example_g() -> None:
    weight, fisher = example_g(torch.float32)
    found, saliency = search.search_nm(
        weight, fisher, "2:8", damp=torch.tensor([0.5]), method="combinatorial", mask=None
    )
    assert found.nonzero()[:, 1].tolist() == [0, 7, 11, 12]
    assert saliency.flatten().tolist() == pytest.approx([60.850642, 177.304694], rel=10 * EXAMPLE_F32)


def test_fused_step_of_groups(gen: torch.Generator) -> None:
    """Search and update in one; what is wrong stands in ``info`` and nothing is raised."""
    weight, fisher = problem(gen, 6, 16, 8)
    damp = torch.rand(12, generator=gen)
    wanted, saliency = reference.search_nm(weight, fisher, "2:8", damp=damp, method="combinatorial", mask=None)
    new = reference.obs_update(weight, fisher, wanted, damp=damp, update="joint")
    for kind in (torch.float32, torch.bfloat16):
        mask, updated, loss, info = search.prune_nm(weight.to(kind), fisher, "2:8", damp=damp, mask=None)
        assert updated.dtype == kind and not info.any()
    mask, updated, loss, info = search.prune_nm(weight, fisher, "2:8", damp=damp, mask=None)
    assert torch.equal(mask, wanted)
    torch.testing.assert_close(updated, new, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, saliency, rtol=1e-4, atol=1e-6)
    fisher[3] = -1.0
    mask, updated, loss, info = search.prune_nm(weight, fisher, "2:8", damp=damp, mask=None)
    assert info.nonzero().flatten().tolist() == [3] and torch.equal(updated[1, 8:], weight[1, 8:])
    with pytest.raises(ShapeNotSupportedError, match=r"fisher must be \[B, 4, 4\]"):
        search.prune_nm(weight, fisher, "2:4", damp=damp, mask=None)


def test_fused_step_of_panels() -> None:
    weight, fisher = example_e(torch.float32)
    damp = torch.ones(1)
    mask, updated, loss, columns, info = search.prune_vnm(weight, fisher, "4:2:8", damp=damp, mask=None, num_columns=4)
    assert columns.flatten().tolist() == [0, 4, 5, 6] and not info.any()
    assert updated[0, [0, 4]].tolist() == pytest.approx([-6.392318, 5.665809], rel=EXAMPLE_F32)
    assert updated[3, [4, 6]].tolist() == pytest.approx([-8.429397, 8.047019], rel=EXAMPLE_F32)
    assert float(loss) == pytest.approx(839.487105, rel=EXAMPLE_F32) and int(mask.sum()) == 8


def bad_values(weight: Tensor, fisher: Tensor) -> list[tuple[type[Exception], Tensor, Tensor, Tensor]]:
    """Error, weight, Fisher and damping: what no choice is made of."""
    cases: list[tuple[type[Exception], Tensor, Tensor, Tensor]] = []
    for bad in (float("nan"), float("inf")):
        wrong, blocks = weight.clone(), fisher.clone()
        wrong[2, 3], blocks[1, 0, 5] = bad, bad
        cases += [(NonFiniteError, wrong, fisher, OPTIONS["damp"]), (NonFiniteError, weight, blocks, OPTIONS["damp"])]
    singular = fisher.clone()
    singular[2] = 0.0
    cases.append((SingularBlockError, weight, singular, torch.zeros(1)))
    cases.append((ConfigError, weight, fisher, torch.tensor([-1.0])))
    return cases


@pytest.mark.parametrize("size", [8, 16])
def test_bad_values_raise_as_in_the_reference(gen: torch.Generator, size: int) -> None:
    for error, w, f, damp in bad_values(*problem(gen, 4, 16, size)):
        options = {"damp": damp, "method": "combinatorial", "mask": None}
        with pytest.raises(error) as wanted:
            reference.search_nm(w, f, "2:8", **options)
        with pytest.raises(error) as found:
            search.search_nm(w, f, "2:8", **options)
        assert str(found.value) == str(wanted.value)
        with pytest.raises(error):
            search.search_vnm(w, f, "2:2:8", num_columns=4, **options)


# pairwise and greedy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["1:4", "2:6", "4:8", "5:16", "8:32", "16:32"])
@pytest.mark.parametrize("method", ["pairwise", "greedy"])
def test_methods_of_any_dtype_and_strides(
    gen: torch.Generator, pattern: str, method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some blocks at a time; the loss is the true one of the choice."""
    m = int(pattern.split(":")[1])
    monkeypatch.setattr(conditional, "BYTES_AT_ONCE", 3 * 4 * m * m)
    weight, fisher = problem(gen, 4, 2 * m, m)
    weight, damp = weight.to(dtype), torch.rand(8, generator=gen) + 0.01
    mask = torch.rand(4, 2 * m, generator=gen) < 0.7
    for alive in (None, mask):
        options = {"damp": damp, "method": method, "mask": alive}
        wanted, saliency = reference.search_nm(weight, fisher, pattern, **options)
        found = search.search_nm(weight.t().clone().t(), fisher.mT, pattern, **options)
        same = (found[0] == wanted).view(-1, m).all(1)
        assert same.float().mean() > 0.85 and found[0].dtype == torch.bool
        assert torch.equal(found[0].view(-1, m).sum(1), wanted.view(-1, m).sum(1))
        losses = found[1].flatten()[same], saliency.flatten()[same]
        torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("pattern", "size"), [("2:4", 8), ("4:8", 32), ("1:4", 12), ("6:16", 32)])
@pytest.mark.parametrize("method", ["pairwise", "greedy"])
def test_methods_of_wider_blocks(
    gen: torch.Generator, pattern: str, size: int, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, m = (int(part) for part in pattern.split(":"))
    monkeypatch.setattr(conditional, "BYTES_AT_ONCE", 3 * 4 * size * size)
    weight, fisher = problem(gen, 5, 2 * size, size)
    damp = torch.rand(10, generator=gen)
    mask = torch.rand(5, 2 * size, generator=gen) < 0.8
    for alive in (None, mask):
        found, saliency = search.search_nm(weight, fisher, pattern, damp=damp, method=method, mask=alive)
        for (row, group), member in groups_of(weight, fisher, m, damp=damp, mask=alive).items():
            kept = kept_of(found, row, group, m)
            assert float(saliency[row, group]) == pytest.approx(
                member.losses(n)[kept], rel=SALIENCY_CONDITIONAL, abs=1e-6
            )
            if method == "pairwise":
                model = member.pair_model()
                assert model.losses(n)[kept] <= model.best(n)[1] * (1 + SEARCH_LOSS_CONDITIONAL) + 1e-6
            else:
                assert member.losses(n)[kept] <= member.best(n)[1] * 1.3 + 1e-6


@pytest.mark.parametrize(
    ("pattern", "size"),
    [("4:2:8", 8), ("2:2:8", 16), ("2:1:4", 8), ("2:2:16", 16), ("3:2:4", 12), ("2:3:8", 8), ("2:5:8", 16)],
)
def test_panels_by_pairs(gen: torch.Generator, pattern: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole rows of panels at a time."""
    parsed = parse_pattern(pattern)
    assert isinstance(parsed, VNMPattern)
    v = parsed.v
    rows, cols = 3 * v, 2 * size
    weight, fisher = problem(gen, rows, cols, size)
    mask = torch.rand(rows, cols, generator=gen) < 0.8
    for limit in (1, 2 * v * cols // size * 4 * size * size):
        monkeypatch.setattr(conditional, "BYTES_AT_ONCE", limit)
        for alive in (None, mask):
            options = {"damp": torch.tensor([0.01]), "method": "pairwise", "mask": alive}
            options["num_columns"] = parsed.num_columns
            wanted = reference.search_vnm(weight, fisher, pattern, **options)
            found = search.search_vnm(weight, fisher, pattern, **options)
            assert torch.equal(found[0], wanted[0]) and torch.equal(found[2], wanted[2])
            torch.testing.assert_close(found[1], wanted[1], rtol=SALIENCY_CONDITIONAL, atol=1e-5)


def test_example_e_by_pairs() -> None:
    weight, fisher = example_e(torch.float32)
    mask, loss, columns = search.search_vnm(
        weight, fisher, "4:2:8", damp=torch.ones(1), method="pairwise", mask=None, num_columns=4
    )
    assert columns.flatten().tolist() == [0, 4, 5, 6]
    assert [kept_of(mask, row, 0, 8) for row in range(4)] == [(0, 4), (5, 6), (0, 6), (4, 6)]
    assert float(loss) == pytest.approx(851.310754, rel=EXAMPLE_F32)


@pytest.mark.parametrize("method", ["pairwise", "greedy"])
def test_nothing_by_other_methods(method: str) -> None:
    for size in (8, 16):
        options = {"damp": torch.zeros(1), "method": method, "mask": None}
        mask, saliency = search.search_nm(torch.zeros(0, 16), torch.zeros(0, size, size), "2:8", **options)
        assert mask.shape == (0, 16) and saliency.shape == (0, 2)
        if method == "pairwise":
            found = search.search_vnm(torch.zeros(0, 16), torch.zeros(0, size, size), "4:2:8", num_columns=4, **options)
            assert [tensor.shape for tensor in found] == [(0, 16), (0, 2), (0, 2, 4)]


@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("method", ["pairwise", "greedy"])
def test_bad_values_by_other_methods(
    gen: torch.Generator, method: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the reference raises; and where nothing may be read, bad groups keep nothing."""
    weight, fisher = problem(gen, 4, 16, size)
    good = search.search_nm(weight, fisher, "2:8", damp=OPTIONS["damp"], method=method, mask=None)
    cases = bad_values(weight, fisher)
    for error, w, f, damp in cases:
        options = {"damp": damp, "method": method, "mask": None}
        with pytest.raises(error) as wanted:
            reference.search_nm(w, f, "2:8", **options)
        with pytest.raises(error) as found:
            search.search_nm(w, f, "2:8", **options)
        assert str(found.value) == str(wanted.value)
        if method == "pairwise":
            with pytest.raises(error):
                search.search_vnm(w, f, "2:2:8", num_columns=4, **options)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    _, w, f, _ = cases[1]  # NaN in block 1
    mask, saliency = search.search_nm(w, f, "2:8", damp=OPTIONS["damp"], method=method, mask=None)
    first, last = size // 8, 2 * size // 8
    assert not mask.view(-1, 8)[first:last].any() and saliency.flatten()[first:last].isnan().all()
    assert torch.equal(mask.view(-1, 8)[last:], good[0].view(-1, 8)[last:])
    if method == "pairwise":
        mask, saliency, _ = search.search_vnm(
            w, f, "2:2:8", damp=OPTIONS["damp"], method=method, mask=None, num_columns=4
        )
        assert not mask.view(-1, 8)[first:last].any() and saliency[0].isnan().any() and not saliency[1].isnan().any()


def test_what_the_kernels_do_not_take(gen: torch.Generator) -> None:
    weight, fisher = problem(gen, 4, 16, 8)
    options = {"damp": torch.zeros(1), "mask": None}
    with pytest.raises(ConfigError, match="method must be 'combinatorial', 'pairwise', 'greedy' on the cuda backend"):
        search.search_nm(weight, fisher, "2:8", method="diagonal", **options)
    with pytest.raises(ConfigError, match="method must be 'combinatorial', 'pairwise' on the cuda backend, got 'greed"):
        search.search_vnm(weight, fisher, "2:2:8", method="greedy", num_columns=4, **options)
    with pytest.raises(DTypeNotSupportedError, match="float32 on the cuda backend"):
        search.search_nm(weight.double(), fisher, "2:8", mask=None, **OPTIONS)


@pytest.mark.parametrize(
    ("pattern", "method", "size", "dtype", "text"),
    [
        ("2:8", "diagonal", 8, torch.float32, "'combinatorial' or 'pairwise' or 'greedy' only, got 'diagonal'"),
        ("2:2:8", "greedy", 8, torch.float32, "2:2:8 by method='combinatorial' or 'pairwise' only, got 'greedy'"),
        ("16:40", "greedy", 40, torch.float32, "it takes m <= 32, and m <= 16 for panels of n > 2, got 16:40"),
        ("2:3:20", "pairwise", 20, torch.float32, "got 2:3:20"),
        ("2:3:8", "pairwise", 8, torch.float32, None),
        ("16:32", "greedy", 32, torch.float32, None),
        ("16:32", "pairwise", 64, torch.float32, None),
        ("2:2:8", "pairwise", 8, torch.float32, None),
        ("2:8", "combinatorial", 8, torch.float64, "float32 fisher and a weight of at most 32 bits"),
        ("2:40", "combinatorial", 40, torch.float32, "it takes m <= 32, and m <= 16 for panels of n > 2, got 2:40"),
        ("2:8", "combinatorial", 136, torch.float32, "Fisher blocks of at most 128, got 136"),
        ("2:3:20", "combinatorial", 20, torch.float32, "m <= 16 for panels of n > 2, got 2:3:20"),
        ("2:8", "combinatorial", 128, torch.float32, None),
        ("9:16", "combinatorial", 16, torch.float32, None),
        ("3:20", "combinatorial", 20, torch.float32, None),
        ("30:32", "combinatorial", 32, torch.float32, None),
        ("2:2:32", "combinatorial", 32, torch.float32, None),
        ("2:3:8", "combinatorial", 8, torch.float32, None),
        ("2:7:16", "combinatorial", 16, torch.float32, None),
    ],
)
def test_dispatch_knows_what_the_kernels_take(
    monkeypatch: pytest.MonkeyPatch, pattern: str, method: str, size: int, dtype: torch.dtype, text: str | None
) -> None:
    monkeypatch.setattr(_ext, "reason", lambda: None)
    weight = torch.zeros(2, size, dtype=dtype)
    fisher = torch.zeros(2, size, size, dtype=dtype)
    op = "search_vnm" if pattern.count(":") == 2 else "search_nm"
    reason = dispatch.unavailable(op, "cuda", "cuda", weight, fisher, parse_pattern(pattern), method)
    assert reason is None if text is None else text in str(reason)
