// SPDX-License-Identifier: Apache-2.0
// Tiles of the sparse product and which one a shape takes, apart from the kernel.
#pragma once

#include <algorithm>
#include <cstdint>

namespace obs_kernels {

// A CTA computes `rows` times `tokens`, whose sums two or three warpgroups hold in registers.
// Either `cluster` CTAs share what they read, each bringing its share of it to all of them; a CTA
// computes several tiles, one after the other, and takes all columns (split 0). Or, for few tokens,
// whose tiles leave multiprocessors idle, a cluster of `split` CTAs, one to four, shares out the
// columns of a tile, and adds up.
struct TileShape {
  const char* name;
  int rows;
  int tokens;
  int cluster;
  int split;
  // What a step and a tile cost in cycles of 1.7 GHz, beside 3,000 of a launch, fitted to times on
  // an H200 of products of 16 to 12,288 tokens, in graphs, weights from device memory; gathering
  // tiles of 64 tokens or rows so that they compare with 2:4 in the stored bench. The tensor
  // cores alone take rows * tokens / 64 a step, and 1/8 to 1/4 more as they read W from shared
  // memory; the rest is waiting for copies, of which an SM takes 52 to 60 bytes a clock.
  int step_cycles;
  int tile_cycles;  // filling the pipeline, and an epilogue that nothing hides
};

// For W as 2:4. CTAs of a cluster hold different rows of the same tokens, and share X.
inline constexpr TileShape kSparseTiles[] = {
    {"256x192 cluster 2", 256, 192, 2, 0, 980, 4480},  // fewest bytes for a product
    {"192x192 cluster 2", 192, 192, 2, 0, 815, 2800},  // three warpgroups: two waves of 768 x 12288
    {"256x128 cluster 2", 256, 128, 2, 0, 712, 3490},
    {"128x256 cluster 2", 128, 256, 2, 0, 694, 3390},
    {"128x192 cluster 2", 128, 192, 2, 0, 552, 2650},  // fills the last wave of some shapes better
    {"128x128 cluster 2", 128, 128, 2, 0, 432, 1870},
    {"256x192", 256, 192, 1, 0, 1007, 4170},  // where the last cluster would be half empty
    {"128x256", 128, 256, 1, 0, 729, 2880},   // one tile of rows has nothing to share
    {"128x128", 128, 128, 1, 0, 441, 1750},
    {"128x128 split 2", 128, 128, 1, 2, 555, 5010},  // this and what follows: few tokens
    {"128x64", 128, 64, 1, 1, 298, 2700},
    {"128x64 split 2", 128, 64, 1, 2, 330, 4110},
    {"128x64 split 3", 128, 64, 1, 3, 352, 4410},
    {"128x64 split 4", 128, 64, 1, 4, 355, 4640},
    {"64x64", 64, 64, 1, 1, 250, 2550},
    {"64x64 split 2", 64, 64, 1, 2, 265, 3470},
    {"64x64 split 4", 64, 64, 1, 4, 286, 3860},
};
inline constexpr int kNumSparseTiles = sizeof(kSparseTiles) / sizeof(kSparseTiles[0]);

// For a panel's kept columns, which a warpgroup gathers. A tile lies within a panel, so that its
// rows divide v. CTAs of a cluster hold different tokens of the same rows, and share W.
inline constexpr TileShape kGatherTiles[] = {
    {"gather 256x192", 256, 192, 1, 0, 1209, 3770},  // fewest bytes for a product: X for 256 rows
    {"gather 256x128 cluster 2", 256, 128, 2, 0, 845, 3500},
    {"gather 256x128", 256, 128, 1, 0, 883, 3490},
    {"gather 128x384", 128, 384, 1, 0, 1320, 6000},
    {"gather 128x256", 128, 256, 1, 0, 978, 3150},
    {"gather 128x192", 128, 192, 1, 0, 837, 2450},
    {"gather 128x128", 128, 128, 1, 0, 577, 2140},
    {"gather 64x256", 64, 256, 1, 0, 700, 2620},
    {"gather 128x128 split 2", 128, 128, 1, 2, 627, 5840},  // this and what follows: few tokens
    {"gather 128x64", 128, 64, 1, 1, 634, 1900},
    {"gather 128x64 split 2", 128, 64, 1, 2, 546, 3770},
    {"gather 128x64 split 3", 128, 64, 1, 3, 566, 3950},
    {"gather 128x64 split 4", 128, 64, 1, 4, 526, 4600},
};
inline constexpr int kNumGatherTiles = sizeof(kGatherTiles) / sizeof(kGatherTiles[0]);

inline constexpr int kStepCols = 64;  // of W in a stage: 128 bytes of X, a row of the swizzle
// Token tiles that CTAs work on at a time: neighbours read the same X and the same W through L2.
inline constexpr int kRasterTokens = 8;
// The same where panels gather, counted in clusters: each panel reads other columns of X, so that
// all of it has to stay in L2.
inline constexpr int kGatherRasterTokens = 4;

// Of so many each, the last one maybe less.
inline int64_t parts_of(int64_t value, int64_t each) {
  return (value + each - 1) / each;
}

inline int64_t steps_of(int64_t columns) {
  return parts_of(columns, kStepCols);
}

// CTAs that share out the columns of a tile: as the table says, but none is left without a step.
inline int64_t split_of(int tile_split, int64_t steps) {
  return std::clamp<int64_t>(tile_split, 1, std::max<int64_t>(steps, 1));
}

// Tells apart the tiles of a table; a constant of each `case`.
constexpr int tile_key(int rows, int tokens, bool splits) {
  return (rows * 1024 + tokens) * 2 + (splits ? 1 : 0);
}

// A tile and what the product takes with it.
struct ChosenTile {
  int index;  // -1: none fits
  int64_t cycles;
};

// Clusters of so many CTAs that run at a time, at one CTA a multiprocessor: multiprocessors come in
// groups of an even number, which larger clusters do not fill.
inline int64_t room_for(int64_t multiprocessors, int64_t ctas) {
  return std::max<int64_t>(1, (ctas <= 2 ? multiprocessors : multiprocessors * 9 / 10) / ctas);
}

// The tile of a table that takes least, of equal ones the first. groups_of(tile): clusters of it
// that the product is; 0: it does not fit.
template <int kTiles, typename GroupsOf>
ChosenTile choose_tile(const TileShape (&tiles)[kTiles],
                       int64_t steps,
                       int multiprocessors,
                       const GroupsOf& groups_of) {
  ChosenTile best{-1, 0};
  for (int i = 0; i < kTiles; ++i) {
    const TileShape& tile = tiles[i];
    const int64_t groups = groups_of(tile);
    if (groups == 0) continue;
    const int64_t split = split_of(tile.split, steps);
    const int64_t waves = parts_of(groups, room_for(multiprocessors, tile.cluster * split));
    const int64_t cycles = waves * (parts_of(steps, split) * tile.step_cycles + tile.tile_cycles);
    if (best.index < 0 || cycles < best.cycles) best = {i, cycles};
  }
  return best;
}

// For W as 2:4, `steps` of kStepCols of its columns.
inline ChosenTile choose_sparse_tile(int64_t rows,
                                     int64_t tokens,
                                     int64_t steps,
                                     int multiprocessors) {
  return choose_tile(kSparseTiles, steps, multiprocessors, [&](const TileShape& tile) {
    return parts_of(rows, tile.rows * tile.cluster) * parts_of(tokens, tile.tokens);
  });
}

// For the kept columns of panels of v rows.
inline ChosenTile choose_gather_tile(
    int64_t rows, int64_t tokens, int64_t steps, int64_t v, int multiprocessors) {
  return choose_tile(kGatherTiles, steps, multiprocessors, [&](const TileShape& tile) {
    return v % tile.rows == 0
               ? parts_of(rows, tile.rows) * parts_of(tokens, tile.tokens * tile.cluster)
               : 0;
  });
}

// Transposing X first: another launch, whose start and end nothing hides, and bytes through L2 or
// device memory.
inline int64_t transpose_cycles(int64_t tokens, int64_t cols) {
  constexpr int64_t kLaunch = 5000;
  constexpr int64_t kBytesOfCycle = 2100;  // 3.4 to 4.8 TB/s
  return kLaunch + 4 * tokens * cols / kBytesOfCycle;
}

// W as 2:4 on all of its columns.
inline int64_t whole_cycles(int64_t rows, int64_t cols, int64_t tokens, int multiprocessors) {
  return choose_sparse_tile(rows, tokens, steps_of(cols), multiprocessors).cycles;
}

// Gathering the kept columns of a v:2:m weight, with a transposition before it unless x is
// feature-major; no tile if none fits (v = 0: there are no panels).
inline ChosenTile choose_gathered(int64_t rows,
                                  int64_t cols,
                                  int64_t tokens,
                                  int64_t v,
                                  int64_t m,
                                  bool feature_x,
                                  int multiprocessors) {
  if (v == 0) return {-1, 0};
  ChosenTile gathered =
      choose_gather_tile(rows, tokens, steps_of(cols / m * 4), v, multiprocessors);
  if (!feature_x) gathered.cycles += transpose_cycles(tokens, cols);
  return gathered;
}

// Whether that is faster than running the weight as 2:4.
inline bool gather_is_faster_on(int64_t rows,
                                int64_t cols,
                                int64_t tokens,
                                int64_t v,
                                int64_t m,
                                bool feature_x,
                                int multiprocessors) {
  const ChosenTile gathered = choose_gathered(rows, cols, tokens, v, m, feature_x, multiprocessors);
  return gathered.index >= 0 && gathered.cycles < whole_cycles(rows, cols, tokens, multiprocessors);
}

// Of the faster of the two.
inline int64_t product_cycles_on(int64_t rows,
                                 int64_t cols,
                                 int64_t tokens,
                                 int64_t v,
                                 int64_t m,
                                 bool feature_x,
                                 int multiprocessors) {
  const ChosenTile gathered = choose_gathered(rows, cols, tokens, v, m, feature_x, multiprocessors);
  const int64_t whole = whole_cycles(rows, cols, tokens, multiprocessors);
  return gathered.index >= 0 ? std::min(gathered.cycles, whole) : whole;
}

}  // namespace obs_kernels
