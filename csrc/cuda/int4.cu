// int4_repack, int4_dequantize, int4_linear (contract: torch_pagedkv/ops/int4.py; layout: int4.h).
//
// Repacking and dequantising are one thread an output word or weight: they run once, when a model is loaded.
// int4_linear in 16 bits is int4_mma.cu's, int4_few.cu's and int4_many.cu's; here are its preparation (a permuted or
// oddly aligned x is copied into rows padded with zeros) and the float32 kernel, which has no tensor cores to go to: a
// lane owns an output, the warps of a CTA take its words in turn, and their sums are added up in order.
#include <algorithm>
#include <array>
#include <mutex>

#include "int4.h"
#include "reduce.cuh"
#include "torch_linear.h"
#include "wgmma.cuh"

namespace pagedkv {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    repack_kernel(const uint8_t* q, int64_t n, int64_t k, int64_t words, int64_t count, uint32_t* packed) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t c = i % kInt4Block, j = i / kInt4Block % words, row = i / kInt4Block / words * kInt4Block + c;
  uint32_t word = 0;
#pragma unroll
  for (int e = 0; e < kInt4Word; ++e) {
    const int64_t at = j * kInt4Word + e;
    if (row < n && at < k) word |= ((uint32_t(q[row * k + at]) ^ 8u) & 15u) << int4_shift(e);
  }
  packed[i] = word;
}

struct Dequantize {
  const uint32_t* packed;
  const void *scales, *offsets;
  const uint8_t *zeros, *sub_scales, *sub_mins;
  const int32_t* perm;  // [k] or null
  ScalarType scale_type;
  int64_t n, k, k_padded, group, in_features;  // n: outputs of `scales`
  int64_t first_n, end_n;                      // outputs that are written, the first to row 0
  void* w;                                     // [end_n - first_n, in_features]
};

// A thread has a lane's 16 bytes of words: eight inputs of four outputs. Four lanes write 64 consecutive bytes.
template <class T>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const __grid_constant__ Dequantize p, int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const int lane = int(i % 32), t = lane % 4;
  const Quotient at = divide(i / 32, p.k_padded / kInt4Block);
  const int64_t block = p.first_n / kInt4Block + at.q, k = at.r * kInt4Block + t * kInt4Word;
  const int64_t n = block * kInt4Block + lane / 4 * 4;
  if (k >= p.k) return;
  const uint4 words = __ldcs(reinterpret_cast<const uint4*>(
      p.packed + (block * (p.k_padded / kInt4Word) + k / kInt4Word) * kInt4Block + lane / 4 * 4));
  const uint32_t word[4] = {words.x, words.y, words.z, words.w};
  const int64_t group = divide(k, p.group).q,
                factors = group * p.n + n;  // groups are whole words, but for a single one
  const int inputs = int(min(int64_t(kInt4Word), p.k - k));
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    if (n + b < p.first_n || n + b >= p.end_n) continue;
    const ScaleOffset of = p.offsets ? load_scale_offset(p, group, n + b)
                                     : ScaleOffset{load_scale(p.scales, p.scale_type, factors + b), 0};
    const int zero = p.zeros ? p.zeros[factors + b] : 8;
    float v[kInt4Word];
#pragma unroll
    for (int e = 0; e < kInt4Word; ++e) {
      const int q = int((word[b] >> int4_shift(e)) & 15u) ^ 8;
      // the exact product, added to and rounded once: in float32, unless it may have more than 24 bits
      v[e] = !p.offsets                          ? __fmul_rn(of.scale, float(q - zero))
             : p.scale_type != ScalarType::Float ? fmaf(of.scale, float(q), of.offset)
                                                 : float(double(of.scale) * q + of.offset);
    }
    T* const row = static_cast<T*>(p.w) + (n + b - p.first_n) * p.in_features;
    if (!p.perm && p.in_features % kInt4Word == 0) {
      store_floats(row + k, v);
    } else {
#pragma unroll
      for (int e = 0; e < kInt4Word; ++e) {
        if (e >= inputs) break;
        const int64_t to = p.perm ? p.perm[k + e] : k + e;
        if (to >= 0 && to < p.in_features) row[to] = from_float<T>(v[e]);
      }
    }
  }
}

void launch_dequantize(const Dequantize& p, ScalarType dtype, cudaStream_t stream) {
  const int64_t blocks = ceil_div(p.end_n, kInt4Block) - p.first_n / kInt4Block;
  const int64_t count = blocks * (p.k_padded / kInt4Block) * 32;
  if (count == 0) return;
  dispatch_cuda(dtype, "int4_dequantize", [&](auto tag) {
    dequantize_kernel<decltype(tag)><<<ceil_div(count, kThreads), kThreads, 0, stream>>>(p, count);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// y = activation(y + bias) + residual of a finished product
template <class T>
__global__ void __launch_bounds__(kThreads) epilogue_kernel(const __grid_constant__ Int4Params p) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.m * p.n) return;
  const Quotient at = divide(i, p.n);
  T* const y = static_cast<T*>(p.y);
  y[i] = int4_finish<T>(p, at.q, at.r, to_float(y[i]));
}

// x [m, k0] -> [m, k_padded]: in the order of perm, zeros where there is no input.
template <class T>
__global__ void __launch_bounds__(kThreads) gather_kernel(const T* x, int64_t x_stride, int64_t k0, const int32_t* perm,
                                                          int64_t m, int64_t k, int64_t k_padded, T* out) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= m * k_padded) return;
  const int64_t row = i / k_padded, at = i % k_padded, from = at >= k ? -1 : perm ? perm[at] : at;
  out[i] = from >= 0 && from < k0 ? x[row * x_stride + from] : T(0.f);
}

constexpr int kWarps = 8, kRows = 4;

__global__ void __launch_bounds__(32 * kWarps) float_kernel(const __grid_constant__ Int4Params p) {
  __shared__ float sums[kWarps][kRows][32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  const int64_t n = int64_t(blockIdx.x) * kInt4Block + lane, row = int64_t(blockIdx.y) * kRows;
  const int rows = int(min(int64_t(kRows), p.m - row));
  const int64_t words = p.k_padded / kInt4Word;
  const float* const x = static_cast<const float*>(p.x) + row * p.x_stride;
  float total[kRows] = {};
  if (n < p.n)
    for (int64_t j = warp; j < words; j += kWarps) {
      const uint32_t word = p.packed[(blockIdx.x * words + j) * kInt4Block + lane];
      const int64_t at = min(j * kInt4Word / p.group, (p.k - 1) / p.group) * p.n + n;
      const ScaleOffset with = p.offsets ? load_scale_offset(p, at / p.n, n) : ScaleOffset{};
      const float scale = p.offsets ? with.scale : load_scale(p.scales, p.scale_type, at);
      const float zero = p.zeros ? float(p.zeros[at]) : 8.f;
      float sum[kRows] = {}, x_sum[kRows] = {};
#pragma unroll
      for (int e = 0; e < kInt4Word; ++e) {
        const int64_t k = j * kInt4Word + e;
        if (k >= p.k) break;
        const float w = float(int((word >> int4_shift(e)) & 15u) ^ 8) - zero;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (r >= rows) break;
          const float in = x[r * p.x_stride + k];
          sum[r] = fmaf(w, in, sum[r]);
          x_sum[r] += in;
        }
      }
      const float shift = p.offsets ? fmaf(8.f, scale, with.offset) : 0.f;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        total[r] = fmaf(scale, sum[r], total[r]);
        if (p.offsets) total[r] = fmaf(shift, x_sum[r], total[r]);
      }
    }
#pragma unroll
  for (int r = 0; r < kRows; ++r) sums[warp][r][lane] = total[r];
  __syncthreads();
  if (warp >= rows || n >= p.n) return;  // warp r finishes row r
  float sum = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += sums[w][warp][lane];
  static_cast<float*>(p.y)[(row + warp) * p.n + n] = int4_finish<float>(p, row + warp, n, sum);
}

// Has that much shared memory exactly where it was compiled for sm_90a: the device may run another of the library's
// binaries.
constexpr size_t kProbeBytes = 8192;
__global__ void probe_kernel(int* out) {
#ifdef PAGEDKV_WGMMA
  __shared__ int shared[kProbeBytes / sizeof(int)];
  shared[threadIdx.x] = int(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
#endif
}

}  // namespace

const Int4Device& int4_device() {
  static std::array<Int4Device, 64> devices;
  static std::array<std::once_flag, 64> once;
  int index = 0;
  STD_CUDA_CHECK(cudaGetDevice(&index));
  if (index >= int(devices.size())) fail("int4_linear: got device cuda:", index, ", needs an index below 64");
  std::call_once(once[index], [&] {
    Int4Device& d = devices[index];
    int major = 0, minor = 0, clusters = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&d.sms, cudaDevAttrMultiProcessorCount, index));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, index));
    cudaFuncAttributes compiled{};  // for an architecture that may be older than the device
    STD_CUDA_CHECK(cudaFuncGetAttributes(&compiled, probe_kernel));
    d.has_wgmma = major == 9 && minor == 0 && compiled.sharedSizeBytes >= kProbeBytes;
    d.has_clusters = d.has_wgmma && clusters != 0;
  });
  return devices[index];
}

Tensor int4_repack_cuda(Tensor q) {
  check_int4_repack(q);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const int64_t n = q.size(0), k = q.size(1), words = ceil_div(k, kInt4Block) * (kInt4Block / kInt4Word);
  Tensor packed =
      torch::stable::new_empty(q, {int64_t(ceil_div(n, kInt4Block)), words, int64_t(kInt4Block)}, ScalarType::Int);
  const Tensor dense = torch::stable::contiguous(q);
  const int64_t count = packed.numel();
  if (count == 0) return packed;
  repack_kernel<<<ceil_div(count, kThreads), kThreads, 0, current_stream(q)>>>(
      dense.const_data_ptr<uint8_t>(), n, k, words, count,
      reinterpret_cast<uint32_t*>(packed.mutable_data_ptr<int32_t>()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return packed;
}

Tensor int4_dequantize_cuda(Tensor packed, Tensor scales, OptTensor zeros, OptTensor offsets, OptTensor perm,
                            int64_t group_size, int64_t in_features, ScalarType dtype) {
  check_int4_dequantize(packed, scales, zeros, offsets, perm, group_size, in_features, dtype);
  const torch::stable::accelerator::DeviceGuard guard(scales.get_device_index());
  Dequantize p{};
  p.packed = static_cast<const uint32_t*>(packed.const_data_ptr());
  p.scales = scales.const_data_ptr(), p.scale_type = scales.scalar_type();
  p.zeros = zeros.has_value() ? zeros->const_data_ptr<uint8_t>() : nullptr;
  p.offsets = offsets.has_value() ? offsets->const_data_ptr() : nullptr;
  p.perm = perm.has_value() ? perm->const_data_ptr<int32_t>() : nullptr;
  p.n = p.end_n = scales.size(1), p.k = perm.has_value() ? perm->size(0) : in_features;
  p.k_padded = packed.size(1) * kInt4Word, p.group = group_size, p.in_features = in_features;
  Tensor w = torch::stable::new_empty(scales, {p.n, in_features}, dtype);
  if (perm.has_value()) w = torch::stable::zero_(w);  // what no entry points to
  p.w = w.mutable_data_ptr();
  if (p.n * p.k == 0) return w;
  launch_dequantize(p, dtype, current_stream(scales));
  return w;
}

namespace {

// x W^T + bias of many rows: the weights in the activations' dtype, and cuBLAS. `input`: p.x as it lies, rows of p.k
// (padded) inputs. The weights of some outputs at a time, which bounds the scratch memory.
void expand(const Int4Params& p, const Tensor& input, const OptTensor& bias, Tensor& y, cudaStream_t stream) {
  constexpr int64_t kScratch = int64_t(1) << 27;  // bytes
  const int64_t k = p.x_stride == p.k_padded && input.size(input.dim() - 1) == p.k_padded ? p.k_padded : p.k;
  Dequantize d{};
  d.packed = p.packed, d.scales = p.scales, d.offsets = p.offsets, d.zeros = p.zeros;
  d.sub_scales = p.sub_scales, d.sub_mins = p.sub_mins, d.scale_type = p.scale_type;
  d.n = p.n, d.k = d.in_features = k, d.k_padded = p.k_padded, d.group = p.group;
  const int64_t step = std::max<int64_t>(1, kScratch / (k * 2 * kInt4Block)) * kInt4Block;
  const Tensor rows = torch::stable::reshape(input, {p.m, k});
  Tensor w = torch::stable::new_empty(input, {std::min(step, p.n), k});
  Tensor flat = torch::stable::reshape(y, {p.m, p.n});
  for (d.first_n = 0; d.first_n < p.n; d.first_n = d.end_n) {
    d.end_n = std::min(p.n, d.first_n + step);
    Tensor part = torch::stable::narrow(w, 0, 0, d.end_n - d.first_n);
    d.w = part.mutable_data_ptr();
    launch_dequantize(d, input.scalar_type(), stream);
    OptTensor added;
    if (bias.has_value()) {
      Tensor whole = *bias;
      added = torch::stable::narrow(whole, 0, d.first_n, d.end_n - d.first_n);
    }
    const Tensor product = torch_linear(rows, part, added);
    if (d.end_n - d.first_n == p.n) {
      y = torch::stable::reshape(product, y.sizes());
    } else {
      Tensor to = torch::stable::narrow(flat, 1, d.first_n, d.end_n - d.first_n);
      torch::stable::copy_(to, product);
    }
  }
}

}  // namespace

Tensor int4_linear_cuda(Tensor x, Tensor packed, Tensor scales, OptTensor zeros, OptTensor offsets, OptTensor perm,
                        OptTensor bias, OptTensor residual, int64_t group_size, int64_t in_features,
                        std::string activation) {
  Int4Params p{};
  p.act = kPackedActs[check_int4_linear(x, packed, scales, zeros, offsets, perm, bias, residual, group_size,
                                        in_features, activation, kPackedActivations)];
  p.packed = static_cast<const uint32_t*>(packed.const_data_ptr());
  p.scales = scales.const_data_ptr(), p.scale_type = scales.scalar_type();
  p.zeros = zeros.has_value() ? zeros->const_data_ptr<uint8_t>() : nullptr;
  p.offsets = offsets.has_value() ? offsets->const_data_ptr() : nullptr;
  p.n = scales.size(1), p.k = perm.has_value() ? perm->size(0) : in_features;
  p.group = group_size;
  return int4_product("int4_linear", x, p, perm, bias, residual);
}

Tensor int4_product(const char* op, const Tensor& x, Int4Params& p, const OptTensor& perm, const OptTensor& bias,
                    const OptTensor& residual) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const EvenRows rows(x);
  const int64_t k0 = x.size(x.dim() - 1);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = p.n;
  Tensor y = torch::stable::new_empty(x, sizes);
  p.m = rows.count, p.x_stride = rows.stride;
  p.k_padded = int64_t(ceil_div(p.k, kInt4Block)) * kInt4Block;
  if (p.m == 0 || p.n == 0) return y;

  Tensor input = rows.tensor;
  OptTensor added = residual;
  if (added.has_value() && !added->is_contiguous()) added = torch::stable::contiguous(*added);
  p.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
  p.residual = added.has_value() ? added->const_data_ptr() : nullptr;
  p.x = input.const_data_ptr(), p.y = y.mutable_data_ptr();
  const cudaStream_t stream = current_stream(x);
  const bool narrow = x.scalar_type() != ScalarType::Float;
  if (perm.has_value() || (narrow && !int4_reads(p.x, p.x_stride, p.k))) {
    Tensor gathered = torch::stable::new_empty(x, {p.m, p.k_padded});
    if (p.k_padded > 0)
      dispatch_cuda(x.scalar_type(), op, [&](auto tag) {
        using T = decltype(tag);
        gather_kernel<T><<<ceil_div(p.m * p.k_padded, kThreads), kThreads, 0, stream>>>(
            static_cast<const T*>(p.x), p.x_stride, k0, perm.has_value() ? perm->const_data_ptr<int32_t>() : nullptr,
            p.m, p.k, p.k_padded, static_cast<T*>(gathered.mutable_data_ptr()));
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      });
    input = gathered;
    p.x = input.const_data_ptr(), p.x_stride = p.k_padded;
  }
  const auto on_many = x.scalar_type() == ScalarType::Half ? launch_int4_many<__half> : launch_int4_many<__nv_bfloat16>;
  if (narrow && p.m >= kInt4Many && on_many(p, input, stream)) return y;
  const auto on_few = x.scalar_type() == ScalarType::Half ? launch_int4_few<__half> : launch_int4_few<__nv_bfloat16>;
  if (narrow && p.m >= kInt4Few && on_few(p, stream)) return y;
  const auto on_packed =
      x.scalar_type() == ScalarType::Half ? launch_packed_wgmma<__half> : launch_packed_wgmma<__nv_bfloat16>;
  if (narrow && p.offsets && p.m >= kPackedWgmma && p.m < kPackedExpand && on_packed(p, false, input, stream)) return y;
  const bool many = p.m >= (p.offsets ? kInt4ExpandOffsets : kInt4Expand) && !int4_is_small(p, int4_device().sms);
  if (narrow && (many || p.k == 0)) {
    if (p.k > 0)
      expand(p, input, bias, y, stream), p.bias = nullptr;
    else
      y = torch::stable::zero_(y);
    if (p.bias || p.residual || p.act != Act::kNone) {
      p.y = y.mutable_data_ptr();
      dispatch_cuda(x.scalar_type(), "int4_linear", [&](auto tag) {
        epilogue_kernel<decltype(tag)><<<ceil_div(p.m * p.n, kThreads), kThreads, 0, stream>>>(p);
      });
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  } else if (narrow) {
    (x.scalar_type() == ScalarType::Half ? launch_int4_mma<__half> : launch_int4_mma<__nv_bfloat16>)(p, stream);
  } else {
    const int64_t blocks = (p.m + kRows - 1) / kRows;
    if (blocks > 65535) fail(op, ": x: got ", p.m, " rows of float32, needs at most ", 65535 * kRows);
    float_kernel<<<dim3(ceil_div(p.n, kInt4Block), unsigned(blocks)), 32 * kWarps, 0, stream>>>(p);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return y;
}

}  // namespace pagedkv

STABLE_TORCH_LIBRARY_IMPL(torch_pagedkv, CUDA, m) {
  PAGEDKV_IMPL(m, int4_repack, pagedkv::int4_repack_cuda);
  PAGEDKV_IMPL(m, int4_dequantize, pagedkv::int4_dequantize_cuda);
  PAGEDKV_IMPL(m, int4_linear, pagedkv::int4_linear_cuda);
}
