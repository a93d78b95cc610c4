// SPDX-License-Identifier: Apache-2.0
#include "obs_kernels/packing.h"

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#include "common/check.h"
#include "common/device_guard.h"
#include "common/launch.h"
#include "packing/packing_config.h"
#include "packing/slots.h"

namespace obs_kernels {
namespace {

using slots::kPanelColumns;

// The arguments of a kernel: PackParams with the element type, and with the divisions done.
template <typename Element>
struct PackArgs {
  const Element* weight;
  const uint8_t* mask;
  Element* values;
  uint8_t* codes;
  uint8_t* columns;
  int64_t rows;
  int64_t cols;
  int64_t v;
  int64_t groups;      // of a row
  int64_t code_bytes;  // of a row, where a byte holds the two pairs of two groups
  int n;
  int m;
};

__device__ __forceinline__ int64_t first_item() {
  return int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
}

__device__ __forceinline__ int64_t item_stride() {
  return int64_t{gridDim.x} * blockDim.x;
}

// 2:4. A thread packs the eight columns behind one byte of codes, so no two threads write one byte.
// Elements and mask come and go in the widest words that a full octet allows.
template <typename Element>
struct alignas(16) Octet {
  Element at[8];
};

template <typename Element>
struct alignas(4 * sizeof(Element) < 16 ? 4 * sizeof(Element) : 16) Quad {
  Element at[4];
};

// A run-time index into registers would send them to local memory; three selects do not.
template <typename Element>
__device__ __forceinline__ Element pick(const Octet<Element>& octet, int base, uint32_t position) {
  const Element low = (position & 1) ? octet.at[base + 1] : octet.at[base];
  const Element high = (position & 1) ? octet.at[base + 3] : octet.at[base + 2];
  return (position & 2) ? high : low;
}

// cols % 8 == 0 and wide alignment: rows follow each other without a gap, so the matrix is one run.
template <typename Element>
__global__ __launch_bounds__(PackGroupsConfig::kThreads) void pack_octets_kernel(
    PackArgs<Element> args, int64_t num_octets) {
  for (int64_t item = first_item(); item < num_octets; item += item_stride()) {
    const auto weight = reinterpret_cast<const Octet<Element>*>(args.weight)[item];
    const uint2 mask = reinterpret_cast<const uint2*>(args.mask)[item];
    Quad<Element> values;
    uint32_t code = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t kept = slots::bits_of_bytes(half == 0 ? mask.x : mask.y);
      const slots::TwoOfFour two = slots::choose_two(kept);
      const Element first = pick(weight, 4 * half, two.first);
      const Element second = pick(weight, 4 * half, two.second);
      values.at[2 * half] = (kept >> two.first & 1) ? first : Element{0};
      values.at[2 * half + 1] = (kept >> two.second & 1) ? second : Element{0};
      code |= two.code << (4 * half);
    }
    reinterpret_cast<Quad<Element>*>(args.values)[item] = values;
    args.codes[item] = static_cast<uint8_t>(code);
  }
}

// Any columns, any alignment: the last byte of a row may stand for one group only.
template <typename Element>
__global__ __launch_bounds__(PackGroupsConfig::kThreads) void pack_quads_kernel(
    PackArgs<Element> args, int64_t num_bytes) {
  for (int64_t item = first_item(); item < num_bytes; item += item_stride()) {
    const int64_t row = item / args.code_bytes;
    const int64_t first_group = (item - row * args.code_bytes) * 2;
    uint32_t code = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (first_group + half >= args.groups) continue;
      const int64_t group = row * args.groups + first_group + half;
      const Element* weight = args.weight + group * 4;
      uint32_t kept = 0;
#pragma unroll
      for (int lane = 0; lane < 4; ++lane) {
        kept |= uint32_t{args.mask[group * 4 + lane] != 0} << lane;
      }
      const slots::TwoOfFour two = slots::choose_two(kept);
      args.values[group * 2] = (kept >> two.first & 1) ? weight[two.first] : Element{0};
      args.values[group * 2 + 1] = (kept >> two.second & 1) ? weight[two.second] : Element{0};
      code |= two.code << (4 * half);
    }
    args.codes[item] = static_cast<uint8_t>(code);
  }
}

// Other n:m: a thread owns a group, whose codes are whole bytes.
template <typename Element>
__global__ __launch_bounds__(PackGroupsConfig::kThreads) void pack_groups_kernel(
    PackArgs<Element> args, int64_t num_groups) {
  for (int64_t group = first_item(); group < num_groups; group += item_stride()) {
    slots::pack_group(args.weight + group * args.m,
                      args.mask + group * args.m,
                      args.n,
                      args.m,
                      args.values + group * args.n,
                      args.codes + group * args.n);
  }
}

// v:2:m. The m mask bytes of one row of a panel as a set of columns.
template <bool kWords>
__device__ __forceinline__ uint64_t columns_used(const uint8_t* mask, int m) {
  uint64_t used = 0;
  if constexpr (kWords) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(mask);
    for (int word = 0; word < m / 4; ++word) {
      used |= uint64_t{slots::bits_of_bytes(words[word])} << (4 * word);
    }
  } else {
    for (int at = 0; at < m; ++at) used |= uint64_t{mask[at] != 0} << at;
  }
  return used;
}

// ORs the sets of all threads of a block into `total`; the order does not matter, so the result is
// the same on each run. One atomic a warp instead of 32.
__device__ __forceinline__ void merge_sets(uint64_t set, unsigned long long* total) {
  const uint32_t low = __reduce_or_sync(0xFFFFFFFFu, static_cast<uint32_t>(set));
  const uint32_t high = __reduce_or_sync(0xFFFFFFFFu, static_cast<uint32_t>(set >> 32));
  if (threadIdx.x % PackPanelsConfig::kWarp == 0) {
    atomicOr(total, static_cast<unsigned long long>(high) << 32 | low);
  }
}

// One row of one panel: writes its two values and returns its code of four bits.
template <typename Element>
__device__ __forceinline__ uint32_t
pack_panel_row(const Element* weight, const uint8_t* mask, uint32_t columns, Element* values) {
  uint32_t kept = 0;
#pragma unroll
  for (uint32_t position = 0; position < kPanelColumns; ++position) {
    kept |= uint32_t{mask[slots::column_of(columns, position)] != 0} << position;
  }
  const slots::TwoOfFour two = slots::choose_two(kept);
  const uint32_t first = slots::column_of(columns, two.first);
  const uint32_t second = slots::column_of(columns, two.second);
  values[0] = (kept >> two.first & 1) ? weight[first] : Element{0};
  values[1] = (kept >> two.second & 1) ? weight[second] : Element{0};
  return two.code;
}

// A block packs two neighbouring panels (a byte of codes spans both), a thread one row of them:
// find the columns in use, agree on four, write them, then write each row.
template <typename Element, bool kWords>
__global__ __launch_bounds__(PackPanelsConfig::kMaxThreads) void pack_panels_kernel(
    PackArgs<Element> args, int64_t num_pairs) {
  __shared__ unsigned long long used[2];
  for (int64_t pair = blockIdx.x; pair < num_pairs; pair += gridDim.x) {
    const int64_t panel = pair / args.code_bytes;
    const int64_t group = (pair - panel * args.code_bytes) * 2;
    const bool both = group + 1 < args.groups;  // the last panel of an odd number is alone
    const int64_t first_row = panel * args.v;

    if (threadIdx.x < 2) used[threadIdx.x] = 0;
    __syncthreads();
    uint64_t left = 0;
    uint64_t right = 0;
    for (int64_t row = first_row + threadIdx.x; row < first_row + args.v; row += blockDim.x) {
      const uint8_t* mask = args.mask + row * args.cols + group * args.m;
      left |= columns_used<kWords>(mask, args.m);
      if (both) right |= columns_used<kWords>(mask + args.m, args.m);
    }
    merge_sets(left, &used[0]);
    merge_sets(right, &used[1]);
    __syncthreads();

    const uint32_t left_columns = slots::choose_columns(used[0]);
    const uint32_t right_columns = slots::choose_columns(used[1]);
    if (threadIdx.x < (both ? 2 : 1) * kPanelColumns) {
      const uint32_t columns = threadIdx.x < kPanelColumns ? left_columns : right_columns;
      args.columns[(panel * args.groups + group) * kPanelColumns + threadIdx.x] =
          static_cast<uint8_t>(slots::column_of(columns, threadIdx.x % kPanelColumns));
    }
    for (int64_t row = first_row + threadIdx.x; row < first_row + args.v; row += blockDim.x) {
      const int64_t at = row * args.cols + group * args.m;
      Element* values = args.values + (row * args.groups + group) * 2;
      uint32_t code = pack_panel_row(args.weight + at, args.mask + at, left_columns, values);
      if (both) {
        code |= pack_panel_row(
                    args.weight + at + args.m, args.mask + at + args.m, right_columns, values + 2)
                << 4;
      }
      args.codes[row * args.code_bytes + group / 2] = static_cast<uint8_t>(code);
    }
    __syncthreads();  // `used` is cleared for the next pair only after its last reader
  }
}

template <typename Element>
LaunchPlan launch_quads(const PackArgs<Element>& args, cudaStream_t stream) {
  using Config = PackGroupsConfig;
  const int64_t num_bytes = args.rows * args.code_bytes;
  const auto blocks = grid_size(num_bytes, Config::kThreads, Config::kMaxBlocks);
  const auto grid = static_cast<unsigned>(blocks);
  const bool wide = args.cols % 8 == 0 && aligned(args.weight, alignof(Octet<Element>)) &&
                    aligned(args.values, alignof(Quad<Element>)) &&
                    aligned(args.mask, alignof(uint2));
  if (wide) {
    pack_octets_kernel<Element><<<grid, Config::kThreads, 0, stream>>>(args, num_bytes);
  } else {
    pack_quads_kernel<Element><<<grid, Config::kThreads, 0, stream>>>(args, num_bytes);
  }
  OBS_CUDA_CHECK(cudaGetLastError());
  return {"pack", wide ? "octets" : "quads", blocks, Config::kThreads};
}

template <typename Element>
LaunchPlan launch_groups(const PackArgs<Element>& args, cudaStream_t stream) {
  using Config = PackGroupsConfig;
  const int64_t num_groups = args.rows * args.groups;
  const auto blocks = grid_size(num_groups, Config::kThreads, Config::kMaxBlocks);
  pack_groups_kernel<Element>
      <<<static_cast<unsigned>(blocks), Config::kThreads, 0, stream>>>(args, num_groups);
  OBS_CUDA_CHECK(cudaGetLastError());
  return {"pack", "groups", blocks, Config::kThreads};
}

template <typename Element>
LaunchPlan launch_panels(const PackArgs<Element>& args, cudaStream_t stream) {
  using Config = PackPanelsConfig;
  const int64_t num_pairs = args.rows / args.v * args.code_bytes;
  const auto blocks = grid_size(num_pairs, 1, Config::kMaxBlocks);
  const auto grid = static_cast<unsigned>(blocks);
  const int threads = Config::threads(args.v);
  const bool words = args.m % 4 == 0 && aligned(args.mask, alignof(uint32_t));
  if (words) {
    pack_panels_kernel<Element, true><<<grid, threads, 0, stream>>>(args, num_pairs);
  } else {
    pack_panels_kernel<Element, false><<<grid, threads, 0, stream>>>(args, num_pairs);
  }
  OBS_CUDA_CHECK(cudaGetLastError());
  return {"pack", words ? "panels_words" : "panels_bytes", blocks, threads};
}

template <typename Element>
LaunchPlan launch(const PackParams& params, cudaStream_t stream) {
  PackArgs<Element> args{};
  args.weight = static_cast<const Element*>(params.weight);
  args.mask = params.mask;
  args.values = static_cast<Element*>(params.values);
  args.codes = params.codes;
  args.columns = params.columns;
  args.rows = params.rows;
  args.cols = params.cols;
  args.v = params.v;
  args.groups = params.cols / params.m;
  args.code_bytes = (args.groups + 1) / 2;
  args.n = static_cast<int>(params.n);
  args.m = static_cast<int>(params.m);
  if (params.v > 0) return launch_panels(args, stream);
  if (params.n == 2 && params.m == 4) return launch_quads(args, stream);
  return launch_groups(args, stream);
}

LaunchPlan launch_for_size(const PackParams& params, cudaStream_t stream) {
  switch (params.element_size) {
    case 2:
      return launch<uint16_t>(params, stream);
    case 4:
      return launch<uint32_t>(params, stream);
    default:
      return launch<uint64_t>(params, stream);
  }
}

void check_sizes(const PackParams& params) {
  constexpr int64_t kMaxGroup = 64;  // a set of columns is one 64-bit word
  const int64_t n = params.n;
  const int64_t m = params.m;
  OBS_CHECK(0 < n && n < m && m <= kMaxGroup,
            "pack needs 0 < n < m <= ",
            kMaxGroup,
            ", got n = ",
            n,
            ", m = ",
            m);
  OBS_CHECK(params.v >= 0, "v must be 0 (no panels) or more, got ", params.v);
  OBS_CHECK(params.v == 0 || (n == 2 && m >= kPanelColumns),
            "panels are packed for n = 2 and m >= 4, got n = ",
            n,
            ", m = ",
            m);
  OBS_CHECK(params.rows >= 0 && params.cols >= 0,
            "rows and cols must not be negative, got ",
            params.rows,
            " and ",
            params.cols);
  OBS_CHECK(params.cols % m == 0, "cols must be a multiple of m = ", m, ", got ", params.cols);
  OBS_CHECK(params.v == 0 || params.rows % params.v == 0,
            "rows must be a multiple of v = ",
            params.v,
            ", got ",
            params.rows);
  OBS_CHECK(params.element_size == 2 || params.element_size == 4 || params.element_size == 8,
            "element_size must be 2, 4 or 8 bytes, got ",
            params.element_size);
  const int64_t max_elements = std::numeric_limits<int64_t>::max() / params.element_size;
  OBS_CHECK(params.cols == 0 || params.rows <= max_elements / params.cols,
            "rows * cols must fit 64 bits, got ",
            params.rows,
            " * ",
            params.cols);
}

}  // namespace

LaunchPlan pack(const PackParams& params, int device, cudaStream_t stream) {
  check_sizes(params);
  if (params.rows == 0 || params.cols == 0) return {"pack", "empty", 0, 0};
  OBS_CHECK(params.weight && params.mask && params.values && params.codes,
            "weight, mask, values and codes must not be null for ",
            params.rows,
            " x ",
            params.cols);
  OBS_CHECK(params.v == 0 || params.columns, "columns must not be null for panels");
  const auto element_size = static_cast<uintptr_t>(params.element_size);
  OBS_CHECK(aligned(params.weight, element_size) && aligned(params.values, element_size),
            "weight and values must be aligned to their elements of ",
            element_size,
            " bytes, got ",
            params.weight,
            " and ",
            params.values);
  OBS_CHECK(device >= 0, "device must be an index, got ", device);
  const DeviceGuard guard(device);
  const LaunchPlan plan = launch_for_size(params, stream);
  count_launch();
  return plan;
}

}  // namespace obs_kernels
