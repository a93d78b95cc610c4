# SPDX-License-Identifier: Apache-2.0
"""The kernel bench: arithmetic of rows, the schema, red checks, and whole runs on sizes that take no time."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import cases, peers
from bench import run as bench_run
from bench.cases import fisher, inverse, search, update
from bench.harness import Case, Check, Context, Problem, Selection, Variant, backends, case, make_row, plans, session
from bench.harness.rows import problem_rows, with_limit
from obs_kernels import reference
from obs_kernels.errors import ConfigError
from obs_kernels.ops import dispatch
from obs_kernels.patterns import parse_pattern
from obs_kernels.report.bench import bench_facts, bench_table, is_bench_result, ratio_text, schema_problems
from obs_kernels.timing import Ceilings, Spread

RESULTS = Path(__file__).parents[1] / "bench" / "results"
CEILINGS = Ceilings(copy_gbps=1000.0, matmul_tflops=100.0)


class CountingClock:
    """Each sample takes one microsecond more than the one before it."""

    def __init__(self) -> None:
        self.count = 0.0

    def now(self) -> float:
        return 0.0

    def sample(self, calls: Sequence[Callable[[], object]], *, spin_us: float) -> float:
        for call in calls:
            call()
        self.count += 1.0
        return self.count

    def estimate(self, call: Callable[[], object]) -> tuple[float, float]:
        call()
        return 1000.0, 1.0


def variant(name: str, *, check: Callable[..., Check] | None = None, **other: Any) -> Variant:
    config = {"peer": name} if other.get("peer") else {"backend": name}
    green = Check(1e-7, 1e-6)
    fields: dict[str, Any] = {"config": config, **other}
    return Variant(name, lambda inputs: inputs["x"].add_(1), check or (lambda inputs: green), **fields)


def problem(*variants: Variant, **other: Any) -> Problem:
    fields: dict[str, Any] = {
        "op": "op_",
        "name": "tiny",
        "shape": {"B": 4, "D": 2},
        "dtype": "f32",
        "num_bytes": 1000,
        "num_flops": 5000,
        "set_bytes": 1 << 40 if other.pop("huge", False) else 1 << 30,
        "make": lambda number: {"x": torch.zeros(2)},
        "variants": variants,
    }
    return Problem(**{**fields, **other})


def context(**other: Any) -> Context:
    return Context(Selection(), CountingClock(), CEILINGS, seconds=0.0, **other)


@pytest.fixture
def doc() -> dict[str, Any]:
    """A whole result of two rows."""
    ours = make_row(
        "op_",
        {"B": 4},
        us=10.0,
        p20=9.0,
        p80=12.0,
        path="kernel",
        config={"backend": "triton", "path": "tile", "config": "16x16"},
        dtype="f32",
        num_bytes=1000,
        num_flops=5000,
        x_peer={"torch": 0.5},
        parts={"first": 4.0},
    )
    theirs = make_row("op_", {"B": 4}, us=5.0, p20=5.0, p80=5.0, path="kernel", config={"peer": "torch"})
    keys = ("device", "compute_capability", "driver", "cuda", "torch", "triton", "python", "commit", "dirty", "date")
    env = dict.fromkeys((*keys, "clocks")) | {"label": "CPU", "device": "a CPU", "torch": "2", "date": "today"}
    return session.document(
        [ours, theirs], env=env, ceilings=CEILINGS, command="python -m bench.run", refused=[], skipped=[]
    )


# rows


def test_the_arithmetic_of_a_row():
    row = make_row("op_", {"B": 1}, us=50.0, path="kernel", config={"backend": "b"}, num_bytes=10**7, num_flops=10**9)
    assert row["gbps"] == pytest.approx(200.0) and row["tflops"] == pytest.approx(20.0)
    assert with_limit(row, CEILINGS)["limit_share"] == pytest.approx(0.2)  # 10 us of bytes, 10 us of flops, of 50
    assert with_limit(row, Ceilings(100.0, 100.0))["limit_share"] == pytest.approx(2.0)
    assert with_limit(row, Ceilings(1e6, 25.0))["limit_share"] == pytest.approx(0.8)
    whole = make_row("job", {"R": 2}, us=1e6, path="model", config={}, parts={"forward": 7e5})
    assert with_limit(whole, CEILINGS)["limit_share"] is None and whole["parts"] == {"forward": 7e5}


def test_ratios_are_by_share_of_the_work():
    """A peer that takes one of 8 gradients in 20 us takes 160 us for all."""
    found = problem(
        variant("mine"),
        variant("whole", peer=True),
        variant("step", peer=True, share=1 / 8, shape={"B": 4, "D": 2, "S": 1}, num_bytes=200, num_flops=300),
        real_shape={"B": 400, "D": 2},
    )
    spreads = {name: Spread(us, us - 1, us + 1, 7) for name, us in (("mine", 40.0), ("whole", 30.0), ("step", 20.0))}
    rows = problem_rows(found, spreads, dict.fromkeys(spreads, Check(0.5, 1.0)), {"mine": {"path": "tile"}}, 3)
    mine, whole, step = rows
    assert mine["x_peer"] == pytest.approx({"whole": 0.75, "step": 4.0})
    assert whole["x_peer"] == step["x_peer"] == {}
    assert mine["config"] == {"backend": "mine", "path": "tile"} and step["config"] == {"peer": "step"}
    assert step["shape"]["S"] == 1 and step["gbps"] == pytest.approx(0.01) and step["detail"]["flops"] == 300
    assert mine["detail"]["real_shape"] == {"B": 400, "D": 2} and step["detail"]["real_shape"]["S"] == 1
    assert mine["detail"]["repeats"] == 7 and mine["detail"]["buffer_sets"] == 3 and mine["detail"]["error"] == 0.5


def test_slower_is_printed_as_such(doc: dict[str, Any]):
    assert [ratio_text(x) for x in (0.999, 1.0, 2.5, None)] == ["1.00 slower", "1.00", "2.50", "–"]
    head, rows = bench_table(doc)
    assert rows[0][head.index("× torch")] == "0.50 slower" and "× dense" not in head and "pattern" not in head
    assert rows[0][head.index("config")] == "triton tile 16x16" and rows[1][head.index("config")] == "peer: torch"


# the schema


def test_a_whole_document_has_no_problems(doc: dict[str, Any]):
    assert schema_problems(doc) == [] and schema_problems(json.loads(json.dumps(doc))) == []


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("env",), None, "env is missing"),
        (("rows",), {}, "rows is missing or no list"),
        (("env", "label"), "TPU", "env.label"),
        (("ceilings", "copy_gbps"), 0.0, "ceilings.copy_gbps"),
        (("rows", 0, "us"), -1.0, "us must be a positive number"),
        (("rows", 0, "us"), float("nan"), "us must be a positive number"),
        (("rows", 0, "us"), "5", "us has the wrong type str"),
        (("rows", 0, "us"), True, "us has the wrong type bool"),
        (("rows", 0, "p20"), 11.0, "in that order"),
        (("rows", 0, "p80"), None, "in that order"),
        (("rows", 0, "ok"), False, "a red check makes no row"),
        (("rows", 0, "path"), "graph", "path must be one of"),
        (("rows", 0, "x_peer"), {"torch": -2.0}, "x_peer['torch'] must be positive"),
        (("rows", 0, "parts"), {"first": None}, "parts['first'] must be positive"),
        (("rows", 0, "shape"), {"B": 1.5}, "whole numbers by letter"),
        (("rows", 0, "config"), {"path": "tile"}, "a backend or a peer"),
        (("rows", 0, "speed"), 3.0, "speed is no key of a row"),
        (("refused",), [{"op": "x"}], "refused[0]"),
    ],
)
def test_what_is_wrong_is_named(doc: dict[str, Any], path: tuple[Any, ...], value: Any, said: str):
    place: Any = doc
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert any(said in found for found in schema_problems(doc)), schema_problems(doc)


def test_every_key_of_a_row_is_needed(doc: dict[str, Any]):
    for key in list(doc["rows"][0]):
        broken = copy.deepcopy(doc)
        del broken["rows"][0][key]
        optional = key in ("name", "parts", "detail")
        assert schema_problems(broken) == ([] if optional else [f"rows[0]: {key} is missing"])


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.json")), ids=lambda path: path.name)
def test_committed_results_keep_the_schema(path: Path):
    stored = json.loads(path.read_text(encoding="utf-8"))
    if not is_bench_result(stored):
        pytest.skip("another schema")
    assert schema_problems(stored) == []
    assert not stored["refused"], "a result with red checks is not committed"
    assert stored["env"]["complete"], "a run that was cut off is not committed"


# checks before times


def test_after_the_deadline_no_problem_begins(monkeypatch: pytest.MonkeyPatch):
    """It is named as left out; what was measured before stays."""
    found = context()
    first = problem(variant("good"))

    def problems(selection: Selection) -> Iterator[Problem]:
        yield first
        yield first
        found.deadline = 0.0
        yield first

    found.run_case(Case(topic="t", op=first.op, summary="", shapes=(), problems=problems))
    assert len(found.rows) == 2
    assert [(entry["variant"], entry["why"]) for entry in found.skipped] == [
        ("all", "not reached in the minutes given")
    ]


def test_a_red_check_makes_no_row():
    def raises(inputs: Any) -> Check:
        raise RuntimeError("launch failed\nmore")

    def no_memory(inputs: Any) -> Check:
        raise torch.OutOfMemoryError("out of memory")

    found = context()
    rows = found.measure(
        problem(
            variant("good"),
            variant("wrong", check=lambda inputs: Check(2.0, 1.0)),
            variant("nan", check=lambda inputs: Check(float("nan"), 1.0)),
            variant("raises", check=raises),
            variant("forced", check=raises, config={"backend": "triton", "forced": True}),
            variant("big", check=no_memory),
        )
    )
    assert [row["config"]["backend"] for row in rows] == ["good"] and rows[0]["ok"]
    assert [entry["variant"] for entry in found.refused] == ["wrong", "nan", "raises"]
    assert found.refused[0]["why"] == "error 2 against float64 is above 1"
    assert found.refused[2]["why"] == "RuntimeError: launch failed"
    assert [entry["variant"] for entry in found.skipped] == ["forced", "big"], "these say nothing of being right"


def test_nothing_is_timed_if_all_checks_are_red():
    found = context()
    assert found.measure(problem(variant("wrong", check=lambda inputs: Check(2.0, 1.0)))) == []
    assert found.clock.count == 0  # type: ignore[attr-defined]


def test_what_does_not_fit_is_skipped_with_the_sizes():
    found = context()
    assert found.measure(problem(variant("good"), set_bytes=1 << 60)) == []
    assert "1152921504.6 GB" in found.skipped[0]["why"] and not found.refused


def test_a_case_may_make_its_own_rows():
    def run(given: Context) -> list[dict[str, Any]]:
        return [make_row("job", {"S": 8}, us=2e6, path="model", config={}, parts={"forward": 1e6, "update": 5e5})]

    saved: list[int] = []
    found = context()
    found.on_rows = lambda: saved.append(len(found.rows))
    found.run_case(Case(topic="job", op="job", summary="", shapes=("all",), run=run))
    assert saved == [1] and found.rows[0]["path"] == "model"


# the plan of a call


@dataclass(frozen=True)
class Plan:
    op: str
    path: str
    blocks: int
    config: str = ""


def test_the_plan_is_what_the_launcher_returned(monkeypatch: pytest.MonkeyPatch):
    package, inner = ModuleType("fake_kernels"), ModuleType("fake_kernels.topic")

    def launch_it(blocks: int) -> Plan:
        return Plan("op_", "tile", blocks)

    inner.launch_it = launch_it  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_kernels", package)
    monkeypatch.setitem(sys.modules, "fake_kernels.topic", inner)
    monkeypatch.setitem(dispatch.MODULES, "fake", "fake_kernels")
    assert plans.plan_of("fake", lambda: inner.launch_it(7)) == {"path": "tile", "blocks": 7}
    twice = plans.plan_of("fake", lambda: (inner.launch_it(7), inner.launch_it(8)))
    assert twice == {"path": "tile", "blocks": 7, "launches": 2}
    assert inner.launch_it is launch_it, "the launcher is put back"
    with pytest.raises(ZeroDivisionError):
        plans.plan_of("fake", lambda: inner.launch_it(1 // 0))
    assert inner.launch_it is launch_it
    assert plans.plan_of("reference", lambda: None) == plans.plan_of("unknown", lambda: None) == {}


# the cases


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that take no time, and ceilings that are not measured."""
    monkeypatch.setattr(case, "CPU_SHARE", 20_000)
    monkeypatch.setattr(bench_run, "measure_ceilings", lambda device, clock: CEILINGS)
    monkeypatch.setattr(session, "cache_bytes", lambda device: 1)


def test_every_file_of_the_cases_is_in_the_registry():
    files = {path.stem for path in Path(cases.__file__).parent.glob("*.py")} - {"__init__"}
    assert files == set(cases.TOPICS)
    for topic in cases.TOPICS:
        loaded = cases.load(topic)
        assert loaded.topic == topic and loaded.shapes and (loaded.problems or loaded.run)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("topic", ["fisher", "inverse", "update"])
def test_every_size_has_its_variants_and_peers(topic: str):
    found = list(cases.load(topic).problems(Selection()))  # type: ignore[misc]
    assert (
        len({p.label for p in found}) == len(found) == {"fisher": 2 * 7 * 2 * 2, "inverse": 2 * 7, "update": 20}[topic]
    )
    for one in found:
        names = [v.name for v in one.variants]
        assert len(set(names)) == len(names) and {"reference", "call reference"} <= set(names)
        assert sum(v.peer for v in one.variants) == 2
        assert one.real_shape is not None and one.real_shape["B"] > one.shape["B"]
        inputs = one.make(0)
        held = sum(t.numel() * t.element_size() for t in inputs.values())
        outputs = {"fisher": 0, "inverse": held, "update": list(inputs.values())[-1].nbytes}[topic]
        assert one.set_bytes == held + outputs, "the results belong to it"
        again = one.make(0)
        assert all(torch.equal(t, again[name]) for name, t in inputs.items())
        assert not torch.equal(list(one.make(1).values())[-1], list(inputs.values())[-1])


def test_floors_are_the_bytes_of_the_definition():
    one = fisher.problem(Selection(), "14M", 8, 32, "bf16")
    blocks = one.shape["B"]
    assert one.num_bytes == 2 * 4 * blocks * 64 + 2 * 32 * blocks * 8 and one.num_flops == 2 * 32 * blocks * 64
    step = one.variants[-1]
    assert step.num_bytes == 2 * 4 * blocks * 64 + 2 * blocks * 8 and step.share == 1 / 32
    assert one.real_shape == {"B": 14_155_776 // 8, "D": 8, "S": 32}
    other = inverse.problem(Selection(), "14M", 128, "f32")
    assert other.num_bytes == 2 * 4 * other.shape["B"] * 128**2 and other.real_shape == {"B": 110_592, "D": 128}


def test_peers_and_forced_records_are_options():
    few = fisher.problem(Selection(peers=False), "14M", 8, 32, "f32")
    assert not any(v.peer for v in few.variants)
    assert backends.runnable("accumulate_fisher_", Selection(backends=("triton",))) == []
    named = fisher.problem(Selection(backends=("reference",), sweep=True), "14M", 8, 32, "f32")
    assert [v.name for v in named.variants][:2] == ["reference", "call reference"]


def spoil(where: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def run(fisher_: Tensor, grads: Tensor) -> Tensor:
        return where(peers.baddbmm_fisher_(fisher_, grads, scale=fisher.SCALE))

    return run


def test_the_check_of_the_fisher_sees_what_it_must():
    inputs = {"fisher": torch.full((300, 8, 8), 5.0), "grads": torch.randn(32, 2400)}
    assert fisher.check_accumulate(spoil(lambda f: f), inputs).ok
    assert not fisher.check_accumulate(lambda f, g: f, inputs).ok, "nothing done"
    assert not fisher.check_accumulate(spoil(lambda f: f.mul_(1 + 1e-4)), inputs).ok
    for block in (0, 150, 299):
        wrong = fisher.check_accumulate(spoil(lambda f, b=block: f[b].zero_()), inputs)  # type: ignore[misc]
        seen = block in backends.some_blocks(300).tolist()
        assert wrong.ok != seen and (seen or block == 150)

    def tf32(fisher_: Tensor, grads: Tensor) -> Tensor:
        rounded = ((grads.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
        return peers.baddbmm_fisher_(fisher_, rounded, scale=fisher.SCALE)

    assert not fisher.check_accumulate(tf32, inputs).ok, "products of f32 gradients in plain tf32"


def test_the_check_of_the_inverse_sees_what_it_must():
    matrices = inverse.random_spd(200, 16, torch.float32, torch.device("cpu"), seed=0)
    inputs = {"matrices": matrices}
    assert torch.equal(matrices, inverse.random_spd(200, 16, torch.float32, torch.device("cpu"), seed=0))
    for run in (peers.cholesky_inverse, peers.linalg_inverse):
        assert inverse.check_inverse(run, inputs, damp=0.0).ok
        assert not inverse.check_inverse(run, inputs, damp=0.01).ok, "the damping left out"
    assert not inverse.check_inverse(lambda a: peers.linalg_inverse(a) * (1 + 1e-3), inputs, damp=0.0).ok
    failed = (torch.linalg.inv(matrices), torch.ones(200, dtype=torch.int32))
    assert not inverse.check_inverse(lambda a: failed, inputs, damp=0.0).ok


def test_the_check_of_the_update_sees_what_it_must():
    inputs = update.make_inputs(200, 16, 4, torch.float32, torch.device("cpu"), seed=0)
    assert (inputs["mask"].sum(1) == 4).all()
    for solve in (peers.lu_solve, peers.cholesky_solve):

        def run(given: dict[str, Tensor], damp: float = update.DAMP, solve: peers.Solve = solve) -> Tensor:
            return peers.kept_solve(given["weight"], given["fisher"], given["mask"], solve=solve, damp=damp)

        assert update.check_update(run, inputs).ok
        assert not update.check_update(lambda given, run=run: run(given, 0.0), inputs).ok, "the damping left out"
        assert not update.check_update(lambda given, run=run: run(given) * (1 + 1e-4), inputs).ok
        assert not update.check_update(lambda given, run=run: run(given) + ~given["mask"] * 1e-30, inputs).ok
    assert not update.check_update(lambda given: given["weight"] * given["mask"], inputs).ok, "only pruned"


@pytest.mark.parametrize("pattern", ["2:8", "4:2:8"])
def test_the_check_of_the_search_sees_what_it_must(pattern: str):
    inputs = search.make(8, 32, 8, torch.device("cpu"), seed=0)
    op = "search_vnm" if pattern.count(":") == 2 else "search_nm"

    def run(weight: Tensor, fisher_: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        mask, saliency = search._public(op, pattern, {"backend": "reference"}, weight, fisher_)
        return mask, saliency * factor

    parsed = parse_pattern(pattern)
    assert search.check_search(run, inputs, pattern=parsed).ok
    assert not search.check_search(partial(run, factor=1.01), inputs, pattern=parsed).ok

    def pairwise(weight: Tensor, fisher_: Tensor) -> tuple[Tensor, Tensor]:
        return search._public(op, pattern, {"backend": "reference", "method": "pairwise"}, weight, fisher_)

    assert search.check_pairwise(pairwise, inputs, pattern=parsed).ok
    assert not search.check_pairwise(run, inputs, pattern=parsed).ok, "the exact choice is another one"


def test_the_peer_of_the_search_finds_the_optimum():
    inputs = search.make(6, 16, 8, torch.device("cpu"), seed=0)
    weight, blocks = inputs["weight"].double().view(-1, 8), inputs["fisher"].double()
    kept, loss = peers.search_by_pruned_sets(weight, blocks, n=3, damp=0.1)
    options = {"damp": torch.tensor([0.1]), "method": "combinatorial", "mask": None}
    mask, saliency = reference.search_nm(weight, blocks, "3:8", **options)  # type: ignore[arg-type]
    torch.testing.assert_close(loss, saliency[:, 0])
    assert torch.equal(torch.zeros_like(mask).scatter_(1, kept, True), mask)


def test_the_recursion_gives_the_inverse_of_the_damped_fisher(gen: torch.Generator):
    grads = torch.randn(10, 3, 4, generator=gen, dtype=torch.float64)
    finv = torch.eye(4, dtype=torch.float64).expand(3, 4, 4) / 0.1
    finv = finv.clone()
    for grad in grads:
        peers.sherman_morrison_(finv, grad.reshape(-1), samples=10)
    wanted = torch.linalg.inv(0.1 * torch.eye(4, dtype=torch.float64) + torch.einsum("sbi,sbj->bij", grads, grads) / 10)
    torch.testing.assert_close(finv, wanted, rtol=1e-10, atol=1e-12)


def test_blocks_to_check_reach_both_ends():
    assert backends.some_blocks(5).tolist() == [0, 1, 2, 3, 4]
    many = backends.some_blocks(10**7)
    assert len(many) <= 96 and many[0] == 0 and many[-1] == 10**7 - 1 and ((many > 10**6) & (many < 9 * 10**6)).any()


# the command


def command(*arguments: object) -> int:
    return bench_run.main([str(argument) for argument in [*arguments, "--seconds", 0, "--device", "cpu"]])


@pytest.mark.usefixtures("tiny")
def test_a_run_on_a_cpu_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    target = tmp_path / "secret-place" / "out.json"
    done = command("--op", "fisher", "--shape", "bert-base", "--block-size", "4,50", "--samples", 3, "--json", target)
    assert done == 0
    stored = json.loads(target.read_text())
    assert schema_problems(stored) == [] and stored["env"]["label"] == "CPU" and stored["env"]["complete"]
    assert len(stored["rows"]) == 2 * 2 * 4 and stored["refused"] == stored["skipped"] == []
    assert {row["name"] for row in stored["rows"]} == {"bert-base"} and stored["ceilings"]["copy_gbps"] == 1000.0
    assert "secret" not in json.dumps(stored) and "--json out.json" in stored["command"]
    assert stored["env"]["unavailable"].get("accumulate_fisher_", {}).keys() <= {"triton", "cuda"}
    shown = capsys.readouterr()
    assert "on the CPU" in shown.out and "no figure here says anything about a GPU" in shown.out
    assert "× torch baddbmm" in shown.out and str(target) in shown.err
    assert any("cut down" in line for line in bench_facts(stored))


@pytest.mark.usefixtures("tiny")
def test_a_folder_gets_a_file_for_each_op(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert command("--json", tmp_path / "all", "--block-size", 4, "--samples", 2, "--no-peers", "--dtype", "f32") == 0
    assert sorted(path.stem for path in (tmp_path / "all").iterdir()) == sorted(cases.TOPICS)
    both = tmp_path / "both.json"
    assert command("--json", both, "--block-size", 4, "--samples", 2, "--no-peers", "--dtype", "f32") == 0
    stored = json.loads(both.read_text())
    assert {row["op"] for row in stored["rows"]} >= {"accumulate_fisher_", "invert_spd"}


@pytest.mark.usefixtures("tiny")
def test_a_broken_op_is_refused_and_fails_the_run(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch):
    import obs_kernels.reference

    right = obs_kernels.reference.invert_spd
    monkeypatch.setattr(obs_kernels.reference, "invert_spd", lambda a, *, damp: right(a, damp=2 * damp))
    target = tmp_path / "out.json"
    assert (
        command("--op", "inverse", "--shape", "14M", "--block-size", 8, "--backend", "reference", "--json", target) == 1
    )
    stored = json.loads(target.read_text())
    assert schema_problems(stored) == [] and all("peer" in row["config"] for row in stored["rows"])
    assert [entry["variant"] for entry in stored["refused"]] == ["reference", "call reference"]
    assert "RED, no row" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny")
def test_what_was_measured_is_kept_when_a_run_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    measure = Context.measure

    def dies(self: Context, problem: Problem) -> list[dict[str, Any]]:
        if problem.shape["D"] == 8:
            raise KeyboardInterrupt
        return measure(self, problem)

    monkeypatch.setattr(Context, "measure", dies)
    with pytest.raises(KeyboardInterrupt):
        command("--op", "inverse", "--block-size", "4,8", "--json", tmp_path / "out.json")
    stored = json.loads((tmp_path / "out.json").read_text())
    assert len(stored["rows"]) == 4 and not stored["env"]["complete"] and schema_problems(stored) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--op", "inverse", "--shape", "70B"), "shape must be one of 14M, bert-base or all, got '70B'"),
        (("--dtype", "int4"), "dtype must be one of"),
        (("--op", "inverse", "--dtype", "bf16"), "dtype must be one of f32 or all, got 'bf16'"),
        (("--block-size", "0"), "block-size must be positive whole numbers"),
        (("--samples", "a,b"), "samples must be positive whole numbers"),
        (("--lengths", "0"), "lengths must be positive whole numbers"),
        (("--minutes", "-1"), "minutes must be positive, got -1"),
        (("--backend", "fast"), "backend must be one of"),
        (("--op", "inverse", "--backend", "triton"), "backend must be one that runs here; invert_spd on triton"),
        (("--device", "tpu"), "device"),
    ],
)
def test_wrong_usage_is_2_and_measures_nothing(arguments: tuple[str, ...], said: str, capsys: Any):
    with pytest.raises(SystemExit) as ended:
        bench_run.main(list(arguments))
    assert ended.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
def test_the_list_measures_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench_run, "measure_ceilings", lambda *_: pytest.fail("measured"))
    assert command("--list") == 0
    shown = capsys.readouterr().out
    assert (
        "fisher: accumulate_fisher_" in shown and "invert_spd 14M" in shown and "backend reference: runs here" in shown
    )


def test_names_are_checked_over_all_ops():
    both = [cases.load(topic) for topic in ("fisher", "inverse")]
    session.check_selection(both, Selection(shapes=("bert-base", "14M"), dtypes=("bf16",)))
    with pytest.raises(ConfigError, match="14M, bert-base or all"):
        session.check_selection(both, Selection(shapes=("7B",)))
