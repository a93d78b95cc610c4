// SPDX-License-Identifier: Apache-2.0
// The step of a block of threads: its rows, the columns of the step, group after group.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <cstdint>

#include "common/pieces.cuh"
#include "obs_kernels/sweep.h"
#include "sweep/sets.cuh"
#include "sweep/sweep_config.h"

namespace obs_kernels::sweep {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int kWarp = 32;
constexpr uint64_t kEveryColumn = 0xFEDCBA9876543210ull;  // place i is column i

// What the rows of a block hand from one to the other. Groups narrower than kM are filled up with
// zeros.
template <typename Config, int kM>
struct Stage {
  static constexpr int kStride = kM + 1;  // of matrices: lanes that read a column meet many banks
  alignas(16) float now[Config::kRows * kM];   // pushed part of the group, then a = now R_gg
  alignas(16) float line[Config::kRows * kM];  // live weights, then u, then the change
  uint32_t live[Config::kRows];                // a bit a column of the group
  float own[kM * kStride];
  float curvature[kM * kStride];
  uint32_t inner[kMaxSets];
  uint64_t columns;  // that a panel leaves open, 4 bits each, ascending
};

// Where a block of threads stands.
struct Place {
  int64_t first_row;
  int rows;
  int64_t group;  // of a row
  int begin;      // its first column in the step
};

template <typename Config, int kM>
__device__ __forceinline__ void load_matrices(const SweepParams& p,
                                              const Place& place,
                                              int thread,
                                              Stage<Config, kM>& stage) {
  const int m = static_cast<int>(p.m);
  for (int item = thread; item < kM * kM; item += Config::kThreads) {
    const int i = item / kM;
    const int j = item % kM;
    const bool inside = i < m && j < m;
    const int64_t at = (place.group * m + i) * m + j;
    stage.own[i * stage.kStride + j] = inside ? p.own[at] : 0.0f;
    stage.curvature[i * stage.kStride + j] = inside ? p.curvature[at] : 0.0f;
  }
}

// Calls work(row, lane of the row) for all rows; whole warps come together, so that the last rows
// may be none.
template <typename Config, typename Work>
__device__ __forceinline__ void for_each_row(int rows, int thread, const Work& work) {
  constexpr int kStep = Config::kThreads / kRowLanes;
  constexpr int kOfWarp = kWarp / kRowLanes;
  const int end = (rows + kOfWarp - 1) / kOfWarp * kOfWarp;
  for (int row = thread / kRowLanes; row < end; row += kStep) work(row, thread % kRowLanes);
}

// Sum of the lanes of a row, the same in all of them.
__device__ __forceinline__ float row_sum(float value) {
#pragma unroll
  for (int step = kRowLanes / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, step);
  }
  return value;
}

// The larger gain, and of equal ones the lower set, over `kLanes` neighbours.
template <int kLanes>
__device__ __forceinline__ void best_of(float& gain, int& set) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, gain, step);
    const int other_set = __shfl_xor_sync(kAllLanes, set, step);
    if (other > gain || (other == gain && other_set < set)) {
      gain = other;
      set = other_set;
    }
  }
}

// a and u of a row from its live weights and what settled columns have pushed.
template <typename Config, int kM>
__device__ __forceinline__ void prepare_row(
    const SweepParams& p, const Place& place, int row, int lane, Stage<Config, kM>& stage) {
  constexpr int kStride = Stage<Config, kM>::kStride;
  constexpr int kParts = (kM + kRowLanes - 1) / kRowLanes;
  // Loads under way at a time: few where the pushed parts of many rows fill the registers.
  constexpr int kAhead = Config::kRowsOfThread > 16 ? 4 : kM;
  const int m = static_cast<int>(p.m);
  const bool real = row < place.rows;
  const int64_t at = (place.first_row + row) * p.cols + place.group * m;
  float* const now = stage.now + row * kM;
  float* const line = stage.line + row * kM;
  uint32_t live = 0u;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int j = part * kRowLanes + lane;
    const bool inside = real && j < m;
    if (j < kM) line[j] = inside ? p.live[at + j] : 0.0f;
    const bool alive = inside && (p.alive == nullptr || p.alive[at + j] != 0);
    const uint32_t votes = __ballot_sync(kAllLanes, alive);
    const int shift = row * kRowLanes % kWarp;
    live |= (votes >> shift & ((1u << kRowLanes) - 1u)) << part * kRowLanes;
  }
  if (lane == 0) stage.live[row] = live;
  __syncwarp();
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int j = part * kRowLanes + lane;
    if (j >= kM) continue;
    float sum = -now[j];
#pragma unroll kAhead
    for (int i = 0; i < kM; ++i) sum = fmaf(line[i], stage.own[i * kStride + j], sum);
    now[j] = sum;
  }
  __syncwarp();
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int i = part * kRowLanes + lane;
    if (i >= kM) continue;
    float sum = 0.0f;
#pragma unroll kAhead
    for (int j = 0; j < kM; ++j) sum = fmaf(now[j], stage.own[i * kStride + j], sum);
    line[i] = (live >> i & 1u) != 0u ? sum : 0.0f;
  }
  __syncwarp();
}

// What a row keeps of a group: `count` members, and those of them that live as a bit a column.
template <int kN>
struct Kept {
  Members<kN> members;
  int count;
  uint32_t bits;
};

// The best set of a row inside `columns`, those of `open`, by the lanes of the row.
template <typename Config, int kM, int kN>
__device__ __forceinline__ Kept<kN> best_inside(const SweepParams& p,
                                                uint64_t columns,
                                                uint32_t open,
                                                int row,
                                                int lane,
                                                const Stage<Config, kM>& stage) {
  const int n = static_cast<int>(p.n);
  const RowProblem<Stage<Config, kM>::kStride> problem{
      stage.curvature, stage.line + row * kM, stage.live[row]};
  const int most = min(n, __popc(problem.live & open));  // live entries that can be kept

  float best = -INFINITY;
  int best_set = INT_MAX;
  for (int set = lane; set < static_cast<int>(p.tables.num_inner); set += kRowLanes) {
    const Members<kN> members(stage.inner[set], columns, n);
    if (p.alive != nullptr && __popc(members.bits() & problem.live) < most) continue;
    const float gain = gain_of(problem, members, n);
    if (gain > best) {
      best = gain;
      best_set = set;
    }
  }
  best_of<kRowLanes>(best, best_set);
  // no set has a gain that is a number: any will do
  const Members<kN> kept(stage.inner[best_set == INT_MAX ? 0 : best_set], columns, n);
  return {kept, n, kept.bits() & problem.live};
}

// What comes of the set that a row keeps; leaves the change in `stage.line`.
template <typename Config, int kM, int kN>
__device__ __forceinline__ void settle_row(const SweepParams& p,
                                           const Place& place,
                                           const Kept<kN>& kept,
                                           float unit,
                                           int row,
                                           int lane,
                                           Stage<Config, kM>& stage) {
  constexpr int kStride = Stage<Config, kM>::kStride;
  constexpr int kParts = (kM + kRowLanes - 1) / kRowLanes;
  const int m = static_cast<int>(p.m);
  const bool real = row < place.rows;
  float* const line = stage.line + row * kM;
  const float* const now = stage.now + row * kM;
  const RowProblem<kStride> problem{stage.curvature, line, stage.live[row]};
  float weights[kN];
  weights_of(problem, kept.members, kept.count, weights);
  __syncwarp();  // u has been read

  const int64_t global_row = place.first_row + row;
  const int64_t at = global_row * p.cols + place.group * m;
  float loss = 0.0f;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int j = part * kRowLanes + lane;
    if (j >= kM) continue;
    float left = now[j];
    float value = 0.0f;
#pragma unroll
    for (int k = 0; k < kN; ++k) {
      left = fmaf(-weights[k], stage.own[kept.members.at[k] * kStride + j], left);
      if (kept.members.at[k] == j) value += weights[k];
    }
    loss = fmaf(left, left, loss);
    const bool keep = (kept.bits >> j & 1u) != 0u;
    value = keep ? value : 0.0f;
    const bool inside = real && j < m;
    const float change = inside ? value - p.live[at + j] : 0.0f;
    line[j] = change;
    if (!inside) continue;
    p.mask[at + j] = keep ? uint8_t{1} : uint8_t{0};
    p.new_weight[at + j] = value;
    p.change[global_row * p.change_stride + place.begin + j] = change;
  }
  loss = row_sum(loss);
  if (real && lane == 0) p.loss[global_row * (p.cols / m) + place.group] = 0.5f * unit * loss;
}

// choose(place): the columns of the panel into stage.columns, between two barriers. pick(columns,
// open, row, lane): what a row keeps of them, asked of all lanes of the row.
template <typename Config, int kM, int kN, bool kPanels, typename Choose, typename Pick>
__device__ __forceinline__ void sweep_step(const SweepParams& p,
                                           Stage<Config, kM>& stage,
                                           const Choose& choose,
                                           const Pick& pick) {
  constexpr int kRowsOfThread = Config::kRowsOfThread;
  constexpr int kSlots = Config::kSlots;
  constexpr bool kAhead = kRowsOfThread <= 16;  // else the registers are full
  const int thread = static_cast<int>(threadIdx.x);
  const int column = thread % Config::kWidth;
  const int slot = thread / Config::kWidth;
  const int m = static_cast<int>(p.m);
  const int count = static_cast<int>(p.count);
  const int64_t height = kPanels ? p.v : Config::kRows;
  Place place{};
  place.first_row = int64_t{blockIdx.x} * height;
  place.rows = static_cast<int>(min(height, p.rows - place.first_row));

  // (change of settled columns) R of this column, for row slot, slot + kSlots, ...
  float pushed[kRowsOfThread];
#pragma unroll
  for (int i = 0; i < kRowsOfThread; ++i) {
    const int row = slot + i * kSlots;
    const bool inside = row < place.rows && column < count;
    pushed[i] = inside ? p.pushed[(place.first_row + row) * p.cols + p.first + column] : 0.0f;
  }
  for (int item = thread; item < Config::kRows * kM; item += Config::kThreads) {
    stage.now[item] = 0.0f;
    stage.line[item] = 0.0f;
  }
  for (int set = thread; set < static_cast<int>(p.tables.num_inner); set += Config::kThreads) {
    stage.inner[set] = p.tables.inner[set];
  }
  __syncthreads();

  for (place.begin = 0; place.begin < count; place.begin += m) {
    place.group = (p.first + place.begin) / m;
    const int at = column - place.begin;
    const bool later = at >= m && column < count;
    const float* const factor = p.factor + (p.first + place.begin) * p.cols + p.first + column;
    float right[kM];
    if constexpr (kAhead) {  // asked for now, needed after the choice
#pragma unroll
      for (int j = 0; j < kM; ++j) right[j] = later && j < m ? factor[j * p.cols] : 0.0f;
    }
    load_matrices(p, place, thread, stage);
    const float unit = p.unit[place.group];
    if (at >= 0 && at < m) {
      const float scale = 1.0f / sqrtf(unit);
#pragma unroll
      for (int i = 0; i < kRowsOfThread; ++i) {
        stage.now[(slot + i * kSlots) * kM + at] = pushed[i] * scale;
      }
    }
    __syncthreads();
    if constexpr (kPanels) {
      for_each_row<Config>(
          place.rows, thread, [&](int row, int lane) { prepare_row(p, place, row, lane, stage); });
      choose(place);
      uint32_t open = 0u;
      for (int i = 0; i < static_cast<int>(p.num_columns); ++i) {
        open |= 1u << (stage.columns >> 4 * i & 15u);
      }
      for_each_row<Config>(place.rows, thread, [&](int row, int lane) {
        const Kept<kN> kept = pick(stage.columns, open, row, lane);
        settle_row<Config, kM, kN>(p, place, kept, unit, row, lane, stage);
      });
    } else {
      for_each_row<Config>(place.rows, thread, [&](int row, int lane) {
        prepare_row(p, place, row, lane, stage);
        const Kept<kN> kept = pick(kEveryColumn, kAllLanes, row, lane);
        settle_row<Config, kM, kN>(p, place, kept, unit, row, lane, stage);
      });
    }
    __syncthreads();
    if (!later) continue;
#pragma unroll
    for (int j = 0; j < kM; j += 4) {
      if constexpr (!kAhead) {
#pragma unroll
        for (int e = 0; e < 4; ++e) right[j + e] = j + e < m ? factor[(j + e) * p.cols] : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kRowsOfThread; ++i) {
        if (i * kSlots >= place.rows) break;
        const float* const change = stage.line + (slot + i * kSlots) * kM;
        const auto four = *reinterpret_cast<const Piece<float, 4>*>(change + j);
#pragma unroll
        for (int e = 0; e < 4; ++e) pushed[i] = fmaf(four.at[e], right[j + e], pushed[i]);
      }
    }
  }
}

}  // namespace obs_kernels::sweep
