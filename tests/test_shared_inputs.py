# SPDX-License-Identifier: Apache-2.0
"""Attention whose query, key and value layers share one feature-major input."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import obs_kernels as obs
from obs_kernels import parse_pattern
from obs_kernels.cuda_calls import layout as cuda_layout
from obs_kernels.errors import DTypeNotSupportedError, ShapeNotSupportedError
from obs_kernels.ops import feature_major, layout
from obs_kernels.sparse import attention, compress_, decompress_
from obs_kernels.sparse.attention import SharedInput
from obs_kernels.sparse.linear import SparseLinear

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
FROM = 8


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the hook asked for; here sharing gains from 8 tokens on."""
    found: list[tuple[Any, ...]] = []

    def from_tokens(*key: Any) -> int:
        found.append(key)
        return FROM

    monkeypatch.setattr(attention, "shared_from", from_tokens)
    return found


@pytest.fixture
def inputs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every call of a packed layer: whether its input lay feature-major."""
    found: list[bool] = []
    forward = SparseLinear.forward

    def watched(self: SparseLinear, x: Tensor) -> Tensor:
        found.append(not x.is_contiguous() and x.movedim(-1, 0).is_contiguous())
        return forward(self, x)

    monkeypatch.setattr(SparseLinear, "forward", watched)
    return found


def pruned(model: nn.Module, pattern: str = "2:4") -> nn.Module:
    cfg = obs.OBSConfig(pattern=pattern, method="magnitude", update="none", curvature="block")
    obs.sparsify_(model.eval(), cfg, None, None)
    return model


def bert() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return pruned(transformers.BertModel(transformers.BertConfig(**sizes, intermediate_size=64))).to(torch.bfloat16)


@torch.no_grad()
def answer(model: Any) -> Tensor:
    return model(IDS).last_hidden_state


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 4), (0, 4), (3, 0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_layout_alone_changes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    y = feature_major(x)
    assert torch.equal(x, y) and y.dtype == dtype and y.movedim(-1, 0).is_contiguous()
    assert torch.equal(feature_major(y), x)


def test_gradients_pass_and_the_op_compiles() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    weights = torch.randn(4, 6)
    (feature_major(x) * weights).sum().backward()
    assert torch.equal(x.grad, weights)
    torch.library.opcheck(torch.ops.obs_kernels.feature_major, (x.detach(),), {"backend": "reference"})
    run = torch.compile(lambda t: feature_major(t) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(run(x.detach()), x.detach() + 1)


def test_bad_input_of_the_op() -> None:
    with pytest.raises(ShapeNotSupportedError, match=r"x must be \[..., C\] of two dimensions or more, got \[3\]"):
        feature_major(torch.zeros(3))
    with pytest.raises(DTypeNotSupportedError, match="x must be"):
        feature_major(torch.zeros(3, 4, dtype=torch.int32))


def test_one_transposition_for_three_layers(asked: list[Any], inputs: list[bool]) -> None:
    model = bert()
    wanted = answer(model)
    report = compress_(model)
    assert report.shared == [f"encoder.layer.{i}.attention.self" for i in (0, 1)] == report.to_dict()["shared"]
    torch.testing.assert_close(answer(model), wanted, rtol=5e-2, atol=5e-2)
    block = [True, True, True, False, False, False]  # query, key, value; output; the feed-forward pair
    assert inputs[: len(block)] == block and inputs.count(True) == 6
    assert asked[0] == ((32, 32, 32), ("2:4", "2:4", "2:4"), 32, "cpu", 0)


def test_too_few_tokens(asked: list[Any], inputs: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert()
    compress_(model)
    monkeypatch.setattr(attention, "shared_from", lambda *key: IDS.numel() + 1)
    answer(model)
    assert inputs and not any(inputs)


def test_nothing_is_shared_on_the_reference_path(inputs: list[bool]) -> None:
    model = bert()
    compress_(model)
    answer(model)
    assert inputs and not any(inputs)
    assert layout.shared_from((32,), ("2:4",), 32, "cpu", 0) == layout.NEVER


@pytest.mark.parametrize("change", ["dense layer", "dense dispatch", "autocast", "f32", "backend", "ragged"])
def test_who_does_not_share(change: str, asked: list[Any], inputs: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that is no longer packed, one that runs its dense copy; an x that autocast copies anyway, that no kernel
    takes, or whose tokens are no whole pieces; another backend.
    """
    model = bert()
    compress_(model, keep_dense=True)
    ids = IDS
    if change in ("f32", "autocast"):
        model.float()
    elif change == "backend":
        monkeypatch.setenv("OBS_KERNELS_BACKEND", "reference")
    elif change == "ragged":
        ids = torch.cat([IDS, IDS[:, :1]], 1)
    for layer in model.modules():
        if isinstance(layer, SparseLinear):
            layer.dispatch = "sparse"
    own = [block.attention.self for block in model.encoder.layer]
    for block in own:
        if change == "dense layer":
            block.value = block.value.to_linear()
        elif change == "dense dispatch":
            block.key.dispatch = "dense"
    with torch.autocast("cpu", enabled=change == "autocast"), torch.no_grad():
        model(ids)
    assert inputs and not any(inputs)


def test_copies_and_pickles_share_and_decompress_ends_it(asked: list[Any], inputs: list[bool]) -> None:
    model = bert()
    wanted = answer(model)
    compress_(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        inputs.clear()
        torch.testing.assert_close(answer(other), wanted, rtol=5e-2, atol=5e-2)
        assert inputs.count(True) == 6
        decompress_(other)
        assert torch.equal(answer(other), wanted)
        assert not any(isinstance(hook, SharedInput) for m in other.modules() for hook in m._forward_pre_hooks.values())


def test_a_loaded_model_shares_and_fuses(asked: list[Any], inputs: list[bool], tmp_path: Any) -> None:
    model = bert()
    wanted = answer(model)
    compress_(model)
    obs.save_pretrained(model, tmp_path)
    plain, fused = obs.load(tmp_path), obs.load(tmp_path, fuse_ffn="feature")
    for loaded, feature in ((plain, 6), (fused, 8)):  # the second layer of each pair too
        inputs.clear()
        torch.testing.assert_close(answer(loaded), wanted, rtol=5e-2, atol=5e-2)
        assert inputs.count(True) == feature
    with pytest.raises(obs.errors.ConfigError, match="fuse_ffn must be one of"):
        obs.load(tmp_path, fuse_ffn="both")


@pytest.mark.usefixtures("traceable")
def test_compiled_whole_with_changing_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "shared_from", lambda *key: FROM)
    model = bert()
    compress_(model)
    block = model.encoder.layer[0].attention.self
    run = torch.compile(lambda x: block(x)[0], fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (4, 8, 12, 5):  # the last is not shared
        x = torch.randn(2, tokens, 32).bfloat16()
        with torch.no_grad():
            torch.testing.assert_close(run(x), block(x)[0], rtol=5e-2, atol=5e-2)


def test_cross_attention_and_unknown_blocks_stay(asked: list[Any], inputs: list[bool]) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=40,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=16,
    )
    model = pruned(transformers.BartModel(config)).to(torch.bfloat16)
    wanted = answer(model)
    report = compress_(model)
    assert len(report.shared) == 3  # two of them attend to themselves
    torch.testing.assert_close(answer(model), wanted, rtol=5e-2, atol=5e-2)
    assert inputs.count(True) == 6

    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(32, 32) for _ in range(3))

        def forward(self, hidden_states: Tensor) -> Tensor:
            return self.query(hidden_states)

    own = nn.Sequential(Mine())
    assert compress_(pruned(own)).shared == []


# what decides


def test_autocast_to_another_dtype_makes_copies_of_its_own() -> None:
    x = torch.zeros(8, 16, dtype=torch.float16)
    assert layout.shares_layout(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not layout.shares_layout(x) and layout.shares_layout(x.bfloat16())


class Cycles:
    """Stands for the compiled module: a product takes 10 cycles a row token-major, 4 feature-major if it has panels."""

    def __init__(self, transposition: int) -> None:
        self.transposition = transposition
        self.asked: list[tuple[int, int, bool]] = []

    def transposition_cycles(self, *, tokens: int, cols: int) -> int:
        return self.transposition

    def product_cycles(self, *, rows: int, cols: int, tokens: int, v: int, m: int, feature_x: bool, device: int) -> int:
        self.asked.append((v, m, feature_x))
        return rows * (4 if feature_x and v else 10)


@pytest.mark.parametrize(("transposition", "gains"), [(1535, True), (1536, False)])
def test_sharing_gains_where_what_it_saves_is_more_than_a_transposition(
    transposition: int, gains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """128 and 128 rows of panels save 6 cycles each; rows of their own, and panels that no tile takes, save nothing."""
    native = Cycles(transposition)
    monkeypatch.setattr(cuda_layout._ext, "load", lambda: native)
    weights = [(rows, parse_pattern(text)) for rows, text in ((128, "128:2:16"), (128, "64:2:8"), (64, "2:4"))]
    assert cuda_layout.sharing_gains([*weights, (32, parse_pattern("32:2:8"))], 64, 512, 0) is gains
    assert {asked[:2] for asked in native.asked} == {(128, 16), (64, 8), (0, 4), (0, 8)}
    assert len(native.asked) == 8 and sum(feature for _, _, feature in native.asked) == 4


@pytest.mark.parametrize(("gaining", "start"), [((96, 1 << 24), 96), ((64, 128), layout.NEVER), ((0, 0), layout.NEVER)])
def test_the_fewest_tokens_from_which_on_it_gains(
    gaining: tuple[int, int], start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gain at few tokens that many lose again is none."""
    monkeypatch.setattr(layout, "unavailable", lambda *asked: None)
    monkeypatch.setattr(
        cuda_layout, "sharing_gains", lambda w, cols, tokens, device: gaining[0] <= tokens <= gaining[1]
    )
    layout.shared_from.cache_clear()
    assert layout.shared_from((64,), ("2:4",), 64, "cuda", 0) == start
    assert layout.shared_from((64, 128), ("2:4", "128:2:6"), 48, "cuda", 0) == layout.NEVER, "no kernel takes 2:6"
    layout.shared_from.cache_clear()
