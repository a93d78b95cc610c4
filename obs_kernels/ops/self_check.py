# SPDX-License-Identifier: Apache-2.0
"""Tiny runs of every op against brute force, for ``obs-kernels doctor``: does this installation compute right?

Brute force is written from the definitions (all subsets, dense float64 solves) and shares nothing with the backends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from obs_kernels.ops.dispatch import BACKENDS, TABLE, unavailable
from obs_kernels.ops.fisher import accumulate_fisher_, invert_spd
from obs_kernels.ops.hessian import accumulate_hessian_
from obs_kernels.ops.layout import feature_major
from obs_kernels.ops.matmul import sparse_linear
from obs_kernels.ops.packing import pack, unpack
from obs_kernels.ops.prune import Pruned, prune_nm, prune_vnm
from obs_kernels.ops.search import Selection, search_nm, search_vnm
from obs_kernels.ops.sweep import sweep_rows
from obs_kernels.ops.update import block_saliency, loss_increase, obs_update

_TOLERANCE = 1e-4
"""Relative; float32 against float64 on blocks of eight with a condition number below 100."""


@dataclass(frozen=True)
class CheckResult:
    """One op on one backend."""

    op: str
    backend: str
    device: str
    ok: bool
    detail: str
    """Largest relative error, or what went wrong."""
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def check_ops(device: torch.device | str = "cpu") -> list[CheckResult]:
    """Run every op on every backend that can run on ``device``; an exception is a failed result, never raised."""
    device = torch.device(device)
    results = []
    for op in TABLE:
        for backend in BACKENDS:
            if unavailable(op, backend, device.type) is None:
                results.append(_check(op, backend, device))
    return results


def backend_table(device_type: str) -> dict[str, dict[str, str | None]]:
    """{op: {backend: None if it can run on that kind of device, else the reason}}."""
    return {op: {backend: unavailable(op, backend, device_type) for backend in BACKENDS} for op in TABLE}


def default_backends(device_type: str) -> dict[str, str]:
    """{op: the backend that ``backend=None`` takes on that kind of device}."""
    return {op: next(b for b in row if unavailable(op, b, device_type) is None) for op, row in TABLE.items()}


def _check(op: str, backend: str, device: torch.device) -> CheckResult:
    start = time.perf_counter()
    try:
        if op not in _CHECKS:
            return CheckResult(op, backend, device.type, False, "no check is written for this op", 0.0)
        errors = _CHECKS[op](backend, device)
        ok = all(error <= _TOLERANCE for error in errors)  # not max(), which may pass over NaN
        detail = f"largest relative error {max(errors, key=lambda e: (e != e, e)):.1e}"
    except Exception as failure:  # a broken backend may fail in any way, and doctor shows which
        ok, detail = False, f"{type(failure).__name__}: {failure}"
    return CheckResult(op, backend, device.type, ok, detail, time.perf_counter() - start)


def _problem(device: torch.device, rows: int = 4, size: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight [rows, size] and Fisher [rows, size, size]: float64 on the CPU, then float32 on the device."""
    generator = torch.Generator().manual_seed(20240)
    weight = torch.randn(rows, size, generator=generator, dtype=torch.float64).float()
    factor = torch.randn(rows, size, 3 * size, generator=generator, dtype=torch.float64)
    fisher = (factor @ factor.mT / (3 * size) + 0.1 * torch.eye(size, dtype=torch.float64)).float()
    return weight.double(), fisher.double(), weight.to(device), fisher.to(device)


def _least_loss(weight: Tensor, fisher: Tensor, pruned: tuple[int, ...]) -> tuple[float, Tensor]:
    """Loss and new weight of one block when ``pruned`` go and the others move to the optimum."""
    kept = [i for i in range(len(weight)) if i not in pruned]
    gone = list(pruned)
    change = torch.zeros_like(weight)
    change[gone] = -weight[gone]
    if kept:
        change[kept] = torch.linalg.solve(fisher[kept][:, kept], fisher[kept][:, gone] @ weight[gone])
    new = weight + change
    new[gone] = 0.0
    return float(change @ fisher @ change / 2), new


def _row_losses(weight: Tensor, fisher: Tensor, kept_of: Sequence[tuple[int, ...]]) -> list[float]:
    size = range(len(weight))
    return [_least_loss(weight, fisher, tuple(i for i in size if i not in kept))[0] for kept in kept_of]


def _relative(found: Tensor, wanted: Tensor) -> float:
    difference = (found.detach().double().cpu() - wanted.double()).abs().max()
    return float(difference / wanted.double().abs().max().clamp_min(1e-30))


def _check_accumulate(backend: str, device: torch.device) -> list[float]:
    grads = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    wanted = torch.ones(3, 8, 8, dtype=torch.float64)
    for sample in grads.double().unflatten(1, (3, 8)):
        for block in range(3):
            wanted[block] += 0.5 * torch.outer(sample[block], sample[block])
    fisher = torch.ones(3, 8, 8, device=device)
    accumulate_fisher_(fisher, grads.to(device), scale=0.5, backend=backend)
    return [_relative(fisher, wanted)]


def _check_accumulate_hessian(backend: str, device: torch.device) -> list[float]:
    x, weights = torch.randn(5, 8, generator=torch.Generator().manual_seed(1)), torch.arange(1.0, 6.0)
    x = x.bfloat16() if backend == "triton" else x
    wanted = torch.ones(8, 8, dtype=torch.float64)
    for token, weight in zip(x.double(), weights.double(), strict=True):
        wanted += 0.5 * weight * torch.outer(token, token)
    hessian = torch.ones(8, 8, device=device)
    accumulate_hessian_(hessian, x.to(device), token_weight=weights.to(device), scale=0.5, backend=backend)
    return [_relative(hessian, wanted)]


def _check_inverse(backend: str, device: torch.device) -> list[float]:
    _, fisher, _, given = _problem(device)
    inverse, info = invert_spd(given, damp=0.01, backend=backend)
    eye = torch.eye(8, dtype=torch.float64)
    return [_relative((fisher + 0.01 * eye) @ inverse.double().cpu(), eye.expand(4, 8, 8)), float(info.any())]


def _check_search_nm(backend: str, device: torch.device) -> list[float]:
    weight, fisher, given, blocks = _problem(device)
    return _group_errors(search_nm(given, blocks, "2:8", backend=backend), weight, fisher)


def _group_errors(found: Selection | Pruned, weight: Tensor, fisher: Tensor) -> list[float]:
    subsets = list(combinations(range(8), 2))
    errors = []
    for row in range(4):
        losses = _row_losses(weight[row], fisher[row], subsets)
        mine = tuple(found.mask[row].nonzero().flatten().tolist())
        errors += [losses[subsets.index(mine)] / min(losses) - 1, abs(float(found.saliency[row, 0]) / min(losses) - 1)]
    return errors


def _check_search_vnm(backend: str, device: torch.device) -> list[float]:
    weight, fisher, given, blocks = _problem(device)
    return _panel_errors(search_vnm(given, blocks, "4:2:8", backend=backend), weight, fisher)


def _panel_errors(found: Selection | Pruned, weight: Tensor, fisher: Tensor) -> list[float]:
    pairs = list(combinations(range(8), 2))
    losses = [dict(zip(pairs, _row_losses(weight[r], fisher[r], pairs), strict=True)) for r in range(4)]
    best = min(
        sum(min(row[pair] for pair in combinations(columns, 2)) for row in losses)
        for columns in combinations(range(8), 4)
    )
    chosen = [tuple(row.nonzero().flatten().tolist()) for row in found.mask.cpu()]
    if found.columns is None or not set().union(*chosen) <= set(found.columns.flatten().tolist()):
        return [float("inf")]
    mine = sum(losses[r][pair] for r, pair in enumerate(chosen))
    return [mine / best - 1, abs(float(found.saliency[0, 0]) / best - 1)]


def _check_prune_nm(backend: str, device: torch.device) -> list[float]:
    weight, fisher, given, blocks = _problem(device)
    found = prune_nm(given, blocks, "2:8", backend=backend)
    return _group_errors(found, weight, fisher) + _weight_errors(found, weight, fisher)


def _check_prune_vnm(backend: str, device: torch.device) -> list[float]:
    weight, fisher, given, blocks = _problem(device)
    found = prune_vnm(given, blocks, "4:2:8", backend=backend)
    return _panel_errors(found, weight, fisher) + _weight_errors(found, weight, fisher)


def _check_sweep(backend: str, device: torch.device) -> list[float]:
    """One group and one panel as wide as the row: the choice of a row is then that of a block, all of one F."""
    weight, fisher, given, blocks = _problem(device)
    shared = fisher[:1].expand_as(fisher)
    rows = sweep_rows(given, blocks[0], "2:8", backend=backend)
    panels = sweep_rows(given, blocks[0], "4:2:8", backend=backend)
    errors = _group_errors(rows, weight, shared) + _panel_errors(panels, weight, shared)
    return [*errors, _weight_error(rows, weight, shared), _weight_error(panels, weight, shared)]


def _weight_errors(found: Pruned, weight: Tensor, fisher: Tensor) -> list[float]:
    return [_weight_error(found, weight, fisher), float(found.info.any())]


def _weight_error(found: Selection | Pruned, weight: Tensor, fisher: Tensor) -> float:
    gone = [tuple((~row).nonzero().flatten().tolist()) for row in found.mask.cpu()]
    wanted = torch.stack([_least_loss(w, f, p)[1] for w, f, p in zip(weight, fisher, gone, strict=True)])
    return float("inf") if found.weight is None else _relative(found.weight, wanted)


def _check_update(backend: str, device: torch.device) -> list[float]:
    weight, fisher, given, blocks = _problem(device)
    mask = torch.arange(8).remainder(3).ne(1).expand(4, 8)
    wanted = torch.stack([_least_loss(weight[r], fisher[r], (1, 4, 7))[1] for r in range(4)])
    found = obs_update(given, blocks, mask.to(device), backend=backend)
    return [_relative(found, wanted), float(found.cpu()[~mask].abs().max())]


def _check_block_saliency(backend: str, device: torch.device) -> list[float]:
    weight, fisher, given, blocks = _problem(device)
    wanted = [_least_loss(weight[r], fisher[r], (2 * i, 2 * i + 1))[0] for r in range(4) for i in range(4)]
    found = block_saliency(given, blocks, 2, backend=backend)
    return [_relative(found, torch.tensor(wanted, dtype=torch.float64))]


def _check_loss_increase(backend: str, device: torch.device) -> list[float]:
    change, fisher, given, blocks = _problem(device)
    wanted = torch.stack([c @ f @ c / 2 for c, f in zip(change, fisher, strict=True)])
    return [_relative(loss_increase(given, blocks, backend=backend), wanted)]


def _check_pack(backend: str, device: torch.device) -> list[float]:
    weight = torch.tensor([[0.0, 1.0, 0.0, 2.0, 3.0, 0.0, 0.0, 4.0]], device=device)
    packed = pack(weight, weight != 0, "2:4", backend=backend)
    # places 1, 3 and 0, 3, two bits each, lowest first
    return [
        _relative(packed.values, torch.tensor([[1.0, 2.0, 3.0, 4.0]])),
        _relative(packed.codes, torch.tensor([[1 | 3 << 2 | 0 << 4 | 3 << 6]])),
    ]


def _pruned(device: torch.device, pattern: str) -> Tensor:
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(2))
    kept = torch.arange(32) % 8 < 2 if pattern != "2:4" else torch.arange(32) % 4 > 1
    return (weight * kept).to(device)


def _check_unpack(backend: str, device: torch.device) -> list[float]:
    errors = []
    for pattern in ("2:4", "2:8", "16:2:8"):
        weight = _pruned(device, pattern)
        errors.append(_relative(unpack(pack(weight, weight != 0, pattern), backend=backend), weight.cpu()))
    return errors


def _check_sparse_linear(backend: str, device: torch.device) -> list[float]:
    errors = []
    dtype = torch.bfloat16 if backend == "cuda" else torch.float32  # small integers: exact in both
    x = torch.randint(-3, 4, (5, 32), generator=torch.Generator().manual_seed(3)).to(dtype)
    for pattern in ("2:4", "2:8", "16:2:8"):
        weight = _pruned(device, pattern).round().to(dtype)
        found = sparse_linear(x.to(device), pack(weight, weight != 0, pattern), backend=backend)
        errors.append(_relative(found, x.double() @ weight.cpu().double().T))
    return errors


def _check_feature_major(backend: str, device: torch.device) -> list[float]:
    errors = []
    for shape in ((16, 24), (2, 8, 40), (3, 5)):  # by the kernel, and by torch where it takes no such shape
        x = torch.randn(shape, generator=torch.Generator().manual_seed(4)).bfloat16()
        found = feature_major(x.to(device), backend=backend)
        lies = found.movedim(-1, 0).is_contiguous()
        errors.append(_relative(found, x.double()) if lies else float("inf"))
    return errors


_CHECKS: dict[str, Callable[[str, torch.device], list[float]]] = {
    "accumulate_fisher_": _check_accumulate,
    "accumulate_hessian_": _check_accumulate_hessian,
    "invert_spd": _check_inverse,
    "search_nm": _check_search_nm,
    "search_vnm": _check_search_vnm,
    "prune_nm": _check_prune_nm,
    "prune_vnm": _check_prune_vnm,
    "sweep_rows": _check_sweep,
    "obs_update": _check_update,
    "block_saliency": _check_block_saliency,
    "loss_increase": _check_loss_increase,
    "pack": _check_pack,
    "unpack": _check_unpack,
    "sparse_linear": _check_sparse_linear,
    "feature_major": _check_feature_major,
}
