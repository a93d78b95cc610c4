// SPDX-License-Identifier: Apache-2.0
// n:m: every row for itself.
#include <cuda_runtime.h>

#include <cstdint>

#include "common/check.h"
#include "common/launch.h"
#include "sweep/launches.h"
#include "sweep/sweep.cuh"
#include "sweep/sweep_config.h"

namespace obs_kernels::sweep {
namespace {

template <typename Config, int kM, int kN>
__global__ __launch_bounds__(Config::kThreads, Config::kMinBlocks) void rows_kernel(SweepParams p) {
  __shared__ Stage<Config, kM> stage;
  const auto pick = [&](uint64_t columns, uint32_t open, int row, int lane) {
    return best_inside<Config, kM, kN>(p, columns, open, row, lane, stage);
  };
  sweep_step<Config, kM, kN, false>(p, stage, [](const Place&) {}, pick);
}

template <typename Config, int kM, int kN>
LaunchPlan launch(const SweepParams& params, const char* path, cudaStream_t stream) {
  const int64_t blocks = (params.rows - 1) / Config::kRows + 1;
  rows_kernel<Config, kM, kN>
      <<<static_cast<unsigned>(blocks), Config::kThreads, 0, stream>>>(params);
  OBS_CUDA_CHECK(cudaGetLastError());
  count_launch();
  return {"sweep_columns", path, blocks, Config::kThreads};
}

}  // namespace

LaunchPlan launch_rows(const SweepParams& params, cudaStream_t stream) {
  if (params.n <= 2) {
    if (params.m <= 4) return launch<SweepRows, 4, 2>(params, "rows4", stream);
    if (params.m <= 8) return launch<SweepRows, 8, 2>(params, "rows8", stream);
    return launch<SweepRowsWide, 16, 2>(params, "rows16", stream);
  }
  if (params.n <= 4) return launch<SweepRowsWide, 8, 4>(params, "rows8_4", stream);
  return launch<SweepRowsWide, 8, 7>(params, "rows8_7", stream);
}

}  // namespace obs_kernels::sweep
