// SPDX-License-Identifier: Apache-2.0
// From sums to Y: bias, activation, rounding, and out by the copy engine or element by element.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/hopper.cuh"
#include "matmul/activation.cuh"
#include "matmul/sparse_layout.cuh"

namespace obs_kernels {

template <Activation kActivation, int kSums>
__device__ __forceinline__ void activate_all(float (&sum)[kSums]) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) sum[i] = activate<kActivation>(sum[i]);
}

__device__ __forceinline__ uint32_t pack_pair(float low, float high, const __nv_bfloat16*) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

__device__ __forceinline__ uint32_t pack_pair(float low, float high, const __half*) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// Where the sums of a thread belong: d[4i .. 4i + 3] of wgmma_sp.cuh are tokens 8i + 2q, 8i + 2q +
// 1 of `row`, then of row + 8.
struct SumPlace {
  int first_row;    // of the warpgroup's 64
  int first_token;  // of what is written
  int row;
  int warpgroup;
  int thread;
};

template <typename Element>
__device__ __forceinline__ void load_bias(float (&bias)[2],
                                          const SparseArgs<Element>& args,
                                          int row) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = row + 8 * half;
    bias[half] = args.bias != nullptr && at < args.rows ? static_cast<float>(args.bias[at]) : 0.0f;
  }
}

template <int kSums>
__device__ __forceinline__ void finish_sums(float (&sum)[kSums],
                                            const float (&bias)[2],
                                            Activation activation) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) sum[i] += bias[i / 2 % 2];
  switch (activation) {
    case Activation::kRelu:
      activate_all<Activation::kRelu>(sum);
      break;
    case Activation::kGelu:
      activate_all<Activation::kGelu>(sum);
      break;
    case Activation::kGeluTanh:
      activate_all<Activation::kGeluTanh>(sum);
      break;
    case Activation::kSilu:
      activate_all<Activation::kSilu>(sum);
      break;
    case Activation::kNone:
      break;
  }
}

// By slabs of 64 tokens through `buffers` of shared memory, kBuffers of them on their way. Each
// slab leaves as soon as it is there, so that its buffer is free again by the time it is wanted.
// `slabs_before` of the warpgroup's share of the tile are on their way already, a constant.
template <typename Element, int kTokens>
__device__ __forceinline__ void write_boxes(const float (&sum)[kTokens / 2],
                                            const CUtensorMap& y_map,
                                            const SparseArgs<Element>& args,
                                            const SumPlace& place,
                                            uint32_t buffers,
                                            int slabs_before) {
  using namespace hopper;
  constexpr int kSlabs = kTokens / kSlabTokens;
  const int lane = lane_here();
  const int warp = place.thread / 32;
  const int matrix = lane / 8;  // of the four that one instruction stores
#pragma unroll
  for (int slab = 0; slab < kSlabs; ++slab) {
    const int number = slabs_before + slab;
    const uint32_t buffer = buffers + number % kBuffers * kSlabBytes;
    // The stores of this thread that may still be reading are of buffers not used now.
    if (number == 0 || number >= kBuffers) {
      if (place.thread == 0) {
        if (number == 0) {
          store_wait_read<0>();  // of the tile before
        } else {
          store_wait_read<kBuffers - 1>();
        }
      }
      named_barrier(1 + place.warpgroup, kWarpgroup);
    }
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {  // 16 tokens
      uint32_t part[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int i = slab * 32 + pair * 8 + 2 * j;
        part[j] = pack_pair(sum[i], sum[i + 1], static_cast<const Element*>(nullptr));
      }
      // Matrices: rows 0 to 7 and 8 to 15 of the first 8 tokens, then of the next 8.
      if (args.feature_y) {
        const int line = warp * 16 + 8 * (matrix % 2) + lane % 8;
        const int chunk = 2 * pair + matrix / 2;
        store_matrices<false>(buffer + line * 128 + ((chunk ^ (line % 8)) << 4), part);
      } else {
        const int line = 16 * pair + 8 * (matrix / 2) + lane % 8;
        const int chunk = 2 * warp + matrix % 2;
        store_matrices<true>(buffer + line * 128 + ((chunk ^ (line % 8)) << 4), part);
      }
    }
    fence_async_shared();
    named_barrier(1 + place.warpgroup, kWarpgroup);
    if (place.thread == 0) {
      const int token = place.first_token + slab * kSlabTokens;
      if (place.first_row < args.rows && token < args.tokens) {
        const int inner = args.feature_y ? token : place.first_row;
        const int outer = args.feature_y ? place.first_row : token;
        store_box(&y_map, inner, outer, buffer);
      }
      store_commit();
    }
  }
}

// For rows or a start of Y at no multiples of 16 bytes, which the copy engine does not take.
template <typename Element, int kTokens>
__device__ __forceinline__ void write_elements(const float (&sum)[kTokens / 2],
                                               const SparseArgs<Element>& args,
                                               const SumPlace& place) {
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) {
    const int64_t row = place.row + i / 2 % 2 * 8;
    const int64_t token = place.first_token + i / 4 * 8 + place.thread % 4 * 2 + i % 2;
    if (row < args.rows && token < args.tokens) {
      const int64_t at = args.feature_y ? row * args.tokens + token : token * args.rows + row;
      args.y[at] = static_cast<Element>(sum[i]);
    }
  }
}

}  // namespace obs_kernels
