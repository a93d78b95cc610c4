// SPDX-License-Identifier: Apache-2.0
#include "obs_kernels/search.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "common/check.h"
#include "common/device_guard.h"
#include "common/launch.h"
#include "search/check.h"
#include "search/launches.h"

namespace obs_kernels {
namespace {

// Entries from one row of gains to the next: pieces of 16 bytes.
int64_t gains_stride(int64_t n, int64_t m) {
  return (search::count_sets(n, m) + 3) / 4 * 4;
}

// The kernels for n of m.
auto launch_of(const SearchParams& params) {
  if (params.n > 2) return search::launch_sets;
  return params.m <= 16 ? search::launch_pairs : search::launch_wide;
}

}  // namespace

LaunchPlan search_nm(const SearchParams& params, int device, cudaStream_t stream) {
  search::check_sizes(params);
  OBS_CHECK(params.n <= 2 || params.m <= kMaxSetsSize ||
                search::count_sets(params.n, params.m) <= kMaxKeptSets,
            "n > 2 of m > ",
            kMaxSetsSize,
            " must have at most ",
            kMaxKeptSets,
            " kept sets, got n = ",
            params.n,
            ", m = ",
            params.m);
  if (params.num_groups == 0) return {"search_nm", "empty", 0, 0};
  search::check_pointers(params, device);
  const DeviceGuard guard(device);
  search::Task task{};
  task.groups = params;
  task.count = params.num_groups;
  if (params.n > 2 && params.m > kMaxSetsSize) return search::launch_wide_sets(task, stream);
  return launch_of(params)(task, search::Mode::kChoose, stream);
}

int64_t panel_gains_bytes(int64_t v, int64_t wide, int64_t n, int64_t m) {
  return v * wide * gains_stride(n, m) * static_cast<int64_t>(sizeof(float));
}

LaunchPlan search_vnm(const PanelParams& params, int device, cudaStream_t stream) {
  const SearchParams& groups = params.groups;
  search::check_sizes(groups);
  OBS_CHECK(groups.n <= 2 || groups.m <= kMaxSetsSize,
            "m must be at most ",
            kMaxSetsSize,
            " for panels of n > 2, got n = ",
            groups.n,
            ", m = ",
            groups.m);
  OBS_CHECK(params.num_columns >= groups.n && params.num_columns <= groups.m,
            "num_columns must be n to m = ",
            groups.n,
            " to ",
            groups.m,
            ", got ",
            params.num_columns);
  OBS_CHECK(params.v >= 1 && params.v <= kMaxSearchRows && params.wide >= 0,
            "v must be 1 to ",
            kMaxSearchRows,
            " and wide not negative, got ",
            params.v,
            " and ",
            params.wide);
  if (groups.num_groups == 0) return {"search_vnm", "empty", 0, 0};
  OBS_CHECK(params.wide > 0 && groups.num_groups % (params.v * params.wide) == 0,
            "num_groups must be a multiple of v * wide = ",
            params.v * params.wide,
            ", got ",
            groups.num_groups);
  search::check_pointers(groups, device);
  const ColumnTables& tables = params.tables;
  OBS_CHECK(tables.lists && tables.columns && (tables.derived || tables.num_derived == 0) &&
                params.columns && params.saliency && params.column_bits && params.gains,
            "tables, columns, saliency, column_bits and gains must not be null for ",
            groups.num_groups,
            " groups");
  OBS_CHECK(tables.num_sets >= 1 && tables.length >= 1 &&
                tables.num_sets * tables.length <= std::numeric_limits<int32_t>::max(),
            "lists must be [length, num_sets], got [",
            tables.length,
            ", ",
            tables.num_sets,
            "]");
  const int64_t row_bytes = panel_gains_bytes(params.v, params.wide, groups.n, groups.m);
  OBS_CHECK(params.gains_bytes >= row_bytes && aligned(params.gains, 16),
            "gains must be aligned to 16 bytes and have at least ",
            row_bytes,
            ", got ",
            params.gains_bytes);

  const DeviceGuard guard(device);
  const int64_t rows = groups.num_groups / (params.v * params.wide);  // of panels
  const int64_t step = params.gains_bytes / row_bytes;
  LaunchPlan plan{};
  for (int64_t row = 0; row < rows; row += step) {
    const int64_t count = std::min(step, rows - row) * params.wide;  // panels
    search::Task task{};
    task.groups = groups;
    task.first = row * params.wide * params.v;
    task.count = count * params.v;
    task.gains = params.gains;
    task.stride = gains_stride(groups.n, groups.m);
    const auto launch = launch_of(groups);
    launch(task, search::Mode::kGains, stream);
    plan = search::launch_columns(params, row * params.wide, count, task.stride, stream);
    task.column_bits = params.column_bits;
    task.v = params.v;
    task.wide = params.wide;
    launch(task, search::Mode::kChoose, stream);
  }
  search::launch_panel_sums(params, stream);
  return plan;
}

}  // namespace obs_kernels
