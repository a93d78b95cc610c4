// SPDX-License-Identifier: Apache-2.0
// Matrices up to 64: each in the registers of some lanes of a warp.
#pragma once

#include <cstdint>

#include "fisher/inverse_config.h"
#include "fisher/inverse_step.cuh"
#include "obs_kernels/inverse.h"

namespace obs_kernels::inverse {

// What a lane holds. Chunk blocks (rq, cq) that lie above the diagonal for every lane are left out:
// a quarter of the numbers and of the work of an 8 x 16 share.
template <typename Config>
struct Share {
  float at[Config::kRowChunks][Config::kColChunks][kChunk][kChunk];

  __device__ static constexpr bool stored(int rq, int cq) {
    return cq * Config::kLaneCols < (rq + 1) * Config::kLaneRows;
  }
  // The row chunk block that holds the diagonal of column chunk block cq.
  __device__ static constexpr int diagonal(int cq) {
    return cq * Config::kLaneCols / Config::kLaneRows;
  }
};

template <typename Config>
struct Place {
  int lr;    // of the lane
  int lc;    // of the lane
  int lane;  // inside the group
  __device__ __forceinline__ int row_chunk(int rq) const { return rq * Config::kLaneRows + lr; }
  __device__ __forceinline__ int col_chunk(int cq) const { return cq * Config::kLaneCols + lc; }
};

// The lower triangle, damped; the identity beyond `size`.
template <typename Config, int kVector>
__device__ __forceinline__ void load_share(const float* matrix,
                                           float damp,
                                           bool live,
                                           int size,
                                           const Place<Config>& place,
                                           Share<Config>& share) {
#pragma unroll
  for (int rq = 0; rq < Config::kRowChunks; ++rq) {
#pragma unroll
    for (int cq = 0; cq < Config::kColChunks; ++cq) {
      if (!Share<Config>::stored(rq, cq)) continue;
      const int row_chunk = place.row_chunk(rq);
      const int col_chunk = place.col_chunk(cq);
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {
        const int row = row_chunk * kChunk + e;
        float values[kChunk] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (live && row < size && col_chunk <= row_chunk) {
          load_row<kVector>(matrix + row * size, col_chunk * kChunk, size, values);
        }
#pragma unroll
        for (int f = 0; f < kChunk; ++f) {
          const bool diagonal = col_chunk == row_chunk && e == f;
          share.at[rq][cq][e][f] =
              diagonal ? (live && row < size ? values[f] + damp : 1.0f) : values[f];
        }
      }
    }
  }
}

// Step k = 4 * (cq * kLaneCols + turn) + e. The lanes that hold column k (and, above its chunk
// block, row k) hand it out through shared memory, already scaled, and clear it.
template <typename Config>
__device__ __forceinline__ void hand_out(int cq,
                                         int e,
                                         int turn,
                                         const Place<Config>& place,
                                         float scale,
                                         Share<Config>& share,
                                         float* w) {
  const int rk = Share<Config>::diagonal(cq);
  const int owner_row = cq * Config::kLaneCols % Config::kLaneRows + turn;
  if (place.lc == turn) {
#pragma unroll
    for (int rq = 0; rq < Config::kRowChunks; ++rq) {
      if (rq < rk) continue;
      Piece<kChunk> column;
#pragma unroll
      for (int at = 0; at < kChunk; ++at) {
        column.at[at] = share.at[rq][cq][at][e] * scale;
        share.at[rq][cq][at][e] = 0.0f;
      }
      if (rq == rk && place.lr == owner_row) column.at[e] = -scale;
      *reinterpret_cast<Piece<kChunk>*>(w + place.row_chunk(rq) * kChunk) = column;
    }
  }
  if (place.lr == owner_row) {
#pragma unroll
    for (int other = 0; other < Config::kColChunks; ++other) {
      if (!Share<Config>::stored(rk, other)) continue;
      if (Share<Config>::diagonal(other) < rk) {  // column k is not stored in those rows
        Piece<kChunk> row;
#pragma unroll
        for (int at = 0; at < kChunk; ++at) row.at[at] = share.at[rk][other][e][at] * scale;
        *reinterpret_cast<Piece<kChunk>*>(w + place.col_chunk(other) * kChunk) = row;
      }
#pragma unroll
      for (int at = 0; at < kChunk; ++at) share.at[rk][other][e][at] = 0.0f;
    }
  }
}

template <typename Config>
__device__ __forceinline__ void subtract(const float* w,
                                         const Place<Config>& place,
                                         Share<Config>& share) {
  float of_rows[Config::kRowChunks][kChunk];
  float of_cols[Config::kColChunks][kChunk];
#pragma unroll
  for (int rq = 0; rq < Config::kRowChunks; ++rq) {
    load_four(w + place.row_chunk(rq) * kChunk, of_rows[rq]);
  }
#pragma unroll
  for (int cq = 0; cq < Config::kColChunks; ++cq) {
    load_four(w + place.col_chunk(cq) * kChunk, of_cols[cq]);
  }
#pragma unroll
  for (int rq = 0; rq < Config::kRowChunks; ++rq) {
#pragma unroll
    for (int cq = 0; cq < Config::kColChunks; ++cq) {
      if (!Share<Config>::stored(rq, cq)) continue;
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {
#pragma unroll
        for (int f = 0; f < kChunk; ++f) {
          share.at[rq][cq][e][f] = fmaf(-of_rows[rq][e], of_cols[cq][f], share.at[rq][cq][e][f]);
        }
      }
    }
  }
}

// The negated share, and the mirror image of what is stored on one side only; zeros if `bad`.
template <typename Config, int kVector>
__device__ __forceinline__ void store_share(
    float* inverse, bool bad, int size, const Place<Config>& place, const Share<Config>& share) {
#pragma unroll
  for (int rq = 0; rq < Config::kRowChunks; ++rq) {
#pragma unroll
    for (int cq = 0; cq < Config::kColChunks; ++cq) {
      if (!Share<Config>::stored(rq, cq)) continue;
      const int row_chunk = place.row_chunk(rq);
      const int col_chunk = place.col_chunk(cq);
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {
        float along[kChunk];
        float across[kChunk];
#pragma unroll
        for (int f = 0; f < kChunk; ++f) {
          along[f] = bad ? 0.0f : -share.at[rq][cq][e][f];
          across[f] = bad ? 0.0f : -share.at[rq][cq][f][e];
        }
        const int row = row_chunk * kChunk + e;
        if (row < size) store_row<kVector>(inverse + row * size, col_chunk * kChunk, size, along);
        const int mirror = col_chunk * kChunk + e;
        if (rq > Share<Config>::diagonal(cq) && mirror < size) {
          store_row<kVector>(inverse + mirror * size, row_chunk * kChunk, size, across);
        }
      }
    }
  }
}

template <typename Config, int kVector>
__global__ __launch_bounds__(Config::kThreads,
                             Config::kMinBlocks) void invert_lanes_kernel(InvertParams params) {
  constexpr int kGroups = Config::kThreads / Config::kLanes;  // matrices of a block
  // Two buffers a matrix: step k + 1 is written while slower lanes still read step k.
  alignas(16) __shared__ float exchange[kGroups][2][Config::kSize];

  const int thread = static_cast<int>(threadIdx.x);
  const int group = thread / Config::kLanes;
  Place<Config> place{};
  place.lane = thread % Config::kLanes;
  place.lr = place.lane / Config::kLaneCols;
  place.lc = place.lane % Config::kLaneCols;
  const int64_t block = int64_t{blockIdx.x} * kGroups + group;
  const bool live = block < params.num_blocks;
  const int size = static_cast<int>(params.size);
  const int64_t start = live ? block * size * size : 0;

  Share<Config> share;
  const float damp = live ? params.damp[params.damp_each ? block : 0] : 0.0f;
  load_share<Config, kVector>(params.matrices + start, damp, live, size, place, share);

  int failed = 0;
#pragma unroll
  for (int cq = 0; cq < Config::kColChunks; ++cq) {
    // Not unrolled: which lane owns the pivot is the only difference between the turns.
#pragma unroll 1
    for (int turn = 0; turn < Config::kLaneCols; ++turn) {
      const int chunk = cq * Config::kLaneCols + turn;
      if (chunk * kChunk >= size) break;  // the identity beyond needs no step
      constexpr int kRows = Config::kLaneRows;
      const int owner = (cq * Config::kLaneCols % kRows + turn) * Config::kLaneCols + turn;
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {
        float* const w = exchange[group][e % 2];
        const float mine = share.at[Share<Config>::diagonal(cq)][cq][e][e];
        const Pivot pivot = examine(__shfl_sync(0xFFFFFFFFu, mine, owner, Config::kLanes));
        if (!pivot.good && failed == 0) failed = chunk * kChunk + e + 1;
        hand_out<Config>(cq, e, turn, place, pivot.scale, share, w);
        __syncwarp();
        subtract<Config>(w, place, share);
      }
    }
  }
  if (!live) return;
  // A pivot of the padding is 1 and does not fail, so `failed` is at most `size`.
  store_share<Config, kVector>(params.inverse + start, failed != 0, size, place, share);
  if (place.lane == 0) params.info[block] = failed;
}

}  // namespace obs_kernels::inverse
