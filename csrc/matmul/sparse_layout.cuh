// SPDX-License-Identifier: Apache-2.0
// What the parts of the sparse product share: sizes of shared memory, arguments, and which tile a
// CTA computes when.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "matmul/sparse_config.h"
#include "obs_kernels/matmul.h"

namespace obs_kernels {

inline constexpr int kWarpgroup = 128;
inline constexpr int kConsumers = 2;  // warpgroups, kTileRows / 64
inline constexpr int kSparseThreads = (kConsumers + 1) * kWarpgroup;
inline constexpr int kSharedLimit = 227 * 1024;
inline constexpr int kSlabTokens = 64;       // of a box of X, and of a box of Y
inline constexpr int kSlabBytes = 64 * 128;  // 64 tokens of 64 columns, or 64 columns of 64 tokens
inline constexpr int kHalfTileBytes = static_cast<int>(kPackedBytes) / kConsumers;
// Slabs of Y that a warpgroup has on their way out; a fourth would cost a stage.
inline constexpr int kBuffers = 3;
inline constexpr int kEpilogueBytes = kConsumers * kBuffers * kSlabBytes;

// Sizes of shared memory for a tile of kTokens tokens.
template <int kTokens>
struct SparseStages {
  static constexpr int kSlabs = kTokens / kSlabTokens;
  static constexpr int kStageBytes = kTokens * 128 + static_cast<int>(kPackedBytes);
  static constexpr int kAround = 1024 + kEpilogueBytes + 256;  // alignment, epilogue, barriers
  static constexpr int kStages = (kSharedLimit - kAround) / kStageBytes;
  static constexpr int kBytes = kAround + kStages * kStageBytes;
  static_assert(kStages >= 3, "a stage is multiplied, one is fetched to registers, one is filled");
  static_assert(kSlabs >= 2,
                "each CTA of a cluster of two brings a part, which keeps them in step");
  static_assert(kSlabs <= 2 * kBuffers, "two passes write a tile of Y");
  static_assert(kStageBytes % 1024 == 0, "the swizzle wants stages of whole patterns");
};

template <typename Element>
struct SparseArgs {
  const uint8_t* packed;
  const Element* bias;
  Element* y;
  int64_t rows;
  int64_t tokens;
  int steps;       // of kStepCols columns
  int row_tiles;   // that exist; those of the last cluster may be more
  int row_groups;  // row tiles / cluster, rounded up
  int token_tiles;
  int cluster;
  Activation activation;
  bool feature_y;
  bool boxes;  // y is written by the copy engine; else element by element, for odd sizes
};

struct TilePlace {
  int row_tile;
  int token_tile;
};

// Tiles in groups of kRasterTokens token tiles; within a group the tokens run first.
__device__ __forceinline__ TilePlace
place_of(int tile, int row_groups, int token_tiles, int cluster, int rank) {
  const int whole = kRasterTokens * row_groups;
  const int first = tile / whole * kRasterTokens;
  const int width = min(kRasterTokens, token_tiles - first);
  const int in = tile % whole;
  return {in / width * cluster + rank, first + in % width};
}

}  // namespace obs_kernels
