// SPDX-License-Identifier: Apache-2.0
// The columns of a panel: the order in which sets of them are looked at, and the best one.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <cstdint>

#include "obs_kernels/sweep.h"
#include "sweep/sweep.cuh"
#include "sweep/sweep_config.h"

namespace obs_kernels::sweep {

template <typename Config>
struct PanelChoice {
  static constexpr int kWarps = Config::kThreads / kWarp;
  float gain[kWarps];
  int set[kWarps];
  int chosen;       // column set
  uint64_t places;  // the column of each place
};

// Columns with a live entry in the panel come first, ascending, then the others: sets are visited
// in that order. By the first warp.
template <typename Config>
__device__ __forceinline__ void order_columns(
    int rows, int m, int thread, const uint32_t* live, PanelChoice<Config>& choice) {
  if (thread >= kWarp) return;
  uint32_t used = 0u;
  for (int row = thread; row < rows; row += kWarp) used |= live[row];
  used = __reduce_or_sync(kAllLanes, used);
  if (thread != 0) return;
  uint64_t places = 0u;
  int at = 0;
  for (int turn = 0; turn < 2; ++turn) {
    for (int column = 0; column < m; ++column) {
      if ((used >> column & 1u) == static_cast<unsigned>(turn)) continue;
      places |= static_cast<uint64_t>(column) << 4 * at++;
    }
  }
  choice.places = places;
}

// The best column set of all threads, each with its own best, to p.columns and stage.columns.
template <typename Config, int kM>
__device__ __forceinline__ void take_columns(const SweepParams& p,
                                             const Place& place,
                                             float best,
                                             int best_set,
                                             int thread,
                                             PanelChoice<Config>& choice,
                                             Stage<Config, kM>& stage) {
  best_of<kWarp>(best, best_set);
  if (thread % kWarp == 0) {
    choice.gain[thread / kWarp] = best;
    choice.set[thread / kWarp] = best_set;
  }
  __syncthreads();
  if (thread == 0) {
    for (int warp = 1; warp < choice.kWarps; ++warp) {
      const float other = choice.gain[warp];
      const int other_set = choice.set[warp];
      if (other > best || (other == best && other_set < best_set)) {
        best = other;
        best_set = other_set;
      }
    }
    const int chosen = best_set == INT_MAX ? 0 : best_set;  // no sum is a number: any set will do
    const int num_columns = static_cast<int>(p.num_columns);
    const uint64_t places = p.alive != nullptr ? choice.places : kEveryColumn;
    uint32_t bits = 0u;
    for (int i = 0; i < num_columns; ++i) {
      bits |= 1u << (places >> 4 * p.tables.columns[chosen * num_columns + i] & 15u);
    }
    const int64_t at = int64_t{blockIdx.x} * (p.cols / p.m) + place.group;
    uint8_t* target = p.columns + at * num_columns;
    uint64_t columns = 0u;
    int found = 0;
    for (int column = 0; column < kM; ++column) {
      if ((bits >> column & 1u) == 0u) continue;
      columns |= static_cast<uint64_t>(column) << 4 * found++;
      *target++ = static_cast<uint8_t>(column);
    }
    stage.columns = columns;
    choice.chosen = chosen;
  }
  __syncthreads();
}

}  // namespace obs_kernels::sweep
