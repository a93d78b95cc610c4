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

inline constexpr int kMostSplit = 8;    // CTAs of a cluster that every GPU can hold
inline constexpr int kPieceTokens = 8;  // of four sums of a thread that follow each other
inline constexpr int kPieceBytes = kWarpgroup * 16;

// By the consumers, while the other warps of the CTA are at their cluster_sync. `stages`: memory
// that nothing is brought to any more, for the sums of this CTA.
template <typename Element, typename Tile>
__device__ __forceinline__ void add_up_and_write(const float (&sum)[Tile::kSumTokens / 2],
                                                 const float (&bias)[2],
                                                 const SparseArgs<Element>& args,
                                                 SumPlace place,
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
  const auto rank = static_cast<int>(cluster_rank());
  const int last = kPieces * (rank + 1) / args.split;
  for (int piece = kPieces * rank / args.split; piece < last; ++piece) {
    float part[kMostSplit][4];
#pragma unroll
    for (int cta = 0; cta < kMostSplit; ++cta) {
      if (cta < args.split) load_of_cta(part[cta], mine + piece * kPieceBytes, cta);
    }
    float total[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) total[i] = part[0][i];
#pragma unroll
    for (int cta = 1; cta < kMostSplit; ++cta) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (cta < args.split) total[i] += part[cta][i];
      }
    }
    finish_sums(total, bias, args.activation);
    SumPlace at = place;
    at.first_token += piece * kPieceTokens;
    write_elements<Element, kPieceTokens>(total, args, at);
  }
}

}  // namespace obs_kernels
