// Gated activations and bias + activation (contract: torch_pagedkv/ops/activation.py).
//
// Elementwise over 16-byte vectors that never straddle a row, one a thread: with two, registers cost more in threads
// than they brought in flight (4096 x 14336: 97 us for two, 134 for four, 86 for one). Packed gate and up (the halves
// of one projection) are rows with a stride. The activation is a switch outside the loop over a vector's elements:
// uniform, and one kernel a dtype. bias_act of many rows, which has half of the bytes for the same work: see bias_rows.
//
// Floor: bytes / 4.28 TB/s; silu_and_mul of 4096 x 14336 bf16: 352 MB, 82 us (measured 81.6); bias_act with gelu: 235
// MB, 55 us (58.4; a vector a thread, with the intrinsics' exponential and quotient: 74.6).
#include "activation.cuh"
#include "reduce.cuh"

namespace pagedkv {
namespace {

struct ActParams {
  const void* x;      // rows of T: the gate, or the input of bias_act
  const void* other;  // gated: rows of up; else the bias [N], or null
  RowMap x_rows, other_rows;
  void* y;          // contiguous
  int64_t vectors;  // in all rows
  Divisor row;      // vectors of a row
  Act act;
};

constexpr int kBlock = 256;
constexpr int kRows = 4;                   // of a thread of bias_rows; 2: 59.1 us for 59.1, 8: 62.5
constexpr int64_t kManyVectors = 1 << 19;  // more than are on the device at once: from here on

template <class T, int V, bool gated>
__global__ void __launch_bounds__(kBlock) act_kernel(const __grid_constant__ ActParams p) {
  release_next();
  const int64_t vector = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  const Quotient at = divide(vector, p.row);  // row, vector of the row
  const int64_t column = at.r * V;
  const T* const from = static_cast<const T*>(p.x) + row_offset(p.x_rows, at.q) + column;
  const T* const other = static_cast<const T*>(p.other) + (gated ? row_offset(p.other_rows, at.q) : 0) + column;
  wait_for_previous();
  if (vector >= p.vectors) return;

  const Vec<T, V> a = load_vec<T, V>(from);
  float x[V], b[V] = {};
  if (gated || p.other) to_floats(load_vec<T, V>(other), b);
  to_floats(a, x);
  if constexpr (!gated) {
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] += b[i];
  }
  apply<V, sizeof(T) == 2>(p.act, x);
  if constexpr (gated) {
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] *= b[i];
  }
  store_vec<T, V>(static_cast<T*>(p.y) + vector * V, from_floats<T, V>(x));
}

// bias_act of many rows, a constant distance apart: a thread takes one vector's place in kRows of them, so that the
// bias is converted once and the addresses are worked out once. (Vectors one by one: 34 instructions an element, which
// take longer than the memory.)
template <class T, int V>
__global__ void __launch_bounds__(kBlock) bias_rows(const __grid_constant__ ActParams p) {
  release_next();
  const Quotient at = divide(int64_t(blockIdx.x) * kBlock + threadIdx.x, p.row);  // rows, vector of the row
  const int64_t column = at.r * V, row = at.q * kRows, step = p.row.d * V;
  const T* const from = static_cast<const T*>(p.x) + row * p.x_rows.inner_stride + column;
  const T* const bias = static_cast<const T*>(p.other) + column;
  T* const to = static_cast<T*>(p.y) + row * step + column;
  wait_for_previous();
  const int64_t left = p.x_rows.rows - row;
  if (left <= 0) return;

  Vec<T, V> in[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) in[r] = stream_or_zero<T, V>(from + r * p.x_rows.inner_stride, r < left);
  float b[V] = {};
  if (p.other) to_floats(load_vec<T, V>(bias), b);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float x[V];
    to_floats(in[r], x);
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] += b[i];
    apply<V, sizeof(T) == 2>(p.act, x);
    if (r < left) store_vec<T, V>(to + r * step, from_floats<T, V>(x), true);
  }
}

template <bool gated>
Tensor activation(const char* op, const Tensor& x, const Tensor* other, Act act) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor y = new_like(x);
  if (x.numel() == 0) return y;
  const Rows rows = as_rows(x);
  ActParams p{};
  p.x = rows.tensor.const_data_ptr();
  p.x_rows = rows.map;
  bool aligned = rows.aligned;
  Tensor keep = rows.tensor;  // a contiguous copy of `other` lives until the launch
  if (gated) {
    const Rows up = as_rows(*other);
    keep = up.tensor;
    p.other = keep.const_data_ptr();
    p.other_rows = up.map;
    aligned = aligned && up.aligned;
  } else if (other) {
    p.other = other->const_data_ptr();
    aligned = aligned && is_aligned(p.other);
  }
  p.y = y.mutable_data_ptr();
  p.act = act;
  const int64_t n = x.size(x.dim() - 1);
  const cudaStream_t stream = current_stream(x);
  dispatch_cuda(x.scalar_type(), op, [&](auto tag) {
    using T = decltype(tag);
    auto run = [&](auto width) {
      constexpr int V = decltype(width)::value;
      p.row = n / V;
      p.vectors = p.x_rows.rows * p.row.d;
      launch_kernel(act_kernel<T, V, gated>, ceil_div(p.vectors, kBlock), kBlock, 0, stream, p);
    };
    const bool vectors = aligned && n % kVec<T> == 0;
    if constexpr (!gated) {
      if (vectors && p.x_rows.rows == p.x_rows.inner.d && x.numel() >= kManyVectors * kVec<T>) {
        p.row = n / kVec<T>;
        const int64_t threads = (p.x_rows.rows + kRows - 1) / kRows * p.row.d;
        return launch_kernel(bias_rows<T, kVec<T>>, ceil_div(threads, kBlock), kBlock, 0, stream, p);
      }
    }
    if (vectors)
      run(std::integral_constant<int, kVec<T>>{});
    else
      run(std::integral_constant<int, 1>{});
  });
  return y;
}

}  // namespace

Tensor silu_and_mul_cuda(Tensor gate, Tensor up) {
  check_gated("silu_and_mul", gate, up);
  return activation<true>("silu_and_mul", gate, &up, Act::kSilu);
}

Tensor gelu_and_mul_cuda(Tensor gate, Tensor up, std::string approximate) {
  check_gated("gelu_and_mul", gate, up);
  PAGEDKV_CHECK(approximate == "none" || approximate == "tanh", "gelu_and_mul", "approximate",
                "\"" << approximate << "\"", "\"none\" or \"tanh\"");
  return activation<true>("gelu_and_mul", gate, &up, approximate == "tanh" ? Act::kGeluTanh : Act::kGelu);
}

Tensor bias_act_cuda(Tensor x, OptTensor bias, std::string activation_name) {
  check_bias_act(x, bias);
  const Act act = find_activation("bias_act", activation_name);
  return activation<false>("bias_act", x, bias.has_value() ? &*bias : nullptr, act);
}

}  // namespace pagedkv

STABLE_TORCH_LIBRARY_IMPL(torch_pagedkv, CUDA, m) {
  PAGEDKV_IMPL(m, silu_and_mul, pagedkv::silu_and_mul_cuda);
  PAGEDKV_IMPL(m, gelu_and_mul, pagedkv::gelu_and_mul_cuda);
  PAGEDKV_IMPL(m, bias_act, pagedkv::bias_act_cuda);
}
