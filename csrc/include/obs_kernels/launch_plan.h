// SPDX-License-Identifier: Apache-2.0
// What an op decided to launch, so that a test can assert which path ran.
#pragma once

#include <cstdint>

namespace obs_kernels {

struct LaunchPlan {
  const char* op;    // name of the op
  const char* path;  // name of the kernel variant; "empty" if there was nothing to do
  int64_t blocks;
  int threads;  // per block
};

// Kernels launched by this library since it was loaded. A sanitizer run that launched none of ours
// has checked nothing, and this is how the report knows.
int64_t launch_count();

}  // namespace obs_kernels
