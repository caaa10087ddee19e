// One row of a KV cache: eight elements a thread, stored as they are or quantised with a scale for the row. The bits
// are those of quantize_rows in torch_pagedkv/ops/cache.py:
//     scale = amax / max;  inverse = 1 / scale (0 where scale is 0 or subnormal);  stored = round_to_nearest_even(x *
//     inverse)
// with IEEE divisions (nvcc's default, -prec-div=true).
#pragma once

#include "reduce.cuh"

namespace pagedkv {

constexpr int kChunk = 8;  // elements of a row that one thread holds; strides and head_dim are multiples of it

template <class C>
constexpr float kQuantMax = 0.f;  // 0: not quantised
template <>
constexpr float kQuantMax<int8_t> = 127.f;
template <>
constexpr float kQuantMax<__nv_fp8_e4m3> = 448.f;
template <class C>
constexpr bool kQuantized = kQuantMax<C> > 0.f;

template <>
__device__ __forceinline__ int8_t from_float<int8_t>(float x) {
  return int8_t(max(-127, min(127, __float2int_rn(x))));  // NaN gives 0, as the conversion does on the host
}
template <>
__device__ __forceinline__ __nv_fp8_e4m3 from_float<__nv_fp8_e4m3>(float x) {
  return __nv_fp8_e4m3(x);  // to nearest even, saturating; NaN stays NaN
}

// a / 127 or a / 448, rounded to nearest: with the reciprocal known, a product and its remainder do (Markstein), where
// the general division takes four times as many instructions.
template <class C>
__device__ __forceinline__ float over_max(float a) {
  constexpr float kMax = kQuantMax<C>, kInverse = 1.f / kMax;
  if (!(a >= 1e-30f && a <= 1e30f)) return __fdiv_rn(a, kMax);
  const float q = __fmul_rn(a, kInverse);
  return __fmaf_rn(__fmaf_rn(-q, kMax, a), kInverse, q);
}

// What is stored as floats, without the conversions of single bytes, which go through a unit of a quarter of the speed:
// a byte in the lowest bits of 2^23 is a float with its value added.
template <int N>
__device__ __forceinline__ void to_floats(const Vec<int8_t, N>& x, float* out) {
  uint32_t words[N / 4];
  memcpy(words, &x, sizeof x);
#pragma unroll
  for (int i = 0; i < N; ++i)
    out[i] =
        __fadd_rn(__uint_as_float(__byte_perm(words[i / 4] ^ 0x80808080u, 0x4b000000u, 0x7540 | i % 4)), -8388736.f);
}
template <int N>
__device__ __forceinline__ void to_floats(const Vec<__nv_fp8_e4m3, N>& x, float* out) {
  uint16_t pairs[N / 2];
  memcpy(pairs, &x, sizeof x);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const float2 pair = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(pairs[i], __NV_E4M3)));
    out[2 * i] = pair.x, out[2 * i + 1] = pair.y;
  }
}

struct RowScale {
  float scale, inverse;
};
template <class C>
__device__ __forceinline__ RowScale scale_of(float amax) {
  const float scale = over_max<C>(amax);
  return {scale, scale >= 1.17549435e-38f ? __frcp_rn(scale) : 0.f};
}

// The largest magnitude, on the bits: those of positive floats are in order, and a NaN tops them all, so it reaches the
// scale. 16-bit values are compared in pairs; float_bits() has the float's bits of the larger one.
__device__ __forceinline__ uint32_t larger(uint32_t so_far, float x) {
  return max(so_far, __float_as_uint(x) & 0x7fffffffu);
}
template <class T, int N>
__device__ __forceinline__ uint32_t larger(uint32_t so_far, const Vec<T, N>& x) {
  constexpr bool kPairs = sizeof(T) == 2;
  uint32_t words[kPairs ? N / 2 : N];
  memcpy(words, &x, sizeof x);
#pragma unroll
  for (uint32_t w : words) so_far = kPairs ? __vmaxu2(so_far, w & 0x7fff7fffu) : max(so_far, w & 0x7fffffffu);
  return so_far;
}
template <class T>
__device__ __forceinline__ uint32_t float_bits(uint32_t largest) {
  if constexpr (sizeof(T) == 4) return largest;
  const uint16_t bits = uint16_t(max(largest >> 16, largest & 0xffffu));
  T x;
  memcpy(&x, &bits, sizeof x);
  return __float_as_uint(to_float(x));
}

// Of R rows of N chunks a lane, each held by `width` lanes (all lanes of the warp must arrive); nothing where C is not
// quantised. Rows go through the shuffles and divisions side by side, which are all latency.
template <class C, int R, int N, class T>
__device__ __forceinline__ void row_scales(const Vec<T, kChunk> (&x)[R][N], int width, RowScale (&scales)[R]) {
  if constexpr (kQuantized<C>) {
    uint32_t bits[R] = {};
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int n = 0; n < N; ++n) bits[r] = larger(bits[r], x[r][n]);
      bits[r] = float_bits<T>(bits[r]);
    }
#pragma unroll
    for (int o = 16; o > 0; o /= 2) {
      if (o >= width) continue;
#pragma unroll
      for (int r = 0; r < R; ++r) bits[r] = max(bits[r], __shfl_xor_sync(kFullWarp, bits[r], o));
    }
#pragma unroll
    for (int r = 0; r < R; ++r) scales[r] = scale_of<C>(__uint_as_float(bits[r]));
  }
}

// Eight values as C. int8: added to 1.5 * 2^23, a number below 2^22 is rounded to nearest even and lies in the lowest
// bits, and where `inverse` is not 0 all are numbers of at most 127.0001; where it is 0, so is the result, of NaN, too.
// (The hardware's conversions go through a unit of a quarter or an eighth of the speed.)
template <class C>
__device__ __forceinline__ Vec<C, kChunk> quantized(const float* x, float inverse) {
  uint32_t words[kChunk / 4];
#pragma unroll
  for (int w = 0; w < kChunk / 4; ++w) {
    float y[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] = __fmul_rn(x[4 * w + i], inverse);
    if constexpr (std::is_same_v<C, int8_t>) {
      uint32_t bits[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) bits[i] = __float_as_uint(__fadd_rn(y[i], 12582912.f));
      words[w] = __byte_perm(__byte_perm(bits[0], bits[1], 0x0040), __byte_perm(bits[2], bits[3], 0x0040), 0x5410);
      if (inverse == 0.f) words[w] = 0;
    } else {
      const auto pair = [&](int i) {  // to nearest even, saturating; NaN stays NaN
        return uint32_t(__nv_cvt_float2_to_fp8x2(float2{y[i], y[i + 1]}, __NV_SATFINITE, __NV_E4M3));
      };
      words[w] = pair(0) | pair(2) << 16;
    }
  }
  Vec<C, kChunk> out;
  memcpy(&out, words, sizeof out);
  return out;
}
// Stores one thread's chunk; `inverse` is used by a quantised cache only.
template <class C, class T>
__device__ __forceinline__ void store_chunk(C* out, const Vec<T, kChunk>& x, float inverse, bool streamed) {
  if constexpr (kQuantized<C>) {
    float v[kChunk];
    to_floats(x, v);
    store_vec<C, kChunk>(out, quantized<C>(v, inverse), streamed);
  } else {
    store_vec<C, kChunk>(out, x, streamed);
  }
}

// [num_blocks, block_size, Hkv, D] with its scales [num_blocks, block_size, Hkv]
struct CacheView {
  void* data;
  float* scale;
  int64_t stride_block, stride_token, stride_head;  // elements
};
struct CacheShape {
  int64_t slots;  // num_blocks * block_size
  int block_shift, block_mask, heads;
};

inline CacheView cache_view(const Tensor& cache, const OptTensor& scale) {
  return {cache.mutable_data_ptr(), scale.has_value() ? scale->mutable_data_ptr<float>() : nullptr, cache.stride(0),
          cache.stride(1), cache.stride(2)};
}
inline CacheShape cache_shape(const Tensor& cache) {
  const int block_size = int(cache.size(1));
  return {cache.size(0) * block_size, __builtin_ctz(unsigned(block_size)), block_size - 1, int(cache.size(2))};
}

__device__ __forceinline__ int64_t cache_offset(const CacheView& c, const CacheShape& s, int64_t slot, int head) {
  return (slot >> s.block_shift) * c.stride_block + (slot & s.block_mask) * c.stride_token + head * c.stride_head;
}

// Writes the row of (slot, head), N chunks a lane, `apart` elements from each other.
template <class C, class T, int N>
__device__ __forceinline__ void write_row(const CacheView& c, const CacheShape& s, int64_t slot, int head, int lane,
                                          const Vec<T, kChunk> (&x)[N], int apart, const RowScale& scale,
                                          bool streamed = false) {
  C* const to = static_cast<C*>(c.data) + cache_offset(c, s, slot, head) + lane * kChunk;
#pragma unroll
  for (int n = 0; n < N; ++n) store_chunk<C>(to + n * apart, x[n], scale.inverse, streamed);
  if constexpr (kQuantized<C>) {
    if (lane == 0) c.scale[slot * s.heads + head] = scale.scale;
  }
}

// f is called with a value of the storage type of a cache that takes keys of type T.
template <class T, class F>
inline void dispatch_cache(ScalarType cache, F&& f) {
  switch (cache) {
    case ScalarType::Char:
      f(int8_t{});
      return;
    case ScalarType::Float8_e4m3fn:
      f(__nv_fp8_e4m3{});
      return;
    default:
      f(T{});  // the checks made sure that it is the keys' dtype
  }
}

// Lanes that hold a row of head_dim elements: a power of two up to 32, so that groups do not straddle warps.
inline unsigned row_lanes(int64_t head_dim) {
  unsigned lanes = 1;
  while (lanes * kChunk < head_dim) lanes *= 2;
  return lanes;
}

}  // namespace pagedkv
