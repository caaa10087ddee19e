// What the files of the 4-bit linear layer share: its parameters and the launches.
#pragma once

#include "activation.cuh"
#include "cuda_common.h"

namespace pagedkv {

struct Int4Params {
  const uint32_t* packed;  // [blocks][k_padded / 8][32], see int4.h
  const void* scales;      // [groups, n] of scale_type
  const uint8_t* zeros;    // [groups, n] or null: 8
  const void* offsets;     // [groups, n] of scale_type or null
  ScalarType scale_type;
  const void* x;  // [m, k], rows x_stride elements apart
  int64_t x_stride;
  const void* bias;      // [n] or null
  const void* residual;  // [m, n] or null
  void* y;               // [m, n]
  int64_t m, n, k, k_padded, group;
  Act act;
};

// y = activation(sum + bias) + residual
template <class T>
__device__ __forceinline__ T int4_finish(const Int4Params& p, int64_t row, int64_t n, float sum) {
  if (p.bias) sum += to_float(static_cast<const T*>(p.bias)[n]);
  apply<1>(p.act, &sum);
  if (p.residual) sum += to_float(static_cast<const T*>(p.residual)[row * p.n + n]);
  return from_float<T>(sum);
}

__device__ __forceinline__ float load_scale(const void* p, ScalarType type, int64_t i) {
  switch (type) {
    case ScalarType::Half:
      return to_float(static_cast<const __half*>(p)[i]);
    case ScalarType::BFloat16:
      return to_float(static_cast<const __nv_bfloat16*>(p)[i]);
    default:
      return static_cast<const float*>(p)[i];
  }
}

// From so many rows on, weights in 16 bits and cuBLAS.
constexpr int kInt4Expand = 128;

// Tensor cores, for __half and __nv_bfloat16; one unit of int4_mma.cu each.
template <class T>
void launch_int4_mma(const Int4Params& p, int device, cudaStream_t stream);
// Whether it can read x as it is: rows of whole slices, in 16-byte vectors.
inline bool int4_reads(const void* x, int64_t x_stride, int64_t k) {
  return reinterpret_cast<uintptr_t>(x) % 16 == 0 && x_stride % 8 == 0 && k % kInt4Block == 0;
}

}  // namespace pagedkv
