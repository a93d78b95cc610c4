// SPDX-License-Identifier: Apache-2.0
// What all launchers of this topic demand of sizes and addresses, and which kernel a size takes.
#pragma once

#include <cstdint>
#include <limits>

#include "common/check.h"
#include "common/launch.h"
#include "obs_kernels/update.h"
#include "update/update_config.h"

namespace obs_kernels::update {

inline void check_alignment(WeightType type,
                            const void* weight,
                            const void* updated,
                            const float* fisher) {
  const uintptr_t bytes = type == WeightType::kFloat32 ? 4 : 2;
  OBS_CHECK(aligned(weight, bytes) && aligned(updated, bytes) && aligned(fisher, sizeof(float)),
            "weight, updated and fisher must be aligned to their elements, got ",
            weight,
            ", ",
            updated,
            " and ",
            fisher);
}

template <typename Params>
void check_sizes(const Params& params, int device) {
  OBS_CHECK(params.size >= 1 && params.size <= kMaxUpdateSize,
            "size must be 1 to ",
            kMaxUpdateSize,
            ", got ",
            params.size);
  // A block of threads for at least one Fisher block: gridDim.x is the limit.
  OBS_CHECK(params.num_blocks >= 0 && params.num_blocks <= std::numeric_limits<int32_t>::max(),
            "num_blocks must be 0 to 2^31 - 1, got ",
            params.num_blocks);
  OBS_CHECK(params.num_weights >= 0 && params.num_weights <= params.num_blocks * params.size &&
                params.num_weights > (params.num_blocks - 1) * params.size,
            "num_blocks must be num_weights over size, rounded up, got ",
            params.num_blocks,
            " for ",
            params.num_weights,
            " weights and size ",
            params.size);
  OBS_CHECK(params.type == WeightType::kFloat32 || params.type == WeightType::kFloat16 ||
                params.type == WeightType::kBFloat16,
            "type must be 0 to 2, got ",
            static_cast<int>(params.type));
  OBS_CHECK(device >= 0, "device must be an index, got ", device);
}

// Calls launch(config, path) with the config of the narrowest kernel that takes `size`.
template <typename Launch>
LaunchPlan for_size(int64_t size, const Launch& launch) {
  if (size <= Update4::kSize) return launch(Update4{}, "columns4");
  if (size <= Update8::kSize) return launch(Update8{}, "columns8");
  if (size <= Update16::kSize) return launch(Update16{}, "columns16");
  if (size <= Update32::kSize) return launch(Update32{}, "columns32");
  if (size <= Update64::kSize) return launch(Update64{}, "columns64");
  return launch(Update128{}, "columns128");
}

}  // namespace obs_kernels::update
