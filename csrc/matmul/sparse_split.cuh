// SPDX-License-Identifier: Apache-2.0
// The end of a tile whose columns the CTAs of a cluster have shared out: each CTA adds up, over all
// of them, a share of the tokens, and writes it. In the order of the ranks, so that runs are equal
// bit for bit. The copy engine takes sums from one CTA to the other and tells a barrier there, so
// that no barrier of the cluster has to order memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/hopper.cuh"
#include "matmul/sparse_epilogue.cuh"
#include "matmul/sparse_layout.cuh"

namespace obs_kernels {

inline constexpr int kPieceBoxBytes = kPieceTokens * kPartRows * 2;  // of Y

// A warpgroup's first `pieces` of kShare to shared memory, as the boxes of Y that they are, and
// out.
template <typename Element, bool kFeatureY, int kShare>
__device__ __forceinline__ void write_pieces(const float (&sum)[kShare * 4],
                                             const CUtensorMap& y_map,
                                             const SumPlace& place,
                                             uint32_t boxes,
                                             int pieces) {
  using namespace hopper;
  const auto* type = static_cast<const Element*>(nullptr);
  // Matrices: rows 0 to 7 and 8 to 15 of the warp's 16.
  const int warp = place.thread / 32;
  const int line = lane_here() % 8;
  const int chunk = 2 * warp + lane_here() / 8 % 2;
  const uint32_t to =
      boxes + (kFeatureY ? (chunk * 8 + line) * 16 : line * 128 + ((chunk ^ line) << 4));
#pragma unroll
  for (int i = 0; i < kShare; ++i) {  // those beyond `pieces` do not leave
    const uint32_t part[2] = {pack_pair(sum[4 * i], sum[4 * i + 1], type),
                              pack_pair(sum[4 * i + 2], sum[4 * i + 3], type)};
    store_matrices<!kFeatureY>(to + i * kPieceBoxBytes, part);
  }
  fence_async_shared();
  named_barrier(1 + place.warpgroup, kWarpgroup);
  if (place.thread % 32 != 0) return;
#pragma unroll 1
  for (int i = warp; i < pieces; i += kWarpgroup / 32) {  // what lies outside of y is left out
    const int token = place.first_token + i * kPieceTokens;
    store_box(&y_map,
              kFeatureY ? token : place.first_row,
              kFeatureY ? place.first_row : token,
              boxes + i * kPieceBoxBytes);
  }
  store_commit();
  store_wait_read<0>();
}

// The pieces that a CTA adds up: from the first of its rank to the first of the next one's.
__device__ __forceinline__ int first_piece(int pieces, int rank, int split) {
  return pieces * rank / split;
}

// By one thread, before the cluster meets: what the others will send.
template <typename Element, typename Tile>
__device__ __forceinline__ void expect_sums(const SparseArgs<Element>& args, CtaMemory<Tile> cta) {
  const auto rank = static_cast<int>(hopper::cluster_rank());
  const int count = first_piece(Tile::kPieces, rank + 1, args.split) -
                    first_piece(Tile::kPieces, rank, args.split);
  hopper::barrier_init(cta.sums(), 1);
  hopper::fence_barrier_init();
  hopper::barrier_expect(
      cta.sums(), static_cast<uint32_t>((args.split - 1) * count * Tile::kConsumers * kPieceBytes));
}

// The end of a tile that kCtas CTAs share out, by its consumers. All loads together, and one look
// at the activation and at the layout: this runs once a launch, where each wait and each jump is
// felt.
template <int kCtas, typename Element, typename Tile>
__device__ __forceinline__ void add_up_and_write(const float (&sum)[Tile::kSumTokens / 2],
                                                 const float (&bias)[2],
                                                 const CUtensorMap& y_map,
                                                 const SparseArgs<Element>& args,
                                                 const SumPlace& place,
                                                 CtaMemory<Tile> cta) {
  using namespace hopper;
  constexpr int kConsumers = Tile::kConsumers;
  constexpr int kPieces = Tile::kPieces;
  constexpr int kShare = (kPieces + kCtas - 1) / kCtas;
  const auto rank = static_cast<int>(cluster_rank());
  const int first = first_piece(kPieces, rank, kCtas);
  const int count = first_piece(kPieces, rank + 1, kCtas) - first;
  // In stages, to which nothing is brought any more: all sums of the warpgroup, and its part of Y.
  const uint32_t sums = cta.stages + place.warpgroup * kPieces * kPieceBytes;
  const uint32_t boxes =
      cta.stages + kPieces * (kConsumers * kPieceBytes + place.warpgroup * kPieceBoxBytes);
  static_assert(
      kConsumers * kPieces * (kPieceBytes + kPieceBoxBytes) <= Tile::kStages * Tile::kStageBytes,
      "sums and boxes lie in stages");
  const uint32_t inbox = cta.epilogue() + place.warpgroup * Tile::kInboxPieces * kPieceBytes;
  const uint32_t mine = place.thread * 16;    // of a piece
  named_barrier(1, kConsumers * kWarpgroup);  // the other one's products read stages too
  float part[kCtas][kShare * 4];
  if constexpr (kCtas == 1) {
#pragma unroll
    for (int j = 0; j < kShare * 4; ++j) part[0][j] = sum[j];
  } else {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      store_shared(sums + piece * kPieceBytes + mine, sum + 4 * piece);
    }
    fence_async_shared();
    named_barrier(1 + place.warpgroup, kWarpgroup);
    if (place.thread == 0) {
#pragma unroll
      for (int on = 1; on < kCtas; ++on) {
        const int to = rank + on < kCtas ? rank + on : rank + on - kCtas;
        const int piece = first_piece(kPieces, to, kCtas);
        const int bytes = (first_piece(kPieces, to + 1, kCtas) - piece) * kPieceBytes;
        copy_to_cta(inbox + (on - 1) * kShare * kPieceBytes,
                    sums + piece * kPieceBytes,
                    static_cast<uint32_t>(bytes),
                    cta.sums(),
                    static_cast<uint32_t>(to));
      }
    }
    barrier_wait(cta.sums(), 0);
#pragma unroll
    for (int from = 0; from < kCtas; ++from) {
      const int on = rank - from + (rank < from ? kCtas : 0);  // as the sender counted
      const uint32_t at =
          on == 0 ? sums + first * kPieceBytes : inbox + (on - 1) * kShare * kPieceBytes;
#pragma unroll
      for (int i = 0; i < kShare; ++i) load_shared(part[from] + 4 * i, at + i * kPieceBytes + mine);
    }
#pragma unroll
    for (int from = 1; from < kCtas; ++from) {
#pragma unroll
      for (int j = 0; j < kShare * 4; ++j) part[0][j] += part[from][j];
    }
  }
  finish_sums(part[0], bias, args.activation);
  SumPlace at = place;
  at.first_token += first * kPieceTokens;
  if (!args.boxes) {
    write_elements<Element, kShare * kPieceTokens>(part[0], args, at, count * kPieceTokens);
  } else if (args.feature_y) {
    write_pieces<Element, true, kShare>(part[0], y_map, at, boxes, count);
  } else {
    write_pieces<Element, false, kShare>(part[0], y_map, at, boxes, count);
  }
}

// The same, of kCtas CTAs or fewer.
template <int kCtas, typename Element, typename Tile>
__device__ __forceinline__ void finish_split(const float (&sum)[Tile::kSumTokens / 2],
                                             const float (&bias)[2],
                                             const CUtensorMap& y_map,
                                             const SparseArgs<Element>& args,
                                             const SumPlace& place,
                                             CtaMemory<Tile> cta) {
  if constexpr (kCtas > 1) {
    if (args.split < kCtas) {
      return finish_split<kCtas - 1, Element, Tile>(sum, bias, y_map, args, place, cta);
    }
  }
  add_up_and_write<kCtas, Element, Tile>(sum, bias, y_map, args, place, cta);
}

}  // namespace obs_kernels
