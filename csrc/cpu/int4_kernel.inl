// y = x W^T for packed W of 4 or 8 bits (int4.h has the layouts), any number of rows of x.
//
// A vector holds outputs, W of them (W: floats in a vector), and a row's inputs are broadcast to it, so nothing is
// summed across lanes. Weights enter the products as the whole numbers q - 8, exactly, and are scaled as sums of a
// chunk (at most 128 inputs of one group):
//
//     y = sum over chunks of  scale * sum((q - 8) x) + c * sum(x),    c = scale (8 - zero) or offset + 8 scale
//
// (8 bits: q itself, and no c; Q4_K: scale = d * its 6 bits, offset = - dmin * its 6 bits, both exact in float32.)
//
// Words come apart without a mask: vpermw (vpermps) picks from a table by the low bits of a shifted word, 32 weights as
// bfloat16 pairs for vdpbf16ps, or 16 as float32; without AVX-512 two shifts sign-extend a nibble.
//
// Few rows: words are taken apart in registers, each once for all rows. More rows: a chunk of a block of outputs is
// taken apart once into the first-level cache (16 or 32 KiB), then multiplied with blocks of rows as in any matrix
// product.
//
// Floor: few rows, bytes of W / memory bandwidth; many, the multiply-adds.
#include "../int4.h"
#include "attention_vec.h"
#include "int4_kernel.h"

namespace pagedkv {
namespace {

constexpr int kBlockVectors = kInt4Block / W;
#if defined(__AVX512F__)
constexpr int kBlocks = 2, kFusedRows = 4, kPanelRows = 6;  // 24 sums, 4 weights, an input: 29 of 32 registers
#elif defined(__AVX2__)
constexpr int kBlocks = 1, kFusedRows = 2, kPanelRows = 3;  // 12 sums, a weight, an input of 16 registers
#else
constexpr int kBlocks = 1, kFusedRows = 1, kPanelRows = 1;
#endif

// ---- what a word holds ----------------------------------------------------------------------------------------------

INLINE vf to_floats(vi q) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(as<__m512i>(q));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(as<__m256i>(q));
#else
  return __builtin_convertvector(q, vf);
#endif
}

struct Nibbles {
  static constexpr int kWord = kInt4Word;  // inputs
  static INLINE vf number(vu w, int i) {
#if defined(__AVX512F__)
    const vf table = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
    return _mm512_permutexvar_ps(as<__m512i>(w >> int4_shift(i)), table);  // looks at the low four bits
#else
    return to_floats(as<vi>(w << (28 - int4_shift(i))) >> 28);
#endif
  }
#if defined(__AVX512BF16__)
  static INLINE __m512bh pair(vu w, int i) {  // of inputs 2 i and 2 i + 1
    using v32 = uint16_t __attribute__((vector_size(64)));
    // 0 .. 7, -8 .. -1 twice, as only five bits of an index count
    const v32 table = {0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0,
                       0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
                       0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80};
    const __m512i index = _mm512_srli_epi16(as<__m512i>(w), unsigned(4 * i));
    return (__m512bh)_mm512_permutexvar_epi16(index, as<__m512i>(table));
  }
#endif
};

struct Bytes {
  static constexpr int kWord = kInt8Word;
  static INLINE vf number(vu w, int i) { return to_floats(as<vi>(w << (24 - int8_shift(i))) >> 24); }
#if defined(__AVX512BF16__)
  static INLINE __m512bh pair(vu w, int i) {  // eight bits are a bfloat16's precision: the low half of the floats is 0
    return (__m512bh)as<__m512i>(as<vu>(number(w, 2 * i)) >> 16 | as<vu>(number(w, 2 * i + 1)));
  }
#endif
};

// ---- number formats of the products ---------------------------------------------------------------------------------

template <class T, class Code>
struct Floats {
  using E = T;
  using X = float;
  using Operand = vf;
  using Input = vf;
  static constexpr int kInputs = 1;  // of a step
  static constexpr int kWord = Code::kWord;
  static INLINE Operand decode(vu w, int step) { return Code::number(w, step); }
  static INLINE Input input(const X* x, int step) { return splat(x[step]); }
  static INLINE vf dot(Operand w, Input x, vf sum) { return fma(w, x, sum); }
  static INLINE void pack(const E* x, int64_t n, X* out) {
    each(n, [&](int64_t i, auto part) { store(out + i, load(x + i, part), part); });
  }
};

#if defined(__AVX512BF16__)
template <class Code>
struct Products {  // of pairs of bfloat16
  using E = BF16;
  using X = uint16_t;
  using Operand = __m512bh;
  using Input = __m512bh;
  static constexpr int kInputs = 2;
  static constexpr int kWord = Code::kWord;
  static INLINE Operand decode(vu w, int step) { return Code::pair(w, step); }
  static INLINE Input input(const X* x, int step) {
    uint32_t pair;
    memcpy(&pair, x + 2 * step, 4);
    return (__m512bh)_mm512_set1_epi32(int(pair));
  }
  static INLINE vf dot(Operand w, Input x, vf sum) { return _mm512_dpbf16_ps(sum, w, x); }
  static INLINE void pack(const E* x, int64_t n, X* out) {
    for (; n >= 2 * W; n -= 2 * W, x += 2 * W, out += 2 * W) _mm512_storeu_si512(out, _mm512_loadu_si512(x));
    if (n > 0) memcpy(out, x, size_t(2 * n));
  }
};
template <class Code>
using BF16Policy = Products<Code>;
#else
template <class Code>
using BF16Policy = Floats<BF16, Code>;
#endif

template <class P>
void pack(const Int4Task& t, const void* x, int64_t k, int64_t row, char* packed, float* sums) {
  using E = typename P::E;
  using X = typename P::X;
  const E* in = static_cast<const E*>(x);
  for (int64_t c = 0, at = 0; at < t.k_padded; ++c, at += t.chunk) {
    const int64_t size = min64(t.chunk, t.k_padded - at), n = max64(0, min64(size, k - at));
    X* out = reinterpret_cast<X*>(packed) + at * t.rows + row * size;
    P::pack(in + at, n, out);
    if (n < size) memset(out + n, 0, size_t(size - n) * sizeof(X));
    if (sums) {
      vf sum{};
      each(n, [&](int64_t i, auto part) { sum += load(in + at + i, part); });
      sums[c * t.rows + row] = sum_lanes(sum);
    }
  }
}

// ---- scales ---------------------------------------------------------------------------------------------------------

// Of `count` outputs from n on: what a chunk's sums of products and of inputs are multiplied by.
template <int V>
struct Factors {
  vf scale[V], shift[V];
};

template <class T, int V>
INLINE void load_factors(const Int4Scales& s, int64_t group, int64_t n, int count, Factors<V>& f) {
  const int64_t at = group * s.n + n;
  const T* scale = static_cast<const T*>(s.scales) + at;
  const bool full = count >= V * W;
  auto part = [&](int v) { return Part{int(max64(0, min64(W, count - v * W)))}; };
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) f.scale[v] = full ? fetch(scale + v * W, Full{}) : fetch(scale + v * W, part(v));
  if (s.zeros) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const uint8_t* zero = s.zeros + at + v * W;
      const vi z = as<vi>(full ? widen(raw<vs8>(zero, Full{})) : widen(raw<vs8>(zero, part(v))));
      f.shift[v] = f.scale[v] * __builtin_convertvector(8 - z, vf);
    }
  } else if (s.offsets) {
    const T* offset = static_cast<const T*>(s.offsets) + at;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
      f.shift[v] = fma(f.scale[v], splat(8.f), full ? fetch(offset + v * W, Full{}) : fetch(offset + v * W, part(v)));
  }
  const char* next = reinterpret_cast<const char*>(scale + V * W);  // of the next blocks
#pragma GCC unroll 8
  for (int i = 0; i < int(V * W * sizeof(T)); i += 64) __builtin_prefetch(next + i);
}
// Q4_K's: two numbers of 6 bits for each group, which eight groups' pair of float16 multiply.
template <int V>
INLINE void load_super_factors(const Int4Scales& s, int64_t group, int64_t n, int count, Factors<V>& f) {
  const int64_t at = group * s.n + n, super = group / kQ4KGroups * s.n + n;
  const F16 *d = static_cast<const F16*>(s.scales) + super, *dmin = static_cast<const F16*>(s.offsets) + super;
  auto load = [&](int v, auto part) {
    auto number = [&](const uint8_t* p) { return fetch(reinterpret_cast<const I8*>(p) + at + v * W, part); };
    f.scale[v] = fetch(d + v * W, part) * number(s.sub_scales);
    f.shift[v] = fma(f.scale[v], splat(8.f), -(fetch(dmin + v * W, part) * number(s.sub_mins)));
  };
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    if (count >= V * W)
      load(v, Full{});
    else
      load(v, Part{int(max64(0, min64(W, count - v * W)))});
  }
}
template <int V>
INLINE void load_factors(const Int4Scales& s, int64_t group, int64_t n, int count, Factors<V>& f) {
  if (s.sub_scales) return load_super_factors<V>(s, group, n, count, f);
  switch (s.dtype) {
    case kFloat16:
      return load_factors<F16>(s, group, n, count, f);
    case kBFloat16:
      return load_factors<BF16>(s, group, n, count, f);
    default:
      return load_factors<float>(s, group, n, count, f);
  }
}

// ---- results --------------------------------------------------------------------------------------------------------

template <class E>
INLINE void store_result(E* p, vf x) {
  store(p, x, Full{});
}
#if defined(__AVX512BF16__)
INLINE void store_result(BF16* p, vf x) { put(p, as<v16>(_mm512_cvtneps_pbh(x)), Full{}); }  // below 2^-126: 0
#endif

// The totals of `count` outputs of a row from n on -> y.
template <class E>
void finish(const Int4Task& t, int64_t row, int64_t n, int count, float* total) {
  const int64_t at = row * t.s.n + n;
  if (t.bias) {
    const E* bias = static_cast<const E*>(t.bias) + n;
    each(count, [&](int64_t i, auto part) { store(total + i, load(total + i, part) + load(bias + i, part), part); });
  }
  if (t.act != Act::kNone) t.activate(t.act, {total, nullptr, nullptr, total, count});
  if (t.residual) {
    const E* residual = static_cast<const E*>(t.residual) + at;
    each(count,
         [&](int64_t i, auto part) { store(total + i, load(total + i, part) + load(residual + i, part), part); });
  }
  E* y = static_cast<E*>(t.y) + at;
  int i = 0;
  for (; i + W <= count; i += W) store_result(y + i, load(total + i));
  if (i < count) store(y + i, load(total + i, Part{count - i}), Part{count - i});
}

// ---- products -------------------------------------------------------------------------------------------------------

// The words j of V vectors of outputs. The same of the next blocks are prefetched into the
// second-level cache: from memory that makes 28 GB/s of 21 (a row, 4096 x 4096), where a plain sum of floats makes 34.
template <int V>
INLINE void load_words(const uint32_t* block, int64_t block_words, int64_t j, vu (&w)[V]) {
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    const uint32_t* p = block + v / kBlockVectors * block_words + j * kInt4Block + v % kBlockVectors * W;
    w[v] = raw<vu>(p, Full{});
    __builtin_prefetch(p + V / kBlockVectors * block_words, 0, 2);
  }
}

// R rows, all chunks; words taken apart in registers.
template <class P, int R, int B>
INLINE void fused(const Int4Task& t, int64_t row, int64_t b) {
  constexpr int V = B * kBlockVectors, kSteps = P::kWord / P::kInputs;
  constexpr int kChains = R * V < 8 ? 2 : 1;  // sums that wait for each other
  using X = typename P::X;
  const int64_t n = b * kInt4Block, block_words = t.k_padded * (kInt4Block / P::kWord);
  const int count = int(min64(B * kInt4Block, t.s.n - n));
  const uint32_t* block = t.packed + b * block_words;
  vf total[R][V] = {};
  for (int64_t c = 0, at = 0; at < t.k_padded; ++c, at += t.chunk) {
    const int64_t size = min64(t.chunk, t.k_padded - at);
    const X* x = reinterpret_cast<const X*>(t.x) + at * t.rows + row * size;
    vf sum[kChains][R][V] = {};
    for (int64_t k = 0; k < size; k += P::kWord) {
      vu w[V];
      load_words(block, block_words, (at + k) / P::kWord, w);
#pragma GCC unroll 8
      for (int step = 0; step < kSteps; ++step) {
        typename P::Input in[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) in[r] = P::input(x + r * size + k, step);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
          const typename P::Operand weights = P::decode(w[v], step);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
            vf& to = sum[step % kChains][r][v];
            to = P::dot(weights, in[r], to);
          }
        }
      }
    }
    Factors<V> f{};
    load_factors(t.s, at / t.s.group, n, count, f);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const vf s = kChains == 2 ? sum[0][r][v] + sum[kChains - 1][r][v] : sum[0][r][v];
        total[r][v] = fma(f.scale[v], s, total[r][v]);
        if (t.sums) total[r][v] = fma(f.shift[v], splat(t.sums[c * t.rows + row + r]), total[r][v]);
      }
  }
  float out[V * W];
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(out + v * W, total[r][v]);
    finish<typename P::E>(t, row + r, n, count, out);
  }
}

// R rows, one chunk that lies taken apart in `panel`: [steps][V]. The first one sets the totals, the others add.
template <class P, int R, int V>
INLINE void multiply(const typename P::Operand* panel, const typename P::X* x, int64_t size, const Factors<V>& f,
                     const float* sums, bool first, float* total) {
  vf sum[R][V] = {};
  for (int64_t step = 0; step < size / P::kInputs; ++step) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const typename P::Input in = P::input(x + r * size, int(step));
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] = P::dot(panel[step * V + v], in, sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      float* to = total + r * V * W + v * W;
      vf y = first ? f.scale[v] * sum[r][v] : fma(f.scale[v], sum[r][v], load(to));
      if (sums) y = fma(f.shift[v], splat(sums[r]), y);
      store(to, y);
    }
}

template <class P, int B>
void panels(const Int4Task& t, int64_t b) {
  constexpr int V = B * kBlockVectors, kSteps = P::kWord / P::kInputs;
  using X = typename P::X;
  const int64_t n = b * kInt4Block, block_words = t.k_padded * (kInt4Block / P::kWord);
  const int count = int(min64(B * kInt4Block, t.s.n - n));
  const uint32_t* block = t.packed + b * block_words;
  typename P::Operand panel[kInt4Chunk / P::kInputs * V];
  float total[kInt4Rows * V * W];
  if (t.k_padded == 0) memset(total, 0, size_t(t.rows) * V * W * sizeof(float));
  for (int64_t c = 0, at = 0; at < t.k_padded; ++c, at += t.chunk) {
    const int64_t size = min64(t.chunk, t.k_padded - at);
    for (int64_t k = 0; k < size; k += P::kWord) {
      vu w[V];
      load_words(block, block_words, (at + k) / P::kWord, w);
#pragma GCC unroll 8
      for (int step = 0; step < kSteps; ++step)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) panel[(k / P::kInputs + step) * V + v] = P::decode(w[v], step);
    }
    Factors<V> f{};
    load_factors(t.s, at / t.s.group, n, count, f);
    const X* x = reinterpret_cast<const X*>(t.x) + at * t.rows;
    const float* sums = t.sums ? t.sums + c * t.rows : nullptr;
    for (int64_t row = 0; row < t.rows;) {
      const int64_t left = t.rows - row, rows = left / ((left + kPanelRows - 1) / kPanelRows);
      const X* in = x + row * size;
      const float* s = sums ? sums + row : nullptr;
      float* to = total + row * V * W;
      switch (rows) {
#define PAGEDKV_ROWS(R)                                                                  \
  case R:                                                                                \
    if constexpr (R <= kPanelRows) multiply<P, R, V>(panel, in, size, f, s, c == 0, to); \
    break;
        PAGEDKV_ROWS(1)
        PAGEDKV_ROWS(2)
        PAGEDKV_ROWS(3)
        PAGEDKV_ROWS(4)
        PAGEDKV_ROWS(5)
        PAGEDKV_ROWS(6)
#undef PAGEDKV_ROWS
      }
      row += rows;
    }
  }
  for (int64_t row = 0; row < t.rows; ++row) finish<typename P::E>(t, row, n, count, total + row * V * W);
}

template <class P, int B>
void columns(const Int4Task& t, int64_t b) {
  switch (t.rows) {
#define PAGEDKV_ROWS(R)                                            \
  case R:                                                          \
    if constexpr (R <= kFusedRows) return fused<P, R, B>(t, 0, b); \
    break;
    PAGEDKV_ROWS(1)
    PAGEDKV_ROWS(2)
    PAGEDKV_ROWS(3)
    PAGEDKV_ROWS(4)
#undef PAGEDKV_ROWS
  }
  panels<P, B>(t, b);
}

template <class P>
void run(const Int4Task& t, int64_t begin, int64_t end) {
  int64_t b = begin;
  for (; b + kBlocks <= end; b += kBlocks) columns<P, kBlocks>(t, b);
  if constexpr (kBlocks > 1)
    for (; b < end; ++b) columns<P, 1>(t, b);
}

}  // namespace

extern const Int4Kernels PAGEDKV_INT4_TABLE;
const Int4Kernels PAGEDKV_INT4_TABLE = {
    {sizeof(float), sizeof(float), sizeof(BF16Policy<Nibbles>::X)},
    {pack<Floats<float, Nibbles>>, pack<Floats<F16, Nibbles>>, pack<BF16Policy<Nibbles>>},
    {{run<Floats<float, Nibbles>>, run<Floats<F16, Nibbles>>, run<BF16Policy<Nibbles>>},
     {run<Floats<float, Bytes>>, run<Floats<F16, Bytes>>, run<BF16Policy<Bytes>>}},
};

}  // namespace pagedkv
