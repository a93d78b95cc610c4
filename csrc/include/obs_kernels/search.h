// SPDX-License-Identifier: Apache-2.0
// Mask search: which n of m neighbours to keep, and what the kept ones become.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "obs_kernels/errors.h"
#include "obs_kernels/launch_plan.h"

namespace obs_kernels {

// What info tells of a group, beside 0 and the failing pivot (1-based) of its Fisher block.
inline constexpr int32_t kWeightNotFinite = -1;
inline constexpr int32_t kFisherNotFinite = -2;
inline constexpr int32_t kDampNotValid = -3;  // negative or not finite

inline constexpr int64_t kMaxSearchSize = 32;     // m
inline constexpr int64_t kMaxSetsSize = 16;       // m for n > 2 and any number of kept sets
inline constexpr int64_t kMaxKeptSets = 20000;    // of n of m for n > 2 and m above that
inline constexpr int64_t kMaxSearchRows = 65536;  // v

// All pointers are device memory, contiguous, and aligned to their element at least; wider
// alignment is used where it is met. A group is m neighbours with a Fisher block of their own.
struct SearchParams {
  const float* weight;   // [num_groups, m]
  const float* fisher;   // [num_groups, m, m], symmetric
  const float* damp;     // added to the diagonal: [num_groups], or one value
  bool damp_each;        // whether damp has a value a group
  const uint8_t* alive;  // [num_groups, m], non-zero = may be kept; null = all
  uint8_t* mask;         // [num_groups, m]: 1 = kept
  float* saliency;       // [num_groups]: loss increase of the choice
  float* new_weight;  // [num_groups, m]: kept ones re-solved, others +0; null = not wanted; may be
                      // weight itself
  int32_t* info;      // [num_groups]: 0, a failing pivot, or a code above; such a group keeps
                      // nothing in mask, its saliency is NaN and its weight stays
  int64_t num_groups;
  int64_t n;
  int64_t m;
};

// Least loss of each group over all sets of n live entries (all of them where there are fewer).
// Ties go to the lower index. n > 2 and m > kMaxSetsSize: at most kMaxKeptSets sets of n of m.
// Throws ArgumentError for sizes out of range, CudaError if the launch fails.
LaunchPlan search_nm(const SearchParams& params, int device, cudaStream_t stream);

// Tables of the column sets of a panel, made once for each (n, m, num_columns). A row of a panel
// has a table of gains: those of its kept sets, then `num_derived` more, each the largest of three
// kept sets. The best gain inside a column set is the largest of `length` entries.
// Kept sets are in lexicographic order for n <= 2. For n > 2 in the order in which the lanes of a
// warp find them: by the number of their entries among the first h (4 for m <= 8, else 8), then by
// the others, lexicographically, then by those among the first, as bits (bit i = entry i).
struct ColumnTables {
  const uint16_t* derived;  // [3, num_derived]: numbers of kept sets
  const uint16_t* lists;    // [length, num_sets]: entries of the table
  const uint8_t* columns;   // [num_sets, num_columns], ascending, lexicographic
  int64_t num_derived;
  int64_t length;
  int64_t num_sets;
};

struct PanelParams {
  SearchParams groups;    // of a weight [rows, wide * m] row by row; its saliency is scratch memory
  ColumnTables tables;    // of n, m and num_columns
  uint8_t* columns;       // [rows / v, wide, num_columns], ascending
  float* saliency;        // [rows / v, wide]: summed over the rows of the panel, in order
  uint32_t* column_bits;  // [rows / v, wide]: scratch
  float* gains;           // scratch of gains_bytes, 16-byte aligned
  int64_t gains_bytes;    // at least panel_gains_bytes
  int64_t v;              // rows of a panel
  int64_t wide;           // groups of a row
  int64_t num_columns;    // n to m
};

// Scratch for the gains of one row of panels; a multiple of it takes fewer launches.
int64_t panel_gains_bytes(int64_t v, int64_t wide, int64_t n, int64_t m);

// The column set of each panel with the least total loss, and then each row's best set inside it.
// n > 2: m <= kMaxSetsSize.
LaunchPlan search_vnm(const PanelParams& params, int device, cudaStream_t stream);

}  // namespace obs_kernels
