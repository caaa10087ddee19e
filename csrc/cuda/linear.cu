// linear on few rows (contract: torch_pagedkv/ops/linear.py).
//
// Algorithm: a warp computes kColumns columns of y for kRows rows of x. Its lanes stride over K in 16-byte vectors,
// every weight is read once from memory for kRows rows of x (which stay in L1), sums are float32 in registers and
// folded by shuffles at the end. Layout: 4 warps a CTA, neighbours on neighbouring columns; grid (columns, blocks of
// rows). Floor: bytes of the weight / 4.28 TB/s (an H200's copy bandwidth); more than kRows rows read it again, so this
// is for decode, not for prefill.
#include "reduce.cuh"

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
  const dim3 grid(unsigned((p.n + kWarps * kColumns - 1) / (kWarps * kColumns)), unsigned(blocks));
  cudaStream_t stream = current_stream(x);
  dispatch_cuda(x.scalar_type(), "linear", [&](auto tag) {
    using T = decltype(tag);
    constexpr int V = kVec<T>;
    const auto addresses = reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.weight);
    const bool vectors = addresses % kVectorBytes == 0 && p.k % V == 0 && p.weight_stride % V == 0;
    (vectors ? linear_kernel<T, V> : linear_kernel<T, 1>)<<<grid, 32 * kWarps, 0, stream>>>(p);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

}  // namespace pagedkv

STABLE_TORCH_LIBRARY_IMPL(torch_pagedkv, CUDA, m) { PAGEDKV_IMPL(m, linear, pagedkv::linear_cuda); }
