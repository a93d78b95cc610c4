// SPDX-License-Identifier: Apache-2.0
// Gauss-Jordan elimination of a symmetric positive definite system A x = r, a row a thread.
//
// Step j subtracts from every other row its multiple of row j that clears column j; rows above j
// are cleared too, so nothing is left to substitute, and threads that Cholesky would leave idle do
// the work of that second pass. The pivots are the squares of Cholesky's, so positive definiteness
// can be tested at the end. Row j right of the diagonal equals column j below it, and the threads
// of those rows hold that column: each puts its entry into shared memory, and all read the row from
// there. After a step every row moves one place to the left, which costs nothing and makes all
// steps the same code: column j is always at place 0.
#pragma once

#include "update/columns.cuh"

namespace obs_kernels::update {

template <int kSize>
struct Exchange {
  // The pivot row. Two buffers: step j + 1 is written while slower threads still read step j.
  alignas(16) float row[2][kSize];
  // r, and the pivots: a register less for each where there is none to spare.
  float right[kSize];
  float pivot[kSize];
};

// `row` holds the columns not yet eliminated.
template <int kLength, typename Config, typename Sync>
__device__ __forceinline__ void eliminate_column(int j,
                                                 int lane,
                                                 int kept,
                                                 bool busy,
                                                 Exchange<Config::kSize>& exchange,
                                                 float (&row)[Config::kSize],
                                                 Sync sync) {
  float* const shared = exchange.row[j % 2];
  if (lane >= j && lane < kept) shared[lane - j] = row[0];
  sync();
  if (!busy || j >= kept) return;
  Four four = *reinterpret_cast<const Four*>(shared);
  const float pivot = four.at[0];
  float factor = 0.0f;
  if (lane == j) {
    exchange.pivot[j] = pivot;
  } else {
    factor = row[0] / pivot;
    exchange.right[lane] = fmaf(-factor, exchange.right[j], exchange.right[lane]);
  }
#pragma unroll
  for (int column = 1; column < kLength; ++column) {
    if (column % 4 == 0) four = *reinterpret_cast<const Four*>(shared + column);
    row[column - 1] = fmaf(-factor, four.at[column % 4], row[column]);
  }
}

// Steps j to `most` - 1, with rows of kLength as long as more than kLength - kPhase are left.
// Columns at and beyond `kept` hold anything: they never become pivots.
template <int kLength, typename Config, typename Sync>
__device__ __forceinline__ void eliminate(int j,
                                          int most,
                                          int lane,
                                          int kept,
                                          bool busy,
                                          Exchange<Config::kSize>& exchange,
                                          float (&row)[Config::kSize],
                                          Sync sync) {
#pragma unroll 1
  for (; most - j > kLength - Config::kPhase; ++j) {
    eliminate_column<kLength, Config>(j, lane, kept, busy, exchange, row, sync);
  }
  if constexpr (kLength > Config::kPhase) {
    eliminate<kLength - Config::kPhase, Config>(j, most, lane, kept, busy, exchange, row, sync);
  }
}

}  // namespace obs_kernels::update
