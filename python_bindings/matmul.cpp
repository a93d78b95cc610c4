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

obs_kernels::SparseLinearParams product_of(uintptr_t x,
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
                                           int config) {
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
  return params;
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
  const auto params = product_of(
      x, packed, bias, y, rows, cols, tokens, type, activation, feature_x, feature_y, config);
  return launch(obs_kernels::sparse_linear, params, device, stream);
}

py::tuple gather_linear(uintptr_t x,
                        uintptr_t columns,
                        uintptr_t packed,
                        uintptr_t bias,
                        uintptr_t y,
                        int64_t rows,
                        int64_t cols,
                        int64_t tokens,
                        int64_t x_stride,
                        int64_t v,
                        int64_t m,
                        int32_t type,
                        int32_t activation,
                        bool feature_y,
                        int config,
                        int device,
                        uintptr_t stream) {
  obs_kernels::GatherLinearParams params{};
  params.product =
      product_of(x, packed, bias, y, rows, cols, tokens, type, activation, true, feature_y, config);
  params.columns = pointer<const uint8_t>(columns);
  params.x_stride = x_stride;
  params.v = v;
  params.m = m;
  return launch(obs_kernels::gather_linear, params, device, stream);
}

py::tuple transpose(uintptr_t x,
                    uintptr_t out,
                    int64_t tokens,
                    int64_t cols,
                    int64_t out_stride,
                    int device,
                    uintptr_t stream) {
  obs_kernels::TransposeParams params{};
  params.x = pointer<const void>(x);
  params.out = pointer<void>(out);
  params.tokens = tokens;
  params.cols = cols;
  params.out_stride = out_stride;
  return launch(obs_kernels::transpose, params, device, stream);
}

}  // namespace

void bind_matmul(py::module_& module) {
  const auto names = [](int count, const char* (*name)(int)) {
    py::list found;
    for (int i = 0; i < count; ++i) found.append(name(i));
    return py::tuple(found);
  };
  module.attr("SPARSE_TILES") =
      names(obs_kernels::num_sparse_tiles(), &obs_kernels::sparse_tile_name);
  module.attr("GATHER_TILES") =
      names(obs_kernels::num_gather_tiles(), &obs_kernels::gather_tile_name);
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
  module.def("gather_is_faster",
             &obs_kernels::gather_is_faster,
             "Whether gather_linear beats sparse_linear; see obs_kernels/matmul.h.",
             py::kw_only(),
             py::arg("rows"),
             py::arg("cols"),
             py::arg("tokens"),
             py::arg("v"),
             py::arg("m"),
             py::arg("feature_x"),
             py::arg("device"));
  module.def("product_cycles",
             &obs_kernels::product_cycles,
             "Estimated cycles of the faster of the two; see obs_kernels/matmul.h.",
             py::kw_only(),
             py::arg("rows"),
             py::arg("cols"),
             py::arg("tokens"),
             py::arg("v"),
             py::arg("m"),
             py::arg("feature_x"),
             py::arg("device"));
  module.def("transposition_cycles",
             &obs_kernels::transposition_cycles,
             "Estimated cycles of a transposition; see obs_kernels/matmul.h.",
             py::kw_only(),
             py::arg("tokens"),
             py::arg("cols"));
  module.def("gather_linear",
             &gather_linear,
             "(op, path, blocks, threads) of the launch; see obs_kernels/matmul.h.",
             py::kw_only(),
             py::arg("x"),
             py::arg("columns"),
             py::arg("packed"),
             py::arg("bias"),
             py::arg("y"),
             py::arg("rows"),
             py::arg("cols"),
             py::arg("tokens"),
             py::arg("x_stride"),
             py::arg("v"),
             py::arg("m"),
             py::arg("type"),
             py::arg("activation"),
             py::arg("feature_y"),
             py::arg("config"),
             py::arg("device"),
             py::arg("stream"));
  module.def("transpose",
             &transpose,
             "(op, path, blocks, threads) of the launch; see obs_kernels/matmul.h.",
             py::kw_only(),
             py::arg("x"),
             py::arg("out"),
             py::arg("tokens"),
             py::arg("cols"),
             py::arg("out_stride"),
             py::arg("device"),
             py::arg("stream"));
}

}  // namespace obs_kernels::bindings
