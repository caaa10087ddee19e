// RMSNorm, residual add + RMSNorm, LayerNorm (contract: torch_pagedkv/ops/norm.py).
//
// One pass: a group of threads holds one row in registers (in its own dtype, 16 bytes a load), reduces in float32 and
// writes the result.
//     N <= 32 loads     1 .. 32 lanes of a warp a row (head norms), two rows a lane where there are many
//     N <= 16384        one block a row: 4 or 8 warps, 1 .. 8 loads a lane (float32: 16)
//     else, or rows that 16-byte loads cannot take: one block a row, a loop that reads the row again from L2
// The shape of the group depends on N alone, so a row's bits do not depend on the batch it is in.
//
// A single row (decode) is all latency: addresses are ready, and weights on their way into L2, while the kernel in
// front still runs; x, residual, weight and bias come in one trip to memory, the sum takes one barrier. Many rows are
// many small blocks, a few for each SM at a time, of which some load while others reduce and write.
//
// Floor: (read x [+ residual] + write y [+ h]) / 4.28 TB/s; 4096 x 4096 bf16 rms_norm: 67 MB, 15.7 us, as a plain copy
// takes. This form on its own, outside of the library and without prefetches: 16.7; here, when every block prefetched:
// 21.8. 1 row: 1.0 us in a CUDA graph (the ring below: 1.8).
// Tried at that size: rows in a ring of asynchronous copies, which blocks that fill the device once go through: 19.3; a
// ring of bulk copies (4 rows of 8 KB ahead, 5 blocks an SM): 17.8, and 20.0 three ahead; the next row in registers:
// 17.5 .. 28; a warp a row: 20.2, all read at the same time, then all compute; 16 warps a row: 27 .. 32.
// layer_norm there is bound by its instructions, some 550 a thread for 16 elements: 20.6 us, where masks by element and
// weights of any kind in one path took 22.3 (with one sum or with two, one after the other), 64 registers for 48 22.1,
// four warps with four loads a lane 23.0.
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
  bool streamed;  // y and h, past what L2 keeps
  void* y;        // contiguous [rows, N]
  void* h;        // kAddRms
};

template <int N>
constexpr std::integral_constant<int, N> int_c{};

constexpr int kBlock = 256;
constexpr int64_t kManyThreads = 1 << 18;  // of short rows: more than are on the device at once

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

// N weights from element i on, or ones
template <class T, int N>
__device__ __forceinline__ void load_weight(const NormParams& p, int i, float* w) {
  if (p.weight) return load_mixed<T, N>(p.weight, p.weight_float32, i, w);
#pragma unroll
  for (int k = 0; k < N; ++k) w[k] = 1.f;
}

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

// sums of a row ------------------------------------------------------------------------------------------------------
//
// A lane adds up each of its vectors in sequence, and these pairwise; then the warps' lanes of one number, and at last
// the 32 lanes, likewise. So every thread has the sum 200 cycles after its own part (a shuffle takes 25, and comes
// once).

// v[0 .. N), pairwise; N is a power of two
template <int N>
__device__ __forceinline__ float halve(float* v) {
#pragma unroll
  for (int s = N / 2; s > 0; s /= 2)
#pragma unroll
    for (int k = 0; k < s; ++k) v[k] += v[k + s];
  return v[0];
}

// The lane's part of a sum: f(so far, value), over the vectors that are inside(vector).
template <int J, class T, int V, class F, class I>
__device__ __forceinline__ float sum_lane(const Vec<T, V> (&x)[J], F f, I inside) {
  float sums[J] = {};
#pragma unroll
  for (int j = 0; j < J; ++j) {
    float v[V];
    to_floats(x[j], v);
#pragma unroll
    for (int i = 0; i < V; ++i) sums[j] = f(sums[j], v[i]);
    if (!inside(j)) sums[j] = 0.f;
  }
  return halve<J>(sums);
}
// K sums over `lanes` lanes
template <int K>
__device__ __forceinline__ void sum_lanes(float (&x)[K], int lanes) {
#pragma unroll
  for (int o = 16; o > 0; o /= 2) {
    if (o >= lanes) continue;
#pragma unroll
    for (int k = 0; k < K; ++k) x[k] += __shfl_xor_sync(kFullWarp, x[k], o);
  }
}
// and over W warps
template <int W, int K>
__device__ __forceinline__ void sum_block(float (&x)[K], float (&scratch)[K][W][32]) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int k = 0; k < K; ++k) scratch[k][warp][lane] = x[k];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < K; ++k) {
    float of[W];
#pragma unroll
    for (int w = 0; w < W; ++w) of[w] = scratch[k][w][lane];
    x[k] = halve<W>(of);
  }
  sum_lanes(x, 32);
}

// Rows of 16 bits are summed once: what is taken for their mean is that of their first vector, and `rest` the rest of
// it. Its square is in the sum of squares, and there may be as many times the variance as there are vectors in a row
// (where the first alone differs from 0): an error of 500 steps of float32.
template <class T, Norm kind>
constexpr bool kGuesses = kind == Norm::kLayer && sizeof(T) == 2;

// A row's moments from a lane's vectors of it, which begin at `first` and every `step` elements. sum_one and sum_two
// make sums of one and of two lane's parts.
template <class T, int J, Norm kind, class S1, class S2>
__device__ __forceinline__ Moments moments(const NormParams& p, const Vec<T, kVec<T>> (&x)[J],
                                           const Vec<T, kVec<T>>& head, int first, int step, S1 sum_one, S2 sum_two) {
  Moments m{};
  const auto all = [](int) { return true; };  // zeros where it is not inside
  if constexpr (kind == Norm::kLayer) {
    if constexpr (kGuesses<T, kind>) {
      float v[kVec<T>];
      to_floats(head, v);
      m.mean = halve<kVec<T>>(v) / float(kVec<T>);
    } else {
      float total[1] = {sum_lane(x, [](float sum, float v) { return sum + v; }, all)};
      sum_one(total);
      m.mean = mean_of<T>(total[0], p);
    }
    const auto inside = [&](int j) { return first + j * step < p.n; };
    float parts[2] = {sum_lane(
                          x, [&](float sum, float v) { return fmaf(v - m.mean, v - m.mean, sum); }, inside),
                      sum_lane(x, [&](float sum, float v) { return sum + (v - m.mean); }, inside)};
    sum_two(parts);
    m.rest = mean_of<T>(parts[1], p);
    m.inverse = inverse_root<T>(fmaxf(mean_of<T>(parts[0], p) - m.rest * m.rest, 0.f) + p.eps);
  } else {
    float total[1] = {sum_lane(x, [](float sum, float v) { return fmaf(v, v, sum); }, all)};
    sum_one(total);
    m.inverse = inverse_root<T>(mean_of<T>(total[0], p) + p.eps);
  }
  return m;
}

// Weight and bias as a lane holds them, one vector. The usual dtype is loaded early, together with x; floats for x of
// 16 bits only when they are needed.
template <class T, Norm kind>
struct Affine {
  static constexpr int V = kVec<T>;
  uint4 weight, bias;  // whole registers: 16-bit elements that two paths lead to take a register each

  static __device__ __forceinline__ const T* early(const void* p, bool is_float32) {
    return is_float32 ? nullptr : static_cast<const T*>(p);
  }
  static __device__ __forceinline__ uint4 load(const T* p, int at, bool inside) {
    return p && inside ? *reinterpret_cast<const uint4*>(p + at) : uint4{0, 0, 0, 0};
  }
  static __device__ __forceinline__ void to_float(const uint4& words, float* out) {
    Vec<T, V> x;
    memcpy(&x, &words, sizeof x);
    to_floats(x, out);
  }
  // at: the vector's first element
  __device__ __forceinline__ void load(const NormParams& p, int at, bool inside) {
    weight = load(early(p.weight, p.weight_float32), at, inside);
    if constexpr (kind == Norm::kLayer) bias = load(early(p.bias, p.bias_float32), at, inside);
  }
  // By one block for all: thousands that ask L2 for the same few lines are in each other's way (see above).
  static __device__ __forceinline__ void prefetch(const NormParams& p, int at) {
    if (const T* const w = early(p.weight, p.weight_float32)) prefetch_l2(w + at);
    if (const T* const b = early(p.bias, p.bias_float32); kind == Norm::kLayer && b) prefetch_l2(b + at);
  }
  // Whether load() has all that apply() needs: one without a branch for each vector.
  static __device__ __forceinline__ bool is_plain(const NormParams& p) {
    return early(p.weight, p.weight_float32) && p.weight_offset == 0.f &&
           (kind != Norm::kLayer || early(p.bias, p.bias_float32));
  }
  __device__ __forceinline__ Vec<T, V> apply_plain(const NormParams& p, const Vec<T, V>& x, const Moments& m) const {
    float w[V], b[V] = {};
    to_float(weight, w);
    if constexpr (kind == Norm::kLayer) to_float(bias, b);
    return finish<T, V, kind>(x, m, w, b, p.round_before_weight);
  }
  __device__ __forceinline__ Vec<T, V> apply(const NormParams& p, const Vec<T, V>& x, const Moments& m, int at) const {
    float w[V], b[V] = {};
    if (early(p.weight, p.weight_float32))
      to_float(weight, w);
    else
      load_weight<T, V>(p, at, w);
#pragma unroll
    for (int i = 0; i < V; ++i) w[i] += p.weight_offset;
    if constexpr (kind == Norm::kLayer) {
      if (early(p.bias, p.bias_float32))
        to_float(bias, b);
      else if (p.bias)
        load_mixed<T, V>(p.bias, p.bias_float32, at, b);
    }
    return finish<T, V, kind>(x, m, w, b, p.round_before_weight);
  }
};

// A block of W warps a row, J vectors a lane.
template <Norm kind, int J>  // that an SM takes: it decides over the bytes in flight
constexpr int kBlocks = J > 4 || J < 2       ? 1
                        : J > 2              ? (kind == Norm::kLayer ? 3 : 4)
                        : kind == Norm::kRms ? 6
                                             : 5;
template <class T, int W, int J, Norm kind>
__global__ void __launch_bounds__(32 * W, W == 8 ? kBlocks<kind, J> : 1)
    norm_row(const __grid_constant__ NormParams p) {
  constexpr int V = kVec<T>, kStep = 32 * W * V;
  constexpr bool kAdds = kind == Norm::kAddRms;
  __shared__ float one[1][W][32], two[kind == Norm::kLayer ? 2 : 1][W][32];
  release_next();
  const int first = int(threadIdx.x) * V;
  const int64_t row = blockIdx.x;
  const T* const from = static_cast<const T*>(p.x) + row_offset(p.x_rows, row) + first;
  const T* const other = kAdds ? static_cast<const T*>(p.residual) + row_offset(p.residual_rows, row) + first : nullptr;
  bool inside[J];
#pragma unroll
  for (int j = 0; j < J; ++j) {
    inside[j] = first + j * kStep < p.n;
    if (blockIdx.x == 0 && inside[j]) Affine<T, kind>::prefetch(p, first + j * kStep);
  }
  wait_for_previous();

  Vec<T, V> x[J], add_to[J], head;
  Affine<T, kind> affine[J];
  if constexpr (kGuesses<T, kind>) head = load_vec<T, V>(from - first);
#pragma unroll
  for (int j = 0; j < J; ++j) {
    x[j] = stream_or_zero<T, V>(from + j * kStep, inside[j]);
    if constexpr (kAdds) add_to[j] = stream_or_zero<T, V>(other + j * kStep, inside[j]);
  }
#pragma unroll
  for (int j = 0; j < J; ++j) affine[j].load(p, first + j * kStep, inside[j]);
  const int64_t to = row * p.n + first;
  if constexpr (kAdds) {
#pragma unroll
    for (int j = 0; j < J; ++j) {
      x[j] = add(x[j], add_to[j]);
      if (inside[j]) store_vec<T, V>(static_cast<T*>(p.h) + to + j * kStep, x[j], p.streamed);
    }
  }
  const Moments m = moments<T, J, kind>(
      p, x, head, first, kStep, [&](float (&v)[1]) { sum_block<W>(v, one); },
      [&](auto& v) {
        if constexpr (kind == Norm::kLayer) sum_block<W>(v, two);
      });
  const auto store = [&](auto apply) {
#pragma unroll
    for (int j = 0; j < J; ++j)
      if (inside[j]) store_vec<T, V>(static_cast<T*>(p.y) + to + j * kStep, apply(j), p.streamed);
  };
  if (Affine<T, kind>::is_plain(p))
    store([&](int j) { return affine[j].apply_plain(p, x[j], m); });
  else
    store([&](int j) { return affine[j].apply(p, x[j], m, first + j * kStep); });
}

// Rows of at most 32 vectors: `lanes` of a warp a row, K rows of it at once.
template <class T, int K, Norm kind>
__global__ void __launch_bounds__(kBlock) norm_short_rows(const __grid_constant__ NormParams p, int lanes) {
  constexpr int V = kVec<T>;
  constexpr bool kAdds = kind == Norm::kAddRms;
  release_next();
  const int lane = int(threadIdx.x) % lanes, first = lane * V;
  const int64_t begin = (int64_t(blockIdx.x) * K * kBlock + threadIdx.x) / lanes;
  const int stride = kBlock / lanes;
  const bool inside = first < p.n;
  if (blockIdx.x == 0 && inside) Affine<T, kind>::prefetch(p, first);
  wait_for_previous();

  Vec<T, V> x[K][1], add_to[K], head[K];
  Affine<T, kind> affine;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int64_t row = begin + k * stride;
    const bool live = inside && row < p.x_rows.rows;
    const T* const from = static_cast<const T*>(p.x) + (live ? row_offset(p.x_rows, row) + first : 0);
    x[k][0] = stream_or_zero<T, V>(from, live);
    if constexpr (kGuesses<T, kind>) head[k] = load_or_zero<T, V>(from - first, live);
    if constexpr (kAdds)
      add_to[k] = stream_or_zero<T, V>(
          static_cast<const T*>(p.residual) + (live ? row_offset(p.residual_rows, row) + first : 0), live);
  }
  affine.load(p, first, inside);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int64_t row = begin + k * stride;
    const bool live = inside && row < p.x_rows.rows;
    if constexpr (kAdds) {
      x[k][0] = add(x[k][0], add_to[k]);
      if (live) store_vec<T, V>(static_cast<T*>(p.h) + row * p.n + first, x[k][0]);
    }
    const Moments m = moments<T, 1, kind>(
        p, x[k], head[k], first, 0, [&](float (&v)[1]) { sum_lanes(v, lanes); }, [&](auto& v) { sum_lanes(v, lanes); });
    if (live) store_vec<T, V>(static_cast<T*>(p.y) + row * p.n + first, affine.apply(p, x[k][0], m, first));
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
void launch(const NormParams& p, bool aligned, cudaStream_t stream) {
  constexpr int V = kVec<T>;
  const int64_t rows = p.x_rows.rows;
  if (!aligned || p.n % V != 0 || p.n > 16 * 1024)
    return launch_kernel(norm_loop<T, kind>, unsigned(rows), kBlock, 0, stream, p);
  const auto block_a_row = [&](auto warps, auto vectors) {
    constexpr int W = decltype(warps)::value;
    launch_kernel(norm_row<T, W, decltype(vectors)::value, kind>, unsigned(rows), 32 * W, 0, stream, p);
  };
  const int columns = int(ceil_div(p.n, 32 * V));  // of 32 vectors
  if (columns <= 1) {
    int lanes = 32;
    while (lanes > 1 && lanes / 2 * V >= p.n) lanes /= 2;
    const auto run = [&](auto at_once) {
      constexpr int K = decltype(at_once)::value;
      const unsigned blocks = ceil_div(rows, K * kBlock / lanes);
      launch_kernel(norm_short_rows<T, K, kind>, blocks, kBlock, 0, stream, p, lanes);
    };
    return rows * lanes > kManyThreads ? run(int_c<2>) : run(int_c<1>);
  }
  if (columns <= 4) return block_a_row(int_c<4>, int_c<1>);
  if (columns <= 8) return block_a_row(int_c<8>, int_c<1>);
  if (columns <= 16) return block_a_row(int_c<8>, int_c<2>);
  if (columns <= 32) return block_a_row(int_c<8>, int_c<4>);
  if (columns <= 64) return block_a_row(int_c<8>, int_c<8>);
  if constexpr (sizeof(T) == 4) block_a_row(int_c<8>, int_c<16>);
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
  p.streamed = is_streamed(y.numel() * int64_t(y.element_size()));
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
