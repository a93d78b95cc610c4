# SPDX-License-Identifier: Apache-2.0
"""SparseLinear, the exchange of modules, and checkpoints: out, in, and refused when damaged."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import struct
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import obs_kernels as obs
from obs_kernels import OBSConfig, SparseLinear, compress_, decompress_, load, save_pretrained
from obs_kernels.errors import CheckpointFormatError, ConfigError, SparsityPatternError
from obs_kernels.ops import dispatch
from obs_kernels.sparse import detect_pattern, linear

PATTERNS = ["2:4", "4:8", "2:8", "2:16", "1:4", "16:2:8", "16:2:16"]
DETECTED = {p: p for p in PATTERNS} | {"1:4": "2:8"}
"""What the zeros say: one of four is two of eight as well, and as sparse."""
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def mask_of(shape: tuple[int, int], pattern: str, seed: int = 0) -> Tensor:
    """A random mask that obeys the pattern and uses every slot."""
    gen = torch.Generator().manual_seed(seed)
    *v, n, m = map(int, pattern.split(":"))
    rows, cols = shape
    score = torch.rand(rows, cols // m, m, generator=gen)
    if v:
        columns = torch.rand(rows // v[0], 1, cols // m, m, generator=gen).argsort(-1).argsort(-1) < 4
        score = (score.view(-1, v[0], cols // m, m) * columns).view(rows, cols // m, m)
    return (score.argsort(dim=2, descending=True, stable=True).argsort(-1) < n).view(rows, cols)


def pruned_linear(
    rows: int, cols: int, pattern: str, *, bias: bool = True, dtype=torch.float32, seed: int = 0
) -> nn.Linear:
    torch.manual_seed(seed)
    module = nn.Linear(cols, rows, bias=bias).to(dtype)
    module.weight.data.masked_fill_(~mask_of((rows, cols), pattern, seed), 0.0)
    return module


def net(pattern: str = "2:4", dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    return nn.Sequential(
        pruned_linear(32, 16, pattern, dtype=dtype, seed=seed),
        nn.GELU(),
        nn.LayerNorm(32, dtype=dtype),
        pruned_linear(16, 32, pattern, dtype=dtype, bias=False, seed=seed + 1),
        nn.Linear(16, 5, dtype=dtype),
    )


def fresh_net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(99)
    return nn.Sequential(
        nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 16, bias=False), nn.Linear(16, 5)
    ).to(dtype)  # fmt: skip


def inputs(wide: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 7, wide, generator=torch.Generator().manual_seed(5)).to(dtype)


def state_bits(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return set(one) == set(two) and all(one[k].dtype == two[k].dtype and torch.equal(one[k], two[k]) for k in one)


# the module


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_sparse_linear_equals_linear(pattern, bias):
    module = pruned_linear(32, 32, pattern, bias=bias)
    sparse = SparseLinear.from_linear(module, pattern)
    for x in (inputs(32), inputs(32)[0], inputs(32)[0, 0], inputs(32)[:0]):
        wanted = module.double()(x.double())
        module.float()
        assert sparse(x).shape == wanted.shape
        assert torch.allclose(sparse(x).double(), wanted, rtol=0, atol=1e-5)
    assert torch.equal(sparse.sparse.to_dense(), module.weight)
    assert (sparse.in_features, sparse.out_features, str(sparse.pattern)) == (32, 32, pattern)
    assert sparse.bias is module.bias
    assert repr(sparse) == f"SparseLinear(32, 32, pattern={pattern}, bias={bias})"


def test_mask_decides_over_zeros():
    """A kept weight that is 0 has its slot; a pruned one that is not is refused nowhere, since the mask counts."""
    module = nn.Linear(4, 1, bias=False)
    module.weight.data = torch.tensor([[0.0, 1.0, 2.0, 0.0]])
    sparse = SparseLinear.from_linear(module, "2:4", torch.tensor([[True, True, False, False]]))
    assert sparse.values.tolist() == [[0.0, 1.0]] and sparse.codes.tolist() == [[0b0100]]


@pytest.mark.parametrize("pattern", ["2:4", "16:2:8", "2:8"])
def test_gradient_of_input_and_bias(pattern):
    module = pruned_linear(32, 16, pattern)
    sparse = SparseLinear.from_linear(module, pattern)
    one, two = inputs().requires_grad_(), inputs().requires_grad_()
    module(one).square().sum().backward()
    wanted, module.bias.grad = module.bias.grad, None
    sparse(two).square().sum().backward()
    assert torch.allclose(one.grad, two.grad, atol=1e-4) and torch.allclose(wanted, module.bias.grad, atol=1e-4)
    assert [name for name, _ in sparse.named_parameters()] == ["bias"]  # the packed weight is not trained


@pytest.mark.parametrize("pattern", ["2:4", "16:2:8"])
def test_state_dict_copy_and_pickle(pattern):
    sparse = SparseLinear.from_linear(pruned_linear(32, 16, pattern), pattern)
    names = {"values", "codes", "bias"} | ({"columns"} if pattern.count(":") == 2 else set())
    assert set(sparse.state_dict()) == names
    other = SparseLinear.from_linear(pruned_linear(32, 16, pattern, seed=8), pattern)
    other.load_state_dict(sparse.state_dict())
    for twin in (other, copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        assert equal(state_bits(twin), state_bits(sparse)) and torch.equal(twin(inputs()), sparse(inputs()))
        assert str(twin.pattern) == pattern
    assert copy.deepcopy(sparse).values.data_ptr() != sparse.values.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
def test_to_dtype_moves_values_only(dtype):
    sparse = SparseLinear.from_linear(pruned_linear(32, 16, "16:2:8"), "16:2:8").to(dtype)
    assert sparse.values.dtype == dtype and sparse.codes.dtype == sparse.columns.dtype == torch.uint8
    assert sparse(inputs(dtype=dtype)).dtype == dtype


@pytest.mark.usefixtures("traceable")
@pytest.mark.parametrize("first_call", ["eager", "compiled"])
@pytest.mark.parametrize("pattern", ["2:4", "16:2:8", "2:8"])
def test_compile_full_graph(pattern, first_call):
    getattr(dispatch._log_once, "cache_clear", lambda: None)()  # as in a new process
    model = nn.Sequential(SparseLinear.from_linear(pruned_linear(32, 16, pattern), pattern), nn.GELU())
    if first_call == "eager":
        model(inputs())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (1, 3, 7):
        x = inputs()[:, :tokens]
        assert torch.allclose(compiled(x), model(x), atol=1e-6)
    x = inputs().requires_grad_()
    compiled(x).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


# the exchange


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_compress_and_decompress_round_trip(pattern, dtype):
    model = net(pattern, dtype)
    before, out = state_bits(model), model(inputs(dtype=dtype))
    bias = model[0].bias
    assert compress_(model) == {"0": DETECTED[pattern], "3": DETECTED[pattern]}
    assert [type(m) for m in model] == [SparseLinear, nn.GELU, nn.LayerNorm, SparseLinear, nn.Linear]
    assert model[0].bias is bias and model[3].bias is None and model[0].values.dtype == dtype
    assert torch.allclose(
        model(inputs(dtype=dtype)).float(), out.float(), rtol=0.05, atol=1e-5 if dtype == torch.float32 else 0.05
    )
    assert decompress_(model) == ["0", "3"]
    assert equal(before, state_bits(model)) and type(model[0]) is nn.Linear and model[0].bias is bias
    assert not torch.signbit(model[0].weight[model[0].weight == 0]).any()
    assert decompress_(model) == []


def test_negative_zeros_become_positive():
    model = net()
    model[0].weight.data[model[0].weight == 0] = -0.0
    compress_(model)
    decompress_(model)
    assert not torch.signbit(model[0].weight[model[0].weight == 0]).any()


def test_names_training_mode_and_neighbours_stay():
    model = nn.ModuleDict({"inner": net(), "other": nn.Embedding(3, 4)}).train()
    names = [name for name, _ in model.named_modules()]
    assert compress_(model) == {"inner.0": "2:4", "inner.3": "2:4"}
    assert [name for name, _ in model.named_modules()] == names and all(m.training for m in model.modules())
    model.eval()
    decompress_(model)
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_detection(pattern):
    assert str(detect_pattern(pruned_linear(32, 32, pattern).weight)) == DETECTED[pattern]
    assert detect_pattern(nn.Linear(32, 32).weight) is None


def test_detection_takes_the_sparsest():
    weight = pruned_linear(32, 32, "2:8").weight.detach().clone()
    assert str(detect_pattern(torch.zeros(256, 64))) == "256:2:32"
    weight[0, :3] = 1.0  # one group now keeps three or more of eight
    weight[0, 3:8] = 0.0
    assert str(detect_pattern(weight)) == "4:8"
    half = torch.ones(3, 8)
    half[:, 1::2] = 0
    assert str(detect_pattern(half)) == "2:4"
    assert detect_pattern(torch.ones(3, 5).tril()) is None


def test_detection_prefers_2_of_32_to_a_denser_panel():
    """Two of 32, and at most four columns of each eight: both fit, 2:32 is the sparser."""
    weight = torch.zeros(16, 32)
    for row in range(16):
        weight[row, 8 * (row % 4) + row % 3] = weight[row, 8 * ((row + 1) % 4) + row % 2] = 1.0
    assert detect_pattern(weight).sparsity == 1 - 2 / 32


def test_masks_of_the_pruner_decide():
    """A layer that was not pruned stays dense, and a kept zero keeps its place."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight.data.masked_fill_(~mask_of((16, 16), "2:8"), 0.0)
    pruner = obs.OBSPruner(
        model, OBSConfig(pattern="2:4", method="magnitude", update="none", ignore=("1",), curvature="block")
    )
    pruner.prune()
    mask = pruner.masks()["0.weight"]
    with torch.no_grad():
        model[0].weight[:, 3::4] = 0.0  # the zeros alone would put a filler at the lowest free place instead
    pruner.finalize()
    before = state_bits(model)
    wanted, other = (obs.ops.pack(model[0].weight.detach(), m, "2:4").codes for m in (mask, model[0].weight != 0))
    assert compress_(model) == {"0": "2:4"}
    assert torch.equal(model[0].codes, wanted) and not torch.equal(wanted, other)
    decompress_(model)
    assert equal(before, state_bits(model))


@pytest.mark.parametrize("pattern", ["unstructured:0.5", "block4:0.5"])
def test_patterns_without_a_packed_format(pattern):
    model = nn.Sequential(nn.Linear(16, 16))
    pruner = obs.OBSPruner(model, OBSConfig(pattern=pattern, method="magnitude", update="none", curvature="block"))
    pruner.prune()
    pruner.finalize()
    with pytest.raises(ConfigError, match=f"pattern {pattern} has no packed format"):
        compress_(model)


def test_nothing_to_compress():
    for model in (fresh_net(), nn.Sequential(nn.ReLU())):
        before = state_bits(model)
        with pytest.raises(ConfigError, match=r"no pruned nn\.Linear"):
            compress_(model)
        assert equal(before, state_bits(model))


def test_a_weight_that_breaks_the_pattern_changes_nothing():
    model = net("2:4")
    model[3].weight.data[5, :4] = 1.0
    before = state_bits(model)
    with pytest.raises(SparsityPatternError, match=r"^3: .*keeps 4 of 4 in row 5, group 0"):
        compress_(model, pattern="2:4")
    assert equal(before, state_bits(model)) and not any(isinstance(m, SparseLinear) for m in model.modules())


def test_weights_that_grew_back_after_finalize_are_not_dropped_in_silence():
    """Trained on without apply_masks: packing by the mask would change the model's output."""
    model = nn.Sequential(nn.Linear(16, 16))
    pruner = obs.OBSPruner(model, OBSConfig(pattern="2:4", method="magnitude", update="none", curvature="block"))
    pruner.prune()
    pruner.finalize()
    model[0].weight.data[0, :4] = 1.0
    with pytest.raises((SparsityPatternError, ConfigError)):
        compress_(model)


def test_a_shared_module_stays_shared():
    shared = pruned_linear(16, 16, "2:4")
    model = nn.Sequential(shared, nn.Tanh(), shared)
    out = model(inputs())
    assert set(compress_(model)) == {"0"}
    assert model[0] is model[2] and isinstance(model[2], SparseLinear)
    assert torch.allclose(model(inputs()), out, atol=1e-5)
    decompress_(model)
    assert model[0] is model[2] and torch.equal(model[2].weight, shared.weight)


@pytest.mark.parametrize("change", [compress_, decompress_])
def test_a_bare_module_cannot_be_replaced_in_place(change):
    """There is no parent to put the new module into: an error, not a second weight beside the first."""
    module = pruned_linear(16, 16, "2:4")
    model = module if change is compress_ else SparseLinear.from_linear(module, "2:4")
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ConfigError):
        change(model)
    assert [name for name, _ in model.named_modules()] == before


def test_subclasses_of_linear_are_left_alone():
    class Mine(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = nn.Sequential(Mine(16, 16), pruned_linear(16, 16, "2:4"))
    model[0].weight.data.masked_fill_(~mask_of((16, 16), "2:4"), 0.0)
    assert compress_(model) == {"1": "2:4"}


# checkpoints


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = net("16:2:8")
    compress_(model)
    return save_pretrained(model, tmp_path / "out")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_save_and_load_a_plain_module(tmp_path: Path, pattern, dtype):
    model = net(pattern, dtype).eval()
    compress_(model)
    out = model(inputs(dtype=dtype))
    path = save_pretrained(model, tmp_path / "deep" / "out")
    assert sorted(p.name for p in path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    target = fresh_net(dtype)
    found = load(path, model=target)
    assert found is target and not found.training
    assert equal(state_bits(found), state_bits(model)) and torch.equal(found(inputs(dtype=dtype)), out)
    decompress_(found)
    assert equal(state_bits(found), state_bits(net(pattern, dtype)))


def test_the_stored_format(folder: Path):
    """design.md, Stored format (version 1): names, shapes and dtypes."""
    tensors = {k: (tuple(v.shape), v.dtype) for k, v in load_file(folder / "model.safetensors").items()}
    assert tensors == {
        "0.values": ((32, 4), torch.float32),
        "0.codes": ((32, 1), torch.uint8),
        "0.columns": ((2, 2, 4), torch.uint8),
        "0.bias": ((32,), torch.float32),
        "0.weight": ((0,), torch.float32),
        "2.weight": ((32,), torch.float32),
        "2.bias": ((32,), torch.float32),
        "3.values": ((16, 8), torch.float32),
        "3.codes": ((16, 2), torch.uint8),
        "3.columns": ((1, 4, 4), torch.uint8),
        "3.weight": ((0,), torch.float32),
        "4.weight": ((5, 16), torch.float32),
        "4.bias": ((5,), torch.float32),
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "obs_kernels", "format_version": 1, "pattern": "16:2:8", "targets": ["0", "3"]
    }  # fmt: skip


def test_the_empty_weights_may_be_missing(folder: Path):
    """They stop other readers (README of the folder); ours needs none."""
    rewrite(folder, lambda t: [t.pop(key) for key in ("0.weight", "3.weight")])
    model = net("16:2:8").eval()
    compress_(model)
    assert torch.equal(load(folder, model=fresh_net())(inputs()), model(inputs()))


def test_the_readme_says_how_to_load(folder: Path):
    text = (folder / "README.md").read_text()
    for word in (
        "obs_kernels.load(",
        "from_pretrained(",
        "is refused",
        "fresh random weights",
        "save_dense=True",
        ".values",
    ):
        assert word in text


def test_several_patterns_in_one_model(tmp_path: Path):
    model = nn.Sequential(pruned_linear(16, 16, "2:4"), pruned_linear(16, 16, "16:2:8"), nn.Linear(16, 16))
    compress_(model)
    path = save_pretrained(model, tmp_path / "out")
    section = json.loads((path / "config.json").read_text())["quantization_config"]
    assert section["targets"] == {"0": "2:4", "1": "16:2:8"}
    found = load(path, model=nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))))
    assert torch.equal(found(inputs()), model(inputs()))


def test_save_dense(tmp_path: Path):
    model = net("2:4")
    dense = state_bits(model)
    compress_(model)
    path = save_pretrained(model, tmp_path / "out", save_dense=True)
    assert equal(load_file(path / "model.safetensors"), dense)
    assert "quantization_config" not in json.loads((path / "config.json").read_text())
    assert isinstance(model[0], SparseLinear)  # saving changes nothing
    plain = fresh_net()
    plain.load_state_dict(load_file(path / "model.safetensors"))
    assert equal(state_bits(load(path, model=fresh_net())), dense)


def test_saving_a_dense_model_must_be_asked_for(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no packed layer; call compress_.*save_dense=True"):
        save_pretrained(fresh_net(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    save_pretrained(fresh_net(), tmp_path / "out", save_dense=True)


def test_saving_replaces_a_folder(tmp_path: Path, folder: Path):
    (folder / "old").write_text("1")
    model = net("2:4")
    compress_(model)
    save_pretrained(model, folder)
    assert not (folder / "old").exists() and [p.name for p in tmp_path.iterdir()] == ["out"]
    assert torch.equal(load(folder, model=fresh_net())(inputs()), model.eval()(inputs()))


def test_tied_weights_of_a_plain_module(tmp_path: Path):
    """Both names come back right, and stay one tensor in a model that ties them."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.a, self.b = pruned_linear(16, 16, "2:4"), nn.Linear(16, 16), nn.Linear(16, 16)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(self.fc(x)))

    model = Tied().eval()
    compress_(model)
    path = save_pretrained(model, tmp_path / "out")
    torch.manual_seed(1)
    found = load(path, model=Tied())
    assert torch.equal(found(inputs()), model(inputs()))
    assert found.a.weight is found.b.weight


# transformers


def tiny_bert(**changes):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.BertForQuestionAnswering(
        transformers.BertConfig(
            **(
                {
                    "vocab_size": 40,
                    "hidden_size": 16,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "intermediate_size": 32,
                }
                | changes
            )
        )
    ).eval()


def prune_bert(model: nn.Module, pattern: str) -> None:
    obs.sparsify_(model, OBSConfig(pattern=pattern, method="magnitude", update="none", curvature="block"), None, None)


IDS = torch.tensor([[3, 4, 5, 6, 0], [7, 8, 9, 10, 11]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", ["2:4", "16:2:8"])
def test_bert_round_trip(tmp_path: Path, pattern, dtype):
    model = tiny_bert().to(dtype)
    prune_bert(model, pattern)
    compress_(model)
    with torch.no_grad():
        wanted = model(IDS)
        path = save_pretrained(model, tmp_path / "packed")
        found = load(path)
        assert type(found) is type(model) and not found.training
        assert sum(isinstance(m, SparseLinear) for m in found.modules()) == 12
        assert next(found.parameters()).dtype == dtype
        result = found(IDS)
    assert torch.equal(result.start_logits, wanted.start_logits) and torch.equal(result.end_logits, wanted.end_logits)
    assert found.config.to_dict() == model.config.to_dict() | {
        "architectures": ["BertForQuestionAnswering"],
        "dtype": found.config.to_dict()["dtype"],
    }


def test_bert_saved_dense_is_read_by_transformers(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    model = tiny_bert()
    prune_bert(model, "2:4")
    compress_(model)
    path = save_pretrained(model, tmp_path / "dense", save_dense=True)
    with torch.no_grad():
        for read in (transformers.BertForQuestionAnswering, transformers.AutoModelForQuestionAnswering):
            found, info = read.from_pretrained(path, output_loading_info=True)
            assert not info["missing_keys"] and not info["unexpected_keys"]
            decompressed = copy.deepcopy(model)
            decompress_(decompressed)
            assert torch.equal(found(IDS).start_logits, decompressed(IDS).start_logits)


def test_bert_with_tied_embeddings(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        )
    ).eval()
    pruner = obs.OBSPruner(model, OBSConfig(pattern="2:4", method="magnitude", update="none", curvature="block"))
    assert any(s.reason.startswith("tied with") for s in pruner.skipped)
    pruner.prune()
    pruner.finalize()
    compress_(model)
    path = save_pretrained(model, tmp_path / "out")
    found = load(path)
    assert found.cls.predictions.decoder.weight is found.bert.embeddings.word_embeddings.weight
    with torch.no_grad():
        assert torch.equal(found(IDS).logits, model(IDS).logits)


# damage


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def reconfigure(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    result = change(config)
    (folder / "config.json").write_text(json.dumps(config if result is None else result))


def refused(folder: Path, *words: str, model: nn.Module | None = None) -> None:
    target = fresh_net() if model is None else model
    before, kinds = state_bits(target), [type(m) for m in target.modules()]
    with pytest.raises(CheckpointFormatError) as caught:
        load(folder, model=target)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert equal(before, state_bits(target)) and kinds == [type(m) for m in target.modules()]


@pytest.mark.parametrize("key", ["0.values", "0.codes", "0.columns", "0.bias", "2.weight", "4.weight", "4.bias"])
def test_missing_tensors(folder: Path, key):
    rewrite(folder, lambda t: t.pop(key))
    refused(folder, key.rpartition(".")[0])


@pytest.mark.parametrize("key", ["0.weight", "x", "3.bias", "4.values"])
def test_extra_tensors(folder: Path, key):
    rewrite(folder, lambda t: t.update({key: torch.zeros(16)}))
    refused(folder, "not part of the model", key)


@pytest.mark.parametrize("key", ["0.values", "0.codes", "0.columns", "0.bias", "2.weight", "4.weight"])
def test_tensors_of_another_shape(folder: Path, key):
    rewrite(folder, lambda t: t.update({key: t[key][:-1]}))
    refused(folder, *key.split("."))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("key", ["0.values", "0.codes", "0.columns", "0.bias", "4.weight"])
def test_tensors_of_another_dtype(folder: Path, key, dtype):
    if load_file(folder / "model.safetensors")[key].dtype == dtype:
        pytest.skip("that is its dtype")
    rewrite(folder, lambda t: t.update({key: t[key].to(dtype)}))
    refused(folder)


@pytest.mark.parametrize("key", ["0.values", "4.weight"])
def test_mixed_float_dtypes(folder: Path, key):
    """f16 values beside an f32 bias would fail at the first call, so the file is refused (promises, row 6)."""
    rewrite(folder, lambda t: t.update({key: t[key].half()}))
    target = fresh_net()
    try:
        found = load(folder, model=target)
    except CheckpointFormatError:
        return
    found(inputs())


@pytest.mark.parametrize("version", [0, 2, "1", 1.5, None, True, [1]])
def test_another_version(folder: Path, version):
    reconfigure(folder, lambda c: c["quantization_config"].update(format_version=version))
    refused(folder, "format_version must be 1", repr(version))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["quantization_config"].pop("format_version"),
        lambda c: c["quantization_config"].update(quant_method="gptq"),
        lambda c: c["quantization_config"].pop("quant_method"),
        lambda c: c.update(quantization_config=[1]),
        lambda c: c.update(quantization_config="obs_kernels"),
        lambda c: c["quantization_config"].update(pattern="4:2"),
        lambda c: c["quantization_config"].update(pattern="2:4"),
        lambda c: c["quantization_config"].update(pattern="16:2:16"),
        lambda c: c["quantization_config"].update(pattern="16:3:8"),
        lambda c: c["quantization_config"].update(pattern="3:2:8"),
        lambda c: c["quantization_config"].update(pattern="2:7"),
        lambda c: c["quantization_config"].update(pattern=5),
        lambda c: c["quantization_config"].update(pattern=None),
        lambda c: c["quantization_config"].update(pattern=["16:2:8"]),
        lambda c: c["quantization_config"].update(pattern="unstructured:0.5"),
        lambda c: c["quantization_config"].pop("pattern"),
        lambda c: c["quantization_config"].pop("targets"),
        lambda c: c["quantization_config"].update(targets=None),
        lambda c: c["quantization_config"].update(targets=[]),
        lambda c: c["quantization_config"].update(targets=["0"]),
        lambda c: c["quantization_config"].update(targets=["0", "3", "4"]),
        lambda c: c["quantization_config"].update(targets=["0", "3", "2"]),
        lambda c: c["quantization_config"].update(targets=["0", "3", "nothing"]),
        lambda c: c["quantization_config"].update(targets=["0", "3", ""]),
        lambda c: c["quantization_config"].update(targets=[["0"], 3]),
        lambda c: c["quantization_config"].update(targets={"0": "16:2:8", "3": 7}),
        lambda c: c.pop("quantization_config"),
        lambda c: [1, 2],
        lambda c: "text",
    ],
)
def test_damaged_configs(folder: Path, change):
    config = json.loads((folder / "config.json").read_text())
    result = change(config)
    (folder / "config.json").write_text(json.dumps(result if isinstance(result, str) or result == [1, 2] else config))
    refused(folder)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"nul", b'{"a": 1,}', b"[" * 100_000])
def test_unreadable_configs(folder: Path, text):
    (folder / "config.json").write_bytes(text)
    refused(folder, "config.json")


def test_folders_that_are_none(tmp_path: Path, folder: Path):
    refused(tmp_path / "nothing", "no config.json", "save_pretrained")
    refused(folder / "model.safetensors", "no config.json")
    (folder / "model.safetensors").unlink()
    refused(folder, "model.safetensors is missing")


def test_a_model_that_does_not_fit(folder: Path):
    refused(folder, model=nn.Sequential(nn.Linear(16, 32)))
    refused(
        folder,
        model=nn.Sequential(
            nn.Linear(16, 31), nn.GELU(), nn.LayerNorm(31), nn.Linear(31, 16, bias=False), nn.Linear(16, 5)
        ),
    )
    refused(folder, "no nn.Linear", model=nn.Sequential(nn.ReLU()))


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, 0.5, 0.9, -1])
def test_a_truncated_file(folder: Path, keep):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    refused(folder, "damaged")


def test_a_config_without_a_transformers_model(folder: Path):
    with pytest.raises(
        CheckpointFormatError, match=r"architecture 'Sequential' is not a transformers model; pass model="
    ):
        pytest.importorskip("transformers")
        load(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(architectures=5),
        lambda c: c.update(architectures={"a": 1}),
        lambda c: c.update(architectures=[]),
        lambda c: c.update(architectures=[None]),
        lambda c: c.update(architectures=["logging"]),
        lambda c: c.update(architectures=["AutoModel"]),
        lambda c: c.update(architectures=["BertConfig"]),
        lambda c: c.update(architectures=["pipeline"]),
        lambda c: c.update(architectures=["GPT2LMHeadModel"]),
        lambda c: c.update(model_type="nothing"),
        lambda c: c.update(model_type=5),
        lambda c: c.pop("model_type"),
        lambda c: c.update(dtype="nn"),
        lambda c: c.update(dtype="load"),
        lambda c: c.update(dtype="int8"),
        lambda c: c.update(hidden_size="wide"),
        lambda c: c.update(hidden_size=17),
        lambda c: c.update(hidden_size=32),
        lambda c: c.update(hidden_size=-16),
        lambda c: c.update(num_hidden_layers=1),
        lambda c: c.update(hidden_act="nothing"),
        lambda c: c.update(vocab_size=41),
    ],
)
def test_damaged_transformers_configs(tmp_path_factory, change, packed_bert):
    """Whatever the config says: one class of error, and nothing but a model of transformers is ever called."""
    folder = tmp_path_factory.mktemp("bert") / "out"
    shutil.copytree(packed_bert, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointFormatError):
        load(folder)


@pytest.fixture(scope="module")
def packed_bert(tmp_path_factory) -> Path:
    model = tiny_bert()
    prune_bert(model, "2:4")
    compress_(model)
    return save_pretrained(model, tmp_path_factory.mktemp("packed") / "out")


def legal(index: Tensor, limit: int) -> bool:
    return bool((index < limit).all()) and bool((index.int().diff(dim=-1) > 0).all())


def two_bit(codes: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """(pairs, what is left in the unused high bits)."""
    places = torch.stack([codes >> s & 3 for s in (0, 2, 4, 6)], -1).flatten(1)
    return places[:, :kept].unflatten(1, (-1, 2)), places[:, kept:]


@pytest.mark.parametrize("pattern", ["2:4", "16:2:8", "16:2:16", "2:8", "4:8", "1:4"])
def test_mutated_codes_and_columns(tmp_path: Path, pattern):
    """Every index out of range or out of order is refused; what is let in is exactly what the file says."""
    model = nn.Sequential(pruned_linear(16, 16, pattern))
    compress_(model, pattern=pattern)
    folder = save_pretrained(model, tmp_path / "out")
    clean = load_file(folder / "model.safetensors")
    random, counts = Random(7), {True: 0, False: 0}
    n, m = map(int, pattern.split(":")[-2:])
    for _ in range(60):
        tensors = {k: v.clone() for k, v in clean.items()}
        for _ in range(random.randint(1, 2)):
            key = random.choice([k for k in tensors if k.endswith((".codes", ".columns"))])
            flat = tensors[key].view(-1)
            at = random.randrange(flat.numel())
            flat[at] = random.choice([random.randrange(256), int(flat[at]) ^ (1 << random.randrange(8)), int(flat[at])])
        save_file(tensors, folder / "model.safetensors")
        codes = tensors["0.codes"]
        if pattern == "2:4" or "0.columns" in tensors:
            pairs, rest = two_bit(codes, 16 // m * n)
            fine = legal(pairs, 4) and not rest.any()
        else:
            fine = legal(codes.unflatten(1, (-1, n)), m)
        fine = bool(fine and ("0.columns" not in tensors or legal(tensors["0.columns"], m)))
        counts[fine] += 1
        target = nn.Sequential(nn.Linear(16, 16))
        if not fine:
            refused(folder, "0", model=target)
            continue
        found = load(folder, model=target)
        assert torch.equal(found[0].codes, codes) and torch.equal(found[0].values, clean["0.values"])
        assert torch.isfinite(found(inputs())).all()
    assert min(counts.values()) > 3


def test_mutated_bytes(folder: Path):
    """Any byte of header or data: refused as damaged, or loaded as the file stands; never another exception."""
    path = folder / "model.safetensors"
    clean = path.read_bytes()
    header = 8 + struct.unpack("<Q", clean[:8])[0]
    random, outcomes = Random(3), set()
    for trial in range(250):
        data = bytearray(clean)
        for _ in range(random.choice([1, 1, 2, 8])):
            data[random.randrange(header if trial % 5 else len(data))] = random.randrange(256)
        path.write_bytes(bytes(data))
        target = fresh_net()
        before, kinds = state_bits(target), [type(m) for m in target.modules()]
        try:
            found = load(folder, model=target)
        except CheckpointFormatError:
            outcomes.add("refused")
            assert equal(before, state_bits(target)) and kinds == [type(m) for m in target.modules()], bytes(
                data[:header]
            )
        else:
            outcomes.add("loaded")
            stored = {k: v for k, v in load_file(path).items() if tuple(v.shape) != (0,)}
            assert set(stored) == set(found.state_dict())
            assert all(
                v.view(torch.uint8).equal(stored[k].view(torch.uint8)) for k, v in found.state_dict().items() if v.dim()
            )
    assert outcomes == {"refused", "loaded"}


def test_a_huge_header_is_refused_at_once(folder: Path):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + path.read_bytes()[8:])
    refused(folder, "damaged")


def test_a_missing_columns_tensor_of_a_panel_pattern(folder: Path):
    rewrite(folder, lambda t: t.pop("3.columns"))
    refused(folder, "3", "columns")


def test_columns_beside_a_pattern_without_panels(tmp_path: Path):
    model = nn.Sequential(pruned_linear(16, 16, "2:4"))
    compress_(model)
    folder = save_pretrained(model, tmp_path / "out")
    rewrite(folder, lambda t: t.update({"0.columns": torch.zeros(1, 4, 4, dtype=torch.uint8)}))
    refused(folder, "0", "columns", model=nn.Sequential(nn.Linear(16, 16)))


# nothing half-written


def test_saving_below_a_file(tmp_path: Path):
    model = net()
    compress_(model)
    (tmp_path / "file").write_text("keep")
    with pytest.raises(OSError):
        save_pretrained(model, tmp_path / "file" / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "keep"


@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_in_the_middle_leaves_nothing(tmp_path: Path, monkeypatch, existing):
    model = net()
    compress_(model)
    if existing:
        save_pretrained(model, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} if existing else {}

    def fail(tensors, path, **kwargs):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="No space"):
        save_pretrained(net_changed(), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if existing else [])
    assert not existing or {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def net_changed() -> nn.Module:
    model = net("2:8", seed=4)
    compress_(model)
    return model


def test_a_failure_of_compress_leaves_the_model(monkeypatch):
    model = net()
    before = state_bits(model)
    calls = 0
    original = linear.pack

    def fail_second(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise MemoryError
        return original(*args, **kwargs)

    monkeypatch.setattr(linear, "pack", fail_second)
    with pytest.raises(MemoryError):
        compress_(model)
    assert equal(before, state_bits(model)) and type(model[0]) is nn.Linear
