# SPDX-License-Identifier: Apache-2.0
"""sparsify_ in a work folder: cut off anywhere, resumed to the same bits; foreign or damaged folders refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from obs_kernels import OBSConfig, sparsify_
from obs_kernels.errors import ConfigError, ResumeMismatchError, WorkFolderLockedError
from obs_kernels.files import hold_folder

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 4 * 8 * 16 * 16
"""Fisher bytes of one of the three layers at D = 8: three groups a stage."""


def make_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))


def make_batches() -> list[Tensor]:
    gen = torch.Generator().manual_seed(1)
    return [torch.randn(4, 16, generator=gen) for _ in range(3)]


def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x.flip(1)).square().sum(1)


def config(**changes) -> OBSConfig:
    return OBSConfig(**({"pattern": "2:8", "num_grads": 12, "recomputations": 2, "curvature": "block"} | changes))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return set(one) == set(two) and all(torch.equal(one[k], two[k]) for k in one)


class Killed(BaseException):
    """As Ctrl-C: no handler of Exception catches it."""


class Loader:
    """Batches that count, and that end the run after ``allowed`` of them."""

    def __init__(self, allowed: int = 10**9) -> None:
        self.allowed, self.drawn = allowed, 0

    def __iter__(self):
        for batch in make_batches():
            if self.drawn >= self.allowed:
                raise Killed
            self.drawn += 1
            yield batch


def run(folder: Path | None, *, allowed: int = 10**9, resume: bool = False, budget: int | None = BUDGET, **changes):
    model, loader = make_model(), Loader(allowed)
    report = sparsify_(model, config(**changes), loader, loss_fn, work_dir=folder, resume=resume, memory_budget=budget)
    return model, report, loader.drawn


@pytest.fixture(scope="module")
def whole() -> tuple[dict[str, Tensor], object, int]:
    model, report, drawn = run(None)
    assert drawn == 2 * 3 * 3  # stages, groups, batches
    return weights(model), report, drawn


def test_a_work_folder_changes_nothing(tmp_path: Path, whole):
    model, report, drawn = run(tmp_path / "run")
    assert equal(weights(model), whole[0]) and drawn == whole[2]
    assert report.saliency == whole[1].saliency and report.stages == whole[1].stages


@pytest.mark.parametrize("allowed", [0, 1, 3, 4, 8, 9, 10, 12, 17])
def test_resume_after_a_cut_is_bitwise_the_same(tmp_path: Path, whole, allowed):
    with pytest.raises(Killed):
        run(tmp_path, allowed=allowed)
    model, report, drawn = run(tmp_path, resume=True)
    assert equal(weights(model), whole[0])
    assert drawn == whole[2] - 3 * (allowed // 3)  # finished groups are not done again
    assert (report.saliency, report.stages, report.num_grads) == (
        whole[1].saliency,
        whole[1].stages,
        whole[1].num_grads,
    )
    assert [(r.name, r.sparsity, r.saliency, r.damp, r.outcome) for r in report.layers] == [
        (r.name, r.sparsity, r.saliency, r.damp, r.outcome) for r in whole[1].layers
    ]


def test_resume_after_several_cuts(tmp_path: Path, whole):
    for allowed in (4, 5, 2, 4):
        with pytest.raises(Killed):
            run(tmp_path, allowed=allowed, resume=True)
    model, _, drawn = run(tmp_path, resume=True)
    assert equal(weights(model), whole[0]) and drawn < whole[2]


def test_resume_of_a_finished_run_draws_nothing(tmp_path: Path, whole):
    run(tmp_path)
    model, report, drawn = run(tmp_path, resume=True)
    assert drawn == 0 and equal(weights(model), whole[0]) and report.saliency == whole[1].saliency


def test_resume_of_a_folder_that_is_not_there(tmp_path: Path, whole):
    model, _, _ = run(tmp_path / "new", resume=True)
    assert equal(weights(model), whole[0])


@pytest.mark.parametrize("pattern", ["block4:0.5", "unstructured:0.5", "8:2:8"])
def test_resume_of_other_patterns(tmp_path: Path, pattern):
    changes = {"pattern": pattern, "fisher_block_size": 8}
    full, _, _ = run(None, **changes)
    with pytest.raises(Killed):
        run(tmp_path, allowed=13, **changes)
    model, _, _ = run(tmp_path, resume=True, **changes)
    assert equal(weights(model), weights(full))


def test_resume_with_another_budget(tmp_path: Path, whole):
    """Groups are no part of the result, so they may change between the runs."""
    with pytest.raises(Killed):
        run(tmp_path, allowed=7)
    model, _, _ = run(tmp_path, resume=True, budget=1 << 30)
    assert equal(weights(model), whole[0])


@pytest.mark.parametrize("allowed", [1, 10])
def test_a_cut_before_a_stage_is_whole_leaves_its_weights(tmp_path: Path, allowed):
    model, loader = make_model(), Loader(allowed)
    before = weights(model)
    with pytest.raises(Killed):
        sparsify_(model, config(), loader, loss_fn, work_dir=tmp_path, memory_budget=BUDGET)
    assert equal(weights(model), before) is (allowed < 9)
    assert (model[0].weight == 0).float().mean() == (0.0 if allowed < 9 else 3 / 8)  # 2:8 in two stages: 5:8 first


# a real process


CHILD = """
import sys, time
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import test_sparsify as t

class Slow(t.Loader):
    def __iter__(self):
        for batch in super().__iter__():
            print(self.drawn, flush=True)
            time.sleep(0.2 if self.drawn >= {slow} else 0)
            yield batch

t.sparsify_(t.make_model(), t.config(), Slow(), t.loss_fn, work_dir={folder!r}, memory_budget=t.BUDGET)
"""


@pytest.mark.parametrize("at", [5, 14])
def test_kill_9_and_resume(tmp_path: Path, whole, at):
    code = CHILD.format(tests=str(ROOT / "tests"), slow=at, folder=str(tmp_path))
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) >= at:
            child.send_signal(signal.SIGKILL)
            break
    child.stdout.close()
    assert child.wait(60) == -signal.SIGKILL
    assert (tmp_path / "manifest.json").exists()
    model, _, drawn = run(tmp_path, resume=True)
    assert equal(weights(model), whole[0]) and 0 < drawn <= whole[2] - 3 * ((at - 1) // 3)


# what is in the folder


def test_contents_of_the_folder(tmp_path: Path):
    run(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["format_version"] == 1 and OBSConfig.from_dict(manifest["config"]) == config()
    names = sorted(p.name for p in (tmp_path / "layers").iterdir())
    assert names == sorted(f"stage{s}.{layer}.safetensors" for s in (1, 2) for layer in "024")
    assert sorted(os.listdir(tmp_path)) == [".lock", "layers", "manifest.json"]


@pytest.mark.parametrize("one", ["a b", "x/y", "ö", "a" * 200])
def test_layer_names_become_file_names_that_do_not_meet(tmp_path: Path, one):
    """Names that differ only where a file name cannot tell them apart: each layer gets its own result back."""
    other = "".join(c if c.isalnum() or c in "._-" else "_" for c in one)
    other = other if other != one else one + "_"

    def build() -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential()
        for name in (one, other):
            model.add_module(name, nn.Linear(16, 16))
        return model

    results = []
    for resume in (False, True):
        model = build()
        sparsify_(model, config(), Loader(), loss_fn, work_dir=tmp_path, resume=resume, memory_budget=BUDGET)
        results.append(weights(model))
    assert equal(*results)
    assert all(p.resolve().is_relative_to(tmp_path.resolve()) for p in tmp_path.rglob("*"))


# folders that do not fit


def cut_off(folder: Path) -> None:
    with pytest.raises(Killed):
        run(folder, allowed=4)


@pytest.mark.parametrize(
    "change", [{"num_grads": 11}, {"pattern": "2:4"}, {"recomputations": 1}, {"damp": 1e-3}, {"seed": 1}]
)
def test_another_config_is_refused(tmp_path: Path, change):
    cut_off(tmp_path)
    with pytest.raises(ResumeMismatchError, match="another configuration or model"):
        run(tmp_path, resume=True, **change)


def test_another_model_is_refused(tmp_path: Path):
    cut_off(tmp_path)
    model = make_model(seed=1)
    before = weights(model)
    with pytest.raises(ResumeMismatchError, match="another configuration or model"):
        sparsify_(model, config(), Loader(), loss_fn, work_dir=tmp_path, resume=True, memory_budget=BUDGET)
    assert equal(weights(model), before)


def test_one_changed_bit_of_a_weight_is_another_model(tmp_path: Path):
    cut_off(tmp_path)
    model = make_model()
    with torch.no_grad():
        model[4].weight[3, 3] = torch.nextafter(model[4].weight[3, 3], torch.tensor(1e9))
    with pytest.raises(ResumeMismatchError):
        sparsify_(model, config(), Loader(), loss_fn, work_dir=tmp_path, resume=True, memory_budget=BUDGET)


def test_a_used_folder_needs_resume(tmp_path: Path):
    cut_off(tmp_path)
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    with pytest.raises(ResumeMismatchError, match=r"already holds a run; pass resume=True"):
        run(tmp_path)
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_layers_without_a_manifest_are_not_taken_over(tmp_path: Path, whole):
    """Only the manifest says whose they are; without it they may be anybody's."""
    run(tmp_path, method="magnitude")
    (tmp_path / "manifest.json").unlink()
    for resume in (False, True):
        try:
            model, _, _ = run(tmp_path, resume=resume)
        except ResumeMismatchError:
            continue
        assert equal(weights(model), whole[0])
        return


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "null", "{}", '{"identity": 3}', "\x00\xff"])
def test_a_damaged_manifest_is_refused(tmp_path: Path, text):
    cut_off(tmp_path)
    (tmp_path / "manifest.json").write_text(text, encoding="latin-1")
    for resume in (True, False):
        with pytest.raises(ResumeMismatchError):
            run(tmp_path, resume=resume)


def damage(path: Path, how: str) -> None:
    from safetensors.torch import load_file, save_file

    data = path.read_bytes()
    if how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "garbage":
        path.write_bytes(b"\xff" * 100)
    elif how == "folder":
        path.unlink()
        path.mkdir()
    else:
        tensors = load_file(path)
        metadata = {"staged": _metadata(path)}
        if how == "no metadata":
            metadata = {}
        elif how == "bad metadata":
            metadata = {"staged": "{"}
        elif how == "other metadata":
            metadata = {"staged": '{"x": 1}'}
        elif how == "no mask":
            del tensors["mask"]
        elif how == "other shape":
            tensors = {k: v[:-1].contiguous() for k, v in tensors.items()}
        save_file(tensors, path, metadata=metadata)


def _metadata(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata()["staged"]


@pytest.mark.parametrize(
    "how",
    [
        "empty",
        "truncated",
        "garbage",
        "folder",
        "no metadata",
        "bad metadata",
        "other metadata",
        "no mask",
        "other shape",
    ],
)
def test_a_damaged_layer_file_is_refused_or_done_again(tmp_path: Path, whole, how):
    cut_off(tmp_path)
    damage(tmp_path / "layers" / "stage1.0.safetensors", how)
    try:
        model, _, _ = run(tmp_path, resume=True)
    except ResumeMismatchError as error:
        assert "stage1.0" in str(error)
        return
    assert equal(weights(model), whole[0])


def test_a_missing_layer_file_is_done_again(tmp_path: Path, whole):
    with pytest.raises(Killed):
        run(tmp_path, allowed=8)
    (tmp_path / "layers" / "stage1.2.safetensors").unlink()
    model, _, _ = run(tmp_path, resume=True)
    assert equal(weights(model), whole[0])


def test_a_work_folder_below_a_file(tmp_path: Path):
    (tmp_path / "file").write_text("keep")
    model, loader = make_model(), Loader()
    before = weights(model)
    with pytest.raises(OSError):
        sparsify_(model, config(), loader, loss_fn, work_dir=tmp_path / "file" / "run", memory_budget=BUDGET)
    assert loader.drawn == 0 and equal(weights(model), before)
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "keep"


def test_a_refused_call_leaves_no_folder(tmp_path: Path):
    model = make_model()
    with pytest.raises(ConfigError):
        sparsify_(model, config(), None, None, work_dir=tmp_path / "run")
    with pytest.raises(ConfigError):
        sparsify_(model, config(), iter(make_batches()), loss_fn, work_dir=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused(tmp_path: Path):
    """Before any gradient, by the pid of whoever is at work there."""
    model, loader = make_model(), Loader()
    before = weights(model)
    with (
        hold_folder(tmp_path / "run"),
        pytest.raises(WorkFolderLockedError, match=f"work_dir .*run is in use by process {os.getpid()}"),
    ):
        sparsify_(model, config(), loader, loss_fn, work_dir=tmp_path / "run")
    assert loader.drawn == 0 and equal(weights(model), before)
    report = sparsify_(model, config(), loader, loss_fn, work_dir=tmp_path / "run")
    assert report.to_dict()["layers"]
