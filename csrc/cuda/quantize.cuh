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

struct RowScale {
  float scale, inverse;
};
template <class C>
__device__ __forceinline__ RowScale scale_of(float amax) {
  const float scale = __fdiv_rn(amax, kQuantMax<C>);
  return {scale, scale >= 1.17549435e-38f ? __fdiv_rn(1.f, scale) : 0.f};
}
// Of R rows of N chunks a lane, each held by `width` lanes (all lanes of the warp must arrive); nothing where C is not
// quantised. The largest magnitude is taken on the bits: those of positive floats are in order, and a NaN tops them
// all, so it reaches the scale. Rows go through the shuffles and divisions side by side, which are all latency.
template <class C, int R, int N, class T>
__device__ __forceinline__ void row_scales(const Vec<T, kChunk> (&x)[R][N], int width, RowScale (&scales)[R]) {
  if constexpr (kQuantized<C>) {
    uint32_t bits[R] = {};
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 0; i < kChunk; ++i) bits[r] = max(bits[r], __float_as_uint(to_float(x[r][n].v[i])) & 0x7fffffffu);
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

// Stores one thread's chunk; `inverse` is used by a quantised cache only.
template <class C, class T>
__device__ __forceinline__ void store_chunk(C* out, const Vec<T, kChunk>& x, float inverse) {
  Vec<C, kChunk> y;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    if constexpr (kQuantized<C>)
      y.v[i] = from_float<C>(__fmul_rn(to_float(x.v[i]), inverse));
    else
      y.v[i] = x.v[i];
  }
  store_vec<C, kChunk>(out, y);
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
                                          const Vec<T, kChunk> (&x)[N], int apart, const RowScale& scale) {
  C* const to = static_cast<C*>(c.data) + cache_offset(c, s, slot, head) + lane * kChunk;
#pragma unroll
  for (int n = 0; n < N; ++n) store_chunk<C>(to + n * apart, x[n], scale.inverse);
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
