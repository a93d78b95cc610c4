// SPDX-License-Identifier: Apache-2.0
// Packing: a dense weight and its mask become values, codes and columns (stored format version 1).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "obs_kernels/errors.h"
#include "obs_kernels/launch_plan.h"

namespace obs_kernels {

// K = cols / m * n slots a row. All pointers are device memory, dense row-major, and aligned to
// their element at least; wider alignment is used where it is met.
struct PackParams {
  const void* weight;   // [rows, cols], elements of element_size bytes, moved bit for bit
  const uint8_t* mask;  // [rows, cols], non-zero = kept
  void* values;         // [rows, K], as weight; a free slot gets zero bits
  uint8_t* codes;       // [rows, ceil(K / 4)] for 2:4 and panels (2 bits a slot), else [rows, K]
  uint8_t* columns;     // [rows / v, cols / m, 4] for panels; unused if v == 0
  int64_t rows;
  int64_t cols;
  int64_t v;             // rows of a panel; 0 = no panels (plain n:m)
  int64_t n;             // kept of each group; panels need 2
  int64_t m;             // columns of a group, at most 64
  int64_t element_size;  // 2, 4 or 8
};

// Packs on `stream` of `device`, without waiting. A mask with more than n kept in a group, or more
// than four columns in a panel, loses the highest positions; nothing is written out of bounds.
// Throws ArgumentError for sizes that do not fit each other, CudaError if the launch fails.
LaunchPlan pack(const PackParams& params, int device, cudaStream_t stream);

}  // namespace obs_kernels
