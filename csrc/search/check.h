// SPDX-License-Identifier: Apache-2.0
// What the functions of this topic demand of sizes and addresses.
#pragma once

#include <cstdint>
#include <limits>

#include "common/check.h"
#include "common/launch.h"
#include "obs_kernels/search.h"

namespace obs_kernels::search {

// A block of threads for a group at least: gridDim.x is the limit.
inline void check_num_groups(int64_t num_groups) {
  OBS_CHECK(num_groups >= 0 && num_groups <= std::numeric_limits<int32_t>::max(),
            "num_groups must be 0 to 2^31 - 1, got ",
            num_groups);
}

template <typename Params>
void check_sizes(const Params& params) {
  OBS_CHECK(params.n >= 1 && params.n < params.m && params.m <= kMaxSearchSize,
            "n and m must be 0 < n < m <= ",
            kMaxSearchSize,
            ", got n = ",
            params.n,
            ", m = ",
            params.m);
  check_num_groups(params.num_groups);
}

inline void check_pointers(const SearchParams& params, int device) {
  OBS_CHECK(params.weight && params.fisher && params.damp && params.mask && params.saliency &&
                params.info,
            "weight, fisher, damp, mask, saliency and info must not be null for ",
            params.num_groups,
            " groups");
  OBS_CHECK(aligned(params.weight, sizeof(float)) && aligned(params.fisher, sizeof(float)) &&
                aligned(params.new_weight, sizeof(float)),
            "weight, fisher and new_weight must be aligned to their elements, got ",
            params.weight,
            ", ",
            params.fisher,
            " and ",
            static_cast<const void*>(params.new_weight));
  OBS_CHECK(device >= 0, "device must be an index, got ", device);
}

}  // namespace obs_kernels::search
