// SPDX-License-Identifier: Apache-2.0
#include "obs_kernels/search.h"

#include <cstdint>

#include "bind.h"
#include "groups.h"

namespace obs_kernels::bindings {
namespace {

py::tuple search_vnm(uintptr_t weight,
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
                     uintptr_t derived,
                     uintptr_t lists,
                     uintptr_t column_sets,
                     int64_t num_derived,
                     int64_t length,
                     int64_t num_sets,
                     uintptr_t columns,
                     uintptr_t panel_saliency,
                     uintptr_t column_bits,
                     uintptr_t gains,
                     int64_t gains_bytes,
                     int64_t v,
                     int64_t wide,
                     int64_t num_columns,
                     int device,
                     uintptr_t stream) {
  obs_kernels::PanelParams params{};
  params.groups = search_params(
      weight, fisher, damp, damp_each, alive, mask, saliency, new_weight, info, num_groups, n, m);
  params.tables.derived = pointer<const uint16_t>(derived);
  params.tables.lists = pointer<const uint16_t>(lists);
  params.tables.columns = pointer<const uint8_t>(column_sets);
  params.tables.num_derived = num_derived;
  params.tables.length = length;
  params.tables.num_sets = num_sets;
  params.columns = pointer<uint8_t>(columns);
  params.saliency = pointer<float>(panel_saliency);
  params.column_bits = pointer<uint32_t>(column_bits);
  params.gains = pointer<float>(gains);
  params.gains_bytes = gains_bytes;
  params.v = v;
  params.wide = wide;
  params.num_columns = num_columns;
  return launch(obs_kernels::search_vnm, params, device, stream);
}

}  // namespace

void bind_search(py::module_& module) {
  def_groups<obs_kernels::search_nm>(module, "search_nm");
  def_of_groups(module,
                "search_vnm",
                &search_vnm,
                "(op, path, blocks, threads) of the last large launch; see obs_kernels/search.h.",
                py::arg("derived"),
                py::arg("lists"),
                py::arg("column_sets"),
                py::arg("num_derived"),
                py::arg("length"),
                py::arg("num_sets"),
                py::arg("columns"),
                py::arg("panel_saliency"),
                py::arg("column_bits"),
                py::arg("gains"),
                py::arg("gains_bytes"),
                py::arg("v"),
                py::arg("wide"),
                py::arg("num_columns"));
}

}  // namespace obs_kernels::bindings
