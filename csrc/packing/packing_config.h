// SPDX-License-Identifier: Apache-2.0
// Launch sizes of packing, apart from the kernels.
#pragma once

#include <algorithm>
#include <cstdint>

namespace obs_kernels {

// Plain n:m and 2:4: a thread owns one group, or the two groups of one byte of codes.
struct PackGroupsConfig {
  // No shared memory and few registers, so any size fills an SM; 256 keeps the tail of a small
  // weight short.
  static constexpr int kThreads = 256;
  // 16.7 M threads, some 60 waves of the largest GPU. A weight above that is walked in strides,
  // which keeps the grid below gridDim.x whatever the size.
  static constexpr int64_t kMaxBlocks = 65536;
};

// Panels: a block owns two neighbouring panels, a thread a row (or several).
struct PackPanelsConfig {
  static constexpr int kWarp = 32;
  // v = 128 is the largest panel in common use; larger ones take more than one row a thread.
  static constexpr int kMaxThreads = 128;
  static constexpr int64_t kMaxBlocks = 65536;

  // Whole warps, because the union of the masks is formed by warp-wide reductions.
  static int threads(int64_t v) {
    return static_cast<int>(std::min<int64_t>((v + kWarp - 1) / kWarp * kWarp, kMaxThreads));
  }
};

}  // namespace obs_kernels
