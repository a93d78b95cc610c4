# SPDX-License-Identifier: Apache-2.0
"""Later stages of the sweep, where entries are dead: looked-up inverses, the ladder of a panel, reads by the host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from oracle import numpy
from tolerances import SALIENCY_F64, UPDATE_F64
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from obs_kernels.errors import SingularBlockError
from obs_kernels.ops import dispatch, sweep_rows
from obs_kernels.patterns import VNMPattern, parse_pattern
from obs_kernels.reference import sweep
from obs_kernels.reference.blocks import Groups
from obs_kernels.reference.candidates import gain_table, kept_sets
from obs_kernels.reference.sweep import sweep_rows as reference_sweep

F64 = torch.float64


def thin_mask(rows: int, cols: int) -> Tensor:
    """Groups of 4 with 0 to 4 live entries."""
    gen = torch.Generator().manual_seed(5)
    share = torch.rand(rows, cols // 4, 1, generator=gen)
    return torch.rand(rows, cols // 4, 4, generator=gen).lt(share).view(rows, cols)


@pytest.mark.parametrize("cols", [16, 4])
@pytest.mark.parametrize("looked_up", [True, False])
@pytest.mark.parametrize(("pattern", "num_columns"), [("2:4", 4), ("3:4", 4), ("4:2:4", 3), ("8:3:4", 3)])
def test_dead_entries_either_way(
    pattern: str, num_columns: int, looked_up: bool, cols: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows enough that the inverses of all sets are made beforehand; and the inverse of each row's own set."""
    if not looked_up:
        monkeypatch.setattr(sweep, "TABLE_SIZE", 0)
    weight, hessian = oracle.row_problem(16, cols)
    mask, parsed = thin_mask(16, cols), parse_pattern(pattern)
    assert (sweep._live_inverses(torch.eye(4)[None], parsed.n, 16) is not None) == looked_up
    sel = sweep_rows(weight, hessian, pattern, mask=mask, num_columns=num_columns, resolve=False)
    more: dict[str, Any] = {"v": parsed.v, "num_columns": num_columns} if isinstance(parsed, VNMPattern) else {}
    wanted = oracle.sweep_groups(weight, hessian, parsed.n, parsed.m, mask=mask, **more)
    assert np.array_equal(sel.mask.numpy(), wanted.kept)
    np.testing.assert_allclose(numpy(sel.weight), wanted.weight, rtol=UPDATE_F64, atol=UPDATE_F64)
    np.testing.assert_allclose(numpy(sel.saliency), wanted.loss, rtol=SALIENCY_F64, atol=1e-12)
    assert not bool(torch.signbit(sel.weight[~sel.mask]).any())


def test_a_ladder_of_panels_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = oracle.row_problem(256, 32)
    found = []
    for size in (sweep.TABLE_SIZE, 0):
        monkeypatch.setattr(sweep, "TABLE_SIZE", size)
        mask, now, stages = None, weight, []
        for text in ("64:5:8", "64:4:8", "64:3:8", "64:2:8"):
            pattern = parse_pattern(text)
            assert isinstance(pattern, VNMPattern)
            sel = sweep_rows(now, hessian, pattern, mask=mask, num_columns=pattern.num_columns)
            assert sel.weight is not None and pattern.count_violations(sel.mask) == 0
            mask, now = sel.mask, sel.weight
            stages.append(sel)
        found.append(stages)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one.mask, two.mask) and torch.equal(one.columns, two.columns)
        torch.testing.assert_close(one.weight, two.weight, rtol=UPDATE_F64, atol=UPDATE_F64)


@pytest.mark.parametrize("looked_up", [True, False])
def test_a_singular_kept_set_is_named(looked_up: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first group that keeps one, though values are looked at only at the end of a block of columns."""
    monkeypatch.setattr(sweep, "TABLE_SIZE", 8 if looked_up else 0)
    invert = sweep.invert_spd

    def no_large(matrices: Tensor, *, damp: Tensor) -> tuple[Tensor, Tensor]:
        inverse, info = invert(matrices, damp=damp)
        return inverse, torch.where((matrices > 1.5).any(1).any(1), 2, info).to(torch.int32)

    monkeypatch.setattr(sweep, "invert_spd", no_large)
    hessian, mask = torch.eye(16), torch.ones(16, 16, dtype=torch.bool)
    mask[0, 0] = False
    sweep_rows(torch.ones(16, 16), hessian, "2:4", mask=mask)
    monkeypatch.setattr(sweep, "diagonal_groups", bad_groups(sweep.diagonal_groups))
    with pytest.raises(SingularBlockError, match=r"hessian in columns 8 to 11: 16 of 16 blocks .* block 0 at pivot 2"):
        sweep_rows(torch.ones(16, 16), hessian, "2:4", mask=mask)


def bad_groups(diagonal_groups: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    def made(factor: Tensor, m: int) -> tuple[Tensor, ...]:
        own, curvature, unit = diagonal_groups(factor, m)
        curvature[2:] *= 2.0
        return own, curvature, unit

    return made


class Reads(TorchDispatchMode):
    """Counts what waits for a GPU: values read by the host, and tensors made from its values."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.lift_fresh):
            self.names[str(func)] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("pattern", ["4:8", "8:4:8", "8:2:8"])
@pytest.mark.parametrize("masked", [False, True])
def test_no_group_waits_for_the_host(pattern: str, masked: bool) -> None:
    counts = []
    for cols in (32, 32, 128):  # the first run makes the tables
        weight, hessian = oracle.row_problem(16, cols, torch.float32)
        mask = (torch.arange(cols) % 8 < 7).expand(16, cols).clone() if masked else None
        given: dict[str, Any] = {"row_scale": None, "damp": torch.zeros(1), "method": "combinatorial", "mask": mask}
        with Reads() as reads:
            reference_sweep(weight, hessian, pattern, num_columns=6, resolve=False, **given)
        counts.append(sum(reads.names.values()))
    assert 0 < counts[1] == counts[2] < 12


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("2:16", None), ("7:8", None), ("64:2:16", None), ("64:5:8", None), ("256:4:8", None), ("128:3:8", None),
        ("9:16", "it takes m <= 16 with n <= 2, and m <= 8 with any n, got 9:16"), ("64:3:9", "m <= 8 with any n"),
        ("2:2:17", "m <= 16 with n <= 2"), ("257:4:8", "at most 256 rows"), ("257:2:8", "at most 256 rows"),
    ],
)  # fmt: skip
def test_what_the_kernel_takes(pattern: str, reason: str | None) -> None:
    weight, hessian = oracle.row_problem(2, 16, torch.float32)
    found = dispatch.LIMITS["sweep_rows", "cuda"](weight, hessian, None, parse_pattern(pattern), "combinatorial")
    assert found is None if reason is None else found is not None and reason in found


def test_gains_of_a_tree_are_those_of_each_set() -> None:
    gen = torch.Generator().manual_seed(2)
    factor, linear = torch.randn(5, 7, 14, generator=gen, dtype=F64), torch.randn(5, 7, generator=gen, dtype=F64)
    curvature = factor @ factor.mT
    groups = Groups(curvature, linear, linear, torch.ones(5, 7, dtype=torch.bool), linear.new_ones(5))
    for n in range(1, 7):
        sets = kept_sets(n, 7)
        own = curvature[:, sets[:, :, None], sets[:, None]]
        u = linear[:, sets]
        wanted = (u * torch.linalg.solve(own, u[..., None])[..., 0]).sum(-1)
        torch.testing.assert_close(gain_table(groups, n), wanted, rtol=1e-10, atol=1e-12)
