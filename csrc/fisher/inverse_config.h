// SPDX-License-Identifier: Apache-2.0
// How a matrix is spread over threads, by its size, apart from the kernels.
#pragma once

namespace obs_kernels {

// Matrices up to 64: a group of lanes of one warp holds a matrix in registers. Rows and columns are
// dealt out in chunks of four neighbours: lane (lr, lc) holds the row chunks lr, lr + kLaneRows,
// ... and the column chunks lc, lc + kLaneCols, ...
template <int kLaneRowsValue,
          int kLaneColsValue,
          int kRowChunksValue,
          int kColChunksValue,
          int kThreadsValue,
          int kMinBlocksValue>
struct LanesConfig {
  static constexpr int kLaneRows = kLaneRowsValue;
  static constexpr int kLaneCols = kLaneColsValue;
  static constexpr int kRowChunks = kRowChunksValue;  // of a lane
  static constexpr int kColChunks = kColChunksValue;
  static constexpr int kLanes = kLaneRows * kLaneCols;
  static constexpr int kSize = 4 * kLaneRows * kRowChunks;
  static constexpr int kThreads = kThreadsValue;
  // Blocks that must fit an SM: caps the registers of a thread at 65536 / (kThreads * kMinBlocks).
  static constexpr int kMinBlocks = kMinBlocksValue;

  static_assert(kSize == 4 * kLaneCols * kColChunks, "the matrix must be square");
  static_assert(kLaneRows % kLaneCols == 0,
                "a chunk of columns must know its row chunk statically");
  static_assert(32 % kLanes == 0, "a matrix must not span two warps");
};

// A matrix a thread: no exchange at all, and 16 numbers need no more.
using Lanes4 = LanesConfig<1, 1, 1, 1, 128, 8>;
// Four lanes of 4 x 4: two neighbouring lanes read a whole sector, which one lane alone would not.
using Lanes8 = LanesConfig<2, 2, 1, 1, 128, 8>;
// 4 x 8 a lane: measured on an H200 at 0.7 of a copy, where 8 x 8 (four lanes) reached 0.5.
using Lanes16 = LanesConfig<4, 2, 1, 2, 128, 5>;
// 8 x 16 a lane: 24 numbers for 96 products. One column a lane would need as many pivot numbers as
// products and stop at about 60 % of the memory rate.
// Some 200 registers, so a scheduler has two warps; a third would need 168, and those spill.
using Lanes32 = LanesConfig<4, 2, 2, 4, 64, 4>;
using Lanes64 = LanesConfig<8, 4, 2, 4, 64, 4>;

// Matrices from 65 to 128: a block a matrix, a thread a tile of 8 x 8 on or below the diagonal.
template <int kSizeValue>
struct TilesConfig {
  static constexpr int kSize = kSizeValue;
  static constexpr int kTile = 8;
  static constexpr int kTileRows = kSize / kTile;
  static constexpr int kTiles = kTileRows * (kTileRows + 1) / 2;
  static constexpr int kThreads = (kTiles + 31) / 32 * 32;
  static constexpr int kMinBlocks = 2;  // three fit on sm_90; asked for, they would spill on sm_100
  static_assert(kSize % kTile == 0, "whole tiles");
};

using Tiles96 = TilesConfig<96>;
using Tiles128 = TilesConfig<128>;

}  // namespace obs_kernels
