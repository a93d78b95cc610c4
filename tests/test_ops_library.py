# SPDX-License-Identifier: Apache-2.0
"""What surrounds the arithmetic: torch.library registration, compilation, fake kernels, the choice of a backend."""

from __future__ import annotations

import importlib.util
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch._subclasses import FakeTensorMode

from obs_kernels import ops, reference
from obs_kernels.errors import BackendUnavailableError, ConfigError
from obs_kernels.ops import dispatch, layout, matmul


@pytest.fixture(autouse=True)
def nan_filled_empty() -> None:
    """Left out here: tracing reads ``torch.empty`` itself, and a wrapper around it is not what users compile."""


def spd(count: int, size: int) -> Tensor:
    return oracle.random_spd(torch.Generator().manual_seed(7), count, size).float()


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(8))


def half_mask(rows: int, cols: int) -> Tensor:
    """2:4, 2:8 and v:2:8 at once: columns 1 and 2 of each eight."""
    return (torch.arange(cols) % 8 == 1).logical_or(torch.arange(cols) % 8 == 2).expand(rows, cols).contiguous()


def packed(text: str) -> ops.SparseWeight:
    return ops.pack(randn(4, 16), half_mask(4, 16), text)


def linear_arguments(
    text: str, *, x_layout: str = "token", y_layout: str = "token", activation: str = "", grad: bool = False
):
    sparse = packed(text)
    x = randn(3, 16) if x_layout == "token" else randn(16, 3)
    bias = randn(4).requires_grad_(grad)
    return (
        (x.requires_grad_(grad), sparse.values, sparse.codes, sparse.columns_or_empty(), bias, text),
        {"activation": activation, "x_layout": x_layout, "y_layout": y_layout, "backend": "reference"},
    )


ONE = torch.full((1,), 0.1)
HESSIAN = spd(1, 16)[0]
REFERENCE = {"backend": "reference"}
SAMPLES: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "accumulate_fisher_": [
        ((spd(2, 4), randn(3, 8)), {"scale": 0.5, **REFERENCE}),
        ((spd(2, 4).double(), randn(8, 3).half().T), {"scale": 0.5, **REFERENCE}),
    ],
    "invert_spd": [((spd(3, 4), ONE), REFERENCE), ((spd(3, 4).mT, torch.rand(3)), REFERENCE)],
    "invert_spd_into": [((spd(3, 4), ONE, torch.empty(3, 4, 4)), REFERENCE)],
    "search_nm": [
        ((randn(4, 16), spd(8, 8), "2:8", ONE, "combinatorial", None), REFERENCE),
        ((randn(16, 4).T, spd(4, 16), "3:8", ONE, "pairwise", half_mask(4, 16)), REFERENCE),
        ((randn(4, 16).half(), None, "2:4", ONE, "magnitude", None), REFERENCE),
    ],
    "search_vnm": [
        ((randn(4, 16), spd(8, 8), "2:2:8", ONE, "combinatorial", None, 4), REFERENCE),
        ((randn(4, 16), spd(8, 8), "2:2:8", ONE, "diagonal", half_mask(4, 16), 5), REFERENCE),
        ((randn(16, 4).half().T, spd(4, 16), "2:2:8", ONE, "pairwise", None, 4), REFERENCE),
        ((randn(4, 16), spd(8, 8).double(), "2:2:8", ONE, "combinatorial", None, 4), REFERENCE),
    ],
    "prune_nm": [
        ((randn(4, 16), spd(8, 8), "2:8", ONE, None), REFERENCE),
        ((randn(16, 4).T, spd(8, 8), "3:8", torch.rand(8), half_mask(4, 16)), REFERENCE),
        ((randn(4, 16).half(), spd(8, 8), "2:8", ONE, None), REFERENCE),
        ((randn(4, 16), spd(16, 4).double(), "2:4", ONE, None), REFERENCE),
    ],
    "prune_vnm": [
        ((randn(4, 16), spd(8, 8), "2:2:8", ONE, None, 4), REFERENCE),
        ((randn(16, 4).bfloat16().T, spd(8, 8), "2:2:8", torch.rand(8), half_mask(4, 16), 5), REFERENCE),
        ((randn(4, 16).double(), spd(8, 8), "2:2:8", ONE, None, 4), REFERENCE),
    ],
    "obs_update": [
        ((randn(4, 16), spd(8, 8), half_mask(4, 16), ONE, update), REFERENCE) for update in ("joint", "single", "none")
    ]
    + [((randn(16, 4).T, spd(8, 8), half_mask(4, 16), ONE, update), REFERENCE) for update in ("joint", "none")]
    + [((randn(3, 7), spd(6, 4), half_mask(3, 7), torch.rand(6), "joint"), REFERENCE)],
    "accumulate_hessian_": [
        ((spd(1, 4)[0], randn(3, 4), None, None), {"scale": 0.5, **REFERENCE}),
        ((spd(1, 4)[0].double(), randn(4, 3).half().T, torch.rand(3), torch.rand(4)), {"scale": 0.5, **REFERENCE}),
    ],
    "sweep_rows": [
        ((randn(4, 16), HESSIAN, "2:8", None, ONE, "combinatorial", None, 4, True), REFERENCE),
        ((randn(16, 4).T, HESSIAN, "3:8", torch.rand(4), ONE, "combinatorial", half_mask(4, 16), 4, False), REFERENCE),
        ((randn(4, 16).half(), HESSIAN, "2:2:8", torch.rand(4), ONE, "combinatorial", None, 5, True), REFERENCE),
        ((randn(4, 16), HESSIAN, "2:2:8", torch.rand(4).double(), ONE, "combinatorial", None, 4, False), REFERENCE),
        ((randn(16, 4).T, HESSIAN.double(), "2:4", None, ONE, "sparsegpt", None, 4, False), REFERENCE),
        ((randn(4, 16), HESSIAN, "unstructured:0.5", None, ONE, "sparsegpt", half_mask(4, 16), 4, True), REFERENCE),
    ],
    "loss_increase": [
        ((randn(4, 16), spd(8, 8), ONE), REFERENCE),
        ((randn(3, 7).half(), spd(6, 4), torch.rand(6)), REFERENCE),
    ],
    "block_saliency": [
        ((randn(4, 16), spd(8, 8), 4, ONE, "combinatorial", None), REFERENCE),
        ((randn(4, 16), spd(8, 8), 1, ONE, "diagonal", half_mask(4, 16)), REFERENCE),
        ((randn(4, 16), None, 4, ONE, "magnitude", None), REFERENCE),
        ((randn(4, 16).bfloat16(), spd(8, 8), 4, ONE, "combinatorial", None), REFERENCE),
    ],
    "pack": [((randn(4, 16), half_mask(4, 16), text), REFERENCE) for text in ("2:4", "2:8", "2:2:8")],
    "unpack": [
        ((s.values, s.codes, s.columns_or_empty(), text), REFERENCE)
        for text, s in ((text, packed(text)) for text in ("2:4", "2:8", "2:2:8"))
    ],
    "sparse_linear": [
        linear_arguments("2:8"),
        linear_arguments("2:4", activation="gelu", y_layout="feature", grad=True),
        linear_arguments("2:2:8", activation="silu", x_layout="feature", grad=True),
        linear_arguments("2:8", x_layout="feature", y_layout="feature", grad=True),
    ],
    "sparse_linear_inference": [
        ((*operands, *options.values()), {})
        for operands, options in (
            linear_arguments("2:8"),
            linear_arguments("2:2:8", activation="silu", x_layout="feature", y_layout="feature"),
        )
    ],
    "feature_major": [
        ((randn(3, 16),), REFERENCE),
        ((randn(2, 3, 16).requires_grad_(),), REFERENCE),
        ((randn(16, 2, 3).half().movedim(0, -1),), REFERENCE),
    ],
}


def registered() -> list[str]:
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix("obs_kernels::") for name in names if name.startswith("obs_kernels::"))


def test_every_registered_op_has_samples():
    assert sorted(SAMPLES) == registered(), "add samples here for a new op"


@pytest.mark.parametrize(("name", "case"), [(name, i) for name, cases in SAMPLES.items() for i in range(len(cases))])
def test_opcheck(name, case):
    """Schema (no hidden mutation or aliasing), autograd registration, fake kernel, and tracing."""
    args, kwargs = SAMPLES[name][case]
    torch.library.opcheck(getattr(torch.ops.obs_kernels, name).default, args, kwargs)


# compilation


def selection(sel: ops.Selection) -> tuple[Tensor, ...]:
    return tuple(t for t in (sel.mask, sel.saliency, sel.columns, sel.weight) if t is not None)


def step_parts(done: ops.Pruned) -> tuple[Tensor, ...]:
    return tuple(t for t in (done.mask, done.weight, done.saliency, done.columns, done.info) if t is not None)


def parts(sparse: ops.SparseWeight) -> tuple[Tensor, ...]:
    return (sparse.values, sparse.codes, sparse.columns_or_empty())


WEIGHT, FISHER, MASK = randn(4, 16), spd(8, 8), half_mask(4, 16)
PANELS = packed("2:2:8")
COMPILED: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "accumulate_fisher_": (
        lambda f, g: ops.accumulate_fisher_(f.clone(), g * 2, scale=0.5) + 1,
        (spd(2, 4), randn(3, 8)),
    ),
    "invert_spd": (lambda m: ops.invert_spd(m * 2, damp=0.1), (spd(3, 4),)),
    "search_nm": (lambda w, f: selection(ops.search_nm(w * 2, f, "2:8", damp=0.1)), (WEIGHT, FISHER)),
    "search_vnm": (
        lambda w, f: selection(ops.search_vnm(w, f, "2:2:8", damp=0.1, method="pairwise")),
        (WEIGHT, FISHER),
    ),
    "prune_nm": (lambda w, f, m: step_parts(ops.prune_nm(w * 2, f, "2:8", damp=0.1, mask=m)), (WEIGHT, FISHER, MASK)),
    "prune_vnm": (lambda w, f: step_parts(ops.prune_vnm(w, f, "2:2:8", damp=0.1)), (WEIGHT, FISHER)),
    "accumulate_hessian_": (
        lambda h, x, q: ops.accumulate_hessian_(h.clone(), x * 2, token_weight=q, scale=0.5) + 1,
        (HESSIAN, randn(2, 3, 16), torch.rand(2, 3)),
    ),
    "sweep_rows": (
        lambda w, h, s: selection(ops.sweep_rows(w * 2, h, "2:2:8", row_scale=s, damp=0.1)),
        (WEIGHT, HESSIAN, torch.rand(4)),
    ),
    "obs_update": (lambda w, f, m: ops.obs_update(w, f, m, damp=0.1) * 2, (WEIGHT, FISHER, MASK)),
    "loss_increase": (lambda w, f: ops.loss_increase(w, f, damp=0.1).sum(), (WEIGHT, FISHER)),
    "block_saliency": (lambda w, f: ops.block_saliency(w, f, 4, damp=0.1), (WEIGHT, FISHER)),
    "pack": (lambda w, m: parts(ops.pack(w, m, "2:2:8")), (WEIGHT, MASK)),
    "unpack": (lambda w: w * ops.unpack(PANELS), (WEIGHT,)),
    "sparse_linear": (lambda x: ops.sparse_linear(x, PANELS, activation="gelu") * 2, (randn(3, 16),)),
    "feature_major": (lambda x: ops.feature_major(x) * 2, (randn(3, 16),)),
}


def test_every_public_op_is_compiled():
    assert sorted(COMPILED) == sorted(dispatch.TABLE)


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_without_graph_breaks(name):
    function, arguments = COMPILED[name]
    torch._dynamo.reset()
    wanted = function(*arguments)
    actual = torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("name", ["feature_major", "sparse_linear"])
def test_compiles_by_itself(name):
    """With no function of the caller around it: what keeps dynamo out of a frame stands further inside."""
    torch._dynamo.reset()
    op, arguments = getattr(ops, name), (randn(3, 16), PANELS)[: 2 if name == "sparse_linear" else 1]
    actual = torch.compile(op, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(actual, op(*arguments))


def sample_call(name: str) -> Callable[[], Any]:
    args, kwargs = SAMPLES[name][0]
    return lambda: getattr(torch.ops.obs_kernels, name)(*args, **kwargs)


PARTS = packed("2:8")
BESIDE = {name: sample_call(name) for name in SAMPLES} | {
    "parts": lambda: matmul.sparse_linear_by_parts(
        randn(3, 16), PARTS.values, PARTS.codes, None, None, PARTS.pattern, PARTS.shape
    ),
    "turned": lambda: layout._turned(randn(3, 16), "reference"),
}


@pytest.mark.parametrize("name", BESIDE)
def test_no_op_is_compiled_inside(name):
    """Beside a compiled graph, as after a graph break, dynamo takes up each frame that Python meets."""
    torch._dynamo.reset()
    recorder = torch._dynamo.testing.EagerAndRecordGraphs()
    call = torch.compiler.disable(BESIDE[name], recursive=False)
    with torch.no_grad():
        torch.compile(lambda: call(), backend=recorder)()
    assert not recorder.graphs


def test_compiles_with_gradients_and_dynamic_tokens():
    """After two sizes the number of tokens is dynamic: the third size compiles nothing new."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    bias = randn(4)

    def run(x: Tensor) -> Tensor:
        return ops.sparse_linear(x, PANELS, bias, activation="silu").sum()

    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for tokens in (3, 5, 9, 17):
        x, same = (randn(tokens, 16).requires_grad_() for _ in range(2))
        compiled(x).backward()
        run(same).backward()
        torch.testing.assert_close(x.grad, same.grad)
    assert counter.frame_count <= 2


# fake kernels


@pytest.mark.parametrize("name", SAMPLES)
def test_fake_and_real_results_agree(name):
    """Shapes, dtypes and strides of the outputs, in the order of the schema."""
    op = getattr(torch.ops.obs_kernels, name).default
    for args, kwargs in SAMPLES[name]:
        real = op(*(a.detach().clone() if isinstance(a, Tensor) else a for a in args), **kwargs)
        with FakeTensorMode() as mode, torch.no_grad():
            fake = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args), **kwargs)
        real, fake = [x if isinstance(x, tuple) else (x,) for x in (real, fake)]
        for r, f in zip(real, fake, strict=True):
            assert (r is None) == (f is None)
            assert r is None or (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


BAD_CALLS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    # (public call on real tensors, the registered op on the same arguments)
    "accumulate_fisher_": (
        lambda: ops.accumulate_fisher_(torch.zeros(2, 4, 4), torch.zeros(3, 7), scale=1.0),
        lambda: torch.ops.obs_kernels.accumulate_fisher_(
            torch.zeros(2, 4, 4), torch.zeros(3, 7), scale=1.0, **REFERENCE
        ),
    ),
    "invert_spd": (
        lambda: ops.invert_spd(torch.zeros(2, 4, 3)),
        lambda: torch.ops.obs_kernels.invert_spd(torch.zeros(2, 4, 3), torch.zeros(1), **REFERENCE),
    ),
    "search_nm": (
        lambda: ops.search_nm(torch.zeros(2, 12), torch.zeros(3, 8, 8), "2:8"),
        lambda: torch.ops.obs_kernels.search_nm(
            torch.zeros(2, 12), torch.zeros(3, 8, 8), "2:8", torch.zeros(1), "combinatorial", None, **REFERENCE
        ),
    ),
    "search_vnm": (
        lambda: ops.search_vnm(torch.zeros(3, 8), torch.zeros(3, 8, 8), "2:2:8"),
        lambda: torch.ops.obs_kernels.search_vnm(
            torch.zeros(3, 8), torch.zeros(3, 8, 8), "2:2:8", torch.zeros(1), "combinatorial", None, 4, **REFERENCE
        ),
    ),
    "prune_nm": (
        lambda: ops.prune_nm(torch.zeros(2, 16), torch.zeros(2, 16, 16), "2:8"),
        lambda: torch.ops.obs_kernels.prune_nm(
            torch.zeros(2, 16), torch.zeros(2, 16, 16), "2:8", torch.zeros(1), None, **REFERENCE
        ),
    ),
    "prune_vnm": (
        lambda: ops.prune_vnm(torch.zeros(2, 8), torch.zeros(2, 8, 8), "2:2:8", num_columns=1),
        lambda: torch.ops.obs_kernels.prune_vnm(
            torch.zeros(2, 8), torch.zeros(2, 8, 8), "2:2:8", torch.zeros(1), None, 1, **REFERENCE
        ),
    ),
    "accumulate_hessian_": (
        lambda: ops.accumulate_hessian_(torch.zeros(4, 4), torch.zeros(3, 5), scale=1.0),
        lambda: torch.ops.obs_kernels.accumulate_hessian_(
            torch.zeros(4, 4), torch.zeros(3, 5), None, None, scale=1.0, **REFERENCE
        ),
    ),
    "sweep_rows": (
        lambda: ops.sweep_rows(torch.zeros(2, 8), torch.zeros(16, 16), "2:8"),
        lambda: torch.ops.obs_kernels.sweep_rows(
            torch.zeros(2, 8),
            torch.zeros(16, 16),
            "2:8",
            None,
            torch.zeros(1),
            "combinatorial",
            None,
            4,
            True,
            **REFERENCE,
        ),
    ),
    "obs_update": (
        lambda: ops.obs_update(torch.zeros(2, 8), torch.zeros(3, 8, 8), torch.zeros(2, 8, dtype=torch.bool)),
        lambda: torch.ops.obs_kernels.obs_update(
            torch.zeros(2, 8),
            torch.zeros(3, 8, 8),
            torch.zeros(2, 8, dtype=torch.bool),
            torch.zeros(1),
            "joint",
            **REFERENCE,
        ),
    ),
    "block_saliency": (
        lambda: ops.block_saliency(torch.zeros(2, 8), torch.zeros(2, 8, 8), 3),
        lambda: torch.ops.obs_kernels.block_saliency(
            torch.zeros(2, 8), torch.zeros(2, 8, 8), 3, torch.zeros(1), "combinatorial", None, **REFERENCE
        ),
    ),
    "pack": (
        lambda: ops.pack(torch.zeros(2, 6), torch.zeros(2, 6, dtype=torch.bool), "2:4"),
        lambda: torch.ops.obs_kernels.pack(torch.zeros(2, 6), torch.zeros(2, 6, dtype=torch.bool), "2:4", **REFERENCE),
    ),
    "loss_increase": (
        lambda: ops.loss_increase(torch.zeros(2, 8), torch.zeros(3, 8, 8)),
        lambda: torch.ops.obs_kernels.loss_increase(
            torch.zeros(2, 8), torch.zeros(3, 8, 8), torch.zeros(1), **REFERENCE
        ),
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_fake_kernels_raise_the_same_text(name):
    public, registered_op = BAD_CALLS[name]
    with pytest.raises(Exception) as real:
        public()
    for call in (public, registered_op):
        with pytest.raises(type(real.value)) as fake, FakeTensorMode():
            call()
        assert str(fake.value) == str(real.value)


# backends


def call_with(name: str, backend: str | None) -> Any:
    """The public op ``name`` on small CPU tensors."""
    calls: dict[str, Callable[[], Any]] = {
        "accumulate_fisher_": lambda: ops.accumulate_fisher_(spd(2, 4), randn(3, 8), scale=1.0, backend=backend),
        "invert_spd": lambda: ops.invert_spd(spd(2, 4), backend=backend),
        "search_nm": lambda: ops.search_nm(WEIGHT, FISHER, "2:8", backend=backend),
        "search_vnm": lambda: ops.search_vnm(WEIGHT, FISHER, "2:2:8", backend=backend),
        "prune_nm": lambda: ops.prune_nm(WEIGHT, FISHER, "2:8", backend=backend),
        "prune_vnm": lambda: ops.prune_vnm(WEIGHT, FISHER, "2:2:8", backend=backend),
        "accumulate_hessian_": lambda: ops.accumulate_hessian_(
            HESSIAN.clone(), randn(3, 16), token_weight=torch.ones(3), scale=1.0, backend=backend
        ),
        "sweep_rows": lambda: ops.sweep_rows(WEIGHT, HESSIAN, "2:8", backend=backend),
        "obs_update": lambda: ops.obs_update(WEIGHT, FISHER, MASK, backend=backend),
        "loss_increase": lambda: ops.loss_increase(WEIGHT, FISHER, backend=backend),
        "block_saliency": lambda: ops.block_saliency(WEIGHT, FISHER, 4, backend=backend),
        "pack": lambda: ops.pack(WEIGHT, MASK, "2:8", backend=backend),
        "unpack": lambda: ops.unpack(PANELS, backend=backend),
        "sparse_linear": lambda: ops.sparse_linear(randn(3, 16), PANELS, backend=backend),
        "feature_major": lambda: ops.feature_major(randn(3, 16), backend=backend),
    }
    return calls[name]()


@pytest.mark.parametrize("name", dispatch.TABLE)
def test_reference_by_name(name, monkeypatch):
    monkeypatch.delenv("OBS_KERNELS_BACKEND", raising=False)
    call_with(name, "reference")
    call_with(name, None)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("name", dispatch.TABLE)
def test_a_backend_that_cannot_run_raises_with_the_reason(name, backend, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendUnavailableError, match=rf"'{backend}' cannot run {name}: \w.*backend=None") as caught:
        call_with(name, backend)
    assert isinstance(caught.value, ImportError)
    assert f"no {backend} kernel" in str(caught.value) or "CUDA tensor, got cpu" in str(caught.value)


@pytest.mark.parametrize("name", dispatch.TABLE)
def test_unknown_backend(name):
    with pytest.raises(ConfigError, match=r"backend must be None, 'reference', 'triton', 'cuda', got 'numpy'"):
        call_with(name, "numpy")


def test_environment_names_the_backend(monkeypatch):
    monkeypatch.setenv("OBS_KERNELS_BACKEND", "cuda")
    with pytest.raises(BackendUnavailableError, match="'cuda' cannot run invert_spd"):
        call_with("invert_spd", None)
    call_with("invert_spd", "reference")  # the argument wins
    monkeypatch.setenv("OBS_KERNELS_BACKEND", "numpy")
    with pytest.raises(ConfigError, match="got 'numpy'"):
        call_with("search_nm", None)
    for value in ("reference", ""):
        monkeypatch.setenv("OBS_KERNELS_BACKEND", value)
        call_with("search_nm", None)


def test_table_and_modules():
    assert set(dispatch.TABLE) == set(reference.__all__)
    for name, backends in dispatch.TABLE.items():
        assert backends[-1] == "reference" and set(backends) <= set(dispatch.BACKENDS), name
        assert callable(dispatch.kernel(name, "reference")) and callable(getattr(ops, name))


def test_choice_is_logged_once(caplog):
    dispatch._log_once.cache_clear()
    with caplog.at_level("INFO", logger="obs_kernels"):
        for _ in range(3):
            call_with("pack", None)
    lines = [r.getMessage() for r in caplog.records if "pack" in r.getMessage()]
    assert len(lines) == 1 and "reference" in lines[0] and "cpu" in lines[0]


# signatures


def parameters(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    return [(name, p.kind) for name, p in inspect.signature(function).parameters.items()]


@pytest.mark.parametrize("module", ["obs_kernels.cuda_calls", "obs_kernels.triton_kernels"])
def test_backends_have_the_signatures_of_the_reference(module):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} does not exist")
    kind = "cuda" if module.endswith("cuda_calls") else "triton"
    if kind == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    backend = importlib.import_module(module)
    for op in reference.__all__:
        name = dispatch.STEPS[op][1] if op in dispatch.STEPS else op
        assert hasattr(backend, name) == (kind in dispatch.TABLE[op]), f"{module}.{name} against dispatch.TABLE"
        if hasattr(backend, name):
            assert parameters(getattr(backend, name)) == parameters(getattr(reference, name)), name
    for name, where in dispatch.INNER_STEPS.items():
        assert hasattr(backend, name) == (kind == where)
        if kind == where:
            assert parameters(getattr(backend, name)) == parameters(getattr(reference, name)), name


@pytest.mark.parametrize("name", reference.__all__)
def test_schema_has_the_parameters_of_the_reference(name):
    schema = getattr(torch.ops.obs_kernels, name).default._schema
    assert schema.arguments[-1].name == "backend" and schema.arguments[-1].kwarg_only
    assert [a.name for a in schema.arguments[:-1]] == [n for n, _ in parameters(getattr(reference, name))]
    mutated = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert mutated == {"accumulate_fisher_": ["fisher"], "accumulate_hessian_": ["hessian"]}.get(name, [])


@pytest.mark.parametrize("name", dispatch.TABLE)
def test_options_are_keyword_only(name):
    """Everything after the tensors (and the pattern, the block) is keyword-only, and backend comes last."""
    listed = parameters(getattr(ops, name))
    assert listed[-1] == ("backend", inspect.Parameter.KEYWORD_ONLY)
    positional = {n for n, kind in listed if kind is not inspect.Parameter.KEYWORD_ONLY}
    assert positional <= {
        "weight",
        "fisher",
        "hessian",
        "grads",
        "matrices",
        "mask",
        "pattern",
        "change",
        "block",
        "sparse",
        "x",
        "bias",
    }
    assert (getattr(ops, name).__doc__ or "").strip()


# good manners


def tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t for t in (result if isinstance(result, tuple) else vars(result).values()) if isinstance(t, Tensor)]


@pytest.mark.parametrize("name", dispatch.TABLE)
def test_autocast_changes_nothing(name):
    """Arithmetic is f32 by contract, also inside a training loop's autocast."""
    expected = tensors(call_with(name, "reference"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = tensors(call_with(name, "reference"))
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and torch.equal(a, e)


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_autocast_changes_no_gradient(activation):
    grads = []
    for enabled in (False, True):
        x, bias = randn(3, 16).requires_grad_(), randn(4).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            ops.sparse_linear(x, PANELS, bias, activation=activation).square().sum().backward()
        grads.append((x.grad, bias.grad))
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])


@pytest.mark.parametrize(
    "name",
    [
        "search_nm",
        "search_vnm",
        "prune_nm",
        "prune_vnm",
        "sweep_rows",
        "obs_update",
        "loss_increase",
        "block_saliency",
        "pack",
    ],
)
def test_a_parameter_gives_results_without_gradient(name):
    """A layer's weight is a Parameter: pack(layer.weight) must give values that sparse_linear takes."""
    weight = torch.nn.Parameter(WEIGHT.clone())
    calls: dict[str, Callable[[], Any]] = {
        "search_nm": lambda: ops.search_nm(weight, FISHER, "2:8"),
        "search_vnm": lambda: ops.search_vnm(weight, FISHER, "2:2:8"),
        "prune_nm": lambda: ops.prune_nm(weight, FISHER, "2:8"),
        "prune_vnm": lambda: ops.prune_vnm(weight, FISHER, "2:2:8"),
        "sweep_rows": lambda: ops.sweep_rows(weight, HESSIAN, "2:8"),
        "obs_update": lambda: ops.obs_update(weight, FISHER, MASK),
        "loss_increase": lambda: ops.loss_increase(weight, FISHER),
        "block_saliency": lambda: ops.block_saliency(weight, FISHER, 4),
        "pack": lambda: ops.pack(weight, MASK, "2:8"),
    }
    assert not any(t.requires_grad for t in tensors(calls[name]()))


@pytest.mark.parametrize("name", dispatch.TABLE)
def test_no_print_and_the_random_state_is_left_alone(name, capfd):
    before = torch.random.get_rng_state()
    call_with(name, None)
    assert torch.equal(torch.random.get_rng_state(), before)
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def test_import_needs_no_gpu_and_starts_none():
    code = (
        "import sys, torch, obs_kernels\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'triton' not in sys.modules and not any(m.endswith('obs_kernels._C') for m in sys.modules)\n"
        "obs_kernels.ops.invert_spd(torch.eye(2)[None])\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(ops.__file__)))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.path.dirname(root)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
