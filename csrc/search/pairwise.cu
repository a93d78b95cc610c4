// SPDX-License-Identifier: Apache-2.0
// The pair model: of F^-1 only the 2 x 2 blocks A_j of adjacent entries count. Its exact minimum by
//   T_j[q] = min(T_{j+1}[q], S_j + T_{j+1}[q - 1], P_j + T_{j+1}[q - 2]),
// P_j = 1/2 w_j' A_j^-1 w_j, S_j = min w_i^2 / (2 (A_j)_ii), q the entries pruned in the pairs j
// ..; and the model itself, for the joint search of panels.
//
// Each step is rounded alone and in the order of the reference: equal masks where numbers are
// exact.
#include <cuda_runtime.h>

#include <cstdint>

#include "common/check.h"
#include "common/launch.h"
#include "common/pieces.cuh"
#include "search/choice.h"
#include "search/gains.cuh"

namespace obs_kernels::search {
namespace {

struct Matrix2 {
  float at[2][2];
};

__device__ __forceinline__ float determinant(const Matrix2& a) {
  return __fsub_rn(__fmul_rn(a.at[0][0], a.at[1][1]), __fmul_rn(a.at[0][1], a.at[1][0]));
}

// A_j^-1 of pair j of the group whose block starts at `inverse`.
__device__ __forceinline__ Matrix2 pair_curvature(const float* inverse, int m, int j) {
  const float* const corner = inverse + 2 * j * (m + 1);
  const auto top = *reinterpret_cast<const Piece<float, 2>*>(corner);
  const auto bottom = *reinterpret_cast<const Piece<float, 2>*>(corner + m);
  const Matrix2 a{{{top.at[0], top.at[1]}, {bottom.at[0], bottom.at[1]}}};
  const float det = determinant(a);
  return {{{__fdiv_rn(a.at[1][1], det), __fdiv_rn(-a.at[0][1], det)},
           {__fdiv_rn(-a.at[1][0], det), __fdiv_rn(a.at[0][0], det)}}};
}

// Costs of pruning none, one or both of a pair.
struct PairCost {
  float of[3];
  bool first;  // whether the one is its first entry
};

__device__ __forceinline__ PairCost
pair_cost(const Matrix2& f, float w0, float w1, bool alive0, bool alive1) {
  const float to0 = __fadd_rn(__fmul_rn(w0, f.at[0][0]), __fmul_rn(w1, f.at[1][0]));
  const float to1 = __fadd_rn(__fmul_rn(w0, f.at[0][1]), __fmul_rn(w1, f.at[1][1]));
  const float both = __fmul_rn(0.5f, __fadd_rn(__fmul_rn(to0, w0), __fmul_rn(to1, w1)));
  // (A_j)_ii is the other diagonal entry of A_j^-1 over its determinant.
  const float det = determinant(f);
  float one0 = __fdiv_rn(__fmul_rn(__fmul_rn(w0, w0), det), __fmul_rn(2.0f, f.at[1][1]));
  float one1 = __fdiv_rn(__fmul_rn(__fmul_rn(w1, w1), det), __fmul_rn(2.0f, f.at[0][0]));
  // Dead entries are pruned first, and for nothing.
  if (!alive0) one0 = 0.0f;
  if (!alive1) one1 = 0.0f;
  if (alive0 && !alive1) one0 = INFINITY;
  if (alive1 && !alive0) one1 = INFINITY;
  const bool none = alive0 && alive1;
  const bool one = alive0 || alive1;
  return {{none ? 0.0f : INFINITY, one ? fminf(one0, one1) : INFINITY, both}, one0 < one1};
}

template <int kSize>
__global__ __launch_bounds__(PairwiseConfig::kThreads) void pairwise_kernel(PairwiseParams p) {
  constexpr int kHalf = kSize / 2;
  const int64_t at = int64_t{blockIdx.x} * PairwiseConfig::kThreads + threadIdx.x;
  if (at >= p.num_groups) return;
  const int m = static_cast<int>(p.m);
  const float* const inverse = p.inverse + at * m * m;

  float least[kSize + 1];  // of pruning q entries in the pairs from j on
  least[0] = 0.0f;
#pragma unroll
  for (int q = 1; q <= kSize; ++q) least[q] = INFINITY;
  // Bit q - 1: pair j gives one, or two, of the q entries.
  uint32_t ones[kHalf];
  uint32_t twos[kHalf];
  uint32_t firsts = 0;  // bit j: the one is the first of its pair
  uint32_t live = 0;
#pragma unroll
  for (int j = kHalf - 1; j >= 0; --j) {
    ones[j] = 0;
    twos[j] = 0;
    if (2 * j >= m) continue;
    const int64_t entry = at * m + 2 * j;
    const bool alive0 = p.alive == nullptr || p.alive[entry] != 0;
    const bool alive1 = p.alive == nullptr || p.alive[entry + 1] != 0;
    const float w0 = alive0 ? p.weight[entry] : 0.0f;
    const float w1 = alive1 ? p.weight[entry + 1] : 0.0f;
    const PairCost cost = pair_cost(pair_curvature(inverse, m, j), w0, w1, alive0, alive1);
    live |= (alive0 ? 1u : 0u) << 2 * j | (alive1 ? 2u : 0u) << 2 * j;
    firsts |= (cost.first ? 1u : 0u) << j;
#pragma unroll
    for (int q = 2 * (kHalf - j); q >= 0; --q) {
      float best = __fadd_rn(cost.of[0], least[q]);
      if (q >= 1) {
        const float with_one = __fadd_rn(cost.of[1], least[q - 1]);
        if (with_one < best) {
          best = with_one;
          ones[j] |= 1u << (q - 1);
        }
      }
      if (q >= 2) {
        const float with_two = __fadd_rn(cost.of[2], least[q - 2]);
        if (with_two < best) {
          best = with_two;
          twos[j] |= 1u << (q - 1);
        }
      }
      least[q] = best;
    }
  }

  const int n = static_cast<int>(p.n);
  int left = m - min(__popc(live), n);
  uint32_t kept = 0;
#pragma unroll
  for (int j = 0; j < kHalf; ++j) {
    if (2 * j >= m) continue;
    const uint32_t bit = left > 0 ? 1u << (left - 1) : 0u;
    uint32_t pair = 3u;
    if (twos[j] & bit) {
      pair = 0u;
    } else if (ones[j] & bit) {
      pair = firsts >> j & 1u ? 2u : 1u;
    }
    left -= 2 - __popc(pair);
    kept |= pair << 2 * j;
  }
  kept &= live;
  // Costs that are no numbers decide nothing, and then any n will do.
  while (__popc(kept) > n) kept &= ~(1u << (31 - __clz(static_cast<int>(kept))));
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    if (i < m) p.mask[at * m + i] = static_cast<uint8_t>(kept >> i & 1u);
  }
}

template <int kThreads>
__global__ __launch_bounds__(kThreads) void pair_models_kernel(PairModelParams p) {
  const int m = static_cast<int>(p.m);
  const int64_t size = p.m * p.m;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x; item < p.num_groups * size;
       item += step) {
    const int64_t group = item / size;
    const int entry = static_cast<int>(item - group * size);
    const int row = entry / m;
    const int col = entry - row * m;
    float value = 0.0f;
    if (row / 2 == col / 2) {
      const Matrix2 f = pair_curvature(p.inverse + group * size, m, row / 2);
      const float left = row % 2 == 0 ? f.at[0][0] : f.at[1][0];
      const float right = row % 2 == 0 ? f.at[0][1] : f.at[1][1];
      value = (col % 2 == 0 ? left : right) * p.unit[group];
    }
    p.model[item] = value;
  }
}

template <int kSize>
LaunchPlan launch(const PairwiseParams& params, const char* path, cudaStream_t stream) {
  const int64_t blocks = (params.num_groups - 1) / PairwiseConfig::kThreads + 1;
  const auto grid = static_cast<unsigned>(blocks);
  pairwise_kernel<kSize><<<grid, PairwiseConfig::kThreads, 0, stream>>>(params);
  OBS_CUDA_CHECK(cudaGetLastError());
  count_launch();
  return {"search_pairwise", path, blocks, PairwiseConfig::kThreads};
}

}  // namespace

LaunchPlan launch_pairwise(const PairwiseParams& params, cudaStream_t stream) {
  return params.m <= 4    ? launch<4>(params, "pairwise4", stream)
         : params.m <= 8  ? launch<8>(params, "pairwise8", stream)
         : params.m <= 16 ? launch<16>(params, "pairwise16", stream)
                          : launch<32>(params, "pairwise32", stream);
}

LaunchPlan launch_pair_models(const PairModelParams& params, cudaStream_t stream) {
  const int64_t items = params.num_groups * params.m * params.m;
  const int64_t blocks = grid_size(items, PairModelConfig::kThreads, PairModelConfig::kMaxBlocks);
  const auto grid = static_cast<unsigned>(blocks);
  pair_models_kernel<PairModelConfig::kThreads>
      <<<grid, PairModelConfig::kThreads, 0, stream>>>(params);
  OBS_CUDA_CHECK(cudaGetLastError());
  count_launch();
  return {"pair_models", "pair_models", blocks, PairModelConfig::kThreads};
}

}  // namespace obs_kernels::search
