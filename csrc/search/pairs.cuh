// SPDX-License-Identifier: Apache-2.0
// n <= 2 and m <= 16: one pass over the blocks, a thread a group.
#pragma once

#include <cstdint>

#include "search/group.cuh"
#include "search/indexed.cuh"

namespace obs_kernels::search {

template <int kSize, bool kExact>
__device__ __forceinline__ void store_choice(const Task& task,
                                             int64_t at,
                                             uint32_t kept,
                                             float loss,
                                             int32_t info,
                                             const float (&w)[kSize]) {
  const SearchParams& p = task.groups;
  const int m = static_cast<int>(p.m);
  p.info[at] = info;
  p.saliency[at] = loss;
  uint8_t* const mask = p.mask + at * m;
  if constexpr (kExact) {
    auto* const words = reinterpret_cast<uint32_t*>(mask);
#pragma unroll
    for (int word = 0; word < kSize / 4; ++word) {
      // four bits to four bytes: bit i lands at 8 i, and nothing else below it in that byte
      words[word] = (kept >> 4 * word & 15u) * 0x00204081u & 0x01010101u;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (i < m) mask[i] = static_cast<uint8_t>(kept >> i & 1u);
    }
  }
  if (p.new_weight == nullptr) return;
  float* const target = p.new_weight + at * m;
  if constexpr (kExact) {
#pragma unroll
    for (int col = 0; col < kSize; col += 4) {
      *reinterpret_cast<Four*>(target + col) = {w[col], w[col + 1], w[col + 2], w[col + 3]};
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (i < m) target[i] = w[i];
    }
  }
}

// Gains of all kept sets, in lexicographic order; four at a time where the table is aligned: single
// ones of 32 lanes would be as many sectors.
template <int kSize, bool kExact>
__device__ __forceinline__ void store_gains(
    const Group<kSize>& group, int n, int m, bool masked, float* table) {
  if (n == 1) {
#pragma unroll
    for (int a = 0; a < kSize; ++a) {
      const float gain = single_gain(group.f[Group<kSize>::at(a, a)], group.u[a]) * group.unit;
      if (a < m) table[a] = masked ? with_dead(gain, !(group.live >> a & 1u)) : gain;
    }
    return;
  }
  Four four;
  for_each_index<kSize>([&](auto row) {
    constexpr int a = decltype(row)::value;
#pragma unroll
    for (int b = a + 1; b < kSize; ++b) {
      const float gain = pair_gain(group.f[Group<kSize>::at(a, a)],
                                   group.f[Group<kSize>::at(b, b)],
                                   group.f[Group<kSize>::at(a, b)],
                                   group.u[a],
                                   group.u[b]) *
                         group.unit;
      const bool dead = (~group.live & (1u << a | 1u << b)) != 0u;
      const float entry = masked ? with_dead(gain, dead) : gain;
      if constexpr (kExact) {
        const int index = a * kSize - a * (a + 1) / 2 + b - a - 1;
        four.at[index % 4] = entry;
        const bool last = index == kSize * (kSize - 1) / 2 - 1;
        if (index % 4 == 3 || last) *reinterpret_cast<Four*>(table + index / 4 * 4) = four;
      } else {
        if (b < m) table[a * m - a * (a + 1) / 2 + b - a - 1] = entry;
      }
    }
  });
}

template <typename Config, bool kExact, Mode kMode>
__global__ __launch_bounds__(Config::kThreads, Config::kMinBlocks) void pairs_kernel(Task task) {
  constexpr int kSize = Config::kSize;
  constexpr int kWarps = Config::kThreads / kWarp;
  // What is staged, and then the blocks that the loop over the pairs looks into.
  constexpr int kStaged = Config::kStages * kWarp * Config::kStride;
  constexpr int kIndexed = Config::kIndexed ? Indexed<kSize>::kFloats : 0;
  alignas(16) __shared__ float stages[kWarps][kStaged > kIndexed ? kStaged : kIndexed];

  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp;
  const int lane = thread % kWarp;
  const int64_t start = (int64_t{blockIdx.x} * kWarps + warp) * kWarp;
  if (start >= task.count) return;  // the whole warp: nothing below meets another
  const int count = static_cast<int>(task.count - start < kWarp ? task.count - start : kWarp);
  const SearchParams& p = task.groups;
  const int m = static_cast<int>(p.m);
  const int64_t first = task.first + start;

  Group<kSize> group;
  float poison = 0.0f;
  load_block<Config, kExact>(p.fisher + first * m * m, count, m, lane, stages[warp], group, poison);
  if (lane >= count) return;
  const int64_t at = first + lane;
  load_weight<kSize, kExact>(p.weight + at * m, m, group.w);
  group.live = load_alive<kSize>(p.alive == nullptr ? nullptr : p.alive + at * m, m);
  const float damp = p.damp[p.damp_each ? at : 0];

  if constexpr (kMode == Mode::kGains) {
    condition(damp, group);
    const bool masked = p.alive != nullptr;
    float* const table = task.gains + (start + lane) * task.stride;
    const int n = static_cast<int>(p.n);
    if constexpr (Config::kIndexed) {
      const Indexed<kSize> block = make_indexed(group, lane, stages[warp]);
      store_gains_indexed<kSize, kExact>(block, group.live, group.unit, n, m, masked, table);
    } else {
      store_gains<kSize, kExact>(group, n, m, masked, table);
    }
  } else {
    float weight_poison = 0.0f;
#pragma unroll
    for (const float value : group.w) weight_poison = fmaf(value, 0.0f, weight_poison);
    condition(damp, group);
    const uint32_t open = group.live & open_columns(task, at);
    const int n = static_cast<int>(p.n);
    Choice choice;
    if constexpr (Config::kIndexed) {
      choice = choose_indexed(make_indexed(group, lane, stages[warp]), open, n, m);
    } else {
      choice = choose(group, open, n);
    }
    float loss = apply(choice, group);
    int32_t info = factor(group);  // last, since it destroys the block
    if (!good_damp(damp)) info = kDampNotValid;
    if (poison != 0.0f) info = kFisherNotFinite;
    if (weight_poison != 0.0f) info = kWeightNotFinite;
    uint32_t kept = choice.kept;
    if (info != 0) {
      loss = NAN;
      kept = 0u;
      load_weight<kSize, kExact>(p.weight + at * m, m, group.w);
    }
    store_choice<kSize, kExact>(task, at, kept, loss, info, group.w);
  }
}

}  // namespace obs_kernels::search
