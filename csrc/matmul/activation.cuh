// SPDX-License-Identifier: Apache-2.0
// Activations of the epilogue, in f32. No tensor core works meanwhile, so that every instruction
// counts: erff and tanhf take forty and branch, these take some fifteen.
#pragma once

#include <cuda_runtime.h>

#include "obs_kernels/matmul.h"

namespace obs_kernels {

// 2^value and 1 / value by one instruction, to 2 units in the last place; results below 2^-126 are
// 0.
__device__ __forceinline__ float fast_exp2(float value) {
  float power = 0.0f;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(value));
  return power;
}

__device__ __forceinline__ float fast_reciprocal(float value) {
  float reciprocal = 0.0f;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(value));
  return reciprocal;
}

// value / (1 + exp(-exponent)). An infinite exponential gives 0, as it should.
__device__ __forceinline__ float times_sigmoid(float value, float exponent) {
  constexpr float kLog2E = 1.4426950408889634f;
  return value * fast_reciprocal(1.0f + fast_exp2(-kLog2E * exponent));
}

// value Phi(value) = max(value, 0) - |value| Q(|value|), Q the upper tail of the normal
// distribution by Abramowitz and Stegun 7.1.26: to 4e-7, and to 0.4 % of itself far in the tail,
// where 1 + erf is all rounding.
__device__ __forceinline__ float gelu(float value) {
  constexpr float kSlope = 0.3275911f * 0.70710678118654752f;
  constexpr float kHalfLog2E = 0.5f * 1.4426950408889634f;
  // As in torch +inf stays, and -inf becomes NaN; a size of inf would make both NaN.
  const float size = fabsf(fminf(value, 1e18f));
  const float t = fast_reciprocal(fmaf(kSlope, size, 1.0f));
  float tail = 0.5f * 1.061405429f;
  tail = fmaf(tail, t, 0.5f * -1.453152027f);
  tail = fmaf(tail, t, 0.5f * 1.421413741f);
  tail = fmaf(tail, t, 0.5f * -0.284496736f);
  tail = fmaf(tail, t, 0.5f * 0.254829592f);
  tail *= t * fast_exp2(-kHalfLog2E * value * value);
  return fmaf(-size, tail, fmaxf(value, 0.0f));  // NaN by `tail`, not by size
}

// The approximation by tanh: 1 + tanh(u) = 2 / (1 + exp(-2u)).
__device__ __forceinline__ float gelu_tanh(float value) {
  constexpr float kTwice = 2.0f * 0.79788456080286536f;
  return times_sigmoid(value, kTwice * value * fmaf(0.044715f * value, value, 1.0f));
}

// As the reference does; relu keeps NaN.
template <Activation kActivation>
__device__ __forceinline__ float activate(float value) {
  if constexpr (kActivation == Activation::kRelu) {
    return value < 0.0f ? 0.0f : value;
  } else if constexpr (kActivation == Activation::kGelu) {
    return gelu(value);
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    return gelu_tanh(value);
  } else {
    static_assert(kActivation == Activation::kSilu, "one of the above");
    return times_sigmoid(value, value);
  }
}

}  // namespace obs_kernels
