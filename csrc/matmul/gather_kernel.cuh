// SPDX-License-Identifier: Apache-2.0
// The kernel of the sparse product for panels, v:2:m: the rows of a panel keep columns among the
// same four of m, so a tile multiplies only those: C / m * 4 columns, of which W keeps two of four.
// X is feature-major, and a warpgroup picks its columns (512 bytes for 256 tokens) by 16-byte
// copies where copies of whole boxes would bring all. Bounded by what such copies bring beside
// products: see bench/micro.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/device.cuh"
#include "common/hopper.cuh"
#include "matmul/sparse_consumer.cuh"
#include "matmul/sparse_layout.cuh"

namespace obs_kernels {

inline constexpr int kPieceTokens = 8;  // 16 bytes
inline constexpr int kStepGroups = kStepCols / 4;
inline constexpr int kGatherWarps = kWarpgroup / 32;
inline constexpr int kGatherCluster =
    2;  // CTAs: other tokens of the same rows, so that W is shared

// The columns of W in `sparse` are those that panels keep.
template <typename Element>
struct GatherArgs {
  SparseArgs<Element> sparse;
  const Element* x;        // [C, x_stride]
  const uint8_t* columns;  // [rows / v, groups, 4], of the m of a group
  int64_t x_stride;        // tokens from one column to the next, a multiple of 8
  int v;
  int m;
  int groups;
};

// A warp: its share of the 64 columns of each stage, and of the W of all CTAs of the cluster.
template <typename Element, typename Tile>
__device__ __forceinline__ void bring_columns(const GatherArgs<Element>& args,
                                              CtaMemory<Tile> cta,
                                              int warp,
                                              int lane) {
  using namespace hopper;
  constexpr int kPieces = Tile::kTokens / kPieceTokens;            // of a column
  constexpr int kAtOnce = kPieces > 16 ? 1 : 2;                    // columns by a copy of all lanes
  constexpr int kLanes = 32 / kAtOnce;                             // of a column
  constexpr int kGroups = kStepCols / 4 / kGatherWarps / kAtOnce;  // of a lane in a step
  static_assert(kGroups % 2 == 0 && kPieces <= kLanes, "a lane has a piece of whole patterns");
  // This CTA's share of W: whole tiles of 64 rows, or half a tile.
  constexpr int kShareTiles = Tile::kWeightTiles / kGatherCluster;
  constexpr int kCopies = kShareTiles > 0 ? kShareTiles : 1;
  constexpr int kCopyBytes = kShareTiles > 0 ? kWeightBytes : kWeightBytes / kGatherCluster;
  constexpr auto kAllCtas = static_cast<uint16_t>((1u << kGatherCluster) - 1u);
  static_assert(kCopies <= kGatherWarps, "a warp brings at most one");
  const SparseArgs<Element>& sparse = args.sparse;
  const int piece = lane % kLanes;
  const int first_group = (warp * kAtOnce + lane / kLanes) * kGroups;
  const auto stride = static_cast<uint32_t>(args.x_stride * 2);  // bytes
  const int64_t group_stride = int64_t{stride} * args.m;
  // In a stage, of the first column; the swizzle XORs the number of a piece with the column's.
  const auto place_in_stage =
      static_cast<uint32_t>(piece / 8 * kSlabBytes + first_group * 4 * 128 + piece % 8 * 16);
  const auto rank = static_cast<int>(cluster_rank());
  const int share = (rank * kCopies + warp) * kCopyBytes;
  StageRing<Tile::kStages> ring;
  for (int tile = first_tile(sparse); tile < num_tiles(sparse); tile += tile_stride(sparse)) {
    const TilePlace place = place_of<true>(tile, sparse, rank);
    const int panel = place.row_tile * Tile::kRows / args.v;
    const auto* columns =
        reinterpret_cast<const uint32_t*>(args.columns) + int64_t{panel} * args.groups;
    const int64_t weight_tile = int64_t{place.row_tile} * Tile::kWeightTiles + share / kWeightBytes;
    const uint8_t* weight =
        sparse.packed + weight_tile * sparse.steps * kPackedBytes + share % kWeightBytes;
    const int token = place.token_tile * Tile::kTokens + piece * kPieceTokens;
    const bool exists = piece < kPieces && token < sparse.tokens;
    const auto* from = reinterpret_cast<const uint8_t*>(args.x + (exists ? token : 0)) +
                       first_group * group_stride;
    uint32_t next[kGroups];  // each the columns of a group, four bytes
    const auto load_columns = [&](int step) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const int group = step * kStepGroups + first_group + g;
        next[g] = group < args.groups ? __ldg(columns + group) : 0;
      }
    };
    load_columns(0);
    for (int step = 0; step < sparse.steps; ++step) {
      uint32_t now[kGroups];
#pragma unroll
      for (int g = 0; g < kGroups; ++g) now[g] = next[g];
      if (step + 1 < sparse.steps) load_columns(step + 1);
      const uint32_t arrived = cta.full(ring.stage);
      barrier_wait(cta.empty(ring.stage), ring.parity ^ 1);
      const uint32_t stage = cta.stages + ring.stage * Tile::kStageBytes;
      if (lane == 0) {
        if (warp == kGatherWarps - 1) barrier_expect(arrived, Tile::kWeightTiles * kWeightBytes);
        if (warp < kCopies) {
          copy_bytes(stage + Tile::kTokenBytes + share, weight, kCopyBytes, arrived, kAllCtas);
        }
      }
      weight += kPackedBytes;
      if (piece < kPieces) {
        const uint32_t to = stage + place_in_stage;
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          const bool copies = exists && step * kStepGroups + first_group + g < args.groups;
          const uint8_t* group =
              copies ? from + g * group_stride : reinterpret_cast<const uint8_t*>(args.x);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int at = 4 * g + i;
            const uint32_t column = now[g] >> (8 * i) & 255u;
            copy_or_zero((to ^ at % 8 * 16) + at * 128, group + uint64_t{column} * stride, copies);
          }
        }
      }
      from += kStepGroups * group_stride;
      barrier_arrive_after_copies(arrived);
      ring.next();
    }
  }
}

template <typename Element, typename Tile>
__global__ __launch_bounds__(kSparseThreads,
                             1) void gather_linear_kernel(const __grid_constant__ CUtensorMap y_map,
                                                          const GatherArgs<Element> args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace hopper;
  extern __shared__ uint8_t raw[];
  const CtaMemory<Tile> cta{(shared_address(raw) + 1023u) & ~1023u};

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      barrier_init(cta.full(stage), kWarpgroup + 1);  // who gathers, and the bytes of W
      barrier_init(cta.empty(stage), kConsumers * kGatherCluster);
    }
    fence_barrier_init();
  }
  cluster_sync();

  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup;
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  constexpr bool kFull = Tile::kParts * Tile::kSumTokens > 256;  // sums fill the registers
  if (warpgroup == kConsumers) {
    give_registers<kFull ? 56 : 88>();
    bring_columns<Element, Tile>(args, cta, thread / 32, thread % 32);
  } else {
    take_registers<kFull ? 224 : 208>();
    consume<Element, Tile, true, true>(y_map, args.sparse, cta, warpgroup, thread);
  }
  // Copies and arrivals of the other CTA must find this one alive.
  cluster_sync();
#else
  __trap();  // a build that lacks sm_90a must not leave y as it was
#endif
}

}  // namespace obs_kernels
