// SPDX-License-Identifier: Apache-2.0
// v:n:m of n > 2 and m <= 8. S is that of all rows, and what is dead in a row only leaves fewer
// members to a set: S_KK is eliminated once a group for every set K of at most n, which then gives
// its gain in each row without a division. A row of a panel has a table of these gains; short
// rows, with fewer than n live entries inside a column set, keep all of them, which are a set too.
#include <cuda_runtime.h>

#include <climits>
#include <cstdint>

#include "common/check.h"
#include "common/launch.h"
#include "sweep/launches.h"
#include "sweep/panels.cuh"
#include "sweep/sets.cuh"
#include "sweep/sweep.cuh"
#include "sweep/sweep_config.h"

namespace obs_kernels::sweep {
namespace {

constexpr int kM = 8;

template <typename Config>
struct SetsStage {
  static constexpr int kCapacity = Config::kTableFloats;
  float table[kCapacity];  // [lines, entries], then [lines, column sets]: the best gain inside each
  float total[kMaxColumnSets];
  // a bit a member
  uint8_t sets[kSubsets];        // places of an entry
  uint8_t bits[kSubsets];        // columns of an entry
  uint8_t open[kMaxColumnSets];  // columns of a column set
  uint8_t kept[Config::kRows];   // columns that a row keeps
  uint8_t entry[kSubsets];       // of the columns of a set
  PanelChoice<Config> choice;
};

// The tables of a group: those of `lines` rows at a time.
struct Tables {
  int entries;  // kept sets, and where entries are dead the smaller sets too
  int column_sets;
  int lines;
};

template <typename Config>
__device__ __forceinline__ Tables tables_of(const SweepParams& p, int rows) {
  Tables tables{};
  tables.entries = static_cast<int>(p.tables.num_sets);
  if (p.alive != nullptr) tables.entries += static_cast<int>(p.tables.num_derived);
  tables.column_sets = static_cast<int>(p.tables.num_column_sets);
  const int most = SetsStage<Config>::kCapacity / (tables.entries + tables.column_sets);
  const int turns = (rows + most - 1) / most;
  tables.lines = (rows + turns - 1) / turns;  // turns of equal height
  return tables;
}

// The columns of every entry and of every column set in the order of this group.
template <typename Config>
__device__ __forceinline__ void place_sets(const SweepParams& p,
                                           const Tables& tables,
                                           int thread,
                                           SetsStage<Config>& panel) {
  const uint64_t places = p.alive != nullptr ? panel.choice.places : kEveryColumn;
  for (int entry = thread; entry < tables.entries; entry += Config::kThreads) {
    uint32_t bits = 0u;
    for (uint32_t left = panel.sets[entry]; left != 0u; left &= left - 1u) {
      bits |= 1u << (places >> 4 * (__ffs(static_cast<int>(left)) - 1) & 15u);
    }
    panel.bits[entry] = static_cast<uint8_t>(bits);
    panel.entry[bits] = static_cast<uint8_t>(entry);
  }
  const int num_columns = static_cast<int>(p.num_columns);
  for (int set = thread; set < tables.column_sets; set += Config::kThreads) {
    uint32_t bits = 0u;
    for (int i = 0; i < num_columns; ++i) {
      bits |= 1u << (places >> 4 * p.tables.columns[set * num_columns + i] & 15u);
    }
    panel.open[set] = static_cast<uint8_t>(bits);
    panel.total[set] = 0.0f;
  }
}

// Gains of the entries inside `open` of `count` rows from `row` on; no gain where a member is dead.
template <typename Config, int kN>
__device__ __forceinline__ void fill_tables(const Tables& tables,
                                            int row,
                                            int count,
                                            uint32_t open,
                                            int thread,
                                            const Stage<Config, kM>& stage,
                                            SetsStage<Config>& panel) {
  // A thread has an entry and every so many rows of it.
  const int width = min(Config::kThreads, (tables.entries + kWarp - 1) / kWarp * kWarp);
  const int slices = Config::kThreads / width;
  const int slice = thread / width;
  if (slice < slices) {
    for (int entry = thread % width; entry < tables.entries; entry += width) {
      const uint32_t bits = panel.bits[entry];
      if ((bits & ~open) != 0u) continue;
      const Factored<kN> set(stage.curvature, stage.kStride, bits);
#pragma unroll 1
      for (int line = slice; line < count; line += slices) {
        const bool dead = (bits & ~stage.live[row + line]) != 0u;
        panel.table[line * tables.entries + entry] =
            dead ? -INFINITY : set.gain(stage.line + (row + line) * kM);
      }
    }
  }
  __syncthreads();
}

// The best gain of a row inside column set `set`.
template <typename Config>
__device__ __forceinline__ float best_gain(const SweepParams& p,
                                           const Tables& tables,
                                           int line,
                                           uint32_t live,
                                           int set,
                                           const SetsStage<Config>& panel) {
  const float* const gains = panel.table + line * tables.entries;
  const uint32_t left = panel.open[set] & live;
  if (__popc(left) <= static_cast<int>(p.n)) return gains[panel.entry[left]];
  float most = -INFINITY;
#pragma unroll 4
  for (int item = 0; item < static_cast<int>(p.tables.length); ++item) {
    most = fmaxf(most, gains[p.tables.lists[item * tables.column_sets + set]]);
  }
  return most;
}

// Adds the best gains of `count` rows from `row` on to the totals, one row after the other: the sum
// must not depend on the backend.
template <typename Config>
__device__ __forceinline__ void add_rows(const SweepParams& p,
                                         const Place& place,
                                         const Tables& tables,
                                         int row,
                                         int count,
                                         int thread,
                                         const Stage<Config, kM>& stage,
                                         SetsStage<Config>& panel) {
  float* const best = panel.table + tables.lines * tables.entries;
  for (int item = thread; item < count * tables.column_sets; item += Config::kThreads) {
    const int line = item / tables.column_sets;
    const int set = item - line * tables.column_sets;
    float gain = best_gain(p, tables, line, stage.live[row + line], set, panel);
    if (p.row_scale != nullptr) {
      gain = __fmul_rn(gain, p.row_scale[place.first_row + row + line]);
    }
    best[item] = gain;
  }
  __syncthreads();
  for (int set = thread; set < tables.column_sets; set += Config::kThreads) {
    float total = panel.total[set];
#pragma unroll 8
    for (int line = 0; line < count; ++line) {
      total = __fadd_rn(total, best[line * tables.column_sets + set]);
    }
    panel.total[set] = total;
  }
}

// The best set of each of `count` rows from `row` on inside the chosen column set.
template <typename Config>
__device__ __forceinline__ void keep_best(const SweepParams& p,
                                          const Tables& tables,
                                          int row,
                                          int count,
                                          int thread,
                                          const Stage<Config, kM>& stage,
                                          SetsStage<Config>& panel) {
  const int chosen = panel.choice.chosen;
  for_each_row<Config>(count, thread, [&](int item, int lane) {
    const int line = min(item, count - 1);
    const uint32_t live = stage.live[row + line];
    const uint32_t left = panel.open[chosen] & live;
    const bool all = __popc(left) <= static_cast<int>(p.n);
    const float* const gains = panel.table + line * tables.entries;
    float best = -INFINITY;
    int best_item = INT_MAX;
#pragma unroll 1
    for (int i = lane; i < static_cast<int>(p.tables.length) && !all; i += kRowLanes) {
      const float gain = gains[p.tables.lists[i * tables.column_sets + chosen]];
      if (gain > best) {
        best = gain;
        best_item = i;
      }
    }
    best_of<kRowLanes>(best, best_item);
    if (lane != 0 || item >= count) return;
    // no set has a gain that is a number: any will do
    const int found = best_item == INT_MAX ? 0 : best_item;
    const uint32_t bits = panel.bits[p.tables.lists[found * tables.column_sets + chosen]];
    panel.kept[row + line] = static_cast<uint8_t>(all ? left : bits & live);
  });
}

template <typename Config, int kN>
__device__ __forceinline__ void choose_columns(const SweepParams& p,
                                               const Place& place,
                                               Stage<Config, kM>& stage,
                                               SetsStage<Config>& panel) {
  const int thread = static_cast<int>(threadIdx.x);
  const Tables tables = tables_of<Config>(p, place.rows);
  __syncthreads();  // all rows are prepared
  if (p.alive != nullptr) {
    order_columns(place.rows, static_cast<int>(p.m), thread, stage.live, panel.choice);
    __syncthreads();
  }
  place_sets(p, tables, thread, panel);
  __syncthreads();
  int row = 0;
  while (true) {
    const int count = min(tables.lines, place.rows - row);
    fill_tables<Config, kN>(tables, row, count, kAllLanes, thread, stage, panel);
    add_rows(p, place, tables, row, count, thread, stage, panel);
    if (row + count == place.rows) break;
    row += count;
  }
  float best = -INFINITY;
  int best_set = INT_MAX;
  for (int set = thread; set < tables.column_sets; set += Config::kThreads) {
    if (panel.total[set] > best) {
      best = panel.total[set];
      best_set = set;
    }
  }
  take_columns(p, place, best, best_set, thread, panel.choice, stage);
  // The tables are those of the last rows: backwards, so that panels of one turn fill them once.
  while (true) {
    keep_best(p, tables, row, min(tables.lines, place.rows - row), thread, stage, panel);
    __syncthreads();
    if (row == 0) break;
    row -= tables.lines;
    const uint32_t open = panel.open[panel.choice.chosen];
    fill_tables<Config, kN>(tables, row, tables.lines, open, thread, stage, panel);
  }
}

template <typename Config, int kN>
__global__ __launch_bounds__(Config::kThreads,
                             Config::kMinBlocks) void panel_sets_kernel(SweepParams p) {
  __shared__ Stage<Config, kM> stage;
  __shared__ SetsStage<Config> panel;
  const int entries = static_cast<int>(p.tables.num_sets + p.tables.num_derived);
  for (int entry = static_cast<int>(threadIdx.x); entry < entries; entry += Config::kThreads) {
    panel.sets[entry] = static_cast<uint8_t>(p.tables.sets[entry]);
  }
  const auto choose = [&](const Place& place) {
    choose_columns<Config, kN>(p, place, stage, panel);
  };
  const auto pick = [&](uint64_t, uint32_t, int row, int) -> Kept<kN> {
    const uint32_t bits = panel.kept[row] & stage.live[row];  // rows beyond the last have none
    return {Members<kN>(bits), __popc(bits), bits};
  };
  sweep_step<Config, kM, kN, true>(p, stage, choose, pick);
}

template <typename Config, int kN>
LaunchPlan launch(const SweepParams& params, const char* path, cudaStream_t stream) {
  const SweepTables& tables = params.tables;
  OBS_CHECK(
      tables.num_sets + tables.num_derived <= kSubsets && tables.num_column_sets <= kMaxColumnSets,
      "there must be at most ",
      kSubsets,
      " sets and ",
      kMaxColumnSets,
      " column sets, got ",
      tables.num_sets + tables.num_derived,
      " and ",
      tables.num_column_sets);
  const int64_t panels = params.rows / params.v;
  panel_sets_kernel<Config, kN>
      <<<static_cast<unsigned>(panels), Config::kThreads, 0, stream>>>(params);
  OBS_CUDA_CHECK(cudaGetLastError());
  count_launch();
  return {"sweep_columns", path, panels, Config::kThreads};
}

template <int kN>
LaunchPlan launch_by_height(const SweepParams& params, cudaStream_t stream) {
  if (params.v <= SweepSets16::kRows) return launch<SweepSets16, kN>(params, "sets16", stream);
  if (params.v <= SweepSets64::kRows) return launch<SweepSets64, kN>(params, "sets64", stream);
  if (params.v <= SweepSets128::kRows) return launch<SweepSets128, kN>(params, "sets128", stream);
  return launch<SweepSets256, kN>(params, "sets256", stream);
}

}  // namespace

LaunchPlan launch_panel_sets(const SweepParams& params, cudaStream_t stream) {
  if (params.n <= 4) return launch_by_height<4>(params, stream);
  if (params.n <= 5) return launch_by_height<5>(params, stream);
  return launch_by_height<7>(params, stream);
}

}  // namespace obs_kernels::sweep
