# SPDX-License-Identifier: Apache-2.0
"""``search_nm`` and ``search_vnm`` by the exact and the pairwise method, and the exact one fused with the joint update;
D = m.

The floor is F and the weight read once and the mask written; the fused step also writes the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import comb

import torch
from torch import Tensor

from bench import peers
from bench.harness.backends import called, runnable
from bench.harness.case import Case, Check, Inputs, Problem, Selection, Variant
from obs_kernels import ops, reference
from obs_kernels.ops.dispatch import kernel
from obs_kernels.patterns import NMPattern, VNMPattern, parse_pattern

SHAPES = {"14M": (3456, 4096), "bert-base": (110_592, 768)}
"""Rows and columns; bert-base are the 72 matrices of the encoder below one another, 84,934,656 weights."""
PATTERNS = ("2:4", "2:8", "2:16", "9:16", "64:2:8", "128:2:8", "64:2:16", "128:2:16", "64:2:32", "64:9:16")
METHODS = ("combinatorial", "pairwise")
DAMP = 0.01
EXCESS = 1e-3
"""Relative excess of the loss over the f64 optimum."""
OTHER_CHOICES = 0.01
"""Share of groups that may choose otherwise than in f64: a near tie of the pair model is no tie of the true loss."""
MANY_SETS = 1000
"""Kept sets of a group beyond which the reference is measured only on request, and on a small share of a weight."""
PEER_SYSTEMS = 400_000
"""Systems that the peer solves in one call on a GPU, all candidates together: well under a second."""
CPU_PEER_SHARE = 256
"""A CPU takes one of so many."""
SLOW_WEIGHTS = 20_000_000
"""Beyond so many weights the reference is measured on a GPU only on request."""

Search = Callable[..., tuple[Tensor, ...]]


def problems(selection: Selection) -> Iterator[Problem]:
    """Every size and pattern that was asked for; ``--block-size`` picks m."""
    for name in selection.pick(CASE.shapes, selection.shapes):
        for text in PATTERNS:
            pattern: NMPattern = parse_pattern(text)
            if selection.block_sizes is None or pattern.m in selection.block_sizes:
                yield problem(selection, name, pattern)


def problem(selection: Selection, name: str, pattern: NMPattern) -> Problem:
    """One weight: R * C / m blocks of m x m."""
    real, real_cols = SHAPES[name]
    v, m = _v(pattern), pattern.m
    many = comb(m, pattern.n) > MANY_SETS
    whole = selection.device.type == "cuda"
    cols = real_cols if whole else real_cols // 8
    if many and not whole:
        cols = 2 * m
    rows = max(1, selection.cut(real) // v) * v
    weights = rows * cols
    flops = 2 * weights * m + 12 * weights // m * comb(m, pattern.n)
    return Problem(
        op=_op(pattern),
        name=name,
        shape={"R": rows, "C": cols, "D": m},
        dtype="f32",
        num_bytes=weights * (4 * m + 4 + 1),
        num_flops=flops,
        set_bytes=weights * (4 * m + 9),
        make=lambda number: make(rows, cols, m, selection.device, seed=number),
        variants=(
            *ours(selection, pattern, weights),
            *(_peers(selection, pattern, weights) if selection.peers else ()),
        ),
        real_shape=None if whole else {"R": real, "C": real_cols, "D": m},
        pattern=str(pattern),
    )


def ours(selection: Selection, pattern: NMPattern, weights: int) -> Iterator[Variant]:
    """Each backend and method on ready tensors, the fused step where there is one, and the public op."""
    for method in METHODS:
        yield from _by_method(selection, pattern, weights, method)


def _by_method(selection: Selection, pattern: NMPattern, weights: int, method: str) -> Iterator[Variant]:
    op, text = _op(pattern), str(pattern)
    damp = torch.full((1,), DAMP, device=selection.device)
    panels = _columns(pattern)
    exact = method == "combinatorial"
    like = (
        torch.empty(0, pattern.m, device=selection.device),
        torch.empty(0, pattern.m, pattern.m, device=selection.device),
        pattern,
        method,
    )

    def variant(name: str, run: Search, backend: str, path: str = "kernel", num_bytes: int | None = None) -> Variant:
        check = partial(check_search if exact else check_pairwise, run, pattern=pattern)
        call = lambda i: run(i["weight"], i["fisher"])  # noqa: E731
        note = method if not exact else "with update" if num_bytes is not None else None
        config = {"backend": backend} | ({} if note is None else {"config": note})
        return Variant(name if exact else f"{name}, {method}", call, check, config, path, num_bytes=num_bytes)

    for backend in runnable(op, selection, *like):
        on_gpu = backend == "reference" and selection.device.type == "cuda"
        many = comb(pattern.m, pattern.n) > MANY_SETS or weights > SLOW_WEIGHTS
        if on_gpu and (many or not exact) and selection.backends is None:
            continue
        run = kernel(op, backend)
        options = {"damp": damp, "method": method, "mask": None, **panels}
        yield variant(backend, partial(_call, run, text, options), backend)
        if backend == "cuda" and exact:
            fused = kernel("prune_vnm" if panels else "prune_nm", backend)
            step = partial(_fused, fused, text, {"damp": damp, "mask": None, **panels})
            yield variant("cuda, with update", step, backend, num_bytes=weights * (4 * pattern.m + 9))
    chosen = called(op, selection, *like)
    if chosen is not None:
        options = {"method": method, "backend": chosen, **panels}
        yield variant(f"call {chosen}", partial(_public, op, text, options), chosen, "call")


def _call(
    run: Search, pattern: str, options: Mapping[str, object], weight: Tensor, fisher: Tensor
) -> tuple[Tensor, ...]:
    return run(weight, fisher, pattern, **options)


def _fused(
    run: Search, pattern: str, options: Mapping[str, object], weight: Tensor, fisher: Tensor
) -> tuple[Tensor, ...]:
    mask, new, saliency, *_ = run(weight, fisher, pattern, **options)
    return mask, saliency, new


def _public(op: str, pattern: str, options: Mapping[str, object], weight: Tensor, fisher: Tensor) -> tuple[Tensor, ...]:
    found = getattr(ops, op)(weight, fisher, pattern, damp=DAMP, **options)
    return found.mask, found.saliency


def _peers(selection: Selection, pattern: NMPattern, weights: int) -> Iterator[Variant]:
    """VENOM's way, on as many groups as take well under a second.

    It has no joint choice of columns to compare with, and for thousands of sets only its launches would be measured.
    """
    if isinstance(pattern, VNMPattern) or comb(pattern.m, pattern.n) > MANY_SETS:
        return
    m, groups = pattern.m, weights // pattern.m
    systems = PEER_SYSTEMS if selection.device.type == "cuda" else PEER_SYSTEMS // CPU_PEER_SHARE
    few = max(1, min(groups, systems // comb(m, pattern.n)))
    name = "solve of each pruned set"
    run = partial(peers.search_by_pruned_sets, n=pattern.n, damp=DAMP)

    def part(inputs: Inputs) -> tuple[Tensor, Tensor]:
        return inputs["weight"].view(-1, m)[:few], inputs["fisher"][:few]

    yield Variant(
        name,
        lambda i: run(*part(i)),
        lambda i: _excess(run(*part(i))[1], *part(i), pattern),
        {"peer": name},
        peer=True,
        share=few / groups,
        shape={"R": few, "C": m, "D": m},
        num_bytes=few * m * (4 * m + 5),
    )


def make(rows: int, cols: int, m: int, device: torch.device, *, seed: int) -> Inputs:
    """Weight, and F = G G^T / 2m with G [m, 2m] normal for every group."""
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.empty(rows, cols, device=device).normal_(generator=generator)
    fisher = torch.empty(rows * cols // m, m, m, device=device)
    for blocks in fisher.split(max(1, (1 << 26) // (m * m))):
        g = torch.empty(len(blocks), m, 2 * m, device=device).normal_(generator=generator)
        torch.bmm(g, g.mT, out=blocks)
        blocks.mul_(1 / (2 * m))
    return {"weight": weight, "fisher": fisher}


def check_search(run: Search, inputs: Inputs, *, pattern: NMPattern) -> Check:
    """Loss of the first and the last panels (or rows) in some groups, against the optimum in f64."""
    weight, fisher = inputs["weight"], inputs["fisher"]
    v = _v(pattern)
    saliency = run(weight, fisher)[1].view(weight.shape[0] // v, -1)
    w, f, parts, wide = _some_groups(weight, fisher, pattern)
    found = torch.cat([saliency[part.start // v : part.stop // v][:, wide] for part in parts])
    return _excess(found, w, f, pattern)


def check_pairwise(run: Search, inputs: Inputs, *, pattern: NMPattern) -> Check:
    """Share of the groups of ``check_search`` with another choice than the pair model has in f64."""
    weight, fisher = inputs["weight"], inputs["fisher"]
    mask = run(weight, fisher)[0].view(weight.shape[0], -1, pattern.m)
    w, f, parts, wide = _some_groups(weight, fisher, pattern)
    found = torch.cat([mask[part][:, wide] for part in parts])
    differ = (found != _in_f64(w, f, pattern, "pairwise")[0].view_as(found)).any(2)
    return Check(float(differ.float().mean()), OTHER_CHOICES)


def _some_groups(weight: Tensor, fisher: Tensor, pattern: NMPattern) -> tuple[Tensor, Tensor, list[slice], list[int]]:
    """Weight [r, 2 m] and blocks of the first and last panels (or rows) and groups, and which rows and groups."""
    (rows, cols), v, m = weight.shape, _v(pattern), pattern.m
    height = v if v > 1 else min(rows, 4)
    wide = [0, cols // m - 1]
    parts = [slice(0, height), slice(rows - height, rows)]
    blocks = fisher.view(rows, cols // m, m, m)
    w = torch.cat([weight.view(rows, -1, m)[part][:, wide] for part in parts])
    f = torch.cat([blocks[part][:, wide] for part in parts])
    return w.reshape(-1, 2 * m), f.reshape(-1, m, m), parts, wide


def _excess(found: Tensor, weight: Tensor, fisher: Tensor, pattern: NMPattern) -> Check:
    """Largest relative distance of losses from the optimum, either way."""
    w, f = weight, fisher
    if not isinstance(pattern, VNMPattern):
        some = slice(0, 64)  # of a peer's groups
        w, f, found = w[some], f[: w[some].numel() // f.shape[1]], found.view(-1, w.shape[1] // f.shape[1])[some]
    best = _in_f64(w, f, pattern, "combinatorial")[1]
    error = (found.double() - best).abs() / best
    return Check(float(error.max()), EXCESS)


def _in_f64(weight: Tensor, fisher: Tensor, pattern: NMPattern, method: str) -> tuple[Tensor, ...]:
    damp = torch.full((1,), DAMP, dtype=torch.float64, device=weight.device)
    search = reference.search_vnm if isinstance(pattern, VNMPattern) else reference.search_nm
    options = {"damp": damp, "method": method, "mask": None, **_columns(pattern)}
    return search(weight.double(), fisher.double(), str(pattern), **options)  # type: ignore[arg-type]


def _columns(pattern: NMPattern) -> dict[str, int]:
    return {"num_columns": pattern.num_columns} if isinstance(pattern, VNMPattern) else {}


def _op(pattern: NMPattern) -> str:
    return "search_vnm" if isinstance(pattern, VNMPattern) else "search_nm"


def _v(pattern: NMPattern) -> int:
    return pattern.v if isinstance(pattern, VNMPattern) else 1


CASE = Case(
    topic="search",
    op="search_nm",
    summary="exact mask search of n:m and v:n:m",
    shapes=tuple(SHAPES),
    dtypes=("f32",),
    problems=problems,
)
