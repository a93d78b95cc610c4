# SPDX-License-Identifier: Apache-2.0
"""SparseLinear in a program: which product runs, compile, autocast, copies, processes; and what compress_ leaves."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from masks import random_mask
from torch import Tensor, nn
from torch._dynamo.testing import EagerAndRecordGraphs

import obs_kernels as obs
from bench.kernel_rows import rows_text, stored_table
from obs_kernels import SparseLinear, compress_, decompress_
from obs_kernels.errors import ConfigError, DataFormatError, DTypeNotSupportedError, SparsityPatternError
from obs_kernels.patterns import parse_pattern
from obs_kernels.sparse import crossover, linear
from obs_kernels.sparse.crossover import KernelRow, KernelTable, packaged_table
from obs_kernels.sparse.ffn import FusedActivation, activation_of

PATTERNS = ["2:4", "16:2:8", "2:8"]


def layer(
    rows: int = 32, cols: int = 32, pattern: str = "2:4", *, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Linear, SparseLinear]:
    torch.manual_seed(0)
    dense = nn.Linear(cols, rows).to(dtype)
    mask = random_mask(torch.Generator().manual_seed(3), rows, cols, parse_pattern(pattern))
    dense.weight.data.masked_fill_(~mask, 0.0)
    return dense, SparseLinear.from_linear(dense, pattern, **options)


def inputs(*lead: int, cols: int = 32, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*lead, cols, generator=torch.Generator().manual_seed(5)).to(dtype)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which product ran, in order."""
    seen: list[str] = []

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(linear, "sparse_linear_by_parts", counted("sparse", linear.sparse_linear_by_parts))
    monkeypatch.setattr(linear.F, "linear", counted("dense", F.linear))
    return seen


# which product runs


def test_dispatch_needs_the_dense_weight() -> None:
    _, sparse = layer()
    assert sparse.dispatch == "auto" and sparse.dense is None
    sparse.dispatch = "sparse"
    with pytest.raises(ConfigError, match=r"needs the dense weight.*keep_dense=True"):
        sparse.dispatch = "dense"
    with pytest.raises(ConfigError, match=r"dispatch must be one of .*got 'fast'"):
        sparse.dispatch = "fast"
    assert sparse.dispatch == "sparse"


def test_the_product_that_was_asked_for_runs(calls: list[str]) -> None:
    dense, sparse = layer(keep_dense=True)
    sparse.sparse_from = 8
    few, many, wanted = inputs(7), inputs(4, 2), {}
    for name in ("auto", "sparse", "dense"):
        sparse.dispatch = name
        calls.clear()
        wanted[name] = [sparse(few), sparse(many)]
        # the reference of the sparse product calls F.linear too
        assert [c for i, c in enumerate(calls) if c == "sparse" or calls[i - 1 : i] != ["sparse"]] == {
            "auto": ["dense", "sparse"], "sparse": ["sparse", "sparse"], "dense": ["dense", "dense"]
        }[name]  # fmt: skip
    for outs in wanted.values():
        torch.testing.assert_close(outs, [dense(few), dense(many)])
    assert torch.equal(wanted["dense"][0], dense(few))


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    linear._log_choice.cache_clear()
    _, sparse = layer(keep_dense=True)
    sparse.sparse_from = 8
    with caplog.at_level(logging.INFO, "obs_kernels"):
        for tokens in (3, 9, 4, 10):
            sparse(inputs(tokens))
    lines = [r.message for r in caplog.records if r.message.startswith("SparseLinear")]
    assert lines == [
        "SparseLinear [32, 32] 2:4 on cpu: dense below 8 tokens",
        "SparseLinear [32, 32] 2:4 on cpu: sparse from 8 tokens on",
    ]


def test_the_dense_copy_follows_the_weight() -> None:
    """No state dict has it, every cast and every load renews it."""
    _, one = layer(keep_dense=True)
    other = layer(pattern="16:2:8")[1]
    assert set(one.state_dict()) == {"values", "codes", "bias"} == set(layer()[1].state_dict())
    _, two = layer(keep_dense=True)
    two.values.mul_(2)
    one.load_state_dict(two.state_dict())
    assert torch.equal(one.dense, two.sparse.to_dense())
    half = one.half()
    assert half.dense.dtype == half.values.dtype == torch.float16 and half.codes.dtype == torch.uint8
    assert torch.equal(half.dense, half.sparse.to_dense())
    assert half.to(torch.float64).dense.dtype == torch.float64
    twin = copy.deepcopy(one)
    twin.dispatch = "dense"
    assert twin.dense.data_ptr() != one.dense.data_ptr() and one.dispatch == "auto"
    assert pickle.loads(pickle.dumps(twin)).dispatch == "dense"
    with pytest.raises(RuntimeError, match=r"weight\.values must be \[32, 16\]"):
        one.load_state_dict(other.state_dict())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_state_dict_with_bad_indices_is_refused(pattern: str) -> None:
    """Whatever a state dict says, no index out of range reaches a kernel."""
    _, sparse = layer(pattern=pattern)
    before = {k: v.clone() for k, v in sparse.state_dict().items()}
    for key in ("codes", "columns"):
        if before.get(key) is None:
            continue
        bad = {k: v.clone() for k, v in before.items()}
        bad[key].fill_(255)
        for assign in (False, True):
            with pytest.raises(RuntimeError, match=key):
                nn.Sequential(sparse).load_state_dict({f"0.{k}": v for k, v in bad.items()}, assign=assign)
    assert all(torch.equal(v, before[k]) for k, v in sparse.state_dict().items())


# compile, autocast, inference mode, processes


@pytest.mark.usefixtures("traceable")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("switch", [None, 5, 1000])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_compile_without_recompiles_after_two_shapes(pattern: str, switch: int | None, backend: str) -> None:
    _, sparse = layer(pattern=pattern, keep_dense=switch is not None)
    sparse.sparse_from = switch or 0
    model = nn.Sequential(sparse, nn.GELU())
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for lead in ((3, 2), (4, 7)):
            compiled(inputs(*lead))
        with torch.compiler.set_stance("fail_on_recompile"):
            for lead in ((2, 9), (5, 3), (8, 11), (3, 4)):
                torch.testing.assert_close(compiled(inputs(*lead)), model(inputs(*lead)))


@pytest.mark.usefixtures("graph_break")
@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_kernel_is_compiled_after_a_graph_break(pattern: str) -> None:
    """Then dynamo takes up each frame that Python meets, those below the op too."""
    _, sparse = layer(pattern=pattern)
    recorder = EagerAndRecordGraphs()
    model = nn.Sequential(nn.GELU(), sparse)
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend=recorder)(inputs(4)), model(inputs(4)))
    compiled = [str(node.target) for graph in recorder.graphs for node in graph.graph.nodes]
    assert not any("linear" in name for name in compiled), compiled


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_casts_as_linear_does(kept: torch.dtype, dtype: torch.dtype) -> None:
    dense, sparse = layer(dtype=kept)
    for given in (torch.float32, torch.bfloat16, torch.float16):
        x = inputs(6, dtype=given)
        with torch.autocast("cpu", dtype=dtype):
            y, wanted = sparse(x), dense(x)
        assert y.dtype == wanted.dtype == dtype
        torch.testing.assert_close(y, wanted, rtol=0.02, atol=0.02)
    assert sparse.values.dtype == kept


def test_autocast_keeps_its_copy_until_the_weight_changes() -> None:
    _, sparse = layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.inference_mode():
            sparse(inputs(2))
        first = sparse._cast
        x = inputs(2).requires_grad_()
        before = sparse(x)
        assert sparse._cast is first
        before.sum().backward()
        assert x.grad is not None
        sparse.values.mul_(2)
        after = sparse(inputs(2))
    assert sparse._cast is not first and not torch.equal(before, after)
    assert copy.deepcopy(sparse)._cast is None and pickle.loads(pickle.dumps(sparse))._cast is None
    torch.testing.assert_close(sparse(inputs(2)), F.linear(inputs(2), sparse.sparse.to_dense(), sparse.bias))


@pytest.mark.usefixtures("traceable")
def test_autocast_when_compiled() -> None:
    _, sparse = layer()
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(compiled(inputs(3)), sparse(inputs(3)))


@pytest.mark.usefixtures("traceable")
@pytest.mark.parametrize("switch", [None, 5])
def test_export_with_any_number_of_tokens(switch: int | None) -> None:
    _, sparse = layer(keep_dense=switch is not None)
    sparse.sparse_from = switch or 0
    dynamic = ({0: torch.export.Dim("tokens", min=switch or 2, max=64)},)
    program = torch.export.export(nn.Sequential(sparse), (inputs(8),), dynamic_shapes=dynamic, strict=True)
    torch.testing.assert_close(program.module()(inputs(11)), sparse(inputs(11)))


def test_without_autocast_mixed_types_are_an_error() -> None:
    _, sparse = layer(dtype=torch.bfloat16)
    with pytest.raises(DTypeNotSupportedError, match="share a dtype"):
        sparse(inputs(3))


def test_inference_mode() -> None:
    dense, sparse = layer(keep_dense=True)
    with torch.inference_mode():
        for name in ("sparse", "dense"):
            sparse.dispatch = name
            torch.testing.assert_close(sparse(inputs(4)), dense(inputs(4)))
        made = SparseLinear.from_linear(dense, "2:4")
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert made(inputs(4)).dtype == torch.bfloat16


def test_overflow_shows_as_in_dense() -> None:
    dense, sparse = layer(dtype=torch.float16)
    x = inputs(4, dtype=torch.float16) * 30_000
    wanted = dense(x)
    assert torch.isinf(wanted).any()
    assert torch.equal(torch.isinf(sparse(x)), torch.isinf(wanted))
    assert torch.equal(sparse(x)[torch.isinf(wanted)], wanted[torch.isinf(wanted)])


def _child(module: SparseLinear, x: Tensor, out: Any) -> None:
    out.put(module(x).tolist())


def test_a_spawned_process_gets_it() -> None:
    _, sparse = layer(keep_dense=True)
    context = mp.get_context("spawn")
    out = context.SimpleQueue()
    process = context.Process(target=_child, args=(sparse, inputs(2), out))
    process.start()
    found = out.get()
    process.join(60)
    assert process.exitcode == 0
    torch.testing.assert_close(torch.tensor(found), sparse(inputs(2)).detach())


# layouts and pairs


@pytest.mark.parametrize("lead", [(5,), (2, 3), ()])
def test_feature_major_keeps_shape_and_values(lead: tuple[int, ...]) -> None:
    first, second = layer(64, 32)[1], layer(32, 64)[1]
    wanted = second(torch.tanh(first(inputs(*lead))))
    first.y_layout = "feature"
    between = first(inputs(*lead))
    assert between.shape == (*lead, 64) and between.movedim(-1, 0).is_contiguous()
    torch.testing.assert_close(second(torch.tanh(between)), wanted)
    second.y_layout = "feature"
    torch.testing.assert_close(second(torch.tanh(between)), wanted)


def bert(**changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**sizes, intermediate_size=64, **changes)).eval()
    obs.sparsify_(model, obs.OBSConfig(pattern="2:4", method="magnitude", update="none", curvature="block"), None, None)
    return model


IDS = torch.tensor([[3, 4, 5, 6, 0], [7, 8, 9, 10, 11]])


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"])
@pytest.mark.parametrize("layout", ["token", "feature"])
def test_feed_forward_pairs(layout: str, act: str) -> None:
    model = bert(hidden_act=act)
    with torch.no_grad():
        wanted = model(IDS).last_hidden_state
        report = compress_(model, fuse_ffn=layout)
        assert report.fused == [f"encoder.layer.{i}.intermediate.dense" for i in (0, 1)]
        block = model.encoder.layer[0]
        assert isinstance(block.intermediate.intermediate_act_fn, FusedActivation)
        assert block.intermediate.dense.activation is not None and block.intermediate.dense.y_layout == layout
        torch.testing.assert_close(model(IDS).last_hidden_state, wanted, rtol=1e-4, atol=1e-5)
        block.intermediate.dense.dispatch = "sparse"
        decompress_(model)
        assert activation_of(block.intermediate.intermediate_act_fn) is not None
        assert torch.equal(model(IDS).last_hidden_state, wanted)


def test_pairs_that_are_not_known_stay(calls: list[str]) -> None:
    """Another activation, or a block of another library whose forward nobody has read."""
    model = bert(hidden_act="quick_gelu")
    assert compress_(model, fuse_ffn="token").fused == []

    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin1, self.activation, self.lin2 = layer(64, 32)[0], nn.GELU(), layer(32, 64)[0]

    mine = nn.Sequential(Mine())
    assert compress_(mine, fuse_ffn="token").fused == [] and isinstance(mine[0].activation, nn.GELU)
    with pytest.raises(ConfigError, match="fuse_ffn must be one of"):
        compress_(bert(), fuse_ffn="yes")


# what stays dense


def row(rows: int, cols: int, tokens: int, sparse_us: float, dense_us: float, pattern: str = "2:4") -> KernelRow:
    return KernelRow(rows, cols, tokens, pattern, sparse_us, dense_us)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> KernelTable:
    """[32, 32] wins from 1,024 tokens on, [64, 32] never."""
    made = KernelTable(
        "a GPU",
        "abc",
        (
            row(32, 32, 256, 4.0, 2.0),
            row(32, 32, 1024, 5.0, 6.0),
            row(32, 32, 4096, 10.0, 20.0),
            row(64, 32, 256, 4.0, 2.0),
            row(64, 32, 4096, 30.0, 20.0),
        ),
    )
    monkeypatch.setattr("obs_kernels.sparse.compress.packaged_table", lambda: made)
    return made


def two_layers() -> nn.Sequential:
    return nn.Sequential(layer(32, 32)[0], layer(64, 32)[0])


def test_losing_layers_stay_dense_with_the_reason(table: KernelTable) -> None:
    model = two_layers()
    report = compress_(model, 1024)
    assert report == {"0": "2:4"} and [type(m) for m in model] == [SparseLinear, nn.Linear]
    assert list(report.dense) == ["1"] and report.dense["1"].startswith("dense is faster at 1,024 tokens: ")
    assert "estimated on a GPU" in report.dense["1"]
    assert json.loads(json.dumps(report.to_dict()))["dense"] == report.dense
    assert any("commit abc" in note for note in report.notes)
    assert any("reference path" in note and "CUDA tensor" in note for note in report.notes)
    model = two_layers()
    report = compress_(model, 256)
    assert report == {} and "4.0 us (measured on a GPU)" in report.dense["0"]
    assert all(type(m) is nn.Linear for m in model)
    assert set(compress_(two_layers())) == {"0", "1"}


def test_unknown_is_not_called_a_win(table: KernelTable) -> None:
    report = compress_(nn.Sequential(layer(32, 32)[0], layer(512, 512)[0]), 64)
    first, second = report.dense.values()
    assert not report and "[32, 32] begin at 256 tokens" in first and "no kernel row near [512, 512]" in second
    model = nn.Sequential(layer(32, 32, "4:8")[0])
    assert "no kernel for sparse tensor cores takes pattern 4:8" in compress_(model, 4096).dense["0"]


def test_switching_at_run_time_takes_its_crossing_from_the_rows(table: KernelTable) -> None:
    model = two_layers()
    compress_(model, keep_dense=True)
    assert 256 < model[0].sparse_from <= 1024 and model[1].sparse_from is None
    model = two_layers()
    compress_(model)
    assert model[0].dense is None
    assert [m.sparse_from for m in model] == [0, 0]


def test_measuring_here(monkeypatch: pytest.MonkeyPatch) -> None:
    model = two_layers()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = compress_(model, 16, measure=True)  # unpacking for each call never wins on a CPU
    assert not report and all("timed on the CPU" in reason for reason in report.dense.values())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    monkeypatch.setattr("obs_kernels.sparse.compress.interleave", lambda ways, *_, **__: {
        "sparse": [1.0], "dense": [2.0]
    })  # fmt: skip
    assert compress_(model, 16, measure=True) == {"0": "2:4", "1": "2:4"}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"tokens": 0}, "tokens must be a positive whole number"),
        ({"tokens": True}, "tokens must be a positive whole number"),
        ({"tokens": 2.5}, "tokens must be a positive whole number"),
        ({"measure": True}, "measure=True needs tokens"),
        ({"pattern": "unstructured:0.5"}, "no packed format"),
    ],
)
def test_bad_arguments_change_nothing(changes: dict[str, Any], text: str) -> None:
    model = two_layers()
    with pytest.raises(ConfigError, match=text):
        compress_(model, **changes)
    assert all(type(m) is nn.Linear for m in model)


@pytest.mark.parametrize("tokens", [None, 16])
def test_a_broken_pattern_names_layer_group_and_entries(tokens: int | None) -> None:
    model = two_layers()
    model[1].weight.data[5, 4:8] = torch.tensor([1.0, 0.5, 0.0, -2.0])
    entries = r"Entries: \[5, 4\] = 1, \[5, 5\] = 0.5, \[5, 7\] = -2$"
    with pytest.raises(SparsityPatternError, match=rf"^1: .*3 of 4 in row 5, group 1 \(columns 4 to 7\).* {entries}"):
        compress_(model, tokens, pattern="2:4")
    panel = nn.Sequential(layer(32, 32, "2:8")[0])
    with pytest.raises(SparsityPatternError, match=r"^0: .*keeps columns \[.*\] in panel 0"):
        compress_(panel, tokens, pattern="32:2:8")
    assert all(type(m) is nn.Linear for m in model)


def test_a_tied_weight_stays_dense() -> None:
    model = nn.Sequential(layer(32, 32)[0], nn.Embedding(32, 32), layer(32, 32)[0])
    model[1].weight = model[0].weight
    report = compress_(model)
    assert report == {"2": "2:4"} and report.dense == {"0": "tied with 1"} and model[0].weight is model[1].weight
    with pytest.raises(ConfigError, match="0: tied with 1"):
        compress_(model)


# the rows


def test_estimates_between_rows(table: KernelTable) -> None:
    pattern = parse_pattern("2:4")
    exact = table.estimate(32, 32, 1024, pattern)
    assert exact is not None and (exact.sparse_us, exact.dense_us, exact.measured) == (5.0, 6.0, True)
    other = table.estimate(32, 32, 1024, parse_pattern("16:2:8"))
    assert other is not None and (other.sparse_us, other.measured) == (5.0, False)  # by the rows of 2:4
    between = table.estimate(32, 32, 2048, pattern)
    assert between is not None and 5.0 < between.sparse_us < 10.0 and not between.measured
    above = table.estimate(32, 32, 8192, pattern)
    assert above is not None and above.sparse_us == pytest.approx(20.0)  # the rate of the last row stays
    assert table.estimate(32, 32, 255, pattern) is None and table.estimate(8, 32, 1024, pattern) is None
    near = table.estimate(48, 32, 1024, pattern)
    assert near is not None and near.sparse_us > 5.0
    assert table.estimate(32, 32, 1024, parse_pattern("4:8")) is None


def test_a_large_shape_at_few_tokens_says_nothing_about_a_small_one() -> None:
    pattern = parse_pattern("2:4")
    large = [row(64, 64, tokens, 1.0, 2.0) for tokens in (16, 64)]
    table = KernelTable("a GPU", "abc", (*large, row(32, 32, 64, 4.0, 2.0)))
    assert table.estimate(64, 64, 16, pattern) is not None
    assert table.estimate(48, 48, 63, pattern) is None  # between the two, of which one begins at 64
    both = table.estimate(48, 48, 64, pattern)
    assert both is not None and both.dense_us / both.sparse_us < 2.0
    alone = KernelTable("a GPU", "abc", tuple(large))
    assert alone.estimate(40, 40, 20, pattern) is None
    enough = alone.estimate(40, 40, 21, pattern)  # half the products of the smallest row
    assert enough is not None and enough.sparse_wins


@pytest.mark.parametrize("pattern", ["2:4", "128:2:8", "128:2:16"])
def test_more_tokens_do_not_look_worse_by_rows_that_begin_there(pattern: str) -> None:
    """Estimates of packaged rows by every measured count of tokens: no step down where rows of small shapes begin."""
    table, parsed = packaged_table(), parse_pattern(pattern)
    starts = sorted({row.tokens for row in table.rows})
    for size in ((1024, 2048), (2048, 2048), (2560, 2560), (4096, 2048), (3072, 4096)):
        for tokens in starts:
            before, at = (table.estimate(*size, count, parsed) for count in (tokens - 1, tokens))
            if before is not None and at is not None:
                assert at.dense_us / at.sparse_us >= 0.97 * before.dense_us / before.sparse_us, (size, tokens)


def test_the_crossing_is_where_it_stays_won() -> None:
    rows = (row(8, 8, 64, 1.0, 2.0), row(8, 8, 256, 3.0, 2.0), row(8, 8, 1024, 4.0, 8.0))
    found = KernelTable("a GPU", "abc", rows).sparse_from(8, 8, parse_pattern("2:4"))
    assert found is not None and 256 < found <= 1024
    assert KernelTable("a GPU", "abc", rows[:2]).sparse_from(8, 8, parse_pattern("2:4")) is None
    assert KernelTable("a GPU", "abc", ()).sparse_from(8, 8, parse_pattern("2:4")) is None


def test_the_packaged_rows_are_those_of_the_bench() -> None:
    """Stale rows: run python -m bench.kernel_rows after new bench/results/matmul*.json."""
    text = rows_text(stored_table())
    assert text == Path(crossover.__file__).with_name(crossover.ROWS_FILE).read_text()
    assert KernelTable.from_dict(json.loads(text)) == packaged_table() == stored_table()
    for found in packaged_table().rows:
        assert found.sparse_us > 0 and found.dense_us > 0


def test_rows_on_feature_major_inputs() -> None:
    """Of their own where they were measured, between rows too; elsewhere those of token-major x stand for them."""

    def measured(tokens: int, us: float, **config: str) -> dict[str, Any]:
        shape = {"R": 64, "C": 64, "T": tokens}
        return {"op": "sparse_linear", "dtype": "bf16", "path": "kernel", "config": config, "shape": shape, "us": us,
                "p20": us, "p80": us, "pattern": "2:4"}  # fmt: skip

    rows = [measured(128, 8.0, backend="cuda"), measured(128, 4.0, backend="cuda", x="feature-major")]
    rows += [measured(512, 20.0, backend="cuda"), measured(512, 1.0, backend="cuda", y="feature-major")]
    rows += [measured(tokens, 10.0, peer="F.linear") for tokens in (128, 512)]
    table = KernelTable.from_bench({"env": {"device": "a GPU", "commit": "abc"}, "rows": rows})
    assert [(r.tokens, r.sparse_us, r.feature_us) for r in table.rows] == [(128, 8.0, 4.0), (512, 20.0, None)]
    assert KernelTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    for tokens, token_us, feature_us in ((128, 8.0, 4.0), (512, 20.0, 20.0)):
        one, other = (table.estimate(64, 64, tokens, parse_pattern("2:4"), feature_x=kind) for kind in (False, True))
        assert one is not None and other is not None
        assert (one.sparse_us, other.sparse_us) == (token_us, feature_us) and one.dense_us == other.dense_us == 10.0
    between = [table.estimate(64, 64, 256, parse_pattern("2:4"), feature_x=kind) for kind in (False, True)]
    assert between[0] is not None and between[1] is not None and between[1].sparse_us < between[0].sparse_us


def test_a_feature_major_input_goes_to_the_product_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    found = layer(32, 64)[1]
    told: list[str] = []
    product = linear.sparse_linear_by_parts

    def watched(*args: Any, x_layout: str = "token", **options: Any) -> Tensor:
        told.append(x_layout)
        return product(*args, x_layout=x_layout, **options)

    monkeypatch.setattr(linear, "sparse_linear_by_parts", watched)
    x = inputs(2, 3, cols=64)
    for given in (x, x.movedim(-1, 0).contiguous().movedim(0, -1), x.transpose(0, 1), x[..., :1].expand(2, 3, 64)):
        assert found(given).shape == (*given.shape[:-1], 32)
    assert told == ["token", "feature", "token", "token"]


@pytest.mark.parametrize("doc", [{}, [], None, {"rows": 5}, {"rows": [{}]}, {"rows": [], "env": {"device": "x"}}])
def test_rows_of_another_file_are_refused(doc: Any) -> None:
    with pytest.raises(DataFormatError, match="kernel rows must"):
        KernelTable.from_bench(doc)
    with pytest.raises(DataFormatError, match="got none"):
        KernelTable.from_bench({"rows": [], "env": {"device": "x", "commit": "y"}})
