// SPDX-License-Identifier: Apache-2.0
#include "obs_kernels/inverse.h"

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#include "common/check.h"
#include "common/device_guard.h"
#include "common/launch.h"
#include "fisher/inverse_config.h"
#include "fisher/inverse_lanes.cuh"
#include "fisher/inverse_tiles.cuh"

namespace obs_kernels {
namespace {

template <typename Config, int kVector>
LaunchPlan launch_lanes(const InvertParams& params, const char* path, cudaStream_t stream) {
  constexpr int kGroups = Config::kThreads / Config::kLanes;
  const int64_t blocks = (params.num_blocks - 1) / kGroups + 1;
  inverse::invert_lanes_kernel<Config, kVector>
      <<<static_cast<unsigned>(blocks), Config::kThreads, 0, stream>>>(params);
  OBS_CUDA_CHECK(cudaGetLastError());
  return {"invert_spd", path, blocks, Config::kThreads};
}

template <typename Config, int kVector>
LaunchPlan launch_tiles(const InvertParams& params, const char* path, cudaStream_t stream) {
  inverse::invert_tiles_kernel<Config, kVector>
      <<<static_cast<unsigned>(params.num_blocks), Config::kThreads, 0, stream>>>(params);
  OBS_CUDA_CHECK(cudaGetLastError());
  return {"invert_spd", path, params.num_blocks, Config::kThreads};
}

template <int kVector>
LaunchPlan launch(const InvertParams& params, cudaStream_t stream) {
  const int64_t size = params.size;
  if (size <= Lanes4::kSize) return launch_lanes<Lanes4, kVector>(params, "lanes4", stream);
  if (size <= Lanes8::kSize) return launch_lanes<Lanes8, kVector>(params, "lanes8", stream);
  if (size <= Lanes16::kSize) return launch_lanes<Lanes16, kVector>(params, "lanes16", stream);
  if (size <= Lanes32::kSize) return launch_lanes<Lanes32, kVector>(params, "lanes32", stream);
  if (size <= Lanes64::kSize) return launch_lanes<Lanes64, kVector>(params, "lanes64", stream);
  if (size <= Tiles96::kSize) return launch_tiles<Tiles96, kVector>(params, "tiles96", stream);
  return launch_tiles<Tiles128, kVector>(params, "tiles128", stream);
}

bool aligned(const void* pointer, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

void check(const InvertParams& params) {
  OBS_CHECK(params.size >= 1 && params.size <= kMaxInvertSize,
            "size must be 1 to ",
            kMaxInvertSize,
            ", got ",
            params.size);
  // One block of threads for at least one matrix: gridDim.x is the limit.
  OBS_CHECK(params.num_blocks >= 0 && params.num_blocks <= std::numeric_limits<int32_t>::max(),
            "num_blocks must be 0 to 2^31 - 1, got ",
            params.num_blocks);
}

}  // namespace

LaunchPlan invert_spd(const InvertParams& params, int device, cudaStream_t stream) {
  check(params);
  if (params.num_blocks == 0) return {"invert_spd", "empty", 0, 0};
  OBS_CHECK(params.matrices && params.damp && params.inverse && params.info,
            "matrices, damp, inverse and info must not be null for ",
            params.num_blocks,
            " blocks");
  OBS_CHECK(aligned(params.matrices, sizeof(float)) && aligned(params.inverse, sizeof(float)),
            "matrices and inverse must be aligned to their elements, got ",
            params.matrices,
            " and ",
            params.inverse);
  OBS_CHECK(device >= 0, "device must be an index, got ", device);
  const DeviceGuard guard(device);
  const auto fits = [&](int vector) {
    const uintptr_t bytes = sizeof(float) * static_cast<uintptr_t>(vector);
    return params.size % vector == 0 && aligned(params.matrices, bytes) &&
           aligned(params.inverse, bytes);
  };
  const LaunchPlan plan = fits(4)   ? launch<4>(params, stream)
                          : fits(2) ? launch<2>(params, stream)
                                    : launch<1>(params, stream);
  count_launch();
  return plan;
}

}  // namespace obs_kernels
