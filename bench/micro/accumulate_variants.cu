// SPDX-License-Identifier: Apache-2.0
// Times ways to accumulate the Fisher that accumulate_config.h could take, to choose among them:
//
//   nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a -Icsrc -Icsrc/include \
//     bench/micro/accumulate_variants.cu -o build/accumulate_variants && build/accumulate_variants
//
// An argument names the only block size to measure. Prints, for each problem and variant:
// registers, local memory, median microseconds of `kRuns`, GB/s of the floor (gradients read once,
// F read and written once) and its share of the rate of a copy. Every variant is checked first,
// exactly, on whole numbers, and a wrong one is not timed.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "fisher/accumulate_config.h"
#include "fisher/accumulate_thread.cuh"
#include "fisher/accumulate_tiles.cuh"
#include "timing.h"

namespace obs = obs_kernels;
using obs::accumulate::Bfloat16;
using obs::accumulate::Float32;

namespace {

constexpr int64_t kWeights = 14155776;  // six of the matrices of BERT-base

// Whole numbers from -8 to 8, the same on both sides.
__host__ __device__ float gradient(int64_t at) {
  auto bits = static_cast<uint32_t>(at) * 2654435761u;
  bits ^= bits >> 15;
  bits *= 2246822519u;
  bits ^= bits >> 13;
  return static_cast<float>(static_cast<int>(bits % 17u) - 8);
}

template <typename Element>
__global__ void fill_kernel(void* grads, int64_t count) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; at < count; at += step) {
    const float value = gradient(at);
    if constexpr (Element::kBytes == 4) {
      static_cast<float*>(grads)[at] = value;
    } else {
      static_cast<uint16_t*>(grads)[at] = static_cast<uint16_t>(__float_as_uint(value) >> 16);
    }
  }
}

struct Launch {
  unsigned grid;
  unsigned threads;
};

struct Variant {
  std::string name;
  const void* kernel;
  std::function<Launch(const obs::AccumulateParams&)> launch;
};

template <typename Config, typename Element, int kVector>
Variant thread(const char* name) {
  const auto kernel = obs::accumulate::accumulate_thread_kernel<Config, Element, kVector>;
  return {
      name, reinterpret_cast<const void*>(kernel), [kernel](const obs::AccumulateParams& params) {
        const auto grid = static_cast<unsigned>((params.num_blocks - 1) / Config::kThreads + 1);
        kernel<<<grid, Config::kThreads>>>(params, true);
        return Launch{grid, Config::kThreads};
      }};
}

// `blocks` Fisher blocks a CTA; the size must leave 16-byte copies possible, or `piece` says what.
template <typename Config, typename Element, int kVector>
Variant tiles(const char* name, int blocks, int piece = 16) {
  const auto kernel = obs::accumulate::accumulate_tiles_kernel<Config, Element, kVector>;
  return {std::string(name) + ", " + std::to_string(blocks) + " a CTA",
          reinterpret_cast<const void*>(kernel),
          [kernel, blocks, piece](const obs::AccumulateParams& params) {
            const obs::TilesShape shape = obs::tiles_shape(params.size,
                                                           params.num_samples,
                                                           Element::kBytes,
                                                           Config::kStageBytes,
                                                           piece,
                                                           true,
                                                           blocks);
            const auto grid = static_cast<unsigned>((params.num_blocks - 1) / blocks + 1);
            const auto threads = static_cast<unsigned>(shape.threads);
            kernel<<<grid, threads>>>(params, shape);
            return Launch{grid, threads};
          }};
}

bool right(const obs::AccumulateParams& params) {
  const int64_t size = params.size;
  std::vector<float> block(static_cast<std::size_t>(size * size));
  for (int64_t b : {int64_t{0}, int64_t{1}, params.num_blocks / 2, params.num_blocks - 1}) {
    check(cudaMemcpy(block.data(),
                     params.fisher + b * size * size,
                     block.size() * sizeof(float),
                     cudaMemcpyDeviceToHost),
          "copy");
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t j = 0; j < size; ++j) {
        float wanted = 0.0f;
        for (int64_t s = 0; s < params.num_samples; ++s) {
          const int64_t row = s * params.row_stride + b * size;
          wanted += gradient(row + i) * gradient(row + j);
        }
        if (block[static_cast<std::size_t>(i * size + j)] != wanted) return false;
      }
    }
  }
  return true;
}

float copy_rate() {
  constexpr std::size_t kBytes = std::size_t{1} << 30;
  char* memory = nullptr;
  check(cudaMalloc(&memory, 2 * kBytes), "malloc");
  const float us = median_us([&] {
    check(cudaMemcpyAsync(memory + kBytes, memory, kBytes, cudaMemcpyDeviceToDevice), "copy");
  });
  check(cudaFree(memory), "free");
  return 2e-3f * static_cast<float>(kBytes) / us;
}

template <typename Element>
void measure(int size, int samples, float copy, const std::vector<Variant>& variants) {
  obs::AccumulateParams params{};
  params.grad_type = Element::kBytes == 4 ? obs::GradType::kFloat32 : obs::GradType::kBfloat16;
  params.size = size;
  params.num_blocks = kWeights / size;
  params.num_samples = samples;
  params.row_stride = params.num_blocks * size;
  params.scale = 1.0f;
  const int64_t count = samples * params.row_stride;
  const auto grad_bytes = static_cast<std::size_t>(count * Element::kBytes);
  const auto fisher_bytes = static_cast<std::size_t>(params.row_stride * size) * sizeof(float);
  void* grads = nullptr;
  check(cudaMalloc(&grads, grad_bytes), "malloc");
  check(cudaMalloc(&params.fisher, fisher_bytes), "malloc");
  params.grads = grads;
  fill_kernel<Element><<<2048, 256>>>(grads, count);
  const double bytes = static_cast<double>(grad_bytes) + 2.0 * static_cast<double>(fisher_bytes);
  std::printf("D = %d, S = %d, %s, copy %.0f GB/s\n",
              size,
              samples,
              Element::kBytes == 4 ? "f32" : "bf16",
              static_cast<double>(copy));
  for (const Variant& variant : variants) {
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, variant.kernel), "attributes");
    check(cudaMemset(params.fisher, 0, fisher_bytes), "clear");
    const Launch launch = variant.launch(params);
    check(cudaDeviceSynchronize(), variant.name.c_str());
    int resident = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
              &resident, variant.kernel, static_cast<int>(launch.threads), 0),
          "occupancy");
    if (!right(params)) {
      std::printf("  %-34s WRONG\n", variant.name.c_str());
      continue;
    }
    const float us = median_us([&] { variant.launch(params); });
    check(cudaGetLastError(), "launch");
    const double rate = 1e-3 * bytes / us;
    std::printf(
        "  %-34s regs %3d local %3zu  %2d x %3u threads an SM  %8.1f us  %6.0f GB/s  %.2f\n",
        variant.name.c_str(),
        attributes.numRegs,
        attributes.localSizeBytes,
        resident,
        launch.threads,
        us,
        rate,
        rate / copy);
  }
  check(cudaFree(grads), "free");
  check(cudaFree(params.fisher), "free");
}

template <int kSize>
struct AskedEarly : obs::ThreadConfig<kSize> {
  static constexpr bool kPrefetch = true;
};
template <int kSize>
struct FewAhead : obs::ThreadConfig<kSize> {
  static constexpr int kWordsAhead = 16;
  static constexpr int kMinBlocks = kSize > 4 ? 6 : 10;
};
template <int kSize>
struct SmallCtas : obs::ThreadConfig<kSize> {
  static constexpr int kThreads = 64;
  static constexpr int kMinBlocks = 2 * obs::ThreadConfig<kSize>::kMinBlocks;
};

using obs::StagedConfig;
template <bool kDirect>
using Asked = StagedConfig<kDirect, 3, 8192, true>;
template <bool kDirect>
using TwoStages = StagedConfig<kDirect, 2, 8192>;
template <bool kDirect>
using LongStages = StagedConfig<kDirect, 3, 14336>;
template <bool kDirect>
using OneWarp = StagedConfig<kDirect, 3, 2048, false, 32, 16>;
template <bool kDirect>
using EightWarps = StagedConfig<kDirect, 3, 16384, false, 256, 2>;

template <typename Element, int kSize>
std::vector<Variant> small_variants() {
  constexpr int kMost = 16 / Element::kBytes;
  constexpr int kVector = kSize < kMost ? kSize : kMost;
  std::vector<Variant> all = {
      thread<obs::ThreadConfig<kSize>, Element, kVector>("thread"),
      thread<AskedEarly<kSize>, Element, kVector>("thread, F asked for early"),
      thread<FewAhead<kSize>, Element, kVector>("thread, half the words ahead"),
      thread<SmallCtas<kSize>, Element, kVector>("thread, two warps a CTA")};
  if (kSize == 8) {
    all.push_back(tiles<StagedConfig<true, 3, 16384, false, 128, 4>, Element, 4>("tiles", 128));
    all.push_back(tiles<OneWarp<true>, Element, 4>("one warp", 32));
  }
  return all;
}

template <typename Element>
std::vector<Variant> large_variants(int size) {
  const int blocks = obs::kBlocksByTileRows[(size - 1) / obs::kAccumulateTile + 1];
  if (size == 50) {
    const int piece = Element::kBytes == 4 ? 8 : 4;
    return {tiles<obs::TilesInBands, Element, 2>("bands", blocks, piece),
            tiles<Asked<false>, Element, 2>("bands, F asked for early", blocks, piece),
            tiles<TwoStages<false>, Element, 2>("bands, two stages", blocks, piece),
            tiles<LongStages<false>, Element, 2>("bands, 14 KB stages", blocks, piece),
            tiles<OneWarp<false>, Element, 2>("bands, one warp", 1, piece),
            tiles<EightWarps<false>, Element, 2>("bands, eight warps", 8, piece)};
  }
  std::vector<Variant> all = {tiles<obs::TilesDirect, Element, 4>("tiles", blocks),
                              tiles<Asked<true>, Element, 4>("tiles, F asked for early", blocks),
                              tiles<TwoStages<true>, Element, 4>("tiles, two stages", blocks),
                              tiles<LongStages<true>, Element, 4>("tiles, 14 KB stages", blocks),
                              tiles<obs::TilesInBands, Element, 4>("bands", blocks)};
  if (size == 16) {
    all.push_back(tiles<OneWarp<true>, Element, 4>("one warp", 10));
    all.push_back(tiles<obs::TilesDirect, Element, 4>("tiles", 21));
  } else if (size == 32) {
    all.push_back(tiles<OneWarp<true>, Element, 4>("one warp", 3));
    all.push_back(tiles<obs::TilesDirect, Element, 4>("tiles", 6));
  } else if (size == 64) {
    all.push_back(tiles<EightWarps<true>, Element, 4>("eight warps", 7));
    all.push_back(tiles<obs::TilesDirect, Element, 4>("tiles", 2));
  }
  return all;
}

template <typename Element>
void measure_all(int only, float copy) {
  for (int samples : {32, 64}) {
    if (only == 0 || only == 4) {
      measure<Element>(4, samples, copy, small_variants<Element, 4>());
    }
    if (only == 0 || only == 8) {
      measure<Element>(8, samples, copy, small_variants<Element, 8>());
    }
    for (int size : {16, 32, 50, 64, 128}) {
      if (only == 0 || only == size) {
        measure<Element>(size, samples, copy, large_variants<Element>(size));
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int only = argc > 1 ? std::atoi(argv[1]) : 0;
  const float copy = copy_rate();
  measure_all<Bfloat16>(only, copy);
  measure_all<Float32>(only, copy);
  return 0;
}
