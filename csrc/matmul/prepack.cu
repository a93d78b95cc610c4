// SPDX-License-Identifier: Apache-2.0
// A packed weight into the order of the sparse product: tiles of values and metadata.
#include <cuda_runtime.h>

#include <cstdint>

#include "common/check.h"
#include "common/device_guard.h"
#include "common/launch.h"
#include "matmul/sparse_config.h"
#include "obs_kernels/matmul.h"

namespace obs_kernels {
namespace {

static_assert(kPackedCols == kStepCols, "a step, two names");
constexpr int kThreads = 128;  // a tile by a CTA

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

// Values of a tile: rows of 64 bytes in the 64-byte swizzle of the copy engine, which XORs the
// number of a 16-byte chunk with half the number of its row. Metadata: see wgmma_sp.cuh; lane
// 4g + q of warp w has 16 columns of rows 16w + g and 16w + g + 8, and lanes with q < 2 hold them
// for the first 32 columns, the others for the second.
__global__ __launch_bounds__(kThreads) void prepack_kernel(const PrepackArgs args) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int g = static_cast<int>(threadIdx.x) % 32 / 4;
  const int q = static_cast<int>(threadIdx.x) % 4;
  for (int64_t tile = blockIdx.x; tile < args.tiles; tile += gridDim.x) {
    const int64_t first_row = tile / args.steps * kPackedRows;
    const int64_t column = tile % args.steps * kPackedCols + 16 * q;
    uint8_t* out = args.packed + tile * kPackedBytes;
    uint32_t meta = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * warp + g + 8 * half;
      uint32_t part[4];
#pragma unroll
      for (int group = 0; group < 4; ++group) {
        const TwoOfFour pair = two_of_four(args, first_row + row, column + 4 * group);
        part[group] = pair.values;
        meta |= pair.code << (16 * half + 4 * group);
      }
      const int chunk = q ^ (row / 2 % 4);
      *reinterpret_cast<uint4*>(out + row * 64 + chunk * 16) =
          make_uint4(part[0], part[1], part[2], part[3]);
    }
    reinterpret_cast<uint32_t*>(out + kPackedRows * 64)[threadIdx.x] = meta;
  }
}

}  // namespace

int64_t prepacked_bytes(int64_t rows, int64_t cols) {
  return parts_of(rows, kPackedRows) * parts_of(cols, kPackedCols) * kPackedBytes;
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
  args.steps = parts_of(params.cols, kPackedCols);
  args.tiles = prepacked_bytes(params.rows, params.cols) / kPackedBytes;
  args.n = static_cast<int>(params.n);
  args.m = static_cast<int>(params.m);
  if (args.tiles == 0) return {"prepack", "empty", 0, 0};
  OBS_CHECK(aligned(params.packed, 16), "packed must be aligned to 16 bytes");
  const DeviceGuard guard(device);
  const auto blocks = static_cast<unsigned>(grid_size(args.tiles, 1, int64_t{1} << 20));
  prepack_kernel<<<blocks, kThreads, 0, stream>>>(args);
  OBS_CUDA_CHECK(cudaGetLastError());
  count_launch();
  return {"prepack", "tiles", blocks, kThreads};
}

}  // namespace obs_kernels
