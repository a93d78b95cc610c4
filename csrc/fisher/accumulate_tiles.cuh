// SPDX-License-Identifier: Apache-2.0
// Fisher blocks from 9 to 128: a thread a tile of 8 x 8 on or below the diagonal of a block, a CTA
// some neighbouring blocks. Their gradients arrive in shared memory stage by stage; F is touched
// once at the end, its lower side read, both sides written.
#pragma once

#include <cstdint>

#include "common/device.cuh"
#include "fisher/accumulate_config.h"
#include "fisher/accumulate_elements.cuh"
#include "obs_kernels/accumulate.h"

namespace obs_kernels::accumulate {

constexpr int kTile = kAccumulateTile;

// Byte of a staged sample where an element lies; `column` counts whole tiles, so the edge of a
// block is padded. A thread reads the 8 elements of a tile: of 16 bits, one piece of 16 bytes, and
// the pieces of 8 neighbouring tiles fill all banks. Of f32, two pieces; they change places in
// every second four of tiles, or the first pieces of 8 tiles would meet in half of the banks.
template <typename Element>
__device__ __forceinline__ int staged_at(int column) {
  if constexpr (Element::kBytes == 2) return column * 2;
  const int piece = column / 4;
  return (piece ^ (piece >> 3 & 1)) * 16 + column % 4 * 4;
}

// Which copies a thread makes: always the same pieces of a sample, of every `step`-th sample.
struct Copier {
  const char* from;  // first sample of the CTA's first block
  int64_t row_bytes;
  int first;   // piece
  int width;   // pieces from one of this thread's to the next
  int pieces;  // of a sample
  int pieces_of_block;
  int sample;  // first one; kNone for a thread with nothing to copy
  int step;
  static constexpr int kNone = 1 << 30;
};

template <typename Element>
__device__ __forceinline__ Copier make_copier(const AccumulateParams& params,
                                              const TilesShape& shape,
                                              int64_t first_block,
                                              int live,
                                              int thread) {
  Copier copier{};
  const int block_bytes = static_cast<int>(params.size) * Element::kBytes;
  copier.from = static_cast<const char*>(params.grads) + first_block * block_bytes;
  copier.row_bytes = params.row_stride * Element::kBytes;
  copier.pieces_of_block = block_bytes / shape.piece_bytes;
  copier.pieces = live * copier.pieces_of_block;
  copier.width = min(copier.pieces, shape.threads);
  copier.first = thread % copier.width;
  copier.step = shape.threads / copier.width;
  copier.sample = thread / copier.width;
  if (copier.sample >= copier.step) copier.sample = Copier::kNone;
  return copier;
}

template <typename Element, int kBytes>
__device__ __forceinline__ void copy_pieces(
    const Copier& copier, const TilesShape& shape, int start, int count, char* stage) {
  for (int piece = copier.first; piece < copier.pieces; piece += copier.width) {
    const int block = piece / copier.pieces_of_block;
    const int inside = piece - block * copier.pieces_of_block;
    const int column = block * shape.tile_rows * kTile + inside * (kBytes / Element::kBytes);
    char* const to = stage + staged_at<Element>(column);
    const char* const from = copier.from + start * copier.row_bytes + piece * kBytes;
    for (int sample = copier.sample; sample < count; sample += copier.step) {
      const char* const source = from + sample * copier.row_bytes;
      if constexpr (kBytes == 2) {
        // cp.async has no such size: an odd number of columns, or a base off by one element.
        *reinterpret_cast<uint16_t*>(to + sample * shape.pitch) =
            *reinterpret_cast<const uint16_t*>(source);
      } else {
        async_copy<kBytes>(to + sample * shape.pitch, source);
      }
    }
  }
}

// Starts the copies of samples start .. start + count - 1. The width is the same for all threads.
template <typename Element>
__device__ __forceinline__ void fetch_stage(
    const Copier& copier, const TilesShape& shape, int start, int count, char* stage) {
  if (shape.piece_bytes == 16) {
    copy_pieces<Element, 16>(copier, shape, start, count, stage);
  } else if (shape.piece_bytes == 8) {
    copy_pieces<Element, 8>(copier, shape, start, count, stage);
  } else if (shape.piece_bytes == 4) {
    copy_pieces<Element, 4>(copier, shape, start, count, stage);
  } else if constexpr (Element::kBytes == 2) {
    copy_pieces<Element, 2>(copier, shape, start, count, stage);
  }
}

// Where a thread's tile lies.
struct Place {
  bool busy;    // false: no tile; the thread copies, and computes what nobody stores
  bool middle;  // on the diagonal
  int first_row;
  int first_col;
  int staged_row;  // byte of a staged sample where its rows begin
  int staged_col;
  int block;  // of the CTA's
};

template <typename Element>
__device__ __forceinline__ Place place_of(int thread, int live, const TilesShape& shape) {
  Place place{};
  place.busy = thread < live * shape.tiles;
  place.block = place.busy ? thread / shape.tiles : 0;
  // Tiles row by row: 0 | 1 2 | 3 4 5 | ...
  const int tile = place.busy ? thread - place.block * shape.tiles : 0;
  int row = 0;
  while ((row + 1) * (row + 2) / 2 <= tile) ++row;
  const int col = tile - row * (row + 1) / 2;
  place.middle = row == col;
  place.first_row = row * kTile;
  place.first_col = col * kTile;
  const int tiles_before = place.block * shape.tile_rows;
  place.staged_row = staged_at<Element>((tiles_before + row) * kTile);
  place.staged_col = staged_at<Element>((tiles_before + col) * kTile);
  return place;
}

// The 8 gradients of a tile's side; `first` is the place of its first piece.
template <typename Element>
__device__ __forceinline__ void read_side(const char* sample, int first, float (&values)[kTile]) {
  uint32_t words[4];
  if constexpr (Element::kBytes == 2) {
    load_words<Element, 8>(sample + first, words);
    widen<Element, 8>(words, values);
  } else {
    load_words<Element, 4>(sample + first, words);
    widen<Element, 4>(words, values);
    load_words<Element, 4>(sample + (first ^ 16), words);  // see staged_at
    widen<Element, 4>(words, values + 4);
  }
}

template <typename Element>
__device__ __forceinline__ void multiply(
    const char* stage, int count, int pitch, const Place& place, float (&sums)[kTile][kTile]) {
#pragma unroll 2
  for (int sample = 0; sample < count; ++sample) {
    float rows[kTile];
    float cols[kTile];
    read_side<Element>(stage + sample * pitch, place.staged_row, rows);
    read_side<Element>(stage + sample * pitch, place.staged_col, cols);
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
#pragma unroll
      for (int j = 0; j < kTile; ++j) sums[i][j] = fmaf(rows[i], cols[j], sums[i][j]);
    }
  }
}

// A row of a tile is a sector of 32 bytes, or lies in two that neighbours ask for as well.
__device__ __forceinline__ void prefetch_tile(const float* fisher, int size, const Place& place) {
#pragma unroll
  for (int e = 0; e < kTile; ++e) {
    const int row = place.first_row + e;
    if (place.busy && row < size) prefetch_l2(fisher + row * size + place.first_col);
  }
}

// F += scale * sums on the tile and its mirror image.
template <int kVector>
__device__ __forceinline__ void add_to_fisher(
    float* fisher, int size, float scale, const Place& place, float (&sums)[kTile][kTile]) {
  constexpr int kRowsAhead = 2;  // 16 registers; 32 spill
#pragma unroll
  for (int start = 0; start < kTile; start += kRowsAhead) {
    float old[kRowsAhead][kTile] = {};
#pragma unroll
    for (int e = 0; e < kRowsAhead; ++e) {
      const int row = place.first_row + start + e;
      if (row < size) load_row<kVector>(fisher + row * size, place.first_col, size, old[e]);
    }
#pragma unroll
    for (int e = 0; e < kRowsAhead; ++e) {
#pragma unroll
      for (int f = 0; f < kTile; ++f)
        sums[start + e][f] = fmaf(scale, sums[start + e][f], old[e][f]);
    }
  }
  if (place.middle) {
    // Its lower half decides, as everywhere.
#pragma unroll
    for (int e = 0; e < kTile; ++e) {
#pragma unroll
      for (int f = e + 1; f < kTile; ++f) sums[e][f] = sums[f][e];
    }
  }
#pragma unroll
  for (int e = 0; e < kTile; ++e) {
    const int row = place.first_row + e;
    if (row < size) store_row<kVector>(fisher + row * size, place.first_col, size, sums[e]);
  }
  if (place.middle) return;
#pragma unroll
  for (int e = 0; e < kTile; ++e) {
    float across[kTile];
#pragma unroll
    for (int f = 0; f < kTile; ++f) across[f] = sums[f][e];
    const int row = place.first_col + e;
    if (row < size) store_row<kVector>(fisher + row * size, place.first_row, size, across);
  }
}

template <typename Config, typename Element, int kVector>
__global__ __launch_bounds__(Config::kMaxThreads, Config::kMinBlocks) void accumulate_tiles_kernel(
    AccumulateParams params, TilesShape shape) {
  constexpr int kStages = Config::kStages;
  alignas(16) __shared__ char staged[kStages][Config::kStageBytes];

  const int thread = static_cast<int>(threadIdx.x);
  const int size = static_cast<int>(params.size);
  const int64_t first_block = int64_t{blockIdx.x} * shape.blocks;
  const int live = static_cast<int>(min(int64_t{shape.blocks}, params.num_blocks - first_block));
  const Copier copier = make_copier<Element>(params, shape, first_block, live, thread);
  const Place place = place_of<Element>(thread, live, shape);
  float* const fisher = params.fisher + (first_block + place.block) * (int64_t{size} * size);
  const auto num_samples = static_cast<int>(params.num_samples);
  const auto samples_from = [&](int start) { return min(shape.samples, num_samples - start); };

  if (size % kTile != 0) {
    // The edge of a block is never copied, and must be zero.
    constexpr int kPieces = kStages * Config::kStageBytes / 16;
    auto* const pieces = reinterpret_cast<Piece<uint32_t, 4>*>(&staged[0][0]);
    for (int at = thread; at < kPieces; at += shape.threads) pieces[at] = {};
    __syncthreads();
  }
#pragma unroll
  for (int ahead = 0; ahead < kStages - 1; ++ahead) {
    const int start = ahead * shape.samples;
    fetch_stage<Element>(copier, shape, start, samples_from(start), staged[ahead]);
    async_commit();
  }

  if constexpr (Config::kPrefetch) prefetch_tile(fisher, size, place);

  float sums[kTile][kTile] = {};
  int now = 0;             // the stage that is computed
  int next = kStages - 1;  // the stage that is filled
#pragma unroll 1
  for (int start = 0; start < num_samples; start += shape.samples) {
    async_wait<kStages - 2>();
    // All copies of this stage are in sight, and all threads have left the one to be filled.
    __syncthreads();
    const int later = start + (kStages - 1) * shape.samples;
    fetch_stage<Element>(copier, shape, later, samples_from(later), staged[next]);
    async_commit();
    multiply<Element>(staged[now], samples_from(start), shape.pitch, place, sums);
    now = now + 1 == kStages ? 0 : now + 1;
    next = next + 1 == kStages ? 0 : next + 1;
  }
  if (place.busy) add_to_fisher<kVector>(fisher, size, params.scale, place, sums);
}

}  // namespace obs_kernels::accumulate
