// SPDX-License-Identifier: Apache-2.0
// Times ways to spread a matrix over lanes that inverse_config.h could take, to choose among them:
//
//   nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a -Icsrc -Icsrc/include \
//     bench/micro/inverse_variants.cu -o build/inverse_variants && build/inverse_variants
//
// Prints, for each size and variant: registers, local memory, median microseconds of `kRuns`, GB/s
// and the share of a copy of the same bytes in the same run. Every variant is checked against the
// identity first, and a wrong one is not timed.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "fisher/inverse_config.h"
#include "fisher/inverse_group.cuh"
#include "fisher/inverse_solo.cuh"
#include "timing.h"

namespace obs = obs_kernels;

namespace {

// A A^T / size + I / 4 of uniform numbers, a few different matrices repeated.
std::vector<float> random_spd(int64_t blocks, int size) {
  constexpr int64_t kDifferent = 16;
  std::vector<float> some(static_cast<std::size_t>(kDifferent * size * size));
  uint32_t state = 12345;
  std::vector<float> factor(static_cast<std::size_t>(size * size));
  for (int64_t b = 0; b < kDifferent; ++b) {
    for (float& value : factor) {
      state = state * 1664525u + 1013904223u;
      value = static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
    }
    for (int i = 0; i < size; ++i) {
      for (int j = 0; j < size; ++j) {
        float sum = i == j ? 0.25f * static_cast<float>(size) : 0.0f;
        for (int k = 0; k < size; ++k) sum += factor[i * size + k] * factor[j * size + k];
        some[(b * size + i) * size + j] = sum / static_cast<float>(size);
      }
    }
  }
  std::vector<float> all(static_cast<std::size_t>(blocks * size * size));
  const int64_t each = int64_t{size} * size;
  for (int64_t b = 0; b < blocks; ++b) {
    std::copy_n(some.begin() + b % kDifferent * each, each, all.begin() + b * each);
  }
  return all;
}

double residual(const std::vector<float>& matrices, const std::vector<float>& inverse, int size) {
  double worst = 0.0;
  const auto last = static_cast<int64_t>(matrices.size()) / size / size - 1;
  for (int64_t b : {int64_t{0}, int64_t{1}, last}) {
    for (int i = 0; i < size; ++i) {
      for (int j = 0; j < size; ++j) {
        double sum = i == j ? -1.0 : 0.0;
        for (int k = 0; k < size; ++k) {
          sum += double{matrices[(b * size + i) * size + k]} * inverse[(b * size + k) * size + j];
        }
        worst = std::max(worst, std::fabs(sum));
      }
    }
  }
  return worst;
}

struct Variant {
  std::string name;
  const void* kernel;
  int threads;
  int matrices;  // of a block of threads
};

template <int kSize>
Variant solo(const char* name) {
  using Config = obs::SoloConfig<kSize>;
  return {name,
          reinterpret_cast<const void*>(obs::inverse::invert_solo_kernel<Config, 4>),
          Config::kThreads,
          Config::kThreads};
}

template <typename Config>
Variant group(const char* name) {
  return {name,
          reinterpret_cast<const void*>(obs::inverse::invert_group_kernel<Config, 4>),
          Config::kThreads,
          Config::kThreads / Config::kLanes};
}

void measure(int size, int64_t blocks, const std::vector<Variant>& variants) {
  const std::vector<float> matrices = random_spd(blocks, size);
  const std::size_t bytes = matrices.size() * sizeof(float);
  float* in = nullptr;
  float* out = nullptr;
  float* damp = nullptr;
  int32_t* info = nullptr;
  check(cudaMalloc(&in, bytes), "malloc");
  check(cudaMalloc(&out, bytes), "malloc");
  check(cudaMalloc(&damp, sizeof(float)), "malloc");
  check(cudaMalloc(&info, static_cast<std::size_t>(blocks) * sizeof(int32_t)), "malloc");
  check(cudaMemset(damp, 0, sizeof(float)), "memset");
  check(cudaMemcpy(in, matrices.data(), bytes, cudaMemcpyHostToDevice), "copy");
  const float floor_us =
      median_us([&] { check(cudaMemcpyAsync(out, in, bytes, cudaMemcpyDeviceToDevice), "copy"); });
  std::printf("size %d, %lld matrices: copy %.0f us, %.0f GB/s\n",
              size,
              static_cast<long long>(blocks),
              floor_us,
              2e-3 * static_cast<double>(bytes) / floor_us);
  for (const Variant& variant : variants) {
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, variant.kernel), "attributes");
    obs::InvertParams params{in, damp, false, out, info, blocks, size};
    const auto grid = static_cast<unsigned>((blocks - 1) / variant.matrices + 1);
    const auto launch = [&] {
      void* arguments[] = {&params};
      const auto threads = static_cast<unsigned>(variant.threads);
      check(cudaLaunchKernel(variant.kernel, dim3(grid), dim3(threads), arguments, 0, nullptr),
            "launch");
    };
    check(cudaMemset(out, 0xFF, bytes), "poison");
    launch();
    std::vector<float> inverse(matrices.size());
    check(cudaMemcpy(inverse.data(), out, bytes, cudaMemcpyDeviceToHost), "copy");
    const double error = residual(matrices, inverse, size);
    if (!(error < 1e-3)) {
      std::printf("  %-24s WRONG, residual %g\n", variant.name.c_str(), error);
      continue;
    }
    const float us = median_us(launch);
    std::printf("  %-24s regs %3d local %3zu  %8.1f us  %6.0f GB/s  share %.2f\n",
                variant.name.c_str(),
                attributes.numRegs,
                attributes.localSizeBytes,
                us,
                2e-3 * static_cast<double>(bytes) / us,
                floor_us / us);
  }
  for (void* memory : {static_cast<void*>(in), static_cast<void*>(out), static_cast<void*>(damp)}) {
    check(cudaFree(memory), "free");
  }
  check(cudaFree(info), "free");
}

}  // namespace

int main() {
  using obs::GroupConfig;
  measure(4, 4000000, {solo<4>("a thread each")});
  measure(8, 2000000, {solo<8>("a thread each")});
  measure(16,
          500000,
          {group<obs::Full16>("4x2 lanes"),
           group<obs::Group16>("4x2, sizes from 9"),
           group<GroupConfig<16, 2, 2, 8, 8, 64, 8>>("2x2 lanes"),
           group<GroupConfig<16, 4, 4, 4, 4, 128, 8>>("4x4 lanes")});
  measure(32,
          200000,
          {group<obs::Full32>("4x4 lanes"),
           group<obs::Group32>("4x4, sizes from 17"),
           group<GroupConfig<32, 4, 2, 8, 16, 64, 6>>("4x2 lanes"),
           group<GroupConfig<32, 8, 4, 4, 8, 128, 7>>("8x4 lanes")});
  measure(48, 200000, {group<obs::Group48>("8x4 lanes, sizes from 33")});
  measure(50,
          200000,
          {group<obs::Group52>("8x4 lanes"),
           group<GroupConfig<49, 8, 4, 7, 13, 64, 8>>("8x4, 16 warps"),
           group<GroupConfig<49, 4, 4, 13, 13, 64, 5>>("4x4 lanes")});
  measure(64,
          200000,
          {group<obs::Full64>("8x4 lanes"),
           group<obs::Group64>("8x4, sizes from 53"),
           group<GroupConfig<64, 8, 4, 8, 16, 32, 16>>("8x4, 1 warp a block")});
  measure(96,
          100000,
          {group<obs::Group96>("16x8 threads"),
           group<GroupConfig<65, 8, 8, 12, 12, 64, 6>>("8x8 threads, spilling")});
  measure(128,
          61035,
          {group<obs::Group128>("16x8 threads"),
           group<GroupConfig<97, 16, 8, 8, 16, 128, 4>>("16x8, 4 blocks"),
           group<GroupConfig<97, 8, 8, 16, 16, 64, 4>>("8x8 threads")});
  return 0;
}
