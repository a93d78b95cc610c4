// SPDX-License-Identifier: Apache-2.0
// 1 / sqrt(x) in five instructions (PTX ISA, "Floating Point Instructions: rsqrt").
#pragma once

#include <cuda_runtime.h>

#include <cmath>

namespace obs_kernels {

// Right to about an ulp: the approximation of the hardware and one step of Newton's. NaN unless x
// is a normal positive number: the step makes NaN of 0 and infinity, too, which are what the
// approximation gives for infinity, 0 and subnormal x.
__device__ __forceinline__ float reciprocal_root(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return fmaf(0.5f * y, fmaf(-x * y, y, 1.0f), y);
#else
  return std::isnormal(x) && x > 0.0f ? 1.0f / std::sqrt(x) : NAN;
#endif
}

}  // namespace obs_kernels
