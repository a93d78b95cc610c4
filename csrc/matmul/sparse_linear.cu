// SPDX-License-Identifier: Apache-2.0
#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "common/check.h"
#include "common/device_guard.h"
#include "common/launch.h"
#include "matmul/sparse_config.h"
#include "matmul/sparse_kernel.cuh"
#include "obs_kernels/matmul.h"

namespace obs_kernels {
namespace {

// From the driver that the runtime loaded: no library to link, none to miss on a machine without.
PFN_cuTensorMapEncodeTiled_v12000 encode_function() {
  static const PFN_cuTensorMapEncodeTiled_v12000 found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
    OBS_CUDA_CHECK(cudaGetDriverEntryPointByVersion(
        "cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result));
    OBS_CHECK(function != nullptr, "the driver must know cuTensorMapEncodeTiled; update it");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return found;
}

// A row-major matrix of 16-bit elements in boxes of 64 x 64, swizzled; outside it reads zeros.
CUtensorMap boxes_of(const void* matrix, int64_t rows, int64_t cols, MatmulType type) {
  CUtensorMap map{};
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(cols) * 2};
  const cuuint32_t box[2] = {64, 64};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult status =
      encode_function()(&map,
                        type == MatmulType::kHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                  : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                        2,
                        const_cast<void*>(matrix),
                        sizes,
                        strides,
                        box,
                        steps,
                        CU_TENSOR_MAP_INTERLEAVE_NONE,
                        CU_TENSOR_MAP_SWIZZLE_128B,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  OBS_CHECK(status == CUDA_SUCCESS,
            "a matrix of ",
            rows,
            " x ",
            cols,
            " must fit a tensor map, got CUresult ",
            static_cast<int>(status));
  return map;
}

// Once a launch, as the attributes come from memory.
void check_capability(int device) {
  int major = 0;
  int minor = 0;
  OBS_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  OBS_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  OBS_CHECK(major == 9 && minor == 0,
            "wgmma needs compute capability 9.0, device ",
            device,
            " has ",
            major,
            ".",
            minor);
}

constexpr int kKnownDevices = 64;  // of which answers of the runtime are kept

int multiprocessors_of(int device) {
  static std::array<std::atomic<int>, kKnownDevices> known{};
  const bool keeps = device >= 0 && device < kKnownDevices;
  int count = keeps ? known[static_cast<size_t>(device)].load(std::memory_order_relaxed) : 0;
  if (count != 0) return count;
  OBS_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  if (keeps) known[static_cast<size_t>(device)].store(count, std::memory_order_relaxed);
  return count;
}

// Clusters of `kernel` that a device runs at a time, after letting it take that much shared memory.
// Asked once for each kernel, device and cluster: the two calls cost more than a launch.
template <auto kKernel, int kBytes>
int clusters_at_once(int device, int cluster) {
  static std::array<std::array<std::atomic<int>, 2>, kKnownDevices> known{};
  const bool keeps = device >= 0 && device < kKnownDevices;
  std::atomic<int>* kept =
      keeps ? &known[static_cast<size_t>(device)][static_cast<size_t>(cluster - 1)] : nullptr;
  int count = keeps ? kept->load(std::memory_order_acquire) : 0;
  if (count != 0) return count;
  OBS_CUDA_CHECK(
      cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(cluster));
  config.blockDim = dim3(kSparseThreads);
  config.dynamicSmemBytes = kBytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  OBS_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&count, kKernel, &config));
  OBS_CHECK(
      count > 0, "a cluster of ", cluster, " CTAs with ", kBytes, " bytes each must fit the GPU");
  if (keeps) kept->store(count, std::memory_order_release);
  return count;
}

template <typename Element, int kParts, int kTokens, bool kFeatureX>
LaunchPlan launch(const SparseLinearParams& params,
                  const SparseTileShape& tile,
                  int device,
                  cudaStream_t stream) {
  constexpr auto kernel = sparse_linear_kernel<Element, kParts, kTokens, kFeatureX>;
  constexpr int kBytes = SparseTile<kParts, kTokens>::kBytes;

  SparseArgs<Element> args{};
  args.packed = static_cast<const uint8_t*>(params.packed);
  args.bias = static_cast<const Element*>(params.bias);
  args.y = static_cast<Element*>(params.y);
  args.rows = params.rows;
  args.tokens = params.tokens;
  args.steps = static_cast<int>(round_up(params.cols, kStepCols) / kStepCols);
  args.weight_tiles = static_cast<int>(round_up(params.rows, kPackedRows) / kPackedRows);
  const int group_rows = tile.rows * tile.cluster;
  args.row_groups = static_cast<int>(round_up(params.rows, group_rows) / group_rows);
  args.token_tiles = static_cast<int>(round_up(params.tokens, kTokens) / kTokens);
  args.cluster = tile.cluster;
  args.activation = params.activation;
  args.feature_y = params.feature_y;
  const int64_t y_cols = params.feature_y ? params.tokens : params.rows;
  args.boxes = y_cols % 8 == 0 && aligned(params.y, 16);

  const CUtensorMap x_map = params.feature_x
                                ? boxes_of(params.x, params.cols, params.tokens, params.type)
                                : boxes_of(params.x, params.tokens, params.cols, params.type);
  const CUtensorMap y_map =
      args.boxes
          ? boxes_of(params.y, params.feature_y ? params.rows : params.tokens, y_cols, params.type)
          : x_map;

  const int64_t clusters =
      std::min<int64_t>(static_cast<int64_t>(args.row_groups) * args.token_tiles,
                        clusters_at_once<kernel, kBytes>(device, tile.cluster));
  const auto blocks = static_cast<unsigned>(clusters * tile.cluster);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(tile.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kSparseThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  OBS_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, x_map, y_map, args));
  count_launch();
  return {"sparse_linear", tile.name, blocks, kSparseThreads};
}

template <typename Element, bool kFeatureX>
LaunchPlan launch_tile(const SparseLinearParams& params,
                       const SparseTileShape& tile,
                       int device,
                       cudaStream_t stream) {
  if (tile.rows == 256) {
    return tile.tokens == 192 ? launch<Element, 2, 192, kFeatureX>(params, tile, device, stream)
                              : launch<Element, 2, 128, kFeatureX>(params, tile, device, stream);
  }
  switch (tile.tokens) {
    case 128:
      return launch<Element, 1, 128, kFeatureX>(params, tile, device, stream);
    case 192:
      return launch<Element, 1, 192, kFeatureX>(params, tile, device, stream);
    default:
      return launch<Element, 1, 256, kFeatureX>(params, tile, device, stream);
  }
}

template <typename Element>
LaunchPlan launch_layout(const SparseLinearParams& params,
                         const SparseTileShape& tile,
                         int device,
                         cudaStream_t stream) {
  return params.feature_x ? launch_tile<Element, true>(params, tile, device, stream)
                          : launch_tile<Element, false>(params, tile, device, stream);
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
  OBS_CHECK(params.rows >= 0 && params.cols >= 0 && params.tokens >= 0,
            "sizes must not be negative, got rows = ",
            params.rows,
            ", cols = ",
            params.cols,
            ", tokens = ",
            params.tokens);
  OBS_CHECK(params.config >= -1 && params.config < kNumSparseTiles,
            "config must be in -1 .. ",
            kNumSparseTiles - 1,
            ", got ",
            params.config);
  if (params.rows == 0 || params.tokens == 0) return {"sparse_linear", "empty", 0, 0};
  OBS_CHECK(params.cols > 0, "cols must be positive, got 0");
  constexpr int64_t kLimit = int64_t{1} << 30;  // coordinates of the copy engine are 32-bit
  OBS_CHECK(params.rows < kLimit && params.cols < kLimit && params.tokens < kLimit,
            "sizes must be below 2^30, got rows = ",
            params.rows,
            ", cols = ",
            params.cols,
            ", tokens = ",
            params.tokens);
  const int64_t x_cols = params.feature_x ? params.tokens : params.cols;
  OBS_CHECK(x_cols % 8 == 0 && aligned(params.x, 16),
            "rows of x must be multiples of 16 bytes and x aligned to 16, got ",
            x_cols,
            " elements");
  OBS_CHECK(aligned(params.packed, 16), "packed must be aligned to 16 bytes");
  check_capability(device);
  const DeviceGuard guard(device);
  const int chosen = params.config >= 0
                         ? params.config
                         : choose_sparse_tile(params.rows,
                                              params.tokens,
                                              round_up(params.cols, kStepCols) / kStepCols,
                                              multiprocessors_of(device));
  const SparseTileShape& tile = kSparseTiles[chosen];
  const int64_t tiles = (params.rows / tile.rows + 1) * (params.tokens / tile.tokens + 1);
  OBS_CHECK(tiles < kLimit, "a product of at most 2^30 tiles is taken, got ", tiles);
  return params.type == MatmulType::kHalf
             ? launch_layout<__half>(params, tile, device, stream)
             : launch_layout<__nv_bfloat16>(params, tile, device, stream);
}

}  // namespace obs_kernels
