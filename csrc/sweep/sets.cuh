// SPDX-License-Identifier: Apache-2.0
// Gain and weights of one kept set of one row: u_K^T S_KK^-1 u_K and S_KK^-1 u_K.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/pair_gain.cuh"

namespace obs_kernels::sweep {

// S of a group, rows kStride apart, and u of a row of the weight, 0 where dead. Rows and columns of
// dead entries are those of the identity.
template <int kStride>
struct RowProblem {
  const float* curvature;
  const float* linear;
  uint32_t live;

  __device__ __forceinline__ float diagonal(int a) const {
    return (live >> a & 1u) != 0u ? curvature[a * kStride + a] : 1.0f;
  }
  __device__ __forceinline__ float coupling(int a, int b) const {
    return (live >> a & live >> b & 1u) != 0u ? curvature[a * kStride + b] : 0.0f;
  }
};

// Ascending members of a set of n <= kN; what is beyond n repeats the first.
template <int kN>
struct Members {
  int at[kN];

  // `set` numbers places, 4 bits each, and `columns` has the column of each place.
  __device__ __forceinline__ Members(uint32_t set, uint64_t columns, int n) {
#pragma unroll
    for (int k = 0; k < kN; ++k) {
      const uint32_t place = set >> (k < n ? 4 * k : 0) & 15u;
      at[k] = static_cast<int>(columns >> 4 * place & 15u);
    }
  }
  // Of a set with a bit a column.
  __device__ __forceinline__ explicit Members(uint32_t bits) {
    const int first = max(__ffs(static_cast<int>(bits)) - 1, 0);
#pragma unroll
    for (int k = 0; k < kN; ++k) {
      at[k] = bits != 0u ? __ffs(static_cast<int>(bits)) - 1 : first;
      bits &= bits - 1u;
    }
  }
  __device__ __forceinline__ uint32_t bits() const {
    uint32_t all = 0u;
#pragma unroll
    for (int k = 0; k < kN; ++k) all |= 1u << at[k];
    return all;
  }
};

// n = 1 and 2: the closed form that all backends share.
template <int kStride>
__device__ __forceinline__ float gain_of(const RowProblem<kStride>& row,
                                         const Members<2>& set,
                                         int n) {
  const int a = set.at[0];
  const int b = set.at[1];
  if (n == 1) return single_gain(row.diagonal(a), row.linear[a]);
  return pair_gain(
      row.diagonal(a), row.diagonal(b), row.coupling(a, b), row.linear[a], row.linear[b]);
}

template <int kStride>
__device__ __forceinline__ void weights_of(const RowProblem<kStride>& row,
                                           const Members<2>& set,
                                           int n,
                                           float (&weights)[2]) {
  const int a = set.at[0];
  const int b = set.at[1];
  const float fa = row.diagonal(a);
  const float ua = row.linear[a];
  weights[1] = 0.0f;
  if (n == 1) {
    weights[0] = ua / fa;
    return;
  }
  const float fb = row.diagonal(b);
  const float fab = row.coupling(a, b);
  const float ub = row.linear[b];
  const float determinant = pair_determinant(fa, fb, fab);
  weights[0] = (fb * ua - fab * ub) / determinant;
  weights[1] = (fa * ub - fab * ua) / determinant;
}

// n > 2: S_KK = L D L^T, filled up to kN by the identity and u = 0. `lower` is left with L below
// the diagonal and D on it, `values` with L^-1 u_K.
template <int kN, int kStride>
__device__ __forceinline__ float eliminate(const RowProblem<kStride>& row,
                                           const Members<kN>& set,
                                           int n,
                                           float (&lower)[kN][kN],
                                           float (&values)[kN]) {
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    values[i] = i < n ? row.linear[set.at[i]] : 0.0f;
    lower[i][i] = i < n ? row.diagonal(set.at[i]) : 1.0f;
#pragma unroll
    for (int j = 0; j < i; ++j) lower[i][j] = i < n ? row.coupling(set.at[j], set.at[i]) : 0.0f;
  }
  float gain = 0.0f;
#pragma unroll
  for (int k = 0; k < kN; ++k) {
    const float inverse = 1.0f / lower[k][k];
    gain = fmaf(values[k] * values[k], inverse, gain);
#pragma unroll
    for (int i = k + 1; i < kN; ++i) {
      const float factor = lower[i][k] * inverse;
      values[i] = fmaf(-factor, values[k], values[i]);
#pragma unroll
      for (int j = k + 1; j <= i; ++j) lower[i][j] = fmaf(-factor, lower[j][k], lower[i][j]);
    }
    // only now: the entries below are still those of the matrix while they are used
#pragma unroll
    for (int i = k + 1; i < kN; ++i) lower[i][k] *= inverse;
  }
  return gain;
}

template <int kN, int kStride>
__device__ __forceinline__ float gain_of(const RowProblem<kStride>& row,
                                         const Members<kN>& set,
                                         int n) {
  float lower[kN][kN];
  float values[kN];
  return eliminate(row, set, n, lower, values);
}

template <int kN, int kStride>
__device__ __forceinline__ void weights_of(const RowProblem<kStride>& row,
                                           const Members<kN>& set,
                                           int n,
                                           float (&weights)[kN]) {
  float lower[kN][kN];
  eliminate(row, set, n, lower, weights);
#pragma unroll
  for (int k = kN - 1; k >= 0; --k) {
    weights[k] /= lower[k][k];
#pragma unroll
    for (int i = k + 1; i < kN; ++i) weights[k] = fmaf(-lower[i][k], weights[i], weights[k]);
  }
}

// S_KK = L D L^T of a set of at most kN for all rows in which no member is dead, in the arithmetic
// of `eliminate`; filled up like there.
template <int kN>
struct Factored {
  Members<kN> set;
  int n;
  float lower[kN][kN];  // below the diagonal
  float inverse[kN];    // of D

  __device__ __forceinline__ Factored(const float* curvature, int stride, uint32_t bits)
      : set(bits) {
    n = __popc(bits);
    float rest[kN][kN];
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      rest[i][i] = i < n ? curvature[set.at[i] * stride + set.at[i]] : 1.0f;
#pragma unroll
      for (int j = 0; j < i; ++j) {
        rest[i][j] = i < n ? curvature[set.at[j] * stride + set.at[i]] : 0.0f;
      }
    }
#pragma unroll
    for (int k = 0; k < kN; ++k) {
      inverse[k] = 1.0f / rest[k][k];
#pragma unroll
      for (int i = k + 1; i < kN; ++i) {
        lower[i][k] = rest[i][k] * inverse[k];
#pragma unroll
        for (int j = k + 1; j <= i; ++j) rest[i][j] = fmaf(-lower[i][k], rest[j][k], rest[i][j]);
      }
    }
  }

  // Of a row with u in `linear`.
  __device__ __forceinline__ float gain(const float* linear) const {
    float values[kN];
#pragma unroll
    for (int i = 0; i < kN; ++i) values[i] = i < n ? linear[set.at[i]] : 0.0f;
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < kN; ++k) {
      sum = fmaf(values[k] * values[k], inverse[k], sum);
#pragma unroll
      for (int i = k + 1; i < kN; ++i) values[i] = fmaf(-lower[i][k], values[k], values[i]);
    }
    return sum;
  }
};

}  // namespace obs_kernels::sweep
