// SPDX-License-Identifier: Apache-2.0
// Matrices up to 8: a thread a matrix, one pivot at a time.
#pragma once

#include <cstdint>

#include "common/device.cuh"
#include "fisher/inverse_config.h"
#include "fisher/inverse_step.cuh"
#include "obs_kernels/inverse.h"

namespace obs_kernels::inverse {

// Calls move(place in shared memory, place in global memory) for the pieces of kVector elements of
// the block's `count` matrices, which lie one behind the other: neighbouring threads, neighbouring
// pieces.
template <typename Config, int kVector, typename Move>
__device__ __forceinline__ void for_each_piece(int count, const Move& move) {
  constexpr int kEntries = Config::kEntries;
  static_assert(kEntries % kVector == 0, "a piece must not span two matrices");
  for (int piece = static_cast<int>(threadIdx.x); piece * kVector < count * kEntries;
       piece += Config::kThreads) {
    const int entry = piece * kVector;
    move(entry / kEntries * Config::kStride + entry % kEntries, entry);
  }
}

template <typename Config>
__device__ __forceinline__ int invert_lower(float (&a)[Config::kSize][Config::kSize]) {
  constexpr int kSize = Config::kSize;
  int failed = 0;
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    const Pivot pivot = examine(a[k][k]);
    if (!pivot.good && failed == 0) failed = k + 1;
    float w[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      float& entry = i < k ? a[k][i] : a[i][k];
      w[i] = i == k ? -pivot.scale : entry * pivot.scale;
      entry = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
#pragma unroll
      for (int j = 0; j <= i; ++j) a[i][j] = fmaf(-w[i], w[j], a[i][j]);
    }
  }
  return failed;
}

template <typename Config, int kVector>
__global__ __launch_bounds__(Config::kThreads) void invert_solo_kernel(InvertParams params) {
  constexpr int kSize = Config::kSize;
  alignas(16) __shared__ float staged[Config::kThreads * Config::kStride];

  const int thread = static_cast<int>(threadIdx.x);
  const int64_t first = int64_t{blockIdx.x} * Config::kThreads;
  const int64_t left = params.num_blocks - first;
  const int count = left < Config::kThreads ? static_cast<int>(left) : Config::kThreads;
  const float* const matrices = params.matrices + first * Config::kEntries;
  float* const inverses = params.inverse + first * Config::kEntries;

  for_each_piece<Config, kVector>(count, [&](int to, int from) {
    async_copy<static_cast<int>(sizeof(float)) * kVector>(staged + to, matrices + from);
  });
  async_commit();
  async_wait<0>();
  __syncthreads();

  if (thread < count) {
    float* const own = staged + thread * Config::kStride;
    const float damp = params.damp[params.damp_each ? first + thread : 0];
    constexpr int kWidth = Config::kWide && kSize % 4 == 0 ? 4 : 1;
    float a[kSize][kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      load_row<kWidth>(own + i * kSize, 0, i + 1, a[i]);
      a[i][i] += damp;
    }
    const int failed = invert_lower<Config>(a);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      float row[kSize];
#pragma unroll
      for (int j = 0; j < kSize; ++j) row[j] = failed != 0 ? 0.0f : -(j <= i ? a[i][j] : a[j][i]);
      store_row<kWidth>(own + i * kSize, 0, kSize, row);
    }
    params.info[first + thread] = failed;
  }
  __syncthreads();
  for_each_piece<Config, kVector>(count, [&](int from, int to) {
    *reinterpret_cast<Piece<float, kVector>*>(inverses + to) =
        *reinterpret_cast<const Piece<float, kVector>*>(staged + from);
  });
}

}  // namespace obs_kernels::inverse
