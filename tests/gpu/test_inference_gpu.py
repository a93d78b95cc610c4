# SPDX-License-Identifier: Apache-2.0
"""Packed layers and whole models on a GPU: graphs, autocast, layouts, all ways of a forward, torch's own layout."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from product_checks import DEVICE, hopper
from torch import Tensor, nn

import obs_kernels as obs
from obs_kernels.errors import UnsupportedGPUError
from obs_kernels.inference import encoders, ways
from obs_kernels.inference.job import run_speed_job
from obs_kernels.sparse import semi_structured
from obs_kernels.sparse.convert import convert
from obs_kernels.sparse.linear import SparseLinear

pytestmark = pytest.mark.gpu
__all__ = ["hopper"]  # fixture


def layers(pattern: str = "64:2:8", **options: bool) -> tuple[nn.Linear, SparseLinear]:
    """A dense layer with zeros and its packed twin, bf16."""
    torch.manual_seed(0)
    dense = nn.Linear(256, 128, device=DEVICE, dtype=torch.bfloat16)
    parsed = obs.parse_pattern(pattern)
    encoders.impose_(dense.weight.data, parsed)
    return dense, SparseLinear.from_linear(dense, pattern, **options)


def near(found: Tensor, wanted: Tensor) -> None:
    """Rounding of bf16 to both sides of f32 sums: some places of the largest output."""
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    assert float((found.float() - wanted.float()).abs().max()) <= 2e-2 * float(wanted.float().abs().max())


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("dispatch", ["sparse", "dense", "auto"])
def test_a_graph_of_a_layer_replays(dispatch: str) -> None:
    dense, sparse = layers(keep_dense=True)
    sparse.dispatch = dispatch
    x = torch.randn(512, 256, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        call = ways._captured(lambda: sparse(x), x.device)
        for _ in range(2):
            x.normal_()
            near(call(), dense(x))


@pytest.mark.usefixtures("hopper")
def test_autocast_of_f32_layers() -> None:
    dense, sparse = layers()
    dense, sparse = dense.float(), sparse.float()
    x = torch.randn(64, 256, device=DEVICE)
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        for _ in range(2):
            near(sparse(x), dense(x))
        first = sparse._cast
        sparse(x)
    assert sparse._cast is first


@pytest.mark.usefixtures("hopper", "graph_break")
@pytest.mark.parametrize("pattern", ["64:2:8", "2:4"])
def test_compiled_with_a_graph_break_on_another_stream(pattern: str) -> None:
    """What runs beside the graphs is not compiled: addresses, and the stream that has to wait for the packing."""
    dense, sparse = layers(pattern)
    compiled = torch.compile(sparse)
    x = torch.randn(64, 256, device=DEVICE, dtype=torch.bfloat16)
    torch.cuda.synchronize()
    with torch.no_grad():
        for _ in range(3):
            near(compiled(x), dense(x))
        with torch.cuda.stream(torch.cuda.Stream()):
            found = compiled(x)
            torch.cuda.current_stream().synchronize()
        near(found, dense(x))


@pytest.mark.usefixtures("hopper")
def test_feature_major_between_two_layers() -> None:
    first, second = layers()[1], SparseLinear.from_linear(_second(), "64:2:8")
    x = torch.randn(4, 24, 256, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        wanted = second(first(x))
        first.y_layout = "feature"
        assert first(x).movedim(-1, 0).is_contiguous()
        near(second(first(x)), wanted)


def _second() -> nn.Linear:
    torch.manual_seed(1)
    dense = nn.Linear(128, 64, device=DEVICE, dtype=torch.bfloat16)
    encoders.impose_(dense.weight.data, obs.parse_pattern("64:2:8"))
    return dense


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("fuse_ffn", [None, "token", "feature"])
def test_all_ways_of_a_model(fuse_ffn: str | None) -> None:
    pytest.importorskip("transformers")
    torch.compiler.reset()
    model, _ = encoders.build("tiny", torch.bfloat16, torch.device(DEVICE))
    twin = encoders.sparse_twin(model, "64:2:8", fuse_ffn=fuse_ffn)[0]
    dense = copy.deepcopy(twin)
    obs.decompress_(dense)
    inputs = encoders.make_inputs(twin, 4, 64)
    with torch.no_grad():
        wanted = ways.first_tensor(dense(**inputs))
        for way in ways.WAYS:
            call = ways.make_call(twin, inputs, way)
            for _ in range(2):
                near(call(), wanted)


@pytest.mark.usefixtures("hopper", "traceable")
def test_the_job_measures_everything() -> None:
    pytest.importorskip("transformers")
    report = run_speed_job(
        model="tiny", patterns=["64:2:8", "2:4"], batches=[4], lengths=[64], device=str(DEVICE), seconds=0.05
    )
    (cell,) = report["cells"]
    for found in (cell["dense"], *cell["sparse"].values()):
        assert found["failed"] == {} and set(found["ways"]) == set(ways.WAYS)
        assert found["peak_bytes"] > 0 and 0 <= found["linear_share"] <= 1
        energy = any("energy was not measured" in note for note in report["notes"])
        assert (found["joules"] is None) == energy
    assert all(found["max_difference"] < 2e-2 for found in cell["sparse"].values())
    assert not any("reference path" in note for note in report["notes"])


@pytest.mark.usefixtures("hopper")
def test_layers_timed_here_decide() -> None:
    """At 4 tokens no kernel beats cuBLAS by more than noise; whatever it says, the reason is a timing of this GPU."""
    model = nn.Sequential(layers()[0], _second())
    report = obs.compress_(model, 4, measure=True)
    assert set(report) | set(report.dense) == {"0", "1"}
    assert all("timed on" in reason and torch.cuda.get_device_name() in reason for reason in report.dense.values())


def test_torch_multiplies_by_our_semi_structured_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = encoders.build("tiny", torch.bfloat16, torch.device("cpu"))[0].config
    model = transformers.BertModel(config).eval().to(torch.bfloat16)
    twin = encoders.sparse_twin(model, "2:4")[0]
    packed = obs.save_pretrained(twin, tmp_path / "packed")
    convert(packed, tmp_path / "semi", "semi-structured")
    if torch.cuda.get_device_capability()[0] != 8:
        with pytest.raises(UnsupportedGPUError, match=r"8\.x .* got .*convert the folder to packed"):
            semi_structured.load_semi_structured(tmp_path / "semi", device=DEVICE)
        return
    found = semi_structured.load_semi_structured(tmp_path / "semi", device=DEVICE)
    obs.decompress_(twin)
    twin = twin.to(DEVICE)
    inputs = encoders.make_inputs(twin, 2, 64)
    with torch.no_grad():
        near(ways.first_tensor(found(**inputs)), ways.first_tensor(twin(**inputs)))


@pytest.mark.usefixtures("hopper")
def test_from_pretrained_onto_the_gpu(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = encoders.build("tiny", torch.bfloat16, torch.device("cpu"))[0].config
    model = transformers.BertModel(config).eval().to(torch.bfloat16)
    twin = encoders.sparse_twin(model, "64:2:8")[0]
    folder = obs.save_pretrained(twin, tmp_path / "packed")
    found = transformers.AutoModel.from_pretrained(folder).to(DEVICE)
    assert sum(isinstance(m, SparseLinear) for m in found.modules()) == 12
    assert next(found.parameters()).dtype == torch.bfloat16
    inputs = encoders.make_inputs(found, 2, 64)
    obs.decompress_(twin)
    with torch.no_grad():
        near(ways.first_tensor(found(**inputs)), ways.first_tensor(twin.to(DEVICE)(**inputs)))
