// quantize_per_token, dequantize_sums (contract: torch_pagedkv/ops/quantize.py).
//
// quantize_per_token: a CTA a row, eight elements a thread at a time; the second pass finds the row in the first-level
// cache. dequantize_sums: four elements a thread where rows allow.
//
// Floor: (read x + write q) / 4.28 TB/s; (read sums + write y) / 4.28 TB/s.
#include <cmath>

#include "quantize.cuh"

namespace pagedkv {
namespace {

constexpr int kThreads = 256;

struct QuantizeRows {
  const void* x;
  RowMap map;
  const float* factor;  // [n] or null
  int64_t n;
  void* q;       // [rows, n]
  float* scale;  // [rows]
  int rotation;  // inputs of a block, or 0
  float root;    // 1 / its root
};

// f(i, values, count) for this thread's elements of a row, times the factor and rotated: eight at a time, or one where
// rows are not multiples of eight. Every thread goes round equally often, as lanes exchange elements.
template <class T, int N, bool kAligned, class F>
__device__ __forceinline__ void each(const T* x, const QuantizeRows& p, F f) {
  for (int64_t first = 0; first < p.n; first += kThreads * N) {
    const int64_t i = first + int64_t(threadIdx.x) * N;
    const bool inside = i < p.n;
    float v[N] = {};
    if (inside) {
      const Vec<T, N> from = load_any<kAligned, T, N>(x + i);
#pragma unroll
      for (int j = 0; j < N; ++j)
        v[j] = p.factor ? __fmul_rn(to_float(from.v[j]), p.factor[i + j]) : to_float(from.v[j]);
    }
    if constexpr (N == 8) {
      if (p.rotation) {
#pragma unroll
        for (int h = 1; h < 8; h *= 2)
#pragma unroll
          for (int j = 0; j < 8; ++j)
            if (!(j & h)) {
              const float a = v[j], b = v[j + h];
              v[j] = __fadd_rn(a, b), v[j + h] = __fadd_rn(a, -b);
            }
        for (int lanes = 1; lanes < p.rotation / 8; lanes *= 2)
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const float other = __shfl_xor_sync(kFullWarp, v[j], lanes);
            v[j] = threadIdx.x & lanes ? __fadd_rn(other, -v[j]) : __fadd_rn(v[j], other);
          }
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = __fmul_rn(v[j], p.root);
      }
    }
    if (inside) f(i, v);
  }
}

template <class T, class C, int N, bool kAligned>
__global__ void __launch_bounds__(kThreads) quantize_kernel(const __grid_constant__ QuantizeRows p) {
  __shared__ uint32_t scratch[32];
  const int64_t row = blockIdx.x;
  const T* const x = static_cast<const T*>(p.x) + row_offset(p.map, row);
  uint32_t bits = 0;  // those of positive floats are in order, and a NaN tops them all
  each<T, N, kAligned>(x, p, [&](int64_t, const float* v) {
#pragma unroll
    for (int j = 0; j < N; ++j) bits = max(bits, __float_as_uint(v[j]) & 0x7fffffffu);
  });
  const float amax = __uint_as_float(row_reduce(bits, scratch, 0u, Max{}));
  const float scale = __fdiv_rn(amax, kQuantMax<C>);
  const float inverse = scale >= 1.17549435e-38f ? __fdiv_rn(1.f, scale) : 0.f;
  C* const q = static_cast<C*>(p.q) + row * p.n;
  each<T, N, kAligned>(x, p, [&](int64_t i, const float* v) {
    Vec<C, N> out;
#pragma unroll
    for (int j = 0; j < N; ++j) out.v[j] = from_float<C>(__fmul_rn(v[j], inverse));
    store_vec<C, N>(q + i, out);
  });
  if (threadIdx.x == 0) p.scale[row] = scale;
}

struct Sums {
  const void* sums;  // [rows, n]
  const float *row_scale, *column_scale;
  const void* bias;  // [n] or null
  void* y;           // [rows, n]
  int64_t n, count;
};

// N consecutive elements a thread, which divides n.
template <class S, class T, int N>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const __grid_constant__ Sums p) {
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (i >= p.count) return;
  const Quotient at = divide(i, p.n);
  const Vec<S, N> in = load_vec<S, N>(static_cast<const S*>(p.sums) + i);
  const float scale = p.row_scale[at.q];
  Vec<T, N> out;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    float v = __fmul_rn(__fmul_rn(float(in.v[j]), scale), p.column_scale[at.r + j]);
    if (p.bias) v += to_float(static_cast<const T*>(p.bias)[at.r + j]);
    out.v[j] = from_float<T>(v);
  }
  store_vec<T, N>(static_cast<T*>(p.y) + i, out);
}

}  // namespace

Pair quantize_per_token_cuda(Tensor x, OptTensor factor, int64_t rotation, ScalarType dtype) {
  check_quantize_per_token(x, factor, rotation, dtype);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Rows rows = as_rows(x);
  const auto sizes = x.sizes();
  const std::vector<int64_t> outer(sizes.begin(), sizes.end() - 1);
  Tensor q = torch::stable::new_empty(x, sizes, dtype);
  Tensor scale = torch::stable::new_empty(x, outer, ScalarType::Float);
  if (rows.map.rows == 0) return {q, scale};
  const QuantizeRows p{rows.tensor.const_data_ptr(),
                       rows.map,
                       factor.has_value() ? factor->const_data_ptr<float>() : nullptr,
                       x.size(x.dim() - 1),
                       q.mutable_data_ptr(),
                       scale.mutable_data_ptr<float>(),
                       int(rotation),
                       rotation ? float(1 / std::sqrt(double(rotation))) : 1.f};
  const bool eights = p.n % 8 == 0;
  dispatch_cuda(x.scalar_type(), "quantize_per_token", [&](auto tag) {
    using T = decltype(tag);
    dispatch_cache<int8_t>(dtype, [&](auto stored) {
      using C = decltype(stored);
      const auto kernel = !eights        ? quantize_kernel<T, C, 1, false>
                          : rows.aligned ? quantize_kernel<T, C, 8, true>
                                         : quantize_kernel<T, C, 8, false>;
      kernel<<<unsigned(rows.map.rows), kThreads, 0, current_stream(x)>>>(p);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return {q, scale};
}

Tensor dequantize_sums_cuda(Tensor sums, Tensor row_scale, Tensor column_scale, OptTensor bias, ScalarType dtype) {
  check_dequantize_sums(sums, row_scale, column_scale, bias, dtype);
  const torch::stable::accelerator::DeviceGuard guard(sums.get_device_index());
  Tensor y = torch::stable::new_empty(sums, sums.sizes(), dtype);
  const Sums p{sums.const_data_ptr(),
               row_scale.const_data_ptr<float>(),
               column_scale.const_data_ptr<float>(),
               bias.has_value() ? bias->const_data_ptr() : nullptr,
               y.mutable_data_ptr(),
               sums.size(sums.dim() - 1),
               sums.numel()};
  if (p.count == 0) return y;
  const bool vectors = p.n % 4 == 0 && is_aligned(p.sums);
  dispatch_cuda(dtype, "dequantize_sums", [&](auto tag) {
    using T = decltype(tag);
    const auto pick = [&](auto s) {
      using S = decltype(s);
      const auto kernel = vectors ? dequantize_kernel<S, T, 4> : dequantize_kernel<S, T, 1>;
      kernel<<<ceil_div(p.count, kThreads * (vectors ? 4 : 1)), kThreads, 0, current_stream(sums)>>>(p);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    };
    sums.scalar_type() == ScalarType::Int ? pick(int32_t{}) : pick(float{});
  });
  return y;
}

}  // namespace pagedkv

STABLE_TORCH_LIBRARY_IMPL(torch_pagedkv, CUDA, m) {
  PAGEDKV_IMPL(m, quantize_per_token, pagedkv::quantize_per_token_cuda);
  PAGEDKV_IMPL(m, dequantize_sums, pagedkv::dequantize_sums_cuda);
}
