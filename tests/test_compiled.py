# SPDX-License-Identifier: Apache-2.0
"""The compiled half without a GPU: it compiles for every target, obeys the rules of csrc/, its absence is explained.

The kernels themselves run here too, as host code under the compiler's sanitizers (cuda_on_cpu.h).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch
from emulation import SANITIZERS, build
from masks import random_mask
from torch import Tensor

from bench import gpu_report, sanitizers
from obs_kernels import _ext, cuda_calls, reference
from obs_kernels.errors import BackendUnavailableError, ConfigError, DeviceMismatchError
from obs_kernels.patterns import NMPattern, VNMPattern, parse_pattern

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
CUDA_SOURCES = sorted(CSRC.rglob("*.cu"))
BINDINGS = ROOT / "python_bindings"
SOURCES = [path for path in [*sorted(CSRC.rglob("*")), *sorted(BINDINGS.rglob("*"))] if path.is_file()]
SHARED = {"include", "common"}
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("obs_kernels_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Compiling


@pytest.mark.parametrize("architecture", ["80", "90a", "100"])
@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda path: path.name)
def test_kernel_compiles_without_spills(source: Path, architecture: str, tmp_path: Path) -> None:
    nvcc = load_setup().find_nvcc(os.environ)
    if nvcc is None:
        pytest.skip("nvcc was not found")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    if f"compute_{architecture.rstrip('a')}" not in known:
        pytest.skip(f"this nvcc knows no sm_{architecture}")
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    includes = ["-I", str(CSRC / "include"), "-I", str(CSRC)]
    flags = ["-std=c++17", "-O3", "-lineinfo", "--Werror=all-warnings", "-Xptxas", "-v", "-gencode", target, "-cubin"]
    command = [str(nvcc), *flags, *includes, "-o", str(tmp_path / "kernel.cubin"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert frames, "ptxas said nothing of its kernels"
    assert all(frame == ("0", "0", "0") for frame in frames), done.stderr
    assert "Performance Loss" not in done.stderr, "wgmma must not be serialised"


@pytest.mark.parametrize("source", sorted((ROOT / "bench" / "micro").glob("*.cu")), ids=lambda path: path.name)
def test_micro_bench_compiles(source: Path, tmp_path: Path) -> None:
    """It runs on a GPU only, and must not be found broken there."""
    nvcc = load_setup().find_nvcc(os.environ)
    if nvcc is None:
        pytest.skip("nvcc was not found")
    flags = ["-std=c++17", "--Werror=all-warnings", "-gencode", "arch=compute_90a,code=sm_90a", "-cubin"]
    command = [
        str(nvcc),
        *flags,
        f"-I{CSRC}",
        f"-I{CSRC / 'include'}",
        "-o",
        str(tmp_path / "micro.cubin"),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Rules of the sources


def test_every_launch_names_its_stream() -> None:
    launches = [
        (path.name, arguments)
        for path in CUDA_SOURCES
        for arguments in re.findall(r"<<<(.*?)>>>", path.read_text(encoding="utf-8"), re.S)
    ]
    assert launches
    for name, arguments in launches:
        flat = re.sub(r"<[^<>]*>|\([^()]*\)", "", arguments)
        parts = [part.strip() for part in flat.split(",")]
        assert len(parts) == 4 and parts[3] == "stream", f"{name}: <<<{arguments}>>>"


def test_nothing_waits_for_a_device() -> None:
    for path in SOURCES:
        found = re.findall(r"cuda(?:Device|Stream|Event)Synchronize|cudaMemcpy\b", path.read_text(encoding="utf-8"))
        assert not found, f"{path.name}: {found}"


def test_csrc_knows_neither_torch_nor_python() -> None:
    for path in SOURCES:
        if CSRC in path.parents:
            included = re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text(encoding="utf-8"))
            assert not [name for name in included if re.match(r"torch|ATen|c10|pybind11|Python\.h", name)], path.name


def test_topics_do_not_include_each_other() -> None:
    topics = {folder.name for folder in CSRC.iterdir() if folder.is_dir()} - SHARED
    assert "packing" in topics
    for path in SOURCES:
        if CSRC not in path.parents:
            continue
        own = path.relative_to(CSRC).parts[0]
        foreign = topics - {own} if own in topics else topics
        for name in re.findall(r'#\s*include\s*"([^"]+)"', path.read_text(encoding="utf-8")):
            assert name.split("/")[0] not in foreign, f"{path.name} includes {name}"
            assert own not in topics or Path(name).stem not in foreign, f"{path.name} includes {name}"


def test_sources_begin_with_their_licence() -> None:
    for path in [*SOURCES, ROOT / "CMakeLists.txt", ROOT / "setup.py", ROOT / "bench" / "gpu_report.py"]:
        assert "SPDX-License-Identifier: Apache-2.0" in path.read_text(encoding="utf-8").splitlines()[0], path.name


# The module, absent, damaged or built


# the finder of an editable install offers the checkout's own _C beside the copy
NO_EDITABLE_INSTALL = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
"""


def run_in_copy(tmp_path: Path, code: str, arrange: Callable[[Path], object] = lambda folder: None) -> str:
    """Run ``code`` with a copy of the package that holds no compiled module but what ``arrange`` puts there."""
    package = tmp_path / "obs_kernels"
    if not package.exists():
        ignore = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__", "demo_data")
        shutil.copytree(ROOT / "obs_kernels", package, ignore=ignore)
    arrange(package)
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", NO_EDITABLE_INSTALL + code]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


CALL = """
import obs_kernels, torch
from obs_kernels import _ext, cuda_calls
from obs_kernels.errors import BackendUnavailableError
assert not torch.cuda.is_initialized()
assert _ext.build_info()["built"] is False
try:
    cuda_calls.pack(torch.zeros(2, 8), torch.zeros(2, 8, dtype=torch.bool), "2:4")
except BackendUnavailableError as error:
    assert isinstance(error, ImportError) and _ext.reason() in str(error)
    print(error)
assert not torch.cuda.is_initialized()
"""
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
ABSENT: dict[str, tuple[Callable[[Path], object], str]] = {
    "never built": (lambda folder: None, "never built"),
    "kept reason": (
        lambda folder: (folder / "_build_info.json").write_text('{"built": false, "reason": "the moon was full"}'),
        "the moon was full",
    ),
    "damaged info": (lambda folder: (folder / "_build_info.json").write_text("{"), "never built"),
    "file gone": (lambda folder: (folder / "_build_info.json").write_text('{"built": true}'), "the file is gone"),
    "empty": (lambda folder: (folder / f"_C{SUFFIX}").write_bytes(b""), "does not load"),
    "corrupt": (lambda folder: (folder / f"_C{SUFFIX}").write_bytes(b"\x7fELF" + b"\0" * 4096), "does not load"),
    "other Python": (lambda folder: (folder / "_C.cpython-399-x86_64-linux-gnu.so").write_bytes(b""), "another Python"),
    "other sources": (lambda folder: (folder / "_C.py").write_text("INTERFACE = -1\n"), "other sources"),
    "raises": (lambda folder: (folder / "_C.py").write_text("raise OSError('torn page')\n"), "torn page"),
}


@pytest.mark.parametrize("case", ABSENT)
def test_absence_is_explained_by_the_first_call(case: str, tmp_path: Path) -> None:
    arrange, reason = ABSENT[case]
    text = run_in_copy(tmp_path, CALL, arrange)
    assert reason in text
    assert "OBS_KERNELS_BUILD=on python" in text, "one command that fixes it"


def test_fix_of_a_checkout_builds_in_place(tmp_path: Path) -> None:
    (tmp_path / "setup.py").touch()
    assert "setup.py build_ext --inplace" in run_in_copy(tmp_path, CALL)


@pytest.fixture
def native() -> ModuleType:
    if _ext.reason() is not None:
        pytest.skip(f"no compiled module: {_ext.reason()}")
    return _ext.load()


GOOD = {
    "weight": 64, "mask": 64, "values": 64, "codes": 64, "columns": 64, "rows": 2, "cols": 8, "v": 0, "n": 2, "m": 4,
    "element_size": 2, "device": 0, "stream": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"cols": 6}, "cols must be a multiple of m = 4, got 6"),
        ({"cols": -8}, "must not be negative"),
        ({"rows": -1}, "must not be negative"),
        ({"n": 0}, "0 < n < m"),
        ({"n": 4}, "0 < n < m"),
        ({"m": 65, "cols": 65}, "0 < n < m <= 64"),
        ({"v": -1}, "v must be"),
        ({"v": 3}, "rows must be a multiple of v = 3, got 2"),
        ({"v": 2, "n": 1}, "panels are packed for n = 2 and m >= 4"),
        ({"v": 2, "m": 3, "cols": 9}, "panels are packed for n = 2 and m >= 4"),
        ({"v": 2, "columns": 0}, "columns must not be null"),
        ({"element_size": 1}, "element_size must be 2, 4 or 8"),
        ({"rows": 2**62}, "must fit 64 bits"),
        ({"mask": 0}, "must not be null"),
        ({"weight": 65}, "aligned to their elements of 2"),
        ({"element_size": 8, "values": 68}, "aligned to their elements of 8"),
        ({"device": -1}, "device must be an index, got -1"),
    ],
)
def test_native_refuses_bad_sizes(native: ModuleType, change: dict[str, int], text: str) -> None:
    before = native.launch_count()
    with pytest.raises(ValueError, match=re.escape(text)) as caught:
        native.pack(**{**GOOD, **change})
    assert re.search(r"is false, csrc/packing/packing\.cu:\d+\]$", str(caught.value)), "condition, file and line"
    assert native.launch_count() == before


@pytest.mark.parametrize("change", [{"rows": 0}, {"cols": 0}, {"rows": 0, "v": 64}])
def test_native_launches_nothing_for_nothing(native: ModuleType, change: dict[str, int]) -> None:
    before = native.launch_count()
    assert native.pack(**{**GOOD, "weight": 0, "mask": 0, **change}) == ("pack", "empty", 0, 0)
    assert native.launch_count() == before


SPARSE = {
    "packed": 64, "rows": 128, "cols": 64, "tokens": 8, "type": 0, "activation": 0, "feature_x": False,
    "feature_y": False, "config": -1, "device": 0,
}  # fmt: skip
GATHER = {name: field for name, field in SPARSE.items() if name != "feature_x"} | {
    "columns": 64, "x_stride": 8, "v": 64, "m": 16
}  # fmt: skip


def test_products_take_the_fields_that_they_know(native: ModuleType) -> None:
    for product, fields in ((native.SparseLinear, SPARSE), (native.GatherLinear, GATHER)):
        product(**fields)
        for name in fields:
            with pytest.raises(TypeError, match=f"{name} is missing"):
                product(**{key: field for key, field in fields.items() if key != name})
        for change, text in (
            ({"row": 1}, "unexpected"),
            ({"rows": "1"}, "rows is of"),
            ({"rows": 2**63}, "rows is of"),
        ):
            with pytest.raises(TypeError, match=text):
                product(**{**fields, **change})


@pytest.mark.parametrize(
    ("change", "addresses", "text"),
    [
        ({"rows": -1}, (64, 0, 0, 64, 0), "must not be negative"),
        ({"v": 96}, (64, 0, 0, 64, 0), "v must be a multiple of 64"),
        ({}, (8, 0, 0, 64, 0), "x and packed must be aligned"),
        ({"x_stride": 4}, (64, 0, 0, 64, 0), "columns of whole 16 bytes"),
        ({}, (64, 8, 0, 64, 0), "x and out must be aligned"),
        ({"x_stride": 16}, (64, 64, 0, 64, 0), "out_stride must be the tokens rounded up to 8, got 16"),
    ],
)
def test_products_refuse_bad_sizes_when_launched(
    native: ModuleType, change: dict[str, int], addresses: tuple[int, ...], text: str
) -> None:
    """The last two by the transposition, for which there is memory."""
    before, product = native.launch_count(), native.GatherLinear(**{**GATHER, **change})
    for call in (product.launch, product.run):
        with pytest.raises(ValueError, match=text):
            call(*addresses)
    assert native.launch_count() == before


def test_products_launch_nothing_for_nothing(native: ModuleType) -> None:
    before = native.launch_count()
    empty = "sparse_linear", "empty", 0, 0
    sparse, gather = native.SparseLinear(**{**SPARSE, "tokens": 0}), native.GatherLinear(**{**GATHER, "rows": 0})
    assert sparse.launch(64, 0, 64, 0) == gather.launch(64, 0, 0, 64, 0) == empty
    assert sparse.run(64, 0, 64, 0) is gather.run(64, 0, 0, 64, 0) is None
    assert native.launch_count() == before


GROUPS = {
    "weight": 64, "fisher": 64, "damp": 64, "damp_each": False, "alive": 0, "mask": 64, "saliency": 64,
    "new_weight": 0, "info": 64, "num_groups": 2, "n": 9, "m": 20, "device": 0, "stream": 0,
}  # fmt: skip
CHOICE: dict[str, dict[str, object]] = {
    "finish_nm": GROUPS,
    "search_greedy": GROUPS,
    "search_pairwise": {
        "weight": 64, "inverse": 64, "alive": 0, "mask": 64, "num_groups": 2, "n": 9, "m": 20, "device": 0, "stream": 0,
    },
    "pair_models": {"inverse": 64, "unit": 64, "model": 64, "num_groups": 2, "m": 20, "device": 0, "stream": 0},
    "sum_panels": {"each": 64, "sums": 64, "num_groups": 12, "v": 3, "wide": 2, "device": 0, "stream": 0},
}  # fmt: skip


@pytest.mark.parametrize(
    ("function", "change", "text"),
    [
        ("finish_nm", {"m": 33}, "0 < n < m <= 32, got n = 9, m = 33"),
        ("finish_nm", {"mask": 0}, "must not be null for 2 groups"),
        ("search_greedy", {"n": 20}, "0 < n < m <= 32"),
        ("search_greedy", {"num_groups": -1}, "num_groups must be 0 to 2^31 - 1, got -1"),
        ("search_greedy", {"fisher": 66}, "must be aligned to their elements"),
        ("search_pairwise", {"m": 21}, "m must be even, got 21"),
        ("search_pairwise", {"inverse": 68}, "must be aligned to 4 and 8 bytes"),
        ("search_pairwise", {"mask": 0}, "must not be null"),
        ("pair_models", {"m": 34}, "m must be even, 2 to 32, got 34"),
        ("pair_models", {"num_groups": 2**31}, "num_groups must be 0 to 2^31 - 1"),
        ("pair_models", {"unit": 0}, "must not be null"),
        ("sum_panels", {"v": 0}, "v must be 1 to 65536, got 0"),
        ("sum_panels", {"wide": 5}, "must be a multiple of v * wide = 15, got 12"),
        ("sum_panels", {"device": -1}, "device must be an index, got -1"),
    ],
)
def test_choices_refuse_bad_sizes(native: ModuleType, function: str, change: dict[str, int], text: str) -> None:
    before = native.launch_count()
    with pytest.raises(ValueError, match=re.escape(text)):
        getattr(native, function)(**{**CHOICE[function], **change})
    assert native.launch_count() == before


@pytest.mark.parametrize("function", CHOICE)
def test_choices_launch_nothing_for_nothing(native: ModuleType, function: str) -> None:
    before = native.launch_count()
    found = getattr(native, function)(**{**CHOICE[function], "num_groups": 0})
    assert found == (function, "empty", 0, 0) and native.launch_count() == before


ACCUMULATE = {
    "grads": 64, "grad_type": 2, "row_stride": 32, "fisher": 64, "num_blocks": 2, "size": 16, "num_samples": 3,
    "scale": 1.0, "device": 0, "stream": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"size": 0}, "size must be 1 to 128, got 0"),
        ({"size": 129}, "size must be 1 to 128, got 129"),
        ({"num_blocks": -1}, "num_blocks must be 0 to 2^31 - 1"),
        ({"num_blocks": 2**31}, "num_blocks must be 0 to 2^31 - 1"),
        ({"num_samples": -1}, "num_samples must be 0 to 2^30"),
        ({"num_samples": 2**31}, "num_samples must be 0 to 2^30"),
        ({"row_stride": -32}, "row_stride must not be negative"),
        ({"grad_type": 3}, "grad_type must be 0 (f32), 1 (f16) or 2 (bf16), got 3"),
        ({"grads": 0}, "must not be null"),
        ({"fisher": 66}, "aligned to their elements"),
        ({"grads": 65}, "aligned to their elements"),
        ({"grads": 66, "grad_type": 0}, "aligned to their elements"),
        ({"device": -1}, "device must be an index, got -1"),
    ],
)
def test_native_accumulate_refuses_bad_sizes(native: ModuleType, change: dict[str, int], text: str) -> None:
    before = native.launch_count()
    with pytest.raises(ValueError, match=re.escape(text)):
        native.accumulate_fisher(**{**ACCUMULATE, **change})
    for empty in ({"num_blocks": 0}, {"num_samples": 0}):
        assert native.accumulate_fisher(**{**ACCUMULATE, **empty}) == ("accumulate_fisher_", "empty", 0, 0)
    assert native.launch_count() == before


def test_native_without_gpu_says_so(native: ModuleType) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(RuntimeError, match=r"cudaError\w+: .*csrc/common/device_guard\.h:\d+\]$"):
        native.pack(**GOOD)


def test_native_tells_its_build(native: ModuleType) -> None:
    info = _ext.build_info()
    assert info["built"] and info["reason"] is None
    assert re.fullmatch(r"\d+\.\d+.*", info["cuda"])
    assert info["architectures"] and not cuda_calls.runs_on((7, 5), info["architectures"])


def test_cpu_tensors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ext, "load", lambda: None)
    with pytest.raises(DeviceMismatchError, match=r"weight must be on a CUDA device, got cpu"):
        cuda_calls.pack(torch.zeros(2, 8), torch.zeros(2, 8, dtype=torch.bool), "2:4")


def test_missing_module_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ext, "_try_load", lambda: (None, "no nvcc"))
    with pytest.raises(BackendUnavailableError, match="no nvcc"):
        _ext.load()
    assert _ext.reason() == "no nvcc"


@pytest.mark.parametrize(
    ("capability", "architectures", "wanted"),
    [
        ((8, 0), ["80"], True),
        ((8, 6), ["80-real"], True),  # same major, later minor
        ((8, 0), ["86"], False),
        ((9, 0), ["80"], True),  # by its PTX
        ((9, 0), ["80-real"], False),
        ((9, 0), ["90a-real"], True),
        ((10, 0), ["90a"], False),  # neither code nor PTX of sm_90a moves on
        ((12, 0), ["100", "120"], True),
        ((10, 3), ["100f"], True),
        ((11, 0), ["100f"], False),
        ((7, 5), ["80", "90a"], False),
        ((9, 0), ["80-virtual"], True),
        ((9, 0), [], False),
    ],
)
def test_runs_on(capability: tuple[int, int], architectures: list[str], wanted: bool) -> None:
    assert cuda_calls.runs_on(capability, architectures) is wanted


def test_runs_on_refuses_words() -> None:
    with pytest.raises(ConfigError, match="got 'native'"):
        cuda_calls.runs_on((9, 0), ["native"])


# setup.py


def test_build_mode() -> None:
    setup = load_setup()
    modes = [setup.build_mode({"OBS_KERNELS_BUILD": text}) for text in ("", "auto", "ON", "off")]
    assert modes == ["auto", "auto", "on", "off"]
    with pytest.raises(SystemExit, match="must be auto, on or off, got 'yes'"):
        setup.build_mode({"OBS_KERNELS_BUILD": "yes"})


def test_cuda_home_is_asked_before_path(tmp_path: Path) -> None:
    setup = load_setup()
    for home in ("first", "second"):
        nvcc = tmp_path / home / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.touch(mode=0o755)
    path = str(tmp_path / "second" / "bin")
    assert setup.find_nvcc({"CUDA_HOME": str(tmp_path / "first"), "PATH": path}) == tmp_path / "first" / "bin" / "nvcc"
    assert setup.find_nvcc({"PATH": path}) == tmp_path / "second" / "bin" / "nvcc"
    assert setup.find_nvcc({"CUDA_HOME": str(tmp_path), "PATH": path}) is None


def test_why_not(tmp_path: Path) -> None:
    setup = load_setup()
    hidden = {"CUDA_HOME": str(tmp_path)}
    assert "OBS_KERNELS_BUILD=off" in setup.why_not({"OBS_KERNELS_BUILD": "off"})
    assert f"CUDA_HOME={tmp_path}" in setup.why_not(hidden)
    with pytest.raises(SystemExit, match="OBS_KERNELS_BUILD=on, but"):
        setup.why_not({"OBS_KERNELS_BUILD": "on", **hidden})


def test_count_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = load_setup()
    monkeypatch.setattr(setup, "free_gb", lambda: 9.0)
    monkeypatch.setattr(setup.os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert setup.count_jobs({}) == 2
    assert setup.count_jobs({"MAX_JOBS": "7"}) == 7
    monkeypatch.setattr(setup, "free_gb", lambda: 0.5)
    assert setup.count_jobs({}) == 1


def test_failed_build_keeps_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup = load_setup()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.touch(mode=0o755)
    env = {"CUDA_HOME": str(tmp_path), "PATH": str(tmp_path)}
    package = tmp_path / "package"
    package.mkdir()
    (package / setup.MODULE_FILE).touch()
    setup.build_into(package, tmp_path / "build", env)  # no cmake on that PATH
    info = json.loads((package / "_build_info.json").read_text())
    reason = "cmake is not installed (pip install cmake)"
    assert info == {"built": False, "reason": reason, "architectures": [], "cuda": None}
    assert not (package / setup.MODULE_FILE).exists(), "an older module must not stand in for one that failed"
    assert "WITHOUT compiled kernels: cmake is not installed" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="cmake is not installed"):
        setup.build_into(package, tmp_path / "build", {**env, "OBS_KERNELS_BUILD": "on"})


def test_first_error_line_is_the_reason() -> None:
    setup = load_setup()
    script = "print('c++ -Werror x.cpp'); print('x.cpp:1: error: bad'); raise SystemExit(3)"
    with pytest.raises(setup.BuildError, match=r"the build failed with exit status 3: x\.cpp:1: error: bad"):
        setup.run_step("the build", [sys.executable, "-c", script])
    with pytest.raises(setup.BuildError, match="the build failed"):
        setup.run_step("the build", ["/nonexistent/cmake"])


# The kernels as host code


@pytest.fixture(scope="module", params=SANITIZERS)
def pack_on_cpu(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(
        "packing/packing.cu",
        "pack_on_cpu.cpp",
        tmp_path_factory.mktemp("emulation") / "pack",
        sanitizer=request.param,
        empty=["0", "8", "0", "2", "4", "2", "0", "0", "0"],
        # so that small weights walk in strides too
        replaced={"packing/packing_config.h": [(r"kMaxBlocks = \d+", "kMaxBlocks = 2", 2)]},
    )


def emulate(
    program: Path, weight: Tensor, mask: Tensor, pattern: NMPattern, shifts: tuple[int, int, int]
) -> tuple[str, Tensor, Tensor, Tensor]:
    """(path, values, codes, columns) of the kernels on the CPU; ``weight`` holds bits as integers."""
    rows, cols = weight.shape
    v = pattern.v if isinstance(pattern, VNMPattern) else 0
    arguments = [rows, cols, v, pattern.n, pattern.m, weight.element_size(), *shifts]
    given = weight.numpy().tobytes() + mask.numpy().tobytes()
    done = subprocess.run([program, *map(str, arguments)], input=given, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    path, _, rest = done.stdout.partition(b"\n")
    kept = cols // pattern.m * pattern.n
    two_bits = v > 0 or (pattern.n, pattern.m) == (2, 4)
    values_size = rows * kept * weight.element_size()
    codes_size = rows * (-(-kept // 4) if two_bits else kept)
    values = torch.frombuffer(bytearray(rest[:values_size]), dtype=weight.dtype).view(rows, kept)
    codes = torch.frombuffer(bytearray(rest[values_size : values_size + codes_size]), dtype=torch.uint8).view(rows, -1)
    columns = torch.tensor(list(rest[values_size + codes_size :]), dtype=torch.uint8)
    return path.decode(), values, codes, columns.view(rows // v, cols // pattern.m, 4) if v else columns


def assert_emulation_is_reference(
    program: Path, weight: Tensor, mask: Tensor, pattern: NMPattern, shifts: tuple[int, int, int] = (0, 0, 0)
) -> str:
    path, *got = emulate(program, weight, mask, pattern, shifts)
    wanted = reference.pack(weight, mask, str(pattern))
    for name, ours, theirs in zip(("values", "codes", "columns"), got, wanted, strict=True):
        assert torch.equal(ours, theirs), f"{name} of {pattern} on {list(weight.shape)}"
    return path


def random_bits(gen: torch.Generator, rows: int, cols: int, size: int) -> Tensor:
    return torch.randint(-(2 ** (8 * size - 1)), 2 ** (8 * size - 1) - 1, (rows, cols), dtype=BITS[size], generator=gen)


@pytest.mark.parametrize(
    ("pattern", "rows", "cols", "size", "shift", "path"),
    [
        ("2:4", 37, 80, 2, 0, "octets"),
        ("2:4", 40, 256, 4, 0, "octets"),
        ("2:4", 33, 144, 8, 0, "octets"),
        ("2:4", 33, 140, 2, 0, "quads"),  # an odd number of groups: the last byte of a row is half empty
        ("2:4", 5, 4, 2, 0, "quads"),
        ("2:4", 40, 256, 2, 1, "quads"),  # off its alignment
        ("2:8", 37, 264, 2, 0, "groups"),
        ("2:8", 3, 8, 4, 3, "groups"),
        ("1:4", 37, 132, 2, 0, "groups"),
        ("4:8", 37, 136, 4, 0, "groups"),
        ("2:16", 17, 48, 8, 0, "groups"),
        ("3:5", 9, 35, 2, 0, "groups"),
        ("2:64", 9, 192, 2, 0, "groups"),
        ("64:2:8", 128, 48, 2, 0, "panels_words"),  # 2 by 3 pairs on 2 blocks
        ("64:2:8", 64, 40, 2, 0, "panels_words"),  # five panels: the last is alone
        ("64:2:8", 64, 40, 2, 1, "panels_bytes"),
        ("128:2:8", 128, 16, 4, 0, "panels_words"),
        ("64:2:16", 64, 48, 4, 0, "panels_words"),
        ("16:2:32", 48, 64, 2, 0, "panels_words"),
        ("8:2:64", 16, 192, 8, 0, "panels_words"),
        ("4:2:6", 8, 30, 2, 0, "panels_bytes"),
        ("1:2:4", 5, 12, 2, 0, "panels_words"),
        ("3:2:5", 9, 25, 4, 0, "panels_bytes"),
        ("300:2:8", 600, 16, 2, 0, "panels_words"),  # more rows than threads
    ],
)
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_kernels_on_cpu_are_the_reference(
    pack_on_cpu: Path,
    gen: torch.Generator,
    pattern: str,
    rows: int,
    cols: int,
    size: int,
    shift: int,
    path: str,
    drop: float,
) -> None:
    parsed = parse_pattern(pattern)
    weight = random_bits(gen, rows, cols, size)
    mask = random_mask(gen, rows, cols, parsed, drop=drop)
    parsed.validate_mask(mask)
    assert assert_emulation_is_reference(pack_on_cpu, weight, mask, parsed, (shift, shift, shift)) == path


@pytest.mark.parametrize(
    ("pattern", "shifts", "path"),
    [
        ("2:4", (1, 0, 0), "quads"),
        ("2:4", (0, 4, 0), "quads"),
        ("2:4", (0, 0, 2), "quads"),
        ("2:4", (8, 8, 4), "octets"),  # off by whole words: as good as aligned
        ("64:2:8", (1, 4, 1), "panels_words"),
        ("64:2:8", (0, 2, 0), "panels_bytes"),
    ],
)
def test_each_misaligned_pointer_counts(
    pack_on_cpu: Path, gen: torch.Generator, pattern: str, shifts: tuple[int, int, int], path: str
) -> None:
    weight = random_bits(gen, 64, 64, 2)
    mask = random_mask(gen, 64, 64, parse_pattern(pattern))
    assert assert_emulation_is_reference(pack_on_cpu, weight, mask, parse_pattern(pattern), shifts) == path


@pytest.mark.parametrize("pattern", ["2:4", "2:8", "8:2:8", "4:2:64"])
def test_kernels_on_cpu_meet_every_small_mask(pack_on_cpu: Path, gen: torch.Generator, pattern: str) -> None:
    """All 256 bytes of mask, legal or not: the lowest positions win, and nothing is written elsewhere."""
    parsed = parse_pattern(pattern)
    byte = torch.arange(256)[:, None] >> torch.arange(8) & 1
    mask = byte.bool().repeat(1, max(1, 2 * parsed.m // 8))
    weight = random_bits(gen, mask.shape[0], mask.shape[1], 2)
    assert_emulation_is_reference(pack_on_cpu, weight, mask, parsed)


def test_kernels_on_cpu_walk_in_strides(pack_on_cpu: Path, gen: torch.Generator) -> None:
    """More work than two blocks do at once, on each path without shared memory."""
    for pattern, cols in (("2:4", 264), ("2:4", 260), ("2:8", 64)):
        parsed = parse_pattern(pattern)
        mask = random_mask(gen, 131, cols, parsed)
        assert_emulation_is_reference(pack_on_cpu, random_bits(gen, 131, cols, 2), mask, parsed)


# The evidence file


def good_report() -> dict[str, object]:
    files = gpu_report.source_files()
    return {
        "schema": 1,
        "date": "2026-01-01T00:00:00+00:00",
        "commit": "abc",
        "dirty": False,
        "device": "NVIDIA H100",
        "compute_capability": "9.0",
        "driver": "580",
        "versions": {},
        "source_hash": gpu_report.source_hash(files),
        "sources": files,
        "passed": ["tests/gpu/a.py::test_a"],
        "failed": [],
        "skipped": [{"test": "tests/gpu/a.py::test_b", "reason": "needs 2 CUDA devices"}],
        "sanitizer": {tool: "passed" for tool in gpu_report.TOOLS},
    }


def test_source_hash_is_stable(tmp_path: Path) -> None:
    wanted = ["CMakeLists.txt", "csrc/a.h", "csrc/b.cu", "obs_kernels/cuda_calls/c.py", "python_bindings/x.cpp"]
    for name in ["README.md", *reversed(wanted)]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    first = gpu_report.source_files(tmp_path)
    assert list(first) == wanted
    # a fixed number: the hash must not depend on the machine, the order of a walk or this version of Python
    assert gpu_report.source_hash(first) == "sha256:8c71cea9b8579103797d96d5aaf630274be2ffc6663f5d4933070ca0172915b1"
    assert gpu_report.source_hash(dict(reversed(first.items()))) == gpu_report.source_hash(first)
    cache = tmp_path / "csrc" / "__pycache__" / "junk"
    cache.parent.mkdir()
    cache.touch()
    assert gpu_report.source_files(tmp_path) == first
    (tmp_path / "csrc" / "a.h").write_text("changed")
    assert gpu_report.source_hash(gpu_report.source_files(tmp_path)) != gpu_report.source_hash(first)


def test_verdicts() -> None:
    report, files = good_report(), gpu_report.source_files()
    assert gpu_report.verdict(report, files).startswith("GPU-verified at abc on NVIDIA H100: 1 passed, 1 skipped")
    changed = {**files, "csrc/new.cu": "0", "CMakeLists.txt": "0"}
    assert gpu_report.verdict(report, changed) == "STALE: changed since abc: CMakeLists.txt, csrc/new.cu"
    assert "dirty tree" in gpu_report.verdict({**report, "dirty": True}, files)
    assert "failed at abc" in gpu_report.verdict({**report, "failed": ["x"]}, files)
    assert "no test passed" in gpu_report.verdict({**report, "passed": []}, files)
    broken = {**good_report()["sanitizer"], "memcheck": "failed: 3 errors"}  # type: ignore[dict-item]
    assert "memcheck failed: 3 errors" in gpu_report.verdict({**report, "sanitizer": broken}, files)
    refused = {tool: "not run: tool refused by this machine" for tool in gpu_report.TOOLS}
    assert "sanitizers passed: none" in gpu_report.verdict({**report, "sanitizer": refused}, files)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"schema": 2}, "schema is 2"),
        ({"passed": None}, "passed is missing"),
        ({"source_hash": "sha256:0"}, "source_hash is not the hash of sources"),
        ({"skipped": [{"test": "a"}]}, "no reason"),
        ({"sanitizer": {"memcheck": "passed"}}, "nothing of racecheck"),
    ],
)
def test_schema_problems(change: dict[str, object], text: str) -> None:
    assert gpu_report.schema_problems(good_report()) == []
    problems = gpu_report.schema_problems({**good_report(), **change})
    assert any(text in problem for problem in problems), problems
    assert "NOT VERIFIED" in gpu_report.verdict({**good_report(), **change}, gpu_report.source_files())


def test_committed_report_obeys_the_schema() -> None:
    if not gpu_report.REPORT.exists():
        pytest.skip("there is no bench/gpu_report.json")
    assert gpu_report.schema_problems(json.loads(gpu_report.REPORT.read_text())) == []


def test_check_never_fails(tmp_path: Path) -> None:
    missing, damaged = tmp_path / "missing.json", tmp_path / "damaged.json"
    damaged.write_text("[1, ")
    for path in (missing, damaged):
        command = [sys.executable, "-m", "bench.gpu_report", "--check", "--out", str(path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and done.stdout.startswith("NOT VERIFIED"), done.stderr


CLEAN = "========= ERROR SUMMARY: 0 errors\nobs_kernels launches: 12\n"
RACES = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\nobs_kernels launches: 1\n"
NO_SUMMARY = "not run: no summary from the tool"
NO_KERNEL = "not run: no kernel of ours was launched"


@pytest.mark.parametrize(
    ("status", "output", "wanted"),
    [
        (0, CLEAN, "passed"),
        (0, RACES, "passed"),
        (0, "obs_kernels launches: 12", f"{NO_SUMMARY} (exit status 0)"),
        (0, CLEAN.replace("12", "0"), f"{NO_KERNEL} (exit status 0)"),
        (0, "========= ERROR SUMMARY: 0 errors", f"{NO_KERNEL} (exit status 0)"),
        (99, CLEAN.replace("0 errors", "2 errors"), "failed: 2 errors (exit status 99)"),
        (0, CLEAN.replace("0 errors", "1 error"), "failed: 1 errors (exit status 0)"),
        (1, CLEAN, "failed: the tests under the tool ended with exit status 1"),
        (1, "========= Error: Device not supported\n", f"{NO_SUMMARY} (exit status 1): Error: Device not supported"),
        (124, "========= failed to end within 9 s", f"{NO_SUMMARY} (exit status 124): failed to end within 9 s"),
    ],
)
def test_judge_sanitizer(status: int, output: str, wanted: str) -> None:
    assert sanitizers.judge_sanitizer(status, output) == wanted


def test_a_tool_is_as_good_as_its_worst_file(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sanitizers.worst({"a": "passed", "b": "passed"}) == "passed"
    states = {"a": "passed", "b": "not run: x", "c": "failed: 2 errors"}
    assert sanitizers.worst(states) == "failed: 2 errors in c"
    assert sanitizers.worst({"a": "passed", "b": "not run: x"}) == "not run: x in b"
    assert sanitizers.worst({}).startswith("not run")
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(sanitizers, "run_sanitizer", lambda tool, tests: asked.append((tool, tests)) or "passed")
    found = sanitizers.run_sanitizers(3)
    assert found == dict.fromkeys(sanitizers.TOOLS, "passed")
    assert ("memcheck", "tests/gpu/test_search_gpu.py") in asked and len(asked) == len(set(asked))


def test_results_count_a_crash_as_failure() -> None:
    notes = [
        ("a", "started", ""), ("a", "passed", ""), ("b", "started", ""), ("b", "skipped", "why"), ("c", "started", ""),
        ("d", "started", ""), ("d", "passed", ""), ("d", "failed", ""), ("e", "failed", ""),
        ("f", "started", ""), ("f", "skipped", "no memory"), ("f", "started", ""), ("f", "passed", ""),
    ]  # fmt: skip
    lines = [json.dumps({"test": test, "outcome": outcome, "reason": reason}) for test, outcome, reason in notes]
    assert gpu_report.read_results(lines) == {
        "passed": ["a", "f"],
        "failed": ["c", "d", "e"],
        "skipped": [{"test": "b", "reason": "why"}],
    }


def test_what_found_no_memory_beside_others_runs_again_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[list[str]] = []

    def played(command: list[str], env: Mapping[str, str], limit_s: int, *, echo: bool) -> tuple[int, str]:
        runs.append(command)
        alone = command[-1].endswith("::wide")
        wide = ("passed", "") if alone else ("skipped", "needs 9 GiB of free GPU memory, found 5")
        two = ("skipped", "needs 2 CUDA devices, found 1")
        with Path(env[gpu_report.LOG_VARIABLE]).open("a") as log:
            for test, (outcome, reason) in {"a": ("passed", ""), "two": two, "wide": wide}.items():
                note = {"test": f"tests/gpu/a.py::{test}", "outcome": outcome, "reason": reason}
                log.write(json.dumps(note) + "\n")
        return 0, ""

    monkeypatch.setattr(gpu_report, "run_command", played)
    results = gpu_report.run_tests(4)
    assert results["passed"] == ["tests/gpu/a.py::a", "tests/gpu/a.py::wide"] and not results["failed"]
    assert [skip["test"] for skip in results["skipped"]] == ["tests/gpu/a.py::two"]
    assert [run[-1] for run in runs] == ["4", "tests/gpu", "tests/gpu/a.py::wide"]


def test_plugin_notes_what_pytest_says(tmp_path: Path) -> None:
    """A run of its own: each outcome ends where it belongs, and the number of launches is printed."""
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert False\n"
        "def test_skip(): pytest.skip('no reason to run')\n"
        "@pytest.fixture\ndef broken():\n    yield\n    raise OSError\n"
        "def test_teardown(broken): pass\n"
        "@pytest.mark.xfail\ndef test_xfail(): assert False\n"
    )
    (tmp_path / "test_import.py").write_text("import nothing_of_that_name\n")
    log = tmp_path / "log"
    command = [sys.executable, "-m", "pytest", "-p", "bench.gpu_report", "-q", "--continue-on-collection-errors"]
    command += ["-p", "no:cacheprovider", "--rootdir", str(tmp_path), "-c", os.devnull, str(tmp_path)]
    env = {**os.environ, gpu_report.LOG_VARIABLE: str(log)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    results = gpu_report.read_results(log.read_text().splitlines())
    assert results["passed"] == ["test_it.py::test_good"]
    assert results["failed"] == ["test_import.py", "test_it.py::test_bad", "test_it.py::test_teardown"]
    assert results["skipped"][0] == {"test": "test_it.py::test_skip", "reason": "no reason to run"}
    assert [skip["test"] for skip in results["skipped"]] == ["test_it.py::test_skip", "test_it.py::test_xfail"]
    assert re.search(rf"{sanitizers.LAUNCHES} \d+", done.stdout)
