// SPDX-License-Identifier: Apache-2.0
// n > 2 and m of 17 to 32, of few kept sets: a warp a group, a lane an entry.
//
// Either the kept entries K are grown one by one, or the pruned ones Q, whichever are fewer:
//   gain(K) = u_K^T F_KK^-1 u_K, the largest,   or   cost(Q) = w_Q^T [(F^-1)_QQ]^-1 w_Q, the least.
// Both are the same recursion, on F and u or on F^-1 and w: each entry of a set is eliminated from
// the others (a column, the diagonals and the linear part, one number of each a lane), and the last
// entry of a set is a lane.
#include <cuda_runtime.h>

#include <cstdint>

#include "common/check.h"
#include "common/launch.h"
#include "search/group.cuh"
#include "search/launches.h"
#include "search/rows.cuh"
#include "search/search_config.h"

namespace obs_kernels::search {
namespace {

constexpr int kSize = WideSetsConfig::kSize;
using Stage = RowStage<kSize>;

// What some entries of a set leave of the others, for all lanes.
struct Level {
  float column[kSize];  // of the last entry, before it was eliminated
  float diagonal[kSize];
  float linear[kSize];
};

struct Growth {
  const float* f;  // rows of Stage::kStride
  Level* levels;   // by the number of entries
  int lane;
  float sign;     // of what is compared: the largest wins
  uint32_t flip;  // into keys: of equal costs the lexicographically last pruned set wins
  Best best;
};

// Sets that have kCount entries and get more of `rest`, up to kWanted. `diagonal` and `linear` are
// what is left of this lane's entry, `ratio` its columns over their pivots.
template <int kWanted, int kCount>
__device__ __forceinline__ void grow(uint32_t rest,
                                     uint32_t key,
                                     float gain,
                                     float diagonal,
                                     float linear,
                                     float (&ratio)[kWanted],
                                     Growth& growth) {
  const int lane = growth.lane;
  if constexpr (kCount + 1 == kWanted) {
    if (rest >> lane & 1u) {
      const float sum = grown(gain, linear, diagonal, reciprocal(diagonal));
      take_better(growth.sign * sum, growth.flip ^ (key | 0x80000000u >> lane), growth.best);
    }
  } else {
    Level* const levels = growth.levels;
#pragma unroll 1
    while (__popc(rest) >= kWanted - kCount) {
      const int chosen = __ffs(static_cast<int>(rest)) - 1;
      rest &= rest - 1u;
      float column = growth.f[chosen * Stage::kStride + lane];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        column = fmaf(-levels[i + 1].column[chosen], ratio[i], column);
      }
      const float pivot = levels[kCount].diagonal[chosen];
      const float value = levels[kCount].linear[chosen];
      const float inverse = reciprocal(pivot);
      ratio[kCount] = divide(column, pivot, inverse);
      const float left_diagonal = fmaf(-column, ratio[kCount], diagonal);
      const float left_linear = fmaf(-ratio[kCount], value, linear);
      if constexpr (kCount + 2 < kWanted) {  // the last entry of a set asks no other lane
        Level& level = levels[kCount + 1];
        __syncwarp();
        level.column[lane] = column;
        level.diagonal[lane] = left_diagonal;
        level.linear[lane] = left_linear;
        __syncwarp();
      }
      grow<kWanted, kCount + 1>(rest,
                                key | 0x80000000u >> chosen,
                                grown(gain, value, pivot, inverse),
                                left_diagonal,
                                left_linear,
                                ratio,
                                growth);
    }
  }
}

// F^-1 in the place of F in `stage`, by Gauss-Jordan without a search for pivots: a block that
// needs one is not positive definite, and what it chooses does not count.
__device__ __forceinline__ void invert(int lane, const Row<kSize>& row, Stage& stage) {
  float a[kSize];
#pragma unroll
  for (int j = 0; j < kSize; ++j) a[j] = row.f[j];
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    __syncwarp();
    if (lane == k) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) stage.line[j] = a[j];
    }
    __syncwarp();
    const float pivot = stage.line[k];
    const bool own = lane == k;
    const float share = own ? 1.0f / pivot : a[k] / pivot;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      if (j == k) continue;
      a[j] = own ? a[j] * share : fmaf(-share, stage.line[j], a[j]);
    }
    a[k] = own ? share : -share;
  }
#pragma unroll
  for (int j = 0; j < kSize; ++j) stage.f[lane * Stage::kStride + j] = a[j];
  __syncwarp();
}

// The best set of n of more entries in `row.live`.
__device__ __forceinline__ uint32_t
best_set(const Row<kSize>& row, int n, int lane, Stage& stage, Level* levels) {
  const int others = __popc(row.live) - n;
  const bool by_kept = n <= others;
  if (!by_kept) invert(lane, row, stage);
  const float diagonal = stage.f[lane * Stage::kStride + lane];
  const float linear = by_kept ? row.u : row.w;
  __syncwarp();
  levels[0].diagonal[lane] = diagonal;
  levels[0].linear[lane] = linear;
  __syncwarp();
  const float sign = by_kept ? 1.0f : -1.0f;
  const uint32_t flip = by_kept ? 0u : 0xFFFFFFFFu;
  Growth growth{stage.f, levels, lane, sign, flip, {-INFINITY, 0u}};
  with_constant<1, WideSetsConfig::kMaxSide>(by_kept ? n : others, [&](auto count) {
    float ratio[decltype(count)::value];
    grow<decltype(count)::value, 0>(row.live, 0u, 0.0f, diagonal, linear, ratio, growth);
  });
  const Best best = best_of_warp(growth.best);
  if (best.key == 0u) return lowest(row.live, n);  // no gain is a number: any set will do
  const uint32_t set = __brev(best.key ^ flip);
  return by_kept ? set : row.live & ~set;
}

__global__ __launch_bounds__(WideSetsConfig::kThreads,
                             WideSetsConfig::kMinBlocks) void wide_sets_kernel(Task task) {
  constexpr int kWarps = WideSetsConfig::kThreads / kWarp;
  __shared__ Stage stages[kWarps];
  __shared__ Level levels[kWarps][WideSetsConfig::kMaxSide - 1];
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp;
  const int warp = thread / kWarp;
  const int64_t at = int64_t{blockIdx.x} * kWarps + warp;
  if (at >= task.count) return;
  const SearchParams& p = task.groups;
  const int n = static_cast<int>(p.n);

  Row<kSize> row;
  load_rows(p, at, lane, stages[warp], row);
  uint32_t kept = row.live;
  if (__popc(row.live) > n) kept = best_set(row, n, lane, stages[warp], levels[warp]);
  const float value = solve_kept(kept, lane, stages[warp], row);
  finish_rows(p, at, lane, kept, value, stages[warp], row);
}

}  // namespace

LaunchPlan launch_wide_sets(const Task& task, cudaStream_t stream) {
  constexpr int kWarps = WideSetsConfig::kThreads / kWarp;
  const int64_t blocks = (task.count - 1) / kWarps + 1;
  const auto grid = static_cast<unsigned>(blocks);
  wide_sets_kernel<<<grid, WideSetsConfig::kThreads, 0, stream>>>(task);
  OBS_CUDA_CHECK(cudaGetLastError());
  count_launch();
  return {"search_nm", "wide_sets", blocks, WideSetsConfig::kThreads};
}

}  // namespace obs_kernels::search
