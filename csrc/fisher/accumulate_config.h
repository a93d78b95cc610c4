// SPDX-License-Identifier: Apache-2.0
// How Fisher blocks are spread over threads, by their size, apart from the kernels.
#pragma once

#include <algorithm>
#include <cstdint>

namespace obs_kernels {

// Fisher blocks up to kSize: a thread a block, its products in registers.
template <int kSizeValue>
struct ThreadConfig {
  static constexpr int kSize = kSizeValue;
  static constexpr int kThreads = 128;
  // At most 96 registers for 36 sums and 32 words of gradients on their way, 64 for up to 10 sums.
  static constexpr int kMinBlocks = kSize > 4 ? 5 : 8;
  // Gradients on their way to a thread: words of 4 bytes, and loads, each with an address.
  static constexpr int kWordsAhead = 32;
  static constexpr int kLoadsAhead = 16;
  static constexpr int kPiecesAhead = 8;  // of F
  // Asking for F at the start costs 5 to 24 % at almost all sizes (H100, accumulate_variants.cu).
  static constexpr bool kPrefetch = false;
};
inline constexpr int kMaxThreadSize = 8;

// Larger Fisher blocks: a thread a tile of 8 x 8 on or below the diagonal of one.
inline constexpr int kAccumulateTile = 8;

template <bool kDirectValue,
          int kStagesValue,
          int kStageBytesValue,
          bool kPrefetchValue = false,
          int kMaxThreadsValue = 160,
          int kMinBlocksValue = 3>
struct StagedConfig {
  // Whether each thread adds its own tile to F: the rows of tiles must be whole sectors. Else F is
  // read and written in order, and the sums go through shared memory.
  static constexpr bool kDirect = kDirectValue;
  static constexpr int kStages = kStagesValue;  // one is computed, the others are on their way
  static constexpr int kStageBytes = kStageBytesValue;
  // Whether F is asked for at the start.
  static constexpr bool kPrefetch = kPrefetchValue;
  static constexpr int kMaxThreads = kMaxThreadsValue;
  static constexpr int kMinBlocks = kMinBlocksValue;  // 3: 128 registers, 64 of them sums
  static_assert(kStages >= 2, "a stage must arrive while another is computed");
};
using TilesDirect = StagedConfig<true, 3, 8192>;
using TilesInBands = StagedConfig<false, 3, 8192>;
// The one case that gains from asking for F early: 0.87 in place of 0.80 of the floor at D = 50.
using TilesInBandsOf16Bits = StagedConfig<false, 3, 8192, true>;

// What the size of the blocks and their number of samples leave to decide.
struct TilesShape {
  int tile_rows;        // of a Fisher block
  int tiles;            // of a Fisher block
  int blocks;           // Fisher blocks of a CTA, neighbours
  int threads;          // of a CTA
  int samples;          // of a stage
  int pitch;            // bytes of a staged sample
  int piece_bytes;      // of a copy: what alignment allows
  bool fisher_aligned;  // to 16 bytes
};

// Fisher blocks of a CTA by tile rows: so many that the tiles nearly fill whole warps, few enough
// that a staged sample is at most 512 columns.
//                                              16  24  32  40 48 56 64 72 80 88 96 .. 128
inline constexpr int kBlocksByTileRows[] = {0, 0, 32, 16, 16, 8, 6, 4, 4, 2, 2, 2, 2, 1, 1, 1, 1};
inline constexpr int kMaxStageSamples = 16;  // so that 32 samples already overlap

inline TilesShape tiles_shape(int64_t size,
                              int64_t num_samples,
                              int element_bytes,
                              int stage_bytes,
                              int piece_bytes,
                              bool fisher_aligned,
                              int blocks) {
  TilesShape shape{};
  shape.tile_rows = static_cast<int>((size - 1) / kAccumulateTile + 1);
  shape.tiles = shape.tile_rows * (shape.tile_rows + 1) / 2;
  shape.blocks = blocks;
  shape.threads = (shape.blocks * shape.tiles + 31) / 32 * 32;
  shape.pitch = shape.blocks * shape.tile_rows * kAccumulateTile * element_bytes;
  // As many as fit a stage, and then no more than an even share.
  const int most = std::min(kMaxStageSamples, stage_bytes / shape.pitch);
  const int64_t stages = (num_samples - 1) / most + 1;
  shape.samples = static_cast<int>((num_samples - 1) / stages + 1);
  shape.piece_bytes = piece_bytes;
  shape.fisher_aligned = fisher_aligned;
  return shape;
}

}  // namespace obs_kernels
