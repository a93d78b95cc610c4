// SPDX-License-Identifier: Apache-2.0
// How Fisher blocks are spread over threads, by their size, apart from the kernels. A thread has a
// column of a block: neighbours read neighbouring addresses of every row, whatever the alignment.
#pragma once

namespace obs_kernels {

template <int kSizeValue, int kThreadsValue, int kMinBlocksValue, int kPhaseValue>
struct UpdateConfig {
  static constexpr int kSize = kSizeValue;  // widest Fisher block
  static constexpr int kThreads = kThreadsValue;
  static constexpr int kGroups = kThreads / kSize;            // Fisher blocks of a block of threads
  static constexpr int kWarps = kSize > 32 ? kSize / 32 : 1;  // of a Fisher block
  // Blocks that must fit an SM: caps the registers of a thread at 65536 / (kThreads * kMinBlocks).
  static constexpr int kMinBlocks = kMinBlocksValue;
  // Pivots between two versions of an elimination step, each of them that much shorter.
  static constexpr int kPhase = kPhaseValue;
  // Loads in flight of a thread. A whole column of up to 32 costs no register that the elimination
  // does not need later anyway, and the wait for memory is paid once.
  static constexpr int kDepth = kSize < 32 ? kSize : 32;

  static_assert(kSize % 4 == 0 && kSize % kPhase == 0 && kPhase % 4 == 0, "whole pieces of four");
  static_assert(kSize <= 32 ? 32 % kSize == 0 : kThreads == kSize,
                "a Fisher block has a part of a warp, or all warps of a block of threads");
};

// The bounds are what ptxas reaches without spills from sm_80 to sm_100; with fewer registers some
// architecture spills. Up to 16 that is 1024 to 1280 threads an SM with a whole column in flight
// each, more than memory needs to be kept busy.
using Update4 = UpdateConfig<4, 128, 10, 4>;
using Update8 = UpdateConfig<8, 128, 8, 4>;
using Update16 = UpdateConfig<16, 128, 8, 4>;
// 79 to 90 registers. Phases of 8: of 4 they would save an eighth of the products of a full block
// and double the code.
using Update32 = UpdateConfig<32, 128, 5, 8>;
// 19 KB of shared memory and two warps: eight and more blocks fit an SM.
using Update64 = UpdateConfig<64, 64, 8, 16>;
// 128 registers for a row: at 168 three blocks of four warps fit an SM, at 192 two.
using Update128 = UpdateConfig<128, 128, 3, 32>;

}  // namespace obs_kernels
