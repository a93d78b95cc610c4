// SPDX-License-Identifier: Apache-2.0
// The kernel of the sparse product, Y^T[R, T] = W[R, C] X^T[C, T]. One warp brings tiles of X and W
// to shared memory, two or three warpgroups multiply; tensor cores read both from there. (W from
// registers would spare them 2 KB of the 18 KB that an instruction reads, but brought to registers
// through the same shared memory it costs more than it spares: bench/micro.)
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

// Shared memory of a CTA: stages, each X and then W; buffers of Y; barriers. All found from one
// address, as the registers of the consumers are full.
template <typename Tile>
struct CtaMemory {
  uint32_t stages;

  __device__ __forceinline__ uint32_t epilogue() const {
    return stages + Tile::kStages * Tile::kStageBytes;
  }
  // Barrier: a stage has arrived.
  __device__ __forceinline__ uint32_t full(uint32_t stage) const {
    return epilogue() + kEpilogueBytes + 8 * stage;
  }
  // Barrier: all CTAs of the cluster are done with a stage.
  __device__ __forceinline__ uint32_t empty(uint32_t stage) const {
    return full(Tile::kStages + stage);
  }
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

// Calls fill(place, step, stage of shared memory, its barrier) for all stages of this CTA, one
// after the other, when they are free.
template <int kParts, int kTokens, typename Element, typename Fill>
__device__ __forceinline__ void fill_stages(const SparseArgs<Element>& args,
                                            CtaMemory<SparseTile<kParts, kTokens>> cta,
                                            const Fill& fill) {
  using Tile = SparseTile<kParts, kTokens>;
  StageRing<Tile::kStages> ring;
  const auto rank = static_cast<int>(hopper::cluster_rank());
  for (int tile = first_tile(args); tile < num_tiles(args); tile += tile_stride(args)) {
    const TilePlace place = place_of(tile, args.row_groups, args.token_tiles, args.cluster, rank);
    for (int step = 0; step < args.steps; ++step) {
      hopper::barrier_wait(cta.empty(ring.stage), ring.parity ^ 1);
      fill(place, step, cta.stages + ring.stage * Tile::kStageBytes, cta.full(ring.stage));
      ring.next();
    }
  }
}

// One thread: this CTA's share of X to all CTAs of the cluster. Tells its own barrier what the
// stage gets in all.
template <typename Element, int kParts, int kTokens, bool kFeatureX>
__device__ __forceinline__ void bring_tokens(const CUtensorMap& x_map,
                                             const SparseArgs<Element>& args,
                                             CtaMemory<SparseTile<kParts, kTokens>> cta) {
  using namespace hopper;
  using Tile = SparseTile<kParts, kTokens>;
  prefetch_map(&x_map);
  const auto rank = static_cast<int>(cluster_rank());
  const auto ctas = static_cast<uint16_t>((1u << args.cluster) - 1u);
  const auto fill = [&](const TilePlace& place, int step, uint32_t stage, uint32_t arrived) {
    barrier_expect(arrived, Tile::kStageBytes);
    for (int slab = rank; slab < Tile::kSlabs; slab += args.cluster) {
      const int token = place.token_tile * kTokens + slab * kSlabTokens;
      const int column = step * kStepCols;
      const int inner = kFeatureX ? token : column;
      const int outer = kFeatureX ? column : token;
      if (args.cluster > 1) {
        copy_box(stage + slab * kSlabBytes, &x_map, inner, outer, arrived, ctas);
      } else {
        copy_box(stage + slab * kSlabBytes, &x_map, inner, outer, arrived);
      }
    }
  };
  fill_stages<kParts, kTokens>(args, cta, fill);
}

// Another thread, as a copy takes some 70 cycles to issue: this CTA's W.
template <typename Element, int kParts, int kTokens>
__device__ __forceinline__ void bring_weight(const SparseArgs<Element>& args,
                                             CtaMemory<SparseTile<kParts, kTokens>> cta) {
  using Tile = SparseTile<kParts, kTokens>;
  const auto fill = [&](const TilePlace& place, int step, uint32_t stage, uint32_t arrived) {
#pragma unroll
    for (int i = 0; i < Tile::kWeightTiles; ++i) {
      // Rows beyond the last tile have no weight of their own: they repeat the last one, unseen.
      const int64_t at = min(place.row_tile * Tile::kWeightTiles + i, args.weight_tiles - 1);
      const uint8_t* from = args.packed + (at * args.steps + step) * kPackedBytes;
      hopper::copy_bytes(stage + kTokens * 128 + i * kWeightBytes, from, kWeightBytes, arrived);
    }
  };
  fill_stages<kParts, kTokens>(args, cta, fill);
}

// A warpgroup: sums of 64 rows and kTokens tokens, tile after tile.
template <typename Element, int kParts, int kTokens, bool kFeatureX>
__device__ __forceinline__ void consume(const CUtensorMap& y_map,
                                        const SparseArgs<Element>& args,
                                        CtaMemory<SparseTile<kParts, kTokens>> cta,
                                        int warpgroup,
                                        int thread) {
  using namespace hopper;
  using Tile = SparseTile<kParts, kTokens>;
  constexpr uint32_t kLeading = kFeatureX ? kSlabBytes : 16;
  constexpr uint32_t kSecond = kFeatureX ? 32 * 128 : 64;  // bytes from columns 0 to 32 of a step
  StageRing<Tile::kStages> ring;
  float sum[kParts][kTokens / 2];
  uint32_t meta[2][kParts];

  const auto weight_at = [&](int part) {
    return cta.stages + ring.stage * Tile::kStageBytes + kTokens * 128 +
           (warpgroup * kParts + part) * kWeightBytes;
  };
  const auto load_meta = [&](uint32_t (&to)[kParts]) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      load_shared(to[part], weight_at(part) + kValueBytes + thread * 4);
    }
  };
  const auto release = [&](uint32_t stage) {
    if (thread < args.cluster) barrier_arrive(cta.empty(stage), static_cast<uint32_t>(thread));
  };
  // Multiplies the stage at hand, whose metadata is in `now`; meanwhile that of the next one comes
  // to `then`. The stage before goes back as soon as its products are done, which is when the first
  // product of this one may begin: a thread that has issued all of them would be late for it.
  const auto multiply = [&](const uint32_t (&now)[kParts], uint32_t (&then)[kParts], int step) {
    const uint32_t x = cta.stages + ring.stage * Tile::kStageBytes;
    const uint64_t first = swizzled_operand<128>(x, kLeading, 1024);
    const uint64_t second = swizzled_operand<128>(x + kSecond, kLeading, 1024);
    product_fence();
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const uint32_t w = weight_at(part);
      sparse_product<Element, kTokens, 0, kFeatureX>(
          sum[part], swizzled_operand<64>(w, 16, 512), first, now[part], step);
      if (part == 0) {
        product_commit();
        product_wait<1>();
        if (step > 0) release(ring.before());
      }
      sparse_product<Element, kTokens, 1, kFeatureX>(
          sum[part], swizzled_operand<64>(w + 32, 16, 512), second, now[part], 1);
    }
    product_commit();
    ring.next();
    if (step + 1 < args.steps) {
      barrier_wait(cta.full(ring.stage), ring.parity);
      load_meta(then);
    }
  };

  for (int tile = first_tile(args); tile < num_tiles(args); tile += tile_stride(args)) {
    const auto rank = static_cast<int>(cluster_rank());
    const TilePlace at = place_of(tile, args.row_groups, args.token_tiles, args.cluster, rank);
    barrier_wait(cta.full(ring.stage), ring.parity);
    load_meta(meta[0]);
    int step = 0;
    for (; step + 1 < args.steps; step += 2) {
      multiply(meta[0], meta[1], step);
      multiply(meta[1], meta[0], step + 1);
    }
    if (step < args.steps) multiply(meta[0], meta[1], step);

    SumPlace place{};
    place.first_row = (at.row_tile * kConsumers + warpgroup) * kParts * kPartRows;
    place.first_token = at.token_tile * kTokens;
    place.row = place.first_row + thread / 32 * 16 + thread % 32 / 4;
    place.warpgroup = warpgroup;
    place.thread = thread;
    float bias[kParts][2];  // while the last product is on its way
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      load_bias(bias[part], args, place.row + part * kPartRows);
    }
    product_wait<0>();
    release(ring.before());

    const uint32_t buffers = cta.epilogue() + warpgroup * kBuffers * kSlabBytes;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      // The wait does not name the sums: this keeps the compiler from reading them before it.
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) asm volatile("" : "+f"(sum[part][i])::"memory");
      finish_sums(sum[part], bias[part], args.activation);
      if (args.boxes) {
        write_boxes<Element, kTokens>(sum[part], y_map, args, place, buffers);
      } else {
        write_elements<Element, kTokens>(sum[part], args, place);
      }
      place.first_row += kPartRows;
      place.row += kPartRows;
    }
  }
  if (thread == 0) store_wait_read<0>();
}

template <typename Element, int kParts, int kTokens, bool kFeatureX>
__global__ __launch_bounds__(kSparseThreads,
                             1) void sparse_linear_kernel(const __grid_constant__ CUtensorMap x_map,
                                                          const __grid_constant__ CUtensorMap y_map,
                                                          const SparseArgs<Element> args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace hopper;
  using Tile = SparseTile<kParts, kTokens>;
  extern __shared__ uint8_t raw[];
  const CtaMemory<Tile> cta{(shared_address(raw) + 1023u) & ~1023u};

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      barrier_init(cta.full(stage), 1);
      barrier_init(cta.empty(stage), static_cast<uint32_t>(kConsumers * args.cluster));
    }
    fence_barrier_init();
  }
  cluster_sync();

  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup;
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  if (warpgroup == kConsumers) {
    give_registers<40>();
    if (thread == 0) bring_tokens<Element, kParts, kTokens, kFeatureX>(x_map, args, cta);
    if (thread == 32) bring_weight<Element, kParts, kTokens>(args, cta);
  } else {
    take_registers<232>();
    consume<Element, kParts, kTokens, kFeatureX>(y_map, args, cta, warpgroup, thread);
  }
  // Copies and arrivals of the others must find this CTA alive.
  cluster_sync();
#else
  __trap();  // a build that lacks sm_90a must not leave y as it was
#endif
}

}  // namespace obs_kernels
