// SPDX-License-Identifier: Apache-2.0
// Columns of panels, from the gains of their groups; and the saliency of panels.
#include <cuda_runtime.h>

#include <climits>
#include <cstdint>

#include "common/check.h"
#include "common/launch.h"
#include "search/gains.cuh"
#include "search/launches.h"
#include "search/search_config.h"

namespace obs_kernels::search {
namespace {

constexpr int kMaxBase = 512;  // kept sets of n <= 2

struct Panel {
  int64_t at;           // of all panels
  int64_t row;          // of panels
  int64_t col;          // of groups
  int64_t first_group;  // of the launch
};

// Columns with a live entry come first, ascending, then the others: sets are visited in that order.
// `source[e]` is the entry of a row's gains that belongs to the positions of entry e.
__device__ __forceinline__ void order_columns(const PanelParams& p,
                                              const Panel& panel,
                                              int thread,
                                              int threads,
                                              uint8_t* place,
                                              uint16_t* source) {
  const int m = static_cast<int>(p.groups.m);
  if (thread < kWarp) {
    bool used = false;
    if (thread < m) {
      for (int64_t row = panel.row * p.v; row < (panel.row + 1) * p.v; ++row) {
        used |= p.groups.alive[(row * p.wide + panel.col) * m + thread] != 0;
      }
    }
    const uint32_t bits = __ballot_sync(kAllLanes, used);
    const uint32_t below = (1u << thread) - 1u;
    if (thread < m) {
      const int at = used ? __popc(bits & below) : __popc(bits) + __popc(~bits & below);
      place[at] = static_cast<uint8_t>(thread);
    }
  }
  __syncthreads();
  const int base = static_cast<int>(p.groups.n == 1 ? m : m * (m - 1) / 2);
  for (int entry = thread; entry < base; entry += threads) {
    if (p.groups.n == 1) {
      source[entry] = place[entry];
      continue;
    }
    int a = 0;
    int rest = entry;
    while (rest >= m - 1 - a) rest -= m - 1 - a++;
    const int one = place[a];
    const int other = place[a + 1 + rest];
    const int low = one < other ? one : other;
    const int high = one < other ? other : one;
    source[entry] = static_cast<uint16_t>(low * m - low * (low + 1) / 2 + high - low - 1);
  }
}

// Tables of `rows` rows from `row` on: gains of kept sets, then the derived entries.
template <typename Config, bool kMasked>
__device__ __forceinline__ void fill_tables(const PanelParams& p,
                                            const Panel& panel,
                                            int64_t stride,
                                            int64_t row,
                                            int rows,
                                            int thread,
                                            const uint16_t* source,
                                            float* table) {
  const int m = static_cast<int>(p.groups.m);
  const int base = p.groups.n == 1 ? m : m * (m - 1) / 2;
  for (int item = thread; item < rows * base; item += Config::kThreads) {
    const int line = item / base;
    const int entry = item - line * base;
    const int64_t group = ((panel.row * p.v + row + line) * p.wide + panel.col) - panel.first_group;
    table[line * Config::kCapacity + entry] =
        p.gains[group * stride + (kMasked ? source[entry] : entry)];
  }
  __syncthreads();
  const int derived = static_cast<int>(p.tables.num_derived);
  for (int item = thread; item < rows * derived; item += Config::kThreads) {
    const int line = item / derived;
    const int entry = item - line * derived;
    float* const mine = table + line * Config::kCapacity;
    const uint16_t* const parts = p.tables.derived + entry;
    const float two = fmaxf(mine[parts[0]], mine[parts[derived]]);
    mine[base + entry] = fmaxf(two, mine[parts[2 * derived]]);
  }
}

template <typename Config, bool kMasked>
__global__ __launch_bounds__(Config::kThreads) void columns_kernel(PanelParams p,
                                                                   int64_t first_panel,
                                                                   int64_t stride) {
  constexpr int kThreads = Config::kThreads;
  constexpr int kRows = Config::kRows;
  __shared__ float table[kRows * Config::kCapacity];
  __shared__ uint16_t source[kMaxBase];
  __shared__ uint8_t place[kWarp];
  static_assert(2 * kThreads <= kRows * Config::kCapacity, "the reduction uses the same memory");

  const int thread = static_cast<int>(threadIdx.x);
  Panel panel{};
  panel.at = first_panel + int64_t{blockIdx.x};
  panel.row = panel.at / p.wide;
  panel.col = panel.at - panel.row * p.wide;
  panel.first_group = first_panel * p.v;
  if constexpr (kMasked) order_columns(p, panel, thread, kThreads, place, source);

  const int num_sets = static_cast<int>(p.tables.num_sets);
  const int length = static_cast<int>(p.tables.length);
  float best = -INFINITY;
  int best_set = INT_MAX;
  for (int first_set = 0; first_set < num_sets; first_set += kThreads * Config::kSets) {
    float total[Config::kSets] = {};
    for (int64_t row = 0; row < p.v; row += kRows) {
      const int rows = static_cast<int>(p.v - row < kRows ? p.v - row : kRows);
      __syncthreads();  // the tables of the last chunk have been read
      fill_tables<Config, kMasked>(p, panel, stride, row, rows, thread, source, table);
      __syncthreads();
#pragma unroll
      for (int turn = 0; turn < Config::kSets; ++turn) {
        const int set = first_set + turn * kThreads + thread;
        if (set >= num_sets) continue;
        float most[kRows];
#pragma unroll
        for (int line = 0; line < kRows; ++line) most[line] = -INFINITY;
#pragma unroll 1
        for (int item = 0; item < length; ++item) {
          const float* const entry = table + p.tables.lists[item * num_sets + set];
#pragma unroll
          for (int line = 0; line < kRows; ++line) {
            if (line < rows) most[line] = fmaxf(most[line], entry[line * Config::kCapacity]);
          }
        }
        // one row after the other: the sum must not depend on the backend
#pragma unroll
        for (int line = 0; line < kRows; ++line) {
          if (line < rows) {
            const float gain = kMasked ? without_dead(most[line]) : most[line];
            total[turn] = __fadd_rn(total[turn], gain);
          }
        }
      }
    }
#pragma unroll
    for (int turn = 0; turn < Config::kSets; ++turn) {
      const int set = first_set + turn * kThreads + thread;
      if (set < num_sets && total[turn] > best) {
        best = total[turn];
        best_set = set;
      }
    }
  }

  __syncthreads();
  float* const values = table;
  int* const sets = reinterpret_cast<int*>(table + kThreads);
  values[thread] = best;
  sets[thread] = best_set;
  for (int step = kThreads / 2; step > 0; step /= 2) {
    __syncthreads();
    if (thread >= step) continue;
    const float other = values[thread + step];
    const int other_set = sets[thread + step];
    if (other > values[thread] || (other == values[thread] && other_set < sets[thread])) {
      values[thread] = other;
      sets[thread] = other_set;
    }
  }
  if (thread != 0) return;
  const int chosen = sets[0] == INT_MAX ? 0 : sets[0];  // all sums are NaN: any set will do
  const int num_columns = static_cast<int>(p.num_columns);
  uint32_t bits = 0u;
  for (int i = 0; i < num_columns; ++i) {
    const int column = p.tables.columns[chosen * num_columns + i];
    bits |= 1u << (kMasked ? place[column] : column);
  }
  p.column_bits[panel.at] = bits;
  uint8_t* target = p.columns + panel.at * num_columns;
  for (int column = 0; column < kWarp; ++column) {
    if (bits >> column & 1u) *target++ = static_cast<uint8_t>(column);
  }
}

template <int kThreads>
__global__ __launch_bounds__(kThreads) void panel_sums_kernel(PanelParams p, int64_t panels) {
  const int64_t panel = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (panel >= panels) return;
  const int64_t row = panel / p.wide;
  const float* const losses = p.groups.saliency + row * p.v * p.wide + (panel - row * p.wide);
  float sum = 0.0f;
  for (int64_t line = 0; line < p.v; ++line) sum = __fadd_rn(sum, losses[line * p.wide]);
  p.saliency[panel] = sum;
}

template <typename Config>
LaunchPlan launch(const PanelParams& params,
                  int64_t first_panel,
                  int64_t panels,
                  int64_t stride,
                  const char* path,
                  cudaStream_t stream) {
  const auto grid = static_cast<unsigned>(panels);
  if (params.groups.alive != nullptr) {
    columns_kernel<Config, true>
        <<<grid, Config::kThreads, 0, stream>>>(params, first_panel, stride);
  } else {
    columns_kernel<Config, false>
        <<<grid, Config::kThreads, 0, stream>>>(params, first_panel, stride);
  }
  OBS_CUDA_CHECK(cudaGetLastError());
  count_launch();
  return {"search_vnm", path, panels, Config::kThreads};
}

}  // namespace

LaunchPlan launch_columns(const PanelParams& params,
                          int64_t first_panel,
                          int64_t panels,
                          int64_t stride,
                          cudaStream_t stream) {
  const int64_t m = params.groups.m;
  const int64_t base = params.groups.n == 1 ? m : m * (m - 1) / 2;
  const int64_t entries = base + params.tables.num_derived;
  OBS_CHECK(entries <= PanelLarge::kCapacity && base <= kMaxBase,
            "the table of a row must have at most ",
            PanelLarge::kCapacity,
            " entries, got ",
            entries);
  const int64_t sets = params.tables.num_sets;
  if (entries <= PanelSmall::kCapacity && sets <= PanelSmall::kThreads) {
    return launch<PanelSmall>(params, first_panel, panels, stride, "panels_small", stream);
  }
  if (entries <= PanelMedium::kCapacity) {
    return launch<PanelMedium>(params, first_panel, panels, stride, "panels_medium", stream);
  }
  return launch<PanelLarge>(params, first_panel, panels, stride, "panels_large", stream);
}

LaunchPlan launch_panel_sums(const PanelParams& params, cudaStream_t stream) {
  const int64_t panels = params.groups.num_groups / params.v;
  const int64_t blocks = (panels - 1) / kSumThreads + 1;
  panel_sums_kernel<kSumThreads>
      <<<static_cast<unsigned>(blocks), kSumThreads, 0, stream>>>(params, panels);
  OBS_CUDA_CHECK(cudaGetLastError());
  count_launch();
  return {"search_vnm", "panel_sums", blocks, kSumThreads};
}

}  // namespace obs_kernels::search
