// linear on few rows (contract: torch_pagedkv/ops/linear.py).
//
// 16-bit types on tensor cores (mma.sync m16n8k16, float32 sums): y^T = W x^T, so that 16 outputs are the rows of a
// product and up to 8 rows of x its columns; 1 row costs what 8 do. Where inputs lie in a sum is free, so a lane takes
// 8 neighbouring ones of its outputs and of its row of x, which is both operands of two mma: all of W goes from memory
// to registers in loads of 16 bytes, without shared memory. A CTA has 16 outputs. Its warps take turns at slices of 64
// inputs (128 bytes of each row of W, together 1 or 2 KiB), and are added up in order at the end: equal bits on every
// run. More than 8 rows read W again: this is for decoding, not for prefill.
//
// float32, and tensors at odd addresses: a warp computes kColumns columns of y for kRows rows of x, its lanes stride
// over K, sums are float32 in registers and folded by shuffles.
//
// Floor: bytes of the weight / 4.28 TB/s (an H200's copy bandwidth). Measured there, bfloat16, in us, rotated weights
// in a CUDA graph (cuBLAS beside it):
//
//     N x K       6144x4096    4096x4096    28672x4096   4096x14336   128256x4096
//     floor       11.8          7.8         54.9         27.4         245.4
//     1 row       15.1 (16.3)  11.5 (13.4)  56.5 (61.8)  29.8 (32.0)  238.1 (249.3)
//     8 rows      15.2 (15.7)  11.8 (13.2)  58.5 (61.6)  30.6 (32.6)  242.1 (250.5)
//
// In a model of Llama-3-8B's shape a layer's four take 112.1 us at 1 row, cuBLAS's with their two reductions 114.4; at
// 8 rows cuBLAS is 1 % faster there.
//
// Tried: loads without the hint that L2 fetch 128 bytes (63.7 us for 28672x4096, 277 for 128256x4096; __ldcs the same),
// with one of 256 (57.9, 248); no slice loaded ahead (57.9, and 34.9 for 4096x14336); 4 warps (36.6 for 4096x14336), 2
// or 4 slices of a warp at a time (no better); 16 warps for a short K (59.5 for 28672x4096), 8 for a long one (30.9 for
// 4096x14336). The form for float32, for 16-bit types: 17.0, 14.6, 64.5, 40.7 and 258 at 1 row, 70 to 696 at 8.
#include "reduce.cuh"
#include "tensor_core.cuh"

namespace pagedkv {
namespace {

constexpr int kWarps = 4, kColumns = 2, kRows = 8;

struct LinearParams {
  const void* x;       // [rows, k] contiguous
  const void* weight;  // [n, k], rows weight_stride elements apart
  const void* bias;    // [n] or null
  void* y;             // [rows, n]
  int64_t weight_stride, rows, n, k;
};

constexpr int kTile = 16;  // outputs of a CTA

// 16 bytes of what is read once: L2 fetches 128 at a time, L1 keeps nothing.
__device__ __forceinline__ uint4 load_stream(const uint4* p) {
  uint4 r;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "l"(p));
  return r;
}

// 16-bit types; k and weight_stride are multiples of 8, x and weight aligned to 16 bytes.
template <class T, int kSplit>
__global__ void __launch_bounds__(32 * kSplit) linear_mma_kernel(const LinearParams p) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int64_t column = int64_t(blockIdx.x) * kTile, row = int64_t(blockIdx.y) * kRows;
  const int rows = int(min(int64_t(kRows), p.rows - row)), columns = int(min(int64_t(kTile), p.n - column));
  const int chunks = int(p.k / 8);  // of 8 inputs, in a row
  // what lies beyond the last row or column is computed from it and not written
  const auto* w = static_cast<const uint4*>(p.weight) + t;
  const uint4* low = w + (column + min(g, columns - 1)) * (p.weight_stride / 8);
  const uint4* high = w + (column + min(g + 8, columns - 1)) * (p.weight_stride / 8);
  const uint4* x = static_cast<const uint4*>(p.x) + (row + g) * chunks + t;
  const bool has_row = g < rows;

  const uint4 zero = {0, 0, 0, 0};
  float sum[4] = {};
  uint4 a[2][2];
  const auto load = [&](int at) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int c = at + 4 * half;
      a[half][0] = c + t < chunks ? load_stream(low + c) : zero;
      a[half][1] = c + t < chunks ? load_stream(high + c) : zero;
    }
  };
  load(warp * 8);
  for (int at = warp * 8; at < chunks; at += kSplit * 8) {
    uint4 b[2];
#pragma unroll
    for (int half = 0; half < 2; ++half)
      b[half] = at + 4 * half + t < chunks && has_row ? __ldg(x + at + 4 * half) : zero;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 &lo = a[half][0], &hi = a[half][1];
      mma_16816<T>(sum, {lo.x, hi.x, lo.y, hi.y}, b[half].x, b[half].y);
      mma_16816<T>(sum, {lo.z, hi.z, lo.w, hi.w}, b[half].z, b[half].w);
    }
    load(at + kSplit * 8);
  }

  __shared__ float parts[kSplit][kRows][kTile];
#pragma unroll
  for (int i = 0; i < 4; ++i) parts[warp][2 * t + i % 2][g + i / 2 * 8] = sum[i];
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * kTile; i += 32 * kSplit) {
    const int r = i / kTile, c = i % kTile;
    if (r >= rows || c >= columns) continue;
    float total = 0;
#pragma unroll
    for (int part = 0; part < kSplit; ++part) total += parts[part][r][c];
    if (p.bias) total += to_float(static_cast<const T*>(p.bias)[column + c]);
    static_cast<T*>(p.y)[(row + r) * p.n + column + c] = from_float<T>(total);
  }
}

template <class T, int V>
__global__ void __launch_bounds__(32 * kWarps) linear_kernel(const LinearParams p) {
  const int lane = threadIdx.x & 31;
  const int64_t column = (int64_t(blockIdx.x) * kWarps + threadIdx.x / 32) * kColumns;
  const int64_t row = int64_t(blockIdx.y) * kRows;
  if (column >= p.n) return;
  const int columns = int(min(int64_t(kColumns), p.n - column)), rows = int(min(int64_t(kRows), p.rows - row));
  const T* x = static_cast<const T*>(p.x) + row * p.k;
  const T* w = static_cast<const T*>(p.weight) + column * p.weight_stride;

  float sum[kColumns][kRows] = {};
  for (int64_t i = int64_t(lane) * V; i < p.k; i += 32 * V) {
    Vec<T, V> weights[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      if (c < columns) weights[c] = load_vec<T, V>(w + c * p.weight_stride + i);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) break;
      const Vec<T, V> in = load_vec<T, V>(x + r * p.k + i);
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        if (c < columns)
#pragma unroll
          for (int v = 0; v < V; ++v) sum[c][r] = fmaf(to_float(weights[c].v[v]), to_float(in.v[v]), sum[c][r]);
    }
  }
#pragma unroll
  for (int c = 0; c < kColumns; ++c)
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float total = group_reduce(sum[c][r], 32, Sum{});
      if (lane == r && c < columns && r < rows) {
        if (p.bias) total += to_float(static_cast<const T*>(p.bias)[column + c]);
        static_cast<T*>(p.y)[(row + r) * p.n + column + c] = from_float<T>(total);
      }
    }
}

}  // namespace

Tensor linear_cuda(Tensor x, Tensor weight, OptTensor bias) {
  check_linear(x, weight, bias);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor input = x.is_contiguous() ? x : torch::stable::contiguous(x);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = weight.size(0);
  Tensor y = torch::stable::new_empty(x, sizes);
  LinearParams p{};
  p.x = input.const_data_ptr(), p.weight = weight.const_data_ptr(), p.y = y.mutable_data_ptr();
  p.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
  p.n = weight.size(0), p.k = weight.size(1);
  p.weight_stride = p.n > 1 ? weight.stride(0) : p.k;
  p.rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) p.rows *= x.size(i);
  if (p.rows == 0 || p.n == 0) return y;
  const int64_t blocks = (p.rows + kRows - 1) / kRows;
  if (blocks > 65535) fail("linear: got ", p.rows, " rows, needs at most ", 65535 * kRows, ": use F.linear");
  const auto grid = [&](int columns) { return dim3(unsigned((p.n + columns - 1) / columns), unsigned(blocks)); };
  cudaStream_t stream = current_stream(x);
  dispatch_cuda(x.scalar_type(), "linear", [&](auto tag) {
    using T = decltype(tag);
    constexpr int V = kVec<T>;
    const auto addresses = reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.weight);
    const bool vectors = addresses % kVectorBytes == 0 && p.k % V == 0 && p.weight_stride % V == 0;
    if constexpr (!std::is_same_v<T, float>) {
      if (vectors && p.k > 0) {
        // a warp of many has few slices of a short row
        if (p.k < 8192)
          linear_mma_kernel<T, 8><<<grid(kTile), 32 * 8, 0, stream>>>(p);
        else
          linear_mma_kernel<T, 16><<<grid(kTile), 32 * 16, 0, stream>>>(p);
        return;
      }
    }
    (vectors ? linear_kernel<T, V> : linear_kernel<T, 1>)<<<grid(kWarps * kColumns), 32 * kWarps, 0, stream>>>(p);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

}  // namespace pagedkv

STABLE_TORCH_LIBRARY_IMPL(torch_pagedkv, CUDA, m) { PAGEDKV_IMPL(m, linear, pagedkv::linear_cuda); }
