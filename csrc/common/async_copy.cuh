// SPDX-License-Identifier: Apache-2.0
// Copies from global to shared memory that go on while the thread computes (PTX ISA, "Data Movement
// and Conversion Instructions: cp.async", sm_80 and newer). On a host they are plain copies.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace obs_kernels {

// kBytes is 4, 8 or 16, and both addresses are multiples of it. 16 bytes pass by L1.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
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

// Waits for all copies of this thread. Those of other threads need a barrier on top.
__device__ __forceinline__ void wait_for_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace obs_kernels
