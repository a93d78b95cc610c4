// SPDX-License-Identifier: Apache-2.0
#include "obs_kernels/matmul.h"

#include <cstdint>

#include "bind.h"

namespace obs_kernels::bindings {
namespace {

py::tuple prepack(uintptr_t values,
                  uintptr_t codes,
                  uintptr_t columns,
                  uintptr_t packed,
                  int64_t rows,
                  int64_t cols,
                  int64_t v,
                  int64_t n,
                  int64_t m,
                  int device,
                  uintptr_t stream) {
  obs_kernels::PrepackParams params{};
  params.values = pointer<const void>(values);
  params.codes = pointer<const uint8_t>(codes);
  params.columns = pointer<const uint8_t>(columns);
  params.packed = pointer<void>(packed);
  params.rows = rows;
  params.cols = cols;
  params.v = v;
  params.n = n;
  params.m = m;
  return launch(obs_kernels::prepack, params, device, stream);
}

py::tuple sparse_linear(uintptr_t x,
                        uintptr_t packed,
                        uintptr_t bias,
                        uintptr_t y,
                        int64_t rows,
                        int64_t cols,
                        int64_t tokens,
                        int32_t type,
                        int32_t activation,
                        bool feature_x,
                        bool feature_y,
                        int config,
                        int device,
                        uintptr_t stream) {
  obs_kernels::SparseLinearParams params{};
  params.x = pointer<const void>(x);
  params.packed = pointer<const void>(packed);
  params.bias = pointer<const void>(bias);
  params.y = pointer<void>(y);
  params.rows = rows;
  params.cols = cols;
  params.tokens = tokens;
  params.type = static_cast<obs_kernels::MatmulType>(type);
  params.activation = static_cast<obs_kernels::Activation>(activation);
  params.feature_x = feature_x;
  params.feature_y = feature_y;
  params.config = config;
  return launch(obs_kernels::sparse_linear, params, device, stream);
}

}  // namespace

void bind_matmul(py::module_& module) {
  py::list tiles;
  for (int i = 0; i < obs_kernels::num_sparse_tiles(); ++i)
    tiles.append(obs_kernels::sparse_tile_name(i));
  module.attr("SPARSE_TILES") = py::tuple(tiles);
  module.def("prepacked_bytes",
             &obs_kernels::prepacked_bytes,
             "Bytes of a weight in the order of the product.",
             py::kw_only(),
             py::arg("rows"),
             py::arg("cols"));
  module.def("prepack",
             &prepack,
             "(op, path, blocks, threads) of the launch; see obs_kernels/matmul.h.",
             py::kw_only(),
             py::arg("values"),
             py::arg("codes"),
             py::arg("columns"),
             py::arg("packed"),
             py::arg("rows"),
             py::arg("cols"),
             py::arg("v"),
             py::arg("n"),
             py::arg("m"),
             py::arg("device"),
             py::arg("stream"));
  module.def("sparse_linear",
             &sparse_linear,
             "(op, path, blocks, threads) of the launch; see obs_kernels/matmul.h.",
             py::kw_only(),
             py::arg("x"),
             py::arg("packed"),
             py::arg("bias"),
             py::arg("y"),
             py::arg("rows"),
             py::arg("cols"),
             py::arg("tokens"),
             py::arg("type"),
             py::arg("activation"),
             py::arg("feature_x"),
             py::arg("feature_y"),
             py::arg("config"),
             py::arg("device"),
             py::arg("stream"));
}

}  // namespace obs_kernels::bindings
