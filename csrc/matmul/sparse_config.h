// SPDX-License-Identifier: Apache-2.0
// Tiles of the sparse product and which one a shape takes, apart from the kernel.
#pragma once

#include <algorithm>
#include <cstdint>

namespace obs_kernels {

// A CTA computes `rows` times `tokens`, whose sums two warpgroups hold in registers; CTAs of a
// cluster hold different rows of the same tokens, and each brings its share of X to all of them.
struct SparseTileShape {
  const char* name;
  int rows;
  int tokens;
  int cluster;
  // What a step and a tile cost in cycles, fitted to 9 shapes on an H200 (2.5 % rms). The tensor
  // cores alone take rows * tokens / 64 a step, and 1/8 to 1/4 more as they read W from shared
  // memory; the rest is waiting for copies, of which an SM takes 52 bytes a clock.
  int step_cycles;
  int tile_cycles;  // filling the pipeline, and an epilogue that nothing hides
};

inline constexpr SparseTileShape kSparseTiles[] = {
    {"256x192 cluster 2", 256, 192, 2, 1045, 6130},  // fewest bytes for a product
    {"256x128 cluster 2", 256, 128, 2, 760, 3520},
    {"128x256 cluster 2", 128, 256, 2, 724, 3970},
    {"128x192 cluster 2", 128, 192, 2, 561, 3650},  // fills the last wave of some shapes better
    {"128x128 cluster 2", 128, 128, 2, 457, 1840},
    {"256x192", 256, 192, 1, 1055, 5920},  // where the last cluster would be half empty
    {"128x256", 128, 256, 1, 808, 3500},   // one tile of rows has nothing to share
    {"128x128", 128, 128, 1, 541, 1510},
};
inline constexpr int kNumSparseTiles = sizeof(kSparseTiles) / sizeof(kSparseTiles[0]);

// Of a panel's kept columns, which a warpgroup gathers. A tile lies within a panel, so that its
// rows divide v.
struct GatherTileShape {
  const char* name;
  int rows;
  int tokens;
  int step_cycles;
  int tile_cycles;
};

inline constexpr GatherTileShape kGatherTiles[] = {
    {"gather 256x192", 256, 192, 1300, 6130},
    {"gather 256x128", 256, 128, 900, 3520},
    {"gather 128x256", 128, 256, 1100, 3970},
    {"gather 128x192", 128, 192, 850, 3650},
    {"gather 128x128", 128, 128, 600, 1840},
    {"gather 64x256", 64, 256, 1000, 2500},
};
inline constexpr int kNumGatherTiles = sizeof(kGatherTiles) / sizeof(kGatherTiles[0]);

inline constexpr int kStepCols = 64;  // of W in a stage: 128 bytes of X, a row of the swizzle
// Token tiles that CTAs work on at a time: neighbours read the same X and the same W through L2.
inline constexpr int kRasterTokens = 8;

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Cycles of a product by a tile, its CTAs all of a size and in waves.
inline int64_t product_cycles(int64_t groups, int64_t at_once, int64_t cycles_of_one) {
  return round_up(groups, at_once) / at_once * cycles_of_one;
}

// The tile with the fewest cycles over all waves.
inline int choose_sparse_tile(int64_t rows, int64_t tokens, int64_t steps, int multiprocessors) {
  int best = 0;
  int64_t fewest = INT64_MAX;
  for (int i = 0; i < kNumSparseTiles; ++i) {
    const SparseTileShape& tile = kSparseTiles[i];
    const int64_t row_groups =
        round_up(rows, tile.rows * tile.cluster) / (tile.rows * tile.cluster);
    const int64_t groups = row_groups * (round_up(tokens, tile.tokens) / tile.tokens);
    const int64_t cycles = product_cycles(groups,
                                          std::max(1, multiprocessors / tile.cluster),
                                          steps * tile.step_cycles + tile.tile_cycles);
    if (cycles < fewest) {
      fewest = cycles;
      best = i;
    }
  }
  return best;
}

// The same among those whose rows divide v; -1 if none does.
inline int choose_gather_tile(
    int64_t rows, int64_t tokens, int64_t steps, int64_t v, int multiprocessors) {
  int best = -1;
  int64_t fewest = INT64_MAX;
  for (int i = 0; i < kNumGatherTiles; ++i) {
    const GatherTileShape& tile = kGatherTiles[i];
    if (v % tile.rows != 0) continue;
    const int64_t pair = 2 * tile.tokens;
    const int64_t groups = rows / tile.rows * (round_up(tokens, pair) / pair);
    const int64_t cycles = product_cycles(
        groups, std::max(1, multiprocessors / 2), steps * tile.step_cycles + tile.tile_cycles);
    if (cycles < fewest) {
      fewest = cycles;
      best = i;
    }
  }
  return best;
}

}  // namespace obs_kernels
