// SPDX-License-Identifier: Apache-2.0
// What all search kernels share beside the gains of kept sets: the scale of a block, and the order
// of gains with dead entries.
#pragma once

#include <cuda_runtime.h>

#include <cfloat>
#include <cstdint>

#include "common/division.cuh"
#include "common/pair_gain.cuh"
#include "obs_kernels/search.h"
#include "search/launches.h"

namespace obs_kernels::search {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// gain + value^2 / pivot. Hundreds of these stand in a row, and a branch in each would keep the
// compiler from mixing them. Pivots are of the scale of 1 here.
__device__ __forceinline__ float grown(float gain, float value, float pivot, float inverse) {
  return __fadd_rn(gain, divide(__fmul_rn(value, value), pivot, inverse));
}

// A power of four near the largest diagonal, and its reciprocal. Gains are of the third order in F
// and would underflow below 1e-13; a power of two changes no bit otherwise.
struct Unit {
  float value;
  float inverse;
};

__device__ __forceinline__ Unit unit_of(float top) {
  if (!(top > 0.0f && top <= FLT_MAX)) return {1.0f, 1.0f};
  // frexp: top = x * 2^exponent with 1/2 <= x < 1; a denormal counts as the least normal number.
  int exponent = static_cast<int>(__float_as_uint(top) >> 23) - 126;
  exponent -= exponent & 1;
  exponent = exponent > 126 ? 126 : exponent < -124 ? -124 : exponent;
  return {__uint_as_float(static_cast<unsigned>(exponent + 127) << 23),
          __uint_as_float(static_cast<unsigned>(127 - exponent) << 23)};
}

__device__ __forceinline__ bool good_pivot(float pivot) {
  return pivot > 0.0f && pivot <= FLT_MAX;
}

__device__ __forceinline__ bool good_damp(float damp) {
  return damp >= 0.0f && damp <= FLT_MAX;
}

// A gain in the table of a row, so that the largest entry is the best of those that hold the fewest
// dead entries. With a dead one: a negative number, the larger the gain the nearer to zero.
constexpr unsigned kDeadTop = 0x7F000000u;

__device__ __forceinline__ float with_dead(float gain, bool dead) {
  const float clamped = fminf(fmaxf(gain, 0.0f), 1e38f);
  return dead ? -__uint_as_float(kDeadTop - __float_as_uint(clamped)) : clamped;
}

__device__ __forceinline__ float without_dead(float entry) {
  const unsigned bits = __float_as_uint(entry);
  return bits >> 31 ? __uint_as_float(kDeadTop - (bits & 0x7FFFFFFFu)) : entry;
}

__device__ __forceinline__ uint32_t all_bits(int m) {
  return m == 32 ? 0xFFFFFFFFu : (1u << m) - 1u;
}

// The best of some sets: `key` has bit 31 - i for entry i, so that of equal sizes the
// lexicographically first has the largest.
struct Best {
  float gain;
  uint32_t key;
};

__device__ __forceinline__ void take_better(float gain, uint32_t key, Best& best) {
  if (gain > best.gain || (gain == best.gain && key > best.key)) best = {gain, key};
}

// The best of all lanes, for all of them; with a gain that is not a number, of some.
__device__ __forceinline__ Best best_of_warp(Best best) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const float gain = __shfl_xor_sync(kAllLanes, best.gain, distance);
    take_better(gain, __shfl_xor_sync(kAllLanes, best.key, distance), best);
  }
  return best;
}

// The n lowest of more entries.
__device__ __forceinline__ uint32_t lowest(uint32_t entries, int n) {
  while (__popc(entries) > n) entries &= ~(1u << (31 - __clz(static_cast<int>(entries))));
  return entries;
}

// Columns that the panel of a group leaves open.
__device__ __forceinline__ uint32_t open_columns(const Task& task, int64_t group) {
  if (task.column_bits == nullptr) return 0xFFFFFFFFu;
  const int64_t row = group / task.wide;
  return task.column_bits[row / task.v * task.wide + (group - row * task.wide)];
}

}  // namespace obs_kernels::search
