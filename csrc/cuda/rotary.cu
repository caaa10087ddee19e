// Rotary position embedding, in place or fused with the cache write (contract: torch_pagedkv/ops/rotary.py).
//
// rotary_embedding: a thread holds the two vectors of a few pairs (x1 | x2), or one vector of interleaved pairs; q and
// k heads share the grid. rotary_and_cache: a group of lanes holds one row of q, k or v, eight elements a lane; a lane
// loads its partner's eight as well (from L1) and computes only its own, so the row ends up in the layout in which the
// cache is written and quantised. All loads of a warp come before its stores, because q is rotated in place.
// Both round through the same two functions, so the fused op stores the bits of the two ops in turn.
//
// Floor: (read and write q, k [, read v, write the cache] + cos, sin) / 4.28 TB/s.
#include "quantize.cuh"

namespace pagedkv {
namespace {

constexpr int kBlock = 256;

// Spelled out, so that the compiler contracts them the same way wherever they are used.
__device__ __forceinline__ float rotate_first(float x1, float x2, float c, float s) {
  return __fmaf_rn(x1, c, -__fmul_rn(x2, s));
}
__device__ __forceinline__ float rotate_second(float x1, float x2, float c, float s) {
  return __fmaf_rn(x2, c, __fmul_rn(x1, s));
}

struct Angles {
  const void* cos;  // [T, half] of the query's dtype or float
  const void* sin;
  int64_t cos_stride, sin_stride;
  bool float32, interleaved;
  int half;
};
// N angles of token t from index i on
template <class T, int N>
__device__ __forceinline__ void load_angles(const Angles& a, int64_t t, int i, float* c, float* s) {
  load_mixed<T, N>(a.cos, a.float32, t * a.cos_stride + i, c);
  load_mixed<T, N>(a.sin, a.float32, t * a.sin_stride + i, s);
}

struct Heads {
  void* data;  // [T, heads, D], unit stride in D
  int64_t stride_token, stride_head;
  int heads;
};

// rotary_embedding ---------------------------------------------------------------------------------------------------

struct RotaryParams {
  Heads q, k;  // k.heads = 0: none
  Angles angles;
  int64_t items;  // tokens * (q.heads + k.heads) * items_per_head
  int items_per_head;
};

// V pairs an item (interleaved: V / 2 pairs, a vector of V elements; V = 1 is the scalar path, one pair an item)
template <class T, int V, bool interleaved>
__global__ void __launch_bounds__(kBlock) rotary_kernel(const RotaryParams p) {
  const int64_t item = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (item >= p.items) return;
  const Quotient row = divide(item, p.items_per_head);
  const Quotient token = divide(row.q, p.q.heads + p.k.heads);
  const bool is_key = token.r >= p.q.heads;
  const Heads& h = is_key ? p.k : p.q;
  T* x = static_cast<T*>(h.data) + token.q * h.stride_token + (token.r - (is_key ? p.q.heads : 0)) * h.stride_head;

  if constexpr (interleaved) {
    constexpr int N = V == 1 ? 1 : V / 2;  // pairs
    const int pair = int(row.r) * N;
    Vec<T, 2 * N> v = load_any<(V > 1), T, 2 * N>(x + 2 * pair);
    float c[N], s[N];
    load_angles<T, N>(p.angles, token.q, pair, c, s);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float x1 = to_float(v.v[2 * i]), x2 = to_float(v.v[2 * i + 1]);
      v.v[2 * i] = from_float<T>(rotate_first(x1, x2, c[i], s[i]));
      v.v[2 * i + 1] = from_float<T>(rotate_second(x1, x2, c[i], s[i]));
    }
    store_any<(V > 1), T, 2 * N>(x + 2 * pair, v);
  } else {
    const int pair = int(row.r) * V;
    Vec<T, V> a = load_vec<T, V>(x + pair), b = load_vec<T, V>(x + pair + p.angles.half);
    float c[V], s[V];
    load_angles<T, V>(p.angles, token.q, pair, c, s);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float x1 = to_float(a.v[i]), x2 = to_float(b.v[i]);
      a.v[i] = from_float<T>(rotate_first(x1, x2, c[i], s[i]));
      b.v[i] = from_float<T>(rotate_second(x1, x2, c[i], s[i]));
    }
    store_vec<T, V>(x + pair, a);
    store_vec<T, V>(x + pair + p.angles.half, b);
  }
}

// rotary_and_cache ---------------------------------------------------------------------------------------------------

struct RotaryCacheParams {
  Heads q, k, v;  // k and v are only read
  Angles angles;
  CacheView key_cache, value_cache;
  CacheShape shape;
  const int64_t* slots;  // [T]
  int64_t rows;          // tokens * (q.heads + k.heads + v.heads)
  int chunks;            // of 8 elements in a row
};

// Elements [lane * 8, lane * 8 + 8) of a row, rotated and rounded to T.
template <class T, bool Aligned>
__device__ __forceinline__ Vec<T, kChunk> rotate_chunk(const T* x, const Angles& a, int64_t t, int lane) {
  const int at = lane * kChunk, half = a.half;
  Vec<T, kChunk> own = load_any<Aligned, T, kChunk>(x + at);
  if (at >= 2 * half) return own;
  if constexpr (Aligned) {
    // half (interleaved: 2 * half) is a multiple of 8: the chunk is rotated as a whole
    if (a.interleaved) {
      float c[kChunk / 2], s[kChunk / 2];
      load_angles<T, kChunk / 2>(a, t, at / 2, c, s);
#pragma unroll
      for (int i = 0; i < kChunk / 2; ++i) {
        const float x1 = to_float(own.v[2 * i]), x2 = to_float(own.v[2 * i + 1]);
        own.v[2 * i] = from_float<T>(rotate_first(x1, x2, c[i], s[i]));
        own.v[2 * i + 1] = from_float<T>(rotate_second(x1, x2, c[i], s[i]));
      }
    } else {
      const bool first = at < half;
      const Vec<T, kChunk> partner = load_vec<T, kChunk>(x + (first ? at + half : at - half));
      float c[kChunk], s[kChunk];
      load_angles<T, kChunk>(a, t, first ? at : at - half, c, s);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const float mine = to_float(own.v[i]), theirs = to_float(partner.v[i]);
        own.v[i] =
            from_float<T>(first ? rotate_first(mine, theirs, c[i], s[i]) : rotate_second(theirs, mine, c[i], s[i]));
      }
    }
  } else {
    const Vec<T, kChunk> before = own;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const int e = at + i;
      if (e >= 2 * half) break;
      const bool first = a.interleaved ? e % 2 == 0 : e < half;
      const int pair = a.interleaved ? e / 2 : first ? e : e - half;
      const int distance = a.interleaved ? 1 : half;
      float c, s;
      load_angles<T, 1>(a, t, pair, &c, &s);
      const float mine = to_float(before.v[i]), theirs = to_float(x[first ? e + distance : e - distance]);
      own.v[i] = from_float<T>(first ? rotate_first(mine, theirs, c, s) : rotate_second(theirs, mine, c, s));
    }
  }
  return own;
}

// block (lanes of a row, rows)
template <class T, class C, bool Aligned>
__global__ void __launch_bounds__(kBlock) rotary_cache_kernel(const RotaryCacheParams p) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const int lane = threadIdx.x;
  const bool live = row < p.rows && lane < p.chunks;
  const Quotient token = divide(row, p.q.heads + p.k.heads + p.v.heads);
  const int64_t t = token.q;
  int head = int(token.r);
  int part = 0;  // q, k, v
  if (head >= p.q.heads) {
    head -= p.q.heads;
    part = 1;
    if (head >= p.k.heads) {
      head -= p.k.heads;
      part = 2;
    }
  }

  Vec<T, kChunk> x;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) x.v[i] = from_float<T>(0.f);
  int64_t slot = -1;
  if (live) {
    const Heads& h = part == 0 ? p.q : part == 1 ? p.k : p.v;
    const T* from = static_cast<const T*>(h.data) + t * h.stride_token + head * h.stride_head;
    x = part == 2 ? load_any<Aligned, T, kChunk>(from + lane * kChunk)
                  : rotate_chunk<T, Aligned>(from, p.angles, t, lane);
    if (part > 0) slot = p.slots[t];
  }
  __syncwarp();  // every lane has loaded its partner
  if (live && part == 0) {
    T* to = static_cast<T*>(p.q.data) + t * p.q.stride_token + head * p.q.stride_head + lane * kChunk;
    store_any<Aligned, T, kChunk>(to, x);
  }
  const bool keep = slot >= 0 && slot < p.shape.slots;
  write_row<C, T>(part == 1 ? p.key_cache : p.value_cache, p.shape, slot, head, lane, blockDim.x, x, keep);
}

// host ---------------------------------------------------------------------------------------------------------------

Heads heads_of(const Tensor& x, bool written) {
  return {written ? x.mutable_data_ptr() : const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1),
          int(x.size(1))};
}
Angles angles_of(const Tensor& cos, const Tensor& sin, bool interleaved) {
  return {
      cos.const_data_ptr(), sin.const_data_ptr(), cos.stride(0), sin.stride(0), cos.scalar_type() == ScalarType::Float,
      interleaved,          int(cos.size(1))};
}

}  // namespace

void rotary_embedding_cuda(Tensor query, OptTensor key, Tensor cos, Tensor sin, bool interleaved) {
  const char* op = "rotary_embedding";
  check_rotary(op, query, key.has_value() ? &*key : nullptr, cos, sin);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  RotaryParams p{};
  p.q = heads_of(query, true);
  if (key.has_value()) p.k = heads_of(*key, true);
  p.angles = angles_of(cos, sin, interleaved);
  const int64_t rows = query.size(0) * (p.q.heads + p.k.heads);
  if (rows == 0 || p.angles.half == 0) return;
  const bool aligned = is_aligned(query, {0, 1}) && (!key.has_value() || is_aligned(*key, {0, 1})) &&
                       is_aligned(cos, {0}) && is_aligned(sin, {0});
  const cudaStream_t stream = current_stream(query);
  dispatch_cuda(query.scalar_type(), op, [&](auto tag) {
    using T = decltype(tag);
    auto run = [&](auto width) {
      constexpr int V = decltype(width)::value;
      p.items_per_head = interleaved && V > 1 ? 2 * p.angles.half / V : p.angles.half / V;
      p.items = rows * p.items_per_head;
      const unsigned grid = ceil_div(p.items, kBlock);
      if (interleaved)
        rotary_kernel<T, V, true><<<grid, kBlock, 0, stream>>>(p);
      else
        rotary_kernel<T, V, false><<<grid, kBlock, 0, stream>>>(p);
    };
    // Interleaved, a vector of V elements meets V / 2 angles, whose loads are half as wide: 8 bytes for 16-bit ones.
    if (aligned && (interleaved ? 2 * p.angles.half : p.angles.half) % kVec<T> == 0)
      run(std::integral_constant<int, kVec<T>>{});
    else
      run(std::integral_constant<int, 1>{});
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void rotary_and_cache_cuda(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor key_cache,
                           Tensor value_cache, Tensor slot_mapping, bool interleaved, OptTensor k_scale,
                           OptTensor v_scale) {
  const char* op = "rotary_and_cache";
  check_rotary(op, query, &key, cos, sin);
  check_cache_write(op, key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  RotaryCacheParams p{};
  p.q = heads_of(query, true);
  p.k = heads_of(key, false);
  p.v = heads_of(value, false);
  p.angles = angles_of(cos, sin, interleaved);
  p.key_cache = cache_view(key_cache, k_scale);
  p.value_cache = cache_view(value_cache, v_scale);
  p.shape = cache_shape(key_cache);
  p.slots = slot_mapping.const_data_ptr<int64_t>();
  p.rows = query.size(0) * (p.q.heads + p.k.heads + p.v.heads);
  p.chunks = int(key.size(2) / kChunk);
  if (p.rows == 0) return;
  const bool aligned = is_aligned(query, {0, 1}) && is_aligned(key, {0, 1}) && is_aligned(value, {0, 1}) &&
                       is_aligned(cos, {0}) && is_aligned(sin, {0}) &&
                       (interleaved ? 2 * p.angles.half : p.angles.half) % kChunk == 0;
  const dim3 block(row_lanes(key.size(2)), kBlock / row_lanes(key.size(2)));
  const unsigned grid = ceil_div(p.rows, block.y);
  const cudaStream_t stream = current_stream(query);
  dispatch_cuda(query.scalar_type(), op, [&](auto tag) {
    using T = decltype(tag);
    dispatch_cache<T>(key_cache.scalar_type(), [&](auto stored) {
      using C = decltype(stored);
      if (aligned)
        rotary_cache_kernel<T, C, true><<<grid, block, 0, stream>>>(p);
      else
        rotary_cache_kernel<T, C, false><<<grid, block, 0, stream>>>(p);
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace pagedkv

STABLE_TORCH_LIBRARY_IMPL(torch_pagedkv, CUDA, m) {
  PAGEDKV_IMPL(m, rotary_embedding, pagedkv::rotary_embedding_cuda);
  PAGEDKV_IMPL(m, rotary_and_cache, pagedkv::rotary_and_cache_cuda);
}
