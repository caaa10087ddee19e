// quantize_per_token, dequantize_sums (contract: torch_pagedkv/ops/quantize.py).
//
// quantize_per_token: rows of up to 16384 elements are held in registers, eight elements a run, a block of 4 or 8 warps
// a row, of up to 32 where rows are few (one row of 14336, rotated: 3.1 us for 3.6). Other rows: a block a row, whose
// second pass finds it in the first-level cache. dequantize_sums: four elements a thread where rows allow.
//
// Floor: (read x + write q) / 4.28 TB/s; (read sums + write y) / 4.28 TB/s. 4096 x 4096 bf16 to int8: 11.8 us;
// measured 14.6.
// Tried: rows in a ring of asynchronous copies (19.3 us), a warp a row (26.2: all read, then all compute).
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

// Eight consecutive elements a lane, rotated in blocks of p.rotation; all lanes of the warp call.
__device__ __forceinline__ void rotate(float* v, const QuantizeRows& p) {
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

// A block of W warps a row, J runs of eight elements a lane, held as floats.
template <class T, class C, int W, int J>
__global__ void __launch_bounds__(32 * W) quantize_row(const __grid_constant__ QuantizeRows p) {
  constexpr int N = 8, kStep = 32 * W * N;
  __shared__ uint32_t largest[W];
  release_next();
  const int64_t row = blockIdx.x;
  const int first = int(threadIdx.x) * N;
  const T* const from = static_cast<const T*>(p.x) + row_offset(p.map, row) + first;
  wait_for_previous();

  Vec<T, N> x[J];
#pragma unroll
  for (int j = 0; j < J; ++j) x[j] = stream_or_zero<T, N>(from + j * kStep, first + j * kStep < p.n);
  float v[J][N];
  uint32_t bits = 0;
#pragma unroll
  for (int j = 0; j < J; ++j) {
    to_floats(x[j], v[j]);
    if (p.factor && first + j * kStep < p.n) {
      float factor[N];
      load_mixed<float, N>(p.factor, true, first + j * kStep, factor);
#pragma unroll
      for (int i = 0; i < N; ++i) v[j][i] = __fmul_rn(v[j][i], factor[i]);
    }
    if (p.rotation) rotate(v[j], p);
#pragma unroll
    for (int i = 0; i < N; ++i) bits = larger(bits, v[j][i]);
  }
  bits = __reduce_max_sync(kFullWarp, bits);
  if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = bits;
  __syncthreads();
  if constexpr (W > 8) {
    bits = __reduce_max_sync(kFullWarp, threadIdx.x % 32 < W ? largest[threadIdx.x % 32] : 0u);
  } else {
#pragma unroll
    for (int w = 0; w < W; ++w) bits = max(bits, largest[w]);
  }
  const RowScale s = scale_of<C>(__uint_as_float(bits));
  if (threadIdx.x == 0) p.scale[row] = s.scale;
  C* const q = static_cast<C*>(p.q) + row * p.n + first;
#pragma unroll
  for (int j = 0; j < J; ++j)
    if (first + j * kStep < p.n) store_vec<C, N>(q + j * kStep, quantized<C>(v[j], s.inverse));
}

// f(i, values) for this thread's elements of a row, times the factor and rotated: eight at a time, or one where rows
// are not multiples of eight. Every thread goes round equally often, as lanes exchange elements.
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
      if (p.rotation) rotate(v, p);
    }
    if (inside) f(i, v);
  }
}

template <class T, class C, int N, bool kAligned>
__global__ void __launch_bounds__(kThreads) quantize_kernel(const __grid_constant__ QuantizeRows p) {
  __shared__ Scratch<uint32_t> scratch;
  begin_kernel();
  const int64_t row = blockIdx.x;
  const T* const x = static_cast<const T*>(p.x) + row_offset(p.map, row);
  uint32_t bits = 0;
  each<T, N, kAligned>(x, p, [&](int64_t, const float* v) {
#pragma unroll
    for (int j = 0; j < N; ++j) bits = larger(bits, v[j]);
  });
  const RowScale s = scale_of<C>(__uint_as_float(row_reduce(bits, scratch, 0u, Max{})));
  C* const q = static_cast<C*>(p.q) + row * p.n;
  each<T, N, kAligned>(x, p, [&](int64_t i, const float* v) {
    if constexpr (N == kChunk)
      store_vec<C, N>(q + i, quantized<C>(v, s.inverse));
    else
      q[i] = from_float<C>(__fmul_rn(v[0], s.inverse));
  });
  if (threadIdx.x == 0) p.scale[row] = s.scale;
}

struct Sums {
  const void* sums;  // [rows, n]
  const float *row_scale, *column_scale;
  const void* bias;  // [n] or null
  void* y;           // [rows, n]
  Divisor n;
  int64_t count;
};

// N consecutive elements a thread, which divides n.
template <class S, class T, int N>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const __grid_constant__ Sums p) {
  begin_kernel();
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (i >= p.count) return;
  const Quotient at = divide(i, p.n);
  const Vec<S, N> in = load_vec<S, N>(static_cast<const S*>(p.sums) + i);
  const float scale = p.row_scale[at.q];
  float column[N], v[N];
#pragma unroll
  for (int j = 0; j < N; ++j) column[j] = p.column_scale[at.r + j];
#pragma unroll
  for (int j = 0; j < N; ++j) v[j] = __fmul_rn(__fmul_rn(float(in.v[j]), scale), column[j]);
  if (p.bias) {
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] += to_float(static_cast<const T*>(p.bias)[at.r + j]);
  }
  store_vec<T, N>(static_cast<T*>(p.y) + i, from_floats<T, N>(v));
}

// Rows of at most 16384 elements in 16-byte pieces.
template <class T, class C>
void launch_rows(const QuantizeRows& p, cudaStream_t stream) {
  const auto run = [&](auto kernel, int warps) {
    launch_kernel(kernel, unsigned(p.map.rows), 32 * warps, 0, stream, p);
  };
  const unsigned runs = ceil_div(p.n, 256);  // a warp's
  if (runs <= 4) return run(quantize_row<T, C, 4, 1>, 4);
  if (runs <= 8) return run(quantize_row<T, C, 8, 1>, 8);
  if (p.map.rows <= 64) {  // of few rows a block has its SM to itself
    if (runs <= 16) return run(quantize_row<T, C, 16, 1>, 16);
    if (runs <= 32) return run(quantize_row<T, C, 32, 1>, 32);
    return run(quantize_row<T, C, 32, 2>, 32);
  }
  if (runs <= 16) return run(quantize_row<T, C, 8, 2>, 8);
  if (runs <= 32) return run(quantize_row<T, C, 8, 4>, 8);
  run(quantize_row<T, C, 8, 8>, 8);
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
  const cudaStream_t stream = current_stream(x);
  dispatch_cuda(x.scalar_type(), "quantize_per_token", [&](auto tag) {
    using T = decltype(tag);
    dispatch_cache<int8_t>(dtype, [&](auto stored) {
      using C = decltype(stored);
      if (eights && rows.aligned && is_aligned(p.factor) && p.n <= 16 * 1024) return launch_rows<T, C>(p, stream);
      const auto kernel = !eights        ? quantize_kernel<T, C, 1, false>
                          : rows.aligned ? quantize_kernel<T, C, 8, true>
                                         : quantize_kernel<T, C, 8, false>;
      launch_kernel(kernel, unsigned(rows.map.rows), kThreads, 0, stream, p);
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
               Divisor(sums.size(sums.dim() - 1)),
               sums.numel()};
  if (p.count == 0) return y;
  const bool vectors = p.n.d % 4 == 0 && is_aligned(p.sums);
  dispatch_cuda(dtype, "dequantize_sums", [&](auto tag) {
    using T = decltype(tag);
    const auto pick = [&](auto s) {
      using S = decltype(s);
      const auto kernel = vectors ? dequantize_kernel<S, T, 4> : dequantize_kernel<S, T, 1>;
      const unsigned blocks = ceil_div(p.count, kThreads * (vectors ? 4 : 1));
      launch_kernel(kernel, blocks, kThreads, 0, current_stream(sums), p);
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
