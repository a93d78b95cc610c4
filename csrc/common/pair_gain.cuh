// SPDX-License-Identifier: Apache-2.0
// Gains of kept sets of one and two: the formulas that decide masks, one contract for all topics.
#pragma once

#include <cuda_runtime.h>

namespace obs_kernels {

// gain(a, b) = (F_bb u_a^2 - 2 F_ab u_a u_b + F_aa u_b^2) / (F_aa F_bb - F_ab^2), in this order and
// each step rounded alone: equal masks on every backend for integer-valued inputs.
__device__ __forceinline__ float pair_numerator(float fa, float fb, float fab, float ua, float ub) {
  const float first = __fmul_rn(__fmul_rn(fb, ua), ua);
  const float cross = __fmul_rn(__fmul_rn(__fmul_rn(2.0f, fab), ua), ub);
  const float second = __fmul_rn(__fmul_rn(fa, ub), ub);
  return __fadd_rn(__fsub_rn(first, cross), second);
}

__device__ __forceinline__ float pair_determinant(float fa, float fb, float fab) {
  return __fsub_rn(__fmul_rn(fa, fb), __fmul_rn(fab, fab));
}

__device__ __forceinline__ float pair_gain(float fa, float fb, float fab, float ua, float ub) {
  return __fdiv_rn(pair_numerator(fa, fb, fab, ua, ub), pair_determinant(fa, fb, fab));
}

__device__ __forceinline__ float single_gain(float f, float u) {
  return __fdiv_rn(__fmul_rn(u, u), f);
}

}  // namespace obs_kernels
