// SPDX-License-Identifier: Apache-2.0
// Gauss-Jordan elimination of symmetric positive definite matrices in registers (the sweep
// operator, Goodnight 1979), four pivots P at a time. With A_PP = L L' and W = A_.P L^-T a step
// replaces A by
//
//     A_ij - W_i W_j'           i, j outside of P
//     A_iP A_PP^-1              j in P (and its mirror)
//     -A_PP^-1                  i, j in P
//
// and after all steps A holds the negative inverse. The pivots are those of Cholesky (their
// squares), so positive definiteness is tested on the way. All three lines are one update of rank
// four, once the rows and columns of P are cleared and the rows of W in P are set to -L^-T, which
// is what W would be if A_PP were minus the identity. Registers hold B = -A, so the result needs no
// sign:
//
//     B_ij += W_i W_j'
//
// W_i W_j' = W_j W_i' bit for bit, so the result is symmetric. Only the lower triangle of the input
// takes part: what lies above is overwritten before it is first used.
//
// Four pivots at once, because an exchange between threads costs two barriers and a chain of loads
// whatever it carries. Steps are a loop and not unrolled: unrolled code of 62 KB did not fit the
// instruction cache and took twice the clocks that its instructions need.
#pragma once

#include <cuda_runtime.h>

#include "common/pieces.cuh"
#include "common/reciprocal_root.cuh"

namespace obs_kernels::inverse {

constexpr int kChunk = 4;

__device__ __forceinline__ void load_four(const float* shared, float (&values)[kChunk]) {
  const auto loaded = *reinterpret_cast<const Piece<float, kChunk>*>(shared);
#pragma unroll
  for (int at = 0; at < kChunk; ++at) values[at] = loaded.at[at];
}

__device__ __forceinline__ void store_four(float* shared, const float (&values)[kChunk]) {
  Piece<float, kChunk> stored;
#pragma unroll
  for (int at = 0; at < kChunk; ++at) stored.at[at] = values[at];
  *reinterpret_cast<Piece<float, kChunk>*>(shared) = stored;
}

// 1 / sqrt(pivot); 1 where the pivot fails, so that the other matrices go on.
struct Pivot {
  float scale;
  bool good;
};

__device__ __forceinline__ Pivot examine(float pivot) {
  const float scale = reciprocal_root(pivot);  // NaN unless the pivot is normal and positive
  const bool good = scale > 0.0f;
  return {good ? scale : 1.0f, good};
}

// The Cholesky factor L of the four pivots, and the reciprocals of its diagonal.
struct PivotBlock {
  float lower[kChunk][kChunk];
  float scale[kChunk];
  int failed;  // 0, or the first pivot that failed, 1-based
};

// `panel` [rows][4] holds the columns of the pivots in B; theirs are the rows from `first` on.
__device__ __forceinline__ PivotBlock factor(const float* panel, int first) {
  PivotBlock block;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    load_four(panel + (first + i) * kChunk, block.lower[i]);
#pragma unroll
    for (int j = 0; j <= i; ++j) block.lower[i][j] = -block.lower[i][j];
  }
  block.failed = 0;
#pragma unroll
  for (int k = 0; k < kChunk; ++k) {
    const Pivot pivot = examine(block.lower[k][k]);
    if (!pivot.good && block.failed == 0) block.failed = k + 1;
    block.scale[k] = pivot.scale;
#pragma unroll
    for (int i = k + 1; i < kChunk; ++i) {
      block.lower[i][k] *= pivot.scale;
#pragma unroll
      for (int j = k + 1; j <= i; ++j) {
        block.lower[i][j] = fmaf(-block.lower[i][k], block.lower[j][k], block.lower[i][j]);
      }
    }
  }
  return block;
}

// Row `row` of W by forward substitution: of the panel, or of minus the identity for the pivots.
__device__ __forceinline__ void substitute(
    const PivotBlock& block, const float* panel, int row, int first, float (&w)[kChunk]) {
  load_four(panel + row * kChunk, w);
  const int pivot = row - first;
#pragma unroll
  for (int e = 0; e < kChunk; ++e) {
    w[e] = -w[e];
    if (pivot >= 0 && pivot < kChunk) w[e] = pivot == e ? -1.0f : 0.0f;
  }
#pragma unroll
  for (int e = 0; e < kChunk; ++e) {
#pragma unroll
    for (int f = 0; f < e; ++f) w[e] = fmaf(-block.lower[e][f], w[f], w[e]);
    w[e] *= block.scale[e];
  }
}

}  // namespace obs_kernels::inverse
