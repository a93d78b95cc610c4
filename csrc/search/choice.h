// SPDX-License-Identifier: Apache-2.0
// Kernels of obs_kernels/choice.h, and how they are spread over threads.
#pragma once

#include <cuda_runtime_api.h>

#include "obs_kernels/choice.h"

namespace obs_kernels::search {

// A warp a group, a lane a row of the block; blocks as many as the registers of a row allow.
template <int kThreadsValue, int kMinBlocksValue>
struct RowsConfig {
  static constexpr int kThreads = kThreadsValue;
  static constexpr int kMinBlocks = kMinBlocksValue;
};

using FinishConfig = RowsConfig<128, 4>;
using GreedyConfig = RowsConfig<128, 3>;

// A thread a group: what it reads are pieces of rows of its own block in any case.
struct PairwiseConfig {
  static constexpr int kThreads = 128;
};

// A thread an entry of the model.
struct PairModelConfig {
  static constexpr int kThreads = 256;
  static constexpr int kMaxBlocks = 16384;
};

LaunchPlan launch_finish(const SearchParams& params, cudaStream_t stream);
LaunchPlan launch_greedy(const SearchParams& params, cudaStream_t stream);
LaunchPlan launch_pairwise(const PairwiseParams& params, cudaStream_t stream);
LaunchPlan launch_pair_models(const PairModelParams& params, cudaStream_t stream);

}  // namespace obs_kernels::search
