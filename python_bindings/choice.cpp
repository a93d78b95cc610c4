// SPDX-License-Identifier: Apache-2.0
#include "obs_kernels/choice.h"

#include <cstdint>

#include "bind.h"
#include "groups.h"

namespace obs_kernels::bindings {
namespace {

py::tuple search_pairwise(uintptr_t weight,
                          uintptr_t inverse,
                          uintptr_t alive,
                          uintptr_t mask,
                          int64_t num_groups,
                          int64_t n,
                          int64_t m,
                          int device,
                          uintptr_t stream) {
  obs_kernels::PairwiseParams params{};
  params.weight = pointer<const float>(weight);
  params.inverse = pointer<const float>(inverse);
  params.alive = pointer<const uint8_t>(alive);
  params.mask = pointer<uint8_t>(mask);
  params.num_groups = num_groups;
  params.n = n;
  params.m = m;
  return launch(obs_kernels::search_pairwise, params, device, stream);
}

py::tuple pair_models(uintptr_t inverse,
                      uintptr_t unit,
                      uintptr_t model,
                      int64_t num_groups,
                      int64_t m,
                      int device,
                      uintptr_t stream) {
  obs_kernels::PairModelParams params{};
  params.inverse = pointer<const float>(inverse);
  params.unit = pointer<const float>(unit);
  params.model = pointer<float>(model);
  params.num_groups = num_groups;
  params.m = m;
  return launch(obs_kernels::pair_models, params, device, stream);
}

py::tuple sum_panels(uintptr_t each,
                     uintptr_t sums,
                     int64_t num_groups,
                     int64_t v,
                     int64_t wide,
                     int device,
                     uintptr_t stream) {
  obs_kernels::PanelParams params{};
  params.groups.saliency = pointer<float>(each);
  params.groups.num_groups = num_groups;
  params.saliency = pointer<float>(sums);
  params.v = v;
  params.wide = wide;
  return launch(obs_kernels::sum_panels, params, device, stream);
}

}  // namespace

void bind_choice(py::module_& module) {
  def_groups<obs_kernels::finish_nm>(module, "finish_nm");
  def_groups<obs_kernels::search_greedy>(module, "search_greedy");
  const char* const doc = "(op, path, blocks, threads) of the launch; see obs_kernels/choice.h.";
  module.def("search_pairwise",
             &search_pairwise,
             doc,
             py::kw_only(),
             py::arg("weight"),
             py::arg("inverse"),
             py::arg("alive"),
             py::arg("mask"),
             py::arg("num_groups"),
             py::arg("n"),
             py::arg("m"),
             py::arg("device"),
             py::arg("stream"));
  module.def("pair_models",
             &pair_models,
             doc,
             py::kw_only(),
             py::arg("inverse"),
             py::arg("unit"),
             py::arg("model"),
             py::arg("num_groups"),
             py::arg("m"),
             py::arg("device"),
             py::arg("stream"));
  module.def("sum_panels",
             &sum_panels,
             doc,
             py::kw_only(),
             py::arg("each"),
             py::arg("sums"),
             py::arg("num_groups"),
             py::arg("v"),
             py::arg("wide"),
             py::arg("device"),
             py::arg("stream"));
}

}  // namespace obs_kernels::bindings
