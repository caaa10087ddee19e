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
// What a kernel reads and the ones in front of it in the stream hardly wrote: into L2 before wait_for_previous().
__device__ __forceinline__ void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Zeros where !valid, by whole registers: set one by one, 16-bit elements take a register each.
template <class T, int N>
__device__ __forceinline__ Vec<T, N> load_or_zero(const T* p, bool valid) {
  using Word = std::conditional_t<sizeof(T) * N == 8, uint2, uint4>;
  static_assert(sizeof(T) * N % sizeof(Word) == 0);
  Word words[sizeof(T) * N / sizeof(Word)];
#pragma unroll
  for (int i = 0; i < int(sizeof(T) * N / sizeof(Word)); ++i)
    words[i] = valid ? reinterpret_cast<const Word*>(p)[i] : Word{};
  Vec<T, N> r;
  memcpy(&r, words, sizeof r);
  return r;
}
// Likewise, of what is read once: not kept in the first-level cache (a copy of 32 MiB: 15.7 us for 16.6).
__device__ __forceinline__ uint4 stream(const uint4* p) {
  uint4 w;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w)
               : "l"(p)
               : "memory");
  return w;
}
template <class T, int N>
__device__ __forceinline__ Vec<T, N> stream_or_zero(const T* p, bool valid) {
  static_assert(sizeof(T) * N % kVectorBytes == 0);
  uint4 words[sizeof(T) * N / kVectorBytes] = {};
#pragma unroll
  for (int i = 0; i < int(sizeof(T)) * N / kVectorBytes; ++i)
    if (valid) words[i] = stream(reinterpret_cast<const uint4*>(p) + i);
  Vec<T, N> r;
  memcpy(&r, words, sizeof r);
  return r;
}
// What nothing reads soon, as it does not fit into L2 with the rest: written back first. Next to it, reads and writes
// of the same kernel keep more of L2 (add_rms_norm of 4096 x 4096: 34.5 us for 36.0; 34.2 without the branch).
// `streamed`: is_streamed() of the output, since smaller ones are read from L2 by the kernel behind.
template <class T, int N>
__device__ __forceinline__ void store_vec(T* p, const Vec<T, N>& x, bool streamed) {
  using Word = std::conditional_t<sizeof(T) * N == 8, uint2, uint4>;
  if constexpr (sizeof(T) * N % sizeof(Word) != 0) {
    store_vec<T, N>(p, x);
  } else if (streamed) {
    Word words[sizeof(T) * N / sizeof(Word)];
    memcpy(words, &x, sizeof x);
#pragma unroll
    for (int i = 0; i < int(sizeof(T) * N / sizeof(Word)); ++i) __stcs(reinterpret_cast<Word*>(p) + i, words[i]);
  } else {
    store_vec<T, N>(p, x);
  }
}
inline bool is_streamed(int64_t bytes) { return bytes >= 8 << 20; }

// load_vec with the alignment known only as a template flag: N scalar accesses where `Aligned` is false.
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

// N floats as T, 16-bit ones by pairs: one at a time, they go through a unit of a quarter of the speed.
template <class T, int N>
__device__ __forceinline__ Vec<T, N> from_floats(const float* x) {
  Vec<T, N> r;
  if constexpr (N % 2 == 0 && std::is_same_v<T, __nv_bfloat16>) {
    __nv_bfloat162 pairs[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) pairs[i] = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
    memcpy(&r, pairs, sizeof r);
  } else if constexpr (N % 2 == 0 && std::is_same_v<T, __half>) {
    __half2 pairs[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) pairs[i] = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
    memcpy(&r, pairs, sizeof r);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) r.v[i] = from_float<T>(x[i]);
  }
  return r;
}
// By whole registers, too: taken one by one, 16-bit elements are kept in a register each.
template <class T, int N>
__device__ __forceinline__ void to_floats(const Vec<T, N>& x, float* out) {
  if constexpr (N % 2 == 0 && std::is_same_v<T, __nv_bfloat16>) {
    uint32_t words[N / 2];
    memcpy(words, &x, sizeof x);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      out[2 * i] = __uint_as_float(words[i] << 16);
      out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  } else if constexpr (N % 2 == 0 && std::is_same_v<T, __half>) {
    __half2 pairs[N / 2];
    memcpy(pairs, &x, sizeof x);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const float2 pair = __half22float2(pairs[i]);
      out[2 * i] = pair.x, out[2 * i + 1] = pair.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = to_float(x.v[i]);
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
    to_floats(load_vec<T, N>(static_cast<const T*>(p) + index), out);
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

inline unsigned ceil_div(int64_t a, int64_t b) { return unsigned((a + b - 1) / b); }

// n / d and n % d for n >= 0: 32-bit division, ten times cheaper than 64-bit, wherever n allows.
struct Quotient {
  int64_t q, r;
};
__device__ __forceinline__ Quotient divide(int64_t n, int64_t d) {
  if (uint64_t(n | d) >> 32) return {n / d, n % d};
  const uint32_t q = uint32_t(n) / uint32_t(d);
  return {int64_t(q), int64_t(uint32_t(n) - q * uint32_t(d))};
}

// A divisor known on the host: below 2^31 a product and a shift instead of twenty instructions.
// Granlund and Montgomery, Division by invariant integers using multiplication (PLDI 1994).
struct Divisor {
  int64_t d = 1;
  uint32_t magic = 0;
  int shift = 0;

  Divisor() = default;
  Divisor(int64_t divisor) : d(divisor) {
    if (d <= 1 || d >> 31) return;  // 1 is told apart; above 2^31 magic 0 gives the quotient 0
    while ((int64_t(1) << shift) < d) ++shift;
    magic = uint32_t(((uint64_t(1) << (31 + shift)) + uint64_t(d) - 1) / uint64_t(d));
    --shift;
  }
};
__device__ __forceinline__ Quotient divide(int64_t n, const Divisor& by) {
  if (uint64_t(n) >> 31) return {n / by.d, n % by.d};
  const uint32_t q = by.d == 1 ? uint32_t(n) : __umulhi(uint32_t(n), by.magic) >> by.shift;
  return {int64_t(q), int64_t(uint32_t(n) - q * uint32_t(by.d))};
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
// What row_reduce needs in shared memory; a different one for each call of a kernel (one barrier suffices then).
template <class T>
struct alignas(kVectorBytes) Scratch {
  T warp[32];
};
// Over the threads with one threadIdx.y: blockDim.x is a power of two up to 32, or a multiple of 32 with blockDim.y
// = 1. Every thread sums up the warps' results by itself: 60 cycles for 8 warps, where shuffles took 150.
template <class T, class Op>
__device__ __forceinline__ T row_reduce(T x, Scratch<T>& scratch, T identity, Op op) {
  constexpr int N = kVec<T>;
  if (blockDim.x < 32) return group_reduce(x, blockDim.x, op);
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) x = op(x, __shfl_xor_sync(kFullWarp, x, o));
  if (blockDim.x == 32) return x;
  const int warps = blockDim.x / 32, lane = threadIdx.x % 32;
  if (lane == 0) scratch.warp[threadIdx.x / 32] = x;
  if (threadIdx.x < 32 && lane >= warps) scratch.warp[lane] = identity;
  __syncthreads();
  x = identity;
#pragma unroll
  for (int w = 0; w < 32; w += N) {
    if (w >= warps) break;
    const Vec<T, N> part = load_vec<T, N>(scratch.warp + w);
#pragma unroll
    for (int i = 0; i < N; ++i) x = op(x, part.v[i]);
  }
  return x;
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
  int64_t rows;
  Divisor inner;
  int64_t outer_stride, inner_stride;
};
__device__ __forceinline__ int64_t row_offset(const RowMap& m, int64_t row) {
  if (m.rows == m.inner.d) return row * m.inner_stride;  // one level
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
  if (!ok && x.numel() == 0) return {x, {0, {}, 0, 0}, false};  // contiguous() leaves its strides as they are
  if (!ok) return as_rows(torch::stable::contiguous(x));
  bool aligned = is_aligned(x.const_data_ptr());
  for (int64_t s : stride) aligned = aligned && s * int64_t(x.element_size()) % kVectorBytes == 0;
  return {x, {size[0] * size[1], Divisor(size[0]), stride[1], stride[0]}, aligned};
}

// contiguous, whatever x is
inline Tensor new_like(const Tensor& x) { return torch::stable::new_empty(x, x.sizes()); }

}  // namespace pagedkv
