// SPDX-License-Identifier: Apache-2.0
// What the parts of the sparse product share: sizes of shared memory, arguments, and which tile a
// CTA computes when.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/hopper.cuh"
#include "matmul/sparse_config.h"
#include "obs_kernels/matmul.h"

namespace obs_kernels {

inline constexpr int kWarpgroup = 128;
inline constexpr int kConsumers = 2;  // warpgroups
inline constexpr int kSparseThreads = (kConsumers + 1) * kWarpgroup;
inline constexpr int kPartRows = 64;  // of a product
inline constexpr int kSharedLimit = 227 * 1024;
inline constexpr int kSlabTokens = 64;       // of a box of X, and of a box of Y
inline constexpr int kSlabBytes = 64 * 128;  // 64 tokens of 64 columns, or 64 columns of 64 tokens
inline constexpr int kWeightBytes = static_cast<int>(kPackedBytes);  // of 64 rows in a step
inline constexpr int kValueBytes = 64 * 64;                          // of them; then metadata
// Slabs of Y that a warpgroup has on their way out; a fourth would cost a stage.
inline constexpr int kBuffers = 3;
inline constexpr int kEpilogueBytes = kConsumers * kBuffers * kSlabBytes;

// Sizes for a tile of kTokens tokens whose sums two warpgroups hold, each of kParts times 64 rows:
// rows of its own of all tokens, or, if kShareRows, the same rows of half the tokens.
template <int kParts_, int kTokens_, bool kShareRows_ = false>
struct SparseTile {
  static constexpr int kParts = kParts_;
  static constexpr int kTokens = kTokens_;
  static constexpr bool kShareRows = kShareRows_;
  static constexpr int kWeightTiles = kShareRows ? kParts : kConsumers * kParts;
  static constexpr int kRows = kWeightTiles * kPartRows;
  static constexpr int kSumTokens = kShareRows ? kTokens / kConsumers : kTokens;
  static constexpr int kSlabs = kTokens / kSlabTokens;
  static constexpr int kTokenBytes = kSlabs * kSlabBytes;  // of a stage; W follows
  // The swizzle wants stages of whole patterns.
  static constexpr int kStageBytes =
      (kTokenBytes + kWeightTiles * kWeightBytes + 1023) / 1024 * 1024;
  static constexpr int kAround = 1024 + kEpilogueBytes + 256;  // alignment, epilogue, barriers
  static constexpr int kStages = (kSharedLimit - kAround) / kStageBytes;
  static constexpr int kBytes = kAround + kStages * kStageBytes;
  static_assert(kStages >= 3, "one is multiplied, two are on their way");
};

template <typename Element>
struct SparseArgs {
  const uint8_t* packed;
  const Element* bias;
  Element* y;
  int64_t rows;
  int64_t tokens;
  int steps;         // of kStepCols columns
  int weight_tiles;  // of 64 rows, that exist; those of the last cluster may be more
  int row_groups;    // of the rows of a cluster
  int token_tiles;
  int cluster;
  Activation activation;
  bool feature_y;
  bool boxes;  // y is written by the copy engine; else element by element, for odd sizes
};

// Tiles of a cluster: the first, how many on the next one is, and how many there are.
template <typename Element>
__device__ __forceinline__ int first_tile(const SparseArgs<Element>& args) {
  return static_cast<int>(blockIdx.x) / args.cluster;
}
template <typename Element>
__device__ __forceinline__ int tile_stride(const SparseArgs<Element>& args) {
  return static_cast<int>(gridDim.x) / args.cluster;
}
template <typename Element>
__device__ __forceinline__ int num_tiles(const SparseArgs<Element>& args) {
  return args.row_groups * args.token_tiles;
}

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

// W of the first stages of this CTA to L2, by one thread: weights are what nothing before had to
// bring, and rows beyond the last tile have none.
template <typename Element, typename Tile>
__device__ __forceinline__ void prefetch_weight(const SparseArgs<Element>& args, int row_tile) {
  const int steps = min(args.steps, Tile::kStages);
#pragma unroll
  for (int i = 0; i < Tile::kWeightTiles; ++i) {
    const int64_t at = min(row_tile * Tile::kWeightTiles + i, args.weight_tiles - 1);
    hopper::prefetch_bytes(args.packed + at * args.steps * kPackedBytes,
                           static_cast<uint32_t>(steps * kPackedBytes));
  }
}

}  // namespace obs_kernels
