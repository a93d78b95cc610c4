// SPDX-License-Identifier: Apache-2.0
// The search of the compiled module as a library of the CPU (cuda_on_cpu.h), for the Python side:
// addresses as _C gets them, but of host memory.
#include "obs_kernels/search.h"

#include "obs_kernels/choice.h"

extern "C" const char* search_nm_on_cpu(const obs_kernels::SearchParams* params) {
  return obs_kernels::search_nm(*params, 0, nullptr).path;
}

extern "C" const char* search_vnm_on_cpu(const obs_kernels::PanelParams* params) {
  return obs_kernels::search_vnm(*params, 0, nullptr).path;
}

extern "C" const char* finish_nm_on_cpu(const obs_kernels::SearchParams* params) {
  return obs_kernels::finish_nm(*params, 0, nullptr).path;
}

extern "C" const char* search_greedy_on_cpu(const obs_kernels::SearchParams* params) {
  return obs_kernels::search_greedy(*params, 0, nullptr).path;
}

extern "C" const char* search_pairwise_on_cpu(const obs_kernels::PairwiseParams* params) {
  return obs_kernels::search_pairwise(*params, 0, nullptr).path;
}

extern "C" const char* pair_models_on_cpu(const obs_kernels::PairModelParams* params) {
  return obs_kernels::pair_models(*params, 0, nullptr).path;
}

extern "C" const char* sum_panels_on_cpu(const obs_kernels::PanelParams* params) {
  return obs_kernels::sum_panels(*params, 0, nullptr).path;
}
