// SPDX-License-Identifier: Apache-2.0
// Columns of panels, from the gains of their groups; and the saliency of panels.
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "common/check.h"
#include "common/launch.h"
#include "common/pieces.cuh"
#include "search/gains.cuh"
#include "search/launches.h"
#include "search/search_config.h"

namespace obs_kernels::search {
namespace {

struct Panel {
  int64_t at;           // of all panels
  int64_t row;          // of panels
  int64_t col;          // of groups
  int64_t first_group;  // of the launch
};

// Columns with a live entry come first, ascending, then the others: of equal column sets the one
// that is first in that order is taken. `position[i]` is the place of column i in it.
__device__ __forceinline__ void order_columns(const PanelParams& p,
                                              const Panel& panel,
                                              int thread,
                                              uint8_t* position) {
  const int m = static_cast<int>(p.groups.m);
  if (thread >= kWarp) return;
  bool used = p.groups.alive == nullptr;
  if (thread < m && !used) {
    for (int64_t row = panel.row * p.v; row < (panel.row + 1) * p.v; ++row) {
      used |= p.groups.alive[(row * p.wide + panel.col) * m + thread] != 0;
    }
  }
  const uint32_t bits = __ballot_sync(kAllLanes, used && thread < m);
  const uint32_t below = (1u << thread) - 1u;
  const int at = used ? __popc(bits & below) : __popc(bits) + __popc(~bits & below);
  position[thread] = static_cast<uint8_t>(at);
}

// The gains of a panel's row `row`.
__device__ __forceinline__ const float* gains_of_row(const PanelParams& p,
                                                     const Panel& panel,
                                                     int64_t stride,
                                                     int64_t row) {
  const int64_t group = (panel.row * p.v + row) * p.wide + panel.col - panel.first_group;
  return p.gains + group * stride;
}

// An entry of the tables of kRows rows: one address and one load for all of them.
template <int kRows>
using Entry = Piece<float, kRows>;

// Gain `entry` of the rows from `row` on.
template <int kRows>
__device__ __forceinline__ Entry<kRows> load_entry(
    const PanelParams& p, const Panel& panel, int64_t stride, int64_t row, int entry) {
  Entry<kRows> all{};
  const float* const gains = gains_of_row(p, panel, stride, row) + entry;
#pragma unroll
  for (int line = 0; line < kRows; ++line) {
    if (row + line < p.v) all.at[line] = gains[line * p.wide * stride];
  }
  return all;
}

// The derived entries of tables whose `base` gains of kept sets are there.
template <typename Config>
__device__ __forceinline__ void derive_entries(const PanelParams& p,
                                               int base,
                                               int thread,
                                               Entry<Config::kRows>* table) {
  constexpr int kRows = Config::kRows;
  const int derived = static_cast<int>(p.tables.num_derived);
  if (derived == 0) return;
  __syncthreads();
  for (int entry = thread; entry < derived; entry += Config::kThreads) {
    const uint16_t* const parts = p.tables.derived + entry;
    Entry<kRows> all = table[parts[0]];
    const Entry<kRows> second = table[parts[derived]];
    const Entry<kRows> third = table[parts[2 * derived]];
#pragma unroll
    for (int line = 0; line < kRows; ++line) {
      all.at[line] = fmaxf(fmaxf(all.at[line], second.at[line]), third.at[line]);
    }
    table[base + entry] = all;
  }
}

// The list of a column set: in registers where all lists have kLength entries, so that a chunk of
// rows reads nothing but the tables; kLength = 0: any length, in memory.
template <int kLength>
struct List {
  int entries[kLength];

  __device__ __forceinline__ void read(const PanelParams& p, int set) {
    const int num_sets = static_cast<int>(p.tables.num_sets);
#pragma unroll
    for (int item = 0; item < kLength; ++item) {
      entries[item] = set < num_sets ? p.tables.lists[item * num_sets + set] : 0;
    }
  }
  __device__ __forceinline__ int length(const PanelParams&) const { return kLength; }
  __device__ __forceinline__ int at(const PanelParams&, int item, int) const {
    return entries[item];
  }
};

template <>
struct List<0> {
  __device__ __forceinline__ void read(const PanelParams&, int) {}
  __device__ __forceinline__ int length(const PanelParams& p) const {
    return static_cast<int>(p.tables.length);
  }
  __device__ __forceinline__ int at(const PanelParams& p, int item, int set) const {
    return p.tables.lists[item * static_cast<int>(p.tables.num_sets) + set];
  }
};

// The largest entry of each row's table inside column set `set`.
template <int kRows, int kLength>
__device__ __forceinline__ Entry<kRows> best_inside(const PanelParams& p,
                                                    const List<kLength>& list,
                                                    int set,
                                                    const Entry<kRows>* table) {
  Entry<kRows> most = table[list.at(p, 0, set)];
#pragma unroll 4
  for (int item = 1; item < list.length(p); ++item) {
    const Entry<kRows> entry = table[list.at(p, item, set)];
#pragma unroll
    for (int line = 0; line < kRows; ++line) {
      most.at[line] = fmaxf(most.at[line], entry.at[line]);
    }
  }
  return most;
}

// kDead: whether entries tell of dead ones (with_dead). kLength: see List; if it is not 0, each
// thread has at most one of the `base` gains, and loads that of the next chunk ahead.
template <typename Config, bool kDead, int kLength>
__global__ __launch_bounds__(Config::kThreads, Config::kMinBlocks) void columns_kernel(
    PanelParams p, int64_t first_panel, int64_t stride, int base) {
  constexpr int kThreads = Config::kThreads;
  constexpr int kRows = Config::kRows;
  extern __shared__ float4 memory[];
  __shared__ Best bests[kThreads / kWarp];
  __shared__ uint8_t position[kWarp];
  auto* const table = reinterpret_cast<Entry<kRows>*>(memory);

  const int thread = static_cast<int>(threadIdx.x);
  Panel panel{};
  panel.at = first_panel + int64_t{blockIdx.x};
  panel.row = panel.at / p.wide;
  panel.col = panel.at - panel.row * p.wide;
  panel.first_group = first_panel * p.v;
  order_columns(p, panel, thread, position);  // seen by all after the barriers below

  const int num_sets = static_cast<int>(p.tables.num_sets);
  const int num_columns = static_cast<int>(p.num_columns);
  Best best{-INFINITY, 0u};
  for (int first_set = 0; first_set < num_sets; first_set += kThreads * Config::kSets) {
    float total[Config::kSets] = {};
    List<kLength> lists[Config::kSets];
#pragma unroll
    for (int turn = 0; turn < Config::kSets; ++turn) {
      lists[turn].read(p, first_set + turn * kThreads + thread);
    }
    Entry<kRows> ahead{};
    if (kLength > 0 && thread < base) ahead = load_entry<kRows>(p, panel, stride, 0, thread);
    for (int64_t row = 0; row < p.v; row += kRows) {
      const int rows = static_cast<int>(p.v - row < kRows ? p.v - row : kRows);
      __syncthreads();  // the tables of the last chunk have been read
      if constexpr (kLength > 0) {
        if (thread < base) {
          table[thread] = ahead;
          ahead = load_entry<kRows>(p, panel, stride, row + kRows, thread);
        }
      } else {
        for (int entry = thread; entry < base; entry += kThreads) {
          table[entry] = load_entry<kRows>(p, panel, stride, row, entry);
        }
      }
      derive_entries<Config>(p, base, thread, table);
      __syncthreads();
#pragma unroll
      for (int turn = 0; turn < Config::kSets; ++turn) {
        const int set = first_set + turn * kThreads + thread;
        if (set >= num_sets) continue;
        const Entry<kRows> most = best_inside<kRows, kLength>(p, lists[turn], set, table);
        // one row after the other: the sum must not depend on the backend
#pragma unroll
        for (int line = 0; line < kRows; ++line) {
          if (line < rows) {
            const float gain = kDead ? without_dead(most.at[line]) : most.at[line];
            total[turn] = __fadd_rn(total[turn], gain);
          }
        }
      }
    }
#pragma unroll
    for (int turn = 0; turn < Config::kSets; ++turn) {
      const int set = first_set + turn * kThreads + thread;
      if (set >= num_sets || !(total[turn] >= best.gain)) continue;
      uint32_t key = 0u;
      for (int i = 0; i < num_columns; ++i) {
        key |= 0x80000000u >> position[p.tables.columns[set * num_columns + i]];
      }
      take_better(total[turn], key, best);
    }
  }

  best = best_of_warp(best);
  if (thread % kWarp == 0) bests[thread / kWarp] = best;
  __syncthreads();
  if (thread != 0) return;
  for (int warp = 1; warp < kThreads / kWarp; ++warp) {
    take_better(bests[warp].gain, bests[warp].key, best);
  }
  // all sums are NaN: any set will do
  const uint32_t key = best.key == 0u ? ~(0xFFFFFFFFu >> 1 >> (num_columns - 1)) : best.key;
  uint32_t bits = 0u;
  uint8_t* target = p.columns + panel.at * num_columns;
  for (int column = 0; column < static_cast<int>(p.groups.m); ++column) {
    if (!(key << position[column] >> 31)) continue;
    bits |= 1u << column;
    *target++ = static_cast<uint8_t>(column);
  }
  p.column_bits[panel.at] = bits;
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

int64_t table_bytes(int rows, int64_t entries) {
  return rows * entries * static_cast<int64_t>(sizeof(float));
}

template <typename Config, bool kDead, int kLength>
LaunchPlan launch(const PanelParams& params,
                  int64_t first_panel,
                  int64_t panels,
                  int64_t stride,
                  const char* path,
                  cudaStream_t stream) {
  const auto grid = static_cast<unsigned>(panels);
  const auto base = static_cast<int>(count_sets(params.groups.n, params.groups.m));
  const auto bytes =
      static_cast<size_t>(table_bytes(Config::kRows, base + params.tables.num_derived));
  if (bytes > kPlainBytes) {
    OBS_CUDA_CHECK(cudaFuncSetAttribute(columns_kernel<Config, kDead, kLength>,
                                        cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(bytes)));
  }
  columns_kernel<Config, kDead, kLength>
      <<<grid, Config::kThreads, bytes, stream>>>(params, first_panel, stride, base);
  OBS_CUDA_CHECK(cudaGetLastError());
  count_launch();
  return {"search_vnm", path, panels, Config::kThreads};
}

template <typename Config>
LaunchPlan launch_masked(const PanelParams& params,
                         int64_t first_panel,
                         int64_t panels,
                         int64_t stride,
                         const char* path,
                         cudaStream_t stream) {
  const bool dead = params.groups.alive != nullptr && params.groups.n <= 2;
  // n = 2 and four columns, the stored format: two triples and a pair hold all pairs.
  constexpr int kStored = 3;
  const bool stored = params.tables.length == kStored &&
                      count_sets(params.groups.n, params.groups.m) <= Config::kThreads;
  const auto run = dead ? (stored ? launch<Config, true, kStored> : launch<Config, true, 0>)
                        : (stored ? launch<Config, false, kStored> : launch<Config, false, 0>);
  return run(params, first_panel, panels, stride, path, stream);
}

// Bytes of tables that a block may have on this device.
int64_t most_table_bytes() {
  int device = 0;
  int bytes = 0;
  OBS_CUDA_CHECK(cudaGetDevice(&device));
  OBS_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes - kPanelStatic;
}

}  // namespace

LaunchPlan launch_columns(const PanelParams& params,
                          int64_t first_panel,
                          int64_t panels,
                          int64_t stride,
                          cudaStream_t stream) {
  const int64_t base = count_sets(params.groups.n, params.groups.m);
  const int64_t row_bytes = table_bytes(1, base + params.tables.num_derived);
  const int64_t most = most_table_bytes();
  OBS_CHECK(
      row_bytes <= most, "the table of a row must have at most ", most, " bytes, got ", row_bytes);
  const int64_t sets = params.tables.num_sets;
  if (sets <= PanelSmall::kThreads && PanelSmall::kRows * row_bytes <= kPlainBytes) {
    return launch_masked<PanelSmall>(params, first_panel, panels, stride, "panels_small", stream);
  }
  if (PanelMedium::kRows * row_bytes <= kPlainBytes / 4) {  // four blocks an SM
    return launch_masked<PanelMedium>(params, first_panel, panels, stride, "panels_medium", stream);
  }
  const auto run = 4 * row_bytes <= most   ? launch_masked<PanelLarge<4>>
                   : 2 * row_bytes <= most ? launch_masked<PanelLarge<2>>
                                           : launch_masked<PanelLarge<1>>;
  return run(params, first_panel, panels, stride, "panels_large", stream);
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
