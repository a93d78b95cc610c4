// SPDX-License-Identifier: Apache-2.0
#include "obs_kernels/choice.h"

#include <cuda_runtime.h>

#include <cstdint>

#include "common/check.h"
#include "common/device_guard.h"
#include "common/launch.h"
#include "search/check.h"
#include "search/choice.h"
#include "search/launches.h"

namespace obs_kernels {
namespace {

void check_device(int device) {
  OBS_CHECK(device >= 0, "device must be an index, got ", device);
}

}  // namespace

LaunchPlan finish_nm(const SearchParams& params, int device, cudaStream_t stream) {
  search::check_sizes(params);
  if (params.num_groups == 0) return {"finish_nm", "empty", 0, 0};
  search::check_pointers(params, device);
  const DeviceGuard guard(device);
  return search::launch_finish(params, stream);
}

LaunchPlan search_greedy(const SearchParams& params, int device, cudaStream_t stream) {
  search::check_sizes(params);
  if (params.num_groups == 0) return {"search_greedy", "empty", 0, 0};
  search::check_pointers(params, device);
  const DeviceGuard guard(device);
  return search::launch_greedy(params, stream);
}

LaunchPlan search_pairwise(const PairwiseParams& params, int device, cudaStream_t stream) {
  search::check_sizes(params);
  OBS_CHECK(params.m % 2 == 0, "m must be even, got ", params.m);
  if (params.num_groups == 0) return {"search_pairwise", "empty", 0, 0};
  OBS_CHECK(params.weight && params.inverse && params.mask,
            "weight, inverse and mask must not be null for ",
            params.num_groups,
            " groups");
  OBS_CHECK(aligned(params.weight, sizeof(float)) && aligned(params.inverse, 2 * sizeof(float)),
            "weight and inverse must be aligned to 4 and 8 bytes, got ",
            params.weight,
            " and ",
            params.inverse);
  check_device(device);
  const DeviceGuard guard(device);
  return search::launch_pairwise(params, stream);
}

LaunchPlan pair_models(const PairModelParams& params, int device, cudaStream_t stream) {
  OBS_CHECK(params.m >= 2 && params.m % 2 == 0 && params.m <= kMaxSearchSize,
            "m must be even, 2 to ",
            kMaxSearchSize,
            ", got ",
            params.m);
  search::check_num_groups(params.num_groups);
  if (params.num_groups == 0) return {"pair_models", "empty", 0, 0};
  OBS_CHECK(params.inverse && params.unit && params.model,
            "inverse, unit and model must not be null for ",
            params.num_groups,
            " groups");
  OBS_CHECK(aligned(params.inverse, 2 * sizeof(float)),
            "inverse must be aligned to 8 bytes, got ",
            params.inverse);
  check_device(device);
  const DeviceGuard guard(device);
  return search::launch_pair_models(params, stream);
}

LaunchPlan sum_panels(const PanelParams& params, int device, cudaStream_t stream) {
  const int64_t groups = params.groups.num_groups;
  OBS_CHECK(params.v >= 1 && params.v <= kMaxSearchRows,
            "v must be 1 to ",
            kMaxSearchRows,
            ", got ",
            params.v);
  if (groups == 0) return {"sum_panels", "empty", 0, 0};
  OBS_CHECK(params.wide > 0 && groups > 0 && groups % (params.v * params.wide) == 0,
            "num_groups must be a multiple of v * wide = ",
            params.v * params.wide,
            ", got ",
            groups);
  OBS_CHECK(params.groups.saliency && params.saliency,
            "the saliencies must not be null for ",
            groups,
            " groups");
  check_device(device);
  const DeviceGuard guard(device);
  return search::launch_panel_sums(params, stream);
}

}  // namespace obs_kernels
