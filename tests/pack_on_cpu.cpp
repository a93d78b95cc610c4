// SPDX-License-Identifier: Apache-2.0
// Packs one weight with the kernels of packing.cu on the CPU (cuda_on_cpu.h).
// Arguments: rows cols v n m element_size, then three shifts. stdin: weight, then mask. stdout: the
// path, a line break, then values, codes and columns. The shifts move weight, mask and outputs off
// their alignment by as many elements; every buffer ends where its allocation ends, so that an
// overrun meets a red zone.
#include <cstdio>
#include <cstdlib>

#include "buffer_on_cpu.h"
#include "obs_kernels/packing.h"

int main(int, char** argv) {
  obs_kernels::PackParams params{};
  params.rows = std::atoll(argv[1]);
  params.cols = std::atoll(argv[2]);
  params.v = std::atoll(argv[3]);
  params.n = std::atoll(argv[4]);
  params.m = std::atoll(argv[5]);
  params.element_size = std::atoll(argv[6]);
  const auto weight_shift = static_cast<std::size_t>(std::atoll(argv[7]));
  const auto mask_shift = static_cast<std::size_t>(std::atoll(argv[8]));
  const auto output_shift = static_cast<std::size_t>(std::atoll(argv[9]));
  const auto size = static_cast<std::size_t>(params.element_size);
  const auto rows = static_cast<std::size_t>(params.rows);
  const auto cols = static_cast<std::size_t>(params.cols);
  const auto groups = cols / static_cast<std::size_t>(params.m);
  const auto kept = groups * static_cast<std::size_t>(params.n);
  const bool two_bits = params.v > 0 || (params.n == 2 && params.m == 4);
  const std::size_t panels = params.v > 0 ? rows / static_cast<std::size_t>(params.v) : 0;

  Buffer weight(rows * cols * size, weight_shift * size);
  Buffer mask(rows * cols, mask_shift);
  Buffer values(rows * kept * size, output_shift * size);
  Buffer codes(rows * (two_bits ? (kept + 3) / 4 : kept), output_shift);
  Buffer columns(panels * groups * 4, output_shift);
  weight.read();
  mask.read();
  params.weight = weight.data();
  params.mask = mask.data();
  params.values = values.data();
  params.codes = codes.data();
  params.columns = columns.data();
  std::printf("%s\n", obs_kernels::pack(params, 0, nullptr).path);
  values.write();
  codes.write();
  columns.write();
}
