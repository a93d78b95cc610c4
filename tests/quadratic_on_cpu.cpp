// SPDX-License-Identifier: Apache-2.0
// Runs the kernels of quadratic.cu on the CPU (cuda_on_cpu.h). Arguments: op ("single" or "loss")
// num_weights num_blocks size damp_each type shift (in elements, off the alignment).
// stdin: damp (one value, or one a block), blocks, weight, mask. stdout: the path, a line break,
// then the updated weight, or the loss of each block.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "buffer_on_cpu.h"
#include "obs_kernels/update.h"

int main(int, char** argv) {
  const bool single = std::strcmp(argv[1], "single") == 0;
  const auto weights = static_cast<std::size_t>(std::atoll(argv[2]));
  const auto blocks = static_cast<std::size_t>(std::atoll(argv[3]));
  const auto size = static_cast<std::size_t>(std::atoll(argv[4]));
  const bool each = std::atoi(argv[5]) != 0;
  const auto type = static_cast<obs_kernels::WeightType>(std::atoi(argv[6]));
  const auto shift = static_cast<std::size_t>(std::atoll(argv[7]));
  const std::size_t element = type == obs_kernels::WeightType::kFloat32 ? 4 : 2;

  Buffer damp((each ? blocks : 1) * sizeof(float), shift * sizeof(float));
  Buffer fisher(blocks * size * size * sizeof(float), shift * sizeof(float));
  Buffer weight(weights * element, shift * element);
  Buffer mask(weights, shift);
  Buffer result(single ? weights * element : blocks * sizeof(float),
                shift * (single ? element : sizeof(float)));
  damp.read();
  fisher.read();
  weight.read();
  mask.read();
  obs_kernels::LaunchPlan plan{};
  if (single) {
    obs_kernels::UpdateParams params{};
    params.weight = weight.data();
    params.mask = mask.data();
    params.fisher = reinterpret_cast<const float*>(fisher.data());
    params.updated = result.data();
    params.num_weights = static_cast<int64_t>(weights);
    params.num_blocks = static_cast<int64_t>(blocks);
    params.size = static_cast<int64_t>(size);
    params.type = type;
    plan = obs_kernels::update_single(params, 0, nullptr);
  } else {
    obs_kernels::LossParams params{};
    params.change = weight.data();
    params.fisher = reinterpret_cast<const float*>(fisher.data());
    params.damp = reinterpret_cast<const float*>(damp.data());
    params.damp_each = each;
    params.loss = reinterpret_cast<float*>(result.data());
    params.num_weights = static_cast<int64_t>(weights);
    params.num_blocks = static_cast<int64_t>(blocks);
    params.size = static_cast<int64_t>(size);
    params.type = type;
    plan = obs_kernels::loss_increase(params, 0, nullptr);
  }
  std::printf("%s %s\n", plan.op, plan.path);
  result.write();
}
