// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime.h>

#include <cstdint>

#include "common/check.h"
#include "common/device_guard.h"
#include "matmul/sparse_config.h"
#include "matmul/sparse_kernel.cuh"
#include "matmul/sparse_launch.h"
#include "obs_kernels/matmul.h"

namespace obs_kernels {
namespace {

template <typename Element, typename Tile, bool kFeatureX>
LaunchPlan launch(const SparseLinearParams& params,
                  const TileShape& tile,
                  int device,
                  cudaStream_t stream) {
  constexpr auto kernel = sparse_linear_kernel<Element, Tile, kFeatureX>;
  const auto args =
      sparse_args<Element>(params, tile.rows * tile.cluster, tile.tokens, tile.cluster, tile.split);
  const CUtensorMap x_map =
      params.feature_x
          ? boxes_of(params.x, params.cols, params.tokens, params.type)
          : boxes_of(params.x, params.tokens, params.cols, params.type, tile.tokens / tile.cluster);
  const CUtensorMap y_map = args.boxes ? boxes_of_y<Tile>(params) : x_map;
  const unsigned blocks = launch_clusters<kernel, Tile>(args, device, stream, x_map, y_map, args);
  return {"sparse_linear", tile.name, blocks, Tile::kThreads};
}

template <typename Element, bool kFeatureX>
LaunchPlan launch_tile(const SparseLinearParams& params,
                       const TileShape& tile,
                       int device,
                       cudaStream_t stream) {
  const auto with = [&](auto sizes) {
    return launch<Element, decltype(sizes), kFeatureX>(params, tile, device, stream);
  };
  switch (tile_key(tile.rows, tile.tokens, tile.split > 0)) {
    case tile_key(256, 192, false):
      return with(SparseTile<2, 192>{});
    case tile_key(256, 128, false):
      return with(SparseTile<2, 128>{});
    case tile_key(192, 192, false):
      return with(SparseTile<1, 192, false, 0, 1, 3>{});
    case tile_key(128, 256, false):
      return with(SparseTile<1, 256>{});
    case tile_key(128, 192, false):
      return with(SparseTile<1, 192>{});
    case tile_key(128, 128, false):
      return with(SparseTile<1, 128>{});
    case tile_key(128, 128, true):
      return with(SparseTile<1, 128, false, 2, 2>{});
    case tile_key(128, 64, true):
      return with(SparseTile<1, 64, false, 4, 2>{});
    default:
      return with(SparseTile<1, 64, true, 4, 2>{});
  }
}

template <typename Element>
LaunchPlan launch_layout(const SparseLinearParams& params,
                         const TileShape& tile,
                         int device,
                         cudaStream_t stream) {
  return params.feature_x ? launch_tile<Element, true>(params, tile, device, stream)
                          : launch_tile<Element, false>(params, tile, device, stream);
}

int chosen_by_table(const SparseLinearParams& params, int device) {
  const int count = multiprocessors_of(device);
  return choose_sparse_tile(params.rows, params.tokens, steps_of(params.cols), count).index;
}

}  // namespace

int num_sparse_tiles() {
  return kNumSparseTiles;
}

const char* sparse_tile_name(int config) {
  OBS_CHECK(config >= 0 && config < kNumSparseTiles,
            "config must be in 0 .. ",
            kNumSparseTiles - 1,
            ", got ",
            config);
  return kSparseTiles[config].name;
}

LaunchPlan sparse_linear(const SparseLinearParams& params, int device, cudaStream_t stream) {
  check_product(params, kNumSparseTiles);
  if (params.rows == 0 || params.tokens == 0) return {"sparse_linear", "empty", 0, 0};
  OBS_CHECK(params.cols > 0, "cols must be positive, got 0");
  const int64_t x_cols = params.feature_x ? params.tokens : params.cols;
  OBS_CHECK(x_cols % 8 == 0, "rows of x must be multiples of 16 bytes, got ", x_cols, " elements");
  check_capability(device);
  const DeviceGuard guard(device);
  const int chosen = params.config >= 0 ? params.config : chosen_by_table(params, device);
  const TileShape& tile = kSparseTiles[chosen];
  check_tiles(params, tile.rows, tile.tokens, tile.split);
  return params.type == MatmulType::kHalf
             ? launch_layout<__half>(params, tile, device, stream)
             : launch_layout<__nv_bfloat16>(params, tile, device, stream);
}

}  // namespace obs_kernels
