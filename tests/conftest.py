# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures: seeds, NaN-filled allocations inside the package, and the rule for tests that need a GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

settings.register_profile(
    "obs_kernels",
    derandomize=True,  # the same examples on every machine: a red test stays red
    database=None,
    deadline=None,
    max_examples=40,
    # the fixtures below hold no state between examples
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("obs_kernels")
KEPT_BYTES = 1 << 30


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # the tensors are small, and waiting threads of a busy machine cost more than they give


def pytest_runtest_setup(item: pytest.Item) -> None:
    needed = 2 if item.get_closest_marker("multigpu") else 1 if item.get_closest_marker("gpu") else 0
    if not needed:
        return
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found >= needed:
        return
    reason = f"needs {needed} CUDA device{'s' if needed > 1 else ''}, found {found}"
    if os.environ.get("OBS_KERNELS_REQUIRE_GPU") == "1":
        pytest.fail(f"OBS_KERNELS_REQUIRE_GPU=1: {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Memory that torch keeps for later is what other test processes on the same GPU lack."""
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > KEPT_BYTES:
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same global random state; tests draw from ``gen`` or a seed of their own."""
    torch.manual_seed(0)


@pytest.fixture
def gen() -> torch.Generator:
    return torch.Generator().manual_seed(20240)


def fill_with_garbage(tensor: Tensor) -> Tensor:
    """NaN, True or the largest integer, so that an output entry which nobody writes cannot pass for a right one."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)


@pytest.fixture(autouse=True)
def nan_filled_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``torch.empty``, ``empty_like``, ``new_empty`` called from inside ``obs_kernels`` return garbage, not zeros."""

    def filled(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: object, **kwargs: object) -> Tensor:
            tensor = original(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            return fill_with_garbage(tensor) if caller.split(".")[0] == "obs_kernels" else tensor

        return call

    monkeypatch.setattr(torch, "empty", filled(torch.empty))
    monkeypatch.setattr(torch, "empty_like", filled(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))
    yield


@pytest.fixture
def traceable(nan_filled_empty: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that compile: nothing compiled before, and no garbage in new memory, as dynamo does not trace a patched
    ``torch.empty``.
    """
    monkeypatch.undo()
    torch.compiler.reset()


@pytest.fixture
def graph_break(traceable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo gives up inside of each product, whose frames it then meets one by one."""
    from obs_kernels.ops import SparseWeight

    columns = SparseWeight.columns_or_empty

    def broken(weight: SparseWeight) -> Tensor:
        torch._dynamo.graph_break()
        return columns(weight)

    monkeypatch.setattr(SparseWeight, "columns_or_empty", broken)
