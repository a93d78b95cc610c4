// SPDX-License-Identifier: Apache-2.0
// Instructions that C++ has no word for. Each has a second meaning in plain C++ for the tests that
// run kernels on the host; section numbers are those of the PTX ISA.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace obs_kernels {

// Copies kBytes from global to shared memory without a register, both aligned to kBytes; done when
// async_wait says so. 9.7.9.25.3. Sixteen bytes pass by L1: what is copied is read once.
template <int kBytes>
__device__ __forceinline__ void async_copy(void* shared, const void* global) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "sizes of cp.async");
#ifdef __CUDA_ARCH__
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(kBytes)
                 : "memory");
  }
#else
  std::memcpy(shared, global, kBytes);
#endif
}

// Closes a group of copies of this thread, be it empty.
__device__ __forceinline__ void async_commit() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the kGroups latest groups of this thread are on their way. Other threads see
// the copies after a barrier.
template <int kGroups>
__device__ __forceinline__ void async_wait() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

// Asks for the sector around `global` to be brought into L2. 9.7.9.15.
__device__ __forceinline__ void prefetch_l2(const void* global) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
#else
  (void)global;
#endif
}

__device__ __forceinline__ float bits_to_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}

// The value of an IEEE half, exactly. 9.7.9.21.
__device__ __forceinline__ float half_to_float(uint16_t half) {
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
#else
  const uint32_t sign = (half & 0x8000u) << 16;
  const uint32_t exponent = half >> 10 & 0x1Fu;
  const uint32_t mantissa = half & 0x3FFu;
  if (exponent == 0) {  // zero or subnormal: a multiple of 2^-24
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  const uint32_t wide = exponent == 0x1F ? 0xFFu : exponent + (127 - 15);
  return bits_to_float(sign | wide << 23 | mantissa << 13);
#endif
}

}  // namespace obs_kernels
