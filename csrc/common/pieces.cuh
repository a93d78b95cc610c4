// SPDX-License-Identifier: Apache-2.0
// Neighbouring elements read or written at once, as wide as their alignment allows.
#pragma once

#include <cuda_runtime.h>

namespace obs_kernels {

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Piece {
  T at[kCount];
};

using Four = Piece<float, 4>;

// Neighbours of one row of a matrix from column `first`, kVector at once; those at or beyond
// `size` are not touched.
template <int kVector, int kCount>
__device__ __forceinline__ void load_row(const float* row,
                                         int first,
                                         int size,
                                         float (&values)[kCount]) {
#pragma unroll
  for (int piece = 0; piece < kCount; piece += kVector) {
    if (first + piece >= size) continue;
    const auto loaded = *reinterpret_cast<const Piece<float, kVector>*>(row + first + piece);
#pragma unroll
    for (int at = 0; at < kVector; ++at) values[piece + at] = loaded.at[at];
  }
}

template <int kVector, int kCount>
__device__ __forceinline__ void store_row(float* row,
                                          int first,
                                          int size,
                                          const float (&values)[kCount]) {
#pragma unroll
  for (int piece = 0; piece < kCount; piece += kVector) {
    if (first + piece >= size) continue;
    Piece<float, kVector> stored;
#pragma unroll
    for (int at = 0; at < kVector; ++at) stored.at[at] = values[piece + at];
    *reinterpret_cast<Piece<float, kVector>*>(row + first + piece) = stored;
  }
}

}  // namespace obs_kernels
