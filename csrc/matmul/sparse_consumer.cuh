// SPDX-License-Identifier: Apache-2.0
// The half of the sparse product that multiplies: warpgroups whose tensor cores read X and W
// from the stages of shared memory that others fill. (W from registers would spare them 2 KB of the
// 18 KB that an instruction reads, but brought to registers through the same shared memory it costs
// more than it spares: bench/micro.)
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/hopper.cuh"
#include "matmul/sparse_epilogue.cuh"
#include "matmul/sparse_layout.cuh"
#include "matmul/sparse_split.cuh"
#include "matmul/wgmma_sp.cuh"

namespace obs_kernels {

// A warpgroup: its sums of a tile, tile after tile. kFeatureX: X lies token after token within a
// column. kGathered: threads copied it, so that the tensor cores must be fenced from their writes.
template <typename Element, typename Tile, bool kFeatureX, bool kGathered>
__device__ __forceinline__ void consume(const CUtensorMap& y_map,
                                        const SparseArgs<Element>& args,
                                        CtaMemory<Tile> cta,
                                        int warpgroup,
                                        int thread) {
  using namespace hopper;
  constexpr int kParts = Tile::kParts;
  constexpr int kTokens = Tile::kSumTokens;
  constexpr int kSteps = Tile::kStageSteps;
  constexpr int kMeta = kParts * kSteps;
  const int row_part = Tile::kShareRows ? 0 : warpgroup * kParts;  // of the 64 rows of a product
  const int token_part = Tile::kShareRows ? warpgroup * kTokens : 0;
  // A slab of feature-major X has a token's 16 bits in each line.
  const int part_bytes = token_part * (kFeatureX && kTokens < kSlabTokens ? 2 : 128);
  const StepRange steps = steps_here<Tile>(args);
  constexpr uint32_t kLeading = kFeatureX ? kSlabBytes : 16;
  constexpr uint32_t kSecond = kFeatureX ? 32 * 128 : 64;  // bytes from columns 0 to 32 of a step
  StageRing<Tile::kStages> ring;
  float sum[kParts][kTokens / 2];
  uint32_t meta[2][kMeta];  // of this stage and of the next, by turns

  const auto weight_at = [&](int part, int step) {
    return cta.stages + ring.stage * Tile::kStageBytes + Tile::kWeightAt +
           ((row_part + part) * kSteps + step) * kWeightBytes;
  };
  const auto load_meta = [&](uint32_t (&to)[kMeta]) {
#pragma unroll
    for (int i = 0; i < kMeta; ++i) {
      load_shared(to[i], weight_at(i / kSteps, i % kSteps) + kValueBytes + thread * 4);
    }
  };
  const auto arrived = [&] {
    barrier_wait(cta.full(ring.stage), ring.parity);
    if constexpr (kGathered) fence_async_shared();
  };
  const auto release = [&](uint32_t stage) {
    if constexpr (Tile::kSplit) {
      if (thread == 0) barrier_arrive(cta.empty(stage), cluster_rank());
    } else {
      if (thread < args.cluster) barrier_arrive(cta.empty(stage), static_cast<uint32_t>(thread));
    }
  };
  // Multiplies `here` steps of the stage at hand, a constant, before which `done` are done; their
  // metadata is in `now`, and meanwhile that of the next stage comes to `then`. The stage before
  // goes back as soon as its products are done, which is when the first product of this one may
  // begin: a thread that has issued all of them would be late for it.
  const auto multiply =
      [&](const int here, const uint32_t (&now)[kMeta], uint32_t (&then)[kMeta], int done) {
        product_fence();
#pragma unroll
        for (int i = 0; i < kParts * here; ++i) {
          const int part = i % kParts;
          const int step = i / kParts;
          const uint32_t x =
              cta.stages + ring.stage * Tile::kStageBytes + step * Tile::kTokenBytes + part_bytes;
          const uint32_t w = weight_at(part, step);
          const uint32_t places = now[part * kSteps + step];
          sparse_product<Element, kTokens, 0, kFeatureX>(sum[part],
                                                         swizzled_operand<64>(w, 16, 512),
                                                         swizzled_operand<128>(x, kLeading, 1024),
                                                         places,
                                                         done + step);
          if (i == 0) {
            product_commit();
            product_wait<1>();
            if (done > 0) release(ring.before());
          }
          sparse_product<Element, kTokens, 1, kFeatureX>(
              sum[part],
              swizzled_operand<64>(w + 32, 16, 512),
              swizzled_operand<128>(x + kSecond, kLeading, 1024),
              places,
              1);
        }
        product_commit();
        ring.next();
        if (done + here < steps.count) {
          arrived();
          load_meta(then);
        }
      };

  for (int tile = first_tile(); tile < num_tiles(args); tile += tile_stride()) {
    const TilePlace at = place_here<Tile, kGathered>(args, tile);
    arrived();
    load_meta(meta[0]);
    // Stages in full, then what is left: with a condition among the products of a stage the
    // compiler would wait for each of them.
    int done = 0;
    for (; done + 2 * kSteps <= steps.count; done += 2 * kSteps) {
      multiply(kSteps, meta[0], meta[1], done);
      multiply(kSteps, meta[1], meta[0], done + kSteps);
    }
    if constexpr (kSteps == 1) {
      if (done < steps.count) multiply(kSteps, meta[0], meta[1], done);
    } else {
      static_assert(kSteps == 2, "none, one, two or three steps are left");
      if (done + kSteps <= steps.count) {
        multiply(kSteps, meta[0], meta[1], done);
        if (done + kSteps < steps.count) multiply(1, meta[1], meta[0], done + kSteps);
      } else if (done < steps.count) {
        multiply(1, meta[0], meta[1], done);
      }
    }

    SumPlace place{};
    place.first_row =
        (Tile::kShareRows ? at.row_tile : at.row_tile * Tile::kConsumers + warpgroup) * kParts *
        kPartRows;
    place.first_token = at.token_tile * Tile::kTokens + token_part;
    place.warpgroup = warpgroup;
    place.thread = thread;
    float bias[kParts][2];  // while the last product is on its way
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      load_bias(bias[part], args, place.row() + part * kPartRows);
    }
    product_wait<0>();
    release(ring.before());

    // The wait does not name the sums: this keeps the compiler from reading them before it.
    const auto hold = [](float (&sums)[kTokens / 2]) {
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) asm volatile("" : "+f"(sums[i])::"memory");
    };
    if constexpr (Tile::kSplit) {
      hold(sum[0]);
      finish_split<Tile::kMostSplit, Element, Tile>(sum[0], bias[0], y_map, args, place, cta);
      return;
    } else {
      const uint32_t buffers = cta.epilogue() + warpgroup * kBuffers * kSlabBytes;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        hold(sum[part]);
        finish_sums(sum[part], bias[part], args.activation);
        const int slabs_before = part * (kTokens / kSlabTokens);
        if (!args.boxes) {
          write_elements<Element, kTokens>(sum[part], args, place);
        } else if (args.feature_y) {
          write_boxes<Element, kTokens, true>(sum[part], y_map, place, buffers, slabs_before);
        } else {
          write_boxes<Element, kTokens, false>(sum[part], y_map, place, buffers, slabs_before);
        }
        place.first_row += kPartRows;
      }
    }
  }
  if (thread == 0) store_wait_read<0>();
}

}  // namespace obs_kernels
