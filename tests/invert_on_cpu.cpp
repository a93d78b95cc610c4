// SPDX-License-Identifier: Apache-2.0
// Inverts matrices with the kernels of inverse.cu on the CPU (cuda_on_cpu.h).
// Arguments: num_blocks size damp_each in_place shift (in elements, off the alignment).
// stdin: damp (one value, or one a block), then the matrices. stdout: the path, a line break, then
// inverse and info.
#include <cstdio>
#include <cstdlib>

#include "buffer_on_cpu.h"
#include "obs_kernels/inverse.h"

int main(int, char** argv) {
  obs_kernels::InvertParams params{};
  params.num_blocks = std::atoll(argv[1]);
  params.size = std::atoll(argv[2]);
  params.damp_each = std::atoi(argv[3]) != 0;
  const bool in_place = std::atoi(argv[4]) != 0;
  const std::size_t shift = static_cast<std::size_t>(std::atoll(argv[5])) * sizeof(float);
  const auto blocks = static_cast<std::size_t>(params.num_blocks);
  const auto size = static_cast<std::size_t>(params.size);
  const std::size_t bytes = blocks * size * size * sizeof(float);

  Buffer damp((params.damp_each ? blocks : 1) * sizeof(float), 0);
  Buffer matrices(bytes, shift);
  Buffer inverse(in_place ? 0 : bytes, shift);
  Buffer info(blocks * sizeof(int), 0);
  damp.read();
  matrices.read();
  params.damp = reinterpret_cast<const float*>(damp.data());
  params.matrices = reinterpret_cast<const float*>(matrices.data());
  params.inverse = reinterpret_cast<float*>(in_place ? matrices.data() : inverse.data());
  params.info = reinterpret_cast<int*>(info.data());
  std::printf("%s\n", obs_kernels::invert_spd(params, 0, nullptr).path);
  (in_place ? matrices : inverse).write();
  info.write();
}
