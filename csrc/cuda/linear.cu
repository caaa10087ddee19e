// linear and scaled_linear on few rows (contracts: torch_pagedkv/ops/linear.py, torch_pagedkv/ops/quantize.py).
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
// scaled_linear, 1 (8) rows: int8 6.7 (7.2) for 4096x4096, 32.2 (33.1) for 28672x4096, 17.8 (18.5) for 4096x14336;
// float8 6.9 (7.6), 31.3 (32.9), 18.5 (20.0). torch's products with quantize_per_token and dequantize_sums at 1 row:
// int8 16.6, 39.2, 42.9, float8 10.0, 32.9, 23.0; with scaled_linear instead of them 9.6, 34.5, 24.0
// and 8.9, 33.2, 21.9.
//
// A layer of Llama-3-8B at 1 row in a graph, two norms, SwiGLU, four quantize_per_token and four scaled_linear, int8
// (float8): 78.5 us (77.5) with launches one behind the other, 73.9 (69.6) since they overlap. The next kernel may
// start once the loop is done; from the beginning, blocks of a large product take the room of the small kernels before
// it (76.9 to 81.8 (73.5), and 1.25 ms a token for 1.06 with 8 such layers).
//
// Tried: the first 2 slices of each warp into L2 under the kernel in front, a line a lane (82 to 93 us a layer); rows
// by cp.async.bulk.prefetch.L2, 1 KiB of each for 660 blocks (73.9 (67.7)), more of them or for more blocks (75 to 80).
// Loads without the hint that L2 fetch 128 bytes (63.7 us for 28672x4096, 277 for 128256x4096; __ldcs the same),
// with one of 256 (57.9, 248); no slice loaded ahead (57.9, and 34.9 for 4096x14336); 4 warps (36.6 for 4096x14336), 2
// or 4 slices of a warp at a time (no better); 16 warps for a short K (59.5 for 28672x4096), 8 for a long one (30.9 for
// 4096x14336). The form for float32, for 16-bit types: 17.0, 14.6, 64.5, 40.7 and 258 at 1 row, 70 to 696 at 8.
#include "quantize.cuh"
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
  const float *row_scale, *column_scale;  // [rows], [n]; of 8-bit elements
};

// Elements E of x and W: sums of their products, and outputs T of these.
template <class E>
using Sum8 = std::conditional_t<std::is_same_v<E, int8_t>, int, float>;

template <class E, class T>
__device__ __forceinline__ void finish(const LinearParams& p, int64_t row, int64_t column, Sum8<E> sum) {
  float total = float(sum);
  if constexpr (kQuantized<E>)  // dequantize_sums' bits
    total = __fmul_rn(__fmul_rn(total, p.row_scale[row]), p.column_scale[column]);
  if (p.bias) total += to_float(static_cast<const T*>(p.bias)[column]);
  static_cast<T*>(p.y)[row * p.n + column] = from_float<T>(total);
}

constexpr int kTile = 16;  // outputs of a CTA

// 16 bytes of what is read once: L2 fetches 128 at a time, L1 keeps nothing.
__device__ __forceinline__ uint4 load_stream(const uint4* p) {
  uint4 r;
  asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "l"(p));
  return r;
}

__device__ __forceinline__ uint2 to_halves(uint32_t bytes) {
  const __half2_raw low = __nv_cvt_fp8x2_to_halfraw2(__nv_fp8x2_storage_t(bytes & 0xffff), __NV_E4M3);
  const __half2_raw high = __nv_cvt_fp8x2_to_halfraw2(__nv_fp8x2_storage_t(bytes >> 16), __NV_E4M3);
  return {low.x | uint32_t(low.y) << 16, high.x | uint32_t(high.y) << 16};
}

// sum += the products of 16 bytes a lane: of rows g and g + 8 of W, and of row g of x. Which inputs these are does not
// matter, as long as they are the same. float8 numbers are multiplied as halves, exactly.
template <class E>
__device__ __forceinline__ void multiply_add(Sum8<E> (&sum)[4], const uint4& low, const uint4& high, const uint4& x) {
  if constexpr (std::is_same_v<E, int8_t>) {
    mma_16832(sum, {low.x, high.x, low.y, high.y}, x.x, x.y);
    mma_16832(sum, {low.z, high.z, low.w, high.w}, x.z, x.w);
  } else if constexpr (kQuantized<E>) {
    const uint32_t words[4][3] = {
        {low.x, high.x, x.x}, {low.y, high.y, x.y}, {low.z, high.z, x.z}, {low.w, high.w, x.w}};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint2 lo = to_halves(words[i][0]), hi = to_halves(words[i][1]), in = to_halves(words[i][2]);
      mma_16816<__half>(sum, {lo.x, hi.x, lo.y, hi.y}, in.x, in.y);
    }
  } else {
    mma_16816<E>(sum, {low.x, high.x, low.y, high.y}, x.x, x.y);
    mma_16816<E>(sum, {low.z, high.z, low.w, high.w}, x.z, x.w);
  }
}

// Types of 8 and 16 bits; rows of x and W are whole chunks of 16 bytes, and aligned to that.
template <class E, class T, int kSplit>
__global__ void __launch_bounds__(32 * kSplit) linear_mma_kernel(const __grid_constant__ LinearParams p) {
  constexpr int kChunkInputs = 16 / sizeof(E);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int64_t column = int64_t(blockIdx.x) * kTile, row = int64_t(blockIdx.y) * kRows;
  const int rows = int(min(int64_t(kRows), p.rows - row)), columns = int(min(int64_t(kTile), p.n - column));
  const int chunks = int(p.k / kChunkInputs);  // in a row
  // what lies beyond the last row or column is computed from it and not written
  const auto* w = static_cast<const uint4*>(p.weight) + t;
  wait_for_previous();
  const uint4* low = w + (column + min(g, columns - 1)) * (p.weight_stride / kChunkInputs);
  const uint4* high = w + (column + min(g + 8, columns - 1)) * (p.weight_stride / kChunkInputs);
  const uint4* x = static_cast<const uint4*>(p.x) + (row + g) * chunks + t;
  const bool has_row = g < rows;

  const uint4 zero = {0, 0, 0, 0};
  Sum8<E> sum[4] = {};
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
    for (int half = 0; half < 2; ++half) b[half] = at + 4 * half + t < chunks && has_row ? x[at + 4 * half] : zero;
#pragma unroll
    for (int half = 0; half < 2; ++half) multiply_add<E>(sum, a[half][0], a[half][1], b[half]);
    load(at + kSplit * 8);
  }
  release_next();

  __shared__ Sum8<E> parts[kSplit][kRows][kTile];
#pragma unroll
  for (int i = 0; i < 4; ++i) parts[warp][2 * t + i % 2][g + i / 2 * 8] = sum[i];
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * kTile; i += 32 * kSplit) {
    const int r = i / kTile, c = i % kTile;
    if (r >= rows || c >= columns) continue;
    Sum8<E> total = 0;
#pragma unroll
    for (int part = 0; part < kSplit; ++part) total += parts[part][r][c];
    finish<E, T>(p, row + r, column + c, total);
  }
}

template <class E, class T, int V>
__global__ void __launch_bounds__(32 * kWarps) linear_kernel(const __grid_constant__ LinearParams p) {
  begin_kernel();
  const int lane = threadIdx.x & 31;
  const int64_t column = (int64_t(blockIdx.x) * kWarps + threadIdx.x / 32) * kColumns;
  const int64_t row = int64_t(blockIdx.y) * kRows;
  if (column >= p.n) return;
  const int columns = int(min(int64_t(kColumns), p.n - column)), rows = int(min(int64_t(kRows), p.rows - row));
  const E* x = static_cast<const E*>(p.x) + row * p.k;
  const E* w = static_cast<const E*>(p.weight) + column * p.weight_stride;

  Sum8<E> sum[kColumns][kRows] = {};
  for (int64_t i = int64_t(lane) * V; i < p.k; i += 32 * V) {
    Vec<E, V> weights[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      if (c < columns) weights[c] = load_vec<E, V>(w + c * p.weight_stride + i);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) break;
      const Vec<E, V> in = load_vec<E, V>(x + r * p.k + i);
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        if (c < columns)
#pragma unroll
          for (int v = 0; v < V; ++v) {
            if constexpr (std::is_same_v<E, int8_t>)
              sum[c][r] += int(weights[c].v[v]) * int(in.v[v]);
            else
              sum[c][r] = fmaf(to_float(weights[c].v[v]), to_float(in.v[v]), sum[c][r]);
          }
    }
  }
#pragma unroll
  for (int c = 0; c < kColumns; ++c)
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const Sum8<E> total = group_reduce(sum[c][r], 32, Sum{});
      if (lane == r && c < columns && r < rows) finish<E, T>(p, row + r, column + c, total);
    }
}

// The products of elements E with outputs T.
template <class E, class T>
void launch(const LinearParams& p, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(E);
  const int64_t blocks = (p.rows + kRows - 1) / kRows;
  const auto grid = [&](int columns) { return dim3(unsigned((p.n + columns - 1) / columns), unsigned(blocks)); };
  const auto addresses = reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.weight);
  const bool vectors = addresses % 16 == 0 && p.k % V == 0 && p.weight_stride % V == 0;
  if constexpr (!std::is_same_v<E, float>) {
    if (vectors && p.k > 0) {
      // a warp of many has few slices of a short row
      if (p.k * int64_t(sizeof(E)) < 16384)
        launch_kernel(linear_mma_kernel<E, T, 8>, grid(kTile), 32 * 8, 0, stream, p);
      else
        launch_kernel(linear_mma_kernel<E, T, 16>, grid(kTile), 32 * 16, 0, stream, p);
      return;
    }
  }
  // vectors of 8 bits at odd sizes only: one element at a time
  constexpr int kVector = kQuantized<E> ? 1 : V;
  launch_kernel(vectors ? linear_kernel<E, T, kVector> : linear_kernel<E, T, 1>, grid(kWarps * kColumns), 32 * kWarps,
                0, stream, p);
}

// What both ops have: a result [..., n] of that dtype, and the parameters of contiguous tensors.
Tensor prepare(const char* op, const char* instead, const Tensor& x, const Tensor& weight, const OptTensor& bias,
               ScalarType dtype, LinearParams& p) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = weight.size(0);
  Tensor y = torch::stable::new_empty(x, sizes, dtype);
  p.x = x.const_data_ptr(), p.weight = weight.const_data_ptr(), p.y = y.mutable_data_ptr();
  p.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
  p.n = weight.size(0), p.k = weight.size(1);
  p.weight_stride = p.n > 1 ? weight.stride(0) : p.k;
  p.rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) p.rows *= x.size(i);
  if (p.rows > 65535 * kRows) fail(op, ": got ", p.rows, " rows, needs at most ", 65535 * kRows, ": use ", instead);
  return y;
}

}  // namespace

Tensor linear_cuda(Tensor x, Tensor weight, OptTensor bias) {
  check_linear(x, weight, bias);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor input = x.is_contiguous() ? x : torch::stable::contiguous(x);
  LinearParams p{};
  const Tensor y = prepare("linear", "F.linear", input, weight, bias, x.scalar_type(), p);
  if (p.rows == 0 || p.n == 0) return y;
  dispatch_cuda(x.scalar_type(), "linear", [&](auto tag) {
    using T = decltype(tag);
    launch<T, T>(p, current_stream(x));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

Tensor scaled_linear_cuda(Tensor x, Tensor row_scale, Tensor weight, Tensor column_scale, OptTensor bias,
                          ScalarType dtype) {
  check_scaled_linear(x, row_scale, weight, column_scale, bias, dtype);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  LinearParams p{};
  const Tensor y = prepare("scaled_linear", "a product of many rows", x, weight, bias, dtype, p);
  p.row_scale = row_scale.const_data_ptr<float>(), p.column_scale = column_scale.const_data_ptr<float>();
  if (p.rows == 0 || p.n == 0) return y;
  dispatch_cuda(dtype, "scaled_linear", [&](auto tag) {
    using T = decltype(tag);
    (x.scalar_type() == ScalarType::Char ? launch<int8_t, T> : launch<__nv_fp8_e4m3, T>)(p, current_stream(x));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

}  // namespace pagedkv

STABLE_TORCH_LIBRARY_IMPL(torch_pagedkv, CUDA, m) {
  PAGEDKV_IMPL(m, linear, pagedkv::linear_cuda);
  PAGEDKV_IMPL(m, scaled_linear, pagedkv::scaled_linear_cuda);
}
