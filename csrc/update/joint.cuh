// SPDX-License-Identifier: Apache-2.0
// The joint update: F is read once, as columns, and of it the kept rows and columns are packed into
// shared memory; the pruned rows leave nothing but the right side.
#pragma once

#include <cfloat>
#include <cstdint>

#include "update/columns.cuh"
#include "update/eliminate.cuh"
#include "update/update_config.h"

namespace obs_kernels::update {

// The kept part of F. Up to 64, whole rows, each a piece of four longer than it has to be, so that
// eight threads reading four entries of their rows meet all banks. The rows of 128 would be 66 KB:
// there it is the lower triangle, whose row starts i (i + 1) / 2 fall into 32 different banks for
// any 32 neighbours.
template <int kSize>
struct KeptPart {
  static constexpr bool kTriangle = kSize > 64;
  static constexpr int kStride = kSize + 4;
  static constexpr int kEntries = kTriangle ? kSize * (kSize + 1) / 2 : kSize * kStride;

  alignas(16) float entries[kEntries];

  __device__ __forceinline__ static int start(int row) {
    return kTriangle ? row * (row + 1) / 2 : row * kStride;
  }

  // Row `lane`, zeros beyond the first `count` columns, rounded up to four.
  __device__ __forceinline__ void read_row(int lane, int count, float (&row)[kSize]) const {
    const int own = start(lane);
#pragma unroll
    for (int first = 0; first < kSize; first += 4) {
      Four four{};
      if (first < count) {
        if constexpr (kTriangle) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int column = first + e;
            four.at[e] = entries[lane >= column ? own + column : start(column) + lane];
          }
        } else {
          four = *reinterpret_cast<const Four*>(entries + own + first);
        }
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) row[first + e] = four.at[e];
    }
  }
};

template <typename Config>
struct JointShared {
  KeptPart<Config::kSize> kept;
  Exchange<Config::kSize> exchange;
  alignas(16) float line[Config::kSize];  // pruned weights by column; later the solution by rank
  // What the end needs again, so that no register holds it while a row of the system takes all
  // there are.
  float weight[Config::kSize];         // by column
  int rank[Config::kSize];             // by column; -1 where pruned, -2 where there is no weight
  int64_t first;                       // weight of the block
  unsigned kept_bits[Config::kWarps];  // a bit a column
  unsigned suspect[Config::kWarps];
  unsigned bad_pivots[Config::kWarps];
};

// The groups of a warp start kSize banks apart, so that their lanes never meet in one.
template <typename Config>
struct JointScratch : JointShared<Config> {
  static constexpr int kWords = static_cast<int>(sizeof(JointShared<Config>) / sizeof(float));
  float gap[(Config::kSize + 31 - kWords % 32) % 32 + 1];
};

// Ballot of the group's lanes; a group of several warps leaves the words in shared memory.
template <typename Config>
__device__ __forceinline__ unsigned group_ballot(bool value, int group) {
  const unsigned bits = __ballot_sync(kAllLanes, value);
  if constexpr (Config::kSize >= 32) return bits;
  return bits >> (group * Config::kSize % 32) & ((1u << Config::kSize % 32) - 1u);
}

template <typename Config>
__global__ __launch_bounds__(Config::kThreads,
                             Config::kMinBlocks) void joint_kernel(UpdateParams params) {
  constexpr int kSize = Config::kSize;
  __shared__ JointScratch<Config> scratch[Config::kGroups];

  const Place<Config> place(params.num_blocks, params.size, params.num_weights);
  const int lane = place.lane;
  const int size = static_cast<int>(params.size);
  JointScratch<Config>& shared = scratch[place.group];
  const float damp = place.live ? params.damp[params.damp_each ? place.block : 0] : 0.0f;
  const float weight = place.real ? load_weight(params.weight, place.at, params.type) : 0.0f;
  const bool keep = place.real && params.mask[place.at] != 0;

  // Which columns are kept, and the rank of this one among them.
  const unsigned own_bits = group_ballot<Config>(keep, place.group);
  const int word = lane / 32;
  if (lane % 32 == 0) shared.kept_bits[word] = own_bits;
  shared.line[lane] = keep ? 0.0f : weight;
  sync_group<Config>();
  int rank = __popc(own_bits & ((1u << lane % 32) - 1u));
  int kept = 0;
#pragma unroll
  for (int w = 0; w < Config::kWarps; ++w) {
    const int count = __popc(shared.kept_bits[w]);
    if (w < word) rank += count;
    kept += count;
  }

  // One pass over F. A kept weight multiplies its row by zero, which leaves NaN for NaN and Inf: so
  // the sums tell of any such entry, at no cost.
  float sum = 0.0f;
  unsigned row_bits = 0;  // of a pruned column: none
  int row_rank = 0;
  float* entry = shared.kept.entries + rank;
  const float* factors = shared.line;
  Four four{};
  for_each_row<kSize, Config::kDepth>(
      params.fisher + (place.live ? place.block * size * size : 0),
      lane,
      size,
      place.live,
      [&](int first) {
        row_bits = keep ? shared.kept_bits[first / 32] >> first % 32 : 0u;
        factors = shared.line + first;
      },
      [&](int e, float value) {
        if (e % 4 == 0) four = *reinterpret_cast<const Four*>(factors + e);
        sum = fmaf(value, four.at[e % 4], sum);
        if ((row_bits >> e & 1u) == 0) return;
        if constexpr (KeptPart<kSize>::kTriangle) {
          if (rank <= row_rank) *entry = value;
          entry += ++row_rank;
        } else {
          *entry = value;
          entry += KeptPart<kSize>::kStride;
        }
      });
  shared.weight[lane] = weight;
  shared.rank[lane] = keep ? rank : place.real ? -1 : -2;
  if (lane == 0) shared.first = place.at;
  if (keep) {
    shared.kept.entries[KeptPart<kSize>::start(rank) + rank] += damp;
    shared.exchange.right[rank] = sum;
  }
  const bool odd =
      !(fabsf(sum) <= FLT_MAX) || !(fabsf(weight) <= FLT_MAX) || !(damp >= 0.0f && damp <= FLT_MAX);
  const unsigned odd_bits = group_ballot<Config>(odd, place.group);
  if (lane % 32 == 0) shared.suspect[word] = odd_bits;
  sync_group<Config>();

  // Thread i of the group now has row i of the kept part. All groups of a warp take as many steps.
  float row[kSize];
  if constexpr (Config::kWarps == 1) {
    const int most = static_cast<int>(__reduce_max_sync(kAllLanes, static_cast<unsigned>(kept)));
    shared.kept.read_row(lane, most, row);
    eliminate<kSize, Config>(0, most, lane, kept, true, shared.exchange, row, [] { __syncwarp(); });
  } else if (kept > 32) {
    const bool busy = word * 32 < kept;
    shared.kept.read_row(lane, busy ? kept : 0, row);
    eliminate<kSize, Config>(
        0, kept, lane, kept, busy, shared.exchange, row, [] { __syncthreads(); });
  } else if (word == 0) {
    shared.kept.read_row(lane, kept, row);
    eliminate<32, Config>(0, kept, lane, kept, true, shared.exchange, row, [] { __syncwarp(); });
  }
  // The first pivot that is not positive and finite; what came after it means nothing.
  const float pivot = lane < kept ? shared.exchange.pivot[lane] : 1.0f;
  // The pruned weights in `line` have been used before the last barrier.
  if (lane < kept) shared.line[lane] = shared.exchange.right[lane] / pivot;
  const unsigned bad = group_ballot<Config>(!(pivot > 0.0f && pivot <= FLT_MAX), place.group);
  if (lane % 32 == 0) shared.bad_pivots[word] = bad;
  sync_group<Config>();

  int failed = 0;
#pragma unroll
  for (int w = Config::kWarps - 1; w >= 0; --w) {
    if (shared.bad_pivots[w] != 0) failed = 32 * w + __ffs(static_cast<int>(shared.bad_pivots[w]));
  }
  const int own = shared.rank[lane];
  if (own >= -1) {
    const float before = shared.weight[lane];
    const float change = own >= 0 && failed == 0 ? shared.line[own] : 0.0f;
    // A weight that does not change keeps its bits, -0 too.
    const float after = change == 0.0f ? before : before + change;
    store_weight(params.updated, shared.first + lane, params.type, own >= 0 ? after : 0.0f);
  }
  if (place.live && lane == 0) {
    unsigned suspect = 0;
#pragma unroll
    for (int w = 0; w < Config::kWarps; ++w) suspect |= shared.suspect[w];
    params.info[place.block] = suspect != 0 ? -1 - failed : failed;
  }
}

}  // namespace obs_kernels::update
