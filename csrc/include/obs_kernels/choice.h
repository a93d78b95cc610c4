// SPDX-License-Identifier: Apache-2.0
// Choices that do not look at every set (pairwise, greedy), and what any given choice costs.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "obs_kernels/launch_plan.h"
#include "obs_kernels/search.h"

namespace obs_kernels {

// What a given choice costs: mask holds the kept entries on entry (dead ones among them do not
// count), and saliency, new_weight, info and mask leave as from search_nm. n is not looked at, and
// any number may be kept. m <= kMaxSearchSize.
LaunchPlan finish_nm(const SearchParams& params, int device, cudaStream_t stream);

// n live entries of each group (all where there are fewer), kept ones added from none and dropped
// from all, both improved by exchanges of one for one while an exchange wins, and the better taken.
// Arguments, results and errors as of search_nm; any n, m <= kMaxSearchSize.
LaunchPlan search_greedy(const SearchParams& params, int device, cudaStream_t stream);

// Groups as the pair model sees them: of F^-1 only the 2 x 2 blocks A_j of adjacent entries.
struct PairwiseParams {
  const float* weight;   // [num_groups, m]
  const float* inverse;  // [num_groups, m, m], (F^-1)_GG times any number a group, dead entries
                         // decoupled; aligned to 8 bytes
  const uint8_t* alive;  // [num_groups, m], non-zero = may be kept; null = all
  uint8_t* mask;         // [num_groups, m]: 1 = kept
  int64_t num_groups;
  int64_t n;
  int64_t m;  // even
};

// The exact minimum of the pair model over all sets of n live entries (all where there are fewer).
// Of equal ones that which prunes fewer in the earlier pairs, and in a pair the higher index.
// Of a group whose numbers are not finite at most n are kept. m <= kMaxSearchSize.
LaunchPlan search_pairwise(const PairwiseParams& params, int device, cudaStream_t stream);

struct PairModelParams {
  const float* inverse;  // [num_groups, m, m] as above, times unit
  const float* unit;     // [num_groups]
  float* model;          // [num_groups, m, m]: A_j^-1 on the diagonal, zeros elsewhere
  int64_t num_groups;
  int64_t m;  // even
};

// The pair model as a curvature that the searches take.
LaunchPlan pair_models(const PairModelParams& params, int device, cudaStream_t stream);

// The saliency of panels from that of their rows, in ascending order. Of `params` only saliency, v,
// wide, groups.saliency and groups.num_groups are looked at.
LaunchPlan sum_panels(const PanelParams& params, int device, cudaStream_t stream);

}  // namespace obs_kernels
