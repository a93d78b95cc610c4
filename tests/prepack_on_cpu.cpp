// SPDX-License-Identifier: Apache-2.0
// Prepacks one weight with the kernel of prepack.cu on the CPU (cuda_on_cpu.h). Arguments: rows cols
// v n m. stdin: values, codes, columns. stdout: the path, a line break, then the packed bytes.
#include <cstdio>
#include <cstdlib>

#include "buffer_on_cpu.h"
#include "obs_kernels/matmul.h"

int main(int, char** argv) {
  obs_kernels::PrepackParams params{};
  params.rows = std::atoll(argv[1]);
  params.cols = std::atoll(argv[2]);
  params.v = std::atoll(argv[3]);
  params.n = std::atoll(argv[4]);
  params.m = std::atoll(argv[5]);
  const auto rows = static_cast<std::size_t>(params.rows);
  const auto groups = static_cast<std::size_t>(params.cols / params.m);
  const auto kept = groups * static_cast<std::size_t>(params.n);
  const bool two_bits = params.v > 0 || (params.n == 2 && params.m == 4);
  const std::size_t panels = params.v > 0 ? rows / static_cast<std::size_t>(params.v) : 0;

  Buffer values(rows * kept * 2, 0);
  Buffer codes(rows * (two_bits ? (kept + 3) / 4 : kept), 0);
  Buffer columns(panels * groups * 4, 0);
  const auto bytes = obs_kernels::prepacked_bytes(params.rows, params.cols);
  Buffer packed(static_cast<std::size_t>(bytes), 0);
  values.read();
  codes.read();
  columns.read();
  params.values = values.data();
  params.codes = codes.data();
  params.columns = columns.data();
  params.packed = packed.data();
  std::printf("%s\n", obs_kernels::prepack(params, 0, nullptr).path);
  packed.write();
}
