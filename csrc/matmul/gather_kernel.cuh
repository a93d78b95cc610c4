// SPDX-License-Identifier: Apache-2.0
// The kernel of the sparse product for panels, v:2:m: the rows of a panel keep columns among the
// same four of m, so a tile multiplies only those: C / m * 4 columns, of which W keeps two of four.
// X is feature-major, and a warpgroup picks its columns (512 bytes for 256 tokens) by 16-byte
// copies where copies of whole boxes would bring all.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "common/hopper.cuh"
#include "matmul/sparse_consumer.cuh"
#include "matmul/sparse_layout.cuh"

namespace obs_kernels {

inline constexpr int kGroupColumns = 4;
inline constexpr int kStepGroups = kStepCols / kGroupColumns;
inline constexpr int kGatherWarps = kWarpgroup / 32;

// The columns of W in `sparse` are those that panels keep.
template <typename Element>
struct GatherArgs {
  SparseArgs<Element> sparse;
  const Element* x;        // [C, x_stride]
  const uint8_t* columns;  // [rows / v, groups, 4], of the m of a group
  int64_t x_stride;        // tokens from one column to the next, a multiple of 8
  int v;
  int m;
  int groups;
};

// A lane's piece of a column from all slabs of a tile.
template <int... kSlab>
__device__ __forceinline__ void copy_slabs(uint32_t to,
                                           const uint8_t* from,
                                           const bool (&exists)[sizeof...(kSlab)],
                                           std::integer_sequence<int, kSlab...>) {
  using namespace hopper;
  (copy_or_zero<kSlab * kSlabBytes, kSlab * kSlabTokens * 2>(to, from, exists[kSlab]), ...);
}

// Which columns of its groups a warp gathers: a word for each group, of the m of the group a byte
// each. A lane loads one word of kSteps coming steps, and the warp hands them around: a load waits
// behind the copies issued before it, for longer than a step takes.
struct KeptColumns {
  static constexpr int kGroups = kStepGroups / kGatherWarps;
  static constexpr int kSteps = 32 / kGroups;

  const uint32_t* words;  // [panels, groups]
  int groups;

  // Those of kSteps steps; `group` is the first one of this warp in the first of them. By plain
  // loads: while this kernel waits, the one in front may write them, and memory read through the
  // path for constants must not change while a kernel lives.
  __device__ __forceinline__ uint32_t load(int panel, int group, int lane) const {
    const int at = group + lane / kGroups * kStepGroups + lane % kGroups;
    return at < groups ? words[int64_t{panel} * groups + at] : 0;
  }

  // Of group `g` of step `step` of those that were loaded.
  static __device__ __forceinline__ uint32_t word_of(uint32_t loaded, int step, int g) {
    return __shfl_sync(~0u, loaded, step * kGroups + g);
  }
};

// The panel of a tile. Most tiles are as many rows, and a division takes the producers long.
template <typename Tile, typename Element>
__device__ __forceinline__ int panel_of(const GatherArgs<Element>& args, const TilePlace& place) {
  return args.v == Tile::kRows ? place.row_tile : place.row_tile * Tile::kRows / args.v;
}

// A warp: four of the 16 groups of each stage, and the W of 64 rows (in a cluster, all CTAs expect
// it and one of them copies it to all). An instruction copies 64 tokens of the four columns of a
// group, eight lanes a column, so that a group takes one address and no more arithmetic for each
// copy: a warp issues alone and is bound by its instructions.
template <typename Element, typename Tile, int kCluster>
__device__ __forceinline__ void bring_columns(const GatherArgs<Element>& args,
                                              CtaMemory<Tile> cta,
                                              int warp,
                                              int lane) {
  using namespace hopper;
  constexpr int kGroups = KeptColumns::kGroups;
  static_assert(Tile::kWeightTiles <= kGatherWarps, "a warp brings at most one");
  static_assert(kCluster == 1 || (!Tile::kSplit && Tile::kWeightTiles % kCluster == 0),
                "each CTA of a cluster brings a part, which keeps them in step");
  static_assert(Tile::kStageSteps == 1, "a warp brings its groups of one step");
  const SparseArgs<Element>& sparse = args.sparse;
  const auto stride = static_cast<uint32_t>(args.x_stride * 2);  // bytes
  const int64_t group_stride = int64_t{stride} * args.m;
  const int column = lane / 8;
  const int piece = lane % 8;  // 16 bytes of the 64 tokens
  // In a stage; the swizzle XORs the number of the piece with that of the row, modulo 8.
  const auto lane_place = static_cast<uint32_t>((warp * kGroups * kGroupColumns + column) * 128 +
                                                ((piece ^ column) << 4));
  const uint32_t column_byte = 0x4440u | static_cast<uint32_t>(column);  // zeros above it
  const StepRange steps = steps_here<Tile>(sparse);
  const int first_step_group = steps.first * kStepGroups + warp * kGroups;
  const int tiles = num_tiles(sparse);
  const KeptColumns columns{reinterpret_cast<const uint32_t*>(args.columns), args.groups};
  StageRing<Tile::kStages> ring;
  TilePlace next_place = place_here<Tile, true>(sparse, first_tile());
  uint32_t next_words = columns.load(panel_of<Tile>(args, next_place), first_step_group, lane);
  for (int tile = first_tile(); tile < tiles; tile += tile_stride()) {
    const TilePlace place = next_place;
    const int panel = panel_of<Tile>(args, place);
    uint32_t words = next_words;
    uint32_t words_after =
        columns.load(panel, first_step_group + KeptColumns::kSteps * kStepGroups, lane);
    if (tile + tile_stride() < tiles) {
      next_place = place_here<Tile, true>(sparse, tile + tile_stride());
      next_words = columns.load(panel_of<Tile>(args, next_place), first_step_group, lane);
    }
    const int64_t row_of_tiles = int64_t{place.row_tile} * Tile::kWeightTiles + warp;
    const uint8_t* weight =
        sparse.packed + (row_of_tiles * sparse.steps + steps.first) * kPackedBytes;
    const int64_t first_token = int64_t{place.token_tile} * Tile::kTokens;
    const int64_t token = first_token + piece * 8;
    const auto* group_x =
        reinterpret_cast<const uint8_t*>(args.x + token) + first_step_group * group_stride;
    // Steps of which all tokens and all groups of this warp exist: their copies ask nothing.
    const int whole_steps =
        first_token + Tile::kTokens <= sparse.tokens
            ? (args.groups - first_step_group + kStepGroups - kGroups) / kStepGroups
            : 0;
    for (int first = 0; first < steps.count; first += KeptColumns::kSteps) {
      const int end = min(first + KeptColumns::kSteps, steps.count);
      for (int step = first; step < end; ++step) {
        uint32_t kept[kGroups];
#pragma unroll
        for (int g = 0; g < kGroups; ++g) kept[g] = KeptColumns::word_of(words, step - first, g);
        const uint32_t arrived = cta.full(ring.stage);
        barrier_wait(cta.empty(ring.stage), ring.parity ^ 1);
        const uint32_t stage = cta.stages + ring.stage * Tile::kStageBytes;
        if (warp < Tile::kWeightTiles && lane == 0) {
          barrier_expect(arrived, kWeightBytes);
          const uint32_t to = stage + Tile::kTokenBytes + warp * kWeightBytes;
          if constexpr (kCluster == 1) {
            copy_bytes(to, weight, kWeightBytes, arrived);
          } else if (warp % kCluster == static_cast<int>(cluster_rank())) {
            copy_bytes(to, weight, kWeightBytes, arrived, (1u << kCluster) - 1u);
          }
        }
        weight += kPackedBytes;
        const int group = first_step_group + step * kStepGroups;
        const auto copy_groups = [&](auto all_exist) {
#pragma unroll
          for (int g = 0; g < kGroups; ++g) {
            bool exists[Tile::kSlabs];
#pragma unroll
            for (int slab = 0; slab < Tile::kSlabs; ++slab) {
              exists[slab] =
                  decltype(all_exist)::value ||
                  (group + g < args.groups && token + slab * kSlabTokens < sparse.tokens);
            }
            const uint32_t to =
                ((stage + lane_place) ^ g % 2 * (kGroupColumns << 4)) + g * kGroupColumns * 128;
            const uint8_t* from = group_x + uint64_t{__byte_perm(kept[g], 0, column_byte)} * stride;
            group_x += group_stride;
            copy_slabs(to, from, exists, std::make_integer_sequence<int, Tile::kSlabs>{});
          }
        };
        if (step < whole_steps) {
          copy_groups(std::true_type{});
        } else {
          copy_groups(std::false_type{});
        }
        group_x += (kStepGroups - kGroups) * group_stride;
        barrier_arrive_after_copies(arrived);
        ring.next();
      }
      words = words_after;
      words_after = columns.load(
          panel, first_step_group + (first + 2 * KeptColumns::kSteps) * kStepGroups, lane);
    }
  }
  if constexpr (kCluster > 1) wait_for_free_stages<Tile>(cta, ring);
}

// What the first stages of this CTA want to know of their weight to L2, by a warpgroup: the columns
// must be there before any of X can be asked for. Of as many columns as it has threads for lines.
template <typename Element, typename Tile>
__device__ __forceinline__ void prefetch_panel(const GatherArgs<Element>& args, int thread) {
  constexpr int kLine = 128;
  const SparseArgs<Element>& sparse = args.sparse;
  const TilePlace place = place_here<Tile, true>(sparse, first_tile());
  const int64_t bytes = int64_t{args.groups} * kGroupColumns;
  const uint8_t* kept = args.columns + panel_of<Tile>(args, place) * bytes;
  const int64_t at =
      int64_t{steps_here<Tile>(sparse).first} * kStepGroups * kGroupColumns + thread * kLine;
  if (at < bytes) hopper::prefetch_line(kept + at);
  if (thread == 0) prefetch_weight<Element, Tile>(sparse, place.row_tile);
}

// kCluster CTAs share rows.
template <typename Element, typename Tile, int kCluster>
__global__ __launch_bounds__(Tile::kThreads,
                             1) void gather_linear_kernel(const __grid_constant__ CUtensorMap y_map,
                                                          const GatherArgs<Element> args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace hopper;
  constexpr bool kWide = (Tile::kParts * Tile::kSumTokens > 256);  // 192 sums a thread
  extern __shared__ uint8_t raw[];
  const CtaMemory<Tile> cta{(shared_address(raw) + 1023u) & ~1023u};

  let_next_grid_start();
  if (threadIdx.x == 0) {
    if (args.sparse.boxes) prefetch_map(&y_map);
    init_barriers(cta, kWarpgroup + Tile::kWeightTiles, Tile::kConsumers * kCluster);
    if constexpr (Tile::kSplit) expect_sums(args.sparse, cta);
  }
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup;
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  if (warpgroup == Tile::kConsumers) prefetch_panel<Element, Tile>(args, thread);
  cluster_meet();
  wait_for_grids_before();

  if (warpgroup == Tile::kConsumers) {
    if constexpr (!Tile::kSplit) give_registers<kWide ? 56 : 88>();
    bring_columns<Element, Tile, kCluster>(args, cta, thread / 32, thread % 32);
  } else {
    if constexpr (!Tile::kSplit) take_registers<kWide ? 224 : 208>();
    consume<Element, Tile, true, true>(y_map, args.sparse, cta, warpgroup, thread);
  }
  // What the others send must find this CTA alive.
  if constexpr (Tile::kSplit || kCluster > 1) cluster_meet();
#else
  __trap();  // a build that lacks sm_90a must not leave y as it was
#endif
}

}  // namespace obs_kernels
