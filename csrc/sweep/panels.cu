// SPDX-License-Identifier: Apache-2.0
// v:n:m of n <= 2: a panel of rows takes the columns with the largest sum of gains, then each row
// its best set inside them.
#include "sweep/panels.cuh"

#include <cuda_runtime.h>

#include <climits>
#include <cstdint>

#include "common/check.h"
#include "common/launch.h"
#include "sweep/launches.h"
#include "sweep/sweep.cuh"
#include "sweep/sweep_config.h"

namespace obs_kernels::sweep {
namespace {

template <typename Config, int kM>
struct PanelStage {
  static constexpr int kTableRows = Config::kTableRows;
  static constexpr int kCapacity = kM == 8 ? 84 : 680;  // pairs and triples
  // Column sets of a thread at a time; one where its rows fill the registers: then tables are made
  // anew for every kThreads of the 1,820 sets of four of 16.
  static constexpr int kSets = kM == 8 || Config::kRowsOfThread > 16 ? 1 : 4;
  float table[kTableRows * kCapacity];
  uint32_t sets[kMaxSets];
  PanelChoice<Config> choice;
};

// A gain in the table of a row, so that the largest entry is the best of those that hold the fewest
// dead entries: with a dead one a negative number, the larger the gain the nearer to zero; with two
// below all of these.
constexpr unsigned kDeadTop = 0x7F000000u;

__device__ __forceinline__ float with_dead(float gain, int dead) {
  const float clamped = fminf(fmaxf(gain, 0.0f), 1e38f);
  if (dead == 0) return clamped;
  return -__uint_as_float(dead == 1 ? kDeadTop - __float_as_uint(clamped) : kDeadTop + 1u);
}

__device__ __forceinline__ float without_dead(float entry) {
  const unsigned bits = __float_as_uint(entry);
  if (bits >> 31 == 0u) return entry;
  const unsigned size = bits & 0x7FFFFFFFu;
  return size > kDeadTop ? 0.0f : __uint_as_float(kDeadTop - size);
}

// Tables of `lines` rows from `row` on: gains of kept sets, then the derived entries.
template <typename Config, int kM>
__device__ __forceinline__ void fill_tables(const SweepParams& p,
                                            int row,
                                            int lines,
                                            int thread,
                                            const Stage<Config, kM>& stage,
                                            PanelStage<Config, kM>& panel) {
  constexpr int kCapacity = PanelStage<Config, kM>::kCapacity;
  const int n = static_cast<int>(p.n);
  const bool masked = p.alive != nullptr;
  const int base = static_cast<int>(p.tables.num_sets);
  const uint64_t places = masked ? panel.choice.places : kEveryColumn;
  for (int item = thread; item < lines * base; item += Config::kThreads) {
    const int line = item / base;
    const int entry = item - line * base;
    const RowProblem<Stage<Config, kM>::kStride> problem{
        stage.curvature, stage.line + (row + line) * kM, stage.live[row + line]};
    const Members<2> members(panel.sets[entry], places, n);
    float gain = gain_of(problem, members, n);
    if (masked) gain = with_dead(gain, __popc(members.bits() & ~problem.live));
    panel.table[line * kCapacity + entry] = gain;
  }
  __syncthreads();
  const int derived = static_cast<int>(p.tables.num_derived);
  for (int item = thread; item < lines * derived; item += Config::kThreads) {
    const int line = item / derived;
    const int entry = item - line * derived;
    float* const mine = panel.table + line * kCapacity;
    const uint16_t* const parts = p.tables.derived + entry;
    const float two = fmaxf(mine[parts[0]], mine[parts[derived]]);
    mine[base + entry] = fmaxf(two, mine[parts[2 * derived]]);
  }
  __syncthreads();
}

// Adds the best gain of each of `lines` rows inside column set `set`, one row after the other: the
// sum must not depend on the backend.
template <typename Config, int kM>
__device__ __forceinline__ float add_rows(const SweepParams& p,
                                          int64_t row,
                                          int lines,
                                          int set,
                                          const PanelStage<Config, kM>& panel,
                                          float total) {
  constexpr int kLines = Config::kTableRows;
  const int num_sets = static_cast<int>(p.tables.num_column_sets);
  const int length = static_cast<int>(p.tables.length);
  float most[kLines];
#pragma unroll
  for (int line = 0; line < kLines; ++line) most[line] = -INFINITY;
#pragma unroll 1
  for (int item = 0; item < length; ++item) {
    const float* const entry = panel.table + p.tables.lists[item * num_sets + set];
#pragma unroll
    for (int line = 0; line < kLines; ++line) {
      if (line < lines) most[line] = fmaxf(most[line], entry[line * panel.kCapacity]);
    }
  }
#pragma unroll
  for (int line = 0; line < kLines; ++line) {
    if (line >= lines) continue;
    float gain = p.alive != nullptr ? without_dead(most[line]) : most[line];
    if (p.row_scale != nullptr) gain = __fmul_rn(gain, p.row_scale[row + line]);
    total = __fadd_rn(total, gain);
  }
  return total;
}

template <typename Config, int kM>
__device__ __forceinline__ void choose_columns(const SweepParams& p,
                                               const Place& place,
                                               Stage<Config, kM>& stage,
                                               PanelStage<Config, kM>& panel) {
  constexpr int kThreads = Config::kThreads;
  constexpr int kSets = PanelStage<Config, kM>::kSets;
  constexpr int kLines = Config::kTableRows;
  const int thread = static_cast<int>(threadIdx.x);
  const int num_sets = static_cast<int>(p.tables.num_column_sets);
  __syncthreads();  // all rows are prepared
  if (p.alive != nullptr) {
    order_columns(place.rows, static_cast<int>(p.m), thread, stage.live, panel.choice);
  }
  float best = -INFINITY;
  int best_set = INT_MAX;
  for (int first_set = 0; first_set < num_sets; first_set += kThreads * kSets) {
    float total[kSets] = {};
    for (int row = 0; row < place.rows; row += kLines) {
      const int lines = min(kLines, place.rows - row);
      __syncthreads();  // the columns are in order, the tables of the last rows have been read
      fill_tables(p, row, lines, thread, stage, panel);
#pragma unroll
      for (int turn = 0; turn < kSets; ++turn) {
        const int set = first_set + turn * kThreads + thread;
        if (set >= num_sets) continue;
        total[turn] = add_rows(p, place.first_row + row, lines, set, panel, total[turn]);
      }
    }
#pragma unroll
    for (int turn = 0; turn < kSets; ++turn) {
      const int set = first_set + turn * kThreads + thread;
      if (set < num_sets && total[turn] > best) {
        best = total[turn];
        best_set = set;
      }
    }
  }
  take_columns(p, place, best, best_set, thread, panel.choice, stage);
}

template <typename Config, int kM>
__global__ __launch_bounds__(Config::kThreads,
                             Config::kMinBlocks) void panels_kernel(SweepParams p) {
  __shared__ Stage<Config, kM> stage;
  __shared__ PanelStage<Config, kM> panel;
  const int thread = static_cast<int>(threadIdx.x);
  for (int set = thread; set < static_cast<int>(p.tables.num_sets); set += Config::kThreads) {
    panel.sets[set] = p.tables.sets[set];
  }
  const auto choose = [&](const Place& place) { choose_columns(p, place, stage, panel); };
  const auto pick = [&](uint64_t columns, uint32_t open, int row, int lane) {
    return best_inside<Config, kM, 2>(p, columns, open, row, lane, stage);
  };
  sweep_step<Config, kM, 2, true>(p, stage, choose, pick);
}

template <typename Config, int kM>
LaunchPlan launch(const SweepParams& params, const char* path, cudaStream_t stream) {
  constexpr int kCapacity = PanelStage<Config, kM>::kCapacity;
  const int64_t entries = params.tables.num_sets + params.tables.num_derived;
  OBS_CHECK(entries <= kCapacity,
            "the table of a row must have at most ",
            kCapacity,
            " entries, got ",
            entries);
  const int64_t panels = params.rows / params.v;
  panels_kernel<Config, kM><<<static_cast<unsigned>(panels), Config::kThreads, 0, stream>>>(params);
  OBS_CUDA_CHECK(cudaGetLastError());
  count_launch();
  return {"sweep_columns", path, panels, Config::kThreads};
}

template <int kM>
LaunchPlan launch_by_height(const SweepParams& params, cudaStream_t stream) {
  if (params.v <= SweepPanel16::kRows) return launch<SweepPanel16, kM>(params, "panels16", stream);
  if (params.v <= SweepPanel64::kRows) return launch<SweepPanel64, kM>(params, "panels64", stream);
  return launch<SweepPanel256, kM>(params, "panels256", stream);
}

}  // namespace

LaunchPlan launch_panels(const SweepParams& params, cudaStream_t stream) {
  if (params.m <= 8) return launch_by_height<8>(params, stream);
  return launch_by_height<16>(params, stream);
}

}  // namespace obs_kernels::sweep
