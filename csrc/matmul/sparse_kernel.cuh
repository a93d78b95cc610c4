// SPDX-License-Identifier: Apache-2.0
// The kernel of the sparse product, Y^T[R, T] = W[R, C] X^T[C, T], for every pattern. One thread
// brings tiles of X and another tiles of W to shared memory, two or three warpgroups multiply.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/hopper.cuh"
#include "matmul/sparse_consumer.cuh"
#include "matmul/sparse_layout.cuh"

namespace obs_kernels {

// Calls fill(place, first step, steps, stage of shared memory, its barrier) for all stages of this
// CTA, one after the other, when they are free, and waits until all are again.
template <typename Element, typename Tile, typename Fill>
__device__ __forceinline__ void fill_stages(const SparseArgs<Element>& args,
                                            CtaMemory<Tile> cta,
                                            const Fill& fill) {
  StageRing<Tile::kStages> ring;
  const StepRange steps = steps_here<Tile>(args);
  for (int tile = first_tile(); tile < num_tiles(args); tile += tile_stride()) {
    const TilePlace place = place_here<Tile, false>(args, tile);
    for (int done = 0; done < steps.count; done += Tile::kStageSteps) {
      const int count = Tile::kStageSteps == 1 ? 1 : min(Tile::kStageSteps, steps.count - done);
      const uint32_t stage = cta.stages + ring.stage * Tile::kStageBytes;
      hopper::barrier_wait(cta.empty(ring.stage), ring.parity ^ 1);
      fill(place, steps.first + done, count, stage, cta.full(ring.stage));
      ring.next();
    }
  }
  if constexpr (!Tile::kSplit) wait_for_free_stages<Tile>(cta, ring);
}

// One thread: this CTA's share of X to all CTAs of the cluster. Tells its own barrier what the
// stage gets in all.
template <typename Element, typename Tile, bool kFeatureX>
__device__ __forceinline__ void bring_tokens(const CUtensorMap& x_map,
                                             const SparseArgs<Element>& args,
                                             CtaMemory<Tile> cta) {
  using namespace hopper;
  static_assert(!kFeatureX || Tile::kSplit || Tile::kSlabs >= 2,
                "each CTA of a cluster of two brings a part, which keeps them in step");
  static_assert(
      Tile::kTokens % 16 == 0 && Tile::kTokens <= 256,
      "a copy brings at most 256 tokens, and whole patterns of the swizzle for each of two");
  const int rank = Tile::kSplit ? 0 : static_cast<int>(cluster_rank());
  const auto ctas = static_cast<uint16_t>((1u << args.cluster) - 1u);
  const auto copy = [&](uint32_t to, int inner, int outer, uint32_t arrived) {
    if (args.cluster > 1) {
      copy_box(to, &x_map, inner, outer, arrived, ctas);
    } else {
      copy_box(to, &x_map, inner, outer, arrived);
    }
  };
  const int share = Tile::kTokens / args.cluster;  // tokens of a box, if not kFeatureX
  const auto fill =
      [&](const TilePlace& place, int step, int count, uint32_t stage, uint32_t arrived) {
        barrier_expect(arrived, static_cast<uint32_t>(count * Tile::kBroughtBytes));
        const int token = place.token_tile * Tile::kTokens;
        for (int i = 0; i < count; ++i) {
          const uint32_t to = stage + i * Tile::kTokenBytes;
          const int column = (step + i) * kStepCols;
          if constexpr (kFeatureX) {
            for (int slab = rank; slab < Tile::kSlabs; slab += args.cluster) {
              copy(to + slab * kSlabBytes, token + slab * kSlabTokens, column, arrived);
            }
          } else {  // one copy, as the thread is slow to issue several
            copy(to + rank * share * 128, column, token + rank * share, arrived);
          }
        }
      };
  fill_stages(args, cta, fill);
}

// Another thread, as a copy takes some 70 cycles to issue: this CTA's W.
template <typename Element, typename Tile>
__device__ __forceinline__ void bring_weight(const SparseArgs<Element>& args, CtaMemory<Tile> cta) {
  const auto fill =
      [&](const TilePlace& place, int step, int count, uint32_t stage, uint32_t arrived) {
#pragma unroll
        for (int i = 0; i < Tile::kWeightTiles; ++i) {
          // Rows beyond the last tile have no weight of their own: they repeat the last one,
          // unseen.
          const int64_t at = min(place.row_tile * Tile::kWeightTiles + i, args.weight_tiles - 1);
          const uint8_t* from = args.packed + (at * args.steps + step) * kPackedBytes;
          const auto bytes = static_cast<uint32_t>(count * kWeightBytes);
          hopper::copy_bytes(
              stage + Tile::kWeightAt + i * Tile::kStageSteps * kWeightBytes, from, bytes, arrived);
        }
      };
  fill_stages(args, cta, fill);
}

template <typename Element, typename Tile, bool kFeatureX>
__global__ __launch_bounds__(Tile::kThreads,
                             1) void sparse_linear_kernel(const __grid_constant__ CUtensorMap x_map,
                                                          const __grid_constant__ CUtensorMap y_map,
                                                          const SparseArgs<Element> args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace hopper;
  constexpr bool kTwo = Tile::kConsumers == 2;  // three get fewer registers each
  extern __shared__ uint8_t raw[];
  const CtaMemory<Tile> cta{(shared_address(raw) + 1023u) & ~1023u};

  let_next_grid_start();
  if (threadIdx.x == 0) {
    prefetch_map(&x_map);
    prefetch_map(&y_map);
    init_barriers(cta, 1, Tile::kConsumers * args.cluster);
    if constexpr (Tile::kSplit) expect_sums(args, cta);
  }
  if (threadIdx.x == 32) {
    prefetch_weight<Element, Tile>(args, place_here<Tile, false>(args, first_tile()).row_tile);
  }
  cluster_meet();
  wait_for_grids_before();

  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup;
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  if (warpgroup == Tile::kConsumers) {
    if constexpr (!Tile::kSplit) give_registers<kTwo ? 40 : 56>();  // sums of a split tile are few
    if (thread == 0) bring_tokens<Element, Tile, kFeatureX>(x_map, args, cta);
    if (thread == 32) bring_weight<Element, Tile>(args, cta);
  } else {
    if constexpr (!Tile::kSplit) take_registers<kTwo ? 232 : 152>();
    consume<Element, Tile, kFeatureX, false>(y_map, args, cta, warpgroup, thread);
  }
  // Copies of the others must find this CTA alive.
  cluster_meet();
#else
  __trap();  // a build that lacks sm_90a must not leave y as it was
#endif
}

}  // namespace obs_kernels
