// SPDX-License-Identifier: Apache-2.0
// A packed weight into the order of the sparse product: fragments of values and metadata.
#include <cuda_runtime.h>

#include <cstdint>

#include "common/check.h"
#include "common/device_guard.h"
#include "common/launch.h"
#include "matmul/sparse_config.h"
#include "obs_kernels/matmul.h"

namespace obs_kernels {
namespace {

static_assert(kPackedRows == kTileRows && kPackedCols == kStepCols, "one tile, two names");

struct PrepackArgs {
  const uint16_t* values;
  const uint8_t* codes;
  const uint8_t* columns;
  uint8_t* packed;
  int64_t rows;
  int64_t cols;
  int64_t v;
  int64_t kept;        // of a row
  int64_t code_bytes;  // of a row
  int64_t groups;      // of a row
  int64_t steps;       // of kStepCols columns
  int64_t tiles;
  int n;
  int m;
  bool two_bits;
};

// Two of four columns, ascending, and what stands there.
struct TwoOfFour {
  uint32_t values;  // the lower column in the lower half
  uint32_t code;    // two positions of two bits, the lower column first
};

// Column in its group of kept element `slot` of a row.
__device__ __forceinline__ int position(const PrepackArgs& args,
                                        int64_t row,
                                        int64_t group,
                                        int64_t slot) {
  const uint8_t* codes = args.codes + row * args.code_bytes;
  if (!args.two_bits) return codes[slot];
  const int code = codes[slot / 4] >> (2 * (slot % 4)) & 3;
  return args.v == 0 ? code : args.columns[(row / args.v * args.groups + group) * 4 + code];
}

// The four columns from `column` on. Free places are zeros at the lowest unused columns.
__device__ __forceinline__ TwoOfFour two_of_four(const PrepackArgs& args,
                                                 int64_t row,
                                                 int64_t column) {
  uint32_t kept = 0;
  uint32_t values[4] = {0, 0, 0, 0};
  if (row < args.rows && column < args.cols) {
    const int64_t group = column / args.m;
    const int first = static_cast<int>(column % args.m);
    for (int i = 0; i < args.n; ++i) {
      const int64_t slot = group * args.n + i;
      const int place = position(args, row, group, slot) - first;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (place == c) {
          kept |= 1u << c;
          values[c] = args.values[row * args.kept + slot];
        }
      }
    }
  }
  while (__popc(kept) < 2) kept |= (kept + 1) & ~kept;  // the lowest bit that is not set
  const int low = __ffs(static_cast<int>(kept)) - 1;
  const int high = 31 - __clz(static_cast<int>(kept));
  uint32_t pair = 0;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    if (c == low) pair |= values[c];
    if (c == high) pair |= values[c] << 16;
  }
  return {pair, static_cast<uint32_t>(low | high << 2)};
}

// A CTA a tile, a thread the fragments of a thread of the product: see wgmma_sp.cuh.
__global__ __launch_bounds__(256) void prepack_kernel(const PrepackArgs args) {
  const int warpgroup = static_cast<int>(threadIdx.x) / 128;
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const int lane = thread % 32;
  const int g = lane / 4;
  const int q = lane % 4;
  for (int64_t tile = blockIdx.x; tile < args.tiles; tile += gridDim.x) {
    const int64_t row = tile / args.steps * kTileRows + warpgroup * 64 + thread / 32 * 16 + g;
    const int64_t column = tile % args.steps * kStepCols;
    uint8_t* out = args.packed + tile * kPackedBytes + warpgroup * (kPackedBytes / 2);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      uint32_t part[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // j & 1: row + 8; j >> 1: the later half of the columns
        const int64_t first = column + 32 * k + 4 * q + 16 * (j >> 1);
        part[j] = two_of_four(args, row + 8 * (j & 1), first).values;
      }
      reinterpret_cast<uint4*>(out)[k * 128 + thread] =
          make_uint4(part[0], part[1], part[2], part[3]);
    }
    // Lanes with q < 2 hold the metadata of the first 32 columns, the others of the second.
    uint32_t meta = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int group = 0; group < 4; ++group) {
        const int64_t first = column + 16 * q + 4 * group;
        const uint32_t code = two_of_four(args, row + 8 * half, first).code;
        meta |= code << (16 * half + 4 * group);
      }
    }
    reinterpret_cast<uint32_t*>(out + 2 * 128 * 16)[thread] = meta;
  }
}

}  // namespace

int64_t prepacked_bytes(int64_t rows, int64_t cols) {
  return round_up(rows, kTileRows) / kTileRows * (round_up(cols, kStepCols) / kStepCols) *
         kPackedBytes;
}

LaunchPlan prepack(const PrepackParams& params, int device, cudaStream_t stream) {
  OBS_CHECK(params.n >= 1 && params.n <= 2 && params.m >= 4 && params.m % 4 == 0,
            "at most 2 of 4, 8, 12, ... columns are wanted, got n = ",
            params.n,
            ", m = ",
            params.m);
  OBS_CHECK(params.rows >= 0 && params.cols >= 0 && params.cols % params.m == 0,
            "cols must be a multiple of m = ",
            params.m,
            " and sizes not negative, got rows = ",
            params.rows,
            ", cols = ",
            params.cols);
  OBS_CHECK(params.v >= 0 && (params.v == 0 || (params.rows % params.v == 0 && params.n == 2)),
            "panels want n = 2 and rows a multiple of v, got rows = ",
            params.rows,
            ", v = ",
            params.v,
            ", n = ",
            params.n);
  PrepackArgs args{};
  args.values = static_cast<const uint16_t*>(params.values);
  args.codes = params.codes;
  args.columns = params.columns;
  args.packed = static_cast<uint8_t*>(params.packed);
  args.rows = params.rows;
  args.cols = params.cols;
  args.v = params.v;
  args.groups = params.cols / params.m;
  args.kept = args.groups * params.n;
  args.two_bits = params.v != 0 || (params.n == 2 && params.m == 4);
  args.code_bytes = args.two_bits ? (args.kept + 3) / 4 : args.kept;
  args.steps = round_up(params.cols, kStepCols) / kStepCols;
  args.tiles = prepacked_bytes(params.rows, params.cols) / kPackedBytes;
  args.n = static_cast<int>(params.n);
  args.m = static_cast<int>(params.m);
  if (args.tiles == 0) return {"prepack", "empty", 0, 0};
  OBS_CHECK(aligned(params.packed, 16), "packed must be aligned to 16 bytes");
  const DeviceGuard guard(device);
  constexpr int kThreads = 256;
  const auto blocks = static_cast<unsigned>(grid_size(args.tiles, 1, int64_t{1} << 20));
  prepack_kernel<<<blocks, kThreads, 0, stream>>>(args);
  OBS_CUDA_CHECK(cudaGetLastError());
  count_launch();
  return {"prepack", "tiles", blocks, kThreads};
}

}  // namespace obs_kernels
