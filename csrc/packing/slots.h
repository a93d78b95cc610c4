// SPDX-License-Identifier: Apache-2.0
// Which positions of a group become slots. Plain integer functions, for kernels and for the host,
// where the test suite runs them over every input without a GPU.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define OBS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define OBS_HOST_DEVICE inline
#endif

namespace obs_kernels::slots {

constexpr int kPanelColumns = 4;

OBS_HOST_DEVICE uint32_t lowest_bit(uint64_t bits) {  // bits != 0
#ifdef __CUDA_ARCH__
  return static_cast<uint32_t>(__ffsll(static_cast<long long>(bits)) - 1);
#else
  return static_cast<uint32_t>(__builtin_ctzll(bits));
#endif
}

OBS_HOST_DEVICE int count_bits(uint64_t bits) {
#ifdef __CUDA_ARCH__
  return __popcll(bits);
#else
  return __builtin_popcountll(bits);
#endif
}

OBS_HOST_DEVICE uint64_t add_lowest_free(uint64_t bits) {
  return bits | (~bits & (bits + 1));
}

// Four mask bytes as loaded (little-endian) -> four bits; a byte counts if it is not zero.
OBS_HOST_DEVICE uint32_t bits_of_bytes(uint32_t bytes) {
  bytes |= bytes >> 4;  // fold each byte into its lowest bit; only bits of the same byte reach it
  bytes |= bytes >> 2;
  bytes |= bytes >> 1;
  // The multiplication moves bit 8 i to bit 24 + i; its other products stay below 24, all apart.
  return ((bytes & 0x01010101u) * 0x01020408u) >> 24 & 0xFu;
}

struct TwoOfFour {
  uint32_t first;  // positions, first < second
  uint32_t second;
  uint32_t code;  // first | second << 2, as the sparse tensor core reads them
};

// The two lowest kept positions of four; free slots take the lowest positions that are not kept.
OBS_HOST_DEVICE TwoOfFour choose_two(uint32_t kept) {
  uint64_t chosen = kept;
  if (count_bits(chosen) < 2) chosen = add_lowest_free(chosen);
  if (count_bits(chosen) < 2) chosen = add_lowest_free(chosen);
  const uint32_t first = lowest_bit(chosen);
  const uint32_t second = lowest_bit(chosen & (chosen - 1));
  return {first, second, first | second << 2};
}

// The four lowest used columns of a group of at least four, ascending, one a byte from the lowest.
OBS_HOST_DEVICE uint32_t choose_columns(uint64_t used) {
  uint64_t chosen = used;
  for (int i = 0; i < kPanelColumns; ++i) {
    if (count_bits(chosen) < kPanelColumns) chosen = add_lowest_free(chosen);
  }
  uint32_t columns = 0;
  for (int i = 0; i < kPanelColumns; ++i) {
    columns |= lowest_bit(chosen) << (8 * i);
    chosen &= chosen - 1;
  }
  return columns;
}

OBS_HOST_DEVICE uint32_t column_of(uint32_t columns, uint32_t position) {
  return columns >> (8 * position) & 0xFFu;
}

// One group of plain n:m: exactly n slots, ascending; `codes` gets positions inside the group.
template <typename Element>
OBS_HOST_DEVICE void pack_group(
    const Element* weight, const uint8_t* mask, int n, int m, Element* values, uint8_t* codes) {
  int kept = 0;
  for (int at = 0; at < m; ++at) kept += mask[at] != 0;
  int gaps = n - kept;
  int slot = 0;
  for (int at = 0; at < m && slot < n; ++at) {
    const bool keep = mask[at] != 0;
    if (!keep && gaps <= 0) continue;
    gaps -= !keep;
    values[slot] = keep ? weight[at] : Element{0};
    codes[slot] = static_cast<uint8_t>(at);
    ++slot;
  }
}

}  // namespace obs_kernels::slots
