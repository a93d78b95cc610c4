// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include "common/check.h"

namespace obs_kernels {

// Makes a device current for a scope, and the one before it current again at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    OBS_CUDA_CHECK(cudaGetDevice(&previous_));
    if (device == previous_) return;
    OBS_CUDA_CHECK(cudaSetDevice(device));
    changed_ = true;
  }
  ~DeviceGuard() {
    // A destructor must not throw; a device that was current a moment ago can be so again.
    if (changed_) (void)cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

}  // namespace obs_kernels
