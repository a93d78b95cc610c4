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

// Subsets of a half by their size, those of a size in ascending order of their bits.
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

// Shows all sets of n entries of the group in `stage` to the visitors of the lanes.
template <int kHalf, typename Visitor>
__device__ __forceinline__ void visit_sets(const RowStage<2 * kHalf>& stage,
                                           const Subsets<kHalf>& subsets,
                                           int n,
                                           int lane,
                                           Visitor& visitor) {
  constexpr int kStride = RowStage<2 * kHalf>::kStride;
  const int least = n > kHalf ? n - kHalf : 0;
  const int most = n < kHalf ? n : kHalf;
#pragma unroll 1
  for (int size = least; size <= most; ++size) {
    const int first = subsets.first[size];
    const int count = subsets.first[size + 1] - first;
#pragma unroll 1
    for (int start = 0; start < count; start += kWarp) {
      const bool active = start + lane < count;
      const int place = active ? start + lane : count - 1;
      const uint32_t subset = subsets.of[first + place];
      Rest<kHalf> rest;
      float gain = 0.0f;
      with_constant<0, kHalf>(size, [&](auto chosen) {
        gain =
            eliminate<kHalf, decltype(chosen)::value>(stage.f, kStride, stage.line, subset, rest);
      });
      const uint32_t key = __brev(subset);
      visitor.begin(count, place, active);
      with_constant<0, kHalf>(n - size, [&](auto chosen) {
        walk<kHalf, decltype(chosen)::value>(rest, gain, key, kHalf, visitor);
      });
      visitor.end(place);
    }
    visitor.end_size();
  }
}

// Entries that may not be kept cost more than all others gain, and couple with nothing. Those whose
// columns are closed are pruned and not dead: F and u of the lanes still know them.
template <int kSize>
__device__ __forceinline__ void forbid(uint32_t open,
                                       int lane,
                                       const Row<kSize>& row,
                                       RowStage<kSize>& stage) {
  constexpr int kStride = RowStage<kSize>::kStride;
  const bool closed = !(open >> lane & 1u);
  if (lane < kSize) {
    if (open != row.live) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        if (closed || !(open >> j & 1u)) stage.f[lane * kStride + j] = 0.0f;
      }
    }
    if (closed) stage.f[lane * kStride + lane] = kDeadPivot;
  }
  share(closed ? kDeadLinear : row.u, lane, stage);
}

template <int kHalf, int kMinBlocks, Mode kMode>
__global__ __launch_bounds__(SetsConfig::kThreads, kMinBlocks) void sets_kernel(Task task) {
  constexpr int kSize = 2 * kHalf;
  constexpr int kWarps = SetsConfig::kThreads / kWarp;
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
  for (int64_t of = int64_t{blockIdx.x} * kWarps + thread / kWarp; of < task.count; of += step) {
    const int64_t at = task.first + of;
    Row<kSize> row;
    load_rows(p, at, lane, stage, row);
    if constexpr (kMode == Mode::kGains) {
      share(row.u, lane, stage);
      StoreGains store{task.gains + of * task.stride, row.unit, static_cast<int>(p.m)};
      visit_sets(stage, subsets, n, lane, store);
    } else {
      const uint32_t open = row.live & open_columns(task, at);
      uint32_t kept = open;
      if (__popc(open) > n) {
        forbid(open, lane, row, stage);
        KeepBest keep;
        visit_sets(stage, subsets, n, lane, keep);
        const Best best = best_of_warp(keep.best);
        // no gain is a number: any set will do
        kept = best.key == 0u ? lowest(open, n) : __brev(best.key);
      }
      const float value = solve_kept(kept, lane, stage, row);
      finish_rows(p, at, lane, kept, value, stage, row);
    }
  }
}

template <int kHalf, int kMinBlocks>
LaunchPlan launch(const Task& task, Mode mode, const char* path, cudaStream_t stream) {
  const int64_t blocks =
      grid_size(task.count, SetsConfig::kThreads / kWarp, SetsConfig::kMaxBlocks);
  const auto grid = static_cast<unsigned>(blocks);
  if (mode == Mode::kGains) {
    sets_kernel<kHalf, kMinBlocks, Mode::kGains><<<grid, SetsConfig::kThreads, 0, stream>>>(task);
  } else {
    sets_kernel<kHalf, kMinBlocks, Mode::kChoose><<<grid, SetsConfig::kThreads, 0, stream>>>(task);
  }
  OBS_CUDA_CHECK(cudaGetLastError());
  count_launch();
  return {"search_nm", path, blocks, SetsConfig::kThreads};
}

}  // namespace

LaunchPlan launch_sets(const Task& task, Mode mode, cudaStream_t stream) {
  return task.groups.m <= 8 ? launch<4, SetsConfig::kMinBlocks8>(task, mode, "sets8", stream)
                            : launch<8, SetsConfig::kMinBlocks16>(task, mode, "sets16", stream);
}

}  // namespace obs_kernels::search
