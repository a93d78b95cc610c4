// SPDX-License-Identifier: Apache-2.0
// How groups and panels are spread over threads, apart from the kernels.
#pragma once

namespace obs_kernels {

// n <= 2, m <= 16: a thread a group, its curvature in registers, so that nothing is exchanged and
// each pair costs some 25 instructions. A warp stages the blocks of its 32 groups in shared memory,
// kStageRows rows of each at a time, since a thread alone would read them 64 lines at once.
template <int kSizeValue,
          int kStageRowsValue,
          int kStagesValue,
          int kThreadsValue,
          int kMinBlocksValue,
          bool kIndexedValue = false>
struct PairsConfig {
  static constexpr int kSize = kSizeValue;
  static constexpr int kStageRows = kStageRowsValue;
  static constexpr int kStages = kStagesValue;  // buffers: the next is filled while one is read
  static constexpr int kThreads = kThreadsValue;
  static constexpr int kMinBlocks = kMinBlocksValue;
  // Whether the pairs are a loop over shared memory and not unrolled over registers.
  static constexpr bool kIndexed = kIndexedValue;
  // Four floats of padding: eight neighbouring lanes read 16 bytes each from all 32 banks.
  static constexpr int kStride = kSizeValue * kStageRowsValue + 4;
};

using Pairs4 = PairsConfig<4, 4, 1, 128, 8>;
// 34 KiB of shared memory a block, six of which fit an SM: the registers must allow as many.
using Pairs8 = PairsConfig<8, 8, 1, 128, 5>;
// 136 numbers a thread: more than the 168 registers of a third warp a scheduler. Four rows a stage
// and two stages keep two loads of 8 KiB a warp under way.
using Pairs16 = PairsConfig<16, 4, 2, 64, 4, true>;

// n <= 2, m of 17 to 32: a lane a row of the block.
struct WideConfig {
  static constexpr int kSize = 32;
  static constexpr int kThreads = 128;
  static constexpr int kMinBlocks = 5;
};

// n > 2: a warp a group, its lanes over subsets.
struct SetsConfig {
  static constexpr int kThreads = 128;
  // 44 numbers of a half, and what a tree of eliminations adds: below 255 registers they would
  // spill.
  static constexpr int kMinBlocks16 = 2;
  static constexpr int kMinBlocks8 = 5;
  // A block lists the subsets once and walks over groups; 15 blocks an SM of the largest GPUs even
  // out the end.
  static constexpr int kMaxBlocks = 2048;
};

// n > 2, m of 17 to 32: a lane an entry.
struct WideSetsConfig {
  static constexpr int kSize = 32;
  static constexpr int kThreads = 128;
  // A lane has a row of F and one of its inverse: with 128 registers they would spill.
  static constexpr int kMinBlocks = 3;
  // Kept or pruned entries, whichever are fewer, of at most 20,000 sets: comb(17, 7) = 19,448.
  static constexpr int kMaxSide = 7;
};

// Choice of the columns of a panel: threads own column sets, and walk over the rows in order.
// Tables of kRows rows lie entry by entry, so that one address and one load serve all of them.
template <int kThreadsValue, int kMinBlocksValue, int kSetsValue, int kRowsValue>
struct PanelConfig {
  static constexpr int kThreads = kThreadsValue;
  static constexpr int kMinBlocks = kMinBlocksValue;
  static constexpr int kSets = kSetsValue;  // of a thread at a time, sums in registers
  static constexpr int kRows = kRowsValue;  // of a chunk in shared memory
};

using PanelSmall = PanelConfig<128, 8, 1, 4>;   // m <= 8: 70 column sets at most, one each
using PanelMedium = PanelConfig<384, 1, 5, 4>;  // m = 16: 1,820 sets of four in one go, 11 KiB
// m = 32: 496 pairs and 4,960 triples, 21 KiB a row; n > 2: up to 12,870 kept sets of 16, 50 KiB a
// row. As many rows at once as a block can hold, since each chunk of rows reads the lists again;
// 512 threads fill an SM's LSU where one block fits.
template <int kRows>
using PanelLarge = PanelConfig<512, 1, 8, kRows>;
inline constexpr int64_t kPlainBytes = 48
                                       << 10;  // of dynamic shared memory without being asked for
inline constexpr int64_t kPanelStatic = 1024;  // bytes left for what is not a table

inline constexpr int kSumThreads = 128;

}  // namespace obs_kernels
