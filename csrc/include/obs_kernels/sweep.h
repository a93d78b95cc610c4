// SPDX-License-Identifier: Apache-2.0
// The sweep of row curvature: one step settles a block of neighbouring columns of all rows, group
// by group, with one Hessian H = R R^T (R upper triangular) for all of them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "obs_kernels/errors.h"
#include "obs_kernels/launch_plan.h"

namespace obs_kernels {

inline constexpr int64_t kMaxSweepSize = 16;     // m
inline constexpr int64_t kMaxSweepWideSize = 8;  // m for n > 2
inline constexpr int64_t kMaxSweepRows = 256;    // v

// Sets have 4 bits a member, the lowest member lowest; ascending and lexicographic. Made once for
// each (n, m, num_columns).
struct SweepTables {
  const uint32_t* inner;  // [num_inner]: kept sets among the num_columns of a panel, or among m
  int64_t num_inner;
  // The rest for panels only: a row has a table of gains, those of its kept sets among m, then
  // `num_derived` more, each the largest of three kept sets. The best gain inside a column set is
  // the largest of `length` entries.
  // For n > 2 the `num_derived` more are those of all smaller sets, which follow the kept sets in
  // `sets`; there a set has a bit a member and they have any order.
  const uint32_t* sets;     // [num_sets], for n > 2 [num_sets + num_derived]: kept sets among m
  const uint16_t* derived;  // [3, num_derived]: numbers of kept sets; n <= 2 only
  const uint16_t* lists;    // [length, num_column_sets]: entries of the table
  const uint8_t* columns;   // [num_column_sets, num_columns], ascending, lexicographic
  int64_t num_sets;
  int64_t num_derived;
  int64_t length;
  int64_t num_column_sets;
};

// All pointers are device memory, row-major, contiguous and aligned to their elements; wide = cols
// / m. Group g has own = R_gg / sqrt(unit) and curvature = own own^T; unit is a power of four.
struct SweepParams {
  const float* live;       // [rows, cols]: weights before the sweep, 0 where dead
  const uint8_t* alive;    // [rows, cols], non-zero = may be kept; null = all
  const float* row_scale;  // [rows]: of the gains of a row inside the sum of its panel; null = ones
  const float* factor;     // [cols, cols]: R
  const float* own;        // [wide, m, m]
  const float* curvature;  // [wide, m, m]
  const float* unit;       // [wide]
  const float* pushed;     // [rows, cols]: (change of the columns before `first`) R
  SweepTables tables;
  uint8_t* mask;      // [rows, cols]: 1 = kept
  float* new_weight;  // [rows, cols]: kept ones solved in their group, others +0
  float* change;      // [rows, change_stride]: new - live of the columns of this step
  float* loss;        // [rows, wide]: of each group, without row_scale
  uint8_t* columns;   // [rows / v, wide, num_columns], ascending; panels only
  int64_t rows;
  int64_t cols;
  int64_t first;  // column that the step begins with, a multiple of m
  int64_t count;  // columns of the step, a multiple of m, at most sweep_width
  int64_t change_stride;
  int64_t v;  // rows of a panel; 0 = no panels
  int64_t n;
  int64_t m;
  int64_t num_columns;  // n to m; panels only
};

// Most columns of a step, a multiple of m; v as in SweepParams.
int64_t sweep_width(int64_t v, int64_t n, int64_t m);

// Writes mask, new_weight, loss and columns of the step's columns, and change; reads what the steps
// before have pushed. Ties go to the lower index. Runs on `stream` of `device`, without waiting.
// Throws ArgumentError for sizes out of range, CudaError if the launch fails.
LaunchPlan sweep_columns(const SweepParams& params, int device, cudaStream_t stream);

}  // namespace obs_kernels
