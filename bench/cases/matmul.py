# SPDX-License-Identifier: Apache-2.0
"""``sparse_linear``: Y = X W^T of layers of BERT and of models of 8B and 70B weights, beside the dense product.

The floor is the longer of two times: x and the packed weight (stored format) read and y written at the rate of the
copy, and the products with kept weights at the rate of the dense product. Sparse tensor cores can reach it: 2:4 takes
them half of the dense time, v:2:m 2/m of it if only the four columns of a panel are gathered; run as 2:4, v:2:m gets to
4/m of the floor at most. TFLOP/s count kept weights; effective ones, all of the dense product.

``cuda`` is the bare launch that a call on token-major x comes to: as 2:4, or, of the columns that panels keep, a
transposition of x and a gathering product. ``cuda, x feature-major`` is the same on x that is transposed outside of the
times, as a layer that follows another gets it. ``as`` in the config of a row says which of the two kernels ran.

Times are of calls back to back: a product comes to the GPU while the one in front ends, which a model gets from
products and not from other kernels in front.

``--samples`` picks T and ``--block-size`` m. A CPU takes one T only. cuSPARSELt's algorithm is
searched once a size; what its search, compression and our prepacking cost is not in the times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness.backends import called, runnable
from bench.harness.case import DENSE, Case, Check, Inputs, Problem, Selection, Variant
from obs_kernels import ops, reference
from obs_kernels.checks import PIECE
from obs_kernels.dtype_names import DTYPES
from obs_kernels.errors import BackendUnavailableError
from obs_kernels.ops.dispatch import kernel
from obs_kernels.packed_format import packed_shapes
from obs_kernels.patterns import NMPattern, VNMPattern, parse_pattern

OP = "sparse_linear"
SHAPES = {
    "bert-base-attention": (768, 768),
    "bert-base-up": (3072, 768),
    "bert-base-down": (768, 3072),
    "bert-large-attention": (1024, 1024),
    "bert-large-up": (4096, 1024),
    "bert-large-down": (1024, 4096),
    "8b-attention": (4096, 4096),
    "8b-gate": (14336, 4096),
    "8b-down": (4096, 14336),
    "70b-gate": (28672, 8192),
}
"""Rows and columns."""
TOKENS = (128, 512, 2048, 12288)
CPU_TOKENS = TOKENS[1:2]
PATTERNS = ("2:4", "64:2:8", "128:2:8", "256:2:8", "64:2:16", "128:2:16", "128:2:32")
CPU_SHARE = 32
"""A CPU takes one of so many rows, columns and tokens."""
CPU_STEPS = {"R": 256, "C": 64, "T": 1}
"""What those stay multiples of, for every pattern."""
PAIRS = (0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110)
"""Codes of the pairs 01, 02, 03, 12, 13, 23, lower position in the lower bits."""
SUMS = 1e-3
"""Error allowed beside the rounding of y, over the RMS of y: f32 sums of 2^13 products, and tensor cores cut off."""
PEER_SUMS = 4
"""The same for peers, times eps of y: they may split C and round the parts to the dtype of y."""
GATHERED_ROWS = 64
"""Panels of a multiple of so many rows can be gathered."""

Product = Callable[[Inputs], Tensor]


def problems(selection: Selection) -> Iterator[Problem]:
    """Every shape, T, pattern and dtype that was asked for; bf16 unless another is named."""
    for name in selection.pick(SHAPES, selection.shapes):
        for tokens in selection.samples or (TOKENS if selection.device.type == "cuda" else CPU_TOKENS):
            for text in PATTERNS:
                pattern: NMPattern = parse_pattern(text)
                fits = not any(size % step for size, step in zip(SHAPES[name], pattern.multiples(), strict=True))
                if fits and (selection.block_sizes is None or pattern.m in selection.block_sizes):
                    for dtype in selection.pick(CASE.dtypes, selection.dtypes or ("bf16",)):
                        yield problem(selection, name, tokens, pattern, dtype)


def problem(selection: Selection, name: str, tokens: int, pattern: NMPattern, dtype: str) -> Problem:
    """One layer, with our backends, the dense product and cuSPARSELt."""
    real = dict(zip("RCT", (*SHAPES[name], tokens), strict=True))
    whole = selection.device.type == "cuda"
    shape = real if whole else {k: max(s, real[k] // CPU_SHARE // s * s) for k, s in CPU_STEPS.items()}
    rows, cols, count = shape.values()
    width = torch.finfo(DTYPES[dtype]).bits // 8
    values, *places = packed_shapes(pattern, rows, cols)
    packed_bytes = width * prod(values) + sum(prod(part) for part in places if part is not None)
    dense_bytes, io_bytes = width * rows * cols, width * count * (rows + cols)
    dense_flops = 2 * count * rows * cols
    facts = {"dense_flops": dense_flops, "packed_share": packed_bytes / dense_bytes}
    variants = (
        *ours(selection, shape, pattern, DTYPES[dtype], facts),
        *(_peers(selection, pattern, dense_bytes + io_bytes, dense_flops) if selection.peers else ()),
    )
    first = cache(partial(_random, shape, pattern, DTYPES[dtype], selection.device))

    def make(number: int) -> Inputs:
        """Copies of one set; on a GPU each later one goes through all calls: what they keep is there before times."""
        x, dense, values, codes, columns = (t.clone() for t in first())
        sparse = ops.SparseWeight(values, codes, columns if columns.numel() else None, pattern, (rows, cols))
        inputs = {"x": x, "dense": dense, "packed": (values, codes, columns), "sparse": sparse}
        for variant in variants if whole and number else ():
            with suppress(Exception):  # its check was red
                variant.run(inputs)
        return inputs

    return Problem(
        op=OP,
        name=name,
        shape=shape,
        dtype=dtype,
        num_bytes=io_bytes + packed_bytes,
        num_flops=dense_flops * pattern.n // pattern.m,
        # on a GPU what the leanest call touches: its sets alone must be more than the cache holds. The copy of a
        # gathered weight has as many bytes as the packed one but for its columns
        set_bytes=io_bytes + packed_bytes + (0 if whole else dense_bytes),
        make=make,
        variants=variants,
        real_shape=None if whole else real,
        pattern=str(pattern),
    )


def ours(
    selection: Selection, shape: Mapping[str, int], pattern: NMPattern, dtype: torch.dtype, facts: Mapping[str, Any]
) -> Iterator[Variant]:
    """The bare launches on a prepacked weight (other backends: their function), and the user's call."""
    like = torch.empty(0, shape["C"], dtype=dtype, device=selection.device)
    backends = runnable(OP, selection, like)
    if selection.device.type == "cuda" and selection.backends is None:
        backends = [b for b in backends if b != "reference"]  # it unpacks into f32: seconds that say nothing
    token: _Launch | None = None
    for backend in backends:
        if backend == "cuda":
            token, *others = _launches(selection, shape, pattern, like.device)
            for launch in (token, *others):
                yield Variant(
                    launch.name, launch, partial(check_product, launch, facts=facts, copy=launch.copy), launch.config
                )
        else:
            run = partial(_function, kernel(OP, backend), str(pattern))
            yield Variant(backend, run, partial(check_product, run, facts=facts), {"backend": backend})
    chosen = called(OP, selection, like)
    if chosen in backends:
        run = partial(_call, chosen)
        ran = token if chosen == "cuda" else None  # the call takes the same kernel, and keeps as large a copy
        check = partial(check_product, run, facts=facts, copy=ran.copy if ran else "")
        config = {"backend": chosen, **({"as": ran.config["as"]} if ran else {})}
        yield Variant(f"call {chosen}", run, check, config, "call")


def _function(run: Callable[..., Tensor], pattern: str, inputs: Inputs) -> Tensor:
    return run(inputs["x"], *inputs["packed"], None, pattern, activation="", x_layout="token", y_layout="token")


def _call(backend: str, inputs: Inputs) -> Tensor:
    return ops.sparse_linear(inputs["x"], inputs["sparse"], backend=backend)


@dataclass(frozen=True)
class _Launch:
    """One launch of the cuda backend. What it prepares stays in the inputs, out of the times, but for token-major x of
    a gathering product: a call has to transpose it each time.
    """

    launcher: Any
    rows: int
    pattern: NMPattern
    gathered: bool
    name: str = "cuda"
    x_layout: str = "token"
    y_layout: str = "token"
    tile: str | None = None
    forced: bool = False

    @property
    def copy(self) -> str:
        """Key of the copy of the weight that it reads."""
        return "prepacked, gathered" if self.gathered else "prepacked"

    @property
    def config(self) -> dict[str, Any]:
        """For its row."""
        layouts = {"x": self.x_layout, "y": self.y_layout}
        return {
            "backend": "cuda",
            "as": "gathered" if self.gathered else "2:4",
            **{tensor: "feature-major" for tensor, layout in layouts.items() if layout == "feature"},
            **({"forced": True} if self.forced else {}),
        }

    def __call__(self, inputs: Inputs) -> Tensor:
        """Y [T, R]."""
        values, codes, columns = inputs["packed"]
        if self.copy not in inputs:
            kept = self.launcher.kept_columns(values, codes, columns) if self.gathered else (values, codes, columns)
            inputs[self.copy] = self.launcher.prepack(*kept, "2:4" if self.gathered else str(self.pattern))
        x: Tensor = inputs["x"]
        tokens, cols = x.shape
        if self.x_layout == "feature":
            if "x, feature-major" not in inputs:
                inputs["x, feature-major"] = x.T.contiguous()
            x = inputs["x, feature-major"]
        y = x.new_empty((tokens, self.rows) if self.y_layout == "token" else (self.rows, tokens))
        options = {"rows": self.rows, "cols": cols, "activation": "", "y_layout": self.y_layout, "config": self.tile}
        if self.gathered:
            x = self.launcher.as_gathered(x, self.x_layout)
            v = getattr(self.pattern, "v", None)
            self.launcher.launch_gather_linear(x, columns, inputs[self.copy], None, y, v=v, **options)
        else:
            self.launcher.launch_sparse_linear(x, inputs[self.copy], None, y, x_layout=self.x_layout, **options)
        return y if self.y_layout == "token" else y.T


def _launches(
    selection: Selection, shape: Mapping[str, int], pattern: NMPattern, device: torch.device
) -> Iterator[_Launch]:
    """What a call launches first; then the same on feature-major x, and what can be forced."""
    launcher = import_module("obs_kernels.cuda_calls.matmul")
    rows, cols, tokens = shape.values()
    panels = isinstance(pattern, VNMPattern) and pattern.v % GATHERED_ROWS == 0

    def gathered(x_layout: str) -> bool:
        return panels and bool(launcher.gathers(pattern, rows, cols, tokens, x_layout, device))

    launch = partial(_Launch, launcher, rows, pattern)
    as_called = gathered("token")
    yield launch(as_called)
    feature = panels and tokens % PIECE == 0
    if feature:
        yield launch(gathered("feature"), "cuda, x feature-major", x_layout="feature")
    if not selection.sweep:
        return
    yield launch(as_called, "cuda, y feature-major", y_layout="feature")
    if as_called:
        yield launch(False, "cuda 2:4", forced=True)
    for tile in launcher.CONFIGS:
        yield launch(False, f"cuda {tile}", tile=tile, forced=True)
    for tile in launcher.GATHER_CONFIGS if feature else ():  # "gather 128x256"
        if isinstance(pattern, VNMPattern) and pattern.v % int(tile.split()[1].split("x")[0]) == 0:
            yield launch(True, f"cuda {tile}", x_layout="feature", tile=tile, forced=True)


def _peers(selection: Selection, pattern: NMPattern, num_bytes: int, num_flops: int) -> Iterator[Variant]:
    """cuBLAS on the dense weight, and for 2:4 on a GPU cuSPARSELt."""
    facts = {"dense_flops": num_flops}
    check = partial(check_product, _dense, facts=facts, peer=True)
    yield Variant(DENSE, _dense, check, {"peer": "F.linear"}, peer=True, num_bytes=num_bytes, num_flops=num_flops)
    if str(pattern) == "2:4" and selection.device.type == "cuda":
        chosen: list[tuple[int, int, int]] = []
        run = partial(_cusparselt, chosen)
        check = partial(check_cusparselt, run, facts={**facts, "algorithm": chosen})
        yield Variant("cuSPARSELt", run, check, {"peer": "cuSPARSELt"}, peer=True)


def _dense(inputs: Inputs) -> Tensor:
    return F.linear(inputs["x"], inputs["dense"])


def _cusparselt(chosen: list[tuple[int, int, int]], inputs: Inputs) -> Tensor:
    """Y [T, R], as the dense product writes it; ``chosen`` keeps the algorithm that the first call has searched."""
    if "compressed" not in inputs:
        inputs["compressed"] = torch._cslt_compress(inputs["dense"])
    weight, x = inputs["compressed"], inputs["x"].T
    if not chosen:
        search = torch._C._cusparselt.mm_search  # type: ignore[attr-defined]  # missing in builds for the CPU
        chosen.append(search(weight, x, None, None, None, True)[:3])
    algorithm, split_k, mode = chosen[0]
    return torch._cslt_sparse_mm(weight, x, transpose_result=True, alg_id=algorithm, split_k=split_k, split_k_mode=mode)


def check_cusparselt(run: Product, inputs: Inputs, *, facts: Mapping[str, Any]) -> Check:
    """Its own errors say that it cannot run here or not at this size, and the context lives on; others are red."""
    if not torch.backends.cusparselt.is_available():
        raise BackendUnavailableError("this torch has no cuSPARSELt")
    try:
        return check_product(run, inputs, facts=facts, peer=True)
    except RuntimeError as error:
        if "cusparselt" not in str(error).lower():
            raise
        raise BackendUnavailableError(str(error).replace("CUDA error", "error of the library")) from error


def check_product(
    run: Product, inputs: Inputs, *, facts: Mapping[str, Any], peer: bool = False, copy: str = ""
) -> Check:
    """All of y against float64: the largest error, in units of what half a place of y and ``SUMS`` allow.

    ``copy`` is the key of the weight's copy that the product reads beside the packed one.
    """
    x, weight, y = inputs["x"], inputs["dense"].double(), run(inputs)
    eps = torch.finfo(x.dtype).eps
    sums = max(SUMS, PEER_SUMS * eps) if peer else SUMS
    worst, tokens = list[Tensor](), 2048  # at a time: y in float64 is large
    for part, found in zip(x.split(tokens), y.split(tokens), strict=True):
        wanted = part.double() @ weight.T
        allowed = 0.5 * eps * wanted.abs() + sums * wanted.square().mean().sqrt()
        worst.append(((found.double() - wanted).abs() / allowed).max())  # shapes that differ raise; NaN stays
    prepacked = inputs.get(copy)
    more = {} if prepacked is None else {"prepacked_share": prepacked.nbytes / inputs["dense"].nbytes}
    return Check(float(torch.stack(worst).max()), 1.0, {**facts, **more})


def _random(shape: Mapping[str, int], pattern: NMPattern, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """x, the dense weight, and its values, codes and columns: random numbers at random places of the pattern."""
    rows, cols, tokens = shape.values()
    generator = torch.Generator(device).manual_seed(0)
    kept, _, panels = packed_shapes(pattern, rows, cols)
    x = torch.empty(tokens, cols, dtype=dtype, device=device).normal_(generator=generator)
    values = torch.empty(kept, dtype=dtype, device=device).normal_(generator=generator)
    groups = cols // pattern.m
    chosen = torch.randint(len(PAIRS), (rows, groups), generator=generator, device=device)
    pairs = F.pad(torch.tensor(PAIRS, dtype=torch.uint8, device=device)[chosen], (0, groups % 2))
    codes = pairs[:, ::2] | pairs[:, 1::2] << 4
    columns = torch.empty(0, dtype=torch.uint8, device=device)
    if panels is not None:
        order = torch.rand(*panels[:2], pattern.m, generator=generator, device=device)
        columns = order.topk(panels[2]).indices.sort().values.to(torch.uint8)
    return [x, reference.unpack(values, codes, columns, str(pattern)), values, codes, columns]


CASE = Case(
    topic="matmul",
    op=OP,
    summary="sparse product of a layer, beside the dense one",
    shapes=tuple(SHAPES),
    dtypes=("bf16", "f16", "f32"),
    problems=problems,
)
