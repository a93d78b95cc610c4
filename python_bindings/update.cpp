// SPDX-License-Identifier: Apache-2.0
#include "obs_kernels/update.h"

#include <cstdint>

#include "bind.h"

namespace obs_kernels::bindings {
namespace {

py::tuple update_joint(uintptr_t weight,
                       uintptr_t mask,
                       uintptr_t fisher,
                       uintptr_t damp,
                       bool damp_each,
                       uintptr_t updated,
                       uintptr_t info,
                       int64_t num_weights,
                       int64_t num_blocks,
                       int64_t size,
                       int type,
                       int device,
                       uintptr_t stream) {
  obs_kernels::UpdateParams params{};
  params.weight = pointer<const void>(weight);
  params.mask = pointer<const uint8_t>(mask);
  params.fisher = pointer<const float>(fisher);
  params.damp = pointer<const float>(damp);
  params.damp_each = damp_each;
  params.updated = pointer<void>(updated);
  params.info = pointer<int32_t>(info);
  params.num_weights = num_weights;
  params.num_blocks = num_blocks;
  params.size = size;
  params.type = static_cast<obs_kernels::WeightType>(type);
  return launch(obs_kernels::update_joint, params, device, stream);
}

py::tuple update_single(uintptr_t weight,
                        uintptr_t mask,
                        uintptr_t inverse,
                        uintptr_t updated,
                        int64_t num_weights,
                        int64_t num_blocks,
                        int64_t size,
                        int type,
                        int device,
                        uintptr_t stream) {
  obs_kernels::UpdateParams params{};
  params.weight = pointer<const void>(weight);
  params.mask = pointer<const uint8_t>(mask);
  params.fisher = pointer<const float>(inverse);
  params.updated = pointer<void>(updated);
  params.num_weights = num_weights;
  params.num_blocks = num_blocks;
  params.size = size;
  params.type = static_cast<obs_kernels::WeightType>(type);
  return launch(obs_kernels::update_single, params, device, stream);
}

py::tuple loss_increase(uintptr_t change,
                        uintptr_t fisher,
                        uintptr_t damp,
                        bool damp_each,
                        uintptr_t loss,
                        int64_t num_weights,
                        int64_t num_blocks,
                        int64_t size,
                        int type,
                        int device,
                        uintptr_t stream) {
  obs_kernels::LossParams params{};
  params.change = pointer<const void>(change);
  params.fisher = pointer<const float>(fisher);
  params.damp = pointer<const float>(damp);
  params.damp_each = damp_each;
  params.loss = pointer<float>(loss);
  params.num_weights = num_weights;
  params.num_blocks = num_blocks;
  params.size = size;
  params.type = static_cast<obs_kernels::WeightType>(type);
  return launch(obs_kernels::loss_increase, params, device, stream);
}

}  // namespace

void bind_update(py::module_& module) {
  module.attr("MAX_UPDATE_SIZE") = obs_kernels::kMaxUpdateSize;
  module.def("update_joint",
             &update_joint,
             "(op, path, blocks, threads) of the launch; see obs_kernels/update.h.",
             py::kw_only(),
             py::arg("weight"),
             py::arg("mask"),
             py::arg("fisher"),
             py::arg("damp"),
             py::arg("damp_each"),
             py::arg("updated"),
             py::arg("info"),
             py::arg("num_weights"),
             py::arg("num_blocks"),
             py::arg("size"),
             py::arg("type"),
             py::arg("device"),
             py::arg("stream"));
  module.def("update_single",
             &update_single,
             "(op, path, blocks, threads) of the launch; see obs_kernels/update.h.",
             py::kw_only(),
             py::arg("weight"),
             py::arg("mask"),
             py::arg("inverse"),
             py::arg("updated"),
             py::arg("num_weights"),
             py::arg("num_blocks"),
             py::arg("size"),
             py::arg("type"),
             py::arg("device"),
             py::arg("stream"));
  module.def("loss_increase",
             &loss_increase,
             "(op, path, blocks, threads) of the launch; see obs_kernels/update.h.",
             py::kw_only(),
             py::arg("change"),
             py::arg("fisher"),
             py::arg("damp"),
             py::arg("damp_each"),
             py::arg("loss"),
             py::arg("num_weights"),
             py::arg("num_blocks"),
             py::arg("size"),
             py::arg("type"),
             py::arg("device"),
             py::arg("stream"));
}

}  // namespace obs_kernels::bindings
