// SPDX-License-Identifier: Apache-2.0
// A weight with zeros into the order of the sparse product: fragments of values and metadata.
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

struct Four {
  uint16_t at[4];
};

// Two of four columns, ascending, and what stands there.
struct TwoOfFour {
  uint32_t values;  // the lower column in the lower half
  uint32_t code;    // two positions of two bits, the lower column first
};

__device__ __forceinline__ Four
load_four(const uint16_t* weight, int64_t rows, int64_t cols, int64_t row, int64_t column) {
  Four four{};
  if (row < rows && column < cols) {
#pragma unroll
    for (int i = 0; i < 4; ++i) four.at[i] = weight[row * cols + column + i];
  }
  return four;
}

// Nonzeros by bits, so that -0.0 stays; free slots are zeros at the lowest unused columns.
__device__ __forceinline__ TwoOfFour choose_two(const Four& four) {
  uint32_t kept = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (four.at[i] != 0 && __popc(kept) < 2) kept |= 1u << i;
  }
  while (__popc(kept) < 2) kept |= (kept + 1) & ~kept;  // the lowest bit that is not set
  const int first = __ffs(static_cast<int>(kept)) - 1;
  const int second = 31 - __clz(static_cast<int>(kept));
  uint32_t low = 0;
  uint32_t high = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i == first) low = four.at[i];
    if (i == second) high = four.at[i];
  }
  return {low | high << 16, static_cast<uint32_t>(first | second << 2)};
}

// A CTA a tile, a thread the fragments of a thread of the product: see wgmma_sp.cuh.
__global__ __launch_bounds__(256) void prepack_kernel(const uint16_t* weight,
                                                      uint8_t* packed,
                                                      int64_t rows,
                                                      int64_t cols,
                                                      int64_t steps,
                                                      int64_t tiles) {
  const int warpgroup = static_cast<int>(threadIdx.x) / 128;
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const int lane = thread % 32;
  const int g = lane / 4;
  const int q = lane % 4;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t row = tile / steps * kTileRows + warpgroup * 64 + thread / 32 * 16 + g;
    const int64_t column = tile % steps * kStepCols;
    uint8_t* out = packed + tile * kPackedBytes + warpgroup * (kPackedBytes / 2);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      uint32_t part[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // j & 1: row + 8; j >> 1: the later half of the columns
        const int64_t first = column + 32 * k + 4 * q + 16 * (j >> 1);
        part[j] = choose_two(load_four(weight, rows, cols, row + 8 * (j & 1), first)).values;
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
        const uint32_t code = choose_two(load_four(weight, rows, cols, row + 8 * half, first)).code;
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
  OBS_CHECK(params.rows >= 0 && params.cols >= 0 && params.cols % 4 == 0,
            "cols must be a multiple of 4 and sizes not negative, got rows = ",
            params.rows,
            ", cols = ",
            params.cols);
  const int64_t tiles = prepacked_bytes(params.rows, params.cols) / kPackedBytes;
  if (tiles == 0) return {"prepack", "empty", 0, 0};
  OBS_CHECK(aligned(params.packed, 16), "packed must be aligned to 16 bytes");
  const DeviceGuard guard(device);
  constexpr int kThreads = 256;
  const auto blocks = static_cast<unsigned>(grid_size(tiles, 1, int64_t{1} << 20));
  prepack_kernel<<<blocks, kThreads, 0, stream>>>(static_cast<const uint16_t*>(params.weight),
                                                  static_cast<uint8_t*>(params.packed),
                                                  params.rows,
                                                  params.cols,
                                                  round_up(params.cols, kStepCols) / kStepCols,
                                                  tiles);
  OBS_CUDA_CHECK(cudaGetLastError());
  count_launch();
  return {"prepack", "tiles", blocks, kThreads};
}

}  // namespace obs_kernels
