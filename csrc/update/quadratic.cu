// SPDX-License-Identifier: Apache-2.0
// Products of Fisher blocks, or of their inverses, with one vector each: bound by memory alone.
#include <cuda_runtime.h>

#include <cstdint>

#include "common/check.h"
#include "common/device_guard.h"
#include "common/launch.h"
#include "obs_kernels/update.h"
#include "update/check.h"
#include "update/columns.cuh"
#include "update/update_config.h"

namespace obs_kernels {
namespace update {
namespace {

// Loads in flight of a thread, and threads that must fit an SM: 64 KB in flight, twice what the
// memory of an H200 needs to be kept busy, at 40 to 48 registers.
constexpr int kDepth = 16;
constexpr int kThreadsOfSM = 1024;

template <typename Config>
struct Line {
  alignas(16) float at[Config::kSize];
};

template <typename Config>
__device__ __forceinline__ const float* matrix_of(const float* all,
                                                  const Place<Config>& place,
                                                  int64_t size) {
  return all + (place.live ? place.block * size * size : 0);
}

// sum_i F_i,lane factors[i]; `factors` are in shared memory, and zeros beyond `size`.
template <typename Config>
__device__ __forceinline__ float column_sum(
    const float* matrix, const float* factors, int lane, int size, bool live) {
  constexpr int kAhead = Config::kSize < kDepth ? Config::kSize : kDepth;
  float sum = 0.0f;
  Four four{};
  const float* now = factors;
  for_each_row<Config::kSize, kAhead>(
      matrix,
      lane,
      size,
      live,
      [&](int first) { now = factors + first; },
      [&](int e, float value) {
        if (e % 4 == 0) four = *reinterpret_cast<const Four*>(now + e);
        sum = fmaf(value, four.at[e % 4], sum);
      });
  return sum;
}

template <typename Config>
__global__ __launch_bounds__(Config::kThreads,
                             kThreadsOfSM /
                                 Config::kThreads) void single_kernel(UpdateParams params) {
  __shared__ Line<Config> lines[Config::kGroups];

  const Place<Config> place(params.num_blocks, params.size, params.num_weights);
  const int size = static_cast<int>(params.size);
  const float* inverse = matrix_of<Config>(params.fisher, place, params.size);
  const float weight = place.real ? load_weight(params.weight, place.at, params.type) : 0.0f;
  const bool keep = place.real && params.mask[place.at] != 0;
  float share = 0.0f;
  if (place.real && !keep) {
    const float diagonal = inverse[place.lane * size + place.lane];
    if (diagonal > 0.0f) share = weight / diagonal;
  }
  float* const line = lines[place.group].at;
  line[place.lane] = share;
  sync_group<Config>();
  const float change = column_sum<Config>(inverse, line, place.lane, size, place.live);
  if (!place.real) return;
  // A weight that does not change keeps its bits, -0 too.
  const float updated = change == 0.0f ? weight : weight - change;
  store_weight(params.updated, place.at, params.type, keep ? updated : 0.0f);
}

template <typename Config>
__global__ __launch_bounds__(Config::kThreads,
                             kThreadsOfSM / Config::kThreads) void loss_kernel(LossParams params) {
  __shared__ Line<Config> lines[Config::kGroups];
  __shared__ float partial[Config::kGroups][Config::kWarps];

  const Place<Config> place(params.num_blocks, params.size, params.num_weights);
  const int size = static_cast<int>(params.size);
  const float change = place.real ? load_weight(params.change, place.at, params.type) : 0.0f;
  float* const line = lines[place.group].at;
  line[place.lane] = change;
  sync_group<Config>();
  const float product = column_sum<Config>(
      matrix_of<Config>(params.fisher, place, params.size), line, place.lane, size, place.live);
  const float damp = place.live ? params.damp[params.damp_each ? place.block : 0] : 0.0f;
  // A column without a weight has no part in the sum, whatever F holds there. The tree of each
  // warp, then the warps in ascending order: the same bits every time.
  float sum = place.real ? change * fmaf(damp, change, product) : 0.0f;
  constexpr int kWidth = Config::kSize < 32 ? Config::kSize : 32;
#pragma unroll
  for (int offset = kWidth / 2; offset > 0; offset /= 2) {
    sum += __shfl_sync(kAllLanes, sum, (place.lane % kWidth) ^ offset, kWidth);
  }
  if constexpr (Config::kWarps > 1) {
    if (place.lane % 32 == 0) partial[place.group][place.lane / 32] = sum;
    sync_group<Config>();
    sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < Config::kWarps; ++warp) sum += partial[place.group][warp];
  }
  if (place.live && place.lane == 0) params.loss[place.block] = 0.5f * sum;
}

template <typename Config>
LaunchPlan launch_single(const UpdateParams& params, const char* path, cudaStream_t stream) {
  const int64_t blocks = (params.num_blocks - 1) / Config::kGroups + 1;
  single_kernel<Config><<<static_cast<unsigned>(blocks), Config::kThreads, 0, stream>>>(params);
  OBS_CUDA_CHECK(cudaGetLastError());
  return {"update_single", path, blocks, Config::kThreads};
}

template <typename Config>
LaunchPlan launch_loss(const LossParams& params, const char* path, cudaStream_t stream) {
  const int64_t blocks = (params.num_blocks - 1) / Config::kGroups + 1;
  loss_kernel<Config><<<static_cast<unsigned>(blocks), Config::kThreads, 0, stream>>>(params);
  OBS_CUDA_CHECK(cudaGetLastError());
  return {"loss_increase", path, blocks, Config::kThreads};
}

}  // namespace
}  // namespace update

LaunchPlan update_single(const UpdateParams& params, int device, cudaStream_t stream) {
  update::check_sizes(params, device);
  if (params.num_blocks == 0) return {"update_single", "empty", 0, 0};
  OBS_CHECK(params.weight && params.mask && params.fisher && params.updated,
            "weight, mask, fisher and updated must not be null for ",
            params.num_blocks,
            " blocks");
  update::check_alignment(params.type, params.weight, params.updated, params.fisher);
  const DeviceGuard guard(device);
  const LaunchPlan plan = update::for_size(params.size, [&](auto config, const char* path) {
    return update::launch_single<decltype(config)>(params, path, stream);
  });
  count_launch();
  return plan;
}

LaunchPlan loss_increase(const LossParams& params, int device, cudaStream_t stream) {
  update::check_sizes(params, device);
  if (params.num_blocks == 0) return {"loss_increase", "empty", 0, 0};
  OBS_CHECK(params.change && params.fisher && params.damp && params.loss,
            "change, fisher, damp and loss must not be null for ",
            params.num_blocks,
            " blocks");
  update::check_alignment(params.type, params.change, params.change, params.fisher);
  const DeviceGuard guard(device);
  const LaunchPlan plan = update::for_size(params.size, [&](auto config, const char* path) {
    return update::launch_loss<decltype(config)>(params, path, stream);
  });
  count_launch();
  return plan;
}

}  // namespace obs_kernels
