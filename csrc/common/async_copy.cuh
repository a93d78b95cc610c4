// SPDX-License-Identifier: Apache-2.0
// Copies from global to shared memory that pass no register (PTX ISA, "cp.async", sm_80). Compiled
// for the host, where the emulation of the tests runs, they are plain copies.
#pragma once

#include <cuda_runtime.h>

#include <cstring>

namespace obs_kernels {

// kBytes of 4 or 16, both addresses aligned to them.
template <int kBytes>
__device__ __forceinline__ void copy_async(float* shared, const float* global) {
  static_assert(kBytes == 4 || kBytes == 16, "sizes that cp.async knows");
#ifdef __CUDA_ARCH__
  const auto target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    // .cg: read once, so the first cache is better left to others
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(global) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(target), "l"(global) : "memory");
  }
#else
  std::memcpy(shared, global, kBytes);
#endif
}

__device__ __forceinline__ void commit_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all committed groups of this thread but the latest kPending.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace obs_kernels
