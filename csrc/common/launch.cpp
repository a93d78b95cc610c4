// SPDX-License-Identifier: Apache-2.0
#include "common/launch.h"

#include <atomic>

namespace obs_kernels {
namespace {

std::atomic<int64_t> launches{0};

}  // namespace

void count_launch() {
  launches.fetch_add(1, std::memory_order_relaxed);
}

int64_t launch_count() {
  return launches.load(std::memory_order_relaxed);
}

}  // namespace obs_kernels
