// RMSNorm, residual add + RMSNorm, LayerNorm (contract: torch_pagedkv/ops/norm.py).
//
// One pass: a group of threads holds one row in registers (in its own dtype, 16 bytes a load), reduces in float32 and
// writes the result; the weight is loaded before the reduction, so that a single row (decode) waits for memory once.
//     N <= 512     2 .. 32 lanes of a warp a row, 16 elements a lane, 256 threads a block (head norms: many short rows)
//     N <= 1024    one warp a row, 32 elements a lane
//     N <= 16384   one block a row, 16 elements a thread
//     else, or rows that 16-byte loads cannot take: one block a row, a loop that reads the row again from L2
// The shape of the group depends on N alone, so a row's bits do not depend on the batch it is in.
//
// Floor: (read x [+ residual] + write y [+ h]) / 4.28 TB/s; 4096 x 4096 bf16 rms_norm: 67 MB, 15.7 us.
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
  float eps, weight_offset;
  int n;
  void* y;  // contiguous [rows, N]
  void* h;  // kAddRms
};

constexpr int kBlock = 256;

// h = x + residual, rounded to T as the model's own add would
template <class T>
__device__ __forceinline__ T add(T a, T b) {
  return from_float<T>(to_float(a) + to_float(b));
}

// `rest`: the mean of x - mean, which is what rounding left in it: a float32 mean of values 10,000 times as large as
// their deviation is off by 1e-3 of that.
template <class T, Norm kind>
__device__ __forceinline__ T finish(float x, float mean, float rest, float inverse, float weight, float bias,
                                    bool round_first) {
  float y = kind == Norm::kLayer ? (x - mean - rest) * inverse : x * inverse;
  if (kind != Norm::kLayer && round_first) y = to_float(from_float<T>(y));
  y *= weight;
  return from_float<T>(kind == Norm::kLayer ? y + bias : y);
}

// E elements a thread; block (threads a row, rows)
template <class T, int E, Norm kind>
__global__ void __launch_bounds__(E == 16 ? 1024 : kBlock) norm_rows(const NormParams p) {
  constexpr int V = kVec<T>, L = E / V;  // elements of a load, loads of a thread
  __shared__ float scratch[3][32];
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool live = row < p.x_rows.rows;  // the others only take part in the reductions

  Vec<T, V> x[L];
  float weight[E];
  const T* from = static_cast<const T*>(p.x) + (live ? row_offset(p.x_rows, row) : 0);
#pragma unroll
  for (int l = 0; l < L; ++l) {
    const int at = (l * blockDim.x + threadIdx.x) * V;
    if (live && at < p.n) {
      x[l] = load_vec<T, V>(from + at);
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) x[l].v[i] = from_float<T>(0.f);
    }
  }
  if constexpr (kind == Norm::kAddRms) {
    const T* other = static_cast<const T*>(p.residual) + (live ? row_offset(p.residual_rows, row) : 0);
#pragma unroll
    for (int l = 0; l < L; ++l) {
      const int at = (l * blockDim.x + threadIdx.x) * V;
      if (!live || at >= p.n) continue;
      const Vec<T, V> r = load_vec<T, V>(other + at);
#pragma unroll
      for (int i = 0; i < V; ++i) x[l].v[i] = add(x[l].v[i], r.v[i]);
    }
  }
#pragma unroll
  for (int l = 0; l < L; ++l) {
    const int at = (l * blockDim.x + threadIdx.x) * V;
    if (p.weight && at < p.n) {
      load_mixed<T, V>(p.weight, p.weight_float32, at, weight + l * V);
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) weight[l * V + i] = 1.f;
    }
  }

  float sum = 0.f, mean = 0.f, rest = 0.f;
  if constexpr (kind == Norm::kLayer) {
#pragma unroll
    for (int l = 0; l < L; ++l)
#pragma unroll
      for (int i = 0; i < V; ++i) sum += to_float(x[l].v[i]);
    mean = row_reduce(sum, scratch[1], 0.f, Sum{}) / float(p.n);
    sum = 0.f;
  }
#pragma unroll
  for (int l = 0; l < L; ++l) {
    const bool inside = (l * blockDim.x + threadIdx.x) * V < p.n;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float d = inside ? to_float(x[l].v[i]) - mean : 0.f;
      sum += d * d;
      rest += d;
    }
  }
  float variance = row_reduce(sum, scratch[0], 0.f, Sum{}) / float(p.n);
  if constexpr (kind == Norm::kLayer) {
    rest = row_reduce(rest, scratch[2], 0.f, Sum{}) / float(p.n);
    variance = fmaxf(variance - rest * rest, 0.f);
  }
  if (!live) return;
  const float inverse = 1.f / sqrtf(variance + p.eps);

  T* y = static_cast<T*>(p.y) + row * p.n;
  T* h = static_cast<T*>(p.h) + (kind == Norm::kAddRms ? row * p.n : 0);
#pragma unroll
  for (int l = 0; l < L; ++l) {
    const int at = (l * blockDim.x + threadIdx.x) * V;
    if (at >= p.n) continue;
    if constexpr (kind == Norm::kAddRms) store_vec<T, V>(h + at, x[l]);
    float bias[V] = {};
    if (kind == Norm::kLayer && p.bias) load_mixed<T, V>(p.bias, p.bias_float32, at, bias);
    Vec<T, V> out;
#pragma unroll
    for (int i = 0; i < V; ++i)
      out.v[i] = finish<T, kind>(to_float(x[l].v[i]), mean, rest, inverse, weight[l * V + i] + p.weight_offset, bias[i],
                                 p.round_before_weight);
    store_vec<T, V>(y + at, out);
  }
}

// Any N, any alignment: one block a row, one element at a time.
template <class T, Norm kind>
__global__ void __launch_bounds__(kBlock) norm_loop(const NormParams p) {
  __shared__ float scratch[3][32];
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + row_offset(p.x_rows, row);
  T* y = static_cast<T*>(p.y) + row * p.n;

  float sum = 0.f, mean = 0.f, rest = 0.f;
  if constexpr (kind == Norm::kAddRms) {
    // A thread reads back below only what it wrote itself.
    const T* r = static_cast<const T*>(p.residual) + row_offset(p.residual_rows, row);
    T* h = static_cast<T*>(p.h) + row * p.n;
    for (int i = threadIdx.x; i < p.n; i += blockDim.x) h[i] = add(x[i], r[i]);
    x = h;
  }
  if constexpr (kind == Norm::kLayer) {
    for (int i = threadIdx.x; i < p.n; i += blockDim.x) sum += to_float(x[i]);
    mean = row_reduce(sum, scratch[1], 0.f, Sum{}) / float(p.n);
    sum = 0.f;
  }
  for (int i = threadIdx.x; i < p.n; i += blockDim.x) {
    const float d = to_float(x[i]) - mean;
    sum += d * d;
    rest += d;
  }
  float variance = row_reduce(sum, scratch[0], 0.f, Sum{}) / float(p.n);
  if constexpr (kind == Norm::kLayer) {
    rest = row_reduce(rest, scratch[2], 0.f, Sum{}) / float(p.n);
    variance = fmaxf(variance - rest * rest, 0.f);
  }
  const float inverse = 1.f / sqrtf(variance + p.eps);
  for (int i = threadIdx.x; i < p.n; i += blockDim.x) {
    float weight = 1.f, bias = 0.f;
    if (p.weight) load_mixed<T, 1>(p.weight, p.weight_float32, i, &weight);
    if (kind == Norm::kLayer && p.bias) load_mixed<T, 1>(p.bias, p.bias_float32, i, &bias);
    y[i] = finish<T, kind>(to_float(x[i]), mean, rest, inverse, weight + p.weight_offset, bias, p.round_before_weight);
  }
}

template <class T, Norm kind>
void launch(const NormParams& p, bool aligned, cudaStream_t stream) {
  const int64_t rows = p.x_rows.rows;
  constexpr int kShort = 512, kWarp = 1024, kLong = 16 * 1024;
  if (!aligned || p.n % kVec<T> != 0 || p.n > kLong) {
    norm_loop<T, kind><<<unsigned(rows), kBlock, 0, stream>>>(p);
  } else if (p.n <= kShort) {
    unsigned lanes = 1;
    while (lanes * 16 < unsigned(p.n)) lanes *= 2;
    const dim3 block(lanes, kBlock / lanes);
    norm_rows<T, 16, kind><<<ceil_div(rows, block.y), block, 0, stream>>>(p);
  } else if (p.n <= kWarp) {
    const dim3 block(32, kBlock / 32);
    norm_rows<T, 32, kind><<<ceil_div(rows, block.y), block, 0, stream>>>(p);
  } else {
    norm_rows<T, 16, kind><<<unsigned(rows), ceil_div(p.n, 16 * 32) * 32, 0, stream>>>(p);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
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
  p.y = y.mutable_data_ptr();
  p.h = h ? h->mutable_data_ptr() : nullptr;
  const bool aligned = rows.aligned && other.aligned && is_aligned(p.weight) && is_aligned(p.bias);
  const cudaStream_t stream = current_stream(x);
  dispatch_cuda(x.scalar_type(), op, [&](auto tag) { launch<decltype(tag), kind>(p, aligned, stream); });
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
