// What attention needs of vectors beyond rows_vec.h: moving lanes between vectors, tanh, and elements in pairs of
// vectors.
#pragma once

#include <string.h>

#include "rows_vec.h"

#define INLINE inline __attribute__((always_inline))

namespace pagedkv {
namespace {

constexpr float kInf = __builtin_inff();

INLINE int64_t round_down(int64_t n, int64_t to) { return n / to * to; }
INLINE int64_t round_up(int64_t n, int64_t to) { return round_down(n + to - 1, to); }
INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE vf load(const float* p) { return raw<vf>(p, Full{}); }
INLINE void store(float* p, vf x) { put(p, x, Full{}); }

// The larger; the second where either is NaN.
INLINE vf max(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// ---- moving lanes ---------------------------------------------------------------------------------------------------

template <int... I>
struct Lanes {};
template <int N>
struct Numbers;
template <>
struct Numbers<4> {
  using type = Lanes<0, 1, 2, 3>;
};
template <>
struct Numbers<8> {
  using type = Lanes<0, 1, 2, 3, 4, 5, 6, 7>;
};
template <>
struct Numbers<16> {
  using type = Lanes<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;
};
using AllLanes = Numbers<W>::type;

template <int... I>
INLINE vi lane_numbers(Lanes<I...>) {
  return vi{I...};
}
// Of two vectors in blocks of H lanes: their even blocks, and their odd blocks.
template <int H, int... I>
INLINE vf even_blocks(vf a, vf b, Lanes<I...>) {
  return __builtin_shufflevector(a, b, ((I & H) ? I - H + W : I)...);
}
template <int H, int... I>
INLINE vf odd_blocks(vf a, vf b, Lanes<I...>) {
  return __builtin_shufflevector(a, b, ((I & H) ? I + W : I + H)...);
}

template <int H>
INLINE void transpose_step(vf* x) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if (i & H) continue;
    const vf a = x[i], b = x[i + H];
    x[i] = even_blocks<H>(a, b, AllLanes{});
    x[i + H] = odd_blocks<H>(a, b, AllLanes{});
  }
}
// W vectors of W lanes, transposed.
INLINE void transpose(vf* x) {
  if constexpr (W > 8) transpose_step<W / 2>(x);
  if constexpr (W > 4) transpose_step<4>(x);
  transpose_step<2>(x);
  transpose_step<1>(x);
}

template <int H>
INLINE void sum_step(vf* x) {
#pragma GCC unroll 16
  for (int i = 0; i < H; ++i)
    x[i] = even_blocks<H>(x[i], x[i + H], AllLanes{}) + odd_blocks<H>(x[i], x[i + H], AllLanes{});
}
// Lane i of the result is the sum of the lanes of x[i]; x is destroyed.
INLINE vf sum_each(vf* x) {
  if constexpr (W > 8) sum_step<W / 2>(x);
  if constexpr (W > 4) sum_step<4>(x);
  sum_step<2>(x);
  sum_step<1>(x);
  return x[0];
}
// Over all lanes, by halves.
template <int H = W / 2>
INLINE float sum_lanes(vf x) {
  x += odd_blocks<H>(x, x, AllLanes{});
  if constexpr (H > 1) return sum_lanes<H / 2>(x);
  return x[0];
}
template <int H = W / 2>
INLINE float max_lanes(vf x) {
  x = max(odd_blocks<H>(x, x, AllLanes{}), x);
  if constexpr (H > 1) return max_lanes<H / 2>(x);
  return x[0];
}

// tanh(x) within a few units in the last place: an odd polynomial near 0 (Cephes' tanhf), 1 - 2 / (exp(2x) + 1) beyond.
INLINE vf tanh(vf x) {
  const vf size = as<vf>(as<vu>(x) & 0x7fffffffu);
  const vf z = x * x;
  vf p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const vf near = p * z * x + x;
  const vf clamped = size > 16.f ? splat(16.f) : size;  // 1 from 9.01 on; NaN stays NaN
  const vf far = 1.f - 2.f / (exp(clamped + clamped) + 1.f);
  return size < 0.625f ? near : as<vf>(as<vu>(far) | (as<vu>(x) & 0x80000000u));
}

// ---- elements -------------------------------------------------------------------------------------------------------

// load() for the narrow types, in the instructions that GCC 12 does not find by itself.
template <class P>
INLINE vf fetch(const float* p, P part) {
  return load(p, part);
}
template <class P>
INLINE vf fetch(const F16* p, P part) {
  return load(p, part);
}
template <class P>
INLINE vf fetch(const BF16* p, P part) {
#if defined(__AVX512F__)
  return as<vf>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(as<__m256i>(raw<v16>(p, part))), 16));
#elif defined(__AVX2__)
  return as<vf>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(as<__m128i>(raw<v16>(p, part))), 16));
#else
  return load(p, part);
#endif
}
template <class P>
INLINE vf fetch(const I8* p, P part) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(as<__m128i>(raw<vs8>(p, part))));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_set1_epi64x(as<int64_t>(raw<vs8>(p, part)))));
#else
  return load(p, part);
#endif
}
// e4m3fn: the same bits 7 places up are a float16 2^8 times smaller, subnormals included; 0x7f and 0xff are NaN.
template <class P>
INLINE vf fetch(const F8* p, P part) {
#if defined(__AVX512F__)
  const __m256i h = _mm256_cvtepu8_epi16(as<__m128i>(raw<v8>(p, part)));
  const __m256i size = _mm256_and_si256(h, _mm256_set1_epi16(0x7f));
  const __m256i nan = _mm256_maskz_set1_epi16(_mm256_cmpeq_epi16_mask(size, _mm256_set1_epi16(0x7f)), 0x7c00);
  const __m256i sign = _mm256_slli_epi16(_mm256_xor_si256(h, size), 8);
  return _mm512_cvtph_ps(_mm256_or_si256(_mm256_or_si256(sign, nan), _mm256_slli_epi16(size, 7))) * 256.f;
#elif defined(__AVX2__)
  const __m128i h = _mm_cvtepu8_epi16(_mm_set1_epi64x(as<int64_t>(raw<v8>(p, part))));
  const __m128i size = _mm_and_si128(h, _mm_set1_epi16(0x7f));
  const __m128i nan = _mm_and_si128(_mm_cmpeq_epi16(size, _mm_set1_epi16(0x7f)), _mm_set1_epi16(0x7c00));
  const __m128i sign = _mm_slli_epi16(_mm_xor_si128(h, size), 8);
  return _mm256_cvtph_ps(_mm_or_si128(_mm_or_si128(sign, nan), _mm_slli_epi16(size, 7))) * 256.f;
#else
  return load(p, part);
#endif
}

// The first n of W elements; the others are 0. Head sizes are multiples of 8, so that n is 8 or all.
template <class E>
INLINE vf load_first(const E* p, int n) {
  if (n >= W) return fetch(p, Full{});
  return fetch(p, Part{n});
}
template <class E>
INLINE void store_first(E* p, vf x, int n) {
  if (n >= W) return store(p, x, Full{});
  store(p, x, Part{n});
}

// 2 W elements in two vectors; the forms with n load and store the first n only. Plain keeps the order. Woven is
// bfloat16 as its even and its odd elements, one shift and one mask; as q, k, v and the output are treated alike, the
// order is never seen.
template <class T>
struct Plain {
  using E = T;
  static INLINE void load2(const E* p, vf& a, vf& b) {
    a = fetch(p, Full{});
    b = fetch(p + W, Full{});
  }
  static INLINE void load2(const E* p, int n, vf& a, vf& b) {
    a = load_first(p, n);
    b = n > W ? load_first(p + W, n - W) : vf{};
  }
  static INLINE void store2(E* p, int n, vf a, vf b) {
    store_first(p, a, n);
    if (n > W) store_first(p + W, b, n - W);
  }
};
struct Woven {
  using E = BF16;
  static INLINE void split(vu words, vf& a, vf& b) {
    a = as<vf>(words << 16);
    b = as<vf>(words & 0xffff0000u);
  }
  // n bfloat16 as n / 2 words.
  static INLINE vu words(const E* p) { return raw<vu>(p, Full{}); }
  static INLINE vu words(const E* p, int n) { return n >= 2 * W ? words(p) : raw<vu>(p, Part{n / 2}); }
  static INLINE void load2(const E* p, vf& a, vf& b) { split(words(p), a, b); }
  static INLINE void load2(const E* p, int n, vf& a, vf& b) { split(words(p, n), a, b); }
  static INLINE void store2(E* p, int n, vf a, vf b) {
    const vu w = __builtin_convertvector(to_bfloat(a), vu) | __builtin_convertvector(to_bfloat(b), vu) << 16;
    if (n >= 2 * W) return put(p, w, Full{});
    put(p, w, Part{n / 2});
  }
};

}  // namespace
}  // namespace pagedkv
