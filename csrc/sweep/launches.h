// SPDX-License-Identifier: Apache-2.0
// The kernels of this topic, a file each.
#pragma once

#include <cuda_runtime_api.h>

#include "obs_kernels/sweep.h"

namespace obs_kernels::sweep {

LaunchPlan launch_rows(const SweepParams& params, cudaStream_t stream);
LaunchPlan launch_panels(const SweepParams& params, cudaStream_t stream);      // n <= 2
LaunchPlan launch_panel_sets(const SweepParams& params, cudaStream_t stream);  // n > 2

}  // namespace obs_kernels::sweep
