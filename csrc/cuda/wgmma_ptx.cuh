// Thin wrappers of wgmma, setmaxnreg, mbarriers and named barriers; compiles for sm_90a only. For wgmma.cuh.
#pragma once

#include <cuda.h>

#include "tensor_core.cuh"

namespace pagedkv::wgmma {

// products ------------------------------------------------------------------------------------------------------------
//
// d is float32 [64, N]: of lane l of warp w, d[4j + 2h + i] is row 16 w + l / 4 + 8 h, column 8 j + 2 (l % 4) + i. The
// A operand in registers has the layout of two such 8-column groups, packed: a[2 c + h] for column group c.

// Before the first product, and whenever registers that a product will read or add to were written.
__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// The compiler must not move reads or writes of these registers across this point: to it the products are done when
// they are issued.
template <int N>
__device__ __forceinline__ void pin(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// What follows comes after the computation of x, which must be >= 0 or NaN. To ptxas a wait depends on nothing but what
// was issued: it moves it up in front of the arithmetic that was to run under the products, as far as the last branch.
// Here is one, never taken.
__device__ __forceinline__ void hold(float x) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.lt.f32 p, %0, 0f00000000;\nvote.sync.any.pred p, p, 0xffffffff;\n@!p bra done;\n"
      "hold:\nnanosleep.u32 99;\nbra hold;\ndone:\n}" ::"f"(x)
      : "memory");
}

// The same of a pair of 16-bit numbers, which must not be all ones.
__device__ __forceinline__ void hold(uint32_t x) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.eq.u32 p, %0, 0xffffffff;\nvote.sync.any.pred p, p, 0xffffffff;\n@!p bra done;\n"
      "hold:\nnanosleep.u32 99;\nbra hold;\ndone:\n}" ::"r"(x)
      : "memory");
}

#define PAGEDKV_R10(t) \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define PAGEDKV_R30 PAGEDKV_R10() PAGEDKV_R10(1) PAGEDKV_R10(2)
#define PAGEDKV_R60 PAGEDKV_R30 PAGEDKV_R10(3) PAGEDKV_R10(4) PAGEDKV_R10(5)
#define PAGEDKV_R120 \
  PAGEDKV_R60 PAGEDKV_R10(6) PAGEDKV_R10(7) PAGEDKV_R10(8) PAGEDKV_R10(9) PAGEDKV_R10(10) PAGEDKV_R10(11)
#define PAGEDKV_F8(o)                                                                                     \
  "+f"(d[(o)]), "+f"(d[(o) + 1]), "+f"(d[(o) + 2]), "+f"(d[(o) + 3]), "+f"(d[(o) + 4]), "+f"(d[(o) + 5]), \
      "+f"(d[(o) + 6]), "+f"(d[(o) + 7])
#define PAGEDKV_F16(o) PAGEDKV_F8(o), PAGEDKV_F8((o) + 8)
#define PAGEDKV_F32(o) PAGEDKV_F16(o), PAGEDKV_F16((o) + 16)
#define PAGEDKV_F64(o) PAGEDKV_F32(o), PAGEDKV_F32((o) + 32)
#define PAGEDKV_F128(o) PAGEDKV_F64(o), PAGEDKV_F64((o) + 64)

// A and B from shared memory, both K-major; d is overwritten where !add.
#define PAGEDKV_WGMMA_SS(n, type, registers, a, b, s, operands)                                                     \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #s ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type \
               "." type " {" registers "}, %" #a ", %" #b ", p, 1, 1, 0, 0;\n}"                                     \
               : operands                                                                                           \
               : "l"(a_descriptor), "l"(b_descriptor), "r"(int(add)))
// d += A B (d = A B where !add): A from registers, B [k, n] MN-major where kTransposed, else K-major.
#define PAGEDKV_WGMMA_RS(n, type, registers, a0, a1, a2, a3, b, s, tr, ...)                                          \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #s ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type  \
               "." type " {" registers "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b ", p, 1, 1, %" #tr ";\n}" \
               : __VA_ARGS__                                                                                         \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_descriptor), "r"(int(add)), "n"(int(kTransposed)))

template <class T, int N>
__device__ __forceinline__ void multiply(float (&d)[N / 2], uint64_t a_descriptor, uint64_t b_descriptor, bool add) {
  static_assert(N == 64 || N == 128);
  constexpr bool kHalf = std::is_same_v<T, __half>;
  if constexpr (N == 64) {
    if constexpr (kHalf)
      PAGEDKV_WGMMA_SS(64, "f16", PAGEDKV_R30 "%30, %31", 32, 33, 34, PAGEDKV_F32(0));
    else
      PAGEDKV_WGMMA_SS(64, "bf16", PAGEDKV_R30 "%30, %31", 32, 33, 34, PAGEDKV_F32(0));
  } else {
    if constexpr (kHalf)
      PAGEDKV_WGMMA_SS(128, "f16", PAGEDKV_R60 "%60, %61, %62, %63", 64, 65, 66, PAGEDKV_F64(0));
    else
      PAGEDKV_WGMMA_SS(128, "bf16", PAGEDKV_R60 "%60, %61, %62, %63", 64, 65, 66, PAGEDKV_F64(0));
  }
}

template <class T, int N, bool kTransposed = true>
__device__ __forceinline__ void multiply_add(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b_descriptor,
                                             bool add = true) {
  static_assert(N == 16 || N == 32 || N == 48 || N == 64 || N == 128 || N == 256);
  constexpr bool kHalf = std::is_same_v<T, __half>;
  if constexpr (N == 16) {
    if constexpr (kHalf)
      PAGEDKV_WGMMA_RS(16, "f16", "%0, %1, %2, %3, %4, %5, %6, %7", 8, 9, 10, 11, 12, 13, 14, PAGEDKV_F8(0));
    else
      PAGEDKV_WGMMA_RS(16, "bf16", "%0, %1, %2, %3, %4, %5, %6, %7", 8, 9, 10, 11, 12, 13, 14, PAGEDKV_F8(0));
  } else if constexpr (N == 32) {
    if constexpr (kHalf)
      PAGEDKV_WGMMA_RS(32, "f16", PAGEDKV_R10() "%10, %11, %12, %13, %14, %15", 16, 17, 18, 19, 20, 21, 22,
                       PAGEDKV_F16(0));
    else
      PAGEDKV_WGMMA_RS(32, "bf16", PAGEDKV_R10() "%10, %11, %12, %13, %14, %15", 16, 17, 18, 19, 20, 21, 22,
                       PAGEDKV_F16(0));
  } else if constexpr (N == 48) {
    if constexpr (kHalf)
      PAGEDKV_WGMMA_RS(48, "f16", PAGEDKV_R10() PAGEDKV_R10(1) "%20, %21, %22, %23", 24, 25, 26, 27, 28, 29, 30,
                       PAGEDKV_F16(0), PAGEDKV_F8(16));
    else
      PAGEDKV_WGMMA_RS(48, "bf16", PAGEDKV_R10() PAGEDKV_R10(1) "%20, %21, %22, %23", 24, 25, 26, 27, 28, 29, 30,
                       PAGEDKV_F16(0), PAGEDKV_F8(16));
  } else if constexpr (N == 64) {
    if constexpr (kHalf)
      PAGEDKV_WGMMA_RS(64, "f16", PAGEDKV_R30 "%30, %31", 32, 33, 34, 35, 36, 37, 38, PAGEDKV_F32(0));
    else
      PAGEDKV_WGMMA_RS(64, "bf16", PAGEDKV_R30 "%30, %31", 32, 33, 34, 35, 36, 37, 38, PAGEDKV_F32(0));
  } else if constexpr (N == 128) {
    if constexpr (kHalf)
      PAGEDKV_WGMMA_RS(128, "f16", PAGEDKV_R60 "%60, %61, %62, %63", 64, 65, 66, 67, 68, 69, 70, PAGEDKV_F64(0));
    else
      PAGEDKV_WGMMA_RS(128, "bf16", PAGEDKV_R60 "%60, %61, %62, %63", 64, 65, 66, 67, 68, 69, 70, PAGEDKV_F64(0));
  } else {
    if constexpr (kHalf)
      PAGEDKV_WGMMA_RS(256, "f16", PAGEDKV_R120 "%120, %121, %122, %123, %124, %125, %126, %127", 128, 129, 130, 131,
                       132, 133, 134, PAGEDKV_F128(0));
    else
      PAGEDKV_WGMMA_RS(256, "bf16", PAGEDKV_R120 "%120, %121, %122, %123, %124, %125, %126, %127", 128, 129, 130, 131,
                       132, 133, 134, PAGEDKV_F128(0));
  }
}

#undef PAGEDKV_WGMMA_SS
#undef PAGEDKV_WGMMA_RS
#undef PAGEDKV_F128
#undef PAGEDKV_F64
#undef PAGEDKV_F32
#undef PAGEDKV_F16
#undef PAGEDKV_F8
#undef PAGEDKV_R120
#undef PAGEDKV_R60
#undef PAGEDKV_R30
#undef PAGEDKV_R10

// Moves registers between warpgroups; the sum over the CTA must stay within what it was launched with.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// shared memory -------------------------------------------------------------------------------------------------------

// A pointer to shared memory that the compiler keeps: it would rather work it out again each time, which takes a
// special register.
__device__ __forceinline__ unsigned char* keep(unsigned char* p) {
  asm volatile("" : "+l"(p));
  return p;
}
// Not moved, and not done by other threads than asked for it.
__device__ __forceinline__ int load_shared(const int& from) {
  int x;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(x) : "r"(smem_address(&from)) : "memory");
  return x;
}

// barriers ------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(uint64_t& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(&barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(&barrier)) : "memory");
}
// One arrival, and the phase ends no earlier than when copy_box has brought so many bytes.
__device__ __forceinline__ void barrier_arrive_expecting(uint64_t& barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(&barrier)), "r"(bytes)
               : "memory");
}
// Until the barrier's phase of this parity is complete. A new barrier counts as having completed one of parity 1.
__device__ __forceinline__ void barrier_wait(uint64_t& barrier, uint32_t parity) {
  const uint32_t address = smem_address(&barrier);
  uint32_t done;
  do {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(address), "r"(parity)
                 : "memory");
  } while (!done);
}
// Arrives when all copies (cp.async) of this thread have.
__device__ __forceinline__ void barrier_arrive_copies(uint64_t& barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(smem_address(&barrier)) : "memory");
}
// What this thread wrote to shared memory by ordinary stores, or by copies that have arrived, becomes visible to
// products that are issued behind a barrier.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// copies -------------------------------------------------------------------------------------------------------------
//
// A box of a tensor of four dimensions, from coordinates x (innermost) .. w, to shared memory in the map's swizzle; all
// that lies outside of the tensor comes in as zeros. One thread issues it for all.

// True in one lane of the warp, the same each time. To the compiler, unlike lane == 0, that is one thread: it need not
// wrap the instructions of the copy engine in loops over all that might be here.
__device__ __forceinline__ bool elect() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected;
}
__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
__device__ __forceinline__ void copy_box(uint32_t target, const CUtensorMap& map, uint64_t& barrier, int x, int y,
                                         int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(target),
      "l"(&map), "r"(smem_address(&barrier)), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}

// A box from shared memory to rows (y) and columns (x) of a tensor; what lies outside of it is left out. The thread
// that issues it waits for its stores: until what they read may be written (kRead), or until they are done.
__device__ __forceinline__ void store_box(const CUtensorMap& map, uint32_t source, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %4}], [%1];\n"
      "cp.async.bulk.commit_group;" ::"l"(&map),
      "r"(source), "r"(x), "r"(y), "r"(0)
      : "memory");
}
template <bool kRead>
__device__ __forceinline__ void wait_stores() {
  if constexpr (kRead)
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
  else
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// clusters ------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
}
__device__ __forceinline__ int cluster_size() {
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return int(size);
}
// All threads of the cluster, and what they wrote to shared memory.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// New barriers become visible to the cluster and the copy engine.
__device__ __forceinline__ void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// An arrival at the same barrier of CTA `rank`. What this thread wrote need not be visible there: a release to the
// cluster at every stage made products of 256 rows and more 1.4 times as long.
__device__ __forceinline__ void barrier_arrive_at(uint64_t& barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(smem_address(&barrier)),
      "r"(rank)
      : "memory");
}
// The same, and what this thread wrote is visible to threads behind barrier_wait_cluster() there.
__device__ __forceinline__ void barrier_release_at(uint64_t& barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}" ::"r"(smem_address(&barrier)),
      "r"(rank)
      : "memory");
}
// barrier_wait, and what other CTAs of the cluster wrote before they arrived is visible.
__device__ __forceinline__ void barrier_wait_cluster(uint64_t& barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(smem_address(&barrier)), "r"(parity)
        : "memory");
  } while (!done);
}
// To the same place in the shared memory of CTA `rank`, whose threads see it behind cluster_sync() or such a wait.
__device__ __forceinline__ void store_at(float4* to, int rank, const float4& v) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "st.shared::cluster.v4.f32 [remote], {%2, %3, %4, %5};\n}" ::"r"(smem_address(to)),
      "r"(rank), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
      : "memory");
}
// A box of rows (y) and columns (x) to the same place in each of the cluster's CTAs, and their barriers.
__device__ __forceinline__ void copy_box_to_all(uint32_t target, const CUtensorMap& map, uint64_t& barrier, int x,
                                                int y, int size) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, "
      "%4, %5, %5}], [%2], %6;" ::"r"(target),
      "l"(&map), "r"(smem_address(&barrier)), "r"(x), "r"(y), "r"(0), "h"(uint16_t((1 << size) - 1))
      : "memory");
}

}  // namespace pagedkv::wgmma
