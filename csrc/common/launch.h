// SPDX-License-Identifier: Apache-2.0
// What launchers of all topics share: the size of a grid, alignment, and the count of launches.
#pragma once

#include <algorithm>
#include <cstdint>

#include "obs_kernels/launch_plan.h"

namespace obs_kernels {

// Blocks for `items` > 0 units of work of which a block does `per_block` at once. Kernels walk over
// what is left, so a capped grid is never wrong, and every grid fits gridDim.x.
inline int64_t grid_size(int64_t items, int64_t per_block, int64_t max_blocks) {
  return std::min((items - 1) / per_block + 1, max_blocks);
}

inline bool aligned(const void* pointer, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// To be called after a launch that the runtime accepted.
void count_launch();

}  // namespace obs_kernels
