// SPDX-License-Identifier: Apache-2.0
#include "search/pairs.cuh"

#include <cuda_runtime.h>

#include <cstdint>

#include "common/check.h"
#include "common/launch.h"
#include "search/launches.h"
#include "search/search_config.h"

namespace obs_kernels::search {
namespace {

template <typename Config, bool kExact>
LaunchPlan launch(const Task& task, Mode mode, const char* path, cudaStream_t stream) {
  const int64_t blocks = (task.count - 1) / Config::kThreads + 1;
  const auto grid = static_cast<unsigned>(blocks);
  if (mode == Mode::kGains) {
    pairs_kernel<Config, kExact, Mode::kGains><<<grid, Config::kThreads, 0, stream>>>(task);
  } else {
    pairs_kernel<Config, kExact, Mode::kChoose><<<grid, Config::kThreads, 0, stream>>>(task);
  }
  OBS_CUDA_CHECK(cudaGetLastError());
  count_launch();
  return {"search_nm", path, blocks, Config::kThreads};
}

template <typename Config>
LaunchPlan launch_size(
    const Task& task, Mode mode, const char* path, const char* ragged, cudaStream_t stream) {
  const SearchParams& p = task.groups;
  const bool exact = p.m == Config::kSize && aligned(p.weight, 16) && aligned(p.fisher, 16) &&
                     aligned(p.new_weight, 16) && aligned(p.mask, 4);
  return exact ? launch<Config, true>(task, mode, path, stream)
               : launch<Config, false>(task, mode, ragged, stream);
}

}  // namespace

LaunchPlan launch_pairs(const Task& task, Mode mode, cudaStream_t stream) {
  const int64_t m = task.groups.m;
  if (m <= 4) return launch_size<Pairs4>(task, mode, "pairs4", "pairs4_ragged", stream);
  if (m <= 8) return launch_size<Pairs8>(task, mode, "pairs8", "pairs8_ragged", stream);
  return launch_size<Pairs16>(task, mode, "pairs16", "pairs16_ragged", stream);
}

}  // namespace obs_kernels::search
