// SPDX-License-Identifier: Apache-2.0
// Division without the branch for extreme exponents (PTX ISA, "rcp.approx.ftz", sm_80).
#pragma once

#include <cuda_runtime.h>

namespace obs_kernels {

// 1 / divisor to about half an ulp. Normal numbers below 2^126; others give what they give.
__device__ __forceinline__ float reciprocal(float divisor) {
#ifdef __CUDA_ARCH__
  float rough;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(rough) : "f"(divisor));
  return fmaf(fmaf(-divisor, rough, 1.0f), rough, rough);
#else
  return 1.0f / divisor;
#endif
}

// value / divisor, rounded as IEEE asks where quotient and remainder are normal numbers: the same
// two corrections as the compiler makes. `inverse` = reciprocal(divisor).
__device__ __forceinline__ float divide(float value, float divisor, float inverse) {
  float quotient = value * inverse;
  quotient = fmaf(fmaf(-divisor, quotient, value), inverse, quotient);
  return fmaf(fmaf(-divisor, quotient, value), inverse, quotient);
}

}  // namespace obs_kernels
