// SPDX-License-Identifier: Apache-2.0
// Tiles of the sparse product and which one a shape takes, apart from the kernel.
#pragma once

#include <algorithm>
#include <cstdint>

namespace obs_kernels {

// A CTA computes 128 rows (two warpgroups of 64, all that 128 sums a thread leave room for) times
// `tokens`; CTAs of a cluster hold different rows of the same tokens, and each brings its share of
// X to all of them.
struct SparseTileShape {
  const char* name;
  int tokens;
  int cluster;
};

inline constexpr SparseTileShape kSparseTiles[] = {
    {"128x256 cluster 2", 256, 2},  // the most work for each byte from L2
    {"128x192 cluster 2", 192, 2},  // fills the last wave of some shapes better
    {"128x128 cluster 2", 128, 2},
    {"128x256", 256, 1},  // one tile of rows has nothing to share
    {"128x128", 128, 1},
};
inline constexpr int kNumSparseTiles = sizeof(kSparseTiles) / sizeof(kSparseTiles[0]);

inline constexpr int kTileRows = 128;
inline constexpr int kStepCols = 64;  // of W in a stage: 128 bytes of X, a row of the swizzle
// Token tiles that CTAs work on at a time: neighbours read the same X and the same W through L2.
inline constexpr int kRasterTokens = 8;

// Cycles of one tile, from the issue rate of wgmma.sp (N / 2 an instruction) and of its reads of
// shared memory; the constant part is filling the pipeline and the epilogue.
inline int64_t tile_cycles(const SparseTileShape& tile, int64_t steps) {
  const int64_t reads = (128 * tile.tokens + 2 * 9216 + tile.tokens * 128) / 128;  // fill, read
  return steps * std::max<int64_t>(2 * tile.tokens, reads) + 1500 + 6 * tile.tokens;
}

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// The tile with the fewest cycles over all waves.
inline int choose_sparse_tile(int64_t rows, int64_t tokens, int64_t steps, int multiprocessors) {
  int best = 0;
  int64_t fewest = INT64_MAX;
  for (int i = 0; i < kNumSparseTiles; ++i) {
    const SparseTileShape& tile = kSparseTiles[i];
    const int64_t row_tiles = round_up(round_up(rows, kTileRows) / kTileRows, tile.cluster);
    const int64_t tiles = row_tiles * (round_up(tokens, tile.tokens) / tile.tokens);
    const int64_t waves = round_up(tiles, multiprocessors) / multiprocessors;
    const int64_t cycles = waves * tile_cycles(tile, steps);
    if (cycles < fewest) {
      fewest = cycles;
      best = i;
    }
  }
  return best;
}

}  // namespace obs_kernels
