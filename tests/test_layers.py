# SPDX-License-Identifier: Apache-2.0
"""The layer law, read from the imports of every file; and an import that stays cheap."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "obs_kernels"

LEVELS = {
    **dict.fromkeys(
        (
            "patterns",
            "packed_format",
            "checks",
            "row_checks",
            "dtype_names",
            "errors",
            "files",
            "launch_plan",
            "timing",
            "_ext",
            "report",
        ),
        0,
    ),
    **dict.fromkeys(("reference", "triton_kernels", "cuda_calls"), 1),
    "ops": 2,
    "sparse": 3,
    "pruning": 4,
    "recipes": 5,
    "training": 6,
    **dict.fromkeys(("cli", "cli_common", "cli_words", "cli_files", "cli_speed", "cli_recipes", "cli_train"), 7),
    **dict.fromkeys(("cli_prune", "cli_damping"), 7),
    **dict.fromkeys(("inference", "run_report", "__main__"), 7),
    "": 8,  # obs_kernels/__init__.py
}
SIDEWAYS = {0, 7}
"""Levels whose units may import each other; backends (1) never."""
HEAVY = {"transformers", "datasets", "typer", "rich", "matplotlib", "jinja2", "pydantic"}
LATE = {"sparse/quantizer.py", "training/callback.py", "training/trainer.py"}
"""Files that need such a library to be defined at all; they are themselves imported only inside functions."""
COMPILED = {"triton", "obs_kernels._C"}

STORAGE_IDENTITY = {
    ("sparse/checkpoint.py", "_unshared"): "which tensors of a state dict are one storage",
    ("pruning/find_layers.py", "_place_of"): "which modules hold the same weight",
    ("pruning/output_watch.py", "is_same_memory"): "whether a function takes what a layer gave",
}
"""(file, function) that may ask for ``data_ptr()`` outside of cuda_calls, and what for."""


class Import(NamedTuple):
    file: str
    line: int
    module: str
    top: bool
    """At module level, so that importing the file runs it."""


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def unit_of(module: str) -> str:
    """ "obs_kernels.ops.search" -> "ops"; the package itself -> ""."""
    return module.removeprefix("obs_kernels").removeprefix(".").split(".")[0]


def unit_of_file(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def exists(module: str) -> bool:
    place = ROOT.joinpath(*module.split("."))
    return place.is_dir() or place.with_suffix(".py").is_file()


def imports_of(path: Path, source: str | None = None) -> Iterator[Import]:
    tree = ast.parse(path.read_text() if source is None else source)
    name = str(path.relative_to(PACKAGE))
    package = ["obs_kernels", *path.relative_to(PACKAGE).parts[:-1]]

    def walk(node: ast.AST, top: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            children: list[ast.AST] = list(node.orelse)  # never run
        else:
            children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name, node.lineno, alias.name, top)
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
                if node.level
                else str(node.module)
            )
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield Import(
                    name,
                    node.lineno,
                    full if full in COMPILED or (base.startswith("obs_kernels") and exists(full)) else base,
                    top,
                )
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield Import(name, node.lineno, argument.value, top)
        inside = top and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in children:
            yield from walk(child, inside)

    yield from walk(tree, True)


def all_imports() -> list[Import]:
    return [found for path in files() for found in imports_of(path)]


def breaks_the_law(unit: str, imported: str) -> bool:
    target = unit_of(imported)
    if target == unit:
        return False
    same = LEVELS[target] == LEVELS[unit]
    return LEVELS[target] > LEVELS[unit] or (same and LEVELS[unit] not in SIDEWAYS)


def test_every_module_has_a_layer():
    unknown = sorted({unit_of_file(path) for path in files()} - set(LEVELS))
    assert not unknown, f"give {unknown} a layer in LEVELS"
    assert len(files()) > 20


def test_imports_only_go_down():
    wrong = [
        f"{found.file}:{found.line} imports {found.module}"
        for path in files()
        for found in imports_of(path)
        if found.module.split(".")[0] == "obs_kernels"
        and found.module not in COMPILED
        and unit_of_file(path) != ""
        and breaks_the_law(unit_of_file(path), found.module)
    ]
    assert not wrong, "\n".join(wrong)


def test_report_renders_plain_data():
    """report/ takes dicts, so that the pruning layer may call it: no torch, and of the package only level 0."""
    wrong = [
        found
        for path in (PACKAGE / "report").rglob("*.py")
        for found in imports_of(path)
        if found.module.split(".")[0] == "torch"
        or (found.module.startswith("obs_kernels") and LEVELS[unit_of(found.module)] > 0)
    ]
    assert not wrong


def test_compiled_code_is_imported_inside_functions():
    wrong = [f for f in all_imports() if f.top and (f.module.split(".")[0] == "triton" or f.module in COMPILED)]
    # the kernels themselves need triton to be defined at all; the folder is imported only inside functions
    wrong = [f for f in wrong if not f.file.startswith("triton_kernels/")]
    assert not wrong
    assert not [
        f
        for f in all_imports()
        if f.top and unit_of(f.module) in ("triton_kernels", "cuda_calls") and unit_of(f.module) not in f.file
    ]


def test_heavy_libraries_are_imported_late():
    wrong = [
        f
        for f in all_imports()
        if f.top
        and f.module.split(".")[0] in HEAVY
        and f.file not in LATE
        and not re.fullmatch(r"cli(_\w+)?\.py", f.file)
    ]
    assert not wrong
    late = {f"obs_kernels.{name.removesuffix('.py').replace('/', '.')}" for name in LATE}
    assert not [f for f in all_imports() if f.top and f.module in late and f.file not in LATE]


def test_addresses_are_taken_in_one_folder():
    for path in files():
        name = str(path.relative_to(PACKAGE))
        if name.startswith("cuda_calls/"):
            continue
        tree = ast.parse(path.read_text())
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for node in ast.walk(tree):
            if not (
                isinstance(node, ast.Attribute) and node.attr in ("data_ptr", "const_data_ptr", "mutable_data_ptr")
            ):
                continue
            inside = [f for f in functions if f.lineno <= node.lineno <= (f.end_lineno or 0)]
            owner = min(inside, key=lambda f: (f.end_lineno or 0) - f.lineno).name if inside else ""
            assert (name, owner) in STORAGE_IDENTITY, (
                f"{name}:{node.lineno} takes an address in {owner or 'the module'}"
            )


@pytest.mark.parametrize(
    ("file", "source", "modules", "top"),
    [
        ("ops/x.py", "from obs_kernels import sparse", ["obs_kernels.sparse"], True),
        ("ops/x.py", "from obs_kernels import parse_pattern", ["obs_kernels"], True),
        (
            "ops/x.py",
            "def f():\n    from obs_kernels.pruning.plan import make_plan",
            ["obs_kernels.pruning.plan"],
            False,
        ),
        ("ops/x.py", "from ..sparse import linear", ["obs_kernels.sparse.linear"], True),
        ("ops/x.py", "class A:\n    import triton.language as tl", ["triton.language"], True),
        ("ops/x.py", "if TYPE_CHECKING:\n    import triton\nelse:\n    import torch", ["torch"], True),
        ("ops/x.py", "try:\n    from obs_kernels import _C\nexcept ImportError:\n    pass", ["obs_kernels._C"], True),
        ("ops/x.py", "def f():\n    return import_module('obs_kernels.cli')", ["obs_kernels.cli"], False),
    ],
)
def test_the_reader_of_imports(file, source, modules, top):
    found = list(imports_of(PACKAGE / file, source))
    assert [f.module for f in found] == modules and {f.top for f in found} == {top}


@pytest.mark.parametrize(
    ("unit", "module", "wrong"),
    [
        ("ops", "obs_kernels.sparse.linear", True),
        ("ops", "obs_kernels.reference", False),
        ("ops", "obs_kernels.ops.fisher", False),
        ("reference", "obs_kernels.cuda_calls", True),
        ("cuda_calls", "obs_kernels.triton_kernels.search", True),
        ("checks", "obs_kernels.patterns", False),
        ("pruning", "obs_kernels.report.html", False),
        ("report", "obs_kernels.pruning", True),
        ("pruning", "obs_kernels", True),
        ("training", "obs_kernels.cli", True),
        ("cli", "obs_kernels.training.squad", False),
    ],
)
def test_the_law(unit, module, wrong):
    assert breaks_the_law(unit, module) is wrong


# the import of the package, in a fresh process


def run(code: str, *, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


def test_import_starts_neither_cuda_nor_heavy_libraries():
    code = f"""
import sys, torch
before = set(sys.modules)
import obs_kernels
assert not torch.cuda.is_initialized()
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
wrong = new & {HEAVY | {"triton", "accelerate", "tokenizers", "sklearn", "pandas", "psutil"}!r}
assert not wrong, wrong
assert "obs_kernels._C" not in sys.modules and "obs_kernels.cuda_calls" not in sys.modules
assert all(hasattr(obs_kernels, name) for name in obs_kernels.__all__)
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == ""


def test_pruning_works_without_optional_libraries():
    """Only torch, safetensors, packaging and tqdm are required."""
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        blocked = {HEAVY | {"triton", "accelerate", "tokenizers", "psutil", "scipy"}!r}
        if name.split(".")[0] in blocked or name == "obs_kernels._C":
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Block())
import tempfile, torch, obs_kernels as obs
from torch import nn
model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
data = [torch.randn(4, 16) for _ in range(4)]
report = obs.sparsify_(model, obs.OBSConfig(pattern="2:4", num_grads=16), data, lambda m, x: m(x).square().mean(1))
report.to_markdown()
obs.compress_(model)
with tempfile.TemporaryDirectory() as folder:
    obs.save_pretrained(model, folder + "/out")
    fresh = obs.load(folder + "/out", model=nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)))
    assert torch.equal(fresh(data[0]), model.eval()(data[0]))
    try:
        obs.load(folder + "/out")
    except obs.errors.MissingDependencyError as error:
        assert "transformers" in str(error)
    else:
        raise AssertionError("load without model= needs transformers")
assert not torch.cuda.is_initialized()
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_a_broken_compiled_module_does_not_break_the_import(tmp_path: Path):
    code = """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "obs_kernels._C":
            raise OSError("libcudart.so.99: cannot open shared object file")
sys.meta_path.insert(0, Broken())
import torch, obs_kernels as obs
weight = torch.arange(8.0).view(1, 8)
weight[0, [0, 1, 4, 5]] = 0
assert torch.equal(obs.ops.pack(weight, weight != 0, "2:4").to_dense(), weight)
try:
    obs.ops.pack(weight, weight != 0, "2:4", backend="cuda")
except obs.errors.BackendUnavailableError as error:
    print(error)
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert "cuda" in done.stdout
