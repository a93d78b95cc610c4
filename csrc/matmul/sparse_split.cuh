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

inline constexpr int kPieceTokens = 8;  // of four sums of a thread that follow each other
inline constexpr int kPieceBytes = kWarpgroup * 16;

// Adds up and writes this CTA's pieces of those of kCtas. All loads first: they take 200 cycles,
// and more from another multiprocessor.
template <int kCtas, int kPieces, typename Element>
__device__ __forceinline__ void add_up(const SparseArgs<Element>& args,
                                       const float (&bias)[2],
                                       const SumPlace& place,
                                       uint32_t mine) {
  constexpr int kShare = (kPieces + kCtas - 1) / kCtas;
  constexpr bool kEqual = kPieces % kCtas == 0;
  const auto rank = static_cast<int>(hopper::cluster_rank());
  const int first = kPieces * rank / kCtas;
  const int count = kEqual ? kShare : kPieces * (rank + 1) / kCtas - first;
  float part[kShare][kCtas][4];
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
#pragma unroll
    for (int cta = 0; cta < kCtas; ++cta) {  // those beyond its share: some of its own again
      const int piece = kEqual || i < count ? first + i : first;
      hopper::load_of_cta(part[i][cta], mine + piece * kPieceBytes, cta);
    }
  }
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
    SumPlace at = place;
    at.first_token += (first + i) * kPieceTokens;
    write_elements<Element, kPieceTokens>(total, args, at);
  }
}

// By the consumers, while the other warps of the CTA are at their cluster_sync. `stages`: memory
// that nothing is brought to any more, for the sums of this CTA.
template <typename Element, typename Tile>
__device__ __forceinline__ void add_up_and_write(const float (&sum)[Tile::kSumTokens / 2],
                                                 const float (&bias)[2],
                                                 const SparseArgs<Element>& args,
                                                 const SumPlace& place,
                                                 uint32_t stages) {
  using namespace hopper;
  constexpr int kPieces = Tile::kSumTokens / kPieceTokens;
  const uint32_t mine =
      stages + (place.warpgroup * kPieces * kWarpgroup + place.thread) * 16;  // of the first piece
  named_barrier(1, kConsumers * kWarpgroup);  // the other one's products read stages too
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    store_shared(mine + piece * kPieceBytes, sum + 4 * piece);
  }
  cluster_sync();
  switch (args.split) {  // one of kSplits
    case 8:
      return add_up<8, kPieces>(args, bias, place, mine);
    case 6:
      return add_up<6, kPieces>(args, bias, place, mine);
    case 4:
      return add_up<4, kPieces>(args, bias, place, mine);
    case 3:
      return add_up<3, kPieces>(args, bias, place, mine);
    case 2:
      return add_up<2, kPieces>(args, bias, place, mine);
    default:
      return add_up<1, kPieces>(args, bias, place, mine);
  }
}

}  // namespace obs_kernels
