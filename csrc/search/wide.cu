// SPDX-License-Identifier: Apache-2.0
// n <= 2 and m up to 32: a warp a group.
#include <cuda_runtime.h>

#include <cstdint>

#include "common/check.h"
#include "common/launch.h"
#include "search/launches.h"
#include "search/rows.cuh"
#include "search/search_config.h"

namespace obs_kernels::search {
namespace {

// Lane b looks at the pairs (a, b), a < b; the larger gain wins, then the lower code.
__device__ __forceinline__ int best_pair(
    const Row<32>& row, uint32_t open, int lane, int n, const RowStage<32>& stage) {
  constexpr int kStride = RowStage<32>::kStride;
  float best = -INFINITY;
  int code = 32 * 32;
  const float own = stage.f[lane * kStride + lane];
  if (open >> lane & 1u) {
    if (n == 1 || __popc(open) < 2) {
      best = single_gain(own, row.u);
      code = lane * 33;
    } else {
#pragma unroll
      for (int a = 0; a < 32; ++a) {
        if (a >= lane || !(open >> a & 1u)) continue;
        const float fa = stage.f[a * kStride + a];
        const float gain = pair_gain(fa, own, row.f[a], stage.line[a], row.u);
        if (!(gain <= best)) {  // NaN wins, so that something is chosen in any case
          best = gain;
          code = a * 32 + lane;
        }
      }
    }
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, best, step);
    const int other_code = __shfl_xor_sync(kAllLanes, code, step);
    const bool taken = code == 32 * 32 || (other_code != 32 * 32 && other > best) ||
                       (other == best && other_code < code);
    if (taken) {
      best = other;
      code = other_code;
    }
  }
  // NaN compares with nothing, so the lanes may differ
  return __shfl_sync(kAllLanes, code, 0);
}

template <int kSize, Mode kMode>
__global__ __launch_bounds__(WideConfig::kThreads,
                             WideConfig::kMinBlocks) void wide_kernel(Task task) {
  constexpr int kWarps = WideConfig::kThreads / kWarp;
  constexpr int kStride = RowStage<kSize>::kStride;
  __shared__ RowStage<kSize> stages[kWarps];
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp;
  RowStage<kSize>& stage = stages[thread / kWarp];
  const int64_t local = int64_t{blockIdx.x} * kWarps + thread / kWarp;
  if (local >= task.count) return;
  const SearchParams& p = task.groups;
  const int64_t at = task.first + local;
  const int m = static_cast<int>(p.m);
  const int n = static_cast<int>(p.n);

  Row<kSize> row;
  load_rows(p, at, lane, stage, row);
  share(row.u, lane, stage);
  if constexpr (kMode == Mode::kGains) {
    const bool masked = p.alive != nullptr;
    const float own = stage.f[lane * kStride + lane];
    float* const table = task.gains + local * task.stride;
    if (n == 1 && lane < m) {
      const float gain = single_gain(own, row.u) * row.unit;
      table[lane] = masked ? with_dead(gain, !(row.live >> lane & 1u)) : gain;
    }
#pragma unroll
    for (int a = 0; a < kSize; ++a) {
      if (n == 1 || a >= lane || lane >= m) continue;
      const float fa = stage.f[a * kStride + a];
      const float gain = pair_gain(fa, own, row.f[a], stage.line[a], row.u) * row.unit;
      const bool dead = (~row.live & (1u << a | 1u << lane)) != 0u;
      table[a * m - a * (a + 1) / 2 + lane - a - 1] = masked ? with_dead(gain, dead) : gain;
    }
  } else {
    const uint32_t open = row.live & open_columns(task, at);
    const int code = best_pair(row, open, lane, n, stage);
    uint32_t kept = 0u;
    float value = 0.0f;
    if (code < 32 * 32) {
      const int a = code / 32;
      const int b = code % 32;
      kept = 1u << a | 1u << b;
      const float fa = stage.f[a * kStride + a];
      const float fb = stage.f[b * kStride + b];
      const float fab = stage.f[a * kStride + b];
      const float ua = stage.line[a];
      const float ub = stage.line[b];
      const float inverse = 1.0f / (fa * fb - fab * fab);
      if (a == b) {
        value = lane == a ? ua / fa : 0.0f;
      } else {
        value = lane == a   ? (fb * ua - fab * ub) * inverse
                : lane == b ? (fa * ub - fab * ua) * inverse
                            : 0.0f;
      }
    }
    finish_rows(p, at, lane, kept, value, stage, row);
  }
}

}  // namespace

LaunchPlan launch_wide(const Task& task, Mode mode, cudaStream_t stream) {
  constexpr int kWarps = WideConfig::kThreads / kWarp;
  const int64_t blocks = (task.count - 1) / kWarps + 1;
  const auto grid = static_cast<unsigned>(blocks);
  if (mode == Mode::kGains) {
    wide_kernel<WideConfig::kSize, Mode::kGains><<<grid, WideConfig::kThreads, 0, stream>>>(task);
  } else {
    wide_kernel<WideConfig::kSize, Mode::kChoose><<<grid, WideConfig::kThreads, 0, stream>>>(task);
  }
  OBS_CUDA_CHECK(cudaGetLastError());
  count_launch();
  return {"search_nm", "wide", blocks, WideConfig::kThreads};
}

}  // namespace obs_kernels::search
