// SPDX-License-Identifier: Apache-2.0
// Functions of groups with a Fisher block of their own: one list of arguments for all of them.
#pragma once

#include <cstdint>

#include "bind.h"
#include "obs_kernels/search.h"

namespace obs_kernels::bindings {

inline obs_kernels::SearchParams search_params(uintptr_t weight,
                                               uintptr_t fisher,
                                               uintptr_t damp,
                                               bool damp_each,
                                               uintptr_t alive,
                                               uintptr_t mask,
                                               uintptr_t saliency,
                                               uintptr_t new_weight,
                                               uintptr_t info,
                                               int64_t num_groups,
                                               int64_t n,
                                               int64_t m) {
  obs_kernels::SearchParams params{};
  params.weight = pointer<const float>(weight);
  params.fisher = pointer<const float>(fisher);
  params.damp = pointer<const float>(damp);
  params.damp_each = damp_each;
  params.alive = pointer<const uint8_t>(alive);
  params.mask = pointer<uint8_t>(mask);
  params.saliency = pointer<float>(saliency);
  params.new_weight = pointer<float>(new_weight);
  params.info = pointer<int32_t>(info);
  params.num_groups = num_groups;
  params.n = n;
  params.m = m;
  return params;
}

using GroupsFunction = LaunchPlan (*)(const SearchParams&, int, cudaStream_t);

template <GroupsFunction kFunction>
py::tuple call_groups(uintptr_t weight,
                      uintptr_t fisher,
                      uintptr_t damp,
                      bool damp_each,
                      uintptr_t alive,
                      uintptr_t mask,
                      uintptr_t saliency,
                      uintptr_t new_weight,
                      uintptr_t info,
                      int64_t num_groups,
                      int64_t n,
                      int64_t m,
                      int device,
                      uintptr_t stream) {
  const obs_kernels::SearchParams params = search_params(
      weight, fisher, damp, damp_each, alive, mask, saliency, new_weight, info, num_groups, n, m);
  return launch(kFunction, params, device, stream);
}

// Defines a function of groups, whose own arguments `more` stand before device and stream.
template <typename Function, typename... More>
void def_of_groups(py::module_& module,
                   const char* name,
                   Function function,
                   const char* doc,
                   const More&... more) {
  module.def(name,
             function,
             doc,
             py::kw_only(),
             py::arg("weight"),
             py::arg("fisher"),
             py::arg("damp"),
             py::arg("damp_each"),
             py::arg("alive"),
             py::arg("mask"),
             py::arg("saliency"),
             py::arg("new_weight"),
             py::arg("info"),
             py::arg("num_groups"),
             py::arg("n"),
             py::arg("m"),
             more...,
             py::arg("device"),
             py::arg("stream"));
}

template <GroupsFunction kFunction>
void def_groups(py::module_& module, const char* name) {
  def_of_groups(
      module,
      name,
      &call_groups<kFunction>,
      "(op, path, blocks, threads) of the launch; see obs_kernels/search.h and choice.h.");
}

}  // namespace obs_kernels::bindings
