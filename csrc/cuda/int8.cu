// int8_repack, int8_dequantize, int8_linear (contract: torch_pagedkv/ops/int8.py; layout: int4.h).
//
// Few rows: a CTA has 32 outputs and up to four rows. A lane reads 16 bytes, four inputs of four outputs, so a warp's
// load is 512 bytes in one piece; its warps take the words in turn, and sums are added up in order, so that equal calls
// give equal bits. A byte becomes a float as the low bits of 2^23, minus that. Floor: the bytes of W.
// Many rows: the weight is dequantised for the call and multiplied by torch's own product, whose time it is.
#include "int4.h"
#include "reduce.cuh"
#include "torch_linear.h"

namespace pagedkv {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    repack_kernel(const int8_t* q, int64_t n, int64_t k, int64_t words, int64_t count, uint32_t* packed) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t c = i % kInt4Block, j = i / kInt4Block % words, row = i / kInt4Block / words * kInt4Block + c;
  uint32_t word = 0;
#pragma unroll
  for (int e = 0; e < kInt8Word; ++e) {
    const int64_t at = j * kInt8Word + e;
    if (row < n && at < k) word |= uint32_t(uint8_t(q[row * k + at])) << int8_shift(e);
  }
  packed[i] = word;
}

struct Dequantize {
  const uint32_t* packed;
  const void* scales;
  ScalarType scale_type;
  int64_t n, k, words, group;
};

template <class T>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const __grid_constant__ Dequantize p, T* w) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.n * p.k) return;
  const int64_t row = i / p.k, k = i % p.k;
  const uint32_t word = p.packed[(row / kInt4Block * p.words + k / kInt8Word) * kInt4Block + row % kInt4Block];
  const int8_t q = int8_t(uint8_t(word >> int8_shift(int(k % kInt8Word))));
  w[i] = from_float<T>(__fmul_rn(load_scale(p.scales, p.scale_type, k / p.group * p.n + row), float(q)));
}

constexpr int kWarps = 8, kRows = 4, kUnroll = 4;
constexpr int kWarpWords = 4;  // of each output, in a load of a warp
constexpr int64_t kFewRows = 16;

// Byte e of a word whose bytes have had their signs flipped.
__device__ __forceinline__ float byte_to_float(uint32_t flipped, int e) {
  return __uint_as_float(__byte_perm(flipped, 0x4b000000u, 0x7650u + e)) - 8388736.f;  // 2^23 + 128
}

// Rows first_row .. of x, as many as `rows` says; p.stages and p.splits are not used.
template <class T>
__global__ void __launch_bounds__(32 * kWarps) few_rows_kernel(const __grid_constant__ Int4Params p) {
  __shared__ float sums[kWarps][kRows][32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, g = lane & 7, r = lane >> 3;
  const int64_t first_row = int64_t(blockIdx.y) * kRows, n = int64_t(blockIdx.x) * kInt4Block + 4 * g;
  const int rows = int(min(int64_t(kRows), p.m - first_row));
  const int64_t words = p.k_padded / kInt8Word;  // a multiple of 8
  const T* const x = static_cast<const T*>(p.x) + first_row * p.x_stride;
  const uint4* const from = reinterpret_cast<const uint4*>(p.packed) + (blockIdx.x * words * kInt4Block) / 4 + g;
  float total[kRows][4] = {};
  for (int64_t first = int64_t(warp) * kUnroll * kWarpWords; first < words; first += kWarps * kUnroll * kWarpWords) {
    uint4 loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t j = first + u * kWarpWords + r;
      loaded[u] = j < words ? from[j * (kInt4Block / 4)] : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t k = (first + u * kWarpWords + r) * kInt8Word;
      if (k >= p.k) continue;
      const uint32_t w[4] = {loaded[u].x ^ 0x80808080u, loaded[u].y ^ 0x80808080u, loaded[u].z ^ 0x80808080u,
                             loaded[u].w ^ 0x80808080u};
      float in[kRows][kInt8Word];
#pragma unroll
      for (int row = 0; row < kRows; ++row)
#pragma unroll
        for (int e = 0; e < kInt8Word; ++e)
          in[row][e] = row < rows && k + e < p.k ? to_float(x[row * p.x_stride + k + e]) : 0.f;
      const int64_t at = k / p.group * p.n + n;
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const float scale = n + b < p.n ? load_scale(p.scales, p.scale_type, at + b) : 0.f;
        float q[kInt8Word];
#pragma unroll
        for (int e = 0; e < kInt8Word; ++e) q[e] = byte_to_float(w[b], e);
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
          float sum = 0.f;
#pragma unroll
          for (int e = 0; e < kInt8Word; ++e) sum = fmaf(q[e], in[row][e], sum);
          total[row][b] = fmaf(scale, sum, total[row][b]);
        }
      }
    }
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row)
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      float sum = total[row][b];  // over the lanes with the same outputs
      sum += __shfl_xor_sync(kFullWarp, sum, 8);
      sum += __shfl_xor_sync(kFullWarp, sum, 16);
      if (r == 0) sums[warp][row][4 * g + b] = sum;
    }
  __syncthreads();
  const int64_t out = int64_t(blockIdx.x) * kInt4Block + lane;
  if (warp >= rows || out >= p.n) return;  // warp r finishes row r
  float sum = 0.f;
#pragma unroll
  for (int other = 0; other < kWarps; ++other) sum += sums[other][warp][lane];
  static_cast<T*>(p.y)[(first_row + warp) * p.n + out] = int4_finish<T>(p, first_row + warp, out, sum);
}

// y = activation(y) + residual
template <class T>
__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ Int4Params p) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.m * p.n) return;
  T* const y = static_cast<T*>(p.y) + i;
  *y = int4_finish<T>(p, i / p.n, i % p.n, to_float(*y));
}

Tensor dequantize(const Tensor& packed, const Tensor& scales, int64_t group, int64_t k, ScalarType dtype) {
  const int64_t n = scales.size(1);
  Tensor w = torch::stable::new_empty(scales, {n, k}, dtype);
  if (n * k == 0) return w;
  const Dequantize p{static_cast<const uint32_t*>(packed.const_data_ptr()),
                     scales.const_data_ptr(),
                     scales.scalar_type(),
                     n,
                     k,
                     packed.size(1),
                     group};
  dispatch_cuda(dtype, "int8_dequantize", [&](auto tag) {
    using T = decltype(tag);
    const auto kernel = dequantize_kernel<T>;
    kernel<<<ceil_div(n * k, kThreads), kThreads, 0, current_stream(scales)>>>(p,
                                                                               static_cast<T*>(w.mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return w;
}

}  // namespace

Tensor int8_repack_cuda(Tensor q) {
  check_int8_repack(q);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const int64_t n = q.size(0), k = q.size(1), words = ceil_div(k, kInt4Block) * (kInt4Block / kInt8Word);
  Tensor packed =
      torch::stable::new_empty(q, {int64_t(ceil_div(n, kInt4Block)), words, int64_t(kInt4Block)}, ScalarType::Int);
  const Tensor dense = torch::stable::contiguous(q);
  const int64_t count = packed.numel();
  if (count == 0) return packed;
  repack_kernel<<<ceil_div(count, kThreads), kThreads, 0, current_stream(q)>>>(
      dense.const_data_ptr<int8_t>(), n, k, words, count,
      reinterpret_cast<uint32_t*>(packed.mutable_data_ptr<int32_t>()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return packed;
}

Tensor int8_dequantize_cuda(Tensor packed, Tensor scales, int64_t group_size, int64_t in_features, ScalarType dtype) {
  check_int8_dequantize(packed, scales, group_size, in_features, dtype);
  const torch::stable::accelerator::DeviceGuard guard(scales.get_device_index());
  return dequantize(packed, scales, group_size, in_features, dtype);
}

Tensor int8_linear_cuda(Tensor x, Tensor packed, Tensor scales, OptTensor bias, OptTensor residual, int64_t group_size,
                        int64_t in_features, std::string activation) {
  Int4Params p{};
  p.act = kPackedActs[check_int8_linear(x, packed, scales, bias, residual, group_size, in_features, activation,
                                        kPackedActivations)];
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const EvenRows rows(x);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = scales.size(1);
  p.m = rows.count, p.n = scales.size(1), p.k = in_features, p.group = group_size;
  p.k_padded = packed.size(1) * kInt8Word;
  Tensor added;
  if (residual.has_value()) added = residual->is_contiguous() ? *residual : torch::stable::contiguous(*residual);
  p.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
  p.residual = residual.has_value() ? added.const_data_ptr() : nullptr;
  const cudaStream_t stream = current_stream(x);
  const bool few = p.m <= kFewRows;
  Tensor y;
  if (few || p.n == 0) {
    y = torch::stable::new_empty(x, sizes);
  } else {
    Tensor w = dequantize(packed, scales, group_size, in_features, x.scalar_type());
    y = torch_linear(x, w, bias);
    if (!y.is_contiguous()) y = torch::stable::contiguous(y);
    p.bias = nullptr;
  }
  if (p.m == 0 || p.n == 0) return y;
  p.y = y.mutable_data_ptr();
  if (!few && !p.residual && p.act == Act::kNone) return y;
  if (few) {
    p.packed = static_cast<const uint32_t*>(packed.const_data_ptr());
    p.scales = scales.const_data_ptr(), p.scale_type = scales.scalar_type();
    p.x = rows.tensor.const_data_ptr(), p.x_stride = rows.stride;
  }
  dispatch_cuda(x.scalar_type(), "int8_linear", [&](auto tag) {
    using T = decltype(tag);
    if (few)
      few_rows_kernel<T><<<dim3(ceil_div(p.n, kInt4Block), ceil_div(p.m, kRows)), 32 * kWarps, 0, stream>>>(p);
    else
      finish_kernel<T><<<ceil_div(p.m * p.n, kThreads), kThreads, 0, stream>>>(p);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return y;
}

}  // namespace pagedkv

STABLE_TORCH_LIBRARY_IMPL(torch_pagedkv, CUDA, m) {
  PAGEDKV_IMPL(m, int8_repack, pagedkv::int8_repack_cuda);
  PAGEDKV_IMPL(m, int8_dequantize, pagedkv::int8_dequantize_cuda);
  PAGEDKV_IMPL(m, int8_linear, pagedkv::int8_linear_cuda);
}
