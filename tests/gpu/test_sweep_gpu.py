# SPDX-License-Identifier: Apache-2.0
"""``sweep_rows`` on a GPU, against the reference in f64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from obs_kernels import ops
from obs_kernels.errors import BackendUnavailableError, NonFiniteError, SingularBlockError
from obs_kernels.ops import dispatch
from obs_kernels.patterns import VNMPattern, parse_pattern
from obs_kernels.reference.hessian import row_loss

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
SHAPES = [(768, 768), (3072, 768), (768, 3072)]
PATTERNS = ["2:4", "2:8", "4:8", "64:2:8", "128:2:8", "64:2:16"]
OTHERS = ["1:4", "2:3", "1:16", "2:12", "3:8", "5:8", "7:8", "16:2:4", "16:1:8", "5:2:8", "256:2:8", "256:2:16"]
SETS = [f"{v}:{n}:8" for v in (3, 64, 128, 256) for n in (5, 4, 3)]
"""Panels of n > 2, of each kernel."""
OTHER_SETS = ["1:5:8", "1:3:8", "16:4:8", "5:3:7", "4:3:4", "16:6:8", "64:6:8", "128:7:8", "250:6:8"]
LOSS = 1e-4
"""Relative; reported losses against those of the weights."""
CHOICE = 5e-3
"""Relative; loss of the whole sweep against f64: near ties fall either way, and later groups go on from there."""


@pytest.fixture
def gen() -> torch.Generator:
    return torch.Generator(device=DEVICE).manual_seed(20240)


def problem(gen: torch.Generator, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """Inputs with a common part, and half as many of them as columns: strongly correlated."""
    x = torch.randn(cols // 2 + 1, cols, generator=gen, device=DEVICE)
    x = x + 0.7 * torch.randn(cols // 2 + 1, 1, generator=gen, device=DEVICE)
    hessian = torch.zeros(cols, cols, device=DEVICE)
    ops.accumulate_hessian_(hessian, x, scale=2 / cols)
    return torch.randn(rows, cols, generator=gen, device=DEVICE), hessian


def live_mask(gen: torch.Generator, rows: int, cols: int, m: int) -> Tensor:
    share = torch.tensor([1.0, 0.7, 0.3, 0.1, 0.0], device=DEVICE)
    share = share[torch.randint(0, 5, (rows, cols // m, 1), generator=gen, device=DEVICE)]
    return (torch.rand(rows, cols // m, m, generator=gen, device=DEVICE) < share).view(rows, cols)


def sweep(weight: Tensor, hessian: Tensor, pattern: str, *, backend: str = "cuda", **options: object) -> ops.Selection:
    given = {"damp": 0.05, "resolve": False} | options
    return ops.sweep_rows(weight, hessian, pattern, backend=backend, **given)  # type: ignore[arg-type]


def usual(pattern: str) -> dict[str, int]:
    """The columns that a stage of this pattern keeps."""
    parsed = parse_pattern(pattern)
    return {"num_columns": parsed.num_columns} if isinstance(parsed, VNMPattern) else {}


def assert_is_reference(weight: Tensor, hessian: Tensor, pattern: str, **options: object) -> ops.Selection:
    options = usual(pattern) | options
    found = sweep(weight, hessian, pattern, **options)
    best = sweep(weight.double(), hessian.double(), pattern, backend="reference", **options)
    parsed, mask, scale = parse_pattern(pattern), options.get("mask"), options.get("row_scale")
    v = parsed.v if isinstance(parsed, VNMPattern) else 1
    live = weight if mask is None else weight.masked_fill(~mask, 0.0)  # type: ignore[operator]
    change = found.weight.double() - live.double()  # type: ignore[union-attr]
    whole = row_loss(change, hessian.double(), row_scale=scale, damp=0.05)  # type: ignore[arg-type]
    torch.testing.assert_close(found.saliency.double().sum(1), whole.view(-1, v).sum(1), rtol=LOSS, atol=1e-5)
    assert abs(float(found.saliency.double().sum() / best.saliency.sum()) - 1) <= CHOICE
    # the first groups are chosen on the weights as given
    first, wanted = found.saliency[:, 0].double(), best.saliency[:, 0]
    assert (first <= wanted * (1 + LOSS) + 1e-6).all()
    assert (found.mask == best.mask).float().mean() >= 0.9
    assert mask is None or not (found.mask & ~mask).any()  # type: ignore[operator]
    assert not found.weight[~found.mask].any()  # type: ignore[index]
    parsed.validate_mask(found.mask)
    return found


@pytest.mark.parametrize("pattern", [*PATTERNS, "64:5:8", "64:4:8", "128:3:8", "256:5:8"])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_loss_is_that_of_the_reference(gen: torch.Generator, pattern: str, rows: int, cols: int) -> None:
    weight, hessian = problem(gen, rows, cols)
    assert_is_reference(weight, hessian, pattern)


@pytest.mark.parametrize("pattern", [*PATTERNS, *OTHERS, *SETS, *OTHER_SETS])
def test_dead_entries_scales_and_odd_sizes(gen: torch.Generator, pattern: str) -> None:
    parsed = parse_pattern(pattern)
    v = parsed.v if isinstance(parsed, VNMPattern) else 1
    rows, cols = 3 * v if v > 1 else 101, 47 * parsed.m
    weight, hessian = problem(gen, rows, cols)
    mask = live_mask(gen, rows, cols, parsed.m)
    scale = torch.rand(rows, generator=gen, device=DEVICE) * (torch.rand(rows, generator=gen, device=DEVICE) < 0.8)
    scale[::v] = 1.0
    assert_is_reference(weight, hessian, pattern, row_scale=scale)
    assert_is_reference(weight, hessian, pattern, mask=mask)


@pytest.mark.parametrize("num_columns", [2, 3, 5, 6, 8])
@pytest.mark.parametrize("pattern", ["64:2:8", "16:2:16", "64:3:8", "16:4:8", "128:5:8"])
def test_any_number_of_columns(gen: torch.Generator, pattern: str, num_columns: int) -> None:
    if num_columns < parse_pattern(pattern).n:
        pytest.skip("fewer columns than are kept")
    weight, hessian = problem(gen, 128, 160)
    found = sweep(weight, hessian, pattern, num_columns=num_columns)
    best = sweep(weight.double(), hessian.double(), pattern, num_columns=num_columns, backend="reference")
    assert found.columns is not None and found.columns.shape[2] == num_columns
    assert (found.columns.diff(dim=2).to(torch.int8) > 0).all() if num_columns > 1 else True
    assert abs(float(found.saliency.double().sum() / best.saliency.sum()) - 1) <= CHOICE


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pattern", [*SETS, "1:4:8", "16:6:8"])
def test_ties_of_panels(gen: torch.Generator, pattern: str, masked: bool) -> None:
    """Groups and entries that know nothing of each other, small integers: the very choice of the reference."""
    parsed = parse_pattern(pattern)
    assert isinstance(parsed, VNMPattern)
    rows, cols = 2 * parsed.v, 160
    weight = torch.randint(-2, 3, (rows, cols), generator=gen, device=DEVICE).float()
    hessian = 0.25 * torch.eye(cols, device=DEVICE)
    options = {
        "num_columns": parsed.num_columns,
        "mask": live_mask(gen, rows, cols, 8) if masked else None,
        "row_scale": 2.0 ** torch.randint(-1, 2, (rows,), generator=gen, device=DEVICE),
        "damp": 0.0,
    }
    found, best = (sweep(weight, hessian, pattern, backend=backend, **options) for backend in ("cuda", "reference"))
    assert torch.equal(found.mask, best.mask) and torch.equal(found.columns, best.columns)  # type: ignore[arg-type]
    assert torch.equal(found.weight, best.weight)  # type: ignore[arg-type]
    torch.testing.assert_close(found.saliency, best.saliency, rtol=LOSS, atol=0.0)


@pytest.mark.parametrize("v", [16, 64, 128, 256])
def test_a_ladder_of_panels(gen: torch.Generator, v: int) -> None:
    """The stages of gradual pruning: each goes on from what the one before has left."""
    weight, hessian = problem(gen, 256, 512)
    mask, count = None, 5
    while count >= 2:
        found = assert_is_reference(weight, hessian, f"{v}:{count}:8", mask=mask)
        assert found.mask.view(256, 64, 8).sum(2).max() == count
        mask, weight, count = found.mask, found.weight, count - 1


def test_resolve_and_dtypes(gen: torch.Generator) -> None:
    weight, hessian = problem(gen, 64, 256)
    plain, solved = (sweep(weight.bfloat16(), hessian, "2:4", resolve=resolve) for resolve in (False, True))
    assert torch.equal(plain.mask, solved.mask) and torch.equal(plain.saliency, solved.saliency)
    assert solved.weight is not None and solved.weight.dtype == torch.bfloat16


def test_bad_values_raise(gen: torch.Generator) -> None:
    weight, hessian = problem(gen, 16, 64)
    for error, tensor, place in (
        (NonFiniteError, weight, (3, 5)), (NonFiniteError, hessian, (1, 2)), (SingularBlockError, hessian, (7, 7)),
    ):  # fmt: skip
        before = tensor.clone()
        tensor[place] = -100.0 if error is SingularBlockError else torch.nan
        for pattern in ("2:4", "16:4:8"):
            with pytest.raises(error):
                sweep(weight, hessian, pattern)
        tensor.copy_(before)
    sweep(weight, hessian, "2:4")


def test_kernel_is_preferred_where_it_runs(gen: torch.Generator) -> None:
    weight, hessian = problem(gen, 4, 64)
    for pattern, method, wanted in (
        ("2:4", "combinatorial", "cuda"), ("2:4", "sparsegpt", "reference"), ("9:16", "combinatorial", "reference"),
        ("2:32", "combinatorial", "reference"), ("4:5:8", "combinatorial", "cuda"),
        ("4:3:9", "combinatorial", "reference"),
    ):  # fmt: skip
        arguments = (weight, hessian, None, parse_pattern(pattern), method)
        assert dispatch.resolve("sweep_rows", None, *arguments) == wanted
    with pytest.raises(BackendUnavailableError, match="'cuda' cannot run sweep_rows: it sweeps by"):
        sweep(weight, hessian, "2:4", method="sparsegpt")
    assert sweep(weight[:0], hessian, "2:4").mask.shape == (0, 64)


@pytest.mark.parametrize("pattern", [*PATTERNS, "16:5:8", "64:5:8", "64:4:8", "128:3:8", "256:4:8"])
def test_the_same_bits_again_and_on_a_side_stream(gen: torch.Generator, pattern: str) -> None:
    weight, hessian = problem(gen, 256, 512)
    mask = live_mask(gen, 256, 512, 8) if "3:8" in pattern else None
    options = {"mask": mask, **usual(pattern)}
    first, second = (sweep(weight, hessian, pattern, **options) for _ in range(2))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    late = torch.zeros_like(weight)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(weight)
        third = sweep(late, hessian, pattern, **options)
    stream.synchronize()
    for other in (second, third):
        assert torch.equal(first.mask, other.mask) and torch.equal(first.saliency, other.saliency)
        assert torch.equal(first.weight, other.weight)
        assert first.columns is None or torch.equal(first.columns, other.columns)
