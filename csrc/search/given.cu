// SPDX-License-Identifier: Apache-2.0
// What a given choice costs, and what its kept weights become.
#include <cuda_runtime.h>

#include <cstdint>

#include "common/check.h"
#include "common/launch.h"
#include "search/choice.h"
#include "search/rows.cuh"

namespace obs_kernels::search {
namespace {

template <int kSize>
__global__ __launch_bounds__(FinishConfig::kThreads,
                             FinishConfig::kMinBlocks) void finish_kernel(SearchParams p) {
  constexpr int kWarps = FinishConfig::kThreads / kWarp;
  __shared__ RowStage<kSize> stages[kWarps];
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp;
  RowStage<kSize>& stage = stages[thread / kWarp];
  const int64_t at = int64_t{blockIdx.x} * kWarps + thread / kWarp;
  if (at >= p.num_groups) return;
  Row<kSize> row;
  load_rows(p, at, lane, stage, row);
  const bool given = lane < static_cast<int>(p.m) && p.mask[at * p.m + lane] != 0;
  const uint32_t kept = __ballot_sync(kAllLanes, given) & row.live;
  const float value = solve_kept(kept, lane, stage, row);
  finish_rows(p, at, lane, kept, value, stage, row);
}

template <int kSize>
LaunchPlan launch(const SearchParams& params, const char* path, cudaStream_t stream) {
  constexpr int kWarps = FinishConfig::kThreads / kWarp;
  const int64_t blocks = (params.num_groups - 1) / kWarps + 1;
  const auto grid = static_cast<unsigned>(blocks);
  finish_kernel<kSize><<<grid, FinishConfig::kThreads, 0, stream>>>(params);
  OBS_CUDA_CHECK(cudaGetLastError());
  count_launch();
  return {"finish_nm", path, blocks, FinishConfig::kThreads};
}

}  // namespace

LaunchPlan launch_finish(const SearchParams& params, cudaStream_t stream) {
  return params.m <= 8    ? launch<8>(params, "given8", stream)
         : params.m <= 16 ? launch<16>(params, "given16", stream)
                          : launch<32>(params, "given32", stream);
}

}  // namespace obs_kernels::search
