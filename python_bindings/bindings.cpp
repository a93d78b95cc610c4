// SPDX-License-Identifier: Apache-2.0
// The Python module _C: integers in (addresses, sizes, device index, stream), plans out. Tensors
// stay on the Python side (obs_kernels/cuda_calls), so that one build serves every torch.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <sstream>
#include <string>

#include "bind.h"
#include "obs_kernels/accumulate.h"
#include "obs_kernels/errors.h"
#include "obs_kernels/inverse.h"
#include "obs_kernels/launch_plan.h"
#include "obs_kernels/packing.h"

namespace py = pybind11;
using obs_kernels::bindings::launch;
using obs_kernels::bindings::pointer;

namespace {

// Raised whenever a signature below changes; _ext.py refuses a module of another number, which is
// what a checkout sees when sources moved on and nobody built again.
constexpr int kInterface = 9;

py::tuple pack(uintptr_t weight,
               uintptr_t mask,
               uintptr_t values,
               uintptr_t codes,
               uintptr_t columns,
               int64_t rows,
               int64_t cols,
               int64_t v,
               int64_t n,
               int64_t m,
               int64_t element_size,
               int device,
               uintptr_t stream) {
  obs_kernels::PackParams params{};
  params.weight = pointer<const void>(weight);
  params.mask = pointer<const uint8_t>(mask);
  params.values = pointer<void>(values);
  params.codes = pointer<uint8_t>(codes);
  params.columns = pointer<uint8_t>(columns);
  params.rows = rows;
  params.cols = cols;
  params.v = v;
  params.n = n;
  params.m = m;
  params.element_size = element_size;
  return launch(obs_kernels::pack, params, device, stream);
}

py::tuple invert_spd(uintptr_t matrices,
                     uintptr_t damp,
                     bool damp_each,
                     uintptr_t inverse,
                     uintptr_t info,
                     int64_t num_blocks,
                     int64_t size,
                     int device,
                     uintptr_t stream) {
  obs_kernels::InvertParams params{};
  params.matrices = pointer<const float>(matrices);
  params.damp = pointer<const float>(damp);
  params.damp_each = damp_each;
  params.inverse = pointer<float>(inverse);
  params.info = pointer<int32_t>(info);
  params.num_blocks = num_blocks;
  params.size = size;
  return launch(obs_kernels::invert_spd, params, device, stream);
}

py::tuple accumulate_fisher(uintptr_t grads,
                            int32_t grad_type,
                            int64_t row_stride,
                            uintptr_t fisher,
                            int64_t num_blocks,
                            int64_t size,
                            int64_t num_samples,
                            float scale,
                            int device,
                            uintptr_t stream) {
  obs_kernels::AccumulateParams params{};
  params.grads = pointer<const void>(grads);
  params.grad_type = static_cast<obs_kernels::GradType>(grad_type);
  params.row_stride = row_stride;
  params.fisher = pointer<float>(fisher);
  params.num_blocks = num_blocks;
  params.size = size;
  params.num_samples = num_samples;
  params.scale = scale;
  return launch(obs_kernels::accumulate_fisher, params, device, stream);
}

py::dict build_info() {
  py::list architectures;
  std::istringstream names(OBS_ARCHITECTURES);
  for (std::string name; std::getline(names, name, ',');) architectures.append(name);
  py::dict info;
  info["architectures"] = architectures;
  info["cuda"] = OBS_CUDA_VERSION;
  info["compiler"] = OBS_HOST_COMPILER;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled half of obs_kernels; use obs_kernels.cuda_calls, which checks first.";
  module.attr("INTERFACE") = kInterface;
  py::register_local_exception_translator([](std::exception_ptr pending) {
    try {
      if (pending) std::rethrow_exception(pending);
    } catch (const obs_kernels::ArgumentError& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const obs_kernels::CudaError& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
  });
  module.def("build_info", &build_info, "Architectures and toolkit of this build; starts no CUDA.");
  module.def("launch_count", &obs_kernels::launch_count, "Kernels launched since the import.");
  module.def("pack",
             &pack,
             "(op, path, blocks, threads) of the launch; see obs_kernels/packing.h.",
             py::kw_only(),
             py::arg("weight"),
             py::arg("mask"),
             py::arg("values"),
             py::arg("codes"),
             py::arg("columns"),
             py::arg("rows"),
             py::arg("cols"),
             py::arg("v"),
             py::arg("n"),
             py::arg("m"),
             py::arg("element_size"),
             py::arg("device"),
             py::arg("stream"));
  module.attr("MAX_INVERT_SIZE") = obs_kernels::kMaxInvertSize;
  module.def("invert_spd",
             &invert_spd,
             "(op, path, blocks, threads) of the launch; see obs_kernels/inverse.h.",
             py::kw_only(),
             py::arg("matrices"),
             py::arg("damp"),
             py::arg("damp_each"),
             py::arg("inverse"),
             py::arg("info"),
             py::arg("num_blocks"),
             py::arg("size"),
             py::arg("device"),
             py::arg("stream"));
  module.attr("MAX_ACCUMULATE_SIZE") = obs_kernels::kMaxAccumulateSize;
  module.def("accumulate_fisher",
             &accumulate_fisher,
             "(op, path, blocks, threads) of the launch; see obs_kernels/accumulate.h.",
             py::kw_only(),
             py::arg("grads"),
             py::arg("grad_type"),
             py::arg("row_stride"),
             py::arg("fisher"),
             py::arg("num_blocks"),
             py::arg("size"),
             py::arg("num_samples"),
             py::arg("scale"),
             py::arg("device"),
             py::arg("stream"));
  obs_kernels::bindings::bind_choice(module);
  obs_kernels::bindings::bind_matmul(module);
  obs_kernels::bindings::bind_search(module);
  obs_kernels::bindings::bind_sweep(module);
  obs_kernels::bindings::bind_update(module);
}
