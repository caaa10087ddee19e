// int8_repack, int8_dequantize, int8_linear (contract: torch_pagedkv/ops/int8.py; layout: int4.h).
//
// Few rows of float32: a CTA has 32 outputs and up to four rows. A lane reads 16 bytes, four inputs of four outputs, so
// a warp's load is 512 bytes in one piece; its warps take the words in turn, and sums are added up in order, so that
// equal calls give equal bits. A byte becomes a float as the low bits of 2^23, minus that. Floor: the bytes of W.
// 16-bit activations: int8_mma.cu; on Hopper, from 17 rows on, packed_wgmma.cu.
// Many rows: the weight is dequantised for the call and multiplied by torch's own product. That takes 2.0 to 2.6 times
// a product's time on bfloat16 weights with 65 to 256 rows, 1.6 with 512, 1.3 with 1024 (H200).
#include <algorithm>

#include "int4.h"
#include "reduce.cuh"
#include "torch_linear.h"

namespace pagedkv {
namespace {

constexpr int kThreads = 256;
// From so many rows on, weights in x's dtype and torch's product; where packed_wgmma.cu can, from kPackedExpand on.
constexpr int64_t kExpand = 65, kExpandFloat = 17;
constexpr int64_t kLongest = int64_t(1) << 21;  // inputs whose slices are counted in the halves of a product

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

// Byte e of a word whose bytes have had their signs flipped.
__device__ __forceinline__ float byte_to_float(uint32_t flipped, int e) {
  return __uint_as_float(__byte_perm(flipped, 0x4b000000u, 0x7650u + e)) - 8388736.f;  // 2^23 + 128
}

struct Dequantize {
  const uint32_t* packed;
  const void* scales;
  ScalarType scale_type;
  int64_t n, k, words, group;  // n: outputs of `scales`
  int64_t first_n, end_n;      // outputs that are written, the first to row 0
  void* w;                     // [end_n - first_n, k]
};

// A thread has two words of four outputs: eight inputs. Four lanes write 64 consecutive bytes. kWhole: K is a multiple
// of eight. (Asked here, the compiler makes one path of both, which stores two bytes at a time: 78 us for 4096 x 4096.)
template <class T, bool kWhole>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const __grid_constant__ Dequantize p, int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  constexpr int kInputs = 2 * kInt8Word;
  const int lane = int(i % 32);
  const Quotient at = divide(i / 32, p.words / (kInt4Block / kInt8Word));
  const int64_t block = p.first_n / kInt4Block + at.q, k = at.r * kInt4Block + lane % 4 * kInputs;
  const int64_t n = block * kInt4Block + lane / 4 * 4;
  if (k >= p.k) return;
  const uint4* const from =
      reinterpret_cast<const uint4*>(p.packed + (block * p.words + k / kInt8Word) * kInt4Block) + lane / 4;
  const uint4 words[2] = {__ldcs(from), __ldcs(from + kInt4Block / 4)};
  const uint32_t word[2][4] = {{words[0].x, words[0].y, words[0].z, words[0].w},
                               {words[1].x, words[1].y, words[1].z, words[1].w}};
  const int64_t scales = divide(k, p.group).q * p.n + n;
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    if (n + b < p.first_n || n + b >= p.end_n) continue;
    const float scale = load_scale(p.scales, p.scale_type, scales + b);
    float v[kInputs];
#pragma unroll
    for (int e = 0; e < kInputs; ++e) v[e] = __fmul_rn(scale, byte_to_float(word[e / 4][b] ^ 0x80808080u, e % 4));
    T* const to = static_cast<T*>(p.w) + (n + b - p.first_n) * p.k + k;
    if constexpr (kWhole) {
      store_floats(to, v);
    } else {
#pragma unroll
      for (int e = 0; e < kInputs; ++e)
        if (k + e < p.k) to[e] = from_float<T>(v[e]);
    }
  }
}

void launch_dequantize(const Dequantize& p, ScalarType dtype, cudaStream_t stream) {
  const int64_t blocks = ceil_div(p.end_n, kInt4Block) - p.first_n / kInt4Block;
  const int64_t count = blocks * (p.words / (kInt4Block / kInt8Word)) * 32;
  if (count == 0) return;
  dispatch_cuda(dtype, "int8_dequantize", [&](auto tag) {
    using T = decltype(tag);
    const auto kernel = p.k % (2 * kInt8Word) == 0 ? dequantize_kernel<T, true> : dequantize_kernel<T, false>;
    kernel<<<ceil_div(count, kThreads), kThreads, 0, stream>>>(p, count);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

constexpr int kWarps = 8, kRows = 4, kUnroll = 4;
constexpr int kWarpWords = 4;  // of each output, in a load of a warp

__global__ void __launch_bounds__(32 * kWarps) float_kernel(const __grid_constant__ Int4Params p) {
  __shared__ float sums[kWarps][kRows][32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, g = lane & 7, r = lane >> 3;
  const int64_t first_row = int64_t(blockIdx.y) * kRows, n = int64_t(blockIdx.x) * kInt4Block + 4 * g;
  const int rows = int(min(int64_t(kRows), p.m - first_row));
  const int64_t words = p.k_padded / kInt8Word;  // a multiple of 8
  const float* const x = static_cast<const float*>(p.x) + first_row * p.x_stride;
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
        for (int e = 0; e < kInt8Word; ++e) in[row][e] = row < rows && k + e < p.k ? x[row * p.x_stride + k + e] : 0.f;
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
  static_cast<float*>(p.y)[(first_row + warp) * p.n + out] = int4_finish<float>(p, first_row + warp, out, sum);
}

// y = activation(y) + residual
template <class T>
__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ Int4Params p) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.m * p.n) return;
  T* const y = static_cast<T*>(p.y) + i;
  *y = int4_finish<T>(p, i / p.n, i % p.n, to_float(*y));
}

Dequantize weights(const Tensor& packed, const Tensor& scales, int64_t group, int64_t k) {
  Dequantize d{};
  d.packed = static_cast<const uint32_t*>(packed.const_data_ptr());
  d.scales = scales.const_data_ptr(), d.scale_type = scales.scalar_type();
  d.n = scales.size(1), d.k = k, d.words = packed.size(1), d.group = group;
  return d;
}

// x W^T + bias by torch's own product. The weights of some outputs at a time, which bounds the scratch memory.
Tensor expand(Dequantize d, const Tensor& x, const OptTensor& bias, cudaStream_t stream) {
  constexpr int64_t kScratch = int64_t(1) << 27;  // elements
  const int64_t step = std::max<int64_t>(1, kScratch / (d.k * kInt4Block)) * kInt4Block;
  Tensor w = torch::stable::new_empty(x, {std::min(step, d.n), d.k});
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = d.n;
  Tensor y;
  for (d.first_n = 0; d.first_n < d.n; d.first_n = d.end_n) {
    d.end_n = std::min(d.n, d.first_n + step);
    const int64_t count = d.end_n - d.first_n;
    Tensor part = torch::stable::narrow(w, 0, 0, count);
    d.w = part.mutable_data_ptr();
    launch_dequantize(d, x.scalar_type(), stream);
    OptTensor added;
    if (bias.has_value()) {
      Tensor whole = *bias;
      added = torch::stable::narrow(whole, 0, d.first_n, count);
    }
    Tensor product = torch_linear(x, part, added);
    if (count == d.n) return product.is_contiguous() ? product : torch::stable::contiguous(product);
    if (d.first_n == 0) y = torch::stable::new_empty(x, sizes);
    Tensor to = torch::stable::narrow(y, int64_t(sizes.size()) - 1, d.first_n, count);
    torch::stable::copy_(to, product);
  }
  return y;
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
  Dequantize d = weights(packed, scales, group_size, in_features);
  Tensor w = torch::stable::new_empty(scales, {d.n, d.k}, dtype);
  d.end_n = d.n, d.w = w.mutable_data_ptr();
  launch_dequantize(d, dtype, current_stream(scales));
  return w;
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
  if (p.m == 0 || p.n == 0) return torch::stable::new_empty(x, sizes);
  Tensor added;
  if (residual.has_value()) added = residual->is_contiguous() ? *residual : torch::stable::contiguous(*residual);
  p.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
  p.residual = residual.has_value() ? added.const_data_ptr() : nullptr;
  const cudaStream_t stream = current_stream(x);
  const bool narrow = x.scalar_type() != ScalarType::Float;
  const auto expanded = [&] {
    Tensor y;
    if (p.k > 0) {
      y = expand(weights(packed, scales, group_size, in_features), x, bias, stream);
      p.bias = nullptr;
    } else {
      y = torch::stable::new_empty(x, sizes);
      torch::stable::zero_(y);
    }
    p.y = y.mutable_data_ptr();
    if (!p.bias && !p.residual && p.act == Act::kNone) return y;
    dispatch_cuda(x.scalar_type(), "int8_linear", [&](auto tag) {
      finish_kernel<decltype(tag)><<<ceil_div(p.m * p.n, kThreads), kThreads, 0, stream>>>(p);
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return y;
  };
  if (p.k == 0 || p.m >= (narrow ? kPackedExpand : kExpandFloat) || p.k >= kLongest) return expanded();
  Tensor y = torch::stable::new_empty(x, sizes), input = rows.tensor;
  p.x = input.const_data_ptr(), p.x_stride = rows.stride, p.y = y.mutable_data_ptr();
  p.packed = static_cast<const uint32_t*>(packed.const_data_ptr());
  p.scales = scales.const_data_ptr(), p.scale_type = scales.scalar_type();
  if (narrow) {
    if (!int4_reads(p.x, p.x_stride, p.k)) {  // rows of whole slices
      Tensor padded = torch::stable::new_empty(x, {p.m, p.k_padded});
      if (p.k_padded > p.k) torch::stable::zero_(padded);
      Tensor part = torch::stable::narrow(padded, 1, 0, p.k);
      torch::stable::copy_(part, torch::stable::reshape(input, {p.m, p.k}));
      input = padded;
      p.x = input.const_data_ptr(), p.x_stride = p.k_padded;
    }
    const auto on_wgmma =
        x.scalar_type() == ScalarType::Half ? launch_packed_wgmma<__half> : launch_packed_wgmma<__nv_bfloat16>;
    if (p.m >= kPackedWgmma && on_wgmma(p, true, input, stream)) return y;
    if (p.m >= kExpand) return expanded();
    (x.scalar_type() == ScalarType::Half ? launch_int8_mma<__half> : launch_int8_mma<__nv_bfloat16>)(p, stream);
  } else {
    float_kernel<<<dim3(ceil_div(p.n, kInt4Block), ceil_div(p.m, kRows)), 32 * kWarps, 0, stream>>>(p);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

}  // namespace pagedkv

STABLE_TORCH_LIBRARY_IMPL(torch_pagedkv, CUDA, m) {
  PAGEDKV_IMPL(m, int8_repack, pagedkv::int8_repack_cuda);
  PAGEDKV_IMPL(m, int8_dequantize, pagedkv::int8_dequantize_cuda);
  PAGEDKV_IMPL(m, int8_linear, pagedkv::int8_linear_cuda);
}
