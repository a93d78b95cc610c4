# SPDX-License-Identifier: Apache-2.0
"""The bench of the sparse product: inputs, floors, its check, peers that are missing; the launch is played by torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import run as bench_run
from bench.cases import matmul
from bench.harness import Check, Context, Problem, Selection, Variant, session
from bench.harness.case import DENSE
from bench.harness.plans import plan_of
from bench.harness.rows import problem_rows, with_limit
from bench.readme import matmul_table
from bench.stored import merged
from obs_kernels import ops, reference
from obs_kernels.errors import BackendUnavailableError, ConfigError, DataFormatError
from obs_kernels.launch_plan import LaunchPlan
from obs_kernels.ops import dispatch
from obs_kernels.patterns import parse_pattern
from obs_kernels.report.bench import bench_table, schema_problems
from obs_kernels.sparse.crossover import KernelTable
from obs_kernels.timing import Ceilings, CpuClock, Spread

CEILINGS = Ceilings(copy_gbps=1000.0, matmul_tflops=100.0)
GPU = Selection(device=torch.device("cuda"))


def one(pattern: str = "128:2:8", *, name: str = "8b-gate", dtype: str = "bf16", **other: Any) -> Problem:
    return matmul.problem(Selection(**other), name, 512, parse_pattern(pattern), dtype)  # type: ignore[arg-type]


def play(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A cuda backend whose launches are torch's own product; its calls. Panels of eight and more columns are gathered,
    token-major x for more than eight only.
    """
    seen: list[dict[str, Any]] = []
    module = ModuleType("obs_kernels.cuda_calls.matmul")

    def prepack(values: Tensor, codes: Tensor, columns: Tensor, pattern: str) -> Tensor:
        seen.append({"prepack": pattern})
        return reference.unpack(values, codes, columns, pattern).flatten().view(torch.uint8)

    def launch_sparse_linear(x: Tensor, packed: Tensor, bias: None, y: Tensor, **options: Any) -> LaunchPlan:
        weight = packed.view(x.dtype).view(options["rows"], options["cols"])
        product = torch.nn.functional.linear(x if options["x_layout"] == "token" else x.T, weight)
        y.copy_(product if options["y_layout"] == "token" else product.T)
        seen.append(options)
        return LaunchPlan("sparse_linear", "wgmma", 132, 384, options["config"] or "128x256")

    def gathers(pattern: Any, rows: int, cols: int, tokens: int, x_layout: str, device: torch.device) -> bool:
        assert rows % pattern.v == 0 and cols % pattern.m == 0 and tokens > 0 and device.type == "cpu"
        return bool(pattern.m > 8 or x_layout == "feature")

    def kept_columns(values: Tensor, codes: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return values, codes, columns.view(-1)[:0]

    def as_gathered(x: Tensor, x_layout: str) -> Tensor:
        seen.append({"transposed": x_layout == "token"})
        return x.T.contiguous() if x_layout == "token" else x

    def launch_gather_linear(x: Tensor, columns: Tensor, packed: Tensor, bias: None, y: Tensor, **options: Any) -> Any:
        groups = columns.shape[1]
        weight = packed.view(x.dtype).view(len(columns), options["v"], 4 * groups)
        first = torch.arange(groups)[:, None] * (options["cols"] // groups)
        for panel, (own, kept) in enumerate(zip(weight, columns, strict=True)):
            product = own @ x[(first + kept).flatten()]
            part = slice(panel * options["v"], (panel + 1) * options["v"])
            (y.T if options["y_layout"] == "token" else y)[part] = product
        seen.append({**options, "gathered": True})
        return LaunchPlan("sparse_linear", "gather", 132, 384, options["config"] or "128x256")

    vars(module).update(CONFIGS=("a", "b"), prepack=prepack, launch_sparse_linear=launch_sparse_linear)
    vars(module).update(GATHER_CONFIGS=("gather 128x256", "gather 64x256"), launch_gather_linear=launch_gather_linear)
    vars(module).update(gathers=gathers, kept_columns=kept_columns, as_gathered=as_gathered)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(dispatch.TABLE, "sparse_linear", ("cuda", "reference"))
    monkeypatch.setattr(dispatch, "_no_cuda", lambda kind: None)
    monkeypatch.delitem(dispatch.LIMITS, ("sparse_linear", "cuda"), raising=False)
    monkeypatch.delitem(dispatch.GPU_LIMITS, ("sparse_linear", "cuda"))
    return seen


@pytest.fixture
def only_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without our variants, whose limits look at a tensor of the device, a GPU's problems are data."""
    monkeypatch.setattr(matmul, "ours", lambda *_: ())


# sizes and inputs


@pytest.mark.usefixtures("only_peers")
def test_every_size_and_pattern_of_the_targets_is_there():
    found = list(matmul.problems(GPU))
    assert len(found) == len({p.label for p in found}) == 10 * 4 * 7
    assert {p.dtype for p in found} == {"bf16"} and all(p.real_shape is None for p in found)
    for name in matmul.SHAPES:
        assert {p.shape["T"] for p in found if p.name == name} == {128, 512, 2048, 12288}
    for p in found:
        parse_pattern(str(p.pattern)).check_shape((p.shape["R"], p.shape["C"]))
        peers = ["dense", "cuSPARSELt"] if p.pattern == "2:4" else ["dense"]
        assert [v.name for v in p.variants] == peers


def test_sizes_are_options():
    picked = Selection(samples=(100,), block_sizes=(4, 32), shapes=("8b-down",), dtypes=("f16", "f32"), peers=False)
    found = list(matmul.problems(picked))
    assert [(p.pattern, p.dtype) for p in found] == [(q, d) for q in ("2:4", "128:2:32") for d in ("f16", "f32")]
    assert all(p.real_shape == {"R": 4096, "C": 14336, "T": 100} for p in found)
    assert [v.name for v in found[0].variants] == ["reference", "call reference"]


@pytest.mark.parametrize("pattern", matmul.PATTERNS)
def test_inputs_are_packed_weights_of_the_pattern(pattern: str):
    p = one(pattern, name="bert-base-up")
    inputs, again = p.make(0), p.make(3)
    dense, sparse = inputs["dense"], inputs["sparse"]
    sparse.validate()
    parse_pattern(pattern).validate_mask(dense != 0)
    assert torch.equal(ops.unpack(sparse), dense) and (dense != 0).sum() == sparse.values.numel()
    packed = ops.pack(dense, dense != 0, pattern)
    assert torch.equal(packed.values, sparse.values), "every slot is taken"
    assert len(sparse.codes.unique()) == 36, "all pairs of pairs"
    for key in ("x", "dense"):
        assert torch.equal(inputs[key], again[key]) and inputs[key].data_ptr() != again[key].data_ptr()
    assert sparse.values.data_ptr() != again["sparse"].values.data_ptr()
    assert sparse.values.data_ptr() == inputs["packed"][0].data_ptr()
    y = inputs["x"].nbytes // p.shape["C"] * p.shape["R"]
    assert p.num_bytes == inputs["x"].nbytes + sparse.nbytes + y and p.set_bytes == p.num_bytes + dense.nbytes


def test_an_odd_number_of_groups_leaves_the_high_bits_free():
    shape = {"R": 64, "C": 40, "T": 3}
    pattern = parse_pattern("64:2:8")
    x, dense, values, codes, columns = matmul._random(shape, pattern, torch.bfloat16, torch.device("cpu"))  # type: ignore[arg-type]
    ops.SparseWeight(values, codes, columns, pattern, (64, 40)).validate()  # type: ignore[arg-type]
    assert x.shape == (3, 40) and dense.shape == (64, 40)


# floors and rows


@pytest.mark.usefixtures("only_peers")
def test_floors_are_the_bytes_or_the_kept_products():
    p = matmul.problem(GPU, "8b-gate", 2048, parse_pattern("128:2:8"), "bf16")  # type: ignore[arg-type]
    rows, cols, tokens = 14336, 4096, 2048
    packed = 2 * rows * cols // 4 + rows * cols // 16 + rows // 128 * cols // 8 * 4
    assert p.num_bytes == p.set_bytes == packed + 2 * tokens * (rows + cols)
    assert p.num_flops == 2 * rows * cols * tokens // 4
    dense = p.variants[0]
    assert dense.num_bytes == 2 * (rows * cols + tokens * (rows + cols)) and dense.num_flops == 2 * rows * cols * tokens
    half = matmul.problem(GPU, "8b-gate", 2048, parse_pattern("2:4"), "bf16")  # type: ignore[arg-type]
    assert half.num_flops == dense.num_flops // 2, "2:4 takes half of the dense time"


def test_ratios_are_to_the_dense_product_of_the_run():
    p = one("2:4")
    peer = Variant("cuSPARSELt", lambda i: None, lambda i: Check(0.0, 1.0), {"peer": "cuSPARSELt"}, peer=True)
    mine, dense = p.variants[0], p.variants[-1]
    assert dense.name == DENSE
    p = Problem(**{**vars(p), "variants": (mine, dense, peer)})
    facts = {"dense_flops": 2 * p.num_flops, "packed_share": 0.5625}
    checks = {mine.name: Check(0.1, 1.0, facts), DENSE: Check(0.1, 1.0, facts), "cuSPARSELt": Check(0.1, 1.0)}
    spreads = {name: Spread(us, us, us, 5) for name, us in ((mine.name, 20.0), (DENSE, 30.0), ("cuSPARSELt", 24.0))}
    ours, theirs, library = problem_rows(p, spreads, checks, {}, 2)
    assert ours["x_dense"] == pytest.approx(1.5) and ours["x_peer"] == pytest.approx({"cuSPARSELt": 1.2})
    assert library["x_dense"] == pytest.approx(1.25) and theirs["x_dense"] is None
    assert theirs["x_peer"] == library["x_peer"] == {}
    assert ours["tflops"] == pytest.approx(p.num_flops / 20e6) and ours["detail"]["packed_share"] == 0.5625
    assert with_limit(ours, CEILINGS)["limit_share"] == pytest.approx(CEILINGS.floor_us(p.num_bytes, p.num_flops) / 20)
    head, cells = bench_table({"rows": [ours, theirs, library]})
    effective = [row[head.index("effective TFLOP/s")] for row in cells]
    assert effective == [f"{2 * p.num_flops / us / 1e6:,.3g}" for us in (20, 30)] + ["–"]
    assert [row[head.index("× dense")] for row in cells] == ["1.50", "–", "1.25"]


# the check


def product(inputs: dict[str, Any]) -> Tensor:
    return (inputs["x"].float() @ inputs["dense"].float().T).to(inputs["x"].dtype)


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_the_check_sees_what_it_must(dtype: str):
    inputs = one("64:2:16", dtype=dtype, samples=(512,)).make(0)

    def check(change: Callable[[Tensor], Any], peer: bool = False) -> bool:
        def run(given: dict[str, Any]) -> Tensor:
            y = product(given)
            change(y)
            return y

        return matmul.check_product(run, inputs, facts={}, peer=peer).ok

    assert check(lambda y: None) and check(lambda y: None, peer=True)
    for peer in (False, True):
        assert not check(lambda y: y.zero_(), peer)
        assert not check(lambda y: y[-1, -1].fill_(float("nan")), peer)
        assert not check(lambda y: y[3, 5].mul_(-1), peer)
        assert not check(lambda y: y.copy_(y.roll(1, 0)), peer)
    last = inputs["x"][:, -1:].float() * inputs["dense"][:, -1].float()
    assert not check(lambda y: y.sub_(last)), "one column left out"
    with pytest.raises((RuntimeError, ValueError)):
        matmul.check_product(lambda i: product(i).T, inputs, facts={})
    assert matmul.check_product(product, inputs, facts={"dense_flops": 5}).detail == {"dense_flops": 5}


def test_the_check_goes_through_all_tokens(gen: torch.Generator):
    x, dense = torch.randn(5000, 8, generator=gen), torch.randn(4, 8, generator=gen)
    for bad in (0, 2048, 4999):

        def run(given: dict[str, Any], bad: int = bad) -> Tensor:
            y = product(given)
            y[bad] += 1
            return y

        assert not matmul.check_product(run, {"x": x, "dense": dense}, facts={}).ok
    assert matmul.check_product(product, {"x": x, "dense": dense}, facts={}).ok


# the launch


def checked(p: Problem) -> dict[str, Check]:
    """The checks of what runs here, on one set."""
    inputs = p.make(0)
    checks = {v.name: v.check(inputs) for v in p.variants if v.path == "kernel"}
    assert all(check.ok for check in checks.values())
    return checks


def test_the_launch_takes_a_weight_that_was_prepacked_once(monkeypatch: pytest.MonkeyPatch):
    seen = play(monkeypatch)
    p = one("2:4", backends=("cuda",), sweep=True)
    assert [v.name for v in p.variants] == ["cuda", "cuda, y feature-major", "cuda a", "cuda b", "call cuda", DENSE]
    checks = checked(p)
    assert checks["cuda"].detail["prepacked_share"] == 1.0 and "prepacked_share" not in checks[DENSE].detail
    assert checks["cuda"].detail["packed_share"] == pytest.approx(1 / 2 + 1 / 16)
    assert [entry for entry in seen if "prepack" in entry] == [{"prepack": "2:4"}]
    launches = [(entry["y_layout"], entry["config"]) for entry in seen if "rows" in entry]
    assert launches == [("token", None), ("feature", None), ("token", "a"), ("token", "b")]
    assert all(entry["activation"] == "" and entry["x_layout"] == "token" for entry in seen if "rows" in entry)
    plan = plan_of("cuda", lambda: p.variants[2].run(p.make(0)))
    assert plan == {"path": "wgmma", "blocks": 132, "threads": 384, "config": "a"}
    assert p.variants[2].config["forced"] and p.variants[0].config == {"backend": "cuda", "as": "2:4"}
    assert p.variants[4].path == "call" and p.variants[0].path == "kernel"
    assert p.variants[4].config == p.variants[0].config


@pytest.mark.parametrize(("pattern", "run_as"), [("64:2:8", "2:4"), ("64:2:16", "gathered")])
def test_panels_also_take_x_transposed_before(monkeypatch: pytest.MonkeyPatch, pattern: str, run_as: str):
    seen = play(monkeypatch)
    p = one(pattern, backends=("cuda",))
    assert [v.name for v in p.variants] == ["cuda", "cuda, x feature-major", "call cuda", DENSE]
    token, feature, call, _ = p.variants
    assert token.config == call.config == {"backend": "cuda", "as": run_as}
    assert feature.config == {"backend": "cuda", "as": "gathered", "x": "feature-major"}
    inputs = p.make(0)
    shares = [v.check(inputs).detail["prepacked_share"] for v in (token, feature)]
    kept = 4 / int(pattern.split(":")[-1])
    assert shares == [1.0 if run_as == "2:4" else kept, kept], "the copy that it read"
    before = [pattern, "2:4"] if run_as == "2:4" else ["2:4"]
    assert [entry["prepack"] for entry in seen if "prepack" in entry] == before
    given, kept_before = inputs["x, feature-major"], len(inputs)
    seen.clear()
    for v in (token, feature):
        v.run(inputs)
    assert inputs["x, feature-major"] is given and len(inputs) == kept_before, "prepared outside of the times"
    assert not any("prepack" in entry for entry in seen)
    transposed = [entry["transposed"] for entry in seen if "transposed" in entry]
    assert transposed == ([False] if run_as == "2:4" else [True, False]), "a call on token-major x has to"
    assert plan_of("cuda", lambda: feature.run(inputs))["path"] == "gather"


def test_a_sweep_forces_both_kernels(monkeypatch: pytest.MonkeyPatch):
    seen = play(monkeypatch)
    p = one("64:2:16", backends=("cuda",), sweep=True)
    tiles = ["cuda 2:4", "cuda a", "cuda b", "cuda gather 64x256"]
    names = ["cuda", "cuda, x feature-major", "cuda, y feature-major", *tiles, "call cuda", DENSE]
    assert [v.name for v in p.variants] == names
    checks = checked(p)
    assert {name: checks[name].detail["prepacked_share"] for name in tiles} == dict(
        zip(tiles, (1, 1, 1, 0.25), strict=True)
    )
    assert [v.config.get("forced", False) for v in p.variants] == [v.name in tiles for v in p.variants]
    assert [entry["prepack"] for entry in seen if "prepack" in entry] == ["2:4", "64:2:16"]
    launches = [(entry.get("gathered", False), entry["y_layout"], entry["config"]) for entry in seen if "rows" in entry]
    forced = [(False, "token", None), (False, "token", "a"), (False, "token", "b"), (True, "token", "gather 64x256")]
    assert launches == [(True, "token", None), (True, "token", None), (True, "feature", None), *forced]
    assert [v.name for v in one("128:2:8", backends=("cuda",), sweep=True).variants if "gather" in v.name] == [
        "cuda gather 128x256",
        "cuda gather 64x256",
    ]
    odd = matmul.problem(
        Selection(backends=("cuda",), sweep=True, peers=False),
        "8b-gate",
        matmul.CPU_SHARE * 3,
        parse_pattern("64:2:16"),  # type: ignore[arg-type]
        "bf16",
    )
    assert odd.shape["T"] == 3 and not any("x feature" in v.name or "gather" in v.name for v in odd.variants)


def test_kernel_rows_are_those_of_calls_on_token_major_x(monkeypatch: pytest.MonkeyPatch):
    play(monkeypatch)
    p = one("64:2:16", backends=("cuda",), sweep=True)
    us = {v.name: 9.0 if v.name == "cuda" else 20.0 if v.name == DENSE else 1.0 for v in p.variants}
    spreads = {name: Spread(time, time, time, 5) for name, time in us.items()}
    rows = problem_rows(p, spreads, {name: Check(0.1, 1.0) for name in us}, {}, 2)
    (found,) = KernelTable.from_bench({"rows": rows, "env": {"device": "a GPU", "commit": "abc"}}).rows
    assert (found.pattern, found.sparse_us, found.dense_us) == ("64:2:16", 9.0, 20.0)
    for name in ("cuda", DENSE):  # either one's unsteady time decides nothing
        unsteady = problem_rows(
            p, {**spreads, name: Spread(us[name], us[name], 2 * us[name], 5)},
            {name: Check(0.1, 1.0) for name in us}, {}, 2,
        )  # fmt: skip
        with pytest.raises(DataFormatError, match="steady"):
            KernelTable.from_bench({"rows": unsteady, "env": {"device": "a GPU", "commit": "abc"}})


def test_the_readme_shows_panels_once_there_are_rows(tmp_path: Path):
    def row(pattern: str, tokens: int, x_dense: float, **config: Any) -> dict[str, Any]:
        same = {"name": "8b-gate", "shape": {"R": 14336, "C": 4096, "T": tokens}, "path": "kernel", "x_peer": {}}
        same |= {"p20": 10.0, "p80": 12.0}
        return {**same, "pattern": pattern, "x_dense": x_dense, "config": {"backend": "cuda", **config}}

    def table(rows: list[dict[str, Any]]) -> list[str]:
        path = tmp_path / "matmul.json"
        path.write_text(json.dumps({"rows": rows, "env": {"device": "a GPU", "commit": "abc"}}))
        return matmul_table([path]).splitlines()

    rows = [row("2:4", tokens, 1.5) | {"x_peer": {"cuSPARSELt": 1.04}} for tokens in (512, 2048)]
    rows += [row("128:2:8", tokens, 1.6) for tokens in (512, 2048)]
    before = table(rows)
    assert before[-1] == "| 2,048 tokens, 2:4 | 1.50 (1.04) |"
    assert before[0].endswith("best algorithm). From 4,096 x 4,096 and 2,048 tokens on: 2:4 1.50 to 1.50.")
    rows += [row("128:2:8", 2048, 2.25, x="feature-major"), row("128:2:8", 2048, 9.0, x="feature-major", forced=True)]
    rows += [row("128:2:8", 2048, 9.0, y="feature-major"), row("2:4", 2048, 9.0, forced=True)]
    after = table(rows)
    assert after[-2:] == [
        "| 512 tokens, 2:4<br>128:2:8 | 1.50 (1.04)<br>1.60 / - |",
        "| 2,048 tokens, 2:4<br>128:2:8 | 1.50 (1.04)<br>1.60 / 2.25 |",
    ]
    assert "best algorithm); 128:2:8: x token-major / feature-major." in after[0] and len(after) == len(before)
    assert after[0].endswith("2:4 1.50 to 1.50, 128:2:8 1.60 to 1.60 / 2.25 to 2.25.")
    peer = rows[0] | {"config": {"peer": "cuSPARSELt"}}
    assert table([*rows, peer]) == after
    unsteady = table([*rows, peer | {"p80": 20.0}])
    assert unsteady[-2:] == [after[-2].replace("(1.04)", "(unsteady)"), after[-1]]
    dense = rows[0] | {"config": {"peer": "F.linear"}}
    assert table([*rows, dense]) == after
    unsteady = table([*rows, dense | {"p80": 13.0}])
    assert unsteady[-2:] == [after[-2].replace("1.50", "unsteady"), after[-1]]
    rows[0]["p80"] = rows[-5]["p80"] = 13.0
    unsteady = table(rows)
    assert unsteady[-2:] == [
        after[-2].replace("1.50 (1.04)", "unsteady (unsteady)"),
        after[-1].replace("1.60", "unsteady"),
    ]
    assert '"unsteady": ' in unsteady[0] and "unsteady" not in after[0]


def test_results_of_several_runs_make_one_table(tmp_path: Path) -> None:
    """Each layer with the commit that measured it; a cell that two runs have, and two devices, are refused."""

    def stored(name: str, commit: str, size: int, device: str = "a GPU", date: str = "2026-01-01") -> Path:
        shape = {"R": size, "C": size, "T": 2048}
        own = {"name": f"layer {size}", "shape": shape, "path": "kernel", "pattern": "2:4", "op": "sparse_linear"}
        times = {"dtype": "bf16", "us": 2.0, "p20": 2.0, "p80": 2.0, "x_dense": 1.5, "x_peer": {}}
        rows = [own | times | {"config": {"backend": "cuda"}}, own | times | {"config": {"peer": "F.linear"}}]
        path = tmp_path / name
        path.write_text(json.dumps({"rows": rows, "env": {"device": device, "commit": commit, "date": date}}))
        return path

    old, new = stored("b.json", "abc", 64), stored("a.json", "def", 128, date="2026-02-02")
    found = merged([old, new])
    assert (
        found["env"]["commit"] == "def, abc" and [row["commit"] for row in found["rows"]] == ["def"] * 2 + ["abc"] * 2
    )
    table = matmul_table([old, new]).splitlines()
    assert "commit def (128 x 128), abc (64 x 64), 2:4" in table[0]
    assert table[-1].count("1.50") == 2
    assert "commit abc, 2:4" in matmul_table([old])
    assert len(KernelTable.from_bench(found).rows) == 2
    with pytest.raises(ConfigError, match="a cell once"):
        merged([old, new, stored("c.json", "ghi", 64)])
    with pytest.raises(ConfigError, match="one device"):
        merged([old, stored("d.json", "ghi", 256, device="another")])


# the peer


def cusparselt_problem(error: Exception | None) -> Problem:
    """A problem with cuSPARSELt on CPU tensors; its call raises ``error``, or is right."""

    def run(inputs: dict[str, Any]) -> Tensor:
        if error is not None:
            raise error
        return product(inputs)

    def check(inputs: dict[str, Any]) -> Check:
        return matmul.check_cusparselt(run, inputs, facts={})

    peer = Variant("cuSPARSELt", run, check, {"peer": "cuSPARSELt"}, peer=True)
    p = one("2:4", name="bert-base-attention")
    return Problem(**{**vars(p), "variants": (*p.variants, peer)})


def measured(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> Context:
    monkeypatch.setattr(session, "cache_bytes", lambda device: 1)
    context = Context(Selection(), CpuClock(), CEILINGS, seconds=0.0)
    context.add(context.measure(problem))
    return context


def test_a_library_that_is_missing_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    context = measured(cusparselt_problem(None), monkeypatch)
    assert len(context.rows) == 3 and not context.refused
    assert context.skipped[0]["variant"] == "cuSPARSELt" and "no cuSPARSELt" in context.skipped[0]["why"]


def test_its_own_errors_do_not_end_the_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    text = "CUDA error: operation not supported when calling `cusparseLtMatmulPlanInit(`"
    context = measured(cusparselt_problem(RuntimeError(text)), monkeypatch)
    assert len(context.rows) == 3 and not context.refused
    assert "operation not supported" in context.skipped[0]["why"]
    context = measured(cusparselt_problem(RuntimeError("shapes differ")), monkeypatch)
    assert context.refused[0]["variant"] == "cuSPARSELt" and not context.skipped
    with pytest.raises(RuntimeError, match="illegal memory access"):
        measured(cusparselt_problem(RuntimeError("CUDA error: an illegal memory access")), monkeypatch)
    context = measured(cusparselt_problem(torch.OutOfMemoryError("out of memory")), monkeypatch)
    assert context.skipped[0]["why"] == "out of memory"
    assert len(measured(cusparselt_problem(None), monkeypatch).rows) == 4


def test_an_op_of_ours_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch):
    def check(inputs: dict[str, Any]) -> Check:
        raise BackendUnavailableError("no kernel")

    p = one("2:4", name="bert-base-attention")
    broken = Variant("cuda", lambda i: None, check, {"backend": "cuda"})
    context = measured(Problem(**{**vars(p), "variants": (broken,)}), monkeypatch)
    assert context.refused[0]["variant"] == "cuda" and not context.skipped


def test_the_algorithm_is_searched_once_and_the_result_is_token_major(monkeypatch: pytest.MonkeyPatch):
    searched: list[tuple[Any, ...]] = []

    class Library:
        @staticmethod
        def mm_search(weight: Tensor, x: Tensor, *options: Any) -> tuple[int, int, int, int]:
            searched.append((weight.shape, x.shape, *options))
            return 7, 2, 1, 9

    def multiply(weight: Tensor, x: Tensor, **options: Any) -> Tensor:
        assert options == {"transpose_result": True, "alg_id": 7, "split_k": 2, "split_k_mode": 1}
        return (weight @ x).T.contiguous()

    monkeypatch.setattr(torch._C, "_cusparselt", Library, raising=False)
    monkeypatch.setattr(torch, "_cslt_compress", torch.clone)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    variants = list(matmul._peers(GPU, parse_pattern("2:4"), 1, 2))  # type: ignore[arg-type]
    p = one("2:4", name="bert-base-attention")
    inputs = p.make(0)
    check = variants[1].check(inputs)
    assert check.ok and check.detail == {"dense_flops": 2, "algorithm": [(7, 2, 1)]}
    variants[1].run(p.make(1))
    assert searched == [((256, 64), (64, p.shape["T"]), None, None, None, True)]


# the command


def test_a_run_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(bench_run, "measure_ceilings", lambda device, clock: CEILINGS)
    monkeypatch.setattr(session, "cache_bytes", lambda device: 1)
    target = tmp_path / "out.json"
    arguments = ["--op", "matmul", "--shape", "bert-base-attention,70b-gate", "--block-size", "4,8", "--seconds", "0"]
    assert bench_run.main([*arguments, "--device", "cpu", "--backend", "reference", "--json", str(target)]) == 0
    stored = json.loads(target.read_text())
    assert schema_problems(stored) == [] and stored["refused"] == stored["skipped"] == []
    assert len(stored["rows"]) == 2 * 4 * 3
    for row in stored["rows"]:
        assert row["op"] == "sparse_linear" and (row["x_dense"] is None) == ("peer" in row["config"])
        assert row["detail"]["real_shape"]["T"] == 512
        assert ("packed_share" in row["detail"]) == ("backend" in row["config"])
    assert {row["path"] for row in stored["rows"]} == {"kernel", "call"}
    shown = capsys.readouterr().out
    assert "× dense" in shown and "peer: F.linear" in shown and "effective" in shown
