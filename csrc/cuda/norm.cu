// RMSNorm, residual add + RMSNorm, LayerNorm (contract: torch_pagedkv/ops/norm.py).
//
// One pass: a group of threads holds one row in registers (in its own dtype, 16 bytes a load), reduces in float32 and
// writes the result; the weight is loaded before the reduction, so that a single row (decode) waits for memory once.
//     N <= 512     2 .. 32 lanes of a warp a row, 16 elements a lane, 256 threads a block (head norms: many short rows)
//     N <= 1024    one warp a row, 32 elements a lane
//     N <= 16384   one block a row, 16 elements a thread
//     else, or rows that 16-byte loads cannot take: one block a row, a loop that reads the row again from L2
// The shape of the group depends on N alone, so a row's bits do not depend on the batch it is in. The blocks fill the
// device once and go through the rows, whose copies into shared memory run three rows ahead (RowRing): a block a row
// with its loads in registers left memory idle while it reduced, and reached 60 % of the copy bandwidth.
//
// Floor: (read x [+ residual] + write y [+ h]) / 4.28 TB/s; 4096 x 4096 bf16 rms_norm: 67 MB, 15.7 us. Measured: 20.5
// us (an elementwise kernel on as many bytes: 18.8); what is left is instructions: 61 % of the issue slots at 8192
// rows.
#include "reduce.cuh"

namespace pagedkv {
namespace {

enum class Norm { kRms, kAddRms, kLayer };

struct NormParams {
  const void* x;         // rows of T
  const void* residual;  // kAddRms
  RowMap x_rows, residual_rows;
  const void* weight;  // [N] of T or float, or null
  const void* bias;    // kLayer, likewise
  bool weight_float32, bias_float32, round_before_weight;
  float eps, weight_offset, one_nth;
  int n;
  void* y;  // contiguous [rows, N]
  void* h;  // kAddRms
};

constexpr int kBlock = 256;

// h = x + residual, rounded to T as the model's own add would
template <class T, int N>
__device__ __forceinline__ Vec<T, N> add(const Vec<T, N>& a, const Vec<T, N>& b) {
  float x[N], y[N];
  to_floats(a, x), to_floats(b, y);
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] += y[i];
  return from_floats<T, N>(x);
}

// sum / n and 1 / sqrt(x): for results of 16 bits by a product and the hardware's approximation, which is off by two
// steps of float32; the exact ones cost a row 150 cycles.
template <class T>
__device__ __forceinline__ float mean_of(float sum, const NormParams& p) {
  return sizeof(T) == 2 ? sum * p.one_nth : sum / float(p.n);
}
template <class T>
__device__ __forceinline__ float inverse_root(float x) {
  return sizeof(T) == 2 ? rsqrtf(x) : 1.f / sqrtf(x);
}

struct Moments {
  float mean, rest, inverse;  // kLayer: see finish; inverse: of the deviation
};

// x normalised, N at a time. `rest`: the mean of x - mean, which is what rounding left in it: a float32 mean of values
// 10,000 times as large as their deviation is off by 1e-3 of that.
template <class T, int N, Norm kind>
__device__ __forceinline__ Vec<T, N> finish(const Vec<T, N>& x, const Moments& m, const float* weight,
                                            const float* bias, bool round_first) {
  float y[N];
  to_floats(x, y);
#pragma unroll
  for (int i = 0; i < N; ++i) y[i] = (kind == Norm::kLayer ? y[i] - m.mean - m.rest : y[i]) * m.inverse;
  if (kind != Norm::kLayer && round_first) to_floats(from_floats<T, N>(y), y);
#pragma unroll
  for (int i = 0; i < N; ++i) y[i] = kind == Norm::kLayer ? y[i] * weight[i] + bias[i] : y[i] * weight[i];
  return from_floats<T, N>(y);
}

// E elements a thread; block (threads a row, rows of a group); a block goes through `groups` with a stride of the grid.
template <class T, int E, Norm kind>
__global__ void __launch_bounds__(E == 16 ? 1024 : kBlock)
    norm_rows(const __grid_constant__ NormParams p, int groups, int stages) {
  constexpr int V = kVec<T>, L = E / V;  // elements of a load, loads of a thread
  constexpr bool kAdds = kind == Norm::kAddRms;
  __shared__ Scratch<float> scratch[2][3];  // rows take turns: one barrier a reduction suffices
  extern __shared__ __align__(16) uint8_t shared[];
  begin_kernel();
  RowRing ring(shared, kAdds ? 2 * L : L, stages);
  const int first = int(threadIdx.x) * V, step = int(blockDim.x) * V;
  bool inside[L];
#pragma unroll
  for (int l = 0; l < L; ++l) {
    inside[l] = first + l * step < p.n;
    if (!inside[l]) ring.clear(l);
    if (kAdds && !inside[l]) ring.clear(L + l);
  }
  const auto fetch = [&](int group) {
    const int64_t row = int64_t(group) * blockDim.y + threadIdx.y;
    if (group < groups && row < p.x_rows.rows) {  // others only take part in the reductions
      const T* const x = static_cast<const T*>(p.x) + row_offset(p.x_rows, row) + first;
#pragma unroll
      for (int l = 0; l < L; ++l)
        if (inside[l]) ring.copy(l, x + l * step);
      if constexpr (kAdds) {
        const T* const r = static_cast<const T*>(p.residual) + row_offset(p.residual_rows, row) + first;
#pragma unroll
        for (int l = 0; l < L; ++l)
          if (inside[l]) ring.copy(L + l, r + l * step);
      }
    }
    ring.advance();
  };
  for (int i = 0; i < stages; ++i) fetch(int(blockIdx.x + i * gridDim.x));

  float weight[E];
#pragma unroll
  for (int l = 0; l < L; ++l) {
    if (p.weight && inside[l]) {
      load_mixed<T, V>(p.weight, p.weight_float32, first + l * step, weight + l * V);
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) weight[l * V + i] = 1.f;
    }
#pragma unroll
    for (int i = 0; i < V; ++i) weight[l * V + i] += p.weight_offset;
  }

  int turn = 0;
  for (int group = blockIdx.x; group < groups; group += gridDim.x, turn ^= 1) {
    const int64_t row = int64_t(group) * blockDim.y + threadIdx.y;
    ring.ready();
    Vec<T, V> x[L];
#pragma unroll
    for (int l = 0; l < L; ++l) {
      x[l] = ring.piece<T>(l);
      if constexpr (kAdds) x[l] = add(x[l], ring.piece<T>(L + l));
    }

    float sum = 0.f, rest = 0.f;
    Moments m{};
    if constexpr (kind == Norm::kLayer) {
#pragma unroll
      for (int l = 0; l < L; ++l)
#pragma unroll
        for (int i = 0; i < V; ++i) sum += to_float(x[l].v[i]);
      m.mean = mean_of<T>(row_reduce(sum, scratch[turn][1], 0.f, Sum{}), p);
      sum = 0.f;
    }
#pragma unroll
    for (int l = 0; l < L; ++l) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float d = kind != Norm::kLayer || inside[l] ? to_float(x[l].v[i]) - m.mean : 0.f;  // outside x is 0
        sum += d * d;
        rest += d;
      }
    }
    float variance = mean_of<T>(row_reduce(sum, scratch[turn][0], 0.f, Sum{}), p);
    if constexpr (kind == Norm::kLayer) {
      m.rest = mean_of<T>(row_reduce(rest, scratch[turn][2], 0.f, Sum{}), p);
      variance = fmaxf(variance - m.rest * m.rest, 0.f);
    }
    m.inverse = inverse_root<T>(variance + p.eps);
    fetch(group + stages * int(gridDim.x));
    if (row >= p.x_rows.rows) continue;

    const int64_t to = row * p.n + first;
#pragma unroll
    for (int l = 0; l < L; ++l) {
      if (!inside[l]) continue;
      if constexpr (kAdds) store_vec<T, V>(static_cast<T*>(p.h) + to + l * step, x[l]);
      float bias[V] = {};
      if (kind == Norm::kLayer && p.bias) load_mixed<T, V>(p.bias, p.bias_float32, first + l * step, bias);
      const Vec<T, V> out = finish<T, V, kind>(x[l], m, weight + l * V, bias, p.round_before_weight);
      store_vec<T, V>(static_cast<T*>(p.y) + to + l * step, out);
    }
  }
}

// Any N, any alignment: one block a row, one element at a time.
template <class T, Norm kind>
__global__ void __launch_bounds__(kBlock) norm_loop(const __grid_constant__ NormParams p) {
  __shared__ Scratch<float> scratch[3];
  begin_kernel();
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + row_offset(p.x_rows, row);
  T* y = static_cast<T*>(p.y) + row * p.n;

  float sum = 0.f, rest = 0.f;
  Moments m{};
  if constexpr (kind == Norm::kAddRms) {
    // A thread reads back below only what it wrote itself.
    const T* r = static_cast<const T*>(p.residual) + row_offset(p.residual_rows, row);
    T* h = static_cast<T*>(p.h) + row * p.n;
    for (int i = threadIdx.x; i < p.n; i += blockDim.x) h[i] = from_float<T>(to_float(x[i]) + to_float(r[i]));
    x = h;
  }
  if constexpr (kind == Norm::kLayer) {
    for (int i = threadIdx.x; i < p.n; i += blockDim.x) sum += to_float(x[i]);
    m.mean = mean_of<T>(row_reduce(sum, scratch[1], 0.f, Sum{}), p);
    sum = 0.f;
  }
  for (int i = threadIdx.x; i < p.n; i += blockDim.x) {
    const float d = to_float(x[i]) - m.mean;
    sum += d * d;
    rest += d;
  }
  float variance = mean_of<T>(row_reduce(sum, scratch[0], 0.f, Sum{}), p);
  if constexpr (kind == Norm::kLayer) {
    m.rest = mean_of<T>(row_reduce(rest, scratch[2], 0.f, Sum{}), p);
    variance = fmaxf(variance - m.rest * m.rest, 0.f);
  }
  m.inverse = inverse_root<T>(variance + p.eps);
  for (int i = threadIdx.x; i < p.n; i += blockDim.x) {
    float weight = 1.f, bias = 0.f;
    if (p.weight) load_mixed<T, 1>(p.weight, p.weight_float32, i, &weight);
    if (kind == Norm::kLayer && p.bias) load_mixed<T, 1>(p.bias, p.bias_float32, i, &bias);
    weight += p.weight_offset;
    y[i] = finish<T, 1, kind>(load_vec<T, 1>(x + i), m, &weight, &bias, p.round_before_weight).v[0];
  }
}

template <class T, Norm kind>
void launch(const NormParams& p, bool aligned, int device, cudaStream_t stream) {
  const int64_t rows = p.x_rows.rows;
  constexpr int kShort = 512, kWarp = 1024, kLong = 16 * 1024;
  if (aligned && p.n % kVec<T> == 0 && p.n <= kLong) {
    unsigned lanes = 1;  // of a short row
    while (lanes * 16 < unsigned(p.n)) lanes *= 2;
    const bool is_warp = p.n > kShort && p.n <= kWarp;
    const dim3 block = is_warp         ? dim3(32, kBlock / 32)
                       : p.n <= kShort ? dim3(lanes, kBlock / lanes)
                                       : dim3(ceil_div(p.n, 16 * 32) * 32);
    const auto kernel = is_warp ? norm_rows<T, 32, kind> : norm_rows<T, 16, kind>;
    const int threads = int(block.x * block.y);
    const int groups = int(ceil_div(rows, block.y));
    const int64_t bytes = int64_t(threads) * (is_warp ? 32 : 16) * sizeof(T) * (kind == Norm::kAddRms ? 2 : 1);
    const RingShape shape = ring_shape(kernel, groups, threads, bytes, device);
    if (shape.stages > 0)
      return launch_kernel(kernel, shape.blocks, block, shape.shared, stream, p, groups, shape.stages);
  }
  launch_kernel(norm_loop<T, kind>, unsigned(rows), kBlock, 0, stream, p);
}

template <Norm kind>
void norm(const char* op, const Tensor& x, const Tensor* residual, const OptTensor& weight, const OptTensor& bias,
          double eps, double weight_offset, bool round_before_weight, Tensor& y, Tensor* h) {
  if (x.numel() == 0) return;
  PAGEDKV_CHECK(x.size(x.dim() - 1) < INT32_MAX, op, "x", "shape " << shape_of(x), "a last dimension below 2^31");
  const Rows rows = as_rows(x), other = residual ? as_rows(*residual) : rows;
  NormParams p{};
  p.x = rows.tensor.const_data_ptr();
  p.residual = other.tensor.const_data_ptr();
  p.x_rows = rows.map;
  p.residual_rows = other.map;
  p.weight = weight.has_value() ? weight->const_data_ptr() : nullptr;
  p.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
  p.weight_float32 = weight.has_value() && weight->scalar_type() == ScalarType::Float;
  p.bias_float32 = bias.has_value() && bias->scalar_type() == ScalarType::Float;
  p.round_before_weight = round_before_weight;
  p.eps = float(eps);
  p.weight_offset = p.weight ? float(weight_offset) : 0.f;  // without a weight there is nothing to offset
  p.n = int(x.size(x.dim() - 1));
  p.one_nth = 1.f / float(p.n);
  p.y = y.mutable_data_ptr();
  p.h = h ? h->mutable_data_ptr() : nullptr;
  const bool aligned = rows.aligned && other.aligned && is_aligned(p.weight) && is_aligned(p.bias);
  const cudaStream_t stream = current_stream(x);
  dispatch_cuda(x.scalar_type(), op,
                [&](auto tag) { launch<decltype(tag), kind>(p, aligned, x.get_device_index(), stream); });
}

}  // namespace

Tensor rms_norm_cuda(Tensor x, OptTensor weight, double eps, double weight_offset, bool round_before_weight) {
  check_norm("rms_norm", x, weight, std::nullopt, eps);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor y = new_like(x);
  norm<Norm::kRms>("rms_norm", x, nullptr, weight, std::nullopt, eps, weight_offset, round_before_weight, y, nullptr);
  return y;
}

Pair add_rms_norm_cuda(Tensor x, Tensor residual, OptTensor weight, double eps, double weight_offset,
                       bool round_before_weight) {
  check_norm("add_rms_norm", x, weight, std::nullopt, eps);
  check_same("add_rms_norm", "residual", residual, "x", x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor y = new_like(x), h = new_like(x);
  norm<Norm::kAddRms>("add_rms_norm", x, &residual, weight, std::nullopt, eps, weight_offset, round_before_weight, y,
                      &h);
  return {y, h};
}

Tensor layer_norm_cuda(Tensor x, OptTensor weight, OptTensor bias, double eps) {
  check_norm("layer_norm", x, weight, bias, eps);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor y = new_like(x);
  norm<Norm::kLayer>("layer_norm", x, nullptr, weight, bias, eps, 0.0, false, y, nullptr);
  return y;
}

}  // namespace pagedkv

STABLE_TORCH_LIBRARY_IMPL(torch_pagedkv, CUDA, m) {
  PAGEDKV_IMPL(m, rms_norm, pagedkv::rms_norm_cuda);
  PAGEDKV_IMPL(m, add_rms_norm, pagedkv::add_rms_norm_cuda);
  PAGEDKV_IMPL(m, layer_norm, pagedkv::layer_norm_cuda);
}
