# SPDX-License-Identifier: Apache-2.0
"""Which backend runs an op: one table, no silent fallback.

``backend=None`` takes the first entry of the op's row that can run on the tensor at hand and logs the choice once; a
named backend that cannot run raises with the reason. ``OBS_KERNELS_BACKEND`` names one for the whole process.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from importlib import import_module
from importlib.util import find_spec
from shutil import which
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._C._dynamo import eval_frame

from obs_kernels import _ext
from obs_kernels.errors import BackendUnavailableError, ConfigError
from obs_kernels.packed_format import runs_as_two_of_four
from obs_kernels.patterns import NMPattern, Pattern, VNMPattern

Function = TypeVar("Function", bound=Callable[..., Any])
BACKENDS = ("reference", "triton", "cuda")
MODULES = {
    "reference": "obs_kernels.reference",
    "triton": "obs_kernels.triton_kernels",
    "cuda": "obs_kernels.cuda_calls",
}
TRITON_CAPABILITY = (8, 0)
"""Oldest GPU of the Triton kernels: bf16 and tf32 products came with it."""
MAX_INVERT_SIZE = 128
"""Widest block of the cuda kernel of ``invert_spd``."""
MAX_ACCUMULATE_SIZE = 128
"""Widest block of the cuda kernel of ``accumulate_fisher_``."""
MAX_SEARCH_SIZE = 32
"""Largest m of the cuda kernels of the search."""
MAX_SETS_SIZE = 16
"""Largest m of the same for panels of n > 2."""
EXACT_SEARCH_METHODS = ("combinatorial", "pairwise")
"""What the cuda kernels of the search choose by, exact in its model; "greedy" too where there are no panels."""
MAX_SWEEP_SIZE = 16
"""Largest m of the cuda kernels of ``sweep_rows`` for n <= 2."""
MAX_SWEEP_SETS_SIZE = 8
"""Largest m of the same for n > 2."""
MAX_SWEEP_ROWS = 256
"""Tallest panel of the same."""
MAX_UPDATE_SIZE = 128
"""Widest block of the cuda kernels of ``obs_update``, ``loss_increase`` and ``block_saliency``."""

TABLE: dict[str, tuple[str, ...]] = {
    "accumulate_fisher_": ("cuda", "triton", "reference"),
    "invert_spd": ("cuda", "reference"),
    "search_nm": ("cuda", "reference"),
    "search_vnm": ("cuda", "reference"),
    "prune_nm": ("cuda", "reference"),
    "prune_vnm": ("cuda", "reference"),
    "obs_update": ("cuda", "reference"),
    "block_saliency": ("cuda", "reference"),
    "loss_increase": ("cuda", "reference"),
    "accumulate_hessian_": ("triton", "reference"),
    "sweep_rows": ("cuda", "reference"),
    "pack": ("cuda", "reference"),
    "unpack": ("reference",),
    "sparse_linear": ("cuda", "reference"),
    "feature_major": ("cuda", "reference"),
}
"""Backends of each op in the order of preference."""
STEPS = {"sweep_rows": ("sweep_rows_by", "sweep_groups")}
"""Ops that are a function of the reference around a step; a backend has the step only."""
INNER_STEPS = {"conjugate_gradients": "triton"}
"""Steps of functions of the reference that callers name no backend for, and which other backend has them."""


def _accumulate_limit(fisher: Tensor, grads: Tensor) -> str | None:
    if fisher.dtype != torch.float32 or grads.dtype == torch.float64:
        return f"it takes a float32 fisher and grads of at most 32 bits, got {fisher.dtype} and {grads.dtype}"
    return None


def _cuda_accumulate_limit(fisher: Tensor, grads: Tensor) -> str | None:
    if fisher.shape[-1] > MAX_ACCUMULATE_SIZE:
        return f"it takes blocks of at most {MAX_ACCUMULATE_SIZE}, got blocks of {fisher.shape[-1]}"
    return _accumulate_limit(fisher, grads)


def _hessian_limit(x: Tensor, hessian: Tensor | None = None) -> str | None:
    if x.dtype != torch.bfloat16 or (hessian is not None and hessian.dtype != torch.float32):
        kind = "" if hessian is None else f" and a {hessian.dtype} hessian"
        return f"it takes bfloat16 inputs and a float32 hessian, got {x.dtype}{kind}"  # f16, f32 need over two halves
    return None


def _invert_limit(matrices: Tensor) -> str | None:
    if matrices.dtype != torch.float32 or matrices.shape[-1] > MAX_INVERT_SIZE:
        return (
            f"it takes float32 blocks of at most {MAX_INVERT_SIZE}, got {matrices.dtype} blocks of {matrices.shape[-1]}"
        )
    return None


def _search_limit(weight: Tensor, fisher: Tensor | None, pattern: NMPattern, method: str) -> str | None:
    panels = isinstance(pattern, VNMPattern)
    methods = EXACT_SEARCH_METHODS if panels else (*EXACT_SEARCH_METHODS, "greedy")
    if method not in methods or fisher is None:
        return f"it searches {pattern} by method={' or '.join(map(repr, methods))} only, got {method!r}"
    if fisher.dtype != torch.float32 or weight.dtype == torch.float64:
        return f"it takes a float32 fisher and a weight of at most 32 bits, got {fisher.dtype} and {weight.dtype}"
    if pattern.m > (MAX_SETS_SIZE if panels and pattern.n > 2 else MAX_SEARCH_SIZE):
        return f"it takes m <= {MAX_SEARCH_SIZE}, and m <= {MAX_SETS_SIZE} for panels of n > 2, got {pattern}"
    if fisher.shape[1] > MAX_INVERT_SIZE:  # D > m goes through the inverse
        return f"it takes Fisher blocks of at most {MAX_INVERT_SIZE}, got {fisher.shape[1]}"
    return None


def _prune_limit(weight: Tensor, fisher: Tensor, pattern: NMPattern) -> str | None:
    return _search_limit(weight, fisher, pattern, "combinatorial")  # D = m on every backend: the op checks it


def _sweep_limit(
    weight: Tensor, hessian: Tensor, row_scale: Tensor | None, pattern: Pattern, method: str
) -> str | None:
    if method != "combinatorial" or not isinstance(pattern, NMPattern):
        return f"it sweeps by method='combinatorial' only, got {method!r}"
    if any(t is not None and t.dtype == torch.float64 for t in (weight, hessian, row_scale)):
        return "it takes a float32 hessian, and a weight and a row_scale of at most 32 bits, got float64 among them"
    if pattern.m > (MAX_SWEEP_SIZE if pattern.n <= 2 else MAX_SWEEP_SETS_SIZE):
        return f"it takes m <= {MAX_SWEEP_SIZE} with n <= 2, and m <= {MAX_SWEEP_SETS_SIZE} with any n, got {pattern}"
    if isinstance(pattern, VNMPattern) and pattern.v > MAX_SWEEP_ROWS:
        return f"it takes panels of at most {MAX_SWEEP_ROWS} rows, got {pattern}"
    return None


def _update_limit(weight: Tensor, fisher: Tensor | None = None) -> str | None:
    if weight.dtype == torch.float64 or (fisher is not None and fisher.dtype != torch.float32):
        kind = "" if fisher is None else f" and a {fisher.dtype} fisher"
        return f"it takes a weight of at most 32 bits and a float32 fisher, got {weight.dtype}{kind}"
    if fisher is not None and fisher.shape[-1] > MAX_UPDATE_SIZE:
        return f"it takes fisher blocks of at most {MAX_UPDATE_SIZE}, got {fisher.shape[-1]}"
    return None


def _saliency_limit(weight: Tensor, fisher: Tensor | None = None, method: str = "combinatorial") -> str | None:
    if method != "combinatorial":
        return f"it takes method='combinatorial' only, got {method!r}"
    return _update_limit(weight, fisher)


def constant_when_compiled(function: Function) -> Function:
    """What ``torch.compiler.assume_constant_result`` does; that one imports dynamo, and with it triton."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def run_as_it_is(function: Function) -> Function:
    """Keeps a compiler out of ``function`` and of all that it calls, where they run beside a compiled graph and not in
    it: after a graph break dynamo compiles every frame that Python meets, and would trace launches and streams.

    Like ``torch.compiler.disable``, but a trace that comes from outside goes through ``function``, where that one would
    break it. That one also imports dynamo and costs each call another frame.
    """
    try:
        skip = eval_frame._FrameAction.SKIP
        eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))
    except AttributeError:  # torch promises none of these names, and nothing else hangs on them
        log.debug("torch %s has no way to keep its compiler out of %s", torch.__version__, function.__name__)
    return function


def _sparse_linear_limit(x: Tensor, pattern: NMPattern | None = None) -> str | None:
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, got {x.dtype}"
    if pattern is not None and not runs_as_two_of_four(pattern):
        return f"it takes patterns that keep at most 2 of 4, 8, 12, ... columns, got {pattern}"
    return None


@constant_when_compiled
def _no_sparse_product(device: int) -> str | None:
    reason: str | None = import_module(f"{MODULES['cuda']}.matmul").lacks_sparse_product(device)
    return reason


GPU_LIMITS: dict[tuple[str, str], Callable[[int], str | None]] = {("sparse_linear", "cuda"): _no_sparse_product}
"""Why a backend cannot run an op on a GPU of that index, where not every GPU of the module will do."""

LIMITS: dict[tuple[str, str], Callable[..., str | None]] = {
    ("accumulate_fisher_", "cuda"): _cuda_accumulate_limit,
    ("accumulate_fisher_", "triton"): _accumulate_limit,
    ("accumulate_hessian_", "triton"): _hessian_limit,
    ("invert_spd", "cuda"): _invert_limit,
    ("search_nm", "cuda"): _search_limit,
    ("search_vnm", "cuda"): _search_limit,
    ("prune_nm", "cuda"): _prune_limit,
    ("prune_vnm", "cuda"): _prune_limit,
    ("sweep_rows", "cuda"): _sweep_limit,
    ("obs_update", "cuda"): _update_limit,
    ("loss_increase", "cuda"): _update_limit,
    ("block_saliency", "cuda"): _saliency_limit,
    ("sparse_linear", "cuda"): _sparse_linear_limit,
}
"""Why a backend cannot run an op on given arguments (None: it can), where it takes less than the reference."""

log = logging.getLogger("obs_kernels")

_BACKEND_VARIABLE = "OBS_KERNELS_BACKEND"
_ENVIRONMENT = os.environ._data  # type: ignore[attr-defined]  # a variable that is not set costs os.environ 1 us
_BACKEND_KEY = os.environ.encodekey(_BACKEND_VARIABLE)  # type: ignore[attr-defined]


@constant_when_compiled
def asked_of_process() -> str | None:
    """The backend that the environment names now, as it stands there."""
    return os.environ[_BACKEND_VARIABLE] if _BACKEND_KEY in _ENVIRONMENT else None


def resolve(op: str, backend: str | None, tensor: Tensor, *more: Any) -> str:
    """The backend that will run ``op`` on ``tensor`` and ``more``, what its ``LIMITS`` look at; never None."""
    device_type = tensor.device.type
    asked = backend if backend is not None else asked_of_process() or None
    if asked is None:
        for name in TABLE[op]:
            if unavailable(op, name, device_type, tensor, *more) is None:
                if not torch.compiler.is_compiling():
                    _log_once(op, name, device_type)
                return name
    if asked not in BACKENDS:
        raise ConfigError(f"backend must be None, {', '.join(map(repr, BACKENDS))}, got {asked!r}")
    reason = unavailable(op, asked, device_type, tensor, *more)
    if reason is not None:
        fix = "unset OBS_KERNELS_BACKEND" if backend is None else "pass backend=None"
        raise BackendUnavailableError(f"backend {asked!r} cannot run {op}: {reason}; {fix} to let the package choose")
    return asked


def unavailable(op: str, backend: str, device_type: str, *arguments: Any) -> str | None:
    """Why ``backend`` cannot run ``op`` on that kind of device (and on ``arguments``, if given), or None if it can."""
    if backend not in TABLE[op]:
        return f"this version has no {backend} kernel for it"
    if backend == "reference":
        return None
    reason = _no_triton(device_type) if backend == "triton" else _no_cuda(device_type)
    if reason is None and (op, backend) in GPU_LIMITS:
        index = arguments[0].device.index if arguments else torch.cuda.current_device()
        reason = GPU_LIMITS[op, backend](index)
    limit = LIMITS.get((op, backend))
    return limit(*arguments) if reason is None and limit is not None and arguments else reason


def _no_cuda(device_type: str) -> str | None:
    return f"it needs a CUDA tensor, got {device_type}" if device_type != "cuda" else _no_module()


@constant_when_compiled
def _no_module() -> str | None:
    return _ext.reason()


@constant_when_compiled
def _no_triton(device_type: str) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # runs on tensors of any device
    if device_type != "cuda" and not interpreted:
        return f"it needs a CUDA tensor, got {device_type}"
    if find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    if interpreted:
        return None
    if not _has_c_compiler():
        return "triton finds no C compiler; install gcc or clang, or name one by CC"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < TRITON_CAPABILITY:
        return f"it needs compute capability {TRITON_CAPABILITY[0]}.{TRITON_CAPABILITY[1]} or newer"
    return None


@lru_cache(maxsize=1)
def _has_c_compiler() -> bool:
    """Whether Triton can build what launches its kernels, as it looks for it."""
    return bool(os.environ.get("CC") or which("gcc") or which("clang"))


def kernel(op: str, backend: str) -> Callable[..., Any]:
    """The function of ``backend`` with the name of the op.

    Autocast is off inside, the ops choose their own arithmetic.
    """
    module = import_module(MODULES[backend])
    if op in STEPS and backend != "reference":
        frame, step = STEPS[op]
        around = getattr(import_module(MODULES["reference"]), frame)
        # a backend of sweep_rows that is not the reference takes f32 on a GPU
        gradients = inner_step("conjugate_gradients", "cuda", torch.float32)
        function = partial(around, getattr(module, step), gradients=gradients)
    else:
        function = getattr(module, op)

    def call(*args: Any, **kwargs: Any) -> Any:
        with no_autocast():
            return function(*args, **kwargs)

    return call


def inner_step(step: str, device_type: str, dtype: torch.dtype) -> Callable[..., Any]:
    """The function of an inner step for such tensors: of its backend where that can run, else of the reference."""
    backend = INNER_STEPS[step]
    reason = f"it takes float32, got {dtype}" if dtype != torch.float32 else _no_triton(device_type)
    if asked_of_process() == "reference":
        reason = "OBS_KERNELS_BACKEND names the reference"
    _log_step_once(step, device_type, backend, reason)
    return cast(Callable[..., Any], getattr(import_module(MODULES["reference" if reason else backend]), step))


@contextmanager
def no_autocast() -> Iterator[None]:
    """Autocast off on every device: the ops choose their own arithmetic."""
    if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
        yield  # as almost always, and the two context managers below cost the host 8 us
        return
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@lru_cache(maxsize=256)
def _log_once(op: str, backend: str, device_type: str) -> None:
    others = [f"{b}: {r}" for b in TABLE[op] if (r := unavailable(op, b, device_type)) is not None]
    log.info("%s on %s runs on the %s backend%s", op, device_type, backend, f" ({'; '.join(others)})" if others else "")


@lru_cache(maxsize=256)
def _log_step_once(step: str, device_type: str, backend: str, reason: str | None) -> None:
    text = f"reference backend ({backend}: {reason})" if reason else f"{backend} backend"
    log.info("%s on %s runs on the %s", step, device_type, text)
