# SPDX-License-Identifier: Apache-2.0
"""``cuda_calls.pack`` on a GPU: bit for bit the reference, on torch's stream, inside its own outputs."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from masks import random_mask
from torch import Tensor

from obs_kernels import _ext, cuda_calls, ops, reference
from obs_kernels.errors import DeviceMismatchError, DTypeNotSupportedError, ShapeNotSupportedError
from obs_kernels.ops.sparse_weight import packed_shapes
from obs_kernels.patterns import NMPattern, parse_pattern

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parent.parent.parent
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
GUARD = 0xA5


def random_weight(gen: torch.Generator, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """Every bit pattern: NaN, Inf, -0.0 and subnormals are moved like any other value."""
    bits = BITS[torch.empty(0, dtype=dtype).element_size()]
    info = torch.iinfo(bits)
    return torch.randint(info.min, info.max, (rows, cols), dtype=bits, generator=gen).view(dtype)


def pack_bits(weight: Tensor, mask: Tensor, pattern: str) -> tuple[Tensor, Tensor, Tensor]:
    """The reference on ``weight`` as integers: half-precision ops of a CPU may quieten a signalling NaN."""
    values, codes, columns = reference.pack(weight.view(BITS[weight.element_size()]), mask, pattern)
    return values.view(weight.dtype), codes, columns


def assert_same_bits(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...], what: str = "") -> None:
    for name, ours, theirs in zip(("values", "codes", "columns"), got, wanted, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, f"{name} {what}"
        if ours.is_floating_point():
            bits = BITS[ours.element_size()]
            ours, theirs = ours.view(bits), theirs.view(bits)
        ours, theirs = ours.cpu(), theirs.cpu()
        if not torch.equal(ours, theirs):
            where = (ours != theirs).nonzero()
            raise AssertionError(f"{name} {what}: {len(where)} differ, the first at {where[0].tolist()}")


def assert_packs_like_reference(weight: Tensor, mask: Tensor, pattern: str) -> None:
    """``weight`` and ``mask`` are on the CPU, where the reference runs."""
    got = cuda_calls.pack(weight.cuda(), mask.cuda(), pattern)
    assert all(tensor.is_cuda for tensor in got)
    assert_same_bits(got, pack_bits(weight, mask, pattern), f"of {pattern} on {list(weight.shape)}")


SHAPES = [
    ("2:4", 64, 256),  # whole octets
    ("2:4", 33, 132),  # an odd number of groups: the last byte of a row is half empty
    ("2:4", 1, 4),  # one group
    ("2:8", 37, 264),
    ("1:4", 129, 132),
    ("4:8", 65, 136),
    ("2:16", 17, 48),
    ("3:5", 7, 35),  # m no power of two
    ("2:64", 5, 192),  # the largest group
    ("64:2:8", 192, 264),  # an odd number of panels: the last one is alone
    ("128:2:8", 256, 96),
    ("64:2:16", 128, 160),
    ("16:2:32", 48, 96),
    ("8:2:64", 24, 320),  # 64-bit sets of columns
    ("300:2:8", 600, 24),  # more rows than threads, and no whole warps
    ("1:2:4", 5, 12),
    ("4:2:6", 12, 30),  # m % 4 != 0: mask bytes one by one
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("pattern", "rows", "cols"), SHAPES)
@pytest.mark.parametrize("drop", [0.0, 0.4, 1.0])
def test_pack_is_the_reference(
    gen: torch.Generator, pattern: str, rows: int, cols: int, dtype: torch.dtype, drop: float
) -> None:
    mask = random_mask(gen, rows, cols, parse_pattern(pattern), drop=drop)
    parse_pattern(pattern).validate_mask(mask)
    assert_packs_like_reference(random_weight(gen, rows, cols, dtype), mask, pattern)


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("pattern", "rows", "cols"), SHAPES)
def test_pack_under_sanitizers(gen: torch.Generator, pattern: str, rows: int, cols: int, dtype: torch.dtype) -> None:
    mask = random_mask(gen, rows, cols, parse_pattern(pattern), drop=0.2)
    assert_packs_like_reference(random_weight(gen, rows, cols, dtype), mask, pattern)


def all_masks(m: int, n: int) -> Tensor:
    """One row for each way to keep at most n of m."""
    kept = [positions for count in range(n + 1) for positions in itertools.combinations(range(m), count)]
    mask = torch.zeros(len(kept), m, dtype=torch.bool)
    for row, positions in enumerate(kept):
        mask[row, list(positions)] = True
    return mask


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pair_of_24_groups(gen: torch.Generator, dtype: torch.dtype) -> None:
    """All six full groups and the five with free slots, in either half of a byte of codes."""
    single = all_masks(4, 2)
    assert len(single) == 11
    pairs = torch.tensor(list(itertools.product(range(11), repeat=2)))
    mask = torch.cat([single[pairs[:, 0]], single[pairs[:, 1]]], dim=1)
    assert_packs_like_reference(random_weight(gen, len(mask), 8, dtype), mask, "2:4")
    wide = torch.cat([mask, single[pairs[:, 0]]], dim=1)  # three groups: the path for any columns
    assert_packs_like_reference(random_weight(gen, len(wide), 12, dtype), wide, "2:4")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", ["2:8", "1:2:8"])
def test_every_28_group(gen: torch.Generator, pattern: str, dtype: torch.dtype) -> None:
    """All 28 full groups and the nine with free slots; with v = 1 each is a panel of its own."""
    mask = all_masks(8, 2)
    assert len(mask) == 37
    both = torch.cat([mask, mask.flip(0)], dim=1)
    assert_packs_like_reference(random_weight(gen, 37, 16, dtype), both, pattern)


def test_free_slots_hold_positive_zero_and_kept_zeros_their_sign() -> None:
    weight = torch.tensor([[-0.0, -1.0, -2.0, -0.0]])
    mask = torch.tensor([[True, False, False, False]])
    values, codes, _ = cuda_calls.pack(weight.cuda(), mask.cuda(), "2:4")
    assert torch.signbit(values).tolist() == [[True, False]]
    assert codes.tolist() == [[0b0100]]


@pytest.mark.parametrize("pattern", ["2:4", "2:8", "4:8", "8:2:8", "16:2:32"])
@pytest.mark.parametrize("shape", [(0, 64), (16, 0), (0, 0)])
def test_empty(pattern: str, shape: tuple[int, int]) -> None:
    before = _ext.load().launch_count()
    weight = torch.zeros(shape, dtype=torch.float16, device="cuda")
    got = cuda_calls.pack(weight, torch.zeros(shape, dtype=torch.bool, device="cuda"), pattern)
    wanted = packed_shapes(parse_pattern(pattern), *shape)
    assert [tuple(tensor.shape) for tensor in got] == [*wanted[:2], wanted[2] or (0,)]
    assert [tensor.dtype for tensor in got] == [torch.float16, torch.uint8, torch.uint8]
    assert _ext.load().launch_count() == before
    torch.cuda.synchronize()


# Paths, and memory outside the outputs


class Guarded:
    """A tensor inside a buffer of guard bytes, ``shift`` elements off the alignment of the allocation."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, shift: int) -> None:
        size = torch.empty(0, dtype=dtype).element_size()
        count = torch.Size(shape).numel() * size
        self.before, self.after = 512 + shift * size, 512 + shift * size + count
        self.buffer = torch.full((self.after + 512,), GUARD, dtype=torch.uint8, device="cuda")
        self.tensor = self.buffer[self.before : self.after].view(dtype).view(shape)

    def assert_unharmed(self) -> None:
        assert bool((self.buffer[: self.before] == GUARD).all()), "written before the output"
        assert bool((self.buffer[self.after :] == GUARD).all()), "written after the output"


def guarded_pack(
    weight: Tensor, mask: Tensor, pattern: str, shifts: tuple[int, int, int]
) -> tuple[str, tuple[Tensor, ...]]:
    """Path and outputs of ``launch_pack`` between guards; ``shifts`` of weight, mask and outputs, in elements."""
    wanted = pack_bits(weight, mask, pattern)
    inputs = [
        Guarded(tuple(tensor.shape), tensor.dtype, shift)
        for tensor, shift in zip((weight, mask), shifts[:2], strict=True)
    ]
    outputs = [Guarded(tuple(tensor.shape), tensor.dtype, shifts[2]) for tensor in wanted]
    for guarded, source in zip(inputs, (weight, mask), strict=True):
        guarded.tensor.copy_(source)
    tensors = [guarded.tensor for guarded in (*inputs, *outputs)]
    plan = cuda_calls.launch_pack(*tensors, pattern=parse_pattern(pattern))
    for guarded in (*inputs, *outputs):
        guarded.assert_unharmed()
    return plan.path, tuple(guarded.tensor for guarded in outputs)


PATHS = [
    ("2:4", 40, 256, (0, 0, 0), "octets"),
    ("2:4", 40, 256, (8, 8, 4), "octets"),  # off by whole words
    ("2:4", 40, 256, (1, 0, 0), "quads"),
    ("2:4", 40, 256, (0, 2, 0), "quads"),
    ("2:4", 40, 256, (0, 4, 0), "quads"),
    ("2:4", 40, 256, (0, 0, 1), "quads"),
    ("2:4", 40, 256, (1, 1, 1), "quads"),
    ("2:4", 40, 252, (0, 0, 0), "quads"),
    ("2:8", 40, 256, (0, 0, 0), "groups"),
    ("2:8", 40, 256, (3, 3, 3), "groups"),
    ("64:2:8", 128, 256, (0, 0, 0), "panels_words"),
    ("64:2:8", 128, 264, (1, 4, 1), "panels_words"),
    ("64:2:8", 128, 264, (0, 1, 0), "panels_bytes"),
    ("16:2:32", 32, 96, (2, 2, 2), "panels_bytes"),
    ("4:2:6", 8, 36, (0, 0, 0), "panels_bytes"),
]


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("pattern", "rows", "cols", "shifts", "path"), PATHS)
def test_path_and_guards(
    gen: torch.Generator,
    pattern: str,
    rows: int,
    cols: int,
    shifts: tuple[int, int, int],
    path: str,
    dtype: torch.dtype,
) -> None:
    weight = random_weight(gen, rows, cols, dtype)
    mask = random_mask(gen, rows, cols, parse_pattern(pattern), drop=0.3)
    taken, got = guarded_pack(weight, mask, pattern, shifts)
    assert taken == path
    assert_same_bits(got, pack_bits(weight, mask, pattern), f"of {pattern} at {shifts}")


@pytest.mark.sanitizer
@pytest.mark.parametrize("pattern", ["2:4", "2:8", "1:4", "64:2:8", "16:2:32"])
@pytest.mark.parametrize("density", [0.5, 1.0])
def test_bad_mask_writes_nowhere_else(gen: torch.Generator, pattern: str, density: float) -> None:
    """Too many kept, or too many columns: public ops refuse it, and the kernel keeps the lowest positions."""
    weight = random_weight(gen, 64, 192, torch.float16)
    mask = torch.rand(64, 192, generator=gen) < density
    _, got = guarded_pack(weight, mask, pattern, (0, 0, 0))
    assert_same_bits(got, pack_bits(weight, mask, pattern), f"of {pattern}")


def test_inputs_are_not_changed(gen: torch.Generator) -> None:
    weight, mask = random_weight(gen, 64, 64, torch.float16).cuda(), random_mask(gen, 64, 64, NMPattern(2, 4)).cuda()
    bits, kept = weight.view(torch.int16).clone(), mask.clone()
    cuda_calls.pack(weight, mask, "2:4")
    assert torch.equal(weight.view(torch.int16), bits) and torch.equal(mask, kept)


@pytest.mark.parametrize("pattern", ["2:4", "2:8", "64:2:8"])
def test_three_runs_give_the_same_bits(gen: torch.Generator, pattern: str) -> None:
    parsed = parse_pattern(pattern)
    weight = random_weight(gen, 768, 3072, torch.float16).cuda()
    mask = random_mask(gen, 768, 3072, parsed).cuda()
    first, *others = (cuda_calls.pack(weight, mask, pattern) for _ in range(3))
    for other in others:
        assert_same_bits(other, first)


# The public op


@pytest.mark.parametrize("pattern", ["2:4", "2:8", "16:2:8"])
def test_public_op_takes_any_strides(gen: torch.Generator, pattern: str) -> None:
    parsed = parse_pattern(pattern)
    mask = random_mask(gen, 64, 128, parsed, drop=0.2)
    weight = torch.randn(64, 128, generator=gen).half()
    wanted = pack_bits(weight, mask, pattern)
    views = {
        "transposed": (weight.t().contiguous().cuda().t(), mask.t().contiguous().cuda().t()),
        "sliced": (
            torch.cat([weight, weight], 1).cuda()[:, 128:],
            torch.cat([mask, mask], 1).cuda()[:, :128],
        ),
    }
    for name, (strided_weight, strided_mask) in views.items():
        assert not strided_weight.is_contiguous()
        got = ops.pack(strided_weight, strided_mask, pattern, backend="cuda")
        assert_same_bits((got.values, got.codes, got.columns_or_empty()), wanted, name)


def test_public_op_prefers_the_compiled_kernel(gen: torch.Generator) -> None:
    before = _ext.load().launch_count()
    weight = torch.randn(64, 64, generator=gen).cuda()
    mask = random_mask(gen, 64, 64, NMPattern(2, 4)).cuda()
    sparse = ops.pack(weight, mask, "2:4")
    assert _ext.load().launch_count() == before + 1
    assert torch.equal(ops.unpack(sparse), weight.masked_fill(~mask, 0.0))


# Streams, graphs, devices


@pytest.mark.parametrize("pattern", ["2:4", "2:8", "64:2:8"])
def test_runs_on_the_current_stream(gen: torch.Generator, pattern: str) -> None:
    """The input arrives late on a side stream: a launch on any other stream would pack the zeros before it."""
    parsed = parse_pattern(pattern)
    source, kept = random_weight(gen, 128, 256, torch.float16), random_mask(gen, 128, 256, parsed)
    late_weight, late_mask = source.cuda(), kept.cuda()
    weight, mask = torch.zeros_like(late_weight), torch.zeros_like(late_mask)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        cuda_calls.pack(weight, mask, pattern)  # loads the kernels and fills the cache: both may wait for the device
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000_000)  # cycles: some 0.1 s
        weight.copy_(late_weight)
        mask.copy_(late_mask)
        got = cuda_calls.pack(weight, mask, pattern)
        assert not stream.query(), "the call waited for the device"
    stream.synchronize()
    assert_same_bits(got, pack_bits(source, kept, pattern))


@pytest.mark.parametrize("pattern", ["2:4", "2:8", "64:2:8"])
@pytest.mark.parametrize("public", [False, True])
def test_cuda_graph_replays_with_new_input(gen: torch.Generator, pattern: str, public: bool) -> None:
    parsed = parse_pattern(pattern)
    weights = [torch.randn(128, 256, generator=gen).half() for _ in range(3)]
    masks = [random_mask(gen, 128, 256, parsed, drop=0.2) for _ in range(3)]
    weight, mask = weights[0].cuda(), masks[0].cuda()

    def call() -> tuple[Tensor, Tensor, Tensor]:
        if not public:
            return cuda_calls.pack(weight, mask, pattern)
        sparse = ops.pack(weight, mask, pattern, backend="cuda")
        return sparse.values, sparse.codes, sparse.columns_or_empty()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call()
    for new_weight, new_mask in zip(weights[1:], masks[1:], strict=True):
        weight.copy_(new_weight)
        mask.copy_(new_mask)
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(got, pack_bits(new_weight, new_mask, pattern))


@pytest.mark.multigpu
def test_device_of_the_tensor_counts(gen: torch.Generator) -> None:
    weight, mask = random_weight(gen, 64, 64, torch.float16), random_mask(gen, 64, 64, NMPattern(2, 4))
    assert torch.cuda.current_device() == 0
    for index in (1, 0, 1):
        got = cuda_calls.pack(weight.cuda(index), mask.cuda(index), "2:4")
        assert all(tensor.device.index == index for tensor in got)
        assert_same_bits(got, pack_bits(weight, mask, "2:4"), f"on {index}")
        assert torch.cuda.current_device() == 0
        assert torch.zeros(1, device="cuda").device.index == 0
    with torch.cuda.device(1):
        assert_same_bits(cuda_calls.pack(weight.cuda(0), mask.cuda(0), "2:4"), pack_bits(weight, mask, "2:4"))
        assert torch.cuda.current_device() == 1
    with pytest.raises(DeviceMismatchError, match=r"weight on cuda:1, mask on cuda:0"):
        cuda_calls.pack(weight.cuda(1), mask.cuda(0), "2:4")


def test_import_starts_no_cuda() -> None:
    code = (
        "import torch, obs_kernels; from obs_kernels import _ext; _ext.load(); _ext.build_info(); "
        "assert torch.cuda.is_available() and not torch.cuda.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Errors


def test_wrong_devices_dtypes_and_strides() -> None:
    weight, mask = torch.zeros(8, 8, device="cuda"), torch.zeros(8, 8, dtype=torch.bool, device="cuda")
    with pytest.raises(DeviceMismatchError, match="weight on cuda:0, mask on cpu"):
        cuda_calls.pack(weight, mask.cpu(), "2:4")
    with pytest.raises(DeviceMismatchError, match="weight must be on a CUDA device, got cpu"):
        cuda_calls.pack(weight.cpu(), mask.cpu(), "2:4")
    with pytest.raises(DTypeNotSupportedError, match="got int32"):
        cuda_calls.pack(weight.int(), mask, "2:4")
    with pytest.raises(DTypeNotSupportedError, match="mask must be bool"):
        cuda_calls.pack(weight, mask.byte(), "2:4")
    with pytest.raises(ShapeNotSupportedError, match="weight must be contiguous"):
        cuda_calls.pack(weight.t(), mask, "2:4")
    with pytest.raises(ShapeNotSupportedError, match="values, codes and columns must be"):
        outputs = [torch.zeros(4, 4, device="cuda"), *(torch.zeros(0, dtype=torch.uint8, device="cuda"),) * 2]
        cuda_calls.launch_pack(weight, mask, *outputs, pattern=NMPattern(2, 4))
    torch.cuda.synchronize()


def test_failed_call_leaves_no_error_behind(gen: torch.Generator) -> None:
    """A launch after a refused one is not blamed for it."""
    weight, mask = random_weight(gen, 8, 8, torch.float16), random_mask(gen, 8, 8, NMPattern(2, 4))
    on_gpu = weight.cuda()
    address = on_gpu.data_ptr()
    with pytest.raises(RuntimeError, match=r"cudaErrorInvalidDevice.*device_guard\.h"):
        _ext.load().pack(
            weight=address, mask=address, values=address, codes=address, columns=0, rows=8, cols=8, v=0, n=2, m=4,
            element_size=2, device=4711, stream=0,
        )  # fmt: skip
    assert_packs_like_reference(weight, mask, "2:4")
    torch.cuda.synchronize()


# More than 2^31 elements


@pytest.mark.big
@pytest.mark.parametrize(
    ("pattern", "cols"),
    [
        ("2:4", 32768),  # octets
        ("2:4", 32772),  # quads
        ("2:8", 32768),
        ("128:2:8", 32768),
    ],
)
def test_offsets_beyond_31_bits(pattern: str, cols: int) -> None:
    """The last rows, and those around element 2^31, are as if they stood alone."""
    rows = 67584
    assert rows * cols > 2**31 and rows % 128 == 0
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
    gen = torch.Generator(device="cuda").manual_seed(7)
    bits = torch.randint(-32768, 32767, (rows, cols), dtype=torch.int16, device="cuda", generator=gen)
    weight = bits.view(torch.float16)
    small = random_mask(torch.Generator().manual_seed(8), 128, cols, parse_pattern(pattern), drop=0.1)
    mask = small.cuda().repeat(rows // 128, 1)
    values, codes, columns = cuda_calls.pack(weight, mask, pattern)
    boundary = 2**31 // cols // 128 * 128
    for first in (0, boundary, rows - 128):
        part = slice(first, first + 128)
        wanted = pack_bits(weight[part].cpu(), small, pattern)
        panel = columns[first // 128 : first // 128 + 1] if columns.dim() == 3 else columns
        assert_same_bits((values[part], codes[part], panel), wanted, f"at row {first}")
