// SPDX-License-Identifier: Apache-2.0
// Accumulation of the block Fisher matrix from gradients.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "obs_kernels/errors.h"
#include "obs_kernels/launch_plan.h"

namespace obs_kernels {

enum class GradType : int32_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

// All pointers are device memory and aligned to their element at least; wider alignment is used
// where it is met.
struct AccumulateParams {
  const void* grads;   // [num_samples, num_blocks * size], rows contiguous
  GradType grad_type;  // of grads
  int64_t row_stride;  // elements from one gradient to the next
  float* fisher;       // [num_blocks, size, size], contiguous and symmetric
  int64_t num_blocks;
  int64_t size;  // 1 to kMaxAccumulateSize
  int64_t num_samples;
  float scale;
};

inline constexpr int64_t kMaxAccumulateSize = 128;

// fisher += scale * sum_s g_s g_s^T on `stream` of `device`, without waiting. Products and sums are
// f32, in the order of the samples. Of a fisher block the lower triangle may be all that is read;
// the result is as symmetric. Throws ArgumentError for sizes out of range, CudaError if
// the launch fails.
LaunchPlan accumulate_fisher(const AccumulateParams& params, int device, cudaStream_t stream);

}  // namespace obs_kernels
