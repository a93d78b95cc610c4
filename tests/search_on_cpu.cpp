// SPDX-License-Identifier: Apache-2.0
// Searches masks with the kernels of csrc/search on the CPU (cuda_on_cpu.h).
// Arguments: num_groups n m damp_each has_alive update shift (in elements, off the alignment), then
// for panels v wide num_columns num_derived length num_sets panel_rows (at once).
// stdin: damp (one value, or one a group), weight, fisher, alive, then the tables: derived, lists,
// columns. stdout: the path, a line break, then mask, saliency, info, the new weight; for panels
// also columns and saliency of the panels.
// update: 0 = no new weight, 1 = into memory of its own, 2 = in place.
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "buffer_on_cpu.h"
#include "obs_kernels/search.h"

namespace {

template <typename T>
T* as(Buffer& buffer) {
  return reinterpret_cast<T*>(buffer.data());
}

}  // namespace

int main(int count, char** argv) {
  obs_kernels::SearchParams params{};
  const auto number = [&](int at) { return std::atoll(argv[at]); };
  params.num_groups = number(1);
  params.n = number(2);
  params.m = number(3);
  params.damp_each = number(4) != 0;
  const bool has_alive = number(5) != 0;
  const auto update = number(6);
  const auto shift = static_cast<std::size_t>(number(7));
  const auto groups = static_cast<std::size_t>(params.num_groups);
  const auto m = static_cast<std::size_t>(params.m);

  Buffer damp((params.damp_each ? groups : 1) * sizeof(float), 0);
  Buffer weight(groups * m * sizeof(float), shift * sizeof(float));
  Buffer fisher(groups * m * m * sizeof(float), shift * sizeof(float));
  Buffer alive(has_alive ? groups * m : 0, shift);
  Buffer mask(groups * m, shift);
  Buffer saliency(groups * sizeof(float), 0);
  Buffer info(groups * sizeof(int), 0);
  Buffer fresh(update == 1 ? groups * m * sizeof(float) : 0, shift * sizeof(float));
  for (Buffer* buffer : {&damp, &weight, &fisher, &alive}) buffer->read();
  params.damp = as<const float>(damp);
  params.weight = as<const float>(weight);
  params.fisher = as<const float>(fisher);
  params.alive = has_alive ? as<const unsigned char>(alive) : nullptr;
  params.mask = as<unsigned char>(mask);
  params.saliency = as<float>(saliency);
  params.info = as<int>(info);
  params.new_weight = update == 0 ? nullptr : as<float>(update == 1 ? fresh : weight);

  const char* path = nullptr;
  std::unique_ptr<Buffer> columns, sums;
  if (count > 8) {
    obs_kernels::PanelParams panels{};
    panels.groups = params;
    panels.v = number(8);
    panels.wide = number(9);
    panels.num_columns = number(10);
    panels.tables.num_derived = number(11);
    panels.tables.length = number(12);
    panels.tables.num_sets = number(13);
    const auto number_of_panels = groups / static_cast<std::size_t>(panels.v);
    const auto sets = static_cast<std::size_t>(panels.tables.num_sets);
    const auto kept = static_cast<std::size_t>(panels.num_columns);
    Buffer derived(static_cast<std::size_t>(panels.tables.num_derived) * 3 * sizeof(short), 0);
    Buffer lists(static_cast<std::size_t>(panels.tables.length) * sets * sizeof(short), 0);
    Buffer members(sets * kept, 0);
    for (Buffer* buffer : {&derived, &lists, &members}) buffer->read();
    panels.gains_bytes =
        number(14) * obs_kernels::panel_gains_bytes(panels.v, panels.wide, params.n, params.m);
    Buffer gains(static_cast<std::size_t>(panels.gains_bytes), 0);
    Buffer bits(number_of_panels * sizeof(unsigned), 0);
    columns = std::make_unique<Buffer>(number_of_panels * kept, 0);
    sums = std::make_unique<Buffer>(number_of_panels * sizeof(float), 0);
    panels.tables.derived = as<const unsigned short>(derived);
    panels.tables.lists = as<const unsigned short>(lists);
    panels.tables.columns = as<const unsigned char>(members);
    panels.gains = as<float>(gains);
    panels.column_bits = as<unsigned>(bits);
    panels.columns = as<unsigned char>(*columns);
    panels.saliency = as<float>(*sums);
    path = obs_kernels::search_vnm(panels, 0, nullptr).path;
  } else {
    path = obs_kernels::search_nm(params, 0, nullptr).path;
  }
  std::printf("%s\n", path);
  for (Buffer* buffer : {&mask, &saliency, &info}) buffer->write();
  if (update != 0) (update == 1 ? fresh : weight).write();
  if (columns) {
    columns->write();
    sums->write();
  }
}
