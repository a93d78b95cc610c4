// SPDX-License-Identifier: Apache-2.0
// Gauss-Jordan elimination of symmetric positive definite matrices in registers (the sweep
// operator, Goodnight 1979). Step k replaces A by
//
//     a_ij - a_ik a_kj / a_kk      i, j != k
//     a_ik / a_kk                  j == k (and its mirror)
//     -1 / a_kk                    i == j == k
//
// and after all steps A holds the negative inverse. The pivots are those of Cholesky (their
// squares), so positive definiteness is tested on the way. With w = a_k / sqrt(a_kk) all three
// lines are one rank-one update, once row and column k are cleared and w_k is set to -1 /
// sqrt(a_kk):
//
//     a_ij -= w_i w_j
//
// w_i w_j = w_j w_i exactly, so the result is symmetric bit for bit. Only the lower triangle of the
// input takes part: what lies above is overwritten before it is first used.
#pragma once

#include <cuda_runtime.h>

#include <cfloat>

namespace obs_kernels::inverse {

constexpr int kChunk = 4;

// Both sides of a pivot: the scale of w, and whether the step is possible at all.
struct Pivot {
  float scale;  // 1 / sqrt(pivot); 1 where the pivot fails, so that the other matrices go on
  bool good;
};

__device__ __forceinline__ Pivot examine(float pivot) {
  const float scale = __frsqrt_rn(pivot);
  const bool good = pivot > 0.0f && pivot <= FLT_MAX && scale * scale <= FLT_MAX;
  return {good ? scale : 1.0f, good};
}

// Four neighbours of one row, read or written in pieces of kVector elements. Those at or beyond
// `size` are not touched.
template <int kVector>
struct alignas(sizeof(float) * kVector) Piece {
  float at[kVector];
};

template <int kVector, int kCount>
__device__ __forceinline__ void load_row(const float* row,
                                         int first,
                                         int size,
                                         float (&values)[kCount]) {
#pragma unroll
  for (int piece = 0; piece < kCount; piece += kVector) {
    if (first + piece >= size) continue;
    const auto loaded = *reinterpret_cast<const Piece<kVector>*>(row + first + piece);
#pragma unroll
    for (int at = 0; at < kVector; ++at) values[piece + at] = loaded.at[at];
  }
}

template <int kVector, int kCount>
__device__ __forceinline__ void store_row(float* row,
                                          int first,
                                          int size,
                                          const float (&values)[kCount]) {
#pragma unroll
  for (int piece = 0; piece < kCount; piece += kVector) {
    if (first + piece >= size) continue;
    Piece<kVector> stored;
#pragma unroll
    for (int at = 0; at < kVector; ++at) stored.at[at] = values[piece + at];
    *reinterpret_cast<Piece<kVector>*>(row + first + piece) = stored;
  }
}

__device__ __forceinline__ void load_four(const float* shared, float (&values)[kChunk]) {
  const auto loaded = *reinterpret_cast<const Piece<kChunk>*>(shared);
#pragma unroll
  for (int at = 0; at < kChunk; ++at) values[at] = loaded.at[at];
}

}  // namespace obs_kernels::inverse
