// SPDX-License-Identifier: Apache-2.0
// Settles the columns of a step with the kernels of csrc/sweep on the CPU (cuda_on_cpu.h).
// Arguments: rows cols first count v n m num_columns has_alive has_scale num_inner num_sets
// num_derived length num_column_sets.
// stdin: live, alive, row_scale, factor, own, curvature, unit, pushed, then the tables: inner,
// sets, derived, lists, columns. stdout: the path, a line break, then mask, new weight, loss,
// change and columns: whole matrices, of which a step writes its columns.
#include <cstdio>
#include <cstdlib>

#include "buffer_on_cpu.h"
#include "obs_kernels/sweep.h"

namespace {

template <typename T>
T* as(Buffer& buffer) {
  return reinterpret_cast<T*>(buffer.data());
}

}  // namespace

int main(int, char** argv) {
  obs_kernels::SweepParams params{};
  const auto number = [&](int at) { return std::atoll(argv[at]); };
  const auto size = [](int64_t value) { return static_cast<std::size_t>(value); };
  params.rows = number(1);
  params.cols = number(2);
  params.first = number(3);
  params.count = number(4);
  params.v = number(5);
  params.n = number(6);
  params.m = number(7);
  params.num_columns = number(8);
  params.change_stride = params.count + 3;
  const bool has_alive = number(9) != 0;
  const bool has_scale = number(10) != 0;
  obs_kernels::SweepTables& tables = params.tables;
  tables.num_inner = number(11);
  tables.num_sets = number(12);
  tables.num_derived = number(13);
  tables.length = number(14);
  tables.num_column_sets = number(15);

  const std::size_t weights = size(params.rows * params.cols);
  const int64_t wide = params.cols / params.m;
  const std::size_t blocks = size(params.cols * params.m);
  Buffer live(weights * sizeof(float), 4);
  Buffer alive(has_alive ? weights : 0, 1);
  Buffer scale(has_scale ? size(params.rows) * sizeof(float) : 0, 4);
  Buffer factor(size(params.cols * params.cols) * sizeof(float), 4);
  Buffer own(blocks * sizeof(float), 4);
  Buffer curvature(blocks * sizeof(float), 4);
  Buffer unit(size(wide) * sizeof(float), 4);
  Buffer pushed(weights * sizeof(float), 4);
  Buffer inner(size(tables.num_inner) * sizeof(unsigned), 0);
  const bool smaller = params.n > 2;  // sets behind the kept ones, in place of derived entries
  Buffer sets(size(tables.num_sets + (smaller ? tables.num_derived : 0)) * sizeof(unsigned), 0);
  Buffer derived(smaller ? 0 : size(tables.num_derived) * 3 * sizeof(short), 0);
  Buffer lists(size(tables.length * tables.num_column_sets) * sizeof(short), 0);
  Buffer members(size(tables.num_column_sets * params.num_columns), 0);
  for (Buffer* buffer : {&live,
                         &alive,
                         &scale,
                         &factor,
                         &own,
                         &curvature,
                         &unit,
                         &pushed,
                         &inner,
                         &sets,
                         &derived,
                         &lists,
                         &members}) {
    buffer->read();
  }
  const std::size_t panels = params.v > 0 ? size(params.rows / params.v * wide) : 0;
  Buffer mask(weights, 1);
  Buffer fresh(weights * sizeof(float), 4);
  Buffer loss(size(params.rows * wide) * sizeof(float), 4);
  Buffer change(size(params.rows * params.change_stride) * sizeof(float), 4);
  Buffer columns(panels * size(params.num_columns), 1);
  params.live = as<const float>(live);
  params.alive = has_alive ? as<const unsigned char>(alive) : nullptr;
  params.row_scale = has_scale ? as<const float>(scale) : nullptr;
  params.factor = as<const float>(factor);
  params.own = as<const float>(own);
  params.curvature = as<const float>(curvature);
  params.unit = as<const float>(unit);
  params.pushed = as<const float>(pushed);
  tables.inner = as<const unsigned>(inner);
  tables.sets = as<const unsigned>(sets);
  tables.derived = as<const unsigned short>(derived);
  tables.lists = as<const unsigned short>(lists);
  tables.columns = as<const unsigned char>(members);
  params.mask = as<unsigned char>(mask);
  params.new_weight = as<float>(fresh);
  params.loss = as<float>(loss);
  params.change = as<float>(change);
  params.columns = as<unsigned char>(columns);
  const auto plan = obs_kernels::sweep_columns(params, 0, nullptr);
  std::printf("%s\n", plan.path);
  for (Buffer* buffer : {&mask, &fresh, &loss, &change, &columns}) {
    if (!buffer->unharmed_before()) return 3;
    buffer->write();
  }
}
