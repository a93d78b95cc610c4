// SPDX-License-Identifier: Apache-2.0
// Matrices from 9 to 128: each in the registers of a group of threads.
#pragma once

#include <cstdint>

#include "common/device.cuh"
#include "fisher/inverse_config.h"
#include "fisher/inverse_step.cuh"
#include "obs_kernels/inverse.h"

namespace obs_kernels::inverse {

// The part of B = -A that a thread holds: entry (i, j) is row lr + i * kLaneRows and column
// lc + j * kLaneCols. What lies above the diagonal for every thread is never touched.
template <typename Config>
struct Share {
  float at[Config::kRows][Config::kCols];

  __device__ static constexpr bool stored(int i, int j) {
    return j * Config::kLaneCols < (i + 1) * Config::kLaneRows;
  }
  // Whether the mirror image of an entry is stored, too: rows and columns of the same band do.
  __device__ static constexpr bool mirrored(int i, int j) {
    return j * Config::kLaneCols / Config::kLaneRows == i;
  }
};

// Rows and columns that every size of the path has need no test.
template <typename Config>
__device__ constexpr bool always_inside(int i, int j) {
  return (i + 1) * Config::kLaneRows <= Config::kLeast &&
         (j + 1) * Config::kLaneCols <= Config::kLeast;
}

template <typename Config>
struct Place {
  int lane;  // inside the group
  int lr;
  int lc;
  __device__ __forceinline__ int row(int i) const { return lr + i * Config::kLaneRows; }
  __device__ __forceinline__ int col(int j) const { return lc + j * Config::kLaneCols; }
};

template <typename Config>
struct Exchange {
  float panel[Config::kAllRows * kChunk];                        // [row][pivot]
  float of_rows[kChunk][Config::kLaneRows * Config::kRowPitch];  // W, by lane rows
  float of_cols[kChunk][Config::kLaneCols * Config::kColPitch];  // W, by lane columns
};

// Shared memory of a matrix: the matrix itself on its way in and out if it is staged, and the
// exchange in between.
template <typename Config>
union Workspace {
  float matrix[Config::kStaged ? Config::kStagedSize : 1];
  Exchange<Config> exchange;
};

template <typename Config>
__device__ __forceinline__ void wait_for_group() {
  if constexpr (Config::kLanes <= 32) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// Floats from one row of a staged matrix to the next. Matrices of the full size lie in padded rows,
// others as in global memory, where a row need not be whole pieces of 16 bytes.
template <typename Config>
__device__ __forceinline__ int stride_of(int size) {
  return Config::kLeast == Config::kSize ? Config::kStride : size;
}

// Calls move(place in shared memory, place in global memory) for the pieces of kVector entries of a
// matrix: neighbouring threads, neighbouring pieces.
template <typename Config, int kVector, typename Move>
__device__ __forceinline__ void for_each_piece(int size, int lane, const Move& move) {
  constexpr int kSize = Config::kSize;
  if constexpr (Config::kLeast == kSize) {
    static_assert(kSize % kVector == 0, "whole pieces");
#pragma unroll 4
    for (int entry = lane * kVector; entry < kSize * kSize; entry += Config::kLanes * kVector) {
      move(entry / kSize * Config::kStride + entry % kSize, entry);
    }
  } else {
#pragma unroll 4
    for (int entry = lane * kVector; entry < size * size; entry += Config::kLanes * kVector) {
      move(entry, entry);
    }
  }
}

template <typename Config, int kVector>
__device__ __forceinline__ void stage(const float* matrix, int size, int lane, float* staged) {
  for_each_piece<Config, kVector>(size, lane, [&](int to, int from) {
    async_copy<static_cast<int>(sizeof(float)) * kVector>(staged + to, matrix + from);
  });
}

template <typename Config, int kVector>
__device__ __forceinline__ void copy_out(const float* staged, int size, int lane, float* inverse) {
  for_each_piece<Config, kVector>(size, lane, [&](int from, int to) {
    *reinterpret_cast<Piece<float, kVector>*>(inverse + to) =
        *reinterpret_cast<const Piece<float, kVector>*>(staged + from);
  });
}

// The damped matrix, negated; beyond `size` minus the identity. What lies above the diagonal is
// never used. Rows are `stride` apart.
template <typename Config>
__device__ __forceinline__ void load_share(const float* matrix,
                                           int stride,
                                           float damp,
                                           int size,
                                           const Place<Config>& place,
                                           Share<Config>& share) {
#pragma unroll
  for (int i = 0; i < Config::kRows; ++i) {
    const int row = place.row(i);
#pragma unroll
    for (int j = 0; j < Config::kCols; ++j) {
      if (!Share<Config>::stored(i, j)) continue;
      const int col = place.col(j);
      const bool inside = always_inside<Config>(i, j) || (row < size && col < size);
      float entry = inside ? -matrix[row * stride + col] : 0.0f;
      if (Share<Config>::mirrored(i, j) && row == col) entry = inside ? entry - damp : -1.0f;
      share.at[i][j] = entry;
    }
  }
}

// Where the four pivots from `first` on lie. As registers are not indexed, what is not a constant
// is which lanes hold them: `kCase` counts the runs of pivots that lie in the same columns of a
// share.
template <typename Config, int kCase>
struct PivotPlace {
  static constexpr int kRun = Config::kLaneCols > kChunk ? Config::kLaneCols : kChunk;
  static constexpr int kJ = kCase * kRun / Config::kLaneCols;  // the first of kJs columns
  static constexpr int kJs = Config::kLaneCols < kChunk ? kChunk / Config::kLaneCols : 1;
  static constexpr int kI = kCase * kRun / Config::kLaneRows;
  static constexpr int kIs = Config::kLaneRows < kChunk ? kChunk / Config::kLaneRows : 1;
  // Rows from here on are stored in the columns of the pivots; those above, only in their rows.
  static constexpr int kStoredFrom = kI * Config::kLaneRows;
};

// The threads that hold columns of the pivots, or their rows, write them to the panel and clear
// them.
template <typename Config, int kCase>
__device__ __forceinline__ void hand_out(int first,
                                         const Place<Config>& place,
                                         Share<Config>& share,
                                         float* panel) {
  using Pivots = PivotPlace<Config, kCase>;
#pragma unroll
  for (int jj = 0; jj < Pivots::kJs; ++jj) {
    constexpr int kBase = Pivots::kJ;
    const int pivot = place.col(kBase + jj) - first;
    if (pivot < 0 || pivot >= kChunk) continue;
#pragma unroll
    for (int i = 0; i < Config::kRows; ++i) {
      if (!Share<Config>::stored(i, kBase + jj)) continue;
      panel[place.row(i) * kChunk + pivot] = share.at[i][kBase + jj];
      share.at[i][kBase + jj] = 0.0f;
    }
  }
#pragma unroll
  for (int ii = 0; ii < Pivots::kIs; ++ii) {
    constexpr int kBase = Pivots::kI;
    const int pivot = place.row(kBase + ii) - first;
    if (pivot < 0 || pivot >= kChunk) continue;
#pragma unroll
    for (int j = 0; j < Config::kCols; ++j) {
      if (!Share<Config>::stored(kBase + ii, j)) continue;
      if (j * Config::kLaneCols < Pivots::kStoredFrom) {
        panel[place.col(j) * kChunk + pivot] = share.at[kBase + ii][j];
      }
      share.at[kBase + ii][j] = 0.0f;
    }
  }
}

template <typename Config, int kCase = 0>
__device__ __forceinline__ void hand_out_from(int first,
                                              const Place<Config>& place,
                                              Share<Config>& share,
                                              float* panel) {
  using Pivots = PivotPlace<Config, kCase>;
  if constexpr (kCase * Pivots::kRun < Config::kSize) {
    if (first < (kCase + 1) * Pivots::kRun) {
      hand_out<Config, kCase>(first, place, share, panel);
    } else {
      hand_out_from<Config, kCase + 1>(first, place, share, panel);
    }
  }
}

template <typename Config>
__device__ __forceinline__ void make_w(const PivotBlock& pivots,
                                       int first,
                                       const Place<Config>& place,
                                       Exchange<Config>& shared) {
  constexpr int kEach = (Config::kAllRows + Config::kLanes - 1) / Config::kLanes;
#pragma unroll
  for (int each = 0; each < kEach; ++each) {
    const int row = place.lane + each * Config::kLanes;
    if (Config::kAllRows % Config::kLanes != 0 && row >= Config::kAllRows) continue;
    float w[kChunk];
    substitute(pivots, shared.panel, row, first, w);
    const int by_rows = row % Config::kLaneRows * Config::kRowPitch + row / Config::kLaneRows;
    const int by_cols = row % Config::kLaneCols * Config::kColPitch + row / Config::kLaneCols;
#pragma unroll
    for (int pivot = 0; pivot < kChunk; ++pivot) {
      shared.of_rows[pivot][by_rows] = w[pivot];
      shared.of_cols[pivot][by_cols] = w[pivot];
    }
  }
}

// kCount neighbours of shared memory, 16 bytes at once.
template <int kCount>
__device__ __forceinline__ void load_pieces(const float* shared, float (&values)[kCount]) {
#pragma unroll
  for (int first = 0; first < kCount; first += kChunk) {
    float piece[kChunk];
    load_four(shared + first, piece);
#pragma unroll
    for (int at = 0; at < kChunk && first + at < kCount; ++at) values[first + at] = piece[at];
  }
}

template <typename Config>
__device__ __forceinline__ void add_product(const Exchange<Config>& shared,
                                            const Place<Config>& place,
                                            Share<Config>& share) {
#pragma unroll
  for (int pivot = 0; pivot < kChunk; ++pivot) {
    float of_rows[Config::kRows];
    float of_cols[Config::kCols];
    load_pieces(shared.of_rows[pivot] + place.lr * Config::kRowPitch, of_rows);
    load_pieces(shared.of_cols[pivot] + place.lc * Config::kColPitch, of_cols);
#pragma unroll
    for (int i = 0; i < Config::kRows; ++i) {
#pragma unroll
      for (int j = 0; j < Config::kCols; ++j) {
        if (!Share<Config>::stored(i, j)) continue;
        share.at[i][j] = fmaf(of_rows[i], of_cols[j], share.at[i][j]);
      }
    }
  }
}

// All steps; returns 0 or the first pivot that failed, 1-based.
template <typename Config>
__device__ __forceinline__ int eliminate(int size,
                                         const Place<Config>& place,
                                         Share<Config>& share,
                                         Exchange<Config>& shared) {
  int failed = 0;
  // The identity beyond `size` needs no step.
#pragma unroll 1
  for (int first = 0; first < size; first += kChunk) {
    hand_out_from<Config>(first, place, share, shared.panel);
    wait_for_group<Config>();
    const PivotBlock pivots = factor(shared.panel, first);
    // A pivot of the padding is 1 and does not fail, so this is at most `size`.
    if (failed == 0 && pivots.failed != 0) failed = first + pivots.failed;
    make_w<Config>(pivots, first, place, shared);
    wait_for_group<Config>();
    add_product<Config>(shared, place, share);
  }
  return failed;
}

// The inverse with both its triangles, or zeros if `bad`.
template <typename Config>
__device__ __forceinline__ void store_share(float* inverse,
                                            int stride,
                                            bool bad,
                                            int size,
                                            const Place<Config>& place,
                                            const Share<Config>& share) {
#pragma unroll
  for (int i = 0; i < Config::kRows; ++i) {
    const int row = place.row(i);
#pragma unroll
    for (int j = 0; j < Config::kCols; ++j) {
      if (!Share<Config>::stored(i, j)) continue;
      const int col = place.col(j);
      if (!always_inside<Config>(i, j) && (row >= size || col >= size)) continue;
      const float entry = bad ? 0.0f : share.at[i][j];
      inverse[row * stride + col] = entry;
      if (!Share<Config>::mirrored(i, j)) inverse[col * stride + row] = entry;
    }
  }
}

template <typename Config, int kVector>
__global__ __launch_bounds__(Config::kThreads,
                             Config::kMinBlocks) void invert_group_kernel(InvertParams params) {
  constexpr int kGroups = Config::kThreads / Config::kLanes;  // matrices of a block
  alignas(16) __shared__ Workspace<Config> workspaces[kGroups];

  const int thread = static_cast<int>(threadIdx.x);
  Workspace<Config>& shared = workspaces[thread / Config::kLanes];
  Place<Config> place{};
  place.lane = thread % Config::kLanes;
  place.lr = place.lane / Config::kLaneCols;
  place.lc = place.lane % Config::kLaneCols;
  const int size = Config::kLeast == Config::kSize ? Config::kSize : static_cast<int>(params.size);
  const int64_t block = int64_t{blockIdx.x} * kGroups + thread / Config::kLanes;
  const bool live = block < params.num_blocks;  // the lanes of a warp stay together
  const float* const matrix = params.matrices + block * size * size;
  float* const inverse = params.inverse + block * size * size;
  const float damp = live ? params.damp[params.damp_each ? block : 0] : 0.0f;

  Share<Config> share;
  if constexpr (Config::kStaged) {
    if (live) stage<Config, kVector>(matrix, size, place.lane, shared.matrix);
    async_commit();
    async_wait<0>();
    wait_for_group<Config>();
    load_share<Config>(shared.matrix, stride_of<Config>(size), damp, size, place, share);
  } else {
    load_share<Config>(matrix, size, damp, size, place, share);
  }
  wait_for_group<Config>();  // before the exchange overwrites what was staged
  const int failed = eliminate<Config>(size, place, share, shared.exchange);
  if (live && place.lane == 0) params.info[block] = failed;
  if constexpr (Config::kStaged) {
    wait_for_group<Config>();
    store_share<Config>(shared.matrix, stride_of<Config>(size), failed != 0, size, place, share);
    wait_for_group<Config>();
    if (live) copy_out<Config, kVector>(shared.matrix, size, place.lane, inverse);
  } else {
    store_share<Config>(inverse, size, failed != 0, size, place, share);
  }
}

}  // namespace obs_kernels::inverse
