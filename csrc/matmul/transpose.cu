// SPDX-License-Identifier: Apache-2.0
// X token-major to feature-major, for products that gather columns of it.
#include <cuda_runtime.h>

#include <cstdint>

#include "common/check.h"
#include "common/device_guard.h"
#include "common/launch.h"
#include "matmul/sparse_config.h"
#include "obs_kernels/matmul.h"

namespace obs_kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kSide = 8;         // 16 bytes
constexpr int kColumnLanes = 4;  // 64 bytes of a token
constexpr int kTokenLanes = 8;   // 128 bytes of a column
constexpr int kTileTokens = kSide * kTokenLanes;
constexpr int kTileColumns = kSide * kColumnLanes;

struct TransposeArgs {
  const uint4* x;  // rows of `pieces`
  uint4* out;      // rows of `out_pieces`
  int64_t tokens;
  int64_t pieces;
  int64_t out_pieces;
  int64_t column_tiles;
  int64_t tiles;
};

// A thread turns a square of 8 x 8 in its registers, one byte permutation a word; a warp a tile.
// Three CTAs an SM: left to itself the compiler spills two words to fit a fourth.
__global__ __launch_bounds__(kThreads, 3) void transpose_kernel(const TransposeArgs args) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t warps = int64_t{gridDim.x} * (kThreads / 32);
  for (int64_t tile = int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32; tile < args.tiles;
       tile += warps) {
    const int64_t piece = tile % args.column_tiles * kColumnLanes + lane % kColumnLanes;
    const int64_t out_piece = tile / args.column_tiles * kTokenLanes + lane / kColumnLanes;
    if (piece >= args.pieces || out_piece >= args.out_pieces) continue;
    uint4 in[kSide];
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      const int64_t token = out_piece * kSide + i;
      in[i] = token < args.tokens ? __ldg(args.x + token * args.pieces + piece)
                                  : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int column = 0; column < kSide; ++column) {
      uint32_t word[kSide / 2];
#pragma unroll
      for (int pair = 0; pair < kSide / 2; ++pair) {
        const auto* low = reinterpret_cast<const uint32_t*>(&in[2 * pair]);
        const auto* high = reinterpret_cast<const uint32_t*>(&in[2 * pair + 1]);
        word[pair] =
            __byte_perm(low[column / 2], high[column / 2], column % 2 == 0 ? 0x5410 : 0x7632);
      }
      args.out[(piece * kSide + column) * args.out_pieces + out_piece] =
          make_uint4(word[0], word[1], word[2], word[3]);
    }
  }
}

}  // namespace

LaunchPlan transpose(const TransposeParams& params, int device, cudaStream_t stream) {
  OBS_CHECK(params.tokens >= 0 && params.cols >= 0 && params.cols % kSide == 0,
            "cols must be a multiple of 8 and sizes not negative, got tokens = ",
            params.tokens,
            ", cols = ",
            params.cols);
  OBS_CHECK(params.out_stride >= params.tokens && params.out_stride % kSide == 0,
            "out_stride must be a multiple of 8 and at least the tokens, got ",
            params.out_stride,
            " for ",
            params.tokens);
  OBS_CHECK(aligned(params.x, 16) && aligned(params.out, 16),
            "x and out must be aligned to 16 bytes");
  TransposeArgs args{};
  args.x = static_cast<const uint4*>(params.x);
  args.out = static_cast<uint4*>(params.out);
  args.tokens = params.tokens;
  args.pieces = params.cols / kSide;
  args.out_pieces = parts_of(params.tokens, kSide);
  OBS_CHECK(args.out_pieces * kSide == params.out_stride,
            "out_stride must be the tokens rounded up to 8, got ",
            params.out_stride);
  args.column_tiles = parts_of(params.cols, kTileColumns);
  args.tiles = args.column_tiles * parts_of(params.tokens, kTileTokens);
  if (args.tiles == 0) return {"transpose", "empty", 0, 0};
  const DeviceGuard guard(device);
  const auto blocks = static_cast<unsigned>(grid_size(args.tiles, kThreads / 32, int64_t{1} << 20));
  transpose_kernel<<<blocks, kThreads, 0, stream>>>(args);
  OBS_CUDA_CHECK(cudaGetLastError());
  count_launch();
  return {"transpose", "squares", blocks, kThreads};
}

}  // namespace obs_kernels
