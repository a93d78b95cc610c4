// SPDX-License-Identifier: Apache-2.0
// Instructions of sm_90a: barriers in shared memory, bulk copies, clusters, warpgroups. Section
// numbers are those of the PTX ISA. Addresses of shared memory are the 32-bit ones of the CTA.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace obs_kernels::hopper {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// --- Grids that follow each other (griddepcontrol) ------------------------------------------

// Lets the next kernel of the stream, if it was launched to overlap, take multiprocessors that this
// one leaves. What it may touch there it learns by wait_for_grids_before.
__device__ __forceinline__ void let_next_grid_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Until all kernels before this one are done and what they wrote can be seen. To be called by every
// thread before its first access to global memory, writes too, as kernels before may still read
// there; all but prefetches to L2.
__device__ __forceinline__ void wait_for_grids_before() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// The number of this thread in its warp. Volatile: what is computed from it is not kept in
// registers from before a loop that needs them all.
__device__ __forceinline__ int lane_here() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// --- Barriers (9.7.13.15) -------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers known to the cluster and to the copy engine.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// One arrival, and `bytes` more that copies will bring before the phase is over.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// One arrival at the same barrier of CTA `rank` of the cluster. Of CTA scope, as the waits are:
// what it guards is read and written in shared memory alone, and a release to the cluster would
// wait for all of the thread's global accesses (MEMBAR.GPU), 500 cycles a step.
__device__ __forceinline__ void barrier_arrive(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}\n" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// Waits until the phase of that parity is over.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Waits for the `threads` threads that name barrier `id` (9.7.13.1); 0 is that of __syncthreads.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// --- Clusters (9.7.13.4) --------------------------------------------------------------------

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// The number of this cluster in the grid, and how many there are.
__device__ __forceinline__ uint32_t cluster_id() {
  uint32_t id;
  asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(id));
  return id;
}
__device__ __forceinline__ uint32_t num_clusters() {
  uint32_t count;
  asm volatile("mov.u32 %0, %%nclusterid.x;" : "=r"(count));
  return count;
}

// Until every thread of the cluster is here; those of a warp come together first, as the
// instructions want it. It orders no memory, which would take 1,000 cycles and more, as the thread
// waits for all that it has asked of global memory: initialised barriers are made known by
// fence_barrier_init, and what others bring is told by barriers.
__device__ __forceinline__ void cluster_meet() {
  __syncwarp();
  asm volatile(
      "barrier.cluster.arrive.relaxed.aligned;\n"
      "barrier.cluster.wait.aligned;\n" ::
          : "memory");
}

// --- Bulk copies (9.7.9.25) -----------------------------------------------------------------

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// A box of a matrix to the same place of every CTA in `ctas`, each told by its own barrier.
__device__ __forceinline__ void copy_box(
    uint32_t to, const CUtensorMap* map, int column, int row, uint32_t barrier, uint16_t ctas) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map),
      "r"(column),
      "r"(row),
      "r"(barrier),
      "h"(ctas)
      : "memory");
}

// The same for this CTA alone.
__device__ __forceinline__ void copy_box(
    uint32_t to, const CUtensorMap* map, int column, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map),
      "r"(column),
      "r"(row),
      "r"(barrier)
      : "memory");
}

// `bytes` in a row, a multiple of 16, both sides aligned to 16.
__device__ __forceinline__ void copy_bytes(uint32_t to,
                                           const void* from,
                                           uint32_t bytes,
                                           uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from),
      "r"(bytes),
      "r"(barrier)
      : "memory");
}

// The same to the same place of every CTA in `ctas`, each told by its own barrier.
__device__ __forceinline__ void copy_bytes(
    uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, uint16_t ctas) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from),
      "r"(bytes),
      "r"(barrier),
      "h"(ctas)
      : "memory");
}

// From this CTA's shared memory to what lies at `to` in that of CTA `rank`, told by what lies at
// `barrier` there.
__device__ __forceinline__ void copy_to_cta(
    uint32_t to, uint32_t from, uint32_t bytes, uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote, told;\n"
      "mapa.shared::cluster.u32 remote, %0, %4;\n"
      "mapa.shared::cluster.u32 told, %3, %4;\n"
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [remote], [%1], %2, "
      "[told];\n"
      "}\n" ::"r"(to),
      "r"(from),
      "r"(bytes),
      "r"(barrier),
      "r"(rank)
      : "memory");
}

// Brings `bytes` in a row, a multiple of 16 at a multiple of 16, to L2 alone (9.7.9.25.4.2), where
// writes of other kernels are seen: allowed before wait_for_grids_before.
__device__ __forceinline__ void prefetch_bytes(const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// The same for the 128 bytes around an address.
__device__ __forceinline__ void prefetch_line(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from) : "memory");
}

// Sixteen bytes by this thread (9.7.9.25.3.1), kTo and kFrom bytes from the addresses, or as many
// zeros. Constants in the text: the compiler would make an address of each.
template <int kTo, int kFrom>
__device__ __forceinline__ void copy_or_zero(uint32_t to, const void* from, bool copy) {
  asm volatile("cp.async.cg.shared.global [%0 + %3], [%1 + %4], 16, %2;" ::"r"(to),
               "l"(from),
               "r"(copy ? 16 : 0),
               "n"(kTo),
               "n"(kFrom)
               : "memory");
}

// One arrival when all such copies of this thread so far are done; the barrier counts it among
// those it was made for (9.7.13.15.16).
__device__ __forceinline__ void barrier_arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// A box from shared memory to a matrix; what lies outside of it is not written.
__device__ __forceinline__ void store_box(const CUtensorMap* map,
                                          int column,
                                          int row,
                                          uint32_t from) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
      "r"(column),
      "r"(row),
      "r"(from)
      : "memory");
}

__device__ __forceinline__ void store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until at most the kGroups latest stores of this thread still read shared memory.
template <int kGroups>
__device__ __forceinline__ void store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kGroups) : "memory");
}

// Ordinary stores to shared memory before, accesses of the copy engine after.
__device__ __forceinline__ void fence_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// --- Warpgroups (9.7.15) --------------------------------------------------------------------

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Registers written before are operands of products issued after.
__device__ __forceinline__ void product_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void product_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most the kGroups latest groups of products are on their way.
template <int kGroups>
__device__ __forceinline__ void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

// Descriptor of an operand in shared memory with a swizzle of kSwizzle bytes (9.7.15.5.1); offsets
// in bytes.
template <int kSwizzle>
__device__ __forceinline__ uint64_t swizzled_operand(uint32_t address,
                                                     uint32_t leading,
                                                     uint32_t stride) {
  static_assert(kSwizzle == 64 || kSwizzle == 128, "one of these");
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) |
         static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(stride >> 4) << 32 |
         uint64_t{kSwizzle == 128 ? 1 : 2} << 62;
}

// Volatile: a fence of products must not be passed by a load of what they read.
__device__ __forceinline__ void load_shared(uint32_t (&words)[4], uint32_t address) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address));
}

__device__ __forceinline__ void load_shared(float* values, uint32_t address) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(values[0]), "=f"(values[1]), "=f"(values[2]), "=f"(values[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_shared(uint32_t& word, uint32_t address) {
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(address));
}

__device__ __forceinline__ void store_shared(uint32_t address, const float* values) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "f"(values[0]),
               "f"(values[1]),
               "f"(values[2]),
               "f"(values[3])
               : "memory");
}

// Four 8 x 8 matrices of 16-bit elements, as fragments of a product hold them; lane l has the
// address of row l % 8 of matrix l / 8. kTransposed: what is a row in shared memory is a column of
// the fragment (9.7.14.5.16).
template <bool kTransposed>
__device__ __forceinline__ void store_matrices(uint32_t address, const uint32_t (&part)[4]) {
  if constexpr (kTransposed) {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
        "r"(part[0]),
        "r"(part[1]),
        "r"(part[2]),
        "r"(part[3])
        : "memory");
  } else {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
                 "r"(part[0]),
                 "r"(part[1]),
                 "r"(part[2]),
                 "r"(part[3])
                 : "memory");
  }
}

// The same for two.
template <bool kTransposed>
__device__ __forceinline__ void store_matrices(uint32_t address, const uint32_t (&part)[2]) {
  if constexpr (kTransposed) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address),
                 "r"(part[0]),
                 "r"(part[1])
                 : "memory");
  } else {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(address),
                 "r"(part[0]),
                 "r"(part[1])
                 : "memory");
  }
}

}  // namespace obs_kernels::hopper
