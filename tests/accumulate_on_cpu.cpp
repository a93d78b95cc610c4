// SPDX-License-Identifier: Apache-2.0
// Accumulates gradients with the kernels of accumulate.cu on the CPU (cuda_on_cpu.h).
// Arguments: num_blocks size num_samples row_stride type grads_shift fisher_shift (in elements, off
// the alignment) scale. stdin: fisher, then the rows of grads up to the last element of the last.
// stdout: the path, a line break, then fisher.
#include <cstdio>
#include <cstdlib>

#include "buffer_on_cpu.h"
#include "obs_kernels/accumulate.h"

int main(int, char** argv) {
  obs_kernels::AccumulateParams params{};
  params.num_blocks = std::atoll(argv[1]);
  params.size = std::atoll(argv[2]);
  params.num_samples = std::atoll(argv[3]);
  params.row_stride = std::atoll(argv[4]);
  params.grad_type = static_cast<obs_kernels::GradType>(std::atoi(argv[5]));
  params.scale = std::strtof(argv[8], nullptr);
  const bool wide = params.grad_type == obs_kernels::GradType::kFloat32;
  const std::size_t element = wide ? sizeof(float) : sizeof(short);
  const auto blocks = static_cast<std::size_t>(params.num_blocks);
  const auto size = static_cast<std::size_t>(params.size);
  const auto samples = static_cast<std::size_t>(params.num_samples);
  const auto stride = static_cast<std::size_t>(params.row_stride);
  const std::size_t elements = samples > 0 ? (samples - 1) * stride + blocks * size : 0;

  Buffer fisher(blocks * size * size * sizeof(float),
                static_cast<std::size_t>(std::atoll(argv[7])) * sizeof(float));
  Buffer grads(elements * element, static_cast<std::size_t>(std::atoll(argv[6])) * element);
  fisher.read();
  grads.read();
  params.fisher = reinterpret_cast<float*>(fisher.data());
  params.grads = grads.data();
  std::printf("%s\n", obs_kernels::accumulate_fisher(params, 0, nullptr).path);
  if (!fisher.unharmed_before()) {
    std::fputs("written before fisher\n", stderr);
    return 3;
  }
  fisher.write();
}
