// SPDX-License-Identifier: Apache-2.0
// The search of the compiled module as a library of the CPU (cuda_on_cpu.h), for the Python side:
// addresses as _C gets them, but of host memory.
#include "obs_kernels/search.h"

extern "C" const char* search_nm_on_cpu(const obs_kernels::SearchParams* params) {
  return obs_kernels::search_nm(*params, 0, nullptr).path;
}

extern "C" const char* search_vnm_on_cpu(const obs_kernels::PanelParams* params) {
  return obs_kernels::search_vnm(*params, 0, nullptr).path;
}
