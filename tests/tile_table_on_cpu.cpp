// SPDX-License-Identifier: Apache-2.0
// What the table of tiles says of products, a line each: "rows cols tokens v m feature_x" in; out
// "2:4 tile, cycles, gathering tile or -, its cycles, 1 if that is faster". First, the table.
#include <cstdint>
#include <iostream>

#include "matmul/sparse_config.h"

int main() {
  using namespace obs_kernels;
  constexpr int kMultiprocessors = 132;  // of an H100 and an H200
  for (const TileShape& t : kSparseTiles) {
    std::cout << "sparse," << t.name << ',' << t.rows << ',' << t.tokens << ',' << t.cluster << ','
              << t.split << ',' << t.step_cycles << ',' << t.tile_cycles << '\n';
  }
  for (const TileShape& t : kGatherTiles) {
    std::cout << "gather," << t.name << ',' << t.rows << ',' << t.tokens << ',' << t.cluster << ','
              << t.split << ',' << t.step_cycles << ',' << t.tile_cycles << '\n';
  }
  int64_t rows = 0, cols = 0, tokens = 0, v = 0, m = 0;
  int feature_x = 0;
  while (std::cin >> rows >> cols >> tokens >> v >> m >> feature_x) {
    const ChosenTile whole = choose_sparse_tile(rows, tokens, steps_of(cols), kMultiprocessors);
    const ChosenTile gathered =
        choose_gathered(rows, cols, tokens, v, m, feature_x != 0, kMultiprocessors);
    const bool gathers =
        gather_is_faster_on(rows, cols, tokens, v, m, feature_x != 0, kMultiprocessors);
    std::cout << kSparseTiles[whole.index].name << ',' << whole.cycles << ','
              << (gathered.index < 0 ? "-" : kGatherTiles[gathered.index].name) << ','
              << gathered.cycles << ',' << gathers << '\n';
  }
}
