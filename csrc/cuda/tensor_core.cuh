// Thin wrappers of the tensor core and asynchronous copy instructions, and the swizzle of tiles in shared memory.
#pragma once

#include "cuda_common.h"

namespace pagedkv {

// shared memory -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t smem_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Where 16-byte chunk `c` of row `r` goes in a tile of rows of kChunks chunks without padding, so that the 8 rows of an
// ldmatrix (one chunk each) hit all 32 banks. The result counts chunks from the tile's start; kChunks must be even.
template <int kChunks>
__device__ __forceinline__ int swizzle(int r, int c) {
  static_assert(kChunks % 2 == 0);
  if constexpr (kChunks % 8 == 0) {
    return r * kChunks + (c ^ (r & 7));
  } else if constexpr (kChunks % 4 == 0) {
    return r * kChunks + (c ^ ((r >> 1) & 3));
  } else {
    return r * kChunks + (c ^ ((r >> 2) & 1));
  }
}

// kBytes (4, 8 or 16) from global to shared memory; zeros are written, and nothing is read, where !valid. `source` must
// still be a mapped address then.
template <int kBytes>
__device__ __forceinline__ void cp_async(uint32_t target, const void* source, bool valid) {
  const int bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(target), "l"(source), "n"(kBytes), "r"(bytes)
                 : "memory");
  }
}
// 16 bytes of what is read once, in rows of 128 bytes or more: L2 fetches 128 at a time, and drops them before others.
__device__ __forceinline__ void cp_async_stream(uint32_t target, const void* source) {
  uint64_t policy;  // the compiler makes it once
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "l"(policy)
               : "memory");
}
// The same, kAhead bytes at a time (64 or 128: no more than a row has), with a policy of read_once; zeros where !valid.
template <int kAhead>
__device__ __forceinline__ void cp_async_stream(uint32_t target, const void* source, bool valid, uint64_t policy) {
  const int bytes = valid ? 16 : 0;
  if constexpr (kAhead == 128)
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(target), "l"(source),
                 "r"(bytes), "l"(policy)
                 : "memory");
  else
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::64B [%0], [%1], 16, %2, %3;" ::"r"(target), "l"(source),
                 "r"(bytes), "l"(policy)
                 : "memory");
}
// 4 or 8 bytes whose neighbours are needed, too: L2 fetches 128 at a time.
template <int kBytes>
__device__ __forceinline__ void cp_async_line(uint32_t target, const void* source, bool valid) {
  const int bytes = valid ? kBytes : 0;
  asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], %2, %3;" ::"r"(target), "l"(source), "n"(kBytes),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ uint64_t read_once() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// tensor cores --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// The transpose of an 8 x 8 matrix of 16-bit numbers: lane 4r + c holds row r, columns 2c and 2c + 1.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t pair) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

// d += a * b: a [16, 16] row-major fragment, b [16, 8] column-major fragment, d [16, 8] in float32. With g = lane / 4
// and t = lane % 4: d[0..1] = row g, columns 2t and 2t + 1; d[2..3] = row g + 8; a[0] = row g, a[1] = row g + 8, both k
// = 2t and 2t + 1; a[2], a[3] the same at k + 8; b0 = k 2t and 2t + 1 of column g, b1 at k + 8.
template <class T>
__device__ __forceinline__ void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// The same of 8-bit whole numbers, a [16, 32] and b [32, 8], with exact sums: registers hold four neighbours along k,
// from 4t in a[0], a[1] and b0, from 16 + 4t in the others.
__device__ __forceinline__ void mma_16832(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace pagedkv
