// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime.h>

#include <cstdint>

#include "common/check.h"
#include "common/device_guard.h"
#include "matmul/gather_kernel.cuh"
#include "matmul/sparse_config.h"
#include "matmul/sparse_launch.h"
#include "obs_kernels/matmul.h"

namespace obs_kernels {
namespace {

template <typename Element, typename Tile, int kCluster>
LaunchPlan launch(const GatherLinearParams& params,
                  const TileShape& tile,
                  int device,
                  cudaStream_t stream) {
  constexpr auto kernel = gather_linear_kernel<Element, Tile, kCluster>;
  const SparseLinearParams& product = params.product;
  OBS_CHECK(tile.cluster == kCluster, "no kernel was compiled for ", tile.name);
  GatherArgs<Element> args{};
  args.sparse =
      sparse_args<Element>(product, tile.rows, tile.tokens * kCluster, kCluster, tile.split);
  args.x = static_cast<const Element*>(product.x);
  args.columns = params.columns;
  args.x_stride = params.x_stride;
  args.v = static_cast<int>(params.v);
  args.m = static_cast<int>(params.m);
  args.groups = static_cast<int>(product.cols / 4);
  const CUtensorMap y_map = args.sparse.boxes ? boxes_of_y<Tile>(product) : CUtensorMap{};
  const unsigned blocks = launch_clusters<kernel, Tile>(args.sparse, device, stream, y_map, args);
  return {"sparse_linear", tile.name, blocks, Tile::kThreads};
}

template <typename Element>
LaunchPlan launch_tile(const GatherLinearParams& params,
                       const TileShape& tile,
                       int device,
                       cudaStream_t stream) {
  const auto with = [&](auto sizes) {
    return launch<Element, decltype(sizes), 1>(params, tile, device, stream);
  };
  switch (tile_key(tile.rows, tile.tokens, tile.split > 0)) {
    case tile_key(256, 192, false):
      return with(SparseTile<2, 192>{});
    case tile_key(256, 128, false):
      if (tile.cluster == 2) {
        return launch<Element, SparseTile<2, 128>, 2>(params, tile, device, stream);
      }
      return with(SparseTile<2, 128>{});
    case tile_key(128, 384, false):
      return with(SparseTile<2, 384, true>{});
    case tile_key(128, 256, false):
      return with(SparseTile<1, 256>{});
    case tile_key(128, 192, false):
      return with(SparseTile<1, 192>{});
    case tile_key(128, 128, false):
      return with(SparseTile<1, 128>{});
    case tile_key(128, 128, true):
      return with(SparseTile<1, 128, false, 2>{});
    case tile_key(128, 64, true):
      return with(SparseTile<1, 64, false, 4>{});
    default:
      return with(SparseTile<1, 256, true>{});
  }
}

int chosen_by_table(const GatherLinearParams& params, int device) {
  const SparseLinearParams& product = params.product;
  const int count = multiprocessors_of(device);
  const int64_t steps = steps_of(product.cols);
  return choose_gather_tile(product.rows, product.tokens, steps, params.v, count).index;
}

}  // namespace

int num_gather_tiles() {
  return kNumGatherTiles;
}

const char* gather_tile_name(int config) {
  OBS_CHECK(config >= 0 && config < kNumGatherTiles,
            "config must be in 0 .. ",
            kNumGatherTiles - 1,
            ", got ",
            config);
  return kGatherTiles[config].name;
}

bool gather_is_faster(
    int64_t rows, int64_t cols, int64_t tokens, int64_t v, int64_t m, bool feature_x, int device) {
  OBS_CHECK(v > 0 && m > 0, "v and m must be positive, got v = ", v, ", m = ", m);
  return gather_is_faster_on(rows, cols, tokens, v, m, feature_x, multiprocessors_of(device));
}

int64_t product_cycles(
    int64_t rows, int64_t cols, int64_t tokens, int64_t v, int64_t m, bool feature_x, int device) {
  OBS_CHECK(v >= 0 && m > 0, "v must not be negative and m positive, got v = ", v, ", m = ", m);
  return product_cycles_on(rows, cols, tokens, v, m, feature_x, multiprocessors_of(device));
}

int64_t transposition_cycles(int64_t tokens, int64_t cols) {
  return transpose_cycles(tokens, cols);
}

LaunchPlan gather_linear(const GatherLinearParams& params, int device, cudaStream_t stream) {
  const SparseLinearParams& product = params.product;
  check_product(product, kNumGatherTiles);
  OBS_CHECK(params.v > 0 && params.v % 64 == 0 && product.rows % params.v == 0,
            "v must be a multiple of 64 that divides the rows, got v = ",
            params.v,
            ", rows = ",
            product.rows);
  OBS_CHECK(params.m >= 4 && params.m <= 256 && product.cols % 4 == 0,
            "four of m = 4 .. 256 columns are kept, got m = ",
            params.m,
            ", kept columns = ",
            product.cols);
  if (product.rows == 0 || product.tokens == 0) return {"sparse_linear", "empty", 0, 0};
  OBS_CHECK(product.cols > 0, "cols must be positive, got 0");
  OBS_CHECK(aligned(params.columns, 4), "columns must be aligned to 4 bytes");
  constexpr int64_t kMostStride = int64_t{1} << 30;  // its bytes are 32-bit
  OBS_CHECK(
      product.feature_x && params.x_stride % 8 == 0 && params.x_stride >= product.tokens &&
          params.x_stride < kMostStride,
      "x must be feature-major with columns of whole 16 bytes, less than 2^30 elements apart, "
      "got a stride of ",
      params.x_stride,
      " for ",
      product.tokens,
      " tokens");
  check_capability(device);
  const DeviceGuard guard(device);
  const int chosen = product.config >= 0 ? product.config : chosen_by_table(params, device);
  const TileShape& tile = kGatherTiles[chosen];
  OBS_CHECK(params.v % tile.rows == 0,
            "the rows of a tile must divide v = ",
            params.v,
            ", those of ",
            tile.name,
            " do not");
  check_tiles(product, tile.rows, tile.tokens, tile.split);
  return product.type == MatmulType::kHalf
             ? launch_tile<__half>(params, tile, device, stream)
             : launch_tile<__nv_bfloat16>(params, tile, device, stream);
}

}  // namespace obs_kernels
