# SPDX-License-Identifier: Apache-2.0
"""What ``cuda_calls`` builds from its launches for the update: parts, tails, errors. The launches are played by torch.

The kernels have tests of their own (``test_update_on_cpu.py``, ``test_quadratic_on_cpu.py``, ``gpu/``).
"""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import oracle
import pytest
import torch
from torch import Tensor

from obs_kernels import _ext, reference
from obs_kernels.cuda_calls import update as cuda_calls
from obs_kernels.cuda_calls import update_launches
from obs_kernels.errors import ConfigError, NonFiniteError, ObsKernelsError, SingularBlockError
from obs_kernels.ops import dispatch

SIZES = [((5, 7), 6), ((4, 16), 8), ((2, 3), 50), ((37,), 5), ((1, 9), 8), ((4, 5), 1)]


def padded(values: Tensor, fisher: Tensor) -> Tensor:
    """[B, D], with zeros beyond the end."""
    out = values.new_zeros(fisher.shape[0] * fisher.shape[1])
    out[: values.numel()] = values.reshape(-1)
    return out.view(fisher.shape[:2])


def play_invert(matrices: Tensor, damp: Tensor, inverse: Tensor, info: Tensor) -> None:
    assert all(t.is_contiguous() for t in (matrices, damp, inverse, info))
    assert damp.numel() in (1, len(matrices)) and inverse.shape == matrices.shape and info.shape == (len(matrices),)
    made, codes = reference.invert_spd(matrices, damp=damp)
    inverse.copy_(made)
    info.copy_(codes)


def play_joint(weight: Tensor, fisher: Tensor, mask: Tensor, damp: Tensor, updated: Tensor, info: Tensor) -> None:
    w, keep = padded(weight, fisher).float(), padded(mask, fisher)
    f = fisher + damp.reshape(-1, 1, 1) * torch.eye(fisher.shape[1])
    new = w.masked_fill(~keep, 0.0)
    for b in range(len(fisher)):
        k, p = keep[b].nonzero().flatten(), (~keep[b]).nonzero().flatten()
        if not bool(torch.isfinite(f[b]).all() & torch.isfinite(w[b]).all() & (damp >= 0).all()):
            info[b] = -1
            continue
        info[b] = torch.linalg.cholesky_ex(f[b][k][:, k])[1] if len(k) else 0
        if len(k) and not info[b]:
            new[b, k] += torch.linalg.solve(f[b][k][:, k], f[b][k][:, p] @ w[b, p])
    updated.copy_(new.view(-1)[: weight.numel()].view_as(weight))


def play_single(weight: Tensor, inverse: Tensor, mask: Tensor, updated: Tensor) -> None:
    assert weight.is_contiguous() and inverse.is_contiguous() and -(-weight.numel() // inverse.shape[1]) == len(inverse)
    w, keep = padded(weight, inverse).float(), padded(mask, inverse)
    shares = (w / inverse.diagonal(dim1=1, dim2=2)).masked_fill(keep, 0.0)
    new = (w - (inverse @ shares[:, :, None])[:, :, 0]).masked_fill(~keep, 0.0)
    updated.copy_(new.view(-1)[: weight.numel()].view_as(weight))


def play_loss(change: Tensor, fisher: Tensor, damp: Tensor, loss: Tensor) -> None:
    assert change.is_contiguous() and fisher.is_contiguous() and -(-change.numel() // fisher.shape[1]) == len(fisher)
    loss.copy_(reference.loss_increase(change, fisher, damp=damp))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``cuda_calls`` on CPU tensors, in parts of two blocks of eight."""
    for name, play in [
        ("launch_invert_spd", play_invert),
        ("launch_update_joint", play_joint),
        ("launch_update_single", play_single),
        ("launch_loss_increase", play_loss),
    ]:
        monkeypatch.setattr(cuda_calls, name, play)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(cuda_calls, "SCRATCH_BYTES", 2 * 4 * 8 * 8)
    return cuda_calls


def problem(gen: torch.Generator, shape: tuple[int, ...], size: int) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.randn(shape, generator=gen)
    fisher = oracle.random_spd(gen, -(-weight.numel() // size), size).float()
    return weight, fisher, torch.rand(shape, generator=gen) < 0.5


@pytest.mark.parametrize("update", ["joint", "single", "none"])
@pytest.mark.parametrize(("shape", "size"), SIZES)
def test_update_is_the_reference(
    calls: ModuleType, gen: torch.Generator, shape: tuple[int, ...], size: int, update: str
) -> None:
    weight, fisher, mask = problem(gen, shape, size)
    for damp in (torch.tensor([0.1]), torch.linspace(0.1, 1.0, len(fisher))):
        for dtype in (torch.float32, torch.bfloat16):
            w = weight.to(dtype)
            new = calls.obs_update(w, fisher, mask, damp=damp, update=update)
            wanted = reference.obs_update(w, fisher, mask, damp=damp, update=update)
            rounding = {} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-7}
            torch.testing.assert_close(new, wanted, **rounding)
            assert new.is_contiguous() and not new[~mask].any()


def test_update_of_strided_arguments(calls: ModuleType, gen: torch.Generator) -> None:
    weight, fisher, mask = torch.randn(16, 4, generator=gen).T, *problem(gen, (4, 16), 8)[1:]
    wide = fisher.repeat_interleave(2, 0)[::2]
    for update in ("joint", "single", "none"):
        new = calls.obs_update(weight, wide, mask.T.contiguous().T, damp=torch.tensor([0.1]), update=update)
        assert new.is_contiguous()
        torch.testing.assert_close(
            new, reference.obs_update(weight, fisher, mask, damp=torch.tensor([0.1]), update=update).contiguous()
        )


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize(
    ("shape", "size", "block"),
    [
        ((4, 16), 8, 1),
        ((4, 16), 8, 2),
        ((4, 16), 8, 4),
        ((4, 16), 8, 8),
        ((5, 7), 6, 1),
        ((7, 4), 8, 4),
        ((3, 2), 4, 2),
    ],
)
def test_saliency_is_the_reference(
    calls: ModuleType, gen: torch.Generator, shape: tuple[int, ...], size: int, block: int, with_mask: bool
) -> None:
    weight, fisher, mask = problem(gen, shape, size)
    arguments = {"method": "combinatorial", "mask": mask if with_mask else None}
    for damp in (torch.tensor([0.1]), torch.linspace(0.1, 1.0, len(fisher))):
        for w in (weight, weight.half()):
            scores = calls.block_saliency(w, fisher, block, damp=damp, **arguments)
            wanted = reference.block_saliency(w, fisher, block, damp=damp, **arguments)
            torch.testing.assert_close(scores, wanted, rtol=1e-4, atol=1e-6)


def test_empty(calls: ModuleType) -> None:
    weight, fisher, mask = torch.zeros(0, 8), torch.zeros(0, 8, 8), torch.zeros(0, 8, dtype=torch.bool)
    damp = torch.tensor([0.1])
    for update in ("joint", "single", "none"):
        assert calls.obs_update(weight, fisher, mask, damp=damp, update=update).shape == (0, 8)
    assert calls.loss_increase(weight, fisher, damp=damp).shape == (0,)
    assert calls.block_saliency(weight, fisher, 4, damp=damp, method="combinatorial", mask=None).shape == (0,)


def spoil(kind: str, weight: Tensor, fisher: Tensor, damp: Tensor) -> type[Exception]:
    match kind:
        case "nan weight":
            weight[1, 2] = float("nan")
        case "inf weight":
            weight[0, 0] = float("inf")
        case "nan fisher":
            fisher[3, 1, 2] = float("nan")
        case "minus inf fisher":
            fisher[7, 7, 7] = -float("inf")
        case "all":
            weight[1, 2] = fisher[3, 1, 2] = damp[0] = float("nan")
        case "nan damp":
            damp[1] = float("nan")
        case "negative damp":
            damp[2] = -0.5
        case "singular":
            fisher[2], fisher[5], damp[:] = 0.0, 0.0, 0.0
    if kind == "singular":
        return SingularBlockError
    return ConfigError if "damp" in kind else NonFiniteError


@pytest.mark.parametrize("op", ["joint", "single", "saliency 1", "saliency 4"])
@pytest.mark.parametrize(
    "kind",
    ["nan weight", "inf weight", "nan fisher", "minus inf fisher", "all", "nan damp", "negative damp", "singular"],
)
def test_refuses_what_the_reference_refuses(calls: ModuleType, gen: torch.Generator, kind: str, op: str) -> None:
    """With its error and its text; first the weight, then the Fisher blocks, then the damping."""
    weight, fisher, mask = problem(gen, (4, 16), 8)
    damp = torch.full((8,), 0.1)
    wanted = spoil(kind, weight, fisher, damp)
    texts = []
    for module in (reference, calls):
        with pytest.raises(ObsKernelsError) as caught:
            if op.startswith("saliency"):
                block = int(op[-1])
                module.block_saliency(weight, fisher, block, damp=damp, method="combinatorial", mask=None)
            else:
                module.obs_update(weight, fisher, mask, damp=damp, update=op)
        assert isinstance(caught.value, wanted)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


def test_none_refuses_only_weights(calls: ModuleType, gen: torch.Generator) -> None:
    weight, fisher, mask = problem(gen, (4, 16), 8)
    fisher[0, 0, 0] = float("nan")
    calls.obs_update(weight, fisher, mask, damp=torch.tensor([0.1]), update="none")
    weight[0, 0] = float("nan")
    for given in (fisher, None):
        with pytest.raises(NonFiniteError, match="weight must be finite"):
            calls.obs_update(weight, given, mask, damp=torch.tensor([0.1]), update="none")


def test_an_overflow_hides_no_pivot(calls: ModuleType, gen: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where sums overflow the kernel reports -1 - pivot, and the arguments are finite: only the pivot counts."""
    weight, fisher, mask = problem(gen, (4, 16), 8)
    codes = torch.tensor([0, -1, 0, -4, 0, 0, 2, 0], dtype=torch.int32)
    monkeypatch.setattr(cuda_calls, "launch_update_joint", lambda *a: (a[4].copy_(a[0]), a[5].copy_(codes)))
    with pytest.raises(SingularBlockError, match=r"2 of 8 blocks .* first is block 3 at pivot 3"):
        calls.obs_update(weight, fisher, mask, damp=torch.tensor([0.1]), update="joint")
    codes[3] = codes[6] = 0
    calls.obs_update(weight, fisher, mask, damp=torch.tensor([0.1]), update="joint")


def test_nothing_is_looked_at_during_a_capture(
    calls: ModuleType, gen: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, fisher, mask = problem(gen, (4, 16), 8)
    fisher[2] = 0.0
    damp = torch.zeros(8)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: pytest.fail("a value was read"))
    for update in ("joint", "single"):
        monkeypatch.setattr(cuda_calls, "launch_update_joint", lambda *a: (a[4].zero_(), a[5].zero_()))
        monkeypatch.setattr(cuda_calls, "launch_invert_spd", lambda *a: None)
        monkeypatch.setattr(cuda_calls, "launch_update_single", lambda *a: None)
        monkeypatch.setattr(cuda_calls, "launch_loss_increase", lambda *a: None)
        calls.obs_update(weight, fisher, mask, damp=damp, update=update)
    calls.loss_increase(weight, fisher, damp=damp)
    for block in (1, 4):
        calls.block_saliency(weight, fisher, block, damp=damp, method="combinatorial", mask=mask)


# the dispatch table and the module


@pytest.mark.parametrize("op", ["obs_update", "loss_increase", "block_saliency"])
def test_limits(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ext, "reason", lambda: None)
    weight, fisher = torch.zeros(4, 16), torch.zeros(8, 8, 8)
    for w in (weight, weight.half(), weight.bfloat16()):
        assert dispatch.unavailable(op, "cuda", "cuda", w, fisher) is None
    assert "float64" in str(dispatch.unavailable(op, "cuda", "cuda", weight.double(), fisher))
    assert "float64" in str(dispatch.unavailable(op, "cuda", "cuda", weight, fisher.double()))
    wide = torch.zeros(1, 130, 130)
    assert "at most 128, got 130" in str(dispatch.unavailable(op, "cuda", "cuda", weight, wide))
    if op == "obs_update":
        assert dispatch.unavailable(op, "cuda", "cuda", weight, None) is None
    if op == "block_saliency":
        for method in ("diagonal", "magnitude"):
            reason = str(dispatch.unavailable(op, "cuda", "cuda", weight, fisher, method))
            assert f"got '{method}'" in reason
        with pytest.raises(ConfigError, match="must be 'combinatorial' on the cuda backend"):
            cuda_calls.block_saliency(weight, fisher, 1, damp=torch.zeros(1), method="diagonal", mask=None)


GOOD = {"num_weights": 30, "num_blocks": 4, "size": 8, "type": 0, "device": 0, "stream": 0}
ADDRESSES = {
    "update_joint": {"weight": 64, "mask": 64, "fisher": 64, "damp": 64, "damp_each": False, "updated": 64, "info": 64},
    "update_single": {"weight": 64, "mask": 64, "inverse": 64, "updated": 64},
    "loss_increase": {"change": 64, "fisher": 64, "damp": 64, "damp_each": False, "loss": 64},
}


@pytest.mark.parametrize("op", ADDRESSES)
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"size": 0}, "size must be 1 to 128, got 0"),
        ({"size": 129}, "size must be 1 to 128, got 129"),
        ({"num_blocks": -1}, "num_blocks must be 0 to 2^31 - 1"),
        ({"num_blocks": 2**31}, "num_blocks must be 0 to 2^31 - 1"),
        ({"num_weights": 33}, "num_blocks must be num_weights over size, rounded up, got 4 for 33"),
        ({"num_weights": 24}, "rounded up, got 4 for 24"),
        ({"type": 3}, "type must be 0 to 2, got 3"),
        ({"device": -1}, "device must be an index, got -1"),
    ],
)
def test_native_refuses_bad_sizes(op: str, change: dict[str, int], text: str) -> None:
    if _ext.reason() is not None:
        pytest.skip(f"no compiled module: {_ext.reason()}")
    native = _ext.load()
    assert native.MAX_UPDATE_SIZE == dispatch.MAX_UPDATE_SIZE
    with pytest.raises(ValueError, match=re.escape(text)):
        getattr(native, op)(**{**GOOD, **ADDRESSES[op], **change})
    empty = {name: 0 for name in ADDRESSES[op]}
    assert getattr(native, op)(**{**GOOD, **empty, "num_weights": 0, "num_blocks": 0})[1] == "empty"
    first = next(iter(ADDRESSES[op]))
    with pytest.raises(ValueError, match="must not be null"):
        getattr(native, op)(**{**GOOD, **ADDRESSES[op], first: 0})
    with pytest.raises(ValueError, match="aligned to their elements"):
        getattr(native, op)(**{**GOOD, **ADDRESSES[op], first: 65})


def test_types_of_the_weight() -> None:
    header = Path(__file__).parents[1] / "csrc" / "include" / "obs_kernels" / "update.h"
    assert "kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2" in header.read_text()
    assert list(update_launches.WEIGHT_TYPES.values()) == [0, 1, 2]
