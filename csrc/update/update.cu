// SPDX-License-Identifier: Apache-2.0
#include "obs_kernels/update.h"

#include <cuda_runtime.h>

#include <cstdint>

#include "common/check.h"
#include "common/device_guard.h"
#include "common/launch.h"
#include "update/check.h"
#include "update/joint.cuh"
#include "update/update_config.h"

namespace obs_kernels {
namespace {

template <typename Config>
LaunchPlan launch_joint(const UpdateParams& params, const char* path, cudaStream_t stream) {
  const int64_t blocks = (params.num_blocks - 1) / Config::kGroups + 1;
  update::joint_kernel<Config>
      <<<static_cast<unsigned>(blocks), Config::kThreads, 0, stream>>>(params);
  OBS_CUDA_CHECK(cudaGetLastError());
  return {"update_joint", path, blocks, Config::kThreads};
}

}  // namespace

LaunchPlan update_joint(const UpdateParams& params, int device, cudaStream_t stream) {
  update::check_sizes(params, device);
  if (params.num_blocks == 0) return {"update_joint", "empty", 0, 0};
  OBS_CHECK(
      params.weight && params.mask && params.fisher && params.damp && params.updated && params.info,
      "weight, mask, fisher, damp, updated and info must not be null for ",
      params.num_blocks,
      " blocks");
  update::check_alignment(params.type, params.weight, params.updated, params.fisher);
  const DeviceGuard guard(device);
  const LaunchPlan plan = update::for_size(params.size, [&](auto config, const char* path) {
    return launch_joint<decltype(config)>(params, path, stream);
  });
  count_launch();
  return plan;
}

}  // namespace obs_kernels
