// SPDX-License-Identifier: Apache-2.0
// Fisher blocks up to 8: a thread a block. The gradients of a sample are neighbours over the lanes;
// the sums go through shared memory, so that F is read and written the same way.
#pragma once

#include <cstdint>

#include "common/device.cuh"
#include "fisher/accumulate_config.h"
#include "fisher/accumulate_elements.cuh"
#include "obs_kernels/accumulate.h"

namespace obs_kernels::accumulate {

// Elements from one thread's sums to the next's. An odd number of 16-byte pieces (of elements,
// where the block has no whole pieces) keeps the accesses of a warp off each other's banks.
template <int kSize>
__host__ __device__ constexpr int sums_stride() {
  return kSize % 2 == 0 ? 4 * (kSize * kSize / 4 | 1) : kSize * kSize;
}

// The lower triangle row by row: 00 | 10 11 | 20 21 22 | ...
__host__ __device__ constexpr int product_at(int row, int col) {
  return row * (row + 1) / 2 + col;
}

template <typename Config>
__device__ __forceinline__ void prefetch_fisher(const float* warp_fisher, int live, int lane) {
  constexpr int kSector = 8;  // elements
  constexpr int kElements = 32 * Config::kSize * Config::kSize;
  const int elements = live * Config::kSize * Config::kSize;
#pragma unroll
  for (int first = 0; first < kElements; first += 32 * kSector) {
    const int at = first + lane * kSector;
    if (at < elements) prefetch_l2(warp_fisher + at);
  }
}

template <typename Config, typename Element, int kVector>
__device__ __forceinline__ void sum_products(const AccumulateParams& params,
                                             int64_t block,
                                             float (&sums)[product_at(Config::kSize, 0)]) {
  constexpr int kSize = Config::kSize;
  constexpr int kPieces = kSize / kVector;
  constexpr int kWords = words_of<Element, kVector>();
  constexpr int kByWords = Config::kWordsAhead / (kPieces * kWords);
  constexpr int kByLoads = Config::kLoadsAhead / kPieces;
  constexpr int kAhead = kByWords < kByLoads ? kByWords : kByLoads;
  constexpr int kSamples = kAhead < 4 ? 4 : kAhead;

  const char* const column =
      static_cast<const char*>(params.grads) + block * (kSize * Element::kBytes);
  const int64_t row_bytes = params.row_stride * Element::kBytes;
#pragma unroll
  for (float& sum : sums) sum = 0.0f;
#pragma unroll 1
  for (int64_t start = 0; start < params.num_samples; start += kSamples) {
    uint32_t words[kSamples][kPieces][kWords];
#pragma unroll
    for (int s = 0; s < kSamples; ++s) {
      // Beyond the last sample the last one is read again and cleared: no branch among the loads.
      const int64_t sample = min(start + s, params.num_samples - 1);
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        load_words<Element, kVector>(
            column + sample * row_bytes + piece * kVector * Element::kBytes, words[s][piece]);
      }
    }
#pragma unroll
    for (int s = 0; s < kSamples; ++s) {
      float g[kSize];
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
        for (uint32_t& word : words[s][piece]) word = start + s < params.num_samples ? word : 0;
        widen<Element, kVector>(words[s][piece], g + piece * kVector);
      }
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
#pragma unroll
        for (int j = 0; j <= i; ++j) {
          sums[product_at(i, j)] = fmaf(g[i], g[j], sums[product_at(i, j)]);
        }
      }
    }
  }
}

template <int kSize>
__device__ __forceinline__ void spread_sums(const float (&sums)[product_at(kSize, 0)],
                                            float* shared) {
  constexpr int kPiece = kSize % 2 == 0 ? 4 : 1;
#pragma unroll
  for (int first = 0; first < kSize * kSize; first += kPiece) {
    Piece<float, kPiece> piece;
#pragma unroll
    for (int at = 0; at < kPiece; ++at) {
      const int i = (first + at) / kSize;
      const int j = (first + at) % kSize;
      piece.at[at] = sums[i < j ? product_at(j, i) : product_at(i, j)];
    }
    *reinterpret_cast<Piece<float, kPiece>*>(shared + first) = piece;
  }
}

// F of the blocks of a warp, consecutive lanes on consecutive pieces.
template <typename Config, int kPiece>
__device__ __forceinline__ void add_to_fisher(
    float* warp_fisher, const float* shared, float scale, int live, int lane) {
  constexpr int kOfBlock = Config::kSize * Config::kSize / kPiece;
  using Part = Piece<float, kPiece>;
  auto* const fisher = reinterpret_cast<Part*>(warp_fisher);
  const int pieces = live * kOfBlock;
#pragma unroll
  for (int start = 0; start < kOfBlock; start += Config::kPiecesAhead) {
    Part old[Config::kPiecesAhead];
#pragma unroll
    for (int ahead = 0; ahead < Config::kPiecesAhead; ++ahead) {
      const int at = (start + ahead) * 32 + lane;
      if (start + ahead < kOfBlock && at < pieces) old[ahead] = fisher[at];
    }
#pragma unroll
    for (int ahead = 0; ahead < Config::kPiecesAhead; ++ahead) {
      const int at = (start + ahead) * 32 + lane;
      if (start + ahead >= kOfBlock || at >= pieces) continue;
      const auto sum = *reinterpret_cast<const Part*>(
          shared + at / kOfBlock * sums_stride<Config::kSize>() + at % kOfBlock * kPiece);
#pragma unroll
      for (int e = 0; e < kPiece; ++e) old[ahead].at[e] = fmaf(scale, sum.at[e], old[ahead].at[e]);
      fisher[at] = old[ahead];
    }
  }
}

template <typename Config, typename Element, int kVector>
__global__ __launch_bounds__(Config::kThreads, Config::kMinBlocks) void accumulate_thread_kernel(
    AccumulateParams params, bool fisher_aligned) {
  constexpr int kSize = Config::kSize;
  constexpr int kStride = sums_stride<kSize>();
  alignas(16) __shared__ float shared[Config::kThreads * kStride];

  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int64_t block = int64_t{blockIdx.x} * Config::kThreads + thread;
  const int64_t first = block - lane;  // of the warp
  const int live = static_cast<int>(max(int64_t{0}, min(int64_t{32}, params.num_blocks - first)));
  float* const warp_fisher = params.fisher + (live > 0 ? first * (kSize * kSize) : 0);

  if constexpr (Config::kPrefetch) prefetch_fisher<Config>(warp_fisher, live, lane);
  float sums[product_at(kSize, 0)];
  // A lane without a block does the last one's work once more and stores nothing.
  sum_products<Config, Element, kVector>(params, min(block, params.num_blocks - 1), sums);
  spread_sums<kSize>(sums, shared + thread * kStride);
  __syncwarp();
  const float* const warp_sums = shared + (thread - lane) * kStride;
  if constexpr (kSize % 2 == 0) {
    if (fisher_aligned) {
      add_to_fisher<Config, 4>(warp_fisher, warp_sums, params.scale, live, lane);
      return;
    }
  }
  add_to_fisher<Config, 1>(warp_fisher, warp_sums, params.scale, live, lane);
}

}  // namespace obs_kernels::accumulate
