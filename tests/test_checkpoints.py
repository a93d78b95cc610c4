# SPDX-License-Identifier: Apache-2.0
"""Packed folders: shards, transformers' from_pretrained, other forms; and whatever a damaged file may hold."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import random_mask
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import obs_kernels as obs
from obs_kernels.errors import CheckpointFormatError, ConfigError, DTypeNotSupportedError, ShapeNotSupportedError
from obs_kernels.patterns import parse_pattern
from obs_kernels.sparse import hub, semi_structured, stored
from obs_kernels.sparse.convert import check_target, compress_folder, convert

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[3, 4, 5, 6, 0], [7, 8, 9, 10, 11]])
ROOT = Path(__file__).resolve().parent.parent


def bert(pattern: str = "2:4", kind: str = "BertForQuestionAnswering", **changes: Any) -> nn.Module:
    """Two layers of width 64, which torch's semi-structured layout takes, pruned by magnitude."""
    sizes = {"vocab_size": 40, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, kind)(
        transformers.BertConfig(**sizes, intermediate_size=128, **changes)
    ).eval()
    obs.sparsify_(
        model, obs.OBSConfig(pattern=pattern, method="magnitude", update="none", curvature="block"), None, None
    )
    return model


def answers(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS)[0]
    return found


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A packed folder, and what its model answers."""
    model = bert("16:2:8")
    obs.compress_(model)
    return obs.save_pretrained(model, tmp_path_factory.mktemp("packed") / "out"), answers(model)


# shards


@pytest.mark.parametrize("dense", [False, True])
def test_shards_go_out_and_in(tmp_path: Path, dense: bool) -> None:
    model = bert()
    obs.compress_(model)
    whole = obs.save_pretrained(model, tmp_path / "whole", dense)
    path = obs.save_pretrained(model, tmp_path / "shards", dense, max_shard_size="20KB")
    shards = sorted(path.glob("model-*.safetensors"))
    assert len(shards) > 3 and not (path / stored.WEIGHTS).exists()
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((path / stored.INDEX).read_text())
    one = load_file(whole / stored.WEIGHTS)
    together = {key: tensor for shard in shards for key, tensor in load_file(shard).items()}
    assert set(together) == set(one) == set(index["weight_map"])
    assert all(torch.equal(together[key], one[key]) for key in one)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    for shard in shards:  # a tensor above the limit has a shard of its own
        assert len(load_file(shard)) == 1 or sum(t.nbytes for t in load_file(shard).values()) <= 20_000
    found = obs.load(path)
    obs.decompress_(model)
    assert torch.equal(answers(found), answers(obs.load(whole)))
    torch.testing.assert_close(answers(found), answers(model))


@pytest.mark.parametrize(
    ("size", "wanted"), [(1, 1), ("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("20KB", 20_000), ("7b", 7), (" 12 ", 12)]
)
def test_sizes(size: Any, wanted: int) -> None:
    assert stored.shard_bytes(size) == wanted


@pytest.mark.parametrize("size", [0, -1, "", "GB", "5XB", "-5GB", None, True, "0GB", "five"])
def test_bad_sizes_write_nothing(tmp_path: Path, size: Any) -> None:
    model = bert()
    obs.compress_(model)
    with pytest.raises(ConfigError, match="max_shard_size must be"):
        obs.save_pretrained(model, tmp_path / "out", max_shard_size=size)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    model = bert()
    obs.compress_(model)
    return obs.save_pretrained(model, tmp_path / "out", max_shard_size="20KB")


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((folder / stored.INDEX).read_text())
    found = change(index)
    (folder / stored.INDEX).write_text(json.dumps(index if found is None else found))


@pytest.mark.parametrize(
    "change",
    [
        lambda i: [],
        lambda i: {},
        lambda i: i.update(weight_map=[]),
        lambda i: i.update(weight_map={}),
        lambda i: i["weight_map"].popitem(),
        lambda i: i["weight_map"].update({"more": next(iter(i["weight_map"].values()))}),
        lambda i: i["weight_map"].update({"more": "model-00009-of-00009.safetensors"}),
        *(
            lambda i, name=name: i["weight_map"].update({next(iter(i["weight_map"])): name})
            for name in ("../out/a.safetensors", "/etc/passwd", "", ".safetensors", "a/b.safetensors", 5, None, "a.bin")
        ),
    ],
)
def test_a_damaged_index(sharded: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    edit_index(sharded, change)
    with pytest.raises(CheckpointFormatError):
        obs.load(sharded)


def test_a_missing_or_second_file(sharded: Path) -> None:
    first = sorted(sharded.glob("model-*.safetensors"))[0]
    save_file({}, sharded / stored.WEIGHTS)
    with pytest.raises(CheckpointFormatError, match="holds both"):
        obs.load(sharded)
    (sharded / stored.WEIGHTS).unlink()
    first.rename(sharded / "away")
    with pytest.raises(CheckpointFormatError, match="is missing"):
        obs.load(sharded)


# transformers


def run(code: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),  # how a sum is cut decides its last bit
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


LOAD = """
import sys, torch
{imports}
model, info = transformers.AutoModelForQuestionAnswering.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(info.values()), info
with torch.no_grad():
    print(model(torch.tensor([[3, 4, 5, 6, 0], [7, 8, 9, 10, 11]]))[0].tolist())
print(sum(type(m).__name__ == "SparseLinear" for m in model.modules()))
assert not [f for f in sys.meta_path if type(f).__module__.startswith("obs_kernels")]
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import obs_kernels\nassert 'transformers' not in sys.modules\nimport transformers",
        "import transformers\ntransformers.BertModel\nimport obs_kernels",
    ],
)
def test_from_pretrained_in_either_order(packed: tuple[Path, Tensor], imports: str) -> None:
    out = run(LOAD.format(imports=imports), packed[0]).splitlines()
    assert torch.equal(torch.tensor(json.loads(out[0])), packed[1]) and out[1] == "12"


def test_without_the_package_transformers_refuses(packed: tuple[Path, Tensor]) -> None:
    """Instead of a warning and fresh random weights."""
    code = """
import sys, transformers
try:
    transformers.AutoModelForQuestionAnswering.from_pretrained(sys.argv[1])
except RuntimeError as error:
    print(error)
assert not any(name.startswith("obs_kernels") for name in sys.modules)
"""
    assert "ignore_mismatched_sizes" in run(code, packed[0])
    state = load_file(packed[0] / stored.WEIGHTS)
    obs_free = transformers.BertForQuestionAnswering(transformers.AutoConfig.from_pretrained(packed[0]))
    with pytest.raises(RuntimeError, match="size mismatch"):
        obs_free.load_state_dict(state, strict=False)


def test_the_finder_is_there_once_and_passes_others_by() -> None:
    code = """
import sys, obs_kernels
from obs_kernels.sparse import hub
hub.register()
ours = [f for f in sys.meta_path if type(f).__module__.startswith("obs_kernels")]
assert len(ours) == 1 and ours[0].find_spec("json", None) is None and ours[0].find_spec("nothing.at.all", None) is None
import json, transformers.quantizers.auto as auto
assert not [f for f in sys.meta_path if type(f).__module__.startswith("obs_kernels")]
hub.register()
assert "obs_kernels" in auto.AUTO_QUANTIZER_MAPPING and "_EnteringLoader" not in repr(auto.__loader__)
import importlib; importlib.reload(json)
"""
    run(code)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_pretrained_again_and_again(tmp_path: Path, packed: tuple[Path, Tensor], dtype: torch.dtype) -> None:
    """A bare model, another dtype, transformers' own save_pretrained, and ours after it."""
    hub.register()
    bare = transformers.AutoModel.from_pretrained(packed[0], dtype=dtype)
    assert isinstance(bare.encoder.layer[0].output.dense, obs.SparseLinear)
    assert bare.encoder.layer[0].output.dense.values.dtype == dtype
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(packed[0])
    model.save_pretrained(tmp_path / "theirs")
    assert torch.equal(answers(obs.load(tmp_path / "theirs")), packed[1])
    again = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "theirs")
    assert torch.equal(answers(again), packed[1])
    obs.save_pretrained(again, tmp_path / "ours")
    assert torch.equal(answers(obs.load(tmp_path / "ours")), packed[1])
    obs.decompress_(again)
    torch.testing.assert_close(answers(again), packed[1])


def damaged(folder: Path, to: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    tensors = load_file(to / stored.WEIGHTS)
    change(tensors)
    save_file(tensors, to / stored.WEIGHTS, metadata={"format": "pt"})
    return to


FIRST = "bert.encoder.layer.0.output.dense"


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop(f"{FIRST}.values"),
        lambda t: t.pop(f"{FIRST}.codes"),
        lambda t: t.pop(f"{FIRST}.columns"),
        lambda t: t[f"{FIRST}.codes"].fill_(0),
        lambda t: t[f"{FIRST}.columns"].fill_(3),
        lambda t: t[f"{FIRST}.columns"].fill_(200),
        lambda t: t.update({f"{FIRST}.codes": t[f"{FIRST}.codes"].int()}),
    ],
)
def test_from_pretrained_refuses_what_load_refuses(
    tmp_path: Path, packed: tuple[Path, Tensor], change: Callable[[dict[str, Tensor]], Any]
) -> None:
    folder = damaged(packed[0], tmp_path / "bad", change)
    for read in (obs.load, transformers.AutoModelForQuestionAnswering.from_pretrained):
        with pytest.raises(CheckpointFormatError, match=r"output\.dense"):
            read(folder)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda q: q.update(format_version=2), "format_version must be 1"),
        (lambda q: q.update(pattern="2:7"), "2:7|cols"),
        (lambda q: q.update(targets=["bert.nothing"]), "no nn.Linear|missing"),
        (lambda q: q.update(targets=["bert.encoder"]), "no nn.Linear|missing"),
    ],
)
def test_from_pretrained_reads_the_config_as_load_does(
    tmp_path: Path, packed: tuple[Path, Tensor], change: Callable[[dict[str, Any]], Any], text: str
) -> None:
    folder = damaged(packed[0], tmp_path / "bad", lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    for read in (obs.load, transformers.AutoModelForQuestionAnswering.from_pretrained):
        with pytest.raises(ValueError, match=text):
            read(folder)


def test_tied_weights_stay_tied_in_each_form(tmp_path: Path) -> None:
    model = bert(kind="BertForMaskedLM")
    obs.compress_(model)
    path = obs.save_pretrained(model, tmp_path / "out", max_shard_size="20KB")
    for found in (obs.load(path), transformers.AutoModelForMaskedLM.from_pretrained(path)):
        assert found.cls.predictions.decoder.weight is found.bert.embeddings.word_embeddings.weight
        assert torch.equal(answers(found), answers(model))


# other forms


def with_tokenizer(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "optimizer.pt", "notes.txt"):
        (folder / name).write_text(f'"{name}"')
    return folder


@pytest.mark.parametrize("pattern", ["2:4", "16:2:8", "2:8"])
def test_a_round_through_all_forms(tmp_path: Path, pattern: str) -> None:
    """Dense, packed, semi-structured, packed, dense: every weight as it was, and the tokenizer with it."""
    model = bert(pattern).to(torch.bfloat16)
    wanted = {k: v.clone() for k, v in model.state_dict().items()}
    at = [with_tokenizer(obs.save_pretrained(model, tmp_path / "0", save_dense=True))]
    for form in ("packed", "semi-structured", "packed", "dense"):
        at.append(tmp_path / str(len(at)))
        report = convert(at[-2], at[-1], form)
        assert report["to"] == form and len(report["layers"]) == 12
        assert set(report["layers"].values()) == {pattern}
        assert report["sizes"][form] == stored.weight_bytes(at[-1])
        names = {path.name for path in at[-1].iterdir()}
        assert {"tokenizer.json", "tokenizer_config.json", "vocab.txt"} < names
        assert not {"optimizer.pt", "notes.txt", "model"} & names
    assert stored.weight_bytes(at[1]) < stored.weight_bytes(at[0])
    found = load_file(at[-1] / stored.WEIGHTS)
    assert set(found) == set(wanted) and all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert torch.equal(answers(obs.load(at[3])), answers(obs.load(at[1])))


def test_torch_reads_our_semi_structured_layout(tmp_path: Path) -> None:
    """The two tensors of a layer are those of torch's own class, bit for bit."""
    model = bert().to(torch.bfloat16)
    weight = model.get_submodule(FIRST).weight.detach().clone()
    dense = obs.save_pretrained(model, tmp_path / "dense", save_dense=True)
    convert(dense, tmp_path / "semi", "semi-structured")
    tensors = load_file(tmp_path / "semi" / stored.WEIGHTS)
    theirs: Any = semi_structured.as_semi_structured(weight)
    assert torch.equal(tensors[f"{FIRST}.sparse"], theirs.packed) and torch.equal(tensors[f"{FIRST}.meta"], theirs.meta)
    assert torch.equal(theirs.to_dense(), weight) and tensors[f"{FIRST}.weight"].shape == (0,)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="on a GPU only"):
            semi_structured.load_semi_structured(tmp_path / "semi")
    with pytest.raises(CheckpointFormatError, match="quant_method"):
        obs.load(tmp_path / "semi")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop(f"{FIRST}.meta"), "is missing"),
        (lambda t: t.update({f"{FIRST}.meta": t[f"{FIRST}.meta"][:-1].clone()}), "meta must be"),
        (lambda t: t.update({f"{FIRST}.meta": t[f"{FIRST}.meta"].int()}), "int16"),
        (lambda t: t.update({f"{FIRST}.sparse": t[f"{FIRST}.sparse"].float()}), "float16 or bfloat16"),
        (lambda t: t.update({f"{FIRST}.sparse": t[f"{FIRST}.sparse"][:, :-1].clone()}), "must be"),
        (lambda t: t[f"{FIRST}.meta"].zero_(), "share a place"),
    ],
)
def test_a_damaged_semi_structured_folder(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], text: str
) -> None:
    dense = obs.save_pretrained(bert().to(torch.bfloat16), tmp_path / "dense", save_dense=True)
    convert(dense, tmp_path / "semi", "semi-structured")
    folder = damaged(tmp_path / "semi", tmp_path / "bad", change)
    with pytest.raises(CheckpointFormatError, match=text):
        convert(folder, tmp_path / "out", "dense")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("pattern", "options", "error", "text"),
    [
        ("2:4", {}, DTypeNotSupportedError, "float16 or bfloat16.*got torch.float32.*dtype="),
        ("4:8", {"dtype": "bf16"}, ConfigError, "is of pattern 4:8"),
        ("2:4", {"dtype": "int8"}, ConfigError, "dtype must be one of bf16"),
        ("2:4", {"dtype": "nn"}, ConfigError, "dtype must be one of bf16"),
        ("2:4", {"pattern": "2:8"}, ValueError, "keeps"),
        ("2:4", {"dtype": "bfloat16", "max_shard_size": "x"}, ConfigError, "max_shard_size"),
    ],
)
def test_conversions_that_cannot_be(
    tmp_path: Path, pattern: str, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    dense = obs.save_pretrained(bert(pattern), tmp_path / "dense", save_dense=True)
    with pytest.raises(error, match=text):
        convert(dense, tmp_path / "out", "semi-structured", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_conversions_that_make_no_sense(tmp_path: Path, packed: tuple[Path, Tensor]) -> None:
    with pytest.raises(ConfigError, match="is packed already"):
        convert(packed[0], tmp_path / "out", "packed")
    with pytest.raises(ConfigError, match="pattern belongs to a dense source"):
        convert(packed[0], tmp_path / "out", "dense", pattern="2:4")
    with pytest.raises(ConfigError, match="to must be one of"):
        convert(packed[0], tmp_path / "out", "sparse")
    with pytest.raises(CheckpointFormatError, match=r"no config\.json"):
        convert(tmp_path, tmp_path / "out", "dense")
    plain = transformers.BertModel(transformers.BertConfig(
        vocab_size=40, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    ))  # fmt: skip
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(ConfigError, match=r"no pruned nn\.Linear"):
        convert(tmp_path / "plain", tmp_path / "out", "packed")
    config = json.loads((tmp_path / "plain" / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "gptq"}
    }
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointFormatError, match="quantized by 'gptq'"):
        convert(tmp_path / "plain", tmp_path / "out", "packed")
    odd = nn.Sequential(nn.Linear(24, 32), nn.ReLU())
    odd[0].weight.data.masked_fill_(~random_mask(torch.Generator(), 32, 24, parse_pattern("2:4")), 0.0)
    obs.compress_(odd)
    with pytest.raises(ShapeNotSupportedError, match="cols % 64"):
        semi_structured.semi_structured_state(odd.bfloat16())
    assert not (tmp_path / "out").exists()


def test_targets_that_may_not_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("1")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("1")
    for name, overwrite, text in (
        ("file", True, "got the file"), ("full", False, "--overwrite"), ("full", True, "holds no model")
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=text):
            check_target(tmp_path / name, overwrite=overwrite)
    (tmp_path / "full" / "config.json").write_text("{}")
    assert check_target(tmp_path / "full", overwrite=True) == tmp_path / "full"
    assert check_target(tmp_path / "new", overwrite=False) == tmp_path / "new"


def test_compress_a_folder(tmp_path: Path) -> None:
    model = bert("16:2:8")
    dense = with_tokenizer(obs.save_pretrained(model, tmp_path / "dense", save_dense=True))
    report = compress_folder(dense, tmp_path / "out", verify=True)
    assert set(report["layers"].values()) == {"16:2:8"} and report["verified"] == len(model.state_dict())
    assert report["sizes"]["packed"] == stored.weight_bytes(tmp_path / "out") < report["sizes"]["dense"]
    torch.testing.assert_close(answers(obs.load(tmp_path / "out")), answers(model))
    with pytest.raises(ConfigError, match="no layer is left to pack: all 12 stay dense"):
        compress_folder(dense, tmp_path / "small", tokens=10)
    with pytest.raises(ConfigError, match="is packed; compress takes a dense"):
        compress_folder(tmp_path / "out", tmp_path / "again")
    assert not (tmp_path / "small").exists()


def test_verify_finds_what_does_not_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = obs.save_pretrained(bert(), tmp_path / "dense", save_dense=True)

    def other(path: Path) -> nn.Module:
        model = obs.load(path)
        model.get_submodule(FIRST).values.add_(1)
        return model

    monkeypatch.setattr("obs_kernels.sparse.convert.load", other)
    with pytest.raises(CheckpointFormatError, match="does not read back"):
        compress_folder(dense, tmp_path / "out", verify=True)


# damage by hypothesis


def small(pattern: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 4))
    mask = random_mask(torch.Generator().manual_seed(1), 16, 32, parse_pattern(pattern))
    model[0].weight.data.masked_fill_(~mask, 0.0)
    return model


def fresh() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 4))


def refused_or_sound(folder: Path) -> bool:
    """Load it: refused without a trace, or a model whose indices a kernel may follow. True if it was loaded."""
    target = fresh()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    try:
        found = obs.load(folder, model=target)
    except CheckpointFormatError as error:
        assert str(error)
        after = target.state_dict()
        assert set(after) == set(before) and all(torch.equal(after[k], before[k]) for k in before)
        return False
    for module in found.modules():
        if isinstance(module, obs.SparseLinear):
            module.sparse.validate()
            assert torch.equal(module.sparse.to_dense().isnan().any(), module.values.isnan().any())
    assert found(torch.ones(2, 32, dtype=next(found.parameters()).dtype)).shape == (2, 4)
    return True


@pytest.fixture(scope="module", params=["2:4", "16:2:8", "2:8"])
def clean(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = small(request.param)
    obs.compress_(model)
    return obs.save_pretrained(model, tmp_path_factory.mktemp("fuzz") / "out")


def copied(clean: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "bad"
    folder.mkdir(exist_ok=True)
    for path in clean.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@given(data=st.data())
@settings(max_examples=40)
def test_any_tensors(clean: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Shapes, dtypes and every index of one or two tensors."""
    folder = copied(clean, tmp_path)
    tensors = load_file(folder / stored.WEIGHTS)
    for _ in range(data.draw(st.integers(1, 2))):
        key = data.draw(st.sampled_from(sorted(tensors)))
        tensor = tensors[key]
        match data.draw(st.sampled_from(["indices", "shape", "dtype", "drop", "rename"])):
            case "indices" if tensor.dtype == torch.uint8 and tensor.numel():
                flat = tensor.clone().view(-1)
                for at in data.draw(st.lists(st.integers(0, flat.numel() - 1), max_size=3)):
                    flat[at] = data.draw(st.integers(0, 255))
                tensors[key] = flat.view(tensor.shape)
            case "shape":
                shape = data.draw(st.lists(st.integers(0, 40), max_size=3))
                tensors[key] = torch.zeros(shape, dtype=tensor.dtype)
            case "dtype":
                kinds = [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool]
                tensors[key] = tensor.to(data.draw(st.sampled_from(kinds)))
            case "drop":
                tensors.pop(key)
            case "rename":
                tensors[data.draw(st.text(max_size=12))] = tensors.pop(key)
        if not tensors:
            break
    save_file(tensors, folder / stored.WEIGHTS, metadata={"format": "pt"})
    refused_or_sound(folder)


@given(data=st.data())
@settings(max_examples=40)
def test_any_bytes(clean: Path, tmp_path: Path, data: st.DataObject) -> None:
    """A cut file, changed bytes of header or data, another length of the header."""
    folder = copied(clean, tmp_path)
    path = folder / stored.WEIGHTS
    raw = bytearray(path.read_bytes())
    match data.draw(st.sampled_from(["cut", "bytes", "length", "more"])):
        case "cut":
            raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
        case "bytes":
            header = 8 + struct.unpack("<Q", raw[:8])[0]
            for at in data.draw(st.lists(st.integers(0, header - 1), min_size=1, max_size=4)):
                raw[at] = data.draw(st.integers(0, 255))
        case "length":
            raw[:8] = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1)))
        case "more":
            raw += data.draw(st.binary(min_size=1, max_size=64))
    path.write_bytes(bytes(raw))
    refused_or_sound(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.text(max_size=6) | st.sampled_from(["2:4", "16:2:8", "0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data())
@settings(max_examples=40)
def test_any_section(clean: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Whatever JSON stands in the section of the config."""
    folder = copied(clean, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    section = config["quantization_config"]
    key = data.draw(st.sampled_from([*section, "other", None]))
    value = data.draw(JSON)
    if key is None:
        config["quantization_config"] = value
    else:
        section[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    refused_or_sound(folder)
