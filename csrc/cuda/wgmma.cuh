// Tiles in shared memory for Hopper's matrix products of a warpgroup (wgmma, sm_90a): their layout and descriptors. PTX
// ISA 8.0, "Asynchronous warpgroup-level matrix instructions". The instructions themselves: wgmma_ptx.cuh.
//
// PAGEDKV_WGMMA is defined where they exist.
#pragma once

#include "tensor_core.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define PAGEDKV_WGMMA 1
#endif

namespace pagedkv::wgmma {

// tiles ---------------------------------------------------------------------------------------------------------------
//
// A tile [rows, columns] of 16-bit elements is kept as blocks of 64 columns; in a block a row is 128 bytes, eight
// 16-byte chunks, and chunk c of row r lies in place c ^ (r % 8): the 128-byte swizzle, a pattern of 8 rows (1024
// bytes), which the hardware takes from bits 7..9 of the address. Hence blocks start at multiples of 1024.

constexpr uint32_t kRowBytes = 128, kAtomBytes = 1024;

__device__ __forceinline__ uint32_t swizzle128(int row, int chunk) {
  return uint32_t(row) * kRowBytes + (uint32_t(chunk ^ row) & 7) * 16;
}

// Descriptor: bits 0..13 address / 16, 16..29 leading offset / 16, 32..45 stride offset / 16, 62..63 = 1: 128-byte
// swizzle. The stride offset is from 8 rows to the next 8.
//   rows = m or n, columns = k ("K-major"): a step of 16 in k is 32 bytes further, inside the pattern, and four steps
//     make a block; the leading offset is not used (1 by convention).
//   rows = k, columns = n ("MN-major", trans-b): a step of 16 in k is two patterns further; the leading offset is from
//     64 columns to the next 64, the size of a block.
__device__ __forceinline__ uint32_t descriptor_low(uint32_t address, uint32_t leading_bytes) {
  return ((address & 0x3ffff) >> 4) | (leading_bytes >> 4) << 16;
}
__device__ __forceinline__ uint64_t descriptor(uint32_t low) {  // the other half is always the same
  return uint64_t((kAtomBytes >> 4) | 1u << 30) << 32 | low;
}
__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t leading_bytes) {
  return descriptor(descriptor_low(address, leading_bytes));
}

// A ring of stages: which one, and the parity of its barriers in this round.
template <int kStages>
struct Ring {
  int index = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++index == kStages) index = 0, parity ^= 1;
  }
};

// The same for a power of two, in one register.
template <int kStages>
class Count {
  static_assert((kStages & (kStages - 1)) == 0);
  uint32_t count_ = 0;

 public:
  __device__ __forceinline__ int index() const { return int(count_ % kStages); }
  __device__ __forceinline__ uint32_t parity() const { return count_ / kStages & 1; }
  __device__ __forceinline__ void advance() { ++count_; }
};

}  // namespace pagedkv::wgmma

#ifdef PAGEDKV_WGMMA
#include "wgmma_ptx.cuh"
#endif
