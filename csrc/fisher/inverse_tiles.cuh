// SPDX-License-Identifier: Apache-2.0
// Matrices from 65 to 128: a block of threads a matrix, a thread a tile on or below the diagonal.
#pragma once

#include <cstdint>

#include "fisher/inverse_config.h"
#include "fisher/inverse_step.cuh"
#include "obs_kernels/inverse.h"

namespace obs_kernels::inverse {

template <typename Config, int kVector>
__global__ __launch_bounds__(Config::kThreads,
                             Config::kMinBlocks) void invert_tiles_kernel(InvertParams params) {
  constexpr int kTile = Config::kTile;
  alignas(16) __shared__ float exchange[2][Config::kSize];

  const int thread = static_cast<int>(threadIdx.x);
  // Tiles row by row: 0 | 1 2 | 3 4 5 | ... ; the threads beyond them only keep the barriers
  // company, and must not point outside of `exchange`.
  const bool busy = thread < Config::kTiles;
  const int tile = busy ? thread : 0;
  int tile_row = 0;
  while ((tile_row + 1) * (tile_row + 2) / 2 <= tile) ++tile_row;
  const int tile_col = tile - tile_row * (tile_row + 1) / 2;
  const int size = static_cast<int>(params.size);
  const int64_t block = blockIdx.x;
  const float* matrix = params.matrices + block * size * size;
  const float damp = params.damp[params.damp_each ? block : 0];
  const int first_row = tile_row * kTile;
  const int first_col = tile_col * kTile;

  float a[kTile][kTile];
#pragma unroll
  for (int e = 0; e < kTile; ++e) {
#pragma unroll
    for (int f = 0; f < kTile; ++f) a[e][f] = 0.0f;
    const int row = first_row + e;
    if (busy && row < size) load_row<kVector>(matrix + row * size, first_col, size, a[e]);
    if (tile_row == tile_col) a[e][e] = row < size ? a[e][e] + damp : 1.0f;
  }

  int failed = 0;
#pragma unroll 1
  for (int turn = 0; turn * kTile < size; ++turn) {
    const bool holds_col = busy && tile_col == turn;
    const bool holds_row = busy && tile_row == turn;
#pragma unroll
    for (int e = 0; e < kTile; ++e) {
      if (turn * kTile + e >= size) break;
      // Two buffers: step k + 1 is written while slower threads still read step k.
      float* const shared = exchange[e % 2];
      if (holds_col) {
#pragma unroll
        for (int at = 0; at < kTile; ++at) shared[first_row + at] = a[at][e];
      } else if (holds_row) {
#pragma unroll
        for (int at = 0; at < kTile; ++at) shared[first_col + at] = a[e][at];
      }
      __syncthreads();
      const Pivot pivot = examine(shared[turn * kTile + e]);
      if (!pivot.good && failed == 0) failed = turn * kTile + e + 1;
      float of_rows[kTile];
      float of_cols[kTile];
#pragma unroll
      for (int at = 0; at < kTile; ++at) {
        of_rows[at] = shared[first_row + at] * pivot.scale;
        of_cols[at] = shared[first_col + at] * pivot.scale;
      }
      if (holds_row) {
        of_rows[e] = -pivot.scale;
#pragma unroll
        for (int at = 0; at < kTile; ++at) a[e][at] = 0.0f;
      }
      if (holds_col) {
        of_cols[e] = -pivot.scale;
#pragma unroll
        for (int at = 0; at < kTile; ++at) a[at][e] = 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
#pragma unroll
        for (int j = 0; j < kTile; ++j) a[i][j] = fmaf(-of_rows[i], of_cols[j], a[i][j]);
      }
    }
  }

  // In place: every thread has read its tile before the first barrier.
  float* const inverse = params.inverse + block * size * size;
  if (thread == 0) params.info[block] = failed;
  if (!busy) return;
#pragma unroll
  for (int e = 0; e < kTile; ++e) {
    float along[kTile];
    float across[kTile];
#pragma unroll
    for (int f = 0; f < kTile; ++f) {
      along[f] = failed != 0 ? 0.0f : -a[e][f];
      across[f] = failed != 0 ? 0.0f : -a[f][e];
    }
    const int row = first_row + e;
    const int mirror = first_col + e;
    if (row < size) store_row<kVector>(inverse + row * size, first_col, size, along);
    if (tile_row != tile_col && mirror < size) {
      store_row<kVector>(inverse + mirror * size, first_row, size, across);
    }
  }
}

}  // namespace obs_kernels::inverse
