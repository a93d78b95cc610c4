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
  // What a step and a tile cost in cycles, fitted to 11 shapes on an H200; wgmma.sp alone would
  // take 2 * tokens a step. A step is bound by L2, where W and the tile's share of X come from.
  int step_cycles;
  int tile_cycles;  // filling the pipeline, and an epilogue that nothing hides
};

inline constexpr SparseTileShape kSparseTiles[] = {
    {"128x256 cluster 2", 256, 2, 820, 4500},
    {"128x192 cluster 2", 192, 2, 650, 4000},  // fills the last wave of some shapes better
    {"128x128 cluster 2", 128, 2, 600, 1800},
    {"128x256", 256, 1, 1080, 4500},  // one tile of rows has nothing to share
    {"128x128", 128, 1, 710, 1800},
};
inline constexpr int kNumSparseTiles = sizeof(kSparseTiles) / sizeof(kSparseTiles[0]);

inline constexpr int kTileRows = 128;
inline constexpr int kStepCols = 64;  // of W in a stage: 128 bytes of X, a row of the swizzle
// Token tiles that CTAs work on at a time: neighbours read the same X and the same W through L2.
inline constexpr int kRasterTokens = 8;

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// The tile with the fewest cycles over all waves.
inline int choose_sparse_tile(int64_t rows, int64_t tokens, int64_t steps, int multiprocessors) {
  int best = 0;
  int64_t fewest = INT64_MAX;
  for (int i = 0; i < kNumSparseTiles; ++i) {
    const SparseTileShape& tile = kSparseTiles[i];
    const int64_t row_groups =
        round_up(rows, kTileRows * tile.cluster) / (kTileRows * tile.cluster);
    const int64_t groups = row_groups * (round_up(tokens, tile.tokens) / tile.tokens);
    const int64_t at_once = std::max(1, multiprocessors / tile.cluster);
    const int64_t waves = round_up(groups, at_once) / at_once;
    const int64_t cycles = waves * (steps * tile.step_cycles + tile.tile_cycles);
    if (cycles < fewest) {
      fewest = cycles;
      best = i;
    }
  }
  return best;
}

}  // namespace obs_kernels
