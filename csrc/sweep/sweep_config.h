// SPDX-License-Identifier: Apache-2.0
// How the rows of a step are spread over threads, apart from the kernels.
#pragma once

namespace obs_kernels {

inline constexpr int kSweepWidth = 128;  // columns of a step at most, and threads side by side
inline constexpr int kRowLanes = 8;      // threads that choose for a row together
inline constexpr int kMaxSets = 128;     // kept sets of a group

// A thread owns a column of the step and kRowsOfThread rows of it, whose part of dw R it keeps in
// registers; for the choice of a group the same threads stand kRowLanes to a row.
template <int kSlotsValue, int kRowsOfThreadValue, int kMinBlocksValue, int kTableRowsValue>
struct SweepConfig {
  static constexpr int kSlots = kSlotsValue;
  static constexpr int kRowsOfThread = kRowsOfThreadValue;
  static constexpr int kRows = kSlots * kRowsOfThread;  // of a block of threads
  static constexpr int kThreads = kSlots * kSweepWidth;
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

}  // namespace obs_kernels
