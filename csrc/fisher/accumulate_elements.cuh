// SPDX-License-Identifier: Apache-2.0
// Gradients of three types as f32.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/device.cuh"
#include "common/pieces.cuh"

namespace obs_kernels::accumulate {

struct Float32 {
  static constexpr int kBytes = 4;
};
struct Float16 {
  static constexpr int kBytes = 2;
  __device__ __forceinline__ static float low(uint32_t pair) {
    return half_to_float(static_cast<uint16_t>(pair & 0xFFFFu));
  }
  __device__ __forceinline__ static float high(uint32_t pair) {
    return half_to_float(static_cast<uint16_t>(pair >> 16));
  }
};
struct Bfloat16 {
  static constexpr int kBytes = 2;
  __device__ __forceinline__ static float low(uint32_t pair) { return bits_to_float(pair << 16); }
  __device__ __forceinline__ static float high(uint32_t pair) {
    return bits_to_float(pair & 0xFFFF0000u);
  }
};

// Words of `kCount` neighbouring elements; a lone element of 16 bits lies in the low half of one.
template <typename Element, int kCount>
__host__ __device__ constexpr int words_of() {
  return kCount * Element::kBytes >= 4 ? kCount * Element::kBytes / 4 : 1;
}

template <typename Element, int kCount>
__device__ __forceinline__ void load_words(const void* from,
                                           uint32_t (&words)[words_of<Element, kCount>()]) {
  if constexpr (kCount * Element::kBytes < 4) {
    words[0] = *static_cast<const uint16_t*>(from);
  } else {
    constexpr int kWords = words_of<Element, kCount>();
    const auto loaded = *static_cast<const Piece<uint32_t, kWords>*>(from);
#pragma unroll
    for (int at = 0; at < kWords; ++at) words[at] = loaded.at[at];
  }
}

template <typename Element, int kCount>
__device__ __forceinline__ void widen(const uint32_t (&words)[words_of<Element, kCount>()],
                                      float* values) {
  if constexpr (Element::kBytes == 4) {
#pragma unroll
    for (int at = 0; at < kCount; ++at) values[at] = bits_to_float(words[at]);
  } else {
#pragma unroll
    for (int at = 0; at < kCount; ++at) {
      values[at] = at % 2 == 0 ? Element::low(words[at / 2]) : Element::high(words[at / 2]);
    }
  }
}

}  // namespace obs_kernels::accumulate
