// SPDX-License-Identifier: Apache-2.0
// Updates weights with the kernels of update.cu on the CPU (cuda_on_cpu.h).
// Arguments: num_weights num_blocks size damp_each type in_place shift (in elements, off the
// alignment). stdin: damp (one value, or one a block), Fisher blocks, weight, mask. stdout: the
// path, a line break, then the updated weight and info.
#include <cstdio>
#include <cstdlib>

#include "buffer_on_cpu.h"
#include "obs_kernels/update.h"

int main(int, char** argv) {
  obs_kernels::UpdateParams params{};
  params.num_weights = std::atoll(argv[1]);
  params.num_blocks = std::atoll(argv[2]);
  params.size = std::atoll(argv[3]);
  params.damp_each = std::atoi(argv[4]) != 0;
  params.type = static_cast<obs_kernels::WeightType>(std::atoi(argv[5]));
  const bool in_place = std::atoi(argv[6]) != 0;
  const auto shift = static_cast<std::size_t>(std::atoll(argv[7]));
  const auto weights = static_cast<std::size_t>(params.num_weights);
  const auto blocks = static_cast<std::size_t>(params.num_blocks);
  const auto size = static_cast<std::size_t>(params.size);
  const std::size_t element = params.type == obs_kernels::WeightType::kFloat32 ? 4 : 2;

  Buffer damp((params.damp_each ? blocks : 1) * sizeof(float), shift * sizeof(float));
  Buffer fisher(blocks * size * size * sizeof(float), shift * sizeof(float));
  Buffer weight(weights * element, shift * element);
  Buffer mask(weights, shift);
  Buffer updated(in_place ? 0 : weights * element, shift * element);
  Buffer info(blocks * sizeof(int), shift * sizeof(int));
  damp.read();
  fisher.read();
  weight.read();
  mask.read();
  params.damp = reinterpret_cast<const float*>(damp.data());
  params.fisher = reinterpret_cast<const float*>(fisher.data());
  params.weight = weight.data();
  params.mask = mask.data();
  params.updated = in_place ? weight.data() : updated.data();
  params.info = reinterpret_cast<int*>(info.data());
  std::printf("%s\n", obs_kernels::update_joint(params, 0, nullptr).path);
  (in_place ? weight : updated).write();
  info.write();
}
