// SPDX-License-Identifier: Apache-2.0
// What the kernels of this topic share: a thread for each column of a Fisher block.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/pieces.cuh"
#include "obs_kernels/update.h"

namespace obs_kernels::update {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

__device__ __forceinline__ float load_weight(const void* weight, int64_t at, WeightType type) {
  if (type == WeightType::kFloat32) return static_cast<const float*>(weight)[at];
  if (type == WeightType::kFloat16) return __half2float(static_cast<const __half*>(weight)[at]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(weight)[at]);
}

__device__ __forceinline__ void store_weight(void* weight,
                                             int64_t at,
                                             WeightType type,
                                             float value) {
  if (type == WeightType::kFloat32) {
    static_cast<float*>(weight)[at] = value;
  } else if (type == WeightType::kFloat16) {
    static_cast<__half*>(weight)[at] = __float2half_rn(value);
  } else {
    static_cast<__nv_bfloat16*>(weight)[at] = __float2bfloat16_rn(value);
  }
}

// Where a thread stands.
template <typename Config>
struct Place {
  int group;      // of the block of threads
  int lane;       // of the group: the column, later the kept entry, that the thread has
  int64_t block;  // Fisher block
  bool live;      // whether there is such a Fisher block
  int64_t at;     // weight of the column
  bool real;      // whether there is such a weight

  __device__ __forceinline__ Place(int64_t num_blocks, int64_t size, int64_t num_weights)
      : group(static_cast<int>(threadIdx.x) / Config::kSize),
        lane(static_cast<int>(threadIdx.x) % Config::kSize),
        block(int64_t{blockIdx.x} * Config::kGroups + group),
        live(Config::kGroups == 1 || block < num_blocks),
        at(block * size + lane),
        real(live && lane < size && at < num_weights) {}
};

template <typename Config>
__device__ __forceinline__ void sync_group() {
  if constexpr (Config::kWarps == 1) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// A size that is known when compiling. The addresses of all loads are then one register and what
// an instruction holds itself, and no load asks whether there is such a row.
template <int kValue>
struct Fixed {
  __device__ constexpr operator int() const { return kValue; }
};
template <typename Size>
constexpr bool kIsFixed = false;
template <int kValue>
constexpr bool kIsFixed<Fixed<kValue>> = true;

template <int kDepth, typename Size, typename Start, typename Visit>
__device__ __forceinline__ void walk_rows(
    const float* column, Size size, bool has_column, Start start, Visit visit) {
#pragma unroll 1
  for (int first = 0; first < size; first += kDepth) {
    float values[kDepth];
#pragma unroll
    for (int e = 0; e < kDepth; ++e) {
      values[e] = 0.0f;
      if (has_column && (kIsFixed<Size> || first + e < size)) values[e] = column[e * size];
    }
    column += kDepth * size;
    start(first);
#pragma unroll
    for (int e = 0; e < kDepth; ++e) visit(e, values[e]);
  }
}

// The rows of column `lane`, in ascending order and up to kDepth loads ahead: start(first) before
// those loads are used, then visit(e, value) for rows first + e. Rows beyond `size` count as zeros.
// `size` is kSize or less.
template <int kSize, int kDepth, typename Start, typename Visit>
__device__ __forceinline__ void for_each_row(
    const float* matrix, int lane, int size, bool live, Start start, Visit visit) {
  static_assert(kSize % kDepth == 0, "whole columns");
  if (size == kSize) {
    walk_rows<kDepth>(matrix + lane, Fixed<kSize>{}, live, start, visit);
  } else {
    // Each load in flight has an address of its own here: 8 of them are what registers allow.
    constexpr int kFew = kDepth < 8 ? kDepth : 8;
    walk_rows<kFew>(matrix + lane, size, live && lane < size, start, visit);
  }
}

}  // namespace obs_kernels::update
