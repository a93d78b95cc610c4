// SPDX-License-Identifier: Apache-2.0
// The kernel of the sparse product, Y^T[R, T] = W[R, C] X^T[C, T]. One warp brings tiles of X and W
// to shared memory, two warpgroups multiply; W goes on to registers, X is read by the tensor cores.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/hopper.cuh"
#include "matmul/sparse_config.h"
#include "matmul/wgmma_sp.cuh"
#include "obs_kernels/matmul.h"

namespace obs_kernels {

inline constexpr int kWarpgroup = 128;
inline constexpr int kConsumers = 2;  // warpgroups, kTileRows / 64
inline constexpr int kSparseThreads = (kConsumers + 1) * kWarpgroup;
inline constexpr int kSharedLimit = 227 * 1024;
inline constexpr int kSlabTokens = 64;       // of a box of X, and of a box of Y
inline constexpr int kSlabBytes = 64 * 128;  // 64 tokens of 64 columns, or 64 columns of 64 tokens
inline constexpr int kHalfTileBytes = static_cast<int>(kPackedBytes) / kConsumers;
// Slabs of Y that a warpgroup has on their way out; a fourth would cost a stage.
inline constexpr int kBuffers = 3;
inline constexpr int kEpilogueBytes = kConsumers * kBuffers * kSlabBytes;

// Sizes of shared memory for a tile of kTokens tokens.
template <int kTokens>
struct SparseStages {
  static constexpr int kSlabs = kTokens / kSlabTokens;
  static constexpr int kStageBytes = kTokens * 128 + static_cast<int>(kPackedBytes);
  static constexpr int kAround = 1024 + kEpilogueBytes + 256;  // alignment, epilogue, barriers
  static constexpr int kStages = (kSharedLimit - kAround) / kStageBytes;
  static constexpr int kBytes = kAround + kStages * kStageBytes;
  static_assert(kStages >= 3, "a stage is multiplied, one is fetched to registers, one is filled");
  static_assert(kSlabs >= 2,
                "each CTA of a cluster of two brings a part, which keeps them in step");
  static_assert(kSlabs <= 2 * kBuffers, "two passes write a tile of Y");
  static_assert(kStageBytes % 1024 == 0, "the swizzle wants stages of whole patterns");
};

template <typename Element>
struct SparseArgs {
  const uint8_t* packed;
  const Element* bias;
  Element* y;
  int64_t rows;
  int64_t tokens;
  int steps;       // of kStepCols columns
  int row_tiles;   // that exist; those of the last cluster may be more
  int row_groups;  // row tiles / cluster, rounded up
  int token_tiles;
  int cluster;
  Activation activation;
  bool feature_y;
  bool boxes;  // y is written by the copy engine; else element by element, for odd sizes
};

struct TilePlace {
  int row_tile;
  int token_tile;
};

// Tiles in groups of kRasterTokens token tiles; within a group the tokens run first.
__device__ __forceinline__ TilePlace
place_of(int tile, int row_groups, int token_tiles, int cluster, int rank) {
  const int whole = kRasterTokens * row_groups;
  const int first = tile / whole * kRasterTokens;
  const int width = min(kRasterTokens, token_tiles - first);
  const int in = tile % whole;
  return {in / width * cluster + rank, first + in % width};
}

// In f32, as the reference does; relu keeps NaN.
template <Activation kActivation>
__device__ __forceinline__ float activate(float value) {
  if constexpr (kActivation == Activation::kRelu) {
    return value < 0.0f ? 0.0f : value;
  } else if constexpr (kActivation == Activation::kGelu) {
    return 0.5f * value * (1.0f + erff(value * 0.70710678118654752f));
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    const float cube = value * value * value;
    return 0.5f * value * (1.0f + tanhf(0.79788456080286536f * (value + 0.044715f * cube)));
  } else {
    static_assert(kActivation == Activation::kSilu, "one of the above");
    return value / (1.0f + __expf(-value));
  }
}

template <Activation kActivation, int kSums>
__device__ __forceinline__ void activate_all(float (&sum)[kSums]) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) sum[i] = activate<kActivation>(sum[i]);
}

__device__ __forceinline__ uint32_t pack_pair(float low, float high, const __nv_bfloat16*) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

__device__ __forceinline__ uint32_t pack_pair(float low, float high, const __half*) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// One step of W in the registers of a thread: two fragments of 32 columns, and the metadata of
// both.
struct WeightStep {
  Fragment part[2];
  uint32_t meta;
};

__device__ __forceinline__ void load_step(WeightStep& step, uint32_t half_tile, int thread) {
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(step.part[k].at[0]),
                   "=r"(step.part[k].at[1]),
                   "=r"(step.part[k].at[2]),
                   "=r"(step.part[k].at[3])
                 : "r"(half_tile + k * kWarpgroup * 16 + thread * 16));
  }
  asm volatile("ld.shared.b32 %0, [%1];"
               : "=r"(step.meta)
               : "r"(half_tile + 2 * kWarpgroup * 16 + thread * 4));
}

template <typename Element, int kTokens, bool kFeatureX>
__global__ __launch_bounds__(kSparseThreads,
                             1) void sparse_linear_kernel(const __grid_constant__ CUtensorMap x_map,
                                                          const __grid_constant__ CUtensorMap y_map,
                                                          const SparseArgs<Element> args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace hopper;
  using Stages = SparseStages<kTokens>;
  constexpr int kStages = Stages::kStages;
  extern __shared__ uint8_t raw[];
  const uint32_t base = (shared_address(raw) + 1023u) & ~1023u;
  const uint32_t epilogue = base + kStages * Stages::kStageBytes;
  const uint32_t full = epilogue + kEpilogueBytes;  // a stage has arrived: kStages barriers
  const uint32_t empty = full + 8 * kStages;        // all CTAs of the cluster are done with it

  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup;
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  const int cluster = args.cluster;
  const int rank = static_cast<int>(cluster_rank());
  const int first_tile = static_cast<int>(blockIdx.x) / cluster;
  const int tile_stride = static_cast<int>(gridDim.x) / cluster;
  const int num_tiles = args.row_groups * args.token_tiles;

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(full + 8 * stage, 1);
      barrier_init(empty + 8 * stage, static_cast<uint32_t>(kConsumers * cluster));
    }
    fence_barrier_init();
  }
  cluster_sync();

  uint32_t stage = 0;
  uint32_t parity = 0;
  const auto next = [&] {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  };

  if (warpgroup == kConsumers) {  // the producer
    give_registers<40>();
    if (thread == 0) {
      prefetch_map(&x_map);
      const auto ctas = static_cast<uint16_t>((1u << cluster) - 1u);
      for (int tile = first_tile; tile < num_tiles; tile += tile_stride) {
        const TilePlace place = place_of(tile, args.row_groups, args.token_tiles, cluster, rank);
        // A tile of rows beyond the last has no weight of its own: it repeats the last one, unseen.
        const uint8_t* weight =
            args.packed + static_cast<int64_t>(min(place.row_tile, args.row_tiles - 1)) *
                              args.steps * kPackedBytes;
        const int first_token = place.token_tile * kTokens;
        for (int step = 0; step < args.steps; ++step) {
          barrier_wait(empty + 8 * stage, parity ^ 1);
          const uint32_t arrived = full + 8 * stage;
          const uint32_t to = base + stage * Stages::kStageBytes;
          barrier_expect(arrived, Stages::kStageBytes);
          for (int slab = rank; slab < Stages::kSlabs; slab += cluster) {
            const int token = first_token + slab * kSlabTokens;
            const int column = step * kStepCols;
            const int inner = kFeatureX ? token : column;
            const int outer = kFeatureX ? column : token;
            if (cluster > 1) {
              copy_box(to + slab * kSlabBytes, &x_map, inner, outer, arrived, ctas);
            } else {
              copy_box(to + slab * kSlabBytes, &x_map, inner, outer, arrived);
            }
          }
          copy_bytes(to + kTokens * 128, weight + step * kPackedBytes, kPackedBytes, arrived);
          next();
        }
      }
      // What other CTAs still release must find this one alive: the cluster meets below.
    }
  } else {
    take_registers<232>();
    constexpr uint32_t kLeading = kFeatureX ? kSlabBytes : 16;
    constexpr uint32_t kSecond = kFeatureX ? 32 * 128 : 64;  // bytes from columns 0 to 32 of a step
    const int lane = thread % 32;
    const int warp = thread / 32;
    float sum[kTokens / 2];
    WeightStep weight[2];

    const auto half_tile = [&] {
      return base + stage * Stages::kStageBytes + kTokens * 128 + warpgroup * kHalfTileBytes;
    };
    const auto release = [&](uint32_t done) {
      if (thread < cluster) barrier_arrive(empty + 8 * done, static_cast<uint32_t>(thread));
    };

    for (int tile = first_tile; tile < num_tiles; tile += tile_stride) {
      const TilePlace place = place_of(tile, args.row_groups, args.token_tiles, cluster, rank);

      const int64_t first_row = static_cast<int64_t>(place.row_tile) * kTileRows + warpgroup * 64;
      const int64_t first_token = static_cast<int64_t>(place.token_tile) * kTokens;
      const int64_t row = first_row + warp * 16 + lane / 4;  // and row + 8
      float bias[2] = {0.0f, 0.0f};
      if (args.bias != nullptr) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (row + 8 * half < args.rows)
            bias[half] = static_cast<float>(args.bias[row + 8 * half]);
        }
      }

      // Multiplies the step in `now`, whose stage is `stage`; meanwhile the next one comes to
      // `then`, whose registers the product before has just given back.
      const auto multiply = [&](WeightStep& now, WeightStep& then, int step) {
        const uint32_t x = base + stage * Stages::kStageBytes;
        product_fence();
        sparse_product<Element, kTokens, 0, kFeatureX>(
            sum, now.part[0], swizzled_operand(x, kLeading, 1024), now.meta, step);
        sparse_product<Element, kTokens, 1, kFeatureX>(
            sum, now.part[1], swizzled_operand(x + kSecond, kLeading, 1024), now.meta, 1);
        product_commit();
        const uint32_t before = stage == 0 ? kStages - 1 : stage - 1;
        product_wait<1>();
        if (step > 0) release(before);
        next();
        if (step + 1 < args.steps) {
          barrier_wait(full + 8 * stage, parity);
          load_step(then, half_tile(), thread);
        }
      };

      barrier_wait(full + 8 * stage, parity);
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
      release(stage == 0 ? kStages - 1 : stage - 1);

      // --- Epilogue: bias, activation, rounding, and out -------------------------------------
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) sum[i] += bias[i / 2 % 2];
      switch (args.activation) {
        case Activation::kRelu:
          activate_all<Activation::kRelu>(sum);
          break;
        case Activation::kGelu:
          activate_all<Activation::kGelu>(sum);
          break;
        case Activation::kGeluTanh:
          activate_all<Activation::kGeluTanh>(sum);
          break;
        case Activation::kSilu:
          activate_all<Activation::kSilu>(sum);
          break;
        case Activation::kNone:
          break;
      }
      if (args.boxes) {
        const int matrix = lane / 8;  // of the four that one instruction stores
        const uint32_t buffers = epilogue + warpgroup * kBuffers * kSlabBytes;
#pragma unroll
        for (int first = 0; first < Stages::kSlabs; first += kBuffers) {
          const int last = first + kBuffers < Stages::kSlabs ? first + kBuffers : Stages::kSlabs;
          // The stores of this thread that may still be reading are of buffers not used now.
          if (thread == 0) {
            if (first == 0) {
              store_wait_read<0>();
            } else {
              store_wait_read<2 * kBuffers - Stages::kSlabs>();
            }
          }
          named_barrier(1 + warpgroup, kWarpgroup);
#pragma unroll
          for (int slab = first; slab < last; ++slab) {
            const uint32_t buffer = buffers + (slab - first) * kSlabBytes;
#pragma unroll
            for (int pair = 0; pair < 4; ++pair) {  // 16 tokens
              uint32_t part[4];
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                const int i = slab * 32 + pair * 8 + 2 * j;
                part[j] = pack_pair(sum[i], sum[i + 1], static_cast<const Element*>(nullptr));
              }
              // Matrices: rows 0 to 7 and 8 to 15 of the first 8 tokens, then of the next 8.
              if (args.feature_y) {
                const int line = warp * 16 + 8 * (matrix % 2) + lane % 8;
                const int chunk = 2 * pair + matrix / 2;
                store_matrices<false>(buffer + line * 128 + ((chunk ^ (line % 8)) << 4), part);
              } else {
                const int line = 16 * pair + 8 * (matrix / 2) + lane % 8;
                const int chunk = 2 * warp + matrix % 2;
                store_matrices<true>(buffer + line * 128 + ((chunk ^ (line % 8)) << 4), part);
              }
            }
          }
          fence_async_shared();
          named_barrier(1 + warpgroup, kWarpgroup);
          if (thread == 0) {
            const auto line = static_cast<int>(first_row);
            for (int slab = first; slab < last; ++slab) {
              const int token = static_cast<int>(first_token) + slab * kSlabTokens;
              const uint32_t buffer = buffers + (slab - first) * kSlabBytes;
              if (line < args.rows && token < args.tokens) {
                store_box(
                    &y_map, args.feature_y ? token : line, args.feature_y ? line : token, buffer);
              }
              store_commit();
            }
          }
        }
      } else {
#pragma unroll
        for (int i = 0; i < kTokens / 2; ++i) {
          const int64_t at_row = row + i / 2 % 2 * 8;
          const int64_t token = first_token + i / 4 * 8 + lane % 4 * 2 + i % 2;
          if (at_row < args.rows && token < args.tokens) {
            const int64_t at =
                args.feature_y ? at_row * args.tokens + token : token * args.rows + at_row;
            args.y[at] = static_cast<Element>(sum[i]);
          }
        }
      }
    }
    if (thread == 0) store_wait_read<0>();
  }
  cluster_sync();
#else
  __trap();  // a build that lacks sm_90a must not leave y as it was
#endif
}

}  // namespace obs_kernels
