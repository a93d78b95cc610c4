# SPDX-License-Identifier: Apache-2.0
"""Whole pruning steps of ``OBSPruner`` on a GPU: the kernels against the reference on the same gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import obs_kernels as obs

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
CONFIGS = {
    "2:4": {},
    "2:8": {"fisher_block_size": 32},
    "2:16": {},
    "4:8": {},
    "64:2:8": {},
    "64:2:16": {"fisher_block_size": 64},
    "unstructured:0.75": {},
    "block8:0.75": {},
}


def pruned(pattern: str, dtype: torch.dtype, **options: object) -> tuple[obs.OBSPruner, obs.PruningReport, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(192, 256), nn.GELU(), nn.Linear(256, 192)).to(DEVICE, dtype)
    batches = [torch.randn(16, 192, device=DEVICE, dtype=dtype) for _ in range(4)]

    def loss_fn(module: nn.Module, batch: Tensor) -> Tensor:
        return (module(batch).float() - batch.flip(1).float()).square().sum(1)

    pruner = obs.OBSPruner(model, obs.OBSConfig(pattern=pattern, num_grads=64, **{"curvature": "block"} | options))
    pruner.collect(batches, loss_fn)
    return pruner, pruner.prune(), model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", CONFIGS)
def test_a_step_is_that_of_the_reference(pattern: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Near-ties may fall either way, so the losses are compared, and nearly all of the mask."""
    pruner, report, model = pruned(pattern, dtype, **CONFIGS[pattern])
    assert pruner.verify() == 0
    monkeypatch.setenv("OBS_KERNELS_BACKEND", "reference")
    _, wanted, other = pruned(pattern, dtype, **CONFIGS[pattern])
    for mine, theirs in zip(report.layers, wanted.layers, strict=True):
        assert mine.saliency == pytest.approx(theirs.saliency, rel=1e-2)
        assert mine.damp == pytest.approx(theirs.damp, rel=1e-3)
    for (name, weight), (_, expected) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        if weight.dim() == 2:
            same = ((weight != 0) == (expected != 0)).float().mean()
            assert same > 0.98, f"{name}: {same:.4f} of the mask is that of the reference"


@pytest.mark.parametrize("pattern", ["2:8", "64:2:8"])
def test_blocks_that_need_more_damping_get_it(pattern: str) -> None:
    """A damping far below the rounding of a Fisher of few gradients: some blocks do not factorise at first."""
    pruner, report, _ = pruned(pattern, torch.float32, damp=1e-30, on_singular="increase_damp")
    assert pruner.verify() == 0 and all(layer.saliency >= 0 for layer in report.layers)
