// SPDX-License-Identifier: Apache-2.0
// Asks for global memory that will be read soon, without a register or a wait (PTX ISA, "Data
// Movement and Conversion Instructions: cp.async.bulk.prefetch", sm_90 and newer).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace obs_kernels {

// Brings the whole pieces of 16 bytes inside [begin, begin + bytes) into L2; older GPUs do nothing.
// One thread asks for all of it.
__device__ __forceinline__ void prefetch_to_l2(const void* begin, uint32_t bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const auto address = reinterpret_cast<uintptr_t>(begin);
  const uintptr_t first = (address + 15) & ~uintptr_t{15};
  const uintptr_t last = (address + bytes) & ~uintptr_t{15};
  if (last > first) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(first),
                 "r"(static_cast<uint32_t>(last - first)));
  }
#else
  (void)begin;
  (void)bytes;
#endif
}

}  // namespace obs_kernels
