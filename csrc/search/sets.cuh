// SPDX-License-Identifier: Apache-2.0
// n > 2: every set of n of up to 16, by halves. The entries are cut into a first and a last half. A
// lane takes a subset of the first half, eliminates it (Cholesky of the subset, then the Schur
// complement of the last half, in registers), and walks over the subsets of the last half that fill
// it up to n: a tree of eliminations that is unrolled at compile time. All lanes of a warp take
// subsets of one size, so that they walk in step. On average an elimination serves dozens of sets.
//
// gain(K + i) = gain(K) + (u_i - F_iK z)^2 / (F_ii - F_iK F_KK^-1 F_Ki), as in the reference.
#pragma once

#include <cstdint>

#include "search/group.cuh"
#include "search/rows.cuh"

namespace obs_kernels::search {

// A dead entry in a set costs more than all live ones may gain: such a set is taken only where
// there is no other. Decoupled, it changes nothing else; its square times 16 is still a number.
constexpr float kDeadLinear = 1e18f;
constexpr float kDeadPivot = -1.0f;

// Two things to do with the sets that a lane meets, subset after subset of the first half (`place`
// of `count` of its size; lanes without work of their own repeat the last one and are not active).

// The best one. A subset's own sets come in lexicographic order, subsets do not.
struct KeepBest {
  Best best{-INFINITY, 0u};
  Best inside{-INFINITY, 0u};

  __device__ __forceinline__ void begin(int, int, bool) { inside = {-INFINITY, 0u}; }
  __device__ __forceinline__ void take(float gain, uint32_t key, int) {
    if (gain > inside.gain) inside = {gain, key};
  }
  __device__ __forceinline__ void end(int) { take_better(inside.gain, inside.key, best); }
  __device__ __forceinline__ void end_size() {}
};

// The gain of each into a table, in the order of ColumnTables: lanes write next to each other.
struct StoreGains {
  float* table;
  float unit;
  int m;  // sets that reach beyond are none
  int first = 0;
  int at = 0;
  int step = 0;
  int after = 0;
  bool stores = false;

  __device__ __forceinline__ void begin(int count, int place, bool active) {
    at = first + place;
    step = count;
    stores = active;
  }
  __device__ __forceinline__ void take(float gain, uint32_t, int last) {
    if (last >= m) return;
    if (stores) table[at] = gain * unit;
    at += step;
  }
  __device__ __forceinline__ void end(int place) { after = at - place; }
  __device__ __forceinline__ void end_size() { first = after; }
};

// Curvature and linear part of the last kSize entries, the earlier ones of a set eliminated.
template <int kSize>
struct Rest {
  float f[kSize * (kSize + 1) / 2 + 1];  // never empty
  float u[kSize + 1];
};

// Subsets of kCount of the entries kFrom .. of `rest`, on top of `gain` and `key`, in lexicographic
// order, to visitor.take(gain, key, last entry). `first` is the place of the first entry of `rest`
// in the group.
template <int kSize, int kCount, int kFrom = 0, typename Visitor>
__device__ __forceinline__ void walk(
    const Rest<kSize>& rest, float gain, uint32_t key, int first, Visitor& visitor) {
  if constexpr (kCount == 0) {
    visitor.take(gain, key, first - 1);
  } else if constexpr (kCount == 1) {
#pragma unroll
    for (int i = kFrom; i < kSize; ++i) {
      const float pivot = rest.f[Group<kSize>::at(i, i)];
      const float sum = grown(gain, rest.u[i], pivot, reciprocal(pivot));
      visitor.take(sum, key | 0x80000000u >> (first + i), first + i);
    }
  } else if constexpr (kCount <= kSize - kFrom) {
    // with entry kFrom: eliminate it
    constexpr int kLeft = kSize - kFrom - 1;
    const float pivot = rest.f[Group<kSize>::at(kFrom, kFrom)];
    const float value = rest.u[kFrom];
    const float inverse = reciprocal(pivot);
    Rest<kLeft> next;
    for_each_index<kLeft>([&](auto row) {
      constexpr int i = decltype(row)::value;
      constexpr int kRow = kFrom + 1 + i;
      const float part = rest.f[Group<kSize>::at(kFrom, kRow)] * inverse;
      next.u[i] = fmaf(-part, value, rest.u[kRow]);
#pragma unroll
      for (int j = i; j < kLeft; ++j) {
        next.f[Group<kLeft>::at(i, j)] = fmaf(-part,
                                              rest.f[Group<kSize>::at(kFrom, kFrom + 1 + j)],
                                              rest.f[Group<kSize>::at(kRow, kFrom + 1 + j)]);
      }
    });
    const float sum = grown(gain, value, pivot, inverse);
    const uint32_t with = key | 0x80000000u >> (first + kFrom);
    walk<kLeft, kCount - 1>(next, sum, with, first + kFrom + 1, visitor);
    walk<kSize, kCount, kFrom + 1>(rest, gain, key, first, visitor);
  }
}

// Eliminates the kCount entries of `subset` (bits, of the first half): their gain, and the rest.
template <int kHalf, int kCount>
__device__ __forceinline__ float eliminate(
    const float* f, int stride, const float* u, uint32_t subset, Rest<kHalf>& rest) {
  float gain = 0.0f;
  for_each_index<kHalf>([&](auto row) {
    constexpr int i = decltype(row)::value;
    rest.u[i] = u[kHalf + i];
#pragma unroll
    for (int j = i; j < kHalf; ++j) {
      rest.f[Group<kHalf>::at(i, j)] = f[(kHalf + i) * stride + kHalf + j];
    }
  });
  // F_KK = L D L^T. Of each entry k of the set: coupling[k][i] = (L D)_ki, and row k of L^-1
  // F_K,rest with L^-1 u_K behind it, which leaves the rest at once.
  constexpr int kRoom = kCount > 0 ? kCount : 1;
  float coupling[kRoom][kRoom];
  float inverse[kRoom];
  float across[kRoom][kHalf + 1];
  int place[kRoom];
  for_each_index<kCount>([&](auto step) {
    constexpr int k = decltype(step)::value;
    place[k] = __ffs(static_cast<int>(subset)) - 1;
    subset &= subset - 1u;
    const float* const line = f + place[k] * stride;
    float pivot = line[place[k]];
    float value = u[place[k]];
    float share[kRoom];
#pragma unroll
    for (int j = 0; j < kHalf; ++j) across[k][j] = line[kHalf + j];
#pragma unroll
    for (int i = 0; i < k; ++i) {
      float own = line[place[i]];
#pragma unroll
      for (int h = 0; h < i; ++h) own = fmaf(-share[h], coupling[i][h], own);
      coupling[k][i] = own;
      share[i] = own * inverse[i];
      pivot = fmaf(-share[i], own, pivot);
      value = fmaf(-share[i], across[i][kHalf], value);
#pragma unroll
      for (int j = 0; j < kHalf; ++j) across[k][j] = fmaf(-share[i], across[i][j], across[k][j]);
    }
    inverse[k] = reciprocal(pivot);
    across[k][kHalf] = value;
    gain = grown(gain, value, pivot, inverse[k]);
    for_each_index<kHalf>([&](auto row) {
      constexpr int i = decltype(row)::value;
      const float part = across[k][i] * inverse[k];
      rest.u[i] = fmaf(-part, value, rest.u[i]);
#pragma unroll
      for (int j = i; j < kHalf; ++j) {
        float& target = rest.f[Group<kHalf>::at(i, j)];
        target = fmaf(-part, across[k][j], target);
      }
    });
  });
  return gain;
}

}  // namespace obs_kernels::search
