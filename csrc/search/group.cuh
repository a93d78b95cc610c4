// SPDX-License-Identifier: Apache-2.0
// A group of up to 16 weights in the registers of one thread.
#pragma once

#include <cstdint>

#include "common/device.cuh"
#include "common/pieces.cuh"
#include "search/gains.cuh"
#include "search/search_config.h"

namespace obs_kernels::search {

template <int kSize>
struct Group {
  float f[kSize * (kSize + 1) / 2];  // upper triangle, row by row; damped, decoupled, over unit
  float w[kSize];                    // 0 where dead
  float u[kSize];                    // F w
  uint32_t live;
  float unit;
  int32_t info;

  __device__ static constexpr int at(int row, int col) {
    return row * kSize - row * (row - 1) / 2 + col - row;
  }
};

// body(0), body(1), ... with constants: a triangle of registers may be indexed by nothing else, and
// the compiler does not always see that a nest of loops unrolls to that.
template <int kIndex>
struct Constant {
  static constexpr int value = kIndex;
};

template <int kEnd, int kIndex = 0, typename Body>
__device__ __forceinline__ void for_each_index(const Body& body) {
  if constexpr (kIndex < kEnd) {
    body(Constant<kIndex>{});
    for_each_index<kEnd, kIndex + 1>(body);
  }
}

// Calls body with the constant that `value` is, of kFirst .. kLast.
template <int kFirst, int kLast, typename Body>
__device__ __forceinline__ void with_constant(int value, const Body& body) {
  if constexpr (kFirst <= kLast) {
    if (value == kFirst) {
      body(Constant<kFirst>{});
    } else {
      with_constant<kFirst + 1, kLast>(value, body);
    }
  }
}

// Rows `row` .. of the blocks of a warp's groups on their way to `stage`. kExact: m == kSize, and
// 16-byte aligned.
template <typename Config, bool kExact>
__device__ __forceinline__ void fetch_rows(
    const float* fisher, int count, int m, int row, int lane, float* stage) {
  if constexpr (kExact) {
    constexpr int kPieces = Config::kStageRows * Config::kSize / 4;  // of a group
#pragma unroll
    for (int turn = 0; turn < kPieces; ++turn) {
      const int piece = turn * kWarp + lane;
      const int group = piece / kPieces;
      const int offset = row * Config::kSize + piece % kPieces * 4;
      if (group < count) {
        async_copy<16>(stage + group * Config::kStride + piece % kPieces * 4,
                       fisher + group * Config::kSize * Config::kSize + offset);
      }
    }
  } else {
    const int rows = m - row < Config::kStageRows ? m - row : Config::kStageRows;
    const int length = rows * m;
    for (int item = lane; item < count * length; item += kWarp) {
      const int group = item / length;
      const int offset = item - group * length;
      async_copy<4>(stage + group * Config::kStride + offset,
                    fisher + group * m * m + row * m + offset);
    }
  }
  async_commit();
}

// Rows `row` .. from `stage` into the upper triangle. `poison` turns NaN if an entry is not finite.
template <typename Config, bool kExact, int kRow>
__device__ __forceinline__ void take_rows(const float* mine,
                                          int m,
                                          Group<Config::kSize>& group,
                                          float& poison) {
  constexpr int kSize = Config::kSize;
#pragma unroll
  for (int e = 0; e < Config::kStageRows; ++e) {
    constexpr int kFour = 4;
#pragma unroll
    for (int col = 0; col < kSize; col += kFour) {
      Four values{};
      if constexpr (kExact) {
        values = *reinterpret_cast<const Four*>(mine + e * kSize + col);
      } else {
#pragma unroll
        for (int at = 0; at < kFour; ++at) {
          const bool inside = kRow + e < m && col + at < m;
          values.at[at] = inside ? mine[e * m + col + at] : 0.0f;
        }
      }
#pragma unroll
      for (int at = 0; at < kFour; ++at) {
        poison = fmaf(values.at[at], 0.0f, poison);
        if (col + at >= kRow + e) {
          group.f[Group<kSize>::at(kRow + e, col + at)] = values.at[at];
        }
      }
    }
  }
}

template <typename Config, bool kExact, int kStage>
__device__ __forceinline__ void load_stages(const float* fisher,
                                            int count,
                                            int m,
                                            int lane,
                                            float* stages,
                                            Group<Config::kSize>& group,
                                            float& poison) {
  constexpr int kRow = kStage * Config::kStageRows;
  constexpr int kSteps = Config::kSize / Config::kStageRows;
  constexpr int kBuffer = kWarp * Config::kStride;
  if (kRow >= m) {
    async_wait<0>();
    return;
  }
  constexpr int kAhead = kStage + Config::kStages - 1;
  if constexpr (kAhead < kSteps && Config::kStages > 1) {
    constexpr int kNext = kAhead * Config::kStageRows;
    float* const target = stages + kAhead % Config::kStages * kBuffer;
    if (kNext < m) {
      fetch_rows<Config, kExact>(fisher, count, m, kNext, lane, target);
      async_wait<1>();
    } else {
      async_wait<0>();
    }
  } else {
    async_wait<0>();
  }
  __syncwarp();
  if (lane < count) {
    const float* const stage = stages + kStage % Config::kStages * kBuffer;
    take_rows<Config, kExact, kRow>(stage + lane * Config::kStride, m, group, poison);
  }
  __syncwarp();
  if constexpr (kStage + 1 < kSteps) {
    load_stages<Config, kExact, kStage + 1>(fisher, count, m, lane, stages, group, poison);
  }
}

// The block of each thread's group; `count` groups of this warp exist.
template <typename Config, bool kExact>
__device__ __forceinline__ void load_block(const float* fisher,
                                           int count,
                                           int m,
                                           int lane,
                                           float* stages,
                                           Group<Config::kSize>& group,
                                           float& poison) {
  static_assert(Config::kStages <= 2, "at most one stage ahead");
  for_each_index<Config::kSize>([&](auto row) {
    constexpr int i = decltype(row)::value;
#pragma unroll
    for (int j = i; j < Config::kSize; ++j) group.f[Group<Config::kSize>::at(i, j)] = 0.0f;
  });
  fetch_rows<Config, kExact>(fisher, count, m, 0, lane, stages);
  load_stages<Config, kExact, 0>(fisher, count, m, lane, stages, group, poison);
}

// Weight of a group as given, zeros beyond m.
template <int kSize, bool kExact>
__device__ __forceinline__ void load_weight(const float* weight, int m, float (&w)[kSize]) {
#pragma unroll
  for (int col = 0; col < kSize; col += 4) {
    if constexpr (kExact) {
      const Four values = *reinterpret_cast<const Four*>(weight + col);
#pragma unroll
      for (int at = 0; at < 4; ++at) w[col + at] = values.at[at];
    } else {
#pragma unroll
      for (int at = 0; at < 4; ++at) w[col + at] = col + at < m ? weight[col + at] : 0.0f;
    }
  }
}

template <int kSize>
__device__ __forceinline__ uint32_t load_alive(const uint8_t* alive, int m) {
  if (alive == nullptr) return all_bits(m);
  uint32_t live = 0;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    if (i < m && alive[i] != 0) live |= 1u << i;
  }
  return live;
}

// Damping, dead entries out of the block (diagonal 1), scale, and u = F w.
template <int kSize>
__device__ __forceinline__ void condition(float damp, Group<kSize>& group) {
  float top = 0.0f;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    float& own = group.f[Group<kSize>::at(i, i)];
    own += damp;
    if (group.live >> i & 1u) top = fmaxf(top, own);
  }
  const Unit unit = unit_of(top);
  group.unit = unit.value;
  for_each_index<kSize>([&](auto row) {
    constexpr int i = decltype(row)::value;
#pragma unroll
    for (int j = i; j < kSize; ++j) group.f[Group<kSize>::at(i, j)] *= unit.inverse;
  });
  constexpr uint32_t kAll = (1u << kSize) - 1u;
  if (group.live != kAll) {
    for_each_index<kSize>([&](auto row) {
      constexpr int i = decltype(row)::value;
      if (!(group.live >> i & 1u)) group.w[i] = 0.0f;
#pragma unroll
      for (int j = i; j < kSize; ++j) {
        const uint32_t both = 1u << i | 1u << j;
        if (~group.live & both) group.f[Group<kSize>::at(i, j)] = i == j ? 1.0f : 0.0f;
      }
    });
  }
  for_each_index<kSize>([&](auto row) {
    constexpr int i = decltype(row)::value;
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      sum = fmaf(group.f[i < j ? Group<kSize>::at(i, j) : Group<kSize>::at(j, i)], group.w[j], sum);
    }
    group.u[i] = sum;
  });
}

// First pivot of the block that fails, 1-based, or 0. Destroys the block.
template <int kSize>
__device__ __forceinline__ int32_t factor(Group<kSize>& group) {
  int32_t failed = 0;
  for_each_index<kSize>([&](auto step) {
    constexpr int k = decltype(step)::value;
    const float pivot = group.f[Group<kSize>::at(k, k)];
    const bool good = good_pivot(pivot);
    if (!good && failed == 0) failed = k + 1;
    const float inverse = good ? 1.0f / pivot : 1.0f;
#pragma unroll
    for (int j = k + 1; j < kSize; ++j) {
      const float share = group.f[Group<kSize>::at(k, j)] * inverse;
#pragma unroll
      for (int i = k + 1; i < kSize; ++i) {
        if (i < j) continue;
        float& target = group.f[Group<kSize>::at(j, i)];
        target = fmaf(-share, group.f[Group<kSize>::at(k, i)], target);
      }
    }
  });
  return failed;
}

// Two kept entries (one: first == second; none: first < 0) and their new weights.
struct Choice {
  uint32_t kept;
  int first;
  int second;
  float new_first;
  float new_second;
};

// The new weights of two entries with curvature fa, fb, `coupling`, or of one (first == second).
__device__ __forceinline__ Choice
make_choice(int first, int second, float coupling, float fa, float ua, float fb, float ub) {
  Choice choice{1u << first | 1u << second, first, second, 0.0f, 0.0f};
  if (first == second) {
    choice.new_first = choice.new_second = ua / fa;
  } else {
    const float inverse = 1.0f / (fa * fb - coupling * coupling);
    choice.new_first = (fb * ua - coupling * ub) * inverse;
    choice.new_second = (fa * ub - coupling * ua) * inverse;
  }
  return choice;
}

// The best of the sets of n <= 2 inside `open`, by closed forms.
template <int kSize>
__device__ __forceinline__ Choice choose(const Group<kSize>& group, uint32_t open, int n) {
  const int count = __popc(open);
  float best = -INFINITY;
  float coupling = 0.0f;
  int code = -1;
  if (n == 2 && count >= 2) {
    for_each_index<kSize>([&](auto row) {
      constexpr int a = decltype(row)::value;
#pragma unroll
      for (int b = a + 1; b < kSize; ++b) {
        const float fab = group.f[Group<kSize>::at(a, b)];
        const float gain = pair_gain(group.f[Group<kSize>::at(a, a)],
                                     group.f[Group<kSize>::at(b, b)],
                                     fab,
                                     group.u[a],
                                     group.u[b]);
        // NaN wins, so that something is chosen in any case
        if (!(~open & (1u << a | 1u << b)) && !(gain <= best)) {
          best = gain;
          coupling = fab;
          code = a * kSize + b;
        }
      }
    });
  } else if (count >= 1) {
#pragma unroll
    for (int a = 0; a < kSize; ++a) {
      const float gain = single_gain(group.f[Group<kSize>::at(a, a)], group.u[a]);
      if ((open >> a & 1u) && !(gain <= best)) {
        best = gain;
        code = a * kSize + a;
      }
    }
  }
  Choice choice{0u, -1, -1, 0.0f, 0.0f};
  if (code < 0) return choice;
  choice.first = code / kSize;
  choice.second = code % kSize;
  float fa = 0.0f, fb = 0.0f, ua = 0.0f, ub = 0.0f;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    if (i == choice.first) {
      fa = group.f[Group<kSize>::at(i, i)];
      ua = group.u[i];
    }
    if (i == choice.second) {
      fb = group.f[Group<kSize>::at(i, i)];
      ub = group.u[i];
    }
  }
  return make_choice(choice.first, choice.second, coupling, fa, ua, fb, ub);
}

// 1/2 dw^T F dw of the change itself: E - gain would cancel. `w` becomes the new weight.
template <int kSize>
__device__ __forceinline__ float apply(const Choice& choice, Group<kSize>& group) {
  float change[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const float value = i == choice.first    ? choice.new_first
                        : i == choice.second ? choice.new_second
                                             : 0.0f;
    change[i] = value - group.w[i];
    group.w[i] = value;
  }
  float loss = 0.0f;
  for_each_index<kSize>([&](auto row) {
    constexpr int i = decltype(row)::value;
    float sum = 0.5f * group.f[Group<kSize>::at(i, i)] * change[i];
#pragma unroll
    for (int j = i + 1; j < kSize; ++j) {
      sum = fmaf(group.f[Group<kSize>::at(i, j)], change[j], sum);
    }
    loss = fmaf(change[i], sum, loss);
  });
  return loss * group.unit;
}

}  // namespace obs_kernels::search
