// SPDX-License-Identifier: Apache-2.0
// What the files of the module share, a file a topic.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "obs_kernels/launch_plan.h"

struct CUstream_st;

namespace obs_kernels::bindings {

namespace py = pybind11;

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// What function(params, device, stream) launched. Without the lock: the first launch loads the
// kernels, which takes long enough for other threads to care.
template <typename Function, typename Params>
py::tuple launch(Function function, const Params& params, int device, uintptr_t stream) {
  LaunchPlan plan{};
  {
    const py::gil_scoped_release unlocked;
    plan = function(params, device, pointer<CUstream_st>(stream));
  }
  return py::make_tuple(plan.op, plan.path, plan.blocks, plan.threads);
}

void bind_choice(py::module_& module);
void bind_matmul(py::module_& module);
void bind_search(py::module_& module);
void bind_sweep(py::module_& module);
void bind_update(py::module_& module);

}  // namespace obs_kernels::bindings
