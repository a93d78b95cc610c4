// SPDX-License-Identifier: Apache-2.0
// Runs a CUDA kernel on the CPU, one host thread a CUDA thread, block after block, so that the real
// kernels meet the address and thread sanitizers of the host compiler where there is no GPU.
// test_compiled.py compiles a .cu file against this in place of <cuda_runtime.h>.
#pragma once

#include <algorithm>
#include <atomic>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

using cudaError_t = int;
using cudaStream_t = struct CUstream_st*;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorName(cudaError_t) {
  return "none";
}
inline const char* cudaGetErrorString(cudaError_t) {
  return "none";
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
enum { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaFuncAttributeMaxDynamicSharedMemorySize };
// What the smallest of the GPUs of today allows: 99 KB.
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  *value = 99 * 1024;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(const Kernel&, int, int) {
  return cudaSuccess;
}

using std::max;
using std::min;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}
struct Index {
  unsigned x;
};
inline thread_local Index threadIdx, blockIdx;
inline Index blockDim, gridDim;

namespace emulation {

constexpr unsigned kWarp = 32;
inline std::unique_ptr<std::barrier<>> block;
inline std::vector<std::unique_ptr<std::barrier<>>> warps;
inline std::vector<std::uint32_t> exchange;
inline unsigned char* dynamic = nullptr;

// Shared memory of the size that the launch asks for; past its end is a red zone.
template <typename T>
T* launch_memory() {
  return reinterpret_cast<T*>(dynamic);
}

template <typename Kernel>
void launch(unsigned grid, int threads, std::size_t bytes, const Kernel& kernel) {
  const auto count = static_cast<unsigned>(threads);
  const std::align_val_t alignment{64};
  dynamic = new (alignment) unsigned char[bytes];
  gridDim.x = grid;
  blockDim.x = count;
  block = std::make_unique<std::barrier<>>(threads);
  warps.clear();
  for (unsigned warp = 0; warp < count / kWarp; ++warp) {
    warps.push_back(std::make_unique<std::barrier<>>(kWarp));
  }
  exchange.assign(count, 0);
  std::vector<std::thread> workers;
  for (unsigned thread = 0; thread < count; ++thread) {
    workers.emplace_back([&, thread] {
      threadIdx.x = thread;
      for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x) {
        kernel();
        block->arrive_and_wait();
      }
    });
  }
  for (auto& worker : workers) worker.join();
  ::operator delete[](dynamic, alignment);
}

}  // namespace emulation

inline void __syncthreads() {
  emulation::block->arrive_and_wait();
}

inline std::uint32_t __reduce_or_sync(unsigned, std::uint32_t value) {
  const unsigned warp = threadIdx.x / emulation::kWarp;
  emulation::exchange[threadIdx.x] = value;
  emulation::warps[warp]->arrive_and_wait();
  std::uint32_t all = 0;
  for (unsigned lane = 0; lane < emulation::kWarp; ++lane) {
    all |= emulation::exchange[warp * emulation::kWarp + lane];
  }
  emulation::warps[warp]->arrive_and_wait();
  return all;
}

inline void __syncwarp() {
  emulation::warps[threadIdx.x / emulation::kWarp]->arrive_and_wait();
}

// The value of lane `source` of the `width` lanes that the caller belongs to.
template <typename T>
T __shfl_sync(unsigned, T value, int source, int width = 32) {
  emulation::exchange[threadIdx.x] = std::bit_cast<std::uint32_t>(value);
  __syncwarp();
  const unsigned group = threadIdx.x / static_cast<unsigned>(width) * static_cast<unsigned>(width);
  const auto got = std::bit_cast<T>(emulation::exchange[group + static_cast<unsigned>(source)]);
  __syncwarp();
  return got;
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  const unsigned lane = threadIdx.x % emulation::kWarp;
  return __shfl_sync(mask, value, static_cast<int>(lane ^ static_cast<unsigned>(bits)));
}

inline std::uint32_t __ballot_sync(unsigned mask, bool vote) {
  return __reduce_or_sync(mask, vote ? 1u << threadIdx.x % emulation::kWarp : 0u);
}

// Rounded alone: without -mfma the host compiler contracts nothing.
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline float __fsub_rn(float a, float b) {
  return a - b;
}
inline float __fdiv_rn(float a, float b) {
  return a / b;
}
inline std::uint32_t __float_as_uint(float value) {
  return std::bit_cast<std::uint32_t>(value);
}
inline float __uint_as_float(std::uint32_t bits) {
  return std::bit_cast<float>(bits);
}
inline int __ffs(int bits) {
  return bits == 0 ? 0 : std::countr_zero(static_cast<unsigned>(bits)) + 1;
}
inline int __clz(int bits) {
  return std::countl_zero(static_cast<unsigned>(bits));
}
inline std::uint32_t __brev(std::uint32_t bits) {
  std::uint32_t reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (bits >> i & 1u) << (31 - i);
  return reversed;
}

inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  const unsigned warp = threadIdx.x / emulation::kWarp;
  emulation::exchange[threadIdx.x] = value;
  __syncwarp();
  unsigned most = 0;
  for (unsigned lane = 0; lane < emulation::kWarp; ++lane) {
    most = std::max(most, emulation::exchange[warp * emulation::kWarp + lane]);
  }
  __syncwarp();
  return most;
}

inline int __popc(unsigned bits) {
  return std::popcount(bits);
}

struct __half {
  _Float16 value;
};
inline float __half2float(__half half) {
  return static_cast<float>(half.value);
}
inline __half __float2half_rn(float value) {
  return {static_cast<_Float16>(value)};
}

struct __nv_bfloat16 {
  std::uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 value) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16);
}
// Ties to even, which carries into the exponent as it should; NaN is not rounded up to infinity.
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if (std::isnan(value)) return {0x7FFF};
  return {static_cast<std::uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16)};
}

inline float __frsqrt_rn(float value) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(value)));
}

inline void atomicOr(unsigned long long* target, unsigned long long bits) {
  std::atomic_ref<unsigned long long>(*target).fetch_or(bits, std::memory_order_relaxed);
}
