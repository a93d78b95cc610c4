// SPDX-License-Identifier: Apache-2.0
// Inverse of many small symmetric positive definite matrices, the blocks of a Fisher matrix.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "obs_kernels/errors.h"
#include "obs_kernels/launch_plan.h"

namespace obs_kernels {

// All pointers are device memory, contiguous, and aligned to their element at least; wider
// alignment is used where it is met.
struct InvertParams {
  const float* matrices;  // [num_blocks, size, size]; the lower triangle is read
  const float* damp;      // added to the diagonal: [num_blocks], or one value
  bool damp_each;         // whether damp has a value a block
  float* inverse;         // as matrices, symmetric bit for bit; may be matrices itself
  int32_t* info;          // [num_blocks]: 0, or the failing pivot, 1-based; its block is zeros
  int64_t num_blocks;
  int64_t size;  // 1 to kMaxInvertSize
};

inline constexpr int64_t kMaxInvertSize = 128;

// Inverts on `stream` of `device`, without waiting. A pivot fails unless it and its reciprocal are
// positive and finite. Throws ArgumentError for sizes out of range, CudaError if the launch fails.
LaunchPlan invert_spd(const InvertParams& params, int device, cudaStream_t stream);

}  // namespace obs_kernels
