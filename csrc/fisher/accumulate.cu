// SPDX-License-Identifier: Apache-2.0
#include "obs_kernels/accumulate.h"

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/check.h"
#include "common/device_guard.h"
#include "common/launch.h"
#include "fisher/accumulate_config.h"
#include "fisher/accumulate_thread.cuh"
#include "fisher/accumulate_tiles.cuh"

namespace obs_kernels {
namespace {

using accumulate::Bfloat16;
using accumulate::Float16;
using accumulate::Float32;

// Bytes of the widest access to gradients that never leaves a Fisher block: of all rows and blocks.
template <typename Element>
int piece_bytes(const AccumulateParams& params) {
  int bytes = 16;
  const auto fits = [&] {
    return aligned(params.grads, bytes) && params.row_stride * Element::kBytes % bytes == 0 &&
           params.size * Element::kBytes % bytes == 0;
  };
  while (bytes > Element::kBytes && !fits()) bytes /= 2;
  return bytes;
}

template <typename Config, typename Element, int kVector>
LaunchPlan launch_thread(const AccumulateParams& params, const char* path, cudaStream_t stream) {
  constexpr int kThreads = Config::kThreads;
  const int64_t blocks = (params.num_blocks - 1) / kThreads + 1;
  const auto grid = static_cast<unsigned>(blocks);
  const bool fisher_aligned = aligned(params.fisher, 16);
  accumulate::accumulate_thread_kernel<Config, Element, kVector>
      <<<grid, kThreads, 0, stream>>>(params, fisher_aligned);
  OBS_CUDA_CHECK(cudaGetLastError());
  return {"accumulate_fisher_", path, blocks, kThreads};
}

template <typename Element, int kSize>
LaunchPlan launch_thread_of(const AccumulateParams& params, cudaStream_t stream) {
  using Config = ThreadConfig<kSize>;
  constexpr int kPowerOfTwo = kSize & -kSize;
  constexpr int kMost = 16 / Element::kBytes;
  constexpr int kWidest = kPowerOfTwo < kMost ? kPowerOfTwo : kMost;
  if (piece_bytes<Element>(params) >= kWidest * Element::kBytes) {
    return launch_thread<Config, Element, kWidest>(params, "thread", stream);
  }
  return launch_thread<Config, Element, 1>(params, "thread_narrow", stream);
}

// By how F is added to, and by the bytes of a copy of gradients where alignment allows less
// than 16.
template <typename Config>
const char* tiles_path(int piece_bytes) {
  switch (piece_bytes) {
    case 16:
      return Config::kDirect ? "tiles" : "bands";
    case 8:
      return Config::kDirect ? "tiles_by_8_bytes" : "bands_by_8_bytes";
    case 4:
      return Config::kDirect ? "tiles_by_4_bytes" : "bands_by_4_bytes";
    default:
      return Config::kDirect ? "tiles_by_2_bytes" : "bands_by_2_bytes";
  }
}

template <typename Config, typename Element, int kVector>
LaunchPlan launch_tiles(const AccumulateParams& params, cudaStream_t stream) {
  const int tile_rows = static_cast<int>((params.size - 1) / kAccumulateTile + 1);
  const TilesShape shape = tiles_shape(params.size,
                                       params.num_samples,
                                       Element::kBytes,
                                       Config::kStageBytes,
                                       piece_bytes<Element>(params),
                                       aligned(params.fisher, 16),
                                       kBlocksByTileRows[tile_rows]);
  const int64_t blocks = (params.num_blocks - 1) / shape.blocks + 1;
  const auto grid = static_cast<unsigned>(blocks);
  const int threads = shape.threads;
  accumulate::accumulate_tiles_kernel<Config, Element, kVector>
      <<<grid, threads, 0, stream>>>(params, shape);
  OBS_CUDA_CHECK(cudaGetLastError());
  return {"accumulate_fisher_", tiles_path<Config>(shape.piece_bytes), blocks, threads};
}

template <typename Element>
LaunchPlan launch(const AccumulateParams& params, cudaStream_t stream) {
  switch (params.size) {
    case 1:
      return launch_thread_of<Element, 1>(params, stream);
    case 2:
      return launch_thread_of<Element, 2>(params, stream);
    case 3:
      return launch_thread_of<Element, 3>(params, stream);
    case 4:
      return launch_thread_of<Element, 4>(params, stream);
    case 5:
      return launch_thread_of<Element, 5>(params, stream);
    case 6:
      return launch_thread_of<Element, 6>(params, stream);
    case 7:
      return launch_thread_of<Element, 7>(params, stream);
    case 8:
      return launch_thread_of<Element, 8>(params, stream);
    default:
      break;
  }
  if (params.size % kAccumulateTile == 0 && aligned(params.fisher, 16)) {
    return launch_tiles<TilesDirect, Element, 4>(params, stream);
  }
  using Bands = std::conditional_t<Element::kBytes == 2, TilesInBandsOf16Bits, TilesInBands>;
  if (params.size % 2 == 0) return launch_tiles<Bands, Element, 2>(params, stream);
  return launch_tiles<Bands, Element, 1>(params, stream);
}

void check(const AccumulateParams& params) {
  OBS_CHECK(params.size >= 1 && params.size <= kMaxAccumulateSize,
            "size must be 1 to ",
            kMaxAccumulateSize,
            ", got ",
            params.size);
  // One block of threads for at least one Fisher block: gridDim.x is the limit.
  OBS_CHECK(params.num_blocks >= 0 && params.num_blocks <= std::numeric_limits<int32_t>::max(),
            "num_blocks must be 0 to 2^31 - 1, got ",
            params.num_blocks);
  // Kernels count samples in 32 bits, and look a few stages ahead.
  OBS_CHECK(params.num_samples >= 0 && params.num_samples <= int64_t{1} << 30,
            "num_samples must be 0 to 2^30, got ",
            params.num_samples);
  OBS_CHECK(params.row_stride >= 0, "row_stride must not be negative, got ", params.row_stride);
  const auto type = static_cast<int>(params.grad_type);
  OBS_CHECK(type >= 0 && type <= 2, "grad_type must be 0 (f32), 1 (f16) or 2 (bf16), got ", type);
}

}  // namespace

LaunchPlan accumulate_fisher(const AccumulateParams& params, int device, cudaStream_t stream) {
  check(params);
  if (params.num_blocks == 0 || params.num_samples == 0) {
    return {"accumulate_fisher_", "empty", 0, 0};
  }
  OBS_CHECK(params.grads && params.fisher,
            "grads and fisher must not be null for ",
            params.num_blocks,
            " blocks");
  const int element_bytes = params.grad_type == GradType::kFloat32 ? 4 : 2;
  OBS_CHECK(aligned(params.grads, element_bytes) && aligned(params.fisher, sizeof(float)),
            "grads and fisher must be aligned to their elements, got ",
            params.grads,
            " and ",
            params.fisher);
  OBS_CHECK(device >= 0, "device must be an index, got ", device);
  const DeviceGuard guard(device);
  const LaunchPlan plan = params.grad_type == GradType::kFloat32 ? launch<Float32>(params, stream)
                          : params.grad_type == GradType::kFloat16
                              ? launch<Float16>(params, stream)
                              : launch<Bfloat16>(params, stream);
  count_launch();
  return plan;
}

}  // namespace obs_kernels
