# SPDX-License-Identifier: Apache-2.0
"""``method="pairwise"`` and ``"greedy"`` of the searches on a GPU, against the reference."""

from __future__ import annotations

import pytest
import torch
from fisher_checks import Guarded
from test_search_gpu import integer_problem, live_mask, real_problem, search
from tolerances import SALIENCY_CONDITIONAL, UPDATE_RMS_F32
from torch import Tensor

from obs_kernels import reference
from obs_kernels.cuda_calls import conditional
from obs_kernels.cuda_calls.group_launches import launch_groups
from obs_kernels.errors import BackendUnavailableError, NonFiniteError, SingularBlockError
from obs_kernels.ops import dispatch
from obs_kernels.patterns import parse_pattern

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
PATTERNS = ("1:4", "2:4", "2:6", "2:8", "4:8", "7:8", "5:12", "2:16", "8:16", "9:20", "8:32", "16:32")
PANELS = ("16:2:8", "64:2:8", "64:2:16", "32:1:8", "16:2:32")
METHODS = ("pairwise", "greedy")
EVERY = [*((pattern, method) for pattern in PATTERNS for method in METHODS), *((p, "pairwise") for p in PANELS)]
FEW = [("4:8", "pairwise"), ("16:32", "pairwise"), ("4:8", "greedy"), ("16:32", "greedy"), ("64:2:8", "pairwise")]


@pytest.fixture
def gen() -> torch.Generator:
    return torch.Generator(device=DEVICE).manual_seed(20241)


def shape_of(pattern: str, groups: int = 2049) -> tuple[int, int, int, int]:
    """Rows, columns, v and m of a problem, ragged where there are no panels."""
    parsed = parse_pattern(pattern)
    v = getattr(parsed, "v", 1)
    return (2 * v if v > 1 else groups), 3 * parsed.m, v, parsed.m


def exact_problem(gen: torch.Generator, rows: int, cols: int, m: int) -> tuple[Tensor, Tensor]:
    """Small integers and a diagonal F of powers of four: every number of both methods is exact, ties are many."""
    weight = torch.randint(-3, 4, (rows, cols), generator=gen, device=DEVICE).float()
    return weight, torch.diag_embed(4.0 ** torch.randint(0, 2, (rows * cols // m, m), generator=gen, device=DEVICE))


def paired_problem(gen: torch.Generator, rows: int, cols: int, m: int) -> tuple[Tensor, Tensor]:
    """The same with coupled pairs, which are exact for the pair model as long as all entries live."""
    weight, fisher = exact_problem(gen, rows, cols, m)
    root = fisher.sqrt()
    sign = torch.randint(-1, 2, (fisher.shape[0], m // 2), generator=gen, device=DEVICE).float()
    even = torch.arange(0, m, 2, device=DEVICE)
    root[:, even + 1, even] = sign * root[:, even, even]
    return weight, root @ root.mT


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("pattern", "method"), EVERY)
def test_exact_numbers_give_equal_masks(gen: torch.Generator, pattern: str, method: str, masked: bool) -> None:
    rows, cols, _, m = shape_of(pattern)
    problems = [exact_problem(gen, rows, cols, m)]
    if method == "pairwise" and not masked:
        problems.append(paired_problem(gen, rows, cols, m))
    for weight, fisher in problems:
        mask = live_mask(gen, rows, cols, m) if masked else None
        found = search(weight, fisher, pattern, method=method, mask=mask)
        wanted = search(weight, fisher, pattern, backend="reference", method=method, mask=mask)
        differ = (found.mask != wanted.mask).any(1).nonzero().flatten()
        assert not len(differ), f"{pattern}: {len(differ)} rows differ, the first is {differ[0]}"
        if wanted.columns is not None:
            assert found.columns is not None and torch.equal(found.columns, wanted.columns)
        torch.testing.assert_close(found.saliency, wanted.saliency, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("pattern", "method"), EVERY)
def test_real_numbers(gen: torch.Generator, pattern: str, method: str, size: int) -> None:
    """Also D = 2 m and 4 m, and dead entries: the choice in f64 but for near-ties, and its true loss."""
    _, _, v, m = shape_of(pattern)
    if size * m > 128:
        pytest.skip("D is at most 128")
    rows, cols = max(64, 2 * v), 4 * m
    weight, fisher = real_problem(gen, rows, cols, size * m)
    damp = torch.rand(fisher.shape[0], generator=gen, device=DEVICE) * 0.1 + 0.01
    for mask in (None, torch.rand(rows, cols, generator=gen, device=DEVICE) < 0.8):
        found = search(weight, fisher, pattern, damp=damp, method=method, mask=mask)
        options = {"damp": damp.double(), "method": method, "mask": mask, "backend": "reference"}
        best = search(weight.double(), fisher.double(), pattern, **options)
        parse_pattern(pattern).validate_mask(found.mask)
        assert mask is None or not (found.mask & ~mask).any()
        same = (found.mask == best.mask).view(rows // v, v, -1, m).all(3).all(1)
        assert same.float().mean() > 0.95
        losses = found.saliency[same].double(), best.saliency[same]
        torch.testing.assert_close(*losses, rtol=SALIENCY_CONDITIONAL, atol=1e-5)
        assert float(found.saliency.sum()) <= float(best.saliency.sum()) * 1.01


@pytest.mark.parametrize("pattern", ["4:8", "5:12", "16:32"])
def test_loss_is_that_of_the_update(gen: torch.Generator, pattern: str) -> None:
    rows, cols, _, m = shape_of(pattern, 65)
    weight, fisher = real_problem(gen, rows, cols, m)
    keep = torch.rand(rows, cols, generator=gen, device=DEVICE) < 0.5
    kept, damp = keep.clone(), torch.full((1,), 0.1, device=DEVICE)
    saliency = torch.empty(rows, cols // m, device=DEVICE)
    new, info = torch.empty_like(weight), torch.empty(fisher.shape[0], dtype=torch.int32, device=DEVICE)
    launch_groups("finish_nm", weight, fisher, None, damp, kept, saliency, new, info, pattern=parse_pattern(pattern))
    wanted = reference.obs_update(weight.double(), fisher.double(), keep, damp=damp.double(), update="joint")
    loss = reference.loss_increase(wanted - weight.double(), fisher.double(), damp=damp.double())
    assert torch.equal(kept, keep) and not info.any() and not new[~keep].any()
    assert (new - wanted).norm() <= 10 * UPDATE_RMS_F32 * wanted.norm()
    torch.testing.assert_close(saliency.double().view(-1), loss.view(-1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("pattern", "method"), FEW)
def test_bad_values_raise(gen: torch.Generator, pattern: str, method: str) -> None:
    rows, cols, _, m = shape_of(pattern, 16)
    weight, fisher = integer_problem(gen, rows, cols, m)
    for error, change in (
        (NonFiniteError, (weight, (15, m))), (NonFiniteError, (fisher, (3, 0, 1))), (SingularBlockError, (fisher, 5)),
    ):  # fmt: skip
        tensor, place = change
        before = tensor.clone()
        tensor[place] = 0.0 if error is SingularBlockError else torch.nan
        with pytest.raises(error):
            search(weight, fisher, pattern, method=method)
        tensor.copy_(before)
    search(weight, fisher, pattern, method=method)


@pytest.mark.parametrize(("pattern", "method"), FEW)
def test_nothing_to_tell_apart(pattern: str, method: str) -> None:
    """Zeros: the lowest stay; nothing alive: nothing stays."""
    rows, cols, _, m = shape_of(pattern, 33)
    n = parse_pattern(pattern).n
    weight, fisher = torch.zeros(rows, cols, device=DEVICE), torch.zeros(rows * cols // m, m, m, device=DEVICE)
    found = search(weight, fisher, pattern, damp=1.0, method=method)
    lowest = torch.arange(m, device=DEVICE) < n
    assert torch.equal(found.mask.view(-1, m), lowest.expand(rows * 3, m)) and not found.saliency.any()
    weight += 1.0
    gone = search(weight, fisher, pattern, damp=1.0, method=method, mask=torch.zeros_like(found.mask))
    assert not gone.mask.any() and not gone.saliency.any()


@pytest.mark.sanitizer
@pytest.mark.parametrize("function", ["finish_nm", "search_greedy"])
@pytest.mark.parametrize("pattern", ["1:4", "4:8", "3:7", "8:16", "5:11", "9:20", "16:32"])
@pytest.mark.parametrize("shift", [None, 0, 1, 3])
def test_between_guards(pattern: str, function: str, shift: int | None) -> None:
    """Bases off their alignment, one bad block among the rest; first without guards."""
    m, gen = parse_pattern(pattern).m, torch.Generator().manual_seed(7)
    weight, fisher = integer_problem(gen, 67, m, m, diagonal=True)
    method = "greedy" if function == "search_greedy" else "combinatorial"
    keep = torch.rand(67, m, generator=gen) < 0.5
    if method == "greedy":
        keep, _ = reference.search_nm(weight, fisher, pattern, damp=torch.zeros(1), method=method, mask=None)
    fisher[-2] = -1.0
    given = [Guarded(tensor.to(DEVICE), shift) for tensor in (weight, fisher)]
    out = [
        Guarded(tensor.to(DEVICE), shift)
        for tensor in (
            keep.view(torch.uint8) if function == "finish_nm" else torch.full((67, m), 99, dtype=torch.uint8),
            torch.full((67, 1), torch.nan), torch.full((67, m), torch.nan), torch.full((67,), 99, dtype=torch.int32),
        )
    ]  # fmt: skip
    kept, saliency, new, info = (guarded.tensor for guarded in out)
    kept = kept.view(torch.bool)
    launch_groups(
        function, given[0].tensor, given[1].tensor, None, torch.zeros(1, device=DEVICE), kept, saliency, new, info,
        pattern=parse_pattern(pattern),
    )  # fmt: skip
    good = torch.arange(67) != 65
    assert torch.equal(kept.cpu()[good], keep[good]) and not kept[65].any()
    assert info.nonzero().flatten().tolist() == [65] and torch.equal(new[65].cpu(), weight[65])
    for guarded in (*given, *out):
        guarded.assert_unharmed()


# Choice, repetition, streams, graphs


def test_kernels_are_preferred_where_they_run(gen: torch.Generator) -> None:
    weight, fisher = integer_problem(gen, 4, 16, 8)
    for pattern, method, wanted in (
        ("4:8", "pairwise", "cuda"), ("4:8", "greedy", "cuda"), ("4:8", "diagonal", "reference"),
        ("2:2:8", "pairwise", "cuda"), ("2:2:8", "greedy", "reference"),
    ):  # fmt: skip
        op = "search_vnm" if pattern.count(":") == 2 else "search_nm"
        assert dispatch.resolve(op, None, weight, fisher, parse_pattern(pattern), method) == wanted
    with pytest.raises(BackendUnavailableError, match="'cuda' cannot run search_vnm: it searches 2:2:8 by"):
        search(weight, fisher, "2:2:8", method="greedy")


@pytest.mark.parametrize(("pattern", "method"), FEW)
def test_three_times_the_same_bits(gen: torch.Generator, pattern: str, method: str) -> None:
    rows, cols, _, m = shape_of(pattern)
    weight, fisher = real_problem(gen, rows, cols, m)
    first, *others = (search(weight, fisher, pattern, damp=0.01, method=method) for _ in range(3))
    for other in others:
        assert torch.equal(first.mask, other.mask) and torch.equal(first.saliency, other.saliency)


@pytest.mark.parametrize(("pattern", "method"), FEW)
def test_on_a_side_stream(gen: torch.Generator, pattern: str, method: str) -> None:
    rows, cols, _, m = shape_of(pattern, 64)
    late_weight, late_fisher = real_problem(gen, rows, cols, m)
    weight, fisher = torch.zeros_like(late_weight), torch.eye(m, device=DEVICE).repeat(late_fisher.shape[0], 1, 1)
    wanted = search(late_weight, late_fisher, pattern, damp=0.1, method=method)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        weight.copy_(late_weight)
        fisher.copy_(late_fisher)
        found = search(weight, fisher, pattern, damp=0.1, method=method)
    stream.synchronize()
    assert torch.equal(found.mask, wanted.mask) and torch.equal(found.saliency, wanted.saliency)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(("pattern", "method"), FEW)
def test_in_a_cuda_graph(gen: torch.Generator, pattern: str, method: str, size: int) -> None:
    """Nothing is read in a capture; a block that turns bad between replays keeps nothing."""
    _, _, v, m = shape_of(pattern)
    rows, cols = max(64, v), 2 * m
    weight, fisher = real_problem(gen, rows, cols, size * m)
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        search(weight, fisher, pattern, damp=0.5, method=method)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        found = search(weight, fisher, pattern, damp=0.5, method=method)
    new_weight, new_fisher = real_problem(gen, rows, cols, size * m)
    weight.copy_(new_weight)
    fisher.copy_(new_fisher)
    graph.replay()
    torch.cuda.synchronize()
    again = search(weight, fisher, pattern, damp=0.5, method=method)
    assert torch.equal(found.mask, again.mask) and torch.equal(found.saliency, again.saliency)
    fisher[5] = -1.0
    graph.replay()
    torch.cuda.synchronize()
    assert not found.mask.view(-1, size * m)[5].any()
    if v == 1:
        assert found.saliency.view(-1, size)[5].isnan().all()
        rest = torch.arange(fisher.shape[0], device=DEVICE) != 5
        assert torch.equal(found.mask.view(-1, size * m)[rest], again.mask.view(-1, size * m)[rest])


@pytest.mark.parametrize(("pattern", "method"), FEW)
def test_in_several_parts(gen: torch.Generator, pattern: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks at a time, or whole rows of panels: the same bits."""
    _, _, v, m = shape_of(pattern)
    rows, cols = 3 * max(v, 32), 4 * m
    weight, fisher = real_problem(gen, rows, cols, 2 * m)
    whole = search(weight, fisher, pattern, damp=0.01, method=method)
    monkeypatch.setattr(conditional, "BYTES_AT_ONCE", 7 * 4 * 4 * m * m)
    parts = search(weight, fisher, pattern, damp=0.01, method=method)
    assert torch.equal(whole.mask, parts.mask) and torch.equal(whole.saliency, parts.saliency)
    if whole.columns is not None:
        assert parts.columns is not None and torch.equal(whole.columns, parts.columns)
