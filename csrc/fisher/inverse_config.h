// SPDX-License-Identifier: Apache-2.0
// How a matrix is spread over threads, by its size, apart from the kernels.
#pragma once

#include <cstdint>

namespace obs_kernels {

// Matrices up to kMaxSoloSize: a thread a matrix, 36 numbers at most, which needs no exchange. A
// block stages its matrices through shared memory, so that global memory sees whole lines.
constexpr int64_t kMaxSoloSize = 8;

template <int kSizeValue>
struct SoloConfig {
  static constexpr int kSize = kSizeValue;
  static constexpr int kEntries = kSize * kSize;
  static constexpr bool kWide = kEntries % 4 == 0;  // rows of a matrix in pieces of 16 bytes
  // Floats from one matrix to the next. 4 more than a multiple of 8 for pieces of 16 bytes, or odd
  // for single numbers: neighbouring threads then meet different banks.
  static constexpr int kStride = kWide && kEntries % 8 == 0 ? kEntries + 4 : kEntries;
  static constexpr int kThreads = 128;
};

// Larger matrices: a group of threads holds the lower triangle in registers, some lanes of a warp
// up to 64 and a whole block beyond. Thread (lr, lc) of the grid kLaneRows x kLaneCols holds the
// rows lr, lr + kLaneRows, ... and the columns lc, lc + kLaneCols, ..., so that all have equal
// parts of the triangle: 72 numbers of 8 x 16 in place of the 64 that half of them would be. A step
// reads 8 + 16 numbers for 72 products; one column a lane would read as many as it multiplies, and
// stop at about 60 % of the memory rate.
template <int kLeastValue,
          int kLaneRowsValue,
          int kLaneColsValue,
          int kRowsValue,
          int kColsValue,
          int kThreadsValue,
          int kMinBlocksValue>
struct GroupConfig {
  static constexpr int kLeast = kLeastValue;  // the smallest matrix: what it has needs no test
  static constexpr int kLaneRows = kLaneRowsValue;
  static constexpr int kLaneCols = kLaneColsValue;
  static constexpr int kRows = kRowsValue;  // of a thread
  static constexpr int kCols = kColsValue;
  static constexpr int kLanes = kLaneRows * kLaneCols;
  static constexpr int kSize = kLaneCols * kCols;     // the largest matrix
  static constexpr int kAllRows = kLaneRows * kRows;  // as many, or some more
  static constexpr int kThreads = kThreadsValue;
  // Blocks that must fit an SM: caps the registers of a thread at 65536 / (kThreads * kMinBlocks).
  static constexpr int kMinBlocks = kMinBlocksValue;
  // A block takes a matrix straight from and to global memory: its warps meet whole sectors, and
  // what it computes outweighs the rest. Some lanes of a warp would not, so they pass it on through
  // shared memory.
  static constexpr bool kStaged = kLanes <= 32;
  // Floats from one row of a staged matrix of full size to the next: an odd multiple of 16 bytes,
  // so that eight rows times four columns meet 32 different banks.
  static constexpr int kStride = kAllRows / 8 * 8 + 4 + (kAllRows % 8 > 4 ? 8 : 0);
  // Of a group. Not a multiple of 32, so that the groups of a warp meet other banks.
  static constexpr int kStagedSize = (kAllRows * kStride + 31) / 32 * 32 + (kLanes == 4 ? 8 : 16);
  // Of W: the numbers of a lane row lie together, and those of a lane column, in pieces of 16 bytes
  // that differ in their banks.
  static constexpr int kRowPitch = (kRows + 3) / 4 * 4;
  static constexpr int kColPieces = (kCols + 3) / 4 * 4;
  static constexpr int kColPitch = kColPieces % 16 == 0 ? kColPieces + 4 : kColPieces;

  static_assert(kAllRows >= kSize && kAllRows - kSize < 8, "the matrix must be square");
  static_assert(kStride >= kAllRows, "a row must hold the mirror image of a column");
  static_assert(kColPitch * kLaneCols >= kAllRows, "padding rows must stay in their own place");
  static_assert(kLaneRows % kLaneCols == 0, "whether an entry is stored must not depend on lanes");
  static_assert(32 % kLanes == 0 || kLanes == kThreads, "a group is part of a warp, or the block");
};

// The reasons are shares of a copy on an H100 (bench/micro/inverse_variants.cu).
// 0.93, as 16 lanes; four lanes of 8 x 8 reach 0.85.
using Group16 = GroupConfig<9, 4, 2, 4, 8, 64, 12>;
// 0.98; eight lanes of 8 x 16 reach 0.97 with 129 registers in place of 86.
using Group32 = GroupConfig<17, 4, 4, 8, 8, 64, 8>;
using Group48 = GroupConfig<33, 8, 4, 6, 12, 64, 8>;
// 0.74 at D = 50; of Group64 an eighth of the rows and a fifth of the columns would be padding.
using Group52 = GroupConfig<49, 8, 4, 7, 13, 64, 7>;
using Group64 = GroupConfig<53, 8, 4, 8, 16, 64, 6>;
// 0.44 both. 64 threads gain little, and spill or run with half the warps.
using Group96 = GroupConfig<65, 16, 8, 6, 12, 128, 4>;
using Group128 = GroupConfig<97, 16, 8, 8, 16, 128, 3>;

// Where every matrix has the full size, no entry needs a test and rows are padded against bank
// conflicts: 0.97 in place of 0.76 at D = 32.
using Full16 = GroupConfig<16, 4, 2, 4, 8, 64, 12>;
using Full32 = GroupConfig<32, 4, 4, 8, 8, 64, 8>;
using Full64 = GroupConfig<64, 8, 4, 8, 16, 64, 6>;

}  // namespace obs_kernels
