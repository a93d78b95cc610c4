// SPDX-License-Identifier: Apache-2.0
// Kernels of the search, by the file that holds them; each compiles apart from the others.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "obs_kernels/search.h"

namespace obs_kernels::search {

enum class Mode {
  kChoose,  // mask, saliency, weights
  kGains,   // the table of gains of every group
};

// Groups first .. first + count of a problem.
struct Task {
  SearchParams groups;
  int64_t first;
  int64_t count;
  const uint32_t* column_bits;  // of panels; null = all columns
  int64_t v;
  int64_t wide;
  float* gains;  // [count, stride]
  int64_t stride;
};

// Kept sets of n of m.
inline int64_t count_sets(int64_t n, int64_t m) {
  int64_t count = 1;
  for (int64_t i = 1; i <= n; ++i) count = count * (m - n + i) / i;
  return count;
}

// Alignment to 16 bytes of all that the task points at is found out inside.
LaunchPlan launch_pairs(const Task& task, Mode mode, cudaStream_t stream);  // n <= 2, m <= 16
LaunchPlan launch_wide(const Task& task, Mode mode, cudaStream_t stream);   // n <= 2, m <= 32
LaunchPlan launch_sets(const Task& task, Mode mode, cudaStream_t stream);   // n > 2, m <= 16
// n > 2, m of 17 to 32, at most kMaxKeptSets.
LaunchPlan launch_wide_sets(const Task& task, cudaStream_t stream);

// Columns of `panels` panels from `first_panel` on, from the gains of their groups.
LaunchPlan launch_columns(const PanelParams& params,
                          int64_t first_panel,
                          int64_t panels,
                          int64_t stride,
                          cudaStream_t stream);
LaunchPlan launch_panel_sums(const PanelParams& params, cudaStream_t stream);

}  // namespace obs_kernels::search
