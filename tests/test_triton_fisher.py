# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of the Fisher accumulation without a GPU: interpreted, and compiled for three targets."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from cubins import assert_no_spills
from interpreted import Case, interpret
from tolerances import FISHER_RMS_PER_SQRT_SAMPLE
from torch import Tensor

from obs_kernels.errors import ConfigError
from obs_kernels.ops import dispatch

triton = pytest.importorskip("triton")

from obs_kernels.triton_kernels import fisher as kernels  # noqa: E402  needs triton
from obs_kernels.triton_kernels.tuning import FISHER_CONFIGS, FisherConfig, fisher_config, slot_width  # noqa: E402

KERNELS = Path(__file__).resolve().parent.parent / "obs_kernels" / "triton_kernels"


def rms(values: np.ndarray) -> float:
    return float(np.sqrt((values**2).mean()))


def check(result: Tensor, start: Tensor, grads: Tensor, scale: float) -> None:
    expected = oracle.accumulate(start, grads, scale)
    tolerance = FISHER_RMS_PER_SQRT_SAMPLE * max(1, grads.shape[0]) ** 0.5
    assert rms(oracle.numpy(result) - expected) <= tolerance * rms(expected)


def random_case(gen: torch.Generator, blocks: int, size: int, samples: int, dtype: torch.dtype) -> Case:
    grads = torch.randn(samples, blocks * size, generator=gen).to(dtype)
    return "accumulate_fisher_", (torch.randn(blocks, size, size, generator=gen), grads), {"scale": 0.37}


def run(cases: list[Case], folder: Path) -> None:
    before = [(fisher.clone(), grads) for _, (fisher, grads), _ in cases]
    for result, (fisher, grads), case in zip(interpret(cases, folder), before, cases, strict=True):
        check(result, fisher, grads, case[2]["scale"])


# Interpreted. bf16 products are wrong in the interpreter (triton #11584); a GPU test has them.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_any_size(gen: torch.Generator, tmp_path: Path, dtype: torch.dtype) -> None:
    """Every kind of tile, Fisher blocks that do not fill one, a last program with fewer blocks than it takes."""
    sizes = [1, 2, 3, 4, 7, 8, 16, 31, 32, 50, 64, 100, 128]
    shapes = [(blocks, size, samples) for size in sizes for blocks, samples in [(1, 33), (3, 5), (37, 1)]]
    run([random_case(gen, *shape, dtype) for shape in shapes], tmp_path)


def test_many_samples(gen: torch.Generator, tmp_path: Path) -> None:
    run([random_case(gen, 5, size, 256, torch.float32) for size in (4, 16, 50)], tmp_path)


def test_nothing_to_do_changes_nothing(tmp_path: Path) -> None:
    cases: list[Case] = [
        ("accumulate_fisher_", (torch.full((blocks, 8, 8), 3.0), torch.zeros(samples, blocks * 8)), {"scale": 1.0})
        for blocks, samples in [(0, 5), (2, 0), (0, 0)]
    ]
    for result, case in zip(interpret(cases, tmp_path), cases, strict=True):
        assert torch.equal(result, torch.full(case[1][0].shape, 3.0))


def test_integers_are_exact_and_symmetric(gen: torch.Generator, tmp_path: Path) -> None:
    grads = torch.randint(-8, 9, (31, 3 * 12), generator=gen).float()
    (result,) = interpret([("accumulate_fisher_", (torch.zeros(3, 12, 12), grads), {"scale": 1.0})], tmp_path)
    assert np.array_equal(oracle.numpy(result), oracle.accumulate(torch.zeros(3, 12, 12), grads, 1.0))
    assert torch.equal(result, result.mT)


def test_strides(gen: torch.Generator, tmp_path: Path) -> None:
    """Rows of a wider buffer, transposed gradients, a Fisher that is a slice of something larger."""
    wide = torch.randn(9, 60, generator=gen)
    large = torch.zeros(4, 8, 16)
    cases: list[Case] = [
        ("accumulate_fisher_", (torch.zeros(3, 16, 16), wide[:, 5:53]), {"scale": 1.0}),
        ("accumulate_fisher_", (torch.zeros(3, 16, 16), wide[:, :48].T.contiguous().T), {"scale": 1.0}),
        ("accumulate_fisher_", (large[::2, :, 1::2], wide[:, ::2][:, :16]), {"scale": 1.0}),
    ]
    results = interpret(cases, tmp_path)
    for result, (_, (fisher, grads), _) in zip(results, cases, strict=True):
        check(result, torch.zeros_like(fisher), grads, 1.0)


def test_offsets_of_64_bits(gen: torch.Generator, tmp_path: Path) -> None:
    """Two gradients more than 2^31 elements apart: an offset of 32 bits would read the first one twice."""
    row = torch.randn(2, 32, generator=gen)
    script = (
        "import sys, torch; from obs_kernels import triton_kernels as t\n"
        "rows = torch.load(sys.argv[1]); distance = 2**31 + 48\n"
        "memory = torch.empty(distance + 32, dtype=torch.float32)\n"  # virtual: two pages of it are touched
        "grads = memory.as_strided((2, 32), (distance, 1)); grads.copy_(rows)\n"
        "torch.save(t.accumulate_fisher_(torch.zeros(2, 16, 16), grads, scale=1.0), sys.argv[2])\n"
    )
    torch.save(row, tmp_path / "rows.pt")
    done = subprocess.run(
        [sys.executable, "-c", script, "rows.pt", "out.pt"],
        cwd=tmp_path,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(KERNELS.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    check(torch.load(tmp_path / "out.pt"), torch.zeros(2, 16, 16), row, 1.0)


FORCED = [
    (4, FisherConfig(side=32, tiles=2, samples=16, warps=4, stages=1)),
    (16, FisherConfig(side=16, tiles=1, samples=64, warps=1, stages=1)),
    (16, FisherConfig(side=64, tiles=1, samples=16, warps=4, stages=1)),
    (50, FisherConfig(side=32, tiles=1, samples=16, warps=4, stages=1)),
    (128, FisherConfig(side=128, tiles=1, samples=16, warps=8, stages=1)),
    (64, FisherConfig(side=16, tiles=4, samples=32, warps=4, stages=2)),
]


def test_forced_records(gen: torch.Generator, tmp_path: Path) -> None:
    """Every record of the table, and others that a bench may force: larger tiles, parts of a block, several tiles."""
    forced = [*FORCED, *((size, record) for size, record in FISHER_CONFIGS.items())]
    cases = []
    for size, record in forced:
        name, tensors, options = random_case(gen, 5, size, 20, torch.float32)
        cases.append((name, tensors, {**options, "config": asdict(record)}))
    run(cases, tmp_path)


# Tuning


def test_the_table_covers_every_size() -> None:
    for size in range(1, 513):
        record = fisher_config(size, 32)
        assert record.side >= min(slot_width(size), 64) and record in FISHER_CONFIGS.values()
        assert slot_width(size) // 2 < size <= slot_width(size)
    assert fisher_config(16, 1).samples == 16 and fisher_config(16, 33).samples == 32


@pytest.mark.parametrize("change", [{"side": 8}, {"side": 48}, {"tiles": 3}, {"samples": 8}, {"tiles": 0}])
def test_impossible_records_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="powers of two, side and samples at least 16"):
        fisher_config(16, 32, config=replace(FISHER_CONFIGS[16], **change))


# Compiled


TARGETS = [80, 90, 100]


def compiled(size: int, dtype: str, target: int) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    record = fisher_config(size, 32)
    slot = slot_width(size)
    constants = {
        "D": size,
        "SLOT": slot,
        "SIDE": record.side,
        "PACK": max(1, record.side // slot),
        "PARTS": max(1, slot // record.side),
        "TILES": record.tiles,
        "SAMPLES": record.samples,
        "PRECISION": record.precision,
    }
    signature = {
        "fisher": "*fp32",
        "grads": f"*{dtype}",
        "row_stride": "i64",
        "num_blocks": "i32",
        "num_samples": "i32",
        "scale": "fp32",
        **dict.fromkeys(constants, "constexpr"),
    }
    aligned: dict[Any, Any] = {(index,): [["tt.divisibility", 16]] for index in range(3)}
    source = ASTSource(kernels._accumulate_fisher_kernel, signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": record.warps, "num_stages": record.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("size", [4, 16, 50, 128])
def test_compiles_to_tensor_cores_without_spills(size: int, dtype: str, target: int, tmp_path: Path) -> None:
    kernel = compiled(size, dtype, target)
    assert re.search(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", kernel.asm["ptx"]), "no tensor-core instruction"
    assert_no_spills(kernel, tmp_path)


def test_every_kernel_casts_its_program_id() -> None:
    """Offsets start from the program id: in 32 bits a large tensor would wrap (promise 9)."""
    seen = 0
    for path in KERNELS.glob("*.py"):
        text = path.read_text()
        uses = len(re.findall(r"tl\.program_id\(", text))
        assert uses == len(re.findall(r"tl\.program_id\(\d\)\.to\(tl\.int64\)", text)), path.name
        seen += uses
    assert seen


def test_every_launch_sets_fp_fusion() -> None:
    for path in KERNELS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                assert "enable_fp_fusion" in {keyword.arg for keyword in node.keywords}, path.name


# Dispatch


def test_dispatch_says_why_triton_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    fisher, grads = torch.zeros(1, 4, 4), torch.zeros(1, 4)
    assert dispatch.resolve("accumulate_fisher_", None, fisher, grads) == "reference"
    assert dispatch.unavailable("accumulate_fisher_", "triton", "cpu") == "it needs a CUDA tensor, got cpu"
    reason = dispatch.unavailable("accumulate_fisher_", "triton", "cuda", fisher.double(), grads)
    assert reason is not None and "float32 fisher" in reason
    reason = dispatch.unavailable("accumulate_fisher_", "triton", "cuda", fisher, grads.double())
    assert reason is not None and "got torch.float32 and torch.float64" in reason
    assert dispatch.unavailable("accumulate_fisher_", "triton", "cuda", fisher, grads.bfloat16()) is None
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    reason = dispatch.unavailable("accumulate_fisher_", "triton", "cuda")
    assert reason is not None and "pip install triton" in reason
