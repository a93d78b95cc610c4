// SPDX-License-Identifier: Apache-2.0
// Runs the kernels of obs_kernels/choice.h on the CPU (cuda_on_cpu.h).
// Arguments: operation num_groups n m damp_each has_alive update shift (in elements, off the
// alignment). stdout: the path, a line break, then what the operation gives.
//   finish, greedy: damp, weight, fisher, alive, (finish) mask -> mask, saliency, info, new weight
//   pairwise: weight, inverse, alive -> mask
//   models: inverse, unit -> model
//   sums: saliency of rows -> of panels; n is v, and m the groups of a row
// update: 0 = no new weight, 1 = into memory of its own, 2 = in place.
#include "obs_kernels/choice.h"

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "buffer_on_cpu.h"

namespace {

template <typename T>
T* as(Buffer& buffer) {
  return reinterpret_cast<T*>(buffer.data());
}

void finish(const char* path, const std::vector<Buffer*>& results) {
  std::printf("%s\n", path);
  for (Buffer* buffer : results) buffer->write();
}

}  // namespace

int main(int, char** argv) {
  const std::string operation = argv[1];
  const auto number = [&](int at) { return std::atoll(argv[at]); };
  const auto groups = static_cast<std::size_t>(number(2));
  const auto m = static_cast<std::size_t>(number(4));
  const bool has_alive = number(6) != 0;
  const auto update = number(7);
  const auto shift = static_cast<std::size_t>(number(8));
  const std::size_t row = groups * m * sizeof(float);

  if (operation == "sums") {
    const auto v = static_cast<std::size_t>(number(3));
    Buffer each(groups * sizeof(float), 0), sums(groups / v * sizeof(float), 0);
    each.read();
    obs_kernels::PanelParams params{};
    params.groups.num_groups = number(2);
    params.groups.saliency = as<float>(each);
    params.saliency = as<float>(sums);
    params.v = number(3);
    params.wide = number(4);
    finish(obs_kernels::sum_panels(params, 0, nullptr).path, {&sums});
    return 0;
  }
  if (operation == "models") {
    Buffer inverse(row * m, 0), unit(groups * sizeof(float), 0);
    Buffer model(row * m, shift * sizeof(float));
    inverse.read();
    unit.read();
    obs_kernels::PairModelParams params{};
    params.inverse = as<const float>(inverse);
    params.unit = as<const float>(unit);
    params.model = as<float>(model);
    params.num_groups = number(2);
    params.m = number(4);
    finish(obs_kernels::pair_models(params, 0, nullptr).path, {&model});
    return 0;
  }
  Buffer weight(row, shift * sizeof(float));
  Buffer alive(has_alive ? groups * m : 0, shift);
  Buffer mask(groups * m, shift);
  if (operation == "pairwise") {
    Buffer inverse(row * m, 0);
    for (Buffer* buffer : {&weight, &inverse, &alive}) buffer->read();
    obs_kernels::PairwiseParams params{};
    params.weight = as<const float>(weight);
    params.inverse = as<const float>(inverse);
    params.alive = has_alive ? as<const unsigned char>(alive) : nullptr;
    params.mask = as<unsigned char>(mask);
    params.num_groups = number(2);
    params.n = number(3);
    params.m = number(4);
    finish(obs_kernels::search_pairwise(params, 0, nullptr).path, {&mask});
    return 0;
  }
  obs_kernels::SearchParams params{};
  params.num_groups = number(2);
  params.n = number(3);
  params.m = number(4);
  params.damp_each = number(5) != 0;
  Buffer damp((params.damp_each ? groups : 1) * sizeof(float), 0);
  Buffer fisher(row * m, shift * sizeof(float));
  Buffer saliency(groups * sizeof(float), 0);
  Buffer info(groups * sizeof(int), 0);
  Buffer fresh(update == 1 ? row : 0, shift * sizeof(float));
  for (Buffer* buffer : {&damp, &weight, &fisher, &alive}) buffer->read();
  if (operation == "finish") mask.read();
  params.damp = as<const float>(damp);
  params.weight = as<const float>(weight);
  params.fisher = as<const float>(fisher);
  params.alive = has_alive ? as<const unsigned char>(alive) : nullptr;
  params.mask = as<unsigned char>(mask);
  params.saliency = as<float>(saliency);
  params.info = as<int>(info);
  params.new_weight = update == 0 ? nullptr : as<float>(update == 1 ? fresh : weight);
  const auto run =
      operation == "finish" ? obs_kernels::finish_nm : obs_kernels::search_greedy;
  std::vector<Buffer*> results{&mask, &saliency, &info};
  const char* const path = run(params, 0, nullptr).path;
  if (update != 0) results.push_back(update == 1 ? &fresh : &weight);
  finish(path, results);
}
