// SPDX-License-Identifier: Apache-2.0
// The end of a tile whose columns the CTAs of a cluster have shared out: each CTA adds up, over all
// of them, a share of the tokens, and writes it. In the order of the ranks, so that runs are equal
// bit for bit.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/hopper.cuh"
#include "matmul/sparse_epilogue.cuh"
#include "matmul/sparse_layout.cuh"

namespace obs_kernels {

// Of kPieceTokens tokens: four sums of a thread that follow each other.
inline constexpr int kPieceBytes = kWarpgroup * 16;
inline constexpr int kPieceBoxBytes = kPieceTokens * kPartRows * 2;  // of Y

// A piece of the warpgroup to shared memory, as the box of Y that it is.
template <typename Element>
__device__ __forceinline__ void stage_piece(const float (&sum)[4],
                                            bool feature_y,
                                            uint32_t box,
                                            int warp) {
  const auto* type = static_cast<const Element*>(nullptr);
  // Matrices: rows 0 to 7 and 8 to 15 of the warp's 16.
  const uint32_t part[2] = {pack_pair(sum[0], sum[1], type), pack_pair(sum[2], sum[3], type)};
  const int line = hopper::lane_here() % 8;
  const int chunk = 2 * warp + hopper::lane_here() / 8 % 2;
  if (feature_y) {
    hopper::store_matrices<false>(box + (chunk * 8 + line) * 16, part);
  } else {
    hopper::store_matrices<true>(box + line * 128 + ((chunk ^ line) << 4), part);
  }
}

// Adds up and writes this CTA's pieces of those of kCtas. All loads first: they take 200 cycles,
// and more from another multiprocessor. `boxes`: memory for its part of Y.
template <int kCtas, int kPieces, typename Element>
__device__ __forceinline__ void add_up(const CUtensorMap& y_map,
                                       const SparseArgs<Element>& args,
                                       const float (&bias)[2],
                                       const SumPlace& place,
                                       uint32_t mine,
                                       uint32_t boxes) {
  using namespace hopper;
  constexpr int kShare = (kPieces + kCtas - 1) / kCtas;
  constexpr bool kEqual = kPieces % kCtas == 0;
  const auto rank = static_cast<int>(cluster_rank());
  const int first = kPieces * rank / kCtas;
  const int count = kEqual ? kShare : kPieces * (rank + 1) / kCtas - first;
  float part[kShare][kCtas][4];
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
#pragma unroll
    for (int cta = 0; cta < kCtas; ++cta) {  // those beyond its share: some of its own again
      const int piece = kEqual || i < count ? first + i : first;
      load_of_cta(part[i][cta], mine + piece * kPieceBytes, cta);
    }
  }
  SumPlace at = place;
  at.first_token += first * kPieceTokens;
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    if (i >= count) break;
    float total[4] = {part[i][0][0], part[i][0][1], part[i][0][2], part[i][0][3]};
#pragma unroll
    for (int cta = 1; cta < kCtas; ++cta) {
#pragma unroll
      for (int j = 0; j < 4; ++j) total[j] += part[i][cta][j];
    }
    finish_sums(total, bias, args.activation);
    if (args.boxes) {
      stage_piece<Element>(total, args.feature_y, boxes + i * kPieceBoxBytes, place.thread / 32);
    } else {
      write_elements<Element, kPieceTokens>(total, args, at);
      at.first_token += kPieceTokens;
    }
  }
  if (!args.boxes) return;
  fence_async_shared();
  named_barrier(1 + place.warpgroup, kWarpgroup);
  if (place.thread != 0 || place.first_row >= args.rows) return;
  for (int i = 0; i < count; ++i) {
    const int token = at.first_token + i * kPieceTokens;
    const int inner = args.feature_y ? token : place.first_row;
    const int outer = args.feature_y ? place.first_row : token;
    if (token < args.tokens) store_box(&y_map, inner, outer, boxes + i * kPieceBoxBytes);
  }
  store_commit();
  store_wait_read<0>();
}

// By the consumers, while the other warps of the CTA are at their cluster_sync. `stages`: memory
// that nothing is brought to any more, for the sums of this CTA and its part of Y.
template <typename Element, typename Tile>
__device__ __forceinline__ void add_up_and_write(const float (&sum)[Tile::kSumTokens / 2],
                                                 const float (&bias)[2],
                                                 const CUtensorMap& y_map,
                                                 const SparseArgs<Element>& args,
                                                 const SumPlace& place,
                                                 uint32_t stages) {
  using namespace hopper;
  constexpr int kPieces = Tile::kSumTokens / kPieceTokens;
  const uint32_t mine =
      stages + (place.warpgroup * kPieces * kWarpgroup + place.thread) * 16;  // of the first piece
  const uint32_t boxes = stages + Tile::kSumBytes + place.warpgroup * kPieces * kPieceBoxBytes;
  static_assert(
      Tile::kSumBytes + kConsumers * kPieces * kPieceBoxBytes <= Tile::kStages * Tile::kStageBytes,
      "sums and boxes lie in stages");
  named_barrier(1, kConsumers * kWarpgroup);  // the other one's products read stages too
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    store_shared(mine + piece * kPieceBytes, sum + 4 * piece);
  }
  cluster_sync();
  switch (args.split) {  // at most four in the table of tiles
    case 4:
      return add_up<4, kPieces>(y_map, args, bias, place, mine, boxes);
    case 3:
      return add_up<3, kPieces>(y_map, args, bias, place, mine, boxes);
    case 2:
      return add_up<2, kPieces>(y_map, args, bias, place, mine, boxes);
    default:
      return add_up<1, kPieces>(y_map, args, bias, place, mine, boxes);
  }
}

}  // namespace obs_kernels
