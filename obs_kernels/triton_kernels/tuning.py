# SPDX-License-Identifier: Apache-2.0
"""Which tile a Triton kernel works on, by shape: plain data, apart from the mathematics.

A launcher takes a record made here, or one that a test or a bench forces.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from obs_kernels.errors import ConfigError

__all__ = [
    "FISHER_CONFIGS",
    "HESSIAN_CONFIG",
    "FisherConfig",
    "GradientsConfig",
    "HessianConfig",
    "fisher_config",
    "gradients_config",
    "hessian_config",
]

MIN_TILE = 16
"""Smallest side of a tensor-core product in Triton."""


@dataclass(frozen=True)
class FisherConfig:
    """Tiles of ``accumulate_fisher_``.

    A tile is ``side`` x ``side`` of the outer product: several Fisher blocks on its diagonal if they are smaller, a
    part of one block if that is larger.
    """

    side: int
    """16, 32, 64 or 128."""
    tiles: int
    """Tiles of a program, from neighbouring Fisher blocks."""
    samples: int
    """Gradients of one product, at least 16."""
    warps: int
    stages: int
    precision: str = "tf32x3"
    """How f32 gradients are multiplied; 16-bit products are exact in any case. "tf32x3" carries 22 bits."""

    def __str__(self) -> str:
        return (
            f"{self.side}x{self.side} tiles={self.tiles} samples={self.samples} warps={self.warps} "
            f"stages={self.stages} {self.precision}"
        )


FISHER_CONFIGS: dict[int, FisherConfig] = {
    # A program moves some 16 KB of F each way: enough bytes in flight an SM with six to eight programs on it, few
    # enough registers (32 of F and 32 of sums a thread) that they fit.
    16: FisherConfig(side=16, tiles=16, samples=32, warps=4, stages=2),
    32: FisherConfig(side=32, tiles=4, samples=32, warps=4, stages=2),
    64: FisherConfig(side=64, tiles=1, samples=32, warps=4, stages=2),
}
"""By side of the tile."""


def fisher_config(block_size: int, num_samples: int, *, config: FisherConfig | None = None) -> FisherConfig:
    """The record for Fisher blocks of ``block_size`` weights; ``config`` forces one, which must be possible.

    Raises:
        ConfigError: the forced record cannot run.
    """
    if config is not None:
        powers = all(value > 0 and value & (value - 1) == 0 for value in (config.side, config.tiles, config.samples))
        if not powers or config.side < MIN_TILE or config.samples < MIN_TILE:
            raise ConfigError(f"config needs powers of two, side and samples at least {MIN_TILE}, got {config}")
        return config
    # Larger than 64: parts of 64 x 64, so that sums and F stay in registers; the gradients of a block are read once
    # for each part, from L2 after the first time.
    side = min(max(slot_width(block_size), MIN_TILE), 64)
    chosen = FISHER_CONFIGS[side]
    # one gradient must not pay for 32
    return replace(chosen, samples=MIN_TILE) if num_samples <= MIN_TILE else chosen


MAX_GRADIENTS_BLOCK = 4096
"""Widest block of ``conjugate_gradients``: at 16 columns a thread, the five tensors of a row fit the registers."""


@dataclass(frozen=True)
class GradientsConfig:
    """How a program of ``conjugate_gradients`` goes through its row."""

    block: int
    """Columns at once, a power of two; a row that fits one block is read once, a longer one three times."""
    warps: int

    def __str__(self) -> str:
        return f"block={self.block} warps={self.warps}"


def gradients_config(cols: int) -> GradientsConfig:
    """The record for rows of ``cols`` weights."""
    block = min(max(slot_width(cols), 128), MAX_GRADIENTS_BLOCK)
    return GradientsConfig(block, warps=min(max(block // 256, 1), 8))


def slot_width(block_size: int) -> int:
    """``block_size`` rounded up to a power of two."""
    return 1 << (block_size - 1).bit_length()


@dataclass(frozen=True)
class HessianConfig:
    """How ``accumulate_hessian_`` cuts tokens and columns; each a power of two, but for ``parts``."""

    tokens: int
    """Tokens of a tile that passes over x or dy, and of one f32 sum."""
    cols: int
    """Columns of such a tile."""
    warps: int
    """Of such a tile."""
    sum_blocks: int
    """Such sums that are added in f64 at once."""
    sum_cols: int
    """Columns of a program that adds them."""
    side: int
    """Of a tile of H."""
    strip: int
    """Rows of H that one product computes; a multiple of ``side``."""
    part: int
    """Most tokens of one product; a multiple of ``tokens``."""
    parts: int
    """Most products of one batched call: it holds each of them."""

    def split(self, num_tokens: int) -> tuple[int, int]:
        """Parts of equal length that ``num_tokens`` fill, the last one perhaps not quite."""
        parts = max(1, -(-num_tokens // self.part))
        each = -(-num_tokens // parts)
        return parts, -(-each // self.tokens) * self.tokens

    def __str__(self) -> str:
        return (
            f"{self.tokens}x{self.cols} warps={self.warps} sums={self.sum_blocks}x{self.sum_cols} side={self.side} "
            f"strip={self.strip} part={self.part}x{self.parts}"
        )


HESSIAN_CONFIG = HessianConfig(
    tokens=32,  # 12,288 tokens make some three programs an SM; the f32 sums are a tenth of what is read
    cols=256,  # rows of 512 bytes, 32 values a thread
    warps=8,
    sum_blocks=64,
    sum_cols=32,
    side=32,  # 300 programs for the triangle of 768 columns
    strip=1024,  # a strip fills the GPU; the narrower, the less is computed left of the diagonal
    part=4096,  # tensor cores cut off what a sum cannot hold, a bias of 3e-5 of it at 8,192 tokens that grows with them
    parts=4,
)


def hessian_config(*, config: HessianConfig | None = None) -> HessianConfig:
    """The record of ``accumulate_hessian_``; ``config`` forces one, which must be possible.

    Raises:
        ConfigError: the forced record cannot run.
    """
    if config is None:
        return HESSIAN_CONFIG
    sizes = (config.tokens, config.cols, config.sum_blocks, config.sum_cols, config.side, config.strip, config.part)
    powers = all(value > 0 and value & (value - 1) == 0 for value in sizes)
    if not powers or config.strip % config.side or config.part % config.tokens or config.parts < 1:
        raise ConfigError(f"config needs powers of two, strip a multiple of side and part one of tokens, got {config}")
    return config
