// Rotary position embedding, in place or fused with the cache write (contract: torch_pagedkv/ops/rotary.py).
//
// rotary_embedding: a thread holds the two vectors of a few pairs (x1 | x2), or one vector of interleaved pairs; q and
// k heads share the grid. rotary_and_cache: a group of lanes holds one row of q, k or v, eight elements a lane; a lane
// loads its partner's eight as well (from L1) and computes only its own, so the row ends up in the layout in which the
// cache is written and quantised. All loads of a warp come before its stores, because q is rotated in place.
// rotary_pairs: the same for many rows, where halves are rotated as a whole: a lane holds eight elements of the first
// half and their partners of the second, of two heads of a token (one, where a count of heads is odd), so that nothing
// is read twice (8192 tokens of Llama-3-8B: 64 us for 92; four heads: 74). Both heads are of one part of the token,
// whose addresses are worked out once, and before the kernel in front has ended: 4096 tokens 28.2 us for 31.4,
// streamed 27.2. At one token it is no faster, into an int8 cache 0.4 us slower. All round through the same two
// functions, so the fused op stores the bits of the two ops in turn.
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
  int64_t items;  // tokens * heads * items_per_head
  Divisor items_per_head, heads;
};

// V pairs an item (interleaved: V / 2 pairs, a vector of V elements; V = 1 is the scalar path, one pair an item)
template <class T, int V, bool interleaved>
__global__ void __launch_bounds__(kBlock) rotary_kernel(const RotaryParams p) {
  release_next();
  const int64_t item = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  const Quotient row = divide(item, p.items_per_head);
  const Quotient token = divide(row.q, p.heads);
  const bool is_key = token.r >= p.q.heads;
  const Heads& h = is_key ? p.k : p.q;
  T* x = static_cast<T*>(h.data) + token.q * h.stride_token + (token.r - (is_key ? p.q.heads : 0)) * h.stride_head;
  wait_for_previous();
  if (item >= p.items) return;

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
  int64_t tokens;
  Divisor heads;  // q.heads + k.heads + v.heads; rotary_pairs: groups of N in each of these
  bool streamed;  // q and what goes into the cache, past what L2 keeps
  int chunks;     // of 8 elements in a row; rotary_pairs: in half of it
};

// Which tensor a head of the token is in.
enum Part { kQuery, kKey, kValue };
struct Place {
  Part part;
  int head;  // in it
};
__device__ __forceinline__ Place place_of(int head, int query_heads, int key_heads) {
  if (head < query_heads) return {kQuery, head};
  head -= query_heads;
  if (head < key_heads) return {kKey, head};
  return {kValue, head - key_heads};
}
// Values are chosen, not addresses: a parameter read by an address that is not known beforehand costs half a
// microsecond.
template <class V>
__device__ __forceinline__ V choose(Part part, V query, V key, V value) {
  return part == kQuery ? query : part == kKey ? key : value;
}
template <class T>
__device__ __forceinline__ T* row_of(const RotaryCacheParams& p, int64_t token, const Place& at) {
  return static_cast<T*>(choose(at.part, p.q.data, p.k.data, p.v.data)) +
         token * choose(at.part, p.q.stride_token, p.k.stride_token, p.v.stride_token) +
         at.head * choose(at.part, p.q.stride_head, p.k.stride_head, p.v.stride_head);
}
__device__ __forceinline__ CacheView cache_of(const RotaryCacheParams& p, Part part) {
  const CacheView &k = p.key_cache, &v = p.value_cache;
  return {choose(part, k.data, k.data, v.data), choose(part, k.scale, k.scale, v.scale),
          choose(part, k.stride_block, k.stride_block, v.stride_block),
          choose(part, k.stride_token, k.stride_token, v.stride_token),
          choose(part, k.stride_head, k.stride_head, v.stride_head)};
}

// block (lanes of half a row, items); an item is N heads of one part of a token.
template <class T, class C, int N>
__global__ void __launch_bounds__(kBlock, 4) rotary_pairs(const __grid_constant__ RotaryCacheParams p) {
  release_next();
  const Quotient item = divide(int64_t(blockIdx.x) * blockDim.y + threadIdx.y, p.heads);
  const int64_t t = item.q;
  Place at = place_of(int(item.r), (p.q.heads + N - 1) / N, (p.k.heads + N - 1) / N);
  at.head *= N;
  const int lane = threadIdx.x, heads = choose(at.part, p.q.heads, p.k.heads, p.v.heads);
  const bool live = t < p.tokens && lane < p.chunks;
  const int64_t stride = choose(at.part, p.q.stride_head, p.k.stride_head, p.v.stride_head);
  T* const row = row_of<T>(p, live ? t : 0, at) + lane * kChunk;
  wait_for_previous();

  Vec<T, kChunk> x[N][2];
  bool inside[N];
#pragma unroll
  for (int h = 0; h < N; ++h) {
    inside[h] = live && at.head + h < heads;
    x[h][0] = stream_or_zero<T, kChunk>(row + h * stride, inside[h]);
    x[h][1] = stream_or_zero<T, kChunk>(row + h * stride + p.angles.half, inside[h]);
  }
  const int64_t slot = live && at.part != kQuery ? p.slots[t] : -1;
  if (live && at.part != kValue) {
    float c[kChunk], s[kChunk];
    load_angles<T, kChunk>(p.angles, t, lane * kChunk, c, s);
#pragma unroll
    for (int h = 0; h < N; ++h) {
      float x1[kChunk], x2[kChunk], y1[kChunk], y2[kChunk];
      to_floats(x[h][0], x1), to_floats(x[h][1], x2);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        y1[i] = rotate_first(x1[i], x2[i], c[i], s[i]);
        y2[i] = rotate_second(x1[i], x2[i], c[i], s[i]);
      }
      x[h][0] = from_floats<T, kChunk>(y1);
      x[h][1] = from_floats<T, kChunk>(y2);
    }
  }
  RowScale scales[N];
  if (__any_sync(kFullWarp, slot >= 0)) row_scales<C>(x, blockDim.x, scales);
  if (at.part == kQuery) {
#pragma unroll
    for (int h = 0; h < N; ++h) {
      if (!inside[h]) continue;
      store_vec<T, kChunk>(row + h * stride, x[h][0], p.streamed);
      store_vec<T, kChunk>(row + h * stride + p.angles.half, x[h][1], p.streamed);
    }
  } else if (slot >= 0 && slot < p.shape.slots) {
    const CacheView cache = cache_of(p, at.part);
#pragma unroll
    for (int h = 0; h < N; ++h)
      if (inside[h]) write_row<C>(cache, p.shape, slot, at.head + h, lane, x[h], p.angles.half, scales[h], p.streamed);
  }
}

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
__global__ void __launch_bounds__(kBlock) rotary_cache_kernel(const __grid_constant__ RotaryCacheParams p) {
  release_next();
  const int lane = threadIdx.x;
  const Quotient token = divide(int64_t(blockIdx.x) * blockDim.y + threadIdx.y, p.heads);
  const bool live = token.q < p.tokens && lane < p.chunks;
  const int64_t t = token.q;
  const Place at = place_of(int(token.r), p.q.heads, p.k.heads);
  T* const row = row_of<T>(p, live ? t : 0, at);
  wait_for_previous();

  // Its load comes before all that waits for others.
  const int64_t slot = live && at.part != kQuery ? p.slots[t] : -1;
  Vec<T, kChunk> rows[1][1], &x = rows[0][0];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) x.v[i] = from_float<T>(0.f);
  if (live) {
    x = at.part == kValue ? load_any<Aligned, T, kChunk>(row + lane * kChunk)
                          : rotate_chunk<T, Aligned>(row, p.angles, t, lane);
  }
  __syncwarp();  // every lane has loaded its partner
  if (live && at.part == kQuery) store_any<Aligned, T, kChunk>(row + lane * kChunk, x);
  RowScale scale[1];
  row_scales<C>(rows, blockDim.x, scale);
  if (slot >= 0 && slot < p.shape.slots)
    write_row<C>(cache_of(p, at.part), p.shape, slot, at.head, lane, rows[0], 0, scale[0]);
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

constexpr int64_t kManyRows = 3072;  // 64 tokens of Llama-3-8B: where rotary_pairs is as fast or faster

// rotary_pairs takes these q, k and v with a row's halves in 16-byte pieces.
template <class T, class C>
void launch_pairs(RotaryCacheParams p, cudaStream_t stream) {
  const auto run = [&](auto heads) {
    constexpr int N = decltype(heads)::value;
    p.heads = int64_t(ceil_div(p.q.heads, N) + ceil_div(p.k.heads, N) + ceil_div(p.v.heads, N));
    p.chunks = p.angles.half / kChunk;
    const unsigned lanes = row_lanes(p.angles.half);
    const dim3 block(lanes, kBlock / lanes);
    launch_kernel(rotary_pairs<T, C, N>, ceil_div(p.tokens * p.heads.d, block.y), block, 0, stream, p);
  };
  const bool even = (p.q.heads | p.k.heads | p.v.heads) % 2 == 0;
  if (sizeof(T) == 2 && even) return run(std::integral_constant<int, 2>{});  // 64 bytes a lane
  run(std::integral_constant<int, 1>{});
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
      p.items_per_head = int64_t(interleaved && V > 1 ? 2 * p.angles.half / V : p.angles.half / V);
      p.heads = int64_t(p.q.heads + p.k.heads);
      p.items = rows * p.items_per_head.d;
      launch_kernel(interleaved ? rotary_kernel<T, V, true> : rotary_kernel<T, V, false>, ceil_div(p.items, kBlock),
                    kBlock, 0, stream, p);
    };
    // Interleaved, a vector of V elements meets V / 2 angles, whose loads are half as wide: 8 bytes for 16-bit ones.
    if (aligned && (interleaved ? 2 * p.angles.half : p.angles.half) % kVec<T> == 0)
      run(std::integral_constant<int, kVec<T>>{});
    else
      run(std::integral_constant<int, 1>{});
  });
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
  p.tokens = query.size(0);
  p.streamed = is_streamed(query.numel() * int64_t(query.element_size()));
  p.heads = int64_t(p.q.heads + p.k.heads + p.v.heads);
  p.chunks = int(key.size(2) / kChunk);
  if (p.tokens * p.heads.d == 0) return;
  const int half = p.angles.half;
  const bool aligned = is_aligned(query, {0, 1}) && is_aligned(key, {0, 1}) && is_aligned(value, {0, 1}) &&
                       is_aligned(cos, {0}) && is_aligned(sin, {0}) && (interleaved ? 2 * half : half) % kChunk == 0;
  const bool pairs = aligned && !interleaved && 2 * half == key.size(2) && p.tokens * p.heads.d >= kManyRows;
  const dim3 block(row_lanes(key.size(2)), kBlock / row_lanes(key.size(2)));
  const unsigned grid = ceil_div(p.tokens * p.heads.d, block.y);
  const cudaStream_t stream = current_stream(query);
  dispatch_cuda(query.scalar_type(), op, [&](auto tag) {
    using T = decltype(tag);
    dispatch_cache<T>(key_cache.scalar_type(), [&](auto stored) {
      using C = decltype(stored);
      if (pairs) return launch_pairs<T, C>(p, stream);
      launch_kernel(aligned ? rotary_cache_kernel<T, C, true> : rotary_cache_kernel<T, C, false>, grid, block, 0,
                    stream, p);
    });
  });
}

}  // namespace pagedkv

STABLE_TORCH_LIBRARY_IMPL(torch_pagedkv, CUDA, m) {
  PAGEDKV_IMPL(m, rotary_embedding, pagedkv::rotary_embedding_cuda);
  PAGEDKV_IMPL(m, rotary_and_cache, pagedkv::rotary_and_cache_cuda);
}
