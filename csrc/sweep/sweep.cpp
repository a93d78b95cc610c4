// SPDX-License-Identifier: Apache-2.0
#include "obs_kernels/sweep.h"

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#include "common/check.h"
#include "common/device_guard.h"
#include "common/launch.h"
#include "sweep/launches.h"
#include "sweep/sweep_config.h"

namespace obs_kernels {
namespace {

void check_sizes(const SweepParams& params) {
  const bool panels = params.v > 0;
  OBS_CHECK(params.n >= 1 && params.n < params.m && params.m <= kMaxSweepSize &&
                (params.n <= 2 || params.m <= kMaxSweepWideSize),
            "n and m must be 0 < n < m <= ",
            kMaxSweepSize,
            ", for n > 2 m <= ",
            kMaxSweepWideSize,
            ", got n = ",
            params.n,
            ", m = ",
            params.m);
  OBS_CHECK(params.v >= 0 && params.v <= kMaxSweepRows,
            "v must be 0 to ",
            kMaxSweepRows,
            ", got ",
            params.v);
  // A block of threads for a row at most: gridDim.x is the limit.
  OBS_CHECK(params.rows >= 0 && params.rows <= std::numeric_limits<int32_t>::max() &&
                (!panels || params.rows % params.v == 0),
            "rows must be 0 to 2^31 - 1 and a multiple of v = ",
            params.v,
            ", got ",
            params.rows);
  const int64_t width = sweep_width(params.v, params.n, params.m);
  OBS_CHECK(params.first >= 0 && params.count >= 0 && params.count <= width &&
                params.first % params.m == 0 && params.count % params.m == 0 &&
                params.cols % params.m == 0 && params.first + params.count <= params.cols,
            "first and count must be multiples of m = ",
            params.m,
            " inside cols = ",
            params.cols,
            ", count at most ",
            width,
            ", got ",
            params.first,
            " and ",
            params.count);
  OBS_CHECK(params.change_stride >= params.count,
            "change_stride must be at least count = ",
            params.count,
            ", got ",
            params.change_stride);
  OBS_CHECK(!panels || (params.num_columns >= params.n && params.num_columns <= params.m),
            "num_columns must be n to m = ",
            params.n,
            " to ",
            params.m,
            ", got ",
            params.num_columns);
}

void check_tables(const SweepParams& params) {
  const SweepTables& tables = params.tables;
  OBS_CHECK(tables.inner && tables.num_inner >= 1 && tables.num_inner <= kMaxSets,
            "tables.inner must have 1 to ",
            kMaxSets,
            " sets, got ",
            tables.num_inner);
  if (params.v == 0) return;
  OBS_CHECK(tables.sets && tables.lists && tables.columns &&
                (tables.derived || tables.num_derived == 0 || params.n > 2) && params.columns,
            "tables and columns must not be null for panels of ",
            params.v);
  OBS_CHECK(tables.num_sets >= 1 && tables.num_sets <= kMaxSets && tables.length >= 1 &&
                tables.num_column_sets >= 1 &&
                tables.num_column_sets * tables.length <= std::numeric_limits<int32_t>::max(),
            "tables must have 1 to ",
            kMaxSets,
            " sets and lists [length, num_column_sets], got ",
            tables.num_sets,
            " and [",
            tables.length,
            ", ",
            tables.num_column_sets,
            "]");
}

}  // namespace

int64_t sweep_width(int64_t v, int64_t n, int64_t m) {
  OBS_CHECK(m >= 1, "m must be at least 1, got ", m);
  const int64_t most = n > 2 && v > SweepSets128::kRows ? kTallWidth : kSweepWidth;
  return most / m * m;
}

LaunchPlan sweep_columns(const SweepParams& params, int device, cudaStream_t stream) {
  check_sizes(params);
  if (params.rows == 0 || params.count == 0) return {"sweep_columns", "empty", 0, 0};
  OBS_CHECK(
      params.live && params.factor && params.own && params.curvature && params.unit &&
          params.pushed && params.mask && params.new_weight && params.change && params.loss,
      "live, factor, own, curvature, unit, pushed, mask, new_weight, change and loss must not be "
      "null for ",
      params.rows,
      " rows");
  for (const float* pointer : {params.live,
                               params.row_scale,
                               params.factor,
                               params.own,
                               params.curvature,
                               params.unit,
                               params.pushed,
                               static_cast<const float*>(params.new_weight),
                               static_cast<const float*>(params.change),
                               static_cast<const float*>(params.loss)}) {
    OBS_CHECK(aligned(pointer, sizeof(float)),
              "floats must be aligned to their elements, got ",
              static_cast<const void*>(pointer));
  }
  check_tables(params);
  OBS_CHECK(device >= 0, "device must be an index, got ", device);
  const DeviceGuard guard(device);
  if (params.v == 0) return sweep::launch_rows(params, stream);
  return params.n > 2 ? sweep::launch_panel_sets(params, stream)
                      : sweep::launch_panels(params, stream);
}

}  // namespace obs_kernels
