// SPDX-License-Identifier: Apache-2.0
// How the rows of a step are spread over threads, apart from the kernels.
#pragma once

namespace obs_kernels {

inline constexpr int kSweepWidth = 128;  // columns of a step at most, and threads side by side
inline constexpr int kTallWidth = kSweepWidth / 2;  // the same, of tall panels of n > 2
inline constexpr int kRowLanes = 8;                 // threads that choose for a row together
inline constexpr int kMaxSets = 128;                // kept sets of a group
inline constexpr int kSubsets = 256;                // of eight columns
inline constexpr int kMaxColumnSets = 70;           // of eight columns

// A thread owns a column of the step and kRowsOfThread rows of it, whose part of dw R it keeps in
// registers; for the choice of a group the same threads stand kRowLanes to a row.
template <int kSlotsValue,
          int kRowsOfThreadValue,
          int kMinBlocksValue,
          int kTableRowsValue,
          int kWidthValue = kSweepWidth>
struct SweepConfig {
  static constexpr int kWidth = kWidthValue;
  static constexpr int kSlots = kSlotsValue;
  static constexpr int kRowsOfThread = kRowsOfThreadValue;
  static constexpr int kRows = kSlots * kRowsOfThread;  // of a block of threads
  static constexpr int kThreads = kSlots * kWidth;
  static constexpr int kMinBlocks = kMinBlocksValue;
  static constexpr int kTableRows = kTableRowsValue;  // rows of a panel summed at a time, m = 16
};

// Without panels: 4,096 rows are 128 blocks, one for nearly every SM of an H100. A group is a chain
// of some hundred dependent instructions, so more rows want more blocks an SM, not larger ones.
using SweepRows = SweepConfig<2, 16, 3, 0>;
// n > 2 and m = 16: the matrix of a kept set, or 16 numbers of R, beside the 16 pushed ones.
using SweepRowsWide = SweepConfig<2, 16, 2, 0>;
// A block has one panel, since its columns need the sum over all rows.
using SweepPanel16 = SweepConfig<1, 16, 4, 8>;
using SweepPanel64 = SweepConfig<4, 16, 1, 8>;
// 32 KB of shared memory for what rows hand on leave 11 KB for the tables of four.
using SweepPanel256 = SweepConfig<4, 64, 1, 4>;

// Panels of n > 2. Their tables have what is left of the 48 KB that a kernel may have without
// asking: from 64 gains a row (5 of 8 with seven columns) to 289 (with four, entries dead).
template <int kSlots, int kRowsOfThread, int kMinBlocks, int kTableFloatsValue, int kWidth>
struct SweepSets : SweepConfig<kSlots, kRowsOfThread, kMinBlocks, 0, kWidth> {
  static constexpr int kTableFloats = kTableFloatsValue;
};
using SweepSets16 = SweepSets<1, 16, 4, 16 * 289, kSweepWidth>;  // all rows at a time
using SweepSets64 = SweepSets<4, 16, 1, 64 * 163, kSweepWidth>;  // all, but 4 of 8 with dead ones
using SweepSets128 = SweepSets<4, 32, 1, 128 * 73, kSweepWidth>;
// The eliminated S_KK of a thread needs registers that 64 pushed numbers would take: steps of half
// the width.
using SweepSets256 = SweepSets<8, 32, 1, 256 * 28, kTallWidth>;

}  // namespace obs_kernels
