// SPDX-License-Identifier: Apache-2.0
#include "obs_kernels/inverse.h"

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#include "common/check.h"
#include "common/device_guard.h"
#include "common/launch.h"
#include "fisher/inverse_config.h"
#include "fisher/inverse_group.cuh"
#include "fisher/inverse_solo.cuh"

namespace obs_kernels {
namespace {

template <typename Config, int kVector>
LaunchPlan launch_solo(const InvertParams& params, cudaStream_t stream) {
  const int64_t blocks = (params.num_blocks - 1) / Config::kThreads + 1;
  inverse::invert_solo_kernel<Config, kVector>
      <<<static_cast<unsigned>(blocks), Config::kThreads, 0, stream>>>(params);
  OBS_CUDA_CHECK(cudaGetLastError());
  return {"invert_spd", "solo", blocks, Config::kThreads};
}

template <int kSize>
LaunchPlan launch_solo(const InvertParams& params, bool wide, cudaStream_t stream) {
  using Config = SoloConfig<kSize>;
  if constexpr (Config::kWide) {
    if (wide) return launch_solo<Config, 4>(params, stream);
  }
  return launch_solo<Config, 1>(params, stream);
}

LaunchPlan launch_solo(const InvertParams& params, bool wide, cudaStream_t stream) {
  switch (params.size) {
    case 1:
      return launch_solo<1>(params, wide, stream);
    case 2:
      return launch_solo<2>(params, wide, stream);
    case 3:
      return launch_solo<3>(params, wide, stream);
    case 4:
      return launch_solo<4>(params, wide, stream);
    case 5:
      return launch_solo<5>(params, wide, stream);
    case 6:
      return launch_solo<6>(params, wide, stream);
    case 7:
      return launch_solo<7>(params, wide, stream);
    default:
      return launch_solo<8>(params, wide, stream);
  }
}

template <typename Config, int kVector>
LaunchPlan launch_group(const InvertParams& params, const char* path, cudaStream_t stream) {
  constexpr int kGroups = Config::kThreads / Config::kLanes;
  const int64_t blocks = (params.num_blocks - 1) / kGroups + 1;
  inverse::invert_group_kernel<Config, kVector>
      <<<static_cast<unsigned>(blocks), Config::kThreads, 0, stream>>>(params);
  OBS_CUDA_CHECK(cudaGetLastError());
  return {"invert_spd", path, blocks, Config::kThreads};
}

template <typename Config>
LaunchPlan launch_group(const InvertParams& params,
                        bool wide,
                        const char* path,
                        cudaStream_t stream) {
  if constexpr (Config::kStaged) {
    if (wide) return launch_group<Config, 4>(params, path, stream);
  }
  return launch_group<Config, 1>(params, path, stream);
}

LaunchPlan launch_group(const InvertParams& params, bool wide, cudaStream_t stream) {
  const int64_t size = params.size;
  if (wide && size == 16) return launch_group<Full16, 4>(params, "full16", stream);
  if (wide && size == 32) return launch_group<Full32, 4>(params, "full32", stream);
  if (wide && size == 64) return launch_group<Full64, 4>(params, "full64", stream);
  if (size <= Group16::kSize) return launch_group<Group16>(params, wide, "group16", stream);
  if (size <= Group32::kSize) return launch_group<Group32>(params, wide, "group32", stream);
  if (size <= Group48::kSize) return launch_group<Group48>(params, wide, "group48", stream);
  if (size <= Group52::kSize) return launch_group<Group52>(params, wide, "group52", stream);
  if (size <= Group64::kSize) return launch_group<Group64>(params, wide, "group64", stream);
  if (size <= Group96::kSize) return launch_group<Group96>(params, wide, "group96", stream);
  return launch_group<Group128>(params, wide, "group128", stream);
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
  // An odd matrix is no whole number of pieces of 16 bytes, so that the next one is off alignment;
  // threads that take a matrix each share all pieces of a block, whatever the size.
  const bool aligned16 = aligned(params.matrices, 16) && aligned(params.inverse, 16);
  const LaunchPlan plan = params.size <= kMaxSoloSize
                              ? launch_solo(params, aligned16, stream)
                              : launch_group(params, aligned16 && params.size % 2 == 0, stream);
  count_launch();
  return plan;
}

}  // namespace obs_kernels
