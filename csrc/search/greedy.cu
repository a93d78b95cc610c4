// SPDX-License-Identifier: Apache-2.0
// Greedy choice with exchanges: a warp a group, a lane a row of the curvature swept by the kept set
// K (Goodnight 1979): a_KK = -(F_KK)^-1, a_KJ = (F_KK)^-1 F_KJ, a_JJ the Schur complement, b_K =
// (F_KK)^-1 u_K the kept weights and b_J = u_J - F_JK b_K. Adding j gains b_j^2 / a_jj, dropping i
// costs b_i^2 / -a_ii, and what both at once win is known without trying it.
#include <cuda_runtime.h>

#include <cstdint>

#include "common/check.h"
#include "common/division.cuh"
#include "common/launch.h"
#include "search/choice.h"
#include "search/rows.cuh"

namespace obs_kernels::search {
namespace {

// As in the reference: the share of the gain by which an exchange must win, and the exchanges of a
// group over m.
constexpr float kGainTolerance = 1e-6f;
constexpr int kMaxExchanges = 4;

// Of a lane. The row is swept but for its diagonal, which stands in `own`.
template <int kSize>
struct Swept {
  float a[kSize];
  float own;
  float b;
  uint32_t kept;  // of the group
};

template <int kSize>
struct GreedyStage {
  RowStage<kSize> rows;
  alignas(16) float own[kSize];
  alignas(16) float b[kSize];
};

// Order of floats as an order of integers; NaN of the positive sign is above all.
__device__ __forceinline__ uint32_t ordered(float value) {
  const uint32_t bits = __float_as_uint(value);
  return bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
}

// Lanes among `among` that have the largest value; none among none.
__device__ __forceinline__ uint32_t lanes_of_largest(float value, uint32_t among, int lane) {
  const bool mine = among >> lane & 1u;
  const uint32_t place = mine ? ordered(value) : 0u;
  const uint32_t most = __reduce_max_sync(kAllLanes, place);
  return __ballot_sync(kAllLanes, mine && place == most);
}

// The lane's row of the curvature as it was given.
template <int kSize>
__device__ __forceinline__ void load_row_again(int lane,
                                               const RowStage<kSize>& stage,
                                               float (&row)[kSize]) {
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    row[j] = lane < kSize ? stage.f[lane * RowStage<kSize>::kStride + j] : 0.0f;
  }
}

// Takes entry k into the kept set, or, if it is there, out of it.
template <int kSize>
__device__ __forceinline__ void sweep(int k, int lane, RowStage<kSize>& stage, Swept<kSize>& s) {
  const float sign = s.kept >> k & 1u ? -1.0f : 1.0f;
  __syncwarp();
  if (lane == k) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) stage.line[j] = s.a[j];
  }
  __syncwarp();
  const float across = lane < kSize ? stage.line[lane] : 0.0f;  // a_k,lane
  const float pivot = __shfl_sync(kAllLanes, s.own, k);
  const float linear = __shfl_sync(kAllLanes, s.b, k);
  const float scaled = __fdiv_rn(across, pivot);
  share(scaled, lane, stage);
  const bool is_pivot = lane == k;
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    const float old = is_pivot ? 0.0f : s.a[j];
    const float next = fmaf(is_pivot ? sign : -across, stage.line[j], old);
    s.a[j] = j == k ? sign * scaled : next;
  }
  s.own = is_pivot ? __fdiv_rn(-1.0f, pivot) : fmaf(-across, scaled, s.own);
  s.b = is_pivot ? __fdiv_rn(sign * linear, pivot) : fmaf(-scaled, linear, s.b);
  s.kept ^= 1u << k;
}

// Adds the best of the live entries, n times.
template <int kSize>
__device__ __forceinline__ void grow(
    uint32_t live, int n, int lane, RowStage<kSize>& stage, Swept<kSize>& s) {
#pragma unroll 1
  for (int step = 0; step < n; ++step) {
    const float gain = __fdiv_rn(__fmul_rn(s.b, s.b), s.own);
    const bool open = (live & ~s.kept) >> lane & 1u;
    const uint32_t allowed = __ballot_sync(kAllLanes, open && gain >= 0.0f);
    const uint32_t best = lanes_of_largest(gain, allowed, lane);
    if (best == 0u) return;
    sweep(__ffs(static_cast<int>(best)) - 1, lane, stage, s);  // the lower index
  }
}

// Takes all live entries, and drops the cheapest until n are left.
template <int kSize>
__device__ __forceinline__ void shrink(
    uint32_t live, int n, int lane, RowStage<kSize>& stage, Swept<kSize>& s) {
#pragma unroll 1
  for (uint32_t rest = live; rest != 0u; rest &= rest - 1u) {
    sweep(__ffs(static_cast<int>(rest)) - 1, lane, stage, s);
  }
#pragma unroll 1
  while (__popc(s.kept) > n) {
    const float cost = __fdiv_rn(__fmul_rn(s.b, s.b), -s.own);
    const uint32_t cheapest = lanes_of_largest(-cost, s.kept, lane);
    sweep(31 - __clz(static_cast<int>(cheapest)), lane, stage, s);  // the lower index stays
  }
}

// u_K^T (F_KK)^-1 u_K.
template <int kSize>
__device__ __forceinline__ float gain_of(float u, int lane, const Swept<kSize>& s) {
  return warp_sum(s.kept >> lane & 1u ? u * s.b : 0.0f);
}

// The best exchanges of a kept entry for another live one, as long as one wins.
template <int kSize>
__device__ __forceinline__ void exchange(
    uint32_t live, float u, int m, int lane, GreedyStage<kSize>& stage, Swept<kSize>& s) {
#pragma unroll 1
  for (int step = 0; step < kMaxExchanges * m; ++step) {
    __syncwarp();
    if (lane < kSize) {
      stage.own[lane] = s.own;
      stage.b[lane] = s.b;
    }
    __syncwarp();
    // Row i = lane, dropped; column j, added.
    const float inverse = __fdiv_rn(1.0f, s.own);
    const float cost = __fdiv_rn(__fmul_rn(s.b, s.b), -s.own);
    const uint32_t open = live & ~s.kept;
    float best = -INFINITY;
    int into = 0;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      if (!(open >> j & 1u)) continue;  // the same for all lanes
      const float share_of_row = s.a[j] * inverse;
      const float freed = fmaf(-s.a[j], share_of_row, stage.own[j]);
      const float residual = fmaf(-share_of_row, s.b, stage.b[j]);
      const float gain = divide(__fmul_rn(residual, residual), freed, reciprocal(freed));
      const float net = __fsub_rn(gain, cost);
      if (net > best) {
        best = net;
        into = j;
      }
    }
    const uint32_t able = __ballot_sync(kAllLanes, (s.kept >> lane & 1u) && best > -INFINITY);
    const uint32_t lanes = lanes_of_largest(best, able, lane);
    if (lanes == 0u) return;
    const int out = __ffs(static_cast<int>(lanes)) - 1;
    best = __shfl_sync(kAllLanes, best, out);
    into = __shfl_sync(kAllLanes, into, out);
    if (!(best > kGainTolerance * gain_of(u, lane, s))) return;
    sweep(out, lane, stage.rows, s);
    sweep(into, lane, stage.rows, s);
  }
}

template <int kSize>
__global__ __launch_bounds__(GreedyConfig::kThreads,
                             GreedyConfig::kMinBlocks) void greedy_kernel(SearchParams p) {
  constexpr int kWarps = GreedyConfig::kThreads / kWarp;
  constexpr int kStride = RowStage<kSize>::kStride;
  __shared__ GreedyStage<kSize> stages[kWarps];
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp;
  GreedyStage<kSize>& stage = stages[thread / kWarp];
  const int64_t at = int64_t{blockIdx.x} * kWarps + thread / kWarp;
  if (at >= p.num_groups) return;
  const int m = static_cast<int>(p.m);
  const int n = static_cast<int>(p.n);
  Row<kSize> row;
  load_rows(p, at, lane, stage.rows, row);

  uint32_t kept = 0;
  float gain = 0.0f;
#pragma unroll 1
  for (int start = 0; start < 2; ++start) {
    Swept<kSize> s;
    load_row_again(lane, stage.rows, s.a);
    s.own = lane < kSize ? stage.rows.f[lane * kStride + lane] : 1.0f;
    s.b = row.u;
    s.kept = 0u;
    if (start == 0) {
      grow(row.live, n, lane, stage.rows, s);
    } else {
      shrink(row.live, n, lane, stage.rows, s);
    }
    exchange(row.live, row.u, m, lane, stage, s);
    const float found = gain_of(row.u, lane, s);
    if (start == 0 || found > gain * (1.0f + kGainTolerance)) {
      kept = s.kept;
      gain = found;
    }
  }
  load_row_again(lane, stage.rows, row.f);  // rather than registers for two rows
  const float value = solve_kept(kept, lane, stage.rows, row);
  finish_rows(p, at, lane, kept, value, stage.rows, row);
}

template <int kSize>
LaunchPlan launch(const SearchParams& params, const char* path, cudaStream_t stream) {
  constexpr int kWarps = GreedyConfig::kThreads / kWarp;
  const int64_t blocks = (params.num_groups - 1) / kWarps + 1;
  const auto grid = static_cast<unsigned>(blocks);
  greedy_kernel<kSize><<<grid, GreedyConfig::kThreads, 0, stream>>>(params);
  OBS_CUDA_CHECK(cudaGetLastError());
  count_launch();
  return {"search_greedy", path, blocks, GreedyConfig::kThreads};
}

}  // namespace

LaunchPlan launch_greedy(const SearchParams& params, cudaStream_t stream) {
  return params.m <= 8    ? launch<8>(params, "greedy8", stream)
         : params.m <= 16 ? launch<16>(params, "greedy16", stream)
                          : launch<32>(params, "greedy32", stream);
}

}  // namespace obs_kernels::search
