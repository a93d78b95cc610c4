// SPDX-License-Identifier: Apache-2.0
// OBS update of the kept weights of Fisher blocks. Block b of D x D belongs to the weights b * D to
// b * D + D - 1 of the flattened weight; what lies beyond the weight's end in the last block takes
// no part.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "obs_kernels/errors.h"
#include "obs_kernels/launch_plan.h"

namespace obs_kernels {

enum class WeightType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

inline constexpr int64_t kMaxUpdateSize = 128;

// All pointers are device memory, contiguous, and aligned to their elements.
struct UpdateParams {
  const void* weight;   // [num_weights]
  const uint8_t* mask;  // [num_weights]: 0 = pruned
  const float* fisher;  // [num_blocks, size, size], symmetric
  const float* damp;    // added to the diagonal: [num_blocks], or one value
  bool damp_each;       // whether damp has a value a block
  void* updated;        // [num_weights], as weight; pruned entries are +0; may be weight itself
  // [num_blocks]: 0, or the first pivot of the kept part that is not positive and finite (1-based,
  // counting kept entries); such a block only loses its pruned weights. Where NaN, Inf, an overflow
  // or a negative damp was met the code is -1 - pivot.
  int32_t* info;
  int64_t num_weights;
  int64_t num_blocks;  // ceil(num_weights / size)
  int64_t size;        // D, 1 to kMaxUpdateSize
  WeightType type;
};

// w_K + F_KK^-1 F_KP w_P of every block: kept weights K make up for the loss of the pruned ones P.
// The pruned side, -F^-1[:, P] [(F^-1)_PP]^-1 w_P, would need F^-1 first, some D^3 operations,
// where the kept side needs at most D^3 / 2 of them and less the more is pruned; so no count of
// kept entries favours it. Runs on `stream` of `device`, without waiting. Throws ArgumentError for
// sizes out of range, CudaError if the launch fails.
LaunchPlan update_joint(const UpdateParams& params, int device, cudaStream_t stream);

// w - sum over pruned p of X[:, p] w_p / X_pp with X = `fisher`, here the inverse of the damped
// Fisher blocks; neither damp nor info is used. A block with a diagonal that is not positive only
// loses its pruned weights.
LaunchPlan update_single(const UpdateParams& params, int device, cudaStream_t stream);

struct LossParams {
  const void* change;   // [num_weights]
  const float* fisher;  // as in UpdateParams
  const float* damp;
  bool damp_each;
  float* loss;  // [num_blocks]
  int64_t num_weights;
  int64_t num_blocks;
  int64_t size;
  WeightType type;
};

// 1/2 dw^T (F + damp I) dw of every block, dw = `change`.
LaunchPlan loss_increase(const LossParams& params, int device, cudaStream_t stream);

}  // namespace obs_kernels
