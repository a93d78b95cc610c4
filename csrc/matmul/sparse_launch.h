// SPDX-License-Identifier: Apache-2.0
// The host side that all kernels of the sparse product share: tensor maps, how many CTAs run at a
// time, checks, and the launch.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "common/check.h"
#include "common/launch.h"
#include "matmul/sparse_config.h"
#include "matmul/sparse_layout.cuh"
#include "obs_kernels/matmul.h"

namespace obs_kernels {

// From the driver that the runtime loaded: no library to link, none to miss on a machine without.
inline PFN_cuTensorMapEncodeTiled_v12000 encode_function() {
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

// A row-major matrix of 16-bit elements in boxes, those of 64 columns swizzled; outside it reads
// zeros.
inline CUtensorMap boxes_of(const void* matrix,
                            int64_t rows,
                            int64_t cols,
                            MatmulType type,
                            int box_rows = 64,
                            int box_cols = 64) {
  CUtensorMap map{};
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(cols) * 2};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_cols), static_cast<cuuint32_t>(box_rows)};
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
                        box_cols == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
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
inline void check_capability(int device) {
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

inline constexpr int kKnownDevices = 64;  // of which answers of the runtime are kept

inline int multiprocessors_of(int device) {
  static std::array<std::atomic<int>, kKnownDevices> known{};
  const bool keeps = device >= 0 && device < kKnownDevices;
  int count = keeps ? known[static_cast<size_t>(device)].load(std::memory_order_relaxed) : 0;
  if (count != 0) return count;
  OBS_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  if (keeps) known[static_cast<size_t>(device)].store(count, std::memory_order_relaxed);
  return count;
}

inline constexpr int kMostCluster = 8;  // CTAs

// Clusters of `kernel` that a device runs at a time, after letting it take that much shared memory.
// Asked once for each kernel, device and cluster: the two calls cost more than a launch.
template <auto kKernel, int kBytes, int kThreads>
int clusters_at_once(int device, int cluster) {
  static std::array<std::array<std::atomic<int>, kMostCluster>, kKnownDevices> known{};
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
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kBytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  OBS_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&count, kKernel, &config));
  OBS_CHECK(
      count > 0, "a cluster of ", cluster, " CTAs with ", kBytes, " bytes each must fit the GPU");
  if (keeps) kept->store(count, std::memory_order_release);
  return count;
}

// What all kernels of the product are told alike, of clusters of so many rows and tokens, by what
// the table of tiles says.
template <typename Element>
SparseArgs<Element> sparse_args(const SparseLinearParams& params,
                                int group_rows,
                                int group_tokens,
                                int cluster,
                                int tile_split) {
  SparseArgs<Element> args{};
  args.packed = static_cast<const uint8_t*>(params.packed);
  args.bias = static_cast<const Element*>(params.bias);
  args.y = static_cast<Element*>(params.y);
  args.rows = params.rows;
  args.tokens = params.tokens;
  args.steps = static_cast<int>(steps_of(params.cols));
  args.weight_tiles = static_cast<int>(parts_of(params.rows, kPackedRows));
  args.row_groups = static_cast<int>(parts_of(params.rows, group_rows));
  args.token_groups = static_cast<int>(parts_of(params.tokens, group_tokens));
  args.cluster = cluster;
  args.split = static_cast<int>(split_of(tile_split, args.steps));
  args.activation = params.activation;
  args.feature_y = params.feature_y;
  args.boxes = (params.feature_y ? params.tokens : params.rows) % 8 == 0 && aligned(params.y, 16);
  return args;
}

// Of 64 rows of W and of the tokens that leave at a time.
template <typename Tile>
CUtensorMap boxes_of_y(const SparseLinearParams& params) {
  constexpr int kTokens = Tile::kSplit ? kPieceTokens : kSlabTokens;
  return params.feature_y
             ? boxes_of(params.y, params.rows, params.tokens, params.type, kPartRows, kTokens)
             : boxes_of(params.y, params.tokens, params.rows, params.type, kTokens, kPartRows);
}

// As many clusters as there are tiles, or, where a CTA computes several, as run at a time. Returns
// the CTAs. They may come to the GPU while the kernel before is about to end (programmatic
// dependent launch), and wait there for its end: of a product of 10 us, launching and setting up
// take more than one.
template <auto kKernel, typename Tile, typename Element, typename... Arguments>
unsigned launch_clusters(const SparseArgs<Element>& args,
                         int device,
                         cudaStream_t stream,
                         const Arguments&... arguments) {
  OBS_CHECK(args.split <= std::max(Tile::kMostSplit, 1),
            "no kernel shares out a tile among ",
            args.split);
  const int cluster = args.cluster * args.split;
  const int at_once = clusters_at_once<kKernel, Tile::kBytes, Tile::kThreads>(device, cluster);
  const int64_t tiles = static_cast<int64_t>(args.row_groups) * args.token_groups;
  const int64_t clusters = Tile::kSplit ? tiles : std::min<int64_t>(tiles, at_once);
  const auto blocks = static_cast<unsigned>(clusters * cluster);
  std::array<cudaLaunchAttribute, 2> attributes{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(Tile::kThreads);
  config.dynamicSmemBytes = Tile::kBytes;
  config.stream = stream;
  config.attrs = attributes.data();
  config.numAttrs = static_cast<unsigned>(attributes.size());
  OBS_CUDA_CHECK(cudaLaunchKernelEx(&config, kKernel, arguments...));
  count_launch();
  return blocks;
}

// Sizes and addresses that every product wants. `config` is of `configs`.
inline void check_product(const SparseLinearParams& params, int configs) {
  OBS_CHECK(params.rows >= 0 && params.cols >= 0 && params.tokens >= 0,
            "sizes must not be negative, got rows = ",
            params.rows,
            ", cols = ",
            params.cols,
            ", tokens = ",
            params.tokens);
  OBS_CHECK(params.config >= -1 && params.config < configs,
            "config must be in -1 .. ",
            configs - 1,
            ", got ",
            params.config);
  constexpr int64_t kLimit = int64_t{1} << 30;  // coordinates of the copy engine are 32-bit
  OBS_CHECK(params.rows < kLimit && params.cols < kLimit && params.tokens < kLimit,
            "sizes must be below 2^30, got rows = ",
            params.rows,
            ", cols = ",
            params.cols,
            ", tokens = ",
            params.tokens);
  OBS_CHECK(aligned(params.x, 16) && aligned(params.packed, 16),
            "x and packed must be aligned to 16 bytes");
}

inline void check_tiles(const SparseLinearParams& params, int rows, int tokens, int tile_split) {
  constexpr int64_t kLimit = int64_t{1} << 30;  // numbers of tiles are 32-bit, as is a stride more
  const int64_t split = split_of(tile_split, steps_of(params.cols));
  const int64_t tiles = (params.rows / rows + 1) * (params.tokens / tokens + 1) * split;
  OBS_CHECK(tiles < kLimit, "a product of less than 2^30 tiles is taken, got ", tiles);
}

}  // namespace obs_kernels
