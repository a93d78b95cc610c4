// SPDX-License-Identifier: Apache-2.0
// The kernel of the sparse product, Y^T[R, T] = W[R, C] X^T[C, T]. One warp brings tiles of X and W
// to shared memory, two warpgroups multiply; W goes on to registers, X is read by the tensor cores.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/hopper.cuh"
#include "matmul/sparse_config.h"
#include "matmul/sparse_epilogue.cuh"
#include "matmul/sparse_layout.cuh"
#include "matmul/wgmma_sp.cuh"
#include "obs_kernels/matmul.h"

namespace obs_kernels {

// One step of W in the registers of a thread: two fragments of 32 columns, and the metadata of
// both.
struct WeightStep {
  Fragment part[2];
  uint32_t meta;
};

__device__ __forceinline__ void load_step(WeightStep& step, uint32_t half_tile, int thread) {
  hopper::load_shared(step.part[0].at, half_tile + thread * 16);
  hopper::load_shared(step.part[1].at, half_tile + kWarpgroup * 16 + thread * 16);
  hopper::load_shared(step.meta, half_tile + 2 * kWarpgroup * 16 + thread * 4);
}

// Shared memory of a CTA, and its place in the cluster and in the grid.
struct CtaPlace {
  uint32_t stages;    // X of a stage, then W
  uint32_t epilogue;  // buffers of Y
  uint32_t full;      // barriers: a stage has arrived
  uint32_t empty;     // barriers: all CTAs of the cluster are done with a stage
  int rank;           // in the cluster
  int first_tile;
  int tile_stride;
  int num_tiles;
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

// One thread: stage after stage, this CTA's share of X to all CTAs of the cluster, and its own W.
template <typename Element, int kTokens, bool kFeatureX>
__device__ __forceinline__ void produce(const CUtensorMap& x_map,
                                        const SparseArgs<Element>& args,
                                        const CtaPlace& cta) {
  using namespace hopper;
  using Stages = SparseStages<kTokens>;
  StageRing<Stages::kStages> ring;
  prefetch_map(&x_map);
  const auto ctas = static_cast<uint16_t>((1u << args.cluster) - 1u);
  for (int tile = cta.first_tile; tile < cta.num_tiles; tile += cta.tile_stride) {
    const TilePlace place =
        place_of(tile, args.row_groups, args.token_tiles, args.cluster, cta.rank);
    // A tile of rows beyond the last has no weight of its own: it repeats the last one, unseen.
    const uint8_t* weight =
        args.packed +
        static_cast<int64_t>(min(place.row_tile, args.row_tiles - 1)) * args.steps * kPackedBytes;
    const int first_token = place.token_tile * kTokens;
    for (int step = 0; step < args.steps; ++step) {
      barrier_wait(cta.empty + 8 * ring.stage, ring.parity ^ 1);
      const uint32_t arrived = cta.full + 8 * ring.stage;
      const uint32_t to = cta.stages + ring.stage * Stages::kStageBytes;
      barrier_expect(arrived, Stages::kStageBytes);
      for (int slab = cta.rank; slab < Stages::kSlabs; slab += args.cluster) {
        const int token = first_token + slab * kSlabTokens;
        const int column = step * kStepCols;
        const int inner = kFeatureX ? token : column;
        const int outer = kFeatureX ? column : token;
        if (args.cluster > 1) {
          copy_box(to + slab * kSlabBytes, &x_map, inner, outer, arrived, ctas);
        } else {
          copy_box(to + slab * kSlabBytes, &x_map, inner, outer, arrived);
        }
      }
      copy_bytes(to + kTokens * 128, weight + step * kPackedBytes, kPackedBytes, arrived);
      ring.next();
    }
  }
}

// A warpgroup: sums of 64 rows and kTokens tokens, tile after tile.
template <typename Element, int kTokens, bool kFeatureX>
__device__ __forceinline__ void consume(const CUtensorMap& y_map,
                                        const SparseArgs<Element>& args,
                                        const CtaPlace& cta,
                                        int warpgroup,
                                        int thread) {
  using namespace hopper;
  using Stages = SparseStages<kTokens>;
  constexpr uint32_t kLeading = kFeatureX ? kSlabBytes : 16;
  constexpr uint32_t kSecond = kFeatureX ? 32 * 128 : 64;  // bytes from columns 0 to 32 of a step
  StageRing<Stages::kStages> ring;
  float sum[kTokens / 2];
  WeightStep weight[2];

  const auto half_tile = [&] {
    return cta.stages + ring.stage * Stages::kStageBytes + kTokens * 128 +
           warpgroup * kHalfTileBytes;
  };
  const auto release = [&](uint32_t stage) {
    if (thread < args.cluster) barrier_arrive(cta.empty + 8 * stage, static_cast<uint32_t>(thread));
  };
  // Multiplies the step in `now`, whose stage is at hand; meanwhile the next one comes to `then`,
  // whose registers the product before has just given back.
  const auto multiply = [&](WeightStep& now, WeightStep& then, int step) {
    const uint32_t x = cta.stages + ring.stage * Stages::kStageBytes;
    product_fence();
    sparse_product<Element, kTokens, 0, kFeatureX>(
        sum, now.part[0], swizzled_operand(x, kLeading, 1024), now.meta, step);
    sparse_product<Element, kTokens, 1, kFeatureX>(
        sum, now.part[1], swizzled_operand(x + kSecond, kLeading, 1024), now.meta, 1);
    product_commit();
    product_wait<1>();
    if (step > 0) release(ring.before());
    ring.next();
    if (step + 1 < args.steps) {
      barrier_wait(cta.full + 8 * ring.stage, ring.parity);
      load_step(then, half_tile(), thread);
    }
  };

  for (int tile = cta.first_tile; tile < cta.num_tiles; tile += cta.tile_stride) {
    const TilePlace at = place_of(tile, args.row_groups, args.token_tiles, args.cluster, cta.rank);
    SumPlace place{};
    place.first_row = static_cast<int64_t>(at.row_tile) * kTileRows + warpgroup * 64;
    place.first_token = static_cast<int64_t>(at.token_tile) * kTokens;
    place.row = place.first_row + thread / 32 * 16 + thread % 32 / 4;
    place.warpgroup = warpgroup;
    place.thread = thread;
    float bias[2];
    load_bias(bias, args, place.row);  // early: nothing waits for it

    barrier_wait(cta.full + 8 * ring.stage, ring.parity);
    load_step(weight[0], half_tile(), thread);
    int step = 0;
    for (; step + 1 < args.steps; step += 2) {
      multiply(weight[0], weight[1], step);
      multiply(weight[1], weight[0], step + 1);
    }
    if (step < args.steps) multiply(weight[0], weight[1], step);
    product_wait<0>();
    // The wait does not name the sums: this keeps the compiler from reading them before it.
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) asm volatile("" : "+f"(sum[i])::"memory");
    release(ring.before());

    finish_sums(sum, bias, args.activation);
    if (args.boxes) {
      const uint32_t buffers = cta.epilogue + warpgroup * kBuffers * kSlabBytes;
      write_boxes<Element, kTokens>(sum, y_map, args, place, buffers);
    } else {
      write_elements<Element, kTokens>(sum, args, place);
    }
  }
  if (thread == 0) store_wait_read<0>();
}

template <typename Element, int kTokens, bool kFeatureX>
__global__ __launch_bounds__(kSparseThreads,
                             1) void sparse_linear_kernel(const __grid_constant__ CUtensorMap x_map,
                                                          const __grid_constant__ CUtensorMap y_map,
                                                          const SparseArgs<Element> args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace hopper;
  using Stages = SparseStages<kTokens>;
  extern __shared__ uint8_t raw[];
  CtaPlace cta{};
  cta.stages = (shared_address(raw) + 1023u) & ~1023u;
  cta.epilogue = cta.stages + Stages::kStages * Stages::kStageBytes;
  cta.full = cta.epilogue + kEpilogueBytes;
  cta.empty = cta.full + 8 * Stages::kStages;
  cta.rank = static_cast<int>(cluster_rank());
  cta.first_tile = static_cast<int>(blockIdx.x) / args.cluster;
  cta.tile_stride = static_cast<int>(gridDim.x) / args.cluster;
  cta.num_tiles = args.row_groups * args.token_tiles;

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Stages::kStages; ++stage) {
      barrier_init(cta.full + 8 * stage, 1);
      barrier_init(cta.empty + 8 * stage, static_cast<uint32_t>(kConsumers * args.cluster));
    }
    fence_barrier_init();
  }
  cluster_sync();

  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup;
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  if (warpgroup == kConsumers) {
    give_registers<40>();
    if (thread == 0) produce<Element, kTokens, kFeatureX>(x_map, args, cta);
  } else {
    take_registers<232>();
    consume<Element, kTokens, kFeatureX>(y_map, args, cta, warpgroup, thread);
  }
  // Copies and arrivals of the others must find this CTA alive.
  cluster_sync();
#else
  __trap();  // a build that lacks sm_90a must not leave y as it was
#endif
}

}  // namespace obs_kernels
