// Device helpers of the row-wise kernels: vector loads and stores, index arithmetic, reductions over a group of
// threads; and on the host, a strided tensor seen as rows.
#pragma once

#include <algorithm>

#include "cuda_common.h"

namespace pagedkv {

// vectors ------------------------------------------------------------------------------------------------------------

constexpr int kVectorBytes = 16;
template <class T>
constexpr int kVec = kVectorBytes / int(sizeof(T));  // elements in one full-width load

// N elements at p in pieces of at most 16 bytes, to which p must be aligned. A scalar path is N calls with N = 1.
template <class T, int N>
__device__ __forceinline__ Vec<T, N> load_vec(const T* p) {
  if constexpr (sizeof(T) * N <= kVectorBytes) {
    return *reinterpret_cast<const Vec<T, N>*>(p);
  } else {
    Vec<T, N> r;
    constexpr int M = kVec<T>;
#pragma unroll
    for (int i = 0; i < N / M; ++i) {
      const Vec<T, M> part = *reinterpret_cast<const Vec<T, M>*>(p + i * M);
#pragma unroll
      for (int j = 0; j < M; ++j) r.v[i * M + j] = part.v[j];
    }
    return r;
  }
}
template <class T, int N>
__device__ __forceinline__ void store_vec(T* p, const Vec<T, N>& x) {
  if constexpr (sizeof(T) * N <= kVectorBytes) {
    *reinterpret_cast<Vec<T, N>*>(p) = x;
  } else {
    constexpr int M = kVec<T>;
#pragma unroll
    for (int i = 0; i < N / M; ++i) {
      Vec<T, M> part;
#pragma unroll
      for (int j = 0; j < M; ++j) part.v[j] = x.v[i * M + j];
      *reinterpret_cast<Vec<T, M>*>(p + i * M) = part;
    }
  }
}
// The same with the alignment known only as a template flag: N scalar accesses where `Aligned` is false.
template <bool Aligned, class T, int N>
__device__ __forceinline__ Vec<T, N> load_any(const T* p) {
  if constexpr (Aligned) {
    return load_vec<T, N>(p);
  } else {
    Vec<T, N> r;
#pragma unroll
    for (int i = 0; i < N; ++i) r.v[i] = p[i];
    return r;
  }
}
template <bool Aligned, class T, int N>
__device__ __forceinline__ void store_any(T* p, const Vec<T, N>& x) {
  if constexpr (Aligned) {
    store_vec<T, N>(p, x);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) p[i] = x.v[i];
  }
}

// N values as float of a vector that holds either T or float (weights, cos and sin come in both); p aligned to the
// width of its own type's pieces.
template <class T, int N>
__device__ __forceinline__ void load_mixed(const void* p, bool is_float32, int64_t index, float* out) {
  if (is_float32) {
    const Vec<float, N> x = load_vec<float, N>(static_cast<const float*>(p) + index);
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = x.v[i];
  } else {
    const Vec<T, N> x = load_vec<T, N>(static_cast<const T*>(p) + index);
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = to_float(x.v[i]);
  }
}

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0; }
// Whether steps along these dimensions keep an address aligned, and whether it is aligned at all.
inline bool is_aligned(const Tensor& x, std::initializer_list<int64_t> dims) {
  bool ok = is_aligned(x.const_data_ptr());
  for (int64_t i : dims) ok = ok && (x.size(i) <= 1 || x.stride(i) * int64_t(x.element_size()) % kVectorBytes == 0);
  return ok;
}

// index arithmetic ---------------------------------------------------------------------------------------------------

// n / d and n % d for n >= 0: 32-bit division, ten times cheaper than 64-bit, wherever n allows.
struct Quotient {
  int64_t q, r;
};
__device__ __forceinline__ Quotient divide(int64_t n, int64_t d) {
  if (uint64_t(n | d) >> 32) return {n / d, n % d};
  const uint32_t q = uint32_t(n) / uint32_t(d);
  return {int64_t(q), int64_t(uint32_t(n) - q * uint32_t(d))};
}

// reductions ---------------------------------------------------------------------------------------------------------

constexpr unsigned kFullWarp = 0xffffffffu;

// Over aligned groups of `width` lanes (a power of two up to 32); every lane of the warp must arrive. The order of the
// sum is fixed, so equal rows give equal bits in any batch.
template <class T, class Op>
__device__ __forceinline__ T group_reduce(T x, int width, Op op) {
  for (int o = width / 2; o > 0; o >>= 1) x = op(x, __shfl_xor_sync(kFullWarp, x, o));
  return x;
}
// Over the threads with one threadIdx.y: blockDim.x is a power of two up to 32, or a multiple of 32 with blockDim.y
// = 1. `scratch`: 32 values in shared memory, a different array for each call of a kernel (one barrier suffices then).
template <class T, class Op>
__device__ __forceinline__ T row_reduce(T x, T* scratch, T identity, Op op) {
  x = group_reduce(x, min(blockDim.x, 32), op);
  if (blockDim.x <= 32) return x;
  const int lane = threadIdx.x % 32;
  if (lane == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  x = lane < int(blockDim.x / 32) ? scratch[lane] : identity;
  return group_reduce(x, 32, op);
}

struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

// rows ---------------------------------------------------------------------------------------------------------------

// [..., N] as rows of unit stride: row r starts at element (r / inner) * outer_stride + (r % inner) * inner_stride. Two
// levels take the views of a fused projection ([tokens, heads, D] inside [tokens, 3 * heads * D]) without a copy.
struct RowMap {
  int64_t rows, inner, outer_stride, inner_stride;
};
__device__ __forceinline__ int64_t row_offset(const RowMap& m, int64_t row) {
  if (m.rows == m.inner) return row * m.inner_stride;
  const Quotient at = divide(row, m.inner);
  return at.q * m.outer_stride + at.r * m.inner_stride;
}

struct Rows {
  Tensor tensor;  // the rows' owner: the argument, or a contiguous copy where three or more strides remain
  RowMap map;
  bool aligned;  // every row starts at a 16-byte boundary
};

inline Rows as_rows(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  int64_t size[2] = {1, 1}, stride[2] = {0, 0};
  int levels = 0;  // [0]: the inner one
  bool ok = x.size(last) <= 1 || x.stride(last) == 1;
  for (int64_t i = last - 1; i >= 0 && ok; --i) {
    if (x.size(i) == 1) continue;
    if (levels > 0 && x.stride(i) == size[levels - 1] * stride[levels - 1]) {
      size[levels - 1] *= x.size(i);
    } else if (levels < 2) {
      size[levels] = x.size(i);
      stride[levels++] = x.stride(i);
    } else {
      ok = false;
    }
  }
  if (!ok && x.numel() == 0) return {x, {0, 1, 0, 0}, false};  // contiguous() leaves its strides as they are
  if (!ok) return as_rows(torch::stable::contiguous(x));
  bool aligned = is_aligned(x.const_data_ptr());
  for (int64_t s : stride) aligned = aligned && s * int64_t(x.element_size()) % kVectorBytes == 0;
  return {x, {size[0] * size[1], size[0], stride[1], stride[0]}, aligned};
}

// contiguous, whatever x is
inline Tensor new_like(const Tensor& x) { return torch::stable::new_empty(x, x.sizes()); }

inline unsigned ceil_div(int64_t a, int64_t b) { return unsigned((a + b - 1) / b); }

}  // namespace pagedkv
