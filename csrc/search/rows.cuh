// SPDX-License-Identifier: Apache-2.0
// A group of up to 32 weights in a warp: a lane a row of the block, the whole of it in shared
// memory too, for places that are known at run time only.
#pragma once

#include <cstdint>

#include "common/device.cuh"
#include "search/gains.cuh"

namespace obs_kernels::search {

template <int kSize>
struct RowStage {
  static constexpr int kStride = kSize + 4;  // eight lanes read 16 bytes each from all 32 banks
  alignas(16) float f[kSize * kStride];
  alignas(16) float line[kSize];  // a row, or a vector, for all lanes
};

// What a lane knows of its row; lanes at or beyond m hold a row of the identity.
template <int kSize>
struct Row {
  float f[kSize];  // damped, decoupled, over unit
  float w;         // 0 where dead
  float u;
  uint32_t live;  // of the group
  float unit;
  bool fisher_finite;
  bool weight_finite;
  float damp;
};

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, step));
  }
  return value;
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, step);
  }
  return value;
}

// Every entry of `stage.line` is one lane's value.
template <int kSize>
__device__ __forceinline__ void share(float value, int lane, RowStage<kSize>& stage) {
  __syncwarp();
  if (lane < kSize) stage.line[lane] = value;
  __syncwarp();
}

template <int kSize>
__device__ __forceinline__ float dot(const float (&row)[kSize], const float* line) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kSize; ++j) sum = fmaf(row[j], line[j], sum);
  return sum;
}

// Group `at` into its warp: conditioned, and u = F w. `stage.f` holds what the lanes hold.
template <int kSize>
__device__ __forceinline__ void load_rows(
    const SearchParams& p, int64_t at, int lane, RowStage<kSize>& stage, Row<kSize>& row) {
  constexpr int kStride = RowStage<kSize>::kStride;
  const int m = static_cast<int>(p.m);
  __syncwarp();
  for (int item = lane; item < m * m; item += kWarp) {
    const int line = item / m;
    async_copy<4>(stage.f + line * kStride + item - line * m, p.fisher + at * m * m + item);
  }
  async_commit();
  const bool inside = lane < m;
  const float weight = inside ? p.weight[at * m + lane] : 0.0f;
  const bool alive = inside && (p.alive == nullptr || p.alive[at * m + lane] != 0);
  row.live = __ballot_sync(kAllLanes, alive);
  row.damp = p.damp[p.damp_each ? at : 0];
  row.w = alive ? weight : 0.0f;
  async_wait<0>();
  __syncwarp();

  float poison = 0.0f;
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    const float value = inside && j < m ? stage.f[lane * kStride + j] : 0.0f;
    poison = fmaf(value, 0.0f, poison);
    row.f[j] = j == lane ? value + row.damp : value;
  }
  row.fisher_finite = __ballot_sync(kAllLanes, poison != 0.0f) == 0u;
  row.weight_finite = __ballot_sync(kAllLanes, weight * 0.0f != 0.0f) == 0u;
  const Unit unit = unit_of(warp_max(alive ? stage.f[lane * kStride + lane] + row.damp : 0.0f));
  row.unit = unit.value;
  __syncwarp();
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    const bool both = alive && (row.live >> j & 1u);
    row.f[j] = both ? row.f[j] * unit.inverse : j == lane ? 1.0f : 0.0f;
    if (lane < kSize) stage.f[lane * kStride + j] = row.f[j];
  }
  share(row.w, lane, stage);
  row.u = dot(row.f, stage.line);
  __syncwarp();
}

// First pivot of the block that fails, 1-based, or 0. Destroys the rows of the lanes, not the
// stage.
template <int kSize>
__device__ __forceinline__ int32_t factor(int lane, RowStage<kSize>& stage, Row<kSize>& row) {
  int32_t failed = 0;
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    __syncwarp();
    if (lane == k) {
#pragma unroll
      for (int j = k; j < kSize; ++j) stage.line[j] = row.f[j];
    }
    __syncwarp();
    const float pivot = stage.line[k];
    const bool good = good_pivot(pivot);
    if (!good && failed == 0) failed = k + 1;
    const float share = good ? row.f[k] / pivot : row.f[k];
#pragma unroll
    for (int j = k + 1; j < kSize; ++j) row.f[j] = fmaf(-share, stage.line[j], row.f[j]);
  }
  return failed;
}

// F_KK x = u_K over the lanes, Gauss-Jordan; 0 for lanes outside.
template <int kSize>
__device__ __forceinline__ float solve_kept(uint32_t kept,
                                            int lane,
                                            RowStage<kSize>& stage,
                                            const Row<kSize>& row) {
  const bool own = kept >> lane & 1u;
  float a[kSize];
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    a[j] = own && (kept >> j & 1u) ? row.f[j] : j == lane ? 1.0f : 0.0f;
  }
  float b = own ? row.u : 0.0f;
  float pivot = 1.0f;
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    if (!(kept >> k & 1u)) continue;  // the same for all lanes
    __syncwarp();
    if (lane == k) {
      pivot = a[k];
#pragma unroll
      for (int j = k; j < kSize; ++j) stage.line[j] = a[j];
    }
    const float right = __shfl_sync(kAllLanes, b, k);
    __syncwarp();
    const float share = lane == k ? 0.0f : a[k] / stage.line[k];
#pragma unroll
    for (int j = k; j < kSize; ++j) a[j] = fmaf(-share, stage.line[j], a[j]);
    b = fmaf(-share, right, b);
  }
  return own ? b / pivot : 0.0f;
}

template <int kSize>
__device__ __forceinline__ int32_t info_of(const Row<kSize>& row, int32_t failed) {
  return !row.weight_finite     ? kWeightNotFinite
         : !row.fisher_finite   ? kFisherNotFinite
         : !good_damp(row.damp) ? kDampNotValid
                                : failed;
}

// Mask, weight, saliency and info of a group whose lanes hold their new weight.
template <int kSize>
__device__ __forceinline__ void finish_rows(const SearchParams& p,
                                            int64_t at,
                                            int lane,
                                            uint32_t kept,
                                            float value,
                                            RowStage<kSize>& stage,
                                            Row<kSize>& row) {
  const int m = static_cast<int>(p.m);
  const float change = value - row.w;
  share(change, lane, stage);
  const float loss = 0.5f * warp_sum(change * dot(row.f, stage.line)) * row.unit;
  const int32_t info = info_of(row, factor(lane, stage, row));
  if (lane < m) {
    p.mask[at * m + lane] = info == 0 ? static_cast<uint8_t>(kept >> lane & 1u) : uint8_t{0};
    if (p.new_weight != nullptr) {
      p.new_weight[at * m + lane] = info == 0 ? value : p.weight[at * m + lane];
    }
  }
  if (lane == 0) {
    p.saliency[at] = info == 0 ? loss : NAN;
    p.info[at] = info;
  }
}

}  // namespace obs_kernels::search
