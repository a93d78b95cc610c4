// SPDX-License-Identifier: Apache-2.0
// Groups of 9 to 16 weights: the pairs by a loop over a copy of the block in shared memory.
// Unrolled over registers, as for smaller groups, 120 pairs are 100 KB of instructions that each
// warp meets once, and fetching them takes three times as long as running them.
#pragma once

#include <cstdint>

#include "common/division.cuh"
#include "search/group.cuh"

namespace obs_kernels::search {

struct alignas(8) Own {
  float f;  // on the diagonal
  float u;
};

// A thread's block, entry after entry and a lane apart, so that all lanes meet other banks.
template <int kSize>
struct Indexed {
  static constexpr int kTriangle = kSize * (kSize + 1) / 2;
  static constexpr int kFloats = kWarp * (kTriangle + 2 * kSize);  // of a warp

  const float* entries;
  const Own* own;

  __device__ __forceinline__ float at(int row, int col) const {
    return entries[kWarp * Group<kSize>::at(row, col)];
  }
  __device__ __forceinline__ const Own& of(int i) const { return own[kWarp * i]; }
};

template <int kSize>
__device__ __forceinline__ Indexed<kSize> make_indexed(const Group<kSize>& group,
                                                       int lane,
                                                       float* memory) {
  auto* const own = reinterpret_cast<Own*>(memory + kWarp * Indexed<kSize>::kTriangle) + lane;
  for_each_index<kSize>([&](auto row) {
    constexpr int i = decltype(row)::value;
    own[kWarp * i] = {group.f[Group<kSize>::at(i, i)], group.u[i]};
#pragma unroll
    for (int j = i; j < kSize; ++j) {
      constexpr int kFirst = Group<kSize>::at(i, i);
      memory[kWarp * (kFirst + j - i) + lane] = group.f[kFirst + j - i];
    }
  });
  return {memory + lane, own};
}

// Four pairs that follow one another in lexicographic order; `count` of them exist.
struct FourPairs {
  int first[4];
  int second[4];
  float coupling[4];
  float gain[4];
  int count;
};

// body(index of the first, pairs) for all pairs of the first m entries.
template <int kSize, typename Body>
__device__ __forceinline__ void for_each_four_pairs(const Indexed<kSize>& block,
                                                    int m,
                                                    const Body& body) {
  const int total = m * (m - 1) / 2;
  int a = 0;
  int b = 1;
#pragma unroll 1
  for (int index = 0; index < total; index += 4) {
    FourPairs pairs;
    pairs.count = total - index < 4 ? total - index : 4;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const Own one = block.of(a);
      const Own other = block.of(b);
      const float coupling = block.at(a, b);
      const float above = pair_numerator(one.f, other.f, coupling, one.u, other.u);
      const float below = pair_determinant(one.f, other.f, coupling);
      pairs.first[e] = a;
      pairs.second[e] = b;
      pairs.coupling[e] = coupling;
      pairs.gain[e] = divide(above, below, reciprocal(below));
      // Past the last pair it stays there.
      const bool last = b == m - 1;
      a += last && a < m - 2 ? 1 : 0;
      b = last ? a + 1 : b + 1;
    }
    body(index, pairs);
  }
}

// As choose() for registers.
template <int kSize>
__device__ __forceinline__ Choice
choose_indexed(const Indexed<kSize>& block, uint32_t open, int n, int m) {
  const int count = __popc(open);
  float best = -INFINITY;
  float coupling = 0.0f;
  int first = -1;
  int second = -1;
  if (n == 2 && count >= 2) {
    for_each_four_pairs(block, m, [&](int, const FourPairs& pairs) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const uint32_t both = 1u << pairs.first[e] | 1u << pairs.second[e];
        const bool exists = e < pairs.count && (~open & both) == 0u;
        // NaN wins, so that something is chosen in any case
        if (exists && !(pairs.gain[e] <= best)) {
          best = pairs.gain[e];
          coupling = pairs.coupling[e];
          first = pairs.first[e];
          second = pairs.second[e];
        }
      }
    });
  } else if (count >= 1) {
#pragma unroll 1
    for (int a = 0; a < m; ++a) {
      const Own one = block.of(a);
      const float gain = single_gain(one.f, one.u);
      if ((open >> a & 1u) && !(gain <= best)) {
        best = gain;
        first = second = a;
      }
    }
  }
  if (first < 0) return {0u, -1, -1, 0.0f, 0.0f};
  return make_choice(first,
                     second,
                     coupling,
                     block.of(first).f,
                     block.of(first).u,
                     block.of(second).f,
                     block.of(second).u);
}

// As store_gains() for registers.
template <int kSize, bool kExact>
__device__ __forceinline__ void store_gains_indexed(const Indexed<kSize>& block,
                                                    uint32_t live,
                                                    float unit,
                                                    int n,
                                                    int m,
                                                    bool masked,
                                                    float* table) {
  if (n == 1) {
#pragma unroll 1
    for (int a = 0; a < m; ++a) {
      const float gain = single_gain(block.of(a).f, block.of(a).u) * unit;
      table[a] = masked ? with_dead(gain, !(live >> a & 1u)) : gain;
    }
    return;
  }
  for_each_four_pairs(block, m, [&](int index, const FourPairs& pairs) {
    Four four;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float gain = pairs.gain[e] * unit;
      const bool dead = (~live & (1u << pairs.first[e] | 1u << pairs.second[e])) != 0u;
      four.at[e] = masked ? with_dead(gain, dead) : gain;
    }
    if constexpr (kExact) {  // whole fours of an aligned table
      *reinterpret_cast<Four*>(table + index) = four;
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (e < pairs.count) table[index + e] = four.at[e];
      }
    }
  });
}

}  // namespace obs_kernels::search
