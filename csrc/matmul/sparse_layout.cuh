// SPDX-License-Identifier: Apache-2.0
// What the parts of the sparse product share: sizes of shared memory, arguments, and which tile a
// CTA computes when.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/hopper.cuh"
#include "matmul/sparse_config.h"
#include "obs_kernels/matmul.h"

namespace obs_kernels {

inline constexpr int kWarpgroup = 128;
inline constexpr int kPartRows = 64;  // of a product
inline constexpr int kSharedLimit = 227 * 1024;
inline constexpr int kSlabTokens = 64;       // of what lies together of X, and of a box of Y
inline constexpr int kSlabBytes = 64 * 128;  // 64 tokens of 64 columns, or 64 columns of 64 tokens
inline constexpr int kWeightBytes = static_cast<int>(kPackedBytes);  // of 64 rows in a step
inline constexpr int kValueBytes = 64 * 64;                          // of them; then metadata
inline constexpr int kPieceTokens = 8;               // of a box of Y of a split tile
inline constexpr int kPieceBytes = kWarpgroup * 16;  // of its sums: four of a thread
// Slabs of Y that a warpgroup has on their way out; a fourth would cost a stage.
inline constexpr int kBuffers = 3;

// Pieces that a CTA is sent at most, of `pieces` that up to `most_split` CTAs share out.
constexpr int most_sent(int pieces, int most_split) {
  int most = 0;
  for (int split = 2; split <= most_split; ++split) {
    const int sent = (pieces + split - 1) / split * (split - 1);
    if (sent > most) most = sent;
  }
  return most;
}

// Sizes for a tile of kTokens tokens whose sums kConsumers warpgroups hold, each of kParts times 64
// rows: rows of its own of all tokens, or, if kShareRows, the same rows of its share of the tokens.
// kMostSplit: up to so many CTAs, a cluster, share out the columns of a tile and add up their sums
// at the end; a CTA then computes one tile only. 0: each CTA takes all columns of its tiles. A
// stage holds kStageSteps steps: to wait for one and to begin its products takes longer than the
// products of one step of a small tile.
template <int kParts_,
          int kTokens_,
          bool kShareRows_ = false,
          int kMostSplit_ = 0,
          int kStageSteps_ = 1,
          int kConsumers_ = 2>
struct SparseTile {
  static constexpr int kParts = kParts_;
  static constexpr int kTokens = kTokens_;
  static constexpr bool kShareRows = kShareRows_;
  static constexpr int kMostSplit = kMostSplit_;
  static constexpr bool kSplit = kMostSplit > 0;
  static constexpr int kStageSteps = kStageSteps_;
  static constexpr int kConsumers = kConsumers_;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;  // one warpgroup fills stages
  static constexpr int kWeightTiles = kShareRows ? kParts : kConsumers * kParts;
  static constexpr int kRows = kWeightTiles * kPartRows;
  static constexpr int kSumTokens = kShareRows ? kTokens / kConsumers : kTokens;
  static constexpr int kSlabs = kTokens / kSlabTokens;
  // A stage: X, step after step; then W, its 64 rows one after the other.
  static constexpr int kTokenBytes = kSlabs * kSlabBytes;  // of a step
  static constexpr int kWeightAt = kStageSteps * kTokenBytes;
  static constexpr int kBroughtBytes = kTokenBytes + kWeightTiles * kWeightBytes;  // of a step
  // Sums of a split tile leave in pieces of kPieceTokens tokens.
  static constexpr int kPieces = kSumTokens / kPieceTokens;
  static constexpr int kInboxPieces = most_sent(kPieces, kMostSplit);  // of a warpgroup
  static constexpr int kInboxBytes = kConsumers * kInboxPieces * kPieceBytes;
  // The swizzle wants stages of whole patterns.
  static constexpr int kStageBytes = (kStageSteps * kBroughtBytes + 1023) / 1024 * 1024;
  // What the epilogue has to itself: buffers of Y, or what other CTAs send.
  static constexpr int kBufferBytes = kSplit ? kInboxBytes : kConsumers * kBuffers * kSlabBytes;
  static constexpr int kAround = 1024 + kBufferBytes + 256;  // alignment, epilogue, barriers
  static constexpr int kStages = (kSharedLimit - kAround) / kStageBytes;
  static constexpr int kBytes = kAround + kStages * kStageBytes;
  static_assert(kStages >= 3, "one is multiplied, two are on their way");
  static_assert(!kSplit || kParts == 1, "what adds up knows one part");
  static_assert((2 * kStages + 1) * 8 <= 256, "barriers of stages, and one of sums");
};

// Shared memory of a CTA: stages, each X and then W; what the epilogue has to itself; barriers. All
// found from one address, as the registers of the consumers are full.
template <typename Tile>
struct CtaMemory {
  uint32_t stages;

  __device__ __forceinline__ uint32_t epilogue() const {
    return stages + Tile::kStages * Tile::kStageBytes;
  }
  // Barrier: a stage has arrived.
  __device__ __forceinline__ uint32_t full(uint32_t stage) const {
    return epilogue() + Tile::kBufferBytes + 8 * stage;
  }
  // Barrier: all that multiply a stage are done with it, those of all CTAs that share what it
  // holds.
  __device__ __forceinline__ uint32_t empty(uint32_t stage) const {
    return full(Tile::kStages + stage);
  }
  // Barrier: sums of other CTAs have arrived, of a split tile.
  __device__ __forceinline__ uint32_t sums() const { return full(2 * Tile::kStages); }
};

// The stage at hand, and the parity of the phase in which its barriers are waited for.
template <int kStages>
struct StageRing {
  uint32_t stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
  __device__ __forceinline__ uint32_t before() const {
    return stage == 0 ? kStages - 1 : stage - 1;
  }
};

// By threads that fill stages, at their end: what consumers of other CTAs still tell a barrier must
// find it alive.
template <typename Tile>
__device__ __forceinline__ void wait_for_free_stages(CtaMemory<Tile> cta,
                                                     StageRing<Tile::kStages> ring) {
  for (int i = 0; i < Tile::kStages; ++i) {
    hopper::barrier_wait(cta.empty(ring.stage), ring.parity ^ 1);
    ring.next();
  }
}

template <typename Element>
struct SparseArgs {
  const uint8_t* packed;
  const Element* bias;
  Element* y;
  int64_t rows;
  int64_t tokens;
  int steps;         // of kStepCols columns
  int weight_tiles;  // of 64 rows, that exist; those of the last cluster may be more
  int row_groups;    // of the rows of a cluster
  int token_groups;  // of its tokens
  int cluster;       // CTAs that share tokens or, gathered, rows
  int split;         // CTAs that share out columns; one of the two is 1
  Activation activation;
  bool feature_y;
  bool boxes;  // y is written by the copy engine; else element by element: odd sizes or addresses
};

// Tiles of a cluster: the first, how many on the next one is, and how many there are.
__device__ __forceinline__ int first_tile() {
  return static_cast<int>(hopper::cluster_id());
}
__device__ __forceinline__ int tile_stride() {
  return static_cast<int>(hopper::num_clusters());
}
template <typename Element>
__device__ __forceinline__ int num_tiles(const SparseArgs<Element>& args) {
  return args.row_groups * args.token_groups;
}

struct TilePlace {
  int row_tile;
  int token_tile;
};

// Of a cluster, counted in its rows and tokens: in stripes of kRaster of them in tokens, within
// which the tokens run first.
template <int kRaster>
__device__ __forceinline__ TilePlace group_of(int tile, int row_groups, int token_groups) {
  const int whole = kRaster * row_groups;
  const int first = tile / whole * kRaster;
  const int width = min(kRaster, token_groups - first);
  const int in = tile % whole;
  if (width == kRaster) return {in / kRaster, first + in % kRaster};  // by a constant: cheap
  return {in / width, first + in % width};
}

// The place of a tile of this CTA.
template <typename Tile, bool kGathered, typename Element>
__device__ __forceinline__ TilePlace place_here(const SparseArgs<Element>& args, int tile) {
  constexpr int kRaster = kGathered ? kGatherRasterTokens : kRasterTokens;
  TilePlace place = group_of<kRaster>(tile, args.row_groups, args.token_groups);
  if constexpr (!Tile::kSplit) {
    const auto rank = static_cast<int>(hopper::cluster_rank());
    int& shared_out = kGathered ? place.token_tile : place.row_tile;
    shared_out = shared_out * args.cluster + rank;
  }
  return place;
}

// By one thread, before the CTAs that share the barriers meet: several take turns.
template <typename Tile>
__device__ __forceinline__ void init_barriers(CtaMemory<Tile> cta,
                                              int full_arrivals,
                                              int empty_arrivals) {
#pragma unroll
  for (uint32_t stage = 0; stage < Tile::kStages; ++stage) {
    hopper::barrier_init(cta.full(stage), static_cast<uint32_t>(full_arrivals));
    hopper::barrier_init(cta.empty(stage), static_cast<uint32_t>(empty_arrivals));
  }
  hopper::fence_barrier_init();
}

// The steps that this CTA multiplies: all, or its share.
struct StepRange {
  int first;
  int count;
};

template <typename Tile, typename Element>
__device__ __forceinline__ StepRange steps_here(const SparseArgs<Element>& args) {
  if constexpr (Tile::kSplit) {
    const auto rank = static_cast<int>(hopper::cluster_rank());
    const int first = args.steps * rank / args.split;
    return {first, args.steps * (rank + 1) / args.split - first};
  } else {
    return {0, args.steps};
  }
}

// W of the first stages of this CTA to L2, by one thread: weights are what nothing before had to
// bring, and rows beyond the last tile have none.
template <typename Element, typename Tile>
__device__ __forceinline__ void prefetch_weight(const SparseArgs<Element>& args, int row_tile) {
  const StepRange steps = steps_here<Tile>(args);
#pragma unroll
  for (int i = 0; i < Tile::kWeightTiles; ++i) {
    const int64_t at = min(row_tile * Tile::kWeightTiles + i, args.weight_tiles - 1);
    hopper::prefetch_bytes(
        args.packed + (at * args.steps + steps.first) * kPackedBytes,
        static_cast<uint32_t>(min(steps.count, Tile::kStages * Tile::kStageSteps) * kPackedBytes));
  }
}

}  // namespace obs_kernels
