// SPDX-License-Identifier: Apache-2.0
#include "obs_kernels/sweep.h"

#include <cstdint>

#include "bind.h"

namespace obs_kernels::bindings {
namespace {

py::tuple sweep_columns(uintptr_t live,
                        uintptr_t alive,
                        uintptr_t row_scale,
                        uintptr_t factor,
                        uintptr_t own,
                        uintptr_t curvature,
                        uintptr_t unit,
                        uintptr_t pushed,
                        uintptr_t mask,
                        uintptr_t new_weight,
                        uintptr_t change,
                        uintptr_t loss,
                        uintptr_t columns,
                        uintptr_t inner,
                        uintptr_t sets,
                        uintptr_t derived,
                        uintptr_t lists,
                        uintptr_t column_sets,
                        int64_t num_inner,
                        int64_t num_sets,
                        int64_t num_derived,
                        int64_t length,
                        int64_t num_column_sets,
                        int64_t rows,
                        int64_t cols,
                        int64_t first,
                        int64_t count,
                        int64_t change_stride,
                        int64_t v,
                        int64_t n,
                        int64_t m,
                        int64_t num_columns,
                        int device,
                        uintptr_t stream) {
  obs_kernels::SweepParams params{};
  params.live = pointer<const float>(live);
  params.alive = pointer<const uint8_t>(alive);
  params.row_scale = pointer<const float>(row_scale);
  params.factor = pointer<const float>(factor);
  params.own = pointer<const float>(own);
  params.curvature = pointer<const float>(curvature);
  params.unit = pointer<const float>(unit);
  params.pushed = pointer<const float>(pushed);
  params.mask = pointer<uint8_t>(mask);
  params.new_weight = pointer<float>(new_weight);
  params.change = pointer<float>(change);
  params.loss = pointer<float>(loss);
  params.columns = pointer<uint8_t>(columns);
  params.tables.inner = pointer<const uint32_t>(inner);
  params.tables.sets = pointer<const uint32_t>(sets);
  params.tables.derived = pointer<const uint16_t>(derived);
  params.tables.lists = pointer<const uint16_t>(lists);
  params.tables.columns = pointer<const uint8_t>(column_sets);
  params.tables.num_inner = num_inner;
  params.tables.num_sets = num_sets;
  params.tables.num_derived = num_derived;
  params.tables.length = length;
  params.tables.num_column_sets = num_column_sets;
  params.rows = rows;
  params.cols = cols;
  params.first = first;
  params.count = count;
  params.change_stride = change_stride;
  params.v = v;
  params.n = n;
  params.m = m;
  params.num_columns = num_columns;
  return launch(obs_kernels::sweep_columns, params, device, stream);
}

}  // namespace

void bind_sweep(py::module_& module) {
  module.def("sweep_width",
             &obs_kernels::sweep_width,
             "Most columns of a step.",
             py::kw_only(),
             py::arg("v"),
             py::arg("n"),
             py::arg("m"));
  module.def("sweep_columns",
             &sweep_columns,
             "(op, path, blocks, threads) of the launch; see obs_kernels/sweep.h.",
             py::kw_only(),
             py::arg("live"),
             py::arg("alive"),
             py::arg("row_scale"),
             py::arg("factor"),
             py::arg("own"),
             py::arg("curvature"),
             py::arg("unit"),
             py::arg("pushed"),
             py::arg("mask"),
             py::arg("new_weight"),
             py::arg("change"),
             py::arg("loss"),
             py::arg("columns"),
             py::arg("inner"),
             py::arg("sets"),
             py::arg("derived"),
             py::arg("lists"),
             py::arg("column_sets"),
             py::arg("num_inner"),
             py::arg("num_sets"),
             py::arg("num_derived"),
             py::arg("length"),
             py::arg("num_column_sets"),
             py::arg("rows"),
             py::arg("cols"),
             py::arg("first"),
             py::arg("count"),
             py::arg("change_stride"),
             py::arg("v"),
             py::arg("n"),
             py::arg("m"),
             py::arg("num_columns"),
             py::arg("device"),
             py::arg("stream"));
}

}  // namespace obs_kernels::bindings
