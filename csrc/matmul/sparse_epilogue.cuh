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
// 1 of row(), then of row() + 8.
struct SumPlace {
  int first_row;    // of the warpgroup's 64
  int first_token;  // of what is written
  int warpgroup;
  int thread;

  // Computed anew: registers are full.
  __device__ __forceinline__ int row() const {
    return first_row + thread / 32 * 16 + hopper::lane_here() / 4;
  }
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

// Where a lane stores its rows of four 8 x 8 matrices in a slab of 64 tokens, 16 of them at a time:
// rows 0 to 7 and 8 to 15 of the warp's of the first 8 tokens, then of the next 8. The lines of a
// slab are tokens of 64 rows, or, for feature-major y, rows of 64 tokens; the swizzle XORs the
// number of a 16-byte chunk with that of its line, modulo 8.
template <bool kFeatureY>
struct SlabPlace {
  uint32_t first;

  __device__ __forceinline__ SlabPlace(int warp, int lane) {
    const int matrix = lane / 8;
    const int half = kFeatureY ? matrix % 2 : matrix / 2;  // of the 16 lines that are stored
    const int line = (kFeatureY ? warp * 16 : 0) + half * 8 + lane % 8;
    const int chunk = kFeatureY ? matrix / 2 : 2 * warp + matrix % 2;
    first = static_cast<uint32_t>(line * 128 + ((chunk ^ (lane % 8)) << 4));
  }
  // Of the `pair`-th 16 tokens, a constant: 16 lines on, or two chunks. `buffer`: whole patterns of
  // the swizzle.
  __device__ __forceinline__ uint32_t at(uint32_t buffer, int pair) const {
    return kFeatureY ? buffer + (first ^ static_cast<uint32_t>(pair << 5))
                     : buffer + first + static_cast<uint32_t>(pair * 16 * 128);
  }
};

// By slabs of 64 tokens through `buffers` of shared memory, kBuffers of them on their way. Each
// slab leaves as soon as it is there, so that its buffer is free again by the time it is wanted.
// `slabs_before` of the warpgroup's share of the tile are on their way already, a constant. The
// tensor cores idle meanwhile: what counts here is the number of instructions.
template <typename Element, int kTokens, bool kFeatureY>
__device__ __forceinline__ void write_boxes(const float (&sum)[kTokens / 2],
                                            const CUtensorMap& y_map,
                                            const SumPlace& place,
                                            uint32_t buffers,
                                            int slabs_before) {
  using namespace hopper;
  const SlabPlace<kFeatureY> lines(place.thread / 32, lane_here());
#pragma unroll
  for (int slab = 0; slab < kTokens / kSlabTokens; ++slab) {
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
      store_matrices<!kFeatureY>(lines.at(buffer, pair), part);
    }
    fence_async_shared();
    named_barrier(1 + place.warpgroup, kWarpgroup);
    if (place.thread == 0) {  // what lies outside of y is left out
      const int token = place.first_token + slab * kSlabTokens;
      store_box(
          &y_map, kFeatureY ? token : place.first_row, kFeatureY ? place.first_row : token, buffer);
      store_commit();
    }
  }
}

// The first `count` tokens of those, for rows or a start of Y at no multiples of 16 bytes, which
// the copy engine does not take.
template <typename Element, int kTokens>
__device__ __forceinline__ void write_elements(const float (&sum)[kTokens / 2],
                                               const SparseArgs<Element>& args,
                                               const SumPlace& place,
                                               int count = kTokens) {
  const int64_t end = min(args.tokens, int64_t{place.first_token} + count);
  const int64_t first_row = place.row();
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) {
    const int64_t row = first_row + i / 2 % 2 * 8;
    const int64_t token = place.first_token + i / 4 * 8 + place.thread % 4 * 2 + i % 2;
    if (row < args.rows && token < end) {
      const int64_t at = args.feature_y ? row * args.tokens + token : token * args.rows + row;
      args.y[at] = static_cast<Element>(sum[i]);
    }
  }
}

}  // namespace obs_kernels
