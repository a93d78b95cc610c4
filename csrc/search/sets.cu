// SPDX-License-Identifier: Apache-2.0
#include "search/sets.cuh"

#include <cuda_runtime.h>

#include <cstdint>

#include "common/check.h"
#include "common/launch.h"
#include "search/launches.h"
#include "search/search_config.h"

namespace obs_kernels::search {
namespace {

// Subsets of a half by their size, each size from the lexicographically first on.
template <int kHalf>
struct Subsets {
  uint8_t of[1 << kHalf];
  int first[kHalf + 2];  // of a size
};

template <int kHalf>
__device__ __forceinline__ void list_subsets(int thread, int threads, Subsets<kHalf>& subsets) {
  constexpr int kCount = 1 << kHalf;
  for (int mine = thread; mine < kCount; mine += threads) {
    const int size = __popc(static_cast<unsigned>(mine));
    int at = 0;
    for (int other = 0; other < kCount; ++other) {
      const int other_size = __popc(static_cast<unsigned>(other));
      at += other_size < size || (other_size == size && other < mine) ? 1 : 0;
    }
    subsets.of[at] = static_cast<uint8_t>(mine);
  }
  if (thread <= kHalf + 1) {
    int smaller = 0;
    for (int other = 0; other < kCount; ++other) {
      smaller += __popc(static_cast<unsigned>(other)) < thread ? 1 : 0;
    }
    subsets.first[thread] = smaller;
  }
}

// Calls body with the constant that `value` is, of kFirst .. kLast.
template <int kFirst, int kLast, typename Body>
__device__ __forceinline__ void with_constant(int value, const Body& body) {
  if constexpr (kFirst <= kLast) {
    if (value == kFirst) {
      body(Constant<kFirst>{});
    } else {
      with_constant<kFirst + 1, kLast>(value, body);
    }
  }
}

// The best set of n entries of the group in `stage` among those that this lane looks at.
template <int kHalf>
__device__ __forceinline__ Best
search_subsets(const RowStage<2 * kHalf>& stage, const Subsets<kHalf>& subsets, int n, int lane) {
  constexpr int kStride = RowStage<2 * kHalf>::kStride;
  Best best{-INFINITY, 0u};
  const int least = n > kHalf ? n - kHalf : 0;
  const int most = n < kHalf ? n : kHalf;
#pragma unroll 1
  for (int size = least; size <= most; ++size) {
    const int last = subsets.first[size + 1] - 1;
#pragma unroll 1
    for (int start = subsets.first[size]; start <= last; start += kWarp) {
      // lanes without work of their own repeat the last subset, which changes nothing
      const uint32_t subset = subsets.of[start + lane < last ? start + lane : last];
      Rest<kHalf> rest;
      float gain = 0.0f;
      with_constant<0, kHalf>(size, [&](auto count) {
        gain = eliminate<kHalf, decltype(count)::value>(stage.f, kStride, stage.line, subset, rest);
      });
      Best inside{-INFINITY, 0u};
      const uint32_t key = __brev(subset);
      with_constant<0, kHalf>(n - size, [&](auto count) {
        walk<kHalf, decltype(count)::value>(rest, gain, key, kHalf, inside);
      });
      take_better(inside.gain, inside.key, best);
    }
  }
  return best;
}

template <int kHalf, int kMinBlocks>
__global__ __launch_bounds__(SetsConfig::kThreads, kMinBlocks) void sets_kernel(Task task) {
  constexpr int kSize = 2 * kHalf;
  constexpr int kWarps = SetsConfig::kThreads / kWarp;
  constexpr int kStride = RowStage<kSize>::kStride;
  __shared__ RowStage<kSize> stages[kWarps];
  __shared__ Subsets<kHalf> subsets;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp;
  RowStage<kSize>& stage = stages[thread / kWarp];
  list_subsets(thread, SetsConfig::kThreads, subsets);
  __syncthreads();

  const SearchParams& p = task.groups;
  const int n = static_cast<int>(p.n);
  const int64_t step = int64_t{gridDim.x} * kWarps;
  for (int64_t at = int64_t{blockIdx.x} * kWarps + thread / kWarp; at < task.count; at += step) {
    Row<kSize> row;
    load_rows(p, at, lane, stage, row);
    uint32_t kept = row.live;
    if (__popc(row.live) > n) {
      const bool dead = !(row.live >> lane & 1u);
      if (lane < kSize && dead) stage.f[lane * kStride + lane] = kDeadPivot;
      share(dead ? kDeadLinear : row.u, lane, stage);
      Best best = search_subsets<kHalf>(stage, subsets, n, lane);
#pragma unroll
      for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        const float gain = __shfl_xor_sync(kAllLanes, best.gain, distance);
        take_better(gain, __shfl_xor_sync(kAllLanes, best.key, distance), best);
      }
      kept = __brev(best.key);
      if (best.key == 0u) {  // no gain is a number: any set will do
        kept = row.live;
        while (__popc(kept) > n) kept &= ~(1u << (31 - __clz(static_cast<int>(kept))));
      }
    }
    const float value = solve_kept(kept, lane, stage, row);
    finish_rows(p, at, lane, kept, value, stage, row);
  }
}

template <int kHalf, int kMinBlocks>
LaunchPlan launch(const Task& task, const char* path, cudaStream_t stream) {
  const int64_t blocks =
      grid_size(task.count, SetsConfig::kThreads / kWarp, SetsConfig::kMaxBlocks);
  const auto grid = static_cast<unsigned>(blocks);
  sets_kernel<kHalf, kMinBlocks><<<grid, SetsConfig::kThreads, 0, stream>>>(task);
  OBS_CUDA_CHECK(cudaGetLastError());
  count_launch();
  return {"search_nm", path, blocks, SetsConfig::kThreads};
}

}  // namespace

LaunchPlan launch_sets(const Task& task, cudaStream_t stream) {
  return task.groups.m <= 8 ? launch<4, SetsConfig::kMinBlocks8>(task, "sets8", stream)
                            : launch<8, SetsConfig::kMinBlocks16>(task, "sets16", stream);
}

}  // namespace obs_kernels::search
