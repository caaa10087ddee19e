// The attention kernels, written once over vectors and compiled once per instruction set by attention_<isa>.cpp, which
// defines PAGEDKV_ATTENTION_TABLE as the name of its table.
//
// Both kernels run over tiles of keys with an online softmax in fp32. `run_direct` (decode) takes dot products with the
// keys where they lie, all rows of a KV head at once, so that the cache is read once; it goes over the heads inside a
// tile, so that memory is read in the order of the pages. `run_tiled` (prefill) packs a tile of K (transposed) and V
// into scratch, as fp32 or as pairs of bfloat16, and multiplies blocks of 6 rows with it in registers.
#include "attention_kernel.h"
#include "attention_vec.h"

namespace pagedkv {
namespace {

#if defined(__AVX512BF16__)
constexpr bool kHasDot = true;  // vdpbf16ps: products of bfloat16 pairs summed in fp32
#else
constexpr bool kHasDot = false;
#endif

constexpr int kTile = 128;                      // keys of a tile
constexpr int kRows = 4;                        // rows of the direct kernels' register blocks
constexpr int kBlockRows = 6;                   // and of the matrix kernel's
constexpr int kBlockVectors = W == 16 ? 4 : 2;  // columns of both, in vectors
constexpr int kPanel = kBlockVectors * W;       // columns of a packed panel
constexpr int kAhead = 32;                      // keys that decode asks for ahead of time
constexpr int kChain = 32;                      // products that are added one after the other
constexpr int kS = kTile + 16;                  // row stride of a tile of logits

// Keys [begin, end) that the query token `t` of a sequence sees: always one range.
struct Range {
  int64_t begin, end;
};
INLINE Range visible(const AttentionArgs& a, int64_t length, int64_t position) {
  Range r{0, length};
  if (a.causal) r.end = min64(r.end, position + 1);
  if (a.window > 0) {
    r.begin = max64(0, position - a.window + 1);
    if (!a.causal) r.end = min64(r.end, position + a.window);
  }
  return r;
}

// Where the keys of a tile lie: byte addresses at KV head 0, and their places in the scales (paged only).
struct Tile {
  const char* k[kS];
  const char* v[kS];
  int64_t slot[kS];
  int n;
};
template <int kBytes>
void locate(const AttentionArgs& a, int sequence, int64_t begin, int64_t end, Tile& tile) {
  const char *k = (const char*)a.k, *v = (const char*)a.v;
  int n = 0;
  if (!a.block_tables) {
    const int64_t first = a.key_start[sequence] + begin;
    for (; begin + n < end; ++n) {
      tile.k[n] = k + (first + n) * a.k_stride_t * kBytes;
      tile.v[n] = v + (first + n) * a.v_stride_t * kBytes;
    }
  } else {
    const int32_t* table = a.block_tables + sequence * a.table_stride;
    const int64_t size = int64_t(1) << a.block_shift;
    while (begin < end) {
      const int64_t block = table[begin >> a.block_shift], offset = begin & (size - 1);
      const int64_t stop = min64(end, begin - offset + size);
      const char* kb = k + (block * a.k_stride_block + offset * a.k_stride_t) * kBytes;
      const char* vb = v + (block * a.v_stride_block + offset * a.v_stride_t) * kBytes;
      for (int64_t slot = block * size + offset; begin < stop; ++begin, ++n, ++slot) {
        tile.k[n] = kb;
        tile.v[n] = vb;
        tile.slot[n] = slot;
        kb += a.k_stride_t * kBytes;
        vb += a.v_stride_t * kBytes;
      }
    }
  }
  tile.n = n;
  for (int i = n; i < round_up(n, 16); ++i) {  // whole vectors of keys may be read; their results are masked
    tile.k[i] = tile.k[n - 1];
    tile.v[i] = tile.v[n - 1];
  }
}
const float* gather_scales(const float* scales, const Tile& tile, int kv_heads, int head, float* to) {
  if (!scales) return nullptr;
  for (int i = 0; i < tile.n; ++i) to[i] = scales[tile.slot[i] * kv_heads + head];
  for (int i = tile.n; i < round_up(tile.n, 16); ++i) to[i] = 0;
  return to;
}

// ---- softmax --------------------------------------------------------------------------------------------------------

struct Logits {
  float scale, softcap, slope;
  const float* k_scale;  // of the tile's keys, or null
  const float* v_scale;
};

// One row of logits s[0..n) of a tile -> weights exp(l - max), times v_scale, in place (kPairs: as bfloat16, packed at
// the front of the row). Of the keys only [begin, end) count, the others get weight 0; `distance` is the position of
// key 0 less the query's. Updates the row's max and sum, and returns exp(old max - new max).
template <bool kPairs>
float softmax(const Logits& f, float* s, int n, int begin, int end, float distance, float& row_max, float& row_sum) {
  const int stop = int(round_up(n, kPairs ? 2 * W : W));
  if (begin >= end) {
    for (int j = 0; j < (kPairs ? stop / 2 : stop); j += W) store(s + j, vf{});
    return 1.f;
  }
  const vi lane = lane_numbers(AllLanes{});
  vf m = splat(-kInf);
  const bool plain = f.softcap == 0 && f.slope == 0;
  for (int j = 0; j < stop; j += W) {
    vf x = load(s + j) * f.scale;
    if (f.k_scale) x = x * load(f.k_scale + j);
    if (!plain) {
      if (f.softcap > 0) x = tanh(x / f.softcap) * f.softcap;
      if (f.slope != 0) x = x + f.slope * (__builtin_convertvector(lane + j, vf) + distance);
    }
    if (j < begin || j + W > end) {
      const vi i = lane + j;
      x = ((i >= begin) & (i < end)) ? x : splat(-kInf);
    }
    store(s + j, x);
    m = max(x, m);
  }
  const float tile_max = max_lanes(m), old_max = row_max;
  const float new_max = tile_max > old_max ? tile_max : old_max;
  const float base = new_max == -kInf ? 0.f : new_max;  // all logits -inf: the weights are exp(-inf), not NaN
  vf total{};
  for (int j = 0; j < stop; j += kPairs ? 2 * W : W) {
    if constexpr (kPairs) {
#if defined(__AVX512BF16__)
      vf a = exp(load(s + j) - base), b = exp(load(s + j + W) - base);
      total += a + b;
      if (f.v_scale) a = a * load(f.v_scale + j), b = b * load(f.v_scale + j + W);
      put(s + j / 2, _mm512_cvtne2ps_pbh((__m512)b, (__m512)a), Full{});
#endif
    } else {
      vf p = exp(load(s + j) - base);
      total += p;
      if (f.v_scale) p = p * load(f.v_scale + j);
      store(s + j, p);
    }
  }
  const float fade = old_max == -kInf ? 0.f : exp(splat(old_max - base))[0];
  row_max = new_max;
  row_sum = row_sum * fade + sum_lanes(total);
  return fade;
}

// ---- results --------------------------------------------------------------------------------------------------------

template <class Elem>
INLINE void store_row(void* out, int64_t at, const float* o, int d, float factor) {
  auto* p = (typename Elem::E*)out + at;
  for (int i = 0; i < d; i += 2 * W) {
    const int n = int(min64(d - i, 2 * W));
    const vf a = load(o + i), b = load(o + i + W);
    // factor 0: a row that sees nothing, whatever o holds
    Elem::store2(p + i, n, factor == 0 ? vf{} : a * factor, factor == 0 ? vf{} : b * factor);
  }
}
// A finished row: the unnormalised sum `o` with max m and sum l -> out and lse.
void write_out(const AttentionArgs& a, bool woven, int64_t token, int head, const float* o, float m, float l) {
  const int64_t row = token * a.heads + head, at = row * a.head_dim;
  float factor = 0, top = -kInf;
  if (m != -kInf || l != 0) {  // something was seen (l is NaN after a NaN logit)
    top = m;
    if (a.sinks && !(a.sinks[head] <= m)) top = a.sinks[head];
    const float fade = exp(splat(m - top))[0];
    l *= fade;
    if (a.sinks) l += exp(splat(a.sinks[head] - top))[0];
    factor = fade / l;
  }
  switch (a.states ? kF32 : a.q_type) {
    case kF32:
      if (woven) {
        float plain[256];
        for (int i = 0; i < a.head_dim; i += 2 * W)
          for (int j = 0; j < W; ++j) plain[i + 2 * j] = o[i + j], plain[i + 2 * j + 1] = o[i + W + j];
        store_row<Plain<float>>(a.out, at, plain, a.head_dim, factor);
      } else {
        store_row<Plain<float>>(a.out, at, o, a.head_dim, factor);
      }
      break;
    case kF16:
      store_row<Plain<F16>>(a.out, at, o, a.head_dim, factor);
      break;
    default:
      if (woven)
        store_row<Woven>(a.out, at, o, a.head_dim, factor);
      else
        store_row<Plain<BF16>>(a.out, at, o, a.head_dim, factor);
  }
  if (a.lse && a.states)
    a.lse[2 * row] = top, a.lse[2 * row + 1] = l;
  else if (a.lse)
    a.lse[row] = top == -kInf && l == 0 ? -kInf : top + __builtin_logf(l);
}
// Partials keep the order of elements that the kernel has them in; combine() knows which that is.
INLINE int64_t part_stride(const AttentionArgs& a) { return round_up(a.head_dim, 32); }
INLINE bool is_woven(const AttentionArgs& a, const AttentionItem& it) { return !it.tiled && a.kv_type == kBF16; }
void finish(const AttentionArgs& a, const AttentionItem& it, const AttentionPartials* parts, int64_t part_rows,
            int kv_head, int m, const float* o, float row_max, float row_sum) {
  if (it.split < 0) {
    const int64_t token = a.query_start[it.sequence] + m / a.group;
    write_out(a, is_woven(a, it), token, kv_head * a.group + m % a.group, o, row_max, row_sum);
    return;
  }
  const int64_t rows = int64_t(a.query_len[it.sequence]) * a.group;
  const int64_t at = it.split * part_rows + it.part_base + kv_head * rows + m;
  parts->max[at] = row_max;
  parts->sum[at] = row_sum;
  memcpy(parts->out + at * part_stride(a), o, part_stride(a) * sizeof(float));
}

// Takes pieces of the scratch; with a null base it only adds them up.
struct Arena {
  char* base;
  int64_t used;
  template <class T>
  INLINE T* take(int64_t n) {
    T* p = (T*)(base + used);
    used += round_up(n * int64_t(sizeof(T)), 64);
    return p;
  }
};

template <class Elem>
INLINE void load_row(const void* q, int64_t at, int d, float scale, float* to) {
  const auto* p = (const typename Elem::E*)q + at;
  for (int i = 0; i < d; i += 2 * W) {
    vf a, b;
    Elem::load2(p + i, int(min64(d - i, 2 * W)), a, b);
    store(to + i, a * scale);
    store(to + i + W, b * scale);
  }
}
// A query row as fp32, times scale, up to the next multiple of 2 W with zeros.
void load_query(const AttentionArgs& a, bool woven, int64_t at, float scale, float* to) {
  switch (a.q_type) {
    case kF32:
      return load_row<Plain<float>>(a.q, at, a.head_dim, scale, to);
    case kF16:
      return load_row<Plain<F16>>(a.q, at, a.head_dim, scale, to);
    default:
      return woven ? load_row<Woven>(a.q, at, a.head_dim, scale, to)
                   : load_row<Plain<BF16>>(a.q, at, a.head_dim, scale, to);
  }
}
INLINE int64_t query_offset(const AttentionArgs& a, const AttentionItem& it, int kv_head, int m) {
  return (a.query_start[it.sequence] + m / a.group) * a.q_stride_t + (kv_head * a.group + m % a.group) * a.q_stride_h;
}
// Keys that row m sees, of those of this item.
INLINE Range row_keys(const AttentionArgs& a, const AttentionItem& it, int m) {
  const int64_t length = a.key_len[it.sequence];
  Range r = visible(a, length, length - a.query_len[it.sequence] + m / a.group);
  r.begin = max64(r.begin, it.key_begin);
  r.end = min64(r.end, it.key_end);
  return r;
}
// Keys that any row of [begin, end) sees: both ends of the range grow with the row.
INLINE Range rows_keys(const AttentionArgs& a, const AttentionItem& it, int begin, int end) {
  return {row_keys(a, it, begin).begin, row_keys(a, it, end - 1).end};
}
INLINE float query_position(const AttentionArgs& a, const AttentionItem& it, int m) {
  return float(a.key_len[it.sequence] - a.query_len[it.sequence] + m / a.group);
}

// The first reader of a tile's rows asks for those ahead; at the end, for `rows` at byte `offset`, which come next.
struct Ahead {
  bool first;
  const char* const* rows;
  int64_t offset;
};
// Asks for rows j + kAhead and on of a tile's n keys or values, past its end for those of `next` (null: nothing). The
// rows of a head lie a page or so apart, where the hardware's prefetchers do not follow: 1.6 to 2.5 times the
// bandwidth. Into L2: rows a page apart share the same few sets of L1.
INLINE void prefetch_rows(const char* const* rows, int64_t offset, const char* const* next, int64_t next_offset, int j,
                          int count, int n, int bytes) {
  for (int i = j + kAhead; i < j + kAhead + count; ++i) {
    if (i >= n && (!next || i >= 2 * n)) return;
    const char* p = i < n ? rows[i] + offset : next[i - n] + next_offset;
    for (int at = 0; at < bytes; at += 64) __builtin_prefetch(p + at, 0, 2);
  }
}

// ---- direct ---------------------------------------------------------------------------------------------------------

// s[r][j] = q[r] . k[j] for R rows and the n keys of a tile; kDot: q and k as they are stored, in bfloat16.
template <class KV, bool kDot, int R>
void dot_rows(const float* q, int64_t q_stride, const char* const* keys, int64_t offset, int n, int d, float* s,
              const Ahead& ahead) {
  constexpr int kSlots = R == 3 ? 4 : R, kKeys = W / kSlots;
  for (int j = 0; j < n; j += kKeys) {
    if (ahead.first)
      prefetch_rows(keys, offset, ahead.rows, ahead.offset, j, kKeys, n, d * int(sizeof(typename KV::E)));
    vf acc[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) acc[i] = vf{};
    auto step = [&](int i, auto load2) __attribute__((always_inline)) {
#pragma GCC unroll 16
      for (int key = 0; key < kKeys; ++key) {
        const auto* k = (const typename KV::E*)(keys[j + key] + offset) + i;
        if constexpr (kDot) {
#if defined(__AVX512BF16__)
          const __m512bh words = (__m512bh)load2(k);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r)
            acc[r * kKeys + key] = (vf)_mm512_dpbf16_ps((__m512)acc[r * kKeys + key], words,
                                                        (__m512bh)raw<vu>(q + r * q_stride + i / 2, Full{}));
#endif
        } else {
          vf a, b;
          load2(k, a, b);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            vf& sum = acc[r * kKeys + key];
            sum += a * load(q + r * q_stride + i);
            sum += b * load(q + r * q_stride + i + W);
          }
        }
      }
    };
    int i = 0;
    const int rest = d % (2 * W);
    if constexpr (kDot) {
      for (; i + 2 * W <= d; i += 2 * W) step(i, [](const BF16* p) { return Woven::words(p); });
      if (rest) step(i, [rest](const BF16* p) { return Woven::words(p, rest); });
    } else {
      using S = typename KV::E;
      for (; i + 2 * W <= d; i += 2 * W) step(i, [](const S* p, vf& a, vf& b) { KV::load2(p, a, b); });
      if (rest) step(i, [rest](const S* p, vf& a, vf& b) { KV::load2(p, rest, a, b); });
    }
    alignas(64) float t[W];
    store(t, sum_each(acc));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) memcpy(s + r * kS + j, t + r * kKeys, kKeys * 4);
  }
}

// o[r][:] = o[r][:] * fade[r] + sum over j of s[r][j] v[j][:], for R rows and B blocks of 2 W columns. kPart: one
// block, of which only the first `columns` are there.
template <class KV, int R, int B, bool kPart>
void add_blocks(const float* s, const float* fade, const char* const* values, int64_t offset, int n, int columns,
                float* o, int64_t o_stride, const Ahead& ahead, int bytes) {
  vf acc[R][2 * B];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < 2 * B; ++c) acc[r][c] = vf{};
  }
  for (int j = 0; j < n; ++j) {
    if (ahead.first) prefetch_rows(values, offset, ahead.rows, ahead.offset, j, 1, n, bytes);
    const auto* v = (const typename KV::E*)(values[j] + offset);
#pragma GCC unroll 4
    for (int block = 0; block < B; ++block) {
      vf a, b;
      if constexpr (kPart)
        KV::load2(v, columns, a, b);
      else
        KV::load2(v + block * 2 * W, a, b);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const vf p = splat(s[r * kS + j]);
        acc[r][2 * block] += p * a;
        acc[r][2 * block + 1] += p * b;
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < 2 * B; ++c) {
      float* p = o + r * o_stride + c * W;
      store(p, load(p) * fade[r] + acc[r][c]);
    }
  }
}
template <class KV, int R>
INLINE void add_values(const float* s, const float* fade, const char* const* values, int64_t offset, int n, int d,
                       float* o, int64_t o_stride, Ahead ahead) {
  // As many blocks at once as there are registers for; a single row wants several, to hide the latency of its sums.
  constexpr int kMost = R == 1 ? 4 : W == 16 || R == 2 ? 2 : 1, kBytes = sizeof(typename KV::E);
  int i = 0;
  for (; i + kMost * 2 * W <= d; i += kMost * 2 * W) {
    add_blocks<KV, R, kMost, false>(s, fade, values, offset + i * kBytes, n, 0, o + i, o_stride, ahead, d * kBytes);
    ahead.first = false;  // the rest of each row has been asked for
  }
  if constexpr (kMost > 2) {
    if (i + 4 * W <= d) {
      add_blocks<KV, R, 2, false>(s, fade, values, offset + i * kBytes, n, 0, o + i, o_stride, ahead, d * kBytes);
      i += 4 * W;
      ahead.first = false;
    }
  }
  if constexpr (kMost > 1) {
    if (i + 2 * W <= d) {
      add_blocks<KV, R, 1, false>(s, fade, values, offset + i * kBytes, n, 0, o + i, o_stride, ahead, d * kBytes);
      i += 2 * W;
      ahead.first = false;
    }
  }
  if (i < d)
    add_blocks<KV, R, 1, true>(s, fade, values, offset + i * kBytes, n, d - i, o + i, o_stride, ahead, d * kBytes);
}

struct DirectScratch {
  float *q, *o, *max, *sum;  // [KV heads of the item, rows, padded D or 1]
  float *s, *k_scale, *v_scale;
  Tile* tile;
  int64_t padded, bytes;
  DirectScratch(const AttentionArgs& a, const AttentionItem& it, char* base) {
    Arena arena{base, 0};
    padded = part_stride(a);
    const int64_t rows = int64_t(it.head_end - it.head_begin) * (it.row_end - it.row_begin);
    q = arena.take<float>(rows * padded);
    o = arena.take<float>(rows * padded);
    max = arena.take<float>(rows);
    sum = arena.take<float>(rows);
    s = arena.take<float>((it.row_end - it.row_begin) * kS);
    k_scale = arena.take<float>(kS);
    v_scale = arena.take<float>(kS);
    tile = arena.take<Tile>(1);
    bytes = arena.used;
  }
};

template <class KV>
void run_direct(const AttentionArgs& a, const AttentionItem& it, const AttentionPartials* parts, int64_t part_rows,
                char* base) {
  constexpr int kBytes = sizeof(typename KV::E);
  constexpr bool kWoven = __is_same(KV, Woven), kDot = kWoven && kHasDot;
  DirectScratch x(a, it, base);
  const int d = a.head_dim, rows = it.row_end - it.row_begin, heads = it.head_end - it.head_begin;
  const int64_t padded = x.padded;
  for (int h = 0; h < heads; ++h) {
    for (int m = 0; m < rows; ++m) {
      const int64_t from = query_offset(a, it, it.head_begin + h, it.row_begin + m), row = h * rows + m;
      float* to = x.q + row * padded;
      if constexpr (kDot) {
        memset(to, 0, padded * 2);
        memcpy(to, (const uint16_t*)a.q + from, d * 2);
      } else {
        load_query(a, kWoven, from, a.scale, to);
      }
      x.max[row] = -kInf;
      x.sum[row] = 0;
    }
  }
  memset(x.o, 0, heads * rows * padded * sizeof(float));
  const Range all = rows_keys(a, it, it.row_begin, it.row_end);
  for (int64_t begin = all.begin; begin < all.end; begin += kTile) {
    Tile& tile = *x.tile;
    locate<kBytes>(a, it.sequence, begin, min64(begin + kTile, all.end), tile);
    for (int h = 0; h < heads; ++h) {
      const int head = it.head_begin + h;
      const int64_t k_offset = head * a.k_stride_h * kBytes, v_offset = head * a.v_stride_h * kBytes;
      Logits f{kDot ? a.scale : 1.f, a.softcap, 0, nullptr, nullptr};
      f.k_scale = gather_scales(a.k_scale, tile, a.kv_heads, head, x.k_scale);
      f.v_scale = gather_scales(a.v_scale, tile, a.kv_heads, head, x.v_scale);
      float fade[kDirectRows];
      for (int m = 0; m < rows; m += kRows) {
        const float* qm = x.q + (h * rows + m) * padded;
        float* s = x.s + m * kS;
        const Ahead ahead{m == 0, tile.v, v_offset};
        switch (rows - m) {
          case 1:
            dot_rows<KV, kDot, 1>(qm, padded, tile.k, k_offset, tile.n, d, s, ahead);
            break;
          case 2:
            dot_rows<KV, kDot, 2>(qm, padded, tile.k, k_offset, tile.n, d, s, ahead);
            break;
          case 3:
            dot_rows<KV, kDot, 3>(qm, padded, tile.k, k_offset, tile.n, d, s, ahead);
            break;
          default:
            dot_rows<KV, kDot, 4>(qm, padded, tile.k, k_offset, tile.n, d, s, ahead);
        }
      }
      for (int m = 0; m < rows; ++m) {
        const Range r = row_keys(a, it, it.row_begin + m);
        const int lo = int(max64(0, min64(r.begin - begin, kTile))), hi = int(max64(0, min64(r.end - begin, tile.n)));
        f.slope = a.alibi_slopes ? a.alibi_slopes[head * a.group + (it.row_begin + m) % a.group] : 0.f;
        fade[m] =
            softmax<false>(f, x.s + m * kS, tile.n, lo, hi, float(begin) - query_position(a, it, it.row_begin + m),
                           x.max[h * rows + m], x.sum[h * rows + m]);
      }
      for (int m = 0; m < rows; m += kRows) {
        const float* s = x.s + m * kS;
        float* o = x.o + (h * rows + m) * padded;
        const Ahead ahead{m == 0, h + 1 < heads ? tile.k : nullptr, k_offset + a.k_stride_h * kBytes};
        switch (rows - m) {
          case 1:
            add_values<KV, 1>(s, fade + m, tile.v, v_offset, tile.n, d, o, padded, ahead);
            break;
          case 2:
            add_values<KV, 2>(s, fade + m, tile.v, v_offset, tile.n, d, o, padded, ahead);
            break;
          case 3:
            add_values<KV, 3>(s, fade + m, tile.v, v_offset, tile.n, d, o, padded, ahead);
            break;
          default:
            add_values<KV, 4>(s, fade + m, tile.v, v_offset, tile.n, d, o, padded, ahead);
        }
      }
    }
  }
  for (int h = 0; h < heads; ++h)
    for (int m = 0; m < rows; ++m)
      finish(a, it, parts, part_rows, it.head_begin + h, it.row_begin + m, x.o + (h * rows + m) * padded,
             x.max[h * rows + m], x.sum[h * rows + m]);
}

// ---- tiled ----------------------------------------------------------------------------------------------------------

// What the matrix kernel multiplies: 32-bit words, an fp32 each or (Pairs) two neighbouring bfloat16 of the summed
// dimension.
struct Singles {
  static constexpr int kPer = 1;
  static INLINE vf fma(vf acc, float a, vf b) { return acc + splat(a) * b; }
};
#if defined(__AVX512BF16__)
struct Pairs {
  static constexpr int kPer = 2;
  static INLINE vf fma(vf acc, float a, vf b) {
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)(__m512)splat(a), (__m512bh)(__m512)b);
  }
};
#endif

// c[R][V vectors] = fade * c + a[R][k] b[k][panel]; fade null: c is only written. The products are added up in chains
// of kChain, whose sums are added in turn: one long chain would lose twice what PyTorch's does.
template <class Word, int R, int V>
void multiply(const float* a, int64_t a_stride, const float* b, int k, const float* fade, float* c, int64_t c_stride) {
  for (int begin = 0; begin < k; begin += kChain) {
    vf acc[R][V];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = vf{};
    }
    const int end = begin + kChain < k ? begin + kChain : k;
    for (int i = begin; i < end; ++i, b += kPanel) {
      vf x[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) x[v] = load(b + v * W);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const float y = a[r * a_stride + i];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[r][v] = Word::fma(acc[r][v], y, x[v]);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      float* p = c + r * c_stride;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        if (begin > 0)
          acc[r][v] += load(p + v * W);
        else if (fade)
          acc[r][v] += load(p + v * W) * fade[r];
        store(p + v * W, acc[r][v]);
      }
    }
  }
}
template <class Word, int R>
INLINE void multiply_columns(int columns, const float* a, int64_t a_stride, const float* b, int k, const float* fade,
                             float* c, int64_t c_stride) {
  const int vectors = (columns + W - 1) / W;
  if constexpr (kBlockVectors == 4) {
    if (vectors >= 4) return multiply<Word, R, 4>(a, a_stride, b, k, fade, c, c_stride);
    if (vectors == 3) return multiply<Word, R, 3>(a, a_stride, b, k, fade, c, c_stride);
  }
  if (vectors >= 2) return multiply<Word, R, 2>(a, a_stride, b, k, fade, c, c_stride);
  return multiply<Word, R, 1>(a, a_stride, b, k, fade, c, c_stride);
}
template <class Word>
void multiply_rows(int rows, int columns, const float* a, int64_t a_stride, const float* b, int k, const float* fade,
                   float* c, int64_t c_stride) {
  switch (rows) {
    case 1:
      return multiply_columns<Word, 1>(columns, a, a_stride, b, k, fade, c, c_stride);
    case 2:
      return multiply_columns<Word, 2>(columns, a, a_stride, b, k, fade, c, c_stride);
    case 3:
      return multiply_columns<Word, 3>(columns, a, a_stride, b, k, fade, c, c_stride);
    case 4:
      return multiply_columns<Word, 4>(columns, a, a_stride, b, k, fade, c, c_stride);
    case 5:
      return multiply_columns<Word, 5>(columns, a, a_stride, b, k, fade, c, c_stride);
    default:
      return multiply_columns<Word, 6>(columns, a, a_stride, b, k, fade, c, c_stride);
  }
}

// W words of key row p from word i on; the row has `words` of them.
template <class E, int kPer>
INLINE vf key_words(const E* p, int i, int words) {
  if constexpr (kPer == 1) {
    return load_first(p + i, int(min64(W, words - i)));
  } else if constexpr (__is_same(E, BF16)) {
    return (vf)Woven::words(p + 2 * i, int(min64(2 * (words - i), 2 * W)));
  } else {
#if defined(__AVX512BF16__)
    vf a, b;
    Plain<E>::load2(p + 2 * i, int(min64(2 * (words - i), 2 * W)), a, b);
    return (vf)(__m512)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);  // exact: int8 and fp8 fit in bfloat16
#endif
  }
}
// Keys [n][D] -> panels of kPanel keys, each [words of D][kPanel].
template <class E, int kPer>
void pack_keys(const Tile& tile, int64_t offset, int d, float* to) {
  const int words = d / kPer;
  for (int j = 0; j < tile.n; j += W) {
    float* column = to + (j / kPanel) * int64_t(words) * kPanel + j % kPanel;
    for (int i = 0; i < words; i += W) {
      vf x[W];
#pragma GCC unroll 16
      for (int key = 0; key < W; ++key) x[key] = key_words<E, kPer>((const E*)(tile.k[j + key] + offset), i, words);
      transpose(x);
      const int stop = int(min64(W, words - i));
      for (int w = 0; w < stop; ++w) store(column + int64_t(i + w) * kPanel, x[w]);
    }
  }
}
// Values [n][D] -> panels of kPanel columns, each [n / kPer][kPanel].
template <class E, int kPer>
void pack_values(const Tile& tile, int64_t offset, int d, float* to) {
  using S = E;
  for (int j = 0; j < tile.n; j += kPer) {
    const auto* p = (const S*)(tile.v[j] + offset);
    const auto* p1 = (const S*)(tile.v[j + kPer - 1] + offset);
    for (int i = 0; i < d; i += W) {
      const int n = int(min64(d - i, W));
      vf x = load_first(p + i, n);
      if constexpr (kPer == 2) {
        const vf y = j + 1 < tile.n ? load_first(p1 + i, n) : vf{};
        x = (vf)(((vu)x >> 16) | ((vu)y & 0xffff0000u));
      }
      store(to + (i / kPanel) * int64_t(kTile / kPer) * kPanel + (j / kPer) * int64_t(kPanel) + i % kPanel, x);
    }
  }
}

struct TiledScratch {
  float *q, *o, *s, *max, *sum, *fade;
  float *k, *v, *k_scale, *v_scale;
  Tile* tile;
  int64_t q_stride, o_stride, bytes;
  TiledScratch(const AttentionArgs& a, const AttentionItem& it, char* base) {
    Arena arena{base, 0};
    const int64_t rows = it.row_end - it.row_begin;
    q_stride = o_stride = part_stride(a);
    q = arena.take<float>(rows * q_stride);
    o = arena.take<float>(rows * o_stride);
    s = arena.take<float>(rows * kS);
    max = arena.take<float>(rows);
    sum = arena.take<float>(rows);
    fade = arena.take<float>(rows);
    k = arena.take<float>(int64_t(a.head_dim) * round_up(kTile, kPanel));
    v = arena.take<float>(kTile * round_up(a.head_dim, kPanel));
    k_scale = arena.take<float>(kS);
    v_scale = arena.take<float>(kS);
    tile = arena.take<Tile>(1);
    bytes = arena.used;
  }
};

template <class E, class Word>
void run_tiled(const AttentionArgs& a, const AttentionItem& it, const AttentionPartials* parts, int64_t part_rows,
               char* base) {
  constexpr int kBytes = sizeof(E), kPer = Word::kPer;
  TiledScratch x(a, it, base);
  const int d = a.head_dim, rows = it.row_end - it.row_begin, head = it.head_begin, words = d / kPer;
  for (int m = 0; m < rows; ++m) {
    const int64_t from = query_offset(a, it, head, it.row_begin + m);
    float* to = x.q + m * x.q_stride;
    if (kPer == 2)
      memcpy(to, (const uint16_t*)a.q + from, d * 2);
    else
      load_query(a, false, from, a.scale, to);
    x.max[m] = -kInf;
    x.sum[m] = 0;
  }
  memset(x.o, 0, rows * x.o_stride * sizeof(float));
  const Range all = rows_keys(a, it, it.row_begin, it.row_end);
  for (int64_t begin = all.begin; begin < all.end; begin += kTile) {
    Tile& tile = *x.tile;
    locate<kBytes>(a, it.sequence, begin, min64(begin + kTile, all.end), tile);
    pack_keys<E, kPer>(tile, head * a.k_stride_h * kBytes, d, x.k);
    pack_values<E, kPer>(tile, head * a.v_stride_h * kBytes, d, x.v);
    Logits f{kPer == 2 ? a.scale : 1.f, a.softcap, 0, nullptr, nullptr};
    f.k_scale = gather_scales(a.k_scale, tile, a.kv_heads, head, x.k_scale);
    f.v_scale = gather_scales(a.v_scale, tile, a.kv_heads, head, x.v_scale);
    // Of a block of rows only the keys before `stop` are multiplied: half of a tile on the diagonal.
    auto each_block = [&](auto body) __attribute__((always_inline)) {
      for (int m = 0; m < rows; m += kBlockRows) {
        const int count = int(min64(kBlockRows, rows - m));
        const Range r = rows_keys(a, it, it.row_begin + m, it.row_begin + m + count);
        const int stop = int(min64(r.end - begin, tile.n));
        if (stop > 0 && r.begin < begin + tile.n) body(m, count, stop);
      }
    };
    for (int panel = 0; panel < tile.n; panel += kPanel)
      each_block([&](int m, int count, int stop) __attribute__((always_inline)) {
        if (panel < stop)
          multiply_rows<Word>(count, stop - panel, x.q + m * x.q_stride, x.q_stride, x.k + int64_t(panel) * words,
                              words, nullptr, x.s + m * kS + panel, kS);
      });
    each_block([&](int m, int count, int stop) __attribute__((always_inline)) {
      for (int i = m; i < m + count; ++i) {
        const Range r = row_keys(a, it, it.row_begin + i);
        const int lo = int(max64(0, min64(r.begin - begin, kTile))), hi = int(max64(0, min64(r.end - begin, tile.n)));
        f.slope = a.alibi_slopes ? a.alibi_slopes[head * a.group + (it.row_begin + i) % a.group] : 0.f;
        x.fade[i] = softmax<kPer == 2>(f, x.s + i * kS, stop, lo, hi,
                                       float(begin) - query_position(a, it, it.row_begin + i), x.max[i], x.sum[i]);
      }
    });
    for (int panel = 0; panel < d; panel += kPanel)
      each_block([&](int m, int count, int stop) __attribute__((always_inline)) {
        multiply_rows<Word>(count, d - panel, x.s + m * kS, kS, x.v + int64_t(panel) * (kTile / kPer),
                            (stop + kPer - 1) / kPer, x.fade + m, x.o + m * x.o_stride + panel, x.o_stride);
      });
  }
  for (int m = 0; m < rows; ++m)
    finish(a, it, parts, part_rows, head, it.row_begin + m, x.o + m * x.o_stride, x.max[m], x.sum[m]);
}

// ---- the table ------------------------------------------------------------------------------------------------------

int64_t scratch(const AttentionArgs* a, const AttentionItem* it) {
  return it->tiled ? TiledScratch(*a, *it, nullptr).bytes : DirectScratch(*a, *it, nullptr).bytes;
}

template <class E, class Direct>
INLINE void run_as(const AttentionArgs& a, const AttentionItem& it, const AttentionPartials* parts, int64_t part_rows,
                   char* base) {
  if (!it.tiled) return run_direct<Direct>(a, it, parts, part_rows, base);
#if defined(__AVX512BF16__)
  if constexpr (!__is_same(E, float) && !__is_same(E, F16))
    if (a.q_type == kBF16) return run_tiled<E, Pairs>(a, it, parts, part_rows, base);
  if constexpr (!__is_same(E, BF16)) run_tiled<E, Singles>(a, it, parts, part_rows, base);
#else
  run_tiled<E, Singles>(a, it, parts, part_rows, base);
#endif
}
void run(const AttentionArgs* a, const AttentionItem* it, const AttentionPartials* parts, int64_t part_rows,
         char* base) {
  switch (a->kv_type) {
    case kF32:
      return run_as<float, Plain<float>>(*a, *it, parts, part_rows, base);
    case kF16:
      return run_as<F16, Plain<F16>>(*a, *it, parts, part_rows, base);
    case kBF16:
      return run_as<BF16, Woven>(*a, *it, parts, part_rows, base);
    case kI8:
      return run_as<I8, Plain<I8>>(*a, *it, parts, part_rows, base);
    case kF8E4M3:
      return run_as<F8, Plain<F8>>(*a, *it, parts, part_rows, base);
  }
}

void combine(const AttentionArgs* a, const AttentionItem* it, const AttentionPartials* parts, int64_t part_rows,
             int splits) {
  const int64_t rows = int64_t(a->query_len[it->sequence]) * a->group;
  const int64_t stride = part_stride(*a);
  alignas(64) float o[256];
  for (int head = it->head_begin; head < it->head_end; ++head) {
    for (int m = it->row_begin; m < it->row_end; ++m) {
      const int64_t row = it->part_base + head * rows + m;
      float top = -kInf, total = 0;
      for (int s = 0; s < splits; ++s) {
        const float x = parts->max[s * part_rows + row];
        top = x > top ? x : top;
      }
      memset(o, 0, stride * sizeof(float));
      for (int s = 0; s < splits; ++s) {
        const int64_t at = s * part_rows + row;
        const float part_max = parts->max[at], part_sum = parts->sum[at];
        if (part_max == -kInf && part_sum == 0) continue;  // saw nothing
        const float w = top == -kInf ? 1.f : exp(splat(part_max - top))[0];
        total += part_sum * w;
        const float* p = parts->out + at * stride;
        for (int i = 0; i < stride; i += W) store(o + i, load(o + i) + load(p + i) * w);
      }
      write_out(*a, is_woven(*a, *it), a->query_start[it->sequence] + m / a->group, head * a->group + m % a->group, o,
                top, total);
    }
  }
}

template <class From, class To>
INLINE void merge_as(int64_t d, const void* a, float wa, const void* b, float wb, void* out) {
  using S = typename From::E;
  using R = typename To::E;
  // A side of weight 0 is not read: it may hold NaN.
  auto block = [&](const S* pa, const S* pb, R* po, int n) __attribute__((always_inline)) {
    vf x0{}, x1{}, y0{}, y1{};
    if (wa != 0) From::load2(pa, n, x0, x1);
    if (wb != 0) From::load2(pb, n, y0, y1);
    To::store2(po, n, x0 * wa + y0 * wb, x1 * wa + y1 * wb);
  };
  const S *pa = (const S*)a, *pb = (const S*)b;
  R* po = (R*)out;
  int64_t i = 0;
  for (; i + 8 <= d; i += 2 * W) block(pa + i, pb + i, po + i, int(min64(round_down(d - i, 8), 2 * W)));
  i = round_down(d, 8);
  if (const int rest = int(d - i)) {
    S ta[8] = {}, tb[8] = {};
    R to[8];
    memcpy(ta, pa + i, rest * sizeof(S));
    memcpy(tb, pb + i, rest * sizeof(S));
    block(ta, tb, to, 8);
    memcpy(po + i, to, rest * sizeof(R));
  }
}
void merge(AttentionType from, AttentionType to, int64_t d, const void* a, float wa, const void* b, float wb,
           void* out) {
  switch (to) {
    case kF32:
      return merge_as<Plain<float>, Plain<float>>(d, a, wa, b, wb, out);
    case kF16:
      return from == kF32 ? merge_as<Plain<float>, Plain<F16>>(d, a, wa, b, wb, out)
                          : merge_as<Plain<F16>, Plain<F16>>(d, a, wa, b, wb, out);
    default:
      return from == kF32 ? merge_as<Plain<float>, Plain<BF16>>(d, a, wa, b, wb, out)
                          : merge_as<Woven, Woven>(d, a, wa, b, wb, out);
  }
}

const AttentionKernels kTable{scratch, run, combine, merge};

}  // namespace

const AttentionKernels* PAGEDKV_ATTENTION_TABLE() { return &kTable; }

}  // namespace pagedkv
