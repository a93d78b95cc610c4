// SPDX-License-Identifier: Apache-2.0
// Times what the sparse product does at once, each part alone and together, to see which binds it:
//
//   nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a -Icsrc -Icsrc/include \
//     bench/micro/sparse_product_rates.cu -o build/sparse_product_rates && \
//     build/sparse_product_rates
//
// An argument gives the columns of X and W, a power of two, instead of 2048, whose 14 MB stay in
// L2. A step is what sparse_kernel.cuh multiplies of one stage: 128 rows, 64 columns, 256 tokens,
// 512 cycles at best; where nothing is multiplied, one stage of copies. Prints, for each row: CTAs,
// cluster, bytes of a stage of copies, bytes a clock it keeps to, median microseconds of `kRuns`,
// the clock that follows from them and the cycles (low by the launch, below 1 %), cycles a step,
// TFLOP/s as if W were dense, and bytes a clock and SM: those that reach it, and those that L2
// sends for it (fewer where CTAs share a copy). Copies and gathers do not wait for products nor
// products for them, so each shows what the other costs it. Sums are not checked: the layouts are
// those of sparse_kernel.cuh, which has its tests.
#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "common/hopper.cuh"
#include "matmul/sparse_config.h"
#include "matmul/sparse_kernel.cuh"
#include "sparse_product_beside.cuh"
#include "timing.h"

using namespace obs_kernels;

namespace {

template <Weight kWeight, Beside kBeside, int kProducers, bool kFeature>
__global__ __launch_bounds__((kConsumers + kProducers) * kWarpgroup,
                             1) void rates_kernel(const __grid_constant__ Args args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace hopper;
  extern __shared__ uint8_t raw[];
  __shared__ volatile int ended;
  __shared__ volatile int answer[kConsumers];
  uint8_t* memory = raw + (0u - shared_address(raw)) % 1024u;
  const uint32_t base = shared_address(memory);
  const int cluster = args.ring.cluster;
  const int group = static_cast<int>(blockIdx.x) / cluster;
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup;

  Place place{};
  place.ring = base + (kWeight == kNone ? 0 : kProductBytes);
  place.full = place.ring + args.ring.slots * args.ring.stage_bytes();
  place.empty = place.full + 8 * args.ring.slots;
  place.rank = static_cast<int>(cluster_rank());
  place.token_tile = group % kTokenTiles;
  const int row_tile = (group / kTokenTiles * cluster + place.rank) % kRowTiles;
  place.weight = args.packed + int64_t{row_tile} * args.row_steps * kPacked;

  if (threadIdx.x == 0) {
    ended = 0;
    barrier_init(place.empty + 8 * args.ring.slots, 1);  // whose first phase never ends
    for (int slot = 0; slot < args.ring.slots; ++slot) {
      barrier_init(place.full + 8 * slot, kBeside == kGather ? kProducers * 4 : 1);
      barrier_init(place.empty + 8 * slot, static_cast<uint32_t>(cluster));
    }
    fence_barrier_init();
  }
  if constexpr (kWeight != kNone) {
    for (int at = static_cast<int>(threadIdx.x) * 16; at < kProductBytes; at += blockDim.x * 16) {
      const int in = at % kStageBytes;
      const uint8_t* from = in < kTileBytes
                                ? args.x + place.token_tile * kTileBytes + in
                                : place.weight + at / kStageBytes * kPacked + in - kTileBytes;
      *reinterpret_cast<uint4*>(memory + at) = *reinterpret_cast<const uint4*>(from);
    }
    fence_async_shared();  // the tensor cores read the tiles
  }
  __syncthreads();
  cluster_meet();

  if (warpgroup >= kConsumers) {
    give_registers<40>();
    const long long start = clock64();
    if constexpr (kBeside == kCopies) {
      if (thread == 0) issue_copies(args, place);
      if (thread == 32) release_copies(args, place);
    } else if constexpr (kBeside == kGather) {
      gather<kProducers>(args, place);
    }
    if (threadIdx.x == kConsumers * kWarpgroup + 32) {
      ended = 1;
      const long long cycles = clock64() - start;
      args.readings[blockIdx.x].beside_cycles = cycles;
      if (kWeight == kNone) args.readings[blockIdx.x] = {cycles, args.stages, cycles};
    }
    __syncwarp();
  } else if constexpr (kWeight != kNone) {
    take_registers<kProducers == 1 ? 232 : 216>();
    // Products of 512 threads must do with 128 registers each, too few for 256 tokens at once.
    constexpr int kParts = kProducers;
    constexpr int kPart = kTokens / kParts;
    constexpr int kRing = kWeight == kGlobal3 ? 4 : kWeight == kGlobal2 ? 3 : 2;
    constexpr uint32_t kLeading = kFeature ? kSlabBytes : 16;
    constexpr uint32_t kSecond = kFeature ? 32 * 128 : 64;
    float sum[kParts][kPart / 2] = {};
    WeightStep weight[kRing];
    int ahead = 0;  // steps fetched
    const uint32_t over = place.empty + 8 * args.ring.slots;
    const auto fetch = [&](WeightStep& to) {
      if constexpr (kWeight >= kGlobal2) {
        const uint8_t* half =
            place.weight + (ahead & (args.row_steps - 1)) * kPacked + warpgroup * kWeightBytes;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const uint4 part = __ldcg(reinterpret_cast<const uint4*>(half) + k * kWarpgroup + thread);
          to.part[k] = {{part.x, part.y, part.z, part.w}};
        }
        to.meta = __ldcg(reinterpret_cast<const unsigned*>(half + 2 * kWarpgroup * 16) + thread);
      } else {
        const uint32_t tile = base + ahead % 2 * kStageBytes + kTileBytes;
        const uint32_t half = tile + warpgroup * kWeightBytes;
        if constexpr (kWeight != kTensor) {
          load_shared(to.part[0].at, half + thread * 16);
          load_shared(to.part[1].at, half + kWarpgroup * 16 + thread * 16);
        }
        load_shared(to.meta, half + kValueBytes + thread * 4);
      }
      ++ahead;
    };
    fetch(weight[0]);
    if constexpr (kWeight != kShared && kWeight != kTensor) fetch(weight[1]);
    if constexpr (kRing == 4) fetch(weight[2]);

    const long long start = clock64();
    int steps = 0;
    do {
      for (int chunk = 0; chunk < kChunk; chunk += kUnrolled) {
#pragma unroll
        for (int i = 0; i < kUnrolled; ++i) {
          const WeightStep& now = weight[i % kRing];
          product_fence();
#pragma unroll
          for (int p = 0; p < kParts; ++p) {
            const uint32_t x = base + i % 2 * kStageBytes + p * kPart * 128;
            const uint64_t first = swizzled_operand<128>(x, kLeading, 1024);
            const uint64_t second = swizzled_operand<128>(x + kSecond, kLeading, 1024);
            const auto multiply = [&](const auto& a0, const auto& a1) {
              sparse_product<__nv_bfloat16, kPart, 0, kFeature>(sum[p], a0, first, now.meta, 1);
              sparse_product<__nv_bfloat16, kPart, 1, kFeature>(sum[p], a1, second, now.meta, 1);
            };
            if constexpr (kWeight == kTensor) {
              const uint32_t w = base + i % 2 * kStageBytes + kTileBytes + warpgroup * kWeightBytes;
              multiply(swizzled_operand<64>(w, 16, 512), swizzled_operand<64>(w + 32, 16, 512));
            } else {
              multiply(now.part[0], now.part[1]);
            }
          }
          product_commit();
          product_wait<1>();  // gives back the registers of the step before
          // Over at once: a kernel has to look whether its stage has come, and without a look the
          // compiler moves loads from L2 down to where they are used.
          if constexpr (kWeight == kShared || kWeight == kTensor) barrier_wait(over, 1);
          if constexpr (kWeight != kHeld) fetch(weight[(i + kRing - 1) % kRing]);
          if constexpr (kWeight >= kGlobal2) barrier_wait(over, 1);
        }
      }
      steps += kChunk;
      // One thread looks: all warps of a warpgroup must multiply equally often.
      named_barrier(1 + warpgroup, kWarpgroup);
      if (thread == 0) {
        answer[warpgroup] = kBeside == kNothing ? steps >= kCycles / (2 * kTokens) : ended;
      }
      named_barrier(1 + warpgroup, kWarpgroup);
    } while (answer[warpgroup] == 0);
    product_wait<0>();
    const long long cycles = clock64() - start;
    float total = 0.0f;  // without a use the products might go
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) total += sum[i / (kPart / 2)][i % (kPart / 2)];
    args.sums[blockIdx.x * (kConsumers * kWarpgroup) + threadIdx.x] = total;
    if (threadIdx.x == 0) {
      args.readings[blockIdx.x].cycles = cycles;
      args.readings[blockIdx.x].steps = steps;
    }
  }
  cluster_meet();  // what other CTAs still send must find this one alive
#endif
}

// X as tokens times columns, in boxes of 64 x 64; see sparse_linear.cu.
CUtensorMap boxes_of(const void* x, int cols) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  const char* name = "cuTensorMapEncodeTiled";
  check(cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found), name);
  check(function != nullptr ? cudaSuccess : cudaErrorSymbolNotFound, name);
  CUtensorMap map{};
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(cols), kTokensOfX};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(cols) * 2};
  const cuuint32_t box[2] = {64, 64};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult status = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function)(
      &map,
      CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      2,
      const_cast<void*>(x),
      sizes,
      strides,
      box,
      steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue, name);
  return map;
}

template <Weight kWeight, Beside kBeside, int kProducers = 1, bool kFeature = false>
void measure(const char* name, Args args, const Ring& ring = {0, 0, 0, 1, 0}) {
  constexpr auto kernel = rates_kernel<kWeight, kBeside, kProducers, kFeature>;
  const int stage_bytes = ring.stage_bytes();
  const int bytes = 1024 + 256 +  // alignment, barriers
                    (kWeight == kNone ? 0 : kProductBytes) + ring.slots * stage_bytes;
  args.ring = ring;
  if (ring.slots > 0) args.stages = kCycles / stage_bytes * (ring.rate == 0 ? 48 : ring.rate);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  constexpr int kThreads = (kConsumers + kProducers) * kWarpgroup;
  const auto cluster = static_cast<unsigned>(ring.cluster);
  attribute.val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config{
      cluster, kThreads, static_cast<std::size_t>(bytes), nullptr, &attribute, 1};
  int clusters = 0;
  check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), name);
  const int ctas = clusters * ring.cluster;
  check(ctas > 0 && ctas <= kMostCtas ? cudaSuccess : cudaErrorLaunchOutOfResources, name);
  config.gridDim = dim3(static_cast<unsigned>(ctas));
  const float us = median_us([&] { check(cudaLaunchKernelEx(&config, kernel, args), name); });
  std::vector<Reading> readings(static_cast<std::size_t>(ctas));
  const std::size_t size = readings.size() * sizeof(Reading);
  check(cudaMemcpy(readings.data(), args.readings, size, cudaMemcpyDeviceToHost), name);
  double cycles = 0.0;
  double steps = 0.0;
  double beside_cycles = 0.0;
  for (const Reading& reading : readings) {
    cycles += static_cast<double>(reading.cycles);
    steps += static_cast<double>(reading.steps);
    beside_cycles += static_cast<double>(reading.beside_cycles);
  }
  double reach = kWeight >= kGlobal2 ? kPacked * steps / cycles : 0.0;
  double sent = reach;
  if (ring.slots > 0) {
    const double stages = 1.0 * args.stages * ctas / beside_cycles;
    reach += stages * stage_bytes;
    sent += stages * (1.0 * ring.boxes * kSlabBytes / ring.cluster + ring.weight_bytes);
  }
  const double flops = kWeight == kNone ? 0.0 : 2.0 * kRows * kStepCols * kTokens * steps;
  std::printf("%-36s %4d %7d %6d %5d", name, ctas, ring.cluster, stage_bytes, ring.rate);
  std::printf(" %6.0f %5.2f %7.1f", us, 1e-3 * cycles / ctas / us, cycles / steps);
  std::printf(" %8.0f %6.1f %6.1f\n", 1e-6 * flops / us, reach, sent);
}

template <typename T>
T* allocate(int64_t count) {
  T* memory = nullptr;
  check(cudaMalloc(&memory, static_cast<std::size_t>(count) * sizeof(T)), "malloc");
  return memory;
}

}  // namespace

int main(int argc, char** argv) {
  const int cols = argc > 1 ? std::atoi(argv[1]) : 2048;
  if (cols < 2 * kStepCols || cols > (1 << 18) || (cols & (cols - 1)) != 0) {
    std::fprintf(stderr, "columns must be a power of two from 128 to 2^18\n");
    return 1;
  }
  Args args{};
  args.row_steps = cols / kStepCols;
  const int64_t x_words = kTokensOfX * cols / 2;
  const int64_t packed_words = kRowTiles * args.row_steps * kPacked / 4;
  auto* x = allocate<uint32_t>(x_words);
  auto* packed = allocate<uint32_t>(packed_words);
  fill_kernel<<<1024, 256>>>(x, x_words, false);
  fill_kernel<<<1024, 256>>>(packed, packed_words, true);
  check(cudaGetLastError(), "fill");
  args.x = reinterpret_cast<const uint8_t*>(x);
  args.packed = reinterpret_cast<const uint8_t*>(packed);
  args.sums = allocate<float>(kMostCtas * kConsumers * kWarpgroup);
  args.readings = allocate<Reading>(kMostCtas);
  args.map = boxes_of(x, cols);

  std::printf("%d columns; rate 0: all-out; reach, sent: bytes a clock and SM\n", cols);
  std::printf("%-36s CTAs cluster  bytes  rate     us   GHz  cycles  TFLOP/s  reach   sent\n", "");
  measure<kHeld, kNothing>("1 A held in registers", args);
  measure<kTensor, kNothing>("2 A by the tensor cores", args);
  measure<kTensor, kNothing, 1, true>("2 A by the tensor cores, X^T", args);
  measure<kShared, kNothing>("2 A shared", args);
  measure<kShared, kNothing, 1, true>("2 A shared, X^T", args);
  measure<kShared, kNothing, 2, true>("2 A shared, X^T, N = 2 x 128", args);
  measure<kGlobal2, kNothing>("3 A from L2, two steps ahead", args);
  measure<kGlobal3, kNothing>("3 A from L2, three steps ahead", args);
  for (int cluster : {1, 2, 4}) {
    measure<kNone, kCopies>("4 copies alone", args, {2, kPacked, 8, cluster, 0});
    measure<kNone, kCopies>("4 copies alone", args, {4, kPacked, 4, cluster, 0});
  }
  for (int cluster : {1, 2}) {
    for (int rate : {16, 32, 64, 0}) {
      const Ring ring{2, 0, 8, cluster, rate};
      measure<kTensor, kCopies>("5 A by the tensor cores, copies", args, ring);
      measure<kShared, kCopies>("5 A shared, copies", args, ring);
      if (cluster == 1 || (rate > 0 && rate < 64)) continue;
      measure<kHeld, kCopies>("5 A held, copies", args, ring);
      measure<kGlobal3, kCopies>("5 A from L2, copies", args, ring);
    }
  }
  const Ring tiles{kSlabs, 0, kGatherSlots, 1, 0};
  measure<kNone, kGather, 1, true>("6 gather alone by 1", args, tiles);
  measure<kNone, kGather, 2, true>("6 gather alone by 2", args, tiles);
  measure<kTensor, kGather, 1, true>("6 A by the tensor cores, gather by 1", args, tiles);
  measure<kShared, kGather, 1, true>("6 A shared, gather by 1", args, tiles);
  measure<kShared, kGather, 2, true>("6 A shared, N = 2 x 128, gather by 2", args, tiles);
  return 0;
}
