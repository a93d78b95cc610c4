// SPDX-License-Identifier: Apache-2.0
// What goes on beside the products of sparse_product_rates.cu: copies as in sparse_kernel.cuh, and
// the gather of rows that a v:2:m product would need.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/device.cuh"
#include "common/hopper.cuh"
#include "matmul/sparse_config.h"
#include "matmul/sparse_kernel.cuh"
#include "matmul/wgmma_sp.cuh"

namespace obs_kernels {

// Where A comes from each step: held in registers, read from shared memory by the tensor cores as
// the product does, or fetched to registers from shared memory or from L2, two or three steps
// ahead. And what else goes on.
enum Weight { kNone, kHeld, kTensor, kShared, kGlobal2, kGlobal3 };
enum Beside { kNothing, kCopies, kGather };

constexpr int kTokens = 256;
constexpr int kSlabs = kTokens / kSlabTokens;
constexpr int kTileBytes = kSlabs * kSlabBytes;
using ProductTile = SparseTile<1, kTokens>;
constexpr int kConsumers = ProductTile::kConsumers;  // warpgroups
constexpr int kStageBytes = ProductTile::kStageBytes;
constexpr int kProductBytes = 2 * kStageBytes;  // stages that products read and nobody writes
constexpr int kRows = kConsumers * kPartRows;   // of a CTA
constexpr int kPacked = kConsumers * kWeightBytes;
constexpr int kTokenTiles = kRasterTokens;  // read at a time, as in the kernel
constexpr int kRowTiles = 20;               // enough for 132 CTAs over kTokenTiles
constexpr int kUnrolled = 12;               // steps: a multiple of all rings of fragments
constexpr int kChunk = 24;                  // steps between looks at whether to end
constexpr int kGatherSlots = 4;             // tiles, of which all but one are on their way
constexpr int kMostCtas = 1024;
constexpr int kCycles = 4000000;  // about what a row lasts: the clock must settle
constexpr int64_t kTokensOfX = kTokenTiles * kTokens;

// What comes beside products: stages of some boxes of X, then bytes of W.
struct Ring {
  int boxes;
  int weight_bytes;
  int slots;  // a power of two
  int cluster;
  int rate;  // bytes a clock to keep to; 0: all-out

  __host__ __device__ int stage_bytes() const { return boxes * kSlabBytes + weight_bytes; }
};

struct Reading {
  long long cycles;  // of the products, by one thread; of what is beside, where that is alone
  long long steps;
  long long beside_cycles;
};

// One step of A in the registers of a thread: two fragments of 32 columns, and their metadata.
struct WeightStep {
  Fragment part[2];
  uint32_t meta;
};

struct Args {
  CUtensorMap map;
  const uint8_t* x;  // token-major to copies, feature-major to gathers
  const uint8_t* packed;
  float* sums;
  Reading* readings;
  Ring ring;
  int stages;     // of the ring, after which the products end too
  int row_steps;  // that X and W have, a power of two; then they begin again
};

__device__ uint32_t hashed(uint32_t bits) {
  bits *= 2654435761u;
  bits ^= bits >> 15;
  bits *= 2246822519u;
  return bits ^ bits >> 13;
}

// Pairs of bf16 of either sign from 1/4 to 1 (equal bits would draw less power); for W in the order
// of prepack.cu, with codes behind the values of each half tile.
__global__ void fill_kernel(uint32_t* words, int64_t count, bool packed) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; at < count; at += stride) {
    const auto seed = static_cast<uint32_t>(at);
    uint32_t word = (hashed(seed) & 0x80FF80FFu) + 0x3E803E80u;
    if (packed && at % (kWeightBytes / 4) >= 2 * kWarpgroup * 4) {
      word = 0;
      for (uint32_t i = 0; i < 8; ++i) {  // one of the six pairs of positions, low | high << 2
        word |= (0xED9C84u >> (4 * (hashed(8 * seed + i) % 6u)) & 15u) << (4 * i);
      }
    }
    words[at] = word;
  }
}

// What all threads of a CTA know.
struct Place {
  uint32_t ring;
  uint32_t full;  // barriers: a slot has arrived, and all CTAs of the cluster let go of it
  uint32_t empty;
  int rank;
  int token_tile;
  const uint8_t* weight;  // of this row tile
};

// The producer of sparse_kernel.cuh, at most at the rate asked for.
__device__ __forceinline__ void issue_copies(const Args& args, const Place& place) {
  const Ring ring = args.ring;
  const int bytes = ring.stage_bytes();
  const int interval = ring.rate == 0 ? 0 : bytes / ring.rate;
  const auto ctas = static_cast<uint16_t>((1u << ring.cluster) - 1u);
  long long due = clock64();
  for (int stage = 0; stage < args.stages; ++stage) {
    const int slot = stage & (ring.slots - 1);
    hopper::barrier_wait(place.empty + 8 * slot, (stage & ring.slots) == 0);
    while (clock64() < due) {
    }
    due += interval;
    const uint32_t arrived = place.full + 8 * slot;
    const uint32_t to = place.ring + slot * bytes;
    hopper::barrier_expect(arrived, bytes);
    for (int box = 0; box < ring.boxes; ++box) {
      const int number = stage * ring.boxes + box;
      const int column = (number / kSlabs & (args.row_steps - 1)) * kStepCols;
      const int token = place.token_tile * kTokens + number % kSlabs * kSlabTokens;
      if (ring.cluster == 1) {
        hopper::copy_box(to + box * kSlabBytes, &args.map, column, token, arrived);
      } else if (box % ring.cluster == place.rank) {
        hopper::copy_box(to + box * kSlabBytes, &args.map, column, token, arrived, ctas);
      }
    }
    if (ring.weight_bytes > 0) {
      const uint8_t* from = place.weight + (stage & (args.row_steps - 1)) * kPacked;
      hopper::copy_bytes(to + ring.boxes * kSlabBytes, from, ring.weight_bytes, arrived);
    }
  }
  // What other CTAs still tell a barrier must find it alive.
  for (int stage = args.stages; stage < args.stages + ring.slots; ++stage) {
    hopper::barrier_wait(place.empty + 8 * (stage & (ring.slots - 1)), (stage & ring.slots) == 0);
  }
}

// Stands for the consumers: lets go of a stage at once. A thread apart, or the producer would wait
// for every stage of the other CTAs in turn.
__device__ __forceinline__ void release_copies(const Args& args, const Place& place) {
  for (int stage = 0; stage < args.stages; ++stage) {
    const int slot = stage & (args.ring.slots - 1);
    hopper::barrier_wait(place.full + 8 * slot, (stage & args.ring.slots) != 0);
    for (int cta = 0; cta < args.ring.cluster; ++cta) {
      hopper::barrier_arrive(place.empty + 8 * slot, static_cast<uint32_t>(cta));
    }
  }
}

// 512 bytes of rows of X^T into feature-major tiles, a warp a row at a time. The barriers are told
// what a kernel would have to tell them, though nobody waits.
template <int kProducers>
__device__ __forceinline__ void gather(const Args& args, const Place& place) {
  constexpr int kWarps = kProducers * kWarpgroup / 32;
  constexpr int kAhead = kGatherSlots - 1;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32 - kConsumers * kWarpgroup / 32;
  const auto rows = static_cast<uint32_t>(args.row_steps * kStepCols);
  const uint8_t* from = args.x + place.token_tile * kTokens * 2 + lane * 16;
  auto* tiles = static_cast<uint8_t*>(__cvta_shared_to_generic(place.ring)) + lane / 8 * kSlabBytes;
  for (int stage = 0; stage < args.stages; ++stage) {
    uint8_t* to = tiles + stage % kGatherSlots * kTileBytes;
#pragma unroll 8
    for (int k = 0; k < kStepCols / kWarps; ++k) {
      const int row = k * kWarps + warp;
      const uint32_t picked = hashed((blockIdx.x << 20) + stage * kStepCols + row) & (rows - 1);
      async_copy<16>(to + row * 128 + ((lane % 8 ^ row % 8) << 4), from + picked * kTokensOfX * 2);
    }
    async_commit();
    async_wait<kAhead>();  // the tile that the next turn overwrites is whole
    if (stage >= kAhead) {
      hopper::fence_async_shared();
      __syncwarp();
      if (lane == 0) hopper::barrier_arrive(place.full + (stage + 1) % kGatherSlots * 8, 0);
    }
  }
  async_wait<0>();
  hopper::named_barrier(kConsumers + 1, kProducers * kWarpgroup);
}

}  // namespace obs_kernels
