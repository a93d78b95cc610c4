// SPDX-License-Identifier: Apache-2.0
// Fisher blocks from 9 to 128: a thread a tile of 8 x 8 on or below the diagonal of a block, a CTA
// some neighbouring blocks. Their gradients arrive in shared memory stage by stage; F is touched
// once at the end. Where rows of tiles are whole sectors, each thread reads its tile and writes it
// and its mirror image, so that half of F is never read. Else the sums go through shared memory,
// and F is read and written in order: a piece of 8 bytes a request would cost four times as many.
#pragma once

#include <cstdint>

#include "common/device.cuh"
#include "fisher/accumulate_config.h"
#include "fisher/accumulate_elements.cuh"
#include "obs_kernels/accumulate.h"

namespace obs_kernels::accumulate {

constexpr int kTile = kAccumulateTile;

// Byte of a staged sample where an element lies; `column` counts whole tiles, so the edge of a
// block is padded: what lies there is anything, and ends only in sums that nobody stores. A thread
// reads the 8 elements of a tile: of 16 bits, one piece of 16 bytes, and the pieces of 8
// neighbouring tiles fill all banks. Of f32, two pieces; they change places in every second four
// of tiles, or the first pieces of 8 tiles would meet in half of the banks.
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

__device__ __forceinline__ void prefetch_tile(const float* fisher, int size, const Place& place) {
#pragma unroll
  for (int e = 0; e < kTile; ++e) {
    if (place.busy) prefetch_l2(fisher + (place.first_row + e) * size + place.first_col);
  }
}

// F += scale * sums on the tile and its mirror image; `fisher` is the block's.
__device__ __forceinline__ void add_tile(
    float* fisher, int size, float scale, const Place& place, float (&sums)[kTile][kTile]) {
  // 32 registers. The stores between keep the compiler from loading all of the tile at once, which
  // would spill.
  constexpr int kRowsAhead = 4;
#pragma unroll
  for (int start = 0; start < kTile; start += kRowsAhead) {
    float old[kRowsAhead][kTile];
#pragma unroll
    for (int e = 0; e < kRowsAhead; ++e) {
      load_row<4>(fisher + (place.first_row + start + e) * size, place.first_col, size, old[e]);
    }
#pragma unroll
    for (int e = 0; e < kRowsAhead; ++e) {
      float (&row)[kTile] = sums[start + e];
#pragma unroll
      for (int f = 0; f < kTile; ++f) row[f] = fmaf(scale, row[f], old[e][f]);
      store_row<4>(fisher + (place.first_row + start + e) * size, place.first_col, size, row);
    }
  }
  if (place.middle) return;
#pragma unroll
  for (int e = 0; e < kTile; ++e) {
    float across[kTile];
#pragma unroll
    for (int f = 0; f < kTile; ++f) across[f] = sums[f][e];
    store_row<4>(fisher + (place.first_col + e) * size, place.first_row, size, across);
  }
}

// The rows of a tile and of its mirror image that fall into a band of the CTA's rows of F.
template <int kVector>
__device__ __forceinline__ void spread_tile(float* band,
                                            int first,
                                            int band_rows,
                                            int size,
                                            const Place& place,
                                            const float (&sums)[kTile][kTile]) {
  const auto put = [&](int row, int col, const float (&values)[kTile]) {
    const int slot = place.block * size + row - first;
    if (row < size && slot >= 0 && slot < band_rows) {
      store_row<kVector>(band + slot * size, col, size, values);
    }
  };
#pragma unroll
  for (int e = 0; e < kTile; ++e) put(place.first_row + e, place.first_col, sums[e]);
  if (place.middle) return;
#pragma unroll
  for (int e = 0; e < kTile; ++e) {
    float across[kTile];
#pragma unroll
    for (int f = 0; f < kTile; ++f) across[f] = sums[f][e];
    put(place.first_col + e, place.first_row, across);
  }
}

// Consecutive threads on consecutive pieces.
template <int kPiece>
__device__ __forceinline__ void add_band(
    float* fisher, const float* band, int elements, float scale, int thread, int threads) {
  constexpr int kAhead = 4;
  using Part = Piece<float, kPiece>;
  auto* const to = reinterpret_cast<Part*>(fisher);
  const auto* const from = reinterpret_cast<const Part*>(band);
  const int pieces = elements / kPiece;
  for (int start = thread; start < pieces; start += kAhead * threads) {
    Part old[kAhead];
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead) {
      const int at = start + ahead * threads;
      if (at < pieces) old[ahead] = to[at];
    }
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead) {
      const int at = start + ahead * threads;
      if (at >= pieces) continue;
      const Part sum = from[at];
#pragma unroll
      for (int e = 0; e < kPiece; ++e) old[ahead].at[e] = fmaf(scale, sum.at[e], old[ahead].at[e]);
      to[at] = old[ahead];
    }
  }
}

// F += scale * sums, for all of the CTA's blocks, as many rows at once as `shared` holds.
template <int kVector>
__device__ __forceinline__ void add_in_bands(float* fisher,
                                             int live,
                                             const AccumulateParams& params,
                                             const TilesShape& shape,
                                             const Place& place,
                                             const float (&sums)[kTile][kTile],
                                             char* shared,
                                             int shared_bytes) {
  auto* const band = reinterpret_cast<float*>(shared);
  const int thread = static_cast<int>(threadIdx.x);
  const int size = static_cast<int>(params.size);
  const int rows = live * size;
  // An even number, so that a band begins where a piece of 16 bytes does.
  const int band_rows = shared_bytes / (size * static_cast<int>(sizeof(float))) / 2 * 2;
  for (int first = 0; first < rows; first += band_rows) {
    __syncthreads();  // all have read the last stage, or the band before
    if (place.busy) spread_tile<kVector>(band, first, band_rows, size, place, sums);
    __syncthreads();
    float* const to = fisher + first * size;
    const int elements = min(band_rows, rows - first) * size;
    if (kVector > 1 && shape.fisher_aligned) {
      add_band<4>(to, band, elements, params.scale, thread, shape.threads);
    } else {
      add_band<1>(to, band, elements, params.scale, thread, shape.threads);
    }
  }
}

// kVector: elements that the sums take through shared memory at once; unused if kDirect.
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
  float* const fisher = params.fisher + first_block * (size * size);
  float* const own_fisher = fisher + place.block * size * size;
  const auto num_samples = static_cast<int>(params.num_samples);
  const auto samples_from = [&](int start) { return min(shape.samples, num_samples - start); };

#pragma unroll
  for (int ahead = 0; ahead < kStages - 1; ++ahead) {
    const int start = ahead * shape.samples;
    fetch_stage<Element>(copier, shape, start, samples_from(start), staged[ahead]);
    async_commit();
  }

  if constexpr (Config::kPrefetch && Config::kDirect) {
    prefetch_tile(own_fisher, size, place);
  } else if constexpr (Config::kPrefetch) {
    constexpr int kSector = 8;  // elements
    for (int at = thread * kSector; at < live * size * size; at += shape.threads * kSector) {
      prefetch_l2(fisher + at);
    }
  }

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
  if constexpr (Config::kDirect) {
    if (place.busy) add_tile(own_fisher, size, params.scale, place, sums);
  } else {
    add_in_bands<kVector>(fisher, live, params, shape, place, sums, staged[0], sizeof(staged));
  }
}

}  // namespace obs_kernels::accumulate
