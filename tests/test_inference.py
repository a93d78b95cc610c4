# SPDX-License-Identifier: Apache-2.0
"""Whole models measured: what is built, which ways run, what is predicted, and the commands around them."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import obs_kernels as obs
from bench.cases import inference as case
from bench.harness import Context, Selection
from bench.inference_table import inference_table
from obs_kernels.errors import CheckpointFormatError, ConfigError, DataFormatError
from obs_kernels.inference import encoders, measure, ways
from obs_kernels.inference.job import run_speed_job
from obs_kernels.inference.power import EnergyMeter
from obs_kernels.inference.predict import predict, predict_from_products
from obs_kernels.ops import dispatch
from obs_kernels.report.bench import schema_problems
from obs_kernels.sparse import attention
from obs_kernels.sparse.crossover import KernelRow, KernelTable
from obs_kernels.timing import Ceilings, CpuClock

pytest.importorskip("transformers")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    return encoders.build("tiny", torch.float32, CPU)[0]


def whole(pattern: str) -> nn.Module:
    """A packed model that its config alone describes: with the pooler that an encoder to be timed has not."""
    import transformers

    model = transformers.BertModel(encoders.build("tiny", torch.float32, CPU)[0].config).eval()
    return encoders.sparse_twin(model, pattern)[0]


def speed(**changes: Any) -> dict[str, Any]:
    options = {"model": "tiny", "patterns": ["2:4"], "batches": [2], "lengths": [16], "dtype": "f32", "seconds": 0.0}
    return run_speed_job(**(options | changes))


# models


def test_the_shapes_are_those_of_the_papers() -> None:
    """Weights of the blocks: 85.1M of BERT-base, 302M of BERT-large, 21.3M of MiniLM-L12-H384."""
    for name, millions in (("bert-base", 85), ("bert-large", 302), ("minilm", 21)):
        shape = encoders.SHAPES[name]
        weights = shape.layers * (4 * shape.hidden**2 + 2 * shape.hidden * shape.ffn)
        assert weights // 10**6 in (millions - 1, millions), name
        assert shape.hidden // shape.heads in (32, 64)


@pytest.mark.parametrize("pattern", ["2:4", "64:2:8", "2:16"])
def test_the_sparse_twin_keeps_the_largest(tiny: nn.Module, pattern: str) -> None:
    before = {k: v.clone() for k, v in tiny.state_dict().items()}
    twin, report, imposed = encoders.sparse_twin(tiny, pattern)
    assert len(report) == imposed == 12 and set(report.values()) == {pattern}
    assert all(torch.equal(v, before[k]) for k, v in tiny.state_dict().items())
    name = "encoder.layer.1.intermediate.dense"
    dense, kept = tiny.get_submodule(name).weight, twin.get_submodule(name).sparse.to_dense()
    assert torch.equal(kept[kept != 0], dense[kept != 0])
    if pattern.count(":") == 1:
        largest = dense.abs().unflatten(1, (-1, int(pattern.split(":")[1]))).topk(2).values.sum()
        assert float(kept.abs().sum()) == pytest.approx(float(largest), rel=1e-5)
    cut = copy.deepcopy(twin)
    obs.decompress_(cut)
    again, _, imposed = encoders.sparse_twin(cut, pattern)  # zeros that obey are kept
    assert imposed == 0 and torch.equal(again.get_submodule(name).values, twin.get_submodule(name).values)
    assert encoders.found_pattern(cut) == pattern


def test_without_its_layers_the_model_runs_no_product(tiny: nn.Module) -> None:
    hollow = encoders.hollow_twin(tiny)
    assert not list(encoders.block_layers(hollow)) and len(list(encoders.block_layers(tiny))) == 12
    assert ways.first_tensor(hollow(**encoders.make_inputs(hollow, 2, 8))).shape == (2, 8, 64)
    groups = encoders.layer_groups(tiny)
    assert groups["encoder.layer.*.intermediate.dense"] == (128, 64, 2) and len(groups) == 6


def test_a_folder_in_any_form(tmp_path: Path) -> None:
    folder = obs.save_pretrained(whole("2:4"), tmp_path / "packed")
    report = speed(model=str(folder), patterns=())
    assert report["patterns"] == ["2:4"] and report["cells"][0]["sparse"]["2:4"]["imposed_by_magnitude"] == 0
    assert not any("imposed" in note for note in report["notes"])
    with pytest.raises(ConfigError, match=r"pattern must be given: the model's zeros say None"):
        speed(patterns=())
    (folder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointFormatError):
        speed(model=str(folder))


# ways


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model": "bert-huge"}, "model must be one of bert-base, bert-large, minilm"),
        ({"patterns": ["unstructured:0.5"]}, "pattern must be n:m or v:2:m"),
        ({"patterns": ["64:3:8"]}, "pattern must be n:m or v:2:m"),
        ({"patterns": ["256:2:8"]}, "fits no layer"),
        ({"batches": [0]}, "batch must be positive"),
        ({"batches": []}, "batch must be positive"),
        ({"lengths": [-1]}, "length must be positive"),
        ({"dtype": "f64"}, "dtype must be one of"),
        ({"layers": "some"}, "layers must be one of"),
        ({"fuse_ffn": "x"}, "fuse_ffn must be one of"),
        ({"ways": ["graph"]}, "needs a GPU"),
        ({"ways": ["fast"]}, "way must be one of"),
        ({"seconds": -1.0}, "seconds must not be negative"),
        ({"device": "cuda"}, "needs a GPU"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], text: str) -> None:
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=text):
        speed(**changes)


def test_a_cell_says_all_it_should() -> None:
    said: list[str] = []
    report = speed(patterns=["2:4", "64:2:8", "2:4"], batches=[1, 2], lengths=[16, 99], say=said.append)
    assert [(c["batch"], c["length"], c["tokens"]) for c in report["cells"]] == [(1, 16, 16), (2, 16, 32)]
    assert [s["length"] for s in report["skipped"]] == [99, 99] and "at most 64" in report["skipped"][0]["why"]
    for cell in report["cells"]:
        assert set(cell["sparse"]) == set(cell["layers"]) == {"2:4", "64:2:8"}
        dense = cell["dense"]
        assert dense["way"] == "eager" and dense["us"] == min(dense["ways"].values())
        assert dense["samples_per_s"] == pytest.approx(cell["batch"] / dense["us"] * 1e6)
        for found in cell["sparse"].values():
            assert found["speedup"] == pytest.approx(dense["us"] / found["us"])
            assert found["max_difference"] < 1e-5 and found["packed_layers"] == 12
            assert found["predicted"] is None and found["joules"] is None and found["peak_bytes"] is None
            assert 0 <= found["linear_share"] <= 1
        assert all(layer["dense_us"] > 0 and layer["sparse_us"] > 0 for layer in cell["layers"]["2:4"])
    text = " ".join(report["notes"])
    for word in ("by subtraction", "imposed by magnitude", "reference path", "CUDA tensor", "energy was not", "SDPA"):
        assert word in text
    assert said[0] == "batch 1, length 16" and json.loads(json.dumps(report)) == report


def test_layers_that_lose_stay_dense() -> None:
    with pytest.raises(ConfigError, match="fits no layer"):
        encoders.sparse_twin(nn.Sequential(nn.Linear(64, 64)), "2:4")
    cell = speed(layers="rows")["cells"][0]["sparse"]["2:4"]
    assert cell["packed_layers"] == 0 and len(cell["dense_layers"]) == 12
    assert cell["speedup"] is not None and cell["predicted_here"] is None


def test_a_way_that_fails_leaves_the_others(tiny: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    original = measure.make_call

    def fail(model: nn.Module, inputs: Any, way: str) -> Any:
        if way == "compiled" and any(isinstance(m, obs.SparseLinear) for m in model.modules()):
            raise RuntimeError("no compiler\nhere")
        return original(model, inputs, "eager")

    monkeypatch.setattr(measure, "make_call", fail)
    report = speed(ways=["eager", "compiled"])
    found = report["cells"][0]["sparse"]["2:4"]
    assert found["failed"] == {"compiled": "RuntimeError: no compiler"} and found["way"] == "eager"
    assert set(report["cells"][0]["dense"]["ways"]) == {"eager", "compiled"}


def test_a_failure_names_what_the_compiler_met() -> None:
    """``torch.compile`` wraps whatever its backend raised, by a first line that does not say it."""

    def raised(inner: Exception) -> Exception:
        def backend(graph: object, inputs: object) -> Callable[..., Tensor]:
            raise inner

        with pytest.raises(BackendCompilerFailed) as caught:
            torch.compile(nn.Linear(2, 2), backend=backend)(torch.ones(1, 2))
        torch.compiler.reset()
        return caught.value

    assert measure.why_failed(raised(RuntimeError("no tile\nfits"))) == (
        "BackendCompilerFailed: backend='backend' raised: RuntimeError: no tile"
    )
    assert measure.why_failed(raised(torch.OutOfMemoryError("CUDA"))) == "out of memory"
    assert measure.why_failed(torch.OutOfMemoryError("CUDA")) == "out of memory"
    assert measure.why_failed(ValueError()) == "ValueError:"


def test_out_of_memory_skips_the_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("obs_kernels.inference.job.measure_cell", full)
    report = speed()
    assert report["cells"] == [] and report["skipped"] == [{"batch": 2, "length": 16, "why": "out of memory"}]


def test_the_dense_model_is_the_best_of_all_ways() -> None:
    found = measure.Measured()
    assert found.best is None and found.us is None and found.to_dict(4)["samples_per_s"] is None
    found.spreads = {"eager": SimpleNamespace(us=5.0, p20=4, p80=6), "graph": SimpleNamespace(us=3.0, p20=2, p80=4)}  # type: ignore[dict-item]
    assert found.best == "graph" and found.us == 3.0 and found.to_dict(3)["samples_per_s"] == 1e6


# energy, prediction


def test_energy_by_the_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Joules a call: the counter of the GPU that torch uses, over the calls in between."""
    assert EnergyMeter(CPU).joules(lambda: None, seconds=0) is None and EnergyMeter(CPU).reason is not None
    counter = iter(range(0, 10**9, 6000))
    asked: list[str] = []
    fake = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: asked.append(uuid) or "handle",
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(counter),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    clock = iter([0.0, 0.0, 0.5, 1.5])
    monkeypatch.setattr("obs_kernels.inference.power.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    meter = EnergyMeter(torch.device("cuda", 0))
    calls: list[int] = []
    assert meter.reason is None and asked == ["GPU-1-2"]
    assert meter.joules(lambda: calls.append(1), seconds=1.0) == pytest.approx(6.0 / len(calls)) and len(calls) == 8


def test_energy_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pynvml is not installed" in str(EnergyMeter(torch.device("cuda", 0)).reason)

    def refuse() -> None:
        raise RuntimeError("no driver")

    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(nvmlInit=refuse))
    assert EnergyMeter(torch.device("cuda", 0)).reason == "NVML: no driver"


def test_prediction_by_kernel_rows(tiny: nn.Module) -> None:
    """Dense time less what the rows say of each packed layer: 8 of [64, 64], 2 each of the others."""
    twin = encoders.sparse_twin(tiny, "2:4")[0]
    layers = encoders.sparse_layers(twin)
    rows = (KernelRow(64, 64, 128, "2:4", 3.0, 5.0), KernelRow(128, 64, 128, "2:4", 4.0, 8.0))
    found = predict(layers, 128, 100.0, KernelTable("a GPU", "abc", rows))
    assert found is not None and found["estimated"] == 2 and found["unknown"] == 0  # [64, 128] lies near [64, 64]
    guess = KernelTable("a GPU", "abc", rows).estimate(64, 128, 128, layers["encoder.layer.0.output.dense"].pattern)
    assert guess is not None
    wanted = 100.0 - 8 * 2.0 - 2 * 4.0 - 2 * (guess.dense_us - guess.sparse_us)
    assert found["us"] == pytest.approx(wanted) and found["speedup"] == pytest.approx(100.0 / wanted)
    assert predict(layers, 128, 100.0, None) is None and predict({}, 128, 100.0, KernelTable("g", "c", rows)) is None
    nothing = predict(layers, 1, 100.0, KernelTable("a GPU", "abc", rows))
    assert nothing is not None and nothing["us"] is None and nothing["unknown"] == 12
    here = [{"count": 3, "dense_us": 10.0, "sparse_us": 4.0}, {"count": 5, "dense_us": None, "sparse_us": None}]
    assert predict_from_products(here, 100.0) == {"us": 82.0, "speedup": pytest.approx(100 / 82)}
    assert predict_from_products(here[1:], 100.0) is None and predict_from_products(here, 10.0) is None


def test_kernel_rows_of_a_file(tmp_path: Path) -> None:
    row = {"op": "sparse_linear", "dtype": "bf16", "path": "kernel", "pattern": "2:4"}
    sizes = [{"R": r, "C": c, "T": 32} for r, c in ((64, 64), (128, 64), (64, 128))]
    rows = [
        {**row, "shape": shape, "config": config, "us": us, "p20": us, "p80": us}
        for shape in sizes
        for config, us in (({"backend": "cuda"}, 0.5), ({"peer": "F.linear"}, 1.0), ({"backend": "cuda", "y": "f"}, 9))
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"env": {"device": "a GPU", "commit": "abc"}, "rows": rows}))
    found = speed(kernel_rows=path)["cells"][0]["sparse"]["2:4"]["predicted"]
    assert found["source"] == "a GPU, commit abc" and found["unknown"] == found["estimated"] == 0
    for text in ("no json", "{}"):
        path.write_text(text)
        with pytest.raises(DataFormatError, match="kernel rows must"):
            speed(kernel_rows=path)


# the bench case


def test_rows_of_the_bench() -> None:
    context = Context(Selection(device=CPU), CpuClock(), Ceilings(10.0, 0.1), 0.0)
    case.run(context)
    dense, sparse = context.rows
    assert dense["config"] == {"peer": "dense, SDPA", "config": "eager"} and dense["pattern"] is None
    assert sparse["pattern"] == "64:2:8" and sparse["x_dense"] == pytest.approx(dense["us"] / sparse["us"])
    assert "small, CPU" in sparse["name"] and sparse["detail"]["real_shape"]["L"] == 512
    keys = ("compute_capability", "driver", "cuda", "triton", "commit", "dirty", "clocks", "torch", "python", "date")
    doc = {
        "env": dict.fromkeys(keys) | {"label": "CPU", "device": "x"},
        "ceilings": {"copy_gbps": 1.0, "matmul_tflops": 1.0},
        "command": "",
        "rows": context.rows,
    }
    assert schema_problems(doc) == []
    assert case.OP in dispatch.TABLE


def test_the_table_of_the_bench() -> None:
    cell = {
        "batch": 32,
        "length": 512,
        "tokens": 16384,
        "dense": {"us": 20_000.0, "p20": 1.0, "p80": 9e9, "way": "compiled graph"},
        "sparse": {
            "64:2:8": {"us": 16_000.0, "p20": 1.0, "p80": 9e9, "way": "graph", "speedup": 1.25,
                       "predicted": {"speedup": 1.3}},
            "128:2:8": {"us": 25_000.0, "p20": 1.0, "p80": 9e9, "way": "graph", "speedup": 0.8},
            "2:4": {"us": None},
        },
    }  # fmt: skip
    rows = case.cell_rows(cell, "bert-large", "bf16", gpu=True)
    assert [row["pattern"] for row in rows] == [None, "64:2:8", "128:2:8"]
    lines = inference_table(
        [{"env": {"device": "a GPU", "commit": "abc", "complete": True}, "rows": rows}]
    ).splitlines()
    assert lines[0].startswith("a GPU, commit abc, bf16")
    assert lines[2] == "| model | batch x length | dense, ms | 64:2:8 | 128:2:8 |"
    assert lines[4] == "| bert-large | 32 x 512 | 20.00 (compiled graph) | 1.25 (1.30) | 0.80 (–) |"
    cut = {"env": {"device": "a GPU", "commit": "def", "complete": False}, "rows": rows}
    more = {
        "env": {**cut["env"], "commit": "abc", "complete": True},
        "rows": [row | {"name": "minilm"} for row in rows],
    }
    both = inference_table([more, cut]).splitlines()
    assert both[0].startswith("a GPU, commit abc, def, bf16") and both[0].endswith("other cells were not reached:")
    assert "not reached" not in lines[0] and both[2:4] + both[5:] == lines[2:] and both[4].startswith("| minilm |")
    other = {**cut, "rows": [row | {"dtype": "f16"} for row in rows]}
    assert "| bert-large, f16 | 32 x 512 |" in inference_table([cut, other])
    with pytest.raises(ConfigError, match="must hold a cell once, got bert-large"):
        inference_table([cut, cut])


def test_what_a_shared_input_takes_is_a_layer_of_the_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "shared_from", lambda *key: 0)
    dense, _ = encoders.build("tiny", torch.bfloat16, CPU)
    found = measure.measure_cell(dense, 2, 8, measure.Plan(("64:2:8",), ("eager",), seconds=0.0), CpuClock())
    (shared,) = [row for row in found["layers"]["64:2:8"] if "shared input" in row["name"]]
    assert shared["name"] == "encoder.layer.*.attention.self (shared input)" and shared["dense_us"] == 0.0
    assert (shared["rows"], shared["cols"], shared["count"]) == (64, 64, 2) and shared["sparse_us"] > 0.0


def test_no_mask_reaches_the_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is captured or compiled transformers may not look at a mask, and made one of nothing but True."""
    masking = pytest.importorskip("transformers.masking_utils")
    seen: list[Tensor | None] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(*args: Any, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        seen.append(attn_mask)
        return attend(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(masking, "_ignore_bidirectional_mask_sdpa", lambda *_, **__: False)
    model, _ = encoders.build("tiny", torch.float32, torch.device("cpu"))
    inputs = encoders.make_inputs(model, 2, 16)
    unmasked = model(**inputs)[0]
    assert seen == [None] * 2
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(**inputs)[0], unmasked) and all(mask is not None for mask in seen[2:])


# the commands


@pytest.fixture
def command() -> Callable[..., Any]:
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from obs_kernels.cli import app

    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def test_speed_on_the_command_line(command: Callable[..., Any], tmp_path: Path) -> None:
    words = ("speed", "--model", "tiny", "--pattern", "2:4, 64:2:8", "--batch", "1,2", "--length", 16, "--dtype", "f32")
    done = command(*words, "--seconds", 0, "--json", "--out", tmp_path / "speed.json", "--fuse-ffn", "none")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / "speed.json").read_text()) and len(report["cells"]) == 2
    assert report["config"]["fuse_ffn"] is None and "batch 2, length 16" in done.stderr
    shown = command("speed", "--model", "tiny", "--pattern", "2:4", "--batch", 1, "--length", 16, "--dtype", "f32",
                    "--seconds", 0)  # fmt: skip
    assert shown.exit_code == 0 and "slower" in shown.stdout and "note: " in shown.stdout


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("--batch", "x"), 2, "positive whole numbers"),
        (("--length", "0"), 2, "positive whole numbers"),
        (("--ways", "graph"), 1, "needs a GPU"),
        (("--fuse-ffn", "wrong"), 1, "--fuse-ffn must be one of 'token', 'feature', 'none', got 'wrong'"),
        (("--pattern", "64:2"), 1, "pattern"),
        (("--kernel-rows", "nothing.json"), 1, "kernel rows must be a JSON file"),
    ],
)
def test_speed_refuses(command: Callable[..., Any], words: tuple[str, ...], code: int, text: str) -> None:
    done = command("speed", "--model", "tiny", "--device", "cpu", *words)
    assert done.exit_code == code and text in " ".join(done.stderr.split())


def test_compress_and_convert_on_the_command_line(command: Callable[..., Any], tmp_path: Path) -> None:
    folder = obs.save_pretrained(whole("16:2:8"), tmp_path / "dense", save_dense=True)
    done = command("compress", folder, "--out", tmp_path / "packed", "--verify", "--max-shard-size", "30KB")
    assert done.exit_code == 0, done.output
    assert "12 layers of 16:2:8" in done.stdout and "bit for bit" in done.stdout and "MB now" in done.stdout
    done = command("convert", tmp_path / "packed", "--to", "dense", "--out", tmp_path / "again", "--json")
    report = json.loads(done.stdout)
    assert report["from"] == "packed" and report["sizes"]["dense"] > report["sizes"]["packed"]
    for words, text in (
        (("compress", folder, "--out", tmp_path / "packed"), "--overwrite"),
        (("compress", folder, "--out", tmp_path / "new", "--tokens", 64), "all 12 stay dense"),
        (("compress", folder, "--out", tmp_path / "new", "--pattern", "2:16"), "keeps"),
        (("compress", folder, "--out", tmp_path / "new", "--measure"), "--measure needs tokens"),
        (("compress", folder, "--out", tmp_path / "new", "--dtype", "int8"), "dtype must be one of bf16 (bfloat16)"),
        (("convert", folder, "--to", "semi-structured", "--out", tmp_path / "new"), "float16 or bfloat16"),
        (("convert", tmp_path / "no", "--to", "dense", "--out", tmp_path / "new"), "no config.json"),
    ):
        done = command(*words)
        assert done.exit_code == 1 and text in " ".join(done.stderr.split()), (words, done.stderr)
    assert not (tmp_path / "new").exists()
    assert command("compress", folder, "--out", tmp_path / "packed", "--overwrite").exit_code == 0


def test_copies_that_a_later_cell_makes_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stays allocated after a run on other inputs belongs to the model."""
    allocated = iter([1000, 1300])
    monkeypatch.setattr(measure, "_allocated", lambda device: next(allocated))
    runs: list[Any] = []
    twin = measure.Twin(lambda **inputs: runs.append(inputs), None, 0, 50)  # type: ignore[arg-type]
    ids = {"input_ids": torch.zeros(1, 2)}
    assert measure.grown_twin(twin, ids).resident == 350 and runs == [ids]
